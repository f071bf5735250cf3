"""What the catalogue says of each loss: limits, needs, families, words; against the losses."""

from inspect import Parameter, signature

import pytest
import torch

from fastadapt import Responses, RewardPenalizeLoss
from fastadapt.losses import ALIASES, CATALOGUE, CONTAIN_MLE, FORMULAS, describe
from fastadapt.losses.catalogue import FAMILIES, SYMBOLS, families, symbols_in
from fastadapt.losses.catalogue.describe import NEEDS_IN_WORDS
from fastadapt.losses.catalogue.entry import NEEDS
from fastadapt.losses.catalogue.symbols import times
from fastadapt.losses.named import defaults_of
from fastadapt.tracking.closed_forms import Inputs, _Symbols, gradient_of
from fastadapt.tracking.gradients import checked

LENGTHS = ([3, 2, 1, 3], [1, 3, 2, 2])  # of the chosen and the rejected responses
each_loss = pytest.mark.parametrize("name", CATALOGUE)
with_limits = pytest.mark.parametrize("name", [k for k, e in CATALOGUE.items() if e.limits])


def parameters(name):
    return signature(FORMULAS[name]).parameters


def responses(lengths, **more):
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return Responses(torch.randn(mask.shape, dtype=torch.float64), mask, **more)


def given(name, **changed):
    """What a loss must have: four pairs with references, and its own inputs."""
    chosen, rejected = (responses(lengths) for lengths in LENGTHS)
    shape = chosen.log_odds.shape
    everything = {
        "chosen": chosen,
        "rejected": rejected,
        "ref_chosen_logps": torch.randn(4).double() - 5,
        "ref_rejected_logps": torch.randn(4).double() - 5,
        "gold": responses([2, 1, 3, 2]),
        "candidates": torch.randn(*shape, 2).double(),
        "candidate_mask": torch.ones(*shape, 2, dtype=torch.bool),
        "reference_point": torch.tensor(0.4).double(),
        "reward_shift": torch.tensor(-0.2).double(),
        "logsumexp": torch.rand(shape).double() + 4,
        "mean_logits": torch.rand(shape).double(),
        "chosen_divergences": torch.rand(shape).double(),
        "rejected_divergences": torch.rand(shape).double(),
        **changed,
    }
    left_out = () if "gold" in CATALOGUE[name].needs else ("gold",)
    return {k: v for k, v in everything.items() if k in parameters(name) and k not in left_out}


@each_loss
def test_needs_are_what_the_formula_takes(name):
    needs, own = CATALOGUE[name].needs, parameters(name)
    assert needs <= set(NEEDS) and len(needs & {"pairs", "unpaired"}) == int("rejected" in own)
    inputs = {
        "reference": "ref_chosen_logps",
        "candidates": "candidates",
        "mean_logits": "mean_logits",
        "divergences": "chosen_divergences",
    }
    for need, parameter in inputs.items():
        assert (need in needs) == (parameter in own), need
    must = {k for k, p in own.items() if p.default is Parameter.empty}
    assert ("gold" in needs) == ("gold" in must)
    assert must == set(given(name)) - {"ref_chosen_logps", "ref_rejected_logps"}


@each_loss
def test_pairs_need_as_many_of_each_side(name):
    inputs = given(name)
    if "rejected" not in inputs:
        return
    inputs["rejected"] = responses([2, 1])
    if "ref_rejected_logps" in inputs:
        inputs["ref_rejected_logps"] = inputs["ref_rejected_logps"][:2]
    if "pairs" in CATALOGUE[name].needs:
        if "rejected_divergences" in inputs:
            inputs["rejected_divergences"] = inputs["rejected_divergences"][:2, :2]
        with pytest.raises(ValueError, match="expected 4 responses, as many as chosen, got 2"):
            FORMULAS[name](**inputs)
    else:
        assert FORMULAS[name](**inputs).isfinite()


@each_loss
def test_micro_batches_add_up_unless_the_batch_is_needed(name):
    """With the whole batch's divisors the sum over its halves is its loss."""
    inputs = given(name)
    whole = FORMULAS[name](**inputs)

    def half(value, part):
        if not isinstance(value, Responses):
            return value if value.dim() == 0 else value[part]
        counts = {"total_tokens": int(value.mask.sum()), "total_sequences": 4}
        return Responses(value.log_odds[part], value.mask[part], **counts)

    parts = slice(0, 2), slice(2, 4)
    halves = [FORMULAS[name](**{k: half(v, part) for k, v in inputs.items()}) for part in parts]
    adds_up = torch.allclose(sum(halves), whole, rtol=1e-12, atol=1e-12)
    assert adds_up == ("batch" not in CATALOGUE[name].needs)


@each_loss
def test_lengths_are_needed_where_a_certain_token_changes_the_gradient(name):
    """A token of p = 1 at each end leaves every log P; what divides by lengths sees it."""
    inputs, totals = given(name), {"total_tokens": 9, "total_sequences": 4}
    slopes = []
    for longer in (False, True):
        leaves, own = [], dict(inputs)
        if "candidates" in inputs:
            leaves.append(inputs["candidates"].clone().requires_grad_())
            own["candidates"] = leaves[0]
        for k in [k for k in ("chosen", "rejected") if k in inputs]:
            m = inputs[k].log_odds.clone().requires_grad_()
            leaves.append(m)
            mask = inputs[k].mask
            if longer:
                m = torch.cat([m, torch.full((4, 1), 1e4).double()], 1)
                mask = torch.cat([mask, torch.ones(4, 1, dtype=torch.bool)], 1)
            own[k] = Responses(m, mask, **totals)
        if longer:
            wide = {
                k: torch.cat([v, torch.zeros_like(v[:, :1])], 1)
                for k, v in own.items()
                if isinstance(v, torch.Tensor) and v.dim() > 1
            }
            own |= wide
        grads = torch.autograd.grad(FORMULAS[name](**own), leaves, allow_unused=True)
        slopes.append(torch.cat([g.flatten() for g in grads if g is not None] or [torch.zeros(1)]))
    same = torch.allclose(*slopes, rtol=1e-9, atol=1e-12)
    assert same == ("lengths" not in CATALOGUE[name].needs)
    row = gradient_of(name, defaults_of(FORMULAS[name]))
    assert ("T" in symbols_in([row.chosen, row.rejected, row.u])) == (not same)


