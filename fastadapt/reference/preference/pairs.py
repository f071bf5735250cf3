"""What the references of losses of pairs share: one pair after another, float64."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastadapt.reference.responses import (
    Side,
    dtype_of,
    each,
    log_of,
    probabilities,
    sequences,
    zero,
)

Refs = tuple[Tensor | None, Tensor | None]


def preferred(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns σ(x) and σ(-x): of two choices whose log-odds are x, how likely each is."""
    first, second = torch.stack([x, torch.zeros_like(x)]).softmax(0)
    return first, second


def there(
    chosen: Side, rejected: Side, *, both: bool = False
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yields the number of each pair with tokens, on both sides if asked for, and its log-odds."""
    for i, (g, b) in enumerate(zip(each(chosen), each(rejected), strict=True)):
        if min(len(g), len(b)) if both else len(g) + len(b):
            yield i, g, b


def pair_mean(
    chosen: Side,
    rejected: Side,
    loss: Callable[[int, Tensor, Tensor], Tensor],
    weights: Tensor | None = None,
    *,
    both: bool = False,
) -> Tensor:
    """Returns the mean over the pairs there are of a function of their number and log-odds."""
    total, count = zero(chosen), 0
    for i, g, b in there(chosen, rejected, both=both):
        weight = 1.0 if weights is None else float(weights[i])
        total, count = total + weight * loss(i, g, b), count + 1
    divisor = max(count, 1) if chosen.total_sequences is None else sequences(chosen)
    return (total / divisor).to(dtype_of(chosen.log_odds))


def log_ratios(
    i: int, g: Tensor, b: Tensor, refs: Refs, ld_alpha: float | None = None
) -> tuple[Tensor, Tensor]:
    """Returns log P of both responses less that of the reference; LD-DPO's with α."""
    shared, found = min(len(g), len(b)), []
    for m, ref in ((g, refs[0]), (b, refs[1])):
        logps = log_of(*probabilities(m))
        beyond = 1.0 if ld_alpha is None else ld_alpha
        total = logps[:shared].sum() + beyond * logps[shared:].sum()
        found.append(total - (0.0 if ref is None else float(ref[i])))
    return found[0], found[1]
