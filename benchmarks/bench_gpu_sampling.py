"""`sample` on a CUDA device, beside one read of the rows, torch.softmax and others.

    python benchmarks/bench_gpu_sampling.py --out benchmarks/results/gpu_sampling.json

Times are those between two CUDA events, at least 100 of each call in turns where the budget allows,
with the L2 cache cold or hot, and as the replay of a CUDA graph or not. The bound is one read of
the rows, by whichever of two forms is faster in the cell: torch.amax of each row, or torch.amax of
all entries as 32-bit integers. A copy, which also writes, is there for reference.

The grid: a cell departs from the first V, the first kind of rows or the first dtype in one of the
three at most. The peers run in cells that depart in none. A peer that is missing, or a call that
cannot be captured, gets a note. `--device cpu` runs everything but the device's timers and peers,
to try the script where there is no GPU; nothing of that is a result.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from cases import DTYPES, GPU_ADAPTORS, GPU_BATCHES, GPU_ROWS, GPU_VOCABULARIES, make_rows
from device_timing import DeviceCall, DeviceTimer, captured
from fastadapt import Adaptor, sample
from filters import add_device, check_device, fill_filters, grid_parser
from gpu_peers import GPU_PEERS
from host import PACKAGES, gpu_record, host_record, quartiles, times_us, write_record
from limits import gpu_sampling_limits, print_limits
from timing import Timer, clock, in_turns, ratios

READS = ("amax of each row", "amax of all")
MODES = ("cold", "hot", "cold, graph", "hot, graph")
LEAST_ROUNDS = 20  # whatever the budget
QUICK: dict[str, list[Any]] = {
    "vocab": [128_256],
    "batch": [64, 1],
    "adaptors": ["T+k+p", "T+p", "everything"],
    "peers": ["flashinfer", "vllm", "stock"],  # compiling takes longer than all the rest
}


class Cell(NamedTuple):
    """One place of the grid: V, N, kind of rows, dtype, adaptor."""

    vocabulary: int
    batch: int
    rows: str
    dtype: str
    adaptor: str


class Mode(NamedTuple):
    """A way of timing: the timer, and whether the calls are replays of a CUDA graph."""

    timer: Timer
    in_graph: bool


class Bench:
    """The measurement: options, ways of timing, and notes on what could not be measured."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Make the timers of the device."""
        self.options = options
        self.notes: list[str] = []
        self._replays: dict[DeviceCall, DeviceCall] = {}
        if options.device == "cpu":
            self.modes = {"clock": Mode(clock, False)}
        else:
            timers = {"cold": DeviceTimer(hot=False), "hot": DeviceTimer(hot=True)}
            modes = {
                f"{cache}, graph" if graph else cache: Mode(timer, graph)
                for graph in (False, True)
                for cache, timer in timers.items()
            }
            self.modes = {name: modes[name] for name in options.modes}

    def note(self, text: str) -> None:
        """Keep a note, once."""
        if text not in self.notes:
            self.notes.append(text)

    def make_rows(self, cell: Cell) -> Tensor:
        """The rows of a cell, (N, V), on the device."""
        self._replays.clear()  # they hold the rows before
        (rows, *_) = make_rows(cell.rows, cell.vocabulary, cell.batch, seed=self.options.seed)
        return rows.to(self.options.device, DTYPES[cell.dtype])

    def in_modes(
        self, calls: Mapping[str, DeviceCall], budget_s: float
    ) -> Iterator[tuple[str, dict[str, list[float]]]]:
        """Seconds of each call in each way of timing in which ours can be timed."""
        ways: dict[bool, Mapping[str, DeviceCall]] = {False: calls}
        for name, (timer, in_graph) in self.modes.items():
            if in_graph not in ways:
                ways[in_graph] = self._captured(calls)
            if "fastadapt" in ways[in_graph]:
                yield (
                    name,
                    in_turns(
                        ways[in_graph],
                        rounds=self.options.rounds,
                        budget_s=budget_s / len(self.modes),
                        slice_s=0.0,
                        least_rounds=LEAST_ROUNDS,
                        timer=timer,
                    ),
                )

    def measure(self, cell: Cell, calls: Mapping[str, DeviceCall]) -> list[dict[str, Any]]:
        """Time a cell; a record per way of timing."""
        records = []
        for mode, took in self.in_modes(calls, self.options.seconds):
            record = {**cell._asdict(), "mode": mode, **times_us(took)}
            bound = min(READS, key=lambda form: record["us"][form][1])
            record["bound"] = bound
            record["to_bound"] = _ratios(took, bound, ("fastadapt", "with_fields"))
            record["to_fastadapt"] = _ratios(took, "fastadapt", ("with_fields",))
            records.append(record)
        return records

    def measure_peers(
        self, cell: Cell, rows: Tensor, names: list[str], ours: DeviceCall
    ) -> list[dict[str, Any]]:
        """Time the peers and `sample` in turns; a record per way of timing."""
        calls, adaptor = {"fastadapt": ours}, GPU_ADAPTORS[cell.adaptor]
        for name in names:
            try:
                call = GPU_PEERS[name].make(adaptor, rows)
                call(0)  # some are compiled in their first call
            except Exception as error:  # whatever another's compiler raises
                self.note(f"{name}, not measured: {_first_line(error)}")
            else:
                calls[name] = call
        records = []
        for mode, took in self.in_modes(calls, self.options.peer_seconds):
            if sides := _ratios(took, "fastadapt", tuple(GPU_PEERS)):
                record = {**cell._asdict(), "mode": mode, **times_us(took)}
                records.append({**record, "to_fastadapt": sides})
        return records

    def call_us(self) -> list[float]:
        """Quartiles of the time that the host takes to submit a call on one row."""
        rows = self.make_rows(Cell(GPU_VOCABULARIES[1], 1, "normal3", "float32", "T+k+p"))
        call = own_calls(rows, GPU_ADAPTORS["T+k+p"])["fastadapt"]
        took = in_turns({"call": call}, rounds=self.options.rounds, slice_s=1e-3)
        return times_us(took)["us"]["call"]

    def nothing_us(self) -> dict[str, list[float]]:
        """Quartiles of what the timers read where nothing is called."""
        nothing = {"nothing": DeviceCall(lambda turn: None)}
        return {
            name: times_us(in_turns(nothing, rounds=self.options.rounds, slice_s=0.0, timer=timer))[
                "us"
            ]["nothing"]
            for name, (timer, in_graph) in self.modes.items()
            if not in_graph
        }

    def _captured(self, calls: Mapping[str, DeviceCall]) -> dict[str, DeviceCall]:
        """The calls that can be replayed from a CUDA graph."""
        replays = {}
        for name, call in calls.items():
            if name in GPU_PEERS and not GPU_PEERS[name].in_graph:
                continue
            try:
                if call not in self._replays:
                    self._replays[call] = captured(call)
                replays[name] = self._replays[call]
            except RuntimeError as error:
                self.note(f"{name}, not captured in a CUDA graph: {_first_line(error)}")
        return replays


