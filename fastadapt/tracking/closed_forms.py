"""The closed forms behind `analytic_gradients`: the catalogue's expressions, evaluated.

A loss's coefficients are stated once, as the expressions that tables print, and evaluated here in
float64; nothing is differentiated. An expression has numbers of tokens or of responses in it, not
both.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastadapt.losses.catalogue.entry import Gradient
from fastadapt.losses.catalogue.listing import CATALOGUE
from fastadapt.losses.rows import Pairs, Rows, paired, token_weights
from fastadapt.losses.scores import Sides, scored
from fastadapt.tracking.expressions import value_of

# The letters by which expressions name the options of the losses.
OPTION_SYMBOLS = {
    "alphapo_alpha": "α",
    "beta": "β",
    "coefficient": "λ",
    "delta": "δ",
    "desirable_weight": "λ⁺",
    "discopop_tau": "τ",
    "dpop_lambda": "λ",
    "focal_gamma": "γ",
    "gamma": "γ",
    "label_smoothing": "ε",
    "nll_weight": "ν",
    "tdpo_alpha": "α",
    "undesirable_weight": "λ⁻",
}
_INPUT_SYMBOLS = {"reference_point": "z", "reward_shift": "δ"}
_OF_TOKENS = ("l", "m", "p")


class Slopes(NamedTuple):
    """∂L/∂l and ∂L/∂m of a side; without the latter, it is (1 - p) times the former."""

    logp: Tensor
    log_odds: Tensor | None = None


class Inputs(NamedTuple):
    """The inputs of the closed forms; `others` are those of `RewardPenalizeLoss.forward`."""

    chosen: Rows
    rejected: Rows | None
    refs: tuple[Tensor | None, Tensor | None]
    candidates: Tensor | None
    candidate_mask: Tensor | None
    total_sequences: Any
    others: Mapping[str, Any] = {}


def closed_form(name: str, x: Inputs, options: Mapping[str, Any]) -> dict[str, Slopes]:
    """Returns the slopes of one loss, with all its options, on each of its sides."""
    row, entry = gradient_of(name, options), CATALOGUE[name]
    if "candidates" in entry.needs:
        assert x.candidates is not None
        evaluate = _Symbols(name, x, options, "candidates")
        log_odds = None if row.log_odds is None else evaluate(row.log_odds)
        return {"candidates": Slopes(-evaluate(row.rejected), log_odds)}
    sides = ["chosen"] if entry.limits is None and row.rejected == "0" else ["chosen", "rejected"]
    return {side: _slopes(name, row, x, options, side, alone=len(sides) == 1) for side in sides}


def gradient_of(name: str, options: Mapping[str, Any]) -> Gradient:
    """Returns the catalogue's row for a loss with these options, all that it has."""
    rows = CATALOGUE[name].gradients
    return next(r for r in rows if all(options[k] == v for k, v in r.given.items()))


def response_slopes(name: str, x: Inputs, options: Mapping[str, Any], side: str) -> Tensor:
    """Returns ∂L/∂S of each response of a side times the number of responses, (B,).

    For losses whose coefficients are those of responses: the k of DPO, on the rejected side.
    """
    evaluate = _Symbols(name, x, options, side)
    row = gradient_of(name, options)
    of_each: Tensor = evaluate.of_responses(getattr(row, side)) * evaluate["B"]
    return -of_each


def _slopes(
    name: str, row: Gradient, x: Inputs, options: Mapping[str, Any], side: str, *, alone: bool
) -> Slopes:
    """Returns the slopes of a loss on one side."""
    evaluate = _Symbols(name, x, options, side)
    c = evaluate(getattr(row, side))
    stated = row.log_odds is not None and (alone or side == "rejected")
    return Slopes(-c, evaluate(row.log_odds or "") if stated else None)


