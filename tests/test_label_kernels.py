"""The Triton kernels of label and candidate log-odds under Triton's interpreter, against the CPU's.

Both sum in float32 and from there in float64, over other stretches and from other maxima, so that
the sums of a row differ by at most ULPS, and its log-odds by as much, absolutely, and one rounding.
Each entry of a gradient is a product with such a sum and differs by that and the exponentials.
"""

import os
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fastadapt import candidate_log_odds, label_log_odds, reference
from fastadapt._ops import common
from fastadapt._ops.log_odds import OPERATORS

triton = pytest.importorskip("triton", reason="triton is not installed: it has wheels for Linux")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("a GPU is there: the tests marked gpu run these kernels", allow_module_level=True)

from fastadapt._ops.triton import launch_losses  # noqa: E402  (the interpreter is chosen before)

# of rows that hold NaN or infinities, where the interpreter is NumPy
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
PLAN = launch_losses.Plan(block=64, candidates=4)
OPS = torch.ops.fastadapt
INF, NAN = float("inf"), float("nan")
KINDS = ("normal", "spread", "near_flat", "flat", "ties", "one_hot", "holes", "far", "huge")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS = [(kind, torch.float32) for kind in KINDS]
ROWS += [("spread", dtype) for dtype in (*DTYPES[1:], torch.float64)]
ROWS += [("ties", torch.bfloat16), ("holes", torch.float16)]
ULP = {torch.float32: 2.0**-23, torch.float64: 2.0**-52}
ULPS = 4


def launched(name: str, *arguments: Any, plan: launch_losses.Plan = PLAN) -> Any:
    """What an operator returns on CUDA, by small sizes."""
    out = OPERATORS[name][1](*arguments)
    getattr(launch_losses, name)(*arguments, out, plan)
    return out


def assert_log_odds(ours: Tensor, kernel: Tensor) -> None:
    """Within the rounding of the sums; NaN and infinities are equal."""
    ulp = ULP[ours.dtype]
    torch.testing.assert_close(kernel, ours, rtol=ulp, atol=ULPS * ulp, equal_nan=True)


def assert_stats(ours: Tensor, kernel: Tensor, dtype: torch.dtype) -> None:
    """Maxima, ids and logits are equal, sums within rounding."""
    exact = [0, 2, 3]
    torch.testing.assert_close(kernel[:, exact], ours[:, exact], rtol=0, atol=0, equal_nan=True)
    ulp = ULP[torch.float64 if dtype == torch.float64 else torch.float32]
    torch.testing.assert_close(
        kernel[:, 1], ours[:, 1], rtol=ULPS * ulp, atol=ULPS * ulp, equal_nan=True
    )


def assert_gradients(ours: Tensor, kernel: Tensor, largest: float = 0.0) -> None:
    """Within the rounding of sums and exponentials, and that to the dtype.

    `largest`: sum of a row's upstream gradients where they meet in one entry.
    """
    wide = ULP[torch.float64 if ours.dtype == torch.float64 else torch.float32]
    rtol = 2 * ULPS * wide
    atol = largest * rtol + 1e-37
    if ours.dtype in (torch.bfloat16, torch.float16):
        # numbers that close may be rounded apart, to neighbours
        rtol = torch.finfo(ours.dtype).eps
        atol += torch.finfo(ours.dtype).smallest_normal * rtol
    kernel = kernel.to(ours.dtype)
    torch.testing.assert_close(kernel, ours, rtol=rtol, atol=atol, equal_nan=True)


def gradient_of(name: str, *arguments: Tensor | int | None, plan: launch_losses.Plan) -> Tensor:
    """A backward, float32 for half precision, rounded by torch: the interpreter cuts off."""
    dlog_odds, logits, *_ = arguments
    out = torch.empty(logits.shape, dtype=dlog_odds.dtype)
    getattr(launch_losses, name)(*arguments, out, plan)
    return out


