"""Policy losses against their references, the gradients they state, trl's own numbers and edges."""

import inspect
import math
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fastadapt
from fastadapt import (
    Adaptor,
    Responses,
    Support,
    clipped_ratio_loss,
    filter_logits,
    label_logps,
    linear_log_odds,
    linear_support_log_odds,
    reference,
    reinforce_loss,
    sample,
    weighted_reinforce_loss,
)

POLICY = inspect.getmodule(clipped_ratio_loss)
INF, NAN = float("inf"), float("nan")
REDUCTIONS = ("token_mean", "sequence_mean", "sequence_sum")


class Case(NamedTuple):
    """A loss with options, and what it takes beside the responses."""

    name: str
    inputs: tuple[str, ...]
    options: dict[str, Any]

    def __str__(self) -> str:
        return "-".join([self.name, *map(str, self.options.values()), *self.inputs[1:]])

    def __call__(self, batch: "Batch", package: Any = fastadapt, **changed: Any) -> Any:
        """The loss and its metrics."""
        given = [getattr(batch, name) for name in self.inputs]
        return getattr(package, self.name)(batch.responses, *given, **self.options | changed)


CLIPPED = ("advantages", "sampler_logps")
EACH = ("token_advantages", "sampler_logps")
WIDE = {"epsilon": 0.1, "epsilon_high": 0.28, "delta": 1.6}
CASES = [
    *(Case("clipped_ratio_loss", CLIPPED, {"reduction": name}) for name in REDUCTIONS),
    *(
        Case("clipped_ratio_loss", CLIPPED, {"level": "sequence", "reduction": name})
        for name in REDUCTIONS
    ),
    Case("clipped_ratio_loss", CLIPPED, WIDE),
    Case("clipped_ratio_loss", EACH, WIDE),
    Case("clipped_ratio_loss", CLIPPED, WIDE | {"level": "sequence"}),
    *(Case("reinforce_loss", ("advantages",), {"reduction": name}) for name in REDUCTIONS),
    Case("reinforce_loss", ("token_advantages", "sampler_logps"), {"max_weight": 1.2}),
    *(
        Case("weighted_reinforce_loss", ("correct", *more), {"penalty": name})
        for name in ("log_prob", "unlikelihood")
        for more in ((), ("sampler_logps",))
    ),
    Case(
        "weighted_reinforce_loss",
        ("correct",),
        {"positive_weight": 0.3, "negative_weight": 2.0, "reduction": "sequence_mean"},
    ),
]
each_case = pytest.mark.parametrize("case", CASES, ids=str)


class Batch:
    """Responses, their sampler's log-probabilities a little off, and advantages of both signs."""

    def __init__(self, b: int = 4, t: int = 6, dtype: torch.dtype = torch.float64) -> None:
        self.log_odds = (torch.randn(b, t, dtype=dtype) * 2).requires_grad_()
        self.mask = torch.rand(b, t) < 0.7
        self.mask[:, :1] = True
        self.sampler_logps = label_logps(self.log_odds).detach() + torch.randn(b, t) * 0.3
        self.advantages = torch.randn(b, dtype=dtype)
        self.token_advantages = torch.randn(b, t, dtype=dtype)
        self.correct = torch.arange(b) % 2 == 0
        self.responses = Responses(self.log_odds, self.mask)

    def spoilt(self) -> "Batch":
        """With tokens outside and alone, a response without tokens, and NaN where none counts."""
        with torch.no_grad():
            self.log_odds[0, 0], self.log_odds[1, 0], self.log_odds[2, :] = -INF, INF, -INF
            self.log_odds[3, 0] = self.log_odds[3, 0].abs()
            self.mask[-1] = False
            for x in (self.log_odds, self.sampler_logps, self.token_advantages):
                x[~self.mask] = NAN
            self.advantages[-1] = NAN
        return self

    def packed(self) -> "Batch":
        """The same in the packed layout, tokens in another order."""
        b, t = self.mask.shape
        order = torch.randperm(b * t)
        ids = torch.where(self.mask, torch.arange(b)[:, None], -1).flatten()[order]
        self.responses = Responses(self.log_odds.flatten()[order], segments=ids, num_segments=b)
        self.sampler_logps = self.sampler_logps.flatten()[order]
        self.token_advantages = self.token_advantages.flatten()[order]
        return self

    def gradient(self, loss: Tensor) -> Tensor:
        """∂L/∂m, (B, T)."""
        return torch.autograd.grad(loss, self.log_odds, retain_graph=True)[0]


