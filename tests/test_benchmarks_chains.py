"""The comparison of whole chains: ours has the law of its peers, and runs add up in one file."""

import json

import pytest
import torch

import compare_chains

SMALL = ["--vocab", "500", "--batch", "2", "--history", "30", "--biases", "4", "--rounds", "2"]


def run(out, *more):
    return compare_chains.main([*SMALL, "--threads", "1", "--out", str(out), *more])


def test_peers_are_added_to_a_file(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    out = tmp_path / "chains.json"
    monkeypatch.setitem(compare_chains.PEERS, "vllm", compare_chains.Fastadapt)
    assert run(out, "--peers", "transformers") == 0
    assert run(out, "--peers", "vllm") == 0
    assert run(out, "--peers", "vllm") == 0
    cells = json.loads(out.read_text())["cells"]
    assert [cell["peer"] for cell in cells] == ["transformers", "vllm"]
    for cell in cells:
        assert set(cell["us"]) == {"softmax", "sample", "fastadapt", cell["peer"]}
        assert len(cell["to_fastadapt"]) == 3 and cell["host"]["torch_threads"] == 1
    with pytest.raises(ValueError, match="expected settings and commit"):
        run(out, "--peers", "vllm", "--seed", "1")


def test_a_missing_peer_is_said(tmp_path, monkeypatch):
    def missing(case):
        raise compare_chains.MissingPeer("no such engine\nmore")

    monkeypatch.setitem(compare_chains.PEERS, "vllm", missing)
    assert run(tmp_path / "chains.json", "--peers", "vllm") == 1
    record = json.loads((tmp_path / "chains.json").read_text())
    assert record["cells"] == [] and record["notes"] == ["vllm: no such engine"]


def test_a_chain_without_a_step_is_refused():
    """What draws from rows without penalties and biases has another law."""
    options = compare_chains.BENCHMARK.parse([*SMALL, "--history", "900", "--biases", "300"])
    case = compare_chains.case_of(500, 2, options)
    ours, rows = compare_chains.Fastadapt(case), torch.zeros(2, 500)
    compare_chains.check(ours, ours, rows)

    def plain(rows):
        return compare_chains.sample(rows, compare_chains.ADAPTOR).tokens

    with pytest.raises(ValueError, match="expected draws from the tokens that sample keeps"):
        compare_chains.check(ours, plain, rows)
