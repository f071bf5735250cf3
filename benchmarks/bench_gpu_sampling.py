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
from harness import OF_A_DEVICE, SEED, Axis, Benchmark, Option, measure_until, settings_of
from host import write_record
from missing import first_line
from peers import GPU_PEERS
from timing import Timer, clock, in_turns, microseconds, ratios, times_us

READS = ("amax of each row", "amax of all")
MODES = ("cold", "hot", "cold, graph", "hot, graph")
LEAST_ROUNDS = 20  # whatever the budget
BENCHMARK = Benchmark(
    "gpu_sampling",
    __doc__,
    {
        "vocab": Axis(GPU_VOCABULARIES, [128_256], kind=int),
        "batch": Axis(GPU_BATCHES, [64, 1], kind=int),
        "rows": Axis(tuple(GPU_ROWS)),
        "adaptors": Axis(tuple(GPU_ADAPTORS), ["T+k+p", "T+p", "everything"]),
        "dtypes": Axis(tuple(DTYPES)),
        # compiling takes longer than all the rest
        "peers": Axis(tuple(GPU_PEERS), ["flashinfer", "vllm", "stock"], may_be_empty=True),
        "modes": Axis(MODES),
        "rounds": Option(100, "at most", least=2),
        "seconds": Option(2.0, "per cell, about"),
        "seed": SEED,
        "peer_seconds": Option(4.0, "for its peers"),
        "minutes": Option(6.0, "then cells are left out"),
        **OF_A_DEVICE,
    },
    ("triton", "flashinfer-python", "vllm"),
)


class Cell(NamedTuple):
    """One place of the grid: V, N, kind of rows, dtype, adaptor."""

    vocabulary: int
    batch: int
    rows: str
    dtype: str
    adaptor: str


class Bench:
    """The measurement: options, ways of timing, and notes on what could not be measured."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.notes: list[str] = []
        self._replays: dict[DeviceCall, DeviceCall] = {}
        # the timer of each, and whether the calls are replays of a CUDA graph
        self.modes: dict[str, tuple[Timer, bool]] = {"clock": (clock, False)}
        if options.device == "cuda":
            timers = {"cold": DeviceTimer(hot=False), "hot": DeviceTimer(hot=True)}
            ways = {name: name.partition(", ") for name in options.modes}
            self.modes = {
                name: (timers[cache], bool(graph)) for name, (cache, _, graph) in ways.items()
            }

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
                took = in_turns(
                    ways[in_graph],
                    rounds=self.options.rounds,
                    budget_s=budget_s / len(self.modes),
                    slice_s=0.0,
                    least_rounds=LEAST_ROUNDS,
                    timer=timer,
                )
                yield name, took

    def measure(self, cell: Cell, calls: Mapping[str, DeviceCall]) -> list[dict[str, Any]]:
        """Time a cell; a record per way of timing."""
        records = []
        for mode, took in self.in_modes(calls, self.options.seconds):
            record = {**cell._asdict(), "mode": mode, **times_us(took)}
            bound = min(READS, key=lambda form: record["us"][form][1])
            record["bound"] = bound
            record["to_bound"] = ratios(took, bound, ("fastadapt", "with_fields"))
            record["to_fastadapt"] = ratios(took, "fastadapt", ("with_fields",))
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
                self.note(f"{name}, not measured: {first_line(error)}")
            else:
                calls[name] = call
        records = []
        for mode, took in self.in_modes(calls, self.options.peer_seconds):
            if sides := ratios(took, "fastadapt", GPU_PEERS):
                times = {**cell._asdict(), "mode": mode, **times_us(took)}
                records.append({**times, "to_fastadapt": sides})
        return records

    def call_us(self) -> list[float]:
        """Quartiles of the time that the host takes to submit a call on one row."""
        rows = self.make_rows(Cell(GPU_VOCABULARIES[1], 1, "normal3", "float32", "T+k+p"))
        call = own_calls(rows, GPU_ADAPTORS["T+k+p"])["fastadapt"]
        took = in_turns({"call": call}, rounds=self.options.rounds, slice_s=1e-3)
        return microseconds(took)["call"]

    def nothing_us(self) -> dict[str, list[float]]:
        """Quartiles of what the timers read where nothing is called."""
        nothing = {"nothing": DeviceCall(lambda turn: None)}
        time_it = partial(in_turns, nothing, rounds=self.options.rounds, slice_s=0.0)
        return {
            name: microseconds(time_it(timer=timer))["nothing"]
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
                self.note(f"{name}, not captured in a CUDA graph: {first_line(error)}")
        return replays


@BENCHMARK
def main(options: argparse.Namespace, record: dict[str, Any]) -> bool:
    """Measure cells until time is over, and say whether one failed.

    What there is goes to the file after each cell, so that it is not lost if a call hangs.
    """
    bench = Bench(options)
    record["settings"] = {
        **settings_of(options, "rounds", "minutes", "seed", "dtypes"),
        "seconds_per_cell": options.seconds,
        "peer_seconds_per_cell": options.peer_seconds,
        "adaptors": {name: repr(GPU_ADAPTORS[name]) for name in options.adaptors},
        "rows": {name: GPU_ROWS[name] for name in options.rows},
    }
    record["notes"] = bench.notes
    record |= {"call_us": bench.call_us(), "nothing_us": bench.nothing_us()}
    record["cells"], record["peers"] = [], []
    made: dict[tuple[Any, ...], tuple[Tensor, dict[str, DeviceCall]]] = {}

    def measure_next(cell: Cell) -> None:
        if cell[:4] not in made:
            made.clear()  # before the next rows are made, so that they have the memory
            Console(stderr=True).print("V = {:,}, N = {}, {}, {}".format(*cell))
            rows = bench.make_rows(cell)
            made[cell[:4]] = rows, yardsticks(rows)
        rows, reads = made[cell[:4]]
        ours = own_calls(rows, GPU_ADAPTORS[cell.adaptor])
        record["cells"] += bench.measure(cell, {**ours, **reads})
        if peers := peers_of(cell, options):
            record["peers"] += bench.measure_peers(cell, rows, peers, ours["fastadapt"])
        if options.out:
            write_record(options.out, record)

    grid, end = list(cells(options)), time.monotonic() + 60 * options.minutes
    return measure_until(end, grid, measure_next, bench.note, "{}, {}, {}, {}, {}".format)


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


if __name__ == "__main__":
    sys.exit(main())
