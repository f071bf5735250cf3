"""Pairs whose responses may have different contexts, and their four cells as tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from fastadapt.training.pair_forms import Message, Pair
from fastadapt.training.pairs import IGNORED, PairBatch, encode_pairs, read_pairs

KINDS = ("same-prompt", "same-response", "unpaired")


class ContextPair(NamedTuple):
    """A chosen response in its context x⁺ and a rejected one in x⁻."""

    chosen_prompt: str | Sequence[Message]
    chosen: str
    rejected_prompt: str | Sequence[Message]
    rejected: str


def pairs_of_kind(kind: str, pairs: Sequence[Pair]) -> list[ContextPair]:
    """Returns preference pairs rearranged: which of prompt and response the sides share.

    - "same-prompt": as they are, x⁺ = x⁻; preference data.
    - "same-response": y⁻ = y⁺, the chosen response under the prompt of the next pair; a true
      response in the wrong context, as CausalDialogue (Tuan et al. 2023, arXiv 2212.10515) makes
      them.
    - "unpaired": the rejected response of the next pair with its own prompt, as where chosen and
      rejected examples come in batches of their own.

    Raises:
        ValueError: an unknown kind; fewer than two pairs where the next one is needed.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    if kind == "same-prompt":
        return [ContextPair(p.prompt, p.chosen, p.prompt, p.rejected) for p in pairs]
    if len(pairs) < 2:
        raise ValueError(f"pairs: expected two or more for {kind}, got {len(pairs)}")
    others = [*pairs[1:], pairs[0]]
    if kind == "unpaired":
        return [
            ContextPair(p.prompt, p.chosen, q.prompt, q.rejected)
            for p, q in zip(pairs, others, strict=True)
        ]
    return [
        ContextPair(p.prompt, p.chosen, q.prompt, p.chosen)
        for p, q in zip(pairs, others, strict=True)
    ]


def encode_contexts(
    tokenizer: Any,
    pairs: Sequence[ContextPair],
    *,
    max_length: int | None = None,
    chat: bool = False,
) -> PairBatch:
    """Returns pairs as a batch, each response in its own context.

    Args:
        tokenizer: as in `encode_pairs`, and so the others.
        pairs: at least one.
        max_length: as there.
        chat: as there.

    Raises:
        ValueError: as `encode_pairs`.
    """
    chosen, rejected = (
        encode_pairs(
            tokenizer,
            [Pair(getattr(p, prompt), p.chosen, p.rejected) for p in pairs],
            max_length=max_length,
            chat=chat,
        )
        for prompt in ("chosen_prompt", "rejected_prompt")
    )
    length = max(chosen.tokens.shape[1], rejected.tokens.shape[1])
    fill = int(tokenizer.eos_token_id)
    chosen, rejected = (_padded(batch, length, fill) for batch in (chosen, rejected))
    b = len(pairs)
    return PairBatch(*(torch.cat([x[:b], y[b:]]) for x, y in zip(chosen, rejected, strict=True)))


def cross_cells(batch: PairBatch) -> PairBatch:
    """Returns the responses of pairs in each other's context: (x⁻, y⁺) before (x⁺, y⁻).

    Args:
        batch: as it is trained on, (x⁺, y⁺) before (x⁻, y⁻).
    """
    rows = [_parts(batch, i) for i in range(len(batch.tokens))]
    b = len(rows) // 2
    swapped = [(rows[(i + b) % (2 * b)][0], rows[i][1]) for i in range(2 * b)]
    length = max(len(prompt) + len(response) for prompt, response in swapped)
    tokens = batch.tokens.new_zeros(2 * b, length)
    mask = torch.zeros_like(tokens)
    labels = torch.full_like(tokens, IGNORED)
    for i, (prompt, response) in enumerate(swapped):
        first, last = len(prompt), len(prompt) + len(response)
        tokens[i, :last] = torch.cat([prompt, response])
        mask[i, :last] = 1
        labels[i, first:last] = response
    return PairBatch(tokens, mask, labels[:, 1:])


def shared_rows(batch: PairBatch) -> torch.Tensor:
    """Returns where the two rows of logits of a pair are the same: (B, T-1), bool.

    Two rows are the same where all tokens up to their own are, prompt included.
    """
    chosen, rejected = batch.tokens.chunk(2)
    both = batch.attention_mask.chunk(2)
    same = (chosen == rejected) & (both[0] == 1) & (both[1] == 1)
    return same.cumprod(-1).bool()[:, :-1]


def _parts(batch: PairBatch, i: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the tokens of the prompt and of the response of a sequence."""
    places = batch.mask[i].nonzero()[:, 0] + 1
    if not len(places):
        raise ValueError(f"batch: expected a response in each sequence, got none in {i}")
    first, last = int(places[0]), int(places[-1]) + 1
    return batch.tokens[i, :first], batch.tokens[i, first:last]


def pairs_that_fit(
    tokenizer: Any, path: Path, count: int, max_length: int, *, least: int
) -> list[Pair]:
    """Returns the first pairs of a file that fit without truncation.

    Args:
        tokenizer: as in `fitting`, and so the others.
        path: as `read_pairs` takes it.
        count: how many at most.
        max_length: tokens.
        least: how many at least.

    Raises:
        ValueError: fewer than `least` fit.
    """
    found = fitting(tokenizer, read_pairs(path), count=count, max_length=max_length)
    if len(found) < least:
        raise ValueError(
            f"data: expected at least {least} pairs of at most {max_length} tokens, "
            f"got {len(found)}"
        )
    return found


def fitting(tokenizer: Any, pairs: Sequence[Pair], *, count: int, max_length: int) -> list[Pair]:
    """Returns the first pairs that fit without truncation, in the order of the file.

    Args:
        tokenizer: as in `encode_pairs`.
        pairs: to choose from.
        count: how many at most.
        max_length: tokens of a prompt, a response and the end token.
    """
    found: list[Pair] = []
    for pair in pairs:
        if len(found) == count:
            break
        sizes = [len(tokenizer(text, add_special_tokens=False).input_ids) for text in pair]
        # a prompt may begin with a token of its own
        if min(sizes) > 0 and sizes[0] + max(sizes[1:]) + 2 <= max_length:
            found.append(pair)
    return found


def _padded(batch: PairBatch, length: int, fill: int) -> PairBatch:
    """Pads a batch further on the right."""
    more = (0, length - batch.tokens.shape[1])
    return PairBatch(
        F.pad(batch.tokens, more, value=fill),
        F.pad(batch.attention_mask, more, value=0),
        F.pad(batch.labels, more, value=IGNORED),
    )