def assert_metrics(got: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    assert set(got) == set(wanted)
    for key, value in wanted.items():
        assert got[key].dtype == value.dtype and got[key].shape == ()
        assert not got[key].requires_grad
        torch.testing.assert_close(got[key], value, rtol=tolerance, atol=tolerance, msg=key)


def test_every_policy_loss_has_cases():
    here = [n for n in fastadapt.__all__ if inspect.getmodule(getattr(fastadapt, n)) is POLICY]
    assert {case.name for case in CASES} == set(here) and len(here) == 3
    assert set(here) <= set(fastadapt.losses.__all__) & set(reference.__all__)


@each_case
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("spoilt", [False, True], ids=["plain", "edges"])
def test_equals_its_reference(case, layout, dtype, spoilt):
    x = Batch(5, 7, dtype)
    x = x.spoilt() if spoilt else x
    x = x.packed() if layout == "packed" else x
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    (loss, metrics), (wanted, told) = case(x), case(x, reference)
    assert loss.dtype == wanted.dtype == dtype and loss.shape == ()
    torch.testing.assert_close(loss, wanted, rtol=tolerance, atol=tolerance)
    assert_metrics(metrics, told, tolerance)
    gradient, expected = x.gradient(loss), x.gradient(wanted)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=tolerance)
    still = ~x.mask | x.log_odds.isinf()
    assert (gradient[still] == 0).all()
    assert gradient.abs().sum() > 0
    if spoilt:
        outside = int((x.mask & (x.log_odds == -INF)).sum())
        assert int(metrics["tokens/outside_support"]) == outside > 0


@given(st.data())
def test_equals_its_reference_for_any_shape(data):
    case = data.draw(st.sampled_from(CASES))
    b, t = data.draw(st.integers(0, 4)), data.draw(st.integers(0, 5))
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    x = Batch(b, t)
    density = data.draw(st.sampled_from([0.0, 0.5, 1.0]))
    x.mask = torch.rand(b, t) < density
    edges = torch.rand(b, t)
    with torch.no_grad():
        x.log_odds[edges < 0.1], x.log_odds[edges > 0.9] = -INF, INF
    totals = data.draw(st.sampled_from([{}, {"total_tokens": 9, "total_sequences": 3}]))
    x.responses = Responses(x.log_odds, x.mask, **totals)
    if data.draw(st.booleans()):
        x.packed()
        x.responses = x.responses._replace(**totals)
    (loss, metrics), (wanted, told) = case(x), case(x, reference)
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=1e-12)
    assert_metrics(metrics, told, 1e-12)
    torch.testing.assert_close(x.gradient(loss), x.gradient(wanted), rtol=0, atol=1e-12)


def divisors(x: Batch, reduction: str) -> Tensor:
    """1 / N, 1 / (B T) or 1 / B, (B, T)."""
    lengths = x.mask.sum(-1, keepdim=True).double()
    one = {"token_mean": x.mask.sum(), "sequence_sum": len(x.mask)}
    divisor = one.get(reduction, lengths * len(x.mask))
    return x.mask.double() / divisor


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_clipped_gradient_is_the_stated_one(level, reduction):
    x = Batch(8, 5)
    loss, metrics = clipped_ratio_loss(
        x.responses, x.advantages, x.sampler_logps, level=level, reduction=reduction
    )
    p, a = torch.sigmoid(x.log_odds.detach()), x.advantages[:, None]
    logs = torch.where(x.mask, p.log() - x.sampler_logps, 0)
    if level == "sequence":
        logs = logs.sum(-1, keepdim=True) / x.mask.sum(-1, keepdim=True)
    r = logs.exp()
    clipped = ((a > 0) & (r > 1.2)) | ((a < 0) & (r < 0.8))
    wanted = -r * a * (1 - p) * divisors(x, reduction) * ~clipped
    torch.testing.assert_close(x.gradient(loss), wanted, rtol=1e-12, atol=1e-14)
    assert (x.gradient(loss)[clipped.expand_as(p)] == 0).all()
    counted = x.mask if level == "token" else torch.ones_like(a, dtype=torch.bool)
    share = float(clipped[counted].double().mean())
    assert float(metrics["ratios/clipped"]) == pytest.approx(share, abs=1e-12)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("penalty", ["log_prob", "unlikelihood"])
