"""`sample` with edits and a mask of allowed tokens, beside itself without them and transformers.

    python benchmarks/bench_edits.py --threads 1 --out benchmarks/results/edits.json

In each cell every call runs in every round. Edits change as many ids of each row as a history has
(penalty, then two subtractions), the mask allows half of the tokens. "everything" is all filters
with both; transformers' way to it is its repetition penalty over the same history, a dense bias,
a mask and its chain of warpers, softmax and multinomial, in rounds of its own.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cases import ADAPTORS, DTYPES, make_rows
from fastadapt import Adaptor, Edits, sample
from harness import SEED, Axis, Benchmark, Option, progress, settings_of
from peers import stock_draw
from timing import Call, in_turns, microseconds, ratios

BATCH = 8
FILTERS = {"T+p": ADAPTORS["T+p"], "T+k+p": Adaptor(temperature=0.8, top_k=50, top_p=0.9)}
PENALTY, FREQUENCY, PRESENCE = 1.2, -0.1, -0.5  # those that follow are added
BENCHMARK = Benchmark(
    "edits",
    __doc__,
    {
        "vocab": Axis((128_256,), kind=int),
        "dtypes": Axis(tuple(DTYPES)),
        "ids": Option(1000, "edited in each row", least=1),
        "rounds": Option(60, least=2),
        "peer_rounds": Option(3, least=2),
        "seed": SEED,
    },
)


@BENCHMARK
def main(options: argparse.Namespace, record: dict[str, Any]) -> None:
    """Time every cell."""
    record["settings"] = {
        **settings_of(options, "rounds", "peer_rounds", "seed"),
        "ids": options.ids,
    }
    record["cells"] = []
    grid = list(itertools.product(options.vocab, options.dtypes))
    with progress("sampling", len(grid)) as step:
        for vocabulary, dtype in grid:
            cell = {"vocabulary": vocabulary, "batch": BATCH, "rows": "normal3", "dtype": dtype}
            record["cells"].append({**cell, **measure_cell(vocabulary, dtype, options)})
            step()


def measure_cell(vocabulary: int, dtype: str, options: argparse.Namespace) -> dict[str, Any]:
    """Time one cell; times in microseconds."""
    made = make_rows("normal3", vocabulary, BATCH, seed=options.seed)
    sets = [rows.to(DTYPES[dtype]) for rows in made]
    history = history_of(BATCH, vocabulary, min(options.ids, vocabulary), options.seed)
    edits, allowed, seeds = edits_of(history), half(BATCH, vocabulary), torch.arange(BATCH)

    def drawn(adaptor: Adaptor, **changes: Any) -> Call:
        return lambda turn: sample(sets[turn % len(sets)], adaptor, seeds=seeds, **changes)

    calls: dict[str, Call] = {"softmax": lambda turn: sets[turn % len(sets)].float().softmax(-1)}
    changes = {"edits": {"edits": edits}, "allowed": {"allowed": allowed}}
    for name, adaptor in FILTERS.items():
        calls[name] = drawn(adaptor)
        for kind, given in changes.items():
            calls[f"{name}, {kind}"] = drawn(adaptor, **given)
    calls["everything"] = drawn(ADAPTORS["everything"], edits=edits, allowed=allowed)
    took = in_turns(calls, rounds=options.rounds)
    stock = stock_everything(history, allowed, vocabulary)
    both: dict[str, Call] = {
        "everything": calls["everything"],
        "stock": lambda turn: stock(sets[turn % len(sets)].float()),
    }
    slow = in_turns(both, rounds=options.peer_rounds)
    return {
        "us": microseconds({**took, "stock": slow["stock"]}, 1),
        "to_plain": {
            f"{name}, {kind}": ratios(took, name, [f"{name}, {kind}"], 3)[f"{name}, {kind}"]
            for name in FILTERS
            for kind in changes
        },
        "to_softmax": ratios(took, "softmax", ["everything"], 3),
        "stock_to_everything": ratios(slow, "everything", ["stock"], 1)["stock"],
    }


def history_of(n: int, v: int, count: int, seed: int) -> Tensor:
    """(N, count): ids of each row, none twice, in the order in which they were drawn."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(v, generator=generator)[:count] for _ in range(n)])


def edits_of(history: Tensor) -> Edits:
    """Its penalties: repetition, and frequency and presence of ids that are there once."""
    n, count = history.shape
    ids = history.sort(-1).values.flatten().int()
    numbers = {
        name: torch.full((n * count,), value)
        for name, value in (("penalty", PENALTY), ("post", FREQUENCY), ("last", PRESENCE))
    }
    return Edits(ids, torch.arange(0, n * count + 1, count), **numbers)


def half(n: int, v: int) -> Tensor:
    """(N, ceil(V / 32)): every second token, as bits."""
    return torch.full((n, -(-v // 32)), 0x55555555, dtype=torch.int32)


def stock_everything(history: Tensor, allowed: Tensor, v: int) -> Callable[[Tensor], Tensor]:
    """transformers' way, which needs the additions and the mask as rows of all tokens."""
    from transformers import RepetitionPenaltyLogitsProcessor

    penalty, draw = RepetitionPenaltyLogitsProcessor(PENALTY), stock_draw(ADAPTORS["everything"])
    bits = allowed[:, :, None] >> torch.arange(32) & 1
    banned = bits.flatten(1)[:, :v] == 0

    def call(rows: Tensor) -> Tensor:
        scores: Any = penalty(history, rows)  # type: ignore[arg-type]  # asks for LongTensor
        counts = torch.zeros_like(rows).scatter_(1, history, 1.0)
        scores = scores + FREQUENCY * counts + PRESENCE * (counts > 0)
        return draw(scores.masked_fill(banned, float("-inf")))

    return call


if __name__ == "__main__":
    sys.exit(main())
