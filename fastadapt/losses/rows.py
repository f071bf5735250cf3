"""Checked responses and pairs of them, and sums and means over tokens, responses and pairs.

Notation: S is log P of a response, T its number of tokens, r = S - S_ref its log-ratio.
"""

from numbers import Integral
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastadapt._ops.checks import number, shown
from fastadapt.losses.scores import Sides
from fastadapt.losses.shapes import FIELDS, Labelled, accumulated, beside, like_log_odds

REDUCTIONS = ("token_mean", "sequence_sum")


class Rows(NamedTuple):
    """Checked responses: log-odds in float64, 0 where nothing counts.

    All that a loss does to its N numbers is done in float64: a float32 sum of 20,000 tokens is a
    multiple of 2^-9 nats or worse. Means over tokens and responses return `dtype`.
    """

    log_odds: Tensor  # float64
    kept: Tensor
    segments: Tensor | None
    size: int  # B
    tokens: int | Tensor  # divisors of the means, at least 1
    sequences: int | Tensor
    lengths: Tensor  # (B,)
    dtype: torch.dtype  # of results: float64 for float64, else float32

    def sum(self, x: Tensor) -> Tensor:
        """Returns the sum of per-token values of each response, (B,)."""
        x = torch.where(self.kept, x, 0)
        return x.sum(-1) if self.segments is None else _scatter_sum(x, self.segments, self.size)

    def token_mean(self, x: Tensor) -> Tensor:
        """Returns the mean of per-token values over all tokens of the batch."""
        return (torch.where(self.kept, x, 0).sum() / self.tokens).to(self.dtype)

    def sequence_mean(self, x: Tensor) -> Tensor:
        """Returns the mean of per-response values over the responses that have tokens."""
        return (torch.where(self.lengths > 0, x, 0).sum() / self.sequences).to(self.dtype)

    def spread(self, x: Tensor) -> Tensor:
        """Returns per-response values (B,) at each of their tokens; packed, at ignored ones too."""
        return x[:, None].expand_as(self.kept) if self.segments is None else x[self.segments]

    def reduced(self, x: Tensor, reduction: str) -> Tensor:
        """Returns a mean of per-token values: over tokens, or of responses' sums or means."""
        if reduction == "token_mean":
            return self.token_mean(x)
        return self.sequence_mean(self.totals(x, mean=reduction == "sequence_mean"))

    def totals(self, x: Tensor, *, mean: bool = False) -> Tensor:
        """Returns the sum of per-token values of each response, (B,), or their mean on request."""
        sums = self.sum(x)
        return sums / self.lengths.clamp(min=1) if mean else sums

    def logps(self, *, mean: bool = False) -> Tensor:
        """Returns S = log P of each response, (B,), or S / T on request."""
        return self.totals(F.logsigmoid(self.log_odds), mean=mean)

    def logsumexp(self, x: Tensor) -> Tensor:
        """Returns the log-sum-exp over each response, (B,); -inf without tokens."""
        x = torch.where(self.kept, x, float("-inf"))
        if self.segments is None:
            top = x.detach().amax(-1) if x.shape[-1] else x.new_zeros(self.size)
        else:
            top = x.new_full((self.size,), float("-inf"))
            top = top.scatter_reduce(0, self.segments, x.detach(), "amax")
        some = top != float("-inf")  # NaN stays NaN
        top = torch.where(some, top, 0)
        # log 0 would be right where there is nothing, but its gradient is NaN
        total = torch.where(some, self.sum(torch.exp(x - self.spread(top))), 1)
        return torch.where(some, top + total.log(), float("-inf"))


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
        return references(self.chosen, self.rejected, ref_chosen_logps, ref_rejected_logps)

    def mean(self, losses: Tensor, weights: Tensor | None = None) -> Tensor:
        """Returns the mean of the pairs' losses, each times its weight."""
        if weights is not None:
            losses = losses * per_response("pair_weights", weights, self.chosen)
        total = torch.where(self.counted, losses, 0).sum() / self.number
        return total.to(self.chosen.dtype)


def label_logps(log_odds: Tensor) -> Tensor:
    """Returns the log-probabilities of labels: `log p = -softplus(-m)`.

    Equivalent to `torch.log(torch.sigmoid(log_odds))`, with all digits whatever the log-odds: where
    p rounds to 1, log p = -e^-m. `log(1 - p)` is `label_logps(-log_odds)`.

    Examples:
        >>> label_logps(torch.tensor([0.0, 10.0]))
        tensor([-6.9315e-01, -4.5399e-05])

    Args:
        log_odds (Tensor): any shape, float32, float64, bfloat16 or float16, nats.

    Returns:
        Tensor: the same shape, float32 (float64 for float64), nats.

    Raises:
        TypeError: not a tensor of such a dtype.
    """
    # not softplus: it turns linear at its threshold, or overflows where there is none
    return F.logsigmoid(accumulated("log_odds", log_odds))


