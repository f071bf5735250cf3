"""`LogitsFreeTrainer` beside transformers' own `Trainer`, and margins out of wrapped forwards."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from fastadapt.head_check import LEVELS
from fastadapt.hf_trainer import LogitsFreeTrainer
from fastadapt.losses import mle_loss, unlikelihood_penalty
from fastadapt.preferences import IGNORED
from fastadapt.training import forward_margins

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


def test_no_logits_are_made_and_predictions_are_margins(tmp_path):
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
    # the model is asked once, by a few positions of one row
    assert [shape for shape in shapes if shape[1]] == [(1, len(LEVELS), 30)]
    assert len(shapes) == 5
    batch = _collate(_rows(4))
    with torch.no_grad():
        expected = float(model.eval()(**batch).loss)
    assert result["eval_loss"] == pytest.approx(expected, rel=1e-6)
    assert seen == [(4, batch["labels"].shape[1] - 1)]


def test_objective_is_the_loss(tmp_path):
    """Another loss of margins, divided by the tokens of the step."""

    def objective(good):
        return mle_loss(good) + 0.5 * unlikelihood_penalty(good)

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
    with pytest.raises(ValueError, match="objective= has the loss"):
        LogitsFreeTrainer(_model(), _arguments(tmp_path, label_smoothing_factor=0.1))


@pytest.mark.parametrize("name", ["llama", "cohere", "gemma2"])
def test_margins_of_a_forward(name):
    model, batch = _model(name).eval(), _collate(_rows(5))
    labels = torch.nn.functional.pad(batch.pop("labels")[:, 1:], (0, 1), value=IGNORED)
    margins = forward_margins(model, batch, labels)
    used = labels != IGNORED
    logps = model(**batch).logits.log_softmax(-1)
    expected = logps.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(
        torch.nn.functional.logsigmoid(margins)[used], expected[used], rtol=1e-5, atol=1e-5
    )
    assert (margins[~used] == 0).all()
    assert not model._forward_hooks and not model.get_output_embeddings()._forward_pre_hooks


def test_an_adapter_on_the_head_is_refused():
    model = get_peft_model(_model(), LoraConfig(r=2, target_modules=["lm_head", "q_proj"]))
    batch = _collate(_rows(2))
    labels = batch.pop("labels")
    with pytest.raises(ValueError, match="a head without an adapter"):
        forward_margins(model, batch, labels)
