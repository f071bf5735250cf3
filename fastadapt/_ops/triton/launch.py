"""What the operators call for CUDA tensors: a scan of the rows, and what is made of it.

Nothing here synchronises. One program a row decides, mostly from the list; the survivors that no
list holds are summed by many.
"""

import torch
from torch import Tensor

from fastadapt._ops.triton import decided, draw, top, write
from fastadapt._ops.triton.bundles import Chance, Drawn, Labels, Rows, Scored, Sizes, Support
from fastadapt._ops.triton.launch_scan import (
    COLLECTING,
    DECIDING,
    PASS,
    PLAN,
    Options,
    Plan,
    Scan,
    adaptors_of,
    asked_of,
    knobs_of_rows,
    scan_rows,
    slices,
    some,
    up,
)
from fastadapt._ops.triton.rows import BOUNDS_SIZE
from fastadapt._ops.triton.steps import steps_of


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
    for at in slices(logits, 1, plan):
        scanned, sizes = scan_rows(
            some(logits, at), knobs_of_rows(knobs[None], at), steps, plan, options
        )
        tokens, logprobs, kept, status = (some(t, at) for t in out)
        drawn = Drawn(
            tokens,
            logprobs,
            kept,
            status,
            logprobs if base_logprobs is None else some(base_logprobs, at),
            logprobs if log_mass is None else some(log_mass, at),
        )
        n = len(tokens)
        all_bounds = logits.new_empty(n, BOUNDS_SIZE.value, dtype=torch.int64)
        chance = Chance(some(seeds, at), some(seeds if positions is None else positions, at))
        asked = asked_of(options, positions is not None, base_logprobs is not None, steps.sums)
        arguments = *scanned, all_bounds, chance, drawn
        draw.short_kernel[(n,)](
            *arguments,
            asked=asked,
            sizes=sizes.short,
            **COLLECTING,
        )
        if steps.filters:
            draw.long_kernel[(n,)](
                *arguments,
                asked=asked,
                sizes=sizes.long,
                **DECIDING,
            )
        if steps.sums:
            draw.sum_kernel[(n, sizes.weighing)](
                *arguments,
                asked=asked,
                sizes=sizes.long,
                TOGETHER=plan.together,
                **PASS,
            )
        if top_out:
            _top(scanned, sizes.long, drawn, [some(t, at) for t in top_out])


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
        TOP=up(number),
        **shared,
        **PASS,
    )


def _decided_bounds(
    logits: Tensor, knobs: Tensor, order: int, plan: Plan
) -> tuple[Scan, Sizes, Tensor]:
    """Decides every row: (N, BOUNDS_SIZE)."""
    scanned, layout = scan_rows(logits, knobs, steps_of(order, knobs.shape[2]), plan, Options())
    all_bounds = logits.new_empty(logits.shape[0], BOUNDS_SIZE.value, dtype=torch.int64)
    decided.bounds_kernel[(len(all_bounds),)](
        *scanned, all_bounds, asked=asked_of(Options()), sizes=layout.long, **DECIDING
    )
    return scanned, layout.long, all_bounds


def filter_logits(
    logits: Tensor, knobs: Tensor, order: int, out: Tensor, plan: Plan = PLAN
) -> None:
    """Writes what an adaptor leaves."""
    for at in slices(logits, 1, plan):
        scanned, sizes, all_bounds = _decided_bounds(
            some(logits, at), knobs_of_rows(knobs[None], at), order, plan
        )
        write.filter_kernel[(len(all_bounds), scanned.weights.blocks)](
            *scanned[:3],
            all_bounds,
            some(out, at),
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
    for at in slices(logits, adaptors, plan):
        scanned, layout = scan_rows(
            some(logits, at), knobs_of_rows(knobs, at), steps, plan, options
        )
        decided.score_kernel[(len(some(tokens, at)) * adaptors,)](
            *scanned,
            Labels(some(tokens, at), ignore_index),
            Scored(*(some(t, at) for t in out)),
            asked=asked_of(options),
            sizes=layout.long,
            **DECIDING,
        )


def adapted_log_odds(
    logits: Tensor,
    tokens: Tensor,
    knobs: Tensor,
    order: int,
    ignore_index: int,
    out: tuple[Tensor, Tensor, Tensor],
    plan: Plan = PLAN,
) -> None:
    """Log-odds, support and statistics."""
    double = logits.dtype == torch.float64
    for at in slices(logits, 1, plan):
        log_odds, support, stats = (some(t, at) for t in out)
        scanned, sizes, all_bounds = _decided_bounds(
            some(logits, at), knobs_of_rows(knobs[None], at), order, plan
        )
        n, blocks = len(all_bounds), scanned.weights.blocks
        largest = logits.new_empty(n, blocks, dtype=torch.float64)
        labels, kept = Labels(some(tokens, at), ignore_index), Support(support, largest, blocks)
        write.support_kernel[(n, blocks)](
            *scanned[:3],
            all_bounds,
            labels,
            kept,
            DOUBLE=double,
            BLOCK=plan.block,
            SPLITS=sizes.SPLITS.value,
            **PASS,
        )
        write.log_odds_kernel[(n,)](
            *scanned[:2],
            all_bounds,
            labels,
            kept,
            log_odds,
            stats,
            DOUBLE=double,
            BLOCK=plan.block,
            BLOCKS=sizes.BLOCKS.value,
            **PASS,
        )


def adapted_log_odds_backward(
    dlog_odds: Tensor,
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
    write.log_odds_backward_kernel[(n, -(-v // plan.block))](
        dlog_odds,
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