def test_reinforce_gradients_are_the_stated_ones(penalty, reduction):
    x = Batch()
    p = torch.sigmoid(x.log_odds.detach())
    w = torch.exp(p.log() - x.sampler_logps).clamp(max=1.1)
    assert ((w == 1.1) & x.mask).any() and ((w < 1.1) & x.mask).any()
    options = {"max_weight": 1.1, "reduction": reduction}
    loss, _ = reinforce_loss(x.responses, x.advantages, x.sampler_logps, **options)
    over = divisors(x, reduction)
    wanted = -w * x.advantages[:, None] * (1 - p) * over
    torch.testing.assert_close(x.gradient(loss), wanted, rtol=1e-12, atol=1e-14)
    loss, _ = weighted_reinforce_loss(
        x.responses, x.correct, x.sampler_logps, penalty=penalty, **options
    )
    wrong = 1 - p if penalty == "log_prob" else p
    wanted = torch.where(x.correct[:, None], -0.1 * (1 - p), wrong) * w * over
    torch.testing.assert_close(x.gradient(loss), wanted, rtol=1e-12, atol=1e-14)


# a difference quotient does not hold the weights constant
SMOOTH = [c for c in CASES if "sampler_logps" not in c.inputs or c.name == "clipped_ratio_loss"]


@pytest.mark.parametrize("case", SMOOTH, ids=str)
def test_gradcheck(case):
    x = Batch(3, 3)
    x.sampler_logps = label_logps(x.log_odds).detach() + torch.randn(3, 3).sign() * 0.05

    def loss(m: Tensor) -> Tensor:
        x.responses = Responses(m, x.mask)
        return case(x)[0]

    assert torch.autograd.gradcheck(loss, x.log_odds)
    assert torch.autograd.gradgradcheck(loss, x.log_odds)


def test_numbers_by_hand():
    """p = 1/2 and 3/4 against 1/4 and 3/4 of the sampler: ratios 2 and 1."""
    m = torch.tensor([[0.0, math.log(3)], [0.0, math.log(3)]], dtype=torch.float64)
    sampled = Responses(m, torch.ones(2, 2, dtype=torch.bool))
    mu = torch.tensor([[1 / 4, 3 / 4]] * 2, dtype=torch.float64).log()
    advantages = torch.tensor([1.0, -3.0], dtype=torch.float64)
    loss, metrics = clipped_ratio_loss(sampled, advantages, mu, epsilon_high=0.28)
    assert float(loss) == pytest.approx((-1.28 - 1 + 6 + 3) / 4, rel=1e-14)
    wanted = {
        "ratios/mean": 1.5,
        "ratios/beyond_0.1": 0.5,
        "ratios/clipped": 0.25,
        "ratios/clipped_low": 0.0,
        "kl/sampler": (1 - math.log(2)) / 2,
        "tokens/outside_support": 0.0,
    }
    assert {k: float(v) for k, v in metrics.items()} == pytest.approx(wanted, rel=1e-12, abs=1e-15)
    loss, _ = clipped_ratio_loss(sampled, advantages, mu, delta=1.5)
    assert float(loss) == pytest.approx((-1.2 - 1 + 4.5 + 3) / 4, rel=1e-14)
    loss, metrics = clipped_ratio_loss(
        sampled, advantages, mu, level="sequence", reduction="sequence_mean"
    )
    assert float(loss) == pytest.approx((-1.2 + 3 * 2**0.5) / 2, rel=1e-14)
    assert float(metrics["ratios/mean"]) == pytest.approx(2**0.5, rel=1e-14)
    loss, _ = reinforce_loss(sampled, advantages, mu, max_weight=1.5)
    logs = 1.5 * math.log(2) + math.log(4 / 3)
    assert float(loss) == pytest.approx((1 - 3) * logs / 4, rel=1e-14)


