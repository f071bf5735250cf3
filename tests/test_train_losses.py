"""`fastadapt losses`; `fastadapt train` with every loss that it offers, and their options."""

import json
import random

import pytest
import torch
from safetensors.torch import load_file

from fastadapt._cli.main import main
from fastadapt._cli.train import stage as train_stage
from fastadapt._cli.train.options import OFFERED, parse_options, parse_stages
from fastadapt.losses import CATALOGUE, describe

CANDIDATES = ("--loss", "candidate_unlikelihood_penalty", "--negatives")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A file of 12 pairs."""
    rng = random.Random(0)

    def text():
        return " ".join(rng.choices("abcdefghijklmnop", k=rng.randint(1, 6)))

    rows = [{"prompt": text(), "chosen": text(), "rejected": text()} for _ in range(12)]
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def train(letter_model, data):
    """Runs the command on the model and the data, in this process, and returns its exit code."""

    def run(folder, *flags):
        common = ["--data", data, "--model", letter_model, "--output_dir", str(folder)]
        return main(["train", *common, *map(str, flags)])

    return run


def _metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in lines]


def _one_line(capsys):
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


def test_every_loss_that_is_offered_trains(train, tmp_path):
    flags = ["--max_steps", 1, "--save_strategy", "no", "--learning_rate", 1e-3]
    flags += ["--negatives", "top_k", "--negative_options", "k=2"]
    assert train(tmp_path / "run", "--stages", ",".join(OFFERED), *flags) == 0
    steps = [entry for entry in _metrics(tmp_path / "run") if "loss" in entry]
    assert len(steps) == len(OFFERED)
    for name, entry in zip(OFFERED, steps, strict=True):
        assert entry["loss"] == pytest.approx(entry[f"loss/{name}"], rel=1e-4), name
        assert entry["grad_norm"] > 0, name
        if "reference" in CATALOGUE[name].needs:  # that of the stage's beginning
            assert abs(entry["rewards/chosen"]) < 1e-4, name


def test_what_is_not_offered_needs_what_pairs_have_not():
    left_out = {"tdpo", "tpo", "kto"}
    assert set(CATALOGUE) - set(OFFERED) == left_out


def test_options_reach_their_losses(train, tmp_path):
    """Of one loss, of all that have one, and trl's flags; defaults stay the losses' own."""
    seen = {}

    class Stage(train_stage.StageTrainer):
        def __init__(self, *rest, **named):
            super().__init__(*rest, **named)
            for name in self.mixture.weights:
                seen.setdefault(name, self.mixture.options_of(name))

    flags = ["--stages", "simpo+dpo=0.5,slic,robust", "--max_steps", 1, "--save_strategy", "no"]
    flags += ["--label_smoothing", 0.2, "--beta", 0.3]
    flags += ["--loss_options", "simpo.beta=2.5", "delta=4", "dpo.label_smoothing=0"]
    flags += ["ld_alpha=0.5", "f_divergence=js_divergence"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastadapt._cli.train.run.StageTrainer", Stage)
        assert train(tmp_path / "run", *flags) == 0
    divergence = {"ld_alpha": 0.5, "f_divergence": "js_divergence"}
    wanted = {
        "simpo": {"beta": 2.5, "gamma": 0.5, "label_smoothing": 0.2},
        "dpo": {"beta": 0.3, "label_smoothing": 0, **divergence},
        "slic": {"delta": 4},
        "robust": {"beta": 0.3, "label_smoothing": 0.2, **divergence},
    }
    assert seen == {name: seen[name] | own for name, own in wanted.items()}


def test_negatives_are_those_asked_for(train, tmp_path):
    flags = ["--loss", "mle+candidate_unlikelihood_penalty=0.5", "--save_strategy", "no"]
    flags += ["--max_steps", 1, "--negatives", "top_k", "--negative_options"]
    for k in (1, 5):
        assert train(tmp_path / str(k), *flags, f"k={k}") == 0
        (step,) = [entry for entry in _metrics(tmp_path / str(k)) if "loss" in entry]
        assert k - 1 < step["negatives/per_token"] <= k
        assert step["loss/candidate_unlikelihood_penalty"] > 0


def test_margin_of_slic_is_as_said(train, tmp_path):
    flags = ["--max_steps", 1, "--save_strategy", "no"]
    flags += ["--loss_options", "delta=1000", "slic.nll_weight=0"]
    assert train(tmp_path / "run", "--loss", "slic", *flags) == 0
    (step,) = [entry for entry in _metrics(tmp_path / "run") if "loss" in entry]
    assert step["loss/slic"] == pytest.approx(1000 - step["pairs/margins"], rel=1e-5)


def test_simpo_has_its_own_beta(train, tmp_path):
    """trl's default of 0.1 is not that of a loss which has another."""
    losses = []
    for i, more in enumerate(([], ["--beta", 2.0], ["--beta", 0.1])):
        flags = ["--max_steps", 1, "--save_strategy", "no", *more]
        assert train(tmp_path / str(i), "--loss", "simpo", *flags) == 0
        losses.append(_metrics(tmp_path / str(i))[0]["loss/simpo"])
    assert losses[0] == losses[1] != losses[2]


