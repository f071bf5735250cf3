"""`score` with the 31 adaptors of the probability-quality study: one call, 31 calls, transformers.

    python benchmarks/bench_score.py --threads 1 --out benchmarks/results/score.json

In a round each adaptor is timed alone and then all in one call, in turns. "One adaptor" is the
median of the 31 times, "31 calls" their sum. transformers' way is 31 chains of warpers, each with
log_softmax, gather and the count of the kept tokens; it takes seconds, so it runs in rounds of its
own beside the one call.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from cases import ROWS, chosen, make_rows, study_adaptors
from fastadapt import Adaptor, sample, score
from fastadapt.study._progress import progress_bar, stepper
from filters import at_least
from host import host_record, quartiles, write_record
from limits import print_limits, score_limits
from peers import stock_score
from real_rows import real_logits
from timing import Call, in_turns, ratios

VOCABULARIES = (32_000, 128_256)
KINDS = ("normal1", "normal3", "real")
BATCH = 8


def main() -> None:
    """Run the benchmark, print what it must show and write the JSON file."""
    options = _parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    host, notes, kinds = host_record(), [], list(options.rows)
    real = real_logits(seed=options.seed) if "real" in kinds else None
    if isinstance(real, str):
        notes.append(f"no rows 'real': {real}")
        kinds.remove("real")
        real = None
    adaptors = study_adaptors()
    record: dict[str, Any] = {
        "benchmark": "score",
        "host": host,
        "settings": {
            "adaptors": len(adaptors),
            "rounds": options.rounds,
            "peer_rounds": options.peer_rounds,
            "seed": options.seed,
            "dtype": "float32",
            "rows": {name: ROWS[name] for name in kinds},
        },
        "notes": notes,
        "cells": [],
    }
    with progress_bar(Console(stderr=True), auto_refresh=False) as bar:
        step = stepper(bar, "scoring", len(options.vocab) * len(kinds))
        for vocabulary in options.vocab:
            for kind in kinds:
                sets = make_rows(kind, vocabulary, BATCH, seed=options.seed, real=real)
                cell = {"vocabulary": vocabulary, "batch": BATCH, "rows": kind}
                record["cells"].append({**cell, **measure(sets, adaptors, options)})
                step()
    for note in notes:
        Console(stderr=True).print(f"note: {note}", style="yellow")
    print_limits(score_limits(record))
    if options.out:
        write_record(options.out, record)


def measure(
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
        "us": {
            name: quartiles([1e6 * s for s in seconds], 1)
            for name, seconds in {**times, "stock": slow["stock"]}.items()
        },
        "to_one": {
            name: quartiles(ratios(times[name], times["one"]), 3) for name in ("all", "calls")
        },
        "stock_to_all": quartiles(ratios(slow["stock"], slow["all"]), 1),
    }


def _parse() -> argparse.Namespace:
    """Read the arguments."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, help="JSON file to write")
    add("--vocab", nargs="+", type=int, default=list(VOCABULARIES), metavar="X")
    add("--rows", nargs="+", choices=KINDS, default=list(KINDS))
    add("--rounds", type=int, default=15, help="(default: %(default)s)")
    add("--peer-rounds", type=int, default=3, help="(default: %(default)s)")
    add("--seed", type=int, default=0)
    add("--threads", type=int, help="default: torch's own choice")
    options = parser.parse_args()
    for name in ("rounds", "peer_rounds"):
        at_least(parser, name, getattr(options, name), 2)
    at_least(parser, "vocab", min(options.vocab), 1)
    options.rows = chosen(options.rows, KINDS)
    return options


if __name__ == "__main__":
    main()
