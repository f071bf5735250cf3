"""The command line and the demo behind it, on a tiny model and on the demo's own."""

import copy
import functools
import io
import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import fastadapt
from fastadapt import Adaptor, training
from fastadapt._cli import demo, demo_training
from fastadapt._cli import errors as cli_errors
from fastadapt._cli import main as cli
from fastadapt._ops import memory
from fastadapt.training import packaged_models, pretrained
from fastadapt.training.head import HeadError
from fastadapt.training.pairs import Pair, encode_pairs

ROOT = Path(__file__).resolve().parents[1]
WORDS = ("<pad>", "<unk>", "<end>", *"the a cat dog sat ran on mat and sky is blue".split())


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    """A folder with a random two-layer model and a word-level tokenizer."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    vocabulary = {word: i for i, word in enumerate([*WORDS, *(f"w{i}" for i in range(485))])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", eos_token="<end>"
    ).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.5,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_demo_of_a_model_that_cannot_be_trained_ends_in_one_line(monkeypatch, capsys):
    def run(options):
        raise HeadError("model: expected one with a linear head, got ModuleList")

    monkeypatch.setattr(demo, "run", run)
    assert cli.main(["demo"]) == 2
    assert capsys.readouterr().err == (
        "fastadapt: model: expected one with a linear head, got ModuleList\n"
    )


@pytest.fixture
def no_model(monkeypatch):
    """Fails the test as soon as anything loads a model."""

    def load(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(demo, "load_model", load)


# A process that has what the demo needs imported, but nothing of the demo.
WITHOUT_PACKAGES = """
import sys

def taken(*names):
    return {n: sys.modules.pop(n) for n in [*sys.modules] if n.startswith(names)}

for name in ("rich", "transformers", "platformdirs"):
    taken("fastadapt._cli", "fastadapt.training", "fastadapt.hf", "fastadapt.study")
    there = taken(name)
    sys.modules[name] = None
    from fastadapt._cli.main import main
    print(main(["demo"]), flush=True)
    sys.modules.update(there)