def test_sides_are_the_losses_of_their_names():
    """PSR is `mle_loss` of the right responses, NSR `mate_penalty` of the wrong or unlikelihood."""
    x = Batch()
    right = Responses(x.log_odds, x.mask & x.correct[:, None], total_tokens=int(x.mask.sum()))
    wrong = right._replace(mask=x.mask & ~x.correct[:, None])
    only = {"positive_weight": 0.0}
    for options, wanted in (
        ({"positive_weight": 1.0, "negative_weight": 0.0}, fastadapt.mle_loss(right)),
        (only, fastadapt.mate_penalty(wrong)),
        (only | {"penalty": "unlikelihood"}, fastadapt.unlikelihood_penalty(wrong)),
    ):
        loss, _ = weighted_reinforce_loss(x.responses, x.correct, **options)
        torch.testing.assert_close(loss, wanted, rtol=1e-13, atol=0)
    rewards = torch.where(x.correct, 0.1, -1.0)
    weighted, _ = weighted_reinforce_loss(x.responses, x.correct, x.sampler_logps)
    torch.testing.assert_close(weighted, reinforce_loss(x.responses, rewards, x.sampler_logps)[0])


def test_on_policy_all_have_the_gradient_of_reinforce():
    x = Batch()
    mu = label_logps(x.log_odds)
    plain = x.gradient(reinforce_loss(x.responses, x.advantages, reduction="sequence_mean")[0])
    for level in ("token", "sequence"):
        loss, metrics = clipped_ratio_loss(
            x.responses, x.advantages, mu, level=level, reduction="sequence_mean"
        )
        torch.testing.assert_close(x.gradient(loss), plain, rtol=1e-12, atol=1e-14)
        assert float(metrics["ratios/mean"]) == 1 and float(metrics["kl/sampler"]) == 0


class _Lists(dict):
    """A defaultdict of lists."""

    def __missing__(self, key):
        self[key] = []
        return self[key]


def loss_of_trl(x: Batch, loss_type: str, **options: Any) -> tuple[Tensor, dict[str, list[float]]]:
    """Through trl's own `GRPOTrainer._compute_loss`, with a trainer of a few attributes."""
    trl = pytest.importorskip("trl.trainer.grpo_trainer", reason="trl is not installed")
    logps = label_logps(x.log_odds)

    def unchanged(value, reduction="sum"):
        return value

    metrics = {"train": _Lists(), "eval": _Lists()}
    stub = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logps, torch.zeros_like(logps), None),
        accelerator=SimpleNamespace(gather=unchanged, reduce=unchanged, num_processes=1),
        args=SimpleNamespace(
            delta=options.get("delta"), steps_per_generation=1, use_bias_correction_kl=False
        ),
        loss_type=loss_type, beta=0.0, epsilon_low=0.2, epsilon_high=options["epsilon_high"],
        importance_sampling_level=options.get("level", "token"),
        off_policy_mask_threshold=None, top_entropy_quantile=1.0, use_vllm=False,
        current_gradient_accumulation_steps=1, max_completion_length=9,
        aux_loss_enabled=False, _entropy_bonus_enabled=False,
        model=SimpleNamespace(training=True), _metrics=metrics,
    )  # fmt: skip
    ids = torch.zeros_like(x.mask, dtype=torch.int64)
    inputs = {
        "prompt_ids": ids, "prompt_mask": ids, "completion_ids": ids,
        "completion_mask": x.mask.long(), "advantages": x.advantages,
        "old_per_token_logps": x.sampler_logps, "num_items_in_batch": x.mask.sum(),
    }  # fmt: skip
    return trl.GRPOTrainer._compute_loss(stub, None, inputs), metrics["train"]


