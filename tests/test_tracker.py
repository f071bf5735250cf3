"""The tracker: it changes nothing, and its records are what autograd on explicit logits says."""

import copy
import math

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer
from transformers import TrainingArguments as Arguments

from fastadapt import Responses, RewardPenalizeLoss, training
from fastadapt.tracking.callback import TrackerCallback
from fastadapt.tracking.pair_contexts import (
    ContextPair,
    cross_cells,
    encode_contexts,
    fitting,
    pairs_of_kind,
    shared_rows,
)
from fastadapt.tracking.tracker import RewardPenalizeTracker
from fastadapt.training.pairs import IGNORED, Pair, PairBatch, encode_pairs

WORDS = ("<pad>", "<unk>", "<end>", *"a b c d e f g h".split())
STEPS = 20


@pytest.fixture
def tokenizer():
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", eos_token="<end>"
    )


def tiny(dropout=0.3):
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2,
        initializer_range=0.5,
        attention_dropout=dropout,
    )
    return LlamaForCausalLM(config).train()


PAIRS = [Pair("a b", "c d", "c e f"), Pair("c", "g h", "a"), Pair("d e f", "a", "b b")]
OTHER = [ContextPair("a b", "c d", "e", "c f"), ContextPair("c", "g", "h h a", "a b c")]


def batches_of(tokenizer, kind):
    if kind == "same":
        return [encode_pairs(tokenizer, PAIRS), encode_pairs(tokenizer, PAIRS[1:])]
    return [encode_contexts(tokenizer, OTHER), encode_contexts(tokenizer, OTHER[::-1])]


def run(batches, make_tracker, *, plain=False):
    """20 steps of a model with dropout; returns its weights, generator state and the tracker."""
    model = tiny()
    model.model.layers[0].eval()  # a mode of its own, to be found again
    objective = RewardPenalizeLoss({"dpo": 1.0, "exmate": 0.5})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rows = [(batches[i % 2], None) for i in range(STEPS)]
    tracker = make_tracker(objective, model)
    torch.manual_seed(4)
    if tracker is not None:
        tracker.attach()
    if plain:
        for batch, _ in rows:
            if tracker is not None:
                tracker.see(batch)
            optimizer.zero_grad()
            loss, _ = training.pair_loss(model, batch, objective)
            loss.backward()
            optimizer.step()
    else:
        watched = rows if tracker is None else tracker.watch(rows)
        for _ in training.training_steps(model, watched, objective, optimizer):
            pass
    if tracker is not None:
        tracker.detach()
    modes = [module.training for module in model.modules()]
    return model.state_dict(), torch.get_rng_state(), modes, tracker


@pytest.mark.parametrize("plain", [False, True], ids=["training_steps", "loop"])
@pytest.mark.parametrize("kind", ["same", "different"])
def test_same_weights_with_and_without(kind, plain, tokenizer):
    """Bitwise, after 20 steps with dropout, recording at every step with extra forwards."""
    batches = batches_of(tokenizer, kind)
    without = run(batches, lambda objective, model: None, plain=plain)

    def make(objective, model):
        return RewardPenalizeTracker(objective, interval=1, model=model, extra_forwards=True)

    seen = run(batches, make, plain=plain)
    for name, value in without[0].items():
        assert torch.equal(value, seen[0][name]), name
    assert torch.equal(without[1], seen[1]) and without[2] == seen[2]
    tracker = seen[3]
    assert [row["step"] for row in tracker.records] == list(range(STEPS))
    assert len(tracker.pairs) == sum(len(batches[i % 2].tokens) // 2 for i in range(STEPS))
    assert tracker._handles == []


class PairTrainer(Trainer):
    """transformers' trainer with a loss on pairs."""

    objective: RewardPenalizeLoss
    tracker: RewardPenalizeTracker | None = None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        batch = PairBatch(inputs["tokens"][0], inputs["attention_mask"][0], inputs["labels"][0])
        if self.tracker is not None:
            self.tracker.see(batch)
        return training.pair_loss(model, batch, self.objective)[0]


def train(batches, folder, tracked):
    model = tiny()
    arguments = Arguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        seed=5,
        remove_unused_columns=False,
    )
    data = [batches[0]._asdict() for _ in range(4)]
    objective = RewardPenalizeLoss({"dpo": 1.0, "exmate": 0.5})
    tracker = RewardPenalizeTracker(objective, interval=5, model=model, extra_forwards=True)
    trainer = PairTrainer(
        model=model,
        args=arguments,
        train_dataset=data,
        callbacks=[TrackerCallback(tracker)] if tracked else [],
    )
    trainer.objective, trainer.tracker = objective, tracker if tracked else None
    trainer.train()
    return model.state_dict(), tracker


