"""Filters by the shape of the logits, XTC, any order, and the temperature last.

The kernels against the reference bit for bit, the reference against plain formulas in float64,
transformers' top-h, and what llama.cpp made of chains, recorded by record_llama_cpp.py.
"""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from scipy import stats

from bits import assert_same
from fastadapt import (
    Adaptor,
    Edits,
    adapted_log_odds,
    filter_logits,
    reference,
    sample,
    score,
    verify,
)

KINDS = ["normal", "spread", "flat", "ties", "two_level", "one_hot", "holes", "far", "bf16"]
KNOBS = {
    "top_n_sigma": [0.5, 1.0, 2.0],
    "min_k": [0.01, 3.0, 1000.0],
    "top_h": [0.05, 0.3, 1.0],
    "top_k": [1, 5, 50],
    "top_p": [0.3, 0.9, 0.99],
    "min_p": [0.01, 0.3],
    "top_a": [0.01, 0.1, 1.0],
    "typical_p": [0.2, 0.9],
    "epsilon_cutoff": [1e-3, 1e-2],
    "eta_cutoff": [1e-3, 1e-2],
    "xtc_threshold": [0.0, 1e-9, 0.01, 0.1, 0.3],
}
NEW = ["top_n_sigma", "min_k", "top_h", "top_a", "xtc_threshold"]
LLAMA = json.loads(Path(__file__).with_name("llama_cpp.json").read_text())["filters"]
DRAWS = 40_000
SIGNIFICANCE = 1e-4


def knobs_of(pick, names):
    """Random values for the knobs of some filters, and what else an adaptor has."""
    knobs = {name: pick(KNOBS[name]) for name in names}
    if "xtc_threshold" in knobs:
        knobs["xtc_probability"] = pick([0.2, 0.5, 1.0])
    free = tuple(name_of(name) for name in names)
    order = pick(["hf", "vllm", free, (*free, "temperature")])
    rest = {
        "temperature": pick([1.0, 0.7, 1.5, 0.1, 0.0]),
        "min_tokens_to_keep": pick([1, 1, 2, 150]),
    }
    return Adaptor(order=order, **knobs, **rest)


def name_of(knob):
    """The filter of a knob."""
    return "xtc" if knob == "xtc_threshold" else knob


@pytest.fixture
def pick(request):
    """Chooses from lists, the same for the same test."""
    generator = torch.Generator().manual_seed(hash_of(request.node.name))
    return lambda values: values[int(torch.randint(len(values), (), generator=generator))]


def hash_of(text):
    """A number that is the same in every process."""
    return sum((i + 1) * ord(c) for i, c in enumerate(text))


@pytest.mark.parametrize("v", [1, 2, 33, 1000, 1025, 5000])
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_follow_the_reference(rows, cpu_capability, pick, kind, v):
    x = rows(kind, 3, v)
    seeds, positions = torch.randint(2**62, (3,)), torch.randint(99, (3,))
    draw = {"seeds": seeds, "positions": positions, "base_logprobs": True, "log_mass": True}
    draw["support"] = True
    for names in (
        *([name] for name in NEW),
        *(NEW_IN_CHAINS[pick(range(len(NEW_IN_CHAINS)))] for _ in range(4)),
    ):
        adaptor = knobs_of(pick, names)
        drawn = sample(x, adaptor, top_logprobs=min(v, 3), **draw)
        assert_same(drawn, reference.sample(x, adaptor, top_logprobs=min(v, 3), **draw), adaptor)
        tossed = adaptor.tossed(seeds, positions)
        filtered = filter_logits(x, tossed)
        assert torch.equal(filtered, reference.filter_logits(x, tossed)), adaptor
        assert torch.equal((filtered > -torch.inf).sum(-1).int(), drawn.kept), adaptor
        if adaptor.greedy:
            continue
        tokens = torch.stack([drawn.tokens, torch.randint(v, (3,))])  # one at least survives
        twice, adaptors = x.expand(2, -1, -1), [tossed, Adaptor(top_p=0.9), tossed]
        if tossed.rows is not None:
            twice, tokens, adaptors = x, tokens[0], [tossed, Adaptor(top_p=0.9), tossed]
        scores = score(twice, tokens, adaptors, support=True)
        assert_same(scores, reference.score(twice, tokens, adaptors, support=True), adaptor)
        of_drawn = scores.logprobs.view(-1, 3, 3)[0, :, 0]
        assert torch.equal(of_drawn, drawn.logprobs), "the sampler's own bits"
        log_odds = adapted_log_odds(x.float(), drawn.tokens, tossed)
        wanted = reference.adapted_log_odds(x.float(), drawn.tokens, tossed)
        torch.testing.assert_close(log_odds, wanted, rtol=1e-5, atol=1e-4)


