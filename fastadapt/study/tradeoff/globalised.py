"""The globally normalised adaptor: importance weights, Metropolis–Hastings, effective sizes.

A decoder draws from the locally normalised distribution q(y) = prod a_t(y_t) / Z_t. The globally
normalised one is p(y) = prod a_t(y_t) / Z with one constant for all strings of a prompt, so that

    log p(y) - log q(y) = sum_t log Z_t - log Z

`score` gives log q and log Z_t; their sums are all that is needed here. Weights are compared within
a prompt only, since Z depends on the prompt. Along the last axis stand the strings of one prompt,
its pool.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.special import logsumexp

from fastadapt.study.tradeoff.statistics import Array


class Chains(NamedTuple):
    """Independent Metropolis–Hastings chains, one per prompt.

    Attributes:
        occupancy: (..., n); the share of steps spent at each string. Rows sum to 1.
        acceptance: (...); the share of proposals that were accepted.
    """

    occupancy: Array
    acceptance: Array


def mixture_log_weights(log_q: Array, log_norm: Array, shares: Array, target: int) -> Array:
    """Returns log weights of strings from several adaptors, for one global distribution.

    A string of the pool comes from the mixture sum_b shares_b q_b, whoever drew it (the balance
    heuristic of Veach and Guibas, 1995), so every string counts for every adaptor whose support
    holds it: `log q_a + sum_t log Z_t - log sum_b shares_b q_b`.

    Args:
        log_q: (..., n, A), -inf outside a support.
        log_norm: (..., n, A).
        shares: (..., A), the share of the strings that each adaptor drew.
        target: the adaptor, an index.

    Returns:
        Array: (..., n), nats, up to a constant; -inf outside the target's support.
    """
    return local_log_weights(log_q, shares, target) + log_norm[..., target]


def local_log_weights(log_q: Array, shares: Array, target: int) -> Array:
    """Returns log weights for the locally normalised distribution of an adaptor."""
    with np.errstate(divide="ignore"):  # an adaptor without strings has no share
        mixed = logsumexp(log_q + np.log(shares), axis=-1)
    weights: Array = log_q[..., target] - mixed
    return weights


def normalised(log_weights: Array) -> Array:
    """Returns weights that sum to 1 along the last axis; NaN where all are 0."""
    with np.errstate(invalid="ignore"):
        weights: Array = np.exp(log_weights - logsumexp(log_weights, axis=-1, keepdims=True))
    return weights


def effective_size(log_weights: Array) -> Array:
    """Returns the effective sample size (sum W)² / sum W² along the last axis."""
    return np.asarray(1 / (normalised(log_weights) ** 2).sum(-1))


def metropolis(
    log_weights: Array, steps: int, rng: np.random.Generator, *, burn_in: int = 0
) -> Chains:
    """Runs independent Metropolis-Hastings on pools of strings, all chains at once.

    Each step proposes a string of the pool, all alike, and accepts it if
    `log u < log_weight(proposed) - log_weight(current)`. Its limit is `normalised(log_weights)`,
    which is exact for the pool and costs no chain; this one shows what acceptance it would have.

    Args:
        log_weights: (..., n), at least one finite in each pool; -inf is never accepted.
        steps: counted steps of each chain, at least 1.
        rng: of the start, the proposals and the acceptance.
        burn_in: steps before those.

    Raises:
        ValueError: no step, or a pool without a finite weight.
    """
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    pools, n = log_weights.reshape(-1, log_weights.shape[-1]), log_weights.shape[-1]
    possible = np.isfinite(pools)
    if not possible.any(-1).all():
        raise ValueError("log_weights: expected a finite one in each pool, got none")
    rows = np.arange(len(pools))
    # a chain starts at a string that is possible, all of them alike
    state = np.where(possible, rng.random(pools.shape), -1.0).argmax(-1)
    occupancy, accepted = np.zeros(pools.shape), np.zeros(len(pools))
    for step in range(burn_in + steps):
        proposed = rng.integers(n, size=len(pools))
        log_u = np.log1p(-rng.random(len(pools)))
        moves = log_u < pools[rows, proposed] - pools[rows, state]
        state = np.where(moves, proposed, state)
        if step >= burn_in:
            occupancy[rows, state] += 1
            accepted += moves
    shape = log_weights.shape
    return Chains((occupancy / steps).reshape(shape), (accepted / steps).reshape(shape[:-1]))
