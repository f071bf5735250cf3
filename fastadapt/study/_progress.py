"""Progress bars of the commands and benchmarks; imports rich and no model."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)


def progress_bar(console: Console, *, auto_refresh: bool) -> Progress:
    """Returns a progress display; without automatic refresh no thread disturbs a timing."""
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
    """Adds a task to a display and returns a function that advances it."""
    task = bar.add_task(description, total=total)
    drawn = 0.0

    def step() -> None:
        nonlocal drawn
        bar.advance(task)
        if time.monotonic() - drawn > 0.2:
            drawn = time.monotonic()
            bar.refresh()

    return step


@contextlib.contextmanager
def phases() -> Iterator[Callable[[str, int, int], None]]:
    """Yields a function that reports the progress of a phase by name, done and total."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as bar:

        def report(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bar.add_task(phase, total=total)
            bar.update(tasks[phase], completed=done, total=total)

        yield report
