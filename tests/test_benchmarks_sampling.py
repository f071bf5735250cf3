"""The benchmarks of `sample` and `score`, without timing: grid, peers, limits, what is reported."""

import importlib.util
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import bench_edits
import bench_filters
import bench_history
import bench_sampling
import bench_score
import bench_sharded
import bench_verify
import cases
import fastadapt
import host
import limits
import peers
import real_rows
import report
from fastadapt import Adaptor, filter_logits, score
from fastadapt.study.tradeoff.grids import paper_grid
from fastadapt.training.pretrained import ModelNotFoundError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def sampling_record(monkeypatch, run_benchmark):
    """A result of a few tiny cells, every call timed once or twice."""
    monkeypatch.setattr(bench_sampling, "LARGE_BATCH_VOCABULARY", 70)
    small = ("--vocab", 64, 70, "--batch", 2, 8, "--rows", "normal3", "flat", "--adaptors", "T+p")
    rest = ("--peers", "stock", "--rounds", 2, "--peer-rounds", 2)
    return run_benchmark(bench_sampling, *small, "T", *rest)


def test_grid_is_complete():
    options = bench_sampling.BENCHMARK.parse([])
    grid = list(bench_sampling.cells(options))
    assert len(grid) * len(options.dtypes) == len(set(grid)) * 2 == 5 * 3 * 5 * 6 * 2
    assert len(list(bench_sampling.cells(bench_sampling.BENCHMARK.parse(["--quick"])))) == 4
    knobs = ("temperature", "top_k", "top_p", "min_p", "typical_p")
    everything, neutral = cases.ADAPTORS["everything"], Adaptor()
    for name in (*knobs, "epsilon_cutoff", "eta_cutoff"):
        assert getattr(everything, name) != getattr(neutral, name), name


def test_slow_peers_run_in_few_cells():
    options = bench_sampling.BENCHMARK.parse([])
    where = {
        c: n for c in bench_sampling.cells(options) if (n := bench_sampling.peers_of(c, options))
    }
    assert {c.rows for c in where} == {"normal3"}
    assert {(c.vocabulary, c.adaptor) for c in where if c.batch == 64} == {(128_256, "T+p")}
    for batch in (1, 8):
        stock = [c.vocabulary for c in where if c[1] == batch and "stock" in where[c]]
        assert sorted(set(stock)) == list(cases.VOCABULARIES)
    assert {c.adaptor for c, names in where.items() if "compiled" in names} == {"T+p"}


def test_missing_model_is_a_visible_note(monkeypatch, run_benchmark, capsys):
    def missing(name, **kwargs):
        raise ModelNotFoundError("there is no network")

    monkeypatch.setattr(real_rows, "load_model", missing)
    small = ("--vocab", 32, "--batch", 1, "--adaptors", "T", "--rounds", 2, "--peers")
    record = run_benchmark(bench_sampling, *small, "--rows", "flat", "real")
    assert record["notes"] == ["no rows 'real': there is no network"]
    assert {c["rows"] for c in record["cells"]} == {"flat"}
    assert "there is no network" in capsys.readouterr().err


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
    options, notes = bench_sampling.BENCHMARK.parse(["--peer-rounds", "2"]), []
    cell = bench_sampling.Cell(500, 1, "normal3", "T+p")
    for _ in range(2):
        record = bench_sampling.measure_peers(cell, [row], ["stock", "compiled"], options, notes)
    assert notes == ["no compiler"] and set(record["to_fastadapt"]) == {"stock"}


def test_stock_score_is_our_score():
    rows = torch.randn(4, 300, generator=torch.Generator().manual_seed(7)) * 3
    adaptors, tokens = [cell.adaptor for cell in paper_grid()], rows.argmax(-1)
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
            _cell(1, 1, adaptor="everything", to_fastadapt={"stock": [0, 140.0, 0]}),
        ],
    }
    found = limits.sampling_limits(record)
    assert [round(x.figure, 6) for x in found] == [2.0, 2.0, 4.0, 1.06, 1.06, 140.0, 11.0]
    assert [x.met for x in found] == ["no", "yes", "no", "no", "no", "yes", "yes"]
    assert found[1].where == "V = 128,256, N = 8, flat, T+p, float32"
    assert [x.demanded for x in found[4:]] == ["at most 1.05 x", "at least 100 x", "at most 12 µs"]


