"""Tables of the gradient study on disk: CSV for rows of equal fields, JSON for the rest."""

from __future__ import annotations

import csv
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fastadapt.study.files import write_whole

Row = dict[str, Any]
DIGITS = 6  # significant, of what is written


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows as CSV, numbers in six digits; the fields are those of all rows, in order.

    Raises:
        ValueError: no rows.
    """
    if not rows:
        raise ValueError(f"rows: expected at least one for {path.name}, got none")
    fields = list(dict.fromkeys(name for row in rows for name in row))

    def write(place: Path) -> None:
        with place.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(fields)
            writer.writerows([_cell(row.get(name)) for name in fields] for row in rows)

    write_whole(path, write)


def read_rows(path: Path) -> list[Row]:
    """Returns the rows of a CSV file, with numbers converted and empty cells as None."""
    with path.open(newline="", encoding="utf-8") as file:
        return [{k: _value(v) for k, v in row.items()} for row in csv.DictReader(file)]


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Writes a record as indented JSON."""
    text = json.dumps(record, indent=1, ensure_ascii=False)
    write_whole(path, lambda place: place.write_text(text + "\n", encoding="utf-8"))


def read_json(path: Path) -> dict[str, Any]:
    """Reads a record that `write_json` wrote."""
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected a record of the study, got {error}") from error
    return record


def settings_of(options: Any, found: int) -> Row:
    """Returns the options of a study as a record, without local folders.

    Args:
        options: a dataclass with `data` and `out`.
        found: how many pairs there were.
    """
    settings = {**asdict(options), "data": options.data.name, "found": found}
    del settings["out"]
    return settings


def software() -> dict[str, str]:
    """Returns the versions of packages that a result depends on."""
    names = ("fastadapt", "torch", "transformers")
    return {"python": platform.python_version(), "threads": str(torch.get_num_threads())} | {
        name: metadata.version(name) for name in names
    }


def _cell(value: Any) -> str:
    """Formats a value as text."""
    if value is None:
        return ""
    return f"{value:.{DIGITS}g}" if isinstance(value, float) else str(value)


def _value(text: str) -> Any:
    """Parses text as a number if it is one."""
    if text == "":
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
