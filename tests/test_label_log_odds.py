"""Log-odds of logits one has: values, gradients, edges, of labels and of candidates."""

import pytest
import torch

import fastadapt
from fastadapt import candidate_log_odds, label_log_odds, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Rounding of the gradient to the dtype of the logits, relative to the largest upstream.
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
OPS = torch.ops.fastadapt


def plain(x, y):
    """Log-odds as one would write them, in the dtype of x."""
    others = x.scatter(1, y[:, None], float("-inf"))
    return x.gather(1, y[:, None])[:, 0] - others.logsumexp(-1)


def with_gradient(f, x, upstream):
    """A function of a leaf, and its gradient."""
    leaf = x.clone().requires_grad_()
    out = f(leaf)
    return out.detach(), torch.autograd.grad(out, leaf, upstream.to(out.dtype))[0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_no_more_than_that_of_plain_torch(rows, cpu_capability, dtype):
    sizes = {"spread": 1000, "normal": 5003, "power": 9001, "far": 4096, "flat": 1}
    for kind, v in sizes.items():
        x = rows(kind, 6, v).to(dtype)
        y, upstream = torch.randint(v, (6,)), torch.randn(6)
        if v == 1:
            assert (label_log_odds(x, y) == float("inf")).all()
            continue
        exact, exact_gradient = with_gradient(lambda z: plain(z, y), x.double(), upstream)  # noqa: B023, called at once
        theirs, their_gradient = with_gradient(lambda z: plain(z, y), x, upstream)  # noqa: B023, called at once
        ours, gradient = with_gradient(lambda z: label_log_odds(z, y), x, upstream)  # noqa: B023, called at once
        assert ours.dtype == torch.float32
        assert gradient.dtype == dtype
        worst = exact.abs().max() * 2e-7 + 5e-7
        assert (ours - exact).abs().max() <= (theirs - exact).abs().max() + worst
        error = (gradient - exact_gradient).abs().max()
        assert (
            error <= (their_gradient - exact_gradient).abs().max() + 1.5e-7 * upstream.abs().max()
        )
        assert error <= ROUNDING[dtype] * upstream.abs().max()


@pytest.mark.parametrize("log_odds", (0.0, 8.0, 17.0, 40.0, 100.0, -40.0))
def test_log_odds_that_log_probabilities_lose(cpu_capability, log_odds):
    """z_y - lse rounds to 0 from m = 16.6 in float32; log(1 - p) follows from m at any size."""
    v = 1000
    x = torch.randn(1, v, dtype=torch.float64)
    others = x[:, 1:].logsumexp(-1)
    x[:, 0] = log_odds + others
    x, y = x.float(), torch.zeros(1, dtype=torch.int64)
    exact = plain(x.double(), y)
    m = label_log_odds(x, y)
    torch.testing.assert_close(m.double(), exact, rtol=3e-7, atol=2e-6)
    leaf = x.clone().requires_grad_()
    penalty = -torch.nn.functional.logsigmoid(-label_log_odds(leaf, y)).sum()
    (gradient,) = torch.autograd.grad(penalty, leaf)
    p = exact.sigmoid()
    torch.testing.assert_close(gradient[:, 0].double(), p, rtol=2e-6, atol=0)
    assert float(gradient.double().sum().abs()) <= 1e-6 * float(p)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_equals_its_reference(rows, cpu_capability, dtype):
    for kind in ("spread", "holes", "ties", "one_hot"):
        x = rows(kind, 8, 4099).to(dtype)
        y = torch.where(torch.arange(8) < 2, -100, x.topk(9).indices[:, 8])
        y[3] = x[3].argmax()
        upstream = torch.randn(8)
        for ours, expected in zip(
            with_gradient(lambda z: label_log_odds(z, y), x, upstream),  # noqa: B023
            with_gradient(lambda z: reference.label_log_odds(z, y), x, upstream),  # noqa: B023
            strict=True,
        ):
            tolerance = 3e-6 if dtype == torch.float32 else 1e-12
            torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


def test_gradcheck_in_float64(rows):
    x = rows("spread", 4, 23).double().requires_grad_()
    y = torch.tensor([0, -100, 22, 7])
    torch.autograd.gradcheck(lambda z: label_log_odds(z, y), (x,))
    index = torch.randint(23, (4, 5))
    index[:, 0] = x.detach().argmax(-1)
    index[:, 1] = index[:, 2]
    torch.autograd.gradcheck(lambda z: candidate_log_odds(z, index), (x,))
    torch.autograd.gradcheck(lambda z: candidate_log_odds(z, index, index % 2 == 0), (x,))


def test_edges_have_the_stated_value_and_no_gradient(cpu_capability):
    inf, nan = float("inf"), float("nan")
    x = torch.tensor(
        [[9.0, 1.0, 0.0], [9.0, -inf, -inf], [1.0, nan, 0.0], [1.0, inf, 0.0], [-inf, 1.0, 0.0]]
    )
    y = torch.tensor([-100, 0, 0, 0, 0])
    for dtype in (*DTYPES, torch.float64):
        leaf = x.to(dtype).requires_grad_()
        m = label_log_odds(leaf, y)
        wanted = torch.tensor([0.0, inf, nan, nan, -inf]).to(m.dtype)
        torch.testing.assert_close(m.detach(), wanted, equal_nan=True)
        for upstream in (torch.randn(5), torch.full((5,), inf)):
            (g,) = torch.autograd.grad(m, leaf, upstream.to(m.dtype), retain_graph=True)
            assert (g[:2] == 0).all()
            assert g[2, 1:].isnan().all()
    alone = torch.zeros(2, 1, requires_grad=True)
    m = label_log_odds(alone, torch.zeros(2, dtype=torch.int64))
    assert (m == inf).all()
    assert (torch.autograd.grad(m, alone, torch.randn(2))[0] == 0).all()


def test_nothing_finite_besides_nan_is_nan(cpu_capability):
    """A stretch of -inf and NaN has no largest entry, and must not pass for an empty one."""
    x = torch.full((1, 5000), float("-inf"))
    x[0, 0], x[0, 4500] = 1.0, float("nan")
    assert label_log_odds(x, torch.tensor([0])).isnan().all()
    assert candidate_log_odds(x, torch.tensor([[0]])).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_shapes_and_threads_change_no_bit(rows, cpu_capability, num_threads, dtype):
    x = rows("spread", 6, 5003).to(dtype)
    y, upstream = torch.randint(5003, (6,)), torch.randn(6)
    num_threads(1)
    wanted = with_gradient(lambda z: label_log_odds(z, y), x, upstream)
    wide = torch.zeros(6, 6000, dtype=dtype)
    wide[:, :5003] = x
    views = [wide[:, :5003], x.t().contiguous().t(), x]
    for threads, view in zip((1, 2, 3), views, strict=True):
        num_threads(threads)
        got = with_gradient(lambda z: label_log_odds(z, y), view, upstream)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    folded = with_gradient(
        lambda z: label_log_odds(z, y.view(2, 3)), x.view(2, 3, -1), upstream.view(2, 3)
    )
    assert torch.equal(folded[0].view(6), wanted[0])
    assert torch.equal(folded[1].view(6, -1), wanted[1])
    same = label_log_odds(x[:1].expand(3, -1), y[:1].expand(3))
    assert torch.equal(same, wanted[0][:1].expand(3))


def test_no_rows_and_nothing_but_ignored_rows():
    empty = torch.zeros(0, 7, requires_grad=True)
    m = label_log_odds(empty, torch.zeros(0, dtype=torch.int64))
    assert m.shape == (0,)
    assert torch.autograd.grad(m.sum(), empty)[0].shape == (0, 7)
    x = torch.randn(3, 7, requires_grad=True)
    m = label_log_odds(x, torch.full((3,), -1), ignore_index=-1)
    assert m.tolist() == [0.0, 0.0, 0.0]
    assert (torch.autograd.grad(m, x, torch.randn(3))[0] == 0).all()
    c = candidate_log_odds(x, torch.zeros(3, 0, dtype=torch.int64))
    assert c.shape == (3, 0)
    assert (torch.autograd.grad(c.sum(), x)[0] == 0).all()


def test_arguments_are_checked():
    x, y = torch.randn(3, 7), torch.tensor([0, 6, -100])
    with pytest.raises(ValueError, match=r"labels: expected ids in \[0, 7\) or -100, got 7 .*1"):
        label_log_odds(x, torch.tensor([0, 7, 0]))
    with pytest.raises(ValueError, match="labels: expected ids"):
        label_log_odds(x, torch.tensor([0, -1, 0]))
    with pytest.raises(ValueError, match=r"labels: expected shape \(3,\), got \(2,\)"):
        label_log_odds(x, y[:2])
    with pytest.raises(TypeError, match="labels: expected a tensor of torch.int64, got .*32"):
        label_log_odds(x, y.int())
    with pytest.raises(TypeError, match="logits: expected float32"):
        label_log_odds(x.long(), y)
    with pytest.raises(ValueError, match=r"index: expected ids in \[0, 7\).*got 9 in row=2"):
        candidate_log_odds(x, torch.tensor([[0, 1], [2, 3], [4, 9]]))
    with pytest.raises(TypeError, match="mask: expected a tensor of torch.bool"):
        candidate_log_odds(x, y[:, None] * 0, torch.ones(3, 1))
    masked = candidate_log_odds(x, torch.tensor([[9]] * 3), torch.zeros(3, 1, dtype=torch.bool))
    assert (masked == 0).all()


@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64))
def test_candidates_equal_their_reference(rows, cpu_capability, dtype):
    for kind in ("spread", "one_hot", "holes", "ties"):
        x = rows(kind, 5, 4500).to(dtype)
        if kind == "one_hot":
            x = x + torch.randn(5, 4500).to(dtype)
        index = torch.randint(4500, (5, 6))
        index[:, 1], index[:, 2] = x.argmax(-1), index[:, 3]
        if kind == "holes":
            index = x.topk(6).indices
        mask = torch.rand(5, 6) < 0.7
        upstream = torch.randn(5, 6)
        ours = with_gradient(lambda z: candidate_log_odds(z, index, mask), x, upstream)  # noqa: B023, called at once
        expected = with_gradient(
            lambda z: reference.candidate_log_odds(z, index, mask),  # noqa: B023
            x.double(),
            upstream,
        )
        tolerance = 1e-12 if dtype == torch.float64 else 3e-6
        torch.testing.assert_close(ours[0].double(), expected[0], rtol=tolerance, atol=tolerance)
        tolerance = max(tolerance, ROUNDING.get(dtype, 0))
        torch.testing.assert_close(ours[1].double(), expected[1], rtol=tolerance, atol=tolerance)


