"""The linear head in tiles: every plan against float64 truth, edges, and what autograd may do."""

import itertools

import pytest
import torch

from fastadapt import label_log_odds, linear_log_odds, reference

OPS = torch.ops.fastadapt
V = 5003  # two whole tiles and a part
PLANS = {
    "recompute": {"memory_budget": 0},
    "kept": {"memory_budget": 1 << 30},
    "half_kept": {"memory_budget": 12 * 3000 * 2},
    "by_default": {},
    "frozen": {},
}
SHAPES = {
    "plain": {},
    "scaled": {"logit_scale": 0.3},
    "capped": {"softcap": 5.0, "logit_scale": 1.5},
}


def head(n, h, v, dtype, bias=True):
    """hidden, weight, labels, bias with log-odds of a few nats."""
    hidden, weight = torch.randn(n, h), torch.randn(v, h) * 2 / h**0.5
    b = torch.randn(v).to(dtype) if bias else None
    return hidden.to(dtype), weight.to(dtype), torch.randint(v, (n,)), b


def gradients(f, hidden, weight, labels, bias, upstream, frozen=False, **kwargs):
    """Log-odds, and gradients of hidden, weight and bias (None where frozen)."""
    leaves = [hidden.clone().requires_grad_(), weight.clone(), None]
    leaves[2] = None if bias is None else bias.clone()
    if not frozen:
        for leaf in leaves[1:]:
            if leaf is not None:
                leaf.requires_grad_()
    log_odds = f(leaves[0], leaves[1], labels, leaves[2], **kwargs)
    wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    return [log_odds.detach(), *torch.autograd.grad(log_odds, wanted, upstream.to(log_odds.dtype))]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("plan", PLANS)
