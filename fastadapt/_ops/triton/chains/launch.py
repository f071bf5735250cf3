"""Launches of sampling for CUDA tensors: rows are edited, and go to kernels that know the filters.

Kernels of chains run every filter in any order, one program a row, on a list of the row's survivors
that takes 8 bytes a logit. Orders and filters that Transformers and vLLM have go to faster ones. No
time of a chain was measured on a GPU. Nothing here synchronises.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastadapt._ops.common import RowEdits
from fastadapt._ops.filter_code import packed_filters, temperature_last
from fastadapt._ops.lists import ends_of
from fastadapt._ops.outputs import LogOdds, Scores, score_outputs
from fastadapt._ops.triton import launch, write
from fastadapt._ops.triton.bundles import Labels, Rows, Scored
from fastadapt._ops.triton.chains import kernels
from fastadapt._ops.triton.edits.launch import edited, through_edits
from fastadapt._ops.triton.launch_scan import (
    MOST_REGISTERS,
    PLAN,
    Plan,
    Scan,
    Steps,
    asked_of,
    is_chain,
    knobs_of_rows,
    launch_on,
    scan_rows,
    slices,
    some,
    steps_of,
)
from fastadapt._ops.triton.rows import (
    ALL_WEIGHED,
    BASE,
    POSITIONS,
    SURPRISAL,
)

LEAST_SORTED = 128  # top-h looks at 100
WARPS = 8  # of 216 registers; of 16 warps each would spill
# Only maxima of rows: masses of blocks are those of the survivors, unless more is asked for.
STEPS = Steps(
    0, weighs=False, bins=False, sketches=False, ranks=False, lists=False, sums=False
)  # fmt: skip


def words_of_list(v: int) -> int:
    """The int64 of a list that has room for a row."""
    return -(-v // 32) * 32


def words_of_law(v: int) -> int:
    """The same with those of a row of float32."""
    return words_of_list(v) + (v + 1) // 2


def _decided(
    logits: Tensor, knobs: Tensor, order: int, asked: int, plan: Plan, *chance: Tensor
) -> tuple[Scan, Tensor]:
    """Runs the chain of every virtual row; seeds and positions throw the coin of XTC."""
    scanned = scan_rows(logits, knobs, asked, STEPS, plan, launch_on(logits.device))
    lists = logits.new_empty(scanned.virtual, 2 * words_of_list(logits.shape[1]), dtype=torch.int32)
    sequence, first = packed_filters(order), kernels.FILTER_BITS.value * kernels.FIRST_FILTERS.value
    rest = sequence >> first
    rest |= kernels.LAST.value if temperature_last(order) else 0
    rest |= kernels.TOSSES.value if chance else 0
    scanned.launch(
        kernels.chain_kernel,
        (scanned.virtual,),
        *scanned.given(scanned.layout.long),
        lists,
        sequence & ((1 << first) - 1),
        rest,
        *(chance or (scanned.scratch.memory,) * 2),  # which nothing reads
        SORTED=max(LEAST_SORTED, plan.list_size),
        warps=WARPS,
        registers=MOST_REGISTERS,
    )
    return scanned, lists


def sample_rows(
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
    given = seeds, positions, base_logprobs, log_mass, top_n
    if not is_chain(order):
        return launch.sample(logits, knobs, order, *given, out, plan)
    asked = asked_of(knobs, 0, *launch.draw_bits(positions, base_logprobs, log_mass, top_n))
    for at in slices(logits, 1, plan, words_of_list(logits.shape[1])):
        chance = some(seeds, at), some(seeds if positions is None else positions, at)
        own = some(logits, at), knobs_of_rows(knobs, at), order, asked, plan
        scanned, lists = _decided(*own, *chance)
        part = [some(t, at) for t in out]
        drawn = launch.drawn_of(part, base_logprobs, log_mass, top_n)
        grid, sizes = (scanned.virtual,), scanned.layout.long
        scanned.launch(
            kernels.draw_kernel, grid, *scanned.given(sizes), lists, *chance, drawn, warps=4
        )
        if top_n:
            launch.top(scanned, drawn, part[-3:])


def filter_rows(logits: Tensor, knobs: Tensor, order: int, out: Tensor, plan: Plan = PLAN) -> None:
    """Writes the filtered logits."""
    if not is_chain(order):
        return launch.filter_logits(logits, knobs, order, out, plan)
    asked = asked_of(knobs, 0)
    for at in slices(logits, 1, plan, words_of_list(logits.shape[1])):
        own = some(logits, at), knobs_of_rows(knobs, at), order, asked, plan
        scanned, lists = _decided(*own)
        grid, given = (scanned.virtual, scanned.layout.blocks), scanned.given(scanned.layout.long)
        scanned.launch(kernels.filter_kernel, grid, *given, lists, some(out, at), warps=4)


def law(
    logits: Tensor, knobs: Tensor, order: int, plan: Plan, chance: tuple[Tensor, Tensor] | None
) -> Scan:
    """Runs the chain of every row; what is left of them are rows that no filter changes.

    Their logits are scaled survivors in float32, -inf the others, and their largest is the one that
    masses are relative to. Without seeds and positions no coin is thrown.
    """
    asked = asked_of(knobs, 0, POSITIONS.value)
    scanned, lists = _decided(logits, knobs, order, asked, plan, *(chance or ()))
    rows = logits.new_empty(logits.shape, dtype=torch.float32)
    grid, given = (scanned.virtual, scanned.layout.blocks), scanned.given(scanned.layout.long)
    scanned.launch(kernels.filter_kernel, grid, *given, lists, rows, warps=4)
    scanned.launch(kernels.largest_kernel, grid[:1], *given, warps=4)
    neutral = knobs.new_ones(len(knobs), 1)  # of which the temperature is read
    of_rows = Rows(rows, rows.stride(0), rows.shape[1])
    return scanned._replace(rows=of_rows, knobs=neutral, asked=asked_of(neutral, 0))


def score_rows(
    logits: Tensor,
    tokens: Tensor,
    knobs: list[Tensor],
    orders: list[int],
    ignore_index: int,
    out: Scores,
    plan: Plan = PLAN,
) -> None:
    """Scores tokens under all adaptors: chains of the same filters at a time, then the others."""
    groups: dict[tuple[int, bool], list[int]] = {}
    for i, code in enumerate(orders):
        chain = (packed_filters(code), temperature_last(code)) if is_chain(code) else (0, False)
        groups.setdefault(chain, []).append(i)
    for members in groups.values():
        packed, codes = [knobs[i] for i in members], [orders[i] for i in members]
        of_group = partial(_score_chain if is_chain(codes[0]) else launch.score, logits, tokens)
        if len(members) == len(knobs):
            of_group(packed, codes, ignore_index, out, plan)
            continue
        part = score_outputs(logits, len(members))[:3]
        of_group(packed, codes, ignore_index, (*part, *out[3:]), plan)
        for whole, columns in zip(out[:3], part, strict=True):
            for column, i in enumerate(members):
                whole[:, i] = columns[:, column]


def _score_chain(
    logits: Tensor,
    tokens: Tensor,
    knobs: list[Tensor],
    orders: list[int],
    ignore_index: int,
    out: Scores,
    plan: Plan,
) -> None:
    """Under adaptors of the same filters."""
    rows = max(k.shape[1] for k in knobs)
    packed = torch.stack([k.expand(-1, rows) for k in knobs])  # (A, 14, R)
    asked = asked_of(packed, 0, ALL_WEIGHED.value, BASE.value, SURPRISAL.value)
    for at in slices(logits, len(knobs), plan, words_of_list(logits.shape[1])):
        own = some(logits, at), knobs_of_rows(packed, at), orders[0], asked, plan
        scanned, lists = _decided(*own)
        labels = Labels(some(tokens, at), ignore_index)
        scored = Scored(*(some(t, at) for t in out))
        grid, given = (scanned.virtual,), scanned.given(scanned.layout.long)
        # the base distribution, bad rows, and what a list cannot tell otherwise
        scanned.launch(write.score_kernel, grid, *given, labels, scored, warps=4)
        scanned.launch(kernels.score_kernel, grid, *given, lists, labels, scored, warps=4)


def log_odds_of_rows(
    logits: Tensor,
    tokens: Tensor,
    knobs: Tensor,
    order: int,
    ignore_index: int,
    out: LogOdds,
    plan: Plan = PLAN,
) -> None:
    """Computes log-odds, support and statistics."""
    if not is_chain(order):
        return launch.adapted_log_odds(logits, tokens, knobs, order, ignore_index, out, plan)
    asked = asked_of(knobs, 0)
    for at in slices(logits, 1, plan, words_of_list(logits.shape[1])):
        own = some(logits, at), knobs_of_rows(knobs, at), order, asked, plan
        scanned, lists = _decided(*own)
        labels = Labels(some(tokens, at), ignore_index)
        log_odds, support, stats = (some(t, at) for t in out)
        launch.log_odds(scanned, labels, (log_odds, support, stats), kernels.support_kernel, lists)


def listed_of(kept: Tensor, whole: int) -> Tensor:
    """Returns how many ids rows list, (N,): as many as they keep, none of those that keep all."""
    return torch.where(kept == whole, 0, kept)


def survivors(
    logits: Tensor,
    knobs: Tensor,
    order: int,
    counts: Tensor,
    seeds: Tensor | None = None,
    positions: Tensor | None = None,
    plan: Plan = PLAN,
) -> list[Tensor]:
    """Returns ids and offsets (N + 1,) of what rows keep, which are decided again for them.

    As many as `counts` (N,) says, which was counted before, or none of a row. This waits for the
    device, once. Seeds and positions throw the coin of XTC, as in the draw.
    """
    offsets = ends_of(counts)
    ids = counts.new_empty(int(offsets[-1]))
    starts = torch.where(counts > 0, offsets[:-1], -1)
    steps = STEPS if is_chain(order) else steps_of(order, knobs.shape[1])
    bits = [] if positions is None else [POSITIONS.value]
    asked = asked_of(knobs, 0 if is_chain(order) else steps.order, *bits)
    more = words_of_list(logits.shape[1]) if is_chain(order) else 0
    for at in slices(logits, 1, plan, more) if len(ids) else []:
        own, begins = (some(logits, at), knobs_of_rows(knobs, at)), some(starts, at)
        if is_chain(order):
            chance = [] if seeds is None else [seeds, seeds if positions is None else positions]
            scanned, lists = _decided(*own, order, asked, plan, *(some(t, at) for t in chance))
            kernel: Any = kernels.ids_kernel
            given: tuple[Tensor, ...] = lists, begins
        else:
            scanned = launch.decided(*own, asked, steps, plan)
            kernel, given = write.ids_kernel, (_starts_of_blocks(scanned, begins),)
        grid = scanned.virtual, scanned.layout.blocks
        scanned.launch(kernel, grid, *scanned.given(scanned.layout.long), *given, ids, warps=4)
    return [ids, offsets]


def _starts_of_blocks(scanned: Scan, starts: Tensor) -> Tensor:
    """Returns where the ids of each block start, (N, blocks), given where those of rows do."""
    grid = scanned.virtual, scanned.layout.blocks
    counts = starts.new_empty(grid, dtype=torch.int32)
    given = scanned.given(scanned.layout.long)
    scanned.launch(write.count_kernel, grid, *given, counts, warps=4)
    before = counts.cumsum(1) - counts
    return torch.where(starts[:, None] < 0, -1, starts[:, None] + before)


def filter_logits(logits: Tensor, *rest: Any) -> None:
    """Writes the filtered logits, in the dtype of the output."""
    _edit(filter_rows, logits, *rest)


def sample(logits: Tensor, knobs: Tensor, order: int, *rest: Any) -> None:
    """Draws, and lists what was drawn from."""
    seeds, positions, base_logprobs, log_mass, top_n, whole, *edits, out = rest
    rows, chance = edited(logits, RowEdits(*edits)), (seeds, positions)
    sample_rows(rows, knobs, order, *chance, base_logprobs, log_mass, top_n, out)
    if whole:
        out += survivors(rows, knobs, order, listed_of(out[2], whole), *chance)


def score(logits: Tensor, tokens: Tensor, knobs: list[Tensor], *rest: Any) -> None:
    """Scores tokens under all adaptors, and lists their supports, one behind the other."""
    orders, ignore_index, whole, *edits, out = rest
    rows = edited(logits, RowEdits(*edits))
    score_rows(rows, tokens, knobs, orders, ignore_index, out)
    if not whole:
        return
    listed = [
        survivors(rows, own, order, listed_of(out[2][:, i], whole))
        for i, (own, order) in enumerate(zip(knobs, orders, strict=True))
    ]
    counts = torch.cat([offsets.diff() for _, offsets in listed])
    ids = torch.cat([ids for ids, _ in listed])
    out += [ids, ends_of(counts)]


def adapted_log_odds(logits: Tensor, *rest: Any) -> None:
    """Computes log-odds, support and statistics."""
    _edit(log_odds_of_rows, logits, *rest)


def _edit(function: Callable[..., None], logits: Tensor, *rest: Any) -> None:
    """Edits rows for a function; the last of its arguments are the outputs, before them edits."""
    *arguments, ids, offsets, columns, allowed, out = rest
    function(edited(logits, RowEdits(ids, offsets, columns, allowed)), *arguments, out)


def adapted_log_odds_backward(
    dlog_odds: Tensor, logits: Tensor, tokens: Tensor, *rest: Any
) -> None:
    """Computes the gradient; of edited rows in float32, rounded once."""
    *given, ids, offsets, columns, allowed, of_values, (out, dvalues) = rest
    # a support is one, whatever has decided it
    backward: Callable[..., None] = launch.adapted_log_odds_backward
    if ids is None and allowed is None:
        return backward(dlog_odds, logits, tokens, *given, out)
    edits = RowEdits(ids, offsets, columns, allowed)
    rows = edited(logits, edits)
    dy = torch.empty_like(rows)
    backward(dlog_odds, rows, tokens, *given, dy)
    through_edits(logits, edits, dy, dvalues, of_values)
    out.copy_(dy)
