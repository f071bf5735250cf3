"""`linear_log_odds`: time, memory and error beside full logits, trl, Liger and torch's own.

    python benchmarks/bench_losses.py --threads 1 --out benchmarks/results/losses.json

In each cell every round runs all calls, forward and then backward with a random signed upstream, so
ratios compare times of the same moments; among them the bare products, three, or two with a frozen
head. Peak memory is that of the resident set, in a process of its own for each call, over inputs
and gradients, after one forward and backward of the same N and H on a slice of the vocabulary.
`pip install trl liger-kernel` for those two. Above a size only plain PyTorch runs beside ours: the
others take minutes for a round.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cases import DTYPES, LossInputs, make_loss_inputs
from fastadapt import linear_candidate_log_odds, linear_log_odds
from fastadapt._ops.memory import PeakMemory, is_measurable, return_freed_blocks
from fastadapt.linear import plan_of
from fresh import in_fresh_process
from harness import SEED, Axis, Benchmark, Flag, Option, progress, settings_of, sizes
from loss_peers import LOSS_PEERS, Logps, plain_log_odds
from missing import MissingPeer
from timing import in_turns, milliseconds, ratios

SHAPES = (
    *((1024, 576, 49_152), (1024, 896, 32_768), (4096, 896, 32_768)),
    *((2048, 2048, 128_256), (512, 4096, 151_936)),
)
OURS, LEAN, BOUND = "fastadapt", "nothing kept", "products"
CANDIDATES = 8  # ids a row of the calls that score several
SLOW_PRODUCT = 1 << 36  # N H V from which only plain PyTorch runs beside ours
ERROR_ROWS = 256  # of the float64 truth
WARM_UP_IDS = 8192


def shape_of(text: str) -> tuple[int, int, int]:
    """N,H,V."""
    n, h, v = sizes(text)
    return n, h, v


BENCHMARK = Benchmark(
    "losses",
    __doc__,
    {
        "shapes": Axis(SHAPES, [SHAPES[1]], kind=shape_of, metavar="N,H,V"),
        "dtypes": Axis(tuple(DTYPES), ["bfloat16"]),
        "heads": Axis(("trainable", "frozen")),
        "peers": Axis(tuple(LOSS_PEERS), ["plain", "trl", "liger"], may_be_empty=True),
        "large_float32": Flag("leave out the float32 products of a quarter of a minute each"),
        "memory": Flag("time only"),
        "rounds": Option(9, "at most", least=2),
        "seconds": Option(60, "per cell, about", kind=float),
        "seed": SEED,
    },
    ("trl", "liger-kernel"),
)


class Products(torch.autograd.Function):
    """The products of a head with full logits, which stand for their own gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        """Returns a number a row."""
        logits = hidden @ weight.t()
        ctx.save_for_backward(hidden, weight, logits)
        return logits[:, 0].float()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Makes as many as gradients are wanted."""
        hidden, weight, logits = ctx.saved_tensors
        dweight = logits.t() @ hidden if ctx.needs_input_grad[1] else None
        return logits @ weight, dweight, None


def candidates(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """(N,): the sum of the log-odds of the label and of other ids, spread over the vocabulary."""
    log_odds: Tensor = linear_candidate_log_odds(hidden, weight, _index(labels, len(weight)))
    return log_odds.sum(-1)


def sets(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """(N,): the log-odds of the set of these ids."""
    index = _index(labels, len(weight))
    found: Tensor = linear_candidate_log_odds(hidden, weight, index, outputs=["set_log_odds"])[1]
    return found


def _index(labels: Tensor, v: int) -> Tensor:
    """(N, CANDIDATES)."""
    return (labels[:, None] + torch.arange(CANDIDATES) * (v // CANDIDATES)) % v


SEVERAL: dict[str, Callable[[], Logps]] = {"candidates": lambda: candidates, "set": lambda: sets}
CALLS: dict[str, Callable[[], Logps]] = {
    OURS: lambda: linear_log_odds,
    **SEVERAL,
    LEAN: lambda: functools.partial(linear_log_odds, memory_budget=0),
    BOUND: lambda: Products.apply,
    **LOSS_PEERS,
}


class Cell(NamedTuple):
    """One place of the grid."""

    n: int
    h: int
    v: int
    dtype: str
    head: str

    def make_inputs(self, seed: int) -> LossInputs:
        """What the cell computes on."""
        frozen = self.head == "frozen"
        return make_loss_inputs(*self[:3], DTYPES[self.dtype], frozen=frozen, seed=seed)


class Step:
    """A forward and a backward; keeps the seconds of each."""

    def __init__(self, call: Logps, inputs: LossInputs) -> None:
        self.call, self.inputs = call, inputs
        self.forward: list[float] = []
        self.backward: list[float] = []

    def __call__(self, turn: int) -> None:
        start = time.perf_counter()
        out = self.call(*self.inputs[:3])
        middle = time.perf_counter()
        torch.autograd.grad(out, self.inputs.wanted(), self.inputs.upstream)
        self.forward.append(middle - start)
        self.backward.append(time.perf_counter() - middle)


@BENCHMARK
def main(options: argparse.Namespace, record: dict[str, Any]) -> None:
    """Measure every cell: times, errors and, each in a process of its own, peaks of memory."""
    record["notes"] = notes = []
    options.peers = installed(options.peers, notes)
    if options.memory and not is_measurable():
        notes.append("no memory: this system does not tell the peak of a process")
        options.memory = False
    record["settings"] = {
        **settings_of(options, "rounds", "seed", "peers"),
        "seconds_per_cell": options.seconds,
        "plain_only_from_product": SLOW_PRODUCT,
        "error_rows": ERROR_ROWS,
    }
    grid, record["cells"] = list(cells(options)), []
    with progress("timing", len(grid)) as step:
        for cell in grid:
            peers = peers_of(cell, options.peers)
            names = [OURS, BOUND, *(SEVERAL if is_small(cell) else ()), *peers]
            entry = {**cell._asdict(), **measure_times(cell, names, options)}
            if options.memory:
                entry["memory_mb"] = {}
                for name in (OURS, LEAN, *peers):
                    (extra,) = in_fresh_process(extra_mb, cell, name, options)
                    entry["memory_mb"][name] = extra
            entry["plan_mb"] = round(plan_bytes(cell) / 1e6, 1)
            record["cells"].append(entry)
            step()


def cells(options: argparse.Namespace) -> Iterator[Cell]:
    """The grid that was asked for."""
    for shape, dtype, head in itertools.product(options.shapes, options.dtypes, options.heads):
        cell = Cell(*shape, dtype, head)
        if options.large_float32 or dtype != "float32" or is_small(cell):
            yield cell


def peers_of(cell: Cell, peers: list[str]) -> list[str]:
    """The peers that run in a cell: all, or where a round would take minutes plain PyTorch."""
    return [name for name in peers if is_small(cell) or name == "plain"]


def is_small(cell: Cell) -> bool:
    """Whether a round takes seconds."""
    return cell.n * cell.h * cell.v < SLOW_PRODUCT


def measure_times(cell: Cell, names: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """Time one cell, in milliseconds, and compare its log-odds with the truth."""
    inputs = cell.make_inputs(options.seed)
    steps = {name: Step(CALLS[name](), inputs) for name in names}
    both = in_turns(steps, rounds=options.rounds, budget_s=options.seconds, least_rounds=3)
    return {
        "rounds": len(both[OURS]),
        "ms": {
            name: {
                "forward": milliseconds(step.forward[1:]),  # the first call warms up
                "backward": milliseconds(step.backward[1:]),
                "both": milliseconds(both[name]),
            }
            for name, step in steps.items()
        },
        "to_products": ratios(both, BOUND, [OURS], 3)[OURS],
        "to_fastadapt": ratios(both, OURS, names[2:], 3),
        "rms_error": rms_errors(inputs),
    }


def rms_errors(inputs: LossInputs) -> dict[str, float]:
    """Root mean square error of log-odds, nats, ours and plain PyTorch's, on the first rows."""
    rows = (inputs.hidden.detach()[:ERROR_ROWS], inputs.weight.detach(), inputs.labels[:ERROR_ROWS])
    truth = true_log_odds(*rows)
    calls = {OURS: linear_log_odds, "plain": plain_log_odds}
    return {
        name: float((call(*rows).double() - truth).square().mean().sqrt())
        for name, call in calls.items()
    }