def test_equals_the_truth_in_float64(plan, shape):
    hidden, weight, labels, bias = head(12, 33, V, torch.float64)
    labels[[2, 7]] = -100
    upstream = torch.randn(12)
    options = {"frozen": plan == "frozen", **SHAPES[shape]}
    arguments = (hidden, weight, labels, bias, upstream)
    ours = gradients(linear_log_odds, *arguments, **options, **PLANS[plan])
    truth = gradients(reference.linear_log_odds, *arguments, **options)
    assert len(ours) == (2 if plan == "frozen" else 4)
    for a, b in zip(ours, truth, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    assert (ours[1][[2, 7]] == 0).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("plan", PLANS)
def test_error_is_no_more_than_that_of_plain_torch(each_capability, plan, dtype, shape):
    hidden, weight, labels, bias = head(24, 96, V, dtype)
    labels[5] = -100
    upstream = torch.randn(24)
    frozen = plan == "frozen"

    def ours(*a, **k):
        return linear_log_odds(*a, **k, **PLANS[plan])

    def run(f, dtype):
        inputs = (hidden.to(dtype), weight.to(dtype), labels, bias.to(dtype), upstream)
        return gradients(f, *inputs, frozen=frozen, **SHAPES[shape])

    truth = run(reference.linear_log_odds, torch.float64)
    theirs = run(reference.linear_log_odds, dtype)
    for _ in each_capability():
        for name, got, plain, exact in zip(
            ("log_odds", "hidden", "weight", "bias"), run(ours, dtype), theirs, truth, strict=False
        ):
            error, allowed = ((x.double() - exact).norm() / exact.norm() for x in (got, plain))
            if dtype == torch.float32:  # both are a few roundings: which has more is chance
                assert error <= max(allowed, 1e-6), name
            else:
                assert error <= allowed * 1.02 + 1e-7, name


def test_log_odds_of_bfloat16_have_a_fifth_of_the_error():
    hidden, weight, labels, _ = head(256, 128, 8200, torch.bfloat16)
    weight /= 2  # logits of a nat or so: no single one of them holds much of the mass
    truth = reference.linear_log_odds(hidden.double(), weight.double(), labels)
    ours, plain = (
        (f(hidden, weight, labels).double() - truth).square().mean().sqrt()
        for f in (linear_log_odds, reference.linear_log_odds)
    )
    assert ours <= 0.2 * plain


@pytest.mark.parametrize("log_odds", (0.0, 8.0, 17.0, 40.0, 100.0))
@pytest.mark.parametrize("frozen", (False, True))
def test_large_log_odds(cpu_capability, log_odds, frozen):
    """One direction of the hidden state is the label's alone and sets its log-odds."""
    hidden, weight, labels, _ = head(4, 16, V, torch.float32)
    weight[:, 0], hidden[:, 0], labels[:] = 0.0, 1.0, 4100
    weight[4100] = 0.0
    others = (hidden.double() @ weight.double().t()).scatter(1, labels[:, None], float("-inf"))
    hidden[:, 0] = (others.logsumexp(-1) + log_odds).float()
    weight[4100, 0] = 1.0
    upstream = torch.randn(4)
    options = {"frozen": frozen, "memory_budget": 0}
    ours = gradients(linear_log_odds, hidden, weight, labels, None, upstream, **options)
    truth = gradients(
        reference.linear_log_odds, hidden.double(), weight.double(), labels, None, upstream,
        **options,
    )  # fmt: skip
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("plan", PLANS)
def test_gradcheck(plan, monkeypatch):
    monkeypatch.setattr("fastadapt._ops.linear.cpu.CpuWork.tile", 7)
    hidden, weight, labels, bias = head(5, 4, 17, torch.float64)
    labels[1] = -100
    hidden.requires_grad_()
    frozen = plan == "frozen"
    weight.requires_grad_(not frozen)
    bias.requires_grad_(not frozen)
    for shape in SHAPES.values():
        torch.autograd.gradcheck(
            lambda h, w, b: linear_log_odds(h, w, labels, b, **shape, **PLANS[plan]),  # noqa: B023
            (hidden, weight, bias),
        )


def test_only_the_wanted_gradients_are_made():
    hidden, weight, labels, bias = head(6, 8, V, torch.float32)
    upstream = torch.randn(6)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    whole = torch.autograd.grad(linear_log_odds(hidden, weight, labels, bias), leaves, upstream)
    for chosen in ((0,), (1,), (2,), (0, 2), (1, 2), (0, 1)):
        for i, leaf in enumerate(leaves):
            leaf.requires_grad_(i in chosen)
        log_odds = linear_log_odds(hidden, weight, labels, bias)
        some = torch.autograd.grad(log_odds, [leaves[i] for i in chosen], upstream)
        for i, gradient in zip(chosen, some, strict=True):
            torch.testing.assert_close(gradient, whole[i], rtol=1e-5, atol=1e-6)
    for leaf in leaves:
        leaf.requires_grad_(False)
    assert not linear_log_odds(hidden, weight, labels, bias).requires_grad
    weight.requires_grad_()
    with torch.no_grad():
        assert not linear_log_odds(hidden, weight, labels, bias).requires_grad


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("frozen", (False, True))
def test_extra_outputs(dtype, frozen):
    hidden, weight, labels, bias = head(9, 24, V, dtype)
    hidden.requires_grad_()
    weight.requires_grad_(not frozen)
    labels[0] = -100
    best = (hidden.double() @ weight.double().t() + bias.double()).argmax(-1)
    labels[3:5] = best[3:5]
    bias[best[3:5]] += 0.25  # and by more than the roundings of a logit
    names = ("hit", "entropy", "logsumexp")
    ours = linear_log_odds(hidden, weight, labels, bias, softcap=9.0, outputs=names)
    truth = reference.linear_log_odds(
        hidden.double(), weight.double(), labels, bias.double(), softcap=9.0, outputs=names
    )
    tolerance = 3e-6 if dtype == torch.float32 else 1e-3
    for a, b in zip(ours, truth, strict=True):
        assert a.shape == (9,)
        torch.testing.assert_close(
            a.detach(), b.detach().to(a.dtype), rtol=tolerance, atol=tolerance
        )
    assert ours[1].sum() >= 2
    assert ours[0].requires_grad
    assert [x.requires_grad for x in ours[1:]] == [False, True, True]  # hit is no number
    alone = linear_log_odds(hidden, weight, labels, bias, softcap=9.0)
    assert torch.equal(alone.detach(), ours[0].detach())


@pytest.mark.parametrize(
    ("name", "compiled", "frozen"),
    [
        *itertools.product(("entropy", "logsumexp"), (False,), (False, True)),
        *[("entropy", True, False), ("logsumexp", True, True)],  # a compilation takes a second
    ],
)
def test_a_gradient_of_an_extra_output_is_refused(name, compiled, frozen):
    """Of metrics, by name, whatever else the loss has; without a share it costs nothing."""
    hidden, weight, labels, bias = head(9, 24, V, torch.float32)
    hidden.requires_grad_()
    weight.requires_grad_(not frozen)

    def both(h, share):
        log_odds, extra = linear_log_odds(
            h * 2, weight, labels, bias, outputs=(name,), differentiable=False
        )
        return log_odds.mean() + share * extra.mean(), extra

    if compiled:
        torch.compiler.reset()
        both = torch.compile(both, fullgraph=True, backend="aot_eager")
    message = f"outputs: expected a loss without the {name} of linear_log_odds"
    with pytest.raises(RuntimeError, match=message):
        both(hidden, torch.tensor(0.1))[0].backward()
    gradients = []
    for share in (0.0, None):
        hidden.grad = None
        loss = (
            linear_log_odds(hidden * 2, weight, labels, bias).mean()
            if share is None
            else both(hidden, torch.tensor(share))[0]
        )
        loss.backward()
        gradients.append(hidden.grad)
    assert torch.equal(*gradients)
    with torch.no_grad():
        assert not both(hidden, torch.tensor(0.1))[1].requires_grad


@pytest.mark.parametrize("cast", (False, True), ids=("plain", "autocast"))
@pytest.mark.parametrize("dtype", (torch.int8, torch.uint8, torch.int32, torch.bool))
def test_codes_are_no_weights(dtype, cast):
    """Autocast would cast them, and a quantised head's codes be taken for its weights."""
    hidden, weight, labels, bias = head(3, 8, V, torch.float32)
    message = f"weight: expected floating-point numbers, got {dtype}"
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast):
        with pytest.raises(TypeError, match=message):
            linear_log_odds(hidden, (weight * 10).to(dtype), labels, bias)
        with pytest.raises(TypeError, match="bias: expected floating-point numbers"):
            linear_log_odds(hidden, weight, labels, bias.to(dtype))


