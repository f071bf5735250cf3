"""Ids of the chosen responses' own rows that a loss makes less likely, scored with the labels.

The head scores the rows of labels inside the model's forward, without logits; the candidates of a
row are scored in the same call, by the same head.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastadapt._ops.checks import instance, integer, nearest, one_of
from fastadapt.linear import linear_candidate_log_odds
from fastadapt.losses.candidates import previous_tokens
from fastadapt.losses.mixture import RewardPenalizeLoss
from fastadapt.losses.negatives import linear_top_k, repeated_ngrams
from fastadapt.training.pairs import IGNORED
from fastadapt.trl._log_probs import Head, Outputs, Scorer, score

CONTEXTS = ("response", "sequence")
# Of each kind its options, as they are if nothing is said.
KINDS: dict[str, dict[str, Any]] = {
    "previous": {"window": None, "context": "response"},
    "top_k": {"k": 1},
    "repeated_ngrams": {"n": 4, "context": "response"},
}


class Batch(NamedTuple):
    """The tokens of R rows, prompts and responses."""

    tokens: Tensor  # (R, T)
    labels: Tensor  # (R, T - 1), the labels that are scored, or -100
    chosen: Tensor  # (R, T - 1), bool; the tokens of the chosen responses, all of them scored
    context: Tensor  # (R, T), bool; no padding


class Listed(NamedTuple):
    """Candidates of the M tokens of chosen responses, in the order of rows."""

    ids: Tensor  # (M, K)
    mask: Tensor  # (M, K), bool


class Negatives:
    """A kind of candidates and its options.

    Args:
        kind: of `KINDS`.
        options: of this kind.

    Raises:
        TypeError, ValueError: an unknown kind or option, or one out of range.
    """

    def __init__(self, kind: str, options: Mapping[str, Any] | None = None) -> None:
        one_of("negatives", kind, tuple(KINDS))
        own = KINDS[kind]
        if options is not None:
            instance("negative_options", options, Mapping, "a mapping of names to values")
        left = sorted((options or {}).keys() - own.keys())
        if left:
            raise ValueError(
                f"negative_options: expected some of {', '.join(own)} for {kind}, got {left}"
                f"{nearest(left, own)}"
            )
        self.kind, self._options = kind, own | dict(options or {})
        for name in self._options.keys() & {"k", "n", "window"}:
            if name != "window" or self._options[name] is not None:
                self._options[name] = integer(name, self._options[name], 1)
        if "context" in own:
            one_of("context", self._options["context"], CONTEXTS)

    def of_tokens(self, batch: Batch) -> Listed | None:
        """Returns the candidates that the tokens say; None: the head is asked (`of_head`)."""
        if self.kind == "top_k":
            return None
        rows = F.pad(batch.chosen, (1, 0))  # as the tokens lie
        there = batch.context if self._options["context"] == "sequence" else rows
        parts = [
            self._of_sequence(*each)
            for each in zip(batch.tokens, there, rows, strict=True)
            if bool(each[2].any())
        ]
        if not parts:
            none = batch.tokens.new_zeros(0, 1)
            return Listed(none, none.bool())
        most = max([part.ids.shape[1] for part in parts])
        padded = [Listed(*(F.pad(x, (0, most - x.shape[1])) for x in part)) for part in parts]
        return Listed(*(torch.cat(column) for column in zip(*padded, strict=True)))

    def _of_sequence(self, tokens: Tensor, there: Tensor, rows: Tensor) -> Listed:
        """Returns the candidates of one sequence, its rows cut to the most that one has."""
        places = there.nonzero()[:, 0]
        span = slice(int(places[0]), int(places[-1]) + 1) if len(places) else slice(0)
        labels = tokens.masked_fill(~there, IGNORED)[None, span]
        if self.kind == "previous":
            index, mask = previous_tokens(labels, window=self._options["window"])
        else:
            index, mask = repeated_ngrams(labels, self._options["n"])
        index, mask = index[0][rows[span]], mask[0][rows[span]]
        if not mask.numel() or not bool(mask.any()):
            return Listed(index.new_zeros(len(index), 1), mask.new_zeros(len(mask), 1))
        most = int(mask.sum(1).max())
        order = mask.int().argsort(dim=1, descending=True, stable=True)[:, :most]
        return Listed(index.gather(1, order), mask.gather(1, order))

    def of_head(self, hidden: Tensor, labels: Tensor, head: Head) -> Listed:
        """Returns the candidates that the rows' own logits say."""
        with torch.no_grad():
            found = linear_top_k(
                hidden,
                head.weight,
                self._options["k"],
                labels,
                head.bias,
                softcap=head.softcap,
                logit_scale=head.scale,
                lora=head.lora,
            )
        return Listed(*found)


