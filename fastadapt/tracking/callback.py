"""The tracker in transformers' `Trainer`."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from fastadapt.tracking.tracker import RewardPenalizeTracker


class TrackerCallback(TrainerCallback):
    """Attaches a tracker for the time of a training run and numbers its records.

    The objective of the tracker is what the trainer's loss calls, in `compute_loss_func` or in an
    overridden `compute_loss`. Steps are those of the optimizer: of the micro-batches of a step that
    is due the first is recorded. For ρ, shared rows and the cells (x⁺, y⁻) and (x⁻, y⁺) the loss
    function hands the tracker its batch: `tracker.see(batch)`.

    Args:
        tracker (RewardPenalizeTracker): not attached yet.
    """

    def __init__(self, tracker: RewardPenalizeTracker) -> None:
        """Keeps the tracker."""
        self.tracker = tracker

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attaches the tracker."""
        self.tracker.at_step(state.global_step)
        self.tracker.attach()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Says which step begins."""
        self.tracker.at_step(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Detaches the tracker."""
        self.tracker.detach()