def assert_label(
    x: Tensor, y: Tensor, upstream: Tensor, plan: launch_losses.Plan = PLAN
) -> tuple[Tensor, Tensor]:
    """Forward and backward of labels as on the CPU; returns the kernels' results."""
    ours, stats = OPS.label_log_odds(x, y, -100)
    log_odds, kernel_stats = launched("label_log_odds", x, y, -100, plan=plan)
    assert_log_odds(ours, log_odds)
    assert_stats(stats, kernel_stats, x.dtype)
    upstream = upstream.to(ours.dtype)
    wanted = OPS.label_log_odds_backward(upstream, x, y, -100, stats)
    got = gradient_of("label_log_odds_backward", upstream, x, y, -100, kernel_stats, plan=plan)
    assert_gradients(wanted, got)
    return log_odds, got


def assert_candidates(
    x: Tensor,
    index: Tensor,
    mask: Tensor | None,
    upstream: Tensor,
    plan: launch_losses.Plan = PLAN,
) -> None:
    """Forward and backward of candidates as on the CPU."""
    ours, stats = OPS.candidate_log_odds(x, index, mask)
    log_odds, kernel_stats = launched("candidate_log_odds", x, index, mask, plan=plan)
    assert_log_odds(ours, log_odds)
    assert_stats(stats, kernel_stats, x.dtype)
    upstream = upstream.to(ours.dtype)
    wanted = OPS.candidate_log_odds_backward(upstream, x, index, mask, stats)
    got = gradient_of(
        "candidate_log_odds_backward", upstream, x, index, mask, kernel_stats, plan=plan
    )
    assert_gradients(wanted, got, float(upstream.abs().sum(1).max()))


@pytest.mark.parametrize(("kind", "dtype"), ROWS, ids=str)
def test_labels_equal_the_cpu(rows, kind, dtype):
    x = rows(kind, 5, 200).to(dtype)
    y = torch.randint(200, (5,))
    y[0], y[1] = x[0].argmax(), -100
    assert_label(x, y, torch.randn(5))


@pytest.mark.parametrize(("kind", "dtype"), ROWS, ids=str)
def test_candidates_equal_the_cpu(rows, kind, dtype):
    x = rows(kind, 4, 200).to(dtype)
    index = torch.randint(200, (4, 7))
    index[:, 1], index[:, 2], index[:, 6] = x.argmax(-1), index[:, 3], index[:, 3]
    mask = torch.rand(4, 7) < 0.7
    mask[3] = False
    assert_candidates(x, index, None, torch.randn(4, 7))
    assert_candidates(x, torch.where(mask, index, 999), mask, torch.randn(4, 7))


@pytest.mark.parametrize("v", (1, 2, 63, 64, 65))
def test_short_rows(v):
    x, upstream = torch.randn(3, v), torch.randn(3)
    log_odds, gradient = assert_label(x, torch.randint(v, (3,)), upstream)
    index = torch.randint(v, (3, 5))
    assert_candidates(x, index, None, torch.randn(3, 5))
    if v == 1:
        assert (log_odds == INF).all()
        assert not gradient.any()


def test_label_edges():
    x = torch.tensor(
        [
            [9.0, 1.0, 0.0],
            [9.0, -INF, -INF],
            [1.0, NAN, 0.0],
            [1.0, INF, 0.0],
            [-INF, 1.0, 0.0],
            [-INF, -INF, -INF],
            [NAN, 1.0, 0.0],
            [INF, 1.0, 0.0],
            [1.0, NAN, -INF],
        ]
    )
    y = torch.zeros(9, dtype=torch.int64)
    y[0] = -100
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for each, block in ((1.0, 2), (INF, 4)):
            plan = PLAN._replace(block=block)
            upstream = torch.full((9,), each)
            log_odds, gradient = assert_label(x.to(dtype), y, upstream, plan)
            wanted = torch.tensor([0.0, INF, NAN, NAN, -INF, INF, NAN, INF, NAN])
            torch.testing.assert_close(log_odds.float(), wanted, equal_nan=True)
            assert not gradient[[0, 1, 5]].any()
            assert gradient[2, 1:].isnan().all()


