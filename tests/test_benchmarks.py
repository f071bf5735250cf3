"""What can be tested of the benchmarks without timing: grid, rows, peers, limits, report."""

import gc
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import bench_gpu_losses
import bench_gpu_sampling
import bench_losses
import bench_sampling
import bench_score
import cases
import device_timing
import fresh
import gpu_peers
import host
import limits
import loss_peers
import peers
import real_rows
import report
import timing
import train_preferences
from fastadapt import Adaptor, filter_logits, linear_log_odds, score
from fastadapt._ops.linear import memory
from fastadapt.training.pairs import Pair
from fastadapt.training.pretrained import ModelNotFoundError

ROOT = Path(__file__).resolve().parents[1]
GPU_TIES = ("flat", "levels")


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


def test_missing_model_is_a_visible_note(monkeypatch, tmp_path, capsys):
    def missing(name, **kwargs):
        raise ModelNotFoundError("there is no network")

    monkeypatch.setattr(real_rows, "load_model", missing)
    small = ("--vocab", 32, "--batch", 1, "--adaptors", "T", "--rounds", 2, "--peers")
    out = tmp_path / "s.json"
    record = _run(monkeypatch, bench_sampling, out, *small, "--rows", "flat", "real")
    assert record["notes"] == ["no rows 'real': there is no network"]
    assert {c["rows"] for c in record["cells"]} == {"flat"}
    assert "there is no network" in capsys.readouterr().err


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
    assert host.quartiles([4.0, 1.0, 3.0, 2.0, 5.0]) == [2.0, 3.0, 4.0]
    assert timing.ratios([2.0, 9.0], [1.0, 3.0]) == [2.0, 3.0]


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


def test_figure_of_the_readme_is_of_its_result():
    shown = report.FIGURE.name in (ROOT / "README.md").read_text(encoding="utf-8")
    assert shown == report.FIGURE.exists()
    assert not shown or report.figure_is_current()


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


needs_peak = pytest.mark.skipif(
    not memory.is_measurable(), reason="this system does not tell the peak of a process"
)
TINY = ("--shapes", "6,16,300", "2,16,50", "--rounds", 2, "--seconds", 0)


@pytest.fixture
def losses_record(monkeypatch, tmp_path):
    """A result of tiny cells, timed a few times, without memory."""
    out = tmp_path / "losses.json"
    return _run(monkeypatch, bench_losses, out, *TINY, "--peers", "plain", "--no-memory")


