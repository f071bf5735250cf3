"""What operators of every family share: addresses, checks, registration, launches on a device."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastadapt import _C

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}

Rows = tuple[int, int, int, int, int]
Implementations = dict[str, tuple[Callable[..., object], Callable[..., object]]]
Out = TypeVar("Out")


def address(tensor: Tensor | None) -> int:
    """0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def rows_of(logits: Tensor) -> Rows:
    """What the kernels need to know of (N, V) logits."""
    n, v = logits.shape
    return logits.data_ptr(), DTYPE_CODES[logits.dtype], n, v, logits.stride(0)


def check_ids(name: str, ids: Tensor, v: int, ignore_index: int | None) -> None:
    """Raises for the first entry that is neither an id nor the ignored one."""
    ignored = 0 if ignore_index is None else ignore_index
    at = _C.first_bad_token(ids.data_ptr(), ids.numel(), v, ignored)
    if at >= 0:
        got, row = int(ids.view(-1)[at]), at // ids[0].numel()
        expected = f"[0, {v})" if ignore_index is None else f"[0, {v}) or {ignore_index}"
        raise ValueError(f"{name}: expected ids in {expected}, got {got} in {row=}")


def no_double_backward(name: str) -> Callable[..., None]:
    """The gradient of a backward: without it, autograd would return zeros."""

    def refuse(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(f"{name}: expected a first-order gradient, got a double backward")

    return refuse


def register(
    library: torch.library.Library,
    implementations: Implementations,
    cuda: ModuleType | None = None,
) -> None:
    """Registers each operator of a library: for the CPU, for CUDA by its name, and its fake."""
    for name, (cpu, fake) in implementations.items():
        library.impl(name, cpu, "CPU")
        if cuda is not None:
            library.impl(name, getattr(cuda, name), "CUDA")
        torch.library.register_fake(f"fastadapt::{name}", fake, lib=library)


def device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Makes the device of a tensor the current one."""
    if x.device.type != "cuda" or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)


def given(plan: Any) -> dict[str, Any]:
    """Keyword arguments of a launch."""
    return {} if plan is None else {"plan": plan}


def filled(out: Out, launch: Callable[..., None], *arguments: Any, plan: Any) -> Out:
    """`out`, the last argument of a launch, when it is done on the device of the first."""
    with device_of(arguments[0]):
        launch(*arguments, out, **given(plan))
    return out
