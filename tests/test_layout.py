"""The rules of the code base, read from its source: who imports whom, and what nobody does."""

import ast
import functools
import importlib.metadata
import inspect
import io
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType
from typing import NamedTuple

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import fastadapt
import fastadapt.reference

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fastadapt"
CSRC = ROOT / "csrc"
MODULES = sorted(p.relative_to(PACKAGE).as_posix() for p in PACKAGE.rglob("*.py"))
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

# What each folder or module at the top of the package may import: of ours ("" is the package
# itself, so a public name), and packages of others beside the standard library.
PUBLIC = {"", "adaptor", "linear", "results", "sampling", "log_odds", "losses"}
OURS = {
    "_ops": {"_C", "_ops"},
    "results": {"results"},
    "adaptor": {"_ops"},
    "sampling": {"_ops", "adaptor", "results", "sampling"},
    "linear": {"_ops"},
    "log_odds": {"_ops"},
    "losses": {"_ops", "linear", "log_odds", "losses", "results"},
    "__init__": (PUBLIC - {""}) | {"_C", "_ops"},
    "reference": {"reference", "results"},
    "training": PUBLIC | {"training"},
    "hf": PUBLIC | {"_ops", "hf", "training"},
    "trl": PUBLIC | {"hf", "training", "trl"},
    "sglang": PUBLIC | {"sglang"},
    "vllm": PUBLIC | {"vllm"},
    "tracking": PUBLIC | {"tracking", "training"},
    "study": PUBLIC | {"study", "tracking", "training"},
    "_cli": PUBLIC | {"_cli", "_ops", "hf", "study", "training", "trl"},
    "__main__": {"_cli"},
}
OTHERS = {
    "training": {
        *("datasets", "filelock", "jinja2", "platformdirs", "pyarrow", "safetensors", "torch"),
        "transformers",
    },
    "hf": {"torch", "transformers"},
    "trl": {"torch", "transformers", "trl"},
    "sglang": {"sglang", "torch"},
    "vllm": {"torch", "vllm"},
    "tracking": {"torch", "transformers"},
    "study": {
        *("jinja2", "matplotlib", "numpy", "pyarrow", "rich", "scipy", "torch", "transformers"),
    },
    "_cli": {
        *("accelerate", "datasets", "filelock", "peft", "rich", "safetensors", "torch"),
        *("transformers", "trl", "yaml"),
    },
}
# of arguments, of what is installed, and random numbers: every folder may import these
CHECKS = ("fastadapt._ops.checks.", "fastadapt._ops.config.", "fastadapt._ops.philox.")
KERNELS = "_ops/triton/"  # the only folder that imports triton, and that only within functions
REGISTER = {
    *("_ops/sampling.py", "_ops/log_odds.py", "_ops/verification.py"),
    *(
        "_ops/linear/operator.py",
        "_ops/linear/divergence.py",
        "_ops/linear/mle.py",
        "_ops/supports/products.py",
        "_ops/supports/among.py",
    ),
}
# these say what to install where an import fails
TRIES_TO_IMPORT = {"__init__.py", "hf/__init__.py", "trl/__init__.py", "training/pretrained.py"}
MOST_AT_THE_TOP, MOST_IN_A_FOLDER = 20, 16
# or 12: of two heads, each with its bias, scale, cap and adapter; of one and the terms of a loss;
# of a draw: its chance, what is done to the logits first, and the outputs that are asked for
MOST_ARGUMENTS = {"linear_divergence": 16, "linear_mle_loss": 13, "sample": 13, "verify": 13}


class Import(NamedTuple):
    """One imported module; `path` is absolute, `lazy` says that it happens inside a function."""

    path: str
    bound: str
    lazy: bool
    line: int


def _role(module: str) -> str:
    """The entry of `OURS` for a file or a dotted path below the package."""
    return re.split(r"[./]", module.removesuffix(".py"))[0]


