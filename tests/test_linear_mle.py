"""`linear_mle_loss`: against float64 truth and `linear_log_odds`, its blocks, its memory, edges."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastadapt import Responses, linear_log_odds, linear_mle_loss, mle_loss, reference
from fastadapt._ops.linear.cpu import CpuWork
from fastadapt._ops.linear.cuda import CudaWork
from fastadapt._ops.linear.mle import Terms, block_rows, sum_of_losses
from fastadapt._ops.linear.plans import LinearPlan
from fastadapt._ops.linear.tiles import Problem
from fastadapt.losses.linear_mle import plan_of

OPS = torch.ops.fastadapt
V = 5003  # two whole tiles and a part
N = 150  # three blocks of 64 rows at least, the last one a part
MIB = 1 << 20
INF, NAN = float("inf"), float("nan")
BUDGETS = {"blocks": 0, "whole": None}
SHAPES = {
    "plain": {},
    "scaled": {"logit_scale": 0.3, "z_loss": 0.01, "label_smoothing": 0.1},
    "capped": {"softcap": 5.0, "logit_scale": 1.5, "z_loss": 0.01},
}


def head(n, h, v, dtype, bias=True):
    """hidden, weight, labels with some ignored, bias; losses of a few nats."""
    hidden, weight, b = torch.randn(n, h), torch.randn(v, h) * 2 / h**0.5, torch.randn(v)
    labels = torch.randint(v, (n,))
    labels[2::7] = -100
    return hidden.to(dtype), weight.to(dtype), labels, b.to(dtype) if bias else None


def gradients(f, hidden, weight, labels, bias, upstream=1.0, frozen=False, **options):
    """The loss, and gradients of hidden, weight and bias (of hidden alone where frozen)."""
    leaves = [x if x is None else x.clone() for x in (hidden, weight, bias)]
    for leaf in leaves[: 1 if frozen else 3]:
        if leaf is not None:
            leaf.requires_grad_()
    loss = f(leaves[0], leaves[1], labels, leaves[2], **options)
    wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss * upstream, wanted)]


@pytest.mark.parametrize("frozen", (False, True))
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("budget", BUDGETS)
def test_equals_the_truth_in_float64(budget, shape, frozen):
    given = head(N, 33, V, torch.float64)
    for options in ({}, {"reduction": "sum"}, {"num_items": 7}, {"num_items": torch.tensor(300)}):
        options |= {"frozen": frozen, "upstream": -1.7, **SHAPES[shape]}
        ours = gradients(linear_mle_loss, *given, **options, memory_budget=BUDGETS[budget])
        truth = gradients(reference.linear_mle_loss, *given, **options)
        assert len(ours) == (2 if frozen else 4)
        for a, b in zip(ours, truth, strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        assert (ours[1][2::7] == 0).all()


def test_smoothing_is_that_of_torch():
    hidden, weight, labels, bias = head(N, 33, V, torch.float64)
    loss = linear_mle_loss(hidden, weight, labels, bias, label_smoothing=0.2, logit_scale=0.7)
    logits = torch.nn.functional.linear(hidden, weight, bias) * 0.7
    truth = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.2)
    torch.testing.assert_close(loss, truth, rtol=1e-12, atol=0)


@pytest.mark.parametrize("frozen", (False, True))
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_error_is_no_more_than_that_of_plain_torch(each_capability, dtype, shape, frozen):
    """Half precision has one rounding more, of half an epsilon at most: products are rounded before
    they are added, and the sums at the end.
    """
    given = head(N, 96, V, dtype)
    options = {"frozen": frozen, "upstream": 0.37, **SHAPES[shape]}
    plain = gradients(reference.linear_mle_loss, *given, **options)
    wide = [x.double() if x.is_floating_point() else x for x in given]
    truth = gradients(reference.linear_mle_loss, *wide, **options)
    for _ in each_capability():
        ours = gradients(linear_mle_loss, *given, **options, memory_budget=0)
        for name, mine, theirs, exact in zip(
            ("loss", "hidden", "weight", "bias"), ours, plain, truth, strict=False
        ):
            error, allowed = ((x.double() - exact).norm() / exact.norm() for x in (mine, theirs))
            if dtype == torch.float32:  # both are a few roundings: which has more is chance
                assert error <= max(allowed, 1e-6), name
            else:
                rounding = torch.finfo(dtype).eps / 2
                assert error <= math.hypot(allowed * 1.02, rounding) + 1e-7, name


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_equals_mle_of_log_odds(dtype):
    """Rows are scored by the same driver: values differ by the sum of N numbers, float32 there."""
    hidden, weight, labels, bias = head(N, 40, V, dtype)
    log_odds = linear_log_odds(hidden, weight, labels, bias)
    loss = mle_loss(Responses.from_labels(log_odds[None], labels[None]))
    ours = linear_mle_loss(hidden, weight, labels, bias)
    # torch's products of other numbers of rows may add in another order; log p is a few nats
    bound = 4 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(ours, loss, rtol=bound, atol=0)
    training = linear_mle_loss(hidden.requires_grad_(), weight, labels, bias, memory_budget=0)
    torch.testing.assert_close(training.detach(), loss, rtol=bound, atol=0)


def test_upstream_gradients_scale_and_round_once():
    """A power of two changes no digit, and a loss scale saves what float16 would flush."""
    given = head(N, 40, V, torch.bfloat16)
    once, scaled = (gradients(linear_mle_loss, *given, upstream=u)[1:] for u in (1.0, 4.0))
    for a, b in zip(once, scaled, strict=True):
        assert torch.equal(a * 4, b)
    hidden, weight, labels, _ = head(N, 40, V, torch.float16, bias=False)
    options = {"num_items": 1 << 22}
    tiny, saved = (
        gradients(linear_mle_loss, hidden, weight, labels, None, upstream=u, **options)[1:]
        for u in (1.0, 2.0**16)
    )
    wide = hidden.double(), weight.double(), labels, None
    truth = gradients(reference.linear_mle_loss, *wide, upstream=2.0**16, **options)[1:]
    for lost, mine, exact in zip(tiny, saved, truth, strict=True):
        assert (mine.double() - exact).norm() < 2e-3 * exact.norm()
        assert (lost.double() * 2**16 - exact).norm() > 2e-2 * exact.norm()


def test_gradcheck(monkeypatch):
    monkeypatch.setattr(CpuWork, "tile", 5)
    monkeypatch.setattr(CpuWork, "rows", 2)
    hidden, weight, labels, bias = head(5, 4, 11, torch.float64)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    for shape in SHAPES.values():

        def loss(h, w, b, options=shape):
            return linear_mle_loss(h, w, labels, b, memory_budget=0, **options)

        torch.autograd.gradcheck(loss, leaves)


def test_only_the_wanted_gradients_are_made():
    hidden, weight, labels, bias = head(N, 8, V, torch.float32)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    options = {"memory_budget": 0, "z_loss": 0.01, "label_smoothing": 0.1}
    whole = torch.autograd.grad(linear_mle_loss(hidden, weight, labels, bias, **options), leaves)
    for chosen in ((0,), (1,), (2,), (0, 2), (1, 2), (0, 1)):
        for i, leaf in enumerate(leaves):
            leaf.requires_grad_(i in chosen)
        loss = linear_mle_loss(hidden, weight, labels, bias, **options)
        some = torch.autograd.grad(loss, [leaves[i] for i in chosen])
        for i, gradient in zip(chosen, some, strict=True):
            assert torch.equal(gradient, whole[i])
    weight.requires_grad_()
    with torch.no_grad():
        assert not linear_mle_loss(hidden, weight, labels, bias).requires_grad


def test_a_gradient_is_never_left_out_silently():
    hidden, weight, labels, _ = head(3, 8, 50, torch.float32)
    hidden.requires_grad_()
    problem = (hidden, weight, labels[:, None], None, 0.0, 1.0, -100, None, None)
    terms = {"z_loss": 0.0, "label_smoothing": 0.0, "memory_budget": None}
    loss = OPS.linear_mle(*problem, **terms, wanted=[False, True, False])[0]
    with pytest.raises(RuntimeError, match="linear_mle_loss: expected no gradient of hidden"):
        loss.backward()


CASES = {  # which want gradients, and how many products that takes
    "all": ((True, True, True), 3.0),
    "frozen head": ((True, False, False), 2.0),
    "frozen body": ((False, True, False), 2.0),
    "bias": ((False, False, True), 1.0),
    "none": ((False, False, False), 1.0),
}


@pytest.mark.parametrize("name", CASES)
def test_the_products_are_counted(name):
    """Of blocks of rows, padded on no device but CUDA."""
    wants, products = CASES[name]
    n, h, v = 200, 64, 3000
    inputs = [torch.zeros(shape) for shape in ((n, h), (v, h), (v,))]
    leaves = [x.requires_grad_(w) for x, w in zip(inputs, wants, strict=True)]
    plan = plan_of(*leaves, memory_budget=0)
    assert plan.products == products
    assert plan.name == ("gradients in the forward" if any(wants) else "forward only")
    labels = torch.zeros(n, 1, dtype=torch.int64)
    hidden, weight, bias = (x.detach() for x in leaves)
    problem = Problem(hidden, weight, labels, bias, 0.0, 1.0, -100, None, None)
    with FlopCounterMode(display=False) as flops:  # it does not look into operators
        sum_of_losses(CpuWork, problem, Terms(0.0, 0.0), list(wants), 0)
    of_bias = 2 * n * v * wants[2]
    assert flops.get_total_flops() - of_bias == products * 2 * n * h * v


def test_blocks_of_rows():
    """As many logits as the head has weights, whole multiples of what a product needs."""
    assert block_rows(CpuWork, 576, 49_152, 4, None) == 128 * MIB // (4 * 49_152) // 64 * 64
    assert block_rows(CpuWork, 4096, 128_256, 2, None) == 4096
    assert block_rows(CudaWork, 4096, 128_256, 2, None) == 4096
    assert block_rows(CudaWork, 896, 151_936, 2, None) == 1024
    assert block_rows(CpuWork, 4096, 128_256, 2, 0) == 64
    assert block_rows(CpuWork, 4096, 128_256, 2, 2 * 128_256 * 130) == 128


def test_peak_on_cuda(monkeypatch):
    """Llama 3's 8B head in bfloat16: gradients in float32, 4096 rows of logits, a tile."""
    monkeypatch.setattr("fastadapt._ops.linear.mle.work_of", lambda hidden: CudaWork)
    hidden = torch.zeros(16_384, 4096, dtype=torch.bfloat16, device="meta", requires_grad=True)
    weight = torch.zeros(128_256, 4096, dtype=torch.bfloat16, device="meta", requires_grad=True)
    sums = 4 * 4096 * (16_384 + 128_256)
    expected = sums + 4096 * 128_256 * 2 + (32 + 64) * MIB
    name = "gradients in the forward"
    assert plan_of(hidden, weight) == LinearPlan(name, 3.0, sums, expected)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_runs_strides_and_ignored_rows_change_no_bit(cpu_capability, dtype):
    hidden, weight, labels, bias = head(N, 40, V, dtype)
    options = {"memory_budget": 0, "z_loss": 0.01}
    wanted = gradients(linear_mle_loss, hidden, weight, labels, bias, **options)
    wide = torch.zeros(N, 64, dtype=dtype)
    wide[:, :40] = hidden
    strided = torch.zeros(2 * N, dtype=torch.int64)[::2].copy_(labels)
    for h, y in (
        (hidden, labels),
        (wide[:, :40], strided),
        (hidden.t().contiguous().t(), labels),
        (hidden.view(3, 50, 40), labels.view(3, 50)),
    ):
        got = gradients(linear_mle_loss, h, weight, y, bias, **options)
        for a, b in zip(got, wanted, strict=True):
            assert torch.equal(a.reshape(b.shape), b)
    used = labels != -100  # blocks are of rows that count
    got = gradients(linear_mle_loss, hidden[used], weight, labels[used], bias, **options)
    for a, b in zip(got, (wanted[0], wanted[1][used], *wanted[2:]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_threads(num_threads, dtype):
    """The row work and the loss are the same bits; torch's products may differ but for these."""
    hidden, weight, labels, bias = head(N, 8, V, dtype)
    small = [torch.randint(-8, 9, x.shape).to(dtype) / 8 for x in (hidden, weight, bias)]
    results = []
    for threads in (1, 2, 3):
        num_threads(threads)
        results.append(gradients(linear_mle_loss, small[0], small[1], labels, small[2]))
    for other in results[1:]:
        assert torch.equal(results[0][0], other[0])
        for a, b in zip(results[0], other, strict=True):
            tolerance = 1e-5 if dtype == torch.float32 else 1e-2
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance / 100)


def test_the_sum_of_many_rows_is_the_same_for_any_threads(num_threads):
    hidden, weight, labels, _ = head(100_000, 2, 3, torch.float64, bias=False)
    sums = []
    for threads in (1, 2, 3):
        num_threads(threads)
        sums.append(linear_mle_loss(hidden, weight, labels, reduction="sum"))
    assert torch.equal(sums[0], sums[1]) and torch.equal(sums[0], sums[2])


@pytest.mark.parametrize("log_odds", (0.0, 8.0, 17.0, 40.0, 100.0, 800.0))
def test_certain_labels(cpu_capability, log_odds):
    """A loss of e^-m has all its digits, and so have its gradients; from m = 745 on it is 0."""
    hidden, weight, labels, _ = head(4, 16, V, torch.float32)
    weight[:, 0], hidden[:, 0], labels[:] = 0.0, 1.0, 4100
    weight[4100] = 0.0
    others = (hidden.double() @ weight.double().t()).scatter(1, labels[:, None], -INF)
    hidden[:, 0] = (others.logsumexp(-1) + log_odds).float()
    weight[4100, 0] = 1.0
    ours = gradients(linear_mle_loss, hidden, weight, labels, None, reduction="sum")
    wide = hidden.double(), weight.double(), labels, None
    truth = gradients(reference.linear_mle_loss, *wide, reduction="sum")
    for a, b in zip(ours, truth, strict=True):
        # of V terms each is rounded to a step of float32's smallest numbers, times weights up to 2
        atol = 2e-6 * math.exp(-log_odds) + V * 1.5e-45
        torch.testing.assert_close(a.double(), b, rtol=3e-5, atol=atol)


@pytest.mark.parametrize("frozen", (False, True))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64), ids=str)
def test_no_rows_and_nothing_but_ignored_rows(dtype, frozen):
    for n in (0, 3):
        hidden, weight, labels, bias = head(n, 8, V, dtype)
        labels[:] = -7
        for reduction in ("mean", "sum"):
            options = {"ignore_index": -7, "reduction": reduction, "label_smoothing": 0.1}
            out = gradients(linear_mle_loss, hidden, weight, labels, bias, frozen=frozen, **options)
            assert all((x == 0).all() for x in out)
            shapes = [(), hidden.shape, weight.shape, bias.shape]
            assert [x.shape for x in out] == shapes[: len(out)]


