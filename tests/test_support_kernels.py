"""The Triton kernels of supports under Triton's interpreter: products and sums of few rows."""

import os

import pytest
import torch

from fastadapt._ops.lists import ends_of
from fastadapt._ops.supports.products import _sum_parts, support_products

triton = pytest.importorskip("triton", reason="triton is not installed: it has wheels for Linux")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("a GPU is there: the tests marked gpu run these kernels", allow_module_level=True)

from fastadapt._ops.triton.supports import launch  # noqa: E402  (the interpreter is chosen before)

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
BOUND = {torch.float64: 1e-13, torch.float32: 1e-5}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """So that rows have several, and parts are summed in turns of four."""
    monkeypatch.setattr(launch, "DEPTH", 16)
    monkeypatch.setattr(launch, "WIDTH", 8)
    monkeypatch.setattr(launch, "AT_ONCE", 4)


@pytest.mark.parametrize("h", [1, 8, 37])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products(dtype, h):
    hidden, weight = torch.randn(5, h + 3).to(dtype)[:, :h], torch.randn(40, h).to(dtype)
    offsets = torch.tensor([0, 3, 3, 20, 21, 21])
    ids, rows = torch.randint(40, (21,)), torch.tensor([0] * 3 + [2] * 17 + [3])
    out = torch.full((21,), float("nan"), dtype=torch.float64)
    launch.dot(hidden, weight, rows, ids, out)
    wanted = support_products(hidden.contiguous(), weight, ids, offsets, sparse=False)
    torch.testing.assert_close(out, wanted, rtol=0, atol=BOUND.get(dtype, 1e-5))
    launch.dot(hidden, weight, rows[:0], ids[:0], out[:0])


@pytest.mark.parametrize("h", [1, 8, 37])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums(dtype, h):
    """Each part goes to its place, rounded once; what is no place is left alone."""
    source = torch.randn(30, h).to(dtype)
    counts = torch.tensor([1, 0, 9, 4, 13])
    index, gain = torch.randint(30, (27,)), torch.randn(27, dtype=torch.float64)
    places = torch.tensor([4, 0, 6, 1, 2])
    ours, cpus = (torch.full((8, h), 7.0, dtype=dtype) for _ in range(2))
    launch.mix(source, gain, index, ends_of(counts), places, ours)
    _sum_parts(source, gain, index, ends_of(counts), places, cpus)
    rounding = {torch.bfloat16: 2**-7, torch.float16: 2**-10}.get(dtype, 0)
    torch.testing.assert_close(ours, cpus, rtol=rounding, atol=BOUND.get(dtype, 1e-5))
    assert bool((ours[[3, 5, 7]] == 7).all()) and bool((ours[0] == 0).all())
    launch.mix(source, gain, index, ends_of(counts[:0]), places[:0], ours)
