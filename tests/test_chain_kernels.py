"""The Triton kernels of chains under Triton's interpreter: the CPU kernels' values, bit for bit.

As `test_kernels.py`, with sizes so small that a row is several tiles, blocks and chunks.
"""

import itertools
import os
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bits import assert_same, same
from fastadapt import Adaptor, Edits, Support, adapted_log_odds, filter_logits, sample, score
from fastadapt._ops.sampling import OPERATORS

triton = pytest.importorskip("triton", reason="triton is not installed: it has wheels for Linux")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("a GPU is there: the tests marked gpu run these kernels", allow_module_level=True)

from fastadapt._ops.triton import launch as plain  # noqa: E402  (the interpreter is chosen before)
from fastadapt._ops.triton import launch_scan  # noqa: E402
from fastadapt._ops.triton.chains import launch  # noqa: E402

# of rows that hold NaN or infinities, where the interpreter is NumPy
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
PLAN = launch_scan.Plan(
    columns=16, group=8, ahead=4, supers=4, block=64, bins_step=64, bracket_step=32, bins=32,
    room=128, list_size=64, short_size=16,
)  # fmt: skip
LARGER = PLAN._replace(columns=64, block=512, bins=64)  # for long rows, of which some blocks do
V = 300  # several blocks, and chunks of sorted logits
INF = float("inf")
ROWS: dict[str, Callable[[int, int], Tensor]] = {
    "normal": torch.randn,
    "spread": lambda n, v: torch.randn(n, v) * 3,
    "flat": lambda n, v: torch.randn(n, v) * 0.01,
    "ties": lambda n, v: (torch.randn(n, v) * 2).round(),
    "constant": lambda n, v: torch.full((n, v), 3.0),
    "one for all": lambda n, v: torch.zeros(n, v).index_fill_(1, torch.tensor([v // 2]), 40.0),
    "holes": lambda n, v: torch.randn(n, v).masked_fill_(torch.rand(n, v) < 0.7, -INF),
    "far from zero": lambda n, v: torch.randn(n, v) * 3 - 1000,
    "even falls": lambda n, v: torch.linspace(0, -5, v)[torch.randperm(v)].repeat(n, 1),
    "many at the top": lambda n, v: torch.cat(
        [12 - torch.arange(min(v, 3)).expand(n, -1) * 0.1, torch.randn(n, max(v - 3, 0)) * 3], 1
    ),
    "huge": lambda n, v: torch.randn(n, v) * 1e37,
    "bfloat16": lambda n, v: torch.randn(n, v).bfloat16() * 2,
    "float16": lambda n, v: torch.randn(n, v).half() * 4,
}
VALUES: dict[str, tuple[float, ...]] = {
    "top_n_sigma": (0.5, 1.0, 3.0),
    "min_k": (0.01, 3.0, 1000.0),
    "top_h": (0.05, 0.3, 0.7, 1.0),
    "top_k": (1, 5, 50, 300),
    "top_p": (0.3, 0.9, 0.99),
    "min_p": (0.01, 0.1, 0.5),
    "top_a": (0.01, 0.1, 0.5, 1.0),
    "typical_p": (0.2, 0.9),
    "epsilon_cutoff": (1e-3, 1e-2),
    "eta_cutoff": (1e-3, 1e-2),
    "xtc_threshold": (0.0, 1e-9, 1e-3, 0.01, 0.1, 0.3),
}
NEW = ("top_n_sigma", "min_k", "top_a", "top_h", "xtc_threshold")
# The places of knobs, and values out of their range.
BAD = {0: -1.0, 7: 0.0, 8: 1e7, 9: -1.0, 10: 1.5, 11: float("nan"), 12: 2.0, 13: -0.1}


def launched(name: str, *arguments: Any, plan: launch_scan.Plan = PLAN) -> Any:
    """What an operator returns on CUDA, by small sizes."""
    out = OPERATORS[name][1](*arguments)
    functions = {
        "filter_logits": launch.filter_rows,
        "sample": launch.sample_rows,
        "score": launch.score_rows,
        "adapted_log_odds": launch.log_odds_of_rows,
    }
    functions[name](*arguments, out, plan)
    return out


def assert_sample(
    logits: Tensor, adaptor: Adaptor, plan: launch_scan.Plan = PLAN, *, fields: bool = True
) -> Any:
    """The four fields of every call, or all."""
    n, top = len(logits), min(3, logits.shape[1]) if fields else 0
    seeds = torch.randint(-(2**63), 2**63 - 1, (n,))
    positions = torch.randint(2**40, (n,)) if fields else None
    asked = {"base_logprobs": fields, "log_mass": fields, "top_logprobs": top}
    ours = sample(logits, adaptor, seeds=seeds, positions=positions, **asked)
    given = logits, adaptor.packed, adaptor.filter_code, seeds, positions
    kernel = launched("sample", *given, fields, fields, top, plan=plan)
    for name, a, b in zip(ours._fields, ours, kernel, strict=False):
        assert same(a, b), (adaptor, name, a, b)
    if not fields:
        counts = launch.listed_of(ours.kept, logits.shape[1])
        own = logits, adaptor.packed, adaptor.filter_code, counts, seeds, positions, plan
        ids, offsets = launch.survivors(*own)
        wanted = sample(logits, adaptor, seeds=seeds, positions=positions, support=True).support
        assert Support(ids, offsets, ours.kept == logits.shape[1]) == wanted, adaptor
    return ours.tokens, adaptor.tossed(seeds, positions)


def assert_rest(logits: Tensor, tokens: Tensor, adaptor: Adaptor) -> None:
    """What is no draw: filtered logits, scores beside another adaptor, log-odds, gradients."""
    # the interpreter cuts bfloat16 off where GPUs round: torch rounds what is float32 here
    out = torch.empty_like(logits, dtype=torch.float32)
    own = adaptor.packed, adaptor.filter_code
    launch.filter_rows(logits, *own, out, PLAN)
    assert same(filter_logits(logits, adaptor), out.to(logits.dtype)), adaptor
    adaptors = [Adaptor(top_p=0.9), adaptor]
    packed, codes = [a.packed for a in adaptors], [a.filter_code for a in adaptors]
    ours = score(logits, tokens, adaptors)
    kernel = launched("score", logits, tokens, packed, codes, -100)
    assert_same(ours, [*kernel, None], adaptor)
    mine, upstream = logits.clone().requires_grad_(), torch.randn(len(logits))
    log_odds = adapted_log_odds(mine, tokens, adaptor)
    log_odds.backward(upstream)
    given = logits, tokens, *own, -100
    values, support, stats = launched("adapted_log_odds", *given)
    assert same(log_odds.detach(), values), adaptor
    plain.adapted_log_odds_backward(upstream, *given, support, stats, out, PLAN)
    assert same(mine.grad, out.to(logits.dtype)), adaptor


def knobs_of(*filters: str) -> dict[str, Any]:
    """Some value of each filter's knob."""
    knobs: dict[str, Any] = {name: random.choice(VALUES[name]) for name in filters}
    if "xtc_threshold" in filters:
        knobs["xtc_probability"] = random.choice((0.5, 0.8, 1.0))
    return knobs


def order_of(*filters: str) -> tuple[str, ...]:
    """These filters in this order."""
    return tuple("xtc" if name == "xtc_threshold" else name for name in filters)


@pytest.fixture(autouse=True)
def _same_choices(request: pytest.FixtureRequest) -> None:
    """Each test makes the same choices, whatever runs before it."""
    random.seed(request.node.name)


@pytest.mark.parametrize("kind", ROWS)
def test_each_filter_alone(kind: str) -> None:
    logits = ROWS[kind](2, V)
    for i, name in enumerate(NEW):
        keep = random.choice((1, 1, 4, 200))
        adaptor = Adaptor(**knobs_of(name), min_tokens_to_keep=keep, temperature=1 - i % 2 / 3)
        tokens, tossed = assert_sample(logits, adaptor, fields=i % 2 == 0)
        if i == len(kind) % len(NEW):
            assert_rest(logits, tokens, tossed)


def test_every_pair_of_filters() -> None:
    for a, b in itertools.combinations(VALUES, 2):
        pair = (a, b) if random.random() < 0.5 else (b, a)
        last = ("temperature",) if random.random() < 0.5 else ()
        adaptor = Adaptor(**knobs_of(*pair), temperature=0.8, order=order_of(*pair) + last)
        assert_sample(ROWS["normal"](1, V), adaptor, fields=False)


@pytest.mark.parametrize("number", range(12))
def test_chains(number: int) -> None:
    """Of random filters in random orders, on rows of which some have few tokens."""
    for _ in range(2):
        filters = random.sample(list(VALUES), random.randint(2, 7))
        last = random.choice(((), ("temperature",), ("temperature",)))
        knobs = {**knobs_of(*filters), "temperature": random.choice((1.0, 0.1, 0.7, 1.5))}
        knobs["min_tokens_to_keep"] = random.choice((1, 1, 2, 150))
        adaptor = Adaptor(**knobs, order=order_of(*filters) + last)
        logits = ROWS[random.choice(list(ROWS))](2, random.choice((1, 2, 33, 65, V)))
        tokens, tossed = assert_sample(logits, adaptor)
        assert_rest(logits, tokens.clamp(min=0), tossed)


@pytest.mark.parametrize("order", ["hf", ("top_k", "top_a", "temperature")])
def test_temperature_zero(order: str | tuple[str, ...]) -> None:
    for kind in ("normal", "ties", "holes"):
        assert_sample(ROWS[kind](2, V), Adaptor(temperature=0.0, top_a=0.1, top_k=5, order=order))


def test_the_temperature_last_without_filters() -> None:
    adaptor = Adaptor(temperature=0.6, order=("top_k", "temperature"))
    for kind in ("normal", "holes"):
        tokens, _ = assert_sample(ROWS[kind](2, V), adaptor)
        assert_rest(ROWS[kind](2, V), tokens, adaptor)


def test_the_temperature_last_takes_survivors_beyond_float32() -> None:
    """Upwards and downwards: status 2 and 3, for rows that were good before it."""
    adaptor = Adaptor(temperature=1e-3, top_a=0.1, order=("top_a", "temperature"))
    logits = torch.randn(3, V)
    logits[0] += 1e37
    logits[1] -= 1e37
    tokens, _ = assert_sample(logits, adaptor, fields=False)
    assert tokens[:2].tolist() == [-1, -1] and tokens[2] >= 0
    assert_rest(logits, torch.zeros(3, dtype=torch.int64), adaptor)


def test_bad_rows() -> None:
    logits = torch.randn(4, V)
    logits[0, 3], logits[1, 150], logits[2] = float("nan"), INF, -INF
    for order in ("hf", ("min_k", "xtc", "temperature")):
        knobs = {"min_k": 3.0, "xtc_probability": 1.0, "xtc_threshold": 0.01}
        adaptor = Adaptor(**knobs, temperature=0.7, order=order)
        tokens, _ = assert_sample(logits, adaptor)
        assert tokens[:3].tolist() == [-1, -1, -1]
        assert_rest(logits, torch.tensor([0, 1, -100, 3]), adaptor)


def test_knobs_of_each_row_and_strided_rows() -> None:
    wide = torch.randn(4, V + 9) * 2
    adaptor = Adaptor(
        temperature=torch.tensor([0.5, 1.0, 0.0, 2.0]),
        top_n_sigma=torch.tensor([0.0, 1.0, 1.0, 3.0]),
        min_k=torch.tensor([3.0, 0.0, 3.0, 0.0]),
        top_h=torch.tensor([0.0, 0.5, 0.5, 0.0]),
        xtc_probability=torch.tensor([0.5, 0.0, 1.0, 0.9]),
        xtc_threshold=torch.tensor([0.01, 0.01, 0.01, 0.01]),
        order=("xtc", "min_k", "top_h", "top_n_sigma"),
    )
    for plan in (PLAN, PLAN._replace(scratch_bytes=1)):
        assert_sample(wide[:, :V], adaptor, plan)
    assert_sample(wide[:1, :V].expand(4, V), adaptor)


@pytest.mark.parametrize("knob", BAD)
def test_a_bad_knob_spoils_its_own_row(knob: int) -> None:
    logits, seeds = torch.randn(3, 60), torch.arange(3)
    adaptor = Adaptor(top_a=torch.full((3,), 0.1), xtc_probability=1.0)
    given = logits, adaptor.packed, adaptor.filter_code, seeds, None, False, False, 0
    whole = launched("sample", *given)
    adaptor.packed[knob, 1] = BAD[knob]
    tokens, logprobs, kept, status = launched("sample", *given)
    assert status.tolist() == [0, 4, 0]
    assert tokens.tolist() == [whole[0][0], -1, whole[0][2]]
    assert logprobs[1].isnan() and kept[1] == 0


def test_a_coin_that_nothing_throws_spoils_its_row() -> None:
    logits, tokens = torch.randn(2, 60), torch.tensor([3, 4])
    adaptor = Adaptor(xtc_probability=torch.tensor([1.0, 1.0]), xtc_threshold=0.01)
    adaptor.packed[12, 1] = 0.5
    own = adaptor.packed, adaptor.filter_code
    filtered = launched("filter_logits", logits, *own)
    assert (filtered[0] == -INF).any() and torch.equal(filtered[1], logits[1])
    scores = launched("score", logits, tokens, own[:1], [own[1]], -100)
    assert scores[0].isnan().tolist() == [[False], [True]] and not scores[3].isnan().any()
    assert launched("adapted_log_odds", logits, tokens, *own, -100)[0].isnan()[1]
    # a draw throws it
    drawn = launched("sample", logits, *own, tokens, None, False, False, 0)
    assert drawn[3].tolist() == [0, 0]


@pytest.mark.parametrize("kind", ["normal", "even falls"])
def test_long_rows(kind: str) -> None:
    logits = ROWS[kind](1, 4_500)
    for knobs in ({"min_k": 3.0}, {"top_h": 0.9, "top_n_sigma": 2.0}, {"top_a": 1e-3}):
        assert_sample(logits, Adaptor(**knobs), LARGER, fields=False)


def test_float64_log_odds() -> None:
    """Rounded logits decide the support, and those of float64 the log-odds on it."""
    logits = torch.randn(2, 50, dtype=torch.float64) * 3
    adaptor = Adaptor(temperature=0.8, min_k=3.0, top_a=0.01, order=("top_a", "min_k"))
    tokens, upstream = logits.argmax(-1), torch.randn(2, dtype=torch.float64)
    mine = logits.clone().requires_grad_()
    ours = adapted_log_odds(mine, tokens, adaptor)
    ours.backward(upstream)
    given = logits, tokens, adaptor.packed, adaptor.filter_code, -100
    log_odds, support, stats = launched("adapted_log_odds", *given)
    dlogits = torch.empty_like(logits)
    plain.adapted_log_odds_backward(upstream, *given, support, stats, dlogits, PLAN)
    assert ours.isfinite().any()
    torch.testing.assert_close(log_odds, ours.detach(), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(dlogits, mine.grad, rtol=1e-12, atol=1e-15)


def test_scores_of_chains_and_others_beside_each_other() -> None:
    """Outputs of an adaptor stand where it stood; knobs of rows beside numbers."""
    logits, tokens = torch.randn(3, 100), torch.tensor([5, -100, 7])
    adaptors = [
        Adaptor(min_k=3.0, temperature=0.5, order=("min_k", "temperature")),
        Adaptor(top_k=4),
        Adaptor(top_a=torch.tensor([0.1, 0.2, 0.3])),
        Adaptor(top_a=0.05, temperature=2.0),
        Adaptor(top_p=0.5, order="vllm"),
    ]
    ours = score(logits, tokens, adaptors)
    packed, codes = [a.packed for a in adaptors], [a.filter_code for a in adaptors]
    for plan in (PLAN, PLAN._replace(scratch_bytes=1)):
        kernel = launched("score", logits, tokens, packed, codes, -100, plan=plan)
        assert_same(ours, [*kernel, None])


def test_edited_rows() -> None:
    logits, seeds = torch.randn(2, 200).bfloat16(), torch.arange(2)
    ids, offsets = torch.tensor([3, 9, 199], dtype=torch.int32), torch.tensor([0, 2, 3])
    edits = Edits(ids, offsets, post=torch.tensor([4.0, -2.0, 5.0]))
    allowed = torch.randint(-(2**31), 2**31 - 1, (2, 7)).int() | 1 << 3
    adaptor = Adaptor(top_n_sigma=1.0, xtc_probability=0.5, xtc_threshold=0.02)
    out = OPERATORS["sample"][1](logits, adaptor.packed, 0, seeds, None, False, False, 0)
    own = logits, adaptor.packed, adaptor.filter_code, seeds, None, False, False, 0, 200
    launch.sample(*own, edits.ids, edits.offsets, edits.columns, allowed, out)
    ours = sample(logits, adaptor, seeds=seeds, edits=edits, allowed=allowed, support=True)
    *fields, ids, offsets = out
    assert_same(ours, [*fields, *[None] * 5, Support(ids, offsets, fields[2] == 200)])


def test_no_rows() -> None:
    logits, adaptor = torch.empty(0, 50), Adaptor(top_a=0.9)
    own = logits, adaptor.packed, adaptor.filter_code
    seeds = torch.empty(0, dtype=torch.int64)
    assert [len(t) for t in launched("sample", *own, seeds, None, True, True, 3)] == [0] * 9
    assert launched("filter_logits", *own).shape == (0, 50)


def test_what_is_a_chain() -> None:
    """What Transformers and vLLM have goes to the kernels for it, however it is written."""
    others = Adaptor(), Adaptor(min_p=0.1, top_k=3, order=("min_p", "top_k")), Adaptor(top_p=0.5)
    chains = Adaptor(top_a=0.1), Adaptor(top_p=0.5, top_k=3, order=("top_p", "top_k"))
    assert not any(launch_scan.is_chain(a.filter_code) for a in others)
    assert all(launch_scan.is_chain(a.filter_code) for a in chains)
    with pytest.raises(NotImplementedError, match=r"expected no chain, got the filters \(10,\)"):
        launch_scan.steps_of(Adaptor(top_a=0.1).filter_code, 1)
