"""What the operators call for CUDA tensors: scratch, grids, outputs. Nothing here synchronises.

A call takes the maxima of groups of logits (one read), weighs the rows whose first filter asks for
it (one more), finds a floor over all that matters, lists the tokens above it, and then one program
a row decides, mostly from the list. What is launched follows from the adaptor, never from logits.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import next_power_of_2

from fastadapt.kernels import draw, law, nucleus, scan, top, write
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
from fastadapt.kernels.rows import LAW_SIZE, MARKS
from fastadapt.kernels.steps import Steps, steps_of

PASS: dict[str, object] = {"num_warps": 4, "enable_fp_fusion": False}
# Without a limit, assemblers for sm_80 stop at 128 or 168 registers and spill.
COLLECTING: dict[str, object] = {**PASS, "maxnreg": 255}
DECIDING: dict[str, object] = {**COLLECTING, "num_warps": 8}
ONE_WARP: dict[str, object] = {**PASS, "num_warps": 1}
WIDE: dict[str, object] = {**PASS, "num_warps": 8}


class Plan(NamedTuple):
    """Sizes that change how soon a kernel is done, never what it computes; powers of two."""

    columns: int = 128  # groups of a tile of the first pass
    group: int = 32  # logits of a group
    ahead: int = 8  # that a thread loads before it looks at them
    supers: int = 16  # super-groups of a tile
    block: int = 1024  # logits whose mass is one number; what the deciding kernels look at together
    together: int = 2  # blocks that a weighing program looks at together
    bins: int = 1024
    bins_step: int = 512  # logits that a warp puts into bins at once
    bins_steps: int = 8
    rounds: int = 3  # on brackets of too many tokens
    programs: int = 2048  # that list tokens, each with tiles enough for its share of the floor
    collect_step: int = 1024  # and that are looked at together for a list
    list_size: int = 2048  # of a row's largest
    short_size: int = 128  # of a list that one warp decides
    middle_size: int = 512  # and of one that is put in order
    scratch_bytes: int = 1 << 28  # of virtual rows at a time

    def row_bytes(self, v: int) -> int:
        """Scratch of a virtual row."""
        return 16 * self.list_size + 8 * self.bins + 36 * -(-v // self.block) + v // self.group * 8


PLAN = Plan()


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
    return Adaptors(knobs, knobs.shape[0], knobs.shape[2], int(knobs.shape[2] > 1), order & 1)


@lru_cache
def sizes_of(plan: Plan, tiles: int, blocks: int, alone: int = 0) -> Sizes:
    """Constants of the deciding kernels; `alone`: of lists that are looked at alone."""
    numbers = (
        plan.block,
        plan.list_size,
        alone or plan.list_size,
        plan.bins,
        next_power_of_2(tiles),
        next_power_of_2(blocks),
        alone > 0,
    )
    return Sizes(*map(tl.constexpr, numbers))


def _scan(
    logits: Tensor, knobs: Tensor, steps: Steps, plan: Plan, options: Options
) -> tuple[Scan, int]:
    """Scans rows of logits (N, V), N > 0, each once for each of the adaptors; and their tiles."""
    n, v = logits.shape
    rows, adaptors = Rows(logits, logits.stride(0), v), adaptors_of(knobs, steps.order)
    virtual = n * adaptors.number
    blocks = triton.cdiv(v, plan.block)
    tiles = triton.cdiv(v, plan.columns * plan.group)
    weighs = steps.weighs or options.all_weighed or options.base
    new = logits.new_empty
    parts = Parts(
        new(n, tiles, dtype=torch.float32),
        new(n, tiles * plan.supers, dtype=torch.float32),
        new(n, tiles * plan.columns, dtype=torch.float32),
        tiles,
    )
    listed, spare = new(2, virtual, plan.list_size, dtype=torch.float32)
    listed_ids, spare_ids = new(2, virtual, plan.list_size, dtype=torch.int32)
    marks = new(virtual, MARKS.value + 3 * plan.bins * steps.bins, dtype=torch.int64)
    floors = new(virtual, dtype=torch.float32)
    lists = Lists(marks, floors, listed, listed_ids, spare, spare_ids, marks.shape[1])
    sums, surprisals, base_sums, base_surprisals = new(4, virtual, blocks, dtype=torch.int64)
    finite = new(virtual, blocks, dtype=torch.int32)
    weights = Weights(sums, surprisals, base_sums, base_surprisals, finite, blocks)
    padded = {"SPLITS": next_power_of_2(tiles), "BLOCKS": next_power_of_2(blocks)}
    layout = {"COLUMNS": plan.columns, "GROUP": plan.group}
    scan.maxima_kernel[(n, tiles)](
        rows, adaptors, parts, lists, **layout, AHEAD=plan.ahead, SUPERS=plan.supers, **ONE_WARP
    )
    if weighs:
        scan.weigh_kernel[(virtual, triton.cdiv(blocks, plan.together))](
            rows,
            adaptors,
            parts,
            weights,
            ALWAYS=options.all_weighed or options.base,
            BASE=options.base,
            BASE_SURPRISAL=options.entropy,
            BLOCK=plan.block,
            TOGETHER=plan.together,
            SPLITS=padded["SPLITS"],
            **PASS,
        )
    scanned = Scan(rows, adaptors, parts, lists, weights)
    programs = triton.cdiv(v, plan.bins_step * plan.bins_steps)
    binned = {"STEP": plan.bins_step, "STEPS": plan.bins_steps, "BINS": plan.bins}
    if steps.bins:
        if steps.sketches:
            nucleus.sketch_kernel[(virtual,)](
                *scanned,
                MOST=plan.list_size // plan.group,
                COLUMNS=plan.columns,
                GROUPS=next_power_of_2(tiles * plan.columns),
                **padded,
                **WIDE,
            )
        nucleus.bins_kernel[(virtual, programs)](*scanned, **binned, **padded, **ONE_WARP)
    if steps.filters:
        few = not steps.sums  # tokens reach the floor of a top-k
        scan.collect_kernel[(virtual, min(tiles, max(4, -(-plan.programs // virtual))))](
            *scanned,
            **layout,
            STEP=min(plan.columns * plan.group, plan.collect_step // (4 if few else 1)),
            ROOM=plan.list_size,
            SUPERS=next_power_of_2(tiles * plan.supers),
            PER_TILE=plan.supers,
            BINS=plan.bins if steps.bins else 0,
            **padded,
            **(ONE_WARP if few else PASS),
        )
    for _ in range(plan.rounds if steps.bins else 0):
        nucleus.narrow_kernel[(virtual, programs)](
            *scanned, **binned, ROOM=plan.list_size, **padded, **ONE_WARP
        )
    return scanned, tiles


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
    steps = steps_of(order, knobs.shape[1])
    for at in _slices(logits, 1, plan):
        scanned, tiles = _scan(logits[at], _part(knobs[None], at), steps, plan, options)
        tokens, logprobs, kept, status = (t[at] for t in out)
        drawn = Drawn(
            tokens,
            logprobs,
            kept,
            status,
            logprobs if base_logprobs is None else base_logprobs[at],
            logprobs if log_mass is None else log_mass[at],
        )
        n, blocks = len(tokens), scanned.weights.blocks
        laws = logits.new_empty(n, LAW_SIZE.value, dtype=torch.int64)
        chance = Chance(seeds[at], seeds[at] if positions is None else positions[at])
        asked = {
            "POSITIONS": positions is not None,
            "BASE": base_logprobs is not None,
            "LOG_MASS": log_mass is not None,
        }
        decide = {
            **asked,
            "ALL_WEIGHED": options.all_weighed or options.base,
            "SUM_LATER": steps.sums,
        }
        arguments = *scanned, laws, chance, drawn
        draw.short_kernel[(n,)](
            *arguments,
            **decide,
            sizes=sizes_of(plan, tiles, blocks, plan.short_size),
            **(ONE_WARP if steps.filters else PASS),
        )
        if steps.filters:
            draw.long_kernel[(n,)](
                *arguments,
                **decide,
                middle=sizes_of(plan, tiles, blocks, plan.middle_size),
                sizes=sizes_of(plan, tiles, blocks),
                **DECIDING,
            )
        if steps.sums and steps.filters:
            draw.sum_kernel[(n, triton.cdiv(blocks, plan.together))](
                *arguments,
                **asked,
                BLOCK=plan.block,
                TOGETHER=plan.together,
                SPLITS=next_power_of_2(tiles),
                BLOCKS=next_power_of_2(blocks),
                **PASS,
            )
        if top_out:
            sizes = sizes_of(plan, tiles, blocks)
            _top(scanned, sizes, drawn, [t[at] for t in top_out])


def _top(scanned: Scan, sizes: Sizes, drawn: Drawn, out: list[Tensor]) -> None:
    """The most probable tokens and the rank of the drawn one."""
    rows, parts, lists = scanned.rows, scanned.parts, scanned.lists
    n, number = out[0].shape
    shared = {"LIST": sizes.ROOM.value, "SPLITS": sizes.SPLITS.value}
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
    scanned, tiles = _scan(logits, knobs, steps_of(order, knobs.shape[2]), plan, Options())
    sizes = sizes_of(plan, tiles, scanned.weights.blocks)
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
    options, steps = Options(base=True, entropy=True), steps_of(order, 0)
    for at in _slices(logits, adaptors, plan):
        scanned, tiles = _scan(logits[at], _part(knobs, at), steps, plan, options)
        sizes = sizes_of(plan, tiles, scanned.weights.blocks)
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