def test_limits_without_cells_are_not_measured():
    record = {"call_us": [1.0, 1.0, 1.0], "cells": [], "peers": []}
    found = limits.sampling_limits(record)
    assert [x.met for x in found] == ["not measured"] * 6 + ["yes"]
    assert found[0].shown == "-"


def test_score_limits_and_table(run_benchmark):
    small = ("--vocab", 200, "--rows", "normal1", "normal3", "--rounds", 2, "--peer-rounds", 2)
    record = run_benchmark(bench_score, *small)
    assert [c["rows"] for c in record["cells"]] == ["normal1", "normal3"]
    record["cells"][0]["to_one"]["all"] = [0, 5.0, 0]
    record["cells"][1]["to_one"]["all"] = [0, 9.0, 0]
    record["cells"][0]["stock_to_all"] = [0, 51.0, 0]
    record["cells"][1]["stock_to_all"] = [0, 60.0, 0]
    record["cells"][0]["us"] = {n: [0, 1111.0, 0] for n in ("one", "all", "calls", "stock")}
    found = limits.score_limits(record)
    assert [(x.figure, x.met) for x in found] == [(9.0, "no"), (51.0, "yes")]
    table = report.TABLES["score"](record)
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
    table = report.TABLES["sampling"](sampling_record)
    for limit in limits.sampling_limits(sampling_record):
        assert f"| {limit.label} | {limit.shown} | {limit.demanded} | {limit.met} |" in table
    assert "32 cells of 2 V x 2 N x 2 rows x 2 adaptors x 2 dtypes" in table
    assert "Note:" not in table
    sampling_record["notes"].append("no compiler")
    assert "\nNote: no compiler.\n" in report.TABLES["sampling"](sampling_record)


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
    assert report.TABLES["sampling"](report.load("sampling")) in rendered
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
    drawing = tmp_path / "sampling.png"
    assert not report.figure_is_current("sampling", drawing)
    figure.draw(report.load("sampling"), drawing)
    assert report.figure_is_current("sampling", drawing)
    assert drawing.stat().st_size < 150_000
    _results(tmp_path, sampling_record, "sampling", dirty=False, commit="fedcba9876543210")
    assert not report.figure_is_current("sampling", drawing)
    cells = [c for c in sampling_record["cells"] if c["adaptor"] != "T+p"]
    with pytest.raises(ValueError, match=r"expected cells of T\+p"):
        figure.draw({**sampling_record, "cells": cells}, tmp_path / "none.png")


def test_pytest_form_measures(start_python, tmp_path):
    """With `-n 0`; under workers pytest-benchmark would time nothing and pass."""
    pytest.importorskip("pytest_benchmark")
    program, output = tmp_path / "run.py", tmp_path / "output"
    program.write_text(
        "import os, sys, pytest\n"
        "for name in [n for n in os.environ if n.startswith('PYTEST_XDIST')]:\n"
        "    del os.environ[name]\n"
        "sys.exit(pytest.main(sys.argv[1:]))"
    )
    words = ["-n", "0", "-q", "-k", "32000", "-p", "no:cacheprovider"]
    words += ["--benchmark-json=times.json", "--benchmark-max-time=0", "--benchmark-min-rounds=1"]
    script = str(ROOT / "benchmarks" / "bench_sampling.py")
    done = start_python(program, *words, script, folder=tmp_path, output=output)
    done.join(timeout=300)
    said = output.read_text()
    assert done.exitcode == 0, said
    assert "8 passed, 8 deselected" in said
    measured = json.loads((tmp_path / "times.json").read_text())["benchmarks"]
    assert len(measured) == 8 and all(one["stats"]["min"] > 0 for one in measured)


def test_pytest_form_refuses_workers():
    import bench_sampling

    with pytest.raises(RuntimeError, match="expected `pytest -n 0`, got a worker of xdist"):
        bench_sampling.test_sample(None, SimpleNamespace(workerinput={}), 32_000, "copy")