def test_labels_out_of_range_are_nan_and_have_no_gradient():
    x, upstream = torch.randn(4, 100), torch.tensor([1.0, NAN, INF, 1.0])
    y = torch.tensor([100, -1, 2**40, 7])
    log_odds, stats = launched("label_log_odds", x, y, -100)
    assert log_odds.isnan().tolist() == [True, True, True, False]
    gradient = launched("label_log_odds_backward", upstream, x, y, -100, stats)
    assert not gradient[:3].any()
    assert gradient[3].all()
    index = torch.stack([torch.arange(4), y], 1)
    log_odds, stats = launched("candidate_log_odds", x, index, None)
    assert log_odds.isnan().tolist() == [[False, True]] * 3 + [[False, False]]
    upstream = torch.stack([torch.zeros(4), upstream], 1)
    gradient = launched("candidate_log_odds_backward", upstream, x, index, None, stats)
    assert not gradient[:3].any()
    assert gradient[3].all()


def test_candidate_edges_are_those_of_the_reference():
    x = torch.tensor(
        [
            [INF, 1.0, 2.0],
            [-INF, -INF, -INF],
            [1.0, -INF, -INF],
            [NAN, -INF, -INF],
            [NAN, NAN, NAN],
            [1.0, NAN, 2.0],
            [INF, 1.0, INF],
        ]
    )
    index = torch.tensor([[0, 1, 2, 1]]).expand(7, 4).contiguous()
    wanted = reference.candidate_log_odds(x.double(), index).float()
    wanted[3, 0] = NAN  # a NaN against nothing is NaN on the CPU too, and +inf to the reference
    for block in (2, 4):
        plan = PLAN._replace(block=block)
        log_odds, stats = launched("candidate_log_odds", x, index, None, plan=plan)
        torch.testing.assert_close(log_odds, wanted, equal_nan=True)
        backward = partial(launched, "candidate_log_odds_backward")
        for mask in (None, torch.zeros_like(index, dtype=torch.bool)):
            upstream = torch.full(index.shape, INF)
            gradient = backward(upstream, x, index, mask, stats, plan=plan)
            assert not gradient[1].any()
            if mask is not None:
                assert not gradient.any()
        gradient = backward(torch.ones(index.shape), x, index, None, stats, plan=plan)
        assert gradient[0].isnan().all()
        assert gradient[3:].isnan().all()
        assert gradient[2].tolist() == [-3.0, 2.0, 1.0]


