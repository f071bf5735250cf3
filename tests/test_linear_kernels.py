"""The linear head for CUDA under Triton's interpreter, against the CPU: values, gradients, plans.

The driver and the kernels are those of a GPU; only cuBLAS's products, float32 of half precision,
are replaced, and the interpreter's conversion to half precision, which cuts off, by torch's.
"""

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from fastadapt import reference
from fastadapt._ops.linear import tiles
from fastadapt._ops.linear.cpu import CpuWork
from fastadapt._ops.linear.cuda import CudaWork, backward_tile
from fastadapt._ops.linear.driver import (
    FORWARD_ONLY,
    FROZEN_HEAD,
    RECOMPUTE,
    Asked,
    Upstream,
    backward,
    forward,
    frozen_head_backward,
    jacobian_rows,
)
from fastadapt._ops.linear.mle import Terms, sum_of_losses
from fastadapt._ops.linear.tiles import Gains, Problem
from fastadapt._ops.linear.values import Listed

pytest.importorskip("triton", reason="triton is not installed: it has wheels for Linux")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("a GPU is there: the tests marked gpu run these kernels", allow_module_level=True)

from fastadapt._ops.triton.linear import launch as launch_linear  # noqa: E402  (the interpreter is chosen before)

# of rows that hold NaN or infinities, where the interpreter is NumPy
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
INF, NAN = float("inf"), float("nan")
N, V, TILE, ROWS = 7, 150, 64, 4  # of rows and of tiles a part is left
OUTPUTS = ("entropy", "logsumexp", "hit")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = {
    "plain": {},
    "scaled": {"logit_scale": 0.3},
    "capped": {"softcap": 5.0, "logit_scale": 1.5},
}
KEPT = {"recompute": 0, "kept": 1 << 30, "half_kept": N * 130 * 4, "frozen": 0}