@pytest.mark.parametrize("delta", [None, 1.5])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(
    ("theirs", "reduction", "total"),
    [
        ("grpo", "sequence_mean", None),
        ("bnpo", "token_mean", None),
        ("dapo", "token_mean", None),
        ("dr_grpo", "token_mean", 8 * 9),
        ("luspo", "sequence_sum", None),
    ],
)
def test_is_the_loss_of_trl(theirs, reduction, total, level, delta):
    x = Batch(8)
    options = {"epsilon_high": 0.28, "level": level, "delta": delta}
    wanted, logged = loss_of_trl(x, theirs, **options)
    sampled = x.responses._replace(total_tokens=total)
    loss, metrics = clipped_ratio_loss(
        sampled, x.advantages, x.sampler_logps, reduction=reduction, **options
    )
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x.gradient(loss), x.gradient(wanted), rtol=0, atol=1e-12)
    (low,) = logged["clip_ratio/low_mean"]
    assert float(metrics["ratios/clipped_low"]) == pytest.approx(low, abs=1e-6)
    if delta is None:  # what delta holds is not in trl's shares
        (share,) = logged["clip_ratio/region_mean"]
        assert float(metrics["ratios/clipped"]) == pytest.approx(share, abs=1e-6)
        assert share > 0 or level == "sequence"


def test_reinforce_is_the_cispo_of_trl():
    x = Batch(8)
    wanted, _ = loss_of_trl(x, "cispo", epsilon_high=1.1)
    loss, _ = reinforce_loss(x.responses, x.advantages, x.sampler_logps, max_weight=1.1)
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x.gradient(loss), x.gradient(wanted), rtol=0, atol=1e-12)


def one(m: float, dtype: torch.dtype = torch.float32) -> Responses:
    leaf = torch.tensor([[m]], dtype=dtype, requires_grad=True)
    return Responses(leaf, torch.ones(1, 1, dtype=torch.bool))


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("m", [INF, 200.0, 30.0, 0.0, -1e4, -3e38, -INF])
@pytest.mark.parametrize("mu", [-1e30, -9999.0, -1.0, 0.0, 1e4])
@pytest.mark.parametrize("advantage", [2.0, 0.0, -2.0])
def test_ratios_far_off(advantage, mu, m, level):
    """Where a bound or an advantage of 0 holds the loss, its gradient is 0 and not inf * 0."""
    sampled, mu = one(m), torch.tensor([[mu]])
    call = (sampled, torch.tensor([advantage]), mu)
    log = float(label_logps(sampled.log_odds.detach()) - mu)
    held = advantage == 0 or log > 0.2 if advantage >= 0 else log < -0.3
    for delta in (None, 3.0):
        loss, metrics = clipped_ratio_loss(*call, level=level, delta=delta)
        (gradient,) = torch.autograd.grad(loss, sampled.log_odds)
        assert not loss.isnan() and not gradient.isnan().any()
        if delta is not None:
            assert loss.isfinite() and gradient.isfinite().all()
            held = held or (advantage < 0 and log > 1.2)
        if held or math.isinf(m):
            assert (gradient == 0).all()
        if m == -INF or advantage == 0:
            assert loss == 0
        assert int(metrics["tokens/outside_support"]) == (m == -INF)
        assert not any(value.isnan() for value in metrics.values())
    correct = torch.tensor([advantage > 0])
    for loss, _ in (
        reinforce_loss(sampled, torch.tensor([advantage]), mu),
        weighted_reinforce_loss(sampled, correct, mu),
        weighted_reinforce_loss(sampled, correct, mu, penalty="unlikelihood"),
    ):
        (gradient,) = torch.autograd.grad(loss, sampled.log_odds)
        assert loss.isfinite() and gradient.isfinite().all()
        assert (gradient == 0).all() or m not in (INF, -INF)


