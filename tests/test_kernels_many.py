"""Ten thousand rows under Triton's interpreter, by every way of the search: the CPU's bits.

Under each adaptor a token is drawn from rows of each kind in each dtype. Sizes are so small that a
row has several tiles and blocks, a program several tiles, that lists and brackets overflow and that
nuclei take rounds. Which ways were taken is what the interpreter, which calls the functions of the
kernels one by one, and the records of the rows tell; kernels count nothing. `--kernel-rows 100000`
takes ten times as many rows, the first of which are the same.
"""

import os
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fastadapt import Adaptor, filter_logits, sample
from fastadapt._ops.sampling import OPERATORS

triton = pytest.importorskip("triton", reason="triton is not installed: it has wheels for Linux")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("a GPU is there: the tests marked gpu run these kernels", allow_module_level=True)

from triton.runtime.interpreter import InterpretedFunction  # noqa: E402  (it is chosen before)

from fastadapt._ops.triton import launch, launch_scan  # noqa: E402
from fastadapt._ops.triton import rows as records  # noqa: E402

# of rows that hold NaN or infinities, where the interpreter is NumPy
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = ("spread", "normal", "near_flat", "flat", "two_level", "one_hot", "holes", "bf16", "bad")
SMALL = launch_scan.Plan(
    columns=64,
    group=2,
    ahead=2,
    supers=16,
    block=128,
    at_once=8,
    bins=32,
    bins_step=128,
    bracket_step=64,
    programs=1,
    seldom=1,
    room=64,
    list_size=32,
    short_size=16,
)
LARGE = SMALL._replace(
    columns=128,
    group=8,
    ahead=8,
    block=1024,
    at_once=4,
    bins=64,
    bins_step=1024,
    bracket_step=256,
    room=512,
    list_size=256,
    short_size=64,
)
STAGES = {
    **{records.BINNED.value: "binned", records.NARROWED.value: "narrowed"},
    **{records.FEW_ENOUGH.value: "few enough", records.BRACKET_LISTED.value: "bracket listed"},
    records.ONE_KAPPA.value: "one kappa",
}
STATES = {
    **{records.DECIDED.value: "decided", records.UNDECIDED.value: "undecided"},
    records.UNSUMMED.value: "unsummed",
}


FIELDS = ("tokens", "logprobs", "kept", "status")


class Case(NamedTuple):
    """An adaptor, its rows of each kind and dtype among 10,000 in all, and ways that they take."""

    knobs: dict[str, Any]
    number: int
    ways: set[str]


BY_MASS = {"bounds_by_mass", "_kept_of_columns", "only_cut", "first_by_blocks"}
# Many rows where the interpreter is quick.
CASES = {
    "greedy": Case(
        {"temperature": 0.0},
        15,
        {"_list_columns", "push", "append", "_first_in_list", "first_by_blocks"}
        | {"decided after short", "is_level", "count_tile", "cut_in_level", "store_level"},
    ),
    "T": Case({"temperature": 0.8}, 120, {"decided after short", "first_by_blocks"}),
    "T+k": Case(
        {"temperature": 0.8, "top_k": 12},
        15,
        {"_kth_largest", "_list_tile", "first_ranks", "last_before", "_first_in_list"}
        | {"count_tile", "store_level", "first_by_blocks"},
    ),
    "T+k+p": Case(
        {"temperature": 1.3, "top_k": 70, "top_p": 0.9},
        6,
        {"cut_among", "_bracket", "_tied_cut", "_at_cut", "_sums_of", "last_before"},
    ),
    "T+p": Case(
        {"temperature": 0.8, "top_p": 0.9},
        6,
        {"binned after bracket", "binned after bins", "_add_by_bin", "_flush", "split"}
        | {"narrowed after narrow", "few enough after narrow", "bracket listed after narrow"}
        | {"unsummed after short", "unsummed after long", "_sum_tile", "_first_in_list"}
        | {"_count_tile", "store_level"},
    ),
    "hot T+p": Case(
        {"temperature": 2.0, "top_p": 0.95, "min_tokens_to_keep": 3},
        2,
        {"cut_among", "_tied_cut", "unsummed after long", "_kept_of_columns"},
    ),
    "min-p": Case({"min_p": 0.05}, 100, BY_MASS),
    "few by min-p": Case(
        {"min_p": 0.2, "min_tokens_to_keep": 3},
        6,
        {"_mass_floor", "first_ranks", "cut_among", "_tied_cut", "unsummed after long"},
    ),
    "typical": Case(
        {"typical_p": 0.9},
        6,
        {"split", "append", "_count_tile", "store_level", "last_before", "_at_cut"}
        | {"few enough after narrow", "bracket listed after narrow"},
    ),
    "typical and epsilon": Case(
        {"typical_p": 0.9, "epsilon_cutoff": 1e-9},
        2,
        {"split", "append", "one kappa after narrow"},
    ),
    "epsilon": Case({"epsilon_cutoff": 3e-3}, 45, BY_MASS | {"cutoff_of"}),
    "eta": Case({"eta_cutoff": 0.01}, 45, BY_MASS | {"cutoff_of", "surprisals"}),
    "everything": Case(
        {
            **{"temperature": 1.5, "top_k": 150, "top_p": 0.95, "min_p": 1e-3},
            **{"typical_p": 0.9, "epsilon_cutoff": 1e-4, "eta_cutoff": 1e-3},
        },
        2,
        {"cut_among", "_tied_cut", "_at_cut", "surprisals", "cutoff_of"},
    ),
    "vllm": Case(
        {"min_p": 0.02, "top_k": 40, "top_p": 0.9, "order": "vllm"},
        4,
        {"_mass_floor", "first_ranks", "cut_among", "_first_in_list"},
    ),
}
CELLS = len(KINDS) * len(DTYPES)
USUAL = CELLS * sum(case.number for case in CASES.values())