def sequence_logps(responses: Labelled) -> Tensor:
    """Returns log P of each response, the sum of its label log-probabilities.

    Examples:
        >>> labels = torch.tensor([[5, 7, 2], [5, -100, -100]])
        >>> responses = Responses.from_labels(torch.zeros(2, 3), labels)
        >>> sequence_logps(responses)
        tensor([-2.0794, -0.6931], dtype=torch.float64)

    Args:
        responses (Responses): see there.

    Returns:
        Tensor: (B,), float64, nats, since a float32 of -40,000 has steps of 0.004; 0 for a response
        without tokens. Under `torch.no_grad()` these are the reference log-probabilities that
        losses with a reference take.

    Raises:
        TypeError, ValueError: wrong dtypes, shapes or devices in `responses`.
    """
    return checked("responses", responses).logps()


def sequence_log_odds(rows: Rows, *, mean: bool) -> Tensor:
    """Returns log P/(1-P), (B,), of responses or (mean) of their mean token probability.

    Through L = log(-S), which has digits where S underflows: 1/P - 1 = expm1(e^L).
    """
    m, s = rows.log_odds, rows.logps(mean=mean)
    # log(-l) = -m - e^-m/2 + O(e^-2m) from m = 20 on, exact in float64; each branch is clamped to
    # where it is finite, since a where passes 0 * inf on, and past where it is taken: the slope of
    # clamp at its bound is 1 up to torch 2.13 and 0 in 2.15
    low, high = m.clamp(-1e30, 21), m.clamp(min=19)
    log_nll = torch.where(m > 20, -high - torch.exp(-high) / 2, (-F.logsigmoid(low)).log())
    log_s = rows.logsumexp(log_nll)
    if mean:
        log_s = log_s - rows.lengths.clamp(min=1).to(log_s.dtype).log()  # that of an integer: f32
    x = log_s.clamp(-80, 1).exp()
    near = -log_s - (torch.expm1(x) / x).log()  # P near 1
    far = s - torch.log1p(-s.clamp(max=-0.5).exp())  # P < 1/e
    return torch.where(log_s > 0, far, near)


def checked(name: str, responses: Labelled) -> Rows:
    """Checks one argument and returns its rows; reads the device only for an unknown B."""
    if getattr(responses, "_fields", None) != FIELDS:
        raise TypeError(f"{name}: expected Responses, got {type(responses).__name__}")
    log_odds, mask, segments = responses.log_odds, responses.mask, responses.segments
    size, tokens = responses.num_segments, responses.total_tokens
    sequences = responses.total_sequences
    dtype = accumulated(f"{name}.log_odds", log_odds).dtype
    if mask is not None and segments is None:
        like_log_odds(f"{name}.mask", mask, torch.bool, log_odds, 2)
        if size is not None:
            raise ValueError(f"{name}.num_segments: expected None beside a mask, got {size}")
        kept, size, lengths = mask, log_odds.shape[0], mask.sum(-1)
    elif segments is not None and mask is None:
        like_log_odds(f"{name}.segments", segments, torch.int64, log_odds, 1)
        if size is None:
            size = max(int(segments.max()) + 1, 1) if segments.numel() else 1
        least = min(segments.numel(), 1)
        if isinstance(size, bool) or not isinstance(size, (int, Integral)) or size < least:
            got = shown(size)
            raise ValueError(f"{name}.num_segments: expected an integer >= {least}, got {got}")
        on_cpu = segments.device.type == "cpu" and not torch.compiler.is_compiling()
        if on_cpu and bool((segments >= size).any()):
            raise ValueError(f"{name}.segments: expected ids < {size}, got {int(segments.max())}")
        kept = segments >= 0
        segments = segments.clamp(min=0)
        lengths = _scatter_sum(kept.long(), segments, size)
    else:
        got = "neither" if mask is None else "both"
        raise ValueError(f"{name}: expected a mask (B, T) or segments (N,), got {got}")
    m = torch.where(kept, log_odds.double(), 0)
    tokens = divisor(f"{name}.total_tokens", tokens, kept)
    sequences = divisor(f"{name}.total_sequences", sequences, lengths > 0)
    return Rows(m, kept, segments, size, tokens, sequences, lengths, dtype)


