"""Tracks chosen and rejected responses during training, without changing the run.

The tracker listens to two modules through forward hooks: the objective, whose arguments are the
log-odds that the step has computed anyway, and the head of the model, which is called with the
hidden states (or its body, where a forward of trl scores what that returns). Both are detached;
nothing that the step uses is changed, and no random number is drawn.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastadapt._ops.checks import instance, integer
from fastadapt.losses import Responses, RewardPenalizeLoss
from fastadapt.tracking.displacement import Displacement, displacement
from fastadapt.tracking.metrics import (
    Row,
    cell_metrics,
    cells_coincide,
    loss_metrics,
    rho_metrics,
)
from fastadapt.tracking.pair_contexts import cross_cells
from fastadapt.training import LogOddsOf, Reference, response_log_odds, sides
from fastadapt.training.head import causal_of, evaluating, layer_of
from fastadapt.training.head_check import ask, head_of
from fastadapt.training.pairs import PairBatch

INTERVAL = 10  # objective calls between two records
Batches = tuple[PairBatch, Reference | None]
T = TypeVar("T", bound="RewardPenalizeTracker")


class RewardPenalizeTracker:
    """Records, at an interval, what training does to chosen and rejected responses.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from fastadapt import tracking, training
        >>> from fastadapt.training.pairs import TokenizedPair, pad_pairs
        >>> sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
        >>> batch = pad_pairs([TokenizedPair([1, 2], [3, 4, 5], [6], False)])
        >>> objective = RewardPenalizeLoss({"exmate": 1.0})
        >>> optimizer = torch.optim.SGD(model.parameters())
        >>> tracker = tracking.RewardPenalizeTracker(objective, interval=2, model=model)
        >>> with tracker:
        ...     batches = tracker.watch([(batch, None)] * 3)
        ...     steps = list(training.training_steps(model, batches, objective, optimizer))
        >>> [record["step"] for record in tracker.records], len(tracker.pairs)
        ([0, 2], 2)

    In a loop of your own, `tracker.see(batch)` before each step takes the place of `watch`. With
    transformers' `Trainer` use `fastadapt.tracking.TrackerCallback`. Only calls of
    the objective that build a graph count, so that evaluations in between are not recorded.

    A record is a dictionary of floats, ints and None:

    - "step", "loss".
    - Cells "chosen_in_chosen" log P(y⁺|x⁺), "rejected_in_rejected" log P(y⁻|x⁻),
      "rejected_in_chosen" log P(y⁻|x⁺) and "chosen_in_rejected" log P(y⁺|x⁻), each as ".../sum"
      (per response) and ".../token" (per token, mean over responses), nats, with "/p10", "/p50" and
      "/p90" over the responses. The last two cells are copies where x⁺ = x⁻ or y⁺ = y⁻ in all
      pairs; else they need `extra_forwards`, and without it, or without a batch, they are None.
      What the step computed is in the mode of training; extra forwards are in that of evaluation,
      before the step.
    - "margin" S⁺ - S⁻ and "accuracy", the share of pairs with S⁺ > S⁻.
    - "mass/chosen", "mass/rejected", "mass/other": Σ |∂L/∂z| on the labels of chosen responses, on
      those of rejected ones and on all other entries of the rows of logits. Where a batch is known,
      rows that a pair shares are one row, in which the two sides cancel or add up.
    - "weight/dpo_k" k (mean), "weight/exmate" coefficient times probability (mean),
      "weight/unlikelihood_odds" and ".../max" e^m (median, largest), of the losses there are.
    - "count/underflow": rejected responses whose P is below the normal float32 range.
      "count/dead_zone": rejected tokens of p > 1 - 1e-5, which published code clamps out of the
      gradient. "count/naive_inf": rejected tokens for which 1 - p is 0 in float32.
      "count/nonfinite": log-odds and slopes that are infinite or NaN. All of this record alone.
    - with a model: "rho/median", "rho/max", "rho/above_one" (pairs with ρ > 1), "rho/pairs".

    `pairs` holds a row per pair and record: step, place in the batch, rho, chosen_norm,
    rejected_norm, cross, flagged.

    Args:
        objective (RewardPenalizeLoss): the loss of the run.
        interval (int): of every so many steps the first is recorded.
        model (Any): a causal language model of transformers, for ρ and for extra forwards; None:
            log-odds alone are seen. The two products of N H V that ρ takes are the larger part of
            the tracker's cost.
        extra_forwards (bool): run the model on (x⁻, y⁺) and (x⁺, y⁻) where they are not among
            what the step computes.
        log_odds_of (LogOddsOf): as in `training_steps`, for the extra forwards.

    Raises:
        TypeError: an objective, an interval or a model of another type.
        ValueError: an interval below 1; extra forwards without a model; (when recording) a model
            without a batch that was seen, or one of another shape than the log-odds.
    """

    def __init__(
        self,
        objective: RewardPenalizeLoss,
        *,
        interval: int = INTERVAL,
        model: Any = None,
        extra_forwards: bool = False,
        log_odds_of: LogOddsOf = response_log_odds,
    ) -> None:
        instance("objective", objective, torch.nn.Module, "a RewardPenalizeLoss")
        interval = integer("interval", interval, 1)
        if model is not None:
            causal_of(model)
        if extra_forwards and model is None:
            raise ValueError("extra_forwards: expected a model to run, got None")
        self.records: list[Row] = []
        self.pairs: list[Row] = []
        self.interval = interval
        self.objective, self._model = objective, model
        self._extra, self._log_odds_of = extra_forwards, log_odds_of
        self._signature = inspect.signature(objective.forward)
        self._step = 0
        self._recorded: int | None = None
        self._follows = False  # the step comes from outside
        self._batch: PairBatch | None = None
        self._hidden: Tensor | None = None  # what the head read
        self._returned: Tensor | None = None  # what the body returned
        self._handles: list[Any] = []

    def __enter__(self: T) -> T:
        """Attaches the tracker."""
        self.attach()
        return self

    def __exit__(self, *_: object) -> None:
        """Detaches the tracker."""
        self.detach()

    def attach(self) -> None:
        """Starts listening to the objective and the model.

        Raises:
            RuntimeError: it listens already.
        """
        if self._handles:
            raise RuntimeError("tracker: expected one that is not attached, got an attached one")
        hook = self.objective.register_forward_hook(self._on_loss, with_kwargs=True)
        self._handles.append(hook)
        if self._model is not None:
            self._handles += [
                layer_of(self._model).register_forward_pre_hook(self._on_head),
                causal_of(self._model).base_model.register_forward_hook(self._on_body),
            ]

    def detach(self) -> None:
        """Stops listening; the records stay."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._hidden = self._returned = self._batch = None

    def watch(self, batches: Iterable[Batches]) -> Iterator[Batches]:
        """Yields the batches unchanged, and remembers each while its step is taken."""
        for item in batches:
            self.see(item[0])
            yield item

    def see(self, batch: PairBatch) -> None:
        """Remembers the batch of the next step."""
        instance("batch", batch, PairBatch, "a PairBatch")
        self._batch = batch

    def at_step(self, step: int) -> None:
        """Sets the number of the step, which the caller counts from now on."""
        self._step, self._follows = step, True

    @property
    def _due(self) -> bool:
        """Whether this step is recorded."""
        return self._step % self.interval == 0 and self._recorded != self._step

    def _on_body(self, body: Any, inputs: Any, output: Any) -> None:
        """Keeps the body's output in a step to be recorded."""
        if self._due and torch.is_grad_enabled():
            self._returned = output.last_hidden_state.detach()

    def _on_head(self, head: Any, inputs: tuple[Any, ...]) -> None:
        """Keeps the hidden states of a step to be recorded."""
        if self._due and torch.is_grad_enabled():
            self._hidden = inputs[0].detach()

    def _on_loss(
        self, objective: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Counts a call that builds a graph, and records it if its turn has come."""
        loss = output[0]
        if not (torch.is_grad_enabled() and loss.requires_grad):
            return
        if self._due:
            bound = self._signature.bind(*args, **kwargs)
            with torch.no_grad():
                others = bound.arguments.pop("inputs", {})
                self._record(float(loss), {**bound.arguments, **others})
            self._recorded, self._hidden, self._returned = self._step, None, None
        if not self._follows:
            self._step += 1

    def _record(self, loss: float, inputs: dict[str, Any]) -> None:
        """Adds one record."""
        chosen, rejected = (_detached(inputs.get(side)) for side in ("chosen", "rejected"))
        if chosen is None or rejected is None:
            raise ValueError("objective: expected calls with both sides, got one")
        inputs = {**inputs, "chosen": chosen, "rejected": rejected}
        batch = self._batch
        if batch is not None and batch.labels.shape != (
            2 * len(chosen.log_odds),
            chosen.log_odds.shape[-1],
        ):
            raise ValueError(
                f"batch: expected one seen for these log_odds, {tuple(chosen.log_odds.shape)} a "
                f"side, got labels {tuple(batch.labels.shape)}"
            )
        row: Row = {"step": self._step, "loss": loss}
        row |= cell_metrics(chosen, rejected, batch, self._cross(batch))
        row |= loss_metrics(self.objective, inputs, batch)
        if self._model is not None:
            found = self._displacement(batch)
            row |= rho_metrics(found)
            self.pairs += [
                {"step": self._step, "pair": i, **values}
                for i, values in enumerate(_per_pair(found))
            ]
        self.records.append(row)

    def _displacement(self, batch: PairBatch | None) -> Displacement:
        """Returns ρ of the batch, from the hidden states of the step."""
        states = self._returned if self._hidden is None else self._hidden
        if batch is None or states is None:
            missing = "batch that was seen" if batch is None else "forward pass"
            raise ValueError(f"model: expected a {missing} before the loss, got none")
        head = head_of(self._model)
        if self._hidden is None and not ask(self._model).direct:
            raise ValueError("model: expected one whose head reads what its body returns")
        return displacement(states[:, : batch.labels.shape[1]], batch.labels, head)

    def _cross(self, batch: PairBatch | None) -> tuple[Responses, Responses] | None:
        """Computes the cells (x⁻, y⁺) and (x⁺, y⁻) in evaluation mode, if asked for."""
        if not self._extra or batch is None or cells_coincide(batch):
            return None
        cross = cross_cells(batch)
        with evaluating(self._model):
            return sides(cross, self._log_odds_of(self._model, cross))


def _detached(side: Responses | None) -> Responses | None:
    """Returns a side without its graph."""
    return None if side is None else side._replace(log_odds=side.log_odds.detach())


def _per_pair(found: Displacement) -> Iterator[Row]:
    """Yields the numbers of each pair."""
    columns = zip(
        found.rho.tolist(),
        found.chosen.tolist(),
        found.rejected.tolist(),
        found.cross.tolist(),
        found.flagged.tolist(),
        strict=True,
    )
    names = ("rho", "chosen_norm", "rejected_norm", "cross", "flagged")
    for values in columns:
        yield dict(zip(names, values, strict=True))
