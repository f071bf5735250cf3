"""The benchmarks of training, without timing: what they compute, and what is made of it."""

import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import bench_trainer
import compare_losses
import compare_report
import fresh
import limits
import report
import train_preferences
from fastadapt._ops import memory
from fastadapt.training import response_log_odds
from fastadapt.training.pairs import Pair, encode_pairs, read_pairs
from fastadapt.training.pretrained import load_model

WORDS = ("<unk>", "<end>", *"abcdefgh", "Human", "Assistant", ":")
QUIET = {"progress": lambda phase, done, total: None}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a small random model of three layers."""
    torch.manual_seed(0)
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("model")
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token="<end>"
    ).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        initializer_range=0.3,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Twenty dialogues and one that is too long."""
    rng = random.Random(0)

    def text(low, high):
        return " ".join(rng.choices("abcdefgh", k=rng.randint(low, high)))

    lines = []
    for low in [1] * 20 + [60]:
        prompt = f"\n\nHuman: {text(1, 4)}\n\nAssistant:"
        pair = {"chosen": f"{prompt} {text(low, 64)}", "rejected": f"{prompt} {text(low, 64)}"}
        lines.append(json.dumps(pair))
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def record(model, data, tmp_path_factory):
    """A small comparison."""
    path = tmp_path_factory.mktemp("out") / "c.json"
    arguments = ["--data", data, "--model", model, "--train", 8, "--choose", 3, "--held-out", 5]
    arguments += ["--seeds", 2, "--layers", 1, "--max-length", 72, "--out", path]
    compare_losses.main([*map(str, arguments)])
    made = json.loads(path.read_text())
    made["host"] |= {"dirty": False, "commit": "0123456789abcdef"}
    return made


@pytest.mark.parametrize("layers", [1, 2])
def test_cached_tail_is_the_model(model, data, layers):
    """Log-odds from hidden states that were kept, in padded batches, are those of the model."""
    whole, tokenizer = load_model(model, **QUIET)
    pairs = [encode_pairs(tokenizer, [pair], chat=False) for pair in read_pairs(data)[:5]]
    expected = [response_log_odds(whole, pair).detach() for pair in pairs]
    front, tail = compare_losses.divide(whole, layers)
    rows = compare_losses.cache(front, pairs)
    batch = compare_losses.collate(rows)
    log_odds = tail.log_odds(batch).detach()
    for i, alone in enumerate(expected):
        for side in (0, 1):
            padded = log_odds[i + 5 * side][: alone.shape[1]]
            torch.testing.assert_close(padded, alone[side], rtol=1e-4, atol=1e-5)
    assert len(front.layers) == 3 - layers and len(tail.body.layers) == layers
    assert not any(p.requires_grad for p in front.parameters()) and not tail.head[0].requires_grad


def test_layers_out_of_range(model):
    with pytest.raises(ValueError, match=r"layers: expected a number in \[1, 2\], got 3"):
        compare_losses.divide(load_model(model, **QUIET)[0], 3)


def test_comparison(record):
    assert record["settings"]["pairs"] == {"train": 8, "choose": 3, "held_out": 5}
    assert len(record["cells"]) == 1 + 2 * 7 and len(record["tokens"]) == 5
    cells = {(c["method"], c["seed"]): c for c in record["cells"]}
    assert [cells[name, 0]["steps"] for name in compare_losses.METHODS] == [2] * 5 + [4] * 2
    assert cells["mle", 0]["chosen"] != cells["mle", 1]["chosen"]  # another order
    start = np.mean(cells["start", None]["chosen"])
    assert np.mean(cells["mle", 0]["chosen"]) > start + 0.01
    # the second stage goes on from where the first ended
    first, second = (np.array(cells[name, 0]["chosen"]) for name in ("mle", "mle, dpo"))
    assert abs(first - second).max() < abs(second - cells["start", None]["chosen"]).max()
    for kind in ("mle", "dpo"):
        rates = record["settings"]["rates"][kind]
        assert rates["chosen"] == min(rates["tried"], key=lambda tried: tried[1])[0]


def test_split_is_disjoint_and_by_seed():
    options = SimpleNamespace(held_out=5, choose=3, train=10, batch=4, split_seed=1)
    split = compare_losses.split_pairs(20, options)
    assert [len(part) for part in split] == [8, 3, 5]
    assert len({place for part in split for place in part}) == 16
    options.split_seed = 2
    assert compare_losses.split_pairs(20, options) != split
    with pytest.raises(ValueError, match="expected more pairs that fit max_length, got 9"):
        compare_losses.split_pairs(9, options)


def test_page_and_figure(record, tmp_path):
    page = report.PAGES["docs/results.md"]["compare_losses"](record)
    assert "| DPO after ExMATE | 4 |" in page and "8 to train on, 3 to choose" in page
    assert "2 seeds; β = 0.1" in page and "commit 0123456" in page
    compare_report.draw(record, tmp_path / "figure.png")
    assert b"0123456789abcdef" in (tmp_path / "figure.png").read_bytes()


