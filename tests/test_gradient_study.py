"""The gradient study: steps as predicted, claims with their conditions, tables, pictures, page."""

import gzip
import json
import math
import re
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import bench_tracker
import limits
from fastadapt import RewardPenalizeLoss, label_log_odds
from fastadapt._cli import gradients as cli_gradients
from fastadapt._cli.main import main
from fastadapt.losses import Responses
from fastadapt.study.gradients import field_plots
from fastadapt.study.gradients import plots as gradient_plots
from fastadapt.study.gradients import report as gradient_report
from fastadapt.study.gradients.cases import (
    CASES,
    WITH_MATE,
    claim_rows,
    curve_rows,
    prediction_rows,
    toy_pair,
)
from fastadapt.study.gradients.field_plots import plane_field, simplex_field
from fastadapt.study.gradients.named_losses import LOSSES
from fastadapt.study.gradients.one_step import (
    exmate_threshold,
    head_copy,
    pair_features,
    step_records,
    trained_head,
)
from fastadapt.study.gradients.records import read_rows, write_rows
from fastadapt.study.gradients.report import cases_table, write_report
from fastadapt.study.gradients.steps import SITUATIONS, StepOptions, run_steps, select, signs
from fastadapt.study.gradients.training import TrainingOptions, run_training
from fastadapt.tracking.pair_contexts import pairs_of_kind
from fastadapt.training.pairs import Pair

DOCS = Path(__file__).resolve().parents[1] / "docs" / "gradients"
WORDS = ("<pad>", "<unk>", "<end>", *"a b c d e f g h i j".split())
TEXTS = [("a b", "c d e", "c f"), ("b", "g h", "a a b"), ("d e", "a", "b b"), ("h i", "j a", "e")]


