"""`sample` on a grid of rows and adaptors, beside torch.softmax, a copy of the rows and others.

    python benchmarks/bench_sampling.py --threads 1 --out benchmarks/results/sampling.json
    pytest -n 0 benchmarks/bench_sampling.py

The first form is the measurement: in each cell every round runs all calls, so the ratios compare
times of the same moments. Both dtypes of a cell are in the same rounds. pytest-benchmark finishes
one function before it begins the next and cannot do that; the second form gives its statistics and
its comparison of runs, on a few cells.

torch.softmax and the copy write into a tensor that is there already: with a new one of more than 32
MiB in each call, softmax takes more than twice its time, for the memory's pages. The slow peers
(transformers' chain, a compiled one, llama.cpp) run on fewer cells and for fewer rounds: on float32
rows of 3 x standard normal, for N = 1 and 8 at every V, and once for N = 64.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cases import ADAPTORS, BATCHES, DTYPES, ROWS, VOCABULARIES, make_rows
from fastadapt import Adaptor, sample
from harness import SEED, Axis, Benchmark, Option, progress, settings_of
from missing import MissingPeer
from peers import LlamaChain, compiled_draw, stock_draw
from real_rows import find_real_rows
from timing import Call, in_turns, microseconds, ratios, times_us

# Which adaptors a peer can do; transformers' chain is the only one that has them all.
PEERS = {
    "stock": ("T+p", "T+k+p+eps", "everything"),
    "compiled": ("T+p",),
    "llama.cpp": ("T+p", "T+k+p+eps"),
}
PEER_ROWS = "normal3"
LARGE_BATCH_VOCABULARY = 128_256  # the one V at which the peers also run with the largest batch
BENCHMARK = Benchmark(
    "sampling",
    __doc__,
    {
        "vocab": Axis(VOCABULARIES, [32_000, 128_256], kind=int),
        "batch": Axis(BATCHES, [8], kind=int),
        "rows": Axis(tuple(ROWS), ["normal3"]),
        "adaptors": Axis(tuple(ADAPTORS), ["T", "T+p"]),
        "dtypes": Axis(tuple(DTYPES)),
        # compiling takes longer than all the rest
        "peers": Axis(tuple(PEERS), ["stock", "llama.cpp"], may_be_empty=True),
        "rounds": Option(21, "at most", least=2),
        "seconds": Option(0.4, "per cell, about"),
        "seed": SEED,
        "peer_rounds": Option(5, least=2),
    },
    ("llama-cpp-python",),
)


class Cell(NamedTuple):
    """One place of the grid: V, N, kind of rows, adaptor."""

    vocabulary: int
    batch: int
    rows: str
    adaptor: str


@BENCHMARK
def main(options: argparse.Namespace, record: dict[str, Any]) -> None:
    """Measure every cell, and the peers where they run."""
    record["notes"] = notes = []
    real = find_real_rows(options, notes)
    record["settings"] = {
        **settings_of(options, "rounds", "peer_rounds", "seed", "dtypes"),
        "seconds_per_cell": options.seconds,
        "adaptors": {name: repr(ADAPTORS[name]) for name in options.adaptors},
        "rows": {name: ROWS[name] for name in options.rows},
    }
    record["call_us"] = _call_us(options)
    record["cells"], record["peers"] = [], []
    grid = list(cells(options))
    with progress("sampling", len(grid)) as step:
        for key, same_rows in itertools.groupby(grid, key=lambda cell: cell[:3]):
            vocabulary, batch, rows = key
            sets = make_rows(rows, vocabulary, batch, seed=options.seed, real=real)
            for cell in same_rows:
                record["cells"] += measure_cell(cell, sets, options)
                if peers := peers_of(cell, options):
                    record["peers"].append(measure_peers(cell, sets, peers, options, notes))
                step()


def cells(options: argparse.Namespace) -> Iterator[Cell]:
    """The grid that was asked for; cells with the same rows follow each other."""
    grid = itertools.product(options.vocab, options.batch, options.rows, options.adaptors)
    return itertools.starmap(Cell, grid)


def own_calls(sets: list[Tensor], adaptor: Adaptor) -> dict[str, Call]:
    """Ours, ours with the optional fields, and the two yardsticks, on the same rows."""
    count, out = len(sets), torch.empty_like(sets[0])
    seeds = [torch.arange(len(rows)) + 1000 * i for i, rows in enumerate(sets)]

    def draw(turn: int, **fields: Any) -> object:
        return sample(sets[turn % count], adaptor, seeds=seeds[turn % count], **fields)

    return {
        "softmax": lambda turn: torch.softmax(sets[turn % count], -1, out=out),
        "fastadapt": draw,
        "copy": lambda turn: out.copy_(sets[turn % count]),
        "with_fields": partial(draw, base_logprobs=True, log_mass=True),
    }


def measure_cell(
    cell: Cell, sets: list[Tensor], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Time a cell in the chosen dtypes; a record per dtype."""
    calls: dict[str, Call] = {}
    for dtype in options.dtypes:
        own = own_calls([rows.to(DTYPES[dtype]) for rows in sets], ADAPTORS[cell.adaptor])
        calls |= {f"{dtype} {name}": call for name, call in own.items()}
    budget = options.seconds * len(options.dtypes)
    took = in_turns(calls, rounds=options.rounds, budget_s=budget)
    records = []
    for dtype in options.dtypes:
        mine = {name: took[f"{dtype} {name}"] for name in own}
        record = {**cell._asdict(), "dtype": dtype, **times_us(mine)}
        record["to_softmax"] = ratios(mine, "softmax", ("fastadapt", "with_fields"))
        if dtype == "bfloat16" and "float32" in options.dtypes:
            name = "bfloat16 fastadapt"
            record["to_float32"] = ratios(took, "float32 fastadapt", (name,))[name]
        records.append(record)
    return records


