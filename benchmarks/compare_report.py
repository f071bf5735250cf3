"""Writes docs/results.md's table and draws its figure from benchmarks/results/compare_losses.json.

    python benchmarks/compare_report.py           # rewrites the block and draws the figure
    python benchmarks/compare_report.py --check   # exit code 1 where they are not what it says

Intervals are of 95 %, by a bootstrap that draws seeds and held-out pairs anew, both with repetition
(percentiles of 4000 draws); a difference between methods is taken within each draw. A seed is an
order of the training pairs, so few seeds say little of other training pairs.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import report

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "results.md"
FIGURE = ROOT / "docs" / "compare_losses.png"
DRAWS = 4000
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


class Comparison:
    """log P of the held-out responses after each method, and what follows from it."""

    def __init__(self, record: dict[str, Any]) -> None:
        """Sorts the cells into arrays (seeds, pairs)."""
        lengths = np.array(record["tokens"], dtype=float)
        self.chosen: dict[str, np.ndarray] = {}
        self.rejected: dict[str, np.ndarray] = {}
        for name in ("start", *METHODS):
            cells = [c for c in record["cells"] if c["method"] == name]
            self.chosen[name] = np.array([c["chosen"] for c in cells])
            self.rejected[name] = np.array([c["rejected"] for c in cells])
        self.lengths = lengths
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


def table(record: dict[str, Any]) -> str:
    """The block of docs/results.md."""
    data = Comparison(record)
    measures = ("chosen", "rejected", "margin")
    lines = [
        "| method | steps | change of log P(y⁺) | change of log P(y⁻) | change of the difference | "
        "P(y⁺) > P(y⁻), % | the same per token, % |",
        "|---|---|---|---|---|---|---|",
    ]
    steps = {c["method"]: c["steps"] for c in record["cells"] if "steps" in c}
    for name in ("start", *METHODS):
        ahead = [data.interval(data.value(name, m)) for m in ("ahead", "ahead per token")]
        shares = " | ".join(x.shown(1, sign=False, factor=100) for x in ahead)
        if name == "start":
            means = " | ".join(f"{data.value(name, m).mean():.2f} nats" for m in measures)
            label = "the model as it is: log P(y⁺), log P(y⁻), difference"
            lines.append(f"| {label} | 0 | {means} | {shares} |")
            continue
        label, before, *_ = METHODS[name]
        taken = steps[name] + (steps[before] if before in steps else 0)
        changes = [data.value(name, m) - data.value("start", m) for m in measures]
        cells = " | ".join(data.interval(change).shown() for change in changes)
        lines.append(f"| {label} | {taken} | {cells} | {shares} |")
    lines += [
        "",
        "Displacement: what the last stage did to log P(y⁺), against the model that it began with:",
        "",
        "| method | mean change | pairs whose log P(y⁺) fell, % |",
        "|---|---|---|",
    ]
    for name, (label, before, *_) in METHODS.items():
        change = data.value(name, "chosen") - data.value(before, "chosen")
        fell = data.interval((change < 0).astype(float)).shown(1, sign=False, factor=100)
        lines.append(f"| {label} | {data.interval(change).shown()} | {fell} |")
    lines += [
        "",
        "Differences between two methods, within the same seeds and pairs:",
        "",
        "| methods | log P(y⁺) | log P(y⁻) | difference | P(y⁺) > P(y⁻), points | "
        "the last, % of the second method's |",
        "|---|---|---|---|---|---|",
    ]
    for first, second in CONTRASTS:
        apart = {m: data.value(first, m) - data.value(second, m) for m in (*measures, "ahead")}
        cells = [data.interval(apart[m]).shown() for m in measures]
        cells.append(data.interval(apart["ahead"]).shown(1, factor=100))
        ratio = data.interval(apart["ahead"], data.value(second, "ahead"))
        cells.append(ratio.shown(1, factor=100))
        lines.append(f"| {METHODS[first][0]} − {METHODS[second][0]} | {' | '.join(cells)} |")
    lines += [
        "",
        "![change of log P of both responses](compare_losses.png)",
        "",
        _protocol(record),
    ]
    return "\n".join(lines) + "\n"


def _protocol(record: dict[str, Any]) -> str:
    """The settings in words."""
    host, settings = record["host"], record["settings"]
    rates, pairs = settings["rates"], settings["pairs"]
    data = Comparison(record)
    weight = np.exp(data.rejected["start"] / data.lengths[:, 1]).mean()
    return (
        f"{settings['model']}, the last {settings['layers']} layers and the final norm trained "
        f"({settings['trained_parameters']:,} parameters), AdamW, {settings['batch']} pairs a "
        f"step; of the pairs of {settings['data']} that fit {settings['max_length']} tokens whole "
        f"{pairs['train']} to train on, {pairs['choose']} to choose the learning rates on, "
        f"{pairs['held_out']} held out (split seed {settings['split_seed']}); {settings['seeds']} "
        f"seeds; β = {settings['beta']}; learning rates {rates['mle']['chosen']:g} without and "
        f"{rates['dpo']['chosen']:g} with DPO, of {_tried(rates['mle'])}; ExMATE's penalty before "
        f"training {weight:.3f}. Nats; means over the "
        f"held-out pairs and the seeds with 95 % intervals. {host['cpu']}, "
        f"{host['torch_threads']} thread, float32, torch "
        f"{host['versions']['torch']}, commit {host['commit'][:7]}."
    )


def render(page: str, record: dict[str, Any]) -> str:
    """The page with its block made anew."""
    block = f"<!-- compare_losses -->\n{table(record)}<!-- /compare_losses -->"
    pattern = r"<!-- compare_losses -->\n.*?<!-- /compare_losses -->"
    page, found = re.subn(pattern, lambda _: block, page, flags=re.DOTALL)
    if found != 1:
        raise ValueError(f"{PAGE.name}: expected one block 'compare_losses', got {found}")
    return page


def draw(record: dict[str, Any], path: Path) -> None:
    """Where each method moved the held-out pairs, and how often the chosen one is ahead."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    data = Comparison(record)
    figure, (plane, shares) = pyplot.subplots(
        1, 2, figsize=(9.6, 4.4), width_ratios=[3, 2], layout="constrained"
    )
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
            xerr=[[across.mean - across.low], [across.high - across.mean]],
            yerr=[[up.mean - up.low], [up.high - up.mean]],
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
    plane.set(
        xlabel="change of log P(y⁻), nats",
        ylabel="change of log P(y⁺), nats",
    )
    plane.set_title("Held-out pairs, against the model as it is", fontsize=9, loc="left")
    plane.legend(frameon=False, fontsize=8, handletextpad=0.2)
    names = ("start", *METHODS)
    for row, name in enumerate(reversed(names)):
        label, _, colour, marker = METHODS.get(name, ("the model as it is", "", "#000000", "|"))
        ahead = data.interval(data.value(name, "ahead"))
        shares.errorbar(
            100 * ahead.mean,
            row,
            xerr=[[100 * (ahead.mean - ahead.low)], [100 * (ahead.high - ahead.mean)]],
            color=colour,
            marker=marker,
            ms=7,
            lw=1,
        )
    shares.set_yticks(range(len(names)))
    labels = [METHODS[n][0] if n in METHODS else "the model as it is" for n in reversed(names)]
    shares.set_yticklabels(labels, fontsize=8)
    shares.set_xlabel("pairs with P(y⁺) > P(y⁻), %")
    shares.set_title("95 % intervals over seeds and pairs", fontsize=9, loc="left")
    for axes in (plane, shares):
        axes.spines[["top", "right"]].set_visible(False)
    commit = str(record["host"]["commit"])
    figure.savefig(path, dpi=120, metadata={"Source": commit, "Software": None})
    pyplot.close(figure)


def figure_is_current(record: dict[str, Any]) -> bool:
    """Whether the figure was drawn from the result that is there: it names the commit."""
    return FIGURE.exists() and record["host"]["commit"].encode() in FIGURE.read_bytes()


def _tried(rates: dict[str, Any]) -> str:
    """Those to choose from."""
    return ", ".join(f"{rate:g}" for rate, _ in rates["tried"])


def main() -> int:
    """Rewrite or check the page and the figure."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing, compare")
    options = parser.parse_args()
    record = report.load("compare_losses")
    before = PAGE.read_text(encoding="utf-8")
    after = render(before, record)
    if options.check:
        return int(before != after or not figure_is_current(record))
    PAGE.write_text(after, encoding="utf-8")
    draw(record, FIGURE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