def test_grid_of_losses(monkeypatch):
    options = _options(monkeypatch, bench_losses)
    grid = list(bench_losses.cells(options))
    assert len(grid) == len(set(grid)) == 4 * 2 * 2
    assert limits.LOSS_SHAPE in bench_losses.SHAPES and options.memory
    with_all = {c[:3] for c in grid if len(bench_losses.peers_of(c, options.peers)) > 1}
    assert with_all == {(1024, 576, 49_152), (1024, 896, 32_768)}
    assert all("plain" in bench_losses.peers_of(c, options.peers) for c in grid)
    quick = _options(monkeypatch, bench_losses, "--quick", "--peers", "--dtypes", "float32")
    assert quick.peers == []
    assert {c[:4] for c in bench_losses.cells(quick)} == {(*limits.LOSS_SHAPE, "float32")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "1"], "rounds: expected at least 2, got 1"),
        (["--shapes", "3,4"], "invalid _shape value: '3,4'"),
        (["--shapes", "3,0,5"], "invalid _shape value: '3,0,5'"),
        (["--heads", "none"], "invalid choice: 'none'"),
    ],
)
def test_bad_arguments_of_losses_are_refused(arguments, message, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        _options(monkeypatch, bench_losses, *arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["plain", "torch", "trl", "liger"])
@pytest.mark.parametrize("head", bench_losses.HEADS)
def test_loss_peers_compute_what_we_do(name, head):
    cell = bench_losses.Cell(5, 16, 70, "float32", head)
    inputs = bench_losses.make_inputs(cell, seed=3)
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
    assert bench_losses._installed(["plain", name], notes) == ["plain"]
    assert len(notes) == 1 and "with its chunked log-probabilities" in notes[0]


def test_torch_without_the_function_is_a_missing_peer(monkeypatch):
    monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy", raising=False)
    with pytest.raises(peers.MissingPeer, match="has no linear_cross_entropy"):
        loss_peers.torch_own()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_errors_are_measured_from_the_truth(dtype):
    cell = bench_losses.Cell(30, 64, 9000, dtype, "frozen")
    inputs = bench_losses.make_inputs(cell, seed=1)
    hidden, weight, labels, upstream = inputs
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


def test_formula_of_memory():
    trainable = bench_losses.Cell(1024, 896, 32_768, "bfloat16", "trainable")
    tile, rows = 1024 * 2048 * 2, 2 * 1024 * 896 * 4
    assert bench_losses.formula(trainable) == rows + tile + 1024 * 32_768 * 2
    assert bench_losses.formula(trainable._replace(head="frozen")) == rows + tile
    wide = trainable._replace(dtype="float32", v=65_536)  # too many logits to keep
    assert bench_losses.formula(wide) == rows + 2 * tile


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


@needs_peak
def test_memory_is_measured_in_its_own_process(monkeypatch, preloaded):
    context = SimpleNamespace(
        get_context=lambda method: preloaded
    )  # new processes, but for imports
    monkeypatch.setattr(fresh, "multiprocessing", context)
    options = _options(monkeypatch, bench_losses)
    cell = bench_losses.Cell(256, 64, 20_000, "float32", "frozen")
    (plain,) = fresh.in_fresh_process(bench_losses.extra_mb, cell, "plain", options)
    (ours,) = fresh.in_fresh_process(bench_losses.extra_mb, cell, "fastadapt", options)
    logits = 4 * 256 * 20_000 / 1e6
    assert 2 * logits < plain < 6 * logits
    assert 0 <= ours < 0.4 * logits


def test_losses_result_and_table(losses_record):
    assert len(losses_record["cells"]) == 2 * 2 * 2
    for cell in losses_record["cells"]:
        assert set(cell["ms"]) == {"fastadapt", "plain"} and "memory_mb" not in cell
        for times in cell["ms"].values():
            assert set(times) == {"forward", "backward", "both"}
    table = report.TABLES["losses"](losses_record)
    assert "| 6, 16, 300, float32, trainable |" in table and "not measured" in table
    cell = losses_record["cells"][0]
    cell["memory_mb"] = {"fastadapt": 3.2, "plain": 99.6}
    cell["memory_formula_mb"] = 4.4
    cell["ms"]["fastadapt"]["both"], cell["ms"]["plain"]["both"] = [0, 1234.0, 0], [0, 7.0, 0]
    row = "| 6, 16, 300, float32, trainable | 1,234 (3) | 7 (100) | (4) |"
    assert row in report.TABLES["losses"](losses_record)


def _loss_cell(shape, dtype, head, plain, memory_mb=None, **peers_of_it):
    n, h, v = shape
    cell = {"n": n, "h": h, "v": v, "dtype": dtype, "head": head}
    cell["to_fastadapt"] = {
        name: [0, ratio, 9] for name, ratio in {"plain": plain, **peers_of_it}.items()
    }
    cell["rms_error"] = {"fastadapt": 1e-4, "plain": 4e-4 if head == "frozen" else 1e-3}
    return cell | ({"memory_mb": {"fastadapt": memory_mb}} if memory_mb else {})


def test_losses_limits_are_computed():
    here, wide = limits.LOSS_SHAPE, (100, 8, 250_000)
    cells = [
        _loss_cell(here, "bfloat16", "trainable", 1.5, memory_mb=1e6, trl=2.4),
        _loss_cell(here, "bfloat16", "frozen", 1.6),
        _loss_cell(here, "float32", "trainable", 0.9),
        _loss_cell(wide, "bfloat16", "frozen", 0.1, memory_mb=4),
        _loss_cell(wide, "float32", "frozen", 0.1, memory_mb=6),
    ]
    found = limits.losses_limits({"cells": cells})
    figures = [x.figure and round(x.figure, 6) for x in found]
    assert figures == [1.5, 2.4, 1.6, 0.9, None, 6.0, 0.25]
    assert [x.met for x in found] == ["yes", "no", "no", "no", "not measured", "no", "no"]
    assert found[5].where == "N = 100, H = 8, V = 250,000, float32, frozen head"
    nothing = limits.losses_limits({"cells": []})
    assert {x.met for x in nothing} == {"not measured"}


def _training(linear, logits, extras):
    memories = [{"before": 1, "extra": extra, "gradients_and_optimizer": 5} for extra in extras]
    runs = [
        {"curves": {"loss": loss}, "memory_mb": mb, "step_s": [1.0, 2.0, 3.0]}
        for loss, mb in zip((linear, logits), memories, strict=True)
    ]
    return {
        "benchmark": "train_preferences",
        "settings": {"steps": 3},
        "variants": dict(zip(("linear", "logits"), runs, strict=True)),
    }


def test_train_limits_are_computed():
    record = _training([2.0, 1.0, 1.0], [2.0, 1.0002, 1.0], (90, 100))
    apart, memory_ratio = limits.train_limits(record)
    assert apart.figure == pytest.approx(199.96, rel=1e-4) and apart.met == "no"
    assert memory_ratio.figure == 0.9 and memory_ratio.met == "yes"
    same = limits.train_limits(_training([2.0, 1.0], [2.0, 1.0], (101, 100)))
    assert [x.met for x in same] == ["yes", "no"]


def test_pairs_are_chosen_by_seed():
    pairs = [Pair(str(i), "a", "b") for i in range(10)]
    some = train_preferences.choose_pairs(pairs, 7, 1)
    assert len(set(some)) == 7 and some != train_preferences.choose_pairs(pairs, 7, 2)
    assert some == train_preferences.choose_pairs(pairs, 7, 1)
    assert pairs == [Pair(str(i), "a", "b") for i in range(10)]
    assert len(set(train_preferences.choose_pairs(pairs, 25, 1))) == 10
    with pytest.raises(ValueError, match="data: expected at least one pair, got none"):
        train_preferences.choose_pairs([], 1, 0)


@needs_peak
def test_training_run_and_table(monkeypatch, tmp_path, tiny_model, preloaded):
    """In processes that have transformers imported, which takes 8 seconds in a new one."""
    monkeypatch.setattr(fresh.multiprocessing, "get_context", lambda kind: preloaded)
    entry = "\n\nHuman: {}\n\nAssistant: {}"
    lines = [
        json.dumps({"chosen": entry.format(f"w{i}", "a b"), "rejected": entry.format(f"w{i}", "c")})
        for i in range(5)
    ]
    data = tmp_path / "pairs.jsonl"
    data.write_text("\n".join(lines))
    arguments = ("--data", data, "--model", tiny_model, "--steps", 3, "--batch", 2)
    record = _run(monkeypatch, train_preferences, tmp_path / "t.json", *arguments)
    linear, logits = record["variants"]["linear"], record["variants"]["logits"]
    assert len(linear["curves"]["loss"]) == 3 and len(set(linear["curves"]["loss"])) == 3
    assert linear["curves"]["loss"] == pytest.approx(logits["curves"]["loss"], rel=1e-4)
    assert linear["response_tokens"] == logits["response_tokens"]
    assert record["settings"]["data"] == "pairs.jsonl"
    assert str(tmp_path) not in json.dumps(record["host"])
    table = report.TABLES["train_preferences"](record)
    assert "| full logits, `label_log_odds` |" in table and "3 steps of DPO+ExMATE" in table


@pytest.fixture
def tiny_model(tmp_path):
    """A folder with a random one-layer model."""
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<end>", *"abc", "Human", ":"])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path / "model"
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token="<end>"
    ).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=None,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


