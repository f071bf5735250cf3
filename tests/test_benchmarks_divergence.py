"""The benchmark of `linear_divergence`, without timing: its grid, calls, products, report."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import bench_divergence
import fresh
import limits
import report
from fastadapt._ops import memory
from fastadapt.losses.divergence import plan_of


@pytest.fixture
def record(run_benchmark):
    """A result of tiny cells, timed a few times, without memory."""
    words = ("--shapes", "6,16,3000", "2,16,50", "--rounds", 2, "--seconds", 0, "--no-memory")
    return run_benchmark(bench_divergence, *words)


def test_grid():
    grid = list(bench_divergence.cells(bench_divergence.BENCHMARK.parse([])))
    assert len(grid) == len(set(grid)) == 2 * 2 * 3 * 2
    assert {c[:3] for c in grid} == {(256, 576, 49_152), (256, 896, 32_768)}
    quick = list(bench_divergence.cells(bench_divergence.BENCHMARK.parse(["--quick"])))
    assert [c[3:] for c in quick] == [("bfloat16", "kl", "trainable")]


@pytest.mark.parametrize("head", ("trainable", "frozen"))
@pytest.mark.parametrize("kind", bench_divergence.KINDS)
def test_calls_compute_the_same(kind, head):
    cell = bench_divergence.Cell(5, 16, 3000, "float32", kind, head)
    inputs = bench_divergence.make_inputs(cell, seed=3)
    assert not torch.equal(inputs.hidden, inputs.teacher_hidden)
    assert inputs.weight.requires_grad == (head == "trainable")
    ours, plain = (
        bench_divergence.call_of(name, cell, inputs)(0)
        for name in (bench_divergence.OURS, bench_divergence.PLAIN)
    )
    assert len(ours) == len(plain) == (2 if head == "trainable" else 1)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("head", ("trainable", "frozen"))
def test_products_are_those_of_the_plan(head):
    cell = bench_divergence.Cell(5, 16, 5000, "float32", "kl", head)
    inputs = bench_divergence.make_inputs(cell, seed=3)
    with FlopCounterMode(display=False) as flops:
        bench_divergence.call_of(bench_divergence.BOUND, cell, inputs)(0)
    expected = plan_of(*inputs[:3]).products * 2 * 5 * 16 * 5000
    assert flops.get_total_flops() == pytest.approx(expected)


@pytest.mark.skipif(
    not memory.is_measurable(), reason="this system does not tell the peak of a process"
)
def test_peaks_are_those_of_the_plan(monkeypatch, preloaded):
    """Measured in new processes, but for their imports: within 5 % and 2 MB of the allocator's."""
    context = SimpleNamespace(get_context=lambda method: preloaded)
    monkeypatch.setattr(fresh, "multiprocessing", context)
    options = bench_divergence.BENCHMARK.parse(["--threads", "1"])
    for kind, head in (("kl", "trainable"), ("jsd", "frozen")):
        cell = bench_divergence.Cell(256, 64, 40_000, "float32", kind, head)
        (extra,) = fresh.in_fresh_process(bench_divergence.extra_mb, cell, "fastadapt", options)
        peak = plan_of(*bench_divergence.make_inputs(cell, 0)[:3], kind=kind).peak_bytes / 1e6
        assert 0.8 * peak <= extra <= 1.05 * peak + 2, (kind, extra, peak)


def test_report(record):
    assert len(record["cells"]) == 2 * 2 * 3 * 2 and record["notes"] == []
    for cell in record["cells"]:
        assert set(cell["ms"]) == {"fastadapt", "products", "plain"}
        assert cell["products"] == (6 if cell["head"] == "trainable" else 5)
    record["cells"][0]["memory_mb"] = {"fastadapt": 1234.5, "plain": 2.0}
    table = report.TABLES["divergence"](record)
    assert "| 6, 16, 3,000, float32, kl, trainable | " in table and " (1,234) | " in table
    for limit in limits.divergence_limits(record):
        assert f"| {limit.label} | {limit.shown} | at most 1.15 x | {limit.met} |" in table
    nothing = limits.divergence_limits({"cells": []})
    assert {x.met for x in nothing} == {"not measured"} and len(nothing) == 2


def test_the_page_says_what_is_not_measured(monkeypatch, tmp_path, record):
    """And has the table where the result is there."""
    monkeypatch.setattr(report, "PAGES", {"page": {"divergence": report.TABLES["divergence"]}})
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    page = "<!-- divergence -->\n<!-- /divergence -->"
    expected = "<!-- divergence -->\nNot yet measured.\n<!-- /divergence -->"
    assert report.render(page, "page") == expected
    record["host"] |= {"dirty": False, "commit": "0" * 40}
    (tmp_path / "divergence.json").write_text(json.dumps(record), encoding="utf-8")
    made = report.render(expected, "page")
    assert "| 6, 16, 3,000, float32, kl, trainable | " in made and "Not yet" not in made
    assert report.render(made, "page") == made
