"""`fastadapt train`: stages, metrics, runs that are killed and go on, and what stops one."""

import errno
import json
import math
import random
import re
import signal
import time

import datasets
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
    Trainer,
)

from fastadapt._cli.main import main
from fastadapt._cli.train import folder as train_folder
from fastadapt._cli.train import stage as train_stage
from fastadapt._cli.train.config import make_parser
from fastadapt._cli.train.data import DataError, load_pairs, split_pairs
from fastadapt._cli.train.folder import RunFolder, seal, sole_writer
from fastadapt._cli.train.options import parse_stages
from fastadapt.trl import RewardPenalizeTrainer

SIDES = ("chosen", "rejected")
RUN = "import sys; from fastadapt._cli.main import main; sys.exit(main())"


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
    _write(path, rows)
    return str(path)


@pytest.fixture
def train(model, data):
    """Runs the command on the model and the data, in this process, and returns its exit code."""

    def run(folder, *flags):
        common = ["--data", data, "--model", model, "--output_dir", str(folder)]
        return main(["train", *common, *map(str, flags)])

    return run


def _write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in lines]


def _weights(folder, name="model.safetensors"):
    return load_file(folder / "model" / name)


def _assert_same(folder, whole, name="model.safetensors"):
    """Metrics and weights are equal to the bit."""
    assert _metrics(folder) == _metrics(whole)
    one, other = _weights(whole, name), _weights(folder, name)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def _one_line(capsys):
    """What was written to the error output: one line."""
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.endswith("\n"), error
    return error


def test_stages(train, model, tmp_path, capsys):
    folder = tmp_path / "run"
    flags = ["--eval_fraction", 0.2, "--learning_rates", 1e-2, 1e-3]
    assert train(folder, "--stages", "exmate,dpo=1+mle=0.5", *flags) == 0
    seen = _metrics(folder)
    steps = [entry for entry in seen if "loss" in entry]
    assert [(e["stage"], e["step"]) for e in steps] == [(s, n) for s in (1, 2) for n in range(1, 7)]
    assert {e["learning_rate"] for e in steps if e["stage"] == 2} == {1e-3}
    # the reference is the model at the stage's beginning, scored in the same batches
    assert abs(steps[6]["rewards/margins"]) < 1e-5 < abs(steps[7]["rewards/margins"])
    assert {"loss/dpo", "loss/mle", "pairs/accuracies", "grad_norm"} <= set(steps[6])
    held_out = [e for e in seen if "eval_loss" in e]
    assert [(e["stage"], e["step"]) for e in held_out] == [(1, 6), (2, 6)]
    assert "eval_rewards/accuracies" in held_out[1] and "eval_rewards/chosen" not in held_out[0]
    shown = capsys.readouterr().out
    assert "21 pairs to train on, 5 held out" in shown
    assert re.search(r"stage 2/2 \(dpo \+ 0.5 mle\), step 6/6: loss \d+\.\d{4}, log P", shown)
    before = LlamaForCausalLM.from_pretrained(model).state_dict()
    changed = _weights(folder)
    assert any(not torch.equal(before[name], value) for name, value in changed.items())
    assert AutoTokenizer.from_pretrained(folder / "model").eos_token == "<end>"


def test_reference_is_of_the_pairs_that_are_used(train, tmp_path, capsys):
    steps = ["--max_steps", 2, "--per_device_train_batch_size", 3]
    flags = ["--gradient_accumulation_steps", 2, "--save_strategy", "no"]
    assert train(tmp_path, "--loss", "dpo", *steps, *flags) == 0
    kept = load_file(tmp_path / "stage-1" / "reference-train.safetensors")
    assert [int((~value.isnan()).sum()) for value in kept.values()] == [12, 12]
    assert "reference of train pairs 4/4" in capsys.readouterr().out


