"""Writes docs/supports.md's tables and draws its figures from benchmarks/results/.

    python benchmarks/support_report.py           # rewrites the blocks and draws the figures
    python benchmarks/support_report.py --check   # exit code 1 where they are not what it says

Intervals of the runs are of 95 %, by Student's t over the seeds.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

from scipy import stats

import figure
import report

PAGE = ["docs/supports.md"]
RATIOS, RUNS = (report.ROOT / "docs" / name for name in ("ratios.png", "train_supports.png"))
# Okabe and Ito's colours
WAYS = {
    "whole": ("the whole vocabulary", "#D55E00"),
    "recompute": ("filters decide again", "#E69F00"),
    "replay": ("the ids it was drawn from", "#0072B2"),
}
ARMS = {"replay": WAYS["replay"], "off": WAYS["whole"]}
FIRST, LAST = 5, 10  # steps whose rewards are averaged


class Mean(NamedTuple):
    """A mean over seeds and the half width of its interval, None of one seed."""

    value: float
    half: float | None

    def shown(self, digits: int) -> str:
        """The mean with its interval."""
        text = f"{self.value:.{digits}f}"
        return text if self.half is None else f"{text} ± {self.half:.{digits}f}"


def mean_of(values: list[float]) -> Mean:
    """Of one value a seed."""
    n = len(values)
    if n == 1:
        return Mean(values[0], None)
    times = float(stats.t.ppf(0.975, n - 1))
    return Mean(statistics.mean(values), times * statistics.stdev(values) / n**0.5)


def arms(record: dict[str, Any]) -> list[dict[str, Any]]:
    """A row of the table for each way of scoring, and their difference within seeds."""
    rows = []
    for name, (label, _) in ARMS.items():
        curves = [run["curves"] for run in record["runs"] if run["support"] == name]
        if not curves:
            continue
        before, after = (
            [statistics.mean(c["reward"][part]) for c in curves]
            for part in (slice(FIRST), slice(-LAST, None))
        )
        whole = {
            key: mean_of([statistics.mean(x for x in c[key] if x is not None) for c in curves])
            for key in ("ratio", "ratio_far", "entropy")
        }
        shown = {key: value.shown(3) for key, value in whole.items()}
        rewards = {"before": mean_of(before).shown(3), "after": mean_of(after).shown(3)}
        rows.append({"label": label, "last": after, **rewards, **shown})
    return rows


def difference(record: dict[str, Any]) -> str | None:
    """By how much the last rewards of the first way are above those of the second, over seeds."""
    rows = arms(record)
    if len(rows) != len(ARMS):
        return None
    first, second = (row["last"] for row in rows)
    return mean_of([a - b for a, b in zip(first, second, strict=True)]).shown(3)


def draw_ratios(record: dict[str, Any], path: Path) -> None:
    """Ratios of trainer to sampler in both dtypes, a line for each way of scoring."""
    dtypes = list(dict.fromkeys(c["dtype"] for c in record["cells"]))
    shape = {"ncols": len(dtypes), "figsize": (9.6, 3.6), "sharey": True, "squeeze": False}
    edges = record["settings"]["bins"]
    with figure.saved_figure(path, record, **shape) as (_, (panels,)):
        for axes, dtype in zip(panels, dtypes, strict=True):
            axes.axvline(1, color="#999999", lw=1)
            for cell in (c for c in record["cells"] if c["dtype"] == dtype):
                label, colour = WAYS[cell["way"]]
                shares = [count / cell["tokens"] for count in cell["counts"]]
                axes.stairs(shares, edges, color=colour, lw=1.6, label=label)
            axes.set(yscale="log", xlabel="trainer's probability over the sampler's", title=dtype)
            axes.set_ylim(bottom=0.5 / record["cells"][0]["tokens"])
        panels[0].set_ylabel("share of sampled tokens")
        panels[-1].legend(frameon=False, fontsize=8, title="scored on", title_fontsize=8)


def draw_runs(record: dict[str, Any], path: Path) -> None:
    """Rewards by step, a thin line for each seed and their mean of five steps."""
    with figure.saved_figure(path, record, figsize=(7.2, 3.8)) as (_, axes):
        for name, (label, colour) in ARMS.items():
            curves = [r["curves"]["reward"] for r in record["runs"] if r["support"] == name]
            for curve in curves:
                axes.plot(range(1, len(curve) + 1), curve, color=colour, lw=0.6, alpha=0.5)
            means = [statistics.mean(at) for at in zip(*curves, strict=True)]
            smooth = [statistics.mean(means[max(0, i - 4) : i + 1]) for i in range(len(means))]
            axes.plot(range(1, len(means) + 1), smooth, color=colour, lw=2.2, label=label)
        axes.set(xlabel="step", ylabel="mean reward of 32 rollouts")
        axes.legend(frameon=False, fontsize=8, title="a token is scored on", title_fontsize=8)


def main() -> int:
    """Rewrite or check the page and both figures."""
    ratios = report.main(PAGE, "ratios", RATIOS, draw_ratios)
    return ratios or report.main(PAGE, "train_supports", RUNS, draw_runs)


if __name__ == "__main__":
    sys.exit(main())
