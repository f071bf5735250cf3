"""How peers are found, and what is raised in place of one; imports nothing that takes seconds."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any


class MissingPeer(RuntimeError):  # noqa: N818, it is no error of the program
    """A peer cannot run here; the message says why."""


def found(place: str, words: str) -> Any:
    """A peer's module, or of a `module:name` what has the name; these words say what is missing."""
    path, _, name = place.partition(":")
    try:
        module = import_module(path)
        return getattr(module, name) if name else module
    except (ImportError, AttributeError) as error:
        raise MissingPeer(f"{words}: {error}") from error


def compiled(function: Callable[..., Any], attempt: Callable[[Any], object]) -> Any:
    """A function through `torch.compile`, anew for each shape, after an attempt to call it.

    Raises:
        MissingPeer: there is no C++ compiler, or the compiler cannot do it.
    """
    import torch
    from torch._inductor.exc import InductorError  # takes 3 s, in each process

    torch.compiler.reset()
    call = torch.compile(function, dynamic=False)
    try:
        attempt(call)
    except InductorError as error:
        raise MissingPeer(f"torch.compile: {first_line(error)}") from error
    return call


def first_line(error: Exception) -> str:
    """What an error says, in a line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
