"""The tracker in trl's trainers: it changes nothing, and says the same of trl's DPO and of ours."""

import contextlib
import math
import random
import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

datasets = pytest.importorskip("datasets", reason="needs trl")
pytest.importorskip("trl")

from peft import LoraConfig  # noqa: E402
from trl import DPOConfig, DPOTrainer, KTOConfig  # noqa: E402

from fastadapt import Responses, RewardPenalizeLoss  # noqa: E402
from fastadapt.tracking import RewardPenalizeTracker, track  # noqa: E402
from fastadapt.tracking.following import log_odds_of, pair_batch  # noqa: E402
from fastadapt.tracking.metrics import slopes_of  # noqa: E402
from fastadapt.tracking.recorder import _of_tokens  # noqa: E402
from fastadapt.trl import (  # noqa: E402
    RewardPenalizeTrainer,
    UnpairedRewardPenalizeTrainer,
    fused_log_probs,
)


@pytest.fixture(scope="module")
def tokenizer(letter_model):
    return AutoTokenizer.from_pretrained(letter_model)


def _pairs(count, seed=0):
    rng = random.Random(seed)

    def text(low, high):
        return " ".join(rng.choices("abcdefgh", k=rng.randint(low, high)))

    rows = [
        {"prompt": text(1, 4), "chosen": " " + text(1, 6), "rejected": " " + text(1, 6)}
        for _ in range(count)
    ]
    return datasets.Dataset.from_list(rows)


def _trainer(folder, tokenizer, tmp_path, kind=DPOTrainer, peft=None, named=None, **changes):
    settings = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "logging_steps": 1,
        "learning_rate": 5e-3,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "seed": 5,
        **changes,
    }
    torch.manual_seed(7)
    return kind(
        folder,
        args=DPOConfig(**settings),
        train_dataset=_pairs(40),
        eval_dataset=_pairs(4, seed=1),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules=["q_proj"]) if peft else None,
        **(named or {}),
    )


def _log(trainer):
    return [entry for entry in trainer.state.log_history if "grad_norm" in entry]


@pytest.mark.parametrize("fused", [False, True], ids=["trl", "fused"])
@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_a_run_of_trl_is_not_changed(letter_model, tokenizer, tmp_path, fused, peft):
    """To the bit, with evaluations in between; what is recorded is what trl logs."""
    ends = []
    for tracked in (False, True):
        changes = {"eval_strategy": "steps", "eval_steps": 1}
        trainer = _trainer(letter_model, tokenizer, tmp_path, peft=peft, **changes)
        if tracked:
            tracker = track(trainer, interval=1)
        with fused_log_probs() if fused else contextlib.nullcontext():
            trainer.train()
        ends.append({k: v.clone() for k, v in trainer.model.state_dict().items()})
    assert all(torch.equal(ends[0][name], x) for name, x in ends[1].items())
    assert "compute_loss" not in trainer.__dict__ and tracker._handles == []
    assert [row["step"] for row in tracker.records] == [0, 1, 2, 3]
    assert len(tracker.pairs) == 16
    for row, entry in zip(tracker.records, _log(trainer), strict=True):
        assert row["loss"] == pytest.approx(entry["loss"], rel=1e-4)
        for side in ("chosen", "rejected"):
            logps = row[f"{side}_in_{side}/sum"]
            assert logps == pytest.approx(entry[f"logps/{side}"], rel=1e-5)
        margin = entry["logps/chosen"] - entry["logps/rejected"]
        assert row["margin"] == pytest.approx(margin, abs=1e-3)
        assert row["rejected_in_chosen/sum"] == row["rejected_in_rejected/sum"]
        assert row["weight/dpo_k"] == row["weight/rejected"]


def test_records_of_trl_are_those_of_our_trainer(letter_model, tokenizer, tmp_path):
    """The same dictionary of the same run, whose masses and weights are from another way."""
    found = []
    for kind in (DPOTrainer, RewardPenalizeTrainer):
        own = kind is RewardPenalizeTrainer
        tracker = RewardPenalizeTracker(interval=2, extra_forwards=True)
        named = {"loss": {"dpo": 1.0}, "tracker": tracker} if own else {}
        changes = {"gradient_accumulation_steps": 2}
        trainer = _trainer(
            letter_model, tokenizer, tmp_path, kind, named=named, beta=0.3, **changes
        )
        if not own:
            tracker.follow(trainer)
        with contextlib.nullcontext() if own else fused_log_probs():
            trainer.train()
        found.append(tracker)
    theirs, ours = found
    assert [row["step"] for row in ours.records] == [0, 2]
    for one, other in zip(ours.records, theirs.records, strict=True):
        assert one.keys() == other.keys()
        parts = 2  # the loss of ours is a micro-batch's share of the step's, as are its slopes
        for name, value in one.items():
            factor = parts if name == "loss" or name.startswith("mass/") else 1
            expected = other[name]
            if value is None:
                assert expected is None, name
            else:
                assert factor * value == pytest.approx(expected, rel=2e-3, abs=1e-5), name
        for name in ("weight/dpo_k", "weight/chosen", "mass/chosen", "rho/median", "margin"):
            assert one[name] is not None and math.isfinite(one[name])
    for one, other in zip(ours.pairs, theirs.pairs, strict=True):
        assert one["rho"] == pytest.approx(other["rho"], rel=1e-3)


