"""Writes docs/results.md's table and draws its figure from benchmarks/results/compare_losses.json.

    python benchmarks/compare_report.py           # rewrites the block and draws the figure
    python benchmarks/compare_report.py --check   # exit code 1 where they are not what it says

Intervals are of 95 %, by a bootstrap that draws seeds and held-out pairs anew, both with repetition
(percentiles of 4000 draws); a difference between methods is taken within each draw. A seed is an
order of the training pairs, so few seeds say little of other training pairs.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import figure
import report

FIGURE = report.ROOT / "docs" / "compare_losses.png"
DRAWS = 4000
START = "the model as it is"
# name in the result: label, what its last stage began with, colour (Okabe and Ito) and marker
METHODS: dict[str, tuple[str, str, str, str]] = {
    "mle": ("MLE", "start", "#0072B2", "o"),
    "exmate": ("ExMATE", "start", "#D55E00", "s"),
    "unlikelihood": ("MLE + unlikelihood", "start", "#009E73", "^"),
    "mle, dpo": ("DPO after MLE", "mle", "#0072B2", "D"),
    "exmate, dpo": ("DPO after ExMATE", "exmate", "#D55E00", "P"),
    "dpo + mle": ("DPO + MLE, jointly", "start", "#0072B2", "X"),
    "dpo + exmate": ("DPO + ExMATE, jointly", "start", "#D55E00", "*"),
}
CONTRASTS = (
    ("exmate", "mle"),
    ("exmate", "unlikelihood"),
    ("exmate, dpo", "mle, dpo"),
    ("dpo + exmate", "dpo + mle"),
)


class Interval(NamedTuple):
    """A mean and the bounds of its interval."""

    mean: float
    low: float
    high: float

    def shown(self, digits: int = 2, *, sign: bool = True, factor: float = 1.0) -> str:
        """The mean and, in brackets, the bounds."""
        form = f"{'+' if sign else ''}.{digits}f"
        low, high = (format(factor * x, form) for x in (self.low, self.high))
        return f"{format(factor * self.mean, form)} ({low} to {high})"

    def bars(self, factor: float = 1.0) -> list[list[float]]:
        """The lengths of error bars below and above."""
        return [[factor * (self.mean - self.low)], [factor * (self.high - self.mean)]]


class Comparison:
    """log P of the held-out responses after each method, and what follows from it."""

    methods, contrasts, start = METHODS, CONTRASTS, START

    def __init__(self, record: dict[str, Any]) -> None:
        self.chosen: dict[str, np.ndarray] = {}
        self.rejected: dict[str, np.ndarray] = {}
        for name in ("start", *METHODS):
            cells = [c for c in record["cells"] if c["method"] == name]
            self.chosen[name] = np.array([c["chosen"] for c in cells])
            self.rejected[name] = np.array([c["rejected"] for c in cells])
        self.lengths = np.array(record["tokens"], dtype=float)
        self.steps = {c["method"]: c["steps"] for c in record["cells"] if "steps" in c}
        seeds, pairs = self.chosen["mle"].shape
        random = np.random.default_rng(0)
        self.seeds = random.integers(seeds, size=(DRAWS, seeds))
        self.pairs = random.integers(pairs, size=(DRAWS, pairs))

    def value(self, name: str, measure: str) -> np.ndarray:
        """A measure of each seed and held-out pair, (seeds or 1, pairs)."""
        chosen, rejected = self.chosen[name], self.rejected[name]
        if measure == "ahead":
            return (chosen > rejected).astype(float)
        if measure == "ahead per token":
            return (chosen / self.lengths[:, 0] > rejected / self.lengths[:, 1]).astype(float)
        return {"chosen": chosen, "rejected": rejected, "margin": chosen - rejected}[measure]

    def interval(self, values: np.ndarray, by: np.ndarray | None = None) -> Interval:
        """Of a mean, or of the ratio of two means."""
        draws, mean = self._draws(values), values.mean()
        if by is not None:
            with np.errstate(invalid="ignore"):  # 0 of 0 is no ratio
                draws, mean = draws / self._draws(by), mean / by.mean()
        low, high = np.percentile(draws, [2.5, 97.5])
        return Interval(float(mean), float(low), float(high))

    def _draws(self, values: np.ndarray) -> np.ndarray:
        """The means of the bootstrap's draws."""
        values = np.broadcast_to(values, (self.seeds.shape[1], values.shape[1]))
        means = values[self.seeds].mean(1)
        return np.take_along_axis(means, self.pairs, axis=1).mean(1)

    def change(self, measure: str, name: str, before: str = "start") -> Interval:
        """What a method did to a measure, against the model as it is or another method."""
        return self.interval(self.value(name, measure) - self.value(before, measure))

    def share(self, measure: str, name: str) -> str:
        """How often a held-out pair has a property, in percent."""
        return self.interval(self.value(name, measure)).shown(1, sign=False, factor=100)

    def fell(self, name: str, before: str) -> str:
        """How often a method lowered log P(y⁺), in percent."""
        lower = (self.value(name, "chosen") < self.value(before, "chosen")).astype(float)
        return self.interval(lower).shown(1, sign=False, factor=100)

    def relative(self, measure: str, first: str, second: str) -> Interval:
        """The difference of two methods, as a part of the second's."""
        other = self.value(second, measure)
        return self.interval(self.value(first, measure) - other, other)

    def penalty(self) -> float:
        """ExMATE's weight of the held-out rejected responses before training."""
        return float(np.exp(self.rejected["start"] / self.lengths[:, 1]).mean())


