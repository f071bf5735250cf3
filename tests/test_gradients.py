"""The closed forms of the gradients against autograd on logits, differences and the printed table.

The truth is made here: rows of logits, the losses of `fastadapt.losses` on log-odds of them, and
autograd down to the logits; nothing of it passes through the closed forms.
"""

import math
from inspect import signature

import pytest
import torch
import torch.nn.functional as F

from fastadapt import Responses, RewardPenalizeLoss
from fastadapt._cli.main import main
from fastadapt.losses import FORMULAS
from fastadapt.study.gradients.check import check_gradients
from fastadapt.study.gradients.named_losses import one_token
from fastadapt.study.gradients.table import OPTIONS, ROWS, example_batch
from fastadapt.tracking.gradients import analytic_gradients, logit

V = 7
each_row = pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])


def log_odds_of(z, y):
    """z_y - logsumexp of the others."""
    others = z.scatter(-1, y[..., None], float("-inf"))
    return z.gather(-1, y[..., None])[..., 0] - others.logsumexp(-1)


class Side:
    """Logits (B, T, V) with labels, as responses."""

    def __init__(self, B=3, T=4):
        self.z = (2 * torch.randn(B, T, V, dtype=torch.float64)).requires_grad_()
        self.y = torch.randint(V, (B, T))
        self.mask = torch.rand(B, T) < 0.7
        self.mask[:, 1] = True
        self.responses = Responses(log_odds_of(self.z, self.y), self.mask)
        self.p = self.z.detach().softmax(-1)


def batch():
    chosen, rejected = Side(), Side()
    ids = torch.rand(3, 4, V).argsort(-1)[..., :3]
    mask = (torch.rand(ids.shape) < 0.7) & (ids != chosen.y[..., None]) & chosen.mask[..., None]
    inputs = {
        "chosen": chosen.responses,
        "rejected": rejected.responses,
        "ref_chosen_logps": torch.randn(3).double() - 7,
        "ref_rejected_logps": torch.randn(3).double() - 7,
        "candidates": log_odds_of(chosen.z[..., None, :].expand(3, 4, 3, V), ids),
        "candidate_mask": mask,
    }
    return chosen, rejected, ids, inputs


def test_every_loss_has_a_row():
    assert {name for row in ROWS for name in row.weights} >= {"mle", "dpo", "mate", "exmate"}
    parts = {"unlikelihood": "unlikelihood_penalty", "exmate": "exmate_penalty"}
    named = {name for row in ROWS for name in row.weights}
    named |= {parts[name] for name in named & set(parts)} | {"mate_penalty"}
    assert named == set(FORMULAS)


@each_row
def test_gradients_of_logits_are_those_of_autograd(row):
    """∂L/∂z = c (s - onehot) = g (onehot - q), and its two norms, to 1e-12."""
    for _ in range(3):
        chosen, rejected, ids, inputs = batch()
        objective = RewardPenalizeLoss(row.weights, **row.options)
        loss, _ = objective(**inputs)
        grads = torch.autograd.grad(loss, [chosen.z, rejected.z], allow_unused=True)
        squares = {}
        for name, side in (("chosen", chosen), ("rejected", rejected)):
            others = side.z.detach().scatter(-1, side.y[..., None], -math.inf).softmax(-1)
            squares[name] = others.square().sum(-1)
        found = analytic_gradients(row.weights, **inputs, sum_squares=squares, **row.options)
        for name, side, grad in (("chosen", chosen, grads[0]), ("rejected", rejected, grads[1])):
            grad = torch.zeros_like(side.z) if grad is None else grad
            onehot = F.one_hot(side.y, V)
            others = side.z.detach().scatter(-1, side.y[..., None], -math.inf).softmax(-1)
            through_l = -found[name].logp[..., None] * (side.p - onehot)
            through_m = found[name].log_odds[..., None] * (onehot - others)
            if name == "chosen":
                at = F.one_hot(ids, V) - side.p[..., None, :]
                row_gradient = (found["candidates"].logp[..., None] * at).sum(-2)
                torch.testing.assert_close(
                    found["candidates"].norm1, row_gradient.abs().sum(-1), rtol=0, atol=1e-12
                )
                through_l, through_m = through_l + row_gradient, through_m + row_gradient
            torch.testing.assert_close(through_l, grad, rtol=0, atol=1e-12)
            torch.testing.assert_close(through_m, grad, rtol=0, atol=1e-12)
            if name == "rejected" or not found["candidates"].logp.any():
                norms = grad.abs().sum(-1), grad.norm(dim=-1)
                torch.testing.assert_close(found[name].norm1, norms[0], rtol=0, atol=1e-12)
                torch.testing.assert_close(found[name].norm2, norms[1], rtol=0, atol=1e-12)


