"""`LogitsFreeTrainer` beside transformers' own `Trainer`, and log-odds out of wrapped forwards."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from fastadapt.hf.trainer import LogitsFreeTrainer
from fastadapt.losses import mle_loss, unlikelihood_penalty
from fastadapt.training import forward_log_odds
from fastadapt.training.head_check import LEVELS
from fastadapt.training.pairs import IGNORED

SIZES = {
    "vocab_size": 30,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
}


def _model(name="llama", seed=0):
    torch.manual_seed(seed)
    if name == "gemma2":
        config = Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=5.0)
        return Gemma2ForCausalLM(config)
    if name == "cohere":
        return CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.3))
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True))


def _rows(count):
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(4, 12, (count,), generator=generator).tolist()
    ids = [torch.randint(3, 30, (n,), generator=generator) for n in lengths]
    return [{"ids": x, "prompt": n // 3} for x, n in zip(ids, lengths, strict=True)]


def _collate(rows):
    ids = pad_sequence([row["ids"] for row in rows], batch_first=True)
    labels = pad_sequence([row["ids"] for row in rows], batch_first=True, padding_value=IGNORED)
    for i, row in enumerate(rows):
        labels[i, : row["prompt"]] = IGNORED
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels}


def _arguments(tmp_path, **changes):
    settings = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 3,
        "max_steps": 20,
        "logging_steps": 1,
        "learning_rate": 2e-3,
        "save_strategy": "no",
        "remove_unused_columns": False,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        **changes,
    }
    return TrainingArguments(**settings)


def _log(trainer):
    trainer.train()
    return [entry for entry in trainer.state.log_history if "grad_norm" in entry]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_follows_transformers(tmp_path, lora):
    """Also with gradient accumulation over batches of different numbers of tokens."""
    logs = []
    for kind in (Trainer, LogitsFreeTrainer):
        model = _model()
        if lora:
            torch.manual_seed(2)
            model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
        arguments = _arguments(tmp_path)
        trainer = kind(model, arguments, train_dataset=_rows(60), data_collator=_collate)
        logs.append(_log(trainer))
    theirs, ours = logs
    assert len(ours) == len(theirs) == 20
    for name in ("loss", "grad_norm"):
        assert ours[0][name] == pytest.approx(theirs[0][name], rel=1e-6)
        assert ours[-1][name] == pytest.approx(theirs[-1][name], rel=1e-4)


def test_no_logits_are_made_and_predictions_are_log_odds(tmp_path):
    model, shapes = _model(), []
    model.get_output_embeddings().register_forward_hook(
        lambda module, inputs, output: shapes.append(tuple(output.shape))
    )
    seen = []

    def metrics(prediction):
        seen.append(prediction.predictions.shape)
        return {}

    trainer = LogitsFreeTrainer(
        model,
        _arguments(tmp_path, max_steps=1, per_device_eval_batch_size=4),
        train_dataset=_rows(6),
        eval_dataset=_rows(4),
        data_collator=_collate,
        compute_metrics=metrics,
    )
    trainer.train()
    result = trainer.evaluate()
    # of one row, at most 32 tokens: its own loss, and what it makes of the head's products
    asked = [shape for shape in shapes if shape[1]]
    assert [shape[0] for shape in asked] == [1, 1] and asked[1][1] == len(LEVELS)
    assert asked[0][1] <= 32
    assert len(shapes) == 4 + 3
    batch = _collate(_rows(4))
    with torch.no_grad():
        expected = float(model.eval()(**batch).loss)
    assert result["eval_loss"] == pytest.approx(expected, rel=1e-6)
    assert seen == [(4, batch["labels"].shape[1] - 1)]


def test_objective_is_the_loss(tmp_path):
    """Another loss of log-odds, divided by the tokens of the step."""

    def objective(chosen):
        return mle_loss(chosen) + 0.5 * unlikelihood_penalty(chosen)

    first = []
    for loss in (mle_loss, unlikelihood_penalty, objective):
        trainer = LogitsFreeTrainer(
            _model(),
            _arguments(tmp_path, max_steps=1),
            train_dataset=_rows(60),
            data_collator=_collate,
            objective=loss,
        )
        first.append(_log(trainer)[0]["loss"])
    assert first[2] == pytest.approx(first[0] + 0.5 * first[1], rel=1e-6)


def test_what_needs_logits_is_refused(tmp_path):
    with pytest.raises(ValueError, match="objective= has a loss of log-odds"):
        LogitsFreeTrainer(_model(), _arguments(tmp_path, label_smoothing_factor=0.1))


COMPILED = {"torch_compile": True, "torch_compile_backend": "eager"}


@pytest.mark.parametrize("way", ["arguments", "model"])
def test_compiled(tmp_path, way):
    """Steps and evaluation are those of the eager model, and graphs ran."""
    torch._dynamo.reset()
    # of one length: another one is another graph, of some seconds
    rows = [row for row in _rows(400) if len(row["ids"]) == 8]
    logs, losses = [], []
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for compiled in (False, True):
        changes = COMPILED if compiled and way == "arguments" else {}
        model = _model()
        if compiled and way == "model":
            model = torch.compile(model, backend="eager")
        trainer = LogitsFreeTrainer(
            model,
            _arguments(tmp_path, max_steps=2, **changes),
            train_dataset=rows,
            eval_dataset=rows[:4],
            data_collator=_collate,
        )
        logs.append(_log(trainer))
        losses.append(trainer.evaluate()["eval_loss"])
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"] - before
        # with gradients, and without unless Trainer drops its wrapper; none to ask the model
        assert graphs == compiled * {"arguments": 1, "model": 2}[way]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for eager, other in zip(*logs, strict=True):
        for name in ("loss", "grad_norm"):
            assert other[name] == pytest.approx(eager[name], rel=1e-5)


def test_columns_of_a_compiled_model(tmp_path):
    """Its wrapper takes any; those that the model does not take are removed, and no others."""
    model = torch.compile(_model(), backend="eager")
    rows = [{"input_ids": [3, 4], "labels": [3, 4], "text": "a"}] * 4
    arguments = _arguments(tmp_path, remove_unused_columns=True)
    trainer = LogitsFreeTrainer(model, arguments, train_dataset=Dataset.from_list(rows))
    assert set(next(iter(trainer.get_train_dataloader()))) == {"input_ids", "labels"}
    assert trainer.model is model


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ("mle", "objective: expected a function of Responses, got 'mle'"),
        (lambda chosen: 1.0, "objective: expected a function that returns a Tensor, got float"),
    ],
)
def test_objectives_that_are_none(tmp_path, objective, message):
    with pytest.raises(TypeError, match=message):
        LogitsFreeTrainer(
            _model(),
            _arguments(tmp_path),
            train_dataset=_rows(6),
            data_collator=_collate,
            objective=objective,
        ).train()


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        ([3, 70], ValueError, r"labels: expected ids in \[0, 30\) or -100, got 70"),
        (
            torch.tensor([3, 4], dtype=torch.int32),
            TypeError,
            "labels: expected a tensor of torch.int64, got torch.int32",
        ),
    ],
)
def test_labels_that_are_none_are_named(tmp_path, labels, error, message):
    rows = [{"input_ids": torch.tensor([3, 3]), "labels": torch.as_tensor(labels)}] * 4
    trainer = LogitsFreeTrainer(_model(), _arguments(tmp_path), train_dataset=rows)
    with pytest.raises(error, match=message):
        trainer.train()


def _first_losses(make, arguments, collate=_collate):
    """Loss and norm of the first step, by `Trainer` and by ours."""
    seen = []
    for kind in (Trainer, LogitsFreeTrainer):
        torch.manual_seed(0)
        trainer = kind(make(), arguments, train_dataset=_rows(6), data_collator=collate)
        entry = _log(trainer)[0]
        seen.append((entry["loss"], entry["grad_norm"]))
    return seen


ENCODED = {"vocab_size": 30, "d_model": 16, "pad_token_id": 0, "decoder_start_token_id": 0}


def _t5():
    return T5ForConditionalGeneration(
        T5Config(**ENCODED, d_kv=4, d_ff=24, num_layers=1, num_heads=4, dropout_rate=0.0)
    )


def _bart():
    config = BartConfig(
        **ENCODED,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        max_position_embeddings=32,
        dropout=0.0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return BartForConditionalGeneration(config)


def _masked():
    """Labels stand where they are, without an encoder."""
    config = BertConfig(
        **{name: size for name, size in SIZES.items() if name != "num_key_value_heads"},
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForMaskedLM(config)


@pytest.mark.parametrize("make", [_t5, _bart, _masked], ids=["t5", "bart", "masked"])
def test_labels_that_are_aligned(tmp_path, make):
    """The loss is that of the model's own forward, whichever label a position scores."""
    theirs, ours = _first_losses(make, _arguments(tmp_path, max_steps=1))
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_aligned_predictions_are_of_all_positions(tmp_path):
    seen = []
    trainer = LogitsFreeTrainer(
        _t5(),
        _arguments(tmp_path),
        eval_dataset=_rows(4),
        data_collator=_collate,
        compute_metrics=lambda p: seen.append(p.predictions.shape) or {},
    )
    trainer.evaluate()
    assert seen == [(4, _collate(_rows(4))["labels"].shape[1])]