def pairs_of(chosen: Labelled, rejected: Labelled, *, both: bool = False) -> Pairs:
    """Checks two sides and returns their pairs.

    A pair counts if one of its responses has a token; with `both`, for losses without a reference,
    if both have.
    """
    g, b = checked("chosen", chosen), checked("rejected", rejected)
    given = total_is_given(chosen, rejected)
    totals = chosen.total_sequences, rejected.total_sequences
    if isinstance(totals[0], int) and isinstance(totals[1], int) and totals[0] != totals[1]:
        raise ValueError(f"total_sequences: expected the same of both sides, got {totals}")
    if g.size != b.size:
        raise ValueError(f"rejected: expected {g.size} responses, as many as chosen, got {b.size}")
    return paired(g, b, given=given, both=both)


def total_is_given(chosen: Labelled, rejected: Labelled) -> bool:
    """Whether the numbers of responses are given, of both sides; raises for one alone."""
    given = chosen.total_sequences is not None
    if given != (rejected.total_sequences is not None):
        raise ValueError("total_sequences: expected it for both sides or for none, got one")
    return given


def paired(chosen: Rows, rejected: Rows, *, given: bool, both: bool) -> Pairs:
    """Returns the pairs of two checked sides, whose number of responses is `given` or counted."""
    of_each = chosen.lengths > 0, rejected.lengths > 0
    counted = of_each[0] & of_each[1] if both else of_each[0] | of_each[1]
    return Pairs(
        chosen, rejected, counted, chosen.sequences if given else counted.sum().clamp(min=1)
    )


def references(
    chosen: Rows,
    rejected: Rows,
    ref_chosen_logps: Tensor | None,
    ref_rejected_logps: Tensor | None,
) -> Sides:
    """Returns S_ref of two sides, held constant; 0 without a reference."""
    if (ref_chosen_logps is None) != (ref_rejected_logps is None):
        raise ValueError("ref_chosen_logps, ref_rejected_logps: expected both or none, got one")
    return Sides(
        reference("ref_chosen_logps", chosen, ref_chosen_logps),
        reference("ref_rejected_logps", rejected, ref_rejected_logps),
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


def per_token(name: str, value: Tensor, chosen: Labelled, rows: Rows) -> Tensor:
    """Returns one number a token in float64, 0 where nothing counts, after checks."""
    beside(name, value, chosen)
    return torch.where(rows.kept, accumulated(name, value).double(), 0)


def mean_of(x: Tensor, counted: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the mean of the values that count, 0 if there are none, in a dtype of results."""
    return (torch.where(counted, x, 0).sum() / counted.sum().clamp(min=1)).to(dtype)


def divisor(name: str, total: int | Tensor | None, counted: Tensor) -> int | Tensor:
    """Returns the divisor of a mean, at least 1, so that nothing counted gives 0 and not NaN."""
    if total is None:
        return counted.sum().clamp(min=1)
    found = _checked_divisor(name, total, counted)
    on_cpu = counted.device.type == "cpu" and not torch.compiler.is_compiling()
    # nothing may depend on a tensor's value: it may be traced, mapped over or on a GPU
    if not isinstance(total, Tensor) and total == 0 and on_cpu and bool(counted.any()):
        raise ValueError(f"{name}: expected at least 1 where some count, got 0")
    return found


def _checked_divisor(name: str, total: int | Tensor, counted: Tensor) -> int | Tensor:
    """Checks a divisor that was given."""
    if isinstance(total, Tensor):
        if total.numel() != 1:
            raise ValueError(f"{name}: expected one value, got shape {tuple(total.shape)}")
        if total.dtype == torch.bool or total.is_complex():
            raise TypeError(f"{name}: expected an integer or a tensor of one, got {total.dtype}")
        return total.reshape(()).to(counted.device).clamp(min=1)
    if isinstance(total, bool) or not isinstance(total, (int, Integral)):
        raise TypeError(f"{name}: expected an integer or a tensor, got {shown(total)}")
    if total < 0:
        raise ValueError(f"{name}: expected an integer >= 0, got {total}")
    return max(total if isinstance(total, int) else int(total), 1)


def _scatter_sum(x: Tensor, ids: Tensor, size: int) -> Tensor:
    """Returns the sums of x by id, (size,)."""
    return x.new_zeros(size).index_add(0, ids, x)