ON_CPU = ("--device", "cpu", "--rounds", 2, "--seconds", 0)


def _on_a_gpu(record):
    """A result with a made-up device."""
    record["host"] |= {
        "gpu": {"name": "Some GPU", "driver": "1.2", "cuda": "13.0"},
        "dirty": False,
        "commit": "0123456789abcdef",
    }
    return record


@pytest.fixture
def gpu_record(monkeypatch, tmp_path):
    """A result of tiny cells timed by the clock of the CPU, with a made-up device."""
    small = ("--vocab", 64, 71, "--batch", 2, "--adaptors", "T", "T+k+p")
    record = _run(monkeypatch, bench_gpu_sampling, tmp_path / "gpu.json", *ON_CPU, *small)
    return _on_a_gpu(record)


def test_grid_on_a_gpu(monkeypatch):
    options = _options(monkeypatch, bench_gpu_sampling, "--device", "cpu")
    grid = list(bench_gpu_sampling.cells(options))
    assert len(grid) == len(set(grid)) == 4 * 9 * (1 + 2 + 2 + 1)
    assert {c[::2] for c in grid[: 4 * 9]} == {
        (128_256, "normal3", name) for name in cases.GPU_ADAPTORS
    }
    assert all(c.dtype == "float32" for c in grid[: 4 * 9])
    assert not any(bench_gpu_sampling.peers_of(c, options) for c in grid)
    options.device = "cuda"
    with_peers = {c: n for c in grid if (n := bench_gpu_sampling.peers_of(c, options))}
    assert {(*c[:1], *c[2:4]) for c in with_peers} == {(128_256, "normal3", "float32")}
    assert {c.batch for c, names in with_peers.items() if "vllm" in names} == {1, 8, 64, 512}
    assert [(c.batch, c.adaptor) for c in with_peers if "compiled" in with_peers[c]] == [
        (64, "T+p")
    ]