def test_shift_of_bco_goes_on(train, tmp_path):
    """A run that is resumed has the mean of all rewards before."""
    flags = ["--loss", "bco", "--save_steps", 2, "--learning_rate", 1e-2]
    assert train(tmp_path / "whole", *flags, "--max_steps", 4) == 0
    assert train(tmp_path / "run", *flags, "--max_steps", 2) == 0
    assert train(tmp_path / "run", *flags, "--max_steps", 4, "--resume") == 0
    one, other = (load_file(tmp_path / x / "model" / "model.safetensors") for x in ("whole", "run"))
    assert all(torch.equal(one[k], other[k]) for k in one)
    assert _metrics(tmp_path / "run")[-1] == _metrics(tmp_path / "whole")[-1]


def test_options_are_those_of_the_run(train, tmp_path, capsys):
    flags = ["--loss", "simpo", "--max_steps", 1, "--loss_options"]
    assert train(tmp_path, *flags, "gamma=1") == 0
    capsys.readouterr()
    assert train(tmp_path, *flags, "gamma=2", "--resume") == 2
    assert "loss_options: expected {'gamma': 1} as in the run, got {'gamma': 2}" in _one_line(
        capsys
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--loss", "kto"], "got 'kto', which needs what this command has not: reference_point"),
        (["--loss", "dpo+tdpo"], "'tdpo', which needs what this command has not: divergences"),
        (["--loss", "tpo"], "'tpo', which needs what this command has not: gold"),
        (["--loss", "sigmod"], "got 'sigmod'; did you mean sigmoid?"),
        (["--loss", "dpo+sigmoid"], "expected each loss once in a stage, got 'dpo' twice"),
        (["--loss", "mle", "--beta", "0.2"], "beta: expected a loss that has it, got mle"),
        (["--loss", "dpo", "--label_smoothing", "0.1"], "expected 0 for dpo, got 0.1; the conserv"),
        (["--loss", "cdpo", "--label_smoothing", "0.7"], "label_smoothing: expected a value in"),
        (["--loss", "simpo", "--loss_options", "gama=1"], "got simpo; did you mean gamma?"),
        (["--loss", "simpo", "--loss_options", "gamma"], "expected NAME=VALUE or LOSS.NAME=VALUE"),
        (["--loss", "simpo", "--loss_options", "gamma=x"], "gamma: expected a number, got 'x'"),
        (["--loss", "simpo", "--loss_options", "gamma=-1"], "gamma: expected a value >= 0, got"),
        (["--loss", "simpo", "--loss_options", "dpo.beta=1"], "dpo: expected a stage with it, got"),
        (["--loss", "simpo", "--loss_options", "simp.beta=1"], "got 'simp'; did you mean simpo?"),
        (["--loss", "simpo", "--loss_options", "simpo.bet=1"], "did you mean beta?"),
        (["--loss", "simpo", "--loss_options", "gamma=1", "gamma=2"], "each option once, got 'ga"),
        (["--loss", "mle", "--negatives", "top_k"], "negatives: expected a stage with candidate_"),
        (["--loss", "mle", "--negative_options", "k=2"], "negative_options: expected a stage with"),
        ([*CANDIDATES, "top"], "expected one of previous, top_k, repeated_ngrams, got 'top'"),
        ([*CANDIDATES, "top_k", "--negative_options", "n=2"], "expected some of k for top_k, got"),
        ([*CANDIDATES, "top_k", "--negative_options", "k=0"], "k: expected at least 1, got 0"),
        ([*CANDIDATES, "top_k", "--negative_options", "a.k=1"], "expected NAME=VALUE, got 'a.k=1'"),
        (["--loss", "dpo", "--f_divergence_type", "js_divergence"], "f_divergence=forward_kl"),
        (["--loss", "dpo", "--ld_alpha", "0.5"], "--loss_options ld_alpha=0.5"),
        (["--loss", "discopop", "--discopop_tau", "0.5"], "--loss_options discopop_tau=0.1"),
        (
            ["--loss=exmate", "--loss_options=exmate.norm=batch_token_mean"]
            + ["--gradient_accumulation_steps=2"],
            "norm: expected one that splits over 2 micro-batches, got 'batch_token_mean'",
        ),
    ],
)
def test_wrong_losses_and_options(arguments, message, capsys, tmp_path):
    common = ["train", "--data", "none.jsonl", "--output_dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as exit_:
        main([*common, *arguments])
    assert exit_.value.code == 2
    assert message in _one_line(capsys)


def test_values_of_options():
    words = ["gamma=1.5", "length_normalized=false", "norm=token", "ipo.ld_alpha=null"]
    assert parse_options(words) == {
        "gamma": 1.5,
        "length_normalized": False,
        "norm": "token",
        "ipo": {"ld_alpha": None},
    }
    assert parse_options(["sigmoid.beta=1"]) == {"dpo": {"beta": 1}}
    assert parse_stages("sigmoid+sft=0.5", None) == ({"dpo": 1.0, "mle": 0.5},)


def test_list_of_losses(capsys):
    assert main(["losses"]) == 0
    out = capsys.readouterr().out
    words = [line.split()[0] for line in out.splitlines() if line.strip()]
    for name, entry in CATALOGUE.items():
        assert words.count(name) == 1, name
        line = next(x for x in out.splitlines() if x.split()[:1] == [name])
        assert entry.title.split()[0] in line
        for need in entry.needs:
            assert need in out


def test_one_loss(capsys):
    assert main(["losses", "simpo"]) == 0
    assert capsys.readouterr().out == describe("simpo") + "\n"
    assert main(["losses", "sigmoid"]) == 0
    assert capsys.readouterr().out.startswith("dpo: DPO")
    assert main(["losses", "simp"]) == 2
    assert _one_line(capsys).endswith("got 'simp'; did you mean simpo?\n")
