"""Negatives of the chosen rows in the trainer, beside the same loss made of full logits."""

import random

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

datasets = pytest.importorskip("datasets", reason="needs trl")
pytest.importorskip("trl")

from peft import LoraConfig  # noqa: E402
from trl import DPOConfig, KTOConfig  # noqa: E402
from trl.trainer import utils as trl_utils  # noqa: E402

from fastadapt.trl import RewardPenalizeTrainer, UnpairedRewardPenalizeTrainer  # noqa: E402
from fastadapt.trl._negatives import Batch, CandidateLogOdds, Negatives  # noqa: E402
from fastadapt.trl._served import served  # noqa: E402
from test_gathered_head import empty_between_passes  # noqa: E402

LOSS = {"mle": 1.0, "candidate_unlikelihood_penalty": 0.7}
ASKED = {
    "previous": {},
    "previous of the sequence": {"window": 3, "context": "sequence"},
    "top_k": {"k": 3},
    "repeated_ngrams": {"n": 2},
    "repeated_ngrams of the sequence": {"n": 2, "context": "sequence"},
}


@pytest.fixture(scope="module")
def tokenizer(letter_model):
    return AutoTokenizer.from_pretrained(letter_model)


def _pairs(count, seed=0):
    """Of four letters, so that they repeat."""
    rng = random.Random(seed)

    def text(low, high):
        return " ".join(rng.choices("abcd", k=rng.randint(low, high)))

    rows = [
        {"prompt": text(1, 6), "chosen": " " + text(1, 9), "rejected": " " + text(1, 6)}
        for _ in range(count)
    ]
    return datasets.Dataset.from_list(rows)


def _settings(tmp_path, **changes):
    return {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "logging_steps": 1,
        "learning_rate": 2e-3,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "seed": 5,
        **changes,
    }


def _candidates(kind, options, tokens, first, logits):
    """The candidates of a token at each place of a row from `first` on, by plain loops."""
    start = 0 if options.get("context") == "sequence" else first
    for t in range(first, len(tokens)):
        earlier = tokens[start:t]
        if kind == "previous":
            window = options.get("window")
            some = set(earlier if window is None else earlier[-window:])
        elif kind == "repeated_ngrams":
            n = options.get("n", 4)
            whole = [tuple(earlier[i : i + n]) for i in range(len(earlier) - n + 1)]
            prefix = tuple(earlier[len(earlier) - n + 1 :])
            some = {g[-1] for g in whole if g[:-1] == prefix}
        else:
            z = logits[t - 1].clone()
            z[tokens[t]] = -torch.inf
            some = set(z.topk(options.get("k", 1)).indices.tolist())
        yield t, sorted(some - {tokens[t]})


