"""Launches of the sampling kernels for CUDA tensors: one scan of the rows, then what follows.

Nothing here synchronises. One program a row decides, mostly from the list; the survivors that no
list holds are summed by many.
"""

import torch
from torch import Tensor

from fastadapt._ops.filter_code import joined, order_of
from fastadapt._ops.outputs import LogOdds, Scores, sample_fields, score_outputs
from fastadapt._ops.triton import draw, write
from fastadapt._ops.triton.bundles import Chance, Drawn, Labels, Rows, Scored, Sizes, Support
from fastadapt._ops.triton.launch_scan import (
    MOST_REGISTERS,
    PLAN,
    Options,
    Plan,
    Scan,
    Steps,
    adaptors_of,
    asked_of,
    knobs_of_rows,
    options_of,
    scan_rows,
    slices,
    some,
    steps_of,
    up,
)
from fastadapt._ops.triton.rows import BOUNDS_SIZE


def sample(
    logits: Tensor,
    knobs: Tensor,
    order: int,
    seeds: Tensor,
    positions: Tensor | None,
    base_logprobs: bool,
    log_mass: bool,
    top_n: int,
    out: list[Tensor],
    plan: Plan = PLAN,
) -> None:
    """Draws; only what was asked for is computed."""
    options = Options(log_mass, base_logprobs or top_n > 0)
    steps = steps_of(order, knobs.shape[1])
    for at in slices(logits, 1, plan):
        scanned, sizes = scan_rows(
            some(logits, at), knobs_of_rows(knobs[None], at), steps, plan, options
        )
        part = [some(t, at) for t in out]
        base, mass, *_ = sample_fields(part, base_logprobs, log_mass, top_n)[4:]
        # a field that is not asked for is not written
        drawn = Drawn(*part[:4], *(part[1] if t is None else t for t in (base, mass)))
        n = len(drawn.tokens)
        all_bounds = logits.new_empty(n, BOUNDS_SIZE.value, dtype=torch.int64)
        chance = Chance(some(seeds, at), some(seeds if positions is None else positions, at))
        asked = asked_of(options, steps, positions is not None, base_logprobs, later=True)
        arguments = *scanned, all_bounds, chance, drawn
        draw.short_kernel[(n,)](
            *arguments,
            asked=asked,
            sizes=sizes.short,
            **options_of(logits.device, 4, MOST_REGISTERS),
        )
        if steps.filters:
            draw.long_kernel[(n,)](
                *arguments,
                asked=asked,
                sizes=sizes.long,
                **options_of(logits.device, 8, MOST_REGISTERS),
            )
        if steps.sums:
            draw.sum_kernel[(n, sizes.weighing)](
                *arguments,
                asked=asked,
                sizes=sizes.long,
                TOGETHER=plan.together,
                **options_of(logits.device, 4),
            )
        if top_n:
            _top(scanned, sizes.long, drawn, part[-3:])


def _top(scanned: Scan, sizes: Sizes, drawn: Drawn, out: list[Tensor]) -> None:
    """Finds the most probable tokens and the rank of the drawn one."""
    rows, parts, lists = scanned.rows, scanned.parts, scanned.lists
    n, number = out[0].shape
    draw.top_kernel[(n,)](
        rows,
        parts,
        drawn,
        number,
        lists,
        out[2],
        sizes=sizes,
        **options_of(out[0].device, 4, MOST_REGISTERS),
    )
    draw.sort_kernel[(n,)](
        rows,
        parts,
        scanned.weights,
        drawn,
        number,
        lists,
        *out[:2],
        sizes=sizes,
        TOP=up(max(number, 2)),  # Triton 3.4 does not sort one entry
        **options_of(out[0].device, 4),
    )


def _decided_bounds(
    logits: Tensor, knobs: Tensor, steps: Steps, plan: Plan, options: Options
) -> tuple[Scan, Sizes, Tensor]:
    """Decides every virtual row; returns what its filters come to, (N A, BOUNDS_SIZE)."""
    scanned, layout = scan_rows(logits, knobs, steps, plan, options)
    n = len(logits) * scanned.adaptors.number
    all_bounds = logits.new_empty(n, BOUNDS_SIZE.value, dtype=torch.int64)
    write.bounds_kernel[(n,)](
        *scanned,
        all_bounds,
        asked=asked_of(options, steps),
        sizes=layout.long,
        **options_of(logits.device, 8, MOST_REGISTERS),
    )
    return scanned, layout.long, all_bounds