def test_candidates_are_exact_where_one_holds_nearly_all_the_mass(cpu_capability):
    for gap in (8.0, 17.0, 40.0, 100.0):
        x = torch.randn(2, 300)
        x[:, 5] = gap
        index = torch.tensor([[5, 7, 5, 8]] * 2)
        upstream = torch.randn(2, 4)
        ours = with_gradient(lambda z: candidate_log_odds(z, index), x, upstream)  # noqa: B023, called at once
        expected = with_gradient(
            lambda z: reference.candidate_log_odds(z, index),  # noqa: B023
            x.double(),
            upstream,
        )
        torch.testing.assert_close(ours[0].double(), expected[0], rtol=3e-7, atol=1e-6)
        torch.testing.assert_close(ours[1].double(), expected[1], rtol=3e-6, atol=1e-7)


def test_candidate_edges_are_those_of_the_reference(cpu_capability):
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([[inf, 1.0, 2.0], [-inf] * 3, [1.0, -inf, -inf], [1.0, nan, 2.0]])
    index = torch.tensor([[0, 1, 2, 1]]).expand(4, 4).contiguous()
    wanted = reference.candidate_log_odds(x.double(), index).float()
    leaf = x.clone().requires_grad_()
    log_odds = candidate_log_odds(leaf, index)
    torch.testing.assert_close(log_odds.detach(), wanted, equal_nan=True)
    (gradient,) = torch.autograd.grad(log_odds, leaf, torch.ones(4, 4))
    assert gradient[0].isnan().all()
    assert gradient[1:3].tolist() == [[0.0, 0.0, 0.0], [-3.0, 2.0, 1.0]]
    log_odds = candidate_log_odds(leaf, index, torch.zeros_like(index, dtype=torch.bool))
    assert not torch.autograd.grad(log_odds, leaf, torch.full((4, 4), inf))[0].any()