def test_trainer_of_transformers_is_not_changed(tokenizer, tmp_path):
    batches = batches_of(tokenizer, "different")
    without, _ = train(batches, tmp_path / "a", tracked=False)
    seen, tracker = train(batches, tmp_path / "b", tracked=True)
    for name, value in without.items():
        assert torch.equal(value, seen[name]), name
    # one record for a step that is due, of its two micro-batches
    assert [row["step"] for row in tracker.records] == [0, 5, 10, 15]
    assert (
        tracker.records[0]["chosen_in_rejected/sum"] != tracker.records[0]["chosen_in_chosen/sum"]
    )


def logps(model, batch):
    """log P of each sequence's response, float64 softmax of the model's logits."""
    inputs = {"input_ids": batch.tokens, "attention_mask": batch.attention_mask}
    table = model(**inputs).logits[:, :-1].double().log_softmax(-1)
    own = table.gather(-1, batch.labels.clamp(min=0)[..., None])[..., 0]
    return torch.where(batch.mask, own, 0.0).sum(-1)


@torch.no_grad()
def four_cells(model, tokenizer, pairs):
    """The cells one sequence at a time, each pair encoded by itself."""
    cells = {
        name: []
        for name in (
            "chosen_in_chosen",
            "rejected_in_rejected",
            "rejected_in_chosen",
            "chosen_in_rejected",
        )
    }
    for p in pairs:
        texts = {
            "chosen_in_chosen": (p.chosen_prompt, p.chosen),
            "rejected_in_rejected": (p.rejected_prompt, p.rejected),
            "rejected_in_chosen": (p.chosen_prompt, p.rejected),
            "chosen_in_rejected": (p.rejected_prompt, p.chosen),
        }
        for name, (prompt, response) in texts.items():
            batch = encode_pairs(tokenizer, [Pair(prompt, response, response)], chat=False)
            cells[name].append(float(logps(model, batch)[0]))
    return cells


@pytest.mark.parametrize("kind", ["same", "different"])
def test_cells_are_the_log_probabilities(kind, tokenizer):
    pairs = pairs_of_kind("same-prompt", PAIRS) if kind == "same" else OTHER
    batch = encode_contexts(tokenizer, pairs)
    model = tiny(dropout=0.0)
    objective = RewardPenalizeLoss({"exmate": 1.0})
    # x⁺ = x⁻ needs no forward pass of its own
    tracker = RewardPenalizeTracker(objective, model=model, extra_forwards=kind == "different")
    with tracker:
        tracker.see(batch)
        training.pair_loss(model, batch, objective)
    for name, values in four_cells(model, tokenizer, pairs).items():
        values = torch.tensor(values).double()
        row = tracker.records[0]
        assert row[f"{name}/sum"] == pytest.approx(float(values.mean()), abs=1e-4), name
        median = float(values.quantile(torch.tensor(0.5).double()))
        assert row[f"{name}/sum/p50"] == pytest.approx(median, abs=1e-4)


def test_cells_that_are_not_known_are_none(tokenizer):
    batch = encode_contexts(tokenizer, OTHER)
    model, objective = tiny(), RewardPenalizeLoss({"exmate": 1.0})
    with RewardPenalizeTracker(objective) as tracker:
        tracker.see(batch)
        training.pair_loss(model, batch, objective)
    assert tracker.records[0]["rejected_in_chosen/sum"] is None
    assert tracker.records[0]["rejected_in_rejected/sum"] < 0