@pytest.mark.parametrize(
    ("loss_type", "weight"),
    [("sigmoid", 0.05), ("hinge", 0.1), ("apo_zero", 0.025), ("nca_pair", 0.025)],
)
def test_weights_of_any_loss_of_trl(letter_model, tokenizer, tmp_path, loss_type, weight):
    """At the reference, where every ratio is 0: by the formulas of trl, β = 0.1."""
    trainer = _trainer(letter_model, tokenizer, tmp_path, loss_type=loss_type, max_steps=1)
    tracker = track(trainer, rho=False)
    trainer.train()
    (row,) = tracker.records
    assert row["weight/chosen"] == pytest.approx(weight, rel=1e-4)
    assert row["weight/rejected"] == pytest.approx(weight, rel=1e-4)
    assert (row["weight/dpo_k"] is None) == (loss_type != "sigmoid")
    assert row["mass/other"] > 0 and "rho/median" not in row


@pytest.mark.parametrize(
    "loss",
    [{"exmate": 1.0, "simpo": 0.5}, {"hinge": 1.0}, {"mle": 1.0}],
    ids=["exmate+simpo", "hinge", "mle"],
)
def test_our_trainer_records_any_mixture(letter_model, tokenizer, tmp_path, loss):
    named = {"loss": loss, "tracker": RewardPenalizeTracker(interval=1)}
    trainer = _trainer(letter_model, tokenizer, tmp_path, RewardPenalizeTrainer, named=named)
    trainer.train()
    records = named["tracker"].records
    assert [row["step"] for row in records] == [0, 1, 2, 3]
    for row, entry in zip(records, _log(trainer), strict=True):
        assert row["loss"] == pytest.approx(entry["loss"], rel=1e-3)
        assert row["weight/chosen"] > 0
        if loss == {"mle": 1.0}:
            assert row["margin"] is row["weight/rejected"] is row["rho/median"] is None
            assert row["rejected_in_rejected/sum"] is None and row["mass/rejected"] == 0
        else:
            assert row["weight/rejected"] >= 0 and row["rho/pairs"] == 4
    assert ("weight/exmate" in records[0]) == ("exmate" in loss)


def test_packed_rows_have_the_same_records(letter_model, tokenizer, tmp_path):
    found = []
    for packs in (False, True):
        named = {"loss": {"simpo": 1.0}, "tracker": RewardPenalizeTracker(interval=1)}
        changes = {"padding_free": packs, "max_steps": 2}
        kind = RewardPenalizeTrainer
        _trainer(letter_model, tokenizer, tmp_path, kind, named=named, **changes).train()
        found.append(named["tracker"].records)
    for one, other in zip(*found, strict=True):
        for name in ("loss", "margin", "mass/rejected", "weight/chosen", "rho/median"):
            assert one[name] == pytest.approx(other[name], rel=1e-3), name


