"""Preference pairs: built-in ones, files of them, and their tokens as one padded batch."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastadapt._ops.checks import instance, integer
from fastadapt.training.pair_files import read_pairs
from fastadapt.training.pair_forms import Pair
from fastadapt.training.pair_tokens import TokenizedPair, Truncation, tokenize_pair

__all__ = [
    "IGNORED",
    "PAIRS",
    "Pair",
    "PairBatch",
    "TokenizedPair",
    "Truncation",
    "encode_pairs",
    "pad_pairs",
    "read_pairs",
    "tokenize_pair",
]

IGNORED = -100
"""The label of positions that do not count."""


class PairBatch(NamedTuple):
    """B pairs as 2B padded sequences, the chosen ones before the rejected ones.

    Examples:
        >>> from fastadapt.training.pairs import TokenizedPair, pad_pairs
        >>> batch = pad_pairs([TokenizedPair([1, 2], [3, 4, 5], [6], False)])
        >>> batch.labels
        tensor([[-100,    3,    4,    5],
                [-100,    6, -100, -100]])
        >>> batch.mask.sum(-1)
        tensor([3, 1])

    Attributes:
        tokens: (2B, T), int64; a prompt and a response each, padded on the right.
        attention_mask: (2B, T), int64; 1 but for padding.
        labels: (2B, T-1), int64; `tokens[:, 1:]` where that belongs to a response, else `IGNORED`.
    """

    tokens: Tensor
    attention_mask: Tensor
    labels: Tensor

    @property
    def mask(self) -> Tensor:
        """(2B, T-1), bool; True at the tokens of the responses."""
        return self.labels != IGNORED


def encode_pairs(
    tokenizer: Any,
    pairs: Sequence[Pair],
    *,
    max_length: int | None = None,
    truncation: Truncation = "prompt",
    chat: bool = True,
) -> PairBatch:
    """Returns pairs as one batch of tokens, each tokenised by `tokenize_pair`.

    Where pairs are cut to `max_length`, a warning has their number. (To count them, or to leave
    them out, call `tokenize_pair`, which says `truncated` of each, and `pad_pairs`.)

    Examples:
        >>> from tokenizers import Tokenizer, models
        >>> from transformers import PreTrainedTokenizerFast
        >>> words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, "?"))
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="?")
        >>> from fastadapt.training.pairs import Pair, encode_pairs
        >>> encode_pairs(tokenizer, [Pair("a", chosen="b", rejected="a")]).tokens
        tensor([[0, 1, 2],
                [0, 0, 2]])

    Args:
        tokenizer: of transformers' kind.
        pairs: at least one.
        max_length: T at most, at least 2; None: whatever the longest needs.
        truncation: what is cut from a pair that is longer: "prompt", its beginning first;
            "response", their ends first; "error", nothing.
        chat: whether prompts that are text go through the tokenizer's chat template.

    Raises:
        TypeError: something else than pairs, and as `tokenize_pair`.
        ValueError: no pairs; a pair that `tokenize_pair` refuses, with its number from 0.
    """
    given: object = pairs
    if isinstance(given, Pair | str) or not isinstance(given, Iterable):
        got = type(given).__name__
        raise TypeError(f"pairs: expected a sequence of Pairs, got {got}")
    tokenized = []
    for number, pair in enumerate(pairs):
        instance(f"pairs[{number}]", pair, Pair, "a Pair(prompt, chosen, rejected)")
        try:
            tokenized.append(
                tokenize_pair(
                    tokenizer, pair, max_length=max_length, truncation=truncation, chat=chat
                )
            )
        except (TypeError, ValueError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"pairs[{number}]: {error}") from error
    cut = sum(pair.truncated for pair in tokenized)
    if cut:
        warnings.warn(
            f"{cut} of {len(tokenized)} pairs were cut to {max_length} tokens", stacklevel=2
        )
    return pad_pairs(tokenized, fill=tokenizer.eos_token_id)


def pad_pairs(pairs: Iterable[TokenizedPair], *, fill: int | None = None) -> PairBatch:
    """Returns tokenised pairs as one batch, padded on the right.

    Examples:
        >>> from fastadapt.training.pairs import TokenizedPair, pad_pairs
        >>> batch = pad_pairs([TokenizedPair([1, 2], [3, 4, 5], [6], False)])
        >>> batch.tokens
        tensor([[1, 2, 3, 4, 5],
                [1, 2, 6, 0, 0]])

    Args:
        pairs: at least one.
        fill: the token in places that `attention_mask` hides; None: 0.

    Raises:
        TypeError: pairs that are not tokenised, a fill that is no integer.
        ValueError: no pairs.
    """
    instance("pairs", pairs, Iterable, "TokenizedPairs")
    if isinstance(pairs, TokenizedPair):
        raise TypeError("pairs: expected TokenizedPairs, got one, not in a list")
    pairs = list(pairs)
    if not pairs:
        raise ValueError("pairs: expected at least one, got none")
    for number, pair in enumerate(pairs):
        instance(f"pairs[{number}]", pair, TokenizedPair, "a TokenizedPair")
    fill = 0 if fill is None else integer("fill", fill)
    rows = [(pair.prompt_ids, pair.chosen_ids) for pair in pairs]
    rows += [(pair.prompt_ids, pair.rejected_ids) for pair in pairs]
    length = max(len(prompt) + len(ids) for prompt, ids in rows)
    tokens = torch.full((len(rows), length), fill)
    attention_mask = torch.zeros_like(tokens)
    labels = torch.full_like(tokens, IGNORED)
    for i, (prompt, ids) in enumerate(rows):
        first, last = len(prompt), len(prompt) + len(ids)
        tokens[i, :last] = torch.tensor(prompt + ids)
        attention_mask[i, :last] = 1
        labels[i, first:last] = tokens[i, first:last]
    return PairBatch(tokens, attention_mask, labels[:, 1:])


PAIRS = tuple(read_pairs(Path(__file__).with_name("builtin_pairs.jsonl")))
"""Pairs written for this package.

The chosen responses are short, friendly facts; the rejected ones are rude or beside the point.
"""
