"""Errors of the commands: one line on the error output, and an exit code."""

from __future__ import annotations

import argparse
import os
import re
import sys
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from fastadapt._ops.checks import nearest

WRONG_INPUT, INTERRUPTED = 2, 130
_REFUSED = r"expected (one|some) of (?P<known>.*), got '(?P<word>[^']*)'$"
_REFUSED_BY_ARGPARSE = r"invalid choice: '(?P<word>[^']*)' \(choose from (?P<known>.*)\)$"


class CommandError(Exception):
    """An error that the user can fix: wrong input, a folder in use, a full disk."""


# What files, folders, models and data raise; a damaged .gz has two errors of its own.
EXPECTED = (CommandError, OSError, ValueError, EOFError, zlib.error)


class CommandParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, with the nearest known word.

    Flags are not abbreviated: a shortened one would change its meaning with the next flag.
    """

    def __init__(self, **settings: Any) -> None:
        """Takes the arguments of `ArgumentParser` by name."""
        super().__init__(**{"allow_abbrev": False, **settings})

    def error(self, message: str) -> NoReturn:
        """Exits with code 2 after one line that names the command."""
        self.exit(WRONG_INPUT, f"{self.prog}: {one_line(with_suggestion(message))}\n")

    # `ArgumentParser` declares it once for every type of namespace
    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parses arguments, and refuses unknown ones that resemble a known flag."""
        parsed, left = super().parse_known_args(args, namespace)
        unknown = [word for word in left if word.startswith("-")]
        if unknown or left:
            first = (unknown or left)[0]
            flags = [flag for action in self._actions for flag in action.option_strings]
            self.error(f"unrecognized argument {first!r}{did_you_mean(first, flags)}")
        return parsed, left


def check_folder(name: str, folder: Path) -> None:
    """Raises unless a folder is writable or could be created; creates nothing.

    Args:
        name: of the argument, for the message.
        folder: where results shall go.

    Raises:
        CommandError: it is a file, or the user may not write there.
    """
    place = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not place.is_dir():
        raise CommandError(f"{name}: expected a folder, got the file {str(place)!r}")
    if not os.access(place, os.W_OK | os.X_OK):
        raise CommandError(f"{name}: expected a folder to write to, got {str(place)!r}")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Returns "; did you mean X?" with the most similar known word, or an empty string."""
    return nearest([word.partition("=")[0]], known)


def with_suggestion(message: str) -> str:
    """Adds "did you mean X?" to a message that refuses a word and lists the valid ones."""
    for pattern in (_REFUSED, _REFUSED_BY_ARGPARSE):
        if found := re.search(pattern, message):
            known = re.findall(r"[\w-]+", found["known"])
            return message + did_you_mean(found["word"], known)
    return message


def one_line(message: object) -> str:
    """Returns a message without its line breaks."""
    return " ".join(str(message).split())


def fail(message: object, code: int = WRONG_INPUT) -> int:
    """Writes one line to the error output and returns the exit code."""
    text = one_line(message) or type(message).__name__
    sys.stderr.write(f"fastadapt: {text}\n")
    return code
