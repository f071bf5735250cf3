"""The measurements: what the audit of the kept sets sees, and what the step clock counts."""

import math
import time

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from fastadapt import Adaptor
from fastadapt._cli import measure

IDS = torch.zeros(1, 0, dtype=torch.int64)


@pytest.fixture(scope="module")
def model():
    """A random two-layer model of 300 words."""
    config = GPT2Config(vocab_size=300, n_positions=64, n_embd=32, n_layer=2, n_head=2)
    return GPT2LMHeadModel(config).eval()


def _log_probs(*values):
    return torch.tensor([values]).log()


def _audit(monkeypatch, adaptor, scores, wrong):
    """The audit of one step in which our mask lacks, or has too many, the tokens `wrong`."""
    audit = measure.KeptSetAudit(adaptor)
    mask = audit.chain(IDS, scores.clone())
    mask[0, wrong] = torch.where(mask[0, wrong] == -math.inf, 0.0, -math.inf)
    monkeypatch.setattr(measure, "filter_logits", lambda scores, adaptor: mask)
    audit(IDS, scores)
    return audit.equal, audit.in_band, audit.ties, audit.wrong


def test_audit_counts_equal_sets(monkeypatch):
    scores = _log_probs(0.5, 0.25, 0.15, 0.1)
    assert _audit(monkeypatch, Adaptor(top_p=0.8), scores, []) == (1, 0, 0, 0)


def test_audit_finds_wrong_tokens(monkeypatch):
    scores = _log_probs(0.5, 0.25, 0.15, 0.1)
    assert _audit(monkeypatch, Adaptor(top_p=0.8), scores, [2, 3]) == (0, 0, 0, 2)
    assert _audit(monkeypatch, Adaptor(top_k=2), scores, [1]) == (0, 0, 0, 1)
    assert _audit(monkeypatch, Adaptor(typical_p=0.6), scores, [0]) == (0, 0, 0, 1)


def test_audit_excuses_the_boundary(monkeypatch):
    scores = _log_probs(0.5, 0.25, 0.15, 0.1)
    assert _audit(monkeypatch, Adaptor(top_p=0.750001), scores, [2]) == (0, 1, 0, 0)
    assert _audit(monkeypatch, Adaptor(top_p=0.7501), scores, [2]) == (0, 0, 0, 1)
    assert _audit(monkeypatch, Adaptor(epsilon_cutoff=0.1500001), scores, [2]) == (0, 1, 0, 0)


def test_audit_excuses_ties(monkeypatch):
    scores = _log_probs(0.4, 0.2, 0.2, 0.2)
    kept = measure.stock_chain(Adaptor(top_p=0.5))(IDS, scores)[0] != -math.inf
    assert kept.sum() == 2
    other = [1, 2, 3]
    other.remove(int(kept[1:].nonzero()) + 1)
    assert _audit(monkeypatch, Adaptor(top_p=0.5), scores, [other[0]])[2:] == (1, 0)


def test_audit_looks_up_drawn_tokens():
    audit = measure.KeptSetAudit(Adaptor(top_k=2))
    scores = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]])
    audit(torch.zeros(2, 1, dtype=torch.int64), scores)
    audit(torch.tensor([[0, 1], [0, 0]]), scores)
    audit.check_drawn(torch.tensor([0, 2]))
    assert (audit.drawn, audit.drawn_outside) == (4, 1)
    assert (audit.rows, audit.equal) == (4, 4)


@pytest.mark.parametrize(
    "adaptor",
    [
        Adaptor(top_p=1e-6),
        Adaptor(typical_p=1e-6),
        Adaptor(typical_p=1.0 - 1e-6),
        Adaptor(epsilon_cutoff=1.0 - 1e-9),
        Adaptor(min_p=1.0),
        Adaptor(),
    ],
)
def test_audit_at_the_ends_of_the_ranges(adaptor):
    audit = measure.KeptSetAudit(adaptor)
    scores = torch.randn(4, 500)
    audit(torch.zeros(4, 1, dtype=torch.int64), scores)
    assert (audit.rows, audit.wrong) == (4, 0)
    audit._explain(scores[:1], torch.ones(500, dtype=torch.bool), torch.ones(500) < 0)


def test_generate_runs_every_mode_to_the_same_length(model):
    inputs = {"input_ids": torch.tensor([[5, 6, 7], [0, 8, 9]])}
    inputs["attention_mask"] = torch.tensor([[1, 1, 1], [0, 1, 1]])
    modes = measure.mode_kwargs(Adaptor(top_p=0.9), seeds=torch.arange(2))
    runs = measure.time_generation(model, inputs, modes, rounds=2, length=6)
    assert set(runs) == {"greedy", "stock", "fused"}
    for mode, pair in runs.items():
        assert all(run.tokens.shape == (2, 6) and len(run.steps_s) == 5 for run in pair), mode
        assert torch.equal(pair[0].tokens, pair[1].tokens), mode
    assert len(measure.step_ratios(runs["fused"], runs["greedy"])) == 2


def test_generate_does_not_count_the_time_of_the_callback(model):
    inputs = {"input_ids": torch.tensor([[5]]), "attention_mask": torch.tensor([[1]])}
    kwargs = measure.mode_kwargs(Adaptor(), seeds=torch.zeros(1, dtype=torch.int64))["greedy"]
    measure.generate(model, inputs, kwargs, length=4)
    calls = []

    def pause():
        calls.append(None)
        time.sleep(0.5)

    run = measure.generate(model, inputs, kwargs, length=4, on_step=pause)
    assert len(calls) == 4 and min(run.steps_s) < 0.5


def test_generation_leaves_the_default_generator_alone(model):
    inputs = {"input_ids": torch.tensor([[5]]), "attention_mask": torch.tensor([[1]])}
    modes = measure.mode_kwargs(Adaptor(), seeds=torch.zeros(1, dtype=torch.int64))
    before = torch.get_rng_state()
    measure.time_generation(model, inputs, {"fused": modes["fused"]}, rounds=1, length=2)
    assert torch.equal(before, torch.get_rng_state())


def test_summaries():
    runs = [measure.Generation(torch.zeros(4, 3), 1.0, [0.5, 0.5])] * 3
    base = [measure.Generation(torch.zeros(4, 3), 1.0, [0.25, 0.25])] * 3
    assert measure.step_ms(runs) == 500.0
    assert measure.step_ratios(runs, base) == [2.0, 2.0, 2.0]
    assert measure.tokens_per_s(runs) == 6.0


def test_median_ms_takes_every_call_in_turn():
    order = []
    times = measure.median_ms([lambda: order.append(0), lambda: order.append(1)], budget_s=0.0)
    assert order == [0, 1] * 6 and len(times) == 2