class CandidateLogOdds(Scorer):
    """Replaces trl's function by one that returns log-odds, and scores candidates beside them.

    Candidates are scored within `reading` alone.
    """

    def __init__(self, negatives: Negatives) -> None:
        self.negatives = negatives
        self.found: Tensor | None = None  # (M K,), the candidates' log-odds of the last call
        self._batch: Batch | None = None
        self._listed: Listed | None = None

    @contextlib.contextmanager
    def reading(self, batch: Batch) -> Iterator[None]:
        """Has the calls of the block, which score a batch's labels, score its candidates."""
        self._batch, self._listed, self.found = batch, self.negatives.of_tokens(batch), None
        try:
            yield
        finally:
            self._batch = None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def apply(self, *arguments: Any) -> Outputs:
        """Returns log-odds (N,), and the other outputs of trl's function."""
        return score(*[*arguments, None, None if self._batch is None else self])

    def of(self, hidden: Tensor, labels: Tensor, head: Head) -> Tensor:
        """Returns the log-odds of the candidates, (M K,), among N rows of labels.

        Raises:
            RuntimeError: rows of other labels than the batch's.
        """
        assert self._batch is not None
        every, chosen = self._batch.labels, self._batch.chosen
        scored = every != IGNORED
        if not torch.equal(labels, every[scored]):
            raise RuntimeError(
                f"labels: expected the {int(scored.sum())} of the batch in their order, "
                f"got {len(labels)} others"
            )
        rows = chosen[scored].nonzero()[:, 0]  # they are scored in the order of the batch
        hidden, labels = hidden.index_select(0, rows), labels.index_select(0, rows)
        if self._listed is None:
            self._listed = self.negatives.of_head(hidden, labels, head)
        index, mask = self._listed
        # ids that stand for images have no logit
        self._listed = Listed(index, mask & (index < head.weight.shape[0]))
        found: Any = linear_candidate_log_odds(
            hidden,
            head.weight,
            *self._listed,
            head.bias,
            softcap=head.softcap,
            logit_scale=head.scale,
            lora=head.lora,
        )
        log_odds: Tensor = found
        return log_odds.flatten()

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """Returns what `RewardPenalizeLoss` takes, (R, T - 1, K), after the forward of a batch.

        Raises:
            RuntimeError: no forward has scored them.
        """
        if self.found is None or self._listed is None:
            raise RuntimeError("negatives: expected a forward that scores labels once, got none")
        log_odds, (_, mask) = self.found.view(self._listed.mask.shape), self._listed
        chosen = batch.chosen
        whole = log_odds.new_zeros(*chosen.shape, mask.shape[1])
        there = mask.new_zeros(whole.shape)
        at = chosen[..., None].expand_as(whole)
        return {
            "candidates": whole.masked_scatter(at, log_odds),
            "candidate_mask": there.masked_scatter(at, mask),
        }

    @property
    def per_token(self) -> Tensor:
        """The mean number of candidates of a chosen token, a scalar."""
        assert self._listed is not None
        mask = self._listed.mask
        return mask.sum() / max(1, len(mask))


def scorer_of(
    negatives: str | None, options: Mapping[str, Any] | None, objective: RewardPenalizeLoss
) -> CandidateLogOdds | None:
    """Returns what scores the candidates of a mixture, None where it has none.

    Raises:
        TypeError, ValueError: as `Negatives`; candidates that no loss takes, or none for one that
            does.
    """
    names = ", ".join(objective.weights)
    if objective.needs("candidates") != (negatives is not None):
        wanted = f"one of {', '.join(KINDS)}" if negatives is None else "None"
        raise ValueError(f"negatives: expected {wanted} for {names}, got {negatives!r}")
    if negatives is None:
        if options:
            raise ValueError(f"negative_options: expected None without negatives, got {options!r}")
        return None
    return CandidateLogOdds(Negatives(negatives, options))
