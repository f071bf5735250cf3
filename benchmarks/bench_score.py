"""`score` with the 31 adaptors of the probability-quality study: one call, 31 calls, transformers.

    python benchmarks/bench_score.py --threads 1 --out benchmarks/results/score.json

In a round each adaptor is timed alone and then all in one call, in turns. "One adaptor" is the
median of the 31 times, "31 calls" their sum. transformers' way is 31 chains of warpers, each with
log_softmax, gather and the count of the kept tokens; it takes seconds, so it runs in rounds of its
own beside the one call.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from typing import Any

import torch
from torch import Tensor

from cases import ROWS, make_rows
from fastadapt import Adaptor, sample, score
from fastadapt.study.tradeoff.grids import paper_grid
from harness import SEED, Axis, Benchmark, Option, progress, settings_of
from peers import stock_score
from real_rows import find_real_rows
from timing import Call, in_turns, microseconds, ratios

BATCH = 8
BENCHMARK = Benchmark(
    "score",
    __doc__,
    {
        "vocab": Axis((32_000, 128_256), kind=int),
        "rows": Axis(("normal1", "normal3", "real")),
        "rounds": Option(15, least=2),
        "peer_rounds": Option(3, least=2),
        "seed": SEED,
    },
)


@BENCHMARK
def main(options: argparse.Namespace, record: dict[str, Any]) -> None:
    """Time every cell."""
    record["notes"] = []
    real = find_real_rows(options, record["notes"])
    adaptors = [cell.adaptor for cell in paper_grid()]
    record["settings"] = {
        "adaptors": len(adaptors),
        **settings_of(options, "rounds", "peer_rounds", "seed"),
        "dtype": "float32",
        "rows": {name: ROWS[name] for name in options.rows},
    }
    record["cells"] = []
    with progress("scoring", len(options.vocab) * len(options.rows)) as step:
        for vocabulary, kind in itertools.product(options.vocab, options.rows):
            sets = make_rows(kind, vocabulary, BATCH, seed=options.seed, real=real)
            cell = {"vocabulary": vocabulary, "batch": BATCH, "rows": kind}
            record["cells"].append({**cell, **measure_cell(sets, adaptors, options)})
            step()


def measure_cell(
    sets: list[Tensor], adaptors: list[Adaptor], options: argparse.Namespace
) -> dict[str, Any]:
    """Time one cell; times in microseconds."""
    seeds, count = torch.arange(BATCH), len(sets)
    tokens = [sample(rows, Adaptor(top_p=0.9), seeds=seeds).tokens for rows in sets]

    def scores(turn: int, these: list[Adaptor]) -> object:
        return score(sets[turn % count], tokens[turn % count], these)

    alone: dict[str, Call] = {
        str(i): lambda turn, one=adaptor: scores(turn, [one]) for i, adaptor in enumerate(adaptors)
    }
    together: dict[str, Call] = {"all": lambda turn: scores(turn, adaptors)}
    took = in_turns({**alone, **together}, rounds=options.rounds)
    by_round = list(zip(*(took[name] for name in alone), strict=True))
    times = {
        "one": [statistics.median(singles) for singles in by_round],
        "all": took["all"],
        "calls": [sum(singles) for singles in by_round],
    }

    def stock(turn: int) -> object:
        return stock_score(sets[turn % count], tokens[turn % count], adaptors)

    slow = in_turns({**together, "stock": stock}, rounds=options.peer_rounds)
    return {
        "rounds": options.rounds,
        "us": microseconds({**times, "stock": slow["stock"]}, 1),
        "to_one": ratios(times, "one", ("all", "calls"), 3),
        "stock_to_all": ratios(slow, "all", ("stock",), 1)["stock"],
    }


if __name__ == "__main__":
    sys.exit(main())
