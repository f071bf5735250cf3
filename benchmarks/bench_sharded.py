"""`sample` and `score` of a vocabulary split over ranks: rounds and bytes a row, and the bits.

    python benchmarks/bench_sharded.py --threads 1 --out benchmarks/results/sharded.json

The ranks' programs run side by side in one process, which counts what they exchange; nothing is
timed. Exchanges: each row is drawn alone, in equal slices. A rank receives the bytes of all others
in a gather, and twice its own but for what stays in a ring's reduction. Bits: random calls on rows
of all kinds under all adaptors, with edits and masks, in uneven and empty slices, beside the same
in one piece.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from typing import Any

import torch
from torch import Tensor

from cases import ADAPTORS, make_rows
from fastadapt import Adaptor
from fastadapt._ops.sharded.exchange import Traffic, side_by_side
from fastadapt.sampling.sharded import draw_of
from harness import SEED, Axis, Benchmark, Option, progress, settings_of
from real_rows import find_real_rows
from sharded_cases import NO_EDITS, differing_rows, made

LAWS = {
    "greedy": Adaptor(temperature=0.0),
    "neutral": Adaptor(),
    "k = 50": Adaptor(top_k=50),
    "p = 0.9": Adaptor(top_p=0.9),
    "min-p": Adaptor(min_p=0.02),
    "epsilon": Adaptor(epsilon_cutoff=3e-4),
    **ADAPTORS,
}
BATCH = 32  # rows of a call whose bytes a row are those of a batch
BENCHMARK = Benchmark(
    "sharded",
    __doc__,
    {
        "vocab": Axis((128_256,), kind=int),
        "ranks": Axis((2, 8), kind=int),
        "rows": Axis(("normal3", "real"), ["normal3"]),
        "each": Option(64, "rows of a kind", least=1),
        "fuzzed": Option(100_000, "rows whose bits are compared", least=1),
        "seed": SEED,
    },
)


@BENCHMARK
def main(options: argparse.Namespace, record: dict[str, Any]) -> None:
    """Count every cell, then compare bits."""
    record["notes"] = []
    real = find_real_rows(options, record["notes"])
    record["settings"] = settings_of(options, "each", "seed")
    record["cells"] = []
    kinds = [(kind, v) for kind in options.rows for v in options.vocab if kind != "real"]
    kinds += [("real", 0)] * ("real" in options.rows)
    grid = list(itertools.product(kinds, options.ranks, LAWS))
    with progress("counting", len(grid) + 1) as step:
        for (kind, v), ranks, law in grid:
            if kind == "real":
                assert real is not None
                rows = real[: options.each]
            else:
                rows = make_rows(kind, v, options.each, seed=options.seed)[0]
            cell = {"rows": kind, "vocabulary": rows.shape[1], "ranks": ranks, "adaptor": law}
            record["cells"].append({**cell, **exchanged(rows, LAWS[law], ranks)})
            step()
        record["fuzz"] = differences(options.fuzzed, options.seed)
        step()


def exchanged(rows: Tensor, adaptor: Adaptor, ranks: int) -> dict[str, Any]:
    """Rounds of a row and the share of rows that take more than two; bytes that a rank receives.

    Those of a batch are bytes a row; `of_gathering` is their part of the others' bfloat16 logits.
    """
    rounds, received = [], 0
    for r in range(len(rows)):
        traffic = drawn(rows[r : r + 1], adaptor, ranks)
        rounds.append(len(traffic.rounds))
        received += traffic.received(ranks)
    batch = rows[:BATCH]
    in_batch = drawn(batch, adaptor, ranks).received(ranks) / len(batch)
    return {
        "rounds": sum(rounds) / len(rounds),
        "most_rounds": max(rounds),
        "more": sum(n > 2 for n in rounds) / len(rounds),
        "bytes": received / len(rows),
        "bytes_in_batch": in_batch,
        "of_gathering": in_batch / (2 * rows.shape[1] * (ranks - 1) / ranks),
    }


def drawn(rows: Tensor, adaptor: Adaptor, ranks: int) -> Traffic:
    """What the ranks of equal slices exchange in one draw."""
    traffic = Traffic([])
    seeds = torch.arange(len(rows))
    parts = rows.tensor_split(ranks, 1)
    side_by_side(
        [draw_of(part, adaptor, rank, seeds=seeds, **NO_EDITS) for rank, part in enumerate(parts)],
        traffic,
    )
    return traffic


def differences(rows: int, seed: int) -> dict[str, int]:
    """How many rows are compared, and how many differ in a bit of a draw or a score."""
    found = {"rows": 0, "draws": 0, "scores": 0}
    case = seed * 10**9
    while found["rows"] < rows:
        one = made(case)
        draws, scores = differing_rows(one)
        found["rows"] += len(one.logits)
        found["draws"] += draws
        found["scores"] += scores
        case += 1
    return found


if __name__ == "__main__":
    sys.exit(main())
