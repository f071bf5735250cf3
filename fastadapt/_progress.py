"""A bar that shows how much of a command or a benchmark is done; imports rich and no model."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn


def progress_bar(console: Console, *, auto_refresh: bool) -> Progress:
    """Return a progress display; without automatic refresh no thread runs beside a timing."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        console=console,
        auto_refresh=auto_refresh,
        transient=True,
        disable=not console.is_terminal,
    )


def stepper(bar: Progress, description: str, total: int) -> Callable[[], None]:
    """Add a task to a display and return what advances it, drawing it five times a second."""
    task = bar.add_task(description, total=total)
    drawn = 0.0

    def step() -> None:
        nonlocal drawn
        bar.advance(task)
        if time.monotonic() - drawn > 0.2:
            drawn = time.monotonic()
            bar.refresh()

    return step