@pytest.fixture(scope="module")
def tokenizer():
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", eos_token="<end>"
    )


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Dialogues whose pieces are words of the tokenizer."""
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    lines = []
    for prompt, chosen, rejected in TEXTS:
        start = f"\n\nHuman: {prompt}\n\nAssistant: "
        lines.append(json.dumps({"chosen": start + chosen, "rejected": start + rejected}))
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def study(model, tokenizer, data, tmp_path_factory):
    """A folder with all tables and the page, from the tiny model, whose parameters it leaves.

    The toys take fewer steps for their claims and curves, the pictures have fewer dots, and the
    coefficients are those of three losses: test_gradients.py checks all.
    """
    folder = tmp_path_factory.mktemp("study")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    seen = []
    steps = StepOptions(data=data, out=folder, pairs=4, max_length=20, fit_epochs=4, fit_rate=0.05)
    run_steps(model, tokenizer, steps, name="tiny", report=lambda *a: seen.append(a))
    training = TrainingOptions(
        data=data, out=folder, pairs=4, batch=2, steps=3, max_length=20, learning_rate=1e-2
    )
    run_training(model, tokenizer, training, name="tiny", report=lambda *a: seen.append(a))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradient_report, "claim_rows", partial(claim_rows, steps=8))
        patch.setattr(gradient_report, "curve_rows", partial(curve_rows, steps=10))
        patch.setattr(gradient_report, "ROWS", gradient_report.ROWS[:3])
        for module in (field_plots, gradient_plots):
            patch.setattr(module, "DPI", 40)
        write_report(folder)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    for phase in {phase for phase, _, _ in seen}:
        counts = [(done, total) for name, done, total in seen if name == phase]
        assert counts[0][0] == 0 and counts[-1][0] == counts[-1][1], phase
    return folder


def test_toy_steps_are_as_predicted():
    """Every case, loss and start: the sign, and the size to a fiftieth of the larger change."""
    rows = prediction_rows()
    assert {(r["case"], r["loss"]) for r in rows} == {(c, x) for c in CASES for x in WITH_MATE}
    for r in rows:
        for side in ("chosen", "rejected"):
            predicted, measured = r[f"predicted_{side}"], r[f"measured_{side}"]
            assert predicted * measured > 0, r
            assert measured == pytest.approx(predicted, abs=2e-5), r
    text = cases_table(rows)
    assert text.count("\n") == len(rows) + 1 and "same response, other context" in text


def test_claims_hold_on_the_toys_under_their_conditions():
    rows = claim_rows(steps=8)
    dpo = [r for r in rows if r["loss"] == "DPO"]
    exmate = [r for r in rows if r["loss"] == "ExMATE"]
    for r in dpo:
        both = r["measured_chosen"] < 0 and r["measured_rejected"] < 0
        assert both == (r["rho"] > 1), r
    for r in exmate:
        assert (r["measured_rejected"] < 0) == (r["p_rejected"] > r["threshold"]), r
    # each condition is met and not met somewhere
    assert {r["rho"] > 1 for r in dpo} == {True, False}
    assert {r["p_rejected"] > r["threshold"] for r in exmate} == {True, False}


def test_toy_contexts_share_rows_where_their_tokens_do():
    pair = toy_pair("shared prefix").own
    chosen, rejected = pair.hidden[: pair.chosen], pair.hidden[pair.chosen :]
    same = (chosen == rejected).all(-1).tolist()
    assert same == [True, True, True, True, False, False]
    other = toy_pair("same response, other context").own
    assert not (other.hidden[:6] == other.hidden[6:]).all(-1).any()
    cells = curve_rows(steps=2, cases=("shared prefix",))
    assert cells[0]["rejected_in_chosen"] == cells[0]["rejected_in_rejected"]


@pytest.mark.parametrize("kind", ["same-prompt", "same-response"])
def test_steps_on_a_model_are_as_predicted(kind, model, tokenizer):
    pairs = pairs_of_kind(kind, [Pair(*t) for t in TEXTS])
    features = pair_features(model, tokenizer, pairs)
    assert len(features) == 4 and all(0 < f.chosen < len(f.labels) for f in features)
    head = head_copy(model)
    assert head.weight.data_ptr() != model.lm_head.weight.data_ptr()
    objectives = {
        k: RewardPenalizeLoss({k: 1.0}, **({"level": "token"} if "unl" in k else {}))
        for k in ("dpo", "exmate", "unlikelihood")
    }
    rows = [
        r
        for f in features
        for r in step_records(head, f, objectives, dict.fromkeys(objectives, (1e-2,)))
    ]
    for r in rows:
        largest = max(abs(r["predicted_chosen"]), abs(r["predicted_rejected"]))
        assert largest == pytest.approx(1e-2, rel=1e-9)
        for side in ("chosen", "rejected"):
            assert r[f"measured_{side}"] == pytest.approx(r[f"predicted_{side}"], abs=5e-4)
        if r["loss"] == "exmate":
            assert (r["predicted_rejected"] < 0) == (r["p_rejected"] > exmate_threshold(r))
        if r["loss"] == "dpo":
            assert (r["predicted_chosen"] < 0) == (r["rho"] > 1)


def test_trained_head_knows_its_side(model, tokenizer):
    pairs = pairs_of_kind("same-prompt", [Pair(*t) for t in TEXTS])
    features = pair_features(model, tokenizer, pairs)
    head = head_copy(model)
    trained = trained_head(head, features, side="rejected", learning_rate=0.05, epochs=30, batch=2)
    dpo = {"dpo": RewardPenalizeLoss({"dpo": 1.0})}
    for f in features:
        (before,) = step_records(head, f, dpo, {"dpo": (0.01,)})
        (after,) = step_records(trained, f, dpo, {"dpo": (0.01,)})
        assert after["logp_rejected"] > before["logp_rejected"] + 1


def test_tables_have_every_situation(study):
    rows = read_rows(study / "steps.csv")
    assert {(r["kind"], r["start"]) for r in rows} == {s[:2] for s in SITUATIONS}
    assert {r["size"] for r in rows} == {0.1, 1}
    training = read_rows(study / "training.csv")
    assert {r["step"] for r in training} == {0, 1, 2}
    assert len(training) == 3 * 6 * 3
    assert len(read_rows(study / "training_pairs.csv")) == 3 * 6 * 3 * 2
    record = json.loads((study / "training.json").read_text())
    example = record["example"]
    assert len(example["slopes"]["DPO"][0]) == len(example["chosen"])
    net = [a + b for a, b in zip(*example["slopes"]["DPO"], strict=False)]
    assert max(map(abs, net[: example["shared"] - 1])) < 1e-9  # DPO: 0 on shared tokens


def test_page_says_what_the_tables_say(study):
    page = (study / "README.md").read_text(encoding="utf-8")
    rows = [r for r in read_rows(study / "steps.csv") if r["loss"] == "dpo" and r["size"] == 0.1]
    right, count = signs(rows)
    assert f"{right} of {count} ({100 * right / count:.1f} %)" in page
    above = [r for r in rows if r["rho"] > 1]
    both = sum(r["measured_chosen"] < 0 and r["measured_rejected"] < 0 for r in above)
    assert f"| DPO lowers both | model | ρ > 1 | {len(above)} | {both} |" in page
    pictures = re.findall(r"\]\((\w+\.png)\)", page)
    assert len(pictures) == len(set(pictures)) == 8
    for name in pictures:
        assert (study / name).read_bytes().startswith(b"\x89PNG")
    assert set(pictures) == {p.name for p in study.glob("*.png")}


def test_published_page_is_of_its_tables():
    """docs/gradients: ρ is right on 95 % of the real pairs or more, in each situation."""
    rows = [r for r in read_rows(DOCS / "steps.csv") if r["loss"] == "dpo"]
    page = (DOCS / "README.md").read_text(encoding="utf-8")
    settings = json.loads((DOCS / "steps.json").read_text())["settings"]
    assert settings["found"] >= 200
    for size in settings["sizes"]:
        for kind, start, _ in SITUATIONS:
            wanted = {"kind": kind, "start": start, "size": size}
            right, count = signs(select(rows, **wanted))
            assert right / count >= 0.95
            assert f"{right} of {count} ({100 * right / count:.1f} %)" in page
    # where ρ decides: as many pairs above 1 as below it, or nearly
    decided = select(rows, kind="same-response", start="MLE on chosen", size=settings["sizes"][0])
    above = sum(r["rho"] > 1 for r in decided)
    assert len(decided) >= 200 and 0.25 < above / len(decided) < 0.75


def test_command_writes_the_report(monkeypatch, tmp_path, capsys):
    asked = []

    def write(folder, *, report):
        report("cases", 1, 1)
        asked.append(folder)
        return folder / "README.md"

    monkeypatch.setattr(gradient_report, "write_report", write)
    assert main(["gradients", "report", "--out", str(tmp_path)]) == 0
    assert asked == [tmp_path]
    assert capsys.readouterr().out.strip() == str(tmp_path / "README.md")


@pytest.mark.parametrize("weights", LOSSES.values(), ids=LOSSES)
def test_fields_are_the_descent_of_autograd(weights):
    """A tiny step on explicit logits moves the probabilities along the arrows."""
    options = {"beta": field_plots.BETA} if "dpo" in weights else {}
    objective = RewardPenalizeLoss(weights, **options)
    mask, eps = torch.ones(1, 1, dtype=torch.bool), 1e-6

    def moved(z, labels):
        z = z.clone().requires_grad_()
        log_odds = label_log_odds(z, labels)
        chosen, rejected = (Responses(m.reshape(1, 1), mask) for m in log_odds)
        (gradient,) = torch.autograd.grad(objective(chosen, rejected)[0], [z])
        return z.detach() - eps * gradient

    field = simplex_field(weights)
    corners = field_plots._CORNERS
    for i in (0, 7, 20):
        a = torch.cat([corners.T, torch.ones(1, 3).double()])
        s = torch.linalg.solve(a, torch.cat([field.points[i], torch.ones(1).double()]))
        z = s.log()
        # one row of logits for both labels: its gradients add up
        new = moved(torch.stack([z, z]), torch.tensor([0, 1])) - z
        velocity = ((z + new.sum(0)).softmax(-1) - s) / eps
        torch.testing.assert_close(velocity @ corners, field.velocities[i], atol=1e-5, rtol=1e-4)
    plane = plane_field(weights)
    for i in (0, 40, 100):
        p = plane.points[i]
        z = torch.stack([p.log(), torch.log1p(-p)], -1)
        new = moved(z, torch.tensor([0, 0]))
        velocity = (new.softmax(-1)[:, 0] - p) / eps
        # two classes: a row's label moves by g and its other entry by -g, twice the motion of z_y
        torch.testing.assert_close(velocity, 2 * plane.velocities[i], atol=1e-5, rtol=1e-4)


def test_rows_survive_a_file(tmp_path):
    rows = [{"a": 1, "b": 0.25, "c": None}, {"a": 2, "b": -math.inf, "d": "x"}]
    write_rows(tmp_path / "t.csv", rows)
    read = read_rows(tmp_path / "t.csv")
    assert read[0] == {"a": 1, "b": 0.25, "c": None, "d": None}
    assert read[1]["b"] == -math.inf and read[1]["d"] == "x"
    with pytest.raises(ValueError, match="expected at least one for t.csv, got none"):
        write_rows(tmp_path / "t.csv", [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["step", "--step-pairs", "3"], "pairs: expected at least 4, got 3"),
        (["train", "--train-steps", "1"], "steps: expected at least 2, got 1"),
        (["run", "--step-max-length", "2"], "max_length: expected at least 8, got 2"),
        (["run", "--train-learning-rate", "nan"], "learning_rate: expected a value > 0, got nan"),
        (["train", "--train-learning-rate", "-1"], "learning_rate: expected a value > 0, got -1.0"),
        (["step", "--threads", "0"], "threads: expected at least 1, got 0"),
        (["step", "--step-pairs", "x"], "invalid int value: 'x'"),
    ],
)
def test_wrong_options_end_before_a_model_is_loaded(options, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        main(["gradients", *options, "--data", "none.jsonl", "--out", str(tmp_path)])
    assert left.value.code == 2 and message in capsys.readouterr().err


def test_what_people_do_every_day_is_one_line(data, tmp_path, capsys, monkeypatch):
    """Files that are not there, damaged or in the way: before a model is loaded, with code 2."""
    cut, file, folder = (tmp_path / name for name in ("cut.jsonl.gz", "file", "folder"))
    cut.write_bytes(gzip.compress(data.read_bytes())[:-20])
    file.write_text("")
    folder.mkdir()
    (tmp_path / "half").mkdir()
    for name in ("steps.csv", "training.csv"):
        (tmp_path / "half" / name).write_text("a\n1\n")
    (tmp_path / "half" / "steps.json").write_text('{"model": ')
    out = ["--out", str(folder)]
    for words, message in [
        (["step", "--data", str(tmp_path / "none.jsonl"), *out], "none.jsonl"),
        (["train", "--data", str(folder), *out], "Is a directory"),
        (["run", "--data", str(cut), *out], "got a truncated one"),
        (
            ["run", "--data", str(data), "--out", str(file)],
            f"expected a folder, got the file '{file}'",
        ),
        (["step", "--data", str(data), "--out", str(file / "x")], f"got the file '{file}'"),
        (["step", "--data", str(data), *out, "--model", str(tmp_path / "no")], "does not exist"),
        (["report", "--out", str(tmp_path / "none")], "No such file or directory"),
        (["report", "--out", str(file)], "Not a directory"),
        (["report", "--out", str(tmp_path / "half")], "steps.json: expected a record of the study"),
    ]:
        assert main(["gradients", *words]) == 2, words
        (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("fastadapt:")]
        assert message in line, words
    assert list(folder.iterdir()) == []

    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_gradients, "_load", interrupt)
    assert main(["gradients", "step", "--data", str(data), *out]) == 130
    assert "fastadapt: interrupted; tables" in capsys.readouterr().err


def test_too_few_pairs_are_refused(model, tokenizer, data, tmp_path):
    steps = StepOptions(data=data, out=tmp_path, pairs=4, max_length=8)
    with pytest.raises(ValueError, match="expected at least 4 pairs of at most 8 tokens, got"):
        run_steps(model, tokenizer, steps, name="tiny")
    one = tmp_path / "one.jsonl"
    one.write_text(data.read_text().splitlines()[0])
    training = TrainingOptions(data=one, out=tmp_path, max_length=20)
    with pytest.raises(ValueError, match="expected at least 2 pairs of at most 20 tokens, got 1"):
        run_training(model, tokenizer, training, name="tiny")


def test_command_prints_the_cases(capsys):
    assert main(["gradients", "cases"]) == 0
    assert capsys.readouterr().out.count("| DPO |") == 2 * len(CASES)


def test_tracker_benchmark_runs(model, tokenizer, tmp_path, monkeypatch):
    """All modes on a tiny model; ratios are of times, so only that they are there is tested."""
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    out = tmp_path / "tracker.json"
    arguments = ["--model", folder, "--batch", 2, "--rounds", 2, "--out", out]
    monkeypatch.setattr(sys, "argv", ["bench_tracker", *map(str, arguments)])
    bench_tracker.main()
    record = json.loads(out.read_text())
    assert set(record["step_ms"]) == {"none", "log_odds", "rho"}
    assert [limit.bound for limit in limits.tracker_limits(record)] == [1.05, 1.05]
    assert record["settings"]["interval"] == 10 and min(record["to_none"]["rho"]) > 0