NEW_IN_CHAINS = [
    list(names)
    for number in (2, 3, 5)
    for names in itertools.permutations(KNOBS, number)
    if set(names) & set(NEW) and (hash_of(" ".join(names)) % 10**number) < 20
]


def textbook(name, value, s):
    """What a filter keeps of a row of float64 logits, by its formula, and how near to its edge."""
    p, order = s.softmax(-1), s.argsort(descending=True, stable=True)
    if name == "top_n_sigma":
        return s >= s.max() - value * s.std(correction=0)
    if name == "top_a":
        return p >= value * p.max() ** 2
    kept = torch.zeros_like(s, dtype=torch.bool)
    ranked = s[order]
    if name == "min_k":
        falls = (ranked[:-1] - ranked[1:]) / torch.arange(1, s.numel())
        k = max(int(falls.argmax()) + 1, math.floor(value / float(ranked[0] - ranked[-1])))
        kept[order[:k]] = True
    if name == "top_h":
        q = ranked[:100].softmax(-1)
        entropies = torch.special.entr(q).cumsum(-1)
        kept[order[: max(1, int((entropies <= value * entropies[-1]).sum()))]] = True
    if name == "xtc_threshold":
        above = (p >= value).nonzero()[:, 0]
        least = above[p[above].argmin()] if above.numel() > 1 else order[0]
        kept = s <= s[least]
    return kept


@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize("kind", ["normal", "spread", "far"])
def test_formulas(rows, kind, name):
    for v, value in itertools.product([5, 300, 5000], KNOBS[name][-3:]):
        x = rows(kind, 8, v)
        adaptor = Adaptor(xtc_probability=float(name == "xtc_threshold"), **{name: value})
        ours = filter_logits(x, adaptor) > -torch.inf
        for row, kept in zip(x.double(), ours, strict=True):
            wanted = textbook(name, value, row)
            # sigma has steps of a 256th, spread over the tokens
            assert int((kept != wanted).sum()) <= (name == "top_n_sigma"), (v, value)
        whole = reference.filter_logits(x.double(), adaptor) > -torch.inf
        wanted = torch.stack([textbook(name, value, row) for row in x.double()])
        assert torch.equal(whole, wanted), "of float64, the formula itself"


@pytest.mark.parametrize("h", [0.05, 0.3, 0.7, 0.95])
@pytest.mark.parametrize("kind", ["normal", "spread", "far", "ties", "holes"])
def test_top_h_is_that_of_transformers(rows, kind, h):
    warpers = pytest.importorskip("transformers.generation.logits_process", reason="its top-h")
    for v in (7, 99, 101, 5000):
        x = rows(kind, 8, v)
        theirs = warpers.TopHLogitsWarper(h)(None, x.double()) > -torch.inf
        ours = filter_logits(x, Adaptor(top_h=h)) > -torch.inf
        assert torch.equal(ours.sum(-1), theirs.sum(-1)), v
        low = torch.tensor(-torch.inf)
        mine, other = (torch.where(m, x, low).sort().values for m in (ours, theirs))
        assert torch.equal(mine, other), "but for which of equal tokens"


