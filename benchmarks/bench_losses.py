"""`linear_log_odds`: time, memory and error beside full logits, trl, Liger and torch's own.

    python benchmarks/bench_losses.py --threads 1 --out benchmarks/results/losses.json

In each cell every round runs all calls, forward and then backward with a random signed upstream, so
ratios compare times of the same moments. Peak memory is that of the resident set, in a process of
its own for each call, over inputs and gradients, after one forward and backward of the same N and H
on a slice of the vocabulary. `pip install trl liger-kernel` for those two. Above a size only plain
PyTorch runs beside ours: the others take minutes for a round.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from cases import DTYPES, chosen
from fastadapt import linear_log_odds
from fastadapt._ops.linear.cpu import TILE
from fastadapt._ops.linear.memory import PeakMemory, is_measurable
from fastadapt._ops.linear.plan import KEPT_BYTES
from fastadapt.study._progress import progress_bar, stepper
from fresh import in_fresh_process
from host import PACKAGES, host_record, quartiles, write_record
from limits import losses_limits, print_limits
from loss_peers import LOSS_PEERS, Logps, plain_log_odds
from missing import MissingPeer
from timing import in_turns, ratios

SHAPES = ((1024, 576, 49_152), (1024, 896, 32_768), (2048, 2048, 128_256), (512, 4096, 151_936))
HEADS = ("trainable", "frozen")
OURS = "fastadapt"
SLOW_PRODUCT = 1 << 36  # N H V from which only plain PyTorch runs beside ours
ERROR_ROWS = 256  # of the float64 truth
WARM_UP_IDS = 8192
QUICK: dict[str, list[Any]] = {
    "shapes": [(1024, 896, 32_768)],
    "dtypes": ["bfloat16"],
    "peers": ["plain", "trl", "liger"],
}


class Cell(NamedTuple):
    """One place of the grid."""

    n: int
    h: int
    v: int
    dtype: str
    head: str


class Inputs(NamedTuple):
    """What a cell computes on."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    upstream: Tensor

    def wanted(self) -> list[Tensor]:
        """What gets gradients."""
        return [x for x in (self.hidden, self.weight) if x.requires_grad]


class Step:
    """A forward and a backward; keeps the seconds of each."""

    def __init__(self, call: Logps, inputs: Inputs) -> None:
        """Ready to be called."""
        self.call, self.inputs = call, inputs
        self.forward: list[float] = []
        self.backward: list[float] = []

    def __call__(self, turn: int) -> None:
        """Forward, then backward."""
        start = time.perf_counter()
        out = self.call(*self.inputs[:3])
        middle = time.perf_counter()
        torch.autograd.grad(out, self.inputs.wanted(), self.inputs.upstream)
        self.forward.append(middle - start)
        self.backward.append(time.perf_counter() - middle)


def main() -> None:
    """Run the benchmark, print what it must show and write the JSON file."""
    options = _parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    host = host_record((*PACKAGES, "trl", "liger-kernel"))
    grid = list(cells(options))
    notes: list[str] = []
    peers = _installed(options.peers, notes)
    if options.memory and not is_measurable():
        notes.append("no memory: this system does not tell the peak of a process")
        options.memory = False
    record: dict[str, Any] = {
        "benchmark": "losses",
        "host": host,
        "settings": {
            "rounds": options.rounds,
            "seconds_per_cell": options.seconds,
            "seed": options.seed,
            "peers": peers,
            "plain_only_from_product": SLOW_PRODUCT,
            "error_rows": ERROR_ROWS,
        },
        "notes": notes,
        "cells": [],
    }
    with progress_bar(Console(stderr=True), auto_refresh=False) as bar:
        step = stepper(bar, "timing", len(grid))
        for cell in grid:
            names = [OURS, *peers_of(cell, peers)]
            entry = {**cell._asdict(), **measure(cell, names, options)}
            if options.memory:
                for name in names:
                    (extra,) = in_fresh_process(extra_mb, cell, name, options)
                    entry.setdefault("memory_mb", {})[name] = extra
                entry["memory_formula_mb"] = round(formula(cell) / 1e6, 1)
            record["cells"].append(entry)
            step()
    for note in notes:
        Console(stderr=True).print(f"note: {note}", style="yellow")
    print_limits(losses_limits(record))
    if options.out:
        write_record(options.out, record)


def cells(options: argparse.Namespace) -> Iterator[Cell]:
    """The grid that was asked for."""
    for shape, dtype, head in itertools.product(options.shapes, options.dtypes, options.heads):
        if options.large_float32 or dtype != "float32" or math.prod(shape) < SLOW_PRODUCT:
            yield Cell(*shape, dtype, head)


def peers_of(cell: Cell, peers: list[str]) -> list[str]:
    """The peers that run in a cell: all, or where a round would take minutes plain PyTorch."""
    small = cell.n * cell.h * cell.v < SLOW_PRODUCT
    return [name for name in peers if small or name == "plain"]


def call_of(name: str) -> Logps:
    """Ours or a peer, by name."""
    return linear_log_odds if name == OURS else LOSS_PEERS[name]()


