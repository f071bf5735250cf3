"""Pairs whose two responses may stand in different contexts, and their four cells as tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from fastadapt.preferences import IGNORED, Pair, PairBatch, encode_pairs

KINDS = ("same-prompt", "same-response")


class ContextPair(NamedTuple):
    """A good response in its context x⁺ and a bad one in x⁻."""

    good_prompt: str
    good: str
    bad_prompt: str
    bad: str


def pairs_of_kind(kind: str, pairs: Sequence[Pair]) -> list[ContextPair]:
    """Returns preference pairs as one of the two ends of likeness between y⁺ and y⁻.

    - "same-prompt": as they are, x⁺ = x⁻; preference data.
    - "same-response": y⁻ = y⁺, the good response under the prompt of the next pair; a true response
      in the wrong context, as CausalDialogue (Tuan et al. 2023, arXiv 2212.10515) makes them.

    Raises:
        ValueError: an unknown kind; fewer than two pairs for "same-response".
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    if kind == "same-prompt":
        return [ContextPair(p.prompt, p.good, p.prompt, p.bad) for p in pairs]
    if len(pairs) < 2:
        raise ValueError(f"pairs: expected two or more for same-response, got {len(pairs)}")
    others = [*pairs[1:], pairs[0]]
    return [
        ContextPair(p.prompt, p.good, q.prompt, p.good) for p, q in zip(pairs, others, strict=True)
    ]


def encode_contexts(
    tokenizer: Any,
    pairs: Sequence[ContextPair],
    *,
    max_length: int | None = None,
    chat: bool = False,
) -> tuple[PairBatch, PairBatch]:
    """Returns the batch to train on and its cross cells, of one length.

    Args:
        tokenizer: as in `encode_pairs`, and so the others.
        pairs: at least one.
        max_length: as there.
        chat: as there.

    Returns:
        `(own, cross)`: own holds (x⁺, y⁺) before (x⁻, y⁻), cross (x⁻, y⁺) before (x⁺, y⁻).

    Raises:
        ValueError: as `encode_pairs`.
    """
    good, bad = (
        encode_pairs(
            tokenizer,
            [Pair(getattr(p, prompt), p.good, p.bad) for p in pairs],
            max_length=max_length,
            chat=chat,
        )
        for prompt in ("good_prompt", "bad_prompt")
    )
    length = max(good.tokens.shape[1], bad.tokens.shape[1])
    fill = int(tokenizer.eos_token_id)
    good, bad = (_padded(batch, length, fill) for batch in (good, bad))
    b = len(pairs)
    own = [torch.cat([x[:b], y[b:]]) for x, y in zip(good, bad, strict=True)]
    cross = [torch.cat([y[:b], x[b:]]) for x, y in zip(good, bad, strict=True)]
    return PairBatch(*own), PairBatch(*cross)


def fitting(tokenizer: Any, pairs: Sequence[Pair], *, count: int, max_length: int) -> list[Pair]:
    """Returns the first pairs of which nothing has to be cut, in the order of the file.

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
    """A batch with more padding on the right."""
    more = (0, length - batch.tokens.shape[1])
    return PairBatch(
        F.pad(batch.tokens, more, value=fill),
        F.pad(batch.attention_mask, more, value=0),
        F.pad(batch.labels, more, value=IGNORED),
    )
