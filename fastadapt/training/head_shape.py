"""What lies between a head's products and a model's logits, found by fitting."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from math import isfinite
from typing import Any

import torch
from torch import Tensor

TOLERANCE, HALF_TOLERANCE = 1e-4, 2e-2  # of the largest |logit| of a row
_COLUMNS = 64  # of the vocabulary, for the choice of a shape; all of it has to fit in the end
_WORDS = re.compile("logit|scal|cap|mult|mup|temperature")
_DEPTH = 4  # of configurations in configurations


def configurations(config: Any, depth: int = _DEPTH) -> Iterator[Any]:
    """Yields a configuration and the ones nested in it."""
    if config is None or depth == 0:
        return
    yield config
    for value in vars(config).values():
        if hasattr(value, "to_dict"):
            yield from configurations(value, depth - 1)


def numbers_of(model: Any) -> Iterator[float]:
    """Yields the numbers by which a model may scale or cap its logits.

    Args:
        model: with a `config`; numbers are its own and those of its configurations, at any depth,
            under names that speak of logits, scales, factors or caps.
    """
    configs = list(configurations(getattr(model, "config", None)))
    computed = [
        (name, getattr(config, name, None))
        for config in configs
        for kind in type(config).__mro__
        for name, value in vars(kind).items()
        if _WORDS.search(name) and isinstance(value, property)
    ]
    for fields in (computed, *(vars(owner).items() for owner in (model, *configs))):
        for name, value in fields:
            if not _WORDS.search(name) or isinstance(value, bool):
                continue
            if isinstance(value, int | float) and value != 0 and isfinite(value):
                yield float(value)


def tolerance_of(products: Tensor, logits: Tensor) -> float:
    """Returns the allowed distance of logits from products, as a share of the largest."""
    half = 2 in (products.element_size(), logits.element_size())
    rounds = products.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return HALF_TOLERANCE if half or rounds else TOLERANCE


def fitted_shape(
    products: Tensor, logits: Tensor, numbers: Iterable[float], tolerance: float
) -> tuple[float | None, float] | None:
    """Returns the cap and the factor that turn products into logits; None if none do.

    `logits = softcap * tanh(logit_scale * products / softcap)`, with 1, a number or its reciprocal
    as factor, and no cap or a number.

    Args:
        products: (N, V), of any float dtype, of sizes from far below to far above any cap.
        logits: (N, V); rows that overflow are left out, but not all of them.
        numbers: the candidates.
        tolerance: of `tolerance_of`.

    Returns:
        tuple | None: softcap, logit_scale.
    """
    x, z = products.double(), logits.double()
    keep = z.isfinite().all(-1) & x.isfinite().all(-1)
    if int(keep.sum()) < min(4, len(x)):
        return None
    x, z = x[keep], z[keep]
    top = z.abs().amax(-1)
    if bool((top == 0).any()):
        return None
    candidates = list(dict.fromkeys(float(n) for n in numbers))
    scales = list(dict.fromkeys([1.0, *candidates, *(1 / n for n in candidates)]))
    caps: list[float | None] = [None, *(n for n in candidates if n > 0)]
    columns = torch.linspace(0, x.shape[1] - 1, min(_COLUMNS, x.shape[1]), device=x.device).long()
    columns = torch.cat([columns, x.abs().argmax(-1)]).unique()
    few, wanted = x[:, columns], z[:, columns]
    factors = x.new_tensor(scales)[:, None, None]
    best: tuple[float, float | None, float] | None = None
    for cap in caps:
        errors = (_logits(few, factors, cap) - wanted) / top[:, None]
        sizes = errors.square().mean((1, 2)).sqrt()
        place = int(sizes.argmin())
        if best is None or float(sizes[place]) < best[0]:
            best = float(sizes[place]), cap, scales[place]
        if cap is None and float(sizes[place]) < tolerance:
            break  # what fits at all sizes without a cap has none
    assert best is not None
    error = (_logits(x, best[2], best[1]) - z).abs().amax(-1)
    return (best[1], best[2]) if bool((error <= tolerance * top).all()) else None


def _logits(products: Tensor, scale: Any, cap: float | None) -> Tensor:
    scaled = products * scale
    return scaled if cap is None else cap * torch.tanh(scaled / cap)
