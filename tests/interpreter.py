"""Triton's interpreter without its work that changes nothing: an eighth of its time is left.

What is replaced is what it computes anew for each operation and could remember: the type that two
types give, NumPy's dtypes, types of blocks, the language with NumPy's functions in it. Its checks
of overflow end in an assertion that it leaves out. Operators go straight to the function of NumPy
that they end in, once it has given what the interpreter gave for the same types.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

NUMBERS = frozenset({"fp32", "fp64", "int32", "int64", "uint32", "uint64"})  # NumPy's own as well
SIGNED = frozenset({"int32", "int64"})  # of which NumPy takes the wider one, too
BITS = frozenset({"and", "or", "xor"})
OPERATORS = {
    **{"add": np.add, "sub": np.subtract, "mul": np.multiply, "truediv": np.divide},
    **{"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor},
    **{"lshift": np.left_shift, "rshift": np.right_shift},
    **{"lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal},
    **{"eq": np.equal, "ne": np.not_equal},
}


@contextmanager
def without_repetition() -> Iterator[None]:
    """Remembers, within the context, what the interpreter would compute anew."""
    interpreter = sys.modules.get("triton.runtime.interpreter")
    if interpreter is None:
        yield
        return
    patched: dict[frozenset[str], Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        if hasattr(interpreter, "_LangPatchScope"):  # from 3.5 on
            patch.setattr(interpreter, "_patch_lang", _only_once(interpreter._patch_lang, patched))
            patch.setattr(interpreter, "_patch_attr", _called_at_once)
        if hasattr(interpreter, "_get_np_dtype"):
            patch.setattr(interpreter, "_get_np_dtype", _by_name(interpreter._get_np_dtype))
        if hasattr(getattr(interpreter, "TensorHandle", None), "__post_init__"):
            # a check of NumPy's type, which what makes the array has chosen
            patch.setattr(interpreter.TensorHandle, "__post_init__", lambda self: None)
        _remember_types(patch, interpreter)
        yield
        for scope in reversed(patched.values()):
            scope.restore()


def _only_once(patch: Callable[[Any], Any], patched: dict[frozenset[str], Any]) -> Any:
    """Puts NumPy's functions into the language at the first launch, not in each and its callees."""

    @functools.cache
    def languages(function: Any) -> frozenset[str]:
        """The modules that are patched for a function: those of the language among its globals."""
        modules = {getattr(x, "__name__", "") for x in function.__globals__.values()}
        return frozenset(modules & {"triton.language", "triton.language.core"})

    def patch_once(function: Any) -> Any:
        needed = languages(function)
        if not any(needed <= names for names in patched):
            patched[needed] = patch(function)
        return SimpleNamespace(restore=lambda: None)  # what a launch ends with

    return patch_once


