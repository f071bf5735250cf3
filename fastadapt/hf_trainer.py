"""transformers' `Trainer` without logits: a loss of margins, made inside the model's forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Trainer

from fastadapt.losses import Responses, mle_loss
from fastadapt.preferences import IGNORED
from fastadapt.training import forward_margins


class LogitsFreeTrainer(Trainer):
    """A `Trainer` for causal language models that never makes their logits.

    Its loss is that of the model's own forward, the cross-entropy of the next tokens, with
    `num_items_in_batch` and `average_tokens_across_devices` as transformers has them; the head's
    rows of ignored labels are not computed. A frozen head (LoRA) takes two products a step.
    Predictions, as `compute_metrics` sees them, are margins (B, T-1) instead of logits.

    Example:
        >>> trainer = LogitsFreeTrainer(model, args, train_dataset=dataset, data_collator=collator)
        >>> trainer.train()

    Args:
        objective: makes the loss of `Responses`, padded, whose `total_tokens` is
            `num_items_in_batch`; by default `mle_loss`.
        *rest, **named: as for `Trainer`; batches have "labels", not shifted, as usual.

    Raises:
        ValueError: what needs logits: `compute_loss_func`, `label_smoothing_factor`; or router
            logits, whose loss would be left out.
    """

    objective: Callable[[Responses], Tensor]

    def __init__(
        self, *rest: Any, objective: Callable[[Responses], Tensor] = mle_loss, **named: Any
    ) -> None:
        """See the class."""
        super().__init__(*rest, **named)
        self.objective = objective
        if self.compute_loss_func is not None or self.args.label_smoothing_factor:
            raise ValueError(
                "expected neither compute_loss_func nor label_smoothing_factor, which need logits; "
                "objective= has the loss"
            )
        config: Any = getattr(self.model, "config", None)
        if getattr(config, "output_router_logits", False):
            raise ValueError("model.config: expected output_router_logits=False, got True")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a batch, its share of the step's where `num_items_in_batch` is given."""
        rest = dict(inputs)
        labels = F.pad(rest.pop("labels")[:, 1:], (0, 1), value=IGNORED)
        margins = forward_margins(model, rest, labels)[:, :-1]
        responses = Responses.from_labels(
            margins, labels[:, :-1], ignore_index=IGNORED, total_tokens=num_items_in_batch
        )
        loss = self.objective(responses)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        return (loss, {"loss": loss, "margins": margins}) if return_outputs else loss