def test_unpaired_rows_have_no_margin(letter_model, tokenizer, tmp_path):
    """Also where a batch has as many of both."""
    rows = [
        {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
        for pair in _pairs(8)
        for side in ("chosen", "rejected")
    ]
    tracker = RewardPenalizeTracker(interval=1)
    settings = {"max_steps": 2, "save_strategy": "no", "use_cpu": True, "bf16": False}
    trainer = UnpairedRewardPenalizeTrainer(
        letter_model,
        args=KTOConfig(str(tmp_path), per_device_train_batch_size=16, report_to=[], **settings),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        loss={"kto": 1.0, "mle": 0.2},
        tracker=tracker,
    )
    trainer.train()
    assert [row["step"] for row in tracker.records] == [0, 1] and tracker.pairs == []
    for row in tracker.records:
        assert row["margin"] is row["rho/median"] is row["rejected_in_chosen/sum"] is None
        assert row["weight/chosen"] > 0 and row["weight/rejected"] > 0
        assert row["chosen_in_chosen/sum"] < 0 and row["mass/rejected"] > 0


def test_sides_of_unequal_sizes():
    """Unpaired responses: no margin, no ρ, the masses of each side."""
    torch.manual_seed(0)
    chosen = torch.randn(2, 3, requires_grad=True)
    rejected = torch.randn(5, 3, requires_grad=True)
    sides = (Responses(x, torch.ones_like(x, dtype=torch.bool)) for x in (chosen, rejected))
    objective = RewardPenalizeLoss({"kto": 1.0, "unlikelihood_penalty": 0.5})
    with RewardPenalizeTracker(objective) as tracker:
        refs = torch.zeros(2) - 2, torch.zeros(5) - 2
        loss, _ = objective(*sides, *refs, reference_point=torch.tensor(0.1))
    loss.backward()
    (row,) = tracker.records
    assert row["margin"] is row["accuracy"] is row["rejected_in_chosen/sum"] is None
    assert row["mass/chosen"] == pytest.approx(float(chosen.grad.abs().sum()), rel=1e-5)
    assert row["mass/rejected"] == pytest.approx(float(rejected.grad.abs().sum()), rel=1e-5)
    assert row["weight/chosen"] > 0 and row["weight/rejected"] > 0
    none = Responses(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.bool))
    with RewardPenalizeTracker(objective) as tracker:
        given = Responses(chosen.detach().requires_grad_(), torch.ones(2, 3, dtype=torch.bool))
        objective(given, none, refs[0], torch.zeros(0), reference_point=torch.tensor(0.1))
    assert tracker.records[0]["weight/rejected"] is None
    assert tracker.records[0]["rejected_in_rejected/sum"] is None


@pytest.mark.parametrize("name", ["dpo", "hinge", "ipo", "robust", "simpo", "exmate", "nca_pair"])
def test_weights_are_derivatives_in_log_probabilities(name):
    """B ∂L/∂S by finite differences of every token's log p, in float64."""
    torch.manual_seed(2)
    logps = -torch.rand(2, 3, 4, dtype=torch.float64) - 0.1
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]).bool()
    refs = torch.tensor([-2.0, -1.0, -0.5]), torch.tensor([-1.5, -1.2, -0.4])
    objective = RewardPenalizeLoss({name: 1.0})

    def value(x):
        given = [Responses(log_odds_of(side), mask) for side in x]
        references = refs if objective.takes("ref_chosen_logps") else ()
        return objective(*given, *references)

    x = logps.clone().requires_grad_()
    with RewardPenalizeTracker(objective) as tracker:
        loss, _ = value(x)
    (gradient,) = torch.autograd.grad(loss, x)
    row = tracker.records[0]
    for side, sign, g in zip(("chosen", "rejected"), (-1, 1), gradient, strict=True):
        per_response = (g * mask).sum(-1) / mask.sum(-1)
        expected = float(sign * 3 * per_response.mean())
        assert row[f"weight/{side}"] == pytest.approx(expected, rel=1e-6), side
    if name == "dpo":
        assert row["weight/dpo_k"] == pytest.approx(row["weight/rejected"], rel=1e-9)


def test_slopes_are_those_of_the_loss_whatever_the_dtype():
    x = torch.randn(2, 3).bfloat16()
    side = Responses(x, torch.ones(2, 3, dtype=torch.bool))
    found = slopes_of(RewardPenalizeLoss({"mle": 1.0}), {"chosen": side, "rejected": None})
    assert found.keys() == {"chosen"}
    torch.testing.assert_close(found["chosen"], -torch.sigmoid(-x.double()) / 6)


def test_log_odds_of_log_probabilities():
    m = torch.tensor([-80.0, -1.0, 0.0, 10.0, 60.0], dtype=torch.float64)
    torch.testing.assert_close(log_odds_of(torch.nn.functional.logsigmoid(m)), m)
    assert log_odds_of(torch.zeros(1)) > 24 * math.log(2)  # counted as 1 in float32


def _checkpointed(folder, tokenizer, tmp_path, tracked, kind=DPOTrainer, **changes):
    named = {"loss": {"dpo": 1.0}} if kind is RewardPenalizeTrainer else None
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, **changes}
    trainer = _trainer(folder, tokenizer, tmp_path, kind, named=named, **settings)
    return trainer, track(trainer, interval=2) if tracked else None


@pytest.mark.parametrize("kind", [DPOTrainer, RewardPenalizeTrainer])
@pytest.mark.parametrize("restores", [False, True])
def test_a_resumed_run_has_all_records(letter_model, tokenizer, tmp_path, kind, restores):
    """Those before the checkpoint from there, each step once, as of a run without a break."""
    changes = {"restore_callback_states_from_checkpoint": restores}
    whole, expected = _checkpointed(letter_model, tokenizer, tmp_path, True, kind, **changes)
    whole.train()
    trainer, tracker = _checkpointed(letter_model, tokenizer, tmp_path, True, kind, **changes)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert [row["step"] for row in tracker.records] == [0, 2, 4]
    assert tracker.records == expected.records and tracker.pairs == expected.pairs


