"""What it costs a draw to hand over the ids that it kept: `sample` with `support=True` to without.

    python benchmarks/bench_kept.py --threads 1 --out benchmarks/results/kept.json

In each cell both calls run in every round. Rows of a model keep few ids under a filter; random ones
thousands, each of which is written.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from typing import Any

import torch

from bench_filters import FILTERS
from cases import ADAPTORS, DTYPES, make_rows
from fastadapt import Adaptor, sample
from harness import SEED, Axis, Benchmark, Option, progress, settings_of
from real_rows import find_real_rows
from timing import Call, in_turns, microseconds, ratios

OF_DRAWS = {
    **{name: ADAPTORS[name] for name in ("T", "T+p", "T+k+p+eps", "typical", "eta")},
    "min-p": Adaptor(min_p=0.02),
    "epsilon": Adaptor(epsilon_cutoff=3e-4),
    "greedy": Adaptor(temperature=0.0),
    **{name: FILTERS[name] for name in ("top-n-sigma", "min-k", "top-a", "top-h", "XTC")},
}
PLAIN, KEPT = "without", "with"
BENCHMARK = Benchmark(
    "kept",
    __doc__,
    {
        "vocab": Axis((49_152, 128_256), [49_152], kind=int),
        "rows": Axis(("real", "normal3")),
        "dtypes": Axis(tuple(DTYPES), ["float32"]),
        "batch": Option(64, "rows", least=1),
        "rounds": Option(40, least=2),
        "seed": SEED,
    },
)


@BENCHMARK
def main(options: argparse.Namespace, record: dict[str, Any]) -> None:
    """Time every cell."""
    record["notes"] = notes = []
    real = find_real_rows(options, notes)
    record["settings"] = {
        **settings_of(options, "batch", "rounds", "seed"),
        "adaptors": {name: repr(adaptor) for name, adaptor in OF_DRAWS.items()},
    }
    record["cells"] = []
    grid = list(itertools.product(options.vocab, options.rows, options.dtypes, OF_DRAWS))
    with progress("sampling", len(grid)) as step:
        for vocabulary, rows, dtype, name in grid:
            made = make_rows(rows, vocabulary, options.batch, seed=options.seed, real=real)
            cell = {"vocabulary": vocabulary, "rows": rows, "dtype": dtype, "adaptor": name}
            taken = measure_cell([x.to(DTYPES[dtype]) for x in made], OF_DRAWS[name], options)
            record["cells"].append({**cell, "batch": options.batch, **taken})
            step()


def measure_cell(
    sets: list[torch.Tensor], adaptor: Adaptor, options: argparse.Namespace
) -> dict[str, Any]:
    """Time one cell; times in microseconds."""
    seeds, count = torch.arange(options.batch), len(sets)

    def drawn(support: bool) -> Call:
        return lambda turn: sample(sets[turn % count], adaptor, seeds=seeds, support=support)

    took = in_turns({PLAIN: drawn(False), KEPT: drawn(True)}, rounds=options.rounds)
    support = sample(sets[0], adaptor, seeds=seeds, support=True).support
    return {
        "ids_a_row": support.ids.shape[0] / options.batch,
        "full": float(support.full.double().mean()),
        "us": microseconds(took, 1),
        "to_plain": ratios(took, PLAIN, [KEPT], 3),
    }


if __name__ == "__main__":
    sys.exit(main())