def test_edges(cpu_capability):
    """One id; ids that are forbidden, a label among them; NaN."""
    hidden, weight, labels, bias = head(3, 8, 1, torch.float32)
    labels[:] = 0
    out = gradients(linear_mle_loss, hidden, weight, labels, bias)
    assert all((x == 0).all() for x in out)
    squared = gradients(linear_mle_loss, hidden, weight, labels, bias, z_loss=0.5)
    logits = torch.nn.functional.linear(hidden, weight, bias)
    torch.testing.assert_close(squared[0], 0.5 * logits.square().mean())
    torch.testing.assert_close(squared[1], logits / 3 * weight)
    hidden, weight, labels, bias = head(4, 8, V, torch.float32)
    bias[:4096], labels[:] = -INF, 4999
    ours, truth = (
        gradients(f, hidden, weight, labels, bias, z_loss=0.1)
        for f in (linear_mle_loss, reference.linear_mle_loss)
    )
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)
    assert linear_mle_loss(hidden, weight, labels, bias, label_smoothing=0.1) == INF
    labels[1] = 7
    loss, *grads = gradients(linear_mle_loss, hidden, weight, labels, bias)
    assert loss == INF and all(g.isfinite().all() for g in grads)
    hidden[2, 3], labels[1] = NAN, -100
    loss, dhidden, *_ = gradients(linear_mle_loss, hidden, weight, labels, bias)
    assert loss.isnan()
    assert dhidden.isnan().all(-1).tolist() == [False, False, True, False]