def test_gpu_benchmark_needs_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        _options(monkeypatch, bench_gpu_sampling)
    assert "no CUDA device" in capsys.readouterr().err
    assert host.gpu_record() is None


def test_gpu_benchmark_on_the_cpu(gpu_record):
    assert len(gpu_record["cells"]) == 2 * (1 + 2 + 1 + 1) and gpu_record["peers"] == []
    for cell in gpu_record["cells"]:
        assert cell["mode"] == "clock" and cell["rounds"] == 2
        assert set(cell["us"]) == {
            *("fastadapt", "with_fields", "copy", "softmax"),
            *bench_gpu_sampling.READS,
        }
        assert cell["us"][cell["bound"]][1] == min(
            cell["us"][form][1] for form in bench_gpu_sampling.READS
        )
    assert gpu_record["notes"] == []


def test_gpu_cells_left_out_or_failed_are_noted(monkeypatch, tmp_path):
    small = ("--vocab", 64, "--batch", 2, "--adaptors", "T", "T+p", "--rows", "flat")
    out = tmp_path / "gpu.json"
    record = _run(monkeypatch, bench_gpu_sampling, out, *ON_CPU, *small, "--minutes", 0)
    assert record["cells"] == []
    assert record["notes"] == ["4 of 4 cells left out for want of time"]

    draw = bench_gpu_sampling.sample

    def broken(rows, adaptor, **rest):
        if adaptor == cases.GPU_ADAPTORS["T"]:
            raise ValueError("no kernel\nand more")
        return draw(rows, adaptor, **rest)

    monkeypatch.setattr(bench_gpu_sampling, "sample", broken)
    monkeypatch.setattr(sys, "argv", ["bench", "--out", str(out), *map(str, ON_CPU + small)])
    assert bench_gpu_sampling.main() == 1
    record = json.loads(out.read_text())
    assert {c["adaptor"] for c in record["cells"]} == {"T+p"}
    assert record["notes"][0] == "64, 2, flat, float32, T, failed: no kernel"


class _Event:
    """Stands in for an event of CUDA."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at)


@pytest.fixture
def fake_device(monkeypatch):
    """Lets the device's timers run without a device."""
    empty, properties = torch.empty, SimpleNamespace(L2_cache_size=64)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: properties)
    monkeypatch.setattr(torch, "empty", lambda *size, device=None, **rest: empty(*size, **rest))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    monkeypatch.setattr(device_timing, "FLUSH_BYTES", 1 << 10)