@pytest.mark.parametrize("at", range(len(LLAMA)))
def test_chains_of_llama_cpp(at):
    case = LLAMA[at]
    order = (*(name_of(name) for name in case["numbers"]), "temperature")
    xtc = float("xtc_threshold" in case["numbers"])
    adaptor = Adaptor(
        order=order, temperature=case["temperature"], min_tokens_to_keep=case["keep"],
        xtc_probability=xtc, **case["numbers"],
    )  # fmt: skip
    out = filter_logits(torch.tensor(case["logits"]), adaptor)
    kept = {str(i): out[i].item() for i in (out > -torch.inf).nonzero()[:, 0].tolist()}
    assert kept == pytest.approx(case["out"], rel=1e-6)


def test_a_temperature_that_comes_last_changes_no_support(rows):
    x = rows("spread", 4, 1000)
    knobs = {"min_p": 0.05, "top_p": 0.9, "order": ("min_p", "top_p", "temperature")}
    supports = [
        filter_logits(x, Adaptor(temperature=t, **knobs)) > -torch.inf for t in (0.01, 1.0, 50.0)
    ]
    assert torch.equal(supports[0], supports[1]) and torch.equal(supports[0], supports[2])
    hot = score(x, x.argmax(-1), [Adaptor(temperature=50.0, **knobs)])
    even = -supports[0].sum(-1).log()
    torch.testing.assert_close(hot.logprobs[:, 0], even, rtol=0, atol=0.3)


def test_a_temperature_that_comes_last_may_take_a_row_beyond_float32():
    x = torch.tensor([[1e38, 0.0], [-1e38, -2e38], [3e38, -3e38], [1.0, 0.0]])
    adaptor = Adaptor(temperature=0.1, top_p=0.9, order=("top_p", "temperature"))
    drawn = sample(x, adaptor, seeds=torch.arange(4))
    assert drawn.status.tolist() == [2, 3, 2, 0]
    assert_same(drawn, reference.sample(x, adaptor, seeds=torch.arange(4)), adaptor)
    assert torch.equal(filter_logits(x, adaptor)[:3], x[:3])


@pytest.mark.parametrize("knobs", [{"xtc_probability": 1.0}, {"typical_p": 0.5}])
def test_a_last_temperature_of_0_takes_the_best_survivor(rows, knobs):
    name = "xtc" if "xtc_probability" in knobs else "typical_p"
    x, seeds = torch.cat([rows("spread", 8, 300), rows("ties", 8, 300)]), torch.arange(16)
    last = Adaptor(temperature=0.0, order=(name, "temperature"), **knobs)
    drawn = sample(x, last, seeds=seeds)
    assert_same(drawn, reference.sample(x, last, seeds=seeds), knobs)
    left = filter_logits(x, Adaptor(**knobs, order=(name,)))
    assert torch.equal(drawn.tokens, left.argmax(-1)) and (drawn.tokens != x.argmax(-1)).any()
    assert (drawn.kept == 1).all() and (drawn.logprobs == 0).all()
    out = filter_logits(x, last)
    assert torch.equal(out.argmax(-1), drawn.tokens) and ((out > -torch.inf).sum(-1) == 1).all()
    first = sample(x, Adaptor(temperature=0.0, **knobs), seeds=seeds)
    assert torch.equal(first.tokens, x.argmax(-1))


@pytest.mark.parametrize("scale", [1e-30, 1e-4, 1.0, 300.0, 1e30])
def test_sigma_knows_no_scale(rows, scale):
    x = rows("normal", 8, 5000).double()
    x[:, 7] = -30 * x.abs().amax(-1)  # a masked token counts
    kept = filter_logits((x * scale).float(), Adaptor(top_n_sigma=2.0)) > -torch.inf
    wanted = torch.stack(
        [textbook("top_n_sigma", 2.0, row) for row in (x * scale).float().double()]
    )
    assert int((kept != wanted).sum()) <= 1 and 8 < int(kept.sum()) < 40_000