def main() -> int:
    """Run the benchmark, print what it must show and write the JSON file.

    Returns:
        The exit code: 1 where a cell failed.
    """
    options = _parse()
    host = host_record((*PACKAGES, "triton", "flashinfer-python", "vllm"))
    host["gpu"] = gpu_record()
    if options.commit:  # a copy, whose own git does not know it
        host |= {"commit": options.commit, "dirty": False}
    bench, grid = Bench(options), list(cells(options))
    record: dict[str, Any] = {
        "benchmark": "gpu_sampling",
        "host": host,
        "settings": {
            "rounds": options.rounds,
            "seconds_per_cell": options.seconds,
            "peer_seconds_per_cell": options.peer_seconds,
            "minutes": options.minutes,
            "seed": options.seed,
            "dtypes": options.dtypes,
            "adaptors": {name: repr(GPU_ADAPTORS[name]) for name in options.adaptors},
            "rows": {name: GPU_ROWS[name] for name in options.rows},
        },
        "notes": bench.notes,
        "call_us": bench.call_us(),
        "nothing_us": bench.nothing_us(),
        "cells": [],
        "peers": [],
    }
    failed = run(bench, grid, record)
    for note in bench.notes:
        Console(stderr=True).print(f"note: {note}", style="yellow")
    print_limits(gpu_sampling_limits(record))
    if options.out:
        write_record(options.out, record)
    return int(failed)


