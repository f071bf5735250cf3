"""The README says what benchmarks/results/ says, and no more."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def report():
    spec = importlib.util.spec_from_file_location("report", ROOT / "benchmarks" / "report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_readme_is_what_the_results_say(report):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert report.render(readme) == readme


def test_result_of_an_uncommitted_tree_is_refused(report, tmp_path, monkeypatch):
    record = json.loads((report.RESULTS / "generation.json").read_text(encoding="utf-8"))
    record["host"]["dirty"] = True
    (tmp_path / "generation.json").write_text(json.dumps(record), encoding="utf-8")
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    with pytest.raises(ValueError, match="expected a result of a committed tree"):
        report.load("generation")


def test_block_that_is_missing_is_an_error(report):
    with pytest.raises(ValueError, match="expected one block 'generation', got 0"):
        report.render("# nothing here\n")


def test_quick_start_runs():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    first = re.search(r"```python\n(.*?)```", readme, re.DOTALL)
    scope: dict[str, object] = {}
    exec(compile(first[1], "README.md", "exec"), scope)
    assert scope["drawn"].status.tolist() == [0, 0, 0, 0]


def test_examples_of_losses_run():
    """In one scope, in their order; what was ignored has no gradient, all else has one."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    scope: dict[str, object] = {}
    for block in blocks[:1] + [b for b in blocks if "Responses.from_labels(" in b]:
        exec(compile(block, "README.md", "exec"), scope)
    gradient = scope["hidden"].grad
    assert scope["loss"].isfinite() and scope["metrics"]["logps/good"] < 0
    assert (gradient[:, 28:] == 0).all() and (gradient[:, :28].abs().sum(-1) > 0).all()
    assert scope["logits"].grad.abs().sum() > 0
