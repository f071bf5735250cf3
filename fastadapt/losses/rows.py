"""Checked responses, and sums and means over their tokens and over the responses."""

from numbers import Integral
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastadapt._ops.checks import instance, shown
from fastadapt.losses.responses import Responses, accumulated, beside, like_log_odds

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
        some = top > float("-inf")
        top = torch.where(some, top, 0)
        # log 0 would be right where there is nothing, but its gradient is NaN
        total = torch.where(some, self.sum(torch.exp(x - self.spread(top))), 1)
        return torch.where(some, top + total.log(), float("-inf"))


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


def sequence_logps(responses: Responses) -> Tensor:
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


def checked(name: str, responses: Responses) -> Rows:
    """Checks one argument and returns its rows; reads the device only for an unknown B."""
    instance(name, responses, Responses, "Responses")
    log_odds, mask, segments, size, tokens, sequences = responses
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


def per_token(name: str, value: Tensor, chosen: Responses, rows: Rows) -> Tensor:
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