def peers_of(cell: Cell, options: argparse.Namespace) -> list[str]:
    """The peers that run in a cell: few cells, since a draw of theirs takes up to a second."""
    large = cell.batch > 8 and (cell.vocabulary != LARGE_BATCH_VOCABULARY or cell.adaptor != "T+p")
    if cell.rows != PEER_ROWS or large:
        return []
    return [name for name in options.peers if cell.adaptor in PEERS[name]]


def measure_peers(
    cell: Cell, sets: list[Tensor], names: list[str], options: argparse.Namespace, notes: list[str]
) -> dict[str, Any]:
    """Time the peers and `sample` in turns on float32 rows; a peer that is missing gets a note."""
    adaptor, count = ADAPTORS[cell.adaptor], len(sets)
    draws: dict[str, Callable[[Tensor], object]] = {}
    llama = None
    for name in names:
        try:
            if name == "stock":
                draws[name] = stock_draw(adaptor)
            elif name == "compiled":
                draws[name] = compiled_draw(adaptor, sets[0])
            else:
                draws[name] = llama = LlamaChain(adaptor, cell.vocabulary, seed=options.seed)
        except MissingPeer as missing:
            if str(missing) not in notes:
                notes.append(str(missing))
    calls: dict[str, Call] = {"fastadapt": own_calls(sets, adaptor)["fastadapt"]}
    for name, draw in draws.items():
        calls[name] = lambda turn, draw=draw: draw(sets[turn % count])
    took = in_turns(calls, rounds=options.peer_rounds)
    record = {**cell._asdict(), "dtype": "float32", **times_us(took)}
    record["to_fastadapt"] = ratios(took, "fastadapt", draws, 1)
    if llama:
        llama.close()
    return record


def _call_us(options: argparse.Namespace) -> list[float]:
    """Quartiles of the time of a call on one row of 8 logits: all but the kernel's work."""
    rows = make_rows("normal1", 8, 1, seed=options.seed)
    call = own_calls(rows, ADAPTORS["T+p"])["fastadapt"]
    return microseconds(in_turns({"call": call}, rounds=options.rounds))["call"]


def pytest_generate_tests(metafunc: Any) -> None:
    """The cells of the pytest form: every adaptor and the two yardsticks at N = 8."""
    names = [*ADAPTORS, "softmax", "copy"]
    metafunc.parametrize("name", names)
    metafunc.parametrize("vocabulary", [32_000, 128_256])


def test_sample(benchmark: Any, pytestconfig: Any, vocabulary: int, name: str) -> None:
    """Times one call with pytest-benchmark, which measures nothing in pytest-xdist's workers."""
    if hasattr(pytestconfig, "workerinput"):
        raise RuntimeError("nothing is measured: expected `pytest -n 0`, got a worker of xdist")
    rows, batch = "normal3", 8
    adaptor = ADAPTORS.get(name, Adaptor())
    call = own_calls(make_rows(rows, vocabulary, batch, seed=0), adaptor)
    turns = itertools.count()
    benchmark.group = f"V = {vocabulary}, N = {batch}, {rows}, float32"
    benchmark(lambda: call[name if name in call else "fastadapt"](next(turns)))


if __name__ == "__main__":
    sys.exit(main())
