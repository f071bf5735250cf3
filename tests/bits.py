"""Results that are the same to the bit."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

FILL = -987654321  # of NaN in integers too; no result is that


def same(a: Any, b: Any) -> bool:
    """Whether tensors have equal bits and one dtype, NaN equal to NaN, or others are equal."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return bool(a == b)
    return a.dtype == b.dtype and torch.equal(a.nan_to_num(FILL), b.nan_to_num(FILL))


def assert_same(got: Any, wanted: Iterable[Any], what: object = None) -> None:
    """Compares the fields of a result with as many others, None with None."""
    for name, a, b in zip(got._fields, got, wanted, strict=True):
        assert same(a, b), (name, what, a, b)