class Interpreted(CudaWork):
    """Small sizes, products without cuBLAS."""

    tile, rows = TILE, ROWS
    gradient_width = TILE

    def backward_tile(self) -> int:
        """As asked."""
        return self.gradient_width

    def product(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        """Float32 of half precision."""
        out.copy_(a.to(out.dtype) @ b.to(out.dtype))

    def add_product(self, sums: Tensor, a: Tensor, b: Tensor) -> None:
        """The same."""
        sums += a.to(sums.dtype) @ b.to(sums.dtype)


class Narrow(Interpreted):
    """Tiles of the backward that are parts of those of the forward."""

    gradient_width = TILE // 4


@pytest.fixture(autouse=True)
def _rounded_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the launches write in half precision is float32 first, and then rounded."""
    sum_tile, gradient_tile, set_labels, mix = (
        getattr(launch_linear, name) for name in ("sum_tile", "gradient_tile", "set_labels", "mix")
    )

    def rounded_sum_tile(rows: Any, stats: Tensor, **given: Any) -> None:
        kept, mass, dtype = given.get("kept"), given.get("mass"), rows.products.dtype
        wide_kept = None if kept is None else kept.to(dtype)
        wide_mass = None if mass is None else (mass[0], mass[1].to(dtype), mass[2])
        sum_tile(rows, stats, **(given | {"kept": wide_kept, "mass": wide_mass}))
        if kept is not None and wide_kept is not None:
            kept.copy_(wide_kept)
        if mass is not None and wide_mass is not None:
            mass[1].copy_(wide_mass[1])

    def rounded_gradient_tile(rows: Any, stats: Tensor, gains: Gains, out: Tensor) -> None:
        wide = torch.empty(out.shape, dtype=torch.promote_types(out.dtype, torch.float32))
        gradient_tile(rows, stats, gains, wide)
        out.copy_(wide)

    def rounded_set_labels(labels: Tensor, gains: Any, first: int, out: Tensor) -> None:
        wide = out.to(torch.promote_types(out.dtype, torch.float32))
        set_labels(labels, gains, first, wide)
        out.copy_(wide)

    def rounded_mix(sums: Tensor, out: Tensor, **given: Any) -> None:
        if out is sums or out.data_ptr() == sums.data_ptr():
            mix(sums, out, **given)
            return
        wide = out.to(sums.dtype)
        mix(sums, wide, **given)
        out.copy_(wide)

    monkeypatch.setattr(launch_linear, "sum_tile", rounded_sum_tile)
    monkeypatch.setattr(launch_linear, "gradient_tile", rounded_gradient_tile)
    monkeypatch.setattr(launch_linear, "set_labels", rounded_set_labels)
    monkeypatch.setattr(launch_linear, "mix", rounded_mix)


def problem(n: int, h: int, v: int, dtype: torch.dtype, bias: bool = True, **shape: Any) -> Problem:
    """Log-odds of a few nats, some rows ignored."""
    hidden, weight = torch.randn(n, h), torch.randn(v, h) * 2 / h**0.5
    labels = torch.randint(v, (n,))
    labels[2::7] = -100
    return Problem(
        hidden.to(dtype),
        weight.to(dtype),
        labels[:, None],
        torch.randn(v).to(dtype) if bias else None,
        shape.get("softcap", 0.0),
        shape.get("logit_scale", 1.0),
        -100,
        None,
        None,
    )


def with_adapter(given: Problem, dtype: torch.dtype, r: int = 3) -> Problem:
    """The same with an adapter, whose logits are a few nats too."""
    states = torch.randn(len(given.hidden), r) * 2 / r**0.5
    weight = torch.randn(len(given.weight), r)
    return given._replace(low_states=states.to(dtype), low_weight=weight.to(dtype))


def exact_problem(n: int, h: int, v: int, dtype: torch.dtype) -> Problem:
    """Small multiples of a power of two: products have the same bits in whatever order they add."""
    given = problem(n, h, v, dtype)
    hidden, weight = torch.randint(-8, 9, (n, h)) / 8, torch.randint(-8, 9, (v, h)) / 8
    bias = torch.randint(-16, 17, (v,)) / 16
    return given._replace(hidden=hidden.to(dtype), weight=weight.to(dtype), bias=bias.to(dtype))


def scored(work: type, given: Problem, plan: int, kept: int = 0) -> tuple[Any, ...]:
    """Log-odds of one label a row, and what the forward returns."""
    out = forward(work, given, Asked(plan, kept, True, False))
    log_odds = Listed(*out[:3]).set_log_odds()
    wide = torch.promote_types(given.hidden.dtype, torch.float32)
    return torch.where(given.used, log_odds, 0.0).to(wide), out


def results(work: type, given: Problem, plan: str, upstream: Tensor) -> dict[str, Tensor]:
    """Log-odds, statistics of the rows that count, and the gradients that the plan has."""
    number = FROZEN_HEAD if plan == "frozen" else RECOMPUTE
    log_odds, (own, others, moments, stats, kept) = scored(work, given, number, KEPT[plan])
    out = {"log_odds": log_odds, "stats": stats}
    leaves = own.clone().requires_grad_(), others.clone().requires_grad_()
    of_leaves = torch.where(given.used, Listed(*leaves, moments).set_log_odds(), 0.0)
    by = Upstream(*torch.autograd.grad(of_leaves, leaves, upstream.double()), None)
    if plan == "frozen":
        for name, rows in zip(("dhidden", "dlow"), jacobian_rows(kept, *given.sizes), strict=False):
            out[name] = frozen_head_backward(work, given, by, own, stats, rows, False)
        return out
    wanted = [True, True, given.bias is not None]
    gradients = backward(work, given, by, own, stats, kept, wanted)
    names = ("dhidden", "dweight", "dbias", "dlow", "dlow_weight")[: 3 if given.low is None else 5]
    return out | dict(zip(names, gradients, strict=False))


def truth(given: Problem, upstream: Tensor) -> dict[str, Tensor]:
    """In float64."""
    tensors = (given.hidden, given.weight, given.bias, *(given.low or ()))
    hidden, weight, bias, *low = leaves = [x.double().requires_grad_() for x in tensors]
    if low:  # as further columns of states and weight
        hidden, weight = torch.cat([hidden, low[0]], 1), torch.cat([weight, low[1]], 1)
    log_odds = reference.linear_log_odds(
        hidden, weight, given.labels[:, 0], bias, softcap=given.softcap or None,
        logit_scale=given.logit_scale,
    )  # fmt: skip
    gradients = torch.autograd.grad(log_odds, leaves, upstream.double())
    names = ("log_odds", "dhidden", "dweight", "dbias", "dlow", "dlow_weight")[: 1 + len(leaves)]
    return dict(zip(names, (log_odds.detach(), *gradients), strict=True))


CASES = [(plan, shape, Interpreted) for plan in KEPT for shape in SHAPES]
CASES += [(plan, "capped", Narrow) for plan in KEPT if plan != "frozen"]


@pytest.mark.parametrize(("plan", "shape", "work"), CASES)
def test_float_heads_equal_the_cpu(plan, shape, work):
    """Within float32 rounding, of the sums and of products in another order; float64 in its own."""
    types = {torch.float32: 1e-5} | ({torch.float64: 1e-12} if shape == "capped" else {})
    for dtype, rtol in types.items():
        given, upstream = problem(N, 12, V, dtype, **SHAPES[shape]), torch.randn(N)
        ours, wanted = (results(w, given, plan, upstream) for w in (work, CpuWork))
        assert ours.keys() == wanted.keys()
        for name, x in ours.items():
            assert x.dtype == wanted[name].dtype
            torch.testing.assert_close(x, wanted[name], rtol=rtol, atol=rtol / 3, msg=name)


@pytest.mark.parametrize("plan", KEPT)
@pytest.mark.parametrize(
    ("dtype", "shape"),
    [(torch.bfloat16, "plain"), (torch.bfloat16, "capped"), (torch.float16, "capped")],
    ids=str,
)
def test_errors_of_half_types_are_no_more_than_those_of_the_cpu(plan, shape, dtype):
    """Nothing is rounded before a log-sum-exp: log-odds have float32's error alone.

    Gradients have that of rounded exponentials, as on the CPU; of so few entries it varies.
    """
    assert_errors_are_no_more(problem(N, 32, V, dtype, **SHAPES[shape]), plan)


@pytest.mark.parametrize("plan", KEPT)
@pytest.mark.parametrize("work", (Interpreted, CpuWork))
def test_a_float32_head_is_cast_tile_by_tile(plan, work, monkeypatch):
    """The bits of its cast; its own gradient is float32, and on CUDA not rounded before."""
    monkeypatch.setattr(tiles, "CAST_ROWS", 3)  # labels in blocks
    given, upstream = problem(N, 12, V, torch.bfloat16, softcap=5.0), torch.randn(N)
    master = given._replace(weight=given.weight.float())
    ours, wanted = (results(work, some, plan, upstream) for some in (master, given))
    for name, x in wanted.items():
        assert torch.equal(ours[name].to(x.dtype), x), name
    if plan != "frozen":
        assert ours["dweight"].dtype == torch.float32
        rounded = torch.equal(ours["dweight"], wanted["dweight"].float())
        assert rounded == (work is CpuWork)


def assert_errors_are_no_more(given: Problem, plan: str) -> None:
    """Than the CPU's, in half precision."""
    upstream = torch.randn(N)
    ours, cpu = (results(work, given, plan, upstream) for work in (Interpreted, CpuWork))
    exact = truth(given, upstream)
    torch.testing.assert_close(ours["log_odds"].double(), exact["log_odds"], rtol=1e-5, atol=2e-6)
    for name in ours.keys() & exact.keys():
        error, allowed = (
            (x.double() - exact[name]).norm() / exact[name].norm() for x in (ours[name], cpu[name])
        )
        assert error <= 1.3 * allowed, name


@pytest.mark.parametrize(("plan", "shape", "work"), CASES)
def test_adapters_equal_the_cpu(plan, shape, work):
    """In float32 and float64, with a head's blocks of rows and tiles."""
    for dtype, rtol in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        given = with_adapter(problem(N, 12, V, dtype, **SHAPES[shape]), dtype)
        upstream = torch.randn(N)
        ours, wanted = (results(w, given, plan, upstream) for w in (work, CpuWork))
        exact = truth(given, upstream)
        assert ours.keys() == wanted.keys() and "dlow" in ours
        for name, x in ours.items():
            assert x.dtype == wanted[name].dtype
            torch.testing.assert_close(x, wanted[name], rtol=rtol, atol=rtol, msg=name)
            if dtype == torch.float64 and name in exact:
                torch.testing.assert_close(x, exact[name], rtol=1e-11, atol=1e-12, msg=name)


@pytest.mark.parametrize("plan", KEPT)
@pytest.mark.parametrize("lora_dtype", (torch.float32, torch.bfloat16), ids=str)
def test_adapters_of_half_heads(plan, lora_dtype):
    """Nothing is rounded before a log-sum-exp, and no error is larger than the CPU's."""
    given = problem(N, 32, V, torch.bfloat16, softcap=5.0)
    assert_errors_are_no_more(with_adapter(given, lora_dtype, 32), plan)


@pytest.mark.parametrize("adapter", (False, True), ids=("plain", "adapter"))
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_a_row_depends_on_no_other(dtype, adapter):
    """Log-odds to the last bit: alone, among others, in another block of rows, and again.

    Of the same logits, that is: torch's products of other rows may round otherwise.
    """
    given = exact_problem(11, 16, V, dtype)
    if adapter:
        states, weight = torch.randint(-8, 9, (11, 2)) / 8, torch.randint(-8, 9, (V, 2)) / 8
        given = given._replace(low_states=states, low_weight=weight)
    whole, (*_, stats, _) = scored(Interpreted, given, FORWARD_ONLY)
    for rows in ([5], [0, 5, 10, 6, 2], list(range(10, 3, -1)), list(range(11))):
        part = given._replace(hidden=given.hidden[rows], labels=given.labels[rows])
        if adapter:
            part = part._replace(low_states=given.low_states[rows])
        log_odds, (*_, some, _) = scored(Interpreted, part, FORWARD_ONLY)
        assert torch.equal(log_odds, whole[rows])
        assert torch.equal(some, stats[rows])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("plan", KEPT)
def test_several_labels_and_moments_equal_the_cpu(plan, shape):
    """Labels that are -inf in the products, and gradients of everything that the plan has."""
    given = problem(N, 12, V, torch.float32, **SHAPES[shape])
    labels = torch.stack([given.labels[:, 0], *torch.randint(V, (2, N))], 1)
    labels[1, 2], labels[3, 1] = labels[1, 0], -100
    labels[0, 1] = (labels[0, 0] + 1) % V
    labels[1, 2] = (labels[1, 0] + 2) % V  # each once
    given = given._replace(labels=labels)
    frozen = plan == "frozen"
    asked = Asked(FROZEN_HEAD if frozen else RECOMPUTE, KEPT[plan], True, True)
    by = Upstream(torch.randn(N, 3).double(), torch.randn(N).double(), torch.randn(N, 2).double())
    found = []
    for work in (Interpreted, CpuWork):
        own, others, moments, stats, kept = forward(work, given, asked)
        if frozen:
            upstream = by._replace(moments=None)
            gradients = [frozen_head_backward(work, given, upstream, own, stats, kept, True)]
        else:
            gradients = backward(work, given, by, own, stats, kept, [True] * 3)
        found.append([own, others, moments, stats, *gradients])
    for ours, cpu in zip(*found, strict=True):
        torch.testing.assert_close(ours, cpu, rtol=1e-5, atol=4e-6)


MLE_WANTED = {"all": [True] * 3, "frozen": [True, False, False], "none": [False] * 3}


def mle_results(work: type, given: Problem, wanted: list[bool], terms: Terms) -> dict[str, Tensor]:
    """The sum of losses and its gradients, with blocks of as few rows as there may be."""
    names = ("loss", "dhidden", "dweight", "dbias", "dlow", "dlow_weight")
    return dict(zip(names, sum_of_losses(work, given, terms, wanted, 0), strict=True))


@pytest.mark.parametrize("wanted", MLE_WANTED)
@pytest.mark.parametrize("shape", SHAPES)
def test_sums_of_losses_equal_those_of_the_cpu(shape, wanted):
    """Three blocks of rows here, one there; the driver is the same."""
    terms = Terms(0.01, 0.0 if shape == "capped" else 0.1)
    for dtype, rtol in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        given = problem(11, 12, V, dtype, **SHAPES[shape])
        ours, again, cpu = (
            mle_results(work, given, MLE_WANTED[wanted], terms)
            for work in (Interpreted, Interpreted, CpuWork)
        )
        for name, x in ours.items():
            assert x.dtype == cpu[name].dtype
            torch.testing.assert_close(x, cpu[name], rtol=rtol, atol=rtol, msg=name)
            assert torch.equal(x, again[name])


def mle_truth(given: Problem, terms: Terms) -> dict[str, Tensor]:
    """In float64; an adapter is further columns of states and weight."""
    tensors = (given.hidden, given.weight, given.bias, *(given.low or ()))
    hidden, weight, bias, *low = leaves = [x.detach().double().requires_grad_() for x in tensors]
    if low:
        hidden, weight = torch.cat([hidden, low[0]], 1), torch.cat([weight, low[1]], 1)
    loss = reference.linear_mle_loss(
        hidden, weight, given.labels[:, 0], bias, softcap=given.softcap or None,
        logit_scale=given.logit_scale, reduction="sum", **terms._asdict(),
    )  # fmt: skip
    names = ("dhidden", "dweight", "dbias", "dlow", "dlow_weight")[: len(leaves)]
    made = dict(zip(names, torch.autograd.grad(loss, leaves), strict=True))
    return {"loss": loss.detach(), **made}


@pytest.mark.parametrize("wanted", ("all", "frozen"))
@pytest.mark.parametrize("shape", SHAPES)
def test_sums_of_losses_with_an_adapter(shape, wanted):
    """As of further columns of states and weight; both gradients are made where any is."""
    terms = Terms(0.01, 0.0 if shape == "capped" else 0.1)
    for dtype, rtol in ((torch.float32, 2e-5), (torch.float64, 1e-11)):
        given = with_adapter(problem(11, 12, V, dtype, **SHAPES[shape]), dtype)
        exact = mle_truth(given, terms)
        for work in (Interpreted, CpuWork):
            for name, x in mle_results(work, given, MLE_WANTED[wanted], terms).items():
                if x.numel():
                    truth_of_it = exact[name].to(x.dtype)
                    torch.testing.assert_close(x, truth_of_it, rtol=rtol, atol=rtol, msg=name)
                else:
                    assert wanted == "frozen" and name in ("dweight", "dbias")


@pytest.mark.parametrize("adapter", (None, torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_sums_of_half_losses_are_not_rounded(dtype, adapter):
    """The loss has float32's error alone; gradients that of logits kept in half precision.

    A kept logit is off by |z| eps / 2 at most, so an entry p of the gradient by p |z| eps / 2, and
    by eps / 2 of itself where it is rounded; norms of the factors carry that on. Products are added
    in float32.
    """
    given = problem(11, 32, V, dtype)
    if adapter is not None:
        given = with_adapter(given, adapter)
    ours = mle_results(Interpreted, given, [True] * 3, Terms(0.0, 0.0))
    exact = mle_truth(given, Terms(0.0, 0.0))
    torch.testing.assert_close(ours["loss"].double(), exact.pop("loss"), rtol=1e-5, atol=0)
    h, w, b = (x.double() for x in (given.hidden[given.used], given.weight, given.bias))
    z = h @ w.t() + b
    factors = {"dhidden": w, "dweight": h, "dbias": h.new_ones(len(h), 1)}
    if given.low is not None:
        states, weight = given.low.states[given.used].double(), given.low.weight.double()
        z += states @ weight.t()
        factors |= {"dlow": weight, "dlow_weight": states}
    p = z.softmax(-1)
    at = torch.nn.functional.one_hot(given.labels[given.used, 0], V)
    off = torch.finfo(dtype).eps / 2 * (z.abs().max() * p.norm() + (p - at).norm())
    for name, truth in exact.items():
        assert ours[name].dtype == torch.float32
        bound = off * torch.linalg.matrix_norm(factors[name], 2)
        assert (ours[name].double() - truth).norm() <= bound, name


class Counted(Interpreted):
    """Keeps how many rows its products have."""

    rows_of_products: tuple[int, ...] = ()

    def product(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        """As there."""
        type(self).rows_of_products += (a.shape[0],)
        super().product(a, b, out)


class AfterOwnProducts(Counted):
    """Of a backward whose forward summed inside a product of ours."""

    _sums_in_products = True


@pytest.mark.parametrize("adapter", (False, True), ids=("plain", "adapter"))
@pytest.mark.parametrize(("n", "few"), [(1, 2), (2, 2), (3, 4), (5, 4)])
def test_few_rows_are_filled_up_to_half_a_block(n, few, adapter, monkeypatch):
    """With a frozen head, and where the forward's products were others; else to a whole one."""
    given = problem(n, 12, V, torch.float32, softcap=5.0)
    given = given._replace(labels=given.labels.clamp(min=0))
    given = with_adapter(given, torch.float32) if adapter else given
    for plan, rows in (("frozen", few), ("recompute", 4)):
        monkeypatch.setattr(Counted, "rows_of_products", ())
        ours, cpu = (results(work, given, plan, torch.ones(n)) for work in (Counted, CpuWork))
        assert set(Counted.rows_of_products) == {rows}
        for name, x in ours.items():
            torch.testing.assert_close(x, cpu[name], rtol=1e-5, atol=1e-5, msg=name)
    monkeypatch.setattr(AfterOwnProducts, "rows_of_products", ())
    own, others, _, stats, kept = forward(Counted, given, Asked(RECOMPUTE, 0, False, False))
    by = Upstream(torch.ones(n, 1).double(), -torch.ones(n).double(), None)
    again, wanted = (
        backward(work, given, by, own, stats, kept, [True] * 3)
        for work in (AfterOwnProducts, CpuWork)
    )
    assert set(AfterOwnProducts.rows_of_products) == {few}
    for ours, cpu in zip(again, wanted, strict=True):
        torch.testing.assert_close(ours, cpu, rtol=1e-5, atol=1e-5)


def test_plans_agree_and_runs_are_the_same():
    given, upstream = problem(N, 12, V, torch.float32, softcap=7.0), torch.randn(N)
    runs = {plan: results(Interpreted, given, plan, upstream) for plan in KEPT}
    again = {plan: results(Interpreted, given, plan, upstream) for plan in KEPT}
    for plan, run in runs.items():
        for name, x in run.items():
            assert torch.equal(x, again[plan][name])
            torch.testing.assert_close(x, runs["recompute"][name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_an_upstream_gradient_of_one(dtype):
    """That of a sum: rows times 1 are written like all others."""
    given, upstream = problem(N, 12, V, dtype), torch.ones(N)
    whole = given._replace(labels=given.labels.clamp(min=0))  # none ignored
    rtol, atol = (1e-5, 1e-5) if dtype == torch.float32 else (0.03, 0.01)
    for case in (given, whole):
        for plan in KEPT:
            ours, wanted = (
                results(work, case, plan, upstream)["dhidden"] for work in (Interpreted, CpuWork)
            )
            torch.testing.assert_close(ours, wanted, rtol=rtol, atol=atol)


def test_rows_without_an_upstream_gradient_take_no_part():
    """A row that would spoil everything does not, whatever the plan."""
    given, upstream = problem(13, 12, V, torch.float32), torch.randn(13)
    upstream[[4, 11]] = 0.0
    for work in (Interpreted, CpuWork):
        for plan in KEPT:
            clean = results(work, given, plan, upstream)
            hidden = given.hidden.clone()
            hidden[4] = NAN
            spoilt = results(work, given._replace(hidden=hidden), plan, upstream)
            assert spoilt["log_odds"].isnan().tolist() == [i == 4 for i in range(13)]
            for name in clean.keys() - {"log_odds", "stats"}:
                assert torch.equal(spoilt[name], clean[name])
            assert not clean["dhidden"][[2, 4, 9, 11]].any()


def test_labels_out_of_range_are_nan_and_have_no_gradient():
    given, upstream = problem(6, 8, V, torch.float32), torch.randn(6)
    labels = given.labels.clone()
    labels[[0, 4], 0] = torch.tensor([V, -1])
    for plan in KEPT:
        out = results(Interpreted, given._replace(labels=labels), plan, upstream)
        assert out["log_odds"].isnan().tolist() == [True, False, False, False, True, False]
        assert not out["dhidden"][[0, 4]].any()
        assert not any(x.isnan().any() for name, x in out.items() if name.startswith("d"))


def test_edges():
    """One id; a bias that forbids ids and whole tiles; NaN and infinities in their own rows."""
    for plan in KEPT:
        given = problem(3, 8, 1, torch.float32)._replace(labels=torch.zeros(3, 1, dtype=torch.long))
        out = results(Interpreted, given, plan, torch.full((3,), INF))
        assert (out["log_odds"] == INF).all()
        assert not any(x.any() for name, x in out.items() if name.startswith("d"))
        given = problem(9, 8, V, torch.float32)
        given.bias[: 2 * TILE] = -INF
        given = given._replace(labels=given.labels.masked_fill(given.labels >= 0, V - 2))
        hidden = given.hidden.clone()
        hidden[1, 0], hidden[7, 3] = NAN, INF
        given = given._replace(hidden=hidden)
        ours, wanted = (results(w, given, plan, torch.randn(9)) for w in (Interpreted, CpuWork))
        ok = [0, 2, 3, 4, 5, 6, 8]
        for name in ("log_odds", "stats"):
            a, b = ours[name][ok], wanted[name][ok]
            torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)
        assert ours["log_odds"].isnan().tolist() == wanted["log_odds"].isnan().tolist()


def test_no_rows_and_nothing_but_ignored_rows():
    for n in (0, 3):
        for plan in KEPT:
            given = problem(n, 8, V, torch.bfloat16)
            given = given._replace(labels=torch.full((n, 1), -100))
            out = results(Interpreted, given, plan, torch.randn(n))
            assert all((x == 0).all() for x in out.values())
            assert out["dhidden"].shape == (n, 8)


def test_strides():
    """Heads and hidden states that are not contiguous."""
    given, upstream = problem(9, 12, V, torch.float32), torch.randn(9)
    wide = torch.zeros(9, 20)
    wide[:, 3:15] = given.hidden
    views = (
        given._replace(hidden=wide[:, 3:15]),
        given._replace(weight=given.weight.t().contiguous().t()),
    )
    for plan in ("half_kept", "frozen"):
        wanted = results(Interpreted, given, plan, upstream)
        for view in views:
            for name, x in results(Interpreted, view, plan, upstream).items():
                torch.testing.assert_close(x, wanted[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_capped_logits_are_accurate_at_every_size(dtype):
    """tanh from its series below a bound, from exponentials above it."""
    x = torch.cat([torch.logspace(-6, 1.5, 60, dtype=torch.float64), torch.tensor([0.0])])
    x = torch.cat([x, -x]).to(dtype)[None]
    stats = torch.tensor([[-INF, 0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    numbers = torch.tensor([1.0, 2.0], dtype=torch.float64)
    for i in range(x.shape[1]):  # each alone: the statistic is the logit
        each = stats.clone()
        rows = launch_linear.Rows(
            x[:, i : i + 1].contiguous(), 0, torch.tensor([[-1]]), None, numbers, True
        )
        launch_linear.sum_tile(rows, each, moments=False)
        exact = 2 * (x[0, i].double() / 2).tanh()
        assert abs(float(each[0, 0]) - exact) <= 4 * torch.finfo(dtype).eps * abs(exact)


def test_tiles_of_the_backward():
    """The gradient of a tile stays within its bytes, down to tiles of 1024 ids."""
    assert [backward_tile(n, 2) for n in (1, 4096, 8192, 16_384, 32_768, 10**6)] == [
        8192, 8192, 8192, 4096, 2048, 1024,
    ]  # fmt: skip
    assert backward_tile(16_384, 4) == 2048


def test_half_types_need_products_in_float32(monkeypatch):
    """This torch has them; one that has not is named."""
    given = problem(3, 8, V, torch.bfloat16)
    scored(Interpreted, given, FORWARD_ONLY)
    monkeypatch.setattr("fastadapt._ops.linear.cuda._has_wide_products", lambda: False)
    with pytest.raises(RuntimeError, match=r"torch: expected 2.8 or later .* got 2\."):
        scored(Interpreted, given, FORWARD_ONLY)
    scored(Interpreted, problem(3, 8, V, torch.float32), FORWARD_ONLY)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no distributed")
def test_a_group_of_one_rank_changes_nothing(tmp_path):
    """The exchange between ranks is the driver's, and tested on the CPU by test_vocab_parallel."""
    given, upstream = problem(N, 12, V, torch.float32, softcap=7.0), torch.randn(N)
    given.labels[0] = V  # nobody's
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        span, name = torch.tensor([0, V]), torch.distributed.group.WORLD.group_name
        for plan in KEPT:
            alone = results(Interpreted, given, plan, upstream)
            grouped = results(Interpreted, given._replace(span=span, group=name), plan, upstream)
            for key, x in grouped.items():
                torch.testing.assert_close(x, alone[key], rtol=1e-6, atol=1e-7, equal_nan=True)
            assert grouped["log_odds"].isnan().tolist() == [True] + [False] * (N - 1)
    finally:
        torch.distributed.destroy_process_group()
