"""Rows of equal tokens under Triton's interpreter: the CPU's bits, and no program reads a row.

Sizes are so small that no list holds the tokens of a level, of which there are more than top-k asks
for.
"""

import os

import pytest
import torch

from fastadapt import Adaptor, filter_logits, sample
from fastadapt._ops.sampling import OPERATORS

triton = pytest.importorskip("triton", reason="triton is not installed: it has wheels for Linux")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("a GPU is there: the tests marked gpu run these kernels", allow_module_level=True)

from triton.runtime.interpreter import InterpretedFunction  # noqa: E402  (it is chosen before)

from fastadapt._ops.triton import launch, launch_scan  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
INF = float("inf")
V = 1000  # the last block and the last tile are not full
PLAN = launch_scan.Plan(
    columns=32,
    group=8,
    ahead=4,
    supers=16,
    block=64,
    bins=32,
    bins_step=128,
    bracket_step=32,
    room=128,
    list_size=32,
    short_size=16,
)


def few_above(number: int) -> torch.Tensor:
    """So many tokens of different logits above a level, with others under it."""
    x = torch.where(torch.rand(1, V) < 0.2, -1.0, 0.5)
    above = torch.randperm(V)[:number]
    return x.index_fill_(1, above, 0.6) + torch.zeros(1, V).index_copy_(
        1, above, torch.rand(1, number) * 2
    )


KINDS = {
    "flat": lambda: torch.full((1, V), 1.5),
    "zero": lambda: torch.zeros(1, V) * torch.where(torch.rand(1, V) < 0.5, -1.0, 1.0),
    "two levels": lambda: torch.randint(2, (1, V)) * 1.5,
    "four levels": lambda: torch.randint(4, (1, V)) * 0.3,
    "one above": lambda: torch.zeros(1, V).index_fill_(1, torch.tensor([700]), 4.0),
    "a few above": lambda: few_above(3),
    "more above": lambda: few_above(20),  # which only the longer list holds, with the level
    "too many above": lambda: few_above(40),  # for a list with a level
    "a far level": lambda: torch.zeros(1, V).index_fill_(1, torch.tensor([3]), 60.0),
    "near zero and near 50": lambda: torch.randn(2, V) * 1e-3 + torch.tensor([[0.0], [50.0]]),
    "bfloat16 near 5": lambda: (torch.randn(2, V) * 0.02 + 5).bfloat16(),
    "float16 near 50": lambda: (torch.randn(2, V) * 0.02 + 50).half(),
    "holes": lambda: torch.full((1, V), 2.0).masked_fill_(torch.rand(1, V) < 0.4, -INF),
    "one hole": lambda: torch.full((1, V), 2.0).index_fill_(1, torch.tensor([0]), -INF),
    "bad": lambda: torch.stack(
        [torch.full((V,), x).index_fill_(0, torch.tensor([V - 1]), y) for x, y in
         ((0.0, float("nan")), (0.0, INF), (-INF, -INF), (float("nan"), 0.0), (INF, INF))]
    ),
}  # fmt: skip
REST = {"min_p": 0.02, "typical_p": 0.9, "epsilon_cutoff": 1e-4, "eta_cutoff": 1e-3}
KNOBS = {
    "greedy": {"temperature": 0.0},
    "k": {"top_k": 5},
    "T+k": {"temperature": 0.7, "top_k": 12},
    "T+k+p": {"temperature": 0.8, "top_k": 12, "top_p": 0.9},
    "k and little p": {"top_k": 9, "top_p": 1e-6},
    "k and half p": {"top_k": 30, "top_p": 0.5},
    "k and nearly all p": {"temperature": 3.0, "top_k": 30, "top_p": 1 - 1e-9},
    "k and typical": {"top_k": 7, "typical_p": 0.3},
    "k and epsilon": {"top_k": 7, "epsilon_cutoff": 2e-3},
    "everything": {"temperature": 0.8, "top_k": 25, "top_p": 0.95, **REST},
    "at least 3": {"temperature": 0.8, "top_k": 5, "top_p": 0.3, "min_tokens_to_keep": 3},
}
# which one program does on a whole row, or on a list that it does not hold
ALONE = {"cut_among", "_tied_cut", "_sums_of"}
# A nucleus, which ends in a level that its bracket is.
NUCLEI = {
    "p": {"top_p": 0.9},
    "T+p": {"temperature": 0.8, "top_p": 0.9},
    "half p": {"top_p": 0.5},
    "p of one": {"top_p": 1e-9},
    "nearly all p": {"top_p": 1 - 1e-9},
    "typical": {"typical_p": 0.9},
    "T and little typical": {"temperature": 2.0, "typical_p": 0.05},
}
# what reads a row after its bracket is known: rounds of finer bins, and sums of survivors
LATER = {"_places", "_sum_tile"}
LEVELS = ("flat", "zero", "two levels", "four levels", "one above", "a few above", "more above")
LEVELS += ("a far level", "holes", "one hole", "bad")


