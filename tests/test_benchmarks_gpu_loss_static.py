"""What is counted and predicted of a linear head on a GPU, on a machine without one.

Under pytest Triton interprets kernels, so what is launched is recorded in a process of its own.
"""

import json
import math
import os
import subprocess
import sys

import pytest

import host
import limits
import report

pytest.importorskip("triton", minversion="3.6", reason="needs Triton 3.6, which is for Linux")

import gpu_loss_static  # noqa: E402  (these need triton)
from gpu_model import CONSTANTS, PRODUCTS  # noqa: E402
from no_gpu import Operator, Product, Size  # noqa: E402

TOLD = """
import json
from gpu_loss_static import PLANS, Cell, counted, counted_both_ways

cells = {}
for n, h in ((1300, 4096), (1300, 2048), (96, 4096)):
    for plan in PLANS:
        for within in (None, True, False):
            if plan != "frozen" or within is None:
                cells[f"{n} {h} {plan} {within}"] = counted(Cell(n, h, plan), 20_000, within)
print(json.dumps(cells))
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """Cells of 20,000 ids, three tiles."""
    folder = tmp_path_factory.mktemp("static")
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = str(host.ROOT / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])
    environment |= {"PYTHONPATH": os.pathsep.join(paths), "TRITON_CACHE_DIR": str(folder)}
    run = [sys.executable, "-P", "-c", TOLD]
    done = subprocess.run(run, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_products_and_launches_are_those_of_the_driver(told):
    """Three tiles and two blocks of rows; what the sums take, and the gradients."""
    tiles, blocks = 3, 2
    for h in (4096, 2048):
        for plan, logits, gradients in (
            ("3M", 1, 2),
            ("4M", 2, 2),
            ("forward", 1, 0),
        ):
            beside, within = (told[f"1300 {h} {plan} {x}"] for x in (False, True))
            assert beside["products"] == tiles * (blocks * logits + gradients)
            assert within["products"] == tiles * (blocks * (logits - 1) + gradients)
            assert beside["kernels"]["tile_sum_kernel"] == tiles * blocks
            assert within["kernels"]["product_sum_kernel"] == tiles
            assert within["kernels"]["add_parts_kernel"] == tiles
            assert "product_sum_kernel" not in beside["kernels"]
            assert within["in_products"] and not beside["in_products"]
            in_backward = {"3M": tiles, "4M": tiles * blocks, "forward": 0}[plan]
            for cell in (beside, within):
                assert cell["kernels"].get("tile_gradient_kernel", 0) == in_backward
                assert cell["launches"] == sum(cell["kernels"].values())
    frozen = told["1300 2048 frozen None"]
    assert frozen["products"] == tiles * (blocks + 1)
    assert frozen["kernels"]["tile_sum_kernel"] == tiles * blocks


def test_the_way_that_is_chosen_is_counted(told):
    """As in `CudaWork`: H < 4096, or few rows."""
    for n, h, within in ((1300, 4096, False), (1300, 2048, True), (96, 4096, True)):
        for plan in ("3M", "4M", "forward"):
            assert told[f"{n} {h} {plan} None"] == told[f"{n} {h} {plan} {within}"]


def test_times_are_sums_of_their_kinds(told):
    for name, cell in told.items():
        assert cell["ms"] == pytest.approx(sum(cell["ms_by_kind"].values()), abs=0.01), name
        assert cell["made_to_bare"] >= (0 if cell["in_products"] else 1)
    few, many = (told[f"{n} 4096 4M False"] for n in (96, 1300))
    assert few["ms"] < many["ms"] and few["to_bare"] > many["to_bare"]


def test_products_take_whole_waves():
    """512 blocks of 128 x 256 on 132 multiprocessors are four waves."""
    wave = PRODUCTS.ideal_us(128 * 132, 256, 8192)
    assert PRODUCTS.product_us(4096, 4096, 8192, 0) == pytest.approx(4 * wave)
    assert PRODUCTS.product_us(1, 1, 8192, 0) == pytest.approx(wave)
    assert PRODUCTS.product_us(256, 128 * 132, 8192, 0) == pytest.approx(wave)  # the other way
    assert PRODUCTS.product_us(4096, 4096, 8192, 4e12) == pytest.approx(1e6)
    assert PRODUCTS.ideal_us(4096, 128_256, 4096) == pytest.approx(6148, rel=1e-3)
    programs, block = 2 * CONSTANTS.multiprocessors, 128 * 128
    one = PRODUCTS.own_us(programs, programs, block, 4096, 0)
    assert one == pytest.approx(2 * programs * block * 4096 / 600e6)
    assert PRODUCTS.own_us(programs + 1, programs, block, 4096, 0) == pytest.approx(2 * one)
    # fewer programs than multiprocessors are no faster
    few = PRODUCTS.own_us(4, 4, block, 4096, 0)
    assert few == pytest.approx(PRODUCTS.own_us(132, 132, block, 4096, 0))


def test_bytes_of_launches():
    """What is given twice, as an argument that is not read, counts once; a row of a source each."""
    wide, half = Size((1024, 8192), 4, 1), Size((1024, 8192), 2, 2)
    moved = gpu_loss_static.moved_by
    assert moved("tile_sum_kernel", {"products": wide, "kept": wide, "exps": wide}) == wide.nbytes
    kept = {"products": wide, "kept": half, "exps": wide}
    assert moved("tile_sum_kernel", kept) == wide.nbytes + half.nbytes == 6 * math.prod(wide.shape)
    assert moved("tile_gradient_kernel", {"products": half, "out": wide}) == kept_bytes(half, wide)
    head = Size((128_256, 8192), 2, 3)
    mixed = moved("mix_kernel", {"sums": wide, "out": wide, "source": head})
    assert mixed == 2 * wide.nbytes + half.nbytes
    assert moved("mix_kernel", {"sums": wide, "out": half, "source": wide}) == kept_bytes(
        wide, half
    )
    assert moved("mix_kernel", {"sums": wide, "out": wide, "source": wide}) == 0


def kept_bytes(*sizes):
    return sum(size.nbytes for size in sizes)


def test_pieces_of_work():
    kind, us = gpu_loss_static.time_of(Product(1024, 8192, 4096, 2, 4, False))
    assert kind == "products" and us == PRODUCTS.product_us(1024, 8192, 4096, 0)
    kind, us = gpu_loss_static.time_of(Product(1024, 8192, 64, 2, 4, True))
    moved = (1024 + 8192) * 64 * 2 + 2 * 1024 * 8192 * 4
    assert us == PRODUCTS.moved_us(moved) > PRODUCTS.product_us(1024, 8192, 64, 0)
    assert gpu_loss_static.time_of(Operator("aten.view", 0)) == ("others", 0)


def test_the_record_is_of_this_script():
    """Of all cells, with the earlier counts beside; the page shows it, and what is not met."""
    record = json.loads((report.RESULTS / "gpu_loss_static.json").read_text(encoding="utf-8"))
    grid = list(gpu_loss_static.cells(gpu_loss_static.BENCHMARK.parse([])))
    assert [gpu_loss_static.key_of(cell) for cell in record["cells"]] == grid
    assert record["model"]["tflops"] == PRODUCTS.tflops
    for cell in record["cells"]:
        assert cell["to_bare"] == pytest.approx(cell["ms"] / cell["bare_ms"], rel=0.03)
        assert ("other" in cell) == (cell["plan"] != "frozen")
        assert cell["before"]["products"] >= cell["products"]
    table = report.TABLES["gpu_loss_static"](record)
    assert "| 4,096, 4,096, 3M | " in table and "No time was measured on a GPU." in table
    found = limits.gpu_loss_static_limits(record)
    assert [x.bound for x in found] == [1.08, 1.15, 1.3] * 2
    assert all(f"| {x.label} | {x.shown} | {x.demanded} | {x.met} |" in table for x in found)


def test_demands():
    """The worst cell of each, few rows apart from many."""
    cells = [
        {"n": n, "h": h, "plan": plan, "to_bare": figure}
        for n, h, plan, figure in (
            (512, 4096, "3M", 1.6),
            (4096, 4096, "3M", 1.07),
            (16_384, 4096, "3M", 1.05),
            (4096, 4096, "4M", 3.0),
            (4096, 4096, "frozen", 1.16),
            (4096, 2048, "3M", 1.2),
            (4096, 2048, "frozen", 1.31),
        )
    ]
    found = limits.gpu_loss_static_limits({"cells": cells})
    assert [x.figure for x in found] == [1.07, 1.16, 1.31, 1.6, None, None]
    assert [x.met for x in found] == ["yes", "no", "no", "no", "not measured", "not measured"]
    assert found[2].where == "N = 4,096, frozen"
