"""A callback that runs the tracker in transformers' `Trainer`."""

from __future__ import annotations

import warnings
from typing import Any

from transformers import TrainerCallback

_STATE = "RewardPenalizeTracker"  # its place in the state of the trainer


class TrackerCallback(TrainerCallback):
    """Attaches a tracker during a training run and numbers its records.

    The objective of the tracker is what the trainer's loss calls, in `compute_loss_func` or in an
    overridden `compute_loss`. Steps are those of the optimizer: of the micro-batches of a step that
    is due the first is recorded. For ρ, shared rows and the cells (x⁺, y⁻) and (x⁻, y⁺) the loss
    function hands the tracker its batch: `tracker.see(batch)`; `fastadapt.tracking.track` does that
    for the trainers of pairs.

    Records are kept in the trainer's state, `trainer_state.json` of each checkpoint, those of the
    first process. A run that is resumed from one begins with them, and leaves out what was recorded
    after it; a checkpoint that has none is warned of.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
        >>> from fastadapt.tracking import RewardPenalizeTracker, TrackerCallback
        >>> tracker = RewardPenalizeTracker(RewardPenalizeLoss({"exmate": 1.0}), interval=2)
        >>> def loss_of(outputs, labels, **_):  # the first half of a batch is chosen
        ...     halves = zip(outputs.logits[:, :-1].chunk(2), labels[:, 1:].chunk(2))
        ...     return tracker.objective(*(Responses.from_labels(*half) for half in halves))[0]
        >>> sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
        >>> args = TrainingArguments("out", max_steps=3, save_strategy="no")
        >>> rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 8
        >>> trainer = Trainer(model, args, train_dataset=rows, compute_loss_func=loss_of)
        >>> trainer.add_callback(TrackerCallback(tracker))
        >>> result = trainer.train()
        {'train_runtime': ...}
        >>> [record["step"] for record in tracker.records]
        [0, 2]

    Args:
        tracker (RewardPenalizeTracker): not attached yet.

    Raises:
        TypeError: no tracker.
    """

    def __init__(self, tracker: Any) -> None:
        if not callable(getattr(tracker, "at_step", None)):
            expected = "expected a RewardPenalizeTracker"
            raise TypeError(f"tracker: {expected}, got {type(tracker).__name__}")
        self.tracker = tracker

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attaches the tracker, and finds the records of a run that is resumed."""
        kept = state.stateful_callbacks.get(_STATE)
        if state.global_step > 0 and kept is None:
            warnings.warn(
                f"the checkpoint has no records of a tracker: those before step "
                f"{state.global_step} are missing",
                stacklevel=2,
            )
        elif state.global_step > 0:
            self.tracker.restore(kept["records"], kept["pairs"])
        # the same lists, so that a checkpoint has what is recorded by then
        state.stateful_callbacks[_STATE] = {
            "records": self.tracker.records,
            "pairs": self.tracker.pairs,
        }
        self.tracker.at_step(state.global_step)
        self.tracker.detach()  # what a run that failed has left attached
        self.tracker.attach()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tells the tracker which step begins."""
        self.tracker.at_step(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Detaches the tracker."""
        self.tracker.detach()