def assert_same(x: torch.Tensor, adaptor: Adaptor, seed: int) -> None:
    """All fields but the top tokens, to the last bit."""
    seeds = torch.arange(len(x)) + seed
    arguments = x, adaptor.packed, adaptor.filter_code, seeds, None, True, True, 0
    ours = OPERATORS["sample"][1](*arguments)
    launch.sample(*arguments, ours, PLAN)
    wanted = sample(x, adaptor, seeds=seeds, base_logprobs=True, log_mass=True)
    for a, b in zip(ours, wanted, strict=False):
        assert torch.equal(a.nan_to_num(-9), b.nan_to_num(-9)), (adaptor, seed, a, b)


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The functions that kernels call."""
    names: set[str] = set()
    call = InterpretedFunction.__call__

    def noted(function, *arguments, **options):
        names.add(function.fn.__name__)
        return call(function, *arguments, **options)

    monkeypatch.setattr(InterpretedFunction, "__call__", noted)
    return names


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", KNOBS)
def test_draws_are_those_of_the_cpu(called, kind, name):
    x, adaptor = KINDS[kind](), Adaptor(**KNOBS[name])
    for seed in (5, 6):
        assert_same(x, adaptor, seed)
    if kind in LEVELS and name != "at least 3":
        assert not called & ALONE


def test_ties_are_counted(called):
    for kind, name in (("flat", "T+k+p"), ("two levels", "greedy"), ("four levels", "everything")):
        called.clear()
        assert_same(KINDS[kind](), Adaptor(**KNOBS[name]), 1)
        assert {"count_tile", "store_level", "cut_in_level"} <= called


def test_rows_without_ties_are_not_counted(called):
    for knobs in KNOBS.values():
        assert_same(torch.randn(1, V) * 3, Adaptor(**knobs), 1)
    assert "count_tile" not in called


@pytest.mark.parametrize("kind", KINDS)
def test_masks_are_those_of_the_cpu(kind):
    x = KINDS[kind]().float()
    for knobs in (*KNOBS.values(), *NUCLEI.values()):
        adaptor = Adaptor(**knobs)
        out = torch.empty_like(x)
        launch.filter_logits(x, adaptor.packed, adaptor.filter_code, out, PLAN)
        assert torch.equal(filter_logits(x, adaptor).nan_to_num(-9), out.nan_to_num(-9)), knobs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NUCLEI)
def test_nuclei_are_those_of_the_cpu(called, kind, name):
    x = KINDS[kind]()
    assert_same(x, Adaptor(**NUCLEI[name]), 5)
    if kind in ("flat", "zero", "two levels", "one hole"):
        assert not called & (ALONE | LATER)
        assert {"_count_tile", "store_level"} <= called


@pytest.mark.parametrize("name", NUCLEI)
def test_flat_rows_have_no_bins(called, name):
    for kind in ("flat", "zero"):
        assert_same(KINDS[kind](), Adaptor(**NUCLEI[name]), 3)
    assert "_add_in_runs" not in called


@pytest.mark.parametrize("lowest, spread", [(2, 1e-5), (0, 1e-9)])  # of one bin, or of one mass
def test_a_crowded_bracket_that_is_no_level(called, lowest, spread):
    x = lowest + torch.rand(2, V) * spread
    for knobs in NUCLEI.values():
        called.clear()
        assert_same(x, Adaptor(**knobs), 1)
        assert {"_count_tile", "_places"} <= called
        assert "store_level" not in called


def test_ordinary_nuclei_are_not_counted(called):
    for knobs in NUCLEI.values():
        assert_same(torch.randn(1, V) * 3, Adaptor(**knobs), 1)
    assert "_count_tile" not in called


def test_a_nucleus_before_other_filters(called):
    for kind in KINDS:
        for knobs in ({"top_p": 0.9, "min_p": 0.3}, {"top_p": 0.9, "min_tokens_to_keep": 3}):
            assert_same(KINDS[kind](), Adaptor(**knobs), 1)
    assert "_count_tile" not in called  # the tokens above the bracket are needed, too


def test_a_heavy_token_at_the_cut_of_a_level():
    """A token with a thousandth of the mass is left out where rounding alone takes it in."""
    x = torch.zeros(1, V)
    for p in (0.25, 0.5, 0.75, 250 / V, 251 / V, 0.001, 0.002, 0.999):
        for number in (V, 900, 800, 640):
            assert_same(x[:, :number], Adaptor(top_k=3, top_p=p), 2)
            assert_same(x[:, :number], Adaptor(top_p=p), 2)
