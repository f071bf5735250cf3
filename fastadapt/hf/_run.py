"""A run of transformers' processors as one list of edits and one mask a step."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PrefixConstrainedLogitsProcessor

from fastadapt.hf._processors import RULES, Prefix, Rule, Step
from fastadapt.hf._touched import Touched
from fastadapt.sampling.edits import Edits


class Edited(NamedTuple):
    """Scores with what is still to be done to them.

    Attributes:
        scores: (N, V).
        edits: of the scores, None where nothing is edited.
        allowed: the tokens that are left, a bit each, None where all are.
    """

    scores: Tensor
    edits: Edits | None = None
    allowed: Tensor | None = None


class Run:
    """Applies processors that have a rule to the logits that they touch alone.

    Values and masks are those of the processors one after the other. The processors run themselves
    where the rules do not say all: on scores that are not float32 on the CPU (the host keeps the
    ids of a row), where ids are outside the vocabulary, where a touched logit is NaN or +inf, and
    where nothing is left of what is allowed.

    Args:
        processors: as `splits_at` finds them.
    """

    def __init__(self, processors: Sequence[LogitsProcessor]) -> None:
        """Reads the processors' settings."""
        self.processors: Any = LogitsProcessorList(processors)
        self.rules: list[Rule] = [RULES[type(p)](p) for p in processors]
        self.previous: Tensor | None = None
        self.tokens: list[list[int]] = []
        self.touched: Touched | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Edited:
        """Returns the scores as they are, (N, V), with edits, or what the processors make of them.

        Args:
            input_ids: (N, T); at each call those of the one before with one more token a row, or
                others, which are read anew.
            scores: (N, V).
        """
        if not self.rules:
            return Edited(scores)
        touched = self._followed(input_ids, scores) if _is_plain(input_ids, scores) else None
        if touched is None:
            return Edited(self.processors(input_ids, scores))
        prefixes = [rule for rule in self.rules if isinstance(rule, Prefix)]
        for prefix in prefixes:
            prefix.ask(input_ids)
        step = Step(input_ids, self.tokens, scores, touched)
        # a list, so that each rule sees each step: n-grams are counted as they come
        applies = all([rule.apply(step) for rule in self.rules])
        if not applies or not bool((step.values < float("inf")).all()):
            rules = self.rules
            stock = [r.again() if isinstance(r, Prefix) else r.processor for r in rules]
            chain: Any = LogitsProcessorList(stock)
            return Edited(chain(input_ids, scores))
        lists = step.lists
        edits = Edits.set(lists.ids, lists.offsets, step.values) if len(lists.ids) else None
        return Edited(scores, edits, step.allowed)

    def _followed(self, input_ids: Tensor, scores: Tensor) -> Touched | None:
        """Returns the touched ids up to this step, None where a rule does not fit."""
        (rows, length), vocabulary = input_ids.shape, scores.shape[1]
        previous, self.previous = self.previous, input_ids
        continues = previous is not None and torch.equal(input_ids[:, :-1], previous)
        if not continues or self.touched is None or self.touched.vocabulary != vocabulary:
            self.touched = None
            if all(rule.fits(rows, vocabulary) for rule in self.rules):
                self.tokens = input_ids.tolist()
                self.touched = self._begin(rows, vocabulary)
            return self.touched
        new = input_ids[:, -1].tolist()
        for of_row, token in zip(self.tokens, new, strict=True):
            of_row.append(token)
        growing = [(r.mark, r) for r in self.rules if r.mark is not None]
        of_rows = [[mark for mark, r in growing if r.adds(row, length - 1)] for row in range(rows)]
        self.touched.add(new, of_rows)
        return self.touched

    def _begin(self, rows: int, vocabulary: int) -> Touched:
        """Reads the first ids."""
        shared = sorted({i for rule in self.rules for i in rule.shared if 0 <= i < vocabulary})
        place = {token: at for at, token in enumerate(shared)}
        sets = list[list[set[int]]]()
        for rule in self.rules:
            columns = [place[i] for i in rule.shared if i in place]
            rule.columns = torch.tensor(columns, dtype=torch.int64)
            if rule.has_set:
                rule.mark = len(sets)
                sets.append([rule.first(row, rows, self.tokens[row]) for row in range(rows)])
        return Touched(shared, sets, vocabulary, rows)


def splits_at(processors: Sequence[Any]) -> int:
    """Returns where the last processors begin that have rules, one after the other."""
    at = len(processors)
    while at and _has_rule(processors[at - 1]):
        at -= 1
    return at


def _has_rule(processor: Any) -> bool:
    """Whether a processor is of a known class, and no other, and takes one row at a time."""
    if type(processor) is PrefixConstrainedLogitsProcessor:
        return bool(processor._num_beams == 1)  # noqa: SLF001, its only address
    return type(processor) in RULES


def _is_plain(input_ids: Tensor, scores: Tensor) -> bool:
    """Whether there is one row of float32 scores for each row of ids, both on the CPU."""
    return (
        input_ids.dim() == scores.dim() == 2
        and len(input_ids) == len(scores)
        and scores.dtype == torch.float32
        and scores.device.type == input_ids.device.type == "cpu"
    )
