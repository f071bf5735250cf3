"""The differentiable score: values, gradients, edges, and what autograd may and may not do."""

import pytest
import torch

from fastadapt import Adaptor, adapted_log_odds, adapted_logps, filter_logits, reference, sample

pytestmark = pytest.mark.usefixtures("device")

ADAPTORS = {
    "neutral": Adaptor(),
    "temperature": Adaptor(temperature=0.7),
    "top_p": Adaptor(temperature=1.3, top_p=0.9),
    "top_k": Adaptor(top_k=5),
    "typical": Adaptor(typical_p=0.9),
    "eta": Adaptor(temperature=0.8, eta_cutoff=1e-2),
}
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}


def plain_torch(x, y, adaptor, upstream):
    """Log-odds and gradient as one would write them, in the dtype of x: float64 is the truth.

    The support is that of the float32 values in any case.
    """
    z = x.clone().requires_grad_()
    support = filter_logits(x.float(), adaptor) > float("-inf")
    s = (z / adaptor.temperature).masked_fill(~support, float("-inf"))
    others = s.scatter(1, y[:, None], float("-inf"))
    log_odds = s.gather(1, y[:, None])[:, 0] - others.logsumexp(-1)
    (gradient,) = torch.autograd.grad(log_odds, z, upstream.to(x.dtype))
    return log_odds.detach(), gradient


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", ADAPTORS)
def test_error_is_no_more_than_that_of_plain_torch(rows, cpu_capability, name, dtype):
    adaptor = ADAPTORS[name]
    for kind, v in (("spread", 1000), ("normal", 5003), ("ties", 333)):
        x = rows(kind, 6, v).to(dtype)
        y = sample(x, adaptor).tokens
        upstream = torch.randn(6).to(x.device)
        exact, exact_gradient = plain_torch(x.double(), y, adaptor, upstream)
        inside = exact.isfinite()
        plain, plain_gradient = plain_torch(x, y, adaptor, upstream)
        leaf = x.clone().requires_grad_()
        log_odds = adapted_log_odds(leaf, y, adaptor)
        (gradient,) = torch.autograd.grad(log_odds, leaf, upstream)
        assert log_odds.dtype == torch.float32
        assert gradient.dtype == dtype

        def error(a, b, inside=inside):
            return float((a.double() - b)[inside].abs().max())

        tolerance = TOLERANCE[dtype]
        assert error(log_odds.detach(), exact) <= error(plain, exact) + tolerance
        assert error(gradient, exact_gradient) <= error(plain_gradient, exact_gradient) + tolerance


@pytest.mark.parametrize("name", ADAPTORS)
def test_equals_its_reference(rows, cpu_capability, name):
    adaptor = ADAPTORS[name]
    for dtype in (torch.float32, torch.float64):
        x = rows("spread", 8, 777).to(dtype)
        y = sample(x.float(), Adaptor(top_k=20)).tokens
        y[:2] = -100
        upstream = torch.randn(8).to(x)
        results = []
        for log_odds_of in (adapted_log_odds, reference.adapted_log_odds):
            leaf = x.clone().requires_grad_()
            log_odds = log_odds_of(leaf, y, adaptor)
            results.append((log_odds.detach(), *torch.autograd.grad(log_odds, leaf, upstream)))
        for ours, expected in zip(*results, strict=True):
            tolerance = 2e-5 if dtype == torch.float32 else 1e-12
            torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", ADAPTORS)
def test_gradcheck_in_float64(rows, name):
    x = rows("spread", 3, 23).double().requires_grad_()
    y = sample(x.detach().float(), ADAPTORS[name]).tokens
    many = ADAPTORS[name]
    inside = adapted_log_odds(x, y, many).isfinite()
    assert inside.any()
    torch.autograd.gradcheck(lambda z: adapted_log_odds(z, y, many)[inside], (x,))
    torch.autograd.gradcheck(lambda z: adapted_logps(z, y, many), (x,))


def test_edges_have_the_stated_value_and_no_gradient(device):
    x = torch.tensor(
        [
            [9.0, 1.0, 0.0],  # outside the support
            [9.0, 1.0, 0.0],  # alone in it
            [float("nan"), 1.0, 0.0],
            [1.0, 2.0, 3.0],  # ignored
            [9.0, float("-inf"), float("-inf")],  # V = 1 in effect
        ],
        device=device,
        requires_grad=True,
    )
    y = torch.tensor([1, 0, 1, -100, 0], device=device)
    log_odds = adapted_log_odds(x, y, Adaptor(top_k=1))
    wanted = torch.tensor([float("-inf"), float("inf"), float("nan"), 0.0, float("inf")])
    torch.testing.assert_close(log_odds.detach().cpu(), wanted, equal_nan=True)
    logps = adapted_logps(x, y, Adaptor(top_k=1))
    assert logps.tolist()[:2] == [float("-inf"), 0.0]
    assert logps.tolist()[3:] == [0.0, 0.0]
    for upstream in (torch.randn(5), torch.full((5,), float("inf"))):
        (gradient,) = torch.autograd.grad(log_odds, x, upstream.to(device), retain_graph=True)
        assert (gradient == 0).all()
    (gradient,) = torch.autograd.grad(logps[[0, 1, 3, 4]].sum(), x)
    assert (gradient == 0).all()