def true_log_odds(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """(N,): the log-odds of inputs as they are, float64."""
    blocks = weight.split(8192)  # no float64 copy of the whole head
    logits = torch.cat([hidden.double() @ block.double().t() for block in blocks], -1)
    own = labels[:, None]
    others = logits.scatter(-1, own, -math.inf).logsumexp(-1)
    return logits.gather(-1, own)[:, 0] - others


def plan_bytes(cell: Cell) -> int:
    """Bytes that `linear_log_odds` says it holds beside inputs and gradients."""
    dtype = DTYPES[cell.dtype]
    hidden = torch.empty(cell.n, cell.h, dtype=dtype, device="meta", requires_grad=True)
    weight = torch.empty(cell.v, cell.h, dtype=dtype, device="meta")
    return plan_of(hidden, weight.requires_grad_(cell.head == "trainable")).peak_bytes


def extra_mb(cell: Cell, name: str, options: argparse.Namespace) -> Iterator[float]:
    """Yields the peak of a forward and backward over inputs and gradients; for a process alone."""
    return_freed_blocks()
    if options.threads:
        torch.set_num_threads(options.threads)
    inputs, call = cell.make_inputs(options.seed), CALLS[name]()
    ids = cell.v if name == "compiled" else WARM_UP_IDS  # which would compile a new shape later
    few = inputs.weight.detach()[:ids].clone().requires_grad_(inputs.weight.requires_grad)
    Step(call, inputs._replace(weight=few, labels=inputs.labels % len(few)))(0)
    del few
    with PeakMemory() as peak:
        out = call(*inputs[:3])
        gradients = torch.autograd.grad(out, inputs.wanted(), inputs.upstream)
    yield round((peak.extra - sum(x.nbytes for x in gradients)) / 1e6, 1)


def installed(names: list[str], notes: list[str]) -> list[str]:
    """The peers that can be made; a note for each that cannot."""
    made = []
    for name in names:
        try:
            CALLS[name]()
            made.append(name)
        except MissingPeer as missing:
            notes.append(str(missing))
    return made


if __name__ == "__main__":
    sys.exit(main())
