"""A head's product whose logits are summed in its epilogue, under Triton's interpreter.

The interpreter multiplies bfloat16's codes, so that operands come as float32 of the same values.
"""

import math
import os
from typing import Any

import pytest
import torch
from torch import Tensor

from fastadapt import _C
from fastadapt._ops.linear import cuda
from fastadapt._ops.linear.cuda import CudaWork
from fastadapt._ops.linear.driver import FORWARD_ONLY, RECOMPUTE, Asked, _moments, forward
from fastadapt._ops.linear.tiles import Head, Problem

pytest.importorskip("triton", reason="triton is not installed: it has wheels for Linux")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("a GPU is there: the tests marked gpu run these kernels", allow_module_level=True)

from fastadapt._ops.triton.product import launch  # noqa: E402  (the interpreter is chosen before)

# of rows that hold NaN or infinities, where the interpreter is NumPy
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
INF = math.inf


class Interpreted(CudaWork):
    """Small tiles; the products that are not ours are without cuBLAS."""

    tile, rows = 256, 4

    def product(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        """Float32 of half precision."""
        out.copy_(a.to(out.dtype) @ b.to(out.dtype))


@pytest.fixture(autouse=True)
def _of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device can; operands of half precision are widened."""
    add_sums = launch.add_sums

    def widened(sides: launch.Sides, first: int, stats: Tensor, **given: Any) -> None:
        wide = sides._replace(hidden=sides.hidden.float(), weight=sides.weight.float())
        add_sums(wide, first, stats, **given)

    monkeypatch.setattr(launch, "add_sums", widened)
    monkeypatch.setattr(cuda, "capability_of", lambda x: cuda.HOPPER)


def sides(n: int, h: int, v: int, k: int = 1, *, seed: int = 0, **shape: Any) -> launch.Sides:
    """Logits of a few nats."""
    given = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, h, generator=given).bfloat16()
    weight = (torch.randn(v, h, generator=given) * 2 / h**0.5).bfloat16()
    labels = torch.randint(v, (n, k), generator=given)
    numbers = torch.tensor([shape.get("scale", 1.0), shape.get("cap", 1.0)], dtype=torch.float64)
    bias = torch.randn(v, generator=given) if shape.get("biased") else None
    return launch.Sides(hidden, weight, labels, bias, numbers, "cap" in shape)


def add(given: launch.Sides, first: int, last: int, stats: Tensor, **options: Any) -> None:
    """Adds ids [first, last)."""
    launch.add_sums(given._replace(weight=given.weight[first:last]), first, stats, **options)


def empty(n: int) -> Tensor:
    """Statistics of nothing."""
    stats = torch.zeros(n, _C.NUM_TILE_STATS, dtype=torch.float64)
    stats[:, _C.OTHERS_MAX] = -INF
    return stats


def truth(given: launch.Sides) -> Tensor:
    """(N, V) float64: the logits, -inf at labels."""
    z = given.hidden.double() @ given.weight.double().t()
    z = (z if given.bias is None else z + given.bias.double()) * given.numbers[0]
    if given.capped:
        z = given.numbers[1] * (z / given.numbers[1]).tanh()
    labels = given.labels.clamp(min=0)
    return torch.where(given.labels[:, :1] < 0, z, z.scatter(1, labels, -INF))


SHAPES = {
    "plain": {},
    "biased": {"biased": True},
    "capped": {"biased": True, "cap": 5.0, "scale": 1.5},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("n", "h", "v"), [(1, 64, 1), (127, 64, 129), (129, 192, 700)])
def test_sums_are_those_of_float64(shape, n, h, v):
    """Tiles follow one another; a label is in any of them, or elsewhere."""
    given = sides(n, h, v, **SHAPES[shape])
    given.labels[::5] = -1
    stats = empty(n)
    for first in range(0, v, 256):
        add(given, first, min(first + 256, v), stats, moments=True)
    z = truth(given)
    lse = z.logsumexp(1)
    got = stats[:, _C.OTHERS_MAX] + stats[:, _C.OTHERS_SUM].log()
    some = lse > -INF
    assert torch.equal(got > -INF, some)
    assert ((got - lse)[some].abs() <= 2e-6 * lse[some].abs().clamp(min=1)).all()
    logps = z[some] - lse[some, None]
    entropy = -(logps.exp() * logps.clamp(min=-1000)).sum(1)
    expected = torch.stack([entropy, logps.exp().square().sum(1)], 1)
    torch.testing.assert_close(_moments(stats[some]), expected, rtol=2e-5, atol=1e-9)


def test_several_labels_are_left_out():
    given = sides(9, 64, 300, 4)
    stats = empty(9)
    add(given, 0, 300, stats, moments=False)
    got = stats[:, _C.OTHERS_MAX] + stats[:, _C.OTHERS_SUM].log()
    torch.testing.assert_close(got, truth(given).logsumexp(1), rtol=2e-6, atol=2e-6)


def test_a_row_has_the_same_bits_in_any_batch_and_run():
    given = sides(130, 128, 300)
    kept = torch.empty(130, 300)
    found = []
    for rows in (slice(None), slice(None), slice(129, 130), slice(1, 130)):
        some = given._replace(hidden=given.hidden[rows], labels=given.labels[rows].contiguous())
        stats = empty(len(some.labels))
        add(some, 0, 300, stats, moments=True, kept=kept[rows])
        found.append(stats)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0][129:], found[2]) and torch.equal(found[0][1:], found[3])
    products = given.hidden.double() @ given.weight.double().t()
    torch.testing.assert_close(kept.double(), products, rtol=2e-6, atol=2e-6)


def test_rows_that_are_infinite_or_nan():
    given = sides(4, 64, 200, biased=True)
    given.hidden[1], given.hidden[2] = math.nan, INF
    given.bias[:150] = -INF
    given.labels[3] = 170
    stats = empty(4)
    add(given, 0, 128, stats, moments=True)
    assert (stats[[0, 3], _C.OTHERS_SUM] == 0).all()
    assert (stats[[0, 3], _C.OTHERS_MAX] == -INF).all()
    add(given, 128, 200, stats, moments=True)
    assert stats[1:3, _C.OTHERS_SUM].isnan().all()
    lse = truth(given).logsumexp(1)[[0, 3]]
    got = (stats[:, _C.OTHERS_MAX] + stats[:, _C.OTHERS_SUM].log())[[0, 3]]
    torch.testing.assert_close(got, lse, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("plan", [FORWARD_ONLY, RECOMPUTE])
@pytest.mark.parametrize("k", [1, 3])
def test_the_driver_sums_in_products(plan, k, monkeypatch):
    """As without: own logits, the others', what is kept."""
    given = sides(7, 64, 600, k, biased=True, cap=5.0)
    labels = given.labels if k == 1 else torch.stack([torch.randperm(600)[:k] for _ in range(7)])
    labels[2] = -100
    problem = Problem(
        given.hidden, given.weight, labels, given.bias.bfloat16(), 5.0, 1.0, -100, None, None
    )
    asked = Asked(plan, 1 << 30, True, True)
    found = forward(Interpreted, problem, asked)
    monkeypatch.setattr(cuda, "capability_of", lambda x: 80)
    expected = forward(Interpreted, problem, asked)
    assert torch.equal(found.own, expected.own)
    for name in ("others", "moments"):
        a, b = getattr(found, name), getattr(expected, name)
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)
    assert found.kept.numel() == expected.kept.numel() == (7 * 600 if plan == RECOMPUTE else 0)
    a, b = (x.kept[: 6 * 600].float() for x in (found, expected))  # of the rows that take part
    torch.testing.assert_close(a, b, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize(
    ("n", "h", "k", "dtype", "capability", "sums"),
    [
        (4096, 2048, 1, torch.bfloat16, 90, True),
        (4096, 2048, 1, torch.float16, 100, True),
        (4096, 4096, 1, torch.bfloat16, 90, False),
        (512, 4096, 8, torch.bfloat16, 90, True),
        (512, 4096, 9, torch.bfloat16, 90, False),
        (512, 2048, 1, torch.bfloat16, 80, False),
        (512, 2048, 1, torch.float32, 90, False),
        (512, 2000, 1, torch.bfloat16, 90, False),  # no multiple of 64
    ],
)
def test_where_it_is_predicted_to_be_faster(n, h, k, dtype, capability, sums, monkeypatch):
    monkeypatch.setattr(cuda, "capability_of", lambda x: capability)
    monkeypatch.setattr(cuda, "_has_wide_products", lambda: True)
    hidden, weight = torch.empty(n, h, dtype=dtype), torch.empty(8, h, dtype=dtype)
    head = Head.of_rows(None, hidden, weight, None, 0.0, 1.0)
    labels = torch.zeros(n, k, dtype=torch.int64)
    assert CudaWork(head._replace(labels=labels))._sums_in_products is sums
    shifted = torch.empty(8 * h + 1, dtype=dtype)[1:].view(8, h)  # no multiple of 16 bytes
    assert not CudaWork(head._replace(labels=labels, weight=shifted))._sums_in_products
