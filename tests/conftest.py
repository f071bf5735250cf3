"""Fixtures of all tests: each starts from the same seed and leaves no setting behind."""

import dataclasses
import gc
import getpass
import importlib.util
import json
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch.utils._pytree import tree_map

try:
    from fastadapt import _C, Adaptor, Support
except ImportError as error:
    pytest.exit(
        f"fastadapt._C cannot be imported ({error}). The tests test the installed package: "
        'run `pip install -c constraints.txt ".[test]"`, then `pytest`, not `python -m pytest`, '
        "which finds the sources here, where the extension is not compiled.",
        returncode=4,
    )

if not torch.cuda.is_available():
    # Read when triton is imported: its kernels then run on CPU tensors.
    os.environ["TRITON_INTERPRET"] = "1"

if "PYTEST_XDIST_WORKER" in os.environ and "OMP_NUM_THREADS" not in os.environ:
    # As many workers as cores: one thread each, also in the processes that tests start.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

if "ATEN_CPU_CAPABILITY" in os.environ:
    # torch would take what it compiled under another capability, and fail to build it.
    folder = f"inductor-{os.environ['ATEN_CPU_CAPABILITY']}-{getpass.getuser()}"
    cache = Path(tempfile.gettempdir(), folder).as_posix()
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", cache)

settings.register_profile("fastadapt", deadline=None, derandomize=True)
settings.load_profile("fastadapt")

CAPABILITIES = ("scalar", "avx2", "avx512")
DEVICE = "cuda"
INTERPRETER = Path(__file__).with_name("interpreter.py")
MOST_WORKERS = 8  # each imports torch, transformers and trl: about 1 GB


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the options of the list, which `pytest --help` explains."""
    parser.addoption(
        "--cpu-capability",
        choices=_C.cpu_capabilities(),
        help="run all tests with this instruction set of the kernels",
    )
    parser.addoption(
        "--require-model",
        action="store_true",
        help="fail where the demo's model cannot be had, instead of skipping the tests on it",
    )
    parser.addoption(
        "--every-vocabulary",
        action="store_true",
        help="the GPU's kernels on rows of every size, 1,152 of them, in a quarter of an hour",
    )
    parser.addoption(
        "--kernel-rows",
        type=int,
        default=10_000,
        help="short rows on which the GPU's kernels are interpreted; 100000 take half an hour",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Sets the instruction set that was asked for."""
    if asked := config.getoption("--cpu-capability"):
        _C.set_cpu_capability(asked)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """A worker for each core that this process may use; none where the only device is one GPU."""
    if config.option.markexpr == "gpu":
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cores or 1, MOST_WORKERS)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Groups the tests that one worker should run, for `--dist loadgroup`; the others go anywhere.

    Groups are those of the GPU, of the demo's model, of new processes, and of the tests of a module
    that share one of its fixtures.
    """
    for item in items:
        if group := _group_of(item):
            item.add_marker(pytest.mark.xdist_group(group))


def _group_of(item: pytest.Item) -> str | None:
    """The name of the group of tests to run in one process."""
    if item.get_closest_marker("gpu"):
        return "gpu"
    names = getattr(item, "fixturenames", ())
    if item.get_closest_marker("demo_model") or "demo_model" in names:
        return "demo_model"
    if "preloaded" in names:
        return "preloaded"
    definitions = item._fixtureinfo.name2fixturedefs if isinstance(item, pytest.Function) else {}
    shared = any(found[-1].scope == "module" for found in definitions.values() if found)
    return item.path.stem if shared else None


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Has the garbage collector pass over what is imported by then, a million objects.

    A collection takes 0.6 seconds with them, and trainers of transformers ask for one or two a run.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.collect()
        gc.freeze()


def pytest_unconfigure() -> None:
    """Lets the interpreter clear what it imported, as it does at its end."""
    gc.unfreeze()


def pytest_report_header() -> str:
    """Says which instruction set the tests start from."""
    return f"kernels: {_C.cpu_capability()} of {', '.join(_C.cpu_capabilities())}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Runs tests with each instruction set, or the one asked for, and on each device.

    That is with those of the two fixtures that they take. Tests marked gpu take CUDA alone.
    """
    asked = metafunc.config.getoption("--cpu-capability")
    capabilities = (asked,) if asked else CAPABILITIES
    on_gpu = pytest.param(DEVICE, marks=pytest.mark.gpu)
    if {"device", "cpu_capability"} <= set(metafunc.fixturenames):
        both = [("cpu", name) for name in capabilities]
        both.append(pytest.param(DEVICE, None, marks=pytest.mark.gpu, id=DEVICE))
        metafunc.parametrize(("device", "cpu_capability"), both, indirect=["cpu_capability"])
    elif "cpu_capability" in metafunc.fixturenames:
        metafunc.parametrize("cpu_capability", capabilities, indirect=True)
    elif "device" in metafunc.fixturenames:
        alone = metafunc.definition.get_closest_marker("gpu")
        metafunc.parametrize("device", [on_gpu] if alone else ["cpu", on_gpu])


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips the tests whose marker asks for what is not there."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device: torch.cuda.is_available() is False")


