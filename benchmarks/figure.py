"""The figure of the sampling benchmark: time per row against V."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Okabe and Ito's colours, which remain apart for the colour-blind, and a marker each.
STYLES: dict[str, tuple[str, str]] = {
    "T": ("#56B4E9", "o"),
    "eta": ("#009E73", "s"),
    "T+k+p+eps": ("#0072B2", "^"),
    "everything": ("#CC79A7", "D"),
    "T+p": ("#D55E00", "v"),
    "typical": ("#E69F00", "P"),
}
PEER_STYLES = {
    "stock": ("transformers, T+p", "X"),
    "compiled": ("torch.compile, T+p", "d"),
    "llama.cpp": ("llama.cpp, T+p", "*"),
}
SHOWN = {"batch": 8, "rows": "normal3", "dtype": "float32"}


@contextmanager
def saved_figure(path: Path, record: dict[str, Any], **options: Any) -> Iterator[tuple[Any, Any]]:
    """A figure and its axes, saved at the end of the block with the commit that it shows.

    By that commit a figure of another result is noticed.
    """
    import matplotlib  # takes a second, which a report of tables alone does without

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(**options, layout="constrained")
    yield figure, axes
    for each in figure.axes:
        each.spines[["top", "right"]].set_visible(False)
    metadata = {"Source": str(record["host"]["commit"]), "Software": None}
    figure.savefig(path, dpi=120, metadata=metadata)
    pyplot.close(figure)


def draw(record: dict[str, Any], path: Path) -> None:
    """Draw the figure of a result of bench_sampling.py."""
    with saved_figure(path, record, figsize=(7.2, 4.6)) as (figure, axes):
        _draw_lines(record, axes)
        # from the top down as the lines end
        lines = sorted(axes.get_lines(), key=lambda line: -float(line.get_xydata()[-1, 1]))
        figure.legend(handles=lines, loc="outside right center", frameon=False, fontsize=8)


def _draw_lines(record: dict[str, Any], axes: Any) -> None:
    """A line for each adaptor and peer, and those of the limits."""
    cells = [c for c in record["cells"] if all(c[k] == v for k, v in SHOWN.items())]
    peers = [p for p in record["peers"] if p["batch"] == SHOWN["batch"] and p["adaptor"] == "T+p"]
    for name, (label, marker) in PEER_STYLES.items():
        if measured := [p for p in peers if name in p["us"]]:
            style = {"marker": marker, "color": "#555555", "lw": 1, "ms": 6, "label": label}
            axes.plot(*_line(measured, name), **style)
    for name, (colour, marker) in STYLES.items():
        if measured := [c for c in cells if c["adaptor"] == name]:
            style = {"marker": marker, "color": colour, "ms": 5, "label": f"fastadapt, {name}"}
            axes.plot(*_line(measured, "fastadapt"), **style)
    # every cell has its own; those of one adaptor are as good as another's
    base = [c for c in cells if c["adaptor"] == "T+p"]
    if not base:
        raise ValueError(f"figure: expected cells of T+p with {SHOWN}, got none")
    x, softmax = _line(base, "softmax")
    axes.plot(x, [2.5 * y for y in softmax], "k:", lw=1, label="limit, a cell: 2.5 x softmax")
    axes.plot(x, [1.2 * y for y in softmax], "k--", lw=1, label="limit, mean: 1.2 x softmax")
    axes.plot(x, softmax, "k-", lw=2, label="torch.softmax")
    axes.plot(*_line(base, "copy"), "-", color="#999999", lw=2, label="a copy of the rows")
    axes.set(xscale="log", yscale="log", xlabel="V, size of the vocabulary", ylabel="µs per row")
    axes.set_xticks(x, [f"{v / 1000:.0f}k" for v in x], fontsize=8)
    axes.minorticks_off()
    axes.grid(axis="y", color="#dddddd", lw=0.6)
    host = record["host"]
    threads = f"{host['torch_threads']} thread" + "s" * (host["torch_threads"] > 1)
    axes.set_title(
        f"A draw from 8 rows of 3 x normal logits, float32\n{host['cpu']}, {threads}, "
        f"{host['kernels']}, torch {host['versions']['torch']}",
        fontsize=9,
        loc="left",
    )


def _line(cells: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """V and the median time per row in microseconds, V ascending."""
    points = sorted((c["vocabulary"], c["us"][name][1] / c["batch"]) for c in cells)
    return [v for v, _ in points], [us for _, us in points]
