"""Cells of a benchmark of losses: times, and peaks of memory each in a process of its own."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fastadapt._ops.memory import is_measurable
from fresh import in_fresh_process
from harness import progress, settings_of


def measure_grid(
    options: argparse.Namespace,
    record: dict[str, Any],
    grid: Sequence[Any],
    times: Callable[[Any], dict[str, Any]],
    peak: Callable[..., Iterator[float]],
    weighed: Sequence[str],
) -> None:
    """Fills in the settings, the notes and the cells of a record.

    Args:
        options: those of the benchmark, with `memory`, `rounds`, `seconds` and `seed`.
        record: what is filled in.
        grid: the cells, named tuples.
        times: what it says of a cell.
        peak: of a cell, a name and the options: yields megabytes, in a process for it alone.
        weighed: the names whose peaks are measured.
    """
    record["notes"] = notes = []
    if options.memory and not is_measurable():
        notes.append("no memory: this system does not tell the peak of a process")
        options.memory = False
    record["settings"] = {
        **settings_of(options, "rounds", "seed"),
        "seconds_per_cell": options.seconds,
    }
    record["cells"] = []
    with progress("timing", len(grid)) as step:
        for cell in grid:
            entry = {**cell._asdict(), **times(cell)}
            if options.memory:
                entry["memory_mb"] = {
                    name: next(in_fresh_process(peak, cell, name, options)) for name in weighed
                }
            record["cells"].append(entry)
            step()
