"""The closed forms of the gradients against autograd on logits, differences and the printed table.

The truth is made here: rows of logits, the losses of `fastadapt.losses` on log-odds of them, and
autograd down to the logits; nothing of it passes through the closed forms.
"""

import math
from inspect import signature
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fastadapt import Responses, RewardPenalizeLoss
from fastadapt._cli.main import main
from fastadapt.losses import CATALOGUE, FORMULAS
from fastadapt.losses.catalogue import symbols_in
from fastadapt.study.gradients.check import check_gradients
from fastadapt.study.gradients.named_losses import one_token
from fastadapt.study.gradients.table import MU, ROWS, check_row, example_batch
from fastadapt.tracking.gradients import analytic_gradients, logit

B, T, V = 4, 4, 7
each_row = pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
F_DIVERGENCES = ("forward_kl", "js_divergence", "alpha_divergence")


def texts_of(row):
    return [row.chosen, row.rejected, row.u]


def cases():
    """Every entry and variant of the catalogue, alone and with each option that changes it."""
    for name, entry in CATALOGUE.items():
        own = signature(FORMULAS[name]).parameters
        for row in entry.gradients:
            extras = [{}]
            if "f_divergence" in own:
                extras += [{"f_divergence": kind, "f_alpha": 0.3} for kind in F_DIVERGENCES]
            if "ld_alpha" in own:
                extras.append({"ld_alpha": 0.4})
            if "ε" in symbols_in(texts_of(row)):
                extras.append({"label_smoothing": 0.2})
            for extra in extras:
                options = {**row.given, **extra}
                words = "-".join([name, *map(str, options.values())])
                yield pytest.param(name, options, id=words)


each_case = pytest.mark.parametrize(("name", "options"), list(cases()))


def log_odds_of(z, y):
    """z_y - logsumexp of the others."""
    others = z.scatter(-1, y[..., None], float("-inf"))
    return z.gather(-1, y[..., None])[..., 0] - others.logsumexp(-1)


class Side:
    """Logits (B, T, V) with labels, as responses of the layout asked for.

    `there` says of each response whether it has tokens.
    """

    def __init__(self, there, layout):
        self.z = (2 * torch.randn(B, T, V, dtype=torch.float64)).requires_grad_()
        self.y = torch.randint(V, (B, T))
        self.mask = torch.rand(B, T) < 0.7
        self.mask[:, 1] = True
        self.mask &= torch.tensor(there)[:, None]
        self.order = torch.randperm(B * T) if layout == "packed" else None
        m = self.laid_out(log_odds_of(self.z, self.y))
        self.kept = self.laid_out(self.mask)
        if layout == "padded":
            self.responses = Responses(m, self.kept)
        else:
            ids = torch.arange(B)[:, None].where(self.mask, torch.tensor(-1))
            self.responses = Responses(m, segments=self.laid_out(ids), num_segments=B)
        # of each row: softmax, that over the other entries, and the label
        others = self.z.detach().scatter(-1, self.y[..., None], -math.inf).softmax(-1)
        self.p, self.q = self.laid_out(self.z.detach().softmax(-1)), self.laid_out(others)
        self.onehot = self.laid_out(F.one_hot(self.y, V))

    def laid_out(self, x):
        """Values of tokens (B, T, ...) in the layout of the responses."""
        return x if self.order is None else x.flatten(0, 1)[self.order]


def batch(name, layout):
    """Pairs, one of them without a chosen response and one without any; all that the loss takes."""
    chosen = Side([True, True, False, False], layout)
    rejected = Side([True, True, True, False], layout)
    ids = torch.rand(B, T, V).argsort(-1)[..., :3]
    mask = (torch.rand(ids.shape) < 0.7) & (ids != chosen.y[..., None]) & chosen.mask[..., None]
    candidates = log_odds_of(chosen.z[..., None, :].expand(B, T, 3, V), ids)
    tokens = torch.rand(4, *chosen.responses.log_odds.shape).double()
    others = {
        "pair_weights": torch.rand(B).double() + 0.5,
        "reference_point": torch.tensor(0.7).double(),
        "reward_shift": torch.tensor(-0.3).double(),
        "logsumexp": 5 * tokens[0],
        "mean_logits": tokens[1] - 4,
        "chosen_divergences": tokens[2],
        "rejected_divergences": tokens[3],
    }
    inputs = {
        "chosen": chosen.responses,
        "rejected": rejected.responses,
        "ref_chosen_logps": torch.randn(B).double() - 7,
        "ref_rejected_logps": torch.randn(B).double() - 7,
        "candidates": chosen.laid_out(candidates),
        "candidate_mask": chosen.laid_out(mask),
    }
    taken = {k: v for k, v in others.items() if k in signature(FORMULAS[name]).parameters}
    return chosen, rejected, chosen.laid_out(ids), inputs, taken


