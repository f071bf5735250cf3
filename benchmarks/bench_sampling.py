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
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from cases import ADAPTORS, BATCHES, DTYPES, ROWS, VOCABULARIES, make_rows
from fastadapt import Adaptor, sample
from fastadapt.study._progress import progress_bar, stepper
from filters import at_least, fill_filters, grid_parser
from host import PACKAGES, host_record, quartiles, times_us, write_record
from limits import print_limits, sampling_limits
from missing import MissingPeer
from peers import LlamaChain, compiled_draw, stock_draw
from real_rows import real_logits
from timing import Call, in_turns, ratios

# Which adaptors a peer can do; transformers' chain is the only one that has them all.
PEERS = {
    "stock": ("T+p", "T+k+p+eps", "everything"),
    "compiled": ("T+p",),
    "llama.cpp": ("T+p", "T+k+p+eps"),
}
PEER_ROWS = "normal3"
LARGE_BATCH_VOCABULARY = 128_256  # the one V at which the peers also run with the largest batch
QUICK: dict[str, list[Any]] = {
    "vocab": [32_000, 128_256],
    "batch": [8],
    "rows": ["normal3"],
    "adaptors": ["T", "T+p"],
    "peers": ["stock", "llama.cpp"],  # compiling takes longer than all the rest
}


class Cell(NamedTuple):
    """One place of the grid: V, N, kind of rows, adaptor."""

    vocabulary: int
    batch: int
    rows: str
    adaptor: str


def main() -> None:
    """Run the benchmark, print what it must show and write the JSON file."""
    options = _parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    host = host_record((*PACKAGES, "llama-cpp-python"))
    notes: list[str] = []
    real = real_logits(seed=options.seed) if "real" in options.rows else None
    if isinstance(real, str):
        notes.append(f"no rows 'real': {real}")
        options.rows.remove("real")
        real = None
    grid = list(cells(options))
    record: dict[str, Any] = {
        "benchmark": "sampling",
        "host": host,
        "settings": {
            "rounds": options.rounds,
            "seconds_per_cell": options.seconds,
            "peer_rounds": options.peer_rounds,
            "seed": options.seed,
            "dtypes": options.dtypes,
            "adaptors": {name: repr(ADAPTORS[name]) for name in options.adaptors},
            "rows": {name: ROWS[name] for name in options.rows},
        },
        "notes": notes,
    }
    with progress_bar(Console(stderr=True), auto_refresh=False) as bar:
        step = stepper(bar, "sampling", len(grid))
        record["call_us"] = _call_us(options)
        record["cells"], record["peers"] = [], []
        for key, same_rows in itertools.groupby(grid, key=lambda cell: cell[:3]):
            vocabulary, batch, rows = key
            sets = make_rows(rows, vocabulary, batch, seed=options.seed, real=real)
            for cell in same_rows:
                record["cells"] += measure(cell, sets, options)
                if peers := peers_of(cell, options):
                    record["peers"].append(measure_peers(cell, sets, peers, options, notes))
                step()
    for note in notes:
        Console(stderr=True).print(f"note: {note}", style="yellow")
    print_limits(sampling_limits(record))
    if options.out:
        write_record(options.out, record)


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


def measure(cell: Cell, sets: list[Tensor], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time a cell in the chosen dtypes; a record per dtype."""
    calls = {
        (dtype, name): call
        for dtype in options.dtypes
        for name, call in own_calls(
            [rows.to(DTYPES[dtype]) for rows in sets], ADAPTORS[cell.adaptor]
        ).items()
    }
    flat = {f"{dtype} {name}": call for (dtype, name), call in calls.items()}
    budget = options.seconds * len(options.dtypes)
    took = in_turns(flat, rounds=options.rounds, budget_s=budget)
    records = []
    for dtype in options.dtypes:
        mine = {name: took[f"{d} {name}"] for d, name in calls if d == dtype}
        record = _record(cell, dtype, mine)
        record["to_softmax"] = {
            name: quartiles(ratios(mine[name], mine["softmax"]))
            for name in ("fastadapt", "with_fields")
        }
        if dtype == "bfloat16" and "float32" in options.dtypes:
            wide = took["float32 fastadapt"]
            record["to_float32"] = quartiles(ratios(mine["fastadapt"], wide))
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
    calls: dict[str, Call] = {
        name: lambda turn, draw=draw: draw(sets[turn % count]) for name, draw in draws.items()
    }
    calls = {"fastadapt": own_calls(sets, adaptor)["fastadapt"], **calls}
    took = in_turns(calls, rounds=options.peer_rounds)
    record = _record(cell, "float32", took)
    record["to_fastadapt"] = {
        name: quartiles(ratios(took[name], took["fastadapt"]), 1) for name in draws
    }
    if llama:
        llama.close()
    return record


def _record(cell: Cell, dtype: str, took: dict[str, list[float]]) -> dict[str, Any]:
    """A cell with the quartiles of its times in microseconds."""
    return {
        **cell._asdict(),
        "dtype": dtype,
        **times_us(took),
    }


def _call_us(options: argparse.Namespace) -> list[float]:
    """Quartiles of the time of a call on one row of 8 logits: all but the kernel's work."""
    rows = make_rows("normal1", 8, 1, seed=options.seed)
    call = own_calls(rows, ADAPTORS["T+p"])["fastadapt"]
    return quartiles([1e6 * s for s in in_turns({"call": call}, rounds=options.rounds)["call"]], 2)


def _parse() -> argparse.Namespace:
    """Read the arguments."""
    axes = {
        "vocab": VOCABULARIES,
        "batch": BATCHES,
        "rows": tuple(ROWS),
        "adaptors": tuple(ADAPTORS),
        "dtypes": tuple(DTYPES),
        "peers": tuple(PEERS),
    }
    parser = grid_parser(__doc__, axes, rounds=21, seconds=0.4)
    add = parser.add_argument
    add("--peer-rounds", type=int, default=5, help="(default: %(default)s)")
    add("--threads", type=int, help="default: torch's own choice")
    options = parser.parse_args()
    for name in ("rounds", "peer_rounds"):
        at_least(parser, name, getattr(options, name), 2)
    fill_filters(parser, options, axes, QUICK)
    return options


def pytest_generate_tests(metafunc: Any) -> None:
    """The cells of the pytest form: every adaptor and the two yardsticks at N = 8."""
    names = [*ADAPTORS, "softmax", "copy"]
    metafunc.parametrize("name", names)
    metafunc.parametrize("vocabulary", QUICK["vocab"])


def test_sample(benchmark: Any, pytestconfig: Any, vocabulary: int, name: str) -> None:
    """Times one call with pytest-benchmark, which measures nothing in pytest-xdist's workers."""
    if hasattr(pytestconfig, "workerinput"):
        raise RuntimeError("nothing is measured: expected `pytest -n 0`, got a worker of xdist")
    rows, batch = QUICK["rows"][0], QUICK["batch"][0]
    adaptor = ADAPTORS.get(name, Adaptor())
    call = own_calls(make_rows(rows, vocabulary, batch, seed=0), adaptor)
    turns = itertools.count()
    benchmark.group = f"V = {vocabulary}, N = {batch}, {rows}, float32"
    benchmark(lambda: call[name if name in call else "fastadapt"](next(turns)))


if __name__ == "__main__":
    main()