def _called_at_once(of: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
    """Puts a builtin of the language into its place, without the check that it is in a kernel."""
    from triton.runtime.interpreter import interpreter_semantic as semantic

    function = getattr(member, "__wrapped__", member)

    def call(*args: Any, _semantic: Any = None, **kwargs: Any) -> Any:
        return function(*args, **kwargs, _semantic=semantic)

    scope.set_attr(of, name, _shortened(of, name, call, semantic))


def _shortened(of: Any, name: str, call: Callable[..., Any], semantic: Any) -> Callable[..., Any]:
    """The same function, where it is one that goes straight to NumPy's."""
    import triton.language as tl

    if name == "where" and of in (tl, tl.core):
        return _where(call, semantic)
    if of is not tl.tensor:
        return call
    if name == "to":
        return _to(call)
    operator = name.strip("_")
    if operator in OPERATORS:
        return _operator(operator, call, semantic)
    if name.startswith("__r") and operator[1:] in OPERATORS:
        return _operator(operator[1:], call, semantic, swapped=True)
    return call


def _maker(data: Any, slow: Any) -> Callable[[Any], Any] | None:
    """Makes results of arrays, as the interpreter's first one was made, if NumPy's array was it."""
    wanted = slow.handle.data
    if data.dtype != wanted.dtype or data.shape != wanted.shape:
        return None
    if not np.array_equal(data, wanted, equal_nan=data.dtype.kind == "f"):
        return None
    fields = {name: x for name, x in vars(slow).items() if name != "handle"}
    tensor, handle, dtype = type(slow), type(slow.handle), slow.handle.dtype

    def make(data: Any) -> Any:
        made = object.__new__(tensor)
        vars(made).update(fields)
        made.handle = handle(data, dtype)
        return made

    return make


def _operator(
    name: str, call: Callable[..., Any], semantic: Any, *, swapped: bool = False
) -> Callable[..., Any]:
    """An operator by NumPy's, for two tensors alike, a tensor and a number, a pointer."""
    import triton.language as tl

    function, learned = OPERATORS[name], {}
    kinds = NUMBERS | {"int1"} if name in BITS else NUMBERS
    checks = (False, False, True, True) if name == "truediv" else ()

    def of_tensors(a: Any, b: Any) -> Any:
        return function(a.handle.data, b.handle.data)

    def of_a_pointer(a: Any, b: Any) -> Any:
        width = max(1, a.dtype.element_ty.primitive_bitwidth // 8)
        return a.handle.data + width * b.handle.data.astype(np.uint64)

    def of_a_number(a: Any, b: Any) -> Callable[[Any, Any], Any] | None:
        same, constant = semantic.binary_op_type_checking_impl(a, b, *checks)
        number, to = constant.handle.data, same.handle.data.dtype
        if same.dtype.name not in NUMBERS:
            return None
        if swapped:
            return lambda a, b: function(number, a.handle.data.astype(to, copy=False))
        return lambda a, b: function(a.handle.data.astype(to, copy=False), number)

    def first(key: Any, a: Any, b: Any) -> Any:
        slow, compute = call(a, b), None
        if isinstance(b, tl.tensor):
            if a.dtype.is_ptr():
                compute = of_a_pointer if name == "add" and b.dtype.name in NUMBERS else None
            elif a.dtype.name == b.dtype.name and a.dtype.name in kinds:
                compute = of_tensors
            elif a.dtype.name in SIGNED and b.dtype.name in SIGNED:
                compute = of_tensors
        elif a.dtype.name in NUMBERS | {"int1"} and type(b) in (int, float):
            compute = of_a_number(a, b)
        make = compute and _maker(compute(a, b), slow)
        learned[key] = (lambda a, b: make(compute(a, b))) if make else call
        return slow

    def operator(a: Any, b: Any) -> Any:
        if type(b) is tl.constexpr:
            b = b.value
        if type(b) is tl.tensor:
            key = a.type.name, b.type.name
        else:
            key = a.type.name, type(b), repr(b)
        known = learned.get(key)
        return known(a, b) if known else first(key, a, b)

    return operator


def _to(call: Callable[..., Any]) -> Callable[..., Any]:
    """Conversion of numbers, or of their bits, by that of NumPy's arrays."""
    learned: dict[Any, Any] = {}

    def first(key: Any, x: Any, dtype: Any, bitcast: bool) -> Any:
        slow, make = call(x, dtype, bitcast=bitcast), None
        to = slow.handle.data.dtype

        def compute(x: Any) -> Any:
            return x.handle.data.view(to) if bitcast else x.handle.data.astype(to)

        if slow is x:
            learned[key] = lambda x: x
        elif x.dtype.name in NUMBERS | {"int1"} and dtype.name in NUMBERS:
            make = _maker(compute(x), slow)
        elif (x.dtype.name, dtype.name) == ("fp16", "fp32"):
            make = _maker(compute(x), slow)
        if make:
            learned[key] = lambda x: make(compute(x))
        else:
            learned.setdefault(key, lambda x: call(x, dtype, bitcast=bitcast))
        return slow

    def convert(x: Any, dtype: Any, *rest: Any, bitcast: Any = False, **options: Any) -> Any:
        dtype, bitcast = (getattr(y, "value", y) for y in (dtype, bitcast))  # or constexpr
        if rest or options:
            return call(x, dtype, *rest, bitcast=bitcast, **options)
        key = x.type.name, dtype.name, bitcast
        known = learned.get(key)
        return known(x) if known else first(key, x, dtype, bitcast)

    return convert


def _where(call: Callable[..., Any], semantic: Any) -> Callable[..., Any]:
    """A choice between numbers of one type by NumPy's `where`."""
    import triton.language as tl

    learned: dict[Any, Any] = {}

    def first(key: Any, condition: Any, x: Any, y: Any) -> Any:
        slow, learned[key] = call(condition, x, y), call
        if condition.dtype.name != "int1":
            return slow
        number, wanted = None, x.dtype.name
        if isinstance(y, tl.tensor):
            wanted = y.dtype.name
        elif type(y) in (int, float):
            same, constant = semantic.binary_op_type_checking_impl(x, y, True, True)
            wanted, number = constant.dtype.name, constant.handle.data
        if wanted != x.dtype.name or wanted not in NUMBERS | {"int1"}:
            return slow

        def compute(condition: Any, x: Any, y: Any) -> Any:
            last = y.handle.data if number is None else number
            return np.where(condition.handle.data, x.handle.data, last)

        make = _maker(compute(condition, x, y), slow)
        if make:
            learned[key] = lambda *arguments: make(compute(*arguments))
        return slow

    def where(condition: Any, x: Any, y: Any) -> Any:
        if type(condition) is not tl.tensor or type(x) is not tl.tensor:
            return call(condition, x, y)
        if type(y) is tl.constexpr:
            y = y.value
        last = y.type.name if type(y) is tl.tensor else (type(y), repr(y))
        key = condition.type.name, x.type.name, last
        known = learned.get(key)
        return known(condition, x, y) if known else first(key, condition, x, y)

    return where


def _by_name(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A function of a type, remembered by the type's name, which says all of it."""
    found: dict[str, Any] = {}

    def remembered(dtype: Any) -> Any:
        name = dtype.name
        if name not in found:
            found[name] = function(dtype)
        return found[name]

    return remembered


def _remember_types(patch: pytest.MonkeyPatch, interpreter: Any) -> None:
    """Remembers types of operands, of blocks and of tensors; spares checks of overflow."""
    import triton.language as tl
    from triton.language.semantic import TritonSemantic

    builder = interpreter.interpreter_builder
    if hasattr(builder.options, "sanitize_overflow"):
        quiet = dataclasses.replace(builder.options, sanitize_overflow=False)
        patch.setattr(builder, "options", quiet)

    unwrap, equal = tl.core._unwrap_if_constexpr, tl.dtype.__eq__
    bare = {tl.tensor, tl.dtype, int, float, bool, str, type(None)}
    patch.setattr(tl.core, "_unwrap_if_constexpr", lambda x: x if type(x) in bare else unwrap(x))
    patch.setattr(tl.dtype, "__eq__", lambda a, b: a is b or equal(a, b))

    promote, promoted = TritonSemantic.computation_type_impl, {}

    def computation_type(
        self: Any, a: Any, a_scalar: bool, b: Any, b_scalar: bool, div: bool
    ) -> Any:
        key = a.name, a_scalar, b.name, b_scalar, div
        if key not in promoted:
            promoted[key] = promote(self, a, a_scalar, b, b_scalar, div)
        return promoted[key]

    patch.setattr(TritonSemantic, "computation_type_impl", computation_type)

    check, constants = TritonSemantic.binary_op_type_checking_impl, {}

    def operands(self: Any, a: Any, b: Any, *allowed: bool, **rest: bool) -> tuple[Any, Any]:
        tensors = isinstance(a, tl.tensor), isinstance(b, tl.tensor)
        if all(tensors):
            alike = len(allowed) <= 2 and not rest and a.type.name == b.type.name
            if alike and not a.dtype.is_ptr():
                return a, b  # which no check changes
        elif any(tensors):
            given, number = (a, b) if tensors[0] else (b, a)
            key = given.type.name, type(number), repr(number), tensors[0], allowed, *rest
            if key in constants:
                return (a, constants[key]) if tensors[0] else (constants[key], b)
            pair = check(self, a, b, *allowed, **rest)
            if given is pair[1 - tensors[0]]:
                constant = pair[tensors[0]]
                constant.handle.data.flags.writeable = False
                constants[key] = constant
            return pair
        return check(self, a, b, *allowed, **rest)

    patch.setattr(TritonSemantic, "binary_op_type_checking_impl", operands)

    spread = TritonSemantic.broadcast_impl_value

    def broadcast(self: Any, a: Any, b: Any) -> tuple[Any, Any]:
        shapes = [x.type.shape.values if x.type.is_block() else None for x in (a, b)]
        return (a, b) if shapes[0] == shapes[1] else spread(self, a, b)

    patch.setattr(TritonSemantic, "broadcast_impl_value", broadcast)

    make_block, blocks = tl.block_type.__init__, {}

    def block(self: Any, element_ty: Any, shape: Any) -> None:
        key = element_ty.name, *(getattr(x, "value", x) for x in shape)
        if key not in blocks:
            make_block(self, element_ty, shape)
            blocks[key] = vars(self).copy()
        vars(self).update(blocks[key])

    patch.setattr(tl.block_type, "__init__", block)

    make_tensor, shapes = tl.tensor.__init__, {}

    def tensor(self: Any, handle: Any, type: Any) -> None:
        key = tuple(type.shape.values) if type.is_block() else ()
        if key not in shapes:
            make_tensor(self, handle, type)
            shapes[key] = self.shape, self.numel
            return
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shapes[key]

    patch.setattr(tl.tensor, "__init__", tensor)
