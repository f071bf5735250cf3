"""Every public name is on a page of the API, with an example in its docstring that runs."""

import ast
import doctest
import importlib
import inspect
import re
import sys
from pathlib import Path

import pytest
import torch

import fastadapt

API = Path(__file__).resolve().parent.parent / "docs" / "api"
# What a module's public names need beside torch.
NEEDS = {
    "fastadapt": (),
    "fastadapt.losses": (),
    "fastadapt.reference": (),
    "fastadapt.hf": ("transformers",),
    "fastadapt.tracking": ("transformers", "trl"),
    "fastadapt.training": ("transformers",),
    "fastadapt.training.pairs": ("transformers",),
    "fastadapt.sglang": ("sglang",),
    "fastadapt.trl": ("trl",),
    "fastadapt.vllm": ("vllm",),
}
# Said in one line, with nothing to run.
CONSTANTS = {"IGNORED", "PAIRS", "Truncation"}


def _public_names() -> list[tuple[str, str]]:
    """The names in `__all__` of each module; read from its source, since some need trl."""
    found = []
    for module in NEEDS:
        path = Path(fastadapt.__file__).parent.joinpath(*module.split(".")[1:])
        source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        for node in ast.parse(source.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                found += [(module, name) for name in ast.literal_eval(node.value)]
    return [(module, name) for module, name in found if name not in CONSTANTS]


def _docstring(module: str, name: str) -> str:
    """The docstring of a class or function, or the string below the assignment of a constant."""
    value = getattr(importlib.import_module(module), name)
    if inspect.isroutine(value) or isinstance(value, type) and value.__module__ != "builtins":
        return inspect.getdoc(value) or ""
    package = module.rpartition(".")[0] if module.count(".") > 1 else module
    for known in sorted(name for name in sys.modules if name.startswith(package + ".")):
        body = ast.parse(inspect.getsource(sys.modules[known])).body
        for node, below in zip(body, body[1:], strict=False):
            target = getattr(node, "targets", [getattr(node, "target", None)])[0]
            if isinstance(target, ast.Name) and target.id == name and isinstance(below, ast.Expr):
                return str(ast.literal_eval(below.value))
    return ""


def test_every_public_name_has_its_place_in_the_api():
    pages = "\n".join(page.read_text(encoding="utf-8") for page in API.glob("*.md"))
    named = re.findall(r"^::: fastadapt\.(\w+)$", pages, re.MULTILINE)
    assert sorted(named) == sorted(fastadapt.__all__)


@pytest.mark.parametrize(
    ("module", "name"), [*_public_names(), ("fastadapt.training.pretrained", "load_model")]
)
def test_example_runs(module, name, tmp_path, monkeypatch):
    for package in NEEDS.get(module, ("transformers",)):
        pytest.importorskip(package, reason=f"the examples of {module} need {package}")
    monkeypatch.chdir(tmp_path)  # trainers write there
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    given = {"fastadapt": fastadapt, "torch": torch}
    given |= {public: getattr(fastadapt, public) for public in fastadapt.__all__}
    given |= {public: getattr(fastadapt.losses, public) for public in fastadapt.losses.__all__}
    text = _docstring(module, name)
    example = doctest.DocTestParser().get_doctest(text, given, name, None, None)
    assert example.examples, f"{module}.{name}: expected an example in its docstring"
    assert any(line.want for line in example.examples), f"{module}.{name}: nothing is shown"
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    failed, _ = runner.run(example, out=said.append)
    assert not failed, "".join(said)