def test_extra_outputs_of_no_rows():
    hidden, weight, labels, bias = head(0, 8, V, torch.float32)
    for shape in ((0,), (2, 0)):
        rows = hidden.view(*shape, 8), weight, labels.view(shape), bias
        ours = linear_log_odds(*rows, outputs=("entropy", "logsumexp", "hit"))
        assert [x.shape for x in ours] == [shape] * 4


def test_extra_outputs_of_a_forbidden_label():
    """An id without mass adds nothing to the entropy."""
    hidden, weight, labels, bias = head(4, 8, V, torch.float32)
    labels[:] = 3
    bias[3] = float("-inf")
    names = ("entropy", "logsumexp", "hit")
    ours, truth = (
        f(hidden, weight, labels, bias, outputs=names)
        for f in (linear_log_odds, reference.linear_log_odds)
    )
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("frozen", (False, True))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
def test_no_rows_and_nothing_but_ignored_rows(dtype, frozen):
    for n in (0, 3):
        hidden, weight, labels, bias = head(n, 8, V, dtype)
        labels[:] = -7
        options = {"frozen": frozen, "ignore_index": -7}
        out = gradients(linear_log_odds, hidden, weight, labels, bias, torch.randn(n), **options)
        assert out[0].shape == (n,)
        assert all((x == 0).all() for x in out)
        assert [x.shape for x in out[1:]] == [hidden.shape, weight.shape, bias.shape][
            : len(out) - 1
        ]


def test_one_id(cpu_capability):
    """V = 1: the log-odds are +inf and there is nothing to learn."""
    for frozen in (False, True):
        for upstream in (torch.ones(3), torch.full((3,), float("inf"))):
            hidden, weight, labels, bias = head(3, 8, 1, torch.float32)
            out = gradients(linear_log_odds, hidden, weight, labels, bias, upstream, frozen=frozen)
            assert (out[0] == float("inf")).all()
            assert all((x == 0).all() for x in out[1:])


