"""Grids of sampling adaptors: the paper's 31, a smaller one of 15, or the user's."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastadapt import Adaptor

TEMPERATURES = (0.5, 0.75, 1.0, 1.25, 1.5)
# Names and values of arXiv 2406.10203's released code.
_FAMILIES: dict[str, dict[str, float]] = {
    "top-k 30": {"top_k": 30},
    "top-k 50": {"top_k": 50},
    "nucleus 0.90": {"top_p": 0.9},
    "nucleus 0.95": {"top_p": 0.95},
    "typical 0.90": {"typical_p": 0.9},
    "eta 0.0009": {"eta_cutoff": 9e-4},
}
ANCESTRAL = "ancestral"
# transformers' default top_k, which the released code never turned off for these families.
_DEFAULT_TOP_K = 50
_HIDDEN = tuple(family for family, knobs in _FAMILIES.items() if "top_k" not in knobs)
_FIFTEEN = ("top-k 50", "nucleus 0.90", "typical 0.90", "eta 0.0009")


class Cell(NamedTuple):
    """One adaptor of a grid.

    Attributes:
        family: the truncation, the same for all temperatures.
        adaptor: its knobs, numbers only.
        hidden_top_k: it is a copy of another cell with transformers' default top_k=50 left on, as
            the released code sampled; such cells are reported apart.
    """

    family: str
    adaptor: Adaptor
    hidden_top_k: bool = False

    @property
    def temperature(self) -> float:
        """The adaptor's temperature."""
        return float(self.adaptor.temperature)

    @property
    def name(self) -> str:
        """Family and temperature, for tables."""
        hidden = f" + top-k {_DEFAULT_TOP_K}" if self.hidden_top_k else ""
        return f"{self.family}{hidden}, T={self.temperature:g}"


def paper_grid(temperatures: Sequence[float] = TEMPERATURES) -> list[Cell]:
    """Returns the paper's grid: six truncations at each temperature, and ancestral at 1.

    With the paper's five temperatures these are its 31 adaptors.
    """
    cells = [
        Cell(family, Adaptor(temperature=t, **knobs))  # type: ignore[arg-type]  # mypy#5382
        for family, knobs in _FAMILIES.items()
        for t in temperatures
    ]
    return [Cell(ANCESTRAL, Adaptor()), *cells]


def small_grid() -> list[Cell]:
    """Returns 15 of the 31: all seven samplers, four of them at three temperatures."""
    chosen = [
        cell
        for cell in paper_grid((0.5, 1.0, 1.5))
        if cell.family in _FIFTEEN or cell.temperature == 1.0
    ]
    return chosen


def hidden_cells(cells: Sequence[Cell]) -> list[Cell]:
    """Returns the hottest cells of top-p, typical and eta with top_k=50 left on.

    The released code sampled those three so, and scored them without. The hottest, since there
    the other filter leaves most to remove.
    """
    hottest = max(cell.temperature for cell in cells)
    return [
        Cell(cell.family, _with_top_k(cell.adaptor), hidden_top_k=True)
        for cell in cells
        if cell.family in _HIDDEN and cell.temperature == hottest
    ]


def read_grid(path: str | os.PathLike[str]) -> list[Cell]:
    """Reads a user's grid.

    Args:
        path: a JSON file: a list of objects with the knobs of an `Adaptor` and, if wanted, a
            "family" by which figures colour it (its knobs but the temperature otherwise).

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no such list, or a knob is unknown or out of range; the message has the
            number of the entry.
    """
    path = Path(path)
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path.name}: expected JSON, got {error}") from error
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path.name}: expected a list of adaptors, got {str(entries)[:60]!r}")
    return [_read_cell(path.name, number, entry) for number, entry in enumerate(entries, 1)]


def check_grid(cells: Sequence[Cell]) -> None:
    """Raises unless a grid is fit for a study.

    Raises:
        ValueError: fewer than two adaptors or more than 256, one twice, one with a knob per row,
            or one with temperature 0, which has no distribution to score under.
    """
    if not 2 <= len(cells) <= 256:
        raise ValueError(f"adaptors: expected 2 to 256, got {len(cells)}")
    for cell in cells:
        if cell.adaptor.rows is not None:
            raise ValueError(f"adaptors: expected numbers as knobs, got {cell.adaptor}")
        if cell.temperature == 0:
            raise ValueError(f"adaptors: expected temperature > 0, got 0 in {cell.name!r}")
    for kind, values in (
        ("adaptor", [cell.adaptor for cell in cells]),
        ("name", [cell.name for cell in cells]),
    ):
        value, times = Counter(values).most_common(1)[0]
        if times > 1:
            raise ValueError(f"adaptors: expected each {kind} once, got {value} {times} times")


def _read_cell(name: str, number: int, entry: Any) -> Cell:
    """Reads one entry of a user's grid."""
    if not isinstance(entry, dict):
        raise ValueError(f"{name}, entry {number}: expected an object, got {entry!r}")
    knobs = {key: value for key, value in entry.items() if key != "family"}
    try:
        adaptor = Adaptor(**knobs)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}, entry {number}: {error}") from error
    shown = ", ".join(f"{k}={v}" for k, v in knobs.items() if k != "temperature")
    return Cell(str(entry.get("family", shown or ANCESTRAL)), adaptor)


def _with_top_k(adaptor: Adaptor) -> Adaptor:
    """Returns the adaptor with transformers' default top_k."""
    return Adaptor(
        temperature=adaptor.temperature,
        top_k=_DEFAULT_TOP_K,
        top_p=adaptor.top_p,
        typical_p=adaptor.typical_p,
        eta_cutoff=adaptor.eta_cutoff,
    )
