"""What the operators call for CUDA tensors: scratch, grids, outputs. Nothing here synchronises.

A call scans the rows (one read: maxima, and a list of each row's largest), weighs those whose first
filter asks for it (one more), and then one program a row decides, mostly from the list. Rows are
split over several programs where there are few.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import next_power_of_2

from fastadapt.kernels import draw, law, scan, top, write
from fastadapt.kernels.bundles import (
    Adaptors,
    Chance,
    Drawn,
    Labels,
    Lists,
    Parts,
    Rows,
    Scored,
    Sizes,
    Support,
    Weights,
)
from fastadapt.kernels.rows import LAW_SIZE

PASS: dict[str, object] = {"num_warps": 4, "enable_fp_fusion": False}
# Without a limit, assemblers for sm_80 stop at 128 or 168 registers and spill.
COLLECTING: dict[str, object] = {**PASS, "maxnreg": 255}
DECIDING: dict[str, object] = {**COLLECTING, "num_warps": 8}
WIDE_PASS: dict[str, object] = {**PASS, "num_warps": 8}


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


class Scan(NamedTuple):
    """Scanned and weighed rows: what the deciding kernels are given, in their order."""

    rows: Rows
    adaptors: Adaptors
    parts: Parts
    lists: Lists
    weights: Weights


class Options(NamedTuple):
    """What is asked of a scan."""

    all_weighed: bool = False  # weigh also the rows whose first filter does not ask for it
    base: bool = False  # weigh at temperature 1 too
    entropy: bool = False  # with `base`, surprisals of it too


def adaptors_of(knobs: Tensor, order: int) -> Adaptors:
    """Knobs (A, 8, R) and the code of the order of their filters."""
    return Adaptors(knobs, knobs.shape[0], knobs.shape[2], int(knobs.shape[2] > 1), order)


def sizes_of(plan: Plan, splits: int, blocks: int) -> Sizes:
    """Constants of the deciding kernels."""
    numbers = (
        plan.block,
        plan.list_size,
        plan.bins,
        next_power_of_2(splits),
        next_power_of_2(blocks),
    )
    return Sizes(*map(tl.constexpr, numbers))


def _scan(
    logits: Tensor, knobs: Tensor, order: int, plan: Plan, options: Options
) -> tuple[Scan, Sizes]:
    """Scans and weighs rows of logits (N, V), N > 0, each once for each of the adaptors."""
    n, v = logits.shape
    rows, adaptors = Rows(logits, logits.stride(0), v), adaptors_of(knobs, order)
    virtual = n * adaptors.number
    blocks = triton.cdiv(v, plan.block)
    programs = _programs(logits.device)
    # few rows are read a block a program, so that all multiprocessors take part
    many = virtual * blocks >= programs * plan.wide
    scanned, weighed = (plan.wide, plan.wide_weigh) if many else (1, 1)
    splits = max(1, min(-(-blocks // scanned), programs // virtual))
    parts = Parts(logits.new_empty(n, splits, dtype=torch.float32), splits)
    listed, spare = logits.new_empty(2, virtual, plan.list_size, dtype=torch.float32)
    listed_ids, spare_ids = logits.new_empty(2, virtual, plan.list_size, dtype=torch.int32)
    lists = Lists(
        logits.new_zeros(virtual, dtype=torch.int32),
        logits.new_empty(virtual, dtype=torch.float32),
        listed,
        listed_ids,
        spare,
        spare_ids,
    )
    sums, surprisals, base_sums, base_surprisals = logits.new_empty(
        4, virtual, blocks, dtype=torch.int64
    )
    finite = logits.new_empty(virtual, blocks, dtype=torch.int32)
    weights = Weights(sums, surprisals, base_sums, base_surprisals, finite, blocks)
    sizes = sizes_of(plan, splits, blocks)
    scan.scan_kernel[(virtual, splits)](
        rows,
        adaptors,
        parts,
        lists,
        BLOCK=plan.block * scanned,
        LIST=plan.list_size,
        SAMPLE=plan.sample_size,
        **(WIDE_PASS if many else PASS),
    )
    scan.weigh_kernel[(virtual, splits)](
        rows,
        adaptors,
        parts,
        weights,
        ALWAYS=options.all_weighed or options.base,
        BASE=options.base,
        BASE_SURPRISAL=options.entropy,
        BLOCK=plan.block,
        TOGETHER=weighed,
        SPLITS=sizes.SPLITS.value,
        **PASS,
    )
    return Scan(rows, adaptors, parts, lists, weights), sizes


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
    options = Options(log_mass is not None, base_logprobs is not None or bool(top_out))
    for at in _slices(logits, 1, plan):
        scanned, sizes = _scan(logits[at], _part(knobs[None], at), order, plan, options)
        tokens, logprobs, kept, status = (t[at] for t in out)
        drawn = Drawn(
            tokens,
            logprobs,
            kept,
            status,
            logprobs if base_logprobs is None else base_logprobs[at],
            logprobs if log_mass is None else log_mass[at],
        )
        draw.sample_kernel[(len(tokens),)](
            *scanned,
            Chance(seeds[at], seeds[at] if positions is None else positions[at]),
            drawn,
            POSITIONS=positions is not None,
            BASE=base_logprobs is not None,
            LOG_MASS=log_mass is not None,
            ALL_WEIGHED=options.all_weighed or options.base,
            sizes=sizes,
            **DECIDING,
        )
        if top_out:
            _top(scanned, sizes, drawn, [t[at] for t in top_out])


def _top(scanned: Scan, sizes: Sizes, drawn: Drawn, out: list[Tensor]) -> None:
    """The most probable tokens and the rank of the drawn one."""
    rows, parts, lists = scanned.rows, scanned.parts, scanned.lists
    n, number = out[0].shape
    shared = {name: getattr(sizes, name).value for name in ("LIST", "SPLITS")}
    top.top_kernel[(n,)](
        rows,
        parts,
        drawn,
        number,
        lists,
        out[2],
        BLOCK=sizes.BLOCK.value,
        BINS=sizes.BINS.value,
        **shared,
        **COLLECTING,
    )
    top.sort_kernel[(n,)](
        rows,
        parts,
        scanned.weights,
        drawn,
        number,
        lists,
        *out[:2],
        BLOCKS=sizes.BLOCKS.value,
        TOP=next_power_of_2(number),
        **shared,
        **PASS,
    )


def _laws(logits: Tensor, knobs: Tensor, order: int, plan: Plan) -> tuple[Scan, Sizes, Tensor]:
    """Decides every row: (N, LAW_SIZE)."""
    scanned, sizes = _scan(logits, knobs, order, plan, Options())
    laws = logits.new_empty(logits.shape[0], LAW_SIZE.value, dtype=torch.int64)
    law.law_kernel[(len(laws),)](*scanned, laws, ALL_WEIGHED=False, sizes=sizes, **DECIDING)
    return scanned, sizes, laws


def filter_logits(
    logits: Tensor, knobs: Tensor, order: int, out: Tensor, plan: Plan = PLAN
) -> None:
    """Writes what an adaptor leaves."""
    for at in _slices(logits, 1, plan):
        scanned, sizes, laws = _laws(logits[at], _part(knobs[None], at), order, plan)
        write.filter_kernel[(len(laws), scanned.weights.blocks)](
            *scanned[:3],
            laws,
            out[at],
            BLOCK=plan.block,
            SPLITS=sizes.SPLITS.value,
            **PASS,
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
    options = Options(base=True, entropy=True)
    for at in _slices(logits, adaptors, plan):
        scanned, sizes = _scan(logits[at], _part(knobs, at), order, plan, options)
        law.score_kernel[(len(tokens[at]) * adaptors,)](
            *scanned,
            Labels(tokens[at], ignore_index),
            Scored(*(t[at] for t in out)),
            ALL_WEIGHED=True,
            sizes=sizes,
            **DECIDING,
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
    double = logits.dtype == torch.float64
    for at in _slices(logits, 1, plan):
        margins, support, stats = (t[at] for t in out)
        scanned, sizes, laws = _laws(logits[at], _part(knobs[None], at), order, plan)
        n, blocks = len(laws), scanned.weights.blocks
        largest = logits.new_empty(n, blocks, dtype=torch.float64)
        labels, kept = Labels(tokens[at], ignore_index), Support(support, largest, blocks)
        write.support_kernel[(n, blocks)](
            *scanned[:3],
            laws,
            labels,
            kept,
            DOUBLE=double,
            BLOCK=plan.block,
            SPLITS=sizes.SPLITS.value,
            **PASS,
        )
        write.margin_kernel[(n,)](
            *scanned[:2],
            laws,
            labels,
            kept,
            margins,
            stats,
            DOUBLE=double,
            BLOCK=plan.block,
            BLOCKS=sizes.BLOCKS.value,
            **PASS,
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
        Rows(logits, logits.stride(0), v),
        adaptors_of(knobs[None], 0),
        Labels(tokens, ignore_index),
        support,
        stats,
        out,
        DOUBLE=logits.dtype == torch.float64,
        BLOCK=plan.block,
        **PASS,
    )
