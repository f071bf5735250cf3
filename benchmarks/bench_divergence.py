"""`linear_divergence`: time beside its products alone and full logits, and memory.

    python benchmarks/bench_divergence.py --threads 1 --out benchmarks/results/divergence.json

In each cell every round runs all calls, each a forward and a backward with a random signed
upstream. "products" are the products that the call makes, by torch, of the same tiles and types:
both logits twice, the hidden states' gradient, and the head's where it is trained. Peak memory is
that of the resident set, in a process of its own for each call, over inputs and gradients.

That is six minutes of an idle core, most of them of full logits and new processes; more rows,
`--shapes 1024,576,49152`, or rounds, `--seconds 60`, take as many times longer.
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
from fastadapt import linear_divergence, reference
from fastadapt._ops.linear.cpu import TILE
from fastadapt._ops.memory import PeakMemory, return_freed_blocks
from fastadapt.losses.divergence import plan_of
from harness import SEED, Axis, Benchmark, Flag, Option
from times_and_peaks import measure_grid
from timing import in_turns, milliseconds, ratios

SHAPES = ((256, 576, 49_152), (256, 896, 32_768))
KINDS = ("kl", "reverse_kl", "jsd")
OURS, BOUND, PLAIN = "fastadapt", "products", "plain"
BENCHMARK = Benchmark(
    "divergence",
    __doc__,
    {
        "shapes": Axis(SHAPES, [SHAPES[1]], kind=shape_of, metavar="N,H,V"),
        "dtypes": Axis(tuple(DTYPES), ["bfloat16"]),
        "kinds": Axis(KINDS, ["kl"]),
        "heads": Axis(("trainable", "frozen"), ["trainable"]),
        "plain": Flag("leave out full logits"),
        "memory": Flag("time only"),
        "rounds": Option(9, "at most", least=2),
        "seconds": Option(5, "per cell, about", kind=float),
        "seed": SEED,
    },
)


class Cell(NamedTuple):
    """One place of the grid; the teacher has the student's shape."""

    n: int
    h: int
    v: int
    dtype: str
    kind: str
    head: str


class Inputs(NamedTuple):
    """What a cell computes on."""

    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    teacher_hidden: Tensor
    teacher_weight: Tensor
    upstream: Tensor  # (N,)

    @property
    def wanted(self) -> list[Tensor]:
        """What gets gradients."""
        return [x for x in (self.hidden, self.weight) if x.requires_grad]


def make_inputs(cell: Cell, seed: int) -> Inputs:
    """A student and a teacher of standard normal logits."""
    frozen = cell.head == "frozen"
    student, teacher = (
        make_loss_inputs(*cell[:3], DTYPES[cell.dtype], frozen=frozen, seed=seed + i)
        for i in range(2)
    )
    states = teacher.hidden.detach(), teacher.weight.detach()
    return Inputs(student.hidden, student.weight, *states, student.upstream)


def call_of(name: str, cell: Cell, inputs: Inputs) -> Callable[[int], object]:
    """A forward and a backward, or the products of one."""
    if name == BOUND:
        return products(inputs)
    function = linear_divergence if name == OURS else reference.linear_divergence

    def run(turn: int) -> object:
        values = function(*inputs[:4], kind=cell.kind)
        return torch.autograd.grad(values, inputs.wanted, inputs.upstream)

    return run


def products(inputs: Inputs) -> Callable[[int], object]:
    """The products of a forward and a backward, tile by tile, into memory that is there."""
    hidden, weight, teacher_hidden, teacher_weight = (x.detach() for x in inputs[:4])
    n, v = hidden.shape[0], weight.shape[0]
    tile, dhidden = hidden.new_empty(n * min(TILE, v)), torch.empty_like(hidden)
    gradient = hidden.new_zeros(n * min(TILE, v))
    dweight = torch.empty_like(weight) if inputs.weight.requires_grad else None

    def run(turn: int) -> None:
        for backward, first in itertools.product((False, True), range(0, v, TILE)):
            ids = slice(first, min(first + TILE, v))
            shape = n, ids.stop - first
            out = tile[: math.prod(shape)].view(shape)
            torch.mm(hidden, weight[ids].t(), out=out)
            torch.mm(teacher_hidden, teacher_weight[ids].t(), out=out)
            if backward:
                out = gradient[: math.prod(shape)].view(shape)
                torch.mm(out, weight[ids], out=dhidden)
                if dweight is not None:
                    torch.mm(out.t(), hidden, out=dweight[ids])

    return run


@BENCHMARK
def main(options: argparse.Namespace, record: dict[str, Any]) -> None:
    """Measure every cell: times, and peaks of memory each in a process of its own."""
    names = [OURS, BOUND, *([PLAIN] if options.plain else [])]

    def times(cell: Cell) -> dict[str, Any]:
        return measure_times(cell, names, options)

    measure_grid(
        options,
        record,
        list(cells(options)),
        times,
        extra_mb,
        [name for name in names if name != BOUND],
    )


def cells(options: argparse.Namespace) -> Iterator[Cell]:
    """The grid that was asked for."""
    axes = options.shapes, options.dtypes, options.kinds, options.heads
    for shape, *rest in itertools.product(*axes):
        yield Cell(*shape, *rest)


def measure_times(cell: Cell, names: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """Time one cell, in milliseconds."""
    inputs = make_inputs(cell, options.seed)
    calls = {name: call_of(name, cell, inputs) for name in names}
    took = in_turns(calls, rounds=options.rounds, budget_s=options.seconds, least_rounds=3)
    plan = plan_of(*inputs[:3], kind=cell.kind)
    return {
        "rounds": len(took[OURS]),
        "products": plan.products,
        "ms": {name: milliseconds(seconds) for name, seconds in took.items()},
        "to_products": ratios(took, BOUND, [OURS], 3)[OURS],
        "to_fastadapt": ratios(took, OURS, names[2:], 3),
        "plan_mb": round(plan.peak_bytes / 1e6, 1),
    }


def extra_mb(cell: Cell, name: str, options: argparse.Namespace) -> Iterator[float]:
    """Yields the peak of a forward and backward over inputs and gradients; for a process alone."""
    return_freed_blocks()
    if options.threads:
        torch.set_num_threads(options.threads)
    inputs = make_inputs(cell, options.seed)
    few = [x.detach()[:WARM_UP_IDS].clone() for x in (inputs.weight, inputs.teacher_weight)]
    few[0].requires_grad_(inputs.weight.requires_grad)
    call_of(name, cell, inputs._replace(weight=few[0], teacher_weight=few[1]))(0)
    del few
    with PeakMemory() as peak:
        gradients: Any = call_of(name, cell, inputs)(0)
    yield round((peak.extra - sum(x.nbytes for x in gradients)) / 1e6, 1)


if __name__ == "__main__":
    sys.exit(main())
