"""The trade-off study where everything can be enumerated: a Markov language model."""

import itertools

import numpy as np
import pytest
import torch
from scipy.special import logsumexp

from fastadapt import Adaptor, reference, sample, score
from fastadapt.study.tradeoff import globalised, grids

TEMPERATURES = grids.TEMPERATURES
# The paper's seven samplers; with four symbols most of them keep everything, so stricter ones too.
SAMPLERS = [
    *({}, {"top_k": 30}, {"top_k": 50}, {"top_p": 0.9}, {"top_p": 0.95}),
    *({"typical_p": 0.9}, {"eta_cutoff": 9e-4}),
    *({"top_k": 2}, {"top_p": 0.6}, {"typical_p": 0.5}, {"eta_cutoff": 0.3}),
]
SYMBOLS, LENGTH = 4, 5


@pytest.fixture(scope="module")
def chain():
    """Logits of a Markov language model, one row a state, the start first; another as prior."""
    generator = torch.Generator().manual_seed(0)
    logits = 1.5 * torch.randn(2, SYMBOLS + 1, SYMBOLS, generator=generator, dtype=torch.float64)
    return logits[0], logits[1]


@pytest.fixture(scope="module")
def strings():
    """All strings, (4^5, 5), and the state before each symbol."""
    symbols = torch.tensor(list(itertools.product(range(SYMBOLS), repeat=LENGTH)))
    states = torch.cat([torch.zeros(len(symbols), 1, dtype=torch.int64), symbols[:, :-1] + 1], 1)
    return symbols, states


def _distribution(logits, adaptor):
    """log a_t of every state and symbol, straight from the definition."""
    kept = reference.filter_logits(logits, adaptor) != -torch.inf
    unnormalised = (logits - torch.logsumexp(logits, -1, keepdim=True)) / adaptor.temperature
    return torch.where(kept, unnormalised, -torch.inf)


def _enumerate(logits, adaptor, strings):
    """log q_w, sum of log Z_t and log p^w of all strings; the last without q_w or Z_t."""
    symbols, states = strings
    table = _distribution(logits, adaptor)
    chosen = table[states, symbols].sum(-1)
    norms = torch.logsumexp(table, -1)[states].sum(-1)
    return chosen - norms, norms, chosen - torch.logsumexp(chosen, 0)


@pytest.mark.parametrize("knobs", SAMPLERS, ids=str)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_global_identity(temperature, knobs, chain, strings):
    """log(p^w / q_w) = sum of log Z_t - log Z_w, for every string of the support."""
    adaptor = Adaptor(temperature=temperature, **knobs)
    log_q, norms, log_p = _enumerate(chain[0], adaptor, strings)
    inside = torch.isfinite(log_p)
    assert torch.equal(inside, torch.isfinite(log_q)) and inside.any()
    log_z = torch.logsumexp((log_q + norms)[inside], 0)
    gap = (log_p - log_q - (norms - log_z))[inside]
    assert gap.abs().max() < 1e-12
    assert torch.logsumexp(log_q[inside], 0).abs() < 1e-12

    distribution = np.exp(log_q[inside].numpy() + norms[inside].numpy())
    assert np.abs(distribution / distribution.sum() - log_p[inside].exp().numpy()).max() < 1e-12

    symbols, states = strings
    rows = chain[0].float()[states]
    scored = score(rows, symbols, [adaptor])
    ours = scored.logprobs[..., 0].double().sum(-1), scored.log_norm[..., 0].double().sum(-1)
    assert torch.equal(torch.isfinite(ours[0]), inside)
    assert (ours[0] - log_q)[inside].abs().max() < 1e-4
    assert (ours[1] - norms)[inside].abs().max() < 1e-4


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_reward_identity(temperature, chain, strings):
    """mean r / beta + mean log p = log Z + mean log p+, over all strings and on any corpus."""
    symbols, states = strings
    aligned, prior = (m.log_softmax(-1)[states, symbols].sum(-1).numpy() for m in chain)
    beta, log_z = 0.3, 1.7
    reward = beta * (aligned - prior) + beta * log_z
    assert logsumexp(prior + reward / beta) == pytest.approx(log_z, abs=1e-12)
    counts = np.random.default_rng(0).multinomial(500, np.full(len(prior), 1 / len(prior)), 20)
    left = counts @ (reward / beta + prior) / 500
    assert np.abs(left - log_z - counts @ aligned / 500).max() < 1e-12


