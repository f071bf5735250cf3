"""A demand on a benchmark, and its figure from some cells."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

Record = dict[str, Any]
Figures = list[tuple[float, Record]]  # of cells, each with its cell


class Limit(NamedTuple):
    """One demand. `figure` is None where the result has nothing to compute it from."""

    label: str
    figure: float | None
    bound: float
    unit: str = "x"
    at_least: bool = False
    where: str = ""

    @property
    def met(self) -> str:
        """Whether the figure is within its bound, in words."""
        if self.figure is None:
            return "not measured"
        within = self.figure >= self.bound if self.at_least else self.figure <= self.bound
        return "yes" if within else "no"

    @property
    def shown(self) -> str:
        """The figure with its unit and, if it is one cell's, the cell."""
        if self.figure is None:
            return "-"
        digits = 0 if self.figure >= 100 else 1 if self.figure >= 10 else 2
        text = f"{self.figure:,.{digits}f} {self.unit}"
        return f"{text} ({self.where})" if self.where else text

    @property
    def demanded(self) -> str:
        """The bound with its unit."""
        return f"{'at least' if self.at_least else 'at most'} {self.bound:g} {self.unit}"


def geometric_mean(values: list[float]) -> float | None:
    """None where there is no value."""
    return statistics.geometric_mean(values) if values else None


def medians(cells: Sequence[Record], *path: str) -> Figures:
    """The medians under some keys, of the cells that have them."""
    found = []
    for cell in cells:
        value: Any = cell
        for key in path:
            value = value.get(key, {})
        if value:
            found.append((float(value[1]), cell))
    return found


def mean(label: str, figures: Figures, bound: float, *, at_least: bool = False) -> Limit:
    """A demand on the geometric mean of some cells."""
    return Limit(label, geometric_mean([x for x, _ in figures]), bound, at_least=at_least)


def worst(label: str, figures: Figures, bound: float, *, at_least: bool = False) -> Limit:
    """A demand on the worst of some cells."""
    if not figures:
        return Limit(label, None, bound, at_least=at_least)
    figure, cell = (min if at_least else max)(figures, key=lambda pair: pair[0])
    return Limit(label, figure, bound, at_least=at_least, where=_place(cell))


def _place(cell: Record) -> str:
    """Names a cell of rows, or of a loss."""
    if "h" in cell:
        shape = "N = {n:,}, H = {h:,}, V = {v:,}, {dtype}, {head} head"
        return shape.format(**cell)
    names = [cell["rows"], *(cell[k] for k in ("adaptor", "dtype", "mode") if k in cell)]
    return f"V = {cell['vocabulary']:,}, N = {cell['batch']}, {', '.join(names)}"