@pytest.mark.parametrize("hot", [False, True])
def test_device_timer_prepares_every_call(hot, fake_device):
    seen = []
    call = device_timing.DeviceCall(
        lambda turn: seen.append(turn), prepare=lambda: seen.append("prepared")
    )
    seconds = device_timing.DeviceTimer(hot=hot)(call, range(4, 6))
    assert 0 <= seconds < 1
    assert seen == ["prepared", 4] * (1 + hot) + ["prepared", 5] * (1 + hot)


def test_ways_of_timing_and_peers(monkeypatch, fake_device):
    options = _options(monkeypatch, bench_gpu_sampling, "--rounds", 2)
    bench = bench_gpu_sampling.Bench(options)
    options.device = "cpu"
    cell = bench_gpu_sampling.Cell(70, 2, "normal3", "float32", "T+p")
    rows = bench.make_rows(cell)
    ours = bench_gpu_sampling.own_calls(rows, cases.GPU_ADAPTORS["T+p"])

    def captured(call):
        if call == ours["with_fields"]:
            raise RuntimeError("it synchronises\nhere")
        return call

    def missing(adaptor, rows):
        raise peers.MissingPeer("vllm: not there")

    monkeypatch.setattr(bench_gpu_sampling, "captured", captured)
    monkeypatch.setitem(gpu_peers.GPU_PEERS, "vllm", gpu_peers.Peer(missing, ("T+p",)))
    calls = {**ours, **bench_gpu_sampling.yardsticks(rows)}
    records = bench.measure(cell, calls)
    assert [r["mode"] for r in records] == ["cold", "hot", "cold, graph", "hot, graph"]
    assert ["with_fields" in r["to_fastadapt"] for r in records] == [True, True, False, False]
    records = bench.measure_peers(cell, rows, ["vllm", "stock"], ours["fastadapt"])
    assert [r["mode"] for r in records] == ["cold", "hot"]  # the graph of "stock" is not measured
    assert all(set(r["to_fastadapt"]) == {"stock"} for r in records)
    assert bench.notes == [
        "with_fields, not captured in a CUDA graph: it synchronises",
        "vllm, not measured: vllm: not there",
    ]
    assert set(bench.nothing_us()) == {"cold", "hot"}


def test_missing_gpu_peers_say_why(monkeypatch, row):
    for name in ("flashinfer", "vllm"):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(peers.MissingPeer, match=name):
            gpu_peers.GPU_PEERS[name].make(cases.GPU_ADAPTORS["T+p"], row)


