"""Runs a function that yields in a process of its own, whose memory nothing else has touched."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from typing import Any

_ITEM, _END, _ERROR = range(3)


def in_fresh_process(function: Callable[..., Iterable[Any]], *arguments: Any) -> Iterator[Any]:
    """Yields what `function(*arguments)` yields in a new interpreter.

    Args:
        function: one that can be imported; it returns or yields items, which like its arguments
            can be pickled.
        *arguments: of the function.

    Raises:
        RuntimeError: the function raised, with its traceback, or its process ended without a word.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_all, args=(sender, function, arguments), daemon=True)
    process.start()
    sender.close()
    try:
        while True:
            try:
                kind, item = receiver.recv()
            except EOFError:
                process.join()
                raise RuntimeError(
                    f"{function.__name__}: its process ended with exit code {process.exitcode}"
                ) from None
            if kind == _END:
                process.join()  # so that it ends in order
                return
            if kind == _ERROR:
                raise RuntimeError(f"{function.__name__}, in its process:\n{item}")
            yield item
    finally:
        process.terminate()
        process.join()
        receiver.close()


def _send_all(
    sender: Connection, function: Callable[..., Iterable[Any]], arguments: tuple[Any, ...]
) -> None:
    """The new process."""
    try:
        for item in function(*arguments):
            sender.send((_ITEM, item))
        sender.send((_END, None))
    except Exception:
        sender.send((_ERROR, traceback.format_exc()))
