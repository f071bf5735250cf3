"""Output of a training run: progress lines for a person, and metrics.jsonl."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from fastadapt._cli.train.folder import RunFolder

_EVERY = 10.0  # seconds between lines of one piece of work
_CLOCKS = ("runtime", "samples_per_second", "steps_per_second")
_SHOWN = {
    "loss": "loss {:.4f}",
    "logps/chosen": "log P chosen {:.2f}",
    "logps/rejected": "rejected {:.2f}",
    "pairs/accuracies": "chosen ahead {:.0%}",
    "rewards/accuracies": "more than before {:.0%}",
    "grad_norm": "gradient {:.2g}",
}


class Reporter:
    """Reports the progress of a run: a bar on a terminal, and lines there and in a log.

    Args:
        out: where to.
        active: whether this process speaks.
    """

    def __init__(self, out: Console, *, active: bool = True) -> None:
        self._out, self._active = out, active
        self._last = -_EVERY
        self._work = ""
        self._bar: Progress | None = None

    def say(self, text: str) -> None:
        """Writes a line."""
        if self._active:
            self._out.print(text)

    def advance(self, work: str, done: int, total: int, detail: str = "") -> None:
        """Reports the progress of a task: at its start, at its end and at intervals."""
        if not self._active:
            return
        now = time.monotonic()
        first, last = work != self._work, done >= total
        if first:
            self._work = work
            self._start_bar(work, total)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done)
        if first or last or now - self._last >= _EVERY:
            self._last = now
            self._out.print(f"{work} {done}/{total}{': ' if detail else ''}{detail}")
        if last:
            self.close()

    def close(self) -> None:
        """Closes the progress bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _start_bar(self, work: str, total: int) -> None:
        """Shows a progress bar on a terminal."""
        self.close()
        if self._out.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            self._bar = Progress(*columns, TimeRemainingColumn(), console=self._out, transient=True)
            self._bar.add_task(work, total=total)
            self._bar.start()


class StageCallback(TrainerCallback):
    """Writes a stage's metrics, and decides when to log, evaluate and save.

    A step is logged and evaluated before its checkpoint is saved: a resumed run then needs no
    number from before, and misses none.

    Args:
        folder: of the run.
        number: of the stage, from 0.
        label: of the stage.
        reporter: for a person.
        evaluates: whether there are pairs to evaluate on.
    """

    def __init__(
        self, folder: RunFolder, number: int, label: str, reporter: Reporter, *, evaluates: bool
    ) -> None:
        self.folder, self.number, self.label, self.reporter = folder, number, label, reporter
        self.evaluates = evaluates
        self.on_begin: Callable[[], None] = lambda: None  # called once the state is loaded
        self._saves_at_epoch_end = False
        self._since = time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Calls `on_begin`."""
        self.on_begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Evaluates at the end; logs before saving; saves after an epoch's evaluation."""
        by_epoch = args.eval_strategy == "epoch"
        if state.global_step >= state.max_steps and self.evaluates and not by_epoch:
            control.should_evaluate = True
        if control.should_save and by_epoch and float(state.epoch).is_integer():
            control.should_save, self._saves_at_epoch_end = False, True
        if control.should_save:
            control.should_log = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Saves the checkpoint that a step put off to the end of its epoch."""
        if self._saves_at_epoch_end:
            control.should_save, self._saves_at_epoch_end = True, False
        if control.should_save:
            control.should_log = True

    def on_log(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Writes a line of metrics.jsonl and, at intervals, one for a person."""
        logs: Mapping[str, Any] = rest["logs"]
        evaluated = any(name.startswith("eval_") for name in logs)
        if not state.is_world_process_zero or not (evaluated or "loss" in logs):
            return
        seen = {name: value for name, value in logs.items() if not name.endswith(_CLOCKS)}
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        entry = {"stage": self.number + 1, "step": state.global_step, **seen, "seconds": seconds}
        self.folder.write_metrics(entry)
        detail = _shown({name.removeprefix("eval_"): value for name, value in seen.items()})
        if evaluated:
            self.reporter.say(f"{self.label}, held out after step {state.global_step}: {detail}")
        else:
            self.reporter.advance(f"{self.label}, step", state.global_step, state.max_steps, detail)


def _shown(seen: Mapping[str, float]) -> str:
    """Formats metrics for a person."""
    return ", ".join(text.format(seen[name]) for name, text in _SHOWN.items() if name in seen)