def _draw(logits, adaptor, count, seed):
    """Strings from the locally normalised distribution, by `sample`, as enumerated indices."""
    generator = torch.Generator().manual_seed(seed)
    state = torch.zeros(count, dtype=torch.int64)
    place = torch.zeros(count, dtype=torch.int64)
    for _ in range(LENGTH):
        symbol = sample(logits.float()[state], adaptor, generator=generator).tokens
        place, state = place * SYMBOLS + symbol, symbol + 1
    return place.numpy()


def _distance(found, distribution):
    """Total variation."""
    return 0.5 * np.abs(found - distribution).sum()


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize(
    "adaptor", [Adaptor(top_p=0.6), Adaptor(temperature=0.5), Adaptor(temperature=1.5, top_k=2)]
)
def test_chain_and_weights_reach_the_global_distribution(adaptor, seed, chain, strings):
    """Both come within 0.025 (total variation) of the enumeration; the local one does not."""
    log_q, norms, log_p = (t.numpy() for t in _enumerate(chain[0], adaptor, strings))
    distribution = np.exp(log_p)
    place = _draw(chain[0], adaptor, 60_000, seed)
    local = np.bincount(place, minlength=len(distribution)) / len(place)
    assert _distance(local, np.exp(log_q)) < 0.025
    assert _distance(np.exp(log_q), distribution) > 0.04

    weights = norms[place]
    weighted = np.bincount(place, globalised.normalised(weights), len(distribution))
    assert _distance(weighted, distribution) < 0.025

    pools = weights.reshape(60, 1000)
    rng = np.random.default_rng(seed)
    chains = globalised.metropolis(pools, 3000, rng, burn_in=100)
    assert chains.occupancy.sum(-1) == pytest.approx(1.0)
    walked = np.bincount(place, chains.occupancy.reshape(-1) / 60, len(distribution))
    assert _distance(walked, distribution) < 0.025
    exact = np.array([_acceptance(pool) for pool in pools])
    assert chains.acceptance.mean() == pytest.approx(exact.mean(), abs=5e-3)
    assert exact.mean() < 0.99


def _acceptance(pool):
    """The acceptance rate in the limit, E min(1, W'/W), the state by W and the proposal uniform."""
    weights = np.exp(pool - pool.max())
    ratio = np.minimum(weights[:, None], weights[None, :]).mean(1)
    return ratio.sum() / weights.sum()


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_strings_of_all_adaptors_count_for_each(seed, chain, strings):
    """The mixture's weights give both distributions of an adaptor from strings that others drew."""
    adaptors = [Adaptor(temperature=0.5), Adaptor(), Adaptor(temperature=1.5, top_p=0.6)]
    tables = [_enumerate(chain[0], a, strings) for a in adaptors]
    log_q, norms = (np.stack([t[i].numpy() for t in tables], -1) for i in (0, 1))
    counts = [30_000, 20_000, 10_000]
    place = np.concatenate(
        [_draw(chain[0], a, n, seed) for a, n in zip(adaptors, counts, strict=True)]
    )
    shares = np.array(counts) / sum(counts)
    for target, (local, _, log_p) in enumerate(tables):
        weights = globalised.mixture_log_weights(log_q[place], norms[place], shares, target)
        found = np.bincount(place, globalised.normalised(weights), len(log_p))
        assert _distance(found, log_p.exp().numpy()) < 0.05
        weights = globalised.local_log_weights(log_q[place], shares, target)
        found = np.bincount(place, globalised.normalised(weights), len(log_p))
        assert _distance(found, local.exp().numpy()) < 0.05


def test_effective_size_and_impossible_strings():
    weights = np.log([[1.0, 1.0, 1.0, 1.0], [3.0, 1.0, 1e-300, 1e-300]])
    assert globalised.effective_size(weights) == pytest.approx([4.0, 16 / 10])
    weights[1, 2:] = -np.inf
    assert globalised.effective_size(weights) == pytest.approx([4.0, 16 / 10])
    chains = globalised.metropolis(weights, 4000, np.random.default_rng(0))
    assert (chains.occupancy[1, 2:] == 0).all()
    assert chains.occupancy[1, 0] == pytest.approx(0.75, abs=0.05)
    assert chains.acceptance[0] == 1.0
    with pytest.raises(ValueError, match="expected a finite one in each pool, got none"):
        globalised.metropolis(np.full((2, 3), -np.inf), 5, np.random.default_rng(0))
    with pytest.raises(ValueError, match="steps: expected at least 1, got 0"):
        globalised.metropolis(weights, 0, np.random.default_rng(0))
