"""`fastadapt train`: data, stages, metrics, and a run that is killed and goes on."""

import json
import random
import re
import signal
import subprocess
import sys
import time

import datasets
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from fastadapt.cli import main
from fastadapt.train_data import DataError, load_pairs, split_pairs
from fastadapt.train_options import TrainOptions, parse_stages

SIDES = ("chosen", "rejected")
RUN = "import sys; from fastadapt.cli import main; sys.exit(main())"


@pytest.fixture(scope="module")
def model(letter_model):
    return letter_model


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A file of 26 pairs."""
    rng = random.Random(0)

    def text():
        return " ".join(rng.choices("abcdefghijklmnop", k=rng.randint(1, 6)))

    rows = [{"prompt": text(), "chosen": text(), "rejected": text()} for _ in range(26)]
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def _metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in lines]


def _weights(folder):
    return load_file(folder / "model" / "model.safetensors")


def test_stages(model, data, tmp_path, capsys):
    folder = tmp_path / "run"
    common = ["--data", data, "--model", model, "--output", str(folder), "--held-out", "0.2"]
    done = main(
        ["train", *common, "--stages", "exmate,dpo=1+mle=0.5", "--learning-rate", "1e-2,1e-3"]
    )
    assert done == 0
    seen = _metrics(folder)
    steps = [entry for entry in seen if "loss" in entry]
    assert [(e["stage"], e["step"]) for e in steps] == [(s, n) for s in (1, 2) for n in range(1, 7)]
    assert {e["learning_rate"] for e in steps if e["stage"] == 2} == {1e-3}
    assert steps[6]["rewards/margins"] == 0 and steps[7]["rewards/margins"] != 0
    assert {"loss/dpo", "loss/mle", "pairs/accuracies", "grad_norm"} <= set(steps[6])
    held_out = [e for e in seen if "eval/logps/good" in e]
    assert len(held_out) == 2 and "eval/rewards/accuracies" in held_out[1]
    shown = capsys.readouterr().out
    assert "21 pairs to train on, 5 held out" in shown
    assert re.search(r"stage 2/2 \(dpo \+ 0.5 mle\), step 6/6: loss \d+\.\d{4}, log P good", shown)
    before = LlamaForCausalLM.from_pretrained(model).state_dict()
    changed = _weights(folder)
    assert any(not torch.equal(before[name], value) for name, value in changed.items())


def test_adapters_alone_are_trained(model, data, tmp_path):
    common = ["--data", data, "--model", model, "--loss", "mle", "--lora", "2", "--max-steps", "2"]
    assert main(["train", *common, "--output", str(tmp_path)]) == 0
    saved = load_file(tmp_path / "model" / "adapter_model.safetensors")
    assert saved and all("lora_" in name for name in saved)
    assert any(bool(value.any()) for name, value in saved.items() if "lora_B" in name)


def test_accumulated_batches_are_one(model, data, tmp_path):
    """Losses of token means and of pairs, over batches of different numbers of tokens."""
    curves = []
    for batch, accumulate in (("8", "1"), ("2", "4")):
        folder = tmp_path / batch
        common = ["--data", data, "--model", model, "--output", str(folder), "--max-steps", "3"]
        sizes = ["--batch", batch, "--accumulate", accumulate]
        main(["train", *common, *sizes, "--loss", "dpo=1,unlikelihood=0.5", "--beta", "0.2"])
        curves.append(_metrics(folder))
    for one, other in zip(*curves, strict=True):
        for name in ("loss", "grad_norm", "loss/unlikelihood", "logps/good", "rewards/margins"):
            assert other[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name


def test_killed_run_goes_on_to_the_same_weights(model, data, tmp_path):
    """A child is killed at a random step, its second life ends where an uninterrupted run does."""
    common = ["train", "--data", data, "--model", model, "--stages", "exmate,dpo", "--epochs", "16"]
    common += ["--learning-rate", "1e-2", "--save-every", "4", "--threads", "1", "--resume"]
    threads = torch.get_num_threads()
    assert main([*common, "--output", str(tmp_path / "whole")]) == 0
    whole = len(_metrics(tmp_path / "whole"))
    folder = tmp_path / "killed"
    wanted = random.randint(5, 3 * whole // 4)  # and time enough to be killed before the end
    run = [sys.executable, "-P", "-c", RUN, *common, "--output", str(folder)]
    child = subprocess.Popen(run, cwd=tmp_path, stdout=subprocess.DEVNULL)
    path, lines = folder / "metrics.jsonl", 0
    while lines < wanted and child.poll() is None:
        time.sleep(0.001)
        lines = path.read_bytes().count(b"\n") if path.exists() else 0
    child.kill()
    assert child.wait() == -signal.SIGKILL, f"ended before it was killed after {wanted} lines"
    assert not (folder / "model").exists()
    assert main([*common, "--output", str(folder)]) == 0
    torch.set_num_threads(threads)
    assert _metrics(folder) == _metrics(tmp_path / "whole"), f"killed after {lines} lines"
    one, other = _weights(tmp_path / "whole"), _weights(folder)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one), f"killed after {lines} lines"


def test_checkpoint_of_another_run_is_refused(model, data, tmp_path, capsys):
    common = ["train", "--data", data, "--model", model, "--output", str(tmp_path), "--loss", "mle"]
    assert main([*common, "--max-steps", "1"]) == 0
    assert main([*common, "--max-steps", "1"]) == 1
    assert "has the checkpoint of a run; resume it" in capsys.readouterr().err
    assert main([*common, "--max-steps", "2", "--resume"]) == 1
    assert "max_steps: expected 1 as in the checkpoint, got 2" in capsys.readouterr().err


def test_broken_line_is_named_before_the_model_is_loaded(tmp_path, capsys):
    good = json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"})
    (tmp_path / "p.jsonl").write_text(f'{good}\n{{"prompt": "a", "chosen": "b"}}\n')
    common = ["train", "--data", str(tmp_path / "p.jsonl"), "--output", str(tmp_path / "run")]
    assert main([*common, "--loss", "mle", "--model", str(tmp_path / "no-such-model")]) == 1
    error = capsys.readouterr().err
    assert "p.jsonl, line 2: expected 'chosen' and 'rejected', got ['chosen', 'prompt']" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--loss", "dpo=x"], "dpo: expected a weight, got 'x'"),
        (["--loss", "dpo,dpo"], "dpo: expected each loss once in a stage"),
        (["--loss", "nothing"], "weights: expected some of mle"),
        (["--loss", "mle,exmate"], "expected one loss that contains MLE"),
        (["--loss", "mle", "--beta", "0.1"], "expected those of the losses of a stage"),
        (["--loss", "mle", "--batch", "0"], "batch: expected at least 1, got 0"),
        (["--loss", "mle", "--device", "x"], "device: expected one of torch's, got 'x'"),
        (["--loss", "mle", "--lora", "0"], "lora: expected at least 1, got 0"),
        (["--loss", "mle", "--learning-rate", "a"], "learning_rate: expected numbers, got 'a'"),
        (["--loss", "mle", "--learning-rate", "1,2"], "learning_rates: expected one or 1"),
        (["--loss", "mle", "--held-out", "1"], "held_out: expected a share"),
        (["--loss", "mle", "--max-length", "1"], "max_length: expected at least 2"),
        (
            ["--loss", "exmate", "--norm", "batch_token_mean", "--accumulate", "2"],
            "norm: expected one that splits",
        ),
        ([], "one of the arguments --loss --stages is required"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--data", "p.jsonl", "--output", "run", *arguments])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_parsing_of_stages():
    assert parse_stages("dpo=1, exmate=0.5", None) == ({"dpo": 1.0, "exmate": 0.5},)
    assert parse_stages(None, "exmate,dpo+mle=2") == ({"exmate": 1.0}, {"dpo": 1.0, "mle": 2.0})


def test_warmup(tmp_path):
    stages = ({"mle": 1.0}, {"dpo": 1.0})
    options = TrainOptions(
        data="p", output=tmp_path, stages=stages, learning_rates=(1.0, 2.0), warmup=3
    )
    assert [options.rate(0, step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert options.rate(1, 0) == 0.5


def test_split_is_by_seed(data):
    pairs = load_pairs(data)
    first = split_pairs(pairs, 0.25, 3)
    assert first == split_pairs(pairs, 0.25, 3) != split_pairs(pairs, 0.25, 4)
    assert [len(part) for part in first] == [20, 6]
    assert sorted(pair for part in first for pair in part) == sorted(pairs)


def test_data_of_the_hub(monkeypatch):
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2

    def load(name, split):
        assert (name, split) == ("owner/name", "test")
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert load_pairs("owner/name", split="test") == [("a", "b", "c")] * 2
    rows.append({"prompt": "a"})
    with pytest.raises(DataError, match="^owner/name, split test, row 2: expected 'chosen'"):
        load_pairs("owner/name", split="test")

    def unreachable(name, split):
        raise ConnectionError("no network\nmore")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match="there is no such file, and the hub says: no network$"):
        load_pairs("owner/name")


def test_data_that_does_not_fit(model, tmp_path, capsys):
    rows = [
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": "a", **{k: [{"role": "assistant", "content": k}] for k in SIDES}},
    ]
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ["train", "--data", str(path), "--model", model, "--output", str(tmp_path / "run")]
    assert main([*common, "--loss", "mle", "--batch", "4"]) == 1
    assert "expected a batch of 4 pairs or more, got 2" in capsys.readouterr().err
    assert main([*common, "--loss", "mle", "--batch", "2"]) == 1
    assert "has messages, but the model has no chat template" in capsys.readouterr().err


@pytest.mark.parametrize("source", ["nothing.jsonl", "a/b.jsonl", "./a/b"])
def test_missing_file(source):
    with pytest.raises(DataError, match="no such data: the file"):
        load_pairs(source)


def test_empty_file(tmp_path):
    (tmp_path / "p.jsonl").write_text("\n")
    with pytest.raises(DataError, match="expected at least one pair, got none"):
        load_pairs(str(tmp_path / "p.jsonl"))
