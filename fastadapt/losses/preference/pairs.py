"""Pairs of a chosen and a rejected response: checks, log-ratios to a reference, means over pairs.

Notation: S is log P of a response, T its number of tokens, r = S - S_ref its log-ratio, and Δ = r⁺
- r⁻ the gap of a pair. All is float64.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastadapt._ops.checks import number, one_of
from fastadapt.losses.responses import Responses, accumulated
from fastadapt.losses.rows import Rows, checked

F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


class Sides(NamedTuple):
    """One number a response of each side, (B,)."""

    chosen: Tensor
    rejected: Tensor

    @property
    def gap(self) -> Tensor:
        """The difference of a pair."""
        return self.chosen - self.rejected


class Pairs(NamedTuple):
    """Checked pairs, the i-th chosen with the i-th rejected response."""

    chosen: Rows
    rejected: Rows
    counted: Tensor  # (B,), the pairs with tokens
    number: int | Tensor  # divisor of the mean over pairs

    @property
    def lengths(self) -> Sides:
        """The numbers of tokens, at least 1."""
        return Sides(*(rows.lengths.clamp(min=1) for rows in (self.chosen, self.rejected)))

    @property
    def shared(self) -> Tensor:
        """The length of the shorter response, (B,)."""
        return torch.minimum(self.chosen.lengths, self.rejected.lengths)

    def logps(self, *, mean: bool = False, ld_alpha: float | None = None) -> Sides:
        """Returns S of both sides, S / T on request; with `ld_alpha` that of LD-DPO.

        That counts tokens beyond the shorter response's length α times (Liu et al. 2024, arXiv
        2409.06411, eq. 10).
        """
        sides = (self.chosen, self.rejected)
        if ld_alpha is None:
            return Sides(*(rows.logps(mean=mean) for rows in sides))
        ld_alpha = number("ld_alpha", ld_alpha)
        if ld_alpha > 1:
            raise ValueError(f"ld_alpha: expected a value in [0, 1], got {ld_alpha}")
        weights = (token_weights(rows, self.shared, ld_alpha) for rows in sides)
        logps = (F.logsigmoid(rows.log_odds) for rows in sides)
        parts = zip(sides, weights, logps, strict=True)
        return Sides(*(rows.sum(w * x) for rows, w, x in parts))

    def ratios(
        self,
        ref_chosen_logps: Tensor | None,
        ref_rejected_logps: Tensor | None,
        ld_alpha: float | None = None,
    ) -> Sides:
        """Returns r of both sides, S without a reference."""
        own = self.logps(ld_alpha=ld_alpha)
        constant = self.references(ref_chosen_logps, ref_rejected_logps)
        return Sides(own.chosen - constant.chosen, own.rejected - constant.rejected)

    def references(
        self, ref_chosen_logps: Tensor | None, ref_rejected_logps: Tensor | None
    ) -> Sides:
        """Returns S_ref of both sides, held constant; 0 without a reference."""
        if (ref_chosen_logps is None) != (ref_rejected_logps is None):
            raise ValueError("ref_chosen_logps, ref_rejected_logps: expected both or none, got one")
        return Sides(
            reference("ref_chosen_logps", self.chosen, ref_chosen_logps),
            reference("ref_rejected_logps", self.rejected, ref_rejected_logps),
        )

    def mean(self, losses: Tensor, weights: Tensor | None = None) -> Tensor:
        """Returns the mean of the pairs' losses, each times its weight."""
        if weights is not None:
            losses = losses * per_response("pair_weights", weights, self.chosen)
        total = torch.where(self.counted, losses, 0).sum() / self.number
        return total.to(self.chosen.dtype)


def pairs_of(chosen: Responses, rejected: Responses, *, both: bool = False) -> Pairs:
    """Checks two sides and returns their pairs.

    A pair counts if one of its responses has a token; with `both`, for losses without a reference,
    if both have.
    """
    g, b = checked("chosen", chosen), checked("rejected", rejected)
    given = chosen.total_sequences is not None
    if given != (rejected.total_sequences is not None):
        raise ValueError("total_sequences: expected it for both sides or for none, got one")
    if g.size != b.size:
        raise ValueError(f"rejected: expected {g.size} responses, as many as chosen, got {b.size}")
    return paired(g, b, given=given, both=both)


def paired(chosen: Rows, rejected: Rows, *, given: bool, both: bool) -> Pairs:
    """Returns the pairs of two checked sides, whose number of responses is `given` or counted."""
    of_each = chosen.lengths > 0, rejected.lengths > 0
    counted = of_each[0] & of_each[1] if both else of_each[0] | of_each[1]
    return Pairs(
        chosen, rejected, counted, chosen.sequences if given else counted.sum().clamp(min=1)
    )


