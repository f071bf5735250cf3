"""Pictures of gradients and training runs, legible in grey: lines by dash, areas by hatch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fastadapt.study.gradients.named_losses import LOSSES, one_token
from fastadapt.study.gradients.records import Row

DPI = 160
KIND_TITLES = {
    "same-prompt": "two responses to one prompt",
    "same-response": "one response in two contexts",
    "unpaired": "two responses, two contexts",
}


class Style(NamedTuple):
    """The look of a line or an area."""

    label: str
    color: str
    dash: Any
    hatch: str


CELLS = {
    "chosen_in_chosen": Style("$y^+$ in $x^+$", "#00429d", "-", ""),
    "rejected_in_rejected": Style("$y^-$ in $x^-$", "#c1121f", (0, (5, 2)), ""),
    "rejected_in_chosen": Style("$y^-$ in $x^+$", "#f08c5a", (0, (1, 1.3)), ""),
    "chosen_in_rejected": Style("$y^+$ in $x^-$", "#73a2c6", (0, (6, 1.5, 1, 1.5)), ""),
}
MASSES = {
    "chosen": Style("labels of chosen responses", "#1f5fa8", "-", ""),
    "rejected": Style("labels of rejected responses", "#e07a5f", "-", "////"),
    "other": Style("all other entries", "#e6e6e6", "-", ".."),
}
PENALTIES = {
    "mate_penalty": Style("MATE", "#7a7a7a", (0, (1, 1.2)), ""),
    "unlikelihood_penalty": Style("unlikelihood", "#c1121f", (0, (5, 2)), ""),
    "exmate_penalty": Style("ExMATE", "#00429d", "-", ""),
    "dpo": Style("DPO ($\\beta = 0.1$)", "#2a9d5c", (0, (6, 1.5, 1, 1.5)), ""),
}


def draw_weights(path: Path) -> None:
    """Draws the gradient of each penalty against P⁻ of a response of one token, in three spaces."""
    logits = [x / 10 for x in range(-140, 141, 2)]
    figure, axes = _grid(1, 3, width=10.5, height=3.3)
    titles = (
        "$|\\partial L/\\partial P^-|$",
        "$|\\partial L/\\partial \\log P^-|$",
        "$|\\partial L/\\partial m|$, what a row of logits gets",
    )
    for name, style in PENALTIES.items():
        slopes = [one_token(name, _probability(m)) for m in logits]
        for axis, values in zip(axes[0], zip(*slopes, strict=True), strict=True):
            axis.plot(logits, values, color=style.color, ls=style.dash, lw=2, label=style.label)
    marks = {-13.8: "$10^{-6}$", -6.9: "$10^{-3}$", 0: "1/2", 6.9: "$1-10^{-3}$"}
    marks[13.8] = "$1-10^{-6}$"
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set(yscale="log", title=title, xlabel="$P^-$", ylim=(1e-7, 3e6))
        axis.set_xticks(list(marks), list(marks.values()), fontsize=8)
    _legend(figure, axes[0][0], columns=4)
    _save(figure, path)


def draw_four_cells(path: Path, rows: Sequence[Row], groups: Mapping[str, str], unit: str) -> None:
    """Draws mean log-probability per token of the cells over training, a column per loss.

    Args:
        path: of the picture.
        rows: with "loss", "step" and the cells.
        groups: a line of pictures for each value of "kind" or "case": its title.
        unit: appended to the name of a cell to find its value; "" or "/token".
    """
    figure, axes = _grid(len(groups), len(LOSSES), width=12, height=0.55 + 2.0 * len(groups))
    for line, (group, title) in zip(axes, groups.items(), strict=True):
        for axis, loss in zip(line, LOSSES, strict=True):
            own = [r for r in rows if group in (r.get("kind"), r.get("case")) and r["loss"] == loss]
            for name, style in CELLS.items():
                drawn = [r[f"{name}{unit}"] for r in own]
                expected = {"rejected_in_chosen": ("rejected_in_rejected", "chosen_in_chosen")}
                expected["chosen_in_rejected"] = ("chosen_in_chosen", "rejected_in_rejected")
                if any(drawn == [r[f"{t}{unit}"] for r in own] for t in expected.get(name, ())):
                    continue  # the same cell by another name
                steps = [r["step"] for r in own]
                axis.plot(steps, drawn, color=style.color, ls=style.dash, lw=1.8, label=style.label)
            axis.set_title(loss, fontsize=9)
            axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        line[0].set_ylabel(f"{title}\nmean log p, nats", fontsize=8)
        _same_limits(line)
    for axis in axes[-1]:
        axis.set_xlabel("step", fontsize=8)
    most = max((a for line in axes for a in line), key=lambda a: len(a.get_lines()))
    _legend(figure, most, columns=4)
    _save(figure, path)


def draw_masses(path: Path, rows: Sequence[Row]) -> None:
    """Draws each share of Σ |∂L/∂z| over training, stacked, with the sum as a line."""
    kinds = [k for k in KIND_TITLES if any(r["kind"] == k for r in rows)]
    figure, axes = _grid(len(kinds), len(LOSSES), width=12, height=0.55 + 2.0 * len(kinds))
    for line, kind in zip(axes, kinds, strict=True):
        for axis, loss in zip(line, LOSSES, strict=True):
            own = [r for r in rows if r["kind"] == kind and r["loss"] == loss]
            steps = [r["step"] for r in own]
            totals = [max(sum(r[f"mass/{m}"] for m in MASSES), 1e-30) for r in own]
            stack = [[r[f"mass/{m}"] / t for r, t in zip(own, totals, strict=True)] for m in MASSES]
            areas = axis.stackplot(
                steps, *stack, colors=[s.color for s in MASSES.values()], edgecolor="#333333"
            )
            for area, style in zip(areas, MASSES.values(), strict=True):
                area.set(hatch=style.hatch, linewidth=0.5, label=style.label)
            axis.set(ylim=(0, 1), xlim=(min(steps), max(steps)))
            axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            axis.set_title(f"{loss}\n$\\Sigma$ {totals[0]:.2g} $\\to$ {totals[-1]:.2g}", fontsize=8)
        line[0].set_ylabel(f"{KIND_TITLES[kind]}\nshare", fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("step", fontsize=8)
    _legend(figure, axes[0][0], columns=3)
    _save(figure, path)


def draw_heat_map(path: Path, example: Mapping[str, Any]) -> None:
    """Draws g at each token of a pair for each loss; the shade is |g|, the number 100 g.

    Rows of logits that the pair shares are drawn once, with the sum of both slopes where the labels
    are the same.
    """
    shared = example["shared"] - 1  # the last shared row has two labels
    losses = list(example["slopes"])
    net = {
        k: [a + b for a, b in zip(chosen[:shared], rejected[:shared], strict=True)]
        for k, (chosen, rejected) in example["slopes"].items()
    }
    parts = [
        ("shared tokens", example["chosen"][:shared], net),
        ("chosen response", example["chosen"][shared:], {}),
        ("rejected response", example["rejected"][shared:], {}),
    ]
    for i, (_, _, slopes) in enumerate(parts[1:]):
        slopes |= {k: example["slopes"][k][i][shared:] for k in losses}
    most = max(abs(x) for _, _, slopes in parts for row in slopes.values() for x in row)
    counts = [len(tokens) for _, tokens, _ in parts]
    figure = Figure(
        figsize=(1.6 + 0.56 * sum(counts), 1.2 + 0.42 * len(losses)), layout="compressed"
    )
    axes = figure.subplots(1, 3, width_ratios=counts)
    for axis, (title, tokens, slopes) in zip(axes, parts, strict=True):
        table = [[abs(x) for x in slopes[loss]] for loss in losses]
        axis.imshow(table, cmap="Greys", vmin=0, vmax=1.25 * most, aspect="auto")
        for y, loss in enumerate(losses):
            for x, value in enumerate(slopes[loss]):
                shade = "white" if abs(value) > 0.75 * most else "black"
                text = "0" if abs(value) < 5e-4 else f"{100 * value:+.1f}"
                axis.text(x, y, text, ha="center", va="center", fontsize=8, color=shade)
        axis.set_title(title, fontsize=10)
        axis.set_xticks(range(len(tokens)), [_token(t) for t in tokens], rotation=40, ha="right")
        axis.set_yticks(range(len(losses)), losses if axis is axes[0] else [])
        axis.tick_params(length=0, labelsize=9)
    figure.supxlabel(
        "$100 \\, \\partial L/\\partial m$; below 0: descent raises the token", fontsize=9
    )
    _save(figure, path)


def draw_steps(path: Path, rows: Sequence[Row], size: float) -> None:
    """Draws the measured change of log P(y⁺) by one step of DPO against ρ."""
    groups = list(dict.fromkeys((r["kind"], r["start"]) for r in rows))
    figure, axes = _grid(1, len(groups), width=12, height=3.1)
    for axis, (kind, start) in zip(axes[0], groups, strict=True):
        own = [
            r
            for r in rows
            if (r["kind"], r["start"], r["loss"], r["size"]) == (kind, start, "dpo", size)
        ]
        for right, marker, color in ((True, "o", "#00429d"), (False, "X", "#c1121f")):
            points = [
                (r["rho"], r["measured_chosen"])
                for r in own
                if (r["predicted_chosen"] * r["measured_chosen"] > 0) == right
            ]
            label = "sign as predicted" if right else "sign not as predicted"
            x, y = zip(*points, strict=True) if points else ((), ())
            axis.scatter(
                x,
                y,
                s=14 if right else 40,
                marker=marker,
                color=color,
                label=label,
                alpha=0.6 if right else 1,
                linewidths=0,
            )
        axis.axvline(1, color="black", lw=0.8, ls=(0, (4, 2)))
        axis.axhline(0, color="black", lw=0.8)
        axis.set_title(f"{KIND_TITLES[kind]}\nhead: {start}, {len(own)} pairs", fontsize=8)
        axis.set_xlabel("$\\rho$")
    axes[0][0].set_ylabel("measured change of log $P(y^+)$, nats", fontsize=8)
    _legend(figure, axes[0][0], columns=2)
    _save(figure, path)


def _probability(m: float) -> float:
    """Returns the probability of log-odds."""
    return 1 / (1 + math.exp(-m))


def _token(text: str) -> str:
    """Returns a token as a label, with visible blanks and a name for the end token."""
    text = {"<|im_end|>": "(end)"}.get(text, text.strip() or "(blank)")
    return text.replace("$", "\\$")


def _grid(
    rows: int, columns: int, *, width: float, height: float
) -> tuple[Figure, list[list[Axes]]]:
    """Returns a figure with axes in rows."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.tick_params(labelsize=8)
        axis.grid(color="#dddddd", lw=0.5)
        axis.set_axisbelow(True)
    return figure, [list(line) for line in axes]


def _same_limits(axes: Sequence[Axes]) -> None:
    """Gives a row of axes one vertical range, with numbers on the first alone."""
    low = min(a.get_ylim()[0] for a in axes)
    high = max(a.get_ylim()[1] for a in axes)
    for axis in axes:
        axis.set_ylim(low, high)
        if axis is not axes[0]:
            axis.set_yticklabels([])


def _legend(figure: Figure, axis: Axes, *, columns: int) -> None:
    """Draws one legend below all axes."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9
    )


def _save(figure: Figure, path: Path) -> None:
    """Writes a PNG without its date, so that equal numbers give equal files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI, metadata={"Software": None})
