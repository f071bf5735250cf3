"""Responses as margins of their label tokens, in both layouts, and the means over them."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Responses(NamedTuple):
    """The label tokens of B responses: what every loss of this package takes.

    Two layouts: `Responses(margins, mask)`, padded, and `Responses(margins, segments=ids)`, packed.
    A token that does not count (mask False, segment id negative) changes no loss and gets a zero
    gradient, whatever its margin is, NaN included. A response without tokens counts in no mean.

    Attributes:
        margins: (B, T) or (N,), float32, float64, bfloat16 or float16, nats; per token
            `m = z_y - logsumexp(z_j, j != y)`, from `adapted_margins` or any such operator. Sums
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

    margins: Tensor
    mask: Tensor | None = None
    segments: Tensor | None = None
    num_segments: int | None = None
    total_tokens: int | Tensor | None = None
    total_sequences: int | Tensor | None = None


class Rows(NamedTuple):
    """Responses after the checks: margins in the dtype of the sums, 0 where nothing counts."""

    margins: Tensor
    kept: Tensor
    segments: Tensor | None
    size: int  # B
    tokens: int | Tensor  # divisors of the means, at least 1
    sequences: int | Tensor
    lengths: Tensor  # (B,)

    def sum(self, x: Tensor) -> Tensor:
        """(B,): the sum of per-token values of each response."""
        x = torch.where(self.kept, x, 0)
        return x.sum(-1) if self.segments is None else _scatter_sum(x, self.segments, self.size)

    def token_mean(self, x: Tensor) -> Tensor:
        """The mean of per-token values over all tokens of the batch."""
        return torch.where(self.kept, x, 0).sum() / self.tokens

    def sequence_mean(self, x: Tensor) -> Tensor:
        """The mean over the responses that have tokens of one value for each."""
        return torch.where(self.lengths > 0, x, 0).sum() / self.sequences

    def logps(self, *, mean: bool = False) -> Tensor:
        """(B,): S = log P of each response, or S / T, the log of its mean token probability."""
        sums = self.sum(F.logsigmoid(self.margins))
        return sums / self.lengths.clamp(min=1) if mean else sums

    def logsumexp(self, x: Tensor) -> Tensor:
        """(B,): log of the sum of e^x over each response; -inf without tokens."""
        x = torch.where(self.kept, x, float("-inf"))
        if self.segments is None:
            top = x.detach().amax(-1) if x.shape[-1] else x.new_zeros(self.size)
        else:
            top = x.new_full((self.size,), float("-inf"))
            top = top.scatter_reduce(0, self.segments, x.detach(), "amax")
        some = top > float("-inf")
        top = torch.where(some, top, 0)
        spread = top[:, None] if self.segments is None else top[self.segments]
        # log 0 would be right where there is nothing, but its gradient is NaN
        total = torch.where(some, self.sum(torch.exp(x - spread)), 1)
        return torch.where(some, top + total.log(), float("-inf"))


def label_logps(margins: Tensor) -> Tensor:
    """Returns the log-probabilities of labels: `log p = -softplus(-m)`.

    Equivalent to `torch.log(torch.sigmoid(margins))`, with all digits for any margin: where p
    rounds to 1, log p = -e^-m. `log(1 - p)` is `label_logps(-margins)`.

    Args:
        margins (Tensor): any shape, float32, float64, bfloat16 or float16, nats.

    Returns:
        Tensor: the same shape, float32 (float64 for float64), nats.

    Raises:
        TypeError: not a tensor of such a dtype.
    """
    # not softplus: it turns linear at its threshold, or overflows where there is none
    return F.logsigmoid(accumulated("margins", margins))


def sequence_logps(responses: Responses) -> Tensor:
    """Returns log P of each response, the sum of its label log-probabilities.

    Args:
        responses (Responses): see there.

    Returns:
        Tensor: (B,), float32 (float64 for float64 margins), nats; 0 for a response without tokens.
        Under `torch.no_grad()` these are the reference log-probabilities that `dpo_loss` takes.

    Raises:
        TypeError, ValueError: wrong dtypes, shapes or devices in `responses`.
    """
    return checked("responses", responses).logps()


def checked(name: str, responses: Responses) -> Rows:
    """One argument, by name, checked and in its common form; only an unknown B reads a device."""
    if not isinstance(responses, Responses):
        raise TypeError(f"{name}: expected Responses, got {type(responses).__name__}")
    margins, mask, segments, size, tokens, sequences = responses
    m = accumulated(f"{name}.margins", margins)
    if mask is not None and segments is None:
        _like(f"{name}.mask", mask, torch.bool, margins, 2)
        if size is not None:
            raise ValueError(f"{name}.num_segments: expected None beside a mask, got {size}")
        kept, size, lengths = mask, margins.shape[0], mask.sum(-1)
    elif segments is not None and mask is None:
        _like(f"{name}.segments", segments, torch.int64, margins, 1)
        if size is None:
            size = max(int(segments.max()) + 1, 1) if segments.numel() else 1
        least = min(segments.numel(), 1)
        if isinstance(size, bool) or not isinstance(size, int) or size < least:
            raise ValueError(f"{name}.num_segments: expected an integer >= {least}, got {size!r}")
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
    tokens = _divisor(f"{name}.total_tokens", tokens, kept)
    sequences = _divisor(f"{name}.total_sequences", sequences, lengths > 0)
    return Rows(m, kept, segments, size, tokens, sequences, lengths)


def one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises unless an option is one of those there are."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def accumulated(name: str, margins: Tensor) -> Tensor:
    """Margins in the dtype that sums are made in."""
    if not isinstance(margins, Tensor) or margins.dtype not in _FLOATS:
        got = margins.dtype if isinstance(margins, Tensor) else type(margins).__name__
        raise TypeError(f"{name}: expected float32, float64, bfloat16 or float16, got {got}")
    return margins if margins.dtype == torch.float64 else margins.float()


def _like(name: str, value: Tensor, dtype: torch.dtype, margins: Tensor, dim: int) -> None:
    """Raises unless a tensor has a dtype, and the margins its shape, device and dimensions."""
    if not isinstance(value, Tensor) or value.dtype != dtype:
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name}: expected a tensor of {dtype}, got {got}")
    if value.shape != margins.shape or margins.dim() != dim:
        layout = "(B, T)" if dim == 2 else "(N,)"
        raise ValueError(
            f"{name}: expected margins and it of one shape {layout}, "
            f"got {tuple(margins.shape)} and {tuple(value.shape)}"
        )
    if value.device != margins.device:
        raise ValueError(f"{name}: expected device {margins.device}, got {value.device}")


def _divisor(name: str, total: int | Tensor | None, counted: Tensor) -> int | Tensor:
    """What a mean divides by; at least 1, so that nothing counted gives 0 and never NaN."""
    if total is None:
        return counted.sum().clamp(min=1)
    if isinstance(total, Tensor):
        if total.numel() != 1:
            raise ValueError(f"{name}: expected one value, got shape {tuple(total.shape)}")
        return total.reshape(()).to(counted.device).clamp(min=1)
    if isinstance(total, bool) or not isinstance(total, int):
        raise TypeError(f"{name}: expected an integer or a tensor, got {total!r}")
    if total < 0:
        raise ValueError(f"{name}: expected an integer >= 0, got {total}")
    return max(total, 1)


def _scatter_sum(x: Tensor, ids: Tensor, size: int) -> Tensor:
    """(size,): sums of x by id."""
    return x.new_zeros(size).index_add(0, ids, x)
