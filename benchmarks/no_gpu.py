"""What calls on a GPU would compile and launch, on a machine without one.

Arguments are bound and specialised by Triton itself, on its just-in-time path; what it would then
compile and launch is written down. The operators of fastadapt take their implementations for CUDA
though their tensors are on the CPU, where memory that nothing touches costs nothing. Nothing that a
kernel would write is written: results are what was in their memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fastadapt._ops.linear import cuda, divergence
from fastadapt._ops.linear import operator as linear
from fastadapt._ops.linear.cuda import CudaWork, DoubleCudaWork
from fastadapt._ops.linear.pairs_cuda import CudaPair, DoubleCudaPair
from fastadapt._ops.triton import launch_scan

WARP = 32
EARLY_FROM = 90  # kernels take their places while the one before ends: launch_scan.is_early


class Source(NamedTuple):
    """A specialised kernel: all that its machine code follows from. It can be pickled."""

    target: int  # 90 stands for sm_90
    module: str
    kernel: str
    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]


class Launch(NamedTuple):
    """One launch; the key is that of the specialisation in Triton's cache."""

    key: str
    grid: tuple[int, int, int]
    source: Source


class Calls(NamedTuple):
    """What was called while it was recorded."""

    launches: list[Launch]
    operators: Counter[str]  # of PyTorch's
    compiled: list[Source]  # what was not compiled before for the same target

    def sources(self) -> dict[str, Source]:
        """Every specialised kernel once, by its name and key."""
        return {f"{x.source.kernel} {x.key}": x.source for x in self.launches}


class _Driver:
    """What Triton asks a driver for before it compiles."""

    def __init__(self, target: int, calls: Calls) -> None:
        self.target = target
        self.launches, self.compiled = calls.launches, calls.compiled

    def get_current_device(self) -> int:
        """A device of its own for each target: what is bound for one does not serve another."""
        return self.target

    def get_current_stream(self, device: int) -> int:
        """There are no others."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """What to compile for."""
        return GPUTarget("cuda", self.target, WARP)


class _NotCompiled:
    """Stands in Triton's cache of a kernel for the compiled one; launched, it is written down."""

    function, packed_metadata = 0, None

    def __init__(self, key: str, source: Source) -> None:
        self.key = key
        self.source = source

    def launch_metadata(self, *_: object) -> None:
        """Nobody reads it."""

    def run(self, x: int, y: int, z: int, *_: object) -> None:
        """Writes the launch down where launches are recorded now."""
        driver.active.launches.append(Launch(self.key, (x, y, z), self.source))


def _do_not_compile(
    self: JITFunction,
    key: str,
    signature: dict[str, Any],
    device: int,
    constants: dict[tuple[int, ...], Any],
    options: Any,
    attributes: dict[tuple[int, ...], Any],
    warmup: bool,
) -> _NotCompiled:
    """In the place of Triton's method of these arguments."""
    kernel, target, name = self.fn, driver.active.target, self.fn.__qualname__
    given = signature, constants, attributes, dict(options.__dict__)
    made = _NotCompiled(key, Source(target, kernel.__module__, name, *given))
    driver.active.compiled.append(made.source)
    self.device_caches[device][0][key] = made
    return made


class AsOnCuda(TorchDispatchMode):
    """Takes the implementations for CUDA of our operators, and counts those of PyTorch."""

    def __init__(self, operators: Counter[str]) -> None:
        super().__init__()
        self.operators = operators

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "fastadapt":
            on_cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
            with self:  # which is off within this method
                return func.redispatch(on_cuda, *args, **kwargs)
        self.operators[str(func)] += 1
        if func._overloadname == "dtype_out":  # products of half precision, which the CPU lacks
            return kwargs["out"]
        return func(*args, **kwargs)


@contextmanager
def recorded(target: int) -> Iterator[Calls]:
    """Records what is called in the context, as on a GPU of a target.

    Raises:
        RuntimeError: Triton was imported for its interpreter, which specialises nothing.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("expected Triton's compiler, got its interpreter")
    calls = Calls([], Counter(), [])

    def work_of(hidden: torch.Tensor) -> type[CudaWork]:
        return DoubleCudaWork if hidden.dtype == torch.float64 else CudaWork

    def pairs_of(hidden: torch.Tensor) -> type[CudaPair]:
        return DoubleCudaPair if hidden.dtype == torch.float64 else CudaPair

    before = driver._active
    driver.set_active(_Driver(target, calls))
    try:
        with (
            mock.patch.object(JITFunction, "_do_compile", _do_not_compile),
            mock.patch.object(linear, "work_of", work_of),
            mock.patch.object(cuda, "capability_of", lambda x: target),
            mock.patch.object(divergence, "work_of", pairs_of),
            mock.patch.object(launch_scan, "is_early", lambda device: target >= EARLY_FROM),
            AsOnCuda(calls.operators),
        ):
            yield calls
    finally:
        driver.set_active(before)


def compiled(source: Source) -> Any:
    """Compiles a specialised kernel as Triton does at its first launch."""
    kernel = getattr(import_module(source.module), source.kernel)
    tree = ASTSource(kernel, source.signature, source.constants, source.attributes)
    target = GPUTarget("cuda", source.target, WARP)
    return triton.compile(tree, target=target, options=source.options)