def test_opposite_upstreams_of_equal_candidates_do_not_cancel():
    x = torch.tensor([[3.0, 1.0, 1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    index, upstream = torch.tensor([[1, 2]]), torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    (ours,) = torch.autograd.grad(candidate_log_odds(x, index), x, upstream)
    (expected,) = torch.autograd.grad(reference.candidate_log_odds(x, index), x, upstream)
    torch.testing.assert_close(ours, expected)
    assert ours[0, 1] > 1


def test_one_candidate_is_the_label(rows):
    x = rows("spread", 6, 999)
    y, upstream = torch.randint(999, (6,)), torch.randn(6)
    label = with_gradient(lambda z: label_log_odds(z, y), x, upstream)
    candidate = with_gradient(lambda z: candidate_log_odds(z, y[:, None])[:, 0], x, upstream)
    for a, b in zip(label, candidate, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_upstream_gradient_stays_nan(cpu_capability, dtype):
    x = torch.zeros(1, 33, dtype=dtype, requires_grad=True)
    worst = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    for log_odds in (
        label_log_odds(x, torch.tensor([5])),
        candidate_log_odds(x, torch.tensor([[5]])),
    ):
        (gradient,) = torch.autograd.grad(log_odds, x, worst.view(log_odds.shape))
        assert gradient.isnan().all()


def test_double_backward_raises(rows):
    x = rows("spread", 2, 50).requires_grad_()
    y = x.detach().argmax(-1)
    for f in (lambda z: label_log_odds(z, y), lambda z: candidate_log_odds(z, y[:, None])):
        (gradient,) = torch.autograd.grad(f(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="double backward"):
            gradient.sum().backward()


def test_opcheck():
    x = torch.randn(3, 50)
    y, index = torch.tensor([1, -100, 7]), torch.tensor([[1, 2], [3, 3], [4, 5]])
    mask = index > 2
    _, stats = OPS.label_log_odds(x, y, -100)
    _, tops = OPS.candidate_log_odds(x, index, mask)
    for op, arguments in (
        (OPS.label_log_odds, (x.clone().requires_grad_(), y, -100)),
        (OPS.label_log_odds_backward, (torch.randn(3), x, y, -100, stats)),
        (OPS.candidate_log_odds, (x.clone().requires_grad_(), index, mask)),
        (OPS.candidate_log_odds, (x.bfloat16().requires_grad_(), index, None)),
        (OPS.candidate_log_odds_backward, (torch.randn(3, 2), x, index, mask, tops)),
    ):
        torch.library.opcheck(op.default, arguments)


def test_compiled_without_graph_breaks(rows):
    x = rows("spread", 4, 300).requires_grad_()
    y = x.detach().argmax(-1)

    def loss(x):
        penalty = torch.nn.functional.softplus(fastadapt.candidate_log_odds(x, y[:, None])).mean()
        return penalty - fastadapt.label_log_odds(x * 0.5, y).mean()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    gradients = [torch.autograd.grad(f(x), x)[0] for f in (loss, compiled)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-7)