def evaluated(text, row, side, other, k_u):
    """A printed expression at every token of a side."""
    m, mask = side.log_odds, side.mask
    logp = F.logsigmoid(m)
    lengths = mask.sum(-1, keepdim=True).double()
    sums = (logp * mask).sum(-1, keepdim=True)
    rejected = other.log_odds, other.mask
    names = {
        "N": mask.sum().double(),
        "B": torch.tensor(len(m)).double(),
        "T": lengths,
        "m": m,
        "p": torch.sigmoid(m),
        "S": sums,
        "P": sums.exp(),
        "L": (F.logsigmoid(rejected[0]) * rejected[1]).sum() / rejected[1].sum(),
        "u": k_u[1],
        "k": k_u[0],
        "σ": lambda x: 1 / (1 + torch.exp(-x)),
        "exp": torch.exp,
        "expm1": torch.expm1,
        "α": OPTIONS["alpha"],
        "λ": OPTIONS["lambda"],
        "μ": OPTIONS["mu"],
        "β": OPTIONS["beta"],
        "ε": OPTIONS["epsilon"],
    }
    value = torch.as_tensor(eval(text, {"__builtins__": {}}, names), dtype=torch.float64)
    return torch.where(mask, value.expand_as(m), 0.0)


@each_row
def test_printed_expressions_are_the_gradients(row):
    inputs = example_batch()
    leaves = {k: inputs[k].log_odds.clone().requires_grad_() for k in ("chosen", "rejected")}
    candidates = inputs["candidates"].clone().requires_grad_()
    sides = {k: inputs[k]._replace(log_odds=m) for k, m in leaves.items()}
    loss, _ = RewardPenalizeLoss(row.weights, **row.options)(
        **{**inputs, **sides, "candidates": candidates}
    )
    points = [*leaves.values(), candidates]
    grads = dict(
        zip(
            ("chosen", "rejected", "candidates"),
            torch.autograd.grad(loss, points, allow_unused=True),
            strict=True,
        )
    )
    chosen, rejected = inputs["chosen"], inputs["rejected"]
    length = row.options.get("length_normalized", False)
    ratios = []
    for side, ref in (
        (chosen, inputs["ref_chosen_logps"]),
        (rejected, inputs["ref_rejected_logps"]),
    ):
        ratio = (F.logsigmoid(side.log_odds) * side.mask).sum(-1) - ref
        ratios.append(ratio / side.mask.sum(-1) if length else ratio)
    u = OPTIONS["beta"] * (ratios[0] - ratios[1])[:, None]
    k_u = (OPTIONS["beta"] * torch.sigmoid(-u), u)
    penalised, place = rejected, "rejected"
    if "candidate_unlikelihood_penalty" in row.weights:
        # N stays that of the chosen side
        place, n = "candidates", chosen.mask.sum()
        flat = Responses(inputs["candidates"].flatten(0, 1), inputs["candidate_mask"].flatten(0, 1))
        flat = flat._replace(mask=flat.mask & chosen.mask.reshape(-1, 1))
        text = row.log_odds.replace("N", f"{int(n)}")
        c_text = row.rejected.replace("N", f"{int(n)}")
        penalised = flat
    else:
        text, c_text = row.log_odds, row.rejected
    g = grads[place]
    g = torch.zeros_like(penalised.log_odds) if g is None else g.reshape(penalised.log_odds.shape)
    wanted = evaluated(text, row, penalised, rejected, k_u)
    torch.testing.assert_close(g, wanted, rtol=0, atol=1e-12)
    rest = torch.sigmoid(-penalised.log_odds)
    wanted = evaluated(c_text, row, penalised, rejected, k_u)
    torch.testing.assert_close(-g / rest, wanted, rtol=1e-12, atol=1e-12)
    g = grads["chosen"]
    wanted = evaluated(row.chosen, row, chosen, rejected, k_u)
    torch.testing.assert_close(-g / torch.sigmoid(-chosen.log_odds), wanted, rtol=1e-12, atol=1e-12)


@each_row
def test_self_check_is_small(row):
    check = check_gradients(row.weights, **example_batch(), **row.options)
    assert check.autograd < 1e-12 and check.differences < 1e-7


def test_self_check_finds_a_wrong_form(monkeypatch):
    """A closed form that is off by 1 % is off in both columns."""
    from fastadapt.tracking import closed_forms

    right = closed_forms.CLOSED_FORMS["exmate_penalty"]

    def wrong(x, **options):
        (slopes,) = right(x, **options).values()
        return {"rejected": closed_forms.Slopes(1.01 * slopes.logp)}

    monkeypatch.setitem(closed_forms.CLOSED_FORMS, "exmate_penalty", wrong)
    check = check_gradients("exmate_penalty", **example_batch())
    assert check.autograd > 1e-5 and check.differences > 1e-5


