"""`linear_support_log_odds`: time beside `linear_log_odds`, which is of all ids, and its memory.

    python benchmarks/bench_support.py --threads 1 --out benchmarks/results/support.json

In each cell every round runs all calls, each a forward and a backward with a random signed
upstream. Kept counts are as in the field, a median of 2 and a 99th percentile of 82 (log-normal,
rounded, 1 to 4,096), the ids of a row anywhere in the vocabulary and its label one of them. The
head is frozen, or trained with a dense gradient, or with a sparse one, which `linear_log_odds` does
not have: there it has a dense one. Peak memory is that of the resident set, in a process of its own
for each call, over inputs and gradients.

Nearly all of the time is `linear_log_odds`'s, of a large head a minute a call and more;
`--no-dense` leaves it out, and fewer rows, `--shapes 256,576,49152`, take as many times less.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench_losses import WARM_UP_IDS, shape_of
from cases import DTYPES, make_loss_inputs
from fastadapt import Support, linear_log_odds, linear_support_log_odds
from fastadapt._ops.memory import PeakMemory, return_freed_blocks
from harness import SEED, Axis, Benchmark, Flag, Option
from times_and_peaks import measure_grid
from timing import in_turns, milliseconds, quartiles, ratios

SHAPES = tuple(itertools.product((2048,), (576, 2048), (49_152, 128_256, 262_144)))
OURS, DENSE = "fastadapt", "linear_log_odds"
SPARSE, ZEROS = "sparse", "zeros"  # what a dense gradient of ours is made of
MEDIAN, P99, MOST = 2.0, 82.0, 4096
NORMAL_P99 = 2.3263  # of the standard normal
BENCHMARK = Benchmark(
    "support",
    __doc__,
    {
        "shapes": Axis(SHAPES, [SHAPES[0]], kind=shape_of, metavar="N,H,V"),
        "dtypes": Axis(("bfloat16", "float32"), ["bfloat16"]),
        "heads": Axis(("frozen", "dense", "sparse"), ["frozen", "sparse"]),
        "dense": Flag("leave out linear_log_odds"),
        "memory": Flag("time only"),
        "rounds": Option(9, "at most", least=2),
        "seconds": Option(20, "per cell, about", kind=float),
        "seed": SEED,
    },
)


class Cell(NamedTuple):
    """One place of the grid."""

    n: int
    h: int
    v: int
    dtype: str
    head: str


class Inputs(NamedTuple):
    """What a cell computes on."""

    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    labels: Tensor  # (N,)
    support: Support
    upstream: Tensor  # (N,)

    @property
    def wanted(self) -> list[Tensor]:
        """What gets gradients."""
        return [x for x in (self.hidden, self.weight) if x.requires_grad]


def kept_ids(n: int, v: int, seed: int) -> tuple[Support, Tensor]:
    """A support of n rows with counts as in the field, and a label (n,) of each."""
    generator = torch.Generator().manual_seed(seed)
    spread = math.log(P99 / MEDIAN) / NORMAL_P99
    drawn = torch.randn(n, generator=generator) * spread + math.log(MEDIAN)
    counts = drawn.exp().round().clamp(1, min(MOST, v)).long()
    rows = [
        torch.randperm(v, generator=generator)[:count].sort().values for count in counts.tolist()
    ]
    picks = torch.rand(n, generator=generator)
    labels = [row[int(pick * len(row))] for row, pick in zip(rows, picks.tolist(), strict=True)]
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    full = torch.zeros(n, dtype=torch.bool)
    return Support(torch.cat(rows).int(), offsets, full), torch.stack(labels)


def make_inputs(cell: Cell, seed: int) -> Inputs:
    """Hidden states and a head of standard normal logits, and a support."""
    frozen = cell.head == "frozen"
    made = make_loss_inputs(*cell[:3], DTYPES[cell.dtype], frozen=frozen, seed=seed)
    support, labels = kept_ids(cell.n, cell.v, seed)
    # a label alone has log-odds of +inf, and no gradient
    upstream = made.upstream.masked_fill(support.counts == 1, 0.0)
    return Inputs(made.hidden, made.weight, labels, support, upstream)


def call_of(name: str, cell: Cell, inputs: Inputs) -> Callable[[int], object]:
    """A forward and a backward."""

    def run(turn: int) -> object:
        if name == ZEROS:
            return torch.zeros_like(inputs.weight)
        if name in (OURS, SPARSE):
            sparse = "sparse" in (name, cell.head)
            log_odds = linear_support_log_odds(*inputs[:4], sparse=sparse)
        else:
            log_odds = linear_log_odds(*inputs[:3])
        return torch.autograd.grad(log_odds, inputs.wanted, inputs.upstream)

    return run


@BENCHMARK
def main(options: argparse.Namespace, record: dict[str, Any]) -> None:
    """Measure every cell: times, and peaks of memory each in a process of its own."""
    names = [OURS, *([DENSE] if options.dense else [])]

    def times(cell: Cell) -> dict[str, Any]:
        return measure_times(cell, names, options)

    measure_grid(options, record, list(cells(options)), times, extra_mb, names)


def cells(options: argparse.Namespace) -> Iterator[Cell]:
    """The grid that was asked for."""
    for shape, *rest in itertools.product(options.shapes, options.dtypes, options.heads):
        yield Cell(*shape, *rest)


def measure_times(cell: Cell, names: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """Time one cell, in milliseconds."""
    inputs = make_inputs(cell, options.seed)
    apart = [SPARSE, ZEROS] if cell.head == "dense" else []
    calls = {name: call_of(name, cell, inputs) for name in [*names, *apart]}
    took = in_turns(calls, rounds=options.rounds, budget_s=options.seconds, least_rounds=3)
    counts, sums = inputs.support.counts, {}
    if apart:
        parts = zip(*(took[name] for name in (OURS, *apart)), strict=True)
        sums["to_sum"] = quartiles([ours / (sparse + zeros) for ours, sparse, zeros in parts], 3)
    return {
        **sums,
        "rounds": len(took[OURS]),
        "ids": int(counts.sum()),
        "alone": int((counts == 1).sum()),
        "ms": {name: milliseconds(seconds) for name, seconds in took.items()},
        "to_fastadapt": ratios(took, OURS, names[1:], 3),
    }


def extra_mb(cell: Cell, name: str, options: argparse.Namespace) -> Iterator[float]:
    """Yields the peak of a forward and backward over inputs and gradients; for a process alone."""
    return_freed_blocks()
    if options.threads:
        torch.set_num_threads(options.threads)
    inputs = make_inputs(cell, options.seed)
    few = cell._replace(n=2, v=min(cell.v, WARM_UP_IDS))
    call_of(name, few, make_inputs(few, options.seed))(0)
    with PeakMemory() as peak:
        gradients: Any = call_of(name, cell, inputs)(0)
    yield round((peak.extra - sum(bytes_of(x) for x in gradients)) / 1e6, 1)


def bytes_of(gradient: Tensor) -> int:
    """Those of a tensor, or of the ids and values of a sparse one."""
    if not gradient.is_sparse:
        return gradient.nbytes
    return gradient.indices().nbytes + gradient.values().nbytes


if __name__ == "__main__":
    sys.exit(main())
