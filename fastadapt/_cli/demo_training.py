"""The demo's second part: a few steps of DPO+ExMATE, and their memory without logits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastadapt import RewardPenalizeLoss
from fastadapt._ops.memory import PeakMemory, is_measurable
from fastadapt.training import (
    Reference,
    logits_log_odds,
    pair_loss,
    reference_logps,
    response_log_odds,
    training_steps,
)
from fastadapt.training.pairs import PAIRS, PairBatch, encode_pairs

BATCH = 4
LEARNING_RATE = 1e-5
LOSSES = {"dpo": 1.0, "exmate": 1.0}
_MEMORY_STEPS = 2
_WATCHED = ("logps/chosen", "logps/rejected", "pairs/accuracies")


@dataclass(frozen=True, kw_only=True)
class TrainingReport:
    """Metrics and memory of the demo's training steps.

    Attributes:
        steps: the metrics of each step, on its own pairs.
        before: over all pairs: mean log P of chosen and of rejected, how often chosen is ahead.
        after: the same after the last step.
        memory: peak bytes of one step over what was resident before it, without and with logits;
            None where the system cannot tell.
        logits: bytes of the full float32 logits of that step.
    """

    steps: list[dict[str, float]]
    before: dict[str, float]
    after: dict[str, float]
    memory: tuple[int, int] | None
    logits: int


def count_steps() -> int:
    """Returns how many times `train` reports progress."""
    batches = math.ceil(len(PAIRS) / BATCH)
    return 3 * batches + _MEMORY_STEPS


def train(model: Any, tokenizer: Any, *, on_step: Callable[[], None]) -> TrainingReport:
    """Trains a model in place for one epoch of the built-in pairs.

    Args:
        model: a causal language model of transformers, float32.
        tokenizer: its tokenizer.
        on_step: called after each piece of work, `count_steps()` times.
    """
    batches = [encode_pairs(tokenizer, PAIRS[i : i + BATCH]) for i in range(0, len(PAIRS), BATCH)]
    references = []
    for batch in batches:
        references.append(reference_logps(model, batch))
        on_step()
    objective = RewardPenalizeLoss(LOSSES)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    steps = []
    rows = zip(batches, references, strict=True)
    for seen in training_steps(model, rows, objective, optimizer):
        steps.append({name: float(value) for name, value in seen.items()})
        on_step()
    after = []
    for batch in batches:
        after.append(reference_logps(model, batch))
        on_step()
    largest = max(batches, key=lambda batch: batch.labels.numel())
    memory = _measure_memory(model, objective, largest, on_step)
    vocabulary = model.get_output_embeddings().weight.shape[0]
    return TrainingReport(
        steps=steps,
        before=_summary(references),
        after=_summary(after),
        memory=memory,
        logits=4 * largest.labels.numel() * vocabulary,
    )


def print_report(out: Console, report: TrainingReport) -> None:
    """Prints the second part of the demo."""
    table = Table(
        title=f"Training: {len(report.steps)} steps of DPO+ExMATE, {BATCH} pairs each",
        title_justify="left",
        caption="log P: of a response, mean. Ahead: pairs with P(chosen) > P(rejected)",
        caption_justify="left",
    )
    table.add_column("step")
    for name in ("loss", "log P\nchosen", "log P\nrejected", "chosen\nahead"):
        table.add_column(name, justify="right")
    for number, seen in enumerate(report.steps, start=1):
        table.add_row(str(number), f"{seen['loss']:.3f}", *_shown(seen))
    table.add_section()
    for label, seen in (("before", report.before), ("after", report.after)):
        table.add_row(f"all {len(PAIRS)} pairs, {label}", "", *_shown(seen))
    out.print(table)
    out.print(Text(_memory_text(report)))


def _shown(seen: Mapping[str, float]) -> list[str]:
    """Formats one row of the table."""
    chosen, rejected, ahead = (seen[name] for name in _WATCHED)
    return [f"{chosen:.2f}", f"{rejected:.2f}", f"{100 * ahead:.0f} %"]


def _memory_text(report: TrainingReport) -> str:
    """Describes the memory that a step takes."""
    if report.memory is None:
        return "\nMemory of a step: not measured, this system does not tell the peak."
    without, with_logits = (round(size / 1e6) for size in report.memory)
    return (
        f"\nPeak memory of a step's forward and backward beside model and gradients: {without} MB "
        f"through linear_log_odds, {with_logits} MB through full logits (one float32 copy of "
        f"which takes {report.logits / 1e6:.0f} MB)."
    )


def _summary(logps: Sequence[Reference]) -> dict[str, float]:
    """Averages log P of the chosen and the rejected responses over all pairs."""
    chosen, rejected = (torch.cat(side) for side in zip(*logps, strict=True))
    values = (chosen.mean(), rejected.mean(), (chosen > rejected).float().mean())
    return {name: float(value) for name, value in zip(_WATCHED, values, strict=True)}


def _measure_memory(
    model: Any, objective: RewardPenalizeLoss, batch: PairBatch, on_step: Callable[[], None]
) -> tuple[int, int] | None:
    """Measures a step's peak memory without and with logits, beyond model and gradients."""
    if not is_measurable():
        for _ in range(_MEMORY_STEPS):
            on_step()
        return None
    peaks = []
    for log_odds_of in (response_log_odds, logits_log_odds):
        reference = reference_logps(model, batch, log_odds_of=log_odds_of)
        model.zero_grad(set_to_none=False)  # gradients stay where they are: not part of the peak
        with PeakMemory() as peak:
            loss, _ = pair_loss(model, batch, objective, reference, log_odds_of=log_odds_of)
            loss.backward()
        peaks.append(peak.extra)
        del loss
        on_step()
    return peaks[0], peaks[1]
