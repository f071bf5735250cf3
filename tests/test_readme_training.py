"""The examples of docs/training.md run as they stand there."""

import json
import re
import shlex
from pathlib import Path

import datasets
import pytest
import torch
from transformers import AutoTokenizer, DataCollatorForLanguageModeling, LlamaForCausalLM

from fastadapt import RewardPenalizeLoss
from fastadapt._cli.main import main
from fastadapt.training.pairs import Pair

PAGE = Path(__file__).resolve().parent.parent / "docs" / "training.md"
ROWS = [
    {"prompt": "a b", "chosen": " c d e", "rejected": " f"},
    {"prompt": "c", "chosen": " a", "rejected": " g h"},
]


def _block(language: str, marker: str) -> str:
    """The example that holds a text."""
    blocks = re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (found,) = [block for block in blocks if marker in block]
    return found


@pytest.fixture
def scope(tmp_path, monkeypatch, letter_model):
    """What the examples take as given: a model's folder, data, a collator."""
    monkeypatch.chdir(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(letter_model)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS * 10))
    ids = [{"input_ids": tokenizer(row["prompt"] + row["chosen"]).input_ids} for row in ROWS]
    return {
        "model": letter_model,
        "pairs": datasets.Dataset.from_list(ROWS),
        "rows": datasets.Dataset.from_list(
            [{"prompt": r["prompt"], "completion": r["chosen"], "label": True} for r in ROWS]
        ),
        "texts": datasets.Dataset.from_list([{"text": row["chosen"]} for row in ROWS]),
        "tokens": ids,
        "collator": DataCollatorForLanguageModeling(tokenizer, mlm=False),
    }


TRAINERS = (
    *('loss={"dpo"', "UnpairedRewardPenalizeTrainer(", "negatives="),
    *("SFTTrainer(", "LogitsFreeTrainer("),
)


@pytest.mark.parametrize("marker", TRAINERS)
def test_trainers(marker, scope):
    if marker == "LogitsFreeTrainer(":
        scope["model"] = LlamaForCausalLM.from_pretrained(scope["model"])
    exec(compile(_block("python", marker), PAGE.name, "exec"), scope)
    state = scope["trainer"].state
    assert state.global_step == state.max_steps > 0
    assert scope["trainer"].state.log_history[-1]["train_loss"] > 0


@pytest.mark.parametrize("marker", ["tracker=tracker", "track(trainer"])
def test_trackers_of_trl(marker, scope):
    exec(compile(_block("python", marker), PAGE.name, "exec"), scope)
    records = scope["tracker"].records
    assert records[0]["step"] == 0 and records[0]["weight/rejected"] > 0
    assert records[0]["rho/pairs"] > 0


def test_tracker(scope):
    model = LlamaForCausalLM.from_pretrained(scope["model"])
    scope |= {
        "tokenizer": AutoTokenizer.from_pretrained(scope["model"]),
        "pairs": [Pair(**row) for row in ROWS * 5],
        "model": model,
        "objective": RewardPenalizeLoss({"dpo": 1.0, "exmate": 1.0}),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
    }
    exec(compile(_block("python", "RewardPenalizeTracker(objective"), PAGE.name, "exec"), scope)
    tracker = scope["tracker"]
    assert len(scope["batches"]) == 2 and len(tracker.records) == 1 and len(tracker.pairs) == 8


def test_command(scope):
    program, *arguments = shlex.split(_block("bash", "fastadapt train"))
    assert program == "fastadapt"
    assert main([*arguments, "--model", scope["model"]]) == 0
    assert Path("run/model/model.safetensors").exists()
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert {line["stage"] for line in lines} == {1, 2} and "eval_logps/chosen" in lines[-1]
