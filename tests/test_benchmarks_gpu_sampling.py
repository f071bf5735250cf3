"""The benchmark of `sample` on a GPU, without one: grid, timers, peers, limits, what it reports."""

import math
import sys
import time
from types import ModuleType, SimpleNamespace

import pytest
import torch

import bench_gpu_sampling
import cases
import device_timing
import host
import limits
import peers
import report


@pytest.fixture
def row():
    return torch.randn(1, 500, generator=torch.Generator().manual_seed(3)) * 3


@pytest.fixture
def gpu_record(run_benchmark):
    """A result of tiny cells timed by the clock of the CPU, with a made-up device."""
    small = ("--vocab", 64, 71, "--batch", 2, "--adaptors", "T", "T+k+p")
    return run_benchmark(bench_gpu_sampling, *small, as_on_a_gpu=True)


def test_grid_on_a_gpu():
    options = bench_gpu_sampling.BENCHMARK.parse(["--device", "cpu"])
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


def test_gpu_cells_left_out_or_failed_are_noted(monkeypatch, run_benchmark):
    small = ("--vocab", 64, "--batch", 2, "--adaptors", "T", "T+p", "--rows", "flat")
    record = run_benchmark(bench_gpu_sampling, *small, "--minutes", 0, as_on_a_gpu=True)
    assert record["cells"] == []
    assert record["notes"] == ["4 of 4 cells left out for want of time"]

    draw = bench_gpu_sampling.sample

    def broken(rows, adaptor, **rest):
        if adaptor == cases.GPU_ADAPTORS["T"]:
            raise ValueError("no kernel\nand more")
        return draw(rows, adaptor, **rest)

    monkeypatch.setattr(bench_gpu_sampling, "sample", broken)
    record = run_benchmark(bench_gpu_sampling, *small, as_on_a_gpu=True, code=1)
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
    options = bench_gpu_sampling.BENCHMARK.parse(["--rounds", "2"])
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
    monkeypatch.setitem(peers.GPU_PEERS, "vllm", peers.GpuPeer(missing, ("T+p",)))
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
            peers.GPU_PEERS[name].make(cases.GPU_ADAPTORS["T+p"], row)


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
        peers.flashinfer(cases.GPU_ADAPTORS[name], row)(7)
    (probs, *only_p), (scaled, *both) = seen
    assert only_p == [0.9, {"seed": 0, "offset": 7}]
    assert both == [50, 0.9, {"seed": 0, "offset": 7}]
    torch.testing.assert_close(probs, (row / 0.8).softmax(-1))
    torch.testing.assert_close(scaled, row / 0.8)


@pytest.mark.parametrize("name", peers.GPU_PEERS["vllm"].adaptors)
def test_vllm_starts_from_the_same_rows(name, monkeypatch, row):
    seen = []

    def mask(logits, k, p):
        seen.append((logits.clone(), k, p))
        return logits.masked_fill_(logits < logits.amax(), -math.inf)

    path = "vllm.v1.sample.ops.topk_topp_triton"
    _modules(monkeypatch, path, apply_top_k_top_p_triton=mask)
    adaptor = cases.GPU_ADAPTORS[name]
    call = peers.vllm(adaptor, row)
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