def test_adapters_alone_are_trained(train, tmp_path):
    """Also where a second stage refers to the adapters that the first one left."""
    whole, folder = tmp_path / "whole", tmp_path / "stopped"
    flags = ["--stages", "mle,dpo", "--lora_r", 2, "--max_steps", 2, "--learning_rate", 1e-2]
    assert train(whole, *flags) == 0
    saved = _weights(whole, "adapter_model.safetensors")
    assert saved and all("lora_" in name for name in saved)
    assert any(bool(value.any()) for name, value in saved.items() if "lora_B" in name)
    assert [p.name for p in (whole / "model").iterdir() if p.is_dir()] == []
    margins = [entry["rewards/margins"] for entry in _metrics(whole) if entry["stage"] == 2]
    assert abs(margins[0]) < 1e-5 < abs(margins[1])
    with pytest.MonkeyPatch.context() as patch:
        _stop_at(patch, "reference", after=0)
        assert train(folder, *flags) == 130
    assert train(folder, *flags, "--resume") == 0
    _assert_same(folder, whole, "adapter_model.safetensors")


@pytest.mark.filterwarnings("ignore:Model .*tie_word_embeddings:UserWarning")
def test_adapters_of_the_head_are_trained(train, tmp_path):
    """The second stage's reference is the adapter that the first one left on the head."""
    flags = ["--stages", "mle,dpo", "--lora_r", 2, "--lora_target_modules", "lm_head", "q_proj"]
    flags += ["--max_steps", 2, "--learning_rate", 1e-2]
    whole, folder = tmp_path / "whole", tmp_path / "stopped"
    assert train(whole, *flags) == 0
    saved = _weights(whole, "adapter_model.safetensors")
    trained = [value for name, value in saved.items() if "lm_head.lora_B" in name]
    assert len(trained) == 1 and bool(trained[0].any())
    margins = [entry["rewards/margins"] for entry in _metrics(whole) if entry["stage"] == 2]
    assert abs(margins[0]) < 1e-5 < abs(margins[1])
    with pytest.MonkeyPatch.context() as patch:
        _stop_at(patch, "reference", after=0)
        assert train(folder, *flags) == 130
    assert train(folder, *flags, "--resume") == 0
    _assert_same(folder, whole, "adapter_model.safetensors")