def make_inputs(cell: Cell, seed: int) -> Inputs:
    """Hidden states and head of standard normals, logits of variance 1, a signed upstream."""
    generator = torch.Generator().manual_seed(seed)
    dtype = DTYPES[cell.dtype]
    hidden = torch.randn(cell.n, cell.h, generator=generator).to(dtype)
    weight = torch.empty(cell.v, cell.h, dtype=dtype)
    for rows in weight.split(4096):  # no float32 copy of the whole
        rows.copy_(torch.randn(rows.shape, generator=generator) / cell.h**0.5)
    labels = torch.randint(cell.v, (cell.n,), generator=generator)
    upstream = torch.randn(cell.n, generator=generator)
    weight.requires_grad_(cell.head == "trainable")
    return Inputs(hidden.requires_grad_(), weight, labels, upstream)


def measure(cell: Cell, names: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """Time one cell, in milliseconds, and compare its log-odds with the truth."""
    inputs = make_inputs(cell, options.seed)
    steps = {name: Step(call_of(name), inputs) for name in names}
    both = in_turns(steps, rounds=options.rounds, budget_s=options.seconds, least_rounds=3)
    times = {
        name: {
            "forward": _ms(step.forward[1:]),  # the first call warms up
            "backward": _ms(step.backward[1:]),
            "both": _ms(both[name]),
        }
        for name, step in steps.items()
    }
    return {
        "rounds": len(both[OURS]),
        "ms": times,
        "to_fastadapt": {
            name: quartiles(ratios(both[name], both[OURS]), 3) for name in names if name != OURS
        },
        "rms_error": rms_errors(inputs),
    }


def rms_errors(inputs: Inputs) -> dict[str, float]:
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


def formula(cell: Cell) -> int:
    """Bytes that `linear_log_odds` says it holds beside inputs and gradients."""
    itemsize = DTYPES[cell.dtype].itemsize
    logits = cell.n * cell.v * itemsize
    kept = logits if cell.head == "trainable" and logits <= KEPT_BYTES else 0
    return 8 * cell.n * cell.h + cell.n * min(TILE, cell.v) * itemsize + kept


def extra_mb(cell: Cell, name: str, options: argparse.Namespace) -> Iterator[float]:
    """Yields the peak of a forward and backward over inputs and gradients; for a process alone."""
    if options.threads:
        torch.set_num_threads(options.threads)
    inputs, call = make_inputs(cell, options.seed), call_of(name)
    ids = cell.v if name == "compiled" else WARM_UP_IDS  # which would compile a new shape later
    few = inputs.weight.detach()[:ids].clone().requires_grad_(inputs.weight.requires_grad)
    Step(call, inputs._replace(weight=few, labels=inputs.labels % len(few)))(0)
    del few
    with PeakMemory() as peak:
        out = call(*inputs[:3])
        gradients = torch.autograd.grad(out, inputs.wanted(), inputs.upstream)
    yield round((peak.extra - sum(x.nbytes for x in gradients)) / 1e6, 1)


def _ms(seconds: list[float]) -> list[float]:
    """Quartiles in milliseconds."""
    return quartiles([1e3 * s for s in seconds], 1)


def _installed(names: list[str], notes: list[str]) -> list[str]:
    """The peers that can be made; a note for each that cannot."""
    made = []
    for name in names:
        try:
            call_of(name)
            made.append(name)
        except MissingPeer as missing:
            notes.append(str(missing))
    return made


def _shape(text: str) -> tuple[int, int, int]:
    """N,H,V."""
    n, h, v = (int(part) for part in text.split(","))
    if min(n, h, v) < 1:
        raise ValueError(text)
    return n, h, v


def _parse() -> argparse.Namespace:
    """Read the arguments."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, help="JSON file to write")
    add("--quick", action="store_true", help="few cells; the filters below still widen or narrow")
    add("--shapes", nargs="+", type=_shape, metavar="N,H,V")
    filters = {"dtypes": tuple(DTYPES), "heads": HEADS, "peers": tuple(LOSS_PEERS)}
    for name, known in filters.items():
        add(f"--{name}", nargs="*" if name == "peers" else "+", choices=known, metavar="X")
    add(
        "--no-large-float32",
        dest="large_float32",
        action="store_false",
        help="leave out the cells whose float32 products take a quarter of a minute each",
    )
    add("--no-memory", dest="memory", action="store_false", help="time only")
    add("--rounds", type=int, default=9, help="at most (default: %(default)s)")
    add("--seconds", type=float, default=60, help="per cell, about (default: %(default)s)")
    add("--seed", type=int, default=0)
    add("--threads", type=int, help="default: torch's own choice")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error(f"rounds: expected at least 2, got {options.rounds}")
    for name, known in {"shapes": SHAPES, **filters}.items():
        wanted = getattr(options, name)
        if wanted is None:
            setattr(options, name, list(QUICK.get(name, known) if options.quick else known))
        elif name != "shapes":
            setattr(options, name, chosen(wanted, known))
    return options


if __name__ == "__main__":
    main()
