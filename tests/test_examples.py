"""Every script of examples/ runs to its end, on a small random model."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="some examples train with trl")

from fastadapt._cli.main import main  # noqa: E402

EXAMPLES = sorted((Path(__file__).resolve().parent.parent / "examples").glob("*.py"))


def test_there_are_examples():
    assert len(EXAMPLES) >= 8


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda script: script.stem)
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
    run = [sys.executable, "-P", "-c", WITHOUT_EXTRAS, *map(str, EXAMPLES)]
    done = subprocess.run(run, cwd=tmp_path, check=True, capture_output=True, text=True)
    said = done.stdout.splitlines()
    assert len(said) == len(EXAMPLES)
    for line in said:
        assert " cannot be imported (" in line and 'comes with pip install "fastadapt[' in line