class _Symbols(dict[str, Any]):
    """What the symbols of a loss's expressions are on one side, made where they are asked for."""

    def __init__(self, name: str, x: Inputs, options: Mapping[str, Any], side: str) -> None:
        super().__init__(
            σ=torch.sigmoid,
            exp=lambda v: torch.exp(torch.as_tensor(v, dtype=torch.float64)),
            expm1=torch.expm1,
            log=lambda v: torch.log(torch.as_tensor(v, dtype=torch.float64)),
            relu=torch.relu,
            matched=self._matched,
            inf=float("inf"),
        )
        self.options = options
        self.update(
            {_plain(s): self.options.get(k) for k, s in OPTION_SYMBOLS.items() if k in self.options}
        )
        self.update({s: x.others[k] for k, s in _INPUT_SYMBOLS.items() if k in x.others})
        self.x, self.side = x, side
        self.needs = CATALOGUE[name].needs
        self.u = gradient_of(name, options).u
        self.tokenwise = False

    def __call__(self, text: str) -> Tensor:
        """Returns an expression's value at each token, weights of tokens and pairs included."""
        self.tokenwise = False
        value = self._value(text)
        if self.side == "candidates":
            assert self.x.candidates is not None
            return value.expand_as(self.x.candidates)
        rows = self.rows
        if self.tokenwise or value.dim() == 0:
            value = value.expand_as(rows.log_odds)
        else:
            value = rows.spread(value).expand_as(rows.log_odds)
        return value * self._weights() if "ld_alpha" in self.options else value

    def of_responses(self, text: str) -> Tensor:
        """Returns an expression's value at each response."""
        return self._value(text).expand(self.rows.size)

    def _value(self, text: str) -> Tensor:
        """Returns the value of an expression."""
        return torch.as_tensor(value_of(_plain(text), self), dtype=torch.float64)

    def __missing__(self, name: str) -> Any:
        """Makes a symbol: of the own side without a suffix, else of the side it names."""
        made: Any
        if name == "u":
            made = self._value(self.u)
        elif name in _OF_TOKENS:
            self.tokenwise = True
            return self._of_tokens(name)
        elif name in ("N", "B", "Q", "M", "L"):
            made = self._of_batch(name)
        else:
            kind, _, side = name.partition("_")
            made = self._of_response(kind, side or self.side)
        self[name] = made
        return made

    @property
    def rows(self) -> Rows:
        """The own side; candidates stand in rows of the chosen one."""
        return self._rows("rejected" if self.side == "rejected" else "chosen")

    @functools.cached_property
    def pairs(self) -> Pairs:
        """The pairs of a loss of pairs."""
        given = self.x.total_sequences is not None
        both = "reference" not in self.needs
        return paired(self._rows("chosen"), self._rows("rejected"), given=given, both=both)

    def _rows(self, side: str) -> Rows:
        """Returns a side, which the objective has checked to be there."""
        rows = self.x.chosen if side == "chosen" else self.x.rejected
        assert rows is not None
        return rows

    def _of_tokens(self, name: str) -> Tensor:
        """Returns a number of each token, or of each candidate."""
        m = self.rows.log_odds
        if self.side == "candidates":
            assert self.x.candidates is not None
            m = self.x.candidates
        return {"m": lambda: m, "p": lambda: torch.sigmoid(m), "l": lambda: F.logsigmoid(m)}[name]()

    def _of_batch(self, name: str) -> Any:
        """Returns a number of the whole side, or of both."""
        if name in ("N", "Q") and self.x.others.get("gold") is not None and "pairs" in self.needs:
            return float("inf")  # the likelihood is that of other responses
        if name == "N":
            return torch.as_tensor(self.rows.tokens).double()
        if name == "B" and "pairs" in self.needs:
            # a pair that does not count has a share of 0
            return torch.where(self.pairs.counted, self.pairs.number, float("inf")).double()
        if name in ("B", "Q"):
            return torch.as_tensor(self.rows.sequences).double()
        if name == "L":
            rows = self._rows("rejected")
            return rows.sum(F.logsigmoid(rows.log_odds)).sum() / rows.tokens
        counts = [
            rows.sequences if self.x.total_sequences is not None else (rows.lengths > 0).sum()
            for rows in (self._rows("chosen"), self._rows("rejected"))
        ]
        return torch.as_tensor(counts[0] + counts[1]).clamp(min=1).double()

    def _of_response(self, kind: str, side: str) -> Tensor:
        """Returns a number of each response of a side, (B,)."""
        rows = self._rows(side)
        at = int(side == "rejected")
        alpha = self.options.get("ld_alpha")
        if kind == "T":
            return rows.lengths.clamp(min=1).double()
        if kind == "D":
            given = self.x.others[f"{side}_divergences"].double()
            return rows.sum(given)
        reference = self.x.refs[at]
        constant = torch.zeros(rows.size).double() if reference is None else reference.double()
        if kind == "R":
            return constant
        own = rows.logps() if alpha is None else self.pairs.logps(ld_alpha=alpha)[at]
        if kind in ("S", "P"):
            return own if kind == "S" else own.exp()
        if kind != "r":
            raise KeyError(kind)
        ratio = own - constant
        if "f_divergence" not in self.options:
            return ratio
        return scored(Sides(ratio, ratio), self.options["f_divergence"], self.options["f_alpha"])[0]

    def _matched(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns x minus the value of y of the same rank among the pairs that count, (B,)."""
        counted = self.pairs.counted
        x, y = (torch.where(counted, v, float("inf")) for v in (x, y))
        rank = x.argsort(stable=True).argsort(stable=True)
        return torch.where(counted, x - y.sort(stable=True).values[rank], 0.0)

    def _weights(self) -> Tensor:
        """Returns what the gradient of a pair's tokens is multiplied by."""
        rows, pairs = self.rows, self.pairs
        weights = torch.ones(rows.size, dtype=torch.float64, device=rows.log_odds.device)
        if self.x.others.get("pair_weights") is not None and "batch" not in self.needs:
            weights = self.x.others["pair_weights"].double()
        if "f_divergence" in self.options:
            weights = weights * self._score_slope()
        per_token = rows.spread(weights).expand_as(rows.log_odds)
        alpha = self.options.get("ld_alpha")
        if alpha is not None:
            per_token = per_token * token_weights(rows, pairs.shared, alpha)
        return per_token

    def _score_slope(self) -> Tensor:
        """Returns the derivative of the own side's scores in r, (B,)."""
        kind, alpha = self.options["f_divergence"], self.options["f_alpha"]
        ratio = self._of_response("S", self.side) - self._of_response("R", self.side)
        slopes = {
            "reverse_kl": lambda: torch.ones_like(ratio),
            "forward_kl": lambda: torch.exp(-ratio),
            "js_divergence": lambda: torch.sigmoid(-ratio),
            "alpha_divergence": lambda: torch.exp(ratio * (alpha - 1)),
        }
        return slopes[kind]()


def _plain(text: str) -> str:
    """Returns a text whose superscripts, which no name may have, are spelt out."""
    return text.replace("⁺", "_chosen").replace("⁻", "_rejected")