def test_a_token_outside_does_not_stop_its_response():
    """The ratio of a response is over those inside; divisors count all of its tokens."""
    m = torch.tensor([[0.0, -INF, 1.0]], dtype=torch.float64, requires_grad=True)
    mu = torch.tensor([[-1.0, -0.5, -0.2]], dtype=torch.float64)
    sampled = Responses(m, torch.ones(1, 3, dtype=torch.bool))
    advantages = torch.tensor([-1.0])
    loss, metrics = clipped_ratio_loss(sampled, advantages, mu, level="sequence", epsilon=1.0)
    logs = label_logps(m.detach())[0] - mu[0]
    s = float(((logs[0] + logs[2]) / 2).exp())
    assert loss.item() == pytest.approx(2 / 3 * s, rel=1e-14)
    assert float(metrics["ratios/mean"]) == pytest.approx(s, rel=1e-14)
    (gradient,) = torch.autograd.grad(loss, m)
    assert gradient[0, 1] == 0 and (gradient[0, ::2] > 0).all()


def test_bounds_are_inclusive():
    """A ratio of exactly 1 moves under epsilon = 0, upwards and downwards."""
    for advantage in (1.0, -1.0):
        sampled = one(0.0, torch.float64)
        mu = label_logps(sampled.log_odds.detach())
        loss, metrics = clipped_ratio_loss(sampled, torch.tensor([advantage]), mu, epsilon=0.0)
        (gradient,) = torch.autograd.grad(loss, sampled.log_odds)
        assert float(gradient) == pytest.approx(-advantage / 2)
        assert float(metrics["ratios/clipped"]) == 0


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_bounds_beyond_the_dtype_are_none(advantage):
    """In float32; an importance weight stays finite."""
    sampled, advantages = one(0.0), torch.tensor([advantage])
    mu = label_logps(sampled.log_odds.detach()) - 2
    for level in ("token", "sequence"):
        loss, metrics = clipped_ratio_loss(
            sampled, advantages, mu, epsilon_high=1e300, delta=2e300, level=level
        )
        assert loss.item() == pytest.approx(-advantage * math.exp(2), rel=1e-6)
        assert float(metrics["ratios/clipped"]) == 0
    for off, wanted in ((0.0, math.exp(2)), (200.0, torch.finfo(torch.float32).max)):
        loss, metrics = reinforce_loss(sampled, advantages, mu - off, max_weight=1e300)
        assert loss.item() == pytest.approx(advantage * wanted * math.log(2), rel=1e-6)
        assert float(metrics["ratios/truncated"]) == (off > 0)


@each_case
def test_nothing_that_counts_is_zero_with_a_graph(case):
    for shape in ((0, 0), (0, 3), (2, 0), (2, 3)):
        x = Batch(*shape)
        x.mask[:] = False
        with torch.no_grad():
            x.log_odds[:] = NAN
        loss, metrics = case(x)
        assert loss == 0 and (x.gradient(loss) == 0).all()
        assert all(value == 0 for value in metrics.values())


@each_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves_are_summed_in_float32(case, dtype):
    x = Batch(5, 7)
    x.log_odds = x.log_odds.detach().to(dtype).requires_grad_()
    x.sampler_logps, x.advantages = x.sampler_logps.to(dtype), x.advantages.to(dtype)
    x.token_advantages = x.token_advantages.to(dtype)
    x.responses = Responses(x.log_odds, x.mask)
    loss, _ = case(x)
    assert loss.dtype == torch.float32 and x.gradient(loss).dtype == dtype
    x.responses = Responses(x.log_odds.double(), x.mask)
    torch.testing.assert_close(loss, case(x)[0].float(), rtol=1e-5, atol=1e-6)


@each_case
def test_micro_batches_add_up(case):
    x = Batch(5)
    whole = case(x)[0]
    totals = {"total_tokens": x.mask.sum(), "total_sequences": 5}
    parts = []
    for rows in (slice(0, 2), slice(2, 5)):
        part = SimpleNamespace(**{name: getattr(x, name)[rows] for name in case.inputs})
        part.responses = Responses(x.log_odds[rows], x.mask[rows], **totals)
        parts.append(case(part)[0])
    torch.testing.assert_close(sum(parts), whole, rtol=1e-12, atol=1e-14)