def test_autocast_and_a_float32_head_over_a_half_body():
    hidden, weight, labels, bias = head(6, 16, V, torch.float32)
    body = hidden.bfloat16()
    wanted = gradients(linear_mle_loss, body, weight.bfloat16(), labels, bias.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = gradients(linear_mle_loss, body, weight, labels, bias)
        with pytest.raises(TypeError, match="weight: expected torch.float64 as hidden, got .*32"):
            linear_mle_loss(hidden.double(), weight, labels)
    assert [x.dtype for x in got[1:]] == [torch.bfloat16, torch.float32, torch.float32]
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a.to(b.dtype), b)  # the float32 head's is not rounded before
    mixed, wide = (
        gradients(linear_mle_loss, x, weight, labels, bias) for x in (body, body.float())
    )
    assert [x.dtype for x in mixed[1:]] == [torch.bfloat16, torch.float32, torch.float32]
    for a, b in zip(mixed, wide, strict=True):
        assert torch.equal(a, b.to(a.dtype))


@pytest.mark.parametrize("frozen", (False, True))
def test_what_autograd_may_do(frozen):
    """Backward twice through one forward, accumulation; a double backward is refused by name."""
    hidden, weight, labels, _ = head(N, 8, 50, torch.float32)
    hidden.requires_grad_()
    weight.requires_grad_(not frozen)
    loss = linear_mle_loss(hidden, weight, labels)
    loss.backward(retain_graph=True)
    once = hidden.grad.clone()
    loss.backward(retain_graph=True)
    assert torch.equal(hidden.grad, once * 2)
    assert torch.equal(torch.autograd.grad(loss, hidden)[0], once)
    loss = linear_mle_loss(hidden, weight, labels)
    for upstream in (loss, loss.square()):  # with a graph to the second derivative, and without
        (gradient,) = torch.autograd.grad(upstream, hidden, create_graph=True)
        with pytest.raises(RuntimeError, match="linear_mle_loss: expected a first-order gradient"):
            (upstream + gradient.pow(2).sum()).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="linear_mle_loss: expected a first-order gradient"):
        torch.autograd.functional.hessian(
            lambda h: linear_mle_loss(h, weight.detach(), labels), hidden.detach()
        )


