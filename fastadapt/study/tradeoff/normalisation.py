"""Local against global normalisation, and the effect of the released code's target and chain.

For each prompt the strings of all adaptors are one pool, reweighted for each adaptor in turn
(`globalised.mixture_log_weights`), so that a prompt with two strings of an adaptor still has dozens
that count for it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fastadapt.study.tradeoff import globalised
from fastadapt.study.tradeoff.correlations import estimate
from fastadapt.study.tradeoff.pool import Mask, Pool
from fastadapt.study.tradeoff.statistics import Array, pearson

STEPS = 2000
BURN_IN = 200


class Pools(NamedTuple):
    """The strings by prompt, (P, S, ...), padded with weights of -inf.

    Attributes:
        there: (P, S); whether there is a string.
        values: (P, S, 2); log p and the implicit reward.
        log_q, log_norm: (P, S, A).
        log_aligned: (P, S).
        shares: (P, 1, A); the share of a prompt's strings that each adaptor drew.
    """

    there: Mask
    values: Array
    log_q: Array
    log_norm: Array
    log_aligned: Array
    shares: Array


def by_prompt(pool: Pool) -> Pools:
    """Groups the strings of a pool by prompt."""
    order = np.argsort(pool.prompt, kind="stable")
    per_prompt = np.bincount(pool.prompt, minlength=pool.prompts)
    there = np.arange(per_prompt.max()) < per_prompt[:, None]

    def spread(values: Array) -> Array:
        out = np.zeros((*there.shape, *values.shape[1:]))
        out[there] = values[order]
        return out

    place = pool.prompt * len(pool.cells) + pool.cell
    drawn = np.bincount(place, minlength=pool.prompts * len(pool.cells))
    drawn = drawn.reshape(pool.prompts, len(pool.cells))
    drawn[drawn.sum(-1) == 0] = 1  # a prompt without strings has no weights either
    return Pools(
        there,
        spread(np.stack([pool.log_prior, pool.implicit_reward], -1)),
        spread(pool.log_q),
        spread(pool.log_norm),
        spread(pool.log_aligned),
        (drawn / drawn.sum(-1, keepdims=True))[:, None],
    )


def compare(pool: Pool, counts: Array, seed: int) -> dict[str, Any]:
    """Returns the means of every adaptor of the grid under its local and its global distribution.

    Args:
        pool: all strings, those of cells with a hidden top-k too.
        counts: (B, P), from `statistics.prompt_counts`.
        seed: of the chains.

    Returns:
        `adaptors`: for each its means `[log p, reward]` from its own strings, and from the whole
        pool under the local and the global distribution; `shift`: global minus local with
        intervals; `effective`: the median over prompts of the effective number of strings (global
        distribution); `acceptance` and `chain`: of Metropolis-Hastings on the same pools;
        `own_acceptance`: with the adaptor itself as proposal; `spread`: standard deviation of sum
        log Z_t within a prompt; `one_chain_effective`: share of the adaptor's own strings that
        count if one chain mixes all prompts; `fixed_target`: means under the aligned distribution
        at T = 1 on the adaptor's support. `correlation`: of the adaptors' means.
    """
    pools = by_prompt(pool)
    grid = [i for i, cell in enumerate(pool.cells) if not cell.hidden_top_k]
    masked = np.where(pools.there, 0.0, -np.inf)
    log_q, norms, shares = pools.log_q, pools.log_norm, pools.shares
    local_w = np.stack(
        [masked + globalised.local_log_weights(log_q, shares, target) for target in grid]
    )
    global_w = np.stack(
        [masked + globalised.mixture_log_weights(log_q, norms, shares, target) for target in grid]
    )
    # what the released chain aimed at: the aligned distribution at T = 1 on the support
    fixed_w = np.where(np.isfinite(local_w), local_w, -np.inf) + np.stack(
        [
            pools.log_aligned - np.where(np.isfinite(q), q, 0.0)
            for q in np.moveaxis(pools.log_q, -1, 0)[grid]
        ]
    )
    local, whole, fixed = (_weighted(w, pools.values) for w in (local_w, global_w, fixed_w))
    usable: Mask = np.asarray(np.isfinite(global_w).any(-1))
    chains = globalised.metropolis(
        np.where(usable[..., None], global_w, 0.0),
        STEPS,
        np.random.default_rng(seed),
        burn_in=BURN_IN,
    )
    walked = np.where(
        usable[..., None], np.einsum("aps,psk->apk", chains.occupancy, pools.values), np.nan
    )
    effective = globalised.effective_size(global_w)
    adaptors: list[dict[str, Any]] = []
    for i, cell in enumerate(grid):
        mine = pool.select(pool.cell == cell)
        shift = whole[i] - local[i]
        adaptors.append(
            {
                "own": [float(mine.log_prior.mean()), float(mine.implicit_reward.mean())],
                "local": _mean(local[i]),
                "global": _mean(whole[i]),
                "chain": _mean(walked[i]),
                "fixed_target": _mean(fixed[i]),
                "shift": [_shift(shift[:, k], counts) for k in (0, 1)],
                "effective": float(np.nanmedian(effective[i])),
                "acceptance": float(chains.acceptance[i][usable[i]].mean()),
                **_pairs(mine, cell),
                "one_chain_effective": _one_chain(mine, cell),
            }
        )
    return {
        "pool": float(pools.there.sum(-1).mean()),
        "adaptors": adaptors,
        "correlation": {
            name: _correlation(values, counts)
            for name, values in (("local", local), ("global", whole), ("fixed_target", fixed))
        },
    }


def hidden_top_k(pool: Pool, counts: Array) -> list[dict[str, Any]]:
    """Returns the means of each cell with a hidden top-k, beside those without it.

    `outside`: the share of strings drawn without that top-k that it would have made impossible;
    `shift`: of the means `[log p, reward]` by leaving it on, with intervals.
    """
    found = []
    for i, cell in enumerate(pool.cells):
        if not cell.hidden_top_k:
            continue
        same = [
            j
            for j, other in enumerate(pool.cells)
            if (other.family, other.temperature, other.hidden_top_k)
            == (cell.family, cell.temperature, False)
        ]
        plain = pool.select(pool.cell == same[0])
        shifts = [
            _prompt_means(pool.select(pool.cell == i), k) - _prompt_means(plain, k) for k in (0, 1)
        ]
        found.append(
            {
                "name": cell.name,
                "outside": float(np.isneginf(plain.log_q[:, i]).mean()),
                "shift": [_shift(shift, counts) for shift in shifts],
            }
        )
    return found


def _prompt_means(pool: Pool, which: int) -> Array:
    """Returns the mean of log p or the reward by prompt, (P,); NaN without strings."""
    values = (pool.log_prior, pool.implicit_reward)[which]
    n = np.bincount(pool.prompt, minlength=pool.prompts)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.bincount(pool.prompt, values, pool.prompts) / n)


def _weighted(log_weights: Array, values: Array) -> Array:
    """Returns means of the values under weights (A, P, S), as (A, P, 2)."""
    return np.asarray(np.einsum("aps,psk->apk", globalised.normalised(log_weights), values))


def _mean(by_prompt_: Array) -> list[float]:
    """Returns means over the prompts that have any weight."""
    return [float(value) for value in np.nanmean(by_prompt_, 0)]


def _replicates(by_prompt_: Array, counts: Array) -> Array:
    """Returns bootstrap means over prompts, (..., B); NaN leaves a prompt out."""
    there = np.isfinite(by_prompt_)
    summed = np.where(there, by_prompt_, 0.0) @ counts.T
    with np.errstate(invalid="ignore"):
        means: Array = summed / (there.astype(float) @ counts.T)
    return means


def _shift(by_prompt_: Array, counts: Array) -> list[float]:
    """Returns a mean over prompts with its interval."""
    return estimate(np.nanmean(by_prompt_), _replicates(by_prompt_, counts))


def _correlation(values: Array, counts: Array) -> list[float]:
    """Returns Pearson's r of the adaptors' means (A, P, 2), with its interval."""
    x, y = (_replicates(values[..., k], counts).T for k in (0, 1))
    means = np.nanmean(values, 1)
    return estimate(pearson(means[:, 0], means[:, 1]), pearson(x, y))


def _pairs(mine: Pool, cell: int) -> dict[str, float]:
    """Describes the weights W = exp(sum log Z_t) of one adaptor's strings by prompt.

    The spread of log W, and the acceptance rate with the adaptor as proposal,
    E min(W, W') / E W, from all pairs of a prompt.
    """
    total, free, accepted = 0.0, 0, []
    for prompt in np.unique(mine.prompt):
        values = mine.log_norm[mine.prompt == prompt, cell]
        total += float(((values - values.mean()) ** 2).sum())
        free += len(values) - 1
        if len(values) > 1:
            weights = np.exp(values - values.max())
            first, second = np.triu_indices(len(values), 1)
            accepted.append(np.minimum(weights[first], weights[second]).mean() / weights.mean())
    return {
        "spread": float(np.sqrt(total / free)) if free else float("nan"),
        "own_acceptance": float(np.mean(accepted)) if accepted else float("nan"),
    }


def _one_chain(mine: Pool, cell: int) -> float:
    """Returns the share of strings that count if a single chain runs over all prompts."""
    return float(globalised.effective_size(mine.log_norm[:, cell]) / len(mine.cell))
