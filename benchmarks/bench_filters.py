"""`sample` with one filter by shape, with XTC, and with llama.cpp's chain, beside torch.softmax.

    python benchmarks/bench_filters.py --threads 1 --out benchmarks/results/filters.json

In each cell every call runs in every round. XTC acts in every row. The chain is llama.cpp's own, in
its order, with its default knobs and the temperature last.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from typing import Any

import torch

from cases import DTYPES, ROWS, make_rows
from fastadapt import Adaptor, sample
from harness import SEED, Axis, Benchmark, Option, progress, settings_of
from real_rows import find_real_rows
from timing import Call, in_turns, microseconds, ratios

BATCH = 8
FILTERS = {
    "top-n-sigma": Adaptor(top_n_sigma=1.0),
    "min-k": Adaptor(min_k=3.0),
    "top-a": Adaptor(top_a=0.2),
    "top-h": Adaptor(top_h=0.5),
    "XTC": Adaptor(xtc_probability=1.0, xtc_threshold=0.1),
    "llama.cpp's chain": Adaptor(
        temperature=0.8,
        top_k=40,
        typical_p=0.95,
        top_p=0.95,
        min_p=0.05,
        xtc_probability=0.5,
        order=("top_k", "typical_p", "top_p", "min_p", "xtc", "temperature"),
    ),
}
BENCHMARK = Benchmark(
    "filters",
    __doc__,
    {
        "vocab": Axis((128_256,), kind=int),
        "rows": Axis(tuple(ROWS), ["normal1", "normal3", "real", "ties"]),
        "dtypes": Axis(tuple(DTYPES)),
        "rounds": Option(60, least=2),
        "seed": SEED,
    },
)


@BENCHMARK
def main(options: argparse.Namespace, record: dict[str, Any]) -> None:
    """Time every cell."""
    record["notes"] = notes = []
    real = find_real_rows(options, notes)
    record["settings"] = {
        **settings_of(options, "rounds", "seed"),
        "adaptors": {name: repr(adaptor) for name, adaptor in FILTERS.items()},
        "titles": {name: f"{name}, µs" for name in FILTERS},
    }
    record["cells"] = []
    grid = list(itertools.product(options.vocab, options.rows, options.dtypes))
    with progress("sampling", len(grid)) as step:
        for vocabulary, rows, dtype in grid:
            made = make_rows(rows, vocabulary, BATCH, seed=options.seed, real=real)
            sets = [some.to(DTYPES[dtype]) for some in made]
            cell = {"vocabulary": vocabulary, "batch": BATCH, "rows": rows, "dtype": dtype}
            record["cells"].append({**cell, **measure_cell(sets, options)})
            step()


def measure_cell(sets: list[torch.Tensor], options: argparse.Namespace) -> dict[str, Any]:
    """Time one cell; times in microseconds."""
    seeds, count, out = torch.arange(BATCH), len(sets), torch.empty_like(sets[0])

    def drawn(adaptor: Adaptor) -> Call:
        return lambda turn: sample(sets[turn % count], adaptor, seeds=seeds)

    calls: dict[str, Call] = {
        "softmax": lambda turn: torch.softmax(sets[turn % count], -1, out=out),
        **{name: drawn(adaptor) for name, adaptor in FILTERS.items()},
    }
    took = in_turns(calls, rounds=options.rounds)
    return {"us": microseconds(took, 1), "to_softmax": ratios(took, "softmax", FILTERS, 3)}


if __name__ == "__main__":
    sys.exit(main())
