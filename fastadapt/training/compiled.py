"""Compiled models: the way to the head is taken out of their graphs, the rest stays compiled.

A graph of a whole model does not see the hooks that score the head's states: torch has no guards on
hooks, so that a graph that was made without them is run without them. In a call that scores, every
module from the outermost wrapper down to the head therefore runs as its own forward says, and what
these call beside (the body, which is nearly all of the work) is compiled as the whole was.
"""

from __future__ import annotations

import contextlib
import inspect
from collections import deque
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from torch import nn

from fastadapt.training.head import HeadError, layer_of, wrappers_of

_ORIGINAL = "_torchdynamo_orig_callable"  # an attribute of what torch.compile returns for functions


@contextlib.contextmanager
def head_outside_graphs(model: Any, *, others: bool = True) -> Iterator[None]:
    """Takes the way from a model to its head out of compiled graphs, within the block.

    Args:
        model: as for `layer_of`.
        others: whether what the modules on the way call beside it is compiled, by the backend and
            with the options of the nearest compiled module above; its hooks are not.

    Raises:
        ValueError: a compiled function under a wrapper of another kind.
    """
    way = _way_to_head(model)
    compilers = [_compiler_of(module) for module in way]
    if not any(compilers):
        yield
        return
    with contextlib.ExitStack() as stack:
        for module, compiler in zip(way, compilers, strict=True):
            if compiler is not None:
                _uncompile(module, stack)
        compiler = None
        for (above, _), own in zip(pairwise(way), compilers[:-1], strict=True):
            compiler = own or compiler
            if others and compiler is not None:
                for module in [*_beside(above, way), *_decoder_of(above, way)]:
                    _put(module, "forward", compiler(module.forward), stack)
        yield


def _way_to_head(model: Any) -> list[Any]:
    """Returns the modules that call each other on the way to the head, both ends included."""
    stops = [*wrappers_of(model), layer_of(model)]
    way = stops[:1]
    for above, below in pairwise(stops):
        way += _way(above, below)[1:]
    return way


def _way(above: Any, below: Any) -> tuple[Any, ...]:
    """Returns the shortest way through children; both ends where there is none, as in engines."""
    ways, seen = deque[tuple[Any, ...]]([(above,)]), {above}
    while ways:
        way = ways.popleft()
        if way[-1] is below:
            return way
        new = [child for child in way[-1].children() if child not in seen]
        seen.update(new)
        ways.extend((*way, child) for child in new)
    return above, below


def _beside(module: nn.Module, way: list[Any]) -> Iterator[nn.Module]:
    """Yields what a module calls beside the way: children with parameters, not compiled yet."""
    for child in module.children():
        if any(child is each for each in way) or _compiler_of(child) is not None:
            continue
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _beside(child, way)
        elif any(True for _ in child.parameters()):
            yield child


def _decoder_of(module: Any, way: list[Any]) -> Iterator[nn.Module]:
    """Yields the decoder that a model may call in place of the body that holds it, as OPT does."""
    decoder = module.get_decoder() if hasattr(module, "get_decoder") else None
    if not isinstance(decoder, nn.Module) or any(decoder is each for each in module.children()):
        return
    if _compiler_of(decoder) is None and all(each is not way[-1] for each in decoder.modules()):
        yield decoder


def _compiler_of(module: nn.Module) -> Any | None:
    """Returns the decorator of torch that compiles a module's calls, None if none does."""
    if "_orig_mod" in module._modules:
        if module.__dict__.get("forward") is module._modules["_orig_mod"]:
            return None  # a block around this one has taken it out
        compiler: Any = module.dynamo_ctx
    else:
        calls = (module.__dict__.get(name) for name in ("_compiled_call_impl", "forward"))
        call = next((call for call in calls if hasattr(call, _ORIGINAL)), None)
        if call is None or getattr(call, "_torchdynamo_disable", False):
            return None
        compiler = inspect.getclosurevars(call).nonlocals.get("self")
        if getattr(call, "__wrapped__", None) != getattr(call, _ORIGINAL) or compiler is None:
            raise HeadError(
                f"model: expected {type(module).__name__} with a compiled forward as torch.compile "
                "returns it, got one inside of another function; compile the module instead"
            )
    return compiler if callable(getattr(compiler, "callback", None)) else None


def _uncompile(module: nn.Module, stack: contextlib.ExitStack) -> None:
    """Makes a module run as its own forward says, until the stack is left."""
    if "_orig_mod" in module._modules:
        if hasattr(module.__dict__.get("forward"), _ORIGINAL):  # and not one that trl has put there
            _put(module, "forward", module._modules["_orig_mod"], stack)
        return
    _put(module, "_compiled_call_impl", None, stack)
    forward = module.__dict__.get("forward")
    if hasattr(forward, _ORIGINAL):
        _put(module, "forward", getattr(forward, _ORIGINAL), stack)


def _put(module: nn.Module, name: str, value: Any, stack: contextlib.ExitStack) -> None:
    """Sets an attribute of an instance until the stack is left."""
    attributes = module.__dict__
    if name in attributes:
        stack.callback(attributes.__setitem__, name, attributes[name])
    else:
        stack.callback(attributes.pop, name)
    attributes[name] = value