def test_accumulated_batches_are_one(train, tmp_path):
    """Losses of token means and of pairs, over batches of different numbers of tokens."""
    curves = []
    for batch, accumulate in ((8, 1), (2, 4)):
        folder = tmp_path / str(batch)
        sizes = ["--per_device_train_batch_size", batch]
        sizes += ["--gradient_accumulation_steps", accumulate, "--max_steps", 3]
        train(folder, *sizes, "--loss", "dpo+unlikelihood=0.5", "--beta", 0.2)
        curves.append(_metrics(folder))
    for one, other in zip(*curves, strict=True):
        for name in ("loss", "grad_norm", "loss/unlikelihood", "logps/chosen", "rewards/margins"):
            assert other[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name


def test_killed_run_goes_on_to_the_same_weights(train, model, data, start_python, tmp_path):
    """A child is killed at a random step, its second life ends where an uninterrupted run does."""
    flags = ["--stages", "exmate,dpo", "--num_train_epochs", "6", "--learning_rate", "1e-2"]
    flags += ["--save_steps", "4", "--threads", "1", "--eval_fraction", "0.2"]
    flags += ["--eval_strategy", "epoch", "--no_disable_dropout", "--resume"]
    threads = torch.get_num_threads()
    assert train(tmp_path / "whole", *flags) == 0
    whole = len(_metrics(tmp_path / "whole"))
    folder = tmp_path / "killed"
    wanted = random.randint(5, 3 * whole // 4)  # and time enough to be killed before the end
    common = ["train", "--data", data, "--model", model, "--output_dir", str(folder)]
    program = tmp_path / "run.py"
    program.write_text(RUN)
    output = tmp_path / "output"
    child = start_python(program, *common, *flags, folder=tmp_path, output=output)
    path, lines = folder / "metrics.jsonl", 0
    while lines < wanted and child.is_alive():
        time.sleep(0.002)
        lines = path.read_bytes().count(b"\n") if path.exists() else 0
    child.kill()
    child.join()
    said = output.read_text()[-4000:]
    assert child.exitcode == -signal.SIGKILL, f"ended before it was killed after {wanted}: {said}"
    assert not (folder / "model").exists()
    assert train(folder, *flags) == 0, "its lock went with it"
    torch.set_num_threads(threads)
    _assert_same(folder, tmp_path / "whole")


def _stop_at(patch, place, error=KeyboardInterrupt, after=1):
    """Makes something raise at its second call, or after so many."""
    where = {
        "seal": (train_stage, "seal"),
        "reference": (train_stage.StageTrainer, "_write_reference"),
        "optimizer": (Trainer, "_save_optimizer_and_scheduler"),
        "evaluation": (Trainer, "evaluate"),
        "model": (RunFolder, "place_model"),
    }
    owner, name = where[place]
    before, calls = getattr(owner, name), []

    def stops(*arguments, **named):
        calls.append(0)
        if len(calls) > after:
            raise error
        return before(*arguments, **named)

    patch.setattr(owner, name, stops)


# what torch.save raises on a full disk, and has no type for
TORCHS = "[enforce fail at inline_container.cc:672] . unexpected pos 55424 vs 55312"
FULL = OSError(errno.ENOSPC, "No space left on device")
TWO = ["--stages", "exmate,dpo", "--max_steps", 5, "--learning_rate", 1e-2, "--save_steps", 2]
TWO += ["--logging_steps", 3, "--eval_fraction", 0.2, "--eval_strategy", "steps", "--eval_steps", 2]


@pytest.fixture(scope="module")
def whole(model, data, tmp_path_factory):
    """The folder of an uninterrupted run with `TWO`."""
    folder = tmp_path_factory.mktemp("whole")
    common = ["--data", data, "--model", model, "--output_dir", str(folder)]
    assert main(["train", *common, *map(str, TWO)]) == 0
    return folder


@pytest.mark.parametrize(
    ("place", "after", "error", "left"),
    [
        ("seal", 0, KeyboardInterrupt(), None),  # inside the first checkpoint
        ("seal", 1, KeyboardInterrupt(), "stage-1/checkpoint-2"),
        ("seal", 3, KeyboardInterrupt(), "stage-1/checkpoint-5"),  # inside the next stage's first
        ("reference", 0, KeyboardInterrupt(), "stage-1/checkpoint-5"),  # between the stages
        ("evaluation", 1, KeyboardInterrupt(), "stage-1/checkpoint-2"),
        ("optimizer", 1, FULL, "stage-1/checkpoint-2"),
        ("optimizer", 1, RuntimeError(TORCHS), "stage-1/checkpoint-2"),
        ("model", 0, FULL, "stage-2/checkpoint-5"),
    ],
)
def test_stopped_run_loses_nothing(place, after, error, left, train, whole, tmp_path, capsys):
    """One line, the last checkpoint whole, and the same bits in the end."""
    with pytest.MonkeyPatch.context() as patch:
        _stop_at(patch, place, error, after)
        assert train(tmp_path, *TWO) == (130 if isinstance(error, KeyboardInterrupt) else 2)
    line = _one_line(capsys)
    assert "interrupted" in line or re.search(r"cannot be written \([\d.]+ MB free\): \S", line)
    stage, found, _ = RunFolder(tmp_path).last_checkpoint(2)
    assert (None if found is None else f"stage-{stage + 1}/{found.name}") == left
    assert train(tmp_path, *TWO, "--resume") == 0
    _assert_same(tmp_path, whole)


def test_damaged_checkpoint_is_set_aside(train, whole, tmp_path, capsys):
    """The one before it is whole; with none, the line names what is wrong."""
    with pytest.MonkeyPatch.context() as patch:
        _stop_at(patch, "model", KeyboardInterrupt(), 0)
        train(tmp_path, *TWO)
    damaged = tmp_path / "stage-2" / "checkpoint-5" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-7])
    assert train(tmp_path, *TWO, "--resume") == 0
    shown = capsys.readouterr().out
    assert "damaged, set aside" in shown and "going on from" in shown
    assert (tmp_path / "stage-2" / "damaged-checkpoint-5").exists()
    _assert_same(tmp_path, whole)
    for folder in tmp_path.glob("stage-*/checkpoint-*"):
        (folder / "optimizer.pt").unlink()
    assert train(tmp_path, *TWO, "--resume") == 2
    assert "expected a whole checkpoint, got" in _one_line(capsys)