def test_every_loss_has_its_rows():
    assert list(CATALOGUE) == list(FORMULAS)
    rows = [row for row in ROWS if row.family != "mixtures"]
    stated = {name: [r.gradient for r in rows if name in r.weights] for name in CATALOGUE}
    assert stated == {name: list(entry.gradients) for name, entry in CATALOGUE.items()}


@pytest.mark.parametrize("layout", ["padded", "packed"])
@each_case
def test_gradients_of_logits_are_those_of_autograd(name, options, layout):
    """∂L/∂z = c (s - onehot) = g (onehot - q), and its two norms, to 1e-12."""
    may_have_gold = "gold" in signature(FORMULAS[name]).parameters
    for gold in (False, True) if may_have_gold else (False,):
        chosen, rejected, ids, inputs, taken = batch(name, layout)
        if gold or "gold" in CATALOGUE[name].needs:
            side = torch.randn(2, 3, dtype=torch.float64)
            taken["gold"] = Responses(side, torch.ones(2, 3, dtype=torch.bool))
        objective = RewardPenalizeLoss({name: 1.3}, **options)
        loss, _ = objective(**inputs, **taken)
        grads = torch.autograd.grad(loss, [chosen.z, rejected.z], allow_unused=True)
        squares = {"chosen": chosen.q.square().sum(-1), "rejected": rejected.q.square().sum(-1)}
        found = analytic_gradients(objective, **inputs, inputs=taken, sum_squares=squares)
        seen = 0.0
        for where, side, grad in (("chosen", chosen, grads[0]), ("rejected", rejected, grads[1])):
            grad = side.laid_out(torch.zeros_like(side.z) if grad is None else grad)
            through_l = -found[where].logp[..., None] * (side.p - side.onehot)
            through_m = found[where].log_odds[..., None] * (side.onehot - side.q)
            if where == "chosen":
                at = F.one_hot(ids, V) - side.p[..., None, :]
                row_gradient = (found["candidates"].logp[..., None] * at).sum(-2)
                _close(found["candidates"].norm1, row_gradient.abs().sum(-1))
                through_l, through_m = through_l + row_gradient, through_m + row_gradient
            _close(through_l, grad)
            _close(through_m, grad)
            if where == "rejected" or not found["candidates"].logp.any():
                _close(found[where].norm1, grad.abs().sum(-1))
                _close(found[where].norm2, grad.norm(dim=-1))
            assert not found[where].log_odds[~side.kept].any()
            seen += float(grad.abs().sum())
        assert seen > 0, "nothing was compared"


def _close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def evaluated(text, row, side, rejected, u):
    """A printed expression at every token of a side."""
    m, mask = side.log_odds, side.mask
    logp = F.logsigmoid(m)
    lengths = mask.sum(-1, keepdim=True).double()
    sums = (logp * mask).sum(-1, keepdim=True)
    names = {
        "N": mask.sum().double(),
        "B": torch.tensor(len(m)).double(),
        "T": lengths,
        "m": m,
        "S": sums,
        "L": (F.logsigmoid(rejected.log_odds) * rejected.mask).sum() / rejected.mask.sum(),
        "u": u,
        "σ": lambda x: 1 / (1 + torch.exp(-x)),
        "exp": torch.exp,
        "λ": row.options.get("coefficient"),
        "μ": MU,
        "β": row.options.get("beta"),
    }
    value = torch.as_tensor(eval(text, {"__builtins__": {}}, names), dtype=torch.float64)
    return torch.where(mask, value.expand_as(m), 0.0)


MIXTURES = [row for row in ROWS if row.family == "mixtures"]


@pytest.mark.parametrize("row", MIXTURES, ids=[row.name for row in MIXTURES])
def test_printed_sums_are_the_gradients_of_mixtures(row):
    inputs = example_batch()
    del inputs["inputs"]
    leaves = {k: inputs[k].log_odds.clone().requires_grad_() for k in ("chosen", "rejected")}
    candidates = inputs["candidates"].clone().requires_grad_()
    sides = {k: inputs[k]._replace(log_odds=m) for k, m in leaves.items()}
    loss, _ = RewardPenalizeLoss(row.weights, **row.options)(
        **{**inputs, **sides, "candidates": candidates}
    )
    points = [*leaves.values(), candidates]
    of_each = torch.autograd.grad(loss, points, allow_unused=True)
    grads = dict(zip(("chosen", "rejected", "candidates"), of_each, strict=True))
    chosen, rejected = inputs["chosen"], inputs["rejected"]
    refs = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
    ratios = [
        (F.logsigmoid(side.log_odds) * side.mask).sum(-1) - ref
        for side, ref in zip((chosen, rejected), refs, strict=True)
    ]
    u = row.options.get("beta", 1.0) * (ratios[0] - ratios[1])[:, None]
    texts = row.gradient.rejected, row.gradient.log_odds
    penalised, place = rejected, "rejected"
    if "candidate_unlikelihood_penalty" in row.weights:
        # N stays that of the chosen side
        place, n = "candidates", chosen.mask.sum()
        flat = Responses(inputs["candidates"].flatten(0, 1), inputs["candidate_mask"].flatten(0, 1))
        penalised = flat._replace(mask=flat.mask & chosen.mask.reshape(-1, 1))
        texts = [text.replace("N", f"{int(n)}") for text in texts]
    g = grads[place].reshape(penalised.log_odds.shape)
    rest = torch.sigmoid(-penalised.log_odds)
    _close(-g / rest, evaluated(texts[0], row, penalised, rejected, u))
    if texts[1]:
        _close(g, evaluated(texts[1], row, penalised, rejected, u))
    c = -grads["chosen"] / torch.sigmoid(-chosen.log_odds)
    _close(c, evaluated(row.gradient.chosen, row, chosen, rejected, u))