def test_edits_are_measured_beside_themselves_without(run_benchmark):
    small = ("--vocab", 200, "--ids", 9, "--rounds", 2, "--peer-rounds", 2)
    record = run_benchmark(bench_edits, *small)
    assert [cell["dtype"] for cell in record["cells"]] == list(cases.DTYPES)
    for limit in limits.edits_limits(record):
        assert limit.figure > 0, limit
    assert "| 200, bfloat16 |" in report.block("edits", record)


def test_filters_are_measured_beside_softmax(run_benchmark):
    small = ("--vocab", 200, "--rows", "normal3", "ties", "--rounds", 2)
    record = run_benchmark(bench_filters, *small)
    assert len(record["cells"]) == 4
    for limit in limits.filters_limits(record):
        assert limit.figure > 0, limit
    assert "| 200, ties, bfloat16 |" in report.block("filters", record)


def test_verified_drafts_are_measured_beside_sample(run_benchmark):
    small = ("--vocab", 200, "--rounds", 2, "--draws", 4000, "--sequences", 600)
    record = run_benchmark(bench_verify, *small)
    assert len(record["cells"]) == 16 and len(record["laws"]) == 20
    for cell in record["cells"]:  # the better the drafts, the more of them stand
        assert (cell["accepted"]["by its law"] == 4) == (cell["drafts"] == "the rows")
    found = {limit.label.split()[0]: limit for limit in limits.verify_limits(record)}
    assert found["least"].met == found["of"].met == "yes"
    assert "| 200, bfloat16, T+p | other |" in report.block("verify", record)


def test_a_split_vocabulary_is_counted(run_benchmark):
    small = ("--vocab", 4000, "--ranks", 2, 4, "--rows", "normal3", "--each", 3, "--fuzzed", 50)
    record = run_benchmark(bench_sharded, *small)
    assert len(record["cells"]) == 2 * len(bench_sharded.LAWS)
    cells = {cell["adaptor"]: cell for cell in record["cells"] if cell["ranks"] == 4}
    assert cells["greedy"]["rounds"] == cells["k = 50"]["rounds"] == 2
    assert cells["neutral"]["rounds"] == 3 and cells["neutral"]["more"] == 1
    # a head of 256 bytes, and 8 for a seed's best token and 24 of sums, of each of three others
    assert cells["greedy"]["bytes"] == 3 * (256 + 8 + 24)
    assert record["fuzz"]["rows"] >= 50
    found = limits.sharded_limits(record)
    assert [limit.met for limit in found[:2]] == ["yes", "yes"]
    assert "| normal3, 4,000 | 4 | greedy |" in report.block("sharded", record)


def test_transformers_way_to_edits_is_ours():
    """So that what is timed is the same work."""
    rows, history = torch.randn(3, 200) * 3, bench_edits.history_of(3, 200, 40, seed=0)
    allowed, everything = bench_edits.half(3, 200), cases.ADAPTORS["everything"]
    edits = bench_edits.edits_of(history)
    kept = filter_logits(rows, everything, edits=edits, allowed=allowed) > -math.inf
    draw = bench_edits.stock_everything(history, allowed, 200)
    seen = torch.zeros_like(kept)
    for _ in range(200):
        seen.scatter_(1, draw(rows)[:, None], True)
    assert not (seen & ~kept).any()
    assert seen[:, ::2].sum() == seen.sum() > 6  # every second token is allowed


def test_histories_are_measured_beside_transformers(run_benchmark):
    record = run_benchmark(bench_history, "--batch", 1, 2, "--tokens", 400, "--rounds", 2)
    assert [(c["rule"], c["batch"]) for c in record["cells"]] == [
        (rule, batch) for rule in bench_history.RULES for batch in (1, 2)
    ]
    for limit in limits.history_limits(record):
        assert limit.figure > 0, limit
    assert "| DRY, 2 |" in report.block("history", record)


def test_texts_of_histories_repeat():
    """So that there is something to ban and to penalise, and tokens are as many as asked for."""
    texts = bench_history.texts_of(2, 2000, seed=0)
    history = fastadapt.History(texts)
    assert texts.shape == (2, 2000)
    for rule in bench_history.RULES.values():
        assert rule(history).rows == 2
    following = texts[:, :1000].T.contiguous()
    history.append(following[:40].T)
    assert len(history.ban_ngrams(3).ids) >= 2 and len(history.dry(0.8).ids) >= 2
