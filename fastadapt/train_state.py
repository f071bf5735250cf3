"""What a training run keeps on disk: its checkpoint and its metrics, both safe to be killed in."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

_CHECKPOINT = "checkpoint.pt"
_METRICS = "metrics.jsonl"


class CheckpointError(ValueError):
    """A checkpoint is there that should not be, or is of another run."""


@dataclass
class TrainState:
    """Where a run is.

    Attributes:
        stage: the stage it is in, from 0; the number of stages once all are done.
        step: steps taken in this stage.
        references: log P of the good and of the bad responses of the training pairs, (N,) each,
            under the model that the stage began with; None where no loss asks for them.
        held_out: the same of the pairs held out.
    """

    stage: int = 0
    step: int = 0
    references: tuple[Tensor, Tensor] | None = None
    held_out: tuple[Tensor, Tensor] | None = None


def save_checkpoint(
    folder: Path,
    settings: Mapping[str, Any],
    state: TrainState,
    parameters: Mapping[str, Tensor],
    optimizer: Mapping[str, Any] | None,
) -> None:
    """Writes the checkpoint of a run in place of its last one, at once or not at all."""
    content = {
        "settings": dict(settings),
        "state": vars(state),
        "parameters": {name: value.detach() for name, value in parameters.items()},
        "optimizer": optimizer,
        "rng": torch.get_rng_state(),
    }
    part = folder / f".{_CHECKPOINT}.part"
    with part.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, folder / _CHECKPOINT)


def load_checkpoint(
    folder: Path, settings: Mapping[str, Any], *, resume: bool
) -> dict[str, Any] | None:
    """Returns the checkpoint to go on from, None for a new run.

    Raises:
        CheckpointError: there is one and `resume` is False, or its run had other settings, which
            would not continue the same curve.
    """
    path = folder / _CHECKPOINT
    if not path.exists():
        return None
    if not resume:
        raise CheckpointError(
            f"{folder}: has the checkpoint of a run; resume it or write to another folder"
        )
    content: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    for name, value in settings.items():
        had = content["settings"].get(name)
        if had != value:
            raise CheckpointError(f"{name}: expected {had!r} as in the checkpoint, got {value!r}")
    return content


class Metrics:
    """The file metrics.jsonl: a line per step and per evaluation.

    Going on from a checkpoint, lines after it are dropped: they will be written again, equal.

    Args:
        folder: of the run.
        state: where the run is.
    """

    def __init__(self, folder: Path, state: TrainState) -> None:
        """See the class."""
        path, kept = folder / _METRICS, []
        if path.exists():
            # a killed run may have left half a line, without its end
            whole = path.read_text(encoding="utf-8").split("\n")[:-1]
            entries = [json.loads(line) for line in whole]
            here = (state.stage, state.step)
            kept = [e for e in entries if (e["stage"] - 1, e["step"]) <= here]
        path.write_text("".join(json.dumps(e) + "\n" for e in kept), encoding="utf-8")
        self._file: TextIO = path.open("a", encoding="utf-8")

    def write(self, **entry: Any) -> None:
        """Appends a line."""
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Ends."""
        self._file.close()
