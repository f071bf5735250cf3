"""The Triton kernels under Triton's interpreter: the CPU kernels' values, bit for bit.

`conftest.py` chooses the interpreter where there is no GPU; where there is one, the tests marked
`gpu` run the same operators on it. Sizes are small, so that few tokens are many to the kernels:
every way to a decision is taken.
"""

import itertools
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bits import assert_same, same
from fastadapt import Adaptor, Support, adapted_log_odds, filter_logits, sample, score
from fastadapt._ops.sampling import OPERATORS

triton = pytest.importorskip("triton", reason="triton is not installed: it has wheels for Linux")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("a GPU is there: the tests marked gpu run these kernels", allow_module_level=True)

from fastadapt._ops.triton import launch, launch_scan  # noqa: E402  (the interpreter is chosen before)
from fastadapt._ops.triton.chains import launch as chains  # noqa: E402

# of rows that hold NaN or infinities, where the interpreter is NumPy
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
PLAN = launch_scan.Plan(
    columns=16,
    group=8,
    ahead=4,
    supers=4,
    block=64,
    bins_step=64,
    bracket_step=32,
    bins=32,
    room=128,
    list_size=64,
    short_size=16,
)
V = 200  # a whole block and a part; more than the list and the sample hold
INF = float("inf")
ROWS: dict[str, Callable[[int], Tensor]] = {
    "normal": lambda v: torch.randn(1, v) * 3,
    "flat": lambda v: torch.zeros(1, v),
    "two levels": lambda v: torch.randint(0, 2, (1, v)).float(),
    "almost flat": lambda v: torch.randn(1, v) * 1e-3 + 50,
    "far from zero": lambda v: torch.randn(1, v) * 100 - 1e4,
    "one for all": lambda v: torch.zeros(1, v).index_fill_(1, torch.tensor([v // 2]), 40.0),
    "mostly -inf": lambda v: torch.randn(1, v).masked_fill_(torch.rand(1, v) < 0.9, -INF),
    "huge": lambda v: torch.randn(1, v) * 1e37,
    "bfloat16": lambda v: torch.randn(1, v).bfloat16(),
    "float16": lambda v: torch.randn(1, v).half() * 4,
    "bad": lambda v: torch.stack(
        [
            torch.full((v,), float("nan")),
            torch.full((v,), -INF),
            torch.randn(v).index_fill(0, torch.tensor([v - 1]), INF),
        ]
    ),
}
KNOBS: tuple[dict[str, float | str], ...] = (
    {},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.3, "top_k": 50, "top_p": 0.9},
    {"top_k": 5},
    {"top_p": 0.5, "min_tokens_to_keep": 20},
    {"min_p": 0.05},
    {"typical_p": 0.9, "temperature": 2.0},
    {"typical_p": 0.2, "min_tokens_to_keep": 30, "epsilon_cutoff": 0.2, "order": "vllm"},
    {"epsilon_cutoff": 3e-3},
    {"eta_cutoff": 0.01},
    {"min_p": 0.3, "top_k": 40, "min_tokens_to_keep": 3, "order": "vllm"},
    {
        "temperature": 1.5,
        "top_k": 300,
        "top_p": 0.95,
        "min_p": 1e-3,
        "typical_p": 0.9,
        "epsilon_cutoff": 1e-4,
        "eta_cutoff": 1e-3,
    },
)
GREEDY = {"temperature": 0.0, "top_k": 3}
# Rows that differ from others by the conversion of what is loaded, or by the size of their numbers:
# every filter at least once.
FEW = {"bfloat16", "float16", "far from zero", "huge"}
# of which test_nucleus.py draws under top-p and typical alone, longer ones
NUCLEI = {"normal", "flat", "two levels", "almost flat", "mostly -inf"}


def launched(name: str, *arguments: Any, plan: launch_scan.Plan = PLAN) -> Any:
    """What an operator returns on CUDA, by small sizes."""
    out = OPERATORS[name][1](*arguments)
    getattr(launch, name)(*arguments, out, plan)
    return out


def assert_sample(
    logits: Tensor, adaptor: Adaptor, plan: launch_scan.Plan, *, fields: bool = True
) -> None:
    """The four fields of every call, or all."""
    n, top = len(logits), min(7, logits.shape[1]) if fields else 0
    seeds, positions = (
        torch.randint(-(2**63), 2**63 - 1, (n,)),
        torch.randint(2**40, (n,)) if fields else None,
    )
    asked = {"base_logprobs": fields, "log_mass": fields, "top_logprobs": top}
    ours = sample(logits, adaptor, seeds=seeds, positions=positions, **asked)
    arguments = logits, adaptor.packed, adaptor.filter_code, seeds, positions
    kernel = launched("sample", *arguments, fields, fields, top, plan=plan)
    for name, a, b in zip(ours._fields, ours, kernel, strict=False):
        assert same(a, b), (adaptor, name, a, b)
    if fields:
        counts = chains.listed_of(ours.kept, logits.shape[1])
        own = logits, adaptor.packed, adaptor.filter_code, counts, seeds, positions, plan
        ids, offsets = chains.survivors(*own)
        wanted = sample(logits, adaptor, seeds=seeds, positions=positions, support=True).support
        assert Support(ids, offsets, ours.kept == logits.shape[1]) == wanted, adaptor


@pytest.mark.parametrize("kind", ROWS)
def test_sample_equals_the_cpu(kind: str) -> None:
    logits = ROWS[kind](V)
    for i, knobs in enumerate((GREEDY, *(KNOBS[2::3] if kind in FEW else KNOBS))):
        filters = set(knobs) - {"temperature", "min_tokens_to_keep"}
        if kind not in NUCLEI or filters not in ({"top_p"}, {"typical_p"}):
            assert_sample(logits, Adaptor(**knobs), PLAN, fields=i % 3 == 0)


@pytest.mark.parametrize("kind", ["flat", "two levels", "one for all"])
def test_a_cutoff_above_every_probability_keeps_the_most_probable(kind: str) -> None:
    """They are tied in the first two, and more than a list holds."""
    for knobs in ({"epsilon_cutoff": 0.2}, {"epsilon_cutoff": 0.99, "min_tokens_to_keep": 3}):
        assert_sample(ROWS[kind](V), Adaptor(**knobs), PLAN, fields=False)


@pytest.mark.parametrize("v", [1, 2, 50])
def test_short_rows(v: int) -> None:
    kinds = ("normal", "flat", "mostly -inf", "huge", *(("bad",) if v > 1 else ()))
    logits = torch.cat([ROWS[kind](v).float() for kind in kinds])
    for knobs in (GREEDY, *KNOBS[::3]):
        assert_sample(logits, Adaptor(**knobs), PLAN)


@pytest.mark.parametrize("kind", ["normal", "almost flat", "two levels", "bad", "bfloat16"])
def test_filter_logits_equals_the_cpu(kind: str) -> None:
    logits = ROWS[kind](V)
    for knobs in (GREEDY, *KNOBS[1::2]):
        adaptor = Adaptor(**knobs)
        # the interpreter cuts bfloat16 off where GPUs round: torch rounds what is float32 here
        out = torch.empty_like(logits, dtype=torch.float32)
        launch.filter_logits(logits, adaptor.packed, adaptor.filter_code, out, PLAN)
        assert same(filter_logits(logits, adaptor), out.to(logits.dtype)), knobs


@pytest.mark.parametrize("kind", ["normal", "flat", "mostly -inf", "bad", "bfloat16"])
def test_score_equals_the_cpu(kind: str) -> None:
    logits = ROWS[kind](V)
    adaptors = [Adaptor(**knobs) for knobs in KNOBS]
    tokens = torch.randint(V, (len(logits),))
    tokens[1:2] = -100
    ours = score(logits, tokens, adaptors)
    packed, orders = [a.packed for a in adaptors], [a.filter_code for a in adaptors]
    kernel = launched("score", logits, tokens, packed, orders, -100)
    assert_same(ours, [*kernel, None])


@pytest.mark.parametrize("kind", ["normal", "two levels", "one for all", "bad", "bfloat16"])
def test_log_odds_equal_the_cpu(kind: str) -> None:
    logits = ROWS[kind](V)
    for knobs in KNOBS[1::2]:
        adaptor = Adaptor(**knobs)
        tokens = torch.randint(V, (len(logits),))
        tokens[:1] = logits[:1].nan_to_num().argmax(-1)  # inside most supports
        upstream = torch.randn(len(logits))
        mine = logits.clone().requires_grad_()
        ours = adapted_log_odds(mine, tokens, adaptor)
        ours.backward(upstream)
        arguments = tokens, adaptor.packed, adaptor.filter_code, -100
        log_odds, support, stats = launched("adapted_log_odds", logits, *arguments)
        assert same(ours.detach(), log_odds), knobs
        out = torch.empty_like(logits, dtype=torch.float32)
        launch.adapted_log_odds_backward(upstream, logits, *arguments, support, stats, out, PLAN)
        assert same(mine.grad, out.to(logits.dtype)), knobs


def test_float64_log_odds_equal_the_cpu() -> None:
    logits, tokens = torch.randn(2, 50, dtype=torch.float64) * 3, torch.tensor([3, -100])
    adaptor = Adaptor(temperature=0.8, top_k=20)
    tokens[0] = logits[0].argmax()
    mine, upstream = logits.clone().requires_grad_(), torch.randn(2, dtype=torch.float64)
    ours = adapted_log_odds(mine, tokens, adaptor)
    ours.backward(upstream)
    arguments = tokens, adaptor.packed, adaptor.filter_code, -100
    log_odds, support, stats = launched("adapted_log_odds", logits, *arguments)
    dlogits = torch.empty_like(logits)
    given = upstream, logits, *arguments, support, stats
    launch.adapted_log_odds_backward(*given, dlogits, PLAN)
    torch.testing.assert_close(log_odds, ours.detach(), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(dlogits, mine.grad, rtol=1e-12, atol=1e-15)


def test_knobs_of_each_row_and_strided_rows() -> None:
    n, v = 5, 200
    wide = torch.randn(n, v + 9) * 2
    adaptor = Adaptor(
        temperature=torch.tensor([0.5, 1.0, 0.0, 2.0, 1.0]),
        top_k=torch.tensor([0, 10, 5, 0, 199]),
        top_p=torch.tensor([0.9, 1.0, 0.5, 1.0, 0.3]),
        typical_p=torch.tensor([1.0, 0.5, 1.0, 0.8, 1.0]),
    )
    assert_sample(wide[:, :v], adaptor, PLAN)
    assert_sample(wide[:1, :v].expand(n, v), adaptor, PLAN)


def test_a_bad_knob_spoils_its_own_row() -> None:
    logits, adaptor = torch.randn(3, 60), Adaptor(top_p=torch.tensor([0.9, 0.9, 0.9]))
    seeds = torch.arange(3)
    arguments = logits, adaptor.packed, 0, seeds, None, False, False, 0
    whole = launched("sample", *arguments)
    adaptor.packed[2, 1] = 1.5
    tokens, logprobs, kept, status = launched("sample", *arguments)
    assert status.tolist() == [0, 4, 0]
    assert tokens.tolist() == [whole[0][0], -1, whole[0][2]]
    assert logprobs[1].isnan() and kept[1] == 0


@pytest.mark.parametrize("plan", [
    PLAN._replace(room=512, list_size=512, block=128),
    PLAN._replace(bins=8, room=16, list_size=16),
    PLAN._replace(scratch_bytes=1),
    PLAN._replace(block=16),
], ids=["all in the list", "little list", "a row at a time", "little blocks"])  # fmt: skip
def test_sizes_change_nothing(plan: launch_scan.Plan) -> None:
    logits = torch.randn(2, 300) * 2
    for knobs in ({"top_p": 0.9}, {"typical_p": 0.7}, {"top_k": 100, "eta_cutoff": 0.01}):
        assert_sample(logits, Adaptor(**knobs), plan)


def test_no_rows() -> None:
    logits, adaptor = torch.empty(0, 50), Adaptor(top_p=0.9)
    seeds = torch.empty(0, dtype=torch.int64)
    out = launched("sample", logits, adaptor.packed, 0, seeds, None, True, True, 3)
    assert [len(t) for t in out] == [0] * 9
    assert launched("filter_logits", logits, adaptor.packed, 0).shape == (0, 50)


def test_tokens_out_of_range_are_bad_rows() -> None:
    logits, tokens = torch.randn(3, 40), torch.tensor([40, -1, 3])
    packed = Adaptor().packed
    scores = launched("score", logits, tokens, [packed], [0], -100)
    log_odds, _, stats = launched("adapted_log_odds", logits, tokens, packed, 0, -100)
    for values in (scores[0][:, 0], scores[3], log_odds):
        assert values.isnan().tolist() == [True, True, False]
    assert stats[:2].count_nonzero() == 0


def test_every_pair_of_filters() -> None:
    """On rows that no list holds."""
    one = {
        "top_k": 70,
        "top_p": 0.97,
        "min_p": 1e-3,
        "typical_p": 0.95,
        "epsilon_cutoff": 1e-3,
        "eta_cutoff": 2e-3,
    }
    logits = torch.randn(1, 200)
    for (a, x), (b, y) in itertools.combinations(one.items(), 2):
        order = "hf" if "top_k" in (a, b) else "vllm"
        assert_sample(logits, Adaptor(**{a: x, b: y}, order=order), PLAN, fields=False)