@each_row
def test_self_check_is_small(row):
    check = check_row(row)
    assert check.autograd < 1e-12
    if row.name.startswith("DFT"):  # whose differences are of another loss
        assert check.differences is None
    else:
        assert check.differences < 1e-7


@pytest.mark.parametrize("name", ["exmate_penalty", "kto", "orpo"])
def test_self_check_finds_a_wrong_form(monkeypatch, name):
    """A closed form that is off by 1 % is off in both columns."""
    entry = CATALOGUE[name]
    wrong = [row._replace(rejected=f"1.01*({row.rejected})") for row in entry.gradients]
    monkeypatch.setitem(CATALOGUE, name, entry._replace(gradients=tuple(wrong)))
    inputs = example_batch()
    own = {k: v for k, v in inputs.pop("inputs").items() if k == "reference_point"}
    check = check_gradients(name, **inputs, inputs=own if name == "kto" else None)
    assert check.autograd > 1e-5 and check.differences > 1e-5


def test_packed_and_padded_agree():
    inputs = example_batch()
    del inputs["inputs"]
    packed = {}
    for name in ("chosen", "rejected"):
        log_odds, mask = inputs[name][:2]
        ids = torch.where(mask, torch.arange(3)[:, None], -1).flatten()
        packed[name] = Responses(log_odds.flatten(), segments=ids, num_segments=3)
    for first in ("dpo", "sigmoid_norm", "aot"):
        weights, options = (
            {first: 1.0, "unlikelihood_penalty": 0.5, "exmate": 0.3},
            {"level": "sequence"},
        )
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
    rest = {k: v for k, v in inputs.items() if k.startswith("ref_")}
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
    inputs = pairs_of_the_table()
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


def pairs_of_the_table():
    return {k: v for k, v in example_batch().items() if k in signature(FORMULAS["dpo"]).parameters}


def test_packed_options_reach_only_their_losses():
    inputs = pairs_of_the_table()
    found = analytic_gradients({"dpo": 1.0, "mle": 0.0}, **inputs, beta=0.3)
    alone = analytic_gradients("dpo", **inputs, beta=0.3)
    torch.testing.assert_close(found["chosen"].log_odds, alone["chosen"].log_odds)
    assert "beta" in signature(FORMULAS["dpo"]).parameters


def test_orpo_keeps_its_digits_near_one():
    """1 - P̄ and 1/P̄ - 1 are not differences of numbers near 1."""
    mask = torch.ones(1, 1, dtype=torch.bool)
    for m in (20.0, 34.0, 60.0):
        at = torch.tensor([[m]], dtype=torch.float64, requires_grad=True)
        inputs = Responses(torch.zeros_like(at).detach(), mask), Responses(at, mask)
        loss, _ = RewardPenalizeLoss({"orpo": 1.0})(*inputs)
        (wanted,) = torch.autograd.grad(loss, at)
        found = analytic_gradients("orpo", *inputs)["rejected"].log_odds
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)


def test_published_page_counts_the_rows():
    page = Path(__file__).resolve().parents[1] / "docs" / "gradients" / "README.md"
    assert f"`fastadapt gradients table` prints the {len(ROWS)} rows." in page.read_text("utf-8")


def test_command_prints_the_tables(capsys):
    assert main(["gradients", "table"]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    for row in ROWS:
        line = next(x for x in lines if x.startswith(f"| {row.name} |"))
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[1] == f"`{row.gradient.chosen}`" and float(cells[-2]) < 1e-12
    assert out.count("\n### ") == len({row.family for row in ROWS}) - 1
    # the weights at given probabilities: every loss with a rejected side, once
    weights = lines[lines.index(next(x for x in lines if x.startswith("| loss | p = "))) + 2 :]
    named = [name for line in weights for name in line.split("|")[1].strip().split(", ")]
    penalising = {k for k, e in CATALOGUE.items() if any(r.rejected != "0" for r in e.gradients)}
    assert sorted(named) == sorted(penalising)
    exmate = next(line for line in weights if "exmate" in line)
    assert [float(x) for x in exmate.split("|")[4].split(",")] == [1.0, 0.5, 0.25]