"""


def test_missing_extra_is_named(start_python, tmp_path):
    """Of packages that are imported one after the other: what came before them may be there."""
    program, output = tmp_path / "program.py", tmp_path / "output"
    program.write_text(WITHOUT_PACKAGES)
    done = start_python(program, folder=tmp_path, output=output)
    done.join(timeout=120)
    lines = output.read_text().splitlines()
    assert done.exitcode == 0 and lines.count("2") == 3, lines
    errors = [line for line in lines if line.startswith("fastadapt: ")]
    for package, line in zip(("rich", "transformers", "platformdirs"), errors, strict=True):
        assert f"'{package}'" in line and 'pip install "fastadapt[demo]"' in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--top-p", "1.5"], r"top_p: expected a value in \[0, 1\], got 1.5"),
        (["--top-p", "nan"], "top_p: expected"),
        (["--top-k", "-1"], r"top_k: expected an integer in \[0, 2\*\*31\), got -1"),
        (["--top-k", "2.5"], "--top-k: invalid int value: '2.5'"),
        (["--temperature", "-1"], "temperature: expected"),
        (["--temperature", "0"], "temperature: expected above 0, got 0"),
        (["--typical-p", "0"], "typical_p: expected"),
        (["--eta-cutoff", "1"], "eta_cutoff: expected"),
        (["--epsilon-cutoff", "-0.1"], "epsilon_cutoff: expected"),
        (["--min-p", "2"], "min_p: expected"),
        (["--prompt", "the cat", "--prompt", "  "], r"got an empty prompt \(number 2\)"),
        (["--batch", "0"], "batch: expected at least 1, got 0"),
        (["--batch", "1", "--prompt", "a", "--prompt", "b"], "number of prompts, 2, got 1"),
        (["--max-new-tokens", "1"], "max_new_tokens: expected at least 2, got 1"),
        (["--threads", "0"], "threads: expected at least 1, got 0"),
        (["--seed", "-3"], "seed: expected 0 <= seed"),
        (["--model", ""], "model: expected a name or a path"),
    ],
)
def test_demo_refuses_bad_arguments_before_loading(arguments, message, capsys, no_model):
    with pytest.raises(SystemExit) as left:
        cli.main(["demo", *arguments])
    assert left.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_unknown_model_path(tmp_path, capsys):
    assert cli.main(["demo", "--model", str(tmp_path / "none")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_prompt_longer_than_the_model(tiny_folder, capsys):
    arguments = ["demo", "--model", str(tiny_folder), "--prompt", "cat " * 60]
    assert cli.main(arguments) == 2
    assert "the model has 64 positions; got 60" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "did you mean train?"),
        (["dem"], "did you mean demo?"),
        (["demo", "--promt", "a"], "unrecognized argument '--promt'; did you mean --prompt?"),
        (["demo", "--max_new_token", "4"], "did you mean --max-new-tokens?"),
        (["bench", "lossess"], "did you mean losses?"),
        (["tradeoff", "--out", "x", "--stringss", "1"], "did you mean --strings?"),
        (["gradients", "tabel"], "did you mean table?"),
        (["gradients", "table", "--what"], "unrecognized argument '--what'"),
        (["demo", "the", "cat"], "unrecognized argument 'the'"),
    ],
)
def test_misspelt_word_is_one_line_with_its_like(words, message, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(words)
    error = capsys.readouterr().err
    assert left.value.code == 2 and message in error and error.count("\n") == 1, error


def test_version(capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out == f"fastadapt {fastadapt.__version__}\n"


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(28, "No space left on device"), 2, "[Errno 28] No space left on device"),
        (PermissionError(13, "Permission denied", "x"), 2, "[Errno 13] Permission denied: 'x'"),
        (cli_errors.CommandError("expected\n a, got b"), 2, "expected a, got b"),
    ],
)
def test_what_a_person_can_mend_is_one_line(error, code, message, capsys, monkeypatch):
    def run(options):
        raise error

    monkeypatch.setattr(demo, "run", run)
    assert cli.main(["demo"]) == code
    assert capsys.readouterr().err == f"fastadapt: {message}\n"


def test_fault_of_ours_keeps_its_traceback(monkeypatch):
    def run(options):
        raise IndexError("ours")

    monkeypatch.setattr(demo, "run", run)
    with pytest.raises(IndexError, match="ours"):
        cli.main(["demo"])


def test_no_command_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as left:
        cli.main([])
    assert left.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


@pytest.mark.parametrize(
    "knobs",
    [
        [],
        ["--temperature", "0.7", "--top-k", "40", "--top-p", "0.95"],
        ["--top-p", "1", "--min-p", "0.02", "--typical-p", "0.9"],
        ["--top-p", "1", "--epsilon-cutoff", "0.001", "--eta-cutoff", "0.003"],
        ["--top-p", "1"],
    ],
)
def test_demo_on_a_tiny_model(knobs, tiny_folder, capsys, monkeypatch):
    timed = demo.median_ms
    monkeypatch.setattr(demo, "median_ms", lambda calls, budget_s: timed(calls, budget_s=0.0))
    threads = torch.get_num_threads()
    arguments = ["--model", str(tiny_folder), "--prompt", "the cat", "--prompt", "a", "--batch"]
    assert (
        cli.main(["demo", *arguments, "3", "--max-new-tokens", "5", "--threads", "1", *knobs]) == 0
    )
    out = capsys.readouterr().out
    assert torch.get_num_threads() == threads
    assert _agreement(out)[0] == 15 and "in a second run: yes" in out
    for label in ("greedy", "sampling, transformers", "sampling, fastadapt", "torch.softmax"):
        assert label in out
    # the first line names the model by the path that was given
    assert max(map(len, out.splitlines()[2:])) <= 80


def _agreement(out):
    """The kept sets and the drawn tokens of a demo's report; what differs lies at a threshold.

    Logits are sums in the processor's order, so that a token may come to lie on either side.
    """
    sets = re.search(r"Kept sets: (\d+) of (\d+) equal", out)
    tokens = re.search(r"Differing tokens: (\d+) wrong, (\d+) within", out)
    drawn = re.search(r"transformers' kept set: (\d+) of\s+(\d+)", out)
    equal, total, wrong, within, inside, draws = map(
        int, (*sets.groups(), *tokens.groups(), *drawn.groups())
    )
    assert wrong == 0 and (equal == total or within > 0) and draws - inside <= within
    return total, draws


@pytest.fixture
def few_pairs(monkeypatch):
    """Six short pairs in two batches."""
    pairs = [Pair("the cat", f"sat w{i}", f"ran w{2 * i} mat") for i in range(6)]
    monkeypatch.setattr(demo_training, "PAIRS", pairs)
    return pairs


def test_demo_trains_a_tiny_model(tiny_folder, few_pairs, capsys, monkeypatch):
    timed = demo.median_ms
    monkeypatch.setattr(demo, "median_ms", lambda calls, budget_s: timed(calls, budget_s=0.0))
    arguments = ["--model", str(tiny_folder), "--prompt", "the cat", "--max-new-tokens", "2"]
    assert cli.main(["demo", *arguments, "--train"]) == 0
    out = capsys.readouterr().out
    assert "Training: 2 steps of DPO+ExMATE, 4 pairs each" in out
    for label in ("all 6 pairs, before", "all 6 pairs, after", "log P", "ahead"):
        assert label in out
    expected = "MB through full logits" if memory.is_measurable() else "not measured"
    assert expected in " ".join(out.split())
    assert max(map(len, out.splitlines()[2:])) <= 80


@pytest.mark.parametrize(
    ("flags", "builtin", "trains"),
    [
        ([], True, True),
        (["--no-train"], True, False),
        ([], False, False),
        (["--train"], False, True),
    ],
)
def test_which_models_the_demo_trains(flags, builtin, trains, tiny_folder, capsys, monkeypatch):
    calls = []
    report = demo_training.TrainingReport(
        steps=[], before=_watched(), after=_watched(), memory=None, logits=0
    )
    monkeypatch.setattr(demo_training, "train", lambda *a, **k: calls.append(a) or report)
    load = demo.load_model
    monkeypatch.setattr(demo, "load_model", lambda name, **k: load(name or tiny_folder, **k))
    timed = demo.median_ms
    monkeypatch.setattr(demo, "median_ms", lambda calls, budget_s: timed(calls, budget_s=0.0))
    arguments = ["--prompt", "the cat", "--max-new-tokens", "2", *flags]
    model = [] if builtin else ["--model", str(tiny_folder)]
    assert cli.main(["demo", *arguments, *model]) == 0
    assert len(calls) == trains
    assert ("DPO+ExMATE" in capsys.readouterr().out) == trains


def _watched():
    return {"logps/chosen": -1.0, "logps/rejected": -2.0, "pairs/accuracies": 0.5}


def test_training_report_is_of_these_pairs(tiny_folder, few_pairs):
    model, tokenizer = demo.load_model(tiny_folder)
    untrained = copy.deepcopy(model)
    ticks = []
    report = demo_training.train(model, tokenizer, on_step=lambda: ticks.append(0))
    assert len(ticks) == demo_training.count_steps() == 3 * 2 + 2
    for state, seen in ((untrained, report.before), (model, report.after)):
        logps = training.reference_logps(state, encode_pairs(tokenizer, few_pairs))
        chosen, rejected = (side.mean().item() for side in logps)
        ahead = (logps[0] > logps[1]).float().mean().item()
        found = [seen[name] for name in ("logps/chosen", "logps/rejected", "pairs/accuracies")]
        assert found == pytest.approx([chosen, rejected, ahead], rel=1e-5)
    assert report.after["logps/chosen"] > report.before["logps/chosen"]
    tokens = [encode_pairs(tokenizer, few_pairs[i : i + 4]).labels.numel() for i in (0, 4)]
    assert report.logits == 4 * 500 * max(tokens)


def test_memory_of_a_step_is_left_out_where_it_cannot_be_told(tiny_folder, few_pairs, monkeypatch):
    monkeypatch.setattr(demo_training, "is_measurable", lambda: False)
    ticks = []
    report = demo_training.train(*demo.load_model(tiny_folder), on_step=lambda: ticks.append(0))
    assert report.memory is None and len(ticks) == demo_training.count_steps()
    out = demo.Console(record=True, width=80, file=io.StringIO())
    demo_training.print_report(out, report)
    assert "not measured, this system does not tell the peak" in out.export_text()


def test_texts_end_at_the_end_token(tiny_folder, capsys):
    model, tokenizer = demo.load_model(tiny_folder)
    ids = torch.tensor([[3, 5, 2, 6, 6]])
    runs = {mode: [demo.Generation(ids, 0.0, [0.1])] for mode in ("greedy", "stock", "fused")}
    demo._print_texts(demo.Console(), model, tokenizer, ["a\x1b[31m prompt"], runs)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["prompt", "a[31m", "prompt"]
    assert lines[1].split() == ["transformers", "the", "cat"]


def test_filled_prompts_repeat():
    options = demo.DemoOptions(adaptor=Adaptor(top_p=0.9), prompts=("a", "b"), batch=5)
    for chat in (True, False):
        assert options.filled_prompts(chat=chat) == ["a", "b", "a", "b", "a"]
    options = demo.DemoOptions(adaptor=Adaptor(), batch=2)
    assert options.filled_prompts(chat=True) == list(demo.PROMPTS[:2])
    assert options.filled_prompts(chat=False) == list(demo.BEGINNINGS[:2])


@pytest.fixture
def with_terms(monkeypatch, tiny_folder):
    """A packaged model with terms of use, of which it is recorded whether they were accepted."""
    seen = []
    terms = packaged_models.Terms("Be kind.", "https://terms.example")

    def load(name, *, accept_terms, **kwargs):
        seen.append(accept_terms)
        if not accept_terms:
            raise pretrained.TermsNotAcceptedError("terms, https://terms.example: --accept-terms")
        raise pretrained.ModelNotFoundError("accepted, but there is no network")

    monkeypatch.setattr(demo, "terms_to_accept", lambda name: terms if name == "kind" else None)
    monkeypatch.setattr(demo, "load_model", load)
    return seen


@pytest.mark.parametrize(
    ("flags", "answer", "accepted"),
    [
        ([], "y", True),
        ([], " YES ", True),
        ([], "", False),
        ([], "n", False),
        ([], "yellow", False),
        (["--accept-terms"], None, True),
        ([], None, False),
    ],
)
def test_terms_are_shown_and_asked(flags, answer, accepted, with_terms, monkeypatch, capsys):
    """`answer` is what a person types; None: there is no terminal."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{answer}\n"))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: answer is not None)
    assert cli.main(["demo", "--model", "kind", *flags]) == 2
    shown = capsys.readouterr()
    assert ("there is no network" in shown.err) == accepted
    assert with_terms == [accepted] and "https://terms.example" in shown.err
    assert ("Be kind." in shown.err) == (answer is not None or accepted)
    assert ("[y/N]" in shown.err + shown.out) == (answer is not None)


