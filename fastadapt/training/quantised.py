"""Weights that are codes: the matrix that a quantiser's own interface makes of them."""

from __future__ import annotations

import sys
from collections.abc import Callable

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def is_quantised(weight: Tensor) -> bool:
    """Whether the numbers of a weight are codes, or it is made of tensors of codes and scales."""
    if getattr(weight, "quant_state", None) is not None or not weight.is_floating_point():
        return True
    return not isinstance(weight, DTensor) and is_traceable_wrapper_subclass(weight)


def dequantiser_of(weight: Tensor) -> Callable[[], Tensor] | None:
    """Returns what makes the matrix (V, H) of a quantised weight, None if nothing offers that.

    Known are a `dequantize` of the weight's own class (torchao), and the function
    `functional.dequantize_4bit` of the package that defines a weight with a `quant_state`
    (bitsandbytes).
    """
    kind, state = type(weight), getattr(weight, "quant_state", None)
    if state is not None:
        package = sys.modules.get(kind.__module__.partition(".")[0])
        dequantize = getattr(getattr(package, "functional", None), "dequantize_4bit", None)
        return None if dequantize is None else lambda: dequantize(weight.data, state)
    return weight.dequantize if kind.dequantize is not Tensor.dequantize else None
