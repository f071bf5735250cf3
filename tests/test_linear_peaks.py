"""The peaks of linear heads on the CPU: those that the plans tell, in a process of its own."""

import subprocess
import sys

import pytest

from fastadapt._ops import memory

MIB = 1 << 20
# Steps of each plan: its name, what it needed, what the plan tells with the gradients that are
# returned, what the libraries' products of a tile need for themselves, and the bytes of all logits.
STEPS = """
import torch
from fastadapt import linear_log_odds, linear_mle_loss
from fastadapt._ops import memory
from fastadapt._ops.linear.cpu import TILE
from fastadapt.linear import plan_of
from fastadapt.losses.linear_mle import plan_of as plan_of_loss

N, H, V = 2048, 16, 16_000

def step(function, plan_of, dtype, frozen, budget, sizes=(N, H, V), autocast=False):
    n, h, v = sizes
    hidden = torch.randn(n, h).to(dtype).requires_grad_()
    weight = torch.randn(v, h).to(dtype).requires_grad_(not frozen)
    labels = torch.randint(v, (n,))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        plan = plan_of(hidden, weight, memory_budget=budget)
        with memory.PeakMemory() as peak:
            function(hidden, weight, labels, memory_budget=budget).sum().backward()
    returned = sum(x.grad.nbytes for x in (hidden, weight) if x.grad is not None)
    return plan.name, peak.extra, plan.peak_bytes + returned, n * v * hidden.element_size()

def of_libraries(rows, dtype, h=H):
    shapes = ((rows, h), (TILE, h), (rows, TILE))
    hidden, weight, tile = (torch.ones(shape, dtype=dtype) for shape in shapes)
    extra = 0
    for a, b in ((hidden, weight.t()), (tile, weight), (tile.t(), hidden)):
        out = a.new_empty(a.shape[0], b.shape[1])
        torch.mm(a, b, out=out)
        with memory.PeakMemory() as peak:
            torch.mm(a, b, out=out)
        extra += peak.extra
    return extra

memory.return_freed_blocks()
for dtype in (torch.float32, torch.bfloat16):
    few = 8 << 20
    for function, plan, frozen, budget, rows in (
        (linear_mle_loss, plan_of_loss, False, few, few // (V * dtype.itemsize)),
        (linear_mle_loss, plan_of_loss, True, few, few // (V * dtype.itemsize)),
        (linear_log_odds, plan_of, True, None, N),
        (linear_log_odds, plan_of, False, 0, N),
        (linear_log_odds, plan_of, False, 24 << 20, N),
        (linear_log_odds, plan_of, False, 1 << 30, N),
    ):
        step(function, plan, dtype, frozen, budget)  # libraries compile their products, to keep
        name, *bytes_, logits = step(function, plan, dtype, frozen, budget)
        print(name, *bytes_, of_libraries(rows, dtype), logits, sep=";")
"""
# A tenth of Llama 3's 8B head in float32 over 256 rows, under autocast.
CAST = f"""{STEPS.partition("memory.return_freed_blocks()")[0]}
memory.return_freed_blocks()
for function, plan in ((linear_log_odds, plan_of), (linear_mle_loss, plan_of_loss)):
    for _ in range(2):
        *_, measured, told, _ = step(
            function, plan, torch.float32, function is linear_mle_loss, 0, (256, 4096, 12_826), True
        )
    print(measured, told, of_libraries(256, torch.bfloat16, 4096))
"""
# The same of two such heads, the teacher's of another width.
PAIR = f"""{STEPS.partition("memory.return_freed_blocks()")[0]}
from fastadapt import linear_divergence
from fastadapt.losses.divergence import plan_of as plan_of_pair

def pair(kind):
    states = torch.randn(256, 2048).requires_grad_(), torch.randn(256, 4096)
    heads = torch.randn(12_826, 2048).requires_grad_(), torch.randn(12_826, 4096)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plan = plan_of_pair(states[0], heads[0], states[1], teacher_weight=heads[1], kind=kind)
        with memory.PeakMemory() as peak:
            linear_divergence(states[0], heads[0], states[1], heads[1], kind=kind).sum().backward()
    assert heads[0].grad.dtype == torch.float32
    returned = states[0].grad.nbytes + heads[0].grad.nbytes
    return peak.extra - returned, plan.peak_bytes

memory.return_freed_blocks()
for kind in ("kl", "jsd"):
    pair(kind)
    libraries = of_libraries(256, torch.bfloat16, 2048) + of_libraries(256, torch.bfloat16, 4096)
    print(*pair(kind), libraries)
"""


@pytest.mark.skipif(
    not memory.is_measurable(), reason="this system does not tell the peak of a process"
)
def test_peaks_are_those_of_the_plans(tmp_path):
    """To 3 MiB: pages counted late, and blocks of half a product."""
    run = [sys.executable, "-P", "-c", STEPS]
    done = subprocess.run(run, cwd=tmp_path, check=True, capture_output=True, text=True)
    lines = [line.split(";") for line in done.stdout.splitlines()]
    names = ["gradients in the forward"] * 2 + ["frozen head", "recompute", "partly grouped"]
    assert [name for name, *_ in lines] == [*names, "grouped"] * 2
    for name, *numbers in lines:
        measured, told, of_libraries, logits = map(int, numbers)
        assert told - 3 * MIB <= measured <= told + of_libraries + 3 * MIB, name
        assert name == "grouped" or measured < 0.6 * logits


@pytest.mark.skipif(
    not memory.is_measurable(), reason="this system does not tell the peak of a process"
)
def test_a_float32_head_under_autocast_is_not_copied(tmp_path):
    """What is held beside the gradients is less than a tenth of its copy in half precision."""
    run = [sys.executable, "-P", "-c", CAST]
    done = subprocess.run(run, cwd=tmp_path, check=True, capture_output=True, text=True)
    trained, frozen = (tuple(map(int, line.split())) for line in done.stdout.splitlines())
    returned = 4 * 4096 * (12_826 + 256)
    for measured, told, of_libraries in (trained, frozen):
        assert measured <= told + of_libraries + 3 * MIB
    assert trained[1] - returned < 12_826 * 4096 * 2 / 3


@pytest.mark.skipif(
    not memory.is_measurable(), reason="this system does not tell the peak of a process"
)
def test_two_float32_heads_under_autocast_are_not_copied(tmp_path):
    """A tile of each is, of the six in the vocabulary; their copies would take 158 MB."""
    run = [sys.executable, "-P", "-c", PAIR]
    done = subprocess.run(run, cwd=tmp_path, check=True, capture_output=True, text=True)
    for line in done.stdout.splitlines():
        measured, told, of_libraries = map(int, line.split())
        assert measured <= told + of_libraries + 3 * MIB
        assert told < 12_826 * (2048 + 4096) * 2 / 3
