"""Triton's interpreter without its work that changes nothing: a fifth of its time is left.

What is replaced is what it computes anew for each operation and could remember: the type that two
types give, NumPy's dtypes, types of blocks, the language with NumPy's functions in it. Its checks
of overflow end in an assertion that it leaves out.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest


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

    scope.set_attr(of, name, call)


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
