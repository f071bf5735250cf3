"""The linear head on a CUDA device: against the CPU, its rows and runs, its memory, NCCL."""

import pytest
import torch

from fastadapt import Support, linear_log_odds, linear_mle_loss, linear_support_log_odds
from fastadapt._ops.linear.plans import plan_of

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("device")]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def linear_head(n, h, v, dtype):
    """hidden, weight, labels, bias and upstream gradients; some rows ignored or without one."""
    hidden, weight, bias = torch.randn(n, h), torch.randn(v, h) * 2 / h**0.5, torch.randn(v)
    labels, upstream = torch.randint(v, (n,)), torch.randn(n)
    labels[3::7], upstream[5::11] = -100, 0.0
    return hidden.to(dtype), weight.to(dtype), labels, bias.to(dtype), upstream


def linear_results(hidden, weight, labels, bias, upstream, *, frozen=False, **options):
    """Log-odds, their extra outputs and the gradients that are wanted."""
    leaves = [x.detach().requires_grad_(not frozen) for x in (hidden, weight, bias)]
    leaves[0].requires_grad_()
    out = linear_log_odds(
        leaves[0], leaves[1], labels, leaves[2], outputs=("entropy", "logsumexp", "hit"), **options
    )
    wanted = [x for x in leaves if x.requires_grad]
    gradients = torch.autograd.grad(out[0], wanted, upstream.to(out[0].dtype))
    return [*(x.detach() for x in out), *gradients]


LINEAR_PLANS = {
    "recompute": {"memory_budget": 0},
    "kept": {"memory_budget": 1 << 40},
    "half_kept": {"memory_budget": 1100 * 8192 * 4},
    "frozen": {"frozen": True},
}


@pytest.mark.parametrize("shape", ({}, {"softcap": 5.0, "logit_scale": 1.5}), ids=("plain", "cap"))
@pytest.mark.parametrize("plan", LINEAR_PLANS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_linear_heads_equal_the_cpu(on_device, dtype, plan, shape):
    """Float32 without TF32: within its rounding, of sums in another order."""
    assert not torch.backends.cuda.matmul.allow_tf32
    inputs, options = linear_head(1100, 96, 17_000, dtype), {**LINEAR_PLANS[plan], **shape}
    ours = on_device(linear_results, *inputs, **options)
    wanted = linear_results(*inputs, **options)
    tolerance = 2e-5 if dtype == torch.float32 else 1e-11
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("plan", LINEAR_PLANS)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_errors_of_half_linear_heads_are_no_more_than_those_of_the_cpu(on_device, dtype, plan):
    """Against float64; log-odds have float32's error, since nothing is rounded before.

    Logits that are kept are rounded after their sum was taken, on the CPU before.
    """
    inputs, options = linear_head(1100, 96, 17_000, dtype), LINEAR_PLANS[plan]
    double = [x.double() if x.is_floating_point() else x for x in inputs]
    exact = linear_results(*double, **options)
    ours, cpu = on_device(linear_results, *inputs, **options), linear_results(*inputs, **options)
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=1e-5, atol=1e-5)
    for a, b, c in zip(ours[4:], cpu[4:], exact[4:], strict=True):
        error, allowed = ((x.double() - c).norm() / c.norm() for x in (a, b))
        assert error <= 1.3 * allowed


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_the_log_odds_of_a_row_depends_on_no_other(device, dtype):
    """To the last bit: few rows, many, in other places."""
    hidden, weight, labels, *_ = (x.to(device) for x in linear_head(2500, 256, 20_001, dtype))
    with torch.no_grad():
        whole = linear_log_odds(hidden, weight, labels)
        for rows in (slice(7, 8), slice(1000, 1100), slice(3, 2400)):
            some = linear_log_odds(hidden[rows], weight, labels[rows])
            assert torch.equal(some, whole[rows])
        order = torch.randperm(2500, device=device)
        shuffled = linear_log_odds(hidden[order], weight, labels[order])
        assert torch.equal(shuffled, whole[order])


