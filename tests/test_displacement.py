"""Inner products of gradients on tiles against dense autograd; what they predict of one step."""

import math

import pytest
import torch

from fastadapt import Responses, RewardPenalizeLoss
from fastadapt.tracking import displacement as module
from fastadapt.tracking.displacement import displacement, predicted_change, token_products
from fastadapt.tracking.gradients import analytic_gradients
from fastadapt.training.head import Head
from fastadapt.training.pairs import IGNORED

V, H, T = 23, 6, 5
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 2.0, "logit_scale": 0.7},
    "everything": {"bias": True, "softcap": 3.0, "logit_scale": 1.3},
}


def make(name, dtype=torch.float64, pairs=2):
    """A head, hidden states (2B, T, H) and labels with ignored positions."""
    options = dict(HEADS[name])
    bias = torch.randn(V, dtype=dtype) if options.pop("bias", False) else None
    weight = torch.randn(V, H, dtype=dtype)
    head = Head(weight, bias, options.get("softcap"), options.get("logit_scale", 1.0))
    hidden = torch.randn(2 * pairs, T, H, dtype=dtype)
    labels = torch.randint(V, (2 * pairs, T))
    labels[torch.rand(labels.shape) < 0.3] = IGNORED
    labels[:, 0] = torch.randint(V, (2 * pairs,))
    return head, hidden, labels


def logps_of(weight, bias, head, hidden, labels):
    """(N, T): label log-probabilities through dense logits; 0 where ignored."""
    z = hidden @ weight.t() * 1.0
    z = (z + bias if bias is not None else z) * head.logit_scale
    z = z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)
    logps = z.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return torch.where(labels == IGNORED, 0.0, logps)


def dense(head, hidden, labels):
    """(2B, P): the gradient of log P of each response in all parameters of the head."""
    leaves = [x.clone().requires_grad_() for x in (head.weight, head.bias) if x is not None]
    bias = leaves[1] if head.bias is not None else None
    sums = logps_of(leaves[0], bias, head, hidden, labels).sum(-1)
    rows = []
    for s in sums:
        grads = torch.autograd.grad(s, leaves, retain_graph=True)
        rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("tile", [4, 2048])
def test_products_are_those_of_dense_gradients(name, tile, monkeypatch):
    monkeypatch.setattr(module, "TILE", tile)  # 23 ids: six tiles, the last one not full
    head, hidden, labels = make(name)
    found = displacement(hidden, labels, head)
    g, b = dense(head, hidden, labels).chunk(2)
    torch.testing.assert_close(found.chosen, (g * g).sum(-1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.rejected, (b * b).sum(-1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.cross, (g * b).sum(-1), rtol=1e-12, atol=1e-12)
    assert torch.equal(found.flagged, (g * b).sum(-1) > (g * g).sum(-1))


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("tile", [4, 2048])
def test_products_of_a_head_with_lora_are_those_of_its_adapter(name, tile, monkeypatch):
    monkeypatch.setattr(module, "TILE", tile)
    head, hidden, labels = make(name)
    a, b = torch.randn(3, H).double(), torch.randn(V, 3).double()
    found = displacement(hidden, labels, head._replace(lora=(a, b, 0.6)))
    leaves = [a.requires_grad_(), b.requires_grad_()]
    merged = head.weight + 0.6 * (b @ a)
    rows = []
    for s in logps_of(merged, head.bias, head, hidden, labels).sum(-1):
        grads = torch.autograd.grad(s, leaves, retain_graph=True)
        rows.append(torch.cat([g.flatten() for g in grads]))
    g, r = torch.stack(rows).chunk(2)
    torch.testing.assert_close(found.chosen, (g * g).sum(-1), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(found.rejected, (r * r).sum(-1), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(found.cross, (g * r).sum(-1), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precisions_are_near(dtype):
    head, hidden, labels = make("plain")
    truth = displacement(hidden, labels, head)
    low = Head(head.weight.to(dtype), None, None, 1.0)
    found = displacement(hidden.to(dtype), labels, low)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    assert found.chosen.dtype == torch.float64
    for one, other in zip(found, truth, strict=True):
        assert float((one - other).abs().max() / other.abs().max()) < tolerance


def test_autocast_changes_nothing():
    """As in a training step: hidden states of half precision, a head of float32."""
    head, hidden, labels = make("plain", dtype=torch.float32)
    half = hidden.bfloat16()
    truth = displacement(half.float(), labels, head)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = displacement(half, labels, head)
    for one, other in zip(found, truth, strict=True):
        assert torch.equal(one, other)


def test_shared_tokens_have_the_same_gradient():
    """Identical responses: ρ = 1 exactly where both gradients are the same."""
    head, hidden, labels = make("plain", pairs=1)
    hidden[1], labels[1] = hidden[0], labels[0]
    found = displacement(hidden, labels, head)
    assert float(found.rho) == pytest.approx(1.0, abs=1e-12) and found.rho.shape == (1,)


def test_response_without_tokens_has_no_rho():
    head, hidden, labels = make("plain")
    labels[0] = IGNORED
    found = displacement(hidden, labels, head)
    assert math.isnan(float(found.rho[0])) and not bool(found.flagged[0])


@pytest.mark.parametrize("weights", [{"dpo": 1.0}, {"exmate": 1.0}, {"unlikelihood": 1.0}], ids=str)
def test_first_order_change_is_the_derivative(weights):
    """Δl / η tends to the prediction: at η = 1e-7 they agree in six digits."""
    head, hidden, labels = make("bias")
    mask = labels != IGNORED
    logps = logps_of(head.weight, head.bias, head, hidden, labels)
    log_odds = torch.where(mask, logps - torch.log(-torch.expm1(logps)), 0.0)
    chosen, rejected = (
        Responses(m, k) for m, k in zip(log_odds.chunk(2), mask.chunk(2), strict=True)
    )
    slopes = analytic_gradients(weights, chosen, rejected)
    flat = mask.flatten().nonzero()[:, 0]
    along = torch.cat([slopes["chosen"].logp, slopes["rejected"].logp]).flatten()[flat]
    whole = [torch.arange(len(flat))]
    rows = hidden.flatten(0, 1)[flat], labels.flatten()[flat]
    (products,) = token_products(*rows, head, whole)
    step = 1e-7
    leaves = [head.weight.clone().requires_grad_(), head.bias.clone().requires_grad_()]
    logps = logps_of(*leaves, head, hidden, labels)
    log_odds = torch.where(mask, logps - torch.log(-torch.expm1(logps)), 0.0)
    sides = (Responses(m, k) for m, k in zip(log_odds.chunk(2), mask.chunk(2), strict=True))
    loss, _ = RewardPenalizeLoss(weights)(*sides)
    grads = torch.autograd.grad(loss, leaves)
    moved = [x.detach() - step * g for x, g in zip(leaves, grads, strict=True)]
    measured = logps_of(*moved, head, hidden, labels) - logps.detach()
    found = predicted_change(products, along, step)
    torch.testing.assert_close(found, measured.flatten()[flat], rtol=1e-5, atol=1e-13)


def test_logits_are_not_held():
    """The largest tensor that is made has a tile of the vocabulary, and not all of it."""
    head = Head(torch.randn(20_000, 4), None, None, 1.0)
    hidden, labels = torch.randn(2, 8, 4), torch.randint(20_000, (2, 8))
    made = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            tensors = torch.utils._pytree.tree_leaves(out)
            made.extend(x.numel() for x in tensors if torch.is_tensor(x))
            return out

    with Sizes():
        displacement(hidden, labels, head)
    assert max(n for n in made if n != head.weight.numel()) <= 16 * module.TILE