def _modules(monkeypatch, name, **contents):
    """Make modules of a dotted name importable, the last with these contents."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        module = ModuleType(".".join(parts[:end]))
        module.__path__ = []
        monkeypatch.setitem(sys.modules, module.__name__, module)
    vars(module).update(contents)
    if len(parts) == 2:
        monkeypatch.setattr(sys.modules[parts[0]], parts[1], module, raising=False)


def test_flashinfer_is_called_without_indices(monkeypatch, row):
    seen = []
    _modules(
        monkeypatch,
        "flashinfer.sampling",
        softmax=lambda rows: rows.softmax(-1),
        top_p_sampling_from_probs=lambda *a, **k: seen.append((*a, k)),
        top_k_top_p_sampling_from_logits=lambda *a, **k: seen.append((*a, k)),
    )
    for name in ("T+p", "T+k+p"):
        gpu_peers.flashinfer(cases.GPU_ADAPTORS[name], row)(7)
    (probs, *only_p), (scaled, *both) = seen
    assert only_p == [0.9, {"seed": 0, "offset": 7}]
    assert both == [50, 0.9, {"seed": 0, "offset": 7}]
    torch.testing.assert_close(probs, (row / 0.8).softmax(-1))
    torch.testing.assert_close(scaled, row / 0.8)


@pytest.mark.parametrize("name", gpu_peers.GPU_PEERS["vllm"].adaptors)
def test_vllm_starts_from_the_same_rows(name, monkeypatch, row):
    seen = []

    def mask(logits, k, p):
        seen.append((logits.clone(), k, p))
        return logits.masked_fill_(logits < logits.amax(), -math.inf)

    path = "vllm.v1.sample.ops.topk_topp_triton"
    _modules(monkeypatch, path, apply_top_k_top_p_triton=mask)
    adaptor = cases.GPU_ADAPTORS[name]
    call = gpu_peers.vllm(adaptor, row)
    for turn in range(2):
        call.prepare()
        assert call(turn).tolist() == [row.argmax()]
    assert torch.equal(seen[0][0], row / 0.8) and torch.equal(seen[1][0], row / 0.8)
    _, k, p = seen[0]
    assert (k is None) == (adaptor.top_k == 0) and (p is None) == (adaptor.top_p == 1)
    assert (k is None or k.tolist() == [50]) and (p is None or p.dtype == torch.float32)


def _gpu_cell(us, read, fields=1.5, **changes):
    return {
        **{"vocabulary": 128_256, "batch": 64, "rows": "normal3", "adaptor": "T+k+p"},
        **{"dtype": "float32", "mode": "cold", "us": {"fastadapt": [0, us, 0]}},
        **{
            "to_bound": {"fastadapt": [0, us / read, 0]},
            "to_fastadapt": {"with_fields": [0, fields, 0]},
        },
        **changes,
    }


def test_gpu_limits_are_computed():
    record = {
        "cells": [
            _gpu_cell(20.0, 10.0),
            _gpu_cell(25.0, 10.0, mode="cold, graph"),
            _gpu_cell(90.0, 10.0, adaptor="T"),
            _gpu_cell(60.0, 10.0, rows="levels"),
            _gpu_cell(240.0, 100.0, batch=512, fields=1.7),
            _gpu_cell(50.0, 1.0, batch=1),
            _gpu_cell(11.0, 1.0, batch=1, mode="hot, graph"),
            _gpu_cell(9e9, 1.0, vocabulary=32_000),
        ],
        "peers": [
            {"to_fastadapt": {"flashinfer": [0, 3.0, 0], "vllm": [0, 4.0, 0]}},
            {"to_fastadapt": {"flashinfer": [0, 12.0, 0]}},
        ],
    }
    found = limits.gpu_sampling_limits(record)
    figures = [round(x.figure, 6) for x in found]
    assert figures == [25.0, 2.4, 11.0, 1.7, 3.0, 6.0, 4.0]
    assert [x.met for x in found] == ["yes", "yes", "yes", "no", "no", "yes", "no"]
    assert found[0].shown == ("25.0 µs (V = 128,256, N = 64, normal3, T+k+p, float32, cold, graph)")
    assert "geometric mean of 2 cells" in found[5].label
    nothing = limits.gpu_sampling_limits({"cells": [], "peers": []})
    assert {x.met for x in nothing} == {"not measured"} and len(nothing) == len(found)


def test_gpu_table(gpu_record):
    place = {"vocabulary": 128_256, "mode": report.GPU_MODE, "rows": "normal3"}
    gpu_record["cells"] = [
        {**_gpu_cell(20.0, 10.0, **place), "adaptor": name, "batch": batch}
        for name, batch in (("T", 64), ("T+k+p", 64), ("T+k+p", 8))
    ]
    table = report.TABLES["gpu_sampling"](gpu_record)
    for limit in limits.gpu_sampling_limits(gpu_record):
        assert f"| {limit.label} | {limit.shown} | {limit.demanded} | {limit.met} |" in table
    assert "| adaptor | N = 8 | N = 64 |\n|---|---|---|" in table
    assert "| T+k+p | 20.0 (2.00) | 20.0 (2.00) |\n| T | - | 20.0 (2.00) |" in table
    assert "\nSome GPU, driver 1.2, CUDA 13.0, 3 cells, up to 2 rounds" in table
    assert "Time of others" not in table
    gpu_record["peers"] = [
        {"adaptor": "T", "to_fastadapt": {"vllm": [0, 4.0, 0]}},
        {"adaptor": "T", "to_fastadapt": {"vllm": [0, 9.0, 0], "stock": [0, 70.0, 0]}},
        {"adaptor": "T+p", "to_fastadapt": {"stock": [0, 80.0, 0]}},
    ]
    table = report.TABLES["gpu_sampling"](gpu_record)
    assert "| adaptor | vLLM | transformers |\n" in table
    assert "| T | 6.0 x | 70.0 x |\n| T+p | - | 80.0 x |\n\nSome GPU" in table
    gpu_record["host"]["gpu"] = None
    with pytest.raises(ValueError, match="expected a result of a GPU"):
        report.TABLES["gpu_sampling"](gpu_record)


def test_gpu_block_without_a_result_says_so(gpu_record, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    block = "<!-- gpu_sampling -->\n<!-- /gpu_sampling -->\n"
    said = report.render(block)
    assert said.splitlines()[1:-1] == ["Not yet measured on a GPU."]
    assert report.render(said) == said
    host.write_record(tmp_path / "gpu_sampling.json", gpu_record)
    assert "Some GPU" in report.render(said) and "Not yet" not in report.render(said)


@pytest.fixture
def gpu_losses_record(monkeypatch, tmp_path):
    """A result of tiny cells timed by the clock of the CPU, with a made-up device."""
    shape = ("--batch", 16, "--hidden", 8, "--vocabulary", 50, "--tokens", 4)
    out = tmp_path / "gpu_losses.json"
    record = _run(monkeypatch, bench_gpu_losses, out, *ON_CPU, *shape, "--peers", "plain")
    return _on_a_gpu(record)


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
        assert set(cell["ms"]) == {"fastadapt", "products", "plain"} | lean
        assert set(cell["to_fastadapt"]) == {"plain"} and cell["peak_mib"] == {}
        assert cell["products"] == bench_gpu_losses.TASKS[name].products


@pytest.mark.parametrize("task", bench_gpu_losses.TASKS)
def test_gpu_losses_are_those_of_the_peers(monkeypatch, task):
    """What is timed as the same task has the same gradients."""
    shape = ("--batch", 16, "--hidden", 8, "--vocabulary", 50, "--tokens", 4, "--peers", "plain")
    options = _options(monkeypatch, bench_gpu_losses, *ON_CPU, *shape)
    inputs = bench_gpu_losses.make_inputs(16, bench_gpu_losses.TASKS[task], options)
    inputs = inputs._replace(
        hidden=inputs.hidden.detach().double().requires_grad_(),
        weight=inputs.weight.detach().double().requires_grad_(task != "frozen"),
        upstream=inputs.upstream.double(),
        reference=inputs.reference.double(),
    )
    made = bench_gpu_losses.losses(task, inputs, options)
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


def test_gpu_losses_that_fail_or_have_no_time_are_noted(monkeypatch, tmp_path):
    shape = ("--batch", 16, "--hidden", 8, "--vocabulary", 50, "--tokens", 4, "--tasks", "tokens")
    arguments = (*ON_CPU, *shape, "--peers", "cce")
    out = tmp_path / "gpu.json"
    record = _run(monkeypatch, bench_gpu_losses, out, *arguments, "--minutes", 0)
    assert record["cells"] == [] and record["notes"] == ["1 of 1 cells left out for want of time"]
    _modules(monkeypatch, "cut_cross_entropy")
    record = _run(monkeypatch, bench_gpu_losses, out, *arguments)
    assert len(record["cells"]) == 1 and record["notes"][0].startswith("cut-cross-entropy: ")
    with pytest.raises(SystemExit):
        _options(monkeypatch, bench_gpu_losses, *ON_CPU, "--batch", 4096, "--tokens", 500)


def _gpu_losses_cell(n, task, ms, peaks, products=10.0):
    return {
        **{"n": n, "task": task, "plan": "grouped", "peak_mib": peaks},
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
    assert figures == [1.1, 1.3, 0.25, None, None, 1.5, 2.0, None, None, 0.75, 0.5, None, None,
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
    assert "| 16, ce, grouped | " in table and " | 2.2 (1,234) | - | - | - |" in table
    assert "\nSome GPU, driver 1.2, CUDA 13.0, up to 2 rounds" in table
    monkeypatch.setattr(report, "RESULTS", tmp_path / "none")
    block = "<!-- gpu_losses -->\n<!-- /gpu_losses -->\n"
    assert report.render(block).splitlines()[1:-1] == ["Not yet measured on a GPU."]
    gpu_losses_record["host"]["gpu"] = None
    with pytest.raises(ValueError, match="expected a result of a GPU"):
        report.TABLES["gpu_losses"](gpu_losses_record)
