"""What calls on a GPU would compile and launch, on a machine without one.

Arguments are bound and specialised by Triton itself, on its just-in-time path; what it would then
compile and launch is written down. The operators of fastadapt take their implementations for CUDA
though their tensors are on the CPU, where memory that nothing touches costs nothing. Nothing that a
kernel or a product would write is written: results are what was in their memory.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
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
from triton.tools.tensor_descriptor import TensorDescriptor

from fastadapt._ops.linear import cuda, divergence
from fastadapt._ops.linear import operator as linear
from fastadapt._ops.linear.cuda import CudaWork, DoubleCudaWork
from fastadapt._ops.linear.pairs_cuda import CudaPair, DoubleCudaPair
from fastadapt._ops.triton import launch_scan

WARP = 32
EARLY_FROM = 90  # kernels take their places while the one before ends: launch_scan.is_early
PRODUCTS = {"aten::mm": 0, "aten::addmm": 1}  # of PyTorch, and where their first factor stands


class Size(NamedTuple):
    """A tensor that a kernel is given."""

    shape: tuple[int, ...]
    itemsize: int
    address: int  # the same of what is given twice

    @property
    def nbytes(self) -> int:
        """All of it."""
        return math.prod(self.shape) * self.itemsize


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
    sizes: dict[str, Size]  # of tensors and descriptors, by the names of arguments and fields


class Product(NamedTuple):
    """One product of two matrices through PyTorch."""

    rows: int
    columns: int
    depth: int
    itemsize: int  # of a factor's numbers
    out_itemsize: int
    adds: bool  # whether it is added to what is there


class Operator(NamedTuple):
    """A call of PyTorch's that is no product."""

    name: str
    written: int  # bytes of its results, 0 of views and of what is only allocated


class Calls(NamedTuple):
    """What was called while it was recorded."""

    launches: list[Launch]
    operators: Counter[str]  # of PyTorch's
    compiled: list[Source]  # what was not compiled before for the same target
    work: list[Launch | Product | Operator]  # in the order of the calls

    @classmethod
    def none(cls) -> Calls:
        """Where nothing was called yet."""
        return cls([], Counter(), [], [])

    def by_kernel(self) -> dict[str, int]:
        """How often each kernel was launched."""
        return dict(Counter(launch.source.kernel for launch in self.launches))

    def sources(self) -> dict[str, Source]:
        """Every specialised kernel once, by its name and key."""
        return {f"{x.source.kernel} {x.key}": x.source for x in self.launches}


class _Driver:
    """What Triton asks a driver for before it compiles."""

    def __init__(self, target: int, calls: Calls) -> None:
        self.target = target
        self.launches, self.compiled, self.work = calls.launches, calls.compiled, calls.work

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

    def run(self, x: int, y: int, z: int, *rest: Any) -> None:
        """Writes the launch down where launches are recorded now."""
        arguments = rest[-len(self.source.signature) :]  # after those of the driver
        sizes = dict(_sizes_of(zip(self.source.signature, arguments, strict=True)))
        launch = Launch(self.key, (x, y, z), self.source, sizes)
        driver.active.launches.append(launch)
        driver.active.work.append(launch)


def _sizes_of(named: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Size]]:
    """The sizes of tensors among arguments, in bundles too."""
    for name, x in named:
        if isinstance(x, torch.Tensor):
            yield name, Size(tuple(x.shape), x.element_size(), x.data_ptr())
        elif isinstance(x, TensorDescriptor):
            yield name, Size(tuple(x.shape), x.base.element_size(), x.base.data_ptr())
        elif hasattr(x, "_fields"):
            yield from _sizes_of(zip(x._fields, x, strict=True))


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
    """Takes the implementations for CUDA of our operators; counts PyTorch's, makes no product."""

    def __init__(self, calls: Calls) -> None:
        super().__init__()
        self.operators, self.work = calls.operators, calls.work

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "fastadapt":
            on_cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
            with self:  # which is off within this method
                return func.redispatch(on_cuda, *args, **kwargs)
        self.operators[str(func)] += 1
        name = func._schema.name
        if name in PRODUCTS:
            a, b = args[PRODUCTS[name] : PRODUCTS[name] + 2]
            out = kwargs["out"] if "out" in kwargs else a.new_empty(a.shape[0], b.shape[1])
            sizes = *out.shape, a.shape[1], a.element_size(), out.element_size()
            self.work.append(Product(*sizes, name == "aten::addmm"))
            return out
        made = func(*args, **kwargs)
        self.work.append(Operator(str(func), 0 if _writes_nothing(func) else _nbytes(made)))
        return made


def _writes_nothing(func: Any) -> bool:
    """Whether an operator of PyTorch's makes a view, or memory that it leaves as it is."""
    views = any(x.alias_info and not x.alias_info.is_write for x in func._schema.returns)
    return views or "empty" in func._schema.name or torch.Tag.inplace_view in func.tags


def _nbytes(made: Any) -> int:
    """The bytes of the tensors that were made."""
    several = made if isinstance(made, tuple | list) else (made,)
    return sum(x.nbytes for x in several if isinstance(x, torch.Tensor))


@contextmanager
def recorded(target: int) -> Iterator[Calls]:
    """Records what is called in the context, as on a GPU of a target.

    Raises:
        RuntimeError: Triton was imported for its interpreter, which specialises nothing.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("expected Triton's compiler, got its interpreter")
    calls = Calls.none()

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
            AsOnCuda(calls),
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
