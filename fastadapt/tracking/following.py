"""Follows a trainer's run: its batches are handed to a tracker, and of trl's DPO its losses too.

trl's `DPOTrainer` has no mixture to listen to. Its `compute_loss` is called through a function
that sees the batch, what the model returned (log-probabilities of the labels) and the loss; the
slopes ∂L/∂log p come with the run's own backward, from hooks that change nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastadapt._ops.checks import instance
from fastadapt.losses.mixture import RewardPenalizeLoss
from fastadapt.losses.responses import Responses
from fastadapt.tracking.callback import TrackerCallback
from fastadapt.tracking.metrics import NAIVE_INF, Row, counters, slope_metrics
from fastadapt.training.head import HeadError, causal_of, is_gathered, layer_of
from fastadapt.training.pairs import IGNORED, PairBatch

_TOKENS = {"input_ids", "attention_mask", "completion_mask"}  # of a batch of trl
_CERTAIN = NAIVE_INF + 1  # log-odds of a log-probability that is rounded to 0


class Following(TrackerCallback):
    """The callback of `track`.

    Args:
        tracker: not attached yet.
        trainer: as of `track`.
    """

    def __init__(self, tracker: Any, trainer: Any) -> None:
        super().__init__(tracker)
        if not hasattr(trainer, "callback_handler"):
            got = type(trainer).__name__
            raise TypeError(f"trainer: expected one of transformers' kind, got {got}")
        if any(isinstance(x, Following) for x in trainer.callback_handler.callbacks):
            raise ValueError("trainer: expected one without a tracker, got one that is followed")
        objective = getattr(trainer, "mixture", None)
        if objective is None and not hasattr(trainer, "loss_types"):
            raise TypeError(
                "trainer: expected one with a mixture, a RewardPenalizeLoss, or trl's "
                f"DPOTrainer, got {type(trainer).__name__}"
            )
        if objective is not None:
            instance("trainer.mixture", objective, RewardPenalizeLoss, "a RewardPenalizeLoss")
        tracker.take(objective, trainer.model)
        if tracker.needs_head:
            _check_whole(trainer.model)
        self._trainer, self._follows_loss = trainer, objective is None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attaches the tracker, and sees the batches from now on."""
        super().on_train_begin(args, state, control, **kwargs)
        self._unfollow()
        self._trainer.compute_loss = self._seen(self._trainer.compute_loss)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Detaches the tracker."""
        super().on_train_end(args, state, control, **kwargs)
        self._unfollow()

    def _unfollow(self) -> None:
        """Leaves the trainer's own function, which a run that failed has not found again."""
        self._trainer.__dict__.pop("compute_loss", None)

    def _seen(self, compute_loss: Any) -> Any:
        """Returns a function that computes the same, and tells the tracker."""

        def compute(model: Any, inputs: Mapping[str, Any], *rest: Any, **named: Any) -> Any:
            if not torch.is_grad_enabled() or not self.tracker.due:
                return compute_loss(model, inputs, *rest, **named)
            if inputs.keys() >= _TOKENS:
                self.tracker.see(pair_batch(inputs))
            if not self._follows_loss:
                return compute_loss(model, inputs, *rest, **named)
            returned: list[Any] = []

            def seen(*arguments: Any, **given: Any) -> Any:
                output = model(*arguments, **given)
                returned.append(output)
                return output

            result = compute_loss(seen, inputs, *rest, **named)
            self._record(result[0] if isinstance(result, tuple) else result, returned, inputs)
            return result

        return compute

    def _record(self, loss: Tensor, returned: list[Any], inputs: Mapping[str, Any]) -> None:
        """Adds a record of trl's loss, and completes it in the backward."""
        batch = pair_batch(inputs)
        logps = getattr(returned[0], "log_probs", None) if returned else None
        if batch is None or logps is None or not logps.requires_grad:
            raise RuntimeError(
                "trainer: expected a loss of pairs from the log_probs of one call of the model, as "
                f"of trl's DPOTrainer in trl 1.16.0, got {type(self._trainer).__name__}"
            )
        width = batch.labels.shape[1]
        log_odds = log_odds_of(logps.detach()[:, -width:])
        sides = [
            Responses(*parts) for parts in zip(log_odds.chunk(2), batch.mask.chunk(2), strict=True)
        ]
        row = self.tracker.record(float(loss.detach()), sides[0], sides[1])
        row["weight/dpo_k"] = None
        scale: list[Tensor] = []

        def on_loss(gradient: Tensor) -> None:
            scale.append(gradient.detach().double())

        def on_logps(gradient: Tensor) -> None:
            self._complete(row, gradient[:, -width:].double() / scale[-1], sides, batch)

        loss.register_hook(on_loss)
        logps.register_hook(on_logps)

    @torch.no_grad()
    def _complete(
        self, row: Row, by_logp: Tensor, sides: list[Responses], batch: PairBatch
    ) -> None:
        """Adds what the gradient says to a record."""
        parts = zip(
            ("chosen", "rejected"), by_logp.chunk(2), sides, batch.mask.chunk(2), strict=True
        )
        slopes = {
            name: torch.where(counts, g * torch.sigmoid(-side.log_odds), 0.0)
            for name, g, side, counts in parts
        }
        row |= slope_metrics(slopes, sides[0], sides[1], batch)
        row |= counters(sides[0], sides[1], slopes)
        if list(self._trainer.loss_types) == ["sigmoid"]:
            row["weight/dpo_k"] = row["weight/rejected"]


def pair_batch(inputs: Mapping[str, Any]) -> PairBatch | None:
    """Returns a batch of trl, chosen responses before rejected ones, or None if it has no pairs.

    Those of unpaired responses have a label each.
    """
    if not inputs.keys() >= _TOKENS or "label" in inputs:
        return None
    tokens = inputs["input_ids"]
    labels = tokens.masked_fill(inputs["completion_mask"] == 0, IGNORED)
    return PairBatch(tokens, inputs["attention_mask"], labels[:, 1:])


def log_odds_of(logps: Tensor) -> Tensor:
    """Returns log p - log(1 - p), float64; one that is rounded to 0 counts as p > 1 - 2^-24."""
    x = logps.double().clamp(max=0)
    m = x - torch.log(-torch.expm1(x))
    return torch.where(x == 0, _CERTAIN, m)


def _check_whole(model: Any) -> None:
    """Raises unless the head's matrix is there between its own passes."""
    layer = layer_of(causal_of(model))
    if is_gathered(layer):
        raise HeadError(
            "tracker: expected a head that is whole on each process, or rho=False, got "
            f"{type(layer).__name__} gathered for its own forward"
        )
