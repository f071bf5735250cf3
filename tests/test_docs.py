"""Every public name is on a page of the API, with an example in its docstring that runs."""

import doctest
import inspect
import re
from pathlib import Path

import pytest
import torch

import fastadapt

API = Path(__file__).resolve().parent.parent / "docs" / "api"


def test_every_public_name_has_its_place_in_the_api():
    pages = "\n".join(page.read_text(encoding="utf-8") for page in API.glob("*.md"))
    named = re.findall(r"^::: fastadapt\.(\w+)$", pages, re.MULTILINE)
    assert sorted(named) == sorted(fastadapt.__all__)


@pytest.mark.parametrize("name", fastadapt.__all__)
def test_example_runs(name):
    text = inspect.getdoc(getattr(fastadapt, name))
    given = {"fastadapt": fastadapt, "torch": torch}
    given |= {public: getattr(fastadapt, public) for public in fastadapt.__all__}
    example = doctest.DocTestParser().get_doctest(text, given, name, None, None)
    assert example.examples, f"{name}: expected an example in its docstring"
    said: list[str] = []
    failed, _ = doctest.DocTestRunner().run(example, out=said.append)
    assert not failed, "".join(said)