def number_of(name: str, total: int) -> int:
    """Rows of each kind and dtype under an adaptor, of so many in all."""
    return -(-total * CASES[name].number // USUAL)


class Ways:
    """Counts functions that kernels call, and what rows have come to after each kernel."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counts: Counter[str] = Counter()
        call = InterpretedFunction.__call__

        def counted(function: Any, *arguments: Any, **options: Any) -> Any:
            self.counts[function.fn.__name__] += 1
            return call(function, *arguments, **options)

        monkeypatch.setattr(InterpretedFunction, "__call__", counted)
        self.run = launch_scan.launch_on(torch.device("cpu"))

    def launch(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        """Launches a kernel and looks at the records of the rows."""
        self.run(kernel, grid, *arguments, **options)
        name = kernel.fn.__name__.removesuffix("_kernel")
        scratch = next(x for x in arguments if isinstance(x, launch_scan.Scratch))
        marks = scratch.memory.view(grid[0], -1)
        if name in ("bracket", "bins", "narrow"):
            self._count(name, marks[:, records.MARK_STAGE.value], STAGES)
        if name == "bins":
            self.counts["split"] += int((marks[:, records.MARK_SPLIT.value] == 1).sum())
        if name in ("short", "long"):
            self._count(name, marks[:, records.MARK_STATE.value], STATES)

    def _count(self, name: str, values: Tensor, names: dict[int, str]) -> None:
        for value in values.tolist():
            if value in names:
                self.counts[f"{names[value]} after {name}"] += 1


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> Ways:
    """What the rows of a test go through."""
    return Ways(monkeypatch)


def made(make: Callable[[str, int, int], Tensor], kind: str, n: int, v: int) -> Tensor:
    """(n, v) rows of a kind; bad ones hold a NaN, an infinity or nothing finite, in turn."""
    if kind != "bad":
        return make(kind, n, v)
    x = torch.randn(n, v)
    x[0::3, v // 2] = float("nan")
    x[1::3, v - 1] = float("inf")
    x[2::3] = -float("inf")
    return x


def equal(ours: Tensor, kernel: Tensor) -> Tensor:
    """Which rows have equal bits, NaN for NaN."""
    same = ours.nan_to_num(-9) == kernel.nan_to_num(-9)
    return same.view(len(same), -1).all(1)


def assert_same(x: Tensor, adaptor: Adaptor, plan: launch_scan.Plan, ways: Ways) -> int:
    """Four fields of each row, to the last bit; returns the number of rows."""
    seeds = torch.randint(-(2**63), 2**63 - 1, (len(x),))
    arguments = x, adaptor.packed, adaptor.filter_code, seeds, None, False, False, 0
    kernel = OPERATORS["sample"][1](*arguments)
    launch.sample(*arguments, kernel, plan, ways.launch)
    for name, a, b in zip(FIELDS, sample(x, adaptor, seeds=seeds), kernel, strict=False):
        assert equal(a, b).all(), (name, adaptor, (~equal(a, b)).nonzero().flatten(), x)
    return len(x)


@pytest.mark.parametrize("name", CASES)
def test_many_rows_are_drawn_from_as_on_a_cpu(
    name: str,
    rows: Callable[[str, int, int], Tensor],
    ways: Ways,
    request: pytest.FixtureRequest,
) -> None:
    adaptor = Adaptor(**CASES[name].knobs)
    number = number_of(name, request.config.getoption("--kernel-rows"))
    done = 0
    for kind in KINDS:
        for dtype in DTYPES:
            done += assert_same(made(rows, kind, number, 160).to(dtype), adaptor, SMALL, ways)
        # five tiles, the last one with four logits
        done += assert_same(made(rows, kind, 1, 4100), adaptor, LARGE, ways)
    assert done >= CELLS * number
    assert CASES[name].ways <= set(ways.counts), CASES[name].ways - set(ways.counts)


@pytest.mark.parametrize("name", CASES)
def test_masks_are_those_of_the_cpu(name: str, rows: Callable[[str, int, int], Tensor]) -> None:
    """Of rows that lists hold and others."""
    adaptor = Adaptor(**CASES[name].knobs)
    for kind in KINDS:
        x = made(rows, kind, 1, 160)
        out = torch.empty_like(x)
        launch.filter_logits(x, adaptor.packed, adaptor.filter_code, out, SMALL)
        assert equal(filter_logits(x, adaptor), out).all(), (kind, x)


def test_there_are_ten_thousand_rows() -> None:
    assert CELLS * sum(number_of(name, 10_000) for name in CASES) >= 10_000