class _WithZLoss(LlamaForCausalLM):
    """Adds a term of its logits to its loss."""

    def forward(self, *rest, labels=None, **named):
        output = super().forward(*rest, labels=labels, **named)
        if labels is not None:
            output["loss"] = output.loss + 1e-3 * output.logits.logsumexp(-1).square().mean()
        return output


class _Unaveraged(LlamaForCausalLM):
    """Sums over tokens whatever it is told to divide by."""

    def forward(self, *rest, labels=None, **named):
        output = super().forward(*rest, labels=labels, **named)
        if labels is not None:
            output["loss"] = output.loss * 2
        return output


class _WithoutLogits(LlamaForCausalLM):
    """As a fused loss leaves them."""

    def forward(self, *rest, labels=None, **named):
        output = super().forward(*rest, labels=labels, **named)
        return output if labels is None else {"loss": output.loss}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (_WithZLoss, "expected a loss that is the cross-entropy.*_WithZLoss.*further terms"),
        (_Unaveraged, "expected a loss that is the cross-entropy.*_Unaveraged"),
        (_WithoutLogits, "returns logits"),
    ],
)
def test_other_losses_of_a_model_are_refused(tmp_path, kind, message):
    """At the first batch, before a step was taken."""
    torch.manual_seed(0)
    model = kind(LlamaConfig(**SIZES))
    before = {name: x.clone() for name, x in model.state_dict().items()}
    trainer = LogitsFreeTrainer(
        model, _arguments(tmp_path), train_dataset=_rows(60), data_collator=_collate
    )
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())