def test_longer_run(train, tmp_path, capsys):
    """A run of one stage can be lengthened, and is then the longer run to the bit."""
    flags = ["--loss", "dpo", "--learning_rate", 1e-2]
    assert train(tmp_path / "long", *flags, "--max_steps", 9) == 0
    assert train(tmp_path / "short", *flags, "--max_steps", 3) == 0
    assert train(tmp_path / "short", *flags, "--max_steps", 9, "--resume") == 0
    _assert_same(tmp_path / "short", tmp_path / "long")
    capsys.readouterr()
    for changed, message in [
        (["--max_steps", 4], "max_steps: expected at least the 9 steps taken, got 4"),
        (["--max_steps", 9, "--seed", 1], "seed: expected 42 as in the run, got 1"),
        (["--max_steps", 9, "--beta", 0.2], "beta: expected 0.1 as in the run, got 0.2"),
    ]:
        assert train(tmp_path / "short", *flags, *changed, "--resume") == 2
        assert message in _one_line(capsys)
    for flags, message in [
        (["--loss", "mle", "--lr_scheduler_type", "linear"], "the schedule linear depends on it"),
        (["--stages", "mle,dpo"], "only a run of one stage can change its length"),
        (["--loss", "mle", "--warmup_steps", 0.5], "warmup_steps is a share of it"),
    ]:
        folder = tmp_path / message
        assert train(folder, *flags, "--max_steps", 1) == 0
        assert train(folder, *flags, "--max_steps", 2, "--resume") == 2
        line = _one_line(capsys)
        assert "max_steps: expected 1 as in the run, got 2" in line and message in line


def test_one_run_in_a_folder(train, tmp_path, capsys):
    with sole_writer(tmp_path):
        assert train(tmp_path, "--loss", "mle") == 2
        assert re.search(r"is in use by process \d+ on \S+ since \d{4}-", _one_line(capsys))
    assert train(tmp_path, "--loss", "mle", "--max_steps", 1) == 0
    assert train(tmp_path, "--loss", "mle", "--max_steps", 1) == 2
    assert "has a run; go on with --resume or name another" in _one_line(capsys)


def test_file_system_without_locks(train, tmp_path, capsys, monkeypatch):
    def refuse(self, **_):
        raise NotImplementedError("use SoftFileLock instead")

    monkeypatch.setattr(train_folder.filelock.FileLock, "acquire", refuse)
    assert train(tmp_path, "--loss", "mle") == 2
    assert "output_dir: expected a file system with locks: use Soft" in _one_line(capsys)


@pytest.mark.parametrize("name", ["model", "metrics.jsonl", "stage-1"])
def test_a_run_begins_in_no_folder_with_files_like_its_own(train, tmp_path, capsys, name):
    """They may be all that somebody has, such as the model that the run shall begin with."""
    (tmp_path / name).mkdir()
    assert train(tmp_path, "--loss", "mle") == 2
    assert f"output_dir: expected a folder without {name}, which" in _one_line(capsys)
    assert (tmp_path / name).is_dir() and not (tmp_path / "run.json").exists()


def _broken_model(model, folder):
    """The same model with one NaN."""
    found = LlamaForCausalLM.from_pretrained(model)
    with torch.no_grad():
        found.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    found.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return str(folder)


def test_numbers_that_are_not_finite_stop_a_run(train, model, tmp_path, capsys):
    """Each names the stage and the step; the last good checkpoint stays, and no model is saved."""
    broken = _broken_model(model, tmp_path / "broken")
    capsys.readouterr()
    assert train(tmp_path / "0", "--loss", "mle", "--model", broken) == 2
    line = "stage 1/1 (mle), before its first step: expected finite parameters, got NaN or inf in"
    assert f"{line} model.layers.1.mlp.up_proj.weight" in _one_line(capsys)

    far = ["--learning_rate", 1e25, "--save_steps", 1]
    assert train(tmp_path / "1", "--loss", "mle", *far) == 2
    assert re.search(
        r"\(mle\), step 2: expected a finite (loss|gradient norm), got nan", _one_line(capsys)
    )
    assert RunFolder(tmp_path / "1").last_checkpoint(1)[1].name == "checkpoint-1"
    assert not (tmp_path / "1" / "model").exists()

    assert train(tmp_path / "2", "--loss", "mle", "--learning_rate", 1e39, "--save_steps", 1) == 2
    assert "after step 1: expected finite parameters" in _one_line(capsys)
    assert RunFolder(tmp_path / "2").last_checkpoint(1)[1] is None


