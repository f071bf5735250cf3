"""Figures of the trade-off study, as PNG and SVG, from its results.

Families of adaptors have a colour and a marker each, temperatures a shade from pale to full, so
that nothing is lost in print without colours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from fastadapt.study.files import write_whole

# Okabe and Ito's colours, which remain apart for the colour-blind, and a marker each.
_STYLES = (
    ("#000000", "*"),
    ("#0072B2", "o"),
    ("#56B4E9", "s"),
    ("#D55E00", "^"),
    ("#E69F00", "v"),
    ("#009E73", "D"),
    ("#CC79A7", "P"),
)
FIGURES = ("strings_and_corpora", "corpus_size", "local_and_global")
_CORPUS, _CORPORA = 200, 60  # strings of a drawn corpus, and how many are drawn of each adaptor
_RELIABLE = 5.0
_RC: Any = {
    "svg.hashsalt": "fastadapt",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
}
_LOG_PRIOR = "log p under the prior, nats"
USER = "user_reward"  # the figure that there is only with a reward of the user


def draw_figures(results: Mapping[str, Any], folder: Path) -> list[str]:
    """Draws all figures of a study.

    Args:
        results: what `tradeoff.analyse` returned.
        folder: where `NAME.png` and `NAME.svg` go.

    Returns:
        `FIGURES`, and `USER` where the strings have a reward of the user.
    """
    drawers: dict[str, Callable[[Mapping[str, Any]], Figure]] = dict(
        zip(FIGURES, (_strings_and_corpora, _corpus_size, _local_and_global), strict=True)
    )
    if "user" in results["correlations"]:
        drawers[USER] = partial(_strings_and_corpora, which="user")
    for name, draw in drawers.items():
        with rc_context(_RC):
            figure = draw(results)
            for suffix, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
                save = partial(figure.savefig, dpi=150, metadata=metadata, format=suffix)
                write_whole(folder / f"{name}.{suffix}", save)
    return list(drawers)


def reward_label(results: Mapping[str, Any], which: str) -> str:
    """Returns the axis label of a reward."""
    if which == "user":
        return f"reward, {results['names']['reward']}"
    implicit = "implicit reward" if "user" in results["correlations"] else "reward"
    return f"{implicit}, log p₊ − log p, nats"


def _strings_and_corpora(results: Mapping[str, Any], which: str = "implicit") -> Figure:
    """Draws strings on the left, corpora on the right, with lines of equal mean log p+.

    The user's reward has no such lines: it does not add up to log p+ with log p.
    """
    adaptors, strings = results["adaptors"], results["strings"]
    implicit = which == "implicit"
    columns = ("log_prior", "reward" if implicit else "user", "cell")
    x, y, cell = (np.array(strings[name], dtype=float) for name in columns)
    figure = Figure(figsize=(9.6, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    rng = np.random.default_rng(0)
    # thousands of points: as pixels also in the SVG
    cloud: Any = {"linewidths": 0, "alpha": 0.7, "rasterized": True}
    for number, adaptor in enumerate(adaptors):
        style = _style(adaptor, adaptors)
        mine = (cell == number) & np.isfinite(y)
        if not mine.any():
            continue
        left.scatter(x[mine], y[mine], s=6, **cloud, **style)
        values = np.stack([x[mine], y[mine]], -1)
        counts = rng.multinomial(_CORPUS, np.full(len(values), 1 / len(values)), _CORPORA)
        right.scatter(*(counts @ values / _CORPUS).T, s=9, **cloud, **style)
    key = "own" if implicit else "user"
    for adaptor in (one for one in adaptors if one[key] is not None):
        right.scatter(
            *adaptor[key],
            s=42,
            edgecolors="black",
            linewidths=0.7,
            zorder=3,
            **_style(adaptor, adaptors),
        )
    if implicit:
        _iso_lines(right, [sum(adaptor["own"]) for adaptor in adaptors])
    found = results["correlations"][which]
    r = [_with_interval(found[k]["pooled"]["pearson"]) for k in ("string", "adaptors")]
    left.set_title(f"Strings\nr = {r[0]}", loc="left")
    right.set_title(
        f"Corpora of {_CORPUS} strings; large: the adaptors' means\nr = {r[1]} of the means",
        loc="left",
    )
    for axes, what in ((left, ""), (right, "mean ")):
        axes.set(xlabel=what + _LOG_PRIOR, ylabel=what + reward_label(results, which))
    figure.legend(
        handles=_legend(adaptors, iso=implicit), loc="outside lower center", ncols=6, fontsize=8
    )
    return figure


def _corpus_size(results: Mapping[str, Any]) -> Figure:
    """Draws r over corpora of N strings, by the law of total covariance."""
    figure = Figure(figsize=(6.4, 3.9), layout="constrained")
    axes = figure.subplots()
    lines = {
        "implicit": ("log p₊ − log p", "-", "o", "#0072B2"),
        "released": ("as the released code computes it", "--", "s", "#D55E00"),
        "user": (str(results["names"]["reward"]), ":", "^", "#009E73"),
    }
    for name, (label, line, marker, colour) in lines.items():
        if name not in results["correlations"]:
            continue
        curve = results["correlations"][name]["curve"]
        sizes, low, high = (curve[key] for key in ("sizes", "low", "high"))
        low, high = (np.array(values, dtype=float) for values in (low, high))
        axes.fill_between(sizes, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(
            sizes, curve["pearson"], line, marker=marker, ms=4, lw=1.4, color=colour, label=label
        )
    axes.axhline(0, color="black", lw=0.8)
    axes.set(
        xscale="log",
        ylim=(-1.04, 1.04),
        xlabel="N, strings of a corpus (one adaptor each)",
        ylabel="Pearson's r of mean log p and mean reward",
    )
    axes.set_title("From strings (N = 1) to adaptors (N → ∞); bands: 95 % intervals", loc="left")
    axes.legend(title="reward", alignment="left", loc="upper right", fontsize=8)
    return figure


def _local_and_global(results: Mapping[str, Any]) -> Figure:
    """Draws each adaptor's mean under both distributions, and the effective sample size."""
    adaptors = results["adaptors"]
    figure = Figure(figsize=(9.6, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for adaptor in adaptors:
        style, reliable = _style(adaptor, adaptors), is_reliable(adaptor)
        line = "-" if reliable else ":"
        left.plot(
            *np.transpose([adaptor["local"], adaptor["global"]]), line, color="#777777", lw=0.9
        )
        left.scatter(*adaptor["local"], s=34, edgecolors="black", linewidths=0.5, zorder=3, **style)
        hollow = {"facecolors": "white", "edgecolors": style["c"], "marker": style["marker"]}
        left.scatter(*adaptor["global"], s=34, linewidths=1.1, zorder=3, **hollow)
        right.scatter(
            adaptor["temperature"] + _jitter(adaptor, adaptors),
            adaptor["effective"],
            s=38,
            edgecolors="black",
            linewidths=0.5,
            zorder=3,
            **style,
        )
    left.set(xlabel="mean " + _LOG_PRIOR, ylabel="mean " + reward_label(results, "implicit"))
    left.set_title("Filled: local distribution. Hollow: global distribution", loc="left")
    right.axhline(_RELIABLE, color="black", lw=0.8, ls="--")
    right.text(
        0.02,
        0.95 * _RELIABLE,
        "below: dotted on the left, not to be trusted",
        fontsize=8,
        va="top",
        transform=right.get_yaxis_transform(),
    )
    right.set(yscale="log", xlabel="temperature", ylabel="effective strings of a prompt, median")
    temperatures = sorted({adaptor["temperature"] for adaptor in adaptors})
    right.set_xticks(temperatures, [f"{t:g}" for t in temperatures])
    ticks = [1, 2, 5, 10, 20, 50]
    right.set_yticks(ticks, [str(tick) for tick in ticks])
    right.minorticks_off()
    right.set_title(
        f"Global distribution: effective number of {results['normalisation']['pool']:.0f} strings",
        loc="left",
    )
    figure.legend(handles=_legend(adaptors), loc="outside lower center", ncols=6, fontsize=8)
    return figure


def is_reliable(adaptor: Mapping[str, Any]) -> bool:
    """Whether a global mean is reliable: at least 5 effective strings in the median prompt."""
    return bool(adaptor["effective"] is not None and adaptor["effective"] >= _RELIABLE)


def _families(adaptors: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the families in the order of the grid."""
    return list(dict.fromkeys(adaptor["family"] for adaptor in adaptors))


def _style(adaptor: Mapping[str, Any], adaptors: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns marker and shade of an adaptor."""
    colour, marker = _STYLES[_families(adaptors).index(adaptor["family"]) % len(_STYLES)]
    return {"c": [_shade(colour, adaptor["temperature"], adaptors)], "marker": marker}


def _shade(colour: str, temperature: float, adaptors: Sequence[Mapping[str, Any]]) -> Any:
    """Returns a colour between pale, at the lowest temperature, and full, at the highest."""
    found = [adaptor["temperature"] for adaptor in adaptors]
    low, high = min(found), max(found)
    depth = 1.0 if high == low else 0.45 + 0.55 * (temperature - low) / (high - low)
    return tuple(1 - depth * (1 - channel) for channel in to_rgb(colour))


def _jitter(adaptor: Mapping[str, Any], adaptors: Sequence[Mapping[str, Any]]) -> float:
    """Shifts families apart that have one temperature."""
    names = _families(adaptors)
    return 0.02 * (names.index(adaptor["family"]) - (len(names) - 1) / 2)


def _legend(adaptors: Sequence[Mapping[str, Any]], *, iso: bool = False) -> list[Artist]:
    """Draws a legend: families by marker, temperatures by shade, then lines."""
    handles: list[Artist] = [
        Line2D(
            [],
            [],
            ls="",
            marker=_STYLES[i % len(_STYLES)][1],
            color=_STYLES[i % len(_STYLES)][0],
            label=family,
        )
        for i, family in enumerate(_families(adaptors))
    ]
    for t in sorted({adaptor["temperature"] for adaptor in adaptors}):
        shade = _shade("#444444", t, adaptors)
        handles.append(Patch(color=shade, label=f"T = {t:g}"))
    if iso:
        handles.append(
            Line2D([], [], color="#999999", lw=0.8, ls="--", label="equal mean log p₊ (slope −1)")
        )
    return handles


def _iso_lines(axes: Axes, constants: Sequence[float]) -> None:
    """Draws lines y = C - x; the axes keep their limits."""
    limits = axes.get_xlim(), axes.get_ylim()
    for constant in np.quantile(constants, [0, 0.25, 0.5, 0.75, 1]):
        axes.axline((constant, 0), slope=-1, color="#999999", lw=0.8, ls="--", zorder=0)
    axes.set(xlim=limits[0], ylim=limits[1])


def _with_interval(found: Sequence[float | None]) -> str:
    """Draws an estimate with its interval."""
    value, low, high = (float("nan") if v is None else v for v in found)
    return f"{value:.2f} [{low:.2f}, {high:.2f}]".replace("-", "−")