def filter_logits(
    logits: Tensor, knobs: Tensor, order: int, out: Tensor, plan: Plan = PLAN
) -> None:
    """Writes the filtered logits."""
    steps = steps_of(order, knobs.shape[1])
    for at in slices(logits, 1, plan):
        scanned, sizes, all_bounds = _decided_bounds(
            some(logits, at), knobs_of_rows(knobs[None], at), steps, plan, Options()
        )
        write.filter_kernel[(len(all_bounds), scanned.weights.blocks)](
            *scanned[:3],
            all_bounds,
            some(out, at),
            BLOCK=plan.block,
            SPLITS=sizes.SPLITS.value,
            **options_of(logits.device, 4),
        )


def score(
    logits: Tensor,
    tokens: Tensor,
    knobs: list[Tensor],
    orders: list[int],
    ignore_index: int,
    out: Scores,
    plan: Plan = PLAN,
) -> None:
    """Scores tokens under all adaptors of one order at a time."""
    for order in sorted({order_of(code) for code in orders}):
        members = [i for i, code in enumerate(orders) if order_of(code) == order]
        code = joined(orders[i] for i in members)
        rows = max(knobs[i].shape[1] for i in members)
        packed = torch.stack([knobs[i].expand(-1, rows) for i in members])
        if len(members) == len(knobs):
            _score(logits, tokens, packed, code, ignore_index, out, plan)
            continue
        part = score_outputs(logits, len(members))[:3]
        _score(logits, tokens, packed, code, ignore_index, (*part, *out[3:]), plan)
        for whole, columns in zip(out[:3], part, strict=True):
            for column, i in enumerate(members):
                whole[:, i] = columns[:, column]


def _score(
    logits: Tensor,
    tokens: Tensor,
    knobs: Tensor,
    order: int,
    ignore_index: int,
    out: Scores,
    plan: Plan,
) -> None:
    """Under adaptors of one order; knobs (A, 8, R), outputs (N, A) and (N,)."""
    adaptors = knobs.shape[0]
    options, steps = Options(base=True, entropy=True), steps_of(order, 0)
    for at in slices(logits, adaptors, plan):
        scanned, sizes, all_bounds = _decided_bounds(
            some(logits, at), knobs_of_rows(knobs, at), steps, plan, options
        )
        write.score_kernel[(len(all_bounds),)](
            *scanned[:3],
            scanned.weights,
            all_bounds,
            Labels(some(tokens, at), ignore_index),
            Scored(*(some(t, at) for t in out)),
            sizes=sizes,
            **options_of(logits.device, 4),
        )


def adapted_log_odds(
    logits: Tensor,
    tokens: Tensor,
    knobs: Tensor,
    order: int,
    ignore_index: int,
    out: LogOdds,
    plan: Plan = PLAN,
) -> None:
    """Computes log-odds, support and statistics."""
    double, steps = logits.dtype == torch.float64, steps_of(order, knobs.shape[1])
    for at in slices(logits, 1, plan):
        log_odds, support, stats = (some(t, at) for t in out)
        scanned, sizes, all_bounds = _decided_bounds(
            some(logits, at), knobs_of_rows(knobs[None], at), steps, plan, Options()
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
            **options_of(logits.device, 4),
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
            **options_of(logits.device, 4),
        )


def adapted_log_odds_backward(
    dlog_odds: Tensor,
    logits: Tensor,
    tokens: Tensor,
    knobs: Tensor,
    order: int,
    ignore_index: int,
    support: Tensor,
    stats: Tensor,
    out: Tensor,
    plan: Plan = PLAN,
) -> None:
    """Computes the gradient in one read of the logits and one write."""
    n, v = logits.shape
    write.log_odds_backward_kernel[(n, -(-v // plan.block))](
        dlog_odds.contiguous(),
        Rows(logits, logits.stride(0), v),
        adaptors_of(knobs[None], 0),
        Labels(tokens, ignore_index),
        support,
        stats,
        out,
        DOUBLE=logits.dtype == torch.float64,
        BLOCK=plan.block,
        **options_of(logits.device, 4),
    )