@pytest.mark.parametrize(
    ("owner", "name", "value", "message"),
    [
        (RewardPenalizeTrainer, "training_step", torch.tensor(math.nan), "step 3: expected a fini"),
        (Trainer, "_clip_grad_norm", torch.tensor(float("inf")), "step 3: expected a finite grad"),
        (Trainer, "evaluate", {"eval_loss": float("nan")}, "evaluation after step 3: expected a"),
        (
            train_stage.StageTrainer,
            "compute_ref_log_probs",
            (torch.tensor([-1.0, -1.0, float("-inf"), -1.0]), torch.zeros(4)),
            "expected finite log-probabilities under the reference, got [-inf, 0.0] of pair",
        ),
    ],
)
def test_other_numbers_too(owner, name, value, message, train, tmp_path, capsys, monkeypatch):
    before, calls = getattr(owner, name), []

    def third(*arguments, **named):
        calls.append(0)
        return value if len(calls) == 3 else before(*arguments, **named)

    monkeypatch.setattr(owner, name, third)
    flags = ["--save_steps", 1, "--eval_fraction", 0.2, "--eval_strategy", "steps"]
    assert train(tmp_path, "--loss", "dpo", *flags, "--eval_steps", 1) == 2
    assert message in _one_line(capsys)
    left = RunFolder(tmp_path).last_checkpoint(1)[1]
    assert (left and left.name) == (None if "reference" in message else "checkpoint-2")


