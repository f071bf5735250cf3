"""What the benchmarks have in common: their options, the record of a run, and how it ends."""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from rich.console import Console

import report
from fastadapt.study._progress import progress_bar, stepper
from host import gpu_record, host_record, write_record
from missing import first_line

DEMO_MODEL = "SmolLM2-135M-Instruct"
Cell = TypeVar("Cell", bound=tuple[Any, ...])


class Option(NamedTuple):
    """A number or a name that a benchmark is run with."""

    default: Any = None
    help: str = ""
    least: float | None = None
    kind: Callable[[str], Any] | None = None  # that of the default
    choices: Sequence[str] | None = None
    metavar: str | None = None
    required: bool = False

    def add(self, parser: argparse.ArgumentParser, name: str) -> None:
        """Add the option to a parser."""
        known: dict[str, Any] = self._asdict()
        kind, _ = known.pop("kind"), known.pop("least")
        if self.default is not None:
            kind = kind or type(self.default)
            known["help"] = f"{self.help} (default: %(default)s)".strip()
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, **known)


def sizes(text: str) -> list[int]:
    """Reads numbers of 1 and more between commas."""
    found = [int(part) for part in text.split(",")]
    if min(found) < 1:
        raise ValueError(text)
    return found


class Axis(NamedTuple):
    """The values of an axis of the grid, of which some can be asked for."""

    known: Sequence[Any]
    quick: Sequence[Any] | None = None  # those of --quick
    kind: Callable[[str], Any] | None = None  # of values that need not be known ones
    may_be_empty: bool = False
    metavar: str = "X"

    def add(self, parser: argparse.ArgumentParser, name: str) -> None:
        """Add the option to a parser."""
        limited: dict[str, Any] = {"type": self.kind} if self.kind else {"choices": self.known}
        count = "*" if self.may_be_empty else "+"
        parser.add_argument(f"--{name}", nargs=count, metavar=self.metavar, **limited)

    def values(self, wanted: list[Any] | None, quick: bool) -> list[Any]:
        """Those asked for in the order of the known ones, those of --quick, or all."""
        if wanted is None:
            return list(self.quick if quick and self.quick is not None else self.known)
        return wanted if self.kind else [value for value in self.known if value in wanted]


class Flag(NamedTuple):
    """What a benchmark does unless `--no-NAME` is given."""

    help: str

    def add(self, parser: argparse.ArgumentParser, name: str) -> None:
        """Add the option to a parser."""
        flag = f"--no-{name.replace('_', '-')}"
        parser.add_argument(flag, dest=name, action="store_false", help=self.help)


MODEL = Option(help=f"default: {DEMO_MODEL}", metavar="NAME_OR_PATH")
SEED = Option(0)
PAIRS_FILE = Option(help="JSON Lines of chosen and rejected, or .gz", kind=Path, required=True)
OF_A_DEVICE = {
    "commit": Option(metavar="HASH", help="that this tree is a copy of, for one without its git"),
    "device": Option("cuda", choices=("cuda", "cpu"), help="cpu: only to try the script"),
}


class Benchmark(NamedTuple):
    """A script: its name in the record, its words on itself, its options, its peers' packages."""

    name: str
    description: str
    options: Mapping[str, Option | Axis | Flag]
    packages: tuple[str, ...] = ()

    def parse(self, arguments: Sequence[str] | None = None) -> argparse.Namespace:
        """Read the command line, or these; it ends with a message where a value cannot be."""
        parser = argparse.ArgumentParser(description=self.description.partition("\n")[0])
        parser.add_argument("--out", type=Path, help="JSON file to write")
        parser.add_argument("--threads", type=int, help="default: torch's own choice")
        if any(isinstance(option, Axis) and option.quick for option in self.options.values()):
            text = "few cells; the filters below still widen or narrow"
            parser.add_argument("--quick", action="store_true", help=text)
        for name, option in self.options.items():
            option.add(parser, name)
        parsed = parser.parse_args(arguments)
        for name, option in self.options.items():
            value = getattr(parsed, name)
            if isinstance(option, Axis):
                value = option.values(value, getattr(parsed, "quick", False))
                setattr(parsed, name, value)
                least, smallest = 1, min(value) if option.kind is int else 1
            else:
                least, smallest = getattr(option, "least", None), value
            if least is not None and smallest < least:
                parser.error(f"{name}: expected at least {least}, got {smallest}")
        if getattr(parsed, "device", None) == "cuda":
            require_cuda()
        return parsed

    def __call__(self, measure: Callable[..., bool | None]) -> Callable[[], int]:
        """The main function of a script: it measures, writes the JSON file and prints the result.

        Args:
            measure: of the options and the record, which it fills; it says whether a part of it
                failed, which is the exit code.
        """

        @functools.wraps(measure)
        def main(arguments: Sequence[str] | None = None) -> int:
            options = self.parse(arguments)
            if options.threads:
                torch.set_num_threads(options.threads)
            record = {"benchmark": self.name, "host": self._host(options)}
            failed = measure(options, record)
            if options.out:
                write_record(options.out, record)
            for note in record.get("notes", ()):
                Console(stderr=True).print(f"note: {note}", style="yellow")
            sys.stdout.write(report.summary(record))
            return int(bool(failed))

        return main

    def _host(self, options: argparse.Namespace) -> dict[str, Any]:
        """Describe the machine before anything is measured."""
        host = host_record(self.packages)
        if "device" in self.options:
            host["gpu"] = gpu_record()
            if options.commit:  # a copy, whose own git does not know it
                host |= {"commit": options.commit, "dirty": False}
        return host


def require_cuda() -> None:
    """End with a message where there is no CUDA device."""
    if not torch.cuda.is_available():
        sys.stderr.write("error: no CUDA device: torch.cuda.is_available() is False\n")
        sys.exit(2)


def settings_of(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Some options as a record has them: of files their names, of the default model its name."""
    values = {name: getattr(options, name) for name in names}
    if "model" in values:
        values["model"] = values["model"] or DEMO_MODEL
    return {name: x.name if isinstance(x, Path) else x for name, x in values.items()}


@contextmanager
def progress(words: str, total: int) -> Iterator[Callable[[], None]]:
    """Shows a bar while the block runs; called, what it gives advances the bar."""
    with progress_bar(Console(stderr=True), auto_refresh=False) as bar:
        yield stepper(bar, words, total)


def measure_until(
    end: float,
    grid: Sequence[Cell],
    measure: Callable[[Cell], None],
    note: Callable[[str], None],
    name: Callable[..., str],
) -> bool:
    """Measure cells until time is over, note what was left out, and say whether a cell failed."""
    failed = False
    for done, cell in enumerate(grid):
        if time.monotonic() > end:
            note(f"{len(grid) - done} of {len(grid)} cells left out for want of time")
            break
        try:
            measure(cell)
        except Exception as error:  # the other cells are measured all the same
            note(f"{name(*cell)}, failed: {first_line(error)}")
            failed = True
    return failed