@each_case
def test_sampler_and_advantages_are_held_constant(case):
    x = Batch()
    names = [name for name in case.inputs if name != "correct"]
    for name in names:
        setattr(x, name, getattr(x, name).requires_grad_())
    leaves = [getattr(x, name) for name in names]
    gradients = torch.autograd.grad(case(x)[0], [x.log_odds, *leaves], allow_unused=True)
    assert gradients[0] is not None and gradients[1:] == (None,) * len(leaves)


@each_case
def test_compiles_without_a_graph_break(case):
    x = Batch(dtype=torch.float32)
    torch.compiler.reset()

    def loss(m: Tensor) -> Tensor:
        given = [getattr(x, name) for name in case.inputs]
        function = getattr(fastadapt, case.name)
        return function(Responses(m, x.mask), *given, **case.options)[0]

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for f in (compiled, loss):
        x.log_odds.grad = None
        f(x.log_odds).backward()
        x.results = [*getattr(x, "results", []), x.log_odds.grad]
    torch.testing.assert_close(*x.results, rtol=1e-6, atol=1e-7)


def test_packed_advantages_as_many_as_responses_are_one_a_response():
    ids = torch.tensor([1, 0, 0])
    sampled = Responses(torch.zeros(3), segments=ids, num_segments=3)
    loss, _ = reinforce_loss(sampled, torch.tensor([1.0, 2.0, 4.0]), reduction="sequence_sum")
    assert float(loss) == pytest.approx((2 * 1 + 2) * math.log(2) / 2)


def test_on_the_support_the_first_ratio_is_1():
    """On the whole vocabulary it is the mass that top-p kept."""
    torch.manual_seed(3)
    adaptor = Adaptor(temperature=0.8, top_p=0.7)
    hidden, head = torch.randn(6, 10, 16), torch.randn(50, 16).requires_grad_()
    logits = (hidden @ head.t()).detach()
    drawn = sample(logits, adaptor, seeds=torch.arange(60).view(6, 10), log_mass=True)
    support = Support.from_mask(filter_logits(logits.flatten(0, 1), adaptor) > -INF)
    scale = {"logit_scale": 1 / 0.8}
    on_support = linear_support_log_odds(hidden, head, drawn.tokens, support, **scale)
    dense = linear_log_odds(hidden, head, drawn.tokens, **scale)
    advantages = torch.randn(6)
    mean = {}
    for name, m in (("support", on_support), ("vocabulary", dense)):
        sampled = Responses.from_labels(m, drawn.tokens)
        loss, metrics = clipped_ratio_loss(sampled, advantages, drawn.logprobs)
        assert torch.autograd.grad(loss, head)[0].isfinite().all()
        mean[name] = float(metrics["ratios/mean"])
        assert float(metrics["tokens/outside_support"]) == 0
    assert mean["support"] == pytest.approx(1, abs=1e-5)
    assert mean["vocabulary"] == pytest.approx(float(drawn.log_mass.exp().mean()), abs=1e-5)
    assert mean["vocabulary"] < 0.95


ONE = Responses(torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool))
FLAT = Responses(torch.zeros(4), segments=torch.tensor([0, 0, 1, -1]))
MU, A = torch.zeros(2, 3), torch.zeros(2)


