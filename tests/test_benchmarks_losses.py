"""The benchmarks of `linear_log_odds`, without timing: inputs, peers, memory, what is reported."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import bench_gpu_losses
import bench_losses
import cases
import fresh
import limits
import loss_peers
import peers
import report
from fastadapt import linear_log_odds
from fastadapt._ops import memory

needs_peak = pytest.mark.skipif(
    not memory.is_measurable(), reason="this system does not tell the peak of a process"
)


TINY_PAIRS = ("--heads", "8,50", "--batch", "16", "--tokens", "4")
TINY = ("--shapes", "6,16,300", "2,16,50", "--rounds", 2, "--seconds", 0)


@pytest.fixture
def losses_record(run_benchmark):
    """A result of tiny cells, timed a few times, without memory."""
    return run_benchmark(bench_losses, *TINY, "--peers", "plain", "--no-memory")


def test_grid_of_losses():
    options = bench_losses.BENCHMARK.parse([])
    grid = list(bench_losses.cells(options))
    assert len(grid) == len(set(grid)) == 5 * 2 * 2
    assert set(limits.LOSS_SHAPES) < set(bench_losses.SHAPES) and options.memory
    with_all = {c[:3] for c in grid if len(bench_losses.peers_of(c, options.peers)) > 1}
    assert with_all == {(1024, 576, 49_152), (1024, 896, 32_768)}
    assert all("plain" in bench_losses.peers_of(c, options.peers) for c in grid)
    quick = bench_losses.BENCHMARK.parse(["--quick", "--peers", "--dtypes", "float32"])
    assert quick.peers == []
    assert {c[:4] for c in bench_losses.cells(quick)} == {(*limits.LOSS_SHAPES[1], "float32")}


@pytest.mark.parametrize("name", ["plain", "torch", "trl", "liger"])
@pytest.mark.parametrize("head", ("trainable", "frozen"))
def test_loss_peers_compute_what_we_do(name, head):
    cell = bench_losses.Cell(5, 16, 70, "float32", head)
    inputs = cell.make_inputs(seed=3)
    try:
        peer = loss_peers.LOSS_PEERS[name]()
    except peers.MissingPeer as missing:
        pytest.skip(str(missing))
    ours = -torch.nn.functional.softplus(-linear_log_odds(*inputs[:3]))
    theirs = peer(*inputs[:3])
    assert theirs.shape == (5,)
    torch.testing.assert_close(theirs, ours, atol=2e-6, rtol=2e-6)
    for one, other in zip(
        *(torch.autograd.grad(x, inputs.wanted(), inputs.upstream) for x in (ours, theirs)),
        strict=True,
    ):
        torch.testing.assert_close(one, other, atol=2e-6, rtol=2e-5)
    assert len(inputs.wanted()) == (2 if head == "trainable" else 1)


@pytest.mark.parametrize("package", ["trl", "liger_kernel"])
def test_missing_loss_peers_say_why(package, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    name = package.partition("_")[0]
    notes = []
    assert bench_losses.installed(["plain", name], notes) == ["plain"]
    assert len(notes) == 1 and "with its chunked log-probabilities" in notes[0]


def test_torch_without_the_function_is_a_missing_peer(monkeypatch):
    monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy", raising=False)
    with pytest.raises(peers.MissingPeer, match="has no linear_cross_entropy"):
        loss_peers.torch_own()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_errors_are_measured_from_the_truth(dtype):
    cell = bench_losses.Cell(30, 64, 9000, dtype, "frozen")
    inputs = cell.make_inputs(seed=1)
    hidden, weight, labels, upstream, _ = inputs
    assert hidden.dtype == weight.dtype == cases.DTYPES[dtype] and hidden.requires_grad
    assert upstream.min() < 0 < upstream.max()
    truth = bench_losses.true_log_odds(hidden.detach(), weight, labels)
    logits = hidden.detach().double() @ weight.double().t()
    p = logits.softmax(-1).gather(-1, labels[:, None])[:, 0]
    torch.testing.assert_close(truth, torch.logit(p))
    errors = bench_losses.rms_errors(inputs)
    ours = linear_log_odds(hidden, weight, labels).detach()
    expected = (ours.double() - truth).square().mean().sqrt().item()
    assert errors["fastadapt"] == pytest.approx(expected, rel=0.05, abs=1e-7)
    if dtype == "bfloat16":
        assert errors["fastadapt"] < 0.2 * errors["plain"]


def test_plan_of_a_cell():
    trainable = bench_losses.Cell(1024, 896, 32_768, "bfloat16", "trainable")
    tile, rows = 1024 * 2048 * 2, 1024 * 896 * 4
    assert bench_losses.plan_bytes(trainable) == rows + tile + 1024 * 32_768 * 2
    assert bench_losses.plan_bytes(trainable._replace(head="frozen")) == rows + tile
    wide = trainable._replace(dtype="float32", n=4096)  # kept are 384 MiB, in whole tiles
    assert bench_losses.plan_bytes(wide) == 8 * tile + (384 << 20)


def test_bare_products_are_those_of_full_logits():
    hidden, weight = torch.randn(5, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    labels = torch.zeros(5, dtype=torch.int64)
    with FlopCounterMode(display=False) as flops:
        out = bench_losses.CALLS[bench_losses.BOUND]()(hidden, weight, labels)
        dhidden, dweight = torch.autograd.grad(out.sum(), (hidden, weight))
    assert flops.get_total_flops() == 3 * 2 * 5 * 4 * 7
    assert (dhidden.shape, dweight.shape) == (hidden.shape, weight.shape)
    with FlopCounterMode(display=False) as flops:
        out = bench_losses.CALLS[bench_losses.BOUND]()(hidden, weight.detach(), labels)
        torch.autograd.grad(out.sum(), hidden)
    assert flops.get_total_flops() == 2 * 2 * 5 * 4 * 7


@needs_peak
def test_memory_is_measured_in_its_own_process(monkeypatch, preloaded):
    # new processes, but for their imports
    context = SimpleNamespace(get_context=lambda method: preloaded)
    monkeypatch.setattr(fresh, "multiprocessing", context)
    options = bench_losses.BENCHMARK.parse([])
    cell = bench_losses.Cell(256, 64, 20_000, "float32", "frozen")
    (plain,) = fresh.in_fresh_process(bench_losses.extra_mb, cell, "plain", options)
    (ours,) = fresh.in_fresh_process(bench_losses.extra_mb, cell, "fastadapt", options)
    logits = 4 * 256 * 20_000 / 1e6
    assert 2 * logits < plain < 6 * logits
    assert 0 <= ours < 0.4 * logits


def test_losses_result_and_table(losses_record):
    assert len(losses_record["cells"]) == 2 * 2 * 2
    for cell in losses_record["cells"]:
        ours = {"fastadapt", "candidates", "set"}
        assert set(cell["ms"]) == {*ours, "products", "plain"} and "memory_mb" not in cell
        assert len(cell["to_products"]) == 3 and "plan_mb" in cell
        for times in cell["ms"].values():
            assert set(times) == {"forward", "backward", "both"}
    table = report.TABLES["losses"](losses_record)
    assert "| 6, 16, 300, float32, trainable |" in table and "not measured" in table
    cell = losses_record["cells"][0]
    cell["memory_mb"] = {"fastadapt": 3.2, "nothing kept": 2.2, "plain": 99.6}
    cell["plan_mb"], cell["to_products"] = 4.4, [0, 1.06, 2]
    for name, both in (("fastadapt", 1234.0), ("products", 5.0), ("plain", 7.0)):
        cell["ms"][name]["both"] = [0, both, 0]
    row = "| 6, 16, 300, float32, trainable | 1,234 (3) | 7 (100) | 5 | 1.06 x | (2) | (4) |"
    assert row in report.TABLES["losses"](losses_record)


def _loss_cell(shape, dtype, head, to_plain, to_products, peaks=None, **peers_of_it):
    """`peaks` are those of ours, with nothing kept, of the plan and of plain PyTorch."""
    n, h, v = shape
    cell = {"n": n, "h": h, "v": v, "dtype": dtype, "head": head}
    cell["to_fastadapt"] = {
        name: [0, ratio, 9] for name, ratio in {"plain": to_plain, **peers_of_it}.items()
    }
    cell["to_products"] = [0, to_products, 9]
    cell["rms_error"] = {"fastadapt": 1e-4, "plain": 4e-4 if head == "frozen" else 1e-3}
    if peaks:
        own, lean, cell["plan_mb"], plain = peaks
        cell["memory_mb"] = {"fastadapt": own, "nothing kept": lean, "plain": plain}
    return cell


def test_losses_limits_are_computed():
    (first, second), wide = limits.LOSS_SHAPES, (100, 8, 250_000)
    cells = [
        _loss_cell(first, "bfloat16", "trainable", 1.7, 2.0, candidates=1.04),
        _loss_cell(second, "bfloat16", "trainable", 1.5, 2.0, trl=2.4),
        _loss_cell(second, "bfloat16", "frozen", 1.5, 2.0),
        _loss_cell(second, "float32", "trainable", 0.9, 1.05),
        _loss_cell(wide, "bfloat16", "trainable", 1.0, 1.1, (30, 4, 25, 60)),
        _loss_cell(wide, "float32", "frozen", 1.1, 1.09, (6, 6, 6, 60)),
    ]
    found = limits.losses_limits({"cells": cells})
    figures = [x.figure and round(x.figure, 6) for x in found]
    assert figures == [1.5, 1.5, 2.4, 0.9, 1.1, 1.09, 1.2, 0.5, 0.5, 1.04, None, 6.0, 0.25]
    assert [x.met for x in found] == [
        *("yes", "no", "no", "no", "no", "no", "no", "yes", "no"),
        *("yes", "not measured", "no", "no"),
    ]
    assert found[11].where == "N = 100, H = 8, V = 250,000, float32, frozen head"
    nothing = limits.losses_limits({"cells": []})
    assert {x.met for x in nothing} == {"not measured"} and len(nothing) == len(found)


@pytest.fixture
def gpu_losses_record(run_benchmark):
    """A result of tiny cells timed by the clock of the CPU, with a made-up device."""
    return run_benchmark(bench_gpu_losses, *TINY_PAIRS, "--peers", "plain", as_on_a_gpu=True)


def test_gpu_losses_on_the_cpu(gpu_losses_record):
    found = {c["task"]: c for c in gpu_losses_record["cells"]}
    assert list(found) == list(bench_gpu_losses.TASKS) and gpu_losses_record["notes"] == []
    plans = {name: cell["plan"] for name, cell in found.items()}
    assert plans == {
        **dict.fromkeys(("ce", "dpo", "dpo+exmate"), "grouped"),
        **{"tokens": "recompute", "frozen": "frozen head"},
    }
    for name, cell in found.items():
        lean = {"nothing kept"} if cell["plan"] == "grouped" else set()
        lean |= {"linear_mle_loss"} if name == "ce" else set()
        assert set(cell["ms"]) == {"fastadapt", "products", "plain"} | lean
        assert set(cell["to_fastadapt"]) == {"plain"} and cell["peak_mib"] == {}
        assert cell["products"] == bench_gpu_losses.TASKS[name].products


@pytest.mark.parametrize("task", bench_gpu_losses.TASKS)
def test_gpu_losses_are_those_of_the_peers(task):
    """What is timed as the same task has the same gradients."""
    words = ["--device", "cpu", *TINY_PAIRS, "--peers", "plain"]
    options = bench_gpu_losses.BENCHMARK.parse(words)
    cell = bench_gpu_losses.Cell(8, 50, 16, task)
    inputs = bench_gpu_losses.make_inputs(cell, options)
    inputs = inputs._replace(
        hidden=inputs.hidden.detach().double().requires_grad_(),
        weight=inputs.weight.detach().double().requires_grad_(task != "frozen"),
        upstream=inputs.upstream.double(),
        reference=inputs.reference.double(),
    )
    made = bench_gpu_losses.losses(cell, inputs, options)
    found = [
        bench_gpu_losses.step(loss, inputs)(0) for name, loss in made.items() if name != "plain"
    ]
    rows = inputs.hidden, inputs.weight, inputs.labels
    logps = torch.nn.functional.linear(*rows[:2]).log_softmax(-1).gather(-1, rows[2][:, None])
    loss = bench_gpu_losses.loss_of(task, logps[:, 0], inputs, options.tokens)
    wanted = torch.autograd.grad(loss, inputs.wanted())
    for got in found:
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_gpu_losses_that_fail_or_have_no_time_are_noted(monkeypatch, run_benchmark):
    words = (*TINY_PAIRS, "--tasks", "tokens", "--peers", "cce")
    record = run_benchmark(bench_gpu_losses, *words, "--minutes", 0, as_on_a_gpu=True)
    assert record["cells"] == [] and record["notes"] == ["1 of 1 cells left out for want of time"]
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", ModuleType("cut_cross_entropy"))
    record = run_benchmark(bench_gpu_losses, *words, as_on_a_gpu=True)
    assert len(record["cells"]) == 1 and record["notes"][0].startswith("cut-cross-entropy: ")
    with pytest.raises(SystemExit, match="expected pairs of sequences of 500 tokens, got 4096"):
        bench_gpu_losses.main(["--device", "cpu", "--batch", "4096", "--tokens", "500"])


def _gpu_losses_cell(n, task, ms, peaks, products=10.0):
    return {
        **{"h": 4096, "v": 128_256, "n": n, "task": task, "plan": "grouped", "peak_mib": peaks},
        "ms": {name: [0, value, 0] for name, value in (ms | {"products": products}).items()},
        "to_products": [0, ms["fastadapt"] / products, 0],
    }


def test_gpu_losses_limits_are_computed():
    kept = {"fastadapt": 1000.0, "nothing kept": 100.0}
    record = {
        "cells": [
            _gpu_losses_cell(
                4096, "ce", {"fastadapt": 11.0, "nothing kept": 14.0, "trl": 28.0, "cce": 21.0},
                {**kept, "trl": 2000.0, "cce": 10.0},
            ),
            _gpu_losses_cell(
                4096, "dpo", {"fastadapt": 12.0, "nothing kept": 16.0, "trl": 12.0},
                {**kept, "trl": 500.0},
            ),
            _gpu_losses_cell(4096, "tokens", {"fastadapt": 13.0}, {"fastadapt": 256.0}),
            _gpu_losses_cell(16_384, "tokens", {"fastadapt": 78.0}, {"fastadapt": 512.0}),
        ]
    }  # fmt: skip
    found = limits.gpu_losses_limits(record)
    figures = [x.figure and round(x.figure, 6) for x in found]
    # trl: DPO without logits kept; CCE: CE without, at ten times its peak
    assert figures == [1.1, 1.3, 0.25, None, None, 1.5, 2.0, None, None, 0.75, 0.5, *[None] * 6,
                       1.5, 10.0]  # fmt: skip
    assert [x.met for x in found if x.figure] == [
        *("yes", "no", "yes", "no", "yes"), *("no", "yes"), *("yes", "no"),
    ]  # fmt: skip
    nothing = limits.gpu_losses_limits({"cells": []})
    assert {x.met for x in nothing} == {"not measured"} and len(nothing) == len(found)


def test_gpu_losses_table(gpu_losses_record, tmp_path, monkeypatch):
    cell = gpu_losses_record["cells"][0]
    cell["ms"]["plain"], cell["peak_mib"] = [1.0, 2.25, 3.0], {"plain": 1234.5}
    table = report.TABLES["gpu_losses"](gpu_losses_record)
    for limit in limits.gpu_losses_limits(gpu_losses_record):
        assert f"| {limit.label} | {limit.shown} | {limit.demanded} | {limit.met} |" in table
    assert "| 16, 8, 50, ce, grouped | " in table and " | 2.2 (1,234) | - | - | - |" in table
    assert "\nSome GPU, driver 1.2, CUDA 13.0, up to 2 rounds" in table
    monkeypatch.setattr(report, "RESULTS", tmp_path / "none")
    block = "<!-- gpu_losses -->\n<!-- /gpu_losses -->\n"
    assert report.render(block).splitlines()[1:-1] == ["Not yet measured on a GPU."]
    gpu_losses_record["host"]["gpu"] = None
    with pytest.raises(ValueError, match="expected a result of a GPU"):
        report.TABLES["gpu_losses"](gpu_losses_record)