def test_bias_may_forbid_ids(cpu_capability):
    """-inf in the bias takes an id away, whole tiles of them too."""
    hidden, weight, labels, bias = head(4, 8, V, torch.float32)
    bias[:4096] = float("-inf")
    labels[:] = 4999
    upstream = torch.randn(4)
    for frozen in (False, True):
        arguments = (hidden, weight, labels, bias, upstream)
        ours = gradients(linear_log_odds, *arguments, frozen=frozen)
        truth = gradients(reference.linear_log_odds, *arguments, frozen=frozen)
        for a, b in zip(ours, truth, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)
        if not frozen:
            assert (ours[2][:4096] == 0).all()


def test_nan_stays_in_its_row():
    hidden, weight, labels, _ = head(4, 8, V, torch.float32)
    hidden[1, 3] = float("nan")
    for frozen in (False, True):
        log_odds, dhidden, *_ = gradients(
            linear_log_odds, hidden, weight, labels, None, torch.randn(4), frozen=frozen
        )
        bad = torch.tensor([False, True, False, False])
        assert torch.equal(log_odds.isnan(), bad)
        assert torch.equal(dhidden.isnan().all(-1), bad)
        assert torch.equal(dhidden.isnan().any(-1), bad)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_strides_shapes_and_runs_change_no_bit(cpu_capability, plan, dtype):
    hidden, weight, labels, bias = head(12, 40, V, dtype)
    labels[3] = -100
    upstream = torch.randn(12)
    options = {"frozen": plan == "frozen", **PLANS[plan]}
    wanted = gradients(linear_log_odds, hidden, weight, labels, bias, upstream, **options)
    wide = torch.zeros(12, 64, dtype=dtype)
    wide[:, :40] = hidden
    strided = torch.zeros(24, dtype=torch.int64)[::2].copy_(labels)
    for h, w, y, u in (
        (hidden, weight, labels, upstream),
        (wide[:, :40], weight, strided, torch.zeros(12, 2)[:, 0].copy_(upstream)),
        (hidden.t().contiguous().t(), weight, labels, upstream),
        (hidden.view(3, 4, 40), weight, labels.view(3, 4), upstream.view(3, 4)),
    ):
        got = gradients(linear_log_odds, h, w, y, bias, u, **options)
        for a, b in zip(got, wanted, strict=True):
            assert torch.equal(a.reshape(b.shape), b)
    got = gradients(
        linear_log_odds, hidden, weight.t().contiguous().t(), labels, bias, upstream, **options
    )
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-2 if dtype != torch.float32 else 1e-5)


def test_kept_logits_change_no_bit_and_survive_a_backward():
    hidden, weight, labels, bias = head(12, 40, V, torch.bfloat16)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    upstream = torch.randn(12)
    results = []
    for budget in (0, 12 * 3000 * 2, 1 << 30):
        log_odds = linear_log_odds(hidden, weight, labels, bias, memory_budget=budget)
        for retain in (True, False):
            results.append(torch.autograd.grad(log_odds, leaves, upstream, retain_graph=retain))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_threads(num_threads, plan, dtype):
    """The row work is the same bits on any number of threads; torch's products may differ."""
    hidden, weight, labels, bias = head(12, 40, V, dtype)
    upstream = torch.randn(12)
    options = {"frozen": plan == "frozen", **PLANS[plan]}
    results = []
    for threads in (1, 2, 3):
        num_threads(threads)
        results.append(
            gradients(linear_log_odds, hidden, weight, labels, bias, upstream, **options)
        )
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_arguments_are_checked():
    hidden, weight, labels, bias = head(3, 8, 20, torch.float32)
    labels[:] = torch.tensor([0, 20, 1])
    for grad in (False, True):
        hidden.requires_grad_(grad)
        with pytest.raises(ValueError, match=r"labels: expected ids in \[0, 20\) or -100, got 20"):
            linear_log_odds(hidden, weight, labels, bias)
    hidden, labels = hidden.detach(), labels.clamp(max=19)
    with pytest.raises(ValueError, match=r"weight: expected shape \(V, 8\), V >= 1, got \(8, 20\)"):
        linear_log_odds(hidden, weight.t(), labels)
    with pytest.raises(TypeError, match="weight: expected a Tensor, got Linear"):
        linear_log_odds(hidden, torch.nn.Linear(8, 20), labels)
    with pytest.raises(TypeError, match="labels: expected a Tensor, got list"):
        linear_log_odds(hidden, weight, labels.tolist())
    with pytest.raises(ValueError, match=r"bias: expected shape \(20,\), got \(19,\)"):
        linear_log_odds(hidden, weight, labels, bias[1:])
    with pytest.raises(TypeError, match="weight: expected torch.float32 as hidden, got .*bfloat16"):
        linear_log_odds(hidden, weight.bfloat16(), labels)
    with pytest.raises(ValueError, match="softcap: expected a value > 0, got 0"):
        linear_log_odds(hidden, weight, labels, softcap=0)
    with pytest.raises(ValueError, match="logit_scale: expected a finite value, got nan"):
        linear_log_odds(hidden, weight, labels, logit_scale=float("nan"))
    with pytest.raises(ValueError, match="memory_budget: expected at least 0, got -1"):
        linear_log_odds(hidden, weight, labels, memory_budget=-1)
    with pytest.raises(ValueError, match="outputs: expected names of .*, got 'top'"):
        linear_log_odds(hidden, weight, labels, outputs=("top",))
    with pytest.raises(TypeError, match="outputs: expected a sequence of names, got the string"):
        linear_log_odds(hidden, weight, labels, outputs="hit")
    with pytest.raises(ValueError, match=r"labels: expected shape \(3,\), got \(1,\)"):
        linear_log_odds(hidden, weight, labels[:1])