@pytest.fixture(scope="session", autouse=True)
def _interpreter_without_repetition() -> Iterator[None]:
    """Triton's interpreter, which most of the tests' time would go into, with a memory."""
    spec = importlib.util.spec_from_file_location("triton_interpreter", INTERPRETER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with module.without_repetition():
        yield


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
def cpu_capability(request: pytest.FixtureRequest) -> str | None:
    """Runs the test once with each instruction set; skips those that this CPU lacks."""
    if request.param is None:
        return None  # on another device
    supported = _C.cpu_capabilities()
    assert set(supported) <= set(CAPABILITIES), "an instruction set that no test runs with"
    if request.param not in supported:
        pytest.skip(f"this CPU supports {', '.join(supported)}, not {request.param}")
    _C.set_cpu_capability(request.param)
    return request.param


@pytest.fixture
def each_capability(request: pytest.FixtureRequest) -> Callable[[], Iterator[None]]:
    """Sets each instruction set in turn, or the one asked for; on another device there is one turn.

    For what is compared with a reference that takes longer than the kernels: it is computed once.
    """
    asked = request.config.getoption("--cpu-capability")

    def turns() -> Iterator[None]:
        if _device_of(request) != "cpu":
            yield
            return
        for name in (asked,) if asked else _C.cpu_capabilities():
            _C.set_cpu_capability(name)
            yield

    return turns


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


def _device_of(request: pytest.FixtureRequest) -> str:
    """The device of a test that takes one, else the CPU."""
    device: str = request.getfixturevalue("device") if "device" in request.fixturenames else "cpu"
    return device


@pytest.fixture
def rows(request: pytest.FixtureRequest) -> Callable[[str, int, int], torch.Tensor]:
    """Makes rows of a kind: what a threshold meets in practice, and what breaks it.

    They are on the device of the test, and the same there as on the CPU.
    """
    device = _device_of(request)
    return lambda kind, n, v: _rows(kind, n, v).to(device)


def _moved(tree: Any, device: str) -> Any:
    """Nested lists, tuples and dictionaries with their tensors and per-row knobs on a device."""

    def move(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor | Support):
            return leaf.to(device)
        if not isinstance(leaf, Adaptor) or leaf.rows is None:
            return leaf
        knobs = {f.name: getattr(leaf, f.name) for f in dataclasses.fields(leaf) if f.init}
        return Adaptor(**_moved(knobs, device))

    return tree_map(move, tree)


@pytest.fixture
def per_row_adaptor(request: pytest.FixtureRequest) -> Callable[[int, int], Adaptor]:
    """Makes an adaptor for (n, v) logits; every knob differs from row to row."""

    def make(n: int, v: int) -> Adaptor:
        r = torch.rand(n, 5).double()
        adaptor = Adaptor(
            temperature=0.5 + r[:, 0],
            top_k=torch.randint(0, v, (n,)),
            top_p=0.5 + r[:, 1] / 2,
            min_p=r[:, 2] * 1e-3,
            typical_p=0.5 + r[:, 3] / 2,
            eta_cutoff=r[:, 4] * 1e-3,
            min_tokens_to_keep=torch.randint(1, 4, (n,)),
        )
        moved: Adaptor = _moved(adaptor, _device_of(request))
        return moved

    return make


@pytest.fixture
def on_device(device: str) -> Callable[..., Any]:
    """Calls a function with its tensors and per-row knobs on the test's device.

    What it returns comes back to the CPU.
    """

    def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        args, kwargs = _moved((args, kwargs), device)
        return _moved(function(*args, **kwargs), "cpu")

    return call


@pytest.fixture(scope="session")
def tiny_llama() -> Callable[..., Any]:
    """Makes small Llamas with random weights, whose logits spread widely enough to truncate."""

    def make(vocabulary: int, seed: int = 0, **changes: int) -> Any:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(seed)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1} | changes
        config = LlamaConfig(
            vocab_size=vocabulary,
            num_attention_heads=2,
            max_position_embeddings=256,
            initializer_range=0.3,
            bos_token_id=1,
            eos_token_id=None,
            pad_token_id=0,
            **sizes,
        )
        return LlamaForCausalLM(config).eval()

    return make


