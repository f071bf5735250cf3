"""The documents say what benchmarks/results/ says, and no more; their first examples run."""

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


PAGES = (
    *("README.md", "docs/benchmarks.md", "docs/choosing.md", "docs/losses.md", "docs/results.md"),
    *("docs/sharded.md", "docs/supports.md"),
)


@pytest.mark.parametrize("page", PAGES)
def test_page_is_what_the_results_say(report, page):
    assert set(report.PAGES) == set(PAGES)
    text = (ROOT / page).read_text(encoding="utf-8")
    assert report.render(text, page) == text


def test_first_screen_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


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


def _examples(page, end="\0"):
    """The blocks of Python of a page up to a heading, in their order."""
    text = (ROOT / page).read_text(encoding="utf-8").partition(end)[0]
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_quick_start_runs():
    scope: dict[str, object] = {}
    for block in _examples("README.md"):
        if "model.generate(" not in block:
            exec(compile(block, "README.md", "exec"), scope)
    assert scope["drawn"].status.tolist() == [0, 0, 0, 0]
    assert scope["scores"].logprobs.shape == (4, 2) and scope["loss"].isfinite()
    assert scope["hidden"].grad.abs().sum() > 0


def test_examples_of_sampling_run():
    """Edits, a history's steps, drafts; what needs a model or a GPU is left out."""
    scope: dict[str, object] = {}
    blocks = _examples("docs/sampling.md", "\n## On a GPU\n")
    kept = [block for block in blocks if "model.generate(" not in block]
    assert len(kept) == 7
    lengths = []
    for block in kept:
        exec(compile(block, "docs", "exec"), scope)
        lengths.append(scope["history"].lengths.tolist() if "history" in scope else [])
    assert lengths[-3] == lengths[-2] == [40, 37, 40, 31]
    assert lengths[-1] == (32 + scope["position"]).tolist() and min(lengths[-1]) >= 35
    assert scope["verified"].tokens.shape == (4, 6) and scope["verified"].status.sum() == 0
    assert (scope["drawn"].tokens >= 0).all() and not (scope["drawn"].tokens == 5).any()


def test_examples_of_losses_run():
    """In one scope, in their order; what was ignored has no gradient, all else has one."""
    scope: dict[str, object] = {}
    blocks = _examples("docs/training.md", "\n## Training a model\n")
    assert len(blocks) == 12
    for block in _examples("docs/sampling.md")[:1] + blocks:
        exec(compile(block, "docs", "exec"), scope)
    assert scope["drawn"].status.tolist() == [0, 0, 0, 0]
    gradient = scope["hidden"].grad
    assert scope["loss"].isfinite() and scope["metrics"]["logps/chosen"] < 0
    assert (gradient[:, 28:] == 0).all() and (gradient[:, :28].abs().sum(-1) > 0).all()
    assert scope["logits"].grad.abs().sum() > 0
    assert (scope["logps"] < 0).any() and scope["logps"].isfinite().all()
    assert abs(scope["ratios"]["ratios/mean"] - 1) < 1e-4 and scope["nsr"] > 0
