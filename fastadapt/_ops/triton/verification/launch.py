"""Launches of the kernels that verify drafts. Nothing here synchronises."""

from typing import Any

import torch
from torch import Tensor

from fastadapt._ops.common import RowEdits
from fastadapt._ops.outputs import Verification
from fastadapt._ops.triton import launch
from fastadapt._ops.triton.chains import launch as chains
from fastadapt._ops.triton.edits.launch import edited
from fastadapt._ops.triton.launch_scan import (
    PLAN,
    Plan,
    Scan,
    asked_of,
    is_chain,
    knobs_of_rows,
    launch_on,
    slices,
    some,
    steps_of,
)
from fastadapt._ops.triton.verification import kernels
from fastadapt._ops.triton.verification.kernels import Decided, Sequences, Verdicts


def verify(
    logits: Tensor,
    knobs: Tensor,
    order: int,
    draft: Tensor,
    lengths: Tensor | None,
    draft_logits: Tensor | None,
    draft_knobs: Tensor | None,
    draft_order: int,
    seeds: Tensor,
    positions: Tensor | None,
    whole: int,
    *rest: Any,
    plan: Plan = PLAN,
) -> None:
    """Verifies drafts; all rows are read, as one program does not wait for another's verdict."""
    *edits, out = rest
    n, k = draft.shape
    rows = edited(logits, RowEdits(*edits))
    sequences = Sequences(
        draft,
        torch.full_like(seeds, k) if lengths is None else lengths,
        seeds,
        torch.zeros_like(seeds) if positions is None else positions,
    )
    if n > 0 and k > 0 and draft_logits is not None and draft_knobs is not None:
        drafts = draft_logits, draft_knobs, draft_order
        _by_law(rows, knobs, order, drafts, sequences, out, plan)
    elif n > 0:
        _as_sampled(rows, knobs, order, sequences, out, plan)
    if whole:
        chance, own = _chance_of(sequences, k + 1), _of_rows(knobs, k + 1)
        out += chains.survivors(
            rows, own, order, chains.listed_of(out[3].view(-1), whole), *chance, plan
        )


def _by_law(
    rows: Tensor,
    knobs: Tensor,
    order: int,
    drafts: tuple[Tensor, Tensor, int],
    sequences: Sequences,
    out: Verification,
    plan: Plan,
) -> None:
    """Judges drafts by what they were drawn from: logits, knobs and an order."""
    draft_logits, draft_knobs, draft_order = drafts
    k = sequences.draft.shape[1]
    more = chains.words_of_law(rows.shape[1]) if is_chain(order) or is_chain(draft_order) else 0
    for at in slices(rows[:: k + 1], 2 * k + 1, plan, more):  # virtual rows of a sequence
        part = Sequences(*(some(t, at) for t in sequences))
        p = _decided(rows, knobs, order, k + 1, at, plan, part)
        q = _decided(draft_logits, draft_knobs, draft_order, k, at, plan, part)
        _judge(p, q, part, _some_of(out, at))


def _some_of(out: Verification, at: slice | None) -> Verification:
    """Returns the outputs of some sequences."""
    tokens, accepted, logprobs, kept, status = (some(t, at) for t in out)
    return tokens, accepted, logprobs, kept, status


def _as_sampled(
    rows: Tensor,
    knobs: Tensor,
    order: int,
    sequences: Sequences,
    out: Verification,
    plan: Plan,
) -> None:
    """Draws every row as `sample` does, and ends sequences where a draft is another token."""
    tokens, accepted, logprobs, kept, status = out
    k = tokens.shape[1] - 1
    drawn = [t.view(-1) for t in (tokens, logprobs, kept, status)]
    chance = _chance_of(sequences, k + 1)
    own = _of_rows(knobs, k + 1)
    chains.sample_rows(rows, own, order, *chance, False, False, 0, drawn, plan)
    nothing = accepted  # of what is left to do
    verdicts = Verdicts(*out, state=nothing, sums=nothing)
    launch_on(rows.device)(kernels.end_kernel, (len(accepted),), sequences, k, verdicts, warps=1)


def _chance_of(sequences: Sequences, times: int) -> tuple[Tensor, Tensor]:
    """Returns seeds and positions of rows, so many of which belong to a sequence."""
    seeds, positions = sequences.seeds, sequences.positions
    places = positions[:, None] + torch.arange(times, device=seeds.device)
    return seeds.repeat_interleave(times), places.view(-1)


def _of_rows(knobs: Tensor, times: int) -> Tensor:
    """Returns the knobs (14, R) of rows, so many of which belong to a sequence."""
    return knobs if knobs.shape[1] == 1 else knobs.repeat_interleave(times, 1)


def _decided(
    rows: Tensor,
    knobs: Tensor,
    order: int,
    each: int,
    at: slice | None,
    plan: Plan,
    sequences: Sequences | None = None,
) -> Scan:
    """Decides the rows of some sequences, each of which has so many.

    Sequences are given whose own draws throw coins.
    """
    here = rows if at is None else rows[at.start * each : at.stop * each]
    own = knobs_of_rows(knobs, at)
    if is_chain(order):
        chance = None if sequences is None else _chance_of(sequences, each)
        return chains.law(here, _of_rows(own, each), order, plan, chance)
    steps = steps_of(order, knobs.shape[1])
    decided = launch.decided(here, _of_rows(own, each), asked_of(own, steps.order), steps, plan)
    return decided._replace(knobs=own)


def _judge(p: Scan, q: Scan, sequences: Sequences, out: Verification) -> None:
    """Judges the drafts of decided rows, and draws the tokens behind those that stand."""
    n, blocks, device = len(sequences.seeds), p.layout.blocks, sequences.seeds.device
    state = torch.empty(n, dtype=torch.int32, device=device)
    sums = torch.empty(n, 2, blocks, dtype=torch.int64, device=device)
    laws = (Decided(x.rows, x.knobs, x.scratch) for x in (p, q))
    k, verdicts = out[0].shape[1] - 1, Verdicts(*out, state=state, sums=sums)
    given = *laws, p.asked, q.asked, p.layout.long, sequences, k, verdicts
    p.launch(kernels.judge_kernel, (n,), *given, warps=1)
    p.launch(kernels.left_kernel, (n, blocks), *given, warps=4)
    p.launch(kernels.draw_kernel, (n,), *given, warps=4)