LOSSES = [{"dpo": 1.0}, {"exmate": 1.0}, {"unlikelihood": 1.0}, {"dpo": 1.0, "mle": 0.5}]


@pytest.mark.parametrize("weights", LOSSES, ids=["+".join(w) for w in LOSSES])
def test_masses_are_those_of_the_logits(weights):
    """Random pairs that share rows, some labels too: Σ |∂L/∂z| by autograd on shared logits."""
    torch.manual_seed(1)
    chosen = torch.tensor([[3, 4, 5, 6, 7], [3, 4, 4, 2, 2], [3, 5, 5, 6, 2]])
    rejected = torch.tensor([[3, 4, 5, 8, 2], [3, 9, 4, 2, 2], [4, 5, 5, 6, 2]])
    mask = torch.ones_like(chosen)
    mask[1, 4] = 0
    labels = torch.cat([chosen, rejected])[:, 1:].clone()
    labels[:, 0] = IGNORED  # the prompt has two tokens
    labels[[1, 4], 3] = IGNORED
    batch = PairBatch(torch.cat([chosen, rejected]), torch.cat([mask, mask]), labels)
    contexts = {}
    z_of = {}
    for i in range(6):
        for t in range(4):
            key = (i % 3, *batch.tokens[i, : t + 1].tolist())
            z_of.setdefault(key, torch.randn(12, dtype=torch.float64, requires_grad=True))
            contexts[i, t] = key
    z = torch.stack([torch.stack([z_of[contexts[i, t]] for t in range(4)]) for i in range(6)])
    y = labels.clamp(min=0)[..., None]
    log_odds = z.gather(-1, y)[..., 0] - z.scatter(-1, y, -math.inf).logsumexp(-1)
    objective = RewardPenalizeLoss(weights)
    with RewardPenalizeTracker(objective) as tracker:
        tracker.see(batch)
        sides = (
            Responses(m, k) for m, k in zip(log_odds.chunk(2), batch.mask.chunk(2), strict=True)
        )
        loss, _ = objective(*sides)
    keys = list(z_of)
    grads = torch.autograd.grad(loss, [z_of[k] for k in keys], allow_unused=True)
    wanted = dict.fromkeys(("chosen", "rejected", "other"), 0.0)
    for key, grad in zip(keys, grads, strict=True):
        if grad is None:
            continue
        places = [at for at, other in contexts.items() if other == key]
        owner = {}
        for i, t in places:
            label = int(labels[i, t])
            if label != IGNORED and owner.get(label) != "chosen":
                owner[label] = "chosen" if i < 3 else "rejected"
        for token, value in enumerate(grad.abs().tolist()):
            wanted[owner.get(token, "other")] += value
    row = tracker.records[0]
    for name, value in wanted.items():
        assert row[f"mass/{name}"] == pytest.approx(value, abs=1e-12), name
    assert bool(shared_rows(batch).any())


def test_shared_rows_end_at_the_first_difference(tokenizer):
    batch = encode_pairs(tokenizer, [Pair("a b", "c d", "c e f")])
    assert shared_rows(batch).tolist() == [[True, True, True, False, False]]
    assert not shared_rows(encode_contexts(tokenizer, OTHER)).any()


def test_counters_and_weights():
    """Log-odds on both sides of each threshold."""
    mask = torch.ones(1, 3, dtype=torch.bool)
    chosen = Responses(torch.zeros(1, 3, requires_grad=True), mask)
    rejected = Responses(torch.tensor([[11.6, 17.0, -90.0]]), mask)
    weights = {"dpo": 1.0, "exmate": 1.0, "unlikelihood_penalty": 1.0}
    objective = RewardPenalizeLoss(weights, beta=0.1, coefficient=0.5, norm="token")
    with RewardPenalizeTracker(objective) as tracker:
        objective(chosen, rejected)
    row = tracker.records[0]
    assert [row[f"count/{k}"] for k in ("underflow", "dead_zone", "naive_inf")] == [1, 2, 1]
    assert row["count/nonfinite"] == 0
    u = 0.1 * (3 * math.log(0.5) + 90.0)
    assert row["weight/dpo_k"] == pytest.approx(0.1 / (1 + math.exp(u)), rel=1e-4)
    assert row["weight/exmate"] == pytest.approx(0.5 * 2 / 3, rel=1e-4)
    assert row["weight/unlikelihood_odds/max"] == pytest.approx(math.exp(17.0), rel=1e-5)
    assert row["accuracy"] == 1.0 and row["margin"] == pytest.approx(3 * math.log(0.5) + 90, 1e-4)