class OfLogits(RewardPenalizeTrainer):
    """The loss of the chosen rows from the logits of the model's own forward, in float64."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        rows = len(inputs["input_ids"]) // 2
        ids, there = inputs["input_ids"][:rows], inputs["attention_mask"][:rows]
        logits = model(input_ids=ids, attention_mask=there).logits.double()
        loss = 0.0
        for i in range(rows):
            places = inputs["completion_mask"][i].nonzero()[:, 0].tolist()
            first, last = places[0], places[-1] + 1
            tokens = ids[i, :last].tolist()
            p = logits[i].softmax(-1)
            asked = (self.kind, self.asked, tokens, first, logits[i].detach())
            for t, candidates in _candidates(*asked):
                self.seen += len(candidates)
                loss = loss - p[t - 1, tokens[t]].log()
                loss = loss - 0.7 * torch.log1p(-p[t - 1, candidates]).sum()
        return (loss / num_items_in_batch[0]).float()


def _model(folder, name):
    torch.manual_seed(3)
    if name == "letters":
        return AutoModelForCausalLM.from_pretrained(folder)
    known = transformers.AutoConfig.from_pretrained(folder)
    config = transformers.Gemma2Config(
        vocab_size=known.vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=8,
        final_logit_softcapping=3.0,
        eos_token_id=known.eos_token_id,
        pad_token_id=known.pad_token_id,
        bos_token_id=None,
        initializer_range=0.4,
    )
    return transformers.Gemma2ForCausalLM(config)


def _both(folder, tokenizer, tmp_path, asked, name="letters", adapters=None, **changes):
    """Logs and weights of the trainer of logits and of ours."""
    kind, options = asked.split()[0], ASKED[asked]
    found = []
    for trainer_class in (OfLogits, RewardPenalizeTrainer):
        model = _model(folder, name)
        torch.manual_seed(4)
        trainer = trainer_class(
            model,
            args=DPOConfig(**_settings(tmp_path, **changes)),
            train_dataset=_pairs(40),
            processing_class=tokenizer,
            peft_config=adapters,
            loss=LOSS,
            negatives=kind,
            negative_options=options,
        )
        trainer.kind, trainer.asked, trainer.seen = kind, options, 0
        if adapters is not None:
            with torch.no_grad():  # B is 0 at first, and the adapter nothing
                trainer.model.get_base_model().lm_head.lora_B["default"].weight.normal_(std=0.1)
        trainer.train()
        if trainer_class is OfLogits:
            assert trainer.seen > 10
        log = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
        weights = {k: v.detach() for k, v in trainer.model.named_parameters() if v.requires_grad}
        found.append((log, weights))
    return found


def _assert_same(found):
    (theirs, expected), (ours, weights) = found
    assert len(theirs) == len(ours) == 4
    for one, other in zip(ours, theirs, strict=True):
        for name in ("loss", "grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=2e-4), name
        assert one["negatives/per_token"] > 0
    assert theirs[0]["loss"] == pytest.approx(ours[0]["loss"], rel=1e-6)
    for name, x in weights.items():
        torch.testing.assert_close(x, expected[name], rtol=1e-3, atol=2e-4, msg=name)


@pytest.mark.parametrize("asked", ASKED)
def test_losses_are_those_of_logits_over_micro_batches(letter_model, tokenizer, tmp_path, asked):
    changes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    _assert_same(_both(letter_model, tokenizer, tmp_path, asked, **changes))


@pytest.mark.parametrize("asked", ["previous", "top_k"])
def test_a_capped_model(letter_model, tokenizer, tmp_path, asked):
    _assert_same(_both(letter_model, tokenizer, tmp_path, asked, name="Gemma2"))


@pytest.mark.filterwarnings("ignore:Model .*tie_word_embeddings:UserWarning")
@pytest.mark.parametrize("asked", ["top_k", "repeated_ngrams of the sequence"])
def test_lora_on_the_head(letter_model, tokenizer, tmp_path, asked):
    adapters = LoraConfig(r=4, lora_alpha=8, target_modules=["lm_head", "q_proj"])
    _assert_same(_both(letter_model, tokenizer, tmp_path, asked, adapters=adapters))


def _trainer(folder, tokenizer, tmp_path, loss=LOSS, **named):
    return RewardPenalizeTrainer(
        folder,
        args=DPOConfig(**_settings(tmp_path)),
        train_dataset=_pairs(16),
        eval_dataset=_pairs(4, seed=1),
        processing_class=tokenizer,
        loss=loss,
        **named,
    )


def test_with_a_loss_of_rejected_responses_and_in_evaluation(letter_model, tokenizer, tmp_path):
    """The rejected rows, scored in the same forward, have no candidates."""
    mixture = {**LOSS, "dpo": 1.0}
    logs = []
    for loss in (mixture, LOSS):
        trainer = _trainer(letter_model, tokenizer, tmp_path, loss, negatives="previous")
        logs.append(trainer.evaluate())
        trainer.train()
        logs[-1] |= next(e for e in trainer.state.log_history if "grad_norm" in e)
    name = "loss/candidate_unlikelihood_penalty"
    for each in (name, f"eval_{name}", "negatives/per_token", "eval_negatives/per_token"):
        assert logs[0][each] == pytest.approx(logs[1][each], rel=1e-5), each
    expected = logs[0]["eval_loss/dpo"] + logs[0]["eval_loss/mle"] + 0.7 * logs[0][f"eval_{name}"]
    assert logs[0]["eval_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["top_k", "repeated_ngrams"])
def test_packed_rows(letter_model, tokenizer, tmp_path, kind):
    """Rows without padding, as one, are those of the batch in its order."""
    logs = []
    for packs in (False, True):
        trainer = RewardPenalizeTrainer(
            letter_model,
            args=DPOConfig(**_settings(tmp_path, padding_free=packs)),
            train_dataset=_pairs(16),
            processing_class=tokenizer,
            loss={**LOSS, "simpo": 0.5},
            negatives=kind,
            negative_options={"n": 2, "context": "sequence"} if kind != "top_k" else None,
        )
        trainer.train()
        logs.append([e for e in trainer.state.log_history if "grad_norm" in e])
    for one, other in zip(*logs, strict=True):
        for name in ("loss", "grad_norm", "loss/candidate_unlikelihood_penalty"):
            assert one[name] == pytest.approx(other[name], rel=1e-4), name
        assert one["negatives/per_token"] == pytest.approx(other["negatives/per_token"]) != 0


def test_rows_labelled_true_in_any_order(letter_model, tokenizer, tmp_path):
    """The same first step as of pairs whose chosen responses they are."""
    pairs = _pairs(4)
    rows = [
        {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
        for i, pair in enumerate(pairs)
        for side in (("chosen", "rejected") if i % 2 else ("rejected", "chosen"))
    ]
    logs = []
    for kind, data in (
        (RewardPenalizeTrainer, pairs),
        (UnpairedRewardPenalizeTrainer, datasets.Dataset.from_list(rows)),
    ):
        paired = kind is RewardPenalizeTrainer
        size = {"per_device_train_batch_size": 4 if paired else 8, "max_steps": 1}
        trainer = kind(
            letter_model,
            args=(DPOConfig if paired else KTOConfig)(**_settings(tmp_path, **size)),
            train_dataset=data,
            processing_class=tokenizer,
            loss={**LOSS, "unlikelihood_penalty": 0.5},
            negatives="previous",
        )
        trainer.train()
        logs.append(next(e for e in trainer.state.log_history if "grad_norm" in e))
    for name in ("loss", "grad_norm", "loss/candidate_unlikelihood_penalty", "negatives/per_token"):
        assert logs[0][name] == pytest.approx(logs[1][name], rel=1e-5), name


def test_compiled(letter_model, tokenizer, tmp_path):
    torch._dynamo.reset()
    logs = []
    for changes in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        trainer = RewardPenalizeTrainer(
            letter_model,
            args=DPOConfig(**_settings(tmp_path, max_steps=2, **changes)),
            train_dataset=_pairs(16),
            processing_class=tokenizer,
            loss=LOSS,
            negatives="top_k",
        )
        trainer.train()
        logs.append([e for e in trainer.state.log_history if "grad_norm" in e])
    for one, other in zip(*logs, strict=True):
        for name in ("loss", "grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=1e-5)


@pytest.mark.parametrize("kind", ["previous", "top_k"])
def test_a_head_that_is_gathered_for_its_own_passes(kind, monkeypatch):
    """As under ZeRO-3 and FSDP2: candidates leave the head's module with the labels' log-odds."""
    gradients = []
    ids = torch.randint(3, 12, (4, 9), generator=torch.Generator().manual_seed(1))
    labels = ids.masked_fill(torch.arange(9) < 3, -100)
    for emptied in (False, True):
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=4,
            tie_word_embeddings=False,
        )
        model = transformers.LlamaForCausalLM(config).eval()
        if emptied:
            gathered = empty_between_passes(model)
            monkeypatch.setattr(trl_utils, "maybe_gather_lm_head_ctx", gathered)
        trl_utils.add_fused_lm_head(model)
        scorer = CandidateLogOdds(Negatives(kind))
        chosen = (labels != -100)[:, 1:] & torch.tensor([[True], [True], [False], [False]])
        batch = Batch(ids, labels[:, 1:], chosen, ids > 0)
        with scorer.reading(batch), served(scorer):
            out = model(input_ids=ids, labels=labels, fused_lm_head=True)
        found = scorer.inputs(batch)
        assert found["candidate_mask"].any()
        penalty = torch.nn.functional.softplus(found["candidates"])[found["candidate_mask"]]
        (out.log_probs.sum() + penalty.square().sum()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, x in gradients[0].items():
        assert x is not None and x.abs().sum() > 0
        torch.testing.assert_close(gradients[1][name], x, msg=name)


def test_other_rows_than_those_of_the_batch_are_refused(letter_model):
    model = AutoModelForCausalLM.from_pretrained(letter_model)
    trl_utils.add_fused_lm_head(model)
    scorer = CandidateLogOdds(Negatives("previous"))
    ids = torch.tensor([[3, 4, 5, 6], [3, 4, 5, 6]])
    batch = Batch(ids, ids[:, 1:].flip(1), torch.ones(2, 3, dtype=torch.bool), ids > 0)
    with scorer.reading(batch), served(scorer):
        with pytest.raises(
            RuntimeError, match="labels: expected the 6 of the batch in their order"
        ):
            model(input_ids=ids, labels=ids, fused_lm_head=True)
        with pytest.raises(RuntimeError, match="negatives: expected a forward that scores"):
            scorer.inputs(batch)


def test_responses_without_candidates(letter_model):
    """Of one token, or none: no candidates, a penalty of 0."""
    model = AutoModelForCausalLM.from_pretrained(letter_model)
    trl_utils.add_fused_lm_head(model)
    scorer = CandidateLogOdds(Negatives("previous"))
    ids = torch.tensor([[3, 4, 5, 4], [3, 4, 5, 4]])
    for some in (1, 0):
        labels = ids.masked_fill(torch.arange(4) < 4 - some, -100)
        batch = Batch(ids, labels[:, 1:], (labels != -100)[:, 1:], ids > 0)
        with scorer.reading(batch), served(scorer):
            model(input_ids=ids, labels=labels, fused_lm_head=True)
        found = scorer.inputs(batch)
        assert found["candidates"].shape == (2, 3, 1) and not found["candidate_mask"].any()
        assert float(scorer.per_token) == 0


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({}, "negatives: expected one of previous, top_k, repeated_ngrams for mle, candidate"),
        ({"loss": {"mle": 1.0}, "negatives": "top_k"}, "negatives: expected None for mle, got"),
        ({"negatives": "topk"}, "negatives: expected one of"),
        (
            {"negatives": "top_k", "negative_options": {"n": 2}},
            r"expected some of k for top_k, got",
        ),
        ({"negatives": "top_k", "negative_options": {"k": 0}}, "k: expected at least 1, got 0"),
        (
            {"negatives": "previous", "negative_options": {"context": "prompt"}},
            "context: expected one of",
        ),
        (
            {"loss": {"mle": 1.0}, "negative_options": {"k": 2}},
            "negative_options: expected None without negatives",
        ),
    ],
)
def test_what_is_refused(letter_model, tokenizer, tmp_path, named, message):
    with pytest.raises(ValueError, match=message):
        _trainer(letter_model, tokenizer, tmp_path, **named)
