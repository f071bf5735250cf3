"""The benchmarks of supports, without timing: grids, kept counts, calls and tables."""

from types import SimpleNamespace

import pytest
import torch

import bench_kept
import bench_support
import fresh
import ratios
import report
import support_report
import train_supports
from fastadapt import reference
from fastadapt._ops import memory


def test_grid():
    grid = list(bench_support.cells(bench_support.BENCHMARK.parse([])))
    assert len(grid) == len(set(grid)) == 6 * 2 * 3
    assert {c.v for c in grid} == {49_152, 128_256, 262_144} and {c.h for c in grid} == {576, 2048}
    quick = list(bench_support.cells(bench_support.BENCHMARK.parse(["--quick"])))
    assert [c.head for c in quick] == ["frozen", "sparse"]


def test_kept_counts_are_those_of_the_field():
    support, labels = bench_support.kept_ids(8192, 5000, seed=1)
    counts = support.check(5000).counts.double()
    assert support.contains(labels).all() and not support.full.any()
    assert counts.median() == 2 and 6 < counts.mean() < 10
    assert 65 < counts.quantile(0.99) < 105
    assert 0.3 < (counts == 1).double().mean() < 0.5


@pytest.mark.parametrize("head", ("frozen", "dense", "sparse"))
def test_calls_compute_what_they_say(head):
    cell = bench_support.Cell(20, 16, 90, "float32", head)
    inputs = bench_support.make_inputs(cell, seed=3)
    ours = bench_support.call_of(bench_support.OURS, cell, inputs)(0)
    dense = bench_support.call_of(bench_support.DENSE, cell, inputs)(0)
    m = reference.linear_support_log_odds(*inputs[:4])
    plain = torch.autograd.grad(m, inputs.wanted, inputs.upstream)
    assert len(ours) == len(dense) == len(plain) == (1 if head == "frozen" else 2)
    assert ours[-1].is_sparse == (head == "sparse")
    for a, b, c in zip(ours, plain, dense, strict=True):
        torch.testing.assert_close(a.to_dense(), b, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(c, b)


def test_record(run_benchmark):
    words = ("--shapes", "6,16,300", "--rounds", 2, "--seconds", 0, "--no-memory")
    record = run_benchmark(bench_support, *words)
    assert len(record["cells"]) == 6 and record["notes"] == []
    for cell in record["cells"]:
        apart = {"sparse", "zeros"} if cell["head"] == "dense" else set()
        assert set(cell["ms"]) == {"fastadapt", "linear_log_odds"} | apart
        assert {*cell["to_fastadapt"]} == {"linear_log_odds"}
        assert cell["ids"] >= 6 >= cell["alone"] and ("to_sum" in cell) == bool(apart)
    page = report.TABLES_OF_SUPPORTS["support"](record)
    assert "| 6, 16, 300 | float32, dense |" in page and "at least 500 x" in page
    alone = run_benchmark(bench_support, *words, "--no-dense")
    assert {*alone["cells"][0]["ms"]} == {"fastadapt"}


@pytest.mark.skipif(
    not memory.is_measurable(), reason="this system does not tell the peak of a process"
)
def test_memory_is_of_the_rows_and_not_of_the_vocabulary(monkeypatch, preloaded):
    """Measured in new processes, but for their imports; the head is 51 MB, its logits 41 MB."""
    context = SimpleNamespace(get_context=lambda method: preloaded)
    monkeypatch.setattr(fresh, "multiprocessing", context)
    options = bench_support.BENCHMARK.parse(["--threads", "1"])
    for dtype, head in (("float32", "frozen"), ("float32", "sparse"), ("bfloat16", "dense")):
        cell = bench_support.Cell(64, 64, 200_000, dtype, head)
        (extra,) = fresh.in_fresh_process(bench_support.extra_mb, cell, "fastadapt", options)
        assert extra <= 4, (dtype, head, extra)


def test_record_of_draws_that_hand_over(run_benchmark):
    words = ("--vocab", 300, "--rows", "normal3", "--batch", 5, "--rounds", 2)
    record = run_benchmark(bench_kept, *words)
    assert len(record["cells"]) == 2 * len(bench_kept.OF_DRAWS)
    by_name = {c["adaptor"]: c for c in record["cells"] if c["dtype"] == "float32"}
    assert by_name["T"]["full"] == 1 and by_name["T"]["ids_a_row"] == 0
    assert by_name["greedy"]["ids_a_row"] == 1 < by_name["T+p"]["ids_a_row"]
    page = report.TABLES_OF_SUPPORTS["kept"](record)
    assert "| normal3, 300, float32 | T+p |" in page


def test_ratios_are_counted():
    log_ratios = torch.tensor([0.0, -0.2, 0.2, 5.0, -float("inf"), 0.009]).double()
    cell = ratios.summed(log_ratios)
    assert cell["tokens"] == 6 == sum(cell["counts"]) and cell["outside"] == 1
    assert cell["far"] == pytest.approx(4 / 6) and cell["largest_log"] == 5
    edges, counts = ratios.BINS, cell["counts"]
    middle = next(i for i, low in enumerate(edges) if low == 0.99)
    assert counts[middle] == 2 and counts[0] == 1 and counts[-1] == 1


def test_rewards():
    assert train_supports.reward_of("She sells sea shells so she says some songs.") == 8 / 9
    assert train_supports.reward_of("Sea sea SEA") == 1 / 8  # once, of at least eight
    assert train_supports.reward_of("") == 0


def test_runs_are_summed_by_seed(tmp_path):
    def run(support, seed, last):
        rewards = [0.1] * 5 + [0.2] * 5 + [last] * 10
        curves = dict.fromkeys(("ratio", "ratio_far", "entropy"), [None, *[1.0] * 19])
        return {"support": support, "seed": seed, "curves": {"reward": rewards, **curves}}

    runs = [run("replay", 1, 0.5), run("replay", 2, 0.7), run("off", 1, 0.4), run("off", 2, 0.6)]
    record = {"runs": runs, "host": {"commit": "0123456789abcdef"}}
    first, second = support_report.arms(record)
    # t of one degree of freedom, 12.706, times 0.1414 / sqrt 2
    assert first["after"] == "0.600 ± 1.271" and second["after"] == "0.500 ± 1.271"
    assert first["before"] == "0.100 ± 0.000" and first["ratio"] == "1.000 ± 0.000"
    assert support_report.difference(record) == "0.100 ± 0.000"
    support_report.draw_runs(record, tmp_path / "runs.png")
    cells = [
        {"dtype": dtype, "way": way, **ratios.summed(torch.zeros(9).double())}
        for dtype in ("float32", "bfloat16")
        for way in ratios.WAYS
    ]
    record = {"cells": cells, "settings": {"bins": ratios.BINS}, **record}
    support_report.draw_ratios(record, tmp_path / "ratios.png")
    assert all(p.read_bytes().count(b"0123456789abcdef") for p in tmp_path.iterdir())