def run(bench: Bench, grid: list[Cell], record: dict[str, Any]) -> bool:
    """Measure cells into a record until time is over, and say whether one failed.

    What there is goes to the file whenever the rows change, so that it is not lost if a call hangs.
    """
    options, done, failed = bench.options, 0, False
    end = time.monotonic() + 60 * options.minutes
    for key, same_rows in itertools.groupby(grid, key=lambda cell: cell[:4]):
        rows, reads = None, {}
        for cell in itertools.takewhile(lambda _: time.monotonic() < end, same_rows):
            try:
                if rows is None:
                    rows = bench.make_rows(cell)
                    reads = yardsticks(rows)
                ours = own_calls(rows, GPU_ADAPTORS[cell.adaptor])
                record["cells"] += bench.measure(cell, {**ours, **reads})
                if peers := peers_of(cell, options):
                    record["peers"] += bench.measure_peers(cell, rows, peers, ours["fastadapt"])
            except Exception as error:  # the other cells are measured all the same
                bench.note(f"{', '.join(map(str, cell))}, failed: {_first_line(error)}")
                failed = True
            done += 1
        if rows is not None:
            Console(stderr=True).print("V = {:,}, N = {}, {}, {}".format(*key))
            if options.out:
                write_record(options.out, record)
    if done < len(grid):
        bench.note(f"{len(grid) - done} of {len(grid)} cells left out for want of time")
    return failed


def cells(options: argparse.Namespace) -> Iterator[Cell]:
    """The grid that was asked for, cells with the same rows one after the other.

    Those that depart in nothing come first, so that they are measured if time is short.
    """
    axes = (options.vocab, options.batch, options.rows, options.dtypes, options.adaptors)
    grid = list(itertools.starmap(Cell, itertools.product(*axes)))
    for departures in (0, 1):
        yield from (cell for cell in grid if _departures(cell, options) == departures)


def _departures(cell: Cell, options: argparse.Namespace) -> int:
    """In how many of V, rows and dtype a cell is not the first of what was asked for."""
    first = (options.vocab[0], options.rows[0], options.dtypes[0])
    return sum(a != b for a, b in zip((cell.vocabulary, cell.rows, cell.dtype), first, strict=True))


def peers_of(cell: Cell, options: argparse.Namespace) -> list[str]:
    """The peers that run in a cell."""
    if options.device == "cpu" or cell.dtype != "float32" or _departures(cell, options):
        return []
    return [
        name
        for name in options.peers
        if cell.adaptor in GPU_PEERS[name].adaptors
        and cell.batch in (GPU_PEERS[name].batches or (cell.batch,))
    ]


def own_calls(rows: Tensor, adaptor: Adaptor) -> dict[str, DeviceCall]:
    """Ours, and ours with the optional fields."""
    seeds = torch.arange(len(rows), device=rows.device)
    positions = torch.zeros_like(seeds)

    def draw(turn: int, **fields: Any) -> object:
        return sample(rows, adaptor, seeds=seeds, positions=positions, **fields)

    return {
        "fastadapt": DeviceCall(draw),
        "with_fields": DeviceCall(partial(draw, base_logprobs=True, log_mass=True)),
    }


def yardsticks(rows: Tensor) -> dict[str, DeviceCall]:
    """The two forms of a read, a copy and torch.softmax of the rows."""
    out = torch.empty_like(rows)
    words = rows.view(torch.int32) if rows.shape[1] % 2 == 0 else rows
    runs: dict[str, Callable[[int], object]] = {
        READS[0]: lambda turn: rows.amax(-1),
        READS[1]: lambda turn: words.amax(),
        "copy": lambda turn: out.copy_(rows),
        "softmax": lambda turn: torch.softmax(rows, -1, out=out),
    }
    return {name: DeviceCall(run) for name, run in runs.items()}


def _ratios(
    took: Mapping[str, list[float]], base: str, names: tuple[str, ...]
) -> dict[str, list[float]]:
    """Quartiles of the ratios to one of the calls, for those of the names that were timed."""
    return {name: quartiles(ratios(took[name], took[base])) for name in names if name in took}


def _first_line(error: Exception) -> str:
    """What an error says, in a line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _parse() -> argparse.Namespace:
    """Read the arguments."""
    axes = {
        "vocab": GPU_VOCABULARIES,
        "batch": GPU_BATCHES,
        "rows": tuple(GPU_ROWS),
        "adaptors": tuple(GPU_ADAPTORS),
        "dtypes": tuple(DTYPES),
        "peers": tuple(GPU_PEERS),
        "modes": MODES,
    }
    parser = grid_parser(__doc__, axes, rounds=100, seconds=2.0)
    add = parser.add_argument
    add("--peer-seconds", type=float, default=4.0, help="for its peers (default: %(default)s)")
    add("--minutes", type=float, default=6.0, help="then cells are left out (default: %(default)s)")
    add_device(parser)
    options = parser.parse_args()
    fill_filters(parser, options, axes, QUICK)
    check_device(parser, options)
    return options


if __name__ == "__main__":
    sys.exit(main())
