"""The README's examples of training run as they stand there."""

import json
import re
import shlex
from pathlib import Path

import datasets
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    DataCollatorForLanguageModeling,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from fastadapt.cli import main

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")
WORDS = ("<pad>", "<unk>", "<end>", *"abcdefgh")
ROWS = [
    {"prompt": "a b", "chosen": " c d e", "rejected": " f"},
    {"prompt": "c", "chosen": " a", "rejected": " g h"},
]


def _block(language: str, marker: str) -> str:
    """The example that holds a text."""
    blocks = re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)
    (found,) = [block for block in blocks if marker in block]
    return found


@pytest.fixture
def scope(tmp_path, monkeypatch):
    """What the examples take as given: a model's folder, data, a collator."""
    monkeypatch.chdir(tmp_path)
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<end>", unk_token="<unk>"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS * 10))
    ids = [{"input_ids": tokenizer(row["prompt"] + row["chosen"]).input_ids} for row in ROWS]
    return {
        "model": str(tmp_path / "model"),
        "pairs": datasets.Dataset.from_list(ROWS),
        "texts": datasets.Dataset.from_list([{"text": row["chosen"]} for row in ROWS]),
        "tokens": ids,
        "collator": DataCollatorForLanguageModeling(tokenizer, mlm=False),
    }


@pytest.mark.parametrize("marker", ["RewardPenalizeTrainer(", "SFTTrainer(", "LogitsFreeTrainer("])
def test_trainers(marker, scope):
    if marker == "LogitsFreeTrainer(":
        scope["model"] = LlamaForCausalLM.from_pretrained(scope["model"])
    exec(compile(_block("python", marker), "README.md", "exec"), scope)
    state = scope["trainer"].state
    assert state.global_step == state.max_steps > 0
    assert scope["trainer"].state.log_history[-1]["train_loss"] > 0


def test_command(scope):
    program, *arguments = shlex.split(_block("bash", "fastadapt train"))
    assert program == "fastadapt"
    assert main([*arguments, "--model", scope["model"]]) == 0
    assert Path("run/model/model.safetensors").exists()
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert {line["stage"] for line in lines} == {1, 2} and "eval/logps/good" in lines[-1]