@pytest.mark.parametrize("head", ("trained", "frozen"))
def test_a_float32_head_is_cast_tile_by_tile(head, cpu_capability):
    """Under autocast the bits of a bfloat16 head, where the master has its numbers."""
    hidden, weight = torch.randn(37, 48), torch.randn(5003, 48).bfloat16()
    bias, labels = torch.randn(5003).bfloat16(), torch.randint(5003, (37,))
    labels[::9] = -100
    found = []
    for master in (True, False):
        h, w, b = (x.detach().clone() for x in (hidden, weight, bias))
        w, b = (w.float(), b.float()) if master else (w, b)
        leaves = [h.requires_grad_()]
        if head == "trained":
            leaves += [w.requires_grad_(), b.requires_grad_()]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            options = {"softcap": 30.0, "outputs": ("entropy", "logsumexp")}
            outputs = linear_log_odds(h, w, labels, b, **options)
        made = torch.autograd.grad(sum((i + 1.0) * x.sum() for i, x in enumerate(outputs)), leaves)
        found.append((*outputs, *made))
        assert [x.dtype for x in made] == [x.dtype for x in leaves]
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b.to(a.dtype))


def test_autocast():
    """A float32 head over a bfloat16 body runs, and is differentiated, in the type of autocast."""
    hidden, weight, labels, bias = head(6, 16, V, torch.float32)
    body = hidden.bfloat16()
    upstream = torch.randn(6)
    wanted = gradients(linear_log_odds, body, weight.bfloat16(), labels, bias.bfloat16(), upstream)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = gradients(linear_log_odds, body, weight, labels, bias, upstream)
        same = gradients(linear_log_odds, hidden, weight, labels, bias, upstream)
        with pytest.raises(TypeError, match="weight: expected torch.float64 as hidden, got .*32"):
            linear_log_odds(hidden.double(), weight, labels)
    assert [x.dtype for x in got[1:]] == [torch.bfloat16, torch.float32, torch.float32]
    for a, b, c in zip(got, wanted, same, strict=True):
        assert torch.equal(a.float(), b.float())
        assert torch.equal(c.float(), b.float())
    with torch.autocast("cpu", dtype=torch.float16):
        (h,) = gradients(linear_log_odds, hidden, weight, labels, None, upstream)[:1]
    assert torch.equal(h, linear_log_odds(hidden.half(), weight.half(), labels))


@pytest.mark.parametrize("frozen", (False, True))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_a_float32_head_over_a_half_body(dtype, frozen):
    """Products are float32, and the gradient of the hidden states is rounded to their type."""
    hidden, weight, labels, bias = head(6, 16, V, torch.float32)
    body, upstream = hidden.to(dtype), torch.randn(6)
    got, wanted = (
        gradients(f, x, weight, labels, bias, upstream, frozen=frozen)
        for f, x in ((linear_log_odds, body), (linear_log_odds, body.float()))
    )
    expected = gradients(reference.linear_log_odds, body, weight, labels, bias, upstream, frozen)
    assert [x.dtype for x in got[:2]] == [torch.float32, dtype]
    for a, b, c in zip(got, wanted, expected, strict=True):
        assert torch.equal(a, b.to(a.dtype))
        torch.testing.assert_close(a, c, rtol=2e-2 if a.dtype == dtype else 1e-5, atol=1e-5)


