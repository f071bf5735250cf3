"""A LoRA adapter beside a linear head: every plan against the merged head in float64, and edges."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastadapt import linear_candidate_log_odds, linear_log_odds, reference
from fastadapt._ops.linear.cpu import CpuWork
from fastadapt._ops.linear.driver import (
    FROZEN_HEAD,
    RECOMPUTE,
    Asked,
    Upstream,
    backward,
    forward,
    frozen_head_backward,
    jacobian_rows,
)
from fastadapt._ops.linear.plans import kept_bytes, number_of, plan_of
from fastadapt._ops.linear.tiles import LowRank, Problem

OPS = torch.ops.fastadapt
V, H, SCALE = 5003, 33, 1.7  # two whole tiles and a part
NAMES = ("hidden", "weight", "bias", "a", "b")
WANTED = {  # gradients of hidden, weight, bias, A and B
    "all": (True, True, True, True, True),
    "trained adapter": (True, False, False, True, True),
    "frozen B": (True, False, False, True, False),
    "frozen": (True, False, False, False, False),
    "frozen adapter": (True, True, True, False, False),
    "A alone": (False, False, False, True, False),
    "B alone": (False, False, False, False, True),
}
BUDGETS = {"recompute": 0, "half kept": 12 * 3000 * 8, "kept": 1 << 30}
SHAPES = {
    "plain": {},
    "scaled": {"logit_scale": 0.3},
    "capped": {"softcap": 5.0, "logit_scale": 1.5},
}


def head(n, h=H, v=V, r=3, dtype=torch.float64, lora_dtype=None, bias=True):
    """hidden, weight, bias, A and B, whose product is about as large as that of the weight."""
    lora_dtype = lora_dtype or dtype
    return (
        torch.randn(n, h).to(dtype),
        (torch.randn(v, h) * 2 / h**0.5).to(dtype),
        torch.randn(v).to(dtype) if bias else None,
        (torch.randn(r, h) / h**0.5).to(lora_dtype),
        (torch.randn(v, r) / r**0.5).to(lora_dtype),
    )


def labels_of(n, v=V, ignored=(2, 7)):
    labels = torch.randint(v, (n,))
    labels[[i for i in ignored if i < n]] = -100
    return labels


def leaves_of(tensors, wanted):
    return [
        None if x is None else x.detach().clone().requires_grad_(w)
        for x, w in zip(tensors, wanted, strict=True)
    ]


def run(f, tensors, labels, wanted, **options):
    """Outputs and the wanted gradients of a sum over all outputs, by name."""
    leaves = leaves_of(tensors, wanted)
    hidden, weight, bias, a, b = leaves
    found = f(hidden, weight, labels, bias=bias, lora=(a, b, SCALE), **options)
    found = found if isinstance(found, tuple) else (found,)
    out = {f"output {i}": x.detach() for i, x in enumerate(found)}
    asked = [(name, x) for name, x in zip(NAMES, leaves, strict=True) if x is not None]
    asked = [(name, x) for name, x in asked if x.requires_grad]
    if asked:
        generator = torch.Generator().manual_seed(5)
        total = 0.0
        for x in found:
            if x.is_floating_point():
                by = torch.randn(x.shape, dtype=torch.float64, generator=generator)
                total = total + (x.double() * by).sum()
        gradients = torch.autograd.grad(total, [x for _, x in asked])
        out |= {name: g for (name, _), g in zip(asked, gradients, strict=True)}
    return out


def merged(hidden, weight, labels, bias, lora, **options):
    """The log-odds of the merged head."""
    a, b, scale = lora
    whole = weight.double() + scale * (b.double() @ a.double())
    bias = None if bias is None else bias.double()
    return reference.linear_log_odds(hidden.double(), whole, labels, bias, **options)


def assert_close(ours, truth, rtol=1e-11, atol=1e-11):
    assert ours.keys() == truth.keys()
    for name, x in ours.items():
        torch.testing.assert_close(x, truth[name].to(x.dtype), rtol=rtol, atol=atol, msg=name)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("wanted", WANTED)
def test_equals_the_merged_head_in_float64(wanted, budget, shape):
    tensors, labels = head(12), labels_of(12)
    options = SHAPES[shape]
    ours = run(
        linear_log_odds, tensors, labels, WANTED[wanted], memory_budget=BUDGETS[budget], **options
    )
    truth = run(merged, tensors, labels, WANTED[wanted], **options)
    assert_close(ours, truth)
    if "hidden" in ours:
        assert not ours["hidden"][[2, 7]].any()


@pytest.mark.parametrize("r", (1, 3, 8))
@pytest.mark.parametrize("n", (0, 1, 127))
@pytest.mark.parametrize("wanted", ("all", "trained adapter", "frozen"))
def test_numbers_of_rows_and_ranks(wanted, n, r):
    tensors, labels = head(n, h=7, v=2049, r=r, bias=False), labels_of(n, 2049)
    ours = run(linear_log_odds, tensors, labels, WANTED[wanted])
    assert_close(ours, run(merged, tensors, labels, WANTED[wanted]))


@pytest.mark.parametrize("wanted", ("all", "trained adapter", "frozen B", "frozen", "B alone"))
def test_outputs(wanted):
    """With gradients through all of them; the reference adds the adapter as peft does."""
    tensors, labels = head(12), labels_of(12)
    names = ("entropy", "hit", "logsumexp", "sum_of_squares")
    ours, whole, same = (
        run(f, tensors, labels, WANTED[wanted], outputs=names, softcap=6.0)
        for f in (linear_log_odds, merged, reference.linear_log_odds)
    )
    assert_close(ours, whole)
    assert_close(ours, same)


@pytest.mark.parametrize("k", (1, 4))
@pytest.mark.parametrize("wanted", ("all", "trained adapter", "frozen"))
def test_candidates(wanted, k):
    tensors, labels = head(12), labels_of(12).clamp(min=0)
    index = torch.stack([labels, labels.roll(1), labels, labels.roll(3)], 1)[:, :k]
    mask = torch.rand(12, k) < 0.8

    def whole(hidden, weight, index, bias, lora, **options):
        made = weight + lora[2] * (lora[1] @ lora[0])
        return reference.linear_candidate_log_odds(hidden, made, index, bias=bias, **options)

    options = {"mask": mask, "outputs": ("set_log_odds", "logsumexp"), "logit_scale": 0.7}
    ours, truth, same = (
        run(f, tensors, index, WANTED[wanted], **options)
        for f in (linear_candidate_log_odds, whole, reference.linear_candidate_log_odds)
    )
    assert_close(ours, truth)
    assert_close(ours, same)


@pytest.mark.parametrize("lora_dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("wanted", ("trained adapter", "frozen"))
def test_candidates_of_half_heads(wanted, lora_dtype):
    """Gradients of several candidates and of their set, which are kept apart."""
    tensors = head(96, 64, r=8, dtype=torch.bfloat16, lora_dtype=lora_dtype)
    index = torch.randint(V, (96, 3))
    options = {"outputs": ("set_log_odds",)}
    truth, plain = (
        run(reference.linear_candidate_log_odds, given, index, WANTED[wanted], **options)
        for given in ([x.double() for x in tensors], tensors)
    )
    ours = run(linear_candidate_log_odds, tensors, index, WANTED[wanted], **options)
    assert ours.keys() == truth.keys()
    for name, x in ours.items():
        error, allowed = ((y.double() - truth[name]).norm() for y in (x, plain[name]))
        assert x.dtype == plain[name].dtype
        assert error <= allowed * 1.02, name


@pytest.mark.parametrize("wanted", ("all", "trained adapter", "frozen"))
def test_gradcheck(wanted, monkeypatch):
    monkeypatch.setattr("fastadapt._ops.linear.cpu.CpuWork.tile", 7)
    leaves, labels = leaves_of(head(5, 4, 17, 2), WANTED[wanted]), labels_of(5, 17, (1,))
    for shape in SHAPES.values():
        torch.autograd.gradcheck(
            lambda h, w, bias, a, b: linear_log_odds(
                h,
                w,
                labels,
                bias,
                lora=(a, b, SCALE),
                memory_budget=0,
                **shape,  # noqa: B023
            ),
            leaves,
        )


HALVES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
    (torch.float32, torch.bfloat16),
]


@pytest.mark.parametrize(("dtype", "lora_dtype"), HALVES, ids=str)
@pytest.mark.parametrize("wanted", ("all", "trained adapter", "frozen"))
@pytest.mark.parametrize("shape", ("plain", "capped"))
def test_error_is_no_more_than_that_of_peft(each_capability, wanted, dtype, lora_dtype, shape):
    """The reference rounds where peft does: the head's product, the adapter's, and their sum.

    Over several draws: which of two roundings of one large logit is larger is chance.
    """
    options, draws = SHAPES[shape], []
    for _ in range(8):
        tensors, labels = head(24, 96, r=8, dtype=dtype, lora_dtype=lora_dtype), labels_of(24)
        exact = [None if x is None else x.double() for x in tensors]
        results = (
            run(reference.linear_log_odds, given, labels, WANTED[wanted], **options)
            for given in (exact, tensors)
        )
        draws.append((tensors, labels, *results))
    for _ in each_capability():
        errors, allowed = dict[str, float](), dict[str, float]()
        for tensors, labels, truth, plain in draws:
            ours = run(linear_log_odds, tensors, labels, WANTED[wanted], memory_budget=0, **options)
            assert {k: x.dtype for k, x in ours.items()} == {k: x.dtype for k, x in plain.items()}
            for name, exact in truth.items():
                for sums, x in ((errors, ours[name]), (allowed, plain[name])):
                    error = (x.double() - exact).norm() / exact.norm()
                    sums[name] = sums.get(name, 0.0) + float(error.square())
        for name in errors:
            if torch.float32 == dtype == lora_dtype:  # a few roundings
                assert errors[name] ** 0.5 <= max(allowed[name] ** 0.5, 1e-6), name
            else:
                assert errors[name] ** 0.5 <= allowed[name] ** 0.5 * 1.02 + 1e-7, name


def test_a_float32_head_over_half_states():
    hidden, *rest = head(6, dtype=torch.float32)
    tensors, labels = [hidden.bfloat16(), *rest], labels_of(6)
    ours = run(linear_log_odds, tensors, labels, WANTED["all"])
    wide = run(linear_log_odds, [hidden.bfloat16().float(), *rest], labels, WANTED["all"])
    assert [ours[x].dtype for x in NAMES] == [torch.bfloat16, *[torch.float32] * 4]
    for name, x in ours.items():
        assert torch.equal(x, wide[name].to(x.dtype))


def test_autocast():
    """States and A run in its type, the rest of the adapter in float32, master parameters stay."""
    tensors, labels = head(24, 96, r=8, dtype=torch.float32), labels_of(24)
    exact = [x.double() for x in tensors]
    for wanted in ("all", "trained adapter", "frozen"):
        truth = run(reference.linear_log_odds, exact, labels, WANTED[wanted])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ours = run(linear_log_odds, tensors, labels, WANTED[wanted])
            plain = run(reference.linear_log_odds, tensors, labels, WANTED[wanted])
        for name, x in ours.items():
            error, allowed = (
                (y.double() - truth[name]).norm() / truth[name].norm() for y in (x, plain[name])
            )
            assert x.dtype == torch.float32
            assert error <= allowed * 1.02, (wanted, name)


def test_no_scale_is_no_adapter():
    tensors, labels = head(9, dtype=torch.float32), labels_of(9)
    hidden, weight, bias, a, b = tensors
    assert torch.equal(
        linear_log_odds(hidden, weight, labels, bias, lora=(a, b, 0.0)),
        linear_log_odds(hidden, weight, labels, bias),
    )
    assert torch.equal(
        linear_log_odds(hidden, weight, labels, bias, lora=(a, torch.zeros_like(b), SCALE)),
        linear_log_odds(hidden, weight, labels, bias),
    )


@pytest.mark.parametrize("wanted", ("all", "trained adapter", "frozen"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_strides_and_shapes(wanted, dtype):
    tensors, labels = head(12, 40, dtype=dtype), labels_of(12)
    hidden, weight, bias, a, b = tensors
    expected = run(linear_log_odds, tensors, labels, WANTED[wanted])
    strided = [hidden, weight, bias, a.t().contiguous().t(), b.t().contiguous().t()]
    folded = run(linear_log_odds, [hidden.view(3, 4, 40), weight, bias, a, b], labels.view(3, 4),
                 WANTED[wanted])  # fmt: skip
    for name, x in expected.items():
        assert torch.equal(folded[name].reshape(x.shape), x)
    again = run(linear_log_odds, strided, labels, WANTED[wanted])
    rtol, atol = (1e-5, 1e-5) if dtype == torch.float32 else (2e-2, 1e-2)
    for name, x in expected.items():
        torch.testing.assert_close(again[name], x, rtol=rtol, atol=atol)


def test_nan_stays_in_its_row_of_log_odds():
    hidden, weight, bias, a, b = head(4, dtype=torch.float32)
    hidden[1, 3] = float("nan")
    log_odds = linear_log_odds(hidden, weight, torch.arange(4), bias, lora=(a, b, SCALE))
    assert log_odds.isnan().tolist() == [False, True, False, False]


def test_arguments_are_checked():
    hidden, weight, bias, a, b = head(3, 8, 20, 2, torch.float32)
    labels = torch.arange(3)

    def call(*lora, hidden=hidden, weight=weight):
        for f in (linear_log_odds, lambda h, w, y, lora: linear_candidate_log_odds(
            h, w, y[:, None], lora=lora
        )):  # fmt: skip
            f(hidden, weight, labels, lora=lora)

    with pytest.raises(TypeError, match=r"lora: expected \(A, B, scale\) or None, got 2 of them"):
        call(a, b)
    with pytest.raises(TypeError, match=r"lora: expected \(A, B, scale\) or None, got Tensor"):
        linear_log_odds(hidden, weight, labels, lora=a)
    with pytest.raises(TypeError, match=r"lora\[0\]: expected a Tensor, got Linear"):
        call(torch.nn.Linear(8, 2), b, 1.0)
    with pytest.raises(TypeError, match=r"lora\[2\]: expected a number, got a tensor"):
        call(a, b, torch.ones(()))
    with pytest.raises(ValueError, match=r"lora\[2\]: expected a finite value, got inf"):
        call(a, b, float("inf"))
    with pytest.raises(ValueError, match=r"lora\[0\]: expected shape \(r, 8\), r >= 1, got \(8, 2"):
        call(a.t(), b, 1.0)
    with pytest.raises(ValueError, match=r"lora\[0\]: expected shape \(r, 8\), r >= 1, got \(0, 8"):
        call(a[:0], b[:, :0], 1.0)
    with pytest.raises(ValueError, match=r"lora\[1\]: expected shape \(20, 2\), got \(19, 2\)"):
        call(a, b[1:], 1.0)
    with pytest.raises(TypeError, match=r"lora\[1\]: expected torch.float32 or .*, got .*int8"):
        call(a, b.to(torch.int8), 1.0)
    with pytest.raises(TypeError, match=r"lora\[0\]: expected .* beside torch.float32, got .*64"):
        call(a.double(), b, 1.0)
    with pytest.raises(TypeError, match=r"lora\[0\]: expected torch.float64 beside .*, got .*32"):
        call(a, b, 1.0, hidden=hidden.double(), weight=weight.double())
    with pytest.raises(ValueError, match=r"lora\[0\]: expected device cpu, got meta"):
        call(a.to("meta"), b, 1.0)


@pytest.mark.parametrize("wanted", ("all", "trained adapter", "frozen"))
def test_compiled_without_graph_breaks(wanted):
    leaves, labels = leaves_of(head(6, dtype=torch.float32), WANTED[wanted]), labels_of(6)
    asked = [x for x in leaves if x.requires_grad]
    torch.compiler.reset()

    def loss(h, w, bias, a, b):
        found = linear_log_odds(
            h * 2, w, labels, bias, lora=(a, b, SCALE), outputs=("entropy",), differentiable=False
        )
        return torch.nn.functional.logsigmoid(found[0]).mean()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got, wanted = (torch.autograd.grad(f(*leaves), asked) for f in (compiled, loss))
    for x, y in zip(got, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)


def test_on_meta():
    leaves = [x.to("meta").requires_grad_() for x in head(3, dtype=torch.float32)]
    hidden, weight, bias, a, b = leaves
    labels = torch.zeros(3, dtype=torch.int64, device="meta")
    log_odds = linear_log_odds(hidden, weight, labels, bias, lora=(a, b, SCALE))
    gradients = torch.autograd.grad(log_odds.sum(), leaves)
    assert [x.shape for x in gradients] == [x.shape for x in leaves]


def operator_arguments(plan, apart):
    """Of the operator and, with a plan that has one, of its backward."""
    hidden, weight, bias, a, b = head(3, dtype=torch.float32, lora_dtype=torch.float32)
    labels = torch.stack([torch.arange(3), torch.arange(3) + 4], 1)[:, : 2 if apart else 1]
    low = hidden @ a.t()
    tensors = [hidden, weight, labels, bias, 0.0, 1.0, -100, None, None, low, b]
    options = {"plan": plan, "kept_bytes": 1 << 20, "moments": plan == RECOMPUTE, "apart": apart}
    return tensors, {**options, "masked": False}


@pytest.mark.parametrize("apart", (False, True))
@pytest.mark.parametrize("plan", (0, RECOMPUTE, FROZEN_HEAD))
def test_opcheck(plan, apart):
    tensors, options = operator_arguments(plan, apart)
    leaves = [x.clone() if isinstance(x, torch.Tensor) else x for x in tensors]
    if plan:
        for i in (0, 9) if plan == FROZEN_HEAD else (0, 1, 9, 10):
            leaves[i].requires_grad_()
    torch.library.opcheck(OPS.linear_log_odds.default, tuple(leaves), options)
    if plan != RECOMPUTE:
        return
    own, others, moments, stats, kept = OPS.linear_log_odds(*tensors, **options)
    upstream = [torch.randn_like(x) for x in (own, others, moments)]
    torch.library.opcheck(
        OPS.linear_log_odds_backward.default,
        (*upstream, own, stats, kept, *tensors),
        {"wanted": [True, True, False]},
    )


def test_a_frozen_plan_never_leaves_out_the_gradient_of_b():
    tensors, options = operator_arguments(FROZEN_HEAD, False)
    tensors[10].requires_grad_()
    with pytest.raises(RuntimeError, match="frozen head"):
        OPS.linear_log_odds(*tensors, **options)[0].sum().backward()


PLANS = {  # name and products of the plan, and the budget
    "all": ("recompute", 0),
    "trained adapter": ("recompute", 0),
    "frozen B": ("frozen head", None),
    "frozen": ("frozen head", None),
    "A alone": ("grouped", None),
    "B alone": ("recompute", 0),
}


@pytest.mark.parametrize("wanted", PLANS)
def test_the_plan_is_the_one_that_is_carried_out(wanted):
    """Its products, counted, those of r columns too; with a head that is trained or is not."""
    n, h, v, r = 8, 64, V, 4
    name, budget = PLANS[wanted]
    leaves = leaves_of(head(n, h, v, r, torch.float32), WANTED[wanted])
    hidden, weight, bias, a, b = leaves
    plan = plan_of(hidden, weight, bias, lora=(a, b, SCALE), memory_budget=budget)
    with torch.enable_grad():
        low = LowRank(hidden @ a.t(), b)
    number, allowed = (
        number_of(hidden, weight, bias, False, low),
        kept_bytes(hidden, weight, budget),
    )
    detached = [x.detach() for x in (hidden, weight, bias, *low)]
    labels = torch.zeros(n, 1, dtype=torch.int64)
    problem = Problem(*detached[:2], labels, detached[2], 0.0, 1.0, -100, None, None, *detached[3:])
    upstream = Upstream(torch.ones(n, 1).double(), -torch.ones(n).double(), None)
    with FlopCounterMode(display=False) as flops:  # it does not look into operators
        own, _, _, stats, kept = forward(CpuWork, problem, Asked(number, allowed, False, False))
        if number == FROZEN_HEAD:
            for rows in jacobian_rows(kept, *problem.sizes):
                frozen_head_backward(CpuWork, problem, upstream, own, stats, rows, False)
        else:
            needs = [x.requires_grad for x in (hidden, weight, bias)]
            backward(CpuWork, problem, upstream, own, stats, kept, needs)
    of_bias = 2 * n * v * bias.requires_grad
    assert plan.name == name
    assert flops.get_total_flops() - of_bias == pytest.approx(plan.products * 2 * n * h * v)
    assert plan.kept_bytes == kept.nbytes
    without = plan_of(hidden, weight, bias, memory_budget=budget)
    assert plan.peak_bytes >= without.peak_bytes or without.name != plan.name


def test_an_adapter_that_is_not_trained_has_a_frozen_heads_plan():
    hidden, weight, bias, a, b = head(3, dtype=torch.float32)
    assert plan_of(hidden, weight, bias, lora=(a, b, 1.0)).name == "forward only"
    hidden.requires_grad_()
    assert plan_of(hidden, weight, bias, lora=(a, b, 1.0)).name == "frozen head"
    b.requires_grad_()
    plan = plan_of(hidden, weight, bias, lora=(a, b, 1.0), memory_budget=0)
    assert plan.name == "recompute"
    assert plan.products == pytest.approx(3 + 4 * 3 / H)
    with torch.no_grad():
        assert plan_of(hidden, weight, bias, lora=(a, b, 1.0)).name == "forward only"
