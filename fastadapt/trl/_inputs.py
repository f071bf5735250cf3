"""What KTO and BCO compare rewards with: completions of other prompts, and a mean over the run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState


def after_other_prompts(
    inputs: Mapping[str, Tensor], sides: int, max_length: int | None
) -> dict[str, Tensor] | None:
    """Returns the rows of a batch with each completion behind the prompt of the next row.

    None if there is one row a side, which has no other prompt.

    As trl's `KTOTrainer` makes them: the mean of log P - log P_ref of such rows estimates the
    divergence from the reference.

    Args:
        inputs: per token (R, T): input_ids, attention_mask, completion_mask and any others; tokens
            on the left, prompts first.
        sides: how many parts of the rows, all with the same prompts, are rotated by themselves.
        max_length: where rows are cut.
    """
    completion = inputs["completion_mask"].bool()
    rows = len(completion) // sides
    if rows < 2:
        return None
    own = torch.arange(len(completion), device=completion.device)
    others = own.view(sides, rows).roll(1, 1).flatten()
    prompts = (inputs["attention_mask"].bool() & ~completion).sum(-1)[:, None]
    ends = prompts + completion.sum(-1)[others, None]
    width = int(ends.max()) if max_length is None else min(int(ends.max()), max_length)
    places = torch.arange(width, device=completion.device)[None]
    of_prompt, there = places < prompts, places < ends
    rows_of = torch.where(of_prompt, own[:, None], others[:, None])
    at = torch.where(of_prompt, places, places - prompts + prompts[others])
    at = at.clamp(max=completion.shape[1] - 1)
    moved = {name: x[rows_of, at] for name, x in inputs.items()}
    attended = there.to(inputs["attention_mask"].dtype)
    answered = (there & ~of_prompt).to(inputs["completion_mask"].dtype)
    return {**moved, "attention_mask": attended, "completion_mask": answered}


class RewardShift(TrainerCallback, ExportableState):
    """The mean of the rewards of a run so far, kept in its checkpoints: BCO's δ.

    Attributes:
        total: the sum of the rewards, a number or a scalar tensor.
        count: how many they are.
    """

    def __init__(self) -> None:
        self.total: Tensor | float = 0.0
        self.count: Tensor | float = 0.0

    def add(self, total: Tensor, count: Tensor) -> None:
        """Counts more rewards."""
        self.total, self.count = self.total + total.double(), self.count + count.double()

    def mean(self, like: Tensor) -> Tensor:
        """Returns the mean, a scalar float64 on the device of another tensor; 0 of none."""
        total, count = (
            torch.as_tensor(x, dtype=torch.float64, device=like.device)
            for x in (self.total, self.count)
        )
        return total / count.clamp(min=1)

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps."""
        return {"args": {}, "attributes": {k: float(getattr(self, k)) for k in ("total", "count")}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Continues the mean of a run that is resumed, begins anew otherwise."""
        # a checkpoint of another loss has none
        kept = state.stateful_callbacks.setdefault(type(self).__name__, self.state())["attributes"]
        resumed = state.global_step > 0
        self.total, self.count = (kept[k] if resumed else 0.0 for k in ("total", "count"))