def test_router_losses_are_refused(tmp_path):
    """Whichever configuration asks for them."""
    model = _model()
    model.config.text_config = LlamaConfig(**SIZES, output_router_logits=True)
    with pytest.raises(ValueError, match="expected output_router_logits=False, got True"):
        LogitsFreeTrainer(model, _arguments(tmp_path))


def test_the_question_draws_nothing(tmp_path):
    """Dropout of a first step is that of `Trainer`."""

    def make():
        return LlamaForCausalLM(LlamaConfig(**SIZES, attention_dropout=0.5))

    theirs, ours = _first_losses(make, _arguments(tmp_path, max_steps=1))
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_batches_need_labels(tmp_path):
    args = TrainingArguments(tmp_path, report_to=[], use_cpu=True)
    trainer = LogitsFreeTrainer(_model(), args)
    with pytest.raises(ValueError, match="inputs: expected labels among them, got .'input_ids'."):
        trainer.compute_loss(trainer.model, {"input_ids": torch.zeros(1, 4, dtype=torch.int64)})


@pytest.mark.parametrize("name", ["llama", "cohere", "gemma2"])
def test_log_odds_of_a_forward(name):
    model, batch = _model(name).eval(), _collate(_rows(5))
    labels = torch.nn.functional.pad(batch.pop("labels")[:, 1:], (0, 1), value=IGNORED)
    log_odds = forward_log_odds(model, batch, labels)
    used = labels != IGNORED
    logps = model(**batch).logits.log_softmax(-1)
    expected = logps.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(
        torch.nn.functional.logsigmoid(log_odds)[used], expected[used], rtol=1e-5, atol=1e-5
    )
    assert (log_odds[~used] == 0).all()
    assert not model._forward_hooks and not model.get_output_embeddings()._forward_pre_hooks
