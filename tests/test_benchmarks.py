"""What the benchmarks have in common, without timing: options, turns, records, processes, rows."""

import gc
import itertools
import json
import multiprocessing
import os
from pathlib import Path

import pytest
import torch

import bench_gpu_sampling
import bench_losses
import bench_sampling
import bench_score
import cases
import fresh
import host
import limits
import report
import timing

ROOT = Path(__file__).resolve().parents[1]


GPU_TIES = ("flat", "levels")


def test_filters_keep_the_order_of_the_grid():
    filters = ("--rows", "real", "flat", "--adaptors", "eta", "T", "--vocab", "9", "--peers")
    options = bench_sampling.BENCHMARK.parse(filters)
    assert (options.rows, options.adaptors) == (["flat", "real"], ["T", "eta"])
    assert (options.vocab, options.peers, options.batch) == ([9], [], [1, 8, 64])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "1"], "rounds: expected at least 2, got 1"),
        (["--peer-rounds", "0"], "peer_rounds: expected at least 2, got 0"),
        (["--vocab", "0"], "vocab: expected at least 1, got 0"),
        (["--rows", "wide"], "invalid choice: 'wide'"),
    ],
)
@pytest.mark.parametrize("module", [bench_sampling, bench_score])
def test_bad_arguments_are_refused(module, arguments, message, capsys):
    with pytest.raises(SystemExit):
        module.BENCHMARK.parse(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("kind", sorted({*cases.ROWS, *cases.GPU_ROWS} - {"real"}))
def test_rows(kind):
    sets = cases.make_rows(kind, 1000, 3, seed=5)
    again = cases.make_rows(kind, 1000, 3, seed=5)
    assert len(sets) == cases.SETS and len({rows.data_ptr() for rows in sets}) == cases.SETS
    for rows, same in zip(sets, again, strict=True):
        assert rows.shape == (3, 1000) and rows.dtype == torch.float32 and rows.is_contiguous()
        assert torch.equal(rows, same)
    levels = sets[0].unique().numel()
    assert levels == {"flat": 1, "levels": 2}.get(kind, levels) and (levels > 2 or kind in GPU_TIES)
    assert torch.equal(sets[0], sets[1]) == (kind == "flat")
    exact = torch.equal(sets[0].bfloat16().float(), sets[0])
    assert exact == (kind in ("ties", *GPU_TIES))


def test_large_rows_are_one_set():
    assert len(cases.make_rows("flat", 1 << 20, 4, seed=0)) == 1


def test_real_rows_of_any_width():
    real = torch.randn(20, 1001, generator=torch.Generator().manual_seed(1)) * 4
    for rows in cases.make_rows("real", 400, 6, seed=2, real=real):
        assert all((real[:, :400] == row).all(-1).any() for row in rows)
    for rows in cases.make_rows("real", 5000, 6, seed=2, real=real):
        assert rows.shape == (6, 5000)
        for row in rows:
            (source,) = (real == row[:1001]).all(-1).nonzero()[0]
            tail = real[source].sort().values[:500]
            assert torch.isin(row[1001:], tail).all()
    with pytest.raises(ValueError, match="expected the model's logits, got None"):
        cases.make_rows("real", 10, 1, seed=0)


def test_timer_gets_the_numbers_of_a_slice():
    seen = []
    took = timing.in_turns(
        {"a": lambda turn: None},
        rounds=2,
        slice_s=0.0,
        timer=lambda call, turns: seen.append(turns) or 3.0,
    )
    assert took == {"a": [3.0, 3.0]} and seen == [range(0, 1), range(1, 2)]


def test_calls_take_turns():
    seen = []
    calls = {name: lambda turn, name=name: seen.append((name, turn)) for name in "abc"}
    took = timing.in_turns(calls, rounds=4, slice_s=0.0)
    assert seen[3:] == [  # one call of each warms up
        *[("a", 0), ("b", 0), ("c", 0), ("b", 1), ("c", 1), ("a", 1)],
        *[("c", 2), ("a", 2), ("b", 2), ("a", 3), ("b", 3), ("c", 3)],
    ]
    assert {name: len(seconds) for name, seconds in took.items()} == {"a": 4, "b": 4, "c": 4}
    assert gc.isenabled()


def test_budget_ends_the_rounds_and_slices_repeat():
    calls = {"a": lambda turn: None}
    assert len(timing.in_turns(calls, rounds=50, budget_s=0.0)["a"]) == 5
    assert len(timing.in_turns(calls, rounds=3, budget_s=0.0)["a"]) == 3
    turns = []
    timing.in_turns({"a": turns.append}, rounds=2, slice_s=1e-3)
    assert len(turns) > 3 + 2 * 10


def test_garbage_collector_is_restored_after_an_error():
    def fail(turn):
        if turn > 2:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        timing.in_turns({"a": fail}, rounds=9, slice_s=0.0)
    assert gc.isenabled()


def test_quartiles():
    assert timing.quartiles([4.0, 1.0, 3.0, 2.0, 5.0]) == [2.0, 3.0, 4.0]
    took = {"a": [2.0, 9.0, 8.0], "b": [1.0, 3.0, 2.0]}
    assert timing.ratios(took, "b", ("a", "c")) == {"a": [2.5, 3.0, 3.5]}


@pytest.mark.parametrize(
    ("cpuinfo", "name"),
    [
        (
            "processor\t: 0\ncpu family\t: 26\nmodel\t\t: 2\nmodel name\t: AMD EPYC\n\n"
            "processor\t: 1\ncpu family\t: 25\nmodel\t\t: 1\nmodel name\t: other\n",
            "AMD EPYC (family 26, model 2)",
        ),
        ("processor\t: 0\nmodel name\t: some: core\n", "some: core"),
    ],
)
def test_results_name_the_processor(cpuinfo, name, monkeypatch):
    """A cloud's "AMD EPYC" is several generations; the family tells Zen 3 from Zen 5."""
    monkeypatch.setattr(host.Path, "read_text", lambda path, encoding: cpuinfo)
    assert host._cpu_name() == name


def test_record_is_json_with_a_line_per_cell(tmp_path):
    record = {"host": {"cpu": "x"}, "notes": [], "call_us": [1.0, 2.0], "cells": [{"a": 1}] * 3}
    host.write_record(tmp_path / "new" / "r.json", record)
    text = (tmp_path / "new" / "r.json").read_text()
    assert json.loads(text) == record and len(text.splitlines()) == 2 + 3 + 5


def test_bounds_are_inclusive():
    assert limits.Limit("", 1.2, 1.2).met == "yes" and limits.Limit("", 1.21, 1.2).met == "no"
    assert limits.Limit("", 50, 50, at_least=True).met == "yes"
    assert limits.Limit("", 49.9, 50, at_least=True).met == "no"


def test_figure_of_the_readme_is_of_its_result():
    shown = report.FIGURE.name in (ROOT / "README.md").read_text(encoding="utf-8")
    assert shown == report.FIGURE.exists()
    assert not shown or report.figure_is_current()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "3,4"], "invalid shape_of value: '3,4'"),
        (["--shapes", "3,0,5"], "invalid shape_of value: '3,0,5'"),
        (["--heads", "none"], "invalid choice: 'none'"),
    ],
)
def test_bad_arguments_of_losses_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        bench_losses.BENCHMARK.parse(arguments)
    assert message in capsys.readouterr().err


def test_fresh_process_yields_items_and_errors():
    assert list(fresh.in_fresh_process(range, 3)) == [0, 1, 2]
    with pytest.raises(RuntimeError, match=r"range, in its process:(.|\n)*TypeError: 'str' object"):
        list(fresh.in_fresh_process(range, "a"))
    endless = fresh.in_fresh_process(itertools.count, 5)
    assert next(endless) == 5
    endless.close()
    assert multiprocessing.active_children() == []
    with pytest.raises(RuntimeError, match="_exit: its process ended with exit code 3"):
        list(fresh.in_fresh_process(os._exit, 3))


def test_gpu_benchmark_needs_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        bench_gpu_sampling.BENCHMARK.parse([])
    assert "no CUDA device" in capsys.readouterr().err
    assert host.gpu_record() is None
