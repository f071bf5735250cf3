"""A LoRA adapter beside the heads of losses: against merged heads in float64, and edges."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastadapt import linear_divergence, linear_log_odds, linear_mle_loss, reference
from fastadapt._ops.linear import divergence_driver
from fastadapt._ops.linear.cpu import CpuWork
from fastadapt._ops.linear.divergence import KINDS
from fastadapt._ops.linear.mle import Terms, sum_of_losses
from fastadapt._ops.linear.pairs import PairProblem
from fastadapt._ops.linear.pairs_cpu import CpuPair
from fastadapt._ops.linear.tiles import Problem
from fastadapt.losses.divergence import plan_of as plan_of_pair
from fastadapt.losses.linear_mle import plan_of as plan_of_loss

OPS = torch.ops.fastadapt
V, H, SCALE, OF_TEACHER = 5003, 33, 1.7, 0.6  # two whole tiles and a part
NAMES = ("hidden", "weight", "bias", "a", "b")
LOSSES = ("mle", *KINDS)
WANTED = {  # gradients of hidden, weight, bias, A and B
    "all": (True, True, True, True, True),
    "trained adapter": (True, False, False, True, True),
    "frozen": (True, False, False, False, False),
    "A alone": (False, False, False, True, False),
    "B alone": (False, False, False, False, True),
}
SHAPES = {
    "plain": {},
    "scaled": {"logit_scale": 0.3},
    "capped": {"softcap": 5.0, "logit_scale": 1.5},
}


def heads(n, h=H, v=V, r=3, dtype=torch.float64, lora_dtype=None):
    """A student and a teacher whose adapters' products are about as large as their weights'."""
    lora_dtype, given = lora_dtype or dtype, {}
    for who, width in (("", h), ("teacher_", h // 2 + 1)):
        given[f"{who}hidden"] = torch.randn(n, width).to(dtype)
        given[f"{who}weight"] = (torch.randn(v, width) * 2 / width**0.5).to(dtype)
        given[f"{who}bias"] = torch.randn(v).to(dtype)
        given[f"{who}a"] = (torch.randn(r, width) / width**0.5).to(lora_dtype)
        given[f"{who}b"] = (torch.randn(v, r) / r**0.5).to(lora_dtype)
    return given


def rows_of(n, v=V):
    """Labels with some ignored, which a mask of rows follows."""
    labels = torch.randint(v, (n,))
    labels[2::7] = -100
    return labels


def call(kind, of, given, labels, **options):
    """A loss or the divergences, with adapters; `of` is the package or its reference."""
    lora = given["a"], given["b"], SCALE
    if kind == "mle":
        loss = linear_mle_loss if of is None else of.linear_mle_loss
        head = given["hidden"], given["weight"], labels, given["bias"]
        return loss(*head, lora=lora, **options)
    divergence = linear_divergence if of is None else of.linear_divergence
    other = given["teacher_a"], given["teacher_b"], OF_TEACHER
    names = ("hidden", "weight", "teacher_hidden", "teacher_weight", "bias", "teacher_bias")
    tensors = {name: given[name] for name in names}
    return divergence(
        **tensors, kind=kind, mask=labels != -100, lora=lora, teacher_lora=other, **options
    )


def call_merged(kind, of, given, labels, **options):
    """The reference of merged heads in float64, whose adapters are 0."""
    whole = {name: x.double() for name, x in given.items()}
    for who, scale in (("", SCALE), ("teacher_", OF_TEACHER)):
        product = scale * (whole[f"{who}b"] @ whole[f"{who}a"])
        whole[f"{who}weight"] = whole[f"{who}weight"] + product
        whole[f"{who}a"] = torch.zeros_like(whole[f"{who}a"])
    return call(kind, reference, whole, labels, **options)


def run(f, kind, of, given, labels, wanted, **options):
    """The result, and the wanted gradients of a weighted sum, by name."""
    leaves = {
        name: given[name].detach().clone().requires_grad_(w)
        for name, w in zip(NAMES, WANTED[wanted], strict=True)
    }
    asked = {name: x for name, x in leaves.items() if x.requires_grad}
    found = f(kind, of, {**given, **leaves}, labels, **options)
    generator = torch.Generator().manual_seed(5)
    by = torch.randn(found.shape, dtype=torch.float64, generator=generator)
    made = torch.autograd.grad((found.double() * by).sum(), list(asked.values()))
    return {"result": found.detach(), **dict(zip(asked, made, strict=True))}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("wanted", WANTED)
@pytest.mark.parametrize("kind", LOSSES)
def test_equals_the_merged_head_in_float64(kind, wanted, shape):
    given, labels, options = heads(150), rows_of(150), SHAPES[shape]
    if kind == "mle":  # three blocks of rows
        smoothing = 0.0 if shape == "capped" else 0.1
        options = options | {"z_loss": 0.01, "label_smoothing": smoothing}
    more = {"memory_budget": 0} if kind == "mle" else {}
    ours = run(call, kind, None, given, labels, wanted, **options, **more)
    for f in (call, call_merged):
        truth = run(f, kind, reference, given, labels, wanted, **options)
        assert ours.keys() == truth.keys()
        for name, x in ours.items():
            assert x.dtype == torch.float64
            torch.testing.assert_close(x, truth[name], rtol=1e-11, atol=1e-11, msg=name)
    if "hidden" in ours:
        assert not ours["hidden"][2::7].any()


@pytest.mark.parametrize("n", (0, 1, 5))
@pytest.mark.parametrize("r", (1, 8))
@pytest.mark.parametrize("kind", LOSSES)
def test_numbers_of_rows_and_ranks(kind, r, n):
    given, labels = heads(n, 7, 2049, r), rows_of(n, 2049)
    ours = run(call, kind, None, given, labels, "all")
    truth = run(call_merged, kind, reference, given, labels, "all")
    for name, x in ours.items():
        torch.testing.assert_close(x, truth[name], rtol=1e-11, atol=1e-11, msg=name)


@pytest.mark.parametrize("wanted", ("all", "trained adapter"))
@pytest.mark.parametrize("kind", LOSSES)
def test_gradcheck(kind, wanted, monkeypatch):
    for work in (CpuWork, CpuPair):
        monkeypatch.setattr(work, "tile", 7)
    monkeypatch.setattr(CpuWork, "rows", 2)
    given, labels = heads(5, 4, 17, 2), rows_of(5, 17)
    leaves = [given[x].requires_grad_(w) for x, w in zip(NAMES, WANTED[wanted], strict=True)]
    more = {"memory_budget": 0, "z_loss": 0.1} if kind == "mle" else {}
    for shape in SHAPES.values():
        torch.autograd.gradcheck(
            lambda *x: call(
                kind,
                None,
                {**given, **dict(zip(NAMES, x, strict=True))},
                labels,
                **shape,  # noqa: B023
                **more,
            ),
            leaves,
        )


HALVES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.float32, torch.bfloat16),
]


@pytest.mark.parametrize(("dtype", "lora_dtype"), HALVES, ids=str)
@pytest.mark.parametrize("wanted", ("all", "trained adapter"))
@pytest.mark.parametrize("kind", LOSSES)
def test_error_is_no_more_than_that_of_peft(each_capability, kind, wanted, dtype, lora_dtype):
    """The reference rounds where peft does: the head's product, the adapter's, and their sum.

    On average over many rows: which of two roundings is larger is chance. Gradients of a tile are
    rounded in addition, before they are summed, by half an epsilon at most. The one number of a
    mean is chance alone, and compared with log-odds below.
    """
    draws = []
    for _ in range(3):
        given, labels = heads(192, 96, 2500, 8, dtype, lora_dtype), rows_of(192, 2500)
        exact = {name: x.double() for name, x in given.items()}
        truth, plain = (run(call, kind, reference, x, labels, wanted) for x in (exact, given))
        draws.append((given, labels, truth, plain))
    for _ in each_capability():
        errors, allowed = dict[str, float](), dict[str, float]()
        for given, labels, truth, plain in draws:
            ours = run(call, kind, None, given, labels, wanted)
            assert {k: x.dtype for k, x in ours.items()} == {k: x.dtype for k, x in plain.items()}
            for name, exact in truth.items():
                for sums, x in ((errors, ours[name]), (allowed, plain[name])):
                    error = (x.double() - exact).norm() / exact.norm()
                    sums[name] = sums.get(name, 0.0) + float(error) / len(draws)
        for name in errors.keys() - ({"result"} if kind == "mle" else set()):
            error, bound = errors[name], allowed[name]
            rounding = torch.finfo(dtype).eps / 2 if name != "result" else 0.0
            if torch.float32 == dtype == lora_dtype:  # a few roundings
                assert error <= max(bound, 16 * torch.finfo(dtype).eps), name
            else:
                assert error <= math.hypot(bound * 1.02, rounding) + 1e-7, name


@pytest.mark.parametrize("kind", LOSSES)
def test_autocast(kind):
    """States and A run in its type, the rest of the adapter in float32, master parameters stay."""
    given, labels = heads(24, 96, r=8, dtype=torch.float32), rows_of(24)
    exact = {name: x.double() for name, x in given.items()}
    for wanted in ("all", "trained adapter"):
        truth = run(call, kind, reference, exact, labels, wanted)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ours = run(call, kind, None, given, labels, wanted)
            plain = run(call, kind, reference, given, labels, wanted)
        for name, x in ours.items():
            error, allowed = (
                (y.double() - truth[name]).norm() / truth[name].norm() for y in (x, plain[name])
            )
            assert x.dtype == torch.float32
            assert error <= allowed * 1.3 + torch.finfo(torch.bfloat16).eps / 2, (wanted, name)


@pytest.mark.parametrize("kind", LOSSES)
def test_no_scale_is_no_adapter(kind):
    given, labels = heads(9, dtype=torch.float32), rows_of(9)
    given["b"].zero_()
    given["teacher_b"].zero_()
    with_zeros = call(kind, None, given, labels)
    if kind == "mle":
        without = linear_mle_loss(given["hidden"], given["weight"], labels, given["bias"])
    else:
        tensors = {name: x for name, x in given.items() if name[-1] not in "ab"}
        without = linear_divergence(**tensors, kind=kind, mask=labels != -100)
    assert torch.equal(with_zeros, without)


@pytest.mark.parametrize(("dtype", "lora_dtype"), HALVES, ids=str)
def test_equals_the_log_odds(dtype, lora_dtype):
    """Rows are scored by the same driver, the adapter among them."""
    given, labels = heads(20, 40, V, 3, dtype, lora_dtype), rows_of(20)
    lora = given["a"], given["b"], SCALE
    head = given["hidden"], given["weight"], labels, given["bias"]
    log_odds = linear_log_odds(*head, lora=lora)[labels != -100]
    expected = -torch.nn.functional.logsigmoid(log_odds).mean()
    loss = linear_mle_loss(*head, lora=lora)
    torch.testing.assert_close(loss, expected, rtol=4 * torch.finfo(torch.float32).eps, atol=0)


def test_only_some_have_an_adapter():
    """The student's alone, the teacher's alone: the other head is as it is."""
    given = heads(12)
    names = ("hidden", "weight", "teacher_hidden", "teacher_weight", "bias", "teacher_bias")
    tensors = {name: given[name] for name in names}
    student, teacher = (given["a"], given["b"], SCALE), (given["teacher_a"], given["teacher_b"], 2)
    for loras in ({"lora": student}, {"teacher_lora": teacher}):
        found = []
        for f in (linear_divergence, reference.linear_divergence):
            leaf = given["hidden"].clone().requires_grad_()
            values = f(**{**tensors, "hidden": leaf}, **loras)
            found.append((values.detach(), *torch.autograd.grad(values.sum(), leaf)))
        for ours, truth in zip(*found, strict=True):
            torch.testing.assert_close(ours, truth, rtol=1e-11, atol=1e-11)


def test_what_autograd_may_do():
    """A teacher's adapter is a constant, a double backward is refused, twice one may be made."""
    given, labels = heads(5, dtype=torch.float32), rows_of(5)
    for i, name in enumerate(("teacher_a", "teacher_b")):
        some = {**given, name: given[name].clone().requires_grad_()}
        with pytest.raises(ValueError, match=rf"teacher_lora\[{i}\]: expected a teacher without"):
            call("kl", None, some, labels)
        with torch.no_grad():
            call("kl", None, some, labels)
    leaf = given["b"].clone().requires_grad_()
    for kind, words in (("mle", "linear_mle_loss"), ("kl", "divergence")):
        values = call(kind, None, {**given, "b": leaf}, labels).sum()
        once, again = (torch.autograd.grad(values, leaf, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(once, again)
        (gradient,) = torch.autograd.grad(values.square(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match=f"{words}: expected a first-order gradient"):
            gradient.sum().backward()


def mle_problem(given, labels):
    """The arguments of the operator."""
    low = given["hidden"] @ given["a"].t(), given["b"]
    head = given["hidden"], given["weight"], labels[:, None], given["bias"]
    return Problem(*head, 0.0, 1.0, -100, None, None, *low)


def pair_problem(given, kind):
    """The arguments of the operators."""
    names = ("hidden", "weight", "bias", "teacher_hidden", "teacher_weight", "teacher_bias")
    lows = [(given[f"{who}hidden"] @ given[f"{who}a"].t(), given[f"{who}b"])
            for who in ("", "teacher_")]  # fmt: skip
    numbers = 0.0, 1.0, 0.0, 1.0, KINDS[kind], 0.5
    return PairProblem(*(given[name] for name in names), None, *numbers, *lows[0], *lows[1])


@pytest.mark.parametrize("wanted", ("all", "trained adapter", "frozen"))
def test_opcheck_of_the_loss(wanted):
    given, labels = heads(3, 8, dtype=torch.float32), rows_of(3)
    problem = [x.detach().clone() if isinstance(x, torch.Tensor) else x
               for x in mle_problem(given, labels)]  # fmt: skip
    for place, needs in zip((0, 1, 3, 9, 10), WANTED[wanted], strict=True):
        problem[place].requires_grad_(needs)
    terms = {"z_loss": 0.1, "label_smoothing": 0.1, "memory_budget": 0}
    options = {**terms, "wanted": list(WANTED[wanted])}
    torch.library.opcheck(OPS.linear_mle.default, tuple(problem), options)


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck_of_divergences(kind):
    given = heads(3, 8, dtype=torch.float32)
    arguments = pair_problem(given, kind)
    _, stats = OPS.linear_divergence(*arguments)
    torch.library.opcheck(
        OPS.linear_divergence_backward.default,
        (torch.randn(3), stats, *arguments),
        {"wanted": [True, True, True]},
    )
    leaves = [x.clone() if isinstance(x, torch.Tensor) else x for x in arguments]
    for place in (0, 1, 2, 13, 14):
        leaves[place].requires_grad_()
    torch.library.opcheck(OPS.linear_divergence.default, tuple(leaves))


def test_a_gradient_is_never_left_out_silently():
    given, labels = heads(3, 8, dtype=torch.float32), rows_of(3)
    problem = list(mle_problem(given, labels))
    problem[10] = problem[10].clone().requires_grad_()
    terms = {"z_loss": 0.0, "label_smoothing": 0.0, "memory_budget": None}
    loss = OPS.linear_mle(*problem, **terms, wanted=[False] * 5)[0]
    with pytest.raises(RuntimeError, match="linear_mle_loss: expected no gradient of low_weight"):
        loss.backward()
    arguments = list(pair_problem(given, "kl"))
    arguments[15] = arguments[15].clone().requires_grad_()
    values, _ = OPS.linear_divergence(*arguments)
    with pytest.raises(RuntimeError, match="a teacher has no gradient"):
        values.sum().backward()


@pytest.mark.parametrize("kind", LOSSES)
def test_compiled_without_graph_breaks(kind):
    given, labels = heads(6, dtype=torch.float32), rows_of(6)
    leaves = [given[name].requires_grad_() for name in NAMES]

    def loss(hidden, *rest):
        some = {**given, **dict(zip(NAMES, (hidden * 2, *rest), strict=True))}
        return call(kind, None, some, labels).square().mean()

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got, wanted = (torch.autograd.grad(f(*leaves), leaves) for f in (compiled, loss))
    for x, y in zip(got, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", LOSSES)
def test_on_meta(kind):
    given = {name: x.to("meta") for name, x in heads(3, dtype=torch.float32).items()}
    leaves = [given[name].requires_grad_() for name in NAMES]
    values = call(kind, None, given, torch.zeros(3, dtype=torch.int64, device="meta"))
    gradients = torch.autograd.grad(values.sum(), leaves)
    assert [x.shape for x in gradients] == [x.shape for x in leaves]


@pytest.mark.parametrize("wanted", WANTED)
def test_the_plan_of_the_loss_is_carried_out(wanted):
    """Its products, counted, those of r columns too."""
    n, h, r, needs = 8, 64, 4, WANTED[wanted]
    given, labels = heads(n, h, V, r, torch.float32), torch.zeros(n, dtype=torch.int64)
    hidden, weight, bias, a, b = (
        given[x].requires_grad_(w) for x, w in zip(NAMES, needs, strict=True)
    )
    plan = plan_of_loss(hidden, weight, bias, lora=(a, b, SCALE))
    with torch.no_grad():
        problem = mle_problem(given, labels)
        assert plan_of_loss(hidden, weight, bias, lora=(a, b, SCALE)).products == 1 + r / h
    problem = Problem(*(x.detach() if isinstance(x, torch.Tensor) else x for x in problem))
    with FlopCounterMode(display=False) as flops:  # it does not look into operators
        _, *made = sum_of_losses(CpuWork, problem, Terms(0.0, 0.0), list(needs), None)
    of_bias = 2 * n * V * needs[2]
    assert flops.get_total_flops() - of_bias == pytest.approx(plan.products * 2 * n * h * V)
    assert plan.kept_bytes == sum(x.nbytes for x in made)
    without = plan_of_loss(hidden, weight, bias)
    assert plan.peak_bytes > without.peak_bytes or without.name == "forward only"


@pytest.mark.parametrize("wanted", WANTED)
@pytest.mark.parametrize("kind", KINDS)
def test_the_plan_of_divergences_is_carried_out(kind, wanted):
    n, h, r, needs = 8, 64, 4, WANTED[wanted]
    given = heads(n, h, V, r, torch.float32)
    hidden, weight, bias, a, b = (
        given[x].requires_grad_(w) for x, w in zip(NAMES, needs, strict=True)
    )
    loras = {
        "lora": (a, b, SCALE),
        "teacher_lora": (given["teacher_a"], given["teacher_b"], SCALE),
    }
    plan = plan_of_pair(hidden, weight, given["teacher_hidden"], bias, kind=kind, **loras)
    with torch.no_grad():
        arguments = pair_problem(given, kind)
    arguments = PairProblem(*(x.detach() if isinstance(x, torch.Tensor) else x for x in arguments))
    with FlopCounterMode(display=False) as flops:
        _, stats = divergence_driver.forward(CpuPair, arguments)
        divergence_driver.backward(CpuPair, arguments, torch.ones(n), stats, list(needs[:3]))
    of_bias = 2 * n * V * needs[2]
    assert flops.get_total_flops() - of_bias == pytest.approx(plan.products * 2 * n * h * V)
    without = plan_of_pair(hidden, weight, given["teacher_hidden"], bias, kind=kind)
    assert plan.peak_bytes > without.peak_bytes


def test_arguments_are_checked():
    given, labels = heads(3, 8, 20, 2, torch.float32), rows_of(3, 20)
    hidden, weight, a, b = (given[name] for name in ("hidden", "weight", "a", "b"))
    other = given["teacher_hidden"], given["teacher_weight"]
    calls = (
        ("lora", lambda x: linear_mle_loss(hidden, weight, labels, lora=x)),
        ("lora", lambda x: linear_divergence(hidden, weight, *other, lora=x)),
        ("teacher_lora", lambda x: linear_divergence(*other, hidden, weight, teacher_lora=x)),
    )
    for name, f in calls:
        for lora, error, message in (
            ((a, b), TypeError, r": expected \(A, B, scale\) or None, got 2 of them"),
            (a, TypeError, r": expected \(A, B, scale\) or None, got Tensor"),
            ((a, None, 1.0), TypeError, r"\[1\]: expected a Tensor, got NoneType"),
            ((a, b, torch.ones(())), TypeError, r"\[2\]: expected a number, got a tensor"),
            ((a, b, float("nan")), ValueError, r"\[2\]: expected a finite value, got nan"),
            ((a.t(), b, 1.0), ValueError, r"\[0\]: expected shape \(r, 8\), r >= 1, got \(8, 2"),
            ((a, b[1:], 1.0), ValueError, r"\[1\]: expected shape \(20, 2\), got \(19, 2\)"),
            ((a.double(), b, 1.0), TypeError, r"\[0\]: expected .* beside torch.float32, got"),
            ((a, b.to("meta"), 1.0), ValueError, r"\[1\]: expected device cpu, got meta"),
        ):
            with pytest.raises(error, match=f"^{name}{message}"):
                f(lora)
