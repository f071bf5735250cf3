"""`linear_log_odds` on a CUDA device, beside its products alone through cuBLAS and others.

    python benchmarks/bench_gpu_losses.py --out benchmarks/results/gpu_losses.json

Tasks, each forward and backward: the mean cross entropy with 1.25 GiB of logits kept (three
products), a random signed upstream for every token with nothing kept (four), the same with a frozen
head (two), DPO, and DPO+ExMATE. The bound are so many products of the same shape, of all rows and
the whole vocabulary at once, through cuBLAS. Times are those between two CUDA events with the L2
cache cold, all calls in turns; peaks are those of torch's allocator over inputs and returned
gradients, of a call after a warm-up. Where logits are kept, ours runs once more without. `pip
install trl liger-kernel cut-cross-entropy` for those. `--device cpu` tries the script where there
is no GPU, without peaks; nothing of that is a result.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from device_timing import DeviceCall, DeviceTimer
from fastadapt import label_logps, linear_log_odds
from fastadapt._ops.linear.plan import plan_of
from filters import add_device, check_device, fill_filters, grid_parser
from gpu_loss_peers import GPU_LOSS_PEERS
from host import PACKAGES, gpu_record, host_record, quartiles, write_record
from limits import gpu_losses_limits, print_limits
from loss_peers import Logps
from missing import MissingPeer
from timing import clock, in_turns, ratios

OURS, LEAN, BOUND = "fastadapt", "nothing kept", "products"
BUDGET = 5 << 28  # bytes of logits, 1.25 GiB
BETA, COEFFICIENT = 0.1, 0.05
LEAST_ROUNDS = 5  # whatever the budget
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


class Task(NamedTuple):
    """What is differentiated: of how many products, which head, which budget."""

    products: int
    frozen: bool = False
    budget: int = BUDGET


TASKS = {
    "ce": Task(3),
    "tokens": Task(4, budget=0),
    "frozen": Task(2, frozen=True),
    "dpo": Task(3),
    "dpo+exmate": Task(3),
}
QUICK: dict[str, list[Any]] = {"batch": [4096], "tasks": ["ce", "tokens", "frozen"]}


class Inputs(NamedTuple):
    """What a cell computes on."""

    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    labels: Tensor  # (N,)
    upstream: Tensor  # (N,)
    reference: Tensor  # (pairs,): the reference's log-ratio of each pair

    def wanted(self) -> list[Tensor]:
        """What gets gradients."""
        return [x for x in (self.hidden, self.weight) if x.requires_grad]


def main() -> int:
    """Run the benchmark, print what it must show and write the JSON file.

    Returns:
        The exit code: 1 where a cell failed.
    """
    options = _parse()
    host = host_record((*PACKAGES, "triton", "trl", "liger-kernel", "cut-cross-entropy"))
    host["gpu"] = gpu_record()
    if options.commit:  # a copy, whose own git does not know it
        host |= {"commit": options.commit, "dirty": False}
    notes: list[str] = []
    record: dict[str, Any] = {
        "benchmark": "gpu_losses",
        "host": host,
        "settings": {
            "rounds": options.rounds,
            "seconds_per_cell": options.seconds,
            "minutes": options.minutes,
            "seed": options.seed,
            "hidden": options.hidden,
            "vocabulary": options.vocabulary,
            "tokens_per_sequence": options.tokens,
            "budget": BUDGET,
            "dtype": "bfloat16",
        },
        "notes": notes,
        "cells": [],
    }
    failed = run(options, record, notes)
    for note in notes:
        Console(stderr=True).print(f"note: {note}", style="yellow")
    print_limits(gpu_losses_limits(record))
    if options.out:
        write_record(options.out, record)
    return int(failed)


def run(options: argparse.Namespace, record: dict[str, Any], notes: list[str]) -> bool:
    """Measure cells into a record until time is over, and say whether one failed."""
    failed, end = False, time.monotonic() + 60 * options.minutes
    grid = [(n, task) for n in options.batch for task in options.tasks]
    for done, (n, task) in enumerate(grid):
        if time.monotonic() > end:
            notes.append(f"{len(grid) - done} of {len(grid)} cells left out for want of time")
            break
        try:
            record["cells"].append(measure(n, task, options, notes))
        except Exception as error:  # the other cells are measured all the same
            notes.append(f"N = {n}, {task}, failed: {_first_line(error)}")
            failed = True
        Console(stderr=True).print(f"N = {n:,}, {task}")
        if options.out:
            write_record(options.out, record)
    return failed


def make_inputs(n: int, task: Task, options: argparse.Namespace) -> Inputs:
    """Standard normals, logits of variance 1; as many chosen as rejected sequences."""
    device, dtype = options.device, torch.bfloat16
    generator = torch.Generator(device).manual_seed(options.seed)
    shape = {"generator": generator, "device": device}
    hidden = torch.randn(n, options.hidden, **shape).to(dtype)
    weight = torch.empty(options.vocabulary, options.hidden, dtype=dtype, device=device)
    for rows in weight.split(8192):  # no float32 copy of the whole
        rows.copy_(torch.randn(rows.shape, **shape) / options.hidden**0.5)
    labels = torch.randint(options.vocabulary, (n,), **shape)
    pairs = n // options.tokens // 2
    return Inputs(
        hidden.requires_grad_(),
        weight.requires_grad_(not task.frozen),
        labels,
        torch.randn(n, **shape),
        torch.randn(pairs, **shape),
    )


def loss_of(name: str, logps: Tensor, inputs: Inputs, tokens: int) -> Tensor:
    """The loss of a task on log-probabilities (N,): the chosen sequences, then the rejected."""
    if name == "ce":
        return -logps.mean()
    if name in ("tokens", "frozen"):
        return logps @ inputs.upstream
    of_sequences = logps.view(-1, tokens)
    sums = of_sequences.sum(-1)
    chosen, rejected = sums.chunk(2)
    loss = -F.logsigmoid(BETA * (chosen - rejected - inputs.reference)).mean()
    if name == "dpo":
        return loss
    return loss + COEFFICIENT * of_sequences[len(chosen) :].mean(-1).exp().mean()


def losses(name: str, inputs: Inputs, options: argparse.Namespace) -> dict[str, Loss | MissingPeer]:
    """Ours and the others', or why there is none."""
    task = TASKS[name]

    def own(budget: int) -> Loss:
        return from_logps(lambda *rows: label_logps(linear_log_odds(*rows, memory_budget=budget)))

    def from_logps(logps: Logps) -> Loss:
        return lambda *rows: loss_of(name, logps(*rows), inputs, options.tokens)

    made: dict[str, Loss | MissingPeer] = {OURS: own(task.budget)}
    if task.budget and not task.frozen:
        made[LEAN] = own(0)
    for peer in options.peers:
        make = GPU_LOSS_PEERS[peer]
        try:
            if name == "ce" and make.cross_entropy is not None:
                made[peer] = make.cross_entropy()
            else:
                made[peer] = from_logps(make.logps())
        except MissingPeer as missing:
            made[peer] = missing
    return made