@pytest.fixture(scope="session")
def padded_prompts() -> Callable[[int], dict[str, torch.Tensor]]:
    """Makes three prompts of 7, 4 and 2 tokens, padded on the left, of a vocabulary."""

    def make(vocabulary: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(2, vocabulary, (3, 7), generator=torch.Generator().manual_seed(1))
        mask = torch.tensor([[1] * 7, [0] * 3 + [1] * 4, [0] * 5 + [1] * 2])
        return {"input_ids": ids * mask, "attention_mask": mask}

    return make


@pytest.fixture(scope="session")
def demo_model(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """The demo's model and its tokenizer, which no test may change.

    Skips where the model cannot be had, and fails there with `--require-model`. One worker runs all
    tests that need it.
    """
    required = request.config.getoption("--require-model")
    find = importlib.import_module if required else pytest.importorskip
    pretrained = find("fastadapt.training.pretrained")
    try:
        return pretrained.load_model(None, fetch=True)
    except pretrained.ModelNotFoundError as error:
        if required:
            raise
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def _model_of_marked_tests(request: pytest.FixtureRequest) -> None:
    """Has the demo's model loaded, or the test skipped, where it is marked demo_model."""
    if request.node.get_closest_marker("demo_model"):
        request.getfixturevalue("demo_model")


# What a process of `start_python` does before its program.
CHILD = """
import gc, os, runpy, sys
gc.freeze()
os.chdir({folder!r})
os.environ.update({environment!r})
output = os.open({output!r}, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
os.dup2(output, 1)
os.dup2(output, 2)
sys.argv[:] = {command!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="session")
def preloaded(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The multiprocessing context of processes that have trl imported.

    An interpreter of its own would import that for 10 seconds of the processor. They are forked
    from one that has done nothing else, not from this one with its threads and locks. With a GPU
    they are interpreters of their own: one that has asked for a GPU cannot be forked.
    """
    if torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    context: Any = multiprocessing.get_context("forkserver")
    modules = [
        "torch._dynamo",
        "torch.distributed.fsdp",
        "fastadapt._cli.train.run",
        "fastadapt._cli.demo",
    ]
    context.set_forkserver_preload(["pytest", *modules])
    with pytest.MonkeyPatch.context() as patch:
        # it looks for modules in its folder first, where the sources of a clone are not built
        patch.chdir(tmp_path_factory.mktemp("preloaded"))
        patch.setenv("OMP_NUM_THREADS", "1")
        first = context.Process(target=int)
        first.start()
        first.join()
    return context


@pytest.fixture(scope="session")
def start_python(preloaded: Any) -> Callable[..., BaseProcess]:
    """Starts `python -P PROGRAM WORDS` with one thread, in a process of `preloaded`."""

    def start(
        program: Path, *words: str, folder: Path, output: Path, **environment: str
    ) -> BaseProcess:
        code = CHILD.format(
            folder=str(folder),
            environment=environment,
            output=str(output),
            command=[str(program), *words],
        )
        process: BaseProcess = preloaded.Process(target=exec, args=(code, {}), daemon=True)
        process.start()
        return process

    return start


@pytest.fixture
def run_ranks(
    start_python: Callable[..., BaseProcess], tmp_path: Path
) -> Callable[..., list[list[str]]]:
    """Runs `PROGRAM RANK RANKS STORE WORDS` in a process for each rank; returns their lines."""

    def run(program: Path, ranks: int, *words: str) -> list[list[str]]:
        outputs = [tmp_path / f"{rank}.txt" for rank in range(ranks)]
        started = [
            start_python(
                *(program, str(rank), str(ranks), str(tmp_path / "store"), *words),
                **{"folder": tmp_path, "output": output},
            )
            for rank, output in enumerate(outputs)
        ]
        try:
            for process in started:
                process.join(timeout=240)
        finally:
            for process in started:
                process.kill()
        for process, output in zip(started, outputs, strict=True):
            process.join()
            assert process.exitcode == 0, output.read_text()[-4000:]
        return [output.read_text().splitlines() for output in outputs]

    return run


@pytest.fixture
def run_benchmark(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Runs the main function of a benchmark and returns the result that it writes.

    With `as_on_a_gpu` it times tiny cells by the clock of the CPU, and a device is made up for it.
    """

    def run(
        module: ModuleType, *arguments: object, as_on_a_gpu: bool = False, code: int = 0
    ) -> dict[str, Any]:
        out = tmp_path / "record.json"
        on_cpu = ("--device", "cpu", "--rounds", 2, "--seconds", 0) if as_on_a_gpu else ()
        assert module.main([*map(str, ("--out", out, *on_cpu, *arguments))]) == code
        record: dict[str, Any] = json.loads(out.read_text())
        if as_on_a_gpu:
            record["host"] |= {
                "gpu": {"name": "Some GPU", "driver": "1.2", "cuda": "13.0"},
                "dirty": False,
                "commit": "0123456789abcdef",
            }
        return record

    return run


@pytest.fixture(scope="session")
def letter_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a small random language model; tokens are the letters from a to p."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    ids = {word: i for i, word in enumerate(("<pad>", "<unk>", "<end>", *"abcdefghijklmnop"))}
    words = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<end>", unk_token="<unk>"
    )
    config = LlamaConfig(
        vocab_size=len(ids),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        tie_word_embeddings=True,
    )
    folder = tmp_path_factory.mktemp("letters")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
