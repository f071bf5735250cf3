"""The closed forms of the gradients against autograd on logits, differences and the printed table.

The truth is made here: rows of logits, the losses of `fastadapt.losses` on margins of them, and
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
from fastadapt.study.gradients.table import OPTIONS, ROWS, example_batch, one_token
from fastadapt.tracking.gradients import analytic_gradients, logit

V = 7
each_row = pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])


def margins_of(z, y):
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
        self.responses = Responses(margins_of(self.z, self.y), self.mask)
        self.p = self.z.detach().softmax(-1)


def batch():
    good, bad = Side(), Side()
    ids = torch.rand(3, 4, V).argsort(-1)[..., :3]
    mask = (torch.rand(ids.shape) < 0.7) & (ids != good.y[..., None]) & good.mask[..., None]
    inputs = {
        "good": good.responses,
        "bad": bad.responses,
        "ref_good_logps": torch.randn(3).double() - 7,
        "ref_bad_logps": torch.randn(3).double() - 7,
        "candidates": margins_of(good.z[..., None, :].expand(3, 4, 3, V), ids),
        "candidate_mask": mask,
    }
    return good, bad, ids, inputs


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
        good, bad, ids, inputs = batch()
        objective = RewardPenalizeLoss(row.weights, **row.options)
        loss, _ = objective(**inputs)
        grads = torch.autograd.grad(loss, [good.z, bad.z], allow_unused=True)
        squares = {}
        for name, side in (("good", good), ("bad", bad)):
            others = side.z.detach().scatter(-1, side.y[..., None], -math.inf).softmax(-1)
            squares[name] = others.square().sum(-1)
        found = analytic_gradients(row.weights, **inputs, sum_squares=squares, **row.options)
        for name, side, grad in (("good", good, grads[0]), ("bad", bad, grads[1])):
            grad = torch.zeros_like(side.z) if grad is None else grad
            onehot = F.one_hot(side.y, V)
            others = side.z.detach().scatter(-1, side.y[..., None], -math.inf).softmax(-1)
            through_l = -found[name].logp[..., None] * (side.p - onehot)
            through_m = found[name].margin[..., None] * (onehot - others)
            if name == "good":
                at = F.one_hot(ids, V) - side.p[..., None, :]
                row_gradient = (found["candidates"].logp[..., None] * at).sum(-2)
                torch.testing.assert_close(
                    found["candidates"].norm1, row_gradient.abs().sum(-1), rtol=0, atol=1e-12
                )
                through_l, through_m = through_l + row_gradient, through_m + row_gradient
            torch.testing.assert_close(through_l, grad, rtol=0, atol=1e-12)
            torch.testing.assert_close(through_m, grad, rtol=0, atol=1e-12)
            if name == "bad" or not found["candidates"].logp.any():
                norms = grad.abs().sum(-1), grad.norm(dim=-1)
                torch.testing.assert_close(found[name].norm1, norms[0], rtol=0, atol=1e-12)
                torch.testing.assert_close(found[name].norm2, norms[1], rtol=0, atol=1e-12)


def evaluated(text, row, side, other, k_u):
    """A printed expression at every token of a side."""
    m, mask = side.margins, side.mask
    logp = F.logsigmoid(m)
    lengths = mask.sum(-1, keepdim=True).double()
    sums = (logp * mask).sum(-1, keepdim=True)
    bad = other.margins, other.mask
    names = {
        "N": mask.sum().double(),
        "B": torch.tensor(len(m)).double(),
        "T": lengths,
        "m": m,
        "p": torch.sigmoid(m),
        "S": sums,
        "P": sums.exp(),
        "L": (F.logsigmoid(bad[0]) * bad[1]).sum() / bad[1].sum(),
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
    leaves = {k: inputs[k].margins.clone().requires_grad_() for k in ("good", "bad")}
    candidates = inputs["candidates"].clone().requires_grad_()
    sides = {k: inputs[k]._replace(margins=m) for k, m in leaves.items()}
    loss, _ = RewardPenalizeLoss(row.weights, **row.options)(
        **{**inputs, **sides, "candidates": candidates}
    )
    points = [*leaves.values(), candidates]
    grads = dict(
        zip(
            ("good", "bad", "candidates"),
            torch.autograd.grad(loss, points, allow_unused=True),
            strict=True,
        )
    )
    good, bad = inputs["good"], inputs["bad"]
    length = row.options.get("length_normalized", False)
    ratios = []
    for side, ref in ((good, inputs["ref_good_logps"]), (bad, inputs["ref_bad_logps"])):
        ratio = (F.logsigmoid(side.margins) * side.mask).sum(-1) - ref
        ratios.append(ratio / side.mask.sum(-1) if length else ratio)
    u = OPTIONS["beta"] * (ratios[0] - ratios[1])[:, None]
    k_u = (OPTIONS["beta"] * torch.sigmoid(-u), u)
    penalised, place = bad, "bad"
    if "candidate_unlikelihood_penalty" in row.weights:
        # N stays that of the good side
        place, n = "candidates", good.mask.sum()
        flat = Responses(inputs["candidates"].flatten(0, 1), inputs["candidate_mask"].flatten(0, 1))
        flat = flat._replace(mask=flat.mask & good.mask.reshape(-1, 1))
        text = row.margin.replace("N", f"{int(n)}")
        c_text = row.bad.replace("N", f"{int(n)}")
        penalised = flat
    else:
        text, c_text = row.margin, row.bad
    g = grads[place]
    g = torch.zeros_like(penalised.margins) if g is None else g.reshape(penalised.margins.shape)
    wanted = evaluated(text, row, penalised, bad, k_u)
    torch.testing.assert_close(g, wanted, rtol=0, atol=1e-12)
    rest = torch.sigmoid(-penalised.margins)
    wanted = evaluated(c_text, row, penalised, bad, k_u)
    torch.testing.assert_close(-g / rest, wanted, rtol=1e-12, atol=1e-12)
    g = grads["good"]
    wanted = evaluated(row.good, row, good, bad, k_u)
    torch.testing.assert_close(-g / torch.sigmoid(-good.margins), wanted, rtol=1e-12, atol=1e-12)


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
        return {"bad": closed_forms.Slopes(1.01 * slopes.logp)}

    monkeypatch.setitem(closed_forms.CLOSED_FORMS, "exmate_penalty", wrong)
    check = check_gradients("exmate_penalty", **example_batch())
    assert check.autograd > 1e-5 and check.differences > 1e-5


def test_packed_and_padded_agree():
    inputs = example_batch()
    packed = {}
    for name in ("good", "bad"):
        margins, mask = inputs[name][:2]
        ids = torch.where(mask, torch.arange(3)[:, None], -1).flatten()
        packed[name] = Responses(margins.flatten(), segments=ids, num_segments=3)
    weights = {"dpo": 1.0, "unlikelihood_penalty": 0.5, "exmate": 0.3}
    for options in ({"level": "sequence"}, {"length_normalized": True}):
        one = analytic_gradients(weights, **inputs, **options)
        del (rest := dict(inputs))["candidates"], rest["candidate_mask"]
        other = analytic_gradients(weights, **{**rest, **packed}, **options)
        for name in ("good", "bad"):
            torch.testing.assert_close(one[name].margin.flatten(), other[name].margin)


def test_probabilities_may_be_given():
    inputs = example_batch()
    p = {k: inputs[k]._replace(margins=inputs[k].margins.sigmoid()) for k in ("good", "bad")}
    rest = {k: v for k, v in inputs.items() if k not in p and "candidate" not in k}
    one = analytic_gradients("exmate", inputs["good"], inputs["bad"], **rest)
    other = analytic_gradients("exmate", **p, **rest, given="probabilities")
    torch.testing.assert_close(one["bad"].probability, other["bad"].probability)
    assert float(logit(torch.tensor(0.5))) == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"loss": "exmate", "given": "odds"}, "given: expected one of margins, probabilities"),
        ({"loss": RewardPenalizeLoss({"dpo": 1.0}), "beta": 0.1}, "expected none beside an obj"),
        ({"loss": "dpo", "bad": None}, "bad: expected it for the loss dpo, got None"),
        ({"loss": "nothing"}, "weights: expected some of"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    inputs = {k: v for k, v in example_batch().items() if "candidate" not in k}
    with pytest.raises(ValueError, match=message):
        analytic_gradients(**{**inputs, **call})


def test_unlikelihood_explodes_in_probabilities_alone():
    """∂L/∂p grows as 1/(1-p), |∂L/∂m| stays below 1; ExMATE is bounded in every space."""
    for m in (0.0, 8.0, 17.0, 34.0, 600.0):
        mask = torch.ones(1, 1, dtype=torch.bool)
        bad = Responses(torch.tensor([[m]], dtype=torch.float64), mask)
        for loss, level in (("unlikelihood_penalty", {}), ("exmate_penalty", {})):
            slopes = analytic_gradients(loss, bad, bad, **level)["bad"]
            assert 0 < float(slopes.margin) <= 1
            p = 1 / (1 + math.exp(-m))
            if loss == "unlikelihood_penalty":
                assert float(slopes.logp) == pytest.approx(math.exp(m), rel=1e-12)
                assert float(slopes.margin) == pytest.approx(p, rel=1e-12)
            else:
                assert max(float(slopes.logp), float(slopes.probability)) <= 1 + 1e-15
    assert one_token("unlikelihood_penalty", 0.999)[0] == pytest.approx(1000)


def test_certain_bad_response_has_finite_slopes():
    mask = torch.ones(1, 2, dtype=torch.bool)
    bad = Responses(torch.full((1, 2), 800.0), mask)
    slopes = analytic_gradients("unlikelihood_penalty", bad, bad, level="sequence")["bad"]
    assert bool(slopes.margin.isfinite().all())


def test_packed_options_reach_only_their_losses():
    inputs = {k: v for k, v in example_batch().items() if "candidate" not in k}
    found = analytic_gradients({"dpo": 1.0, "mle": 0.0}, **inputs, beta=0.3)
    alone = analytic_gradients("dpo", **inputs, beta=0.3)
    torch.testing.assert_close(found["good"].margin, alone["good"].margin)
    assert "beta" in signature(FORMULAS["dpo"]).parameters


def test_command_prints_the_table(capsys):
    assert main(["gradients", "table"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n| ") >= len(ROWS)
    for row in ROWS:
        line = next(x for x in out.splitlines() if x.startswith(f"| {row.name} |"))
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[1] == f"`{row.good}`" and float(cells[5]) < 1e-12