def test_a_checkpoint_without_records_is_said(letter_model, tokenizer, tmp_path):
    trainer, _ = _checkpointed(letter_model, tokenizer, tmp_path, False)
    trainer.train()
    trainer, tracker = _checkpointed(letter_model, tokenizer, tmp_path, True)
    with pytest.warns(UserWarning, match="no records of a tracker: those before step 3 are"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert [row["step"] for row in tracker.records] == [4]
    again, tracker = _checkpointed(letter_model, tokenizer, tmp_path, True, max_steps=8)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*no records.*")
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert [row["step"] for row in tracker.records] == [4, 6]


def test_a_run_that_failed_can_be_started_again(letter_model, tokenizer, tmp_path):
    trainer = _trainer(letter_model, tokenizer, tmp_path)
    tracker, step = track(trainer, interval=1), trainer.training_step

    def fails(*arguments, **named):
        raise KeyboardInterrupt

    trainer.training_step = fails
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.training_step = step
    trainer.train()
    assert [row["step"] for row in tracker.records] == [0, 1, 2, 3]
    assert "compute_loss" not in trainer.__dict__


BATCH = {
    "input_ids": torch.tensor([[1, 2, 3, 0], [1, 4, 0, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]),
    "completion_mask": torch.tensor([[0, 1, 1, 0], [0, 1, 0, 0]]),
}


def test_batches_of_pairs_and_others():
    assert pair_batch(BATCH).labels.tolist() == [[2, 3, -100], [4, -100, -100]]
    assert pair_batch({**BATCH, "label": torch.tensor([True, False])}) is None
    assert pair_batch({"input_ids": BATCH["input_ids"]}) is None


def test_as_many_responses_that_are_no_pairs():
    """Said by who hands the batch on."""
    x = torch.randn(1, 3, requires_grad=True)
    side = Responses(x, torch.ones(1, 3, dtype=torch.bool))
    objective = RewardPenalizeLoss({"exmate": 1.0})
    with RewardPenalizeTracker(objective, interval=1) as tracker:
        tracker.see(None)
        objective(side, side)
    with tracker:
        tracker.see(pair_batch(BATCH))
        objective(side, side)
    assert [row["margin"] for row in tracker.records] == [None, 0.0]


def test_states_of_packed_rows_and_of_prompts_that_are_learnt():
    batch = pair_batch(BATCH)
    states = torch.randn(2, 4, 5)
    packed = states[batch.attention_mask.bool()][None]
    expected = states[:, :-1].masked_fill(batch.attention_mask[:, :-1, None] == 0, 0.0)
    assert torch.equal(_of_tokens(packed, batch), expected)
    virtual = torch.cat([torch.randn(2, 7, 5), states], 1)
    for given in (virtual, states, states[:, :-1]):
        assert torch.equal(_of_tokens(given, batch), states[:, :-1])
    for given in (states[:1], states[:, :2]):
        with pytest.raises(ValueError, match="batch: expected one whose tokens reached the head"):
            _of_tokens(given, batch)


def test_what_is_refused(letter_model, tokenizer, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(letter_model)
    plain = Trainer(model, TrainingArguments(str(tmp_path), use_cpu=True), train_dataset=[])
    with pytest.raises(TypeError, match="trainer: expected one with a mixture"):
        track(plain)
    trainer = _trainer(letter_model, tokenizer, tmp_path)
    with pytest.raises(ValueError, match="interval: expected at least 1, got 0"):
        track(trainer, interval=0)
    named = {"loss": {"exmate": 1.0}, "tracker": 10}
    with pytest.raises(TypeError, match=r"such as RewardPenalizeTracker\(interval=10\), got 10"):
        _trainer(letter_model, tokenizer, tmp_path, RewardPenalizeTrainer, named=named)
    named["tracker"] = RewardPenalizeTracker(RewardPenalizeLoss({"exmate": 1.0}))
    with pytest.raises(ValueError, match="tracker: expected one that has recorded no other run"):
        _trainer(letter_model, tokenizer, tmp_path, RewardPenalizeTrainer, named=named)
    weight = trainer.model.get_output_embeddings().weight
    weight.ds_id, weight.ds_shape = 0, weight.shape
    with pytest.raises(ValueError, match="tracker: expected a head that is whole on each process"):
        track(trainer)
    track(trainer, rho=False)