def test_end_of_input_is_a_no(with_terms, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    assert cli.main(["demo", "--model", "kind"]) == 2
    assert with_terms == [False]


def test_models_without_terms_are_not_asked_about(with_terms, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    assert cli.main(["demo", "--model", "other"]) == 2
    assert with_terms == [False]


def test_bench_generation_writes_json(tiny_folder, tmp_path, monkeypatch):
    import bench_generation

    out = tmp_path / "results" / "generation.json"
    options = ["--model", str(tiny_folder), "--batch", "4", "--max-new-tokens", "4"]
    words = ["bench_generation.py", *options, "--rounds", "3", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", words)
    bench_generation.main()
    record = json.loads(out.read_text())
    assert set(record["modes"]) == {"greedy", "stock", "fused", "stock_edits", "fused_edits"}
    for mode in record["modes"].values():
        assert len(mode["step_ms_by_round"]) == len(mode["ratio_to_greedy_by_round"]) == 3
        assert mode["step_ms"]["q1"] <= mode["step_ms"]["median"] <= mode["step_ms"]["q3"]
    assert record["modes"]["greedy"]["ratio_to_greedy"]["median"] == 1.0
    assert record["drafts"]["equal"] == [3, 3] and min(record["drafts"]["plain_to_lookup"]) > 0
    assert record["host"]["torch_threads"] >= 1 and record["host"]["versions"]["torch"]
    assert str(tmp_path) not in json.dumps(record["host"])


def test_bench_needs_a_checkout(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    installed = tmp_path / "site-packages" / "fastadapt" / "_cli" / "main.py"
    monkeypatch.setattr(cli, "__file__", str(installed))
    assert cli.main(["bench", "generation", "--rounds", "2"]) == 2
    assert "from a checkout" in capsys.readouterr().err
    (tmp_path / "site-packages" / "benchmarks").mkdir(parents=True)
    (tmp_path / "site-packages" / "benchmarks" / "bench_generation.py").write_text("exit(7)")
    assert cli.main(["bench", "generation"]) == 7


@pytest.mark.parametrize(
    "name",
    [
        *("generation", "sampling", "score", "losses", "trainer", "tradeoff", "tracker"),
        *("gpu-sampling", "gpu-losses"),
    ],
)
def test_bench_passes_arguments_and_exit_code(name, tmp_path, monkeypatch):
    (tmp_path / "benchmarks").mkdir()
    script = "import sys; sys.exit(7 if sys.argv[1:] == ['--rounds', '2'] else 1)"
    (tmp_path / "benchmarks" / f"bench_{name.replace('-', '_')}.py").write_text(script)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", name, "--rounds", "2"]) == 7


@pytest.mark.demo_model
def test_demo_on_its_own_model(capsys, monkeypatch):
    """Two prompts, one round, two steps of a pair each: what every line of the report needs."""
    timed = demo.median_ms
    monkeypatch.setattr(demo, "DemoOptions", functools.partial(demo.DemoOptions, rounds=1))
    monkeypatch.setattr(demo_training, "BATCH", 1)
    monkeypatch.setattr(demo_training, "PAIRS", demo_training.PAIRS[:2])
    monkeypatch.setattr(demo, "median_ms", lambda calls, budget_s: timed(calls, budget_s=0.0))
    assert cli.main(["demo", "--batch", "2", "--max-new-tokens", "4"]) == 0
    out = capsys.readouterr().out
    assert _agreement(out)[1] == 8
    assert "all 2 pairs, after" in out
    assert max(map(len, out.splitlines())) <= 80
    assert all(math.isfinite(float(number)) for number in re.findall(r"\d+\.\d+", out))
