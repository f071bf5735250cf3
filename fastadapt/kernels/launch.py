"""What the operators call for CUDA tensors: scratch, grids, outputs. Nothing here synchronises.

A call scans the rows (one read: maxima, and a list of each row's largest), weighs those whose first
filter asks for it (one more), and then one program a row decides, mostly from the list. Rows are
split over several programs where there are few.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from fastadapt.kernels import draw, law, scan, top, write
from fastadapt.kernels.rows import LAW_SIZE

NUM_KNOBS = 8
# Without a limit, assemblers for sm_80 stop at 128 or 168 registers and spill.
COLLECTING: dict[str, object] = {"num_warps": 4, "maxnreg": 255, "enable_fp_fusion": False}
DECIDING: dict[str, object] = {**COLLECTING, "num_warps": 8}
NARROW_WARPS, WIDE_WARPS = 4, 8  # of the passes over rows


class Plan(NamedTuple):
    """Sizes that change how soon a kernel is done, never what it computes; powers of two."""

    block: int = 1024  # logits whose mass is one number; what the deciding kernels look at together
    wide: int = 4  # blocks that a program of the first pass reads at once, where rows are many
    wide_weigh: int = 2  # and of the second
    list_size: int = 2048  # of a row's largest
    sample_size: int = 1024  # of a row, from which the floor of its list is guessed
    bins: int = 512
    scratch_bytes: int = 1 << 28  # of virtual rows at a time

    def row_bytes(self, v: int) -> int:
        """Scratch of a virtual row."""
        return 16 * self.list_size + 36 * -(-v // self.block)


PLAN = Plan()


@lru_cache
def _programs(device: torch.device) -> int:
    """How many programs keep a device busy: 4 a multiprocessor."""
    if device.type != "cuda":  # Triton's interpreter
        return 4
    return 4 * int(torch.cuda.get_device_properties(device).multi_processor_count)


class Rows(NamedTuple):
    """Scanned and weighed rows: what the deciding kernels share."""

    arguments: tuple[Tensor | int, ...]  # in the kernels' order
    constants: dict[str, object]
    base_sums: Tensor
    base_surprisal_sums: Tensor
    parts: Tensor  # (N, splits)
    splits: int
    blocks: int


def _scan(
    logits: Tensor,
    knobs: Tensor,
    order: int,
    plan: Plan,
    *,
    all_weighed: bool = False,
    base: bool = False,
    entropy: bool = False,
) -> Rows:
    """Scans and weighs rows of logits, each once for each of the adaptors.

    Args:
        logits (Tensor): (N, V), any row stride, N > 0.
        knobs (Tensor): (A, 8, R) float64, R = 1 or N.
        order (int): code of the order of the filters.
        plan (Plan): sizes.
        all_weighed (bool): weigh also the rows whose first filter does not ask for it.
        base (bool): weigh at temperature 1 too.
        entropy (bool): with `base`, surprisals of it too.
    """
    n, v = logits.shape
    adaptors, _, knob_step = knobs.shape
    rows = n * adaptors
    blocks = triton.cdiv(v, plan.block)
    programs = _programs(logits.device)
    # few rows are read a block a program, so that all multiprocessors take part
    many = rows * blocks >= programs * plan.wide
    scanned, weighed = (plan.wide, plan.wide_weigh) if many else (1, 1)
    splits = max(1, min(-(-blocks // scanned), programs // rows))
    parts = logits.new_empty(n, splits, dtype=torch.float32)
    count = logits.new_zeros(rows, dtype=torch.int32)
    lists = logits.new_empty(2, rows, plan.list_size, dtype=torch.float32)
    ids = logits.new_empty(2, rows, plan.list_size, dtype=torch.int32)
    floors = logits.new_empty(rows, dtype=torch.float32)
    sums = logits.new_empty(4, rows, blocks, dtype=torch.int64)
    finite = logits.new_empty(rows, blocks, dtype=torch.int32)
    row = (logits, logits.stride(0), v, knobs, adaptors, knob_step, int(knob_step > 1), order)
    scan.scan_kernel[(rows, splits)](
        *row,
        parts,
        count,
        lists[0],
        ids[0],
        floors,
        splits,
        BLOCK=plan.block * scanned,
        LIST=plan.list_size,
        SAMPLE=plan.sample_size,
        num_warps=WIDE_WARPS if many else NARROW_WARPS,
        enable_fp_fusion=False,
    )
    scan.weigh_kernel[(rows, splits)](
        *row,
        parts,
        splits,
        *sums,
        finite,
        blocks,
        ALWAYS=all_weighed or base,
        BASE=base,
        BASE_SURPRISAL=entropy,
        BLOCK=plan.block,
        TOGETHER=weighed,
        SPLITS=triton.next_power_of_2(splits),
        num_warps=NARROW_WARPS,
        enable_fp_fusion=False,
    )
    found = (count, lists[0], ids[0], floors, lists[1], ids[1])
    constants: dict[str, object] = {
        "ALL_WEIGHED": all_weighed or base,
        "BLOCK": plan.block,
        "LIST": plan.list_size,
        "BINS": plan.bins,
        "SPLITS": triton.next_power_of_2(splits),
        "BLOCKS": triton.next_power_of_2(blocks),
        **DECIDING,
    }
    arguments = (*row, parts, splits, *found, sums[0], sums[1], finite, blocks)
    return Rows(arguments, constants, sums[2], sums[3], parts, splits, blocks)


def _slices(logits: Tensor, adaptors: int, plan: Plan) -> list[slice]:
    """Rows at a time, so that scratch stays within its bytes."""
    n, v = logits.shape
    step = max(1, plan.scratch_bytes // (adaptors * plan.row_bytes(v)))
    return [slice(i, min(i + step, n)) for i in range(0, n, step)]


def _part(knobs: Tensor, rows: slice) -> Tensor:
    """Knobs (A, 8, R) of some rows."""
    return knobs if knobs.shape[2] == 1 else knobs[:, :, rows].contiguous()


def sample(
    logits: Tensor,
    knobs: Tensor,
    order: int,
    seeds: Tensor,
    positions: Tensor | None,
    out: list[Tensor],
    base_logprobs: Tensor | None,
    log_mass: Tensor | None,
    top_out: list[Tensor],
    plan: Plan = PLAN,
) -> None:
    """Draws. `out`: tokens, logprobs, kept, status; `top_out`: ids, logprobs, rank, or nothing."""
    for at in _slices(logits, 1, plan):
        rows = _scan(
            logits[at],
            _part(knobs[None], at),
            order,
            plan,
            all_weighed=log_mass is not None,
            base=base_logprobs is not None or bool(top_out),
        )
        tokens, logprobs, kept, status = (t[at] for t in out)
        draw.sample_kernel[(len(tokens),)](
            *rows.arguments,
            rows.base_sums,
            seeds[at],
            seeds[at] if positions is None else positions[at],
            tokens,
            logprobs,
            kept,
            status,
            logprobs if base_logprobs is None else base_logprobs[at],
            logprobs if log_mass is None else log_mass[at],
            POSITIONS=positions is not None,
            BASE=base_logprobs is not None,
            LOG_MASS=log_mass is not None,
            **rows.constants,
        )
        if top_out:
            _top(logits[at], rows, tokens, status, [t[at] for t in top_out], plan)


def _top(
    logits: Tensor, rows: Rows, tokens: Tensor, status: Tensor, out: list[Tensor], plan: Plan
) -> None:
    """The most probable tokens and the rank of the drawn one."""
    number = out[0].shape[1]
    spare = logits.new_empty(2, logits.shape[0], plan.list_size, dtype=torch.int32)
    shared = {key: rows.constants[key] for key in ("LIST", "SPLITS")}
    top.top_kernel[(logits.shape[0],)](
        logits,
        logits.stride(0),
        logits.shape[1],
        rows.parts,
        rows.splits,
        rows.blocks,
        status,
        tokens,
        number,
        spare[0].view(torch.float32),
        spare[1],
        out[2],
        BLOCK=plan.block,
        BINS=plan.bins,
        **COLLECTING,
        **shared,
    )
    top.sort_kernel[(logits.shape[0],)](
        logits,
        logits.stride(0),
        rows.parts,
        rows.splits,
        rows.base_sums,
        rows.blocks,
        status,
        number,
        spare[1],
        *out[:2],
        TOP=triton.next_power_of_2(number),
        BLOCKS=rows.constants["BLOCKS"],
        enable_fp_fusion=False,
        **shared,
    )


def _laws(logits: Tensor, knobs: Tensor, order: int, plan: Plan) -> tuple[Rows, Tensor]:
    """Decides every row: (N, LAW_SIZE)."""
    rows = _scan(logits, knobs[None], order, plan)
    laws = logits.new_empty(logits.shape[0], LAW_SIZE.value, dtype=torch.int64)
    law.law_kernel[(logits.shape[0],)](*rows.arguments, laws, **rows.constants)
    return rows, laws


def _row_arguments(logits: Tensor, knobs: Tensor) -> tuple[Tensor | int, ...]:
    """What the writing kernels need to know of rows and knobs (8, R)."""
    step = knobs.shape[1]
    return logits, logits.stride(0), logits.shape[1], knobs, step, int(step > 1)


def filter_logits(
    logits: Tensor, knobs: Tensor, order: int, out: Tensor, plan: Plan = PLAN
) -> None:
    """Writes what an adaptor leaves."""
    for at in _slices(logits, 1, plan):
        part = _part(knobs[None], at)[0]
        rows, laws = _laws(logits[at], part, order, plan)
        write.filter_kernel[(len(laws), rows.blocks)](
            *_row_arguments(logits[at], part),
            rows.parts,
            rows.splits,
            laws,
            out[at],
            BLOCK=plan.block,
            SPLITS=rows.constants["SPLITS"],
            enable_fp_fusion=False,
        )


def score(
    logits: Tensor,
    tokens: Tensor,
    knobs: Tensor,
    order: int,
    ignore_index: int,
    out: tuple[Tensor, ...],
    plan: Plan = PLAN,
) -> None:
    """Scores tokens under the adaptors of one order; knobs (A, 8, R), outputs (N, A) and (N,)."""
    adaptors = knobs.shape[0]
    for at in _slices(logits, adaptors, plan):
        rows = _scan(logits[at], _part(knobs, at), order, plan, base=True, entropy=True)
        law.score_kernel[(len(tokens[at]) * adaptors,)](
            *rows.arguments,
            rows.base_sums,
            rows.base_surprisal_sums,
            tokens[at],
            ignore_index,
            *(t[at] for t in out),
            **rows.constants,
        )


def adapted_margins(
    logits: Tensor,
    tokens: Tensor,
    knobs: Tensor,
    order: int,
    ignore_index: int,
    out: tuple[Tensor, Tensor, Tensor],
    plan: Plan = PLAN,
) -> None:
    """Margins, support and statistics."""
    for at in _slices(logits, 1, plan):
        part = _part(knobs[None], at)[0]
        margins, support, stats = (t[at] for t in out)
        rows, laws = _laws(logits[at], part, order, plan)
        n, double = len(laws), logits.dtype == torch.float64
        largest = logits.new_empty(n, rows.blocks, dtype=torch.float64)
        row = _row_arguments(logits[at], part)
        write.support_kernel[(n, rows.blocks)](
            *row,
            rows.parts,
            rows.splits,
            laws,
            tokens[at],
            ignore_index,
            support,
            largest,
            rows.blocks,
            DOUBLE=double,
            BLOCK=plan.block,
            SPLITS=rows.constants["SPLITS"],
            enable_fp_fusion=False,
        )
        write.margin_kernel[(n,)](
            *row,
            laws,
            tokens[at],
            ignore_index,
            support,
            largest,
            rows.blocks,
            margins,
            stats,
            DOUBLE=double,
            BLOCK=plan.block,
            BLOCKS=rows.constants["BLOCKS"],
            enable_fp_fusion=False,
        )


def adapted_margins_backward(
    dmargins: Tensor,
    logits: Tensor,
    tokens: Tensor,
    knobs: Tensor,
    ignore_index: int,
    support: Tensor,
    stats: Tensor,
    out: Tensor,
    plan: Plan = PLAN,
) -> None:
    """One read of the logits, one write of their gradient."""
    n, v = logits.shape
    write.margin_backward_kernel[(n, triton.cdiv(v, plan.block))](
        dmargins,
        *_row_arguments(logits, knobs),
        tokens,
        ignore_index,
        support,
        stats,
        out,
        DOUBLE=logits.dtype == torch.float64,
        BLOCK=plan.block,
        enable_fp_fusion=False,
    )