def reference(name: str, rows: Rows, logps: Tensor | None) -> Tensor:
    """Returns S_ref, (B,), held constant; 0 without a reference."""
    if logps is None:
        return rows.log_odds.new_zeros(rows.size)
    return per_response(name, logps, rows)


def per_response(name: str, value: object, rows: Rows) -> Tensor:
    """Returns one number a response, (B,) float64, held constant, after checks."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name}: expected a float tensor, got {got}")
    if value.shape != (rows.size,):
        raise ValueError(f"{name}: expected ({rows.size},), got {tuple(value.shape)}")
    if value.device != rows.log_odds.device:
        raise ValueError(f"{name}: expected device {rows.log_odds.device}, got {value.device}")
    return value.detach().double()


def scalar(name: str, value: object, rows: Rows) -> Tensor:
    """Returns one number of a batch, () float64, held constant, after checks."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name}: expected one value, got shape {tuple(value.shape)}")
        return accumulated(name, value).detach().double().reshape(()).to(rows.log_odds.device)
    return rows.log_odds.new_tensor(number(name, value, signed=True))


def scored(ratios: Sides, f_divergence: str, f_alpha: float) -> Sides:
    """Returns f'(e^r) - f'(1) of both sides.

    f-DPO (Wang et al. 2023, arXiv 2309.16240, table 1): r for the reverse KL divergence, 1 - e^-r
    for the forward one, log 2 + log σ(r) for Jensen and Shannon's, (e^(r(a-1)) - 1) / (a-1) for
    that of alpha a, which is r at a = 1.
    """
    one_of("f_divergence", f_divergence, F_DIVERGENCES)
    alpha = number("f_alpha", f_alpha, signed=True)
    if f_divergence == "forward_kl":
        return Sides(*(-exponential(-r) for r in ratios))
    if f_divergence == "js_divergence":
        return Sides(*(math.log(2) + F.logsigmoid(r) for r in ratios))
    if f_divergence == "alpha_divergence" and alpha != 1:
        return Sides(*(exponential(r * (alpha - 1)) / (alpha - 1) for r in ratios))
    return ratios


def exponential(x: Tensor) -> Tensor:
    """Returns e^x - 1, which goes on along its tangent from x = 700.

    Near there float64 ends, and an infinite slope would meet the 0 of a margin that is won.
    """
    beyond = math.exp(700) * (x - 699)
    return torch.where(x > 700, beyond, torch.expm1(x.clamp(max=700)))


def margin(
    ratios: Sides,
    beta: float,
    f_divergence: str = "reverse_kl",
    f_alpha: float = 0.5,
    lengths: Sides | None = None,
) -> Tensor:
    """Returns u, (B,): β times the gap of the pairs' scores, divided by the lengths if given."""
    scores = scored(ratios, f_divergence, f_alpha)
    if lengths is not None:
        scores = Sides(*(x / n for x, n in zip(scores, lengths, strict=True)))
    return number("beta", beta, positive=True) * scores.gap


def logistic(x: Tensor, smoothing: float = 0.0) -> Tensor:
    """Returns -log σ(x), or -(1-ε) log σ(x) - ε log σ(-x) with a share ε of labels swapped."""
    right = -F.logsigmoid(x)
    return right if smoothing == 0 else (1 - smoothing) * right - smoothing * F.logsigmoid(-x)


def probability(x: Tensor) -> Tensor:
    """Returns σ(x) with the slope σ(x) σ(-x): that of `sigmoid`, s - s², is 0 from x = 37 on."""
    return F.logsigmoid(x).exp()


def smoothing_of(value: object, *, positive: bool = False) -> float:
    """Returns a share of swapped labels, in [0, 1/2), or (0, 1/2)."""
    share = number("label_smoothing", value, positive=positive)
    if share >= 0.5:
        low = "(" if positive else "["
        raise ValueError(f"label_smoothing: expected a value in {low}0, 0.5), got {share}")
    return share


def token_weights(rows: Rows, shared: Tensor, ld_alpha: float) -> Tensor:
    """Returns 1 at the first `shared` tokens of each response and α at the others."""
    one = rows.log_odds.new_ones(())  # of two numbers torch.where would make float32
    return torch.where(_places(rows) < rows.spread(shared), one, ld_alpha)


def _places(rows: Rows) -> Tensor:
    """Returns how many tokens of its response stand before each token, shape of the log-odds."""
    if rows.segments is None:
        return rows.kept.cumsum(-1) - 1
    ids = torch.where(rows.kept, rows.segments, rows.size)
    order = ids.argsort(stable=True)
    ends = torch.cat([rows.lengths.new_zeros(1), rows.lengths]).cumsum(0)  # (B+1,)
    places = torch.arange(len(ids), device=ids.device) - ends[ids[order]]
    return torch.empty_like(places).index_copy(0, order, places)