def test_infinite_log_odds_are_counted():
    mask = torch.ones(1, 2, dtype=torch.bool)
    chosen = Responses(torch.zeros(1, 2, requires_grad=True), mask)
    rejected = Responses(torch.tensor([[-math.inf, 1.0]]), mask)
    objective = RewardPenalizeLoss({"exmate": 1.0})
    with RewardPenalizeTracker(objective) as tracker:
        objective(chosen, rejected)
    assert tracker.records[0]["count/nonfinite"] >= 1


def test_only_calls_with_a_graph_count(tokenizer):
    batch = encode_pairs(tokenizer, PAIRS)
    model, objective = tiny(), RewardPenalizeLoss({"exmate": 1.0})
    with RewardPenalizeTracker(objective, interval=2) as tracker:
        for i in range(6):
            tracker.see(batch)
            with torch.set_grad_enabled(i % 2 == 0):
                training.pair_loss(model, batch, objective)
    assert [row["step"] for row in tracker.records] == [0, 2]


def test_wrong_use_is_refused(tokenizer):
    objective, model = RewardPenalizeLoss({"exmate": 1.0}), tiny()
    with pytest.raises(ValueError, match="interval: expected at least 1, got 0"):
        RewardPenalizeTracker(objective, interval=0)
    with pytest.raises(ValueError, match="extra_forwards: expected a model"):
        RewardPenalizeTracker(objective, extra_forwards=True)
    batch = encode_pairs(tokenizer, PAIRS)
    with RewardPenalizeTracker(objective, model=model) as tracker:
        with pytest.raises(RuntimeError, match="expected one that is not attached"):
            tracker.attach()
        with pytest.raises(ValueError, match="expected a batch that was seen"):
            training.pair_loss(model, batch, objective)
        tracker.see(encode_pairs(tokenizer, PAIRS[:1]))
        with pytest.raises(ValueError, match="batch: expected one seen for these log_odds"):
            training.pair_loss(model, batch, objective)


def test_cross_cells_of_one_prompt_are_the_pairs(tokenizer):
    batch = encode_pairs(tokenizer, PAIRS)
    crossed = cross_cells(batch)
    assert torch.equal(crossed.labels, batch.labels)
    again = cross_cells(cross_cells(encode_contexts(tokenizer, OTHER)))
    own = encode_contexts(tokenizer, OTHER)
    length = own.labels.shape[1]
    assert torch.equal(again.labels[:, :length], own.labels)


def test_kinds_and_fitting(tokenizer):
    swapped = pairs_of_kind("same-response", PAIRS)
    assert swapped[0] == ("a b", "c d", "c", "c d") and swapped[2].rejected_prompt == "a b"
    assert pairs_of_kind("unpaired", PAIRS)[0] == ("a b", "c d", "c", "a")
    with pytest.raises(ValueError, match="kind: expected one of"):
        pairs_of_kind("other", PAIRS)
    with pytest.raises(ValueError, match="expected two or more"):
        pairs_of_kind("same-response", PAIRS[:1])
    assert fitting(tokenizer, PAIRS, count=9, max_length=7) == [PAIRS[0], PAIRS[1], PAIRS[2]]
    assert fitting(tokenizer, PAIRS, count=9, max_length=5) == [PAIRS[1]]
    assert fitting(tokenizer, PAIRS, count=1, max_length=7) == PAIRS[:1]


def test_copying_a_tracked_objective_is_possible():
    """Hooks are the tracker's only trace on the objective, and detaching removes it."""
    objective = RewardPenalizeLoss({"exmate": 1.0})
    with RewardPenalizeTracker(objective):
        assert len(objective._forward_hooks) == 1
    assert len(objective._forward_hooks) == 0 and copy.deepcopy(objective).weights
