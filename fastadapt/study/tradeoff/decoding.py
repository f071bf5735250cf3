"""Strings of one prompt under many adaptors, drawn and scored in one visit of the logits.

All strings of a batch answer the same prompt, so its keys and values are computed once and shared.
The aligned model's logits are visited once a step: the token is drawn, and scored under every
adaptor, on the same values. What was drawn is therefore always in the support it is scored under.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastadapt import Adaptor, label_logps, sample, score
from fastadapt.adaptor import KNOBS
from fastadapt.training.head_check import head_of
from fastadapt.training.log_odds import head_log_odds, states_at_head
from fastadapt.training.pairs import IGNORED


class Strings(NamedTuple):
    """N strings under A adaptors; sums over a string's tokens, end token included, in nats.

    Attributes:
        tokens: (N, n), int64; `IGNORED` after the end.
        lengths: (N,), int64; tokens of each string.
        finished: (N,), bool; whether it ended before n tokens were drawn.
        status: (N,), int64; 0, or why no token could be drawn (`Sample.status`).
        violations: (N,), int64; tokens outside the support that they were drawn from.
        log_aligned: (N,), float64; log-probability at temperature 1, unfiltered.
        log_q: (N, A), float64; log-probability under every adaptor, -inf outside its support.
        log_norm: (N, A), float64; the sum of log Z_t of every adaptor.
    """

    tokens: Tensor
    lengths: Tensor
    finished: Tensor
    status: Tensor
    violations: Tensor
    log_aligned: Tensor
    log_q: Tensor
    log_norm: Tensor


def stack_adaptors(adaptors: Sequence[Adaptor]) -> Adaptor:
    """Returns one adaptor with a row per adaptor, all of one order.

    Raises:
        ValueError: their orders differ.
    """
    orders = {adaptor.order for adaptor in adaptors}
    if len(orders) != 1:
        raise ValueError(f"adaptors: expected one order, got {sorted(orders)}")
    knobs: dict[str, Any] = {
        name: torch.tensor([getattr(adaptor, name) for adaptor in adaptors]) for name in KNOBS
    }
    return Adaptor(**knobs, order=orders.pop())


@torch.inference_mode()
def draw_strings(
    model: Any,
    context: Tensor,
    own: Sequence[int],
    adaptors: Sequence[Adaptor],
    seeds: Tensor,
    *,
    ends: Tensor,
    max_new_tokens: int,
) -> Strings:
    """Draws strings and scores each under all adaptors.

    Args:
        model: a causal language model of transformers, of the aligned side.
        context: (1, T), int64; what it reads first.
        own: for each of the N strings the index of the adaptor that draws it.
        adaptors: A of them, numbers only.
        seeds: (N,), int64; a string depends on its seed and on no other.
        ends: (E,), int64; tokens that end a string.
        max_new_tokens: n, the longest string.
    """
    rows, drawing = len(own), stack_adaptors([adaptors[i] for i in own])
    output = model(input_ids=context, use_cache=True, logits_to_keep=1)
    cache = output.past_key_values
    cache.batch_repeat_interleave(rows)
    logits = output.logits[:, -1].expand(rows, -1)
    columns = torch.tensor(own)[:, None]
    tokens = torch.full((rows, max_new_tokens), IGNORED)
    status, violations = torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, dtype=torch.int64)
    log_aligned = torch.zeros(rows, dtype=torch.float64)
    log_q, log_norm = torch.zeros(2, rows, len(adaptors), dtype=torch.float64)
    active = torch.ones(rows, dtype=torch.bool)
    finished = ~active
    for step in range(max_new_tokens):
        drawn = sample(logits, drawing, seeds=seeds, positions=torch.full_like(seeds, step))
        status = torch.where(active, drawn.status.long(), status)
        active = active & (drawn.status == 0)
        tokens[:, step] = torch.where(active, drawn.tokens, IGNORED)
        scored = score(logits, tokens[:, step].contiguous(), adaptors, ignore_index=IGNORED)
        log_aligned += scored.base_logprobs
        log_q += scored.logprobs
        log_norm += scored.log_norm
        own_logprobs = scored.logprobs.gather(1, columns)[:, 0]
        violations += active & (own_logprobs == -torch.inf)
        ended = active & torch.isin(drawn.tokens, ends)
        finished, active = finished | ended, active & ~ended
        if step + 1 == max_new_tokens or not active.any():
            break
        fed = torch.where(active, drawn.tokens, ends[0])[:, None]
        logits = model(input_ids=fed, past_key_values=cache, use_cache=True).logits[:, -1]
    lengths = (tokens != IGNORED).sum(-1)
    return Strings(tokens, lengths, finished, status, violations, log_aligned, log_q, log_norm)


@torch.inference_mode()
def score_strings(model: Any, context: Tensor, tokens: Tensor) -> Tensor:
    """Returns log-probabilities of whole strings at temperature 1, without logits.

    One pass over all strings, after one over the context that they share; the head goes through
    `linear_log_odds`.

    Args:
        model: a causal language model of transformers, of the prior side.
        context: (1, T), int64.
        tokens: (N, n), int64; `IGNORED` after the end of a string.

    Returns:
        Tensor: (N,), float64, nats; 0 for a string without tokens.
    """
    head = head_of(model, {"input_ids": context})
    states, output = states_at_head(model, {"input_ids": context, "use_cache": True})
    hidden = states[:, -1:].expand(len(tokens), -1, -1)
    if tokens.shape[1] > 1:
        cache = output.past_key_values
        cache.batch_repeat_interleave(len(tokens))
        read = tokens[:, :-1].clamp(min=0)
        inputs = {"input_ids": read, "past_key_values": cache, "use_cache": True}
        hidden = torch.cat([hidden, states_at_head(model, inputs)[0]], 1)
    log_odds = head_log_odds(head, hidden, tokens)
    logps = torch.where(tokens == IGNORED, 0.0, label_logps(log_odds).double())
    return logps.sum(-1)