def draw(record: dict[str, Any], path: Path) -> None:
    """Where each method moved the held-out pairs, and how often the chosen one is ahead."""
    data, shape = Comparison(record), {"ncols": 2, "figsize": (9.6, 4.4), "width_ratios": [3, 2]}
    with figure.saved_figure(path, record, **shape) as (_, (plane, shares)):
        _draw_plane(data, plane)
        _draw_shares(data, shares)


def _draw_plane(data: Comparison, plane: Any) -> None:
    """Changes of log P of the rejected and the chosen responses, dotted from a stage before."""
    for name, (label, before, colour, marker) in METHODS.items():
        x, y = (data.value(name, m) - data.value("start", m) for m in ("rejected", "chosen"))
        across, up = data.interval(x), data.interval(y)
        if before != "start":
            first = [data.value(before, m) - data.value("start", m) for m in ("rejected", "chosen")]
            origin = [float(values.mean()) for values in first]
            plane.plot(
                [origin[0], across.mean], [origin[1], up.mean], ":", color=colour, lw=1.2, zorder=1
            )
        plane.errorbar(
            across.mean,
            up.mean,
            xerr=across.bars(),
            yerr=up.bars(),
            color=colour,
            marker=marker,
            ms=9 if marker == "*" else 7,
            mfc="white" if name in ("mle", "exmate", "unlikelihood") else colour,
            lw=0.8,
            ls="none",
            label=label,
        )
    ends = plane.axis()
    across = [min(ends[0], ends[2]), max(ends[1], ends[3])]
    plane.plot(across, across, "--", color="#999999", lw=0.8, zorder=0, label="both gain the same")
    plane.axis(ends)
    plane.set(xlabel="change of log P(y⁻), nats", ylabel="change of log P(y⁺), nats")
    plane.set_title("Held-out pairs, against the model as it is", fontsize=9, loc="left")
    plane.legend(frameon=False, fontsize=8, handletextpad=0.2)


def _draw_shares(data: Comparison, shares: Any) -> None:
    """How often the chosen response is ahead."""
    names = ("start", *METHODS)
    for row, name in enumerate(reversed(names)):
        label, _, colour, marker = METHODS.get(name, (START, "", "#000000", "|"))
        ahead = data.interval(data.value(name, "ahead"))
        shares.errorbar(
            100 * ahead.mean,
            row,
            xerr=ahead.bars(100),
            color=colour,
            marker=marker,
            ms=7,
            lw=1,
        )
    shares.set_yticks(range(len(names)))
    labels = [METHODS[n][0] if n in METHODS else START for n in reversed(names)]
    shares.set_yticklabels(labels, fontsize=8)
    shares.set_xlabel("pairs with P(y⁺) > P(y⁻), %")
    shares.set_title("95 % intervals over seeds and pairs", fontsize=9, loc="left")


if __name__ == "__main__":
    sys.exit(report.main(["docs/results.md"], "compare_losses", FIGURE, draw))