@pytest.mark.parametrize("frozen", (False, True))
def test_double_backward_raises(frozen):
    hidden, weight, labels, _ = head(3, 8, 50, torch.float32)
    hidden.requires_grad_()
    weight.requires_grad_(not frozen)
    log_odds = linear_log_odds(hidden, weight, labels)
    (gradient,) = torch.autograd.grad(log_odds.square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.sum().backward()


def test_a_plan_never_leaves_out_a_gradient_silently():
    hidden, weight, labels, _ = head(3, 8, 50, torch.float32)
    hidden.requires_grad_()
    rest = (labels[:, None], None, 0.0, 1.0, -100, None, None)
    asked = {"kept_bytes": 0, "moments": True, "apart": False, "masked": False}
    own = OPS.linear_log_odds(hidden, weight, *rest, plan=0, **asked)[0]
    with pytest.raises(RuntimeError, match="without a backward"):
        own.sum().backward()
    moments = OPS.linear_log_odds(hidden, weight, *rest, plan=2, **asked)[2]
    assert not moments.requires_grad
    weight.requires_grad_()
    own = OPS.linear_log_odds(hidden, weight, *rest, plan=2, **asked)[0]
    with pytest.raises(RuntimeError, match="frozen head"):
        own.sum().backward()


@pytest.mark.parametrize("apart", (False, True))
@pytest.mark.parametrize("plan", (0, 1, 2))
def test_opcheck(plan, apart):
    hidden, weight, labels, bias = head(3, 8, V, torch.float32)
    labels = torch.stack([labels, (labels + 1) % V], 1)[:, : 2 if apart else 1]
    rest = (0.0, 1.0, -100, None, None)
    if plan:
        hidden.requires_grad_()
        weight.requires_grad_(plan == 1)
    options = {
        "plan": plan,
        "kept_bytes": 1 << 20,
        "moments": plan == 1,
        "apart": apart,
        "masked": False,
    }
    forward = (hidden, weight, labels, bias, *rest)
    torch.library.opcheck(OPS.linear_log_odds.default, forward, options)
    if plan == 0:
        return
    hidden, weight = hidden.detach(), weight.detach()
    own, others, moments, stats, kept = OPS.linear_log_odds(
        hidden, weight, labels, bias, *rest, **options
    )
    upstream = torch.randn_like(own), torch.randn_like(others)
    if plan == 1:
        problem = (hidden, weight, labels, bias, *rest)
        arguments = (*upstream, torch.randn_like(moments), own, stats, kept, *problem)
        wanted = {"wanted": [True, True, True]}
        torch.library.opcheck(OPS.linear_log_odds_backward.default, arguments, wanted)
    else:
        arguments = (*upstream, None, own, stats, kept, labels, weight if apart else None, *rest)
        torch.library.opcheck(OPS.frozen_head_backward.default, (*arguments, torch.float32))


@pytest.mark.parametrize("frozen", (False, True))
def test_compiled_without_graph_breaks(frozen):
    hidden, weight, labels, bias = head(6, 16, V, torch.float32)
    labels[2] = -100
    hidden.requires_grad_()
    weight.requires_grad_(not frozen)
    leaves = [hidden] if frozen else [hidden, weight]

    def loss(h, w):
        m, entropy = linear_log_odds(h * 2, w, labels, bias, outputs=("entropy",))
        return torch.nn.functional.logsigmoid(m).mean() + entropy.detach().mean()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got, wanted = (torch.autograd.grad(f(hidden, weight), leaves) for f in (compiled, loss))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_agrees_with_label_log_odds():
    hidden, weight, labels, bias = head(8, 32, V, torch.float32)
    logits = torch.nn.functional.linear(hidden, weight, bias)
    torch.testing.assert_close(
        linear_log_odds(hidden, weight, labels, bias),
        label_log_odds(logits, labels),
        rtol=1e-5,
        atol=3e-6,
    )
