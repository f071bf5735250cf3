"""Every script of examples/ runs to its end, on a small random model."""

import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import fastadapt

pytest.importorskip("trl", reason="some examples train with trl")

from fastadapt._cli.main import main  # noqa: E402

EXAMPLES = sorted((Path(__file__).resolve().parent.parent / "examples").glob("*.py"))
# its package is compiled for minutes, and is in no extra
OF_LLAMA_CPP = "llama_cpp_python"


def test_there_are_examples():
    assert len(EXAMPLES) >= 9
    assert OF_LLAMA_CPP in {script.stem for script in EXAMPLES}


class Llama:
    """What the example uses of llama-cpp-python 0.3.36's class: the calls of a processor."""

    def __init__(self, model_path, n_ctx, verbose):
        assert Path(model_path).exists() and n_ctx > 0 and not verbose

    def create_completion(self, prompt, max_tokens, temperature, logits_processor):
        assert temperature == 0.0, "the chain must take the token that the processor leaves"
        layout = np.dtype([("id", np.intc), ("logit", np.single), ("p", np.single)])
        generator, tokens = np.random.default_rng(0), [5, 7, 9]
        self.given = []
        for _ in range(max_tokens):
            row = np.zeros(200, layout)  # llama_token_data, so that logits are 12 bytes apart
            row["logit"] = generator.normal(size=200) * 3
            self.given.append(row["logit"].copy())
            row["logit"][:] = logits_processor(np.array(tokens, np.intc), row["logit"])
            assert np.isfinite(row["logit"]).sum() == 1
            tokens.append(int(row["logit"].argmax()))
        return {"choices": [{"text": " ".join(map(str, tokens[3:]))}]}


class LogitsProcessorList(list):
    """Processors, one after the other."""

    def __call__(self, input_ids, scores):
        for processor in self:
            scores = processor(input_ids, scores)
        return scores


@pytest.fixture
def llama_cpp(monkeypatch):
    """The module that the example imports: without a model of its own, ours stands in for it."""
    module = ModuleType("llama_cpp")
    module.Llama, module.LogitsProcessorList = Llama, LogitsProcessorList
    monkeypatch.setitem(sys.modules, "llama_cpp", module)


def test_the_example_of_llama_cpp_draws_as_sample(llama_cpp, monkeypatch, capsys, tmp_path):
    model = tmp_path / "model.gguf"
    model.touch()
    script = next(script for script in EXAMPLES if script.stem == OF_LLAMA_CPP)
    monkeypatch.setattr(sys, "argv", [str(script), str(model)])
    run = runpy.run_path(str(script), run_name="__main__")
    texts = capsys.readouterr().out.splitlines()
    logits = torch.from_numpy(np.array(run["model"].given))
    assert len(texts) == 2 and texts[0] != texts[1]
    for seed, text in zip((1, 2), texts, strict=True):
        drawn = fastadapt.sample(
            logits,
            fastadapt.Adaptor(temperature=0.8, top_p=0.9),
            seeds=torch.full((20,), seed),
            positions=torch.arange(20),
        )
        assert text == " ".join(map(str, drawn.tokens.tolist()))


def test_a_draw_of_llama_cpp_is_of_one_completion(llama_cpp, monkeypatch, capsys, tmp_path):
    model = tmp_path / "model.gguf"
    model.touch()
    script = next(script for script in EXAMPLES if script.stem == OF_LLAMA_CPP)
    monkeypatch.setattr(sys, "argv", [str(script), str(model)])
    draw = runpy.run_path(str(script), run_name="__main__")["Draw"](fastadapt.Adaptor(), 1)
    scores = np.zeros(9, np.single)
    for length in (4, 5, 6):
        draw(np.zeros(length, np.intc), scores)
    for other in (3, 4, 6, 12):  # a shorter prompt, the same, as long as the text, longer
        message = f"expected a new Draw .* 7 tokens now, got one of {other}"
        with pytest.raises(ValueError, match=message):
            draw(np.zeros(other, np.intc), scores)


def test_the_example_of_llama_cpp_says_what_it_takes(llama_cpp, monkeypatch):
    script = next(script for script in EXAMPLES if script.stem == OF_LLAMA_CPP)
    monkeypatch.setattr(sys, "argv", [str(script)])
    with pytest.raises(SystemExit, match="usage: python examples/llama_cpp_python.py MODEL.gguf"):
        runpy.run_path(str(script), run_name="__main__")


OTHERS = [script for script in EXAMPLES if script.stem != OF_LLAMA_CPP]


@pytest.mark.parametrize("script", OTHERS, ids=lambda script: script.stem)
def test_example(script, letter_model, monkeypatch, tmp_path, capsys):
    def in_this_process(command, check):
        """An interpreter of its own would import trl for 10 seconds."""
        assert command[:3] == [sys.executable, "-m", "fastadapt"] and check
        assert main(command[3:]) == 0

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "run", in_this_process)
    monkeypatch.setattr(sys, "argv", [str(script), letter_model])
    runpy.run_path(str(script), run_name="__main__")
    said = capsys.readouterr().out
    assert said.strip() and "nan" not in said
    assert not list(tmp_path.iterdir()), "an example left files"


@pytest.mark.parametrize("loss", ["exmate", "dpo", "orpo", "kto"])
def test_the_example_of_any_loss_takes_others(letter_model, monkeypatch, capsys, loss):
    script = next(script for script in EXAMPLES if script.stem == "train_any_loss")
    monkeypatch.setattr(sys, "argv", [str(script), letter_model, "--loss", loss])
    runpy.run_path(str(script), run_name="__main__")
    said = capsys.readouterr().out
    assert said.startswith(f"{loss}: ") and said.count("nats a token") == 4


WITHOUT_EXTRAS = """
import runpy, sys
for name in ("transformers", "trl", "datasets"):
    sys.modules[name] = None
for script in sys.argv[1:]:
    try:
        runpy.run_path(script, run_name="__main__")
    except ImportError as error:
        print(error)
"""


def test_examples_say_which_extra_they_need(tmp_path):
    run = [sys.executable, "-P", "-c", WITHOUT_EXTRAS, *map(str, OTHERS)]
    done = subprocess.run(run, cwd=tmp_path, check=True, capture_output=True, text=True)
    said = done.stdout.splitlines()
    assert len(said) == len(OTHERS)
    for line in said:
        assert " cannot be imported (" in line and 'comes with pip install "fastadapt[' in line
