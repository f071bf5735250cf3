"""docs/losses.md says what the catalogue says, its example runs, and the API has every loss."""

import re
import types
from pathlib import Path

import pytest

import losses_page
from fastadapt import losses
from fastadapt.losses import CATALOGUE

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / losses_page.PAGE).read_text(encoding="utf-8")


def test_page_is_what_the_catalogue_says():
    assert losses_page.render(PAGE) == PAGE
    assert losses_page.main(["--check"]) == 0


def test_check_finds_a_page_that_is_not(tmp_path, monkeypatch):
    (tmp_path / "docs").mkdir()
    page = tmp_path / losses_page.PAGE
    page.write_text(PAGE.replace("Rafailov", "Raphael"), encoding="utf-8")
    monkeypatch.setattr(losses_page, "ROOT", tmp_path)
    assert losses_page.main(["--check"]) == 1
    assert losses_page.main([]) == 0
    assert page.read_text(encoding="utf-8") == PAGE


def test_block_that_is_missing_is_an_error():
    with pytest.raises(ValueError, match="expected one block 'all', got 0"):
        losses_page.render("# nothing here\n")


def test_every_loss_is_in_both_tables():
    for name, make in losses_page.BLOCKS.items():
        made = make()
        for loss in CATALOGUE:
            assert f"`{loss}`" in made, (name, loss)


def test_every_name_in_the_text_is_a_loss():
    """Of the tables that say which one to take, and of what is missing."""
    text = re.sub(r"<!-- (\w+) -->.*?<!-- /\1 -->", "", PAGE, flags=re.DOTALL)
    choice = text.partition("## Which one")[2].partition("## All of them")[0]
    known = {*CATALOGUE, *losses.__all__, *losses.catalogue.entry.NEEDS}
    options = {"ld_alpha=", "f_divergence=", "pair_weights=wpo_weights(...)"}
    names = {"w": 0.5, "ramp": losses.ramp}
    words = re.findall(r"`([^`]+)`", choice)
    assert len(words) > 30
    for word in words:
        if word.startswith("{"):
            assert losses.RewardPenalizeLoss(eval(word, names)).weights
        else:
            assert word in known | options, word


def test_example_runs(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    scope: dict[str, object] = {}
    exec(compile(example, "docs/losses.md", "exec"), scope)
    assert capsys.readouterr().out.startswith("simpo: SimPO")
    assert {"dpo", "simpo"} <= set(scope["of_pairs"]) and "kto" not in scope["of_pairs"]
    assert scope["loss"].isfinite()


def test_count_in_the_readme():
    (count,) = re.findall(r"\[(\d+) losses\]", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert int(count) == len(CATALOGUE)


def test_every_public_name_is_in_the_api():
    pages = [page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "api").glob("*.md")]
    named = set(re.findall(r"^::: fastadapt[\w.]*\.(\w+)$", "\n".join(pages), re.MULTILINE))
    public = set(losses.__all__)
    modules = {n for n in public if isinstance(getattr(losses, n), types.ModuleType)}
    assert public - modules <= named
