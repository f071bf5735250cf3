"""`linear_log_odds` on a CUDA device, beside its products alone through cuBLAS and others.

    python benchmarks/bench_gpu_losses.py --out benchmarks/results/gpu_losses.json

Tasks, each forward and backward: the mean cross entropy with 1.25 GiB of logits kept (three
products), a random signed upstream for every token with nothing kept (four), the same with a frozen
head (two), DPO, and DPO+ExMATE. The bound are so many products of the same shape, of all rows and
the whole vocabulary at once, through cuBLAS. Times are those between two CUDA events with the L2
cache cold, all calls in turns; peaks are those of torch's allocator over inputs and returned
gradients, of a call after a warm-up. Where logits are kept, ours runs once more without, and of the
cross entropy `linear_mle_loss` too. `pip install trl liger-kernel quack-kernels cut-cross-entropy`
for those. `--device cpu` tries the script where there is no GPU, without peaks; nothing of that is
a result.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from cases import LossInputs, make_loss_inputs
from device_timing import DeviceCall, DeviceTimer
from fastadapt import label_logps, linear_log_odds, linear_mle_loss
from fastadapt.linear import plan_of
from harness import OF_A_DEVICE, SEED, Axis, Benchmark, Option, measure_until, settings_of, sizes
from host import write_record
from loss_peers import GPU_LOSS_PEERS, Logps
from missing import MissingPeer, first_line
from timing import clock, in_turns, milliseconds, ratios

OURS, LEAN, MEAN, BOUND = "fastadapt", "nothing kept", "linear_mle_loss", "products"
HEADS = ((4096, 128_256), (2048, 151_936), (896, 151_936))
SHOWN = "H = {}, V = {}, N = {}, {}".format
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


class Cell(NamedTuple):
    """One place of the grid."""

    h: int
    v: int
    n: int
    task: str


def head_of(text: str) -> tuple[int, int]:
    """H,V."""
    h, v = sizes(text)
    return h, v


BENCHMARK = Benchmark(
    "gpu_losses",
    __doc__,
    {
        "heads": Axis(HEADS, [HEADS[0]], kind=head_of, metavar="H,V"),
        "batch": Axis((4096, 512, 16_384), [4096], kind=int),
        "tasks": Axis(tuple(TASKS), ["ce", "tokens", "frozen"]),
        "peers": Axis(tuple(GPU_LOSS_PEERS), may_be_empty=True),
        "rounds": Option(30, "at most", least=2),
        "seconds": Option(8.0, "per cell, about"),
        "seed": SEED,
        "tokens": Option(512, "of a sequence, or half of a smaller batch"),
        "minutes": Option(5.0, "then cells are left out"),
        **OF_A_DEVICE,
    },
    ("triton", "trl", "liger-kernel", "quack-kernels", "cut-cross-entropy"),
)


@BENCHMARK
def main(options: argparse.Namespace, record: dict[str, Any]) -> bool:
    """Measure cells until time is over, and say whether one failed."""
    end = time.monotonic() + 60 * options.minutes
    for n in options.batch:
        if n % (2 * tokens_of(n, options)):
            sys.exit(f"batch: expected pairs of sequences of {options.tokens} tokens, got {n}")
    record["settings"] = {
        **settings_of(options, "rounds", "minutes", "seed"),
        "seconds_per_cell": options.seconds,
        "tokens_per_sequence": options.tokens,
        "budget": BUDGET,
        "dtype": "bfloat16",
    }
    record["notes"], record["cells"] = [], []

    def measure_next(cell: Cell) -> None:
        record["cells"].append(measure_cell(cell, options, record["notes"]))
        Console(stderr=True).print(SHOWN(*cell))
        if options.out:
            write_record(options.out, record)

    axes = options.heads, options.batch, options.tasks
    grid = [Cell(*head, n, task) for head, n, task in itertools.product(*axes)]
    return measure_until(end, grid, measure_next, record["notes"].append, SHOWN)


def tokens_of(n: int, options: argparse.Namespace) -> int:
    """The tokens of a sequence; there is a pair at least."""
    return min(options.tokens, n // 2)


def make_inputs(cell: Cell, options: argparse.Namespace) -> LossInputs:
    """What a cell computes on; as many chosen as rejected sequences."""
    return make_loss_inputs(
        cell.n,
        cell.h,
        cell.v,
        torch.bfloat16,
        frozen=TASKS[cell.task].frozen,
        seed=options.seed,
        device=options.device,
        pairs=cell.n // tokens_of(cell.n, options) // 2,
    )


def loss_of(name: str, logps: Tensor, inputs: LossInputs, tokens: int) -> Tensor:
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


def losses(
    cell: Cell, inputs: LossInputs, options: argparse.Namespace
) -> dict[str, Loss | MissingPeer]:
    """Ours and the others', or why there is none."""
    task, tokens = TASKS[cell.task], tokens_of(cell.n, options)

    def own(budget: int) -> Loss:
        return from_logps(lambda *rows: label_logps(linear_log_odds(*rows, memory_budget=budget)))

    def from_logps(logps: Logps) -> Loss:
        return lambda *rows: loss_of(cell.task, logps(*rows), inputs, tokens)

    made: dict[str, Loss | MissingPeer] = {OURS: own(task.budget)}
    if task.budget and not task.frozen:
        made[LEAN] = own(0)
    if cell.task == "ce":
        made[MEAN] = linear_mle_loss
    for peer in options.peers:
        make = GPU_LOSS_PEERS[peer]
        try:
            if cell.task == "ce" and make.cross_entropy is not None:
                made[peer] = make.cross_entropy()
            else:
                made[peer] = from_logps(make.logps())
        except MissingPeer as missing:
            made[peer] = missing
    return made


def products(count: int, inputs: LossInputs) -> Callable[[int], object]:
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


def measure_cell(cell: Cell, options: argparse.Namespace, notes: list[str]) -> dict[str, Any]:
    """Time one cell, in milliseconds, and take the peaks."""
    inputs, task = make_inputs(cell, options), TASKS[cell.task]
    calls: dict[str, DeviceCall] = {}
    peaks: dict[str, float] = {}
    for who, loss in losses(cell, inputs, options).items():
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
            notes.append(f"{SHOWN(*cell)}, {who}, not measured: {first_line(error)}")
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
        **cell._asdict(),
        "products": task.products,
        "plan": plan.name,
        "plan_mib": round(plan.peak_bytes / 2**20, 1),
        "rounds": len(took[OURS]),
        "ms": {who: milliseconds(seconds, 3) for who, seconds in took.items()},
        "to_products": ratios(took, BOUND, (OURS,), 3)[OURS],
        "to_fastadapt": ratios(took, OURS, options.peers, 3),
        "peak_mib": peaks,
    }


def step(loss: Loss, inputs: LossInputs) -> DeviceCall:
    """A forward and a backward."""
    rows = inputs.hidden, inputs.weight, inputs.labels
    return DeviceCall(lambda turn: torch.autograd.grad(loss(*rows), inputs.wanted()))


def peak_mib(call: DeviceCall, inputs: LossInputs) -> float:
    """MiB over what was there before and the gradients that are returned."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call(0)
    torch.cuda.synchronize()
    returned = sum(x.nbytes for x in inputs.wanted())
    return round((torch.cuda.max_memory_allocated() - before - returned) / 2**20, 1)


if __name__ == "__main__":
    sys.exit(main())