@functools.cache
def _tree(module: str) -> ast.Module:
    return ast.parse((PACKAGE / module).read_text(), module)


@functools.cache
def _imports(module: str) -> list[Import]:
    """All imports of a file, relative ones made absolute."""
    parts = ("fastadapt", *Path(module).parent.parts)
    found: list[Import] = []

    def visit(node: ast.AST, lazy: bool) -> None:
        if isinstance(node, ast.Import):
            for a in node.names:
                bound = a.asname or a.name.split(".")[0]
                found.append(Import(a.name, bound, lazy, node.lineno))
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(parts[: len(parts) + 1 - node.level]) if node.level else ""
            base = ".".join(filter(None, (base, node.module)))
            for a in node.names:
                path = f"{base}.{a.name}"
                found.append(Import(path, a.asname or a.name, lazy, node.lineno))
        elif isinstance(node, ast.Call) and _dotted(node.func).endswith("import_module"):
            named = node.args[0] if node.args else None
            if isinstance(named, ast.Constant):
                found.append(Import(named.value, "", lazy, node.lineno))
        inside = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(_tree(module), False)
    return found


def _imported_role(path: str) -> str:
    """The module of ours that an absolute path names; "" for a name of the package itself."""
    name = path.split(".")[1] if "." in path else ""
    is_module = name == "_C" or (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").exists()
    return name if name and is_module else ""


def _dotted(node: ast.AST) -> str:
    """`a.b.c` of an attribute chain, with subscripts and calls left out; "" for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = _dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return _dotted(node.value) if isinstance(node, ast.Subscript) else ""


def test_every_folder_has_a_rule() -> None:
    assert {_role(m) for m in MODULES} == set(OURS)


def test_the_tree_is_seen_at_a_glance() -> None:
    tops = {m.split("/")[0] for m in MODULES} | {"_C.pyi", "py.typed"}
    assert len(tops) <= MOST_AT_THE_TOP, sorted(tops)
    for folder in {Path(m).parent for m in MODULES}:
        modules = [m for m in MODULES if Path(m).parent == folder]
        assert len(modules) <= MOST_IN_A_FOLDER, f"{folder}: {len(modules)} modules"


def _graph(lazily: bool = True) -> dict[str, set[str]]:
    """The modules of ours that each module imports, anywhere in it or when it is loaded."""
    graph: dict[str, set[str]] = {}
    for module in MODULES:
        graph[module] = set()
        for path in (i.path for i in _imports(module) if lazily or not i.lazy):
            parts = path.split(".")[1:] if path.startswith("fastadapt.") else []
            for end in range(len(parts), 0, -1):
                stem = "/".join(parts[:end])
                found = {f"{stem}.py", f"{stem}/__init__.py"} & set(MODULES)
                if found:
                    graph[module] |= found - {module}
                    break
    return graph


def test_arrows_only_go_down() -> None:
    """No module imports itself through others, within functions or not."""
    graph, done = _graph(), set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join((*above[above.index(module) :], module))
        if module not in done:
            for below in sorted(graph[module]):
                visit(below, (*above, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


@pytest.mark.parametrize(
    ("module", "lazily", "most"), [("__init__.py", False, 8), ("_cli/main.py", True, 15)]
)
def test_chains_of_imports_are_short(module: str, lazily: bool, most: int) -> None:
    """Of `import fastadapt`, and of the command with what it imports when it is needed."""
    graph = _graph(lazily)

    @functools.cache
    def longest(module: str) -> tuple[str, ...]:
        return (module, *max((longest(below) for below in graph[module]), key=len, default=()))

    assert len(longest(module)) <= most, " -> ".join(longest(module))


@pytest.mark.parametrize("module", MODULES)
def test_imports(module: str) -> None:
    role = _role(module)
    within = module.startswith(KERNELS)
    others = OTHERS.get(role, {"torch"}) | ({"triton"} if within else set())
    for path, _, lazy, line in _imports(module):
        top = path.split(".")[0]
        where = f"{module}:{line} imports {path}"
        if top == "fastadapt":
            target = _imported_role(path)
            may = target in OURS[role] or path.startswith(CHECKS)
            assert may, f"{where}; {role} may import {sorted(OURS[role])}"
            kernels = path.startswith("fastadapt._ops.triton")
            assert not kernels or within or lazy, f"{where} outside a function"
        elif top != "__future__":
            assert top in others | sys.stdlib_module_names, f"{where}; allowed: {sorted(others)}"


def _forbidden(module: str) -> Iterator[str]:
    """Every use of what library code never does."""
    tree, imported = _tree(module), {i.bound for i in _imports(module)} - {""}
    for i in _imports(module):
        if i.path in {"os.environ", "os.environb", "os.getenv", "os.putenv"}:
            yield f"{i.line}: imports {i.path}"
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
            if _dotted(node).split(".")[0] in imported:
                yield f"{line}: assigns to {_dotted(node)}, an attribute of an imported object"
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
            if _dotted(node).split(".")[0] in imported:
                yield f"{line}: writes into {_dotted(node)}, which is imported"
        elif isinstance(node, ast.Attribute):
            if _dotted(node) in {"os.environ", "os.environb", "os.getenv", "os.putenv"}:
                yield f"{line}: uses {_dotted(node)}"
        elif isinstance(node, ast.Call):
            called = _dotted(node.func)
            if called in {"print", "globals", "exec", "eval"}:
                yield f"{line}: calls {called}"
            named = _dotted(node.args[0]).split(".")[0] if node.args else ""
            # one exception: what trl's models score labels with, put back by the same `with` block
            serves = module == "trl/_served.py" and named == "trl_utils"
            if called in {"setattr", "delattr"} and named in imported and not serves:
                yield f"{line}: {called} on {_dotted(node.args[0])}, which is imported"
        elif isinstance(node, ast.Global):
            yield f"{line}: global {', '.join(node.names)}"
        elif isinstance(node, ast.ExceptHandler) and node.type is None:
            yield f"{line}: a bare except"


@pytest.mark.parametrize("module", MODULES)
def test_nothing_forbidden(module: str) -> None:
    assert list(_forbidden(module)) == []


@pytest.mark.parametrize("module", MODULES)
def test_import_only_defines(module: str) -> None:
    """Module level: imports, definitions, constants. Only registration calls anything."""
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    if module in TRIES_TO_IMPORT:
        allowed = (*allowed, ast.Try, ast.With)
    for node in _tree(module).body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        typing = isinstance(node, ast.If) and _dotted(node.test).endswith("TYPE_CHECKING")
        typing |= isinstance(node, ast.If) and module == "__main__.py"
        registers = module in REGISTER and isinstance(node, ast.Expr | ast.For)
        assert isinstance(node, allowed) or docstring or typing or registers, (
            f"{module}:{node.lineno}: {type(node).__name__} at import"
        )


def test_sizes() -> None:
    """At most 400 lines a file, tests aside, and 12 arguments a function, but for a few."""
    folders = [PACKAGE, CSRC, ROOT / "benchmarks"]
    files = [p for f in folders for p in f.rglob("*") if p.suffix in {".py", ".pyi", ".cpp", ".h"}]
    lengths = {p.relative_to(ROOT).as_posix(): len(p.read_text().splitlines()) for p in files}
    assert {name: n for name, n in lengths.items() if n > 400} == {}
    for module in MODULES:
        for node in ast.walk(_tree(module)):
            if isinstance(node, ast.FunctionDef):
                a = node.args
                count = len(a.posonlyargs) + len(a.args) + len(a.kwonlyargs)
                most = MOST_ARGUMENTS.get(node.name, 12)
                assert count <= most, f"{module}:{node.lineno}: {node.name} has {count} arguments"


def test_installed_package_is_this_one() -> None:
    """The tests test the installed package; it holds these sources and no others."""
    installed = Path(fastadapt.__file__).parent
    for pattern in ("*.py", "*.pyi", "*.jsonl", "py.typed"):
        here, there = (
            {p.relative_to(f).as_posix(): p.read_bytes() for p in f.rglob(pattern)}
            for f in (PACKAGE, installed)
        )
        changed = {name for name in here | there if here.get(name) != there.get(name)}
        assert not changed, f"installed in {installed} with other contents; install again"


def test_child_processes_test_the_installed_package() -> None:
    """`python -c` without -P puts the current folder first, and there the sources of the clone."""
    for path in sorted((ROOT / "tests").glob("*.py")):
        for command in re.findall(r"\[sys\.executable,[^\]]*\]", path.read_text()):
            assert '"-c"' not in command or '"-P"' in command, f"{path.name}: {command}"


def test_version() -> None:
    assert fastadapt.__version__ == PYPROJECT["project"]["version"]
    assert fastadapt.__version__ == importlib.metadata.version("fastadapt")
    newest = re.search(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1]
    cited = re.findall(
        r"^(?:version|date-released): (.*)$", (ROOT / "CITATION.cff").read_text(), re.M
    )
    assert newest in ("Unreleased", " - ".join([fastadapt.__version__, *cited[1:]]))
    assert cited[0] == fastadapt.__version__


# What an interpreter of its own says, line by line; importing torch takes it two seconds.
FIRST_STEPS = """
import sys, torch
before = set(sys.modules)
import fastadapt
print(*sorted(set(sys.modules) - before))
import fastadapt._cli.main
print(*sys.modules)
torch.set_num_threads(2)
fastadapt.sample(torch.randn(8, 1000), fastadapt.Adaptor(top_p=0.9))
maps = open('/proc/self/maps') if sys.platform == 'linux' else ()
print(*{line.split()[-1] for line in maps if 'gomp' in line})
for name in ('transformers', 'trl', 'matplotlib'):
    sys.modules[name] = None
import inspect
print(*(hasattr(fastadapt, name) for name in ('hf', 'trl', 'training')))
print(len(inspect.getmembers(fastadapt)) > 20)
print(hasattr(fastadapt.tracking, 'TrackerCallback'))
"""


@pytest.fixture(scope="module")
def first_steps(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The lines of `FIRST_STEPS`."""
    run = [sys.executable, "-P", "-c", FIRST_STEPS]
    folder = tmp_path_factory.mktemp("fresh")
    done = subprocess.run(run, cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.splitlines()


def test_import_is_light(first_steps: list[str]) -> None:
    """`import fastadapt` loads none of the optional packages and no module that needs one."""
    names = first_steps[0].split()
    assert "fastadapt._C" in names
    heavy = {"triton", "transformers", "trl", "matplotlib", "rich", "numpy", "platformdirs"}
    assert {n for n in names if n.split(".")[0] in heavy} == set()
    own = {n.split(".")[1] for n in names if n.startswith("fastadapt.")}
    assert own <= {"_C", "_ops", "adaptor", "linear", "log_odds", "losses", "results", "sampling"}
    assert not [n for n in names if n.startswith("fastadapt._ops.triton")]


def test_import_of_the_command_is_cheap(first_steps: list[str]) -> None:
    loaded = {name.partition(".")[0] for name in first_steps[1].split()}
    assert "fastadapt._cli.main" in first_steps[1].split()
    assert loaded & {"transformers", "rich", "platformdirs", "gguf", "accelerate"} == set()


@pytest.mark.parametrize(
    ("words", "extension"),
    [
        (["-c", "import fastadapt"], None),
        (["-c", "from fastadapt import hf"], None),
        (["-m", "fastadapt._cli.main"], None),
        (["-c", "import fastadapt"], "_C.cpython-39-x86_64-linux-gnu.so"),
    ],
)
def test_unbuilt_sources_say_so(words: list[str], extension: str | None, tmp_path: Path) -> None:
    """Python finds the folder in which it is started before the installed package."""
    ignored = shutil.ignore_patterns("*.so", "*.pyd", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "fastadapt", ignore=ignored)
    if extension:  # built for another Python
        (tmp_path / "fastadapt" / extension).write_text("")
    run = [sys.executable, *words]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and "circular" not in done.stderr
    assert f"{tmp_path}/fastadapt, where it is not built" in last and "pip install -e ." in last


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_one_openmp_runtime(first_steps: list[str]) -> None:
    """The extension runs on the libgomp that torch has loaded, so there is one pool of threads."""
    assert len(first_steps[2].split()) == 1, first_steps[2]


def _public_functions() -> list[str]:
    """Of tensors."""
    functions = [n for n in fastadapt.__all__ if isinstance(getattr(fastadapt, n), FunctionType)]
    return sorted(set(functions) - {"show_config", "warm_up"})


def test_public_names_exist() -> None:
    assert all(hasattr(fastadapt, name) for name in fastadapt.__all__)
    assert {"filter_logits", "sample", "score"} <= set(_public_functions())


def test_dir_is_what_is_public() -> None:
    submodules = {"hf", "losses", "reference", "sglang", "study", "tracking", "training", "trl"}
    assert set(dir(fastadapt)) == {*fastadapt.__all__, *submodules, "__version__"}
    for name in submodules:
        folder = getattr(fastadapt, name)
        public = set(getattr(folder, "__all__", ())) | set(getattr(folder, "_SUBMODULES", ()))
        assert set(dir(folder)) == public == set(dict(inspect.getmembers(folder)))


def test_submodules_without_their_extra(first_steps: list[str]) -> None:
    """In an environment with torch alone `hasattr` and `inspect.getmembers` say what is there."""
    assert first_steps[3:] == ["False False True", "True", "False"]


@pytest.mark.parametrize("raised", ["ModuleNotFoundError", "RuntimeError"])
def test_what_cannot_be_imported_says_what_to_install(raised: str, tmp_path: Path) -> None:
    """transformers turns a missing package of its own into a RuntimeError of several lines."""
    extras = {"hf": ("transformers", "demo"), "trl": ("trl", "train")}
    code = (
        "import sys\n"
        "class Without:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name in ('transformers', 'trl'):\n"
        f"            raise {raised}(f'no {{name}}\\nmore lines')\n"
        "sys.meta_path.insert(0, Without())\n"
        "import fastadapt\n"
    )
    for name in extras:
        code += (
            f"try:\n    import fastadapt.{name}\nexcept ImportError as error:\n    print(error)\n"
            f"try:\n    fastadapt.{name}\nexcept AttributeError as error:\n    print(error)\n"
        )
    run = [sys.executable, "-P", "-c", code]
    said = subprocess.run(run, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    assert said.splitlines() == [
        f"fastadapt.{name} cannot be imported (no {needed}): what it needs comes with "
        f'pip install "fastadapt[{extra}]"'
        for name, (needed, extra) in extras.items()
        for _ in range(2)
    ]


def test_errors_of_other_submodules_are_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(fastadapt, "import_module", fails)
    with pytest.raises(ImportError, match="fastadapt.training"):
        fastadapt.__getattr__("training")
    with pytest.raises(AttributeError, match="module 'fastadapt' has no attribute 'htf'"):
        fastadapt.__getattr__("htf")


def test_config_names_what_a_bug_report_needs() -> None:
    out = io.StringIO()
    fastadapt.show_config(out)
    said = out.getvalue()
    for part in (fastadapt.__version__, fastadapt._C.cpu_capability(), torch.__version__, "Python"):
        assert part in said


@pytest.mark.parametrize("name", _public_functions())
def test_reference_has_the_same_signature(name: str) -> None:
    public = inspect.signature(getattr(fastadapt, name)).parameters.values()
    expected = inspect.signature(getattr(fastadapt.reference, name)).parameters.values()
    assert [(p.name, p.kind, p.default) for p in public] == [
        (p.name, p.kind, p.default) for p in expected
    ]


def _csrc() -> dict[str, str]:
    """The C++ sources without comments."""
    comment = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
    files = [p for p in sorted(CSRC.iterdir()) if p.suffix in {".cpp", ".h"}]
    return {p.name: comment.sub("", p.read_text()) for p in files}


def test_csrc_rules() -> None:
    """Python in the bindings only, torch in none; no environment, no output, no exit."""
    sources = _csrc()
    assert {"kernels.h", "dispatch.cpp", "bindings.cpp", "isa_scalar.cpp"} <= set(sources)
    assert "pybind11" in sources["bindings.cpp"]
    for name, text in sources.items():
        included = re.findall(r'#\s*include\s*[<"]([^>"]+)[>"]', text)
        assert not [i for i in included if re.match(r"(torch|ATen|c10|caffe2)/", i)], name
        assert not re.search(r"\b(getenv|setenv|putenv|printf|cout|cerr|exit|abort)\b", text), name
        if not name.endswith(("bindings.cpp", "bindings.h")):
            assert not re.search(r"pybind11|Python\.h|\bPy[A-Z_]\w*", text), name
            assert not [i for i in included if "/" in i], name


def test_the_stub_has_the_arguments_of_the_module() -> None:
    """`_C.pyi` names what the kernels read, in their order, and what the module has."""
    stub = ast.parse((PACKAGE / "_C.pyi").read_text()).body
    classes = {node.name: node.body for node in stub if isinstance(node, ast.ClassDef)}
    shared = {
        name: [field.target.id for field in classes.pop(name)] for name in ("Tile", "Problems")
    }
    functions = [node for node in stub if isinstance(node, ast.FunctionDef)]
    for node in (f for f in functions if f.args.kwonlyargs):
        names = [a.arg for a in node.args.kwonlyargs]
        if node.args.kwarg:  # Unpack[...] of what several take
            names = shared[node.args.kwarg.annotation.slice.id] + names
        got = inspect.signature(getattr(fastadapt._C, node.name)).parameters
        assert list(got) == names, node.name
        assert {p.kind for p in got.values()} == {inspect.Parameter.KEYWORD_ONLY}, node.name
    for name, body in classes.items():
        has = {key for key, value in vars(getattr(fastadapt._C, name)).items() if callable(value)}
        assert {f.name for f in body} == {key for key in has if key[0] != "_" or key == "__init__"}
    stated = (
        {f.name for f in functions}
        | {*classes}
        | {node.target.id for node in stub if isinstance(node, ast.AnnAssign)}
    )
    assert stated == {name for name in vars(fastadapt._C) if not name.startswith("__")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "filter"),
        ({"labels": None}, "argument out"),
        ({"out": None}, "out: expected"),
        ({"out": 3}, "data_ptr"),
    ],
)
def test_kernels_refuse_other_arguments(change: dict[str, object], message: str) -> None:
    """Names and numbers cannot take each other's places."""
    x, knobs = torch.zeros(1, 4), fastadapt.Adaptor().packed
    given = {
        "rows": (x, 0, 1, 4, 4),
        "knobs": (knobs, 1, 0, False),
        "edits": None,
        "num_threads": 1,
    }
    with pytest.raises((TypeError, AttributeError), match=message):
        fastadapt._C.filter(**given, **change)
    with pytest.raises(
        TypeError, match=re.escape("filter(*, rows, knobs, edits, out, num_threads)")
    ):
        fastadapt._C.filter(*given.values())


def test_system_headers_precede_the_target_pragma() -> None:
    """A std header read under `#pragma GCC target` would leak AVX code into the other sources."""
    sources = _csrc()
    token = re.compile(r'#\s*include\s*([<"])([^>"]+)[>"]|#\s*pragma\s+GCC\s+(target)')

    def walk(name: str, seen: set[str], under_target: bool) -> bool:
        """Reads a file as the preprocessor does; returns whether the pragma has been met."""
        for quote, header, target in token.findall(sources[name]):
            if target:
                under_target = True
            elif header not in seen:
                seen.add(header)
                assert quote == '"' or not under_target, f"<{header}> in {name}, after the pragma"
                if quote == '"':
                    under_target = walk(header, seen, under_target)
        return under_target

    for name in sources:
        met = walk(name, set(), False) if name.endswith(".cpp") else False
        assert met == name.startswith("isa_avx") or not name.endswith(".cpp"), name


@pytest.mark.skipif(not shutil.which("objdump"), reason="needs objdump")
def test_no_avx_outside_its_namespace() -> None:
    """On a CPU without AVX no such instruction may be reached: the machine code has them only in
    functions of the namespaces avx*."""
    command = ["objdump", "-d", "-C", "--no-show-raw-insn", fastadapt._C.__file__]
    code = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    if "<fastadapt::avx2::" not in code:
        pytest.skip("no AVX code, or no symbols, in this build")
    function, found = "", set()
    for line in code.splitlines():
        if line.endswith(">:"):
            function = line.partition(" ")[2]
        elif re.search(r"%[yz]mm|\tv[a-z]+\d*[a-z]* ", line):
            found.add(function)
    assert {name for name in found if not re.search(r"::avx\w*::", name)} == set()


def _pins() -> dict[str, str]:
    """Name and version of each line of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    stated = [line for line in lines if line and not line.startswith("#")]
    pins = dict(line.split("==") for line in stated)
    assert len(pins) == len(stated)
    return {canonicalize_name(name): version for name, version in pins.items()}


def test_constraints_pin_every_requirement() -> None:
    """One exact version each, satisfying pyproject.toml, for every platform (no `+cpu`)."""
    pins, project = _pins(), PYPROJECT["project"]
    assert not [version for version in pins.values() if "+" in version]
    extras = project["optional-dependencies"]
    for line in [*project["dependencies"], *(r for e in extras.values() for r in e)]:
        requirement = Requirement(line)
        if requirement.name == "triton":  # each CUDA build of torch requires its own
            continue
        pin = pins.get(canonicalize_name(requirement.name))
        assert pin and requirement.specifier.contains(pin), f"{line}: constraints.txt has {pin}"


def test_development_tools_have_one_version() -> None:
    """Each tool of the dev extra is pinned; pre-commit runs those and none of its own."""
    dev = [Requirement(line) for line in PYPROJECT["project"]["optional-dependencies"]["dev"]]
    pins = _pins()
    for r in dev:
        assert str(r.specifier) == f"=={pins[canonicalize_name(r.name)]}", r.name
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert set(re.findall(r"repo: (\S+)", hooks)) == {"local"}
    assert set(re.findall(r"language: (\S+)", hooks)) == {"system"}
    assert {"ruff", "clang-format", "mypy"} <= set(re.findall(r"entry: (\S+)", hooks))


def test_readme_has_the_commands_of_ci() -> None:
    """What .ci/run installs and runs is what README.md tells a reader to install and run."""
    readme = (ROOT / "README.md").read_text()
    told = {
        line.strip()
        for block in re.findall(r"```.*?```", readme, re.DOTALL)
        for line in block.splitlines()
    }
    lines = (ROOT / ".ci/run").read_text().splitlines()
    run = [line.removesuffix(" --require-model") for line in lines if line.startswith("pip ")]
    assert run == ['pip install -c constraints.txt ".[test]" && pytest']
    assert set(run) <= told
    assert 'pip install -c constraints.txt ".[demo]" && fastadapt demo' in told