def test_float16_scaler_may_meet_an_infinite_gradient(monkeypatch):
    """It skips such a step; the run is its."""
    from accelerate import Accelerator

    monkeypatch.setattr(Accelerator, "scaler", object(), raising=False)
    trainer = train_stage.StageTrainer.__new__(train_stage.StageTrainer)
    trainer.accelerator = Accelerator.__new__(Accelerator)
    norm = torch.tensor(float("inf"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_get_grad_norm", lambda self, model, grad_norm=None: grad_norm)
        assert trainer._get_grad_norm(None, norm) is norm


def test_broken_line_is_named_before_the_model_is_loaded(tmp_path, capsys):
    chosen = json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"})
    (tmp_path / "p.jsonl").write_text(f'{chosen}\n{{"prompt": "a", "chosen": "b"}}\n')
    common = ["train", "--data", str(tmp_path / "p.jsonl"), "--output_dir", str(tmp_path / "run")]
    assert main([*common, "--loss", "mle", "--model", str(tmp_path / "no-such-model")]) == 2
    assert "p.jsonl" in (line := _one_line(capsys)) and "2" in line
    assert not (tmp_path / "run").exists()


def test_model_that_is_not_there(train, tmp_path, capsys):
    assert train(tmp_path / "run", "--loss", "mle", "--model", str(tmp_path / "none")) == 2
    assert "no such model: the path" in _one_line(capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--loss", "dpo=x"], "loss: expected a number as the weight of dpo, got 'x'"),
        (["--loss", "dpo=nan"], "loss: expected a number as the weight of dpo, got 'nan'"),
        (["--loss", "dpo+dpo"], "loss: expected each loss once in a stage, got 'dpo' twice"),
        (["--loss", "dpo,exmate"], "sum is --loss dpo+exmate, one after the other --stages dpo,"),
        (["--loss", "exmat"], "got 'exmat'; did you mean exmate?"),
        (["--loss", "dpo+candidate_unlikelihood_penalty"], "negatives: expected one of previous,"),
        (["--stages", "mle,dpoo"], "got 'dpoo'; did you mean dpo?"),
        (["--stages", "mle,"], "stages: expected some of mle"),
        (["--loss", "mle+exmate"], "expected one loss that contains MLE"),
        (["--loss", "mle", "--beta", "0.2"], "beta: expected a loss that has it, got mle"),
        (["--loss", "mle", "--norm", "token"], "norm: expected a loss that has it, got mle"),
        (["--loss", "exmate", "--norm", "tokn"], "got 'tokn'; did you mean token?"),
        (["--loss", "dpo", "--beta", "0"], "beta: expected a value > 0, got 0.0"),
        (["--loss", "dpo", "--beta", "x"], "argument --beta: invalid float value: 'x'"),
        (["--loss", "cdpo", "--label_smoothing", "0.7"], "label_smoothing: expected a value in"),
        (["--loss", "mle", "--per_device_train_batch_size", "0"], "batch_size: expected at least"),
        (["--loss", "mle", "--gradient_accumulation_steps", "0"], "steps: expected at least 1"),
        (["--loss", "mle", "--lora_r", "0"], "lora_r: expected at least 1, got 0"),
        (["--loss", "mle", "--lora_alpha", "4"], "lora_r: expected a rank beside the other"),
        (["--loss", "mle", "--learning_rate", "a"], "invalid float value: 'a'"),
        (["--loss", "mle", "--learning_rate", "nan"], "learning_rate: expected a finite value"),
        (["--loss", "mle", "--learning_rates", "1", "2"], "learning_rates: expected 1, one per"),
        (["--loss", "mle", "--eval_fraction", "1"], "eval_fraction: expected a share in [0, 1)"),
        (["--loss", "mle", "--eval_strategy", "steps"], "eval_strategy: expected --eval_data or"),
        (["--loss", "mle", "--seed", "-1"], "seed: expected a value in [0, 2**32), got -1"),
        (["--loss", "mle", "--optim", "adamv"], "adamv"),
        (["--loss", "mle", "--optim", "adamw_bnb_8bit"], "bitsandbytes"),
        (["--loss", "mle", "--max_length", "1"], "max_length: expected at least 2, got 1"),
        (["--loss", "mle", "--max_steps", "0"], "max_steps, num_train_epochs: expected values"),
        (["--loss", "mle", "--truncation", "promt"], "did you mean prompt?"),
        (["--loss", "mle", "--lr_scheduler_type", "linaer"], "linaer"),
        (["--loss", "mle", "--report_to", "nothing"], "report_to: expected what is installed"),
        (["--loss", "mle", "--loss_type", "ipo"], "loss_type: expected ['sigmoid'], got ['ipo']"),
        (["--loss", "mle", "--device", "cuda"], "unrecognized argument '--device'"),
        (["--loss", "mle", "--max-step", "3"], "'--max-step'; did you mean --max_steps?"),
        (["--loss", "mle", "--config"], "config: expected a file, got nothing"),
        (["--loss", "mle", "--config", "none.yaml"], "No such file or directory: 'none.yaml'"),
        (
            ["--loss", "exmate", "--norm", "batch_token_mean", "--gradient_accumulation_steps=2"],
            "norm: expected one that splits over 2 micro-batches, got 'batch_token_mean'",
        ),
        (["--loss", "mle", "--torch_compile"], "torch_compile: expected False, got True"),
        (["--loss", "mle", "--use_liger_kernel"], "use_liger_kernel: expected False, got True"),
        (["--loss", "mle", "--adam_beta1", "1.5"], "adam_beta1: expected a value in [0, 1)"),
        (["--loss", "mle", "--adam_epsilon", "-1"], "adam_epsilon: expected a finite value of"),
        (["--loss", "mle", "--dataloader_num_workers", "-1"], "workers: expected at least 0, got"),
        (["--loss", "mle", "--eval_accumulation_steps", "0"], "steps: expected at least 1, got 0"),
        (["--loss", "mle", "--pad_to_multiple_of", "0"], "pad_to_multiple_of: expected at least"),
        (["--loss", "mle", "--eval_on_start"], "eval_on_start: expected --eval_data or"),
        (
            ["--loss", "mle", "--lr_scheduler_type", "cosine_with_min_lr"],
            "lr_scheduler_kwargs: One of min_lr or min_lr_rate should be set",
        ),
        ([], "loss, stages: expected one of --loss and --stages, got neither"),
        (["--loss", "mle", "--stages", "dpo"], "got both"),
    ],
)
def test_wrong_arguments(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--data", "p.jsonl", "--output_dir", "run", *arguments])
    assert stopped.value.code == 2 and message in (line := _one_line(capsys)), line
    assert list(tmp_path.iterdir()) == []


def test_a_chat_needs_a_template(train, tmp_path, capsys):
    assert train(tmp_path, "--loss", "mle", "--chat") == 2
    assert "chat: expected a tokenizer with a chat template, " in _one_line(capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="that GPU may have it")
def test_bf16_without_support(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--data", "p", "--output_dir", str(tmp_path), "--loss", "mle", "--bf16"])
    error = _one_line(capsys)
    assert stopped.value.code == 2 and "bf16" in error and "expected one argument" not in error


def test_flags_of_true_need_no_word():
    """As the help has them, also where trl's own value may be None."""
    for name in ("bf16", "gradient_checkpointing", "use_cpu"):
        for words in ([], ["true"]):
            arguments = ["--data", "p", "--output_dir", "o", "--use_cpu", f"--{name}", *words]
            assert getattr(make_parser().parse_args([*arguments, "--loss", "mle"]), name) is True


def test_refused_run_leaves_its_folder_free(train, tmp_path, capsys):
    """A wrong model, layer or length is mended in the next call, without --resume."""
    for wrong in (
        ["--model", str(tmp_path / "none")],
        ["--lora_r", 2, "--lora_target_modules", "none"],
        ["--max_length", 3, "--truncation", "error"],
    ):
        assert train(tmp_path / "run", "--loss", "mle", "--max_steps", 1, *wrong) == 2
        assert "has a run" not in _one_line(capsys)
    assert train(tmp_path / "run", "--loss", "mle", "--max_steps", 1) == 0


def test_adapters_are_no_model_to_begin_with(train, tmp_path, capsys):
    """They would be frozen, or left out of the new adapters' model."""
    assert train(tmp_path / "run", "--loss", "mle", "--max_steps", 1, "--lora_r", 2) == 0
    for more in ([], ["--lora_r", 2]):
        flags = ["--loss", "mle", "--model", str(tmp_path / "run" / "model"), *more]
        assert train(tmp_path / "next", *flags) == 2
        assert "model: expected a whole model, got adapters in" in capsys.readouterr().err


def test_target_that_cannot_be_written(train, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    for target in (tmp_path / "file", tmp_path / "file" / "below"):
        assert train(target, "--loss", "mle") == 2
        assert "output_dir: expected a folder, got the file" in _one_line(capsys)
    monkeypatch.setattr(train_folder.os, "access", lambda path, mode: False)
    assert train(tmp_path / "run", "--loss", "mle") == 2
    assert "output_dir: expected a folder to write to, got" in _one_line(capsys)


def test_config_file(train, tmp_path, capsys):
    """As trl's parser reads it; the command line comes before it."""
    (tmp_path / "c.yaml").write_text("loss: mle\nmax_steps: 1\nlearning_rate: 0.5\n")
    flags = ["--config", tmp_path / "c.yaml", "--learning_rate", 0.25]
    assert train(tmp_path / "run", *flags) == 0
    assert [entry["learning_rate"] for entry in _metrics(tmp_path / "run")] == [0.25]
    (tmp_path / "c.yaml").write_text("loss: mle\nmax_step: 1\n")
    with pytest.raises(SystemExit) as stopped:
        train(tmp_path / "run2", *flags)
    assert stopped.value.code == 2
    assert "got 'max_step'; did you mean max_steps?" in capsys.readouterr().err


def test_help_is_short_and_true(capsys):
    """What the short help says of defaults is what the parser has."""
    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    assert text.count("\n") < 100
    parser = make_parser()
    defaults = {action.dest: action.default for action in parser._actions}
    shown = re.findall(r"--(\w+)((?:(?!--)[\s\S])*)", text.partition("data and model")[2])
    known = {name for name, _ in shown}
    assert known - {"config", "help_all"} <= set(defaults)
    for name, rest in shown:
        stated = re.search(r"\(default:\s+([\w.-]+)\)", rest)
        if stated and isinstance(defaults.get(name), int | float):
            assert float(stated[1]) == float(defaults[name]), name
    assert main(["train", "--help_all"]) == 0
    assert "--dataloader_num_workers" in capsys.readouterr().out


def test_truncated_pairs_are_counted(train, tmp_path, capsys):
    flags = ["--loss", "mle", "--max_steps", 1, "--max_length", 6]
    assert train(tmp_path / "run", *flags) == 0
    said = re.search(r"(\d+) of 26 pairs cut to 6 tokens \(the prompt\)", capsys.readouterr().out)
    assert said and 0 < int(said[1]) < 26
    assert train(tmp_path / "other", *flags, "--truncation", "error") == 2
    assert re.search(r"data: pair \d+ of 26: max_length: expected", _one_line(capsys))
    rows = [{"prompt": "a " * 80, "chosen": "b", "rejected": "c"}] * 4
    _write(tmp_path / "long.jsonl", rows)
    assert train(tmp_path / "long", *flags[:4], "--data", tmp_path / "long.jsonl") == 0
    assert "4 of 4 pairs cut to 64 tokens" in capsys.readouterr().out, "the model's positions"


def test_data_that_does_not_fit(train, tmp_path, capsys):
    rows = [
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": "a", **{k: [{"role": "assistant", "content": k}] for k in SIDES}},
    ]
    path = tmp_path / "p.jsonl"
    _write(path, rows)
    flags = ["--data", path, "--loss", "mle"]
    assert train(tmp_path / "run", *flags) == 2
    assert "batch_size: expected no more than the 2 pairs, got 4" in _one_line(capsys)
    assert train(tmp_path / "run", *flags, "--per_device_train_batch_size", 2) == 2
    assert "expected one with a chat template, for prompts of messages" in _one_line(capsys)
    assert train(tmp_path / "r", "--loss", "mle", "--eval_fraction", 0.01) == 2
    assert "expected a share that leaves a pair on either side, got 0.01" in _one_line(capsys)


def test_model_without_end_token(train, model, tmp_path, capsys):
    folder = tmp_path / "model"
    LlamaForCausalLM.from_pretrained(model).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    capsys.readouterr()
    assert train(tmp_path / "run", "--loss", "mle", "--model", folder) == 2
    assert "tokenizer: expected one with an end token, got none" in _one_line(capsys)


def test_model_that_cannot_be_read(train, model, tmp_path, capsys):
    """Its weights cut short; layers for adapters that it has not."""
    folder = tmp_path / "model"
    LlamaForCausalLM.from_pretrained(model).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    capsys.readouterr()
    assert train(tmp_path / "run", "--loss", "mle", "--model", folder) == 2
    assert str(folder) in _one_line(capsys)
    flags = ["--loss", "mle", "--lora_r", 2, "--lora_target_modules", "q_prooj"]
    assert train(tmp_path / "other", *flags) == 2
    assert "lora_target_modules: Target modules {'q_prooj'} not found" in _one_line(capsys)


def test_model_with_more_than_a_matrix_as_head(train, model, tmp_path, capsys):
    """Nothing is computed before the first step of a stage without a reference."""
    tokenizer, folder = AutoTokenizer.from_pretrained(model), tmp_path / "model"
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=80,
        pad_token_id=tokenizer.pad_token_id,
        is_decoder=True,
    )
    RobertaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    capsys.readouterr()
    assert train(tmp_path / "run", "--loss", "exmate", "--model", folder) == 2
    assert "RobertaForCausalLM makes others; trl's loss needs logits here" in _one_line(capsys)


def test_parsing_of_stages():
    assert parse_stages("dpo=1+ exmate=0.5", None) == ({"dpo": 1.0, "exmate": 0.5},)
    assert parse_stages(None, "exmate,dpo+mle=2") == ({"exmate": 1.0}, {"dpo": 1.0, "mle": 2.0})


def test_unsealed_checkpoints_are_removed(tmp_path):
    run = RunFolder(tmp_path)
    for step in (5, 10):
        (tmp_path / "stage-1" / f"checkpoint-{step}").mkdir(parents=True)
        save_file({"w": torch.zeros(2)}, tmp_path / "stage-1" / f"checkpoint-{step}" / "w")
    seal(tmp_path / "stage-1" / "checkpoint-5")
    stage, found, wrong = run.last_checkpoint(2)
    assert (stage, found, wrong) == (0, tmp_path / "stage-1" / "checkpoint-5", [])
    assert [path.name for path in (tmp_path / "stage-1").iterdir()] == ["checkpoint-5"]


def test_metrics_after_a_checkpoint_are_dropped(tmp_path):
    run = RunFolder(tmp_path)
    for stage, step in ((1, 1), (1, 2), (2, 1), (2, 2)):
        run.write_metrics({"stage": stage, "step": step})
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"stage": 2, "st')
    run.rewind_metrics(1, 1)
    assert _metrics(tmp_path) == [{"stage": s, "step": n} for s, n in ((1, 1), (1, 2), (2, 1))]


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


@pytest.mark.parametrize("source", ["nothing.jsonl", "a/b.jsonl", "./a/b"])
def test_missing_file(source):
    with pytest.raises(DataError, match="no such data: the file"):
        load_pairs(source)


def test_empty_file(tmp_path):
    (tmp_path / "p.jsonl").write_text("\n")
    with pytest.raises(DataError, match="expected at least one pair, got none"):
        load_pairs(str(tmp_path / "p.jsonl"))