def test_intervals():
    """Of a mean over seeds and pairs; and of a method against itself, exactly 0."""
    names = ["start", *compare_report.METHODS]
    rng = np.random.default_rng(0)
    cells = [
        {"method": name, "chosen": rng.normal(1, 2, 200).tolist(), "rejected": [0.0] * 200}
        for name in names
        for _ in range(1 if name == "start" else 3)
    ]
    data = compare_report.Comparison({"tokens": [[1, 1]] * 200, "cells": cells})
    values = data.value("mle", "margin")
    interval = data.interval(values)
    assert interval.mean == pytest.approx(values.mean())
    # independent cells: 600 draws of deviation 2, which a bootstrap of both sides overstates
    assert 1.96 * 2 / 600**0.5 < (interval.high - interval.low) / 2 < 4 * 2 / 600**0.5
    assert data.interval(values - values) == (0, 0, 0)
    ratio = data.interval(2 * values, values)
    assert ratio == pytest.approx((2, 2, 2))
    assert compare_report.Interval(0.5, 0.25, 0.75).shown(1, factor=100) == "+50.0 (+25.0 to +75.0)"


def test_figure_is_of_the_result():
    assert report.figure_is_current("compare_losses", compare_report.FIGURE)


CELLS = [("dpo", head) for head in bench_trainer.HEADS]
CELLS += [(loss, "trainable") for loss in bench_trainer.PEERS if loss != "dpo"]


@pytest.mark.parametrize("loss, head", CELLS, ids=["-".join(cell) for cell in CELLS])
def test_steps_of_both_trainers_are_the_same(model, data, loss, head):
    options = SimpleNamespace(
        model=str(model), data=data, steps=2, batch=2, max_length=40, seed=0, threads=None
    )
    cell = bench_trainer.Cell(loss, "float32", head)
    (seen,) = bench_trainer.measure_time(cell, options)
    for one, other in zip(*(seen["losses"][name] for name in bench_trainer.TRAINERS), strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    assert seen["response_tokens"] > 0 and all(x > 0 for x in seen["trl_to_fastadapt"])
    peaks = {name: {"before": 1, "extra": 1000} for name in bench_trainer.TRAINERS}
    entry = {**cell._asdict(), **seen, "peak_mb": peaks}
    settings = {"model": "m", "batch": 2, "max_length": 40, "steps": 2, "rank": 8}
    versions = {"torch": "2.0", "transformers": "5.0"}
    host = {"cpu": "a machine", "torch_threads": 1, "versions": versions, "commit": "0123456789"}
    table = report.TABLES["trainer"]({"settings": settings, "cells": [entry], "host": host})
    trained = {"trainable": "all parameters", "frozen": "LoRA 8"}[head]
    assert f"| {loss} | float32, {trained} |" in table and "| 1,000 | 1,000 |" in table


def _training(linear, logits, extras):
    memories = [{"before": 1, "extra": extra, "gradients_and_optimizer": 5} for extra in extras]
    runs = [
        {"curves": {"loss": loss}, "memory_mb": mb, "step_s": [1.0, 2.0, 3.0]}
        for loss, mb in zip((linear, logits), memories, strict=True)
    ]
    return {
        "benchmark": "train_preferences",
        "settings": {"steps": 3},
        "variants": dict(zip(("linear", "logits"), runs, strict=True)),
    }


def test_train_limits_are_computed():
    record = _training([2.0, 1.0, 1.0], [2.0, 1.0002, 1.0], (90, 100))
    apart, memory_ratio = limits.train_limits(record)
    assert apart.figure == pytest.approx(199.96, rel=1e-4) and apart.met == "no"
    assert memory_ratio.figure == 0.9 and memory_ratio.met == "yes"
    same = limits.train_limits(_training([2.0, 1.0], [2.0, 1.0], (101, 100)))
    assert [x.met for x in same] == ["yes", "no"]


def test_pairs_are_chosen_by_seed():
    pairs = [Pair(str(i), "a", "b") for i in range(10)]
    some = train_preferences.choose_pairs(pairs, 7, 1)
    assert len(set(some)) == 7 and some != train_preferences.choose_pairs(pairs, 7, 2)
    assert some == train_preferences.choose_pairs(pairs, 7, 1)
    assert pairs == [Pair(str(i), "a", "b") for i in range(10)]
    assert len(set(train_preferences.choose_pairs(pairs, 25, 1))) == 10
    with pytest.raises(ValueError, match="data: expected at least one pair, got none"):
        train_preferences.choose_pairs([], 1, 0)


@pytest.mark.skipif(
    not memory.is_measurable(), reason="this system does not tell the peak of a process"
)
def test_training_run_and_table(monkeypatch, tmp_path, model, data, preloaded, run_benchmark):
    """In processes that have transformers imported, which takes 8 seconds in a new one."""
    monkeypatch.setattr(fresh.multiprocessing, "get_context", lambda kind: preloaded)
    arguments = ("--data", data, "--model", model, "--steps", 3, "--batch", 2)
    record = run_benchmark(train_preferences, *arguments)
    linear, logits = record["variants"]["linear"], record["variants"]["logits"]
    assert len(linear["curves"]["loss"]) == 3 and len(set(linear["curves"]["loss"])) == 3
    assert linear["curves"]["loss"] == pytest.approx(logits["curves"]["loss"], rel=1e-4)
    assert linear["response_tokens"] == logits["response_tokens"]
    assert record["settings"]["data"] == "pairs.jsonl"
    assert str(tmp_path) not in json.dumps(record["host"])
    table = report.TABLES["train_preferences"](record)
    assert "| full logits, `label_log_odds` |" in table and "3 steps of DPO+ExMATE" in table
