"""What operators of every family share: rows, checks, registration, launches on a device."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fastadapt import _C

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}

MAX_ADAPTORS = 256  # that are scored at once: csrc/kernels.h

# Tags of operators that wait for the device, to learn how many rows take part or whether a gradient
# is 0; without it `torch.compile(mode="reduce-overhead")` would capture them in a CUDA graph.
WAITS = (torch.Tag.cudagraph_unsafe,)

# of each operator, its implementation, and what makes its empty outputs
Implementations = dict[str, tuple[Callable[..., object], Callable[..., object]]]
Out = TypeVar("Out")


class RowEdits(NamedTuple):
    """What the operators of sampling take of edits; rows as they are by default."""

    ids: Tensor | None = None  # (E,) int32
    offsets: Tensor | None = None  # (N + 1,) int64
    columns: Tensor | None = None  # (4, E) float32, or (1, E) of given values
    allowed: Tensor | None = None  # (N, ceil(V / 32)) int32


AS_THEY_ARE = RowEdits()


def rows_of(logits: Tensor) -> "_C.Rows":
    """What the kernels need to know of (N, V) logits."""
    n, v = logits.shape
    return logits, DTYPE_CODES[logits.dtype], n, v, logits.stride(0)


def check_ids(
    name: str, ids: Tensor, v: int, ignore_index: int | None, *, masked: bool = False
) -> None:
    """Raises if an entry is neither a valid id nor the ignored one, naming the first such.

    With `masked` the ignored one stands for what a mask has left out, and is not named.
    """
    ignored = 0 if ignore_index is None else ignore_index
    at = _C.first_bad_token(ids, v, ignored)
    if at >= 0:
        got, row = int(ids.view(-1)[at]), at // ids[0].numel()
        expected = f"[0, {v})" if ignore_index is None or masked else f"[0, {v}) or {ignore_index}"
        raise ValueError(f"{name}: expected ids in {expected}, got {got} in {row=}")


def no_double_backward(name: str) -> Callable[..., None]:
    """Returns a backward that raises; without it, double backward would silently give zeros."""

    def refuse(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(f"{name}: expected a first-order gradient, got a double backward")

    return refuse


def register(
    library: torch.library.Library,
    implementations: Implementations,
    launches: Callable[[], ModuleType],
    fakes: Mapping[str, Callable[..., object]] | None = None,
) -> None:
    """Registers each operator of a library: for the CPU, for CUDA and as a fake.

    Args:
        library: that defines them.
        implementations: by the name of each operator.
        launches: imports the module whose functions of these names fill outputs on CUDA: their
            arguments are those of the operator and the outputs.
        fakes: of operators whose outputs on CUDA are not all allocated before the launch.
    """
    fakes = fakes or {}
    for name, (cpu, empty) in implementations.items():
        library.impl(name, cpu, "CPU")
        library.impl(name, on_cuda(name, empty, launches), "CUDA")
        torch.library.register_fake(f"fastadapt::{name}", fakes.get(name, empty), lib=library)


def register_everywhere(library: torch.library.Library, implementations: Implementations) -> None:
    """Registers operators whose one implementation tells devices apart, and their fakes."""
    for name, (implementation, empty) in implementations.items():
        for device in ("CPU", "CUDA"):
            library.impl(name, implementation, device)
        torch.library.register_fake(f"fastadapt::{name}", empty, lib=library)


def register_autocast(
    library: torch.library.Library,
    name: str,
    problem: Callable[..., Any],
    casts: Sequence[str],
    masters: Sequence[str] = (),
) -> None:
    """Registers an operator in the type of autocast, as `torch.nn.functional.linear` is.

    Args:
        library: that defines it.
        name: of the operator.
        problem: the named tuple of its positional arguments, `hidden` among them; in float64
            nothing is cast.
        casts: the tensors that are.
        masters: those among them that stay float32 if they are: the operator casts what it reads.
    """

    def cast(*inputs: Any, **options: Any) -> Any:
        given = problem(*inputs)
        device = given.hidden.device.type
        if given.hidden.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
            tensors = {field: getattr(given, field) for field in casts}
            given = given._replace(
                **{
                    field: x.to(dtype)
                    for field, x in tensors.items()
                    if x is not None and not (field in masters and x.dtype == torch.float32)
                }
            )
        with torch.autocast(device, enabled=False):
            return getattr(torch.ops.fastadapt, name)(*given[: len(inputs)], **options)

    for key in ("AutocastCPU", "AutocastCUDA"):
        library.impl(name, cast, key)


def on_cuda(
    name: str, empty: Callable[..., Out], launches: Callable[[], ModuleType]
) -> Callable[..., Out]:
    """An operator for CUDA tensors; triton is imported when it meets the first."""

    def implementation(first: Tensor, *rest: Any) -> Out:
        out = empty(first, *rest)
        with device_of(first):
            getattr(launches(), name)(first, *rest, out)
        return out

    return implementation


def device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Makes a tensor's device the current one."""
    return current(x.device)


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a device the current one; a CUDA device without an index is."""
    without = device.type != "cuda" or device.index is None
    if without or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)
