"""The plan that is told is the one that is carried out: its products, and what it holds."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastadapt._ops.linear.cpu import CpuWork
from fastadapt._ops.linear.cuda import CudaWork, work_of
from fastadapt._ops.linear.driver import (
    Asked,
    Upstream,
    backward,
    forward,
    frozen_head_backward,
)
from fastadapt._ops.linear.plans import LinearPlan, kept_bytes, number_of, plan_of
from fastadapt._ops.linear.tiles import Problem

N, H, V = 8, 64, 5003
MIB = 1 << 20
CASES = {  # which want gradients: hidden, weight, bias; and the budget
    "frozen head": ((True, False, False), None, 2.0),
    "grouped": ((True, True, True), 1 << 30, 3.0),
    "recompute": ((True, True, False), 0, 4.0),
    "partly grouped": ((True, True, False), N * 2048 * 4, 4 - 2048 / V),
    "forward only": ((False, False, False), None, 1.0),
}


def arguments(wants, dtype=torch.float32, n=N, h=H, v=V, device="cpu"):
    """hidden, weight, bias, empty where the device is meta."""
    shapes = ((n, h), (v, h), (v,))
    return [
        torch.zeros(shape, dtype=dtype, device=device, requires_grad=wanted)
        for shape, wanted in zip(shapes, wants, strict=True)
    ]


@pytest.mark.parametrize("name", CASES)
def test_the_products_are_counted(name):
    wants, budget, products = CASES[name]
    hidden, weight, bias = arguments(wants)
    plan = plan_of(hidden, weight, bias, memory_budget=budget)
    assert (plan.name, plan.products) == (name, pytest.approx(products))
    wanted = [x.requires_grad for x in (hidden, weight, bias)]
    number, allowed = number_of(hidden, weight, bias, False), kept_bytes(hidden, weight, budget)
    labels = torch.zeros(N, 1, dtype=torch.int64)
    upstream = Upstream(torch.ones(N, 1).double(), -torch.ones(N).double(), None)
    problem = Problem(
        hidden.detach(), weight.detach(), labels, bias.detach(), 0.0, 1.0, -100, None, None
    )
    with FlopCounterMode(display=False) as flops:  # it does not look into operators
        own, _, _, stats, kept = forward(CpuWork, problem, Asked(number, allowed, False, False))
        if name == "frozen head":
            frozen_head_backward(CpuWork, problem, upstream, own, stats, kept, False)
        elif name != "forward only":
            backward(CpuWork, problem, upstream, own, stats, kept, wanted)
    of_bias = 2 * N * V * wants[2]
    assert flops.get_total_flops() - of_bias == pytest.approx(products * 2 * N * H * V)


def test_what_is_kept_is_what_the_operator_keeps():
    for wants, budget, _ in CASES.values():
        hidden, weight, bias = arguments(wants, torch.bfloat16)
        budget = budget and budget // 2
        plan = plan_of(hidden, weight, bias, memory_budget=budget)
        number, allowed = number_of(hidden, weight, bias, False), kept_bytes(hidden, weight, budget)
        kept = torch.ops.fastadapt.linear_log_odds(
            hidden, weight, torch.zeros(N, 1, dtype=torch.int64), bias, 0.0, 1.0, -100, None, None,
            plan=number, kept_bytes=allowed, moments=False, apart=False, masked=False,
        )[4]  # fmt: skip
        assert plan.kept_bytes == kept.nbytes


def test_one_product_less_where_the_hidden_states_want_no_gradient():
    for wants, products in (((False, True, True), 3.0), ((False, False, True), 2.0)):
        assert plan_of(*arguments(wants), memory_budget=0).products == products


@pytest.mark.parametrize(
    ("n", "h", "v", "dtype", "kept", "products"),
    [
        (1024, 576, 49_152, torch.bfloat16, 1, 3),  # all, which fit 128 MiB
        (1024, 576, 49_152, torch.float32, 1, None),  # but for what is held beside them
        (4096, 896, 32_768, torch.float32, 0.75, None),  # 384 MiB, more than the gradient has
        (4096, 896, 32_768, torch.bfloat16, 1, None),
        (8192, 2048, 128_256, torch.bfloat16, 0.25, None),  # as many as weights
        (512, 4096, 151_936, torch.float32, 1, None),  # but for what is held beside them
    ],
)
def test_left_to_us_as_many_logits_are_kept_as_the_gradient_has_weights(
    n, h, v, dtype, kept, products
):
    hidden, weight, _ = arguments((True, True, False), dtype, n, h, v, "meta")
    plan, logits, tile = plan_of(hidden, weight), n * v * dtype.itemsize, n * 2048 * dtype.itemsize
    beside = plan.peak_bytes - plan.kept_bytes
    assert kept * logits - beside - tile <= plan.kept_bytes <= kept * logits
    assert plan.products == products or plan.products == 4 - plan.kept_bytes / logits
    if logits > 128 * MIB:
        assert plan.peak_bytes <= logits


@pytest.mark.parametrize(
    ("n", "wants", "budget", "expected"),
    [
        # sums of dhidden, a block of products, the gradient of a tile
        (4096, (True, True, False), 0, LinearPlan("recompute", 4.0, 0, (64 + 32 + 64) * MIB)),
        (16_384, (True, True, False), 0, LinearPlan("recompute", 4.0, 0, (256 + 16 + 128) * MIB)),
        # Jacobian rows, a block of products, its exponentials
        (4096, (True, False, False), None,
         LinearPlan("frozen head", 2.0, 64 * MIB, (64 + 32 + 64) * MIB)),
    ],
)  # fmt: skip
def test_peaks_on_cuda(n, wants, budget, expected, monkeypatch):
    """Llama 3's 8B head in bfloat16, at most 0.3 GiB over inputs and gradients for 4096 rows."""
    monkeypatch.setattr("fastadapt._ops.linear.plans.work_of", lambda hidden: CudaWork)
    inputs = arguments(wants, torch.bfloat16, n, 4096, 128_256, "meta")
    assert plan_of(*inputs, memory_budget=budget) == expected
    if n == 4096:
        assert expected.peak_bytes <= 0.3 * 2**30


def test_the_device_decides_about_the_work():
    assert work_of(torch.zeros(1)).tile == 2048


@pytest.mark.parametrize("in_one_call", [False, True])
def test_half_products_are_added_by_old_and_new_torch(in_one_call, monkeypatch):
    """torch before 2.10 has mm of half precision in float32, and no such addmm."""

    def mm(a, b, *, out_dtype):
        return (a.double() @ b.double()).to(out_dtype)

    def addmm(sums, a, b, *, out_dtype, out):
        assert in_one_call
        return out.copy_(sums + mm(a, b, out_dtype=out_dtype))

    a, b, sums = torch.randn(3, 5).bfloat16(), torch.randn(5, 4).bfloat16(), torch.randn(3, 4)
    expected = sums.double() + a.double() @ b.double()
    monkeypatch.setattr("fastadapt._ops.linear.cuda._adds_wide_products", lambda: in_one_call)
    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch, "addmm", addmm)
    CudaWork.add_product(None, sums, a, b)
    assert torch.allclose(sums.double(), expected, atol=1e-6)
