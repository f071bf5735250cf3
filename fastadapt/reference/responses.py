"""What the references of losses of labels share: responses one after another, and probabilities.

Log-odds become the two probabilities `softmax([m, 0])`, that of the label and that of all else,
which neither rounds to 1.
"""

from typing import Any

import torch
from torch import Tensor

Side = Any  # a fastadapt.Responses, or anything with its attributes


def dtype_of(log_odds: Tensor) -> torch.dtype:
    """Returns the dtype of the results."""
    return torch.float64 if log_odds.dtype == torch.float64 else torch.float32


def probabilities(log_odds: Tensor) -> tuple[Tensor, Tensor]:
    """Returns p and 1 - p."""
    p, rest = torch.stack([log_odds.double(), torch.zeros_like(log_odds.double())]).softmax(0)
    return p, rest


def log_of(p: Tensor, rest: Tensor) -> Tensor:
    """Returns log p, from 1 - p where p is near 1."""
    return torch.where(p > 0.5, torch.log1p(-rest.clamp(max=0.75)), p.log())


def miss(p: Tensor, rest: Tensor) -> Tensor:
    """Returns 1 - Π p as the probability of missing some token: (1-p_1) + p_1 (1-p_2) + ..."""
    before = torch.cat([p.new_ones(1), p.cumprod(0)])[: len(p)]
    return (before * rest).sum() if len(p) else p.new_ones(())


def miss_of_mean(m: Tensor) -> Tensor:
    """Returns 1 less the geometric mean of the tokens' probabilities."""
    return -torch.expm1(log_of(*probabilities(m)).sum() / len(m))


def each(side: Side, values: Tensor | None = None) -> list[Tensor]:
    """Returns the log-odds of each response, in the order of its tokens, or other values there."""
    values = side.log_odds if values is None else values
    if side.segments is None:
        return [m[kept] for m, kept in zip(values, side.mask, strict=True)]
    size = side.num_segments
    if size is None:
        size = max([1, *(1 + side.segments).tolist()])
    return [values[side.segments == i] for i in range(size)]


def tokens(side: Side) -> float:
    """Returns the divisor of a mean over tokens."""
    count = sum(map(len, each(side))) if side.total_tokens is None else side.total_tokens
    return max(float(count), 1.0)


def sequences(side: Side) -> float:
    """Returns the divisor of a mean over responses."""
    count = side.total_sequences
    return max(float(sum(len(m) > 0 for m in each(side)) if count is None else count), 1.0)


def zero(side: Side) -> Tensor:
    """Returns 0 with a graph."""
    log_odds: Tensor = side.log_odds
    return log_odds.flatten()[:0].double().sum()


def stacked(values: list[Tensor], like: Tensor) -> Tensor:
    """Stacks values to (B,) of float64, also for B = 0."""
    return torch.stack(values) if values else like.new_zeros(0, dtype=torch.float64)
