"""Divergence of two heads on a CUDA device: against the CPU, its rows and runs, its memory."""

import pytest
import torch

from fastadapt import linear_divergence
from fastadapt.losses.divergence import plan_of

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("device")]

KINDS = ("kl", "reverse_kl", "jsd")
CAPPED = {"softcap": 5.0, "logit_scale": 1.5, "teacher_softcap": 4.0, "temperature": 1.3}


def heads(n, h, v, dtype):
    """hidden, weight, bias, the same of a narrower teacher, upstream; some without a gradient."""
    shapes = (n, h), (v, h), (v,), (n, h // 2), (v, h // 2), (v,)
    scales = 1.0, 2 / h**0.5, 1.0, 1.0, 2 / (h // 2) ** 0.5, 1.0
    given = [(torch.randn(s) * scale).to(dtype) for s, scale in zip(shapes, scales, strict=True)]
    upstream = torch.randn(n)
    upstream[5::11] = 0.0
    return *given, upstream


def results(
    hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, upstream, **options
):
    """Divergences and gradients; a few rows do not count."""
    leaves = [x.detach().requires_grad_() for x in (hidden, weight, bias)]
    mask = torch.arange(len(hidden), device=hidden.device) % 7 != 3
    values = linear_divergence(
        leaves[0], leaves[1], teacher_hidden, teacher_weight, bias=leaves[2],
        teacher_bias=teacher_bias, mask=mask, **options,
    )  # fmt: skip
    gradients = torch.autograd.grad(values, leaves, upstream.to(values.dtype))
    return [values.detach(), *gradients]


@pytest.mark.parametrize("shape", ({}, CAPPED), ids=("plain", "capped"))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_divergences_equal_the_cpu(on_device, dtype, kind, shape):
    """Float32 without TF32: within its rounding, of sums in another order."""
    assert not torch.backends.cuda.matmul.allow_tf32
    inputs = heads(1100, 96, 17_000, dtype)
    ours = on_device(results, *inputs, kind=kind, **shape)
    wanted = results(*inputs, kind=kind, **shape)
    tolerance = 2e-5 if dtype == torch.float32 else 1e-11
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def adapted(*inputs, kind):
    """Divergences of heads with adapters, and the gradients of the student's."""
    hidden, weight, teacher_hidden, teacher_weight, a, b, other_a, other_b = inputs
    leaves = [x.detach().requires_grad_() for x in (hidden, weight, a, b)]
    values = linear_divergence(
        *leaves[:2], teacher_hidden, teacher_weight, kind=kind, lora=(*leaves[2:], 1.3),
        teacher_lora=(other_a, other_b, 0.6),
    )  # fmt: skip
    return [values.detach(), *torch.autograd.grad(values.sum(), leaves)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_adapters_equal_the_cpu(on_device, dtype, kind):
    hidden, weight, _, teacher_hidden, teacher_weight, *_ = heads(1100, 96, 17_000, dtype)
    shapes = (3, 96), (17_000, 3), (5, 48), (17_000, 5)
    loras = [(torch.randn(shape) / shape[1] ** 0.5).to(dtype) for shape in shapes]
    inputs = hidden, weight, teacher_hidden, teacher_weight, *loras
    ours, wanted = on_device(adapted, *inputs, kind=kind), adapted(*inputs, kind=kind)
    tolerance = 2e-5 if dtype == torch.float32 else 1e-11
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_heads_under_autocast_are_cast_by_tiles(device, kind):
    """The bits of half-precision heads; the student's gradient is float32, no head is copied."""
    n, h, v = 512, 1024, 65_536
    hidden, weight, *teacher = [torch.randn(s, h, device=device) for s in (n, v, n, v)]
    half = linear_divergence(*(x.bfloat16() for x in (hidden, weight, *teacher)), kind=kind)
    leaf = weight.requires_grad_()
    for _ in range(2):  # cuBLAS takes its workspace in the first
        leaf.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            values = linear_divergence(hidden, leaf, *teacher, kind=kind)
            plan = plan_of(hidden, leaf, teacher[0], kind=kind)
        values.sum().backward()
        peak = torch.cuda.max_memory_allocated() - before - leaf.grad.nbytes
    assert torch.equal(values, half) and leaf.grad.dtype == torch.float32
    assert peak <= plan.peak_bytes + (8 << 20) and plan.peak_bytes < 2 * v * h * 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_errors_of_half_divergences_are_no_more_than_those_of_the_cpu(on_device, dtype, kind):
    """Against float64; divergences have float32's error, since no logit is rounded."""
    inputs = heads(1100, 96, 17_000, dtype)
    exact = results(*(x.double() for x in inputs), kind=kind)
    ours, cpu = on_device(results, *inputs, kind=kind), results(*inputs, kind=kind)
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=1e-5, atol=1e-5)
    for a, b, c in zip(ours[1:], cpu[1:], exact[1:], strict=True):
        error, allowed = ((x.double() - c).norm() / c.norm() for x in (a, b))
        assert error <= 1.3 * allowed


@pytest.mark.parametrize("kind", KINDS)
def test_the_divergence_of_a_row_depends_on_no_other(device, kind):
    """To the last bit: few rows, many, in other places, and again."""
    hidden, weight, _, *teacher = (x.to(device) for x in heads(2500, 256, 20_001, torch.bfloat16))
    with torch.no_grad():

        def of(rows):
            states = hidden[rows], weight, teacher[0][rows], teacher[1]
            return linear_divergence(*states, kind=kind)

        whole = of(slice(None))
        for rows in (slice(7, 8), slice(1000, 1100), slice(3, 2400), slice(None)):
            assert torch.equal(of(rows), whole[rows])
        order = torch.randperm(2500, device=device)
        assert torch.equal(of(order), whole[order])


@pytest.mark.parametrize("kind", KINDS)
def test_peaks_are_those_of_the_plan(device, kind):
    """Over inputs and gradients, no row left out; 8 MiB for what is a few numbers a row."""
    n, h, v = 4096, 1024, 32_768
    made = [torch.randn(s, h, device=device, dtype=torch.bfloat16) for s in (n, v, n, v)]
    hidden, weight = (x.requires_grad_() for x in made[:2])
    for _ in range(2):  # cuBLAS takes its workspace in the first
        hidden.grad = weight.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        linear_divergence(*made, kind=kind).sum().backward()
        peak = torch.cuda.max_memory_allocated() - before
    returned = hidden.grad.nbytes + weight.grad.nbytes
    assert peak <= plan_of(*made[:3], kind=kind).peak_bytes + returned + (8 << 20)