@pytest.mark.parametrize("log_odds", (0.0, 8.0, 17.0, 40.0, 100.0, -40.0))
def test_log_odds_that_log_probabilities_lose(log_odds):
    x = torch.randn(2, 300, dtype=torch.float64)
    x[:, 5] = log_odds + x[:, 6:].logsumexp(-1)
    x = x.float()
    index = torch.tensor([[5, 7, 5, 8, 299]] * 2)
    assert_label(x, index[:, 0].contiguous(), torch.randn(2))
    assert_candidates(x, index, None, torch.randn(2, 5))
    exact = reference.candidate_log_odds(x.double(), index)
    log_odds, stats = launched("candidate_log_odds", x, index, None)
    torch.testing.assert_close(log_odds.double(), exact, rtol=2.0**-23, atol=ULPS * 2.0**-23)
    leaf, upstream = x.double().requires_grad_(), torch.randn(2, 5)
    wanted = torch.autograd.grad(reference.candidate_log_odds(leaf, index), leaf, upstream.double())
    got = launched("candidate_log_odds_backward", upstream, x, index, None, stats)
    torch.testing.assert_close(got.double(), wanted[0], rtol=3e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_strides_and_other_rows_change_no_bit(rows, dtype):
    x = rows("spread", 4, 200).to(dtype)
    index, upstream = torch.randint(200, (4, 6)), torch.randn(4, 6)
    wide = torch.zeros(4, 230, dtype=dtype)
    wide[:, 11:211] = x
    views = [x, wide[:, 11:211], x[2:3].expand(4, -1)]

    def results(x, index, upstream):
        log_odds, stats = launched("label_log_odds", x, index[:, 0].contiguous(), -100)
        label = launched(
            "label_log_odds_backward", upstream[:, 0], x, index[:, 0].contiguous(), -100, stats
        )
        own, tops = launched("candidate_log_odds", x, index, None)
        candidate = launched("candidate_log_odds_backward", upstream, x, index, None, tops)
        return log_odds, stats, label, own, tops, candidate

    whole, strided, same = (results(view, index, upstream) for view in views)
    one = results(x[2:3], index[2:3], upstream[2:3])
    for a, b, c, d in zip(whole, strided, same, one, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a[2], c[2])
        assert torch.equal(a[2], d[0])


@pytest.mark.parametrize("block", (32, 128, 512))
def test_any_block(rows, block):
    plan = launch_losses.Plan(block=block, candidates=16)
    x, upstream = rows("spread", 3, 500), torch.randn(3, 20)
    assert_label(x, torch.tensor([0, 499, 130]), upstream[:, 0].contiguous(), plan)
    assert_candidates(x, torch.randint(500, (3, 20)), torch.rand(3, 20) < 0.8, upstream, plan)


def test_the_blocks_of_the_launches(rows):
    """4096 entries a tile are summed as well as the CPU's 1024."""
    x = rows("near_flat", 2, 9001)
    assert_label(x, torch.tensor([0, 8999]), torch.randn(2), launch_losses.PLAN)
    index = torch.randint(9001, (2, 70))
    assert_candidates(x, index, None, torch.randn(2, 70), launch_losses.PLAN)


def test_gradients_of_float64_are_exact(rows):
    x = rows("spread", 3, 40).double()
    y, index = torch.tensor([3, -100, 39]), torch.randint(40, (3, 6))
    index[:, 0] = x.argmax(-1)
    leaf = x.requires_grad_()
    for name, public, labels in (
        ("label", label_log_odds, (y,)),
        ("candidate", candidate_log_odds, (index, None)),
    ):
        arguments = (*labels, -100) if name == "label" else labels
        log_odds, stats = launched(f"{name}_log_odds", x.detach(), *arguments)
        upstream = torch.randn(log_odds.shape, dtype=torch.float64)
        (wanted,) = torch.autograd.grad(public(leaf, *labels), leaf, upstream)
        got = launched(f"{name}_log_odds_backward", upstream, x.detach(), *arguments, stats)
        torch.testing.assert_close(got, wanted, rtol=1e-13, atol=1e-14)


def test_operators_launch_what_the_tests_do():
    """By larger tiles: what is registered for CUDA, which fills outputs and looks for a device."""
    x, y = torch.randn(2, 100), torch.tensor([3, -100])
    on_cuda = common.on_cuda(
        "label_log_odds", OPERATORS["label_log_odds"][1], lambda: launch_losses
    )
    expected = launched("label_log_odds", x, y, -100, plan=launch_losses.PLAN)
    for a, b in zip(on_cuda(x, y, -100), expected, strict=True):
        assert torch.equal(a, b)


def test_no_rows_and_no_candidates():
    y, index = torch.empty(0, dtype=torch.int64), torch.empty(0, 3, dtype=torch.int64)
    x = torch.empty(0, 50)
    log_odds, stats = launched("label_log_odds", x, y, -100)
    assert launched("label_log_odds_backward", log_odds, x, y, -100, stats).shape == (0, 50)
    log_odds, stats = launched("candidate_log_odds", x, index, None)
    assert log_odds.shape == (0, 3)
    assert launched("candidate_log_odds_backward", log_odds, x, index, None, stats).shape == x.shape
    x, index = torch.randn(3, 50), torch.empty(3, 0, dtype=torch.int64)
    log_odds, stats = launched("candidate_log_odds", x, index, None)
    gradient = launched("candidate_log_odds_backward", log_odds, x, index, None, stats)
    assert log_odds.shape == (3, 0)
    assert not gradient.any()