def test_large_log_odds_keep_their_digits(device):
    """log p = -e^-m where z_y - lse would round to 0."""
    for m in (8.0, 17.0, 25.0):
        x = torch.tensor([[m, 0.0]], device=device, requires_grad=True)
        logps = adapted_logps(x, torch.tensor([0], device=device), Adaptor())
        exact = -torch.log1p(torch.exp(torch.tensor(-m, dtype=torch.float64)))
        torch.testing.assert_close(logps.double()[0].cpu(), exact, rtol=1e-5, atol=0)


def test_logps_of_any_log_odds_in_float32_have_a_value_and_a_gradient(device):
    log_odds = torch.tensor([-300.0, -100, -89, -88, -20, 0, 20, 80, 85], device=device)
    x = torch.stack([log_odds, torch.zeros_like(log_odds)], 1).requires_grad_()
    y = torch.zeros(9, dtype=torch.int64, device=device)
    for logps in (adapted_logps, reference.adapted_logps):
        got = logps(x, y, Adaptor())
        (gradient,) = torch.autograd.grad(got.sum(), x)
        truth = torch.nn.functional.logsigmoid(log_odds.double())
        torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=0)
        share = torch.sigmoid(-log_odds.double())  # 1 - p
        torch.testing.assert_close(gradient[:, 0].double(), share, rtol=1e-5, atol=0)


def test_gradient_is_that_of_the_log_probability(rows):
    """d log p / dz = (onehot - p) / T on the support."""
    x = rows("spread", 4, 200).requires_grad_()
    adaptor = Adaptor(temperature=0.8, top_p=0.95)
    y = sample(x, adaptor).tokens
    (gradient,) = torch.autograd.grad(adapted_logps(x, y, adaptor).sum(), x)
    p = filter_logits(x.detach(), adaptor).double().softmax(-1)
    wanted = (torch.nn.functional.one_hot(y, 200) - p) / 0.8
    torch.testing.assert_close(gradient.double(), wanted, rtol=0, atol=1e-5)


def test_logps_agree_with_the_sampler(rows):
    x = rows("spread", 32, 500)
    for adaptor in ADAPTORS.values():
        drawn = sample(x, adaptor)
        logps = adapted_logps(x, drawn.tokens, adaptor)
        torch.testing.assert_close(logps, drawn.logprobs, rtol=0, atol=5e-6)


def test_per_row_knobs_and_shapes_fold(rows, device):
    x = rows("spread", 6, 100)
    adaptor = Adaptor(
        temperature=torch.linspace(0.5, 2, 6, device=device),
        top_k=torch.arange(3, 9, device=device),
    )
    y = x.argmax(-1)
    flat = adapted_log_odds(x, y, adaptor)
    assert torch.equal(adapted_log_odds(x.view(2, 3, 100), y.view(2, 3), adaptor).view(6), flat)


def test_double_backward_raises(rows):
    x = rows("spread", 2, 50).requires_grad_()
    log_odds = adapted_log_odds(x, x.argmax(-1), Adaptor())
    (gradient,) = torch.autograd.grad(log_odds.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.sum().backward()


def test_non_contiguous_upstream_gradient(rows):
    x = rows("spread", 4, 50).requires_grad_()
    y = x.detach().argmax(-1)
    upstream = torch.randn(4, 2).to(x.device)
    strided, dense = (
        torch.autograd.grad(adapted_log_odds(x, y, Adaptor()), x, g)[0]
        for g in (upstream[:, 0], upstream[:, 0].contiguous())
    )
    assert torch.equal(strided, dense)
    (expanded,) = torch.autograd.grad(adapted_log_odds(x, y, Adaptor()).sum(), x)
    assert expanded.abs().sum() > 0


def test_small_upstream_gradients_keep_their_digits(device, cpu_capability):
    """Scaling by 2^-40 before the mass is large would underflow."""
    x = torch.zeros(1, 100_000, device=device, requires_grad=True)
    for upstream in (1.0, 1e-22, 1e-28):
        log_odds = adapted_log_odds(x, torch.tensor([5], device=device), Adaptor())
        (gradient,) = torch.autograd.grad(log_odds, x, torch.tensor([upstream], device=device))
        wanted = torch.tensor(-upstream / 99_999, device=device)
        torch.testing.assert_close(gradient[0, 0], wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_nan_upstream_gradient_stays_nan(device, cpu_capability, dtype):
    x = torch.zeros(1, 33, dtype=dtype, device=device, requires_grad=True)
    worst = torch.tensor([0x7FFFFFFF], dtype=torch.int32, device=device).view(torch.float32)
    log_odds = adapted_log_odds(x, torch.tensor([5], device=device), Adaptor())
    (gradient,) = torch.autograd.grad(log_odds, x, worst)
    assert gradient.isnan().all()
