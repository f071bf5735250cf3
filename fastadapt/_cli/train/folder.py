"""The folder of a training run: its lock, settings, metrics and checkpoints."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import filelock

from fastadapt._cli.errors import CommandError

_SEAL = "seal.json"
_PREFIX = "checkpoint-"


@contextlib.contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Creates a folder and locks it, so that one run at a time writes to it.

    The lock goes with its process, however that ends.

    Raises:
        CommandError: another process holds it, the message says which; or there are no locks here.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / ".lock")
    note = folder / ".lock.json"
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise CommandError(f"output_dir: {folder} is in use by {_holder(note)}") from None
    except NotImplementedError as error:
        raise CommandError(f"output_dir: expected a file system with locks: {error}") from error
    try:
        started = time.strftime("%Y-%m-%d %H:%M:%S %z")
        who = {"pid": os.getpid(), "host": socket.gethostname(), "since": started}
        note.write_text(json.dumps(who), encoding="utf-8")
        yield
    finally:
        note.unlink(missing_ok=True)
        lock.release()


def _holder(note: Path) -> str:
    """Describes the process that holds the lock."""
    try:
        who = json.loads(note.read_text(encoding="utf-8"))
        return f"process {who['pid']} on {who['host']} since {who['since']}"
    except (OSError, ValueError, KeyError):
        return "another process"


def write_json(path: Path, content: Any) -> None:
    """Replaces a JSON file atomically."""
    part = path.with_name(f".{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


class RunFolder:
    """The files of a run: run.json, metrics.jsonl, stage-N/checkpoint-M and, at the end, model.

    Args:
        path: there already, its lock held.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.model = path / "model"
        self._settings = path / "run.json"
        self._metrics = path / "metrics.jsonl"

    def stage(self, number: int) -> Path:
        """Returns the folder of a stage, counted from 0."""
        return self.path / f"stage-{number + 1}"

    def settings(self) -> dict[str, Any] | None:
        """Returns the settings of the run in this folder, None if there is none.

        Raises:
            CommandError: their file cannot be read.
        """
        if not self._settings.exists():
            return None
        try:
            found: dict[str, Any] = json.loads(self._settings.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CommandError(f"{self._settings}: expected JSON, got {error}") from error
        return found

    def check_unused(self) -> None:
        """Raises if a new run would overwrite files that are not its own.

        Raises:
            CommandError: there is a model, metrics.jsonl or a stage, without the run's settings.
        """
        for path in (self.model, self._metrics, self.stage(0)):
            if path.exists():
                raise CommandError(
                    f"output_dir: expected a folder without {path.name}, which a run writes, got "
                    f"{self.path}"
                )

    def keep_settings(self, settings: Mapping[str, Any]) -> None:
        """Writes the settings of the run."""
        write_json(self._settings, dict(settings))

    def last_checkpoint(self, stages: int) -> tuple[int, Path | None, list[str]]:
        """Finds the newest intact checkpoint to resume from.

        Checkpoints that were not finished are removed; damaged ones are set aside.

        Args:
            stages: how many there are.

        Returns:
            (stage from 0, its newest whole checkpoint, what was wrong with newer ones); the
            checkpoint is None where no stage has a finished one.

        Raises:
            CommandError: there are finished checkpoints, and all are damaged.
        """
        wrong: list[str] = []
        aside: list[Path] = []
        for stage in reversed(range(stages)):
            for folder in _newest_first(self.stage(stage)):
                if not (folder / _SEAL).exists():
                    shutil.rmtree(folder)
                elif damage := _damage(folder):
                    wrong.append(f"{folder}: {damage}")
                    aside.append(folder)
                else:
                    for path in aside:
                        _set_aside(path)
                    return stage, folder, wrong
        if wrong:
            raise CommandError(f"expected a whole checkpoint, got {'; '.join(wrong)}")
        return 0, None, []

    def end_of_stage(self, number: int) -> Path:
        """Returns the last checkpoint of a finished stage, counted from 0.

        Raises:
            CommandError: there is none, or it is damaged.
        """
        found = [path for path in _newest_first(self.stage(number)) if (path / _SEAL).exists()]
        damage = _damage(found[0]) if found else "it is not there"
        if damage:
            where = found[0] if found else self.stage(number)
            raise CommandError(f"{where}: expected the end of a stage, whole, but {damage}")
        return found[0]

    def rewind_metrics(self, stage: int, step: int) -> None:
        """Drops the metrics after a step; the resumed run writes equal ones.

        Args:
            stage: from 0.
            step: of it; 0 for its beginning.
        """
        kept: list[str] = []
        if self._metrics.exists():
            # a killed run may have left half a line, without its end
            lines = self._metrics.read_text(encoding="utf-8").split("\n")[:-1]
            try:
                places = [(entry["stage"], entry["step"]) for entry in map(json.loads, lines)]
            except (ValueError, KeyError, TypeError) as error:
                raise CommandError(f"{self._metrics}: expected metrics, got {error}") from error
            kept = [x for x, at in zip(lines, places, strict=True) if at <= (stage + 1, step)]
        part = self._metrics.with_suffix(".part")
        part.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        os.replace(part, self._metrics)

    def write_metrics(self, entry: Mapping[str, Any]) -> None:
        """Appends a line to metrics.jsonl."""
        with self._metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def place_model(self, written: Path) -> None:
        """Moves a folder to where the run's model belongs, in place of an earlier one."""
        before = self.path / ".model.before"
        shutil.rmtree(before, ignore_errors=True)
        if self.model.exists():
            os.replace(self.model, before)
        os.replace(written, self.model)
        shutil.rmtree(before, ignore_errors=True)


def seal(folder: Path) -> None:
    """Marks a checkpoint as complete and records the checksums of its files.

    A machine that goes down may lose files that were written: their sums then say so.
    """
    sums = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != _SEAL):
        sums[path.relative_to(folder).as_posix()] = _digest(path)
    write_json(folder / _SEAL, sums)


def unseal(folder: Path) -> None:
    """Removes the mark of `seal` before a checkpoint is written again."""
    (folder / _SEAL).unlink(missing_ok=True)


def _damage(folder: Path) -> str | None:
    """Describes what is wrong with a sealed checkpoint, None if nothing is."""
    try:
        sums = json.loads((folder / _SEAL).read_text(encoding="utf-8"))
        for name, wanted in sums.items():
            if _digest(folder / name) != wanted:
                return f"{name} is not what was written"
    except (OSError, ValueError, AttributeError) as error:
        return str(error)
    return None


def _digest(path: Path) -> str:
    """The SHA-256 sum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _newest_first(folder: Path) -> list[Path]:
    """Returns the checkpoints in a folder, finished or not, newest first."""
    found = [path for path in folder.glob(f"{_PREFIX}*") if step_of(path) >= 0 and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """Returns the step of a checkpoint, from its name; -1 for another name."""
    number = checkpoint.name.removeprefix(_PREFIX)
    return int(number) if number.isdecimal() else -1


def _set_aside(folder: Path) -> None:
    """Renames a damaged checkpoint, so that nothing uses it."""
    target = folder.with_name(f"damaged-{folder.name}")
    shutil.rmtree(target, ignore_errors=True)
    os.replace(folder, target)
