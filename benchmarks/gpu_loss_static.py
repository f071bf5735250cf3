r"""What `linear_log_odds` launches on a GPU, and how long that may take, on a machine without one.

    python benchmarks/gpu_loss_static.py --before benchmarks/results/gpu_loss_static_before.json \
        --out benchmarks/results/gpu_loss_static.json

A forward and a backward of the mean cross entropy, bfloat16, in every plan: launches of Triton,
products through cuBLAS, all calls of PyTorch. "3M" keeps all logits, "4M" none. From sm_90 on
logits can be summed inside a product of ours; a cell has the way that is chosen, and beside it what
the other would take. `--before` sets an earlier record beside it. Milliseconds are those of
`gpu_model.Products`, beside the bare products: nothing here was timed on a GPU. What
`bench_gpu_losses.py` once measured of the same plan stands beside them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch.utils._python_dispatch import _disable_current_modes

from fastadapt import linear_log_odds
from fastadapt._ops.linear.cuda import CudaWork
from fastadapt._ops.triton.linear import launch as launch_linear
from fastadapt._ops.triton.product import launch
from gpu_model import CONSTANTS, PRODUCTS
from harness import Axis, Benchmark, Option, progress
from host import ROOT
from no_gpu import Calls, Launch, Operator, Product, Size, recorded

TARGET = 90
VOCABULARY = 128_256
MEASURED, FROZEN = ROOT / "benchmarks" / "results" / "gpu_losses.json", "frozen head"
BESIDE = ("launches", "products", "aten_calls", "ms", "to_bare")  # what is shown of another cell
PLANS: dict[str, tuple[float, dict[str, Any]]] = {  # products of N H V, and what asks for them
    "3M": (3.0, {"memory_budget": 1 << 50}),
    "4M": (4.0, {"memory_budget": 0}),
    "frozen": (2.0, {}),
    "forward": (1.0, {}),
}
# Of each kernel the tensors that it reads or writes from end to end; those given twice count once.
MOVED = {
    "tile_sum_kernel": ("products", "kept", "exps"),
    "tile_gradient_kernel": ("products", "out"),
    "add_parts_kernel": ("parts",),
    "product_sum_kernel": ("weight", "hidden", "parts", "kept"),
}
BENCHMARK = Benchmark(
    "gpu_loss_static",
    __doc__,
    {
        "widths": Axis((4096, 2048, 896), [4096], kind=int, metavar="H"),
        "batches": Axis((512, 4096, 16_384), [512], kind=int, metavar="N"),
        "plans": Axis(tuple(PLANS)),
        "before": Option(help="an earlier record, to stand beside", kind=Path, metavar="FILE"),
    },
    ("triton",),
)


class Cell(NamedTuple):
    """One place of the grid."""

    n: int
    h: int
    plan: str


@BENCHMARK
def main(options: argparse.Namespace, record: dict[str, Any]) -> None:
    """Count every cell and predict it."""
    record["settings"] = {"vocabulary": VOCABULARY, "dtype": "bfloat16", "target": TARGET}
    record["model"] = PRODUCTS._asdict() | {"multiprocessors": CONSTANTS.multiprocessors}
    earlier = {}
    if options.before:
        before = json.loads(options.before.read_text(encoding="utf-8"))
        record["before"] = before["host"]["commit"]
        earlier = {key_of(cell): cell for cell in before["cells"]}
    measured = measured_ms()
    grid, record["cells"] = list(cells(options)), []
    with progress("counting", len(grid)) as step:
        for cell in grid:
            entry = {**cell._asdict(), **counted_both_ways(cell)}
            if cell in measured:
                entry["measured_ms"] = measured[cell]
            if cell in earlier:
                entry["before"] = {name: earlier[cell][name] for name in BESIDE}
            record["cells"].append(entry)
            step()


def measured_ms(path: Path = MEASURED) -> dict[Cell, list[float]]:
    """Medians of ours and of the bare products, of the earlier commit that was measured."""
    plans = {("ce", "grouped"): "3M", ("tokens", "recompute"): "4M", ("frozen", FROZEN): "frozen"}
    if not path.exists():
        return {}
    return {
        Cell(x["n"], x["h"], plans[x["task"], x["plan"]]): [
            round(x["ms"][who][1], 1) for who in ("fastadapt", "products")
        ]
        for x in json.loads(path.read_text(encoding="utf-8"))["cells"]
        if (x["task"], x["plan"]) in plans and x["v"] == VOCABULARY
    }


def key_of(cell: dict[str, Any]) -> Cell:
    """The place of a cell of a record."""
    return Cell(*(cell[name] for name in Cell._fields))


def cells(options: argparse.Namespace) -> Iterator[Cell]:
    """The grid."""
    axes = options.batches, options.widths, options.plans
    yield from itertools.starmap(Cell, itertools.product(*axes))


def counted_both_ways(cell: Cell) -> dict[str, Any]:
    """A cell, and beside it the way to sum that is not chosen, unless it is that of a frozen head.

    Its exponentials are read by a second product.
    """
    found = counted(cell)
    if cell.plan == "frozen":
        return found
    other = counted(cell, within=not found["in_products"])
    return {**found, "other": {name: other[name] for name in BESIDE}}


def counted(cell: Cell, v: int = VOCABULARY, within: bool | None = None) -> dict[str, Any]:
    """What a cell's call launches, and the times that are predicted of it.

    Args:
        cell: that is called.
        v: ids.
        within: whether logits are summed within a product of ours; None: as it is chosen.
    """
    with summed(within), recorded(TARGET) as calls, adding_ones():
        call(cell, v)
    kernels = calls.by_kernel()
    products = [x for x in calls.work if isinstance(x, Product)]
    by_kind = times(calls)
    made = sum(PRODUCTS.ideal_us(x.rows, x.columns, x.depth) for x in products)
    bare = PLANS[cell.plan][0] * PRODUCTS.ideal_us(cell.n, v, cell.h)
    total = sum(by_kind.values())
    return {
        "launches": len(calls.launches),
        "products": len(products),
        "aten_calls": calls.operators.total(),
        "kernels": kernels,
        "in_products": "product_sum_kernel" in kernels,
        "ms": round(total / 1e3, 2),
        "bare_ms": round(bare / 1e3, 2),
        "to_bare": round(total / bare, 3),
        "ms_by_kind": {kind: round(us / 1e3, 3) for kind, us in by_kind.items()},
        "made_to_bare": round(made / bare, 3),
    }


def call(cell: Cell, v: int) -> None:
    """A forward, and a backward where there is one."""
    needs = cell.plan != "forward"
    hidden, weight = (torch.empty(size, cell.h, dtype=torch.bfloat16) for size in (cell.n, v))
    hidden.requires_grad_(needs)
    weight.requires_grad_(needs and cell.plan != "frozen")
    labels = torch.zeros(cell.n, dtype=torch.int64)
    log_odds = linear_log_odds(hidden, weight, labels, **PLANS[cell.plan][1])
    loss = -torch.nn.functional.logsigmoid(log_odds).mean()
    if needs:
        torch.autograd.grad(loss, [x for x in (hidden, weight) if x.requires_grad])


@contextmanager
def summed(within: bool | None) -> Iterator[None]:
    """Sums logits in one way, on as many multiprocessors as the model has."""
    many = mock.patch.object(launch, "_multiprocessors", lambda x: CONSTANTS.multiprocessors)
    with many:
        if within is None:
            yield
            return
        with mock.patch.object(CudaWork, "_sums_in_products", within):
            yield


@contextmanager
def adding_ones() -> Iterator[None]:
    """Rows get a mass, as no kernel gives them one: without, they would have no gradient."""

    def with_ones(function: Callable[..., None], place: int) -> Callable[..., None]:
        def run(*given: Any, **options: Any) -> None:
            function(*given, **options)
            with _disable_current_modes():
                given[place].fill_(1.0)

        return run

    sums, in_products = launch_linear.sum_tile, launch.add_sums
    with (
        mock.patch.object(launch_linear, "sum_tile", with_ones(sums, 1)),
        mock.patch.object(launch, "add_sums", with_ones(in_products, 2)),
    ):
        yield


def times(calls: Calls) -> dict[str, float]:
    """Microseconds of products, of the work on their rows, of the rest and of launching it all."""
    found = dict.fromkeys(("products", "sums in products", "rows", "others", "launches"), 0.0)
    for work in calls.work:
        kind, us = time_of(work)
        found[kind] += us
        found["launches"] += PRODUCTS.launch_us if us else 0.0
    return found


def time_of(work: Launch | Product | Operator) -> tuple[str, float]:
    """What a piece of work belongs to, and its microseconds beside its launch; 0 of a view."""
    if isinstance(work, Operator):
        return "others", PRODUCTS.moved_us(work.written)
    if isinstance(work, Product):
        rows, columns, depth, itemsize, written, adds = work
        moved = (rows + columns) * depth * itemsize + rows * columns * written * (1 + adds)
        return "products", PRODUCTS.product_us(rows, columns, depth, moved)
    kernel, sizes = work.source.kernel, work.sizes
    moved = moved_by(kernel, sizes)
    if kernel != "product_sum_kernel":
        return "rows" if kernel.startswith("tile") else "others", PRODUCTS.moved_us(moved)
    (n, depth), width = sizes["hidden"].shape, sizes["weight"].shape[0]
    blocks = triton.cdiv(n, launch.ROWS) * triton.cdiv(width, launch.IDS)
    block = launch.ROWS * launch.IDS
    return "sums in products", PRODUCTS.own_us(blocks, work.grid[0], block, depth, moved)


def moved_by(kernel: str, sizes: dict[str, Size]) -> int:
    """The bytes that a launch reads and writes."""
    if kernel == "mix_kernel":
        sums, out, source = (sizes[name] for name in ("sums", "out", "source"))
        added = math.prod(sums.shape) * source.itemsize if source.address != sums.address else 0
        if out.address == sums.address and not added:
            return 0  # rows that are shrunk in place: of most the factor is 1, and they stay
        return sums.nbytes + out.nbytes + added
    if kernel == "dot_kernel":
        return 2 * sizes["a"].nbytes
    given = {sizes[name].address: sizes[name] for name in MOVED.get(kernel, ("labels",))}
    return sum(size.nbytes for size in given.values())


if __name__ == "__main__":
    sys.exit(main())
