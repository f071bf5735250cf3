"""Correlations of strings and corpora, with intervals that resample whole prompts.

Everything here is NumPy in float64. `x` and `y` are two quantities of the same strings, log p and
the reward. Correlations are NaN where a quantity does not vary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import stats

Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]


class Moments(NamedTuple):
    """Sums over the strings of each prompt and adaptor, enough for means and Pearson's r.

    Attributes:
        strings: (P, A); how many.
        first: (P, A, 2); of x and of y.
        second: (P, A, 3); of x², y² and xy.
    """

    strings: Array
    first: Array
    second: Array


def pearson(x: Array, y: Array) -> Array:
    """Returns Pearson's r along the last axis."""
    x, y = x - x.mean(-1, keepdims=True), y - y.mean(-1, keepdims=True)
    return _ratio((x * y).sum(-1), (x * x).sum(-1), (y * y).sum(-1))


def spearman(x: Array, y: Array) -> Array:
    """Returns Spearman's rho along the last axis: Pearson's r of average ranks."""
    return pearson(ranks(x), ranks(y))


def resampled_spearman(x: Array, y: Array, prompt: Indices, counts: Array) -> Array:
    """Returns Spearman's rho of strings in every bootstrap replicate, each ranked anew.

    Args:
        x, y: (N,), of the strings in question and no others: a rank among more is another number.
        prompt: (N,); the prompt of each.
        counts: (B, P), from `prompt_counts`.

    Returns:
        (B,); as `spearman` of a table with copies of the strings. NaN where nothing varies.
    """
    ties_x, ties_y = _ties(x), _ties(y)
    found = []
    # some replicates at a time, whatever the study's size
    for some in np.array_split(counts, max(1, counts.shape[0] * len(x) // 500_000)):
        weights = some[:, prompt]
        ranked = _weighted_ranks(weights, *ties_x), _weighted_ranks(weights, *ties_y)
        found.append(_weighted_pearson(*ranked, weights))
    return np.concatenate(found)


def ranks(values: Array) -> Array:
    """Returns average ranks along the last axis."""
    return np.asarray(stats.rankdata(values, axis=-1), dtype=np.float64)


def moments(x: Array, y: Array, prompt: Indices, cell: Indices, shape: tuple[int, int]) -> Moments:
    """Returns the sums of strings by prompt and adaptor.

    Args:
        x, y: (N,).
        prompt, cell: (N,); where each string belongs.
        shape: P and A.
    """
    # about the mean: sums of squares of values far from 0 would lose digits
    x, y = x - x.mean(), y - y.mean()
    place = prompt * shape[1] + cell

    def sums(values: Array) -> Array:
        summed = np.bincount(place, values, shape[0] * shape[1])
        return np.asarray(summed, dtype=np.float64).reshape(shape)

    return Moments(
        sums(np.ones_like(x)),
        np.stack([sums(x), sums(y)], -1),
        np.stack([sums(x * x), sums(y * y), sums(x * y)], -1),
    )


def prompt_counts(prompts: int, replicates: int, rng: np.random.Generator) -> Array:
    """Returns how often each bootstrap replicate holds each prompt, (B, P); rows sum to P."""
    drawn = rng.multinomial(prompts, np.full(prompts, 1 / prompts), replicates)
    return np.asarray(drawn, dtype=np.float64)


def resample(counts: Array, found: Moments) -> Moments:
    """Returns the sums of every replicate, (B, A), (B, A, 2) and (B, A, 3)."""
    return Moments(*(np.tensordot(counts, part, 1) for part in found))


def string_pearson(found: Moments) -> Array:
    """Returns Pearson's r of strings from sums, added over adaptors first.

    Args:
        found: sums with any leading axes and the adaptors on the next axis, which is reduced.
    """
    n, first, second = found.strings.sum(-1), found.first.sum(-2), found.second.sum(-2)
    xx, yy, xy = np.moveaxis(second, -1, 0)
    x, y = np.moveaxis(first, -1, 0)
    return _ratio(xy - x * y / n, xx - x * x / n, yy - y * y / n)


def means(found: Moments) -> tuple[Array, Array]:
    """Returns the means of x and y by adaptor, relative to the overall mean."""
    with np.errstate(invalid="ignore"):  # an adaptor may have no string in a replicate
        x, y = np.moveaxis(found.first / found.strings[..., None], -1, 0)
    return x, y


def interval(values: Array, level: float = 0.95) -> tuple[float, float]:
    """Returns the percentile interval of bootstrap values; NaN where none is finite."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return float("nan"), float("nan")
    low, high = np.quantile(finite, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def covariance_split(found: Moments) -> tuple[Array, Array]:
    """Splits the covariance of pooled strings by the law of total covariance.

    Args:
        found: sums with any leading axes, then the adaptors.

    Returns:
        The covariance between the adaptors' means and the mean one within them, (..., 2, 2) each;
        their sum is the pooled covariance.
    """
    n = found.strings.sum(-1)[..., None]
    x, y = means(found)
    share = found.strings / n
    within = found.second / found.strings[..., None] - np.stack([x * x, y * y, x * y], -1)
    x, y = x - (share * x).sum(-1, keepdims=True), y - (share * y).sum(-1, keepdims=True)
    between = np.stack([x * x, y * y, x * y], -1)
    return _matrix((share[..., None] * between).sum(-2)), _matrix(
        (share[..., None] * within).sum(-2)
    )


def corpus_curve(between: Array, within: Array, sizes: Sequence[float]) -> Array:
    """Returns Pearson's r over corpora of N strings of one adaptor each, for every N.

    `Cov(N) = between + within / N`: at N = 1 it is the pooled strings' r, for large N that of the
    adaptors' means. Shape (..., sizes).
    """
    curves = []
    for size in sizes:
        total = between + within / size
        curves.append(_ratio(total[..., 0, 1], total[..., 0, 0], total[..., 1, 1]))
    return np.stack(curves, -1)


def draw_corpora(values: Array, size: int, corpora: int, rng: np.random.Generator) -> Array:
    """Returns the means of corpora of strings drawn with replacement, (corpora, k).

    Args:
        values: (n, k), k quantities of n strings.
        size: strings of a corpus.
        corpora: how many.
        rng: draws the multinomial counts; the strings themselves are never copied.
    """
    n = len(values)
    counts = rng.multinomial(size, np.full(n, 1 / n), corpora)
    means_: Array = counts @ values / size
    return means_


def typical(means_of_s: Array, centre: float, epsilon: float) -> npt.NDArray[np.bool_]:
    """Returns which corpora are epsilon-typical: mean s within epsilon of the centre."""
    return np.asarray(np.abs(means_of_s - centre) < epsilon)


def typical_prediction(covariance: Array, width: float) -> float:
    """Returns the r of normally distributed means whose x + y lies in a strip.

    `Cov'(a, b) = Cov(a, b) - (1 - k) Cov(a, s) Cov(b, s) / Var(s)`, s = a + b, k the share of the
    variance of s that the strip leaves. It selects on a sum; no
    law of large numbers is in it, and the size of the corpora cancels.

    Args:
        covariance: (2, 2), of x and y of strings.
        width: half the width of the strip, in standard deviations of the corpora's mean of s.
    """
    inside = 2 * stats.norm.cdf(width) - 1
    kept = 1 - 2 * width * stats.norm.pdf(width) / inside
    with_s = covariance.sum(-1)
    variance = with_s.sum()
    left = covariance - (1 - kept) * np.outer(with_s, with_s) / variance
    return float(_ratio(left[0, 1], left[0, 0], left[1, 1]))


def _ties(values: Array) -> tuple[Indices, Indices, Indices]:
    """Returns the order of values, the start of each tie, and the tie of each value."""
    order = np.argsort(values, kind="stable")
    new = np.diff(values[order], prepend=np.nan) != 0
    tie = np.empty(len(values), dtype=np.int64)
    tie[order] = np.cumsum(new) - 1
    return order, np.flatnonzero(new), tie


def _weighted_ranks(weights: Array, order: Indices, starts: Indices, tie: Indices) -> Array:
    """Returns average ranks, up to a constant, of values repeated `weights` times, (B, N)."""
    of_tie = np.add.reduceat(weights[:, order], starts, axis=1)
    middle: Array = (of_tie.cumsum(1) - of_tie / 2)[:, tie]
    return middle


def _weighted_pearson(x: Array, y: Array, weights: Array) -> Array:
    """Returns Pearson's r of values (B, N) repeated `weights` times, (B,)."""
    n = weights.sum(-1, keepdims=True)
    with np.errstate(invalid="ignore"):  # a replicate may have none of these strings
        x, y = (v - (weights * v).sum(-1, keepdims=True) / n for v in (x, y))
    return _ratio(*((weights * a * b).sum(-1) for a, b in ((x, y), (x, x), (y, y))))


def _ratio(xy: Array, xx: Array, yy: Array) -> Array:
    """Returns xy / sqrt(xx yy), NaN where that is undefined or only rounding."""
    square = np.maximum(xx, 0) * np.maximum(yy, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(square > 0, xy / np.sqrt(square), np.nan))


def _matrix(parts: Array) -> Array:
    """Returns xx, yy, xy (last axis) as a symmetric matrix."""
    xx, yy, xy = np.moveaxis(parts, -1, 0)
    return np.stack([np.stack([xx, xy], -1), np.stack([xy, yy], -1)], -2)