def test_xtc_acts_as_often_as_it_should(rows):
    x = torch.tensor([2.0, 1.9, 1.5, -3.0, -4.0]).expand(DRAWS, -1)
    seeds = torch.arange(DRAWS)
    for probability in (0.1, 0.5, 0.9):
        xtc = Adaptor(xtc_probability=probability, xtc_threshold=0.1)
        drawn = sample(x, xtc, seeds=seeds)
        acted = drawn.kept == 3  # the third is the least of three above the threshold
        assert torch.equal(acted, xtc.tossed(seeds).xtc_probability == 1)
        assert set(drawn.kept.tolist()) == {3, 5}
        assert stats.binomtest(int(acted.sum()), DRAWS, probability).pvalue > SIGNIFICANCE
        # the coin says nothing of the draw
        for one in (True, False):
            tokens = drawn.tokens[acted == one]
            law = Adaptor(xtc_probability=float(one), xtc_threshold=0.1)
            p = filter_logits(x[0], law).softmax(-1)
            wanted = (p[p > 0] * tokens.numel()).double()
            seen = torch.bincount(tokens, minlength=5)[p > 0].double()
            assert stats.chisquare(seen, wanted * seen.sum() / wanted.sum()).pvalue > SIGNIFICANCE


def test_verified_drafts_throw_the_same_coins(rows):
    x, seeds = rows("spread", 12, 200).view(3, 4, 200), torch.arange(3)
    draft, positions = torch.randint(200, (3, 3)), torch.tensor([0, 5, 2**40])
    xtc = Adaptor(xtc_probability=0.5, xtc_threshold=0.01, temperature=0.7)
    each = {
        "seeds": seeds.repeat_interleave(4),
        "positions": (positions[:, None] + torch.arange(4)).flatten(),
    }
    drawn = sample(x.view(12, 200), xtc, **each)
    draft = drawn.tokens.view(3, 4)[:, :3].clone()
    given = {"seeds": seeds, "positions": positions}
    verified = verify(x, draft, xtc, **given)
    assert torch.equal(verified.tokens.flatten(), drawn.tokens)
    assert torch.equal(verified.kept.flatten(), drawn.kept)
    given["draft_logits"], given["draft_adaptor"] = (
        rows("normal", 9, 200).view(3, 3, 200),
        Adaptor(),
    )
    assert_same(verify(x, draft, xtc, **given), reference.verify(x, draft, xtc, **given), xtc)
    of_drafts = given | {"draft_adaptor": xtc}  # the coins of the drafts' own draws
    assert_same(verify(x, draft, xtc, **of_drafts), reference.verify(x, draft, xtc, **of_drafts), 1)


@pytest.mark.parametrize("order", ["hf", ("top_h", "xtc", "top_p", "temperature")])
def test_edits_come_before_shapes(rows, order):
    x, seeds = rows("spread", 6, 500), torch.arange(6)
    ids = torch.randperm(500)[:60].sort().values.int()
    edits = Edits(ids.repeat(6), torch.arange(7) * 60, penalty=torch.full((360,), 1.3))
    adaptor = Adaptor(top_h=0.6, xtc_probability=1.0, top_p=0.95, temperature=1.3, order=order)
    drawn = sample(x, adaptor, seeds=seeds, edits=edits)
    plain = sample(filter_logits(x, Adaptor(), edits=edits), adaptor, seeds=seeds)
    assert_same(drawn, plain, order)


def test_no_coin_is_thrown_where_nothing_is_drawn(rows):
    x, tokens, xtc = rows("normal", 2, 50), torch.tensor([0, 1]), Adaptor(xtc_probability=0.5)
    for call in (
        lambda: filter_logits(x, xtc),
        lambda: score(x, tokens, [Adaptor(), xtc]),
        lambda: adapted_log_odds(x, tokens, xtc),
        lambda: adapted_log_odds(x, tokens, Adaptor(xtc_probability=torch.tensor([1.0, 0.5]))),
        lambda: reference.filter_logits(x, xtc),
    ):
        with pytest.raises(ValueError, match="xtc_probability: expected 0 or 1 where n"):
            call()
