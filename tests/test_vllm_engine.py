"""What a running vLLM engine hands over, against what it saw and a trainer's model of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastadapt import (
    Edits,
    History,
    Support,
    filter_logits,
    label_logps,
    linear_support_log_odds,
    sample,
    support_log_odds,
)
from fastadapt.vllm import forget, supports
from fastadapt.vllm._records import _path, _records
from fastadapt.vllm._request import requested

ENGINE = Path(__file__).with_name("vllm_engine.py")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of one run, its requests that are recorded, and what is read of them."""
    vllm = pytest.importorskip("vllm", reason="an engine: needs vllm")
    folder = tmp_path_factory.mktemp("engine")
    settings = {
        "HF_HUB_OFFLINE": "1", "VLLM_USE_V2_MODEL_RUNNER": "0", "VLLM_CPU_KVCACHE_SPACE": "1",
        "PYTHONPATH": os.pathsep.join([str(ENGINE.parent), os.environ.get("PYTHONPATH", "")]),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-P", str(ENGINE), str(folder)],
        env=os.environ | settings, capture_output=True, text=True, timeout=540,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    found = json.loads((folder / "found.json").read_text())
    requests = {}
    for one in found["requests"]:
        params = vllm.SamplingParams(**one["params"])
        asked = requested(params)
        if asked is not None and asked.support_id is not None:
            requests[asked.support_id] = SimpleNamespace(asked=asked, **one)
    seen: dict[tuple[str, int], torch.Tensor] = {}
    for path in sorted((folder / "seen").iterdir()):
        seen |= torch.load(path)  # the last one of a position counts
    outputs = {of: one.tokens for of, one in requests.items()}
    return SimpleNamespace(
        folder=folder, found=found, requests=requests, outputs=outputs, seen=seen,
        drawn=supports(folder / "records", outputs),
    )  # fmt: skip


def _edits(one: Any, position: int) -> Edits:
    """The changes of a row's logits, of its whole text."""
    made = Edits.from_rows([one.asked.bias], "pre")
    if one.asked.penalised:
        text = torch.tensor([[*one.prompt, *one.tokens[:position]]])
        history = History(text, prompt_length=len(one.prompt))
        made += history.edits(repetition=one.asked.repetition)
    return made


def test_supports_are_what_the_engine_drew_from(run):
    """The sets of `filter_logits` on the engine's own logits, and the law's log-probabilities."""
    assert len(run.drawn) == 32 and sum(map(len, run.outputs.values())) > 500
    sizes = set()
    for of, one in run.requests.items():
        logits = torch.stack([run.seen[of, i] for i in range(len(one.tokens))])
        kept = torch.cat(
            [filter_logits(row[None], one.asked.adaptor, edits=_edits(one, i))
             for i, row in enumerate(logits)]
        )  # fmt: skip
        got = run.drawn[of]
        assert torch.equal(got.support.to_mask(logits.shape[1]), kept > -float("inf"))
        assert got.tokens.tolist() == one.tokens and bool(got.support.contains(got.tokens).all())
        law = kept.double().log_softmax(-1).gather(1, got.tokens[:, None])[:, 0]
        torch.testing.assert_close(got.logprobs.double(), law, rtol=0, atol=2e-5)
        sizes |= set(got.support.counts.tolist())
    assert {0, 1} <= sizes and len(sizes) > 20  # 0: full rows, of requests without a filter


def test_a_ban_of_the_engine_leaves_no_full_row(run):
    """`min_tokens` bans stop tokens: a request without a filter keeps the others, by their ids."""
    banned = [
        (one, run.drawn[of])
        for of, one in run.requests.items()
        if one.params.get("min_tokens")
        and not one.params["extra_args"].keys() - {"fastadapt_support_id", "fastadapt_seed"}
    ]
    assert banned
    for one, got in banned:
        begin = min(4, len(one.tokens))
        assert not bool(got.support.full[:begin].any()) and bool(got.support.full[begin:].all())
        # three stop tokens and the end of the text
        assert set(got.support.counts[:begin].tolist()) == {512 - 4}


def test_the_bits_are_those_of_sample(run):
    of = "request 1"
    one = run.requests[of]
    logits = torch.stack([run.seen[of, i] for i in range(len(one.tokens))])
    assert not one.asked.penalised and not one.asked.bias
    drawn = sample(
        logits, one.asked.adaptor, seeds=torch.full((len(logits),), one.asked.seed),
        positions=torch.arange(len(logits)), support=True,
    )  # fmt: skip
    assert torch.equal(drawn.tokens, run.drawn[of].tokens)
    assert torch.equal(drawn.logprobs, run.drawn[of].logprobs)
    assert drawn.support == run.drawn[of].support


def test_replay_gives_the_samplers_log_probabilities(run):
    """On the engine's logits within 2e-6; from a trainer's own model but for its rounding."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(run.folder / "model", dtype=torch.float32)
    head = model.lm_head.weight.detach().clone().requires_grad_()
    compared = 0
    for of, one in run.requests.items():
        adaptor = one.asked.adaptor
        if one.asked.penalised or one.asked.bias or not float(adaptor.temperature):
            continue  # the law of an edited row is not the model's
        compared += 1
        temperature = float(adaptor.temperature)
        got, n = run.drawn[of], len(one.tokens)
        logits = torch.stack([run.seen[of, i] for i in range(n)])
        on_rows = support_log_odds(logits / temperature, got.tokens, got.support)
        torch.testing.assert_close(label_logps(on_rows), got.logprobs, rtol=0, atol=2e-6)
        text = torch.tensor([one.prompt + one.tokens])
        with torch.no_grad():
            hidden = model.model(text).last_hidden_state[0, len(one.prompt) - 1 : -1]
        on_head = linear_support_log_odds(
            hidden, head, got.tokens, got.support, logit_scale=1 / temperature
        )
        logps = label_logps(on_head)
        torch.testing.assert_close(logps.detach(), got.logprobs, rtol=0, atol=1e-4)
        if bool((got.support.counts > 1).any()):
            (slope,) = torch.autograd.grad(logps.sum(), head)
            assert bool(slope.isfinite().all()) and bool((slope != 0).any())
    assert compared > 10


def test_requests_were_preempted_and_read_in_parts(run):
    """Else the tests above say nothing about either."""
    writers, again = {}, 0
    for of in run.requests:
        path = _path(run.folder / "records", of)
        found = list(_records(path, path.read_bytes()))
        writers[of] = len({one.writer for one in found})
        positions = [one.position for one in found]
        again += len(positions) - len(set(positions))
    assert max(writers.values()) > 1 and min(writers.values()) == 1
    assert again > 0


def test_several_sequences_of_a_request_are_refused(run):
    assert "fastadapt_support_id: expected n=1" in run.found["refused"]


def test_requests_of_one_id_are_refused_by_the_reader(run):
    for tokens in run.found["same"]:
        with pytest.raises(ValueError, match="'same': expected "):
            supports(run.folder / "records", {"same": tokens})


def test_what_was_read_can_be_forgotten(run):
    """Last, for it takes one from the folder."""
    of = min(run.requests)
    forget(run.folder / "records", [of])
    with pytest.raises(LookupError, match="expected records of it"):
        supports(run.folder / "records", {of: run.outputs[of]})
    rest = {name: tokens for name, tokens in run.outputs.items() if name != of}
    again = supports(run.folder / "records", rest)
    joined = Support.cat([one.support for one in again.values()])
    assert joined == Support.cat([run.drawn[name].support for name in rest])