@pytest.mark.parametrize("wanted", ([True, True, True], [True, False, False], [False] * 3))
def test_opcheck(wanted):
    hidden, weight, labels, bias = head(3, 8, V, torch.float32)
    for x, w in zip((hidden, weight, bias), wanted, strict=True):
        x.requires_grad_(w)
    problem = (hidden, weight, labels[:, None], bias, 0.0, 1.0, -100, None, None)
    terms = {"z_loss": 0.1, "label_smoothing": 0.1, "memory_budget": 0}
    torch.library.opcheck(OPS.linear_mle.default, problem, {**terms, "wanted": wanted})
    for sums in (torch.randn(5, 3), torch.randn(7), torch.randn(0, 3)):
        arguments = sums, torch.tensor(0.3), torch.tensor(7.0), torch.bfloat16
        torch.library.opcheck(OPS.scaled_gradient.default, arguments)
        assert torch.equal(OPS.scaled_gradient(*arguments), (sums * 0.3).bfloat16())


@pytest.mark.parametrize("frozen", (False, True))
def test_compiled_without_graph_breaks(frozen):
    hidden, weight, labels, bias = head(N, 16, V, torch.float32)
    hidden.requires_grad_()
    weight.requires_grad_(not frozen)
    leaves = [hidden] if frozen else [hidden, weight]

    def loss(h, w):
        return linear_mle_loss(h * 2, w, labels, bias, z_loss=0.01) * 3

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got, wanted = (torch.autograd.grad(f(hidden, weight), leaves) for f in (compiled, loss))
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no distributed")
def test_a_head_split_over_ranks_is_refused(tmp_path):
    """Its slice is not the head; the message names what takes it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    hidden, weight, labels, _ = head(3, 8, 20, torch.float32)
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        split = distribute_tensor(weight, init_device_mesh("cpu", (1,)), [Shard(0)])
        with pytest.raises(
            ValueError, match="weight: expected a whole head, got a DTensor; linear"
        ):
            linear_mle_loss(hidden, split, labels)
    finally:
        torch.distributed.destroy_process_group()


def test_arguments_are_checked():
    hidden, weight, labels, bias = head(3, 8, 20, torch.float32)
    labels[:] = torch.tensor([0, -100, 1])
    cases = (
        (
            {"labels": labels.abs()},
            ValueError,
            r"labels: expected ids in \[0, 20\) or -100, got 100",
        ),
        ({"labels": labels[:1]}, ValueError, r"labels: expected shape \(3,\), got \(1,\)"),
        ({"labels": labels.tolist()}, TypeError, "labels: expected a Tensor, got list"),
        ({"weight": weight.t()}, ValueError, r"weight: expected shape \(V, 8\), V >= 1, got"),
        ({"weight": weight.bfloat16()}, TypeError, "weight: expected torch.float32 as hidden"),
        ({"weight": None}, TypeError, "weight: expected a Tensor, got NoneType"),
        ({"bias": bias[1:]}, ValueError, r"bias: expected shape \(20,\), got \(19,\)"),
        ({"bias": 0.0}, TypeError, "bias: expected a Tensor or None, got float"),
        ({"softcap": 0}, ValueError, "softcap: expected a value > 0, got 0"),
        ({"logit_scale": NAN}, ValueError, "logit_scale: expected a finite value, got nan"),
        ({"reduction": "none"}, ValueError, "reduction: expected one of mean, sum, got 'none'"),
        ({"reduction": "sum", "num_items": 3}, ValueError, "num_items: expected None with"),
        ({"num_items": 0}, ValueError, "num_items: expected at least 1 where some count, got 0"),
        ({"num_items": 2.5}, TypeError, "num_items: expected an integer or a tensor, got 2.5"),
        ({"z_loss": -1}, ValueError, "z_loss: expected a value >= 0, got -1"),
        ({"label_smoothing": 1.5}, ValueError, r"label_smoothing: expected a value in \[0, 1\]"),
        ({"label_smoothing": 0.1, "softcap": 2}, ValueError, "label_smoothing: expected 0 with a"),
        ({"memory_budget": -1}, ValueError, "memory_budget: expected at least 0, got -1"),
    )
    good = {"hidden": hidden, "weight": weight, "labels": labels, "bias": bias}
    for change, kind, message in cases:
        with pytest.raises(kind, match=message):
            linear_mle_loss(**{**good, **change})
