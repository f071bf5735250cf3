"""`fastadapt gradients train`: a short training run with each loss, under the tracker."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastadapt._ops.checks import integer, number
from fastadapt.losses import RewardPenalizeLoss
from fastadapt.study.gradients.named_losses import LOSSES
from fastadapt.study.gradients.records import Row, settings_of, software, write_json, write_rows
from fastadapt.study.gradients.steps import Report
from fastadapt.tracking.gradients import analytic_gradients
from fastadapt.tracking.pair_contexts import (
    KINDS,
    encode_contexts,
    pairs_of_kind,
    pairs_that_fit,
    shared_rows,
)
from fastadapt.tracking.tracker import RewardPenalizeTracker
from fastadapt.training import reference_logps, response_log_odds, sides, training_steps
from fastadapt.training.pair_forms import Pair
from fastadapt.training.pairs import encode_pairs

# The two responses share their beginning, where DPO has no gradient at all.
EXAMPLE = Pair(
    "What is the capital of France?",
    "The capital of France is Paris, on the Seine.",
    "The capital of France is Lyon, on the coast.",
)


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Options of the training runs.

    Attributes:
        data: preference pairs, as `read_pairs` takes them.
        out: the folder for `training.csv`, `training_pairs.csv`, `training.json`.
        pairs: how many of them, the first ones that fit.
        batch: pairs a step, taken in turns.
        steps: of each run.
        max_length: tokens of a sequence; longer ones are left out, none is cut.
        learning_rate: of AdamW, without weight decay, all parameters.
        threads: of torch; None: its own choice.
    """

    data: Path
    out: Path
    pairs: int = 4
    batch: int = 4
    steps: int = 10
    max_length: int = 32
    learning_rate: float = 2e-5
    threads: int | None = None

    def __post_init__(self) -> None:
        """Checks the ranges."""
        for name, low in (("pairs", 2), ("batch", 1), ("steps", 2), ("max_length", 8)):
            integer(name, getattr(self, name), low)
        number("learning_rate", self.learning_rate, positive=True)


def run_training(
    model: Any,
    tokenizer: Any,
    options: TrainingOptions,
    *,
    name: str,
    report: Report = lambda phase, done, total: None,
) -> list[Row]:
    """Trains and writes `training.csv`; returns its rows, one per kind, loss and step.

    Args:
        model: a causal language model of transformers; its parameters change.
        tokenizer: its tokenizer.
        options: what to train.
        name: of the model, for the record.
        report: called with a phase, how much of it is done and its total.

    Raises:
        ValueError: fewer than two pairs fit.
    """
    if options.threads:
        torch.set_num_threads(options.threads)
    chosen = pairs_that_fit(tokenizer, options.data, options.pairs, options.max_length, least=2)
    settings = settings_of(options, len(chosen))
    record = {
        "model": name,
        "settings": settings,
        "software": software(),
        "losses": LOSSES,
        "example": slopes_of_example(model, tokenizer),
    }
    start = copy.deepcopy(model.state_dict())
    rows: list[Row] = []
    pairs: list[Row] = []
    for kind in KINDS:
        contexts = pairs_of_kind(kind, chosen)
        batches = [
            encode_contexts(tokenizer, contexts[i : i + options.batch])
            for i in range(0, len(contexts), options.batch)
        ]
        model.load_state_dict(start)
        references = [reference_logps(model, batch) for batch in batches]
        for label, weights in LOSSES.items():
            model.load_state_dict(start)
            phase = f"{kind}: {label}"
            report(phase, 0, options.steps)
            objective = RewardPenalizeLoss(weights)
            tracker = RewardPenalizeTracker(objective, interval=1, model=model, extra_forwards=True)
            turns = zip(itertools.cycle(batches), itertools.cycle(references), strict=False)
            taken = itertools.islice(turns, options.steps)
            _train(model, taken, tracker, options, lambda i, p=phase: report(p, i, options.steps))
            where = {"kind": kind, "loss": label}
            rows += [{**where, **_renamed(row)} for row in tracker.records]
            pairs += [{**where, **row} for row in tracker.pairs]
    model.load_state_dict(start)
    write_rows(options.out / "training.csv", rows)
    write_rows(options.out / "training_pairs.csv", pairs)
    write_json(options.out / "training.json", record)
    return rows


@torch.no_grad()
def slopes_of_example(model: Any, tokenizer: Any) -> dict[str, Any]:
    """Returns the tokens of a pair with a shared beginning, and ∂L/∂m of each loss at them.

    Returns:
        dict[str, Any]: "chosen" and "rejected", lists of token texts; "shared", how many rows of
        logits they share, the first of them with the same label; "slopes": by loss, ∂L/∂m of the
        chosen and of the rejected tokens, of one pair and with the model as its own reference.
    """
    batch = encode_pairs(tokenizer, [EXAMPLE])
    log_odds = response_log_odds(model, batch)
    chosen, rejected = sides(batch, log_odds)
    reference = reference_logps(model, batch)
    kept = batch.mask
    texts = [
        [tokenizer.decode([token]) for token in labels[mask].tolist()]
        for labels, mask in zip(batch.labels, kept, strict=True)
    ]
    slopes = {}
    for name, weights in LOSSES.items():
        found = analytic_gradients(weights, chosen, rejected, *reference)
        slopes[name] = [
            found[side].log_odds[0][mask].tolist()
            for side, mask in zip(("chosen", "rejected"), kept, strict=True)
        ]
    shared = int((shared_rows(batch)[0] & kept[0] & kept[1]).sum())
    return {"chosen": texts[0], "rejected": texts[1], "shared": shared, "slopes": slopes}


def _train(
    model: Any,
    turns: Any,
    tracker: RewardPenalizeTracker,
    options: TrainingOptions,
    on_step: Any,
) -> None:
    """Trains with one loss."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=options.learning_rate, weight_decay=0.0, fused=True
    )
    objective = tracker.objective
    assert objective is not None
    with tracker:
        steps = training_steps(model, tracker.watch(turns), objective, optimizer)
        for i, _ in enumerate(steps, start=1):
            on_step(i)


def _renamed(row: Row) -> Row:
    """Returns a record in which "loss" is the value, beside the name of the loss."""
    return {("value" if k == "loss" else k): v for k, v in row.items()}