@pytest.mark.parametrize(
    ("name", "given", "options", "error", "message"),
    [
        ("clipped_ratio_loss", (MU, A, MU), {}, TypeError, "sampled: expected Responses, got Ten"),
        (
            "clipped_ratio_loss",
            (ONE, A, MU[:1]),
            {},
            ValueError,
            "sampler_logps: expected shape (2",
        ),
        ("clipped_ratio_loss", (ONE, A, None), {}, TypeError, "sampler_logps: expected a Tensor"),
        (
            "clipped_ratio_loss",
            (ONE, A, MU.long()),
            {},
            TypeError,
            "sampler_logps: expected float3",
        ),
        (
            *("clipped_ratio_loss", (ONE, torch.zeros(3), MU), {}, ValueError),
            "advantages: expected shape (2,) or (2, 3), got (3,)",
        ),
        (
            *("clipped_ratio_loss", (ONE, A[:, None], MU), {}, ValueError),
            "advantages: expected shape (2,) or (2, 3), got (2, 1)",
        ),
        (
            *("clipped_ratio_loss", (ONE, MU, MU), {"level": "sequence"}, ValueError),
            "advantages: expected shape (2,), got (2, 3)",
        ),
        (
            *("clipped_ratio_loss", (FLAT, torch.zeros(3), torch.zeros(4)), {}, ValueError),
            "advantages: expected shape (2,) or (4,), got (3,)",
        ),
        (
            "clipped_ratio_loss",
            (ONE, 1.0, MU),
            {},
            TypeError,
            "advantages: expected a Tensor, got f",
        ),
        (
            "clipped_ratio_loss",
            (ONE, A.long(), MU),
            {},
            TypeError,
            "advantages: expected float32, f",
        ),
        (
            "clipped_ratio_loss",
            (ONE, MU.long(), MU),
            {},
            TypeError,
            "advantages: expected float32,",
        ),
        (
            *("clipped_ratio_loss", (ONE, A.to("meta"), MU), {}, ValueError),
            "advantages: expected device cpu, got meta",
        ),
        (
            *("clipped_ratio_loss", (ONE, A, MU), {"epsilon": 1.5}, ValueError),
            "epsilon: expected a value in [0, 1], got 1.5",
        ),
        (
            "clipped_ratio_loss",
            (ONE, A, MU),
            {"epsilon": -0.1},
            ValueError,
            "epsilon: expected a val",
        ),
        (
            *("clipped_ratio_loss", (ONE, A, MU), {"epsilon_high": "0.3"}, TypeError),
            "epsilon_high: expected a number, got '0.3'",
        ),
        (
            *("clipped_ratio_loss", (ONE, A, MU), {"delta": 1.1}, ValueError),
            "delta: expected a value > 1 + epsilon_high = 1.2, got 1.1",
        ),
        (
            *("clipped_ratio_loss", (ONE, A, MU), {"level": "response"}, ValueError),
            "level: expected one of token, sequence, got 'response'",
        ),
        (
            *("clipped_ratio_loss", (ONE, A, MU), {"reduction": "mean"}, ValueError),
            "reduction: expected one of token_mean, sequence_mean, sequence_sum, got 'mean'",
        ),
        (
            "reinforce_loss",
            (ONE, A[:1]),
            {},
            ValueError,
            "advantages: expected shape (2,) or (2, 3)",
        ),
        (
            "reinforce_loss",
            (ONE, A, A),
            {},
            ValueError,
            "sampler_logps: expected shape (2, 3), got",
        ),
        (
            *("reinforce_loss", (ONE, A), {"max_weight": 0}, ValueError),
            "max_weight: expected a value > 0, got 0",
        ),
        (
            *("weighted_reinforce_loss", (ONE, A), {}, TypeError),
            "correct: expected a tensor of torch.bool, got torch.float32",
        ),
        (
            *("weighted_reinforce_loss", (ONE, A[:1] > 0), {}, ValueError),
            "correct: expected shape (2,), got (1,)",
        ),
        (
            *("weighted_reinforce_loss", (ONE, [True, False]), {}, TypeError),
            "correct: expected a Tensor, got list",
        ),
        (
            *("weighted_reinforce_loss", (ONE, A > 0), {"penalty": "unlikelyhood"}, ValueError),
            "penalty: expected one of log_prob, unlikelihood, got 'unlikelyhood'; did you mean",
        ),
        (
            *("weighted_reinforce_loss", (ONE, A > 0), {"positive_weight": -1}, ValueError),
            "positive_weight: expected a value >= 0, got -1",
        ),
    ],
)
def test_arguments_are_checked(name, given, options, error, message):
    with pytest.raises(error) as raised:
        getattr(fastadapt, name)(*given, **options)
    assert str(raised.value).startswith(message)
