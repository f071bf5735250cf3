"""Correlations over strings, over adaptors' means, and over corpora of any size.

Results are plain dictionaries for JSON. An estimate is a list `[value, low, high]` with the 95 %
interval of a bootstrap that resamples whole prompts.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fastadapt.study.tradeoff import statistics
from fastadapt.study.tradeoff.pool import Mask, Pool
from fastadapt.study.tradeoff.statistics import Array, Moments

SIZES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 20_000, 200_000)
WIDTHS = (2.0, 1.0, 0.5, 0.2, 0.1)
CORPUS = 100  # strings of a corpus in the experiment on typical corpora, and how many there are
CORPORA = 4000


def estimate(value: Any, replicates: Array) -> list[float]:
    """Returns an estimate with its interval."""
    return [float(value), *statistics.interval(np.asarray(replicates))]


def correlate(pool: Pool, x: Array, y: Array, counts: Array) -> dict[str, Any]:
    """Returns all correlations of two quantities of the strings.

    Args:
        pool: the strings of the grid.
        x: (N,), log p.
        y: (N,), a reward.
        counts: (B, P), from `statistics.prompt_counts`.

    Every number is of its own strings alone: ranks, means and spreads are taken after restricting.

    Returns:
        `string`: of all strings ("pooled"), by temperature, within each adaptor, per token and
        with the length held constant; `adaptors`: of the adaptors' means, pooled and by
        temperature, with the slope of y on x; `curve`: of corpora of N strings; `split`: what lies
        between the adaptors; `identity_at_1`: |curve at N = 1 - pooled|.
    """
    shape = (pool.prompts, len(pool.cells))
    found = statistics.moments(x, y, pool.prompt, pool.cell, shape)
    here = found.strings.sum(0) > 0  # adaptors that have strings
    found = Moments(*(part[:, here] for part in found))
    temperatures = pool.temperatures[here]
    place = (np.cumsum(here) - 1)[pool.cell]  # of each string among those adaptors
    one = np.ones((1, pool.prompts))
    exact, drawn = (statistics.resample(weights, found) for weights in (one, counts))

    def strings(which: Mask) -> dict[str, list[float]]:
        mine = which[place]
        those = x[mine], y[mine]
        rho = statistics.resampled_spearman(*those, pool.prompt[mine], counts)
        return {
            "pearson": _estimate(statistics.string_pearson, exact, drawn, which),
            "spearman": estimate(statistics.spearman(*those), rho),
        }

    def adaptors(which: Any) -> dict[str, list[float]]:
        return {
            "pearson": _estimate(_means_pearson, exact, drawn, which),
            "spearman": _estimate(_means_spearman, exact, drawn, which),
            "slope": _estimate(_slope, exact, drawn, which),
        }

    every = np.ones(int(here.sum()), dtype=bool)
    within = [strings(np.arange(len(every)) == cell) for cell in range(len(every))]
    by_temperature = {f"{t:g}": temperatures == t for t in sorted(set(temperatures))}
    several = {t: which for t, which in by_temperature.items() if which.sum() >= 3}
    between, inside = statistics.covariance_split(exact)
    between_b, inside_b = statistics.covariance_split(drawn)
    curve = statistics.corpus_curve(between, inside, SIZES)[0]
    curves = statistics.corpus_curve(between_b, inside_b, SIZES)
    bands = [statistics.interval(column) for column in curves.T]
    pooled = strings(every)
    return {
        "string": {
            "pooled": pooled,
            "by_temperature": {t: strings(which) for t, which in by_temperature.items()},
            "within_adaptors": [one["pearson"] for one in within],
            "within_adaptors_spearman": [one["spearman"] for one in within],
            **_with_length(pool, x, y, counts),
        },
        "adaptors": {
            "pooled": adaptors(every),
            "by_temperature": {t: adaptors(which) for t, which in several.items()},
        },
        "curve": {
            "sizes": list(SIZES),
            "pearson": curve.tolist(),
            "low": [low for low, _ in bands],
            "high": [high for _, high in bands],
        },
        "split": _split(exact, between[0], inside[0]),
        "identity_at_1": float(abs(curve[0] - pooled["pearson"][0])),
    }


def typical_corpora(pool: Pool, seed: int) -> list[dict[str, Any]]:
    """Returns r over corpora of one adaptor, all and epsilon-typical, and the predicted r.

    Corpora of `CORPUS` strings are drawn with replacement from the strings of one adaptor; typical
    are those whose mean log p+ is within epsilon of the adaptor's. One entry for each epsilon, in
    standard deviations of a corpus's mean: medians over the adaptors.
    """
    rng = np.random.default_rng(seed)
    widths = (float("inf"), *WIDTHS)
    measured: list[list[float]] = [[] for _ in widths]
    predicted: list[list[float]] = [[] for _ in widths]
    for cell in range(len(pool.cells)):
        mine = pool.select(pool.cell == cell)
        if len(mine.cell) < 3:
            continue
        values = np.stack([mine.log_prior, mine.implicit_reward, mine.log_aligned], -1)
        corpora = statistics.draw_corpora(values, CORPUS, CORPORA, rng)
        covariance = np.cov(values[:, :2].T, bias=True)
        deviation = values[:, 2].std() / np.sqrt(CORPUS)
        for i, width in enumerate(widths):
            inside = statistics.typical(corpora[:, 2], values[:, 2].mean(), width * deviation)
            x, y = corpora[inside, 0], corpora[inside, 1]
            measured[i].append(float(statistics.pearson(x, y)) if len(x) > 2 else float("nan"))
            plain = float(statistics.pearson(values[:, 0], values[:, 1]))
            bound = plain if np.isinf(width) else statistics.typical_prediction(covariance, width)
            predicted[i].append(bound)
    return [
        {
            "width": None if np.isinf(width) else width,
            "pearson": float(np.nanmedian(r)),
            "predicted": float(np.nanmedian(p)),
        }
        for width, r, p in zip(widths, measured, predicted, strict=True)
    ]


def _estimate(function: Any, exact: Moments, drawn: Moments, which: Any) -> list[float]:
    """Returns a statistic of the sums of some adaptors, with its interval."""
    one, many = (Moments(*(part[:, which] for part in m)) for m in (exact, drawn))
    return estimate(function(one)[0], function(many))


def _means_pearson(found: Moments) -> Array:
    """Returns Pearson's r of the adaptors' means."""
    return statistics.pearson(*statistics.means(found))


def _means_spearman(found: Moments) -> Array:
    """Returns Spearman's rho of the adaptors' means."""
    return statistics.spearman(*statistics.means(found))


def _slope(found: Moments) -> Array:
    """Returns the slope of the least-squares line through the adaptors' means."""
    x, y = statistics.means(found)
    x, y = x - x.mean(-1, keepdims=True), y - y.mean(-1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((x * y).sum(-1) / (x * x).sum(-1))


def _with_length(pool: Pool, x: Array, y: Array, counts: Array) -> dict[str, Any]:
    """Returns correlations per token, and with the length held constant."""
    length = pool.length.astype(float)
    per_token = _triples(pool, x / length, y / length, length, counts)
    return {
        "per_token": estimate(per_token[0][0], per_token[0][1:]),
        "length_partialled": _second(_triples(pool, x, y, length, counts)),
    }


def _second(pair: tuple[Array, Array]) -> list[float]:
    """Returns the estimate of the second of two statistics."""
    return estimate(pair[1][0], pair[1][1:])


def _triples(pool: Pool, x: Array, y: Array, z: Array, counts: Array) -> tuple[Array, Array]:
    """Returns Pearson's r of x and y, plain and with z held constant; the sample comes first."""
    parts = [v - v.mean() for v in (x, y, z)]
    features = [np.ones_like(x), *parts, *(a * b for i, a in enumerate(parts) for b in parts[i:])]
    sums = np.stack([np.bincount(pool.prompt, f, pool.prompts) for f in features], -1)
    weights = np.concatenate([np.ones((1, pool.prompts)), counts])
    n, mx, my, mz, xx, xy, xz, yy, yz, zz = np.moveaxis(weights @ sums, -1, 0)
    mx, my, mz = mx / n, my / n, mz / n
    xx, yy, zz = xx / n - mx * mx, yy / n - my * my, zz / n - mz * mz
    xy, xz, yz = xy / n - mx * my, xz / n - mx * mz, yz / n - my * mz
    with np.errstate(invalid="ignore", divide="ignore"):
        r = xy / np.sqrt(xx * yy)
        left = xy - xz * yz / zz
        held = left / np.sqrt((xx - xz * xz / zz) * (yy - yz * yz / zz))
    return r, held


def _split(exact: Moments, between: Array, inside: Array) -> dict[str, Any]:
    """Returns the share of the variances between adaptors, and how much of it is noise."""
    strings = exact.strings[0]
    noise = inside / strings.mean()
    return {
        "share_between_log_prior": float(between[0, 0] / (between + inside)[0, 0]),
        "share_between_reward": float(between[1, 1] / (between + inside)[1, 1]),
        "noise_in_between_log_prior": float(noise[0, 0] / between[0, 0]),
        "noise_in_between_reward": float(noise[1, 1] / between[1, 1]),
    }
