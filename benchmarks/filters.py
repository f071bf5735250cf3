"""The command line's filters: which values of each axis of a grid a benchmark runs."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cases import chosen

Axes = Mapping[str, Sequence[Any]]
_NUMBERS = ("vocab", "batch")  # V and N may be any number
_MAYBE_NONE = ("peers",)  # may be left out altogether


def grid_parser(
    description: str, axes: Axes, *, rounds: int, seconds: float
) -> argparse.ArgumentParser:
    """The parser of a grid: where it goes, `--quick` and an option per axis, its rounds."""
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, help="JSON file to write")
    add("--quick", action="store_true", help="few cells; the filters below still widen or narrow")
    for name, known in axes.items():
        limited: dict[str, Any] = {"type": int} if name in _NUMBERS else {"choices": known}
        count = "*" if name in _MAYBE_NONE else "+"
        add(f"--{name}", nargs=count, metavar="X", **limited)
    add("--rounds", type=int, default=rounds, help="at most (default: %(default)s)")
    text = "per cell, about (default: %(default)s)"
    add("--seconds", type=float, default=seconds, help=text)
    add("--seed", type=int, default=0)
    return parser


def fill_filters(
    parser: argparse.ArgumentParser, options: argparse.Namespace, axes: Axes, quick: Axes
) -> None:
    """Give every axis its values: those asked for, those of `--quick`, or all."""
    for name, known in axes.items():
        wanted = getattr(options, name)
        if wanted is None:
            setattr(options, name, list(quick.get(name, known) if options.quick else known))
        elif name in _NUMBERS:
            at_least(parser, name, min(wanted), 1)
        else:
            setattr(options, name, chosen(wanted, known))


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add what the benchmarks of a GPU have in common."""
    add = parser.add_argument
    add("--commit", metavar="HASH", help="that this tree is a copy of, for a tree without its git")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: only to try the script")


def check_device(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Leave with a message where the device is not there, or rounds are too few."""
    at_least(parser, "rounds", options.rounds, 2)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device: torch.cuda.is_available() is False")


def at_least(parser: argparse.ArgumentParser, name: str, value: int, low: int) -> None:
    """Leave with a message where a number is too small."""
    if value < low:
        parser.error(f"{name}: expected at least {low}, got {value}")
