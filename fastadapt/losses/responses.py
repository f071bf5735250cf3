"""Responses as log-odds of their label tokens, in two layouts, and means over them."""

from numbers import Integral
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastadapt._ops.checks import instance, integer, shown
from fastadapt.log_odds import label_log_odds

REDUCTIONS = ("token_mean", "sequence_sum")
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# what is meant where a tensor of another dtype comes
_OTHER_WAY = {
    (torch.bool, torch.int64): "; Responses.from_labels takes labels",
    (torch.int64, torch.bool): "; Responses(log_odds, mask) takes a mask",
}


class Responses(NamedTuple):
    """The label tokens of B responses: the input of every loss of this package.

    Made from labels by `Responses.from_labels(log_odds, labels)`, where a label of -100 does not
    count; from log-probabilities by `Responses.from_logps`. By hand in two layouts:
    `Responses(log_odds, mask)`, padded, and `Responses(log_odds, segments=ids)`, packed. A token
    that does not count (mask False, segment id negative) changes no loss and gets a zero gradient,
    whatever its log-odds are, NaN included. A response without tokens counts in no mean.

    Log-odds are not log-probabilities, but no check can tell the two apart: both are
    negative for a token of p < 1/2. A mask made by hand has to be False where a label was ignored:
    the log-odds there are 0, which under a mask of True is a token of probability 1/2.

    Examples:
        >>> labels = torch.tensor([[5, 7, 2], [5, -100, -100]])
        >>> responses = Responses.from_labels(torch.zeros(2, 3), labels)
        >>> responses.mask
        tensor([[ True,  True,  True],
                [ True, False, False]])

    Attributes:
        log_odds: (B, T) or (N,), float32, float64, bfloat16 or float16, nats; per token
            `m = z_y - logsumexp(z_j, j != y)`, from `adapted_log_odds` or any such operator. Sums
            are float32, float64 for float64. A token of probability 0 has m = -inf.
        mask: (B, T), bool; the tokens that count.
        segments: (N,), int64; the response of each token in [0, B), in any order, or negative. An
            id >= B is an error on the CPU and undefined elsewhere.
        num_segments: B of the packed layout. None: 1 + the largest id, which reads the device and
            cannot be compiled without a graph break.
        total_tokens: what token means divide by: an int or a tensor of one value, such as
            transformers' `num_items_in_batch`. The losses of micro-batches then add up to the loss
            of the whole batch. None: the tokens that count here.
        total_sequences: the same for means over responses or pairs.
    """

    log_odds: Tensor
    mask: Tensor | None = None
    segments: Tensor | None = None
    num_segments: int | None = None
    total_tokens: int | Tensor | None = None
    total_sequences: int | Tensor | None = None

    @classmethod
    def from_labels(
        cls,
        log_odds: Tensor,
        labels: Tensor,
        *,
        ignore_index: int = -100,
        segments: Tensor | None = None,
        num_segments: int | None = None,
        total_tokens: int | Tensor | None = None,
        total_sequences: int | Tensor | None = None,
    ) -> "Responses":
        """Returns the responses of labels; those that are ignored do not count.

        Examples:
            >>> labels = torch.tensor([[1, 2, -100]])
            >>> log_odds = linear_log_odds(torch.ones(1, 3, 4), torch.zeros(5, 4), labels)
            >>> Responses.from_labels(log_odds, labels).mask
            tensor([[ True,  True, False]])

        Args:
            log_odds (Tensor): the labels' log-odds, of the shape of `labels`; or logits, with one
                more dimension (..., V), of which `label_log_odds` makes them.
            labels (Tensor): (B, T), or (N,) with `segments`, int64; those that the log-odds are of,
                at each position the token to score there, or `ignore_index`.
            ignore_index (int): the label of tokens that do not count.
            segments (Tensor | None): as the attribute.
            num_segments (int | None): as the attribute.
            total_tokens (int | Tensor | None): as the attribute.
            total_sequences (int | Tensor | None): as the attribute.

        Raises:
            TypeError: wrong dtypes.
            ValueError: shapes or devices that do not fit; on a CPU a negative label that is not
                ignored (`verify` and bad rows have -1); for logits, as `label_log_odds`.
        """
        ignore_index = integer("ignore_index", ignore_index)
        dims = 2 if segments is None else 1
        of_labels = isinstance(log_odds, Tensor) and isinstance(labels, Tensor)
        if of_labels and labels.dim() == dims and log_odds.shape[:-1] == labels.shape:
            log_odds = label_log_odds(log_odds, labels, ignore_index=ignore_index)
        accumulated("log_odds", log_odds)
        _like("labels", labels, torch.int64, log_odds, dims)
        kept = labels != ignore_index
        if labels.device.type == "cpu" and not torch.compiler.is_compiling():
            negative = labels[kept & (labels < 0)]
            if len(negative) > 0:
                got = int(negative[0])
                raise ValueError(f"labels: expected ids from 0 on or {ignore_index}, got {got}")
        if segments is None:
            return cls(log_odds, kept, None, num_segments, total_tokens, total_sequences)
        _like("segments", segments, torch.int64, log_odds, dims)
        ids = torch.where(kept, segments, -1)
        return cls(log_odds, None, ids, num_segments, total_tokens, total_sequences)

    @classmethod
    def from_logps(
        cls,
        logps: Tensor,
        labels: Tensor,
        *,
        ignore_index: int = -100,
        segments: Tensor | None = None,
        num_segments: int | None = None,
        total_tokens: int | Tensor | None = None,
        total_sequences: int | Tensor | None = None,
    ) -> "Responses":
        """Returns the responses of labels with given log-probabilities, where log-odds are missing.

        `m = l - log(1 - e^l)`, differentiable. Log-probabilities have no digits left where p is
        near 1: l = 0 becomes log-odds of +inf, without a gradient. Log-odds of logits or of hidden
        states have them; see `from_labels`.

        Args:
            logps (Tensor): the labels' log-probabilities, of the shape of `labels`, <= 0, a float
                dtype as `log_odds`, nats.
            labels (Tensor): as in `from_labels`, and so all others.
            ignore_index (int): as in `from_labels`.
            segments (Tensor | None): as the attribute.
            num_segments (int | None): as the attribute.
            total_tokens (int | Tensor | None): as the attribute.
            total_sequences (int | Tensor | None): as the attribute.

        Raises:
            TypeError, ValueError: as `from_labels`. A value > 0 becomes NaN, and the loss with it.
        """
        logp = accumulated("logps", logps)
        _like("labels", labels, torch.int64, logps, 2 if segments is None else 1)
        below = logp < 0
        inside = torch.where(below, logp, -1)  # the gradient elsewhere would be 0 * inf
        edge = torch.where(logp == 0, float("inf"), float("nan"))
        log_odds = torch.where(below, inside - torch.log(-torch.expm1(inside)), edge)
        return cls.from_labels(
            log_odds,
            labels,
            ignore_index=ignore_index,
            segments=segments,
            num_segments=num_segments,
            total_tokens=total_tokens,
            total_sequences=total_sequences,
        )


