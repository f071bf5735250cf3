"""`fastadapt.trl` beside trl's own trainers: losses, gradients and metrics, step by step."""

import random

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

datasets = pytest.importorskip("datasets", reason="needs trl")
pytest.importorskip("trl")

from peft import LoraConfig  # noqa: E402
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer  # noqa: E402
from trl.trainer import utils as trl_utils  # noqa: E402

from fastadapt.trl import RewardPenalizeTrainer, fused_log_probs  # noqa: E402

WORDS = ("<pad>", "<unk>", "<end>", *"abcdefghijklmnop")
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
SHARED = (
    *("loss", "grad_norm", "logps/chosen", "logps/rejected", "logits/chosen", "logits/rejected"),
    *("entropy", "mean_token_accuracy", "num_tokens", *REWARDS),
)


@pytest.fixture(scope="module")
def tokenizer():
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<end>", unk_token="<unk>"
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A model on disk, so that trl can load its reference from there."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        tie_word_embeddings=True,
    )
    path = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def _pairs(count, seed=0):
    rng = random.Random(seed)

    def text(low, high):
        return " ".join(rng.choices(WORDS[3:], k=rng.randint(low, high)))

    rows = [
        {"prompt": text(1, 4), "chosen": " " + text(1, 6), "rejected": " " + text(1, 6)}
        for _ in range(count)
    ]
    return datasets.Dataset.from_list(rows)


def _settings(tmp_path, **changes):
    return {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 4,
        "max_steps": 20,
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


def _train(trainer):
    """The log of a run, a dictionary per step."""
    trainer.train()
    return [entry for entry in trainer.state.log_history if "grad_norm" in entry]


def _assert_follows(ours, theirs, names):
    """1e-6 relative at the first step, 1e-4 at the last."""
    assert len(ours) == len(theirs) == 20
    for name in names:
        # rewards start at 0 and log P has the size of 10 nats: an absolute bound of its rounding
        assert ours[0][name] == pytest.approx(theirs[0][name], rel=1e-6, abs=1e-6), name
        assert ours[-1][name] == pytest.approx(theirs[-1][name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("precompute", [False, True], ids=["reference", "precomputed"])
def test_dpo_follows_trl(folder, tokenizer, tmp_path, lora, precompute):
    logs = []
    for kind in (DPOTrainer, RewardPenalizeTrainer):
        extra = {"loss": {"dpo": 1.0}} if kind is RewardPenalizeTrainer else {}
        trainer = kind(
            folder,
            args=DPOConfig(**_settings(tmp_path), precompute_ref_log_probs=precompute),
            train_dataset=_pairs(80),
            processing_class=tokenizer,
            peft_config=LoraConfig(**LORA) if lora else None,
            **extra,
        )
        logs.append(_train(trainer))
    _assert_follows(logs[1], logs[0], SHARED)
    # the same operator on the same batch; precomputed, the padding and so the body's sums differ
    assert abs(logs[1][0]["rewards/margins"]) <= (1e-6 if precompute else 0)
    assert abs(logs[1][-1]["rewards/margins"]) > 1e-3
    assert {"loss/dpo", "pairs/accuracies", "gradients/good"} <= set(logs[1][0])


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_sft_follows_trl(folder, tokenizer, tmp_path, lora):
    logs = []
    for fused in (False, True):
        rows = [{"prompt": r["prompt"], "completion": r["chosen"]} for r in _pairs(80)]
        trainer = SFTTrainer(
            folder,
            args=SFTConfig(**_settings(tmp_path)),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=LoraConfig(**LORA) if lora else None,
        )
        before = trl_utils._ChunkedLogProbFunction
        if fused:
            with fused_log_probs():
                assert trl_utils._ChunkedLogProbFunction is not before
                logs.append(_train(trainer))
        else:
            logs.append(_train(trainer))
        assert trl_utils._ChunkedLogProbFunction is before
    _assert_follows(logs[1], logs[0], ("loss", "grad_norm", "entropy", "mean_token_accuracy"))
