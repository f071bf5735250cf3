"""Nuclei that no list holds, under Triton's interpreter: the CPU's bits, and by which way.

Sizes are so small that lists overflow and brackets are narrowed over several rounds.
"""

import os

import pytest
import torch

from fastadapt import Adaptor, sample
from fastadapt._ops.sampling import OPERATORS

triton = pytest.importorskip("triton", reason="triton is not installed: it has wheels for Linux")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("a GPU is there: the tests marked gpu run these kernels", allow_module_level=True)

from fastadapt._ops.triton import launch, launch_scan, rows  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
V = 900
PLAN = launch_scan.Plan(
    columns=32,
    group=8,
    ahead=4,
    supers=4,
    block=128,
    bins=32,
    bins_step=128,
    bracket_step=32,
    room=64,
    list_size=32,
    short_size=8,
)
KINDS = {
    "normal": lambda: torch.randn(1, V) * 3,
    "narrow": lambda: torch.randn(1, V) * 0.5,
    "flat": lambda: torch.full((1, V), 1.5),
    "two levels": lambda: torch.randint(0, 2, (1, V)).float(),
    "uniform": lambda: torch.rand(1, V) * 0.01 + 7,
    "ties": lambda: (torch.randn(1, V)).round(),
    "holes": lambda: torch.randn(1, V).masked_fill_(torch.rand(1, V) < 0.9, -float("inf")),
    "scales": lambda: 10.0 ** -(torch.rand(1, V) * 12),
    "peaked": lambda: torch.randn(1, V).index_fill_(1, torch.tensor([5, 600, 601]), 12.0),
    "peak over bulk": lambda: (torch.randn(1, V) * 0.05).index_fill_(1, torch.tensor([7]), 6.0),
}
KNOBS = (
    {"top_p": 0.9},
    {"top_p": 0.3, "temperature": 2.0},
    {"typical_p": 0.9},
    {"typical_p": 0.2},
    {"top_p": 0.95, "typical_p": 0.9},
    {"top_p": 0.5, "min_tokens_to_keep": 40},
)


@pytest.fixture
def stages(monkeypatch):
    """The stage of each row's bracket when it is decided, and what became of it after its bins."""
    seen = []
    kernel = launch.draw.short_kernel

    class Watched:
        def __getitem__(self, grid):
            def run(*arguments, **rest):
                kernel[grid](*arguments, **rest)
                marks = arguments[3].memory
                seen.append((marks[rows.MARK_STAGE.value], int(marks[rows.MARK_SPLIT.value])))

            return run

    monkeypatch.setattr(launch.draw, "short_kernel", Watched())
    return seen


def assert_same(x, knobs, plan=PLAN):
    """The four fields, to the last bit."""
    adaptor, seeds = Adaptor(**knobs), torch.arange(len(x)) + 5
    arguments = x, adaptor.packed, adaptor.filter_code, seeds, None, False, False, 0
    ours = OPERATORS["sample"][1](*arguments)
    launch.sample(*arguments, ours, plan)
    for a, b in zip(ours, sample(x, adaptor, seeds=seeds)[:4], strict=True):
        assert torch.equal(a.nan_to_num(-9), b.nan_to_num(-9)), (knobs, a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_nuclei_are_those_of_the_cpu(kind):
    x = KINDS[kind]()
    for knobs in KNOBS:
        assert_same(x, knobs)


@pytest.mark.parametrize(
    ("kind", "knobs", "stage", "way"),
    [
        ("peaked", {"top_p": 0.9}, rows.NO_BRACKET, 0),  # few groups have all, and a short list
        ("normal", {"top_p": 0.9, "temperature": 1.2}, rows.BINNED, 0),  # a long one
        ("normal", {"top_p": 0.9, "temperature": 2.0}, rows.BINNED, rows.TO_LIST),  # none
        ("normal", {"typical_p": 0.9}, rows.BINNED, rows.TO_LIST),
        ("flat", {"top_p": 0.9}, rows.ONE_LEVEL, rows.TO_COUNT),
        ("two levels", {"top_p": 0.9}, rows.ONE_LEVEL, rows.TO_COUNT),
        ("flat", {"typical_p": 0.9}, rows.ONE_LEVEL, rows.TO_COUNT),
        # another filter needs the tokens above, too
        ("flat", {"typical_p": 0.9, "epsilon_cutoff": 1e-9}, rows.ONE_KAPPA, 0),
        ("flat", {"top_p": 0.9, "epsilon_cutoff": 1e-9}, rows.BRACKET_LISTED, 0),
        # a bin with more than a list holds
        ("uniform", {"top_p": 0.5}, rows.BRACKET_LISTED, rows.TO_COUNT),
    ],
)
def test_the_way_to_a_nucleus(kind, knobs, stage, way, stages):
    plan = PLAN._replace(rounds=6)
    assert_same(KINDS[kind](), knobs, plan)
    assert stages[-1] == (stage.value, getattr(way, "value", way))


def test_the_last_round_is_enough_or_one_program_goes_on():
    for rounds in (0, 1, 2):
        for kind in ("flat", "uniform"):
            for more in ({}, {"epsilon_cutoff": 1e-9}):
                assert_same(KINDS[kind](), {"top_p": 0.9, **more}, PLAN._replace(rounds=rounds))
