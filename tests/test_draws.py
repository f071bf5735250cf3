"""The distribution of the draw: G-tests over seeds and over positions, and the far tail.

All seeds are fixed, so that a test passes always or never. With 34 tests at 1e-5 the suite as a
whole would reject a right sampler once in 2,900 choices of these seeds.
"""

import pytest
import torch
from scipy import stats

from fastadapt import Adaptor, filter_logits, sample

pytestmark = pytest.mark.usefixtures("device")

DRAWS = 250_000
SIGNIFICANCE = 1e-5
ADAPTORS = {
    "neutral": Adaptor(),
    "temperature": Adaptor(temperature=1.7),
    "top_k": Adaptor(top_k=20),
    "top_p": Adaptor(top_p=0.97),
    "typical": Adaptor(typical_p=0.97),
    "all": Adaptor(
        temperature=1.2, top_k=90, top_p=0.95, min_p=0.002, epsilon_cutoff=1e-3, eta_cutoff=2e-3
    ),
}


def assert_distribution(x, adaptor, tokens):
    """G-test of drawn ids (D,) against the filtered row (V,) in float64; bins expect >= 10."""
    p = filter_logits(x[None], adaptor)[0].double().softmax(-1)
    counts = torch.bincount(tokens, minlength=x.shape[0])
    assert counts[p == 0].sum() == 0, "a token outside the support was drawn"
    expected, order = (p * tokens.shape[0]).sort(descending=True)
    observed = counts[order]
    full = int((expected >= 10).sum())
    seen = [*observed[:full].tolist(), int(observed[full:].sum())]
    wanted = [*expected[:full].tolist(), float(expected[full:].sum())]
    if wanted[-1] < 10:  # too small a rest joins its neighbour
        seen[-2:], wanted[-2:] = [sum(seen[-2:])], [sum(wanted[-2:])]
    assert len(seen) > 2, "too few bins to test a distribution"
    g = stats.power_divergence(seen, wanted, lambda_="log-likelihood")
    assert g.pvalue > SIGNIFICANCE, f"G = {g.statistic:.1f} over {len(seen)} bins, p = {g.pvalue}"


@pytest.mark.parametrize("name", ADAPTORS)
@pytest.mark.parametrize("kind", ["spread", "ties", "two_level"])
def test_draws_over_seeds(rows, device, kind, name):
    x = rows(kind, 1, 300)[0]
    seeds = torch.randint(-(2**63), 2**63 - 1, (DRAWS,)).to(device)
    drawn = sample(x.expand(DRAWS, -1), ADAPTORS[name], seeds=seeds)
    assert_distribution(x, ADAPTORS[name], drawn.tokens)


@pytest.mark.parametrize("name", ["neutral", "top_p", "all"])  # seeds know nothing of adaptors
def test_draws_over_consecutive_seeds(rows, device, name):
    x = rows("spread", 1, 300)[0]
    seeds = torch.arange(DRAWS, device=device)
    drawn = sample(x.expand(DRAWS, -1), ADAPTORS[name], seeds=seeds)
    assert_distribution(x, ADAPTORS[name], drawn.tokens)


@pytest.mark.parametrize(
    ("kind", "name"),
    [*(("spread", name) for name in ADAPTORS), ("power", "neutral"), ("power", "all")],
)
def test_draws_over_rows_of_one_seed(rows, device, kind, name):
    """One seed, the position of each row as its counter: what one sequence draws over time."""
    x = rows(kind, 1, 300)[0]
    seeds, positions = torch.full((DRAWS,), 12345), torch.arange(DRAWS, device=device)
    drawn = sample(x.expand(DRAWS, -1), ADAPTORS[name], seeds=seeds.to(device), positions=positions)
    assert_distribution(x, ADAPTORS[name], drawn.tokens)


def test_draws_of_default_seeds(rows):
    x = rows("spread", 1, 300)[0]
    assert_distribution(
        x, Adaptor(top_p=0.9), sample(x.expand(DRAWS, -1), Adaptor(top_p=0.9)).tokens
    )


def test_consecutive_positions_are_independent(device):
    """G-test of pairs of successive draws: 16 equally likely pairs."""
    n = 2 * DRAWS
    tokens = sample(
        torch.zeros(1, 4, device=device).expand(n, -1),
        Adaptor(),
        seeds=torch.full((n,), 7, device=device),
        positions=torch.arange(n, device=device),
    ).tokens.view(-1, 2)
    counts = torch.bincount(tokens[:, 0] * 4 + tokens[:, 1], minlength=16)
    assert stats.power_divergence(counts.tolist(), lambda_="log-likelihood").pvalue > SIGNIFICANCE


def test_tail_tokens_come_as_often_as_they_should(device):
    """32 tokens of probability 1e-7 in each of three places, 2e7 draws: 64 expected in each."""
    n, v, rare, p = 20_000_000, 102, 32, 1e-7
    starts = {"first": 0, "middle": 35, "last": v - rare}
    probs = torch.full((v,), (1 - len(starts) * rare * p) / (v - len(starts) * rare)).double()
    for start in starts.values():
        probs[start : start + rare] = p
    x = probs.log().float().to(device)
    counts = torch.zeros(v, dtype=torch.int64, device=device)
    for chunk in range(10):
        m = n // 10
        positions = torch.arange(chunk * m, (chunk + 1) * m, device=device)
        tokens = sample(x.expand(m, -1), Adaptor(), seeds=torch.zeros_like(positions),
                        positions=positions).tokens  # fmt: skip
        counts += torch.bincount(tokens, minlength=v)
    low, high = stats.poisson.interval(1 - SIGNIFICANCE, n * rare * p)
    for place, start in starts.items():
        hits = int(counts[start : start + rare].sum())
        assert low <= hits <= high, f"{place}: {hits} draws of rare tokens, {n * rare * p} expected"


@pytest.mark.parametrize("v", [1, 7, 1000, 50_257, 151_936])
@pytest.mark.parametrize("kind", ["normal", "spread", "far", "ties", "holes"])
def test_logprobs_are_those_of_float64(rows, kind, v):
    x = rows(kind, 4, v)
    for adaptor in (Adaptor(), Adaptor(temperature=0.7, top_p=0.9), Adaptor(typical_p=0.8)):
        drawn = sample(x, adaptor, base_logprobs=True, log_mass=True)
        scaled = filter_logits(x, Adaptor(temperature=adaptor.temperature)).double()
        support = filter_logits(x, adaptor) > float("-inf")
        y = drawn.tokens[:, None]
        adapted = torch.where(support, scaled, float("-inf")).log_softmax(-1).gather(1, y)[:, 0]
        mass = scaled.softmax(-1).masked_fill(~support, 0).sum(-1).log()
        base = x.double().log_softmax(-1).gather(1, y)[:, 0]
        close = {"rtol": 0, "atol": 2e-5}
        torch.testing.assert_close(drawn.logprobs.double(), adapted, **close)
        torch.testing.assert_close(drawn.log_mass.double(), mass, **close)
        torch.testing.assert_close(drawn.base_logprobs.double(), base, **close)
        assert torch.equal(drawn.kept.long(), support.sum(-1))