def at_log_odds(name, m):
    """c of the rejected tokens, or candidates, where all of them have this log-odds; the inputs.

    From autograd, by g = -c (1 - p).
    """
    options = {"label_smoothing": 0.2} if "ε" in symbols_in(CATALOGUE[name].limits) else {}
    side = responses(LENGTHS[1])
    leaf = torch.full_like(side.log_odds, m).requires_grad_()
    inputs = given(name, rejected=side._replace(log_odds=leaf))
    if "candidates" in inputs:
        leaf = torch.full_like(inputs["candidates"], m).requires_grad_()
        inputs["candidates"] = leaf
    (g,) = torch.autograd.grad(FORMULAS[name](**inputs, **options), leaf)
    return -g / torch.sigmoid(-leaf.detach()), inputs, options


@with_limits
@pytest.mark.parametrize(("which", "near", "far"), [(0, -3e3, -3e6), (1, 40.0, 80.0)])
def test_limits_are_those_of_the_gradients(name, which, near, far):
    text = CATALOGUE[name].limits[which]
    found, inputs, options = at_log_odds(name, near)
    if text in ("inf", "-inf"):
        beyond = at_log_odds(name, far)[0]
        there = found != 0
        assert there.any() and bool(((found > 0) == (text == "inf"))[there].all())
        assert float((beyond.abs() / found.abs())[there].min()) > 100
        return
    rows = {
        k: checked(k, inputs[k]._replace(log_odds=inputs[k].log_odds.detach()))
        for k in ("chosen", "rejected")
        if k in inputs
    }
    refs = inputs.get("ref_chosen_logps"), inputs.get("ref_rejected_logps")
    candidates = inputs.get("candidates"), inputs.get("candidate_mask")
    others = {k: v for k, v in inputs.items() if k not in rows}
    x = Inputs(rows.get("chosen"), rows.get("rejected"), refs, *candidates, None, others)
    side = "candidates" if "candidates" in inputs else "rejected"
    there = rows["chosen"].kept[..., None] if side == "candidates" else rows["rejected"].kept
    wanted = _Symbols(name, x, {**defaults_of(FORMULAS[name]), **options}, side)(text).expand_as(
        found
    )
    torch.testing.assert_close(found, torch.where(there, wanted, 0), rtol=1e-9, atol=1e-12)


def test_every_loss_with_a_rejected_side_has_limits():
    rejecting = {k for k, e in CATALOGUE.items() if any(r.rejected != "0" for r in e.gradients)}
    limited = {k for k, e in CATALOGUE.items() if e.limits}
    assert rejecting - limited == {"alphapo"}  # whose limits go by the sign of α
    assert limited <= rejecting


def test_every_symbol_has_its_words():
    assert set(NEEDS_IN_WORDS) == set(NEEDS)
    texts = [t for e in CATALOGUE.values() for r in e.gradients for t in (*r[:2], r.u)]
    texts += [t for e in CATALOGUE.values() for t in e.limits or ()]
    assert symbols_in(texts) == list(SYMBOLS)


def test_families_hold_every_loss_once():
    held = [name for names in families().values() for name in names]
    assert sorted(held) == sorted(CATALOGUE) and list(families()) == list(FAMILIES)
    assert all(families().values())
    assert "kto" in families()["single responses with a reference"]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("-1/N", "-λ/N"),
        ("1/N", "λ/N"),
        ("-exp(m)/N", "-λ*exp(m)/N"),
        ("a + b", "λ*(a + b)"),
        ("-P/B", "-λ*P/B"),
    ],
)
def test_products_of_expressions(text, wanted):
    assert times("λ", text) == wanted


@each_loss
def test_description_says_what_is_known(name):
    said = describe(name)
    entry = CATALOGUE[name]
    for part in (name, entry.title, entry.source, entry.when, entry.gradients[0].chosen):
        assert part in said
    for row in entry.gradients:
        for symbol in symbols_in([row.chosen, row.rejected, row.u]):
            assert f"{symbol}: {SYMBOLS[symbol]}" in said


def test_losses_that_contain_mle_reward_alone():
    """Without a rejected response their chosen tokens still have a gradient of -1/N (1 - p)."""
    found = set()
    for name, entry in CATALOGUE.items():
        row = gradient_of(name, defaults_of(FORMULAS[name]))
        likelihood = row.chosen in ("1/N", "1/B") or row.chosen.startswith(("1/N ", "ν/N ", "ν/Q "))
        if likelihood and "candidates" not in entry.needs:
            found.add(name)
    assert found == CONTAIN_MLE
    assert set(ALIASES.values()) <= set(CATALOGUE)
    for alias, name in ALIASES.items():
        assert RewardPenalizeLoss({alias: 1.0}).weights == {name: 1.0}
