"""Tracks chosen and rejected responses during training, without changing the run.

The tracker listens to two modules through forward hooks: the objective, whose arguments are the
log-odds that the step has computed anyway, and the head of the model, which is called with the
hidden states (or its body, where a forward of trl scores what that returns). Both are detached;
nothing that the step uses is changed, and no random number is drawn.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastadapt._ops.checks import instance
from fastadapt.losses.mixture import RewardPenalizeLoss
from fastadapt.losses.responses import Responses
from fastadapt.tracking.displacement import Displacement, displacement
from fastadapt.tracking.metrics import (
    SLOPES,
    Row,
    cell_metrics,
    cells_coincide,
    counters,
    named_weights,
    rho_metrics,
    slope_metrics,
    slopes_of,
)
from fastadapt.tracking.pair_contexts import cross_cells
from fastadapt.training.head import causal_of, evaluating, layer_of
from fastadapt.training.head_check import ask, head_of
from fastadapt.training.log_odds import LogOddsOf
from fastadapt.training.pairs import PairBatch
from fastadapt.training.steps import Reference, sides

Batches = tuple[PairBatch, Reference | None]
T = TypeVar("T", bound="Recorder")


class Recorder:
    """Listens to a run and keeps its records; `RewardPenalizeTracker` says what they are.

    Args:
        objective: the loss of the run, None for that of a trainer or none.
        interval: of every so many steps the first is recorded.
        model: a causal language model, or None.
        rho: whether ρ is recorded where there is a model.
        extra_forwards: whether the cells that a step does not compute are.
        log_odds_of: by which.
    """

    def __init__(
        self,
        objective: RewardPenalizeLoss | None,
        interval: int,
        model: Any,
        rho: bool,
        extra_forwards: bool,
        log_odds_of: LogOddsOf,
    ) -> None:
        self.records: list[Row] = []
        self.pairs: list[Row] = []
        self.interval = interval
        self.objective, self._model = objective, model
        self._rho, self._extra, self._log_odds_of = rho, extra_forwards, log_odds_of
        self._step = 0
        self._recorded: int | None = None
        self._follows = False  # the step comes from outside
        self._batch: PairBatch | None = None
        self._unpaired = False  # whether the step was said to have no pairs
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
        if self.objective is not None:
            hook = self.objective.register_forward_hook(self._on_loss, with_kwargs=True)
            self._handles.append(hook)
        if self.needs_head:
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

    def restore(self, records: Iterable[Row], pairs: Iterable[Row]) -> None:
        """Goes on after the records of an earlier run, in place of its own."""
        self.records[:], self.pairs[:] = list(records), list(pairs)
        self._recorded = None

    def watch(self, batches: Iterable[Batches]) -> Iterator[Batches]:
        """Yields the batches unchanged, and remembers each while its step is taken."""
        for item in batches:
            self.see(item[0])
            yield item

    def see(self, batch: PairBatch | None) -> None:
        """Remembers the batch of the next step; None: its responses are no pairs."""
        if batch is not None:
            instance("batch", batch, PairBatch, "a PairBatch")
        self._batch, self._unpaired = batch, batch is None

    def take(self, objective: RewardPenalizeLoss | None, model: Any) -> None:
        """Takes the loss and the model of a run, where it has none of its own.

        Raises:
            ValueError: it has another objective.
        """
        if self.objective is not None and self.objective is not objective:
            raise ValueError(
                "tracker: expected one that has recorded no other run, or with this run's "
                "objective, got "
                f"one with {self.objective}"
            )
        self.objective = objective
        self._model = model if self._model is None else self._model

    def at_step(self, step: int) -> None:
        """Sets the number of the step, which the caller counts from now on."""
        self._step, self._follows = step, True

    @property
    def needs_head(self) -> bool:
        """Whether it reads the head of the model."""
        return self._model is not None and self._rho

    @property
    def due(self) -> bool:
        """Whether this step is still to be recorded."""
        return self._step % self.interval == 0 and self._recorded != self._step

    def _on_body(self, body: Any, inputs: Any, output: Any) -> None:
        """Keeps the body's output in a step to be recorded."""
        if self.due and torch.is_grad_enabled():
            self._returned = output.last_hidden_state.detach()

    def _on_head(self, head: Any, inputs: tuple[Any, ...]) -> None:
        """Keeps the hidden states of a step to be recorded."""
        if self.due and torch.is_grad_enabled():
            self._hidden = inputs[0].detach()

    def _on_loss(
        self, objective: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Counts a call that builds a graph, and records it if its turn has come."""
        loss = output[0]
        if not (torch.is_grad_enabled() and loss.requires_grad):
            return
        if self.due:
            bound = inspect.signature(objective.forward).bind(*args, **kwargs).arguments
            bound |= bound.pop("inputs", {})
            chosen, rejected = (_detached(bound.get(side)) for side in ("chosen", "rejected"))
            inputs = {**bound, "chosen": chosen, "rejected": rejected}
            row = self.record(
                float(loss.detach()), inputs["chosen"], rejected, slopes_of(objective, inputs)
            )
            with torch.no_grad():
                row |= named_weights(objective, inputs)
        if not self._follows:
            self._step += 1

    @torch.no_grad()
    def record(
        self,
        loss: float,
        chosen: Responses,
        rejected: Responses | None,
        slopes: Mapping[str, Tensor] | None = None,
    ) -> Row:
        """Adds a record of this step and returns it.

        Args:
            loss: of the step.
            chosen: its responses, without graphs.
            rejected: the same; None: it has none.
            slopes: ∂L/∂m of each side; None: not known yet, and what they say is None until
                `slope_metrics` is added to the record.
        """
        same = rejected is not None and len(chosen.log_odds) == len(rejected.log_odds)
        pairs = same and not self._unpaired
        batch = self._batch if pairs else None
        if batch is not None and batch.labels.shape != (
            2 * len(chosen.log_odds),
            chosen.log_odds.shape[-1],
        ):
            raise ValueError(
                f"batch: expected one seen for these log_odds, {tuple(chosen.log_odds.shape)} a "
                f"side, got labels {tuple(batch.labels.shape)}"
            )
        row: Row = {"step": self._step, "loss": loss}
        row |= cell_metrics(chosen, rejected, batch, self._cross(batch), pairs=pairs)
        if slopes is None:
            row |= dict.fromkeys(SLOPES)
        else:
            row |= slope_metrics(slopes, chosen, rejected, batch)
        row |= counters(chosen, rejected, slopes)
        if self.needs_head:
            found = self._displacement(batch) if pairs else None
            row |= rho_metrics(found)
            self.pairs += [
                {"step": self._step, "pair": i, **values}
                for i, values in enumerate(() if found is None else _per_pair(found))
            ]
        self.records.append(row)
        self._recorded, self._hidden, self._returned = self._step, None, None
        return row

    def _displacement(self, batch: PairBatch | None) -> Displacement:
        """Returns ρ of the batch, from the hidden states of the step."""
        states = self._returned if self._hidden is None else self._hidden
        if batch is None or states is None:
            missing = "batch that was seen" if batch is None else "forward pass"
            raise ValueError(f"model: expected a {missing} before the loss, got none")
        head = head_of(self._model)
        if self._hidden is None and not ask(self._model).direct:
            raise ValueError("model: expected one whose head reads what its body returns")
        return displacement(_of_tokens(states, batch), batch.labels, head)

    def _cross(self, batch: PairBatch | None) -> tuple[Responses, Responses] | None:
        """Computes the cells (x⁻, y⁺) and (x⁺, y⁻) in evaluation mode, if asked for."""
        if not self._extra or batch is None or cells_coincide(batch):
            return None
        cross = cross_cells(batch)
        with evaluating(self._model):
            return sides(cross, self._log_odds_of(self._model, cross))


def _of_tokens(states: Tensor, batch: PairBatch) -> Tensor:
    """Returns the states before labels, (2B, T - 1, H), of rows or of one row without padding.

    Raises:
        ValueError: states of other tokens.
    """
    there = batch.attention_mask.bool()
    rows, length = there.shape
    if states.shape[:2] == (1, int(there.sum())) and rows > 1:
        whole = states.new_zeros(rows, length, states.shape[2])
        return whole.masked_scatter(there[..., None], states)[:, :-1]
    if states.shape[0] != rows or states.shape[1] < length - 1:
        raise ValueError(
            f"batch: expected one whose tokens reached the head, {tuple(states.shape[:2])} states, "
            f"got tokens {tuple(there.shape)}"
        )
    # adapters of prompts put positions of their own before the tokens
    return states[:, -length:][:, : length - 1]


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