def test_packed_and_padded_agree():
    inputs = example_batch()
    packed = {}
    for name in ("chosen", "rejected"):
        log_odds, mask = inputs[name][:2]
        ids = torch.where(mask, torch.arange(3)[:, None], -1).flatten()
        packed[name] = Responses(log_odds.flatten(), segments=ids, num_segments=3)
    weights = {"dpo": 1.0, "unlikelihood_penalty": 0.5, "exmate": 0.3}
    for options in ({"level": "sequence"}, {"length_normalized": True}):
        one = analytic_gradients(weights, **inputs, **options)
        del (rest := dict(inputs))["candidates"], rest["candidate_mask"]
        other = analytic_gradients(weights, **{**rest, **packed}, **options)
        for name in ("chosen", "rejected"):
            torch.testing.assert_close(one[name].log_odds.flatten(), other[name].log_odds)


def test_probabilities_may_be_given():
    inputs = example_batch()
    p = {
        k: inputs[k]._replace(log_odds=inputs[k].log_odds.sigmoid()) for k in ("chosen", "rejected")
    }
    rest = {k: v for k, v in inputs.items() if k not in p and "candidate" not in k}
    one = analytic_gradients("exmate", inputs["chosen"], inputs["rejected"], **rest)
    other = analytic_gradients("exmate", **p, **rest, given="probabilities")
    torch.testing.assert_close(one["rejected"].probability, other["rejected"].probability)
    assert float(logit(torch.tensor(0.5))) == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"loss": "exmate", "given": "odds"}, "given: expected one of log_odds, probabilities"),
        ({"loss": RewardPenalizeLoss({"dpo": 1.0}), "beta": 0.1}, "expected none beside an obj"),
        ({"loss": "dpo", "rejected": None}, "rejected: expected it for the loss dpo, got None"),
        ({"loss": "nothing"}, "weights: expected some of"),
    ],
)
def test_wrong_arguments_are_refused(call, message):
    inputs = {k: v for k, v in example_batch().items() if "candidate" not in k}
    with pytest.raises(ValueError, match=message):
        analytic_gradients(**{**inputs, **call})


def test_unlikelihood_explodes_in_probabilities_alone():
    """∂L/∂p grows as 1/(1-p), |∂L/∂m| stays below 1; ExMATE is bounded in every space."""
    for m in (0.0, 8.0, 17.0, 34.0, 600.0):
        mask = torch.ones(1, 1, dtype=torch.bool)
        rejected = Responses(torch.tensor([[m]], dtype=torch.float64), mask)
        for loss, level in (("unlikelihood_penalty", {}), ("exmate_penalty", {})):
            slopes = analytic_gradients(loss, rejected, rejected, **level)["rejected"]
            assert 0 < float(slopes.log_odds) <= 1
            p = 1 / (1 + math.exp(-m))
            if loss == "unlikelihood_penalty":
                assert float(slopes.logp) == pytest.approx(math.exp(m), rel=1e-12)
                assert float(slopes.log_odds) == pytest.approx(p, rel=1e-12)
            else:
                assert max(float(slopes.logp), float(slopes.probability)) <= 1 + 1e-15
    assert one_token("unlikelihood_penalty", 0.999)[0] == pytest.approx(1000)


def test_certain_rejected_response_has_finite_slopes():
    mask = torch.ones(1, 2, dtype=torch.bool)
    rejected = Responses(torch.full((1, 2), 800.0), mask)
    slopes = analytic_gradients("unlikelihood_penalty", rejected, rejected, level="sequence")[
        "rejected"
    ]
    assert bool(slopes.log_odds.isfinite().all())


def test_packed_options_reach_only_their_losses():
    inputs = {k: v for k, v in example_batch().items() if "candidate" not in k}
    found = analytic_gradients({"dpo": 1.0, "mle": 0.0}, **inputs, beta=0.3)
    alone = analytic_gradients("dpo", **inputs, beta=0.3)
    torch.testing.assert_close(found["chosen"].log_odds, alone["chosen"].log_odds)
    assert "beta" in signature(FORMULAS["dpo"]).parameters


def test_command_prints_the_table(capsys):
    assert main(["gradients", "table"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n| ") >= len(ROWS)
    for row in ROWS:
        line = next(x for x in out.splitlines() if x.startswith(f"| {row.name} |"))
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[1] == f"`{row.chosen}`" and float(cells[5]) < 1e-12
