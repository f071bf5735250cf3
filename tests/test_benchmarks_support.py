"""The benchmark of `linear_support_log_odds`, without timing: its grid, kept counts and calls."""

from types import SimpleNamespace

import pytest
import torch

import bench_support
import fresh
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
        assert (
            set(cell["ms"])
            == {"fastadapt", "linear_log_odds"}
            == {"fastadapt", *cell["to_fastadapt"]}
        )
        assert cell["ids"] >= 6 >= cell["alone"]
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