def products(count: int, inputs: Inputs) -> Callable[[int], object]:
    """So many products of N H V: logits once or twice, the hidden states' gradient, the head's."""
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
    logits = hidden @ weight.t()  # read by those that follow as if it were the gradient
    dhidden, dweight = torch.empty_like(hidden), torch.empty_like(weight)
    again = logits if count < 4 else torch.empty_like(logits)

    def run(turn: int) -> None:
        torch.mm(hidden, weight.t(), out=logits)
        if count == 4:
            torch.mm(hidden, weight.t(), out=again)
        torch.mm(again, weight, out=dhidden)
        if count > 2:
            torch.mm(again.t(), hidden, out=dweight)

    return run


def measure(n: int, name: str, options: argparse.Namespace, notes: list[str]) -> dict[str, Any]:
    """Time one cell, in milliseconds, and take the peaks."""
    inputs, task = make_inputs(n, TASKS[name], options), TASKS[name]
    calls: dict[str, DeviceCall] = {}
    peaks: dict[str, float] = {}
    for who, loss in losses(name, inputs, options).items():
        if isinstance(loss, MissingPeer):
            if str(loss) not in notes:
                notes.append(str(loss))
            continue
        call = step(loss, inputs)
        try:
            call(0)
            if options.device == "cuda":
                peaks[who] = peak_mib(call, inputs)
        except Exception as error:
            if who == OURS:
                raise
            notes.append(f"N = {n}, {name}, {who}, not measured: {_first_line(error)}")
        else:
            calls[who] = call
    calls[BOUND] = DeviceCall(products(task.products, inputs))
    took = in_turns(
        calls,
        rounds=options.rounds,
        budget_s=options.seconds,
        slice_s=0.0,
        least_rounds=LEAST_ROUNDS,
        timer=clock if options.device == "cpu" else DeviceTimer(hot=False),
    )
    plan = plan_of(inputs.hidden, inputs.weight, memory_budget=task.budget)
    return {
        "n": n,
        "task": name,
        "products": task.products,
        "plan": plan.name,
        "plan_mib": round(plan.peak_bytes / 2**20, 1),
        "rounds": len(took[OURS]),
        "ms": {who: quartiles([1e3 * s for s in seconds], 3) for who, seconds in took.items()},
        "to_products": quartiles(ratios(took[OURS], took[BOUND]), 3),
        "to_fastadapt": {
            who: quartiles(ratios(took[who], took[OURS]), 3)
            for who in took
            if who not in (OURS, LEAN, BOUND)
        },
        "peak_mib": peaks,
    }


def step(loss: Loss, inputs: Inputs) -> DeviceCall:
    """A forward and a backward."""
    rows = inputs.hidden, inputs.weight, inputs.labels
    return DeviceCall(lambda turn: torch.autograd.grad(loss(*rows), inputs.wanted()))


def peak_mib(call: DeviceCall, inputs: Inputs) -> float:
    """MiB over what was there before and the gradients that are returned."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call(0)
    torch.cuda.synchronize()
    returned = sum(x.nbytes for x in inputs.wanted())
    return round((torch.cuda.max_memory_allocated() - before - returned) / 2**20, 1)


def _first_line(error: Exception) -> str:
    """What an error says, in a line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _parse() -> argparse.Namespace:
    """Read the arguments."""
    axes = {"batch": (4096, 16_384), "tasks": tuple(TASKS), "peers": tuple(GPU_LOSS_PEERS)}
    parser = grid_parser(str(__doc__), axes, rounds=30, seconds=8.0)
    add = parser.add_argument
    add("--hidden", type=int, default=4096, metavar="H", help="(default: %(default)s)")
    add("--vocabulary", type=int, default=128_256, metavar="V", help="(default: %(default)s)")
    add("--tokens", type=int, default=512, help="of a sequence (default: %(default)s)")
    add("--minutes", type=float, default=5.0, help="then cells are left out (default: %(default)s)")
    add_device(parser)
    options = parser.parse_args()
    fill_filters(parser, options, axes, QUICK)
    for n in options.batch:
        if n < 2 * options.tokens or n % (2 * options.tokens):
            parser.error(f"batch: expected pairs of sequences of {options.tokens} tokens, got {n}")
    check_device(parser, options)
    return options


if __name__ == "__main__":
    sys.exit(main())
