"""The published toy of the trade-off paper, number by number."""

import numpy as np
import pytest
from scipy.special import logsumexp

from fastadapt.study.tradeoff import statistics


@pytest.fixture(scope="module")
def toy():
    """The paper's toy, section 3.1: 1000 objects, 1000 corpora of 100,000 draws each."""
    rng = np.random.RandomState(42)
    posterior = rng.dirichlet([0.1] * 1000)
    scores = posterior ** (1 / 42) + rng.uniform(-0.42, 0.42, 1000)
    log_prior = scores - logsumexp(scores)
    reward = np.log(posterior) - log_prior
    values = np.stack([log_prior, reward, np.log(posterior)], -1)
    cumulated = posterior.cumsum()
    cumulated /= cumulated[-1]
    corpora = []
    for seed in range(1000):
        # the counts of RandomState(seed).choice(1000, 100_000, p=posterior), in less time
        uniform = np.sort(np.random.RandomState(seed).random_sample(100_000))
        counts = np.diff(np.searchsorted(uniform, cumulated), prepend=0)
        corpora.append(counts @ values / 100_000)
    return posterior, values, np.array(corpora)


def test_toy_entropies_and_strings(toy):
    posterior, values, _ = toy
    log_prior, reward, _ = values.T
    assert -(posterior * values[:, 2]).sum() == pytest.approx(5.0053, abs=5e-5)
    assert -(np.exp(log_prior) * log_prior).sum() == pytest.approx(6.8690, abs=5e-5)
    assert (posterior * reward).sum() == pytest.approx(1.7765, abs=5e-5)
    assert statistics.spearman(log_prior, reward) == pytest.approx(0.427, abs=5e-4)
    assert statistics.pearson(log_prior, reward) == pytest.approx(0.486, abs=5e-4)


def test_toy_corpora(toy):
    posterior, values, corpora = toy
    x, y, s = corpora.T
    centre = (posterior * values[:, 2]).sum()
    kept = statistics.typical(s, centre, 1e-3)
    assert kept.sum() == 213
    assert statistics.pearson(x[kept], y[kept]) == pytest.approx(-0.82, abs=5e-3)
    assert statistics.spearman(x[kept], y[kept]) == pytest.approx(-0.80, abs=5e-3)
    assert statistics.pearson(x, y) == pytest.approx(-0.12, abs=5e-3)
    assert statistics.spearman(x, y) == pytest.approx(-0.12, abs=5e-3)
    for epsilon, r in [(1e-2, -0.13), (5e-3, -0.29), (2e-3, -0.56), (5e-4, -0.94), (2e-4, -0.99)]:
        inside = statistics.typical(s, centre, epsilon)
        assert statistics.pearson(x[inside], y[inside]) == pytest.approx(r, abs=6e-3)


def _stratify(values, bins, per_bin, rng):
    """Indices of values, as many from each bin of equal width, with replacement, as in the toy."""
    edges = np.linspace(values.min(), values.max(), bins + 1)[1:-1]
    place = np.digitize(values, edges, right=True)
    return np.concatenate([rng.choice(np.flatnonzero(place == b), per_bin) for b in range(bins)])


def test_toy_stratified_corpora(toy):
    """(rho, r) = (-0.920, -0.920) is of one draw of the strata; it moves by 0.006 (sd) with it."""
    posterior, values, corpora = toy
    x, y, s = corpora.T
    kept = statistics.typical(s, (posterior * values[:, 2]).sum(), 1e-3)
    x, y = x[kept], y[kept]
    found = []
    for seed in range(20):
        chosen = _stratify(x, 10, 100, np.random.default_rng(seed))
        assert len(chosen) == 1000
        found.append([f(x[chosen], y[chosen]) for f in (statistics.spearman, statistics.pearson)])
    assert np.mean(found, 0) == pytest.approx([-0.920, -0.920], abs=0.01)
    assert np.std(found, 0).max() < 0.01


def test_toy_prediction(toy):
    """The selection on a sum predicts the r of the typical corpora, -0.816, to 0.01."""
    posterior, values, corpora = toy
    x, y = values[:, 0], values[:, 1]
    pairs = np.stack([x, y]) - np.array([[posterior @ x], [posterior @ y]])
    covariance = (posterior * pairs) @ pairs.T
    width = 1e-3 / np.sqrt(covariance.sum() / 100_000)
    assert statistics.typical_prediction(covariance, width) == pytest.approx(-0.816, abs=0.01)
    weighted = covariance[0, 1] / np.sqrt(covariance[0, 0] * covariance[1, 1])
    assert weighted == pytest.approx(-0.13, abs=5e-3)
    wide = statistics.typical_prediction(covariance, 50.0)
    assert wide == pytest.approx(weighted, abs=1e-9)