@pytest.mark.parametrize("plan", LINEAR_PLANS)
def test_linear_heads_are_deterministic(device, plan):
    inputs = [x.to(device) for x in linear_head(1100, 96, 17_000, torch.bfloat16)]
    first, second = (linear_results(*inputs, **LINEAR_PLANS[plan]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("frozen", "budget"), [(False, 0), (False, 300 << 20), (True, None)])
def test_peaks_of_linear_heads_are_those_of_the_plan(device, frozen, budget):
    """Over inputs and gradients, no row ignored; 8 MiB for what is a few numbers a row."""
    n, h, v = 4096, 1024, 32_768
    hidden = torch.randn(n, h, device=device, dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(v, h, device=device, dtype=torch.bfloat16).requires_grad_(not frozen)
    labels = torch.randint(v, (n,), device=device)
    for _ in range(2):  # cuBLAS takes its workspace in the first
        hidden.grad = weight.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        linear_log_odds(hidden, weight, labels, memory_budget=budget).sum().backward()
        peak = torch.cuda.max_memory_allocated() - before
    returned = sum(x.grad.nbytes for x in (hidden, weight) if x.grad is not None)
    assert peak <= plan_of(hidden, weight, memory_budget=budget).peak_bytes + returned + (8 << 20)


def adapter_results(hidden, weight, labels, bias, upstream, a, b, *, frozen=False, **options):
    """Log-odds of a frozen head with a LoRA adapter, trained or frozen too, and gradients."""
    leaves = [x.detach().requires_grad_(not frozen or x is hidden) for x in (hidden, a, b)]
    lora = leaves[1], leaves[2], 0.7
    log_odds = linear_log_odds(leaves[0], weight, labels, bias, lora=lora, **options)
    wanted = [x for x in leaves if x.requires_grad]
    return [log_odds.detach(), *torch.autograd.grad(log_odds, wanted, upstream.to(log_odds.dtype))]


def adapter(h, v, r, dtype):
    """A and B, of logits of a nat or so."""
    return (torch.randn(r, h) / h**0.5).to(dtype), (torch.randn(v, r) / r**0.5).to(dtype)


@pytest.mark.parametrize("r", (1, 3, 16))
@pytest.mark.parametrize("plan", LINEAR_PLANS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_adapters_equal_the_cpu(on_device, dtype, plan, r):
    inputs = [*linear_head(1100, 96, 17_000, dtype), *adapter(96, 17_000, r, dtype)]
    ours = on_device(adapter_results, *inputs, **LINEAR_PLANS[plan])
    wanted = adapter_results(*inputs, **LINEAR_PLANS[plan])
    tolerance = 2e-5 if dtype == torch.float32 else 1e-11
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("lora_dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("plan", LINEAR_PLANS)
def test_errors_of_half_adapters_are_no_more_than_those_of_the_cpu(on_device, plan, lora_dtype):
    """Log-odds have float32's error, and that of low-rank states where A is of half precision."""
    inputs = [*linear_head(1100, 96, 17_000, torch.bfloat16), *adapter(96, 17_000, 8, lora_dtype)]
    double = [x.double() if x.is_floating_point() else x for x in inputs]
    exact, cpu = (adapter_results(*given, **LINEAR_PLANS[plan]) for given in (double, inputs))
    ours = on_device(adapter_results, *inputs, **LINEAR_PLANS[plan])
    if lora_dtype == torch.float32:
        torch.testing.assert_close(ours[0].double(), exact[0], rtol=1e-5, atol=1e-5)
    for a, b, c in zip(ours, cpu, exact, strict=True):
        error, allowed = ((x.double() - c).norm() / c.norm() for x in (a, b))
        assert error <= 1.3 * allowed
    again = on_device(adapter_results, *inputs, **LINEAR_PLANS[plan])
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))


@pytest.mark.parametrize("trained", (False, True))
def test_peaks_of_adapters_are_those_of_the_plan(device, trained):
    n, h, v, r = 4096, 1024, 32_768, 16
    hidden = torch.randn(n, h, device=device, dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(v, h, device=device, dtype=torch.bfloat16)
    a, b = (x.to(device).requires_grad_(trained) for x in adapter(h, v, r, torch.float32))
    labels, leaves = torch.randint(v, (n,), device=device), (hidden, a, b)
    for _ in range(2):  # cuBLAS takes its workspace in the first
        for leaf in leaves:
            leaf.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        linear_log_odds(hidden, weight, labels, lora=(a, b, 1.0), memory_budget=0).sum().backward()
        peak = torch.cuda.max_memory_allocated() - before
    returned = sum(x.grad.nbytes for x in leaves if x.grad is not None)
    told = plan_of(hidden, weight, lora=(a, b, 1.0), memory_budget=0).peak_bytes
    assert peak <= told + returned + (8 << 20)


def mle_results(hidden, weight, labels, bias, _, *low):
    """The loss and its gradients, those of an adapter too, of blocks of 1024 rows."""
    leaves = [x.detach().requires_grad_() for x in (hidden, weight, bias, *low)]
    lora = (*leaves[3:], 0.7) if low else None
    options = {"z_loss": 0.01, "label_smoothing": 0.1, "memory_budget": 0, "lora": lora}
    loss = linear_mle_loss(*leaves[:2], labels, leaves[2], **options)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("r", (0, 3))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_a_loss_with_its_gradients_equals_the_cpu(on_device, dtype, r):
    low = adapter(96, 17_000, r, dtype) if r else ()
    inputs = [*linear_head(2500, 96, 17_000, dtype), *low]
    ours, again = (on_device(mle_results, *inputs) for _ in range(2))
    tolerance = 2e-5 if dtype == torch.float32 else 1e-11
    for a, b, wanted in zip(ours, again, mle_results(*inputs), strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, wanted, rtol=tolerance, atol=tolerance)


def test_labels_out_of_range_spoil_their_own_rows_of_a_linear_head(device):
    hidden, weight, _, bias, upstream = (x.to(device) for x in linear_head(3, 16, 40, DTYPES[0]))
    labels = torch.tensor([40, -1, 3], device=device)
    for frozen in (False, True):
        log_odds, _, _, _, dhidden, *rest = linear_results(
            hidden, weight, labels, bias, upstream, frozen=frozen
        )
        assert log_odds.isnan().tolist() == [True, True, False]
        assert not dhidden[:2].any()
        assert not any(x.isnan().any() for x in (dhidden, *rest))


def test_a_linear_head_of_one_rank_through_nccl(device, tmp_path):
    """The exchange itself runs on CPU processes in test_vocab_parallel.py."""
    inputs = [x.to(device) for x in linear_head(50, 32, 9001, torch.float32)]
    torch.distributed.init_process_group("nccl", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        group = torch.distributed.group.WORLD
        for options in LINEAR_PLANS.values():
            ours = linear_results(*inputs, group=group, **options)
            wanted = linear_results(*inputs, **options)
            for a, b in zip(ours, wanted, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    finally:
        torch.distributed.destroy_process_group()


def support_results(hidden, weight, labels, bias, upstream, support, **options):
    """Log-odds on a support and the gradients of hidden states, head (made dense) and bias."""
    leaves = [x.detach().requires_grad_() for x in (hidden, weight, bias)]
    own = support.to(hidden.device)
    out = linear_support_log_odds(leaves[0], leaves[1], labels, own, bias=leaves[2], **options)
    gradients = torch.autograd.grad(out, leaves, upstream.to(out.dtype))
    return [out.detach(), *(g.to_dense() for g in gradients)]


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_supports_equal_the_cpu(on_device, dtype, sparse):
    """And give the same bits twice, but for the bias."""
    n, v = 300, 2000
    hidden, weight, labels, bias, upstream = linear_head(n, 200, v, dtype)
    mask = torch.rand(n, v) < torch.rand(n, 1) ** 4
    mask[torch.arange(n), labels.clamp(min=0)] = True
    inputs = hidden, weight, labels, bias, upstream, Support.from_mask(mask)
    ours = on_device(support_results, *inputs, sparse=sparse)
    wanted = support_results(*inputs, sparse=sparse)
    tolerance = {torch.float64: 1e-11, torch.float32: 2e-5}.get(dtype, 2e-2)
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    again = on_device(support_results, *inputs, sparse=sparse)
    assert all(torch.equal(a, b) for a, b in zip(ours[:3], again[:3], strict=True))