class Rows(NamedTuple):
    """Checked responses: log-odds in the dtype of the sums, 0 where nothing counts."""

    log_odds: Tensor
    kept: Tensor
    segments: Tensor | None
    size: int  # B
    tokens: int | Tensor  # divisors of the means, at least 1
    sequences: int | Tensor
    lengths: Tensor  # (B,)

    def sum(self, x: Tensor) -> Tensor:
        """Returns the sum of per-token values of each response, (B,)."""
        x = torch.where(self.kept, x, 0)
        return x.sum(-1) if self.segments is None else _scatter_sum(x, self.segments, self.size)

    def token_mean(self, x: Tensor) -> Tensor:
        """Returns the mean of per-token values over all tokens of the batch."""
        return torch.where(self.kept, x, 0).sum() / self.tokens

    def sequence_mean(self, x: Tensor) -> Tensor:
        """Returns the mean of per-response values over the responses that have tokens."""
        return torch.where(self.lengths > 0, x, 0).sum() / self.sequences

    def spread(self, x: Tensor) -> Tensor:
        """Returns per-response values (B,) at each of their tokens; packed, at ignored ones too."""
        return x[:, None].expand_as(self.kept) if self.segments is None else x[self.segments]

    def reduced(self, x: Tensor, reduction: str) -> Tensor:
        """Returns a mean of per-token values: over tokens, or of responses' sums or means."""
        if reduction == "token_mean":
            return self.token_mean(x)
        sums = self.sum(x)
        mean = reduction == "sequence_mean"
        return self.sequence_mean(sums / self.lengths.clamp(min=1) if mean else sums)

    def logps(self, *, mean: bool = False) -> Tensor:
        """Returns S = log P of each response, (B,), or S / T on request."""
        sums = self.sum(F.logsigmoid(self.log_odds))
        return sums / self.lengths.clamp(min=1) if mean else sums

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
        tensor([-2.0794, -0.6931])

    Args:
        responses (Responses): see there.

    Returns:
        Tensor: (B,), float32 (float64 for float64 log-odds), nats; 0 for a response without tokens.
        Under `torch.no_grad()` these are the reference log-probabilities that `dpo_loss` takes.

    Raises:
        TypeError, ValueError: wrong dtypes, shapes or devices in `responses`.
    """
    return checked("responses", responses).logps()


def checked(name: str, responses: Responses) -> Rows:
    """Checks one argument and returns its rows; reads the device only for an unknown B."""
    instance(name, responses, Responses, "Responses")
    log_odds, mask, segments, size, tokens, sequences = responses
    m = accumulated(f"{name}.log_odds", log_odds)
    if mask is not None and segments is None:
        _like(f"{name}.mask", mask, torch.bool, log_odds, 2)
        if size is not None:
            raise ValueError(f"{name}.num_segments: expected None beside a mask, got {size}")
        kept, size, lengths = mask, log_odds.shape[0], mask.sum(-1)
    elif segments is not None and mask is None:
        _like(f"{name}.segments", segments, torch.int64, log_odds, 1)
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
    m = torch.where(kept, m, 0)
    tokens = divisor(f"{name}.total_tokens", tokens, kept)
    sequences = divisor(f"{name}.total_sequences", sequences, lengths > 0)
    return Rows(m, kept, segments, size, tokens, sequences, lengths)


def beside(name: str, value: Tensor, responses: Responses, *, columns: bool = False) -> None:
    """Raises unless a tensor has the shape of the log-odds, with `columns` (..., K), and device."""
    instance(name, value, Tensor, "a Tensor")
    like = responses.log_odds
    if (value.shape[:-1] if columns else value.shape) != like.shape:
        shape = ", ".join([*map(str, like.shape), *(["K"] if columns else [])])
        raise ValueError(f"{name}: expected shape ({shape}), got {tuple(value.shape)}")
    if value.device != like.device:
        raise ValueError(f"{name}: expected device {like.device}, got {value.device}")


def per_token(name: str, value: Tensor, chosen: Responses, rows: Rows) -> Tensor:
    """Returns one number a token in the dtype of sums, 0 where nothing counts, after checks."""
    beside(name, value, chosen)
    return torch.where(rows.kept, accumulated(name, value), 0)


def mean_of(x: Tensor, counted: Tensor) -> Tensor:
    """Returns the mean of the values that count, 0 if there are none."""
    return torch.where(counted, x, 0).sum() / counted.sum().clamp(min=1)


def accumulated(name: str, log_odds: Tensor) -> Tensor:
    """Converts log-odds to the dtype in which sums are made."""
    if not isinstance(log_odds, Tensor) or log_odds.dtype not in _FLOATS:
        got = log_odds.dtype if isinstance(log_odds, Tensor) else type(log_odds).__name__
        raise TypeError(f"{name}: expected float32, float64, bfloat16 or float16, got {got}")
    return log_odds if log_odds.dtype == torch.float64 else log_odds.float()


def _like(name: str, value: Tensor, dtype: torch.dtype, log_odds: Tensor, dim: int) -> None:
    """Raises unless a tensor has a dtype, and the shape, device and rank of the log-odds."""
    if not isinstance(value, Tensor) or value.dtype != dtype:
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        hint = _OTHER_WAY.get((dtype, got), "")
        raise TypeError(f"{name}: expected a tensor of {dtype}, got {got}{hint}")
    if value.shape != log_odds.shape or log_odds.dim() != dim:
        layout = "(B, T)" if dim == 2 else "(N,)"
        raise ValueError(
            f"{name}: expected the shape of the log-odds, {layout}, got {tuple(value.shape)} "
            f"beside {tuple(log_odds.shape)}"
        )
    if value.device != log_odds.device:
        raise ValueError(f"{name}: expected device {log_odds.device}, got {value.device}")


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
