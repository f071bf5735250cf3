"""`fastadapt gradients step`: the effect of one head step on a pair, predicted and measured.

The same pairs in five situations: as preference data, whose two responses share the prompt and
little else, and as one response in the right and in a wrong context, which share all tokens; from
the head as it is, after MLE on the chosen responses and after MLE on the rejected ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastadapt._ops.checks import integer
from fastadapt.losses import RewardPenalizeLoss
from fastadapt.study.gradients.one_step import (
    FORWARD_BATCH,
    head_copy,
    pair_features,
    step_records,
    trained_head,
)
from fastadapt.study.gradients.records import Row, settings_of, software, write_json, write_rows
from fastadapt.tracking.pair_contexts import pairs_of_kind, pairs_that_fit

STARTS = {"base": None, "MLE on chosen": "chosen", "MLE on rejected": "rejected"}
# of the pairs, how many: whole where ρ decides, half where it does not
SITUATIONS = (
    ("same-prompt", "base", 1.0),
    ("same-prompt", "MLE on chosen", 0.5),
    ("same-prompt", "MLE on rejected", 0.5),
    ("same-response", "base", 0.5),
    ("same-response", "MLE on chosen", 1.0),
)
LOSSES = {"dpo": {"dpo": 1.0}, "exmate": {"exmate": 1.0}}
Report = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """Options of the single steps.

    Attributes:
        data: preference pairs, as `read_pairs` takes them.
        out: the folder for `steps.csv` and `steps.json`.
        pairs: how many of them, the first ones that fit.
        max_length: tokens of a sequence; longer ones are left out, none is cut.
        sizes: nats; of steps of DPO. The first one is also that of ExMATE.
        fit_rate: learning rate of AdamW where the head is trained first.
        fit_epochs: times through the pairs.
        threads: of torch; None: its own choice.
    """

    data: Path
    out: Path
    pairs: int = 200
    max_length: int = 64
    sizes: tuple[float, ...] = (0.1, 1.0)
    fit_rate: float = 1e-3
    fit_epochs: int = 8
    threads: int | None = None

    def __post_init__(self) -> None:
        """Checks the ranges."""
        for name, low in (("pairs", 4), ("max_length", 8), ("fit_epochs", 1)):
            integer(name, getattr(self, name), low)
        if not self.sizes or min(self.sizes) <= 0:
            raise ValueError(f"sizes: expected values > 0, got {self.sizes}")


def run_steps(
    model: Any,
    tokenizer: Any,
    options: StepOptions,
    *,
    name: str,
    report: Report = lambda phase, done, total: None,
) -> list[Row]:
    """Measures the steps and writes `steps.csv`; returns its rows.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        options: what to measure.
        name: of the model, for the record.
        report: called with a phase, how much of it is done and its total.

    Raises:
        ValueError: fewer than four pairs fit.
    """
    if options.threads:
        torch.set_num_threads(options.threads)
    chosen = pairs_that_fit(tokenizer, options.data, options.pairs, options.max_length, least=4)
    objectives = {k: RewardPenalizeLoss(weights) for k, weights in LOSSES.items()}
    sizes = {"dpo": options.sizes, "exmate": options.sizes[:1]}
    base = head_copy(model)
    rows: list[Row] = []
    kept: dict[str, Any] = {}
    for kind, start, share in SITUATIONS:
        if kind not in kept:
            phase = f"{kind}: hidden states"
            done = _Counter(report, phase, -(-len(chosen) // FORWARD_BATCH))
            kept = {
                kind: pair_features(model, tokenizer, pairs_of_kind(kind, chosen), on_step=done)
            }
        features = kept[kind][: max(2, round(share * len(chosen)))]
        head, side = base, STARTS[start]
        if side is not None:
            steps = options.fit_epochs * -(-len(features) // 20)
            head = trained_head(
                base,
                features,
                side=side,
                learning_rate=options.fit_rate,
                epochs=options.fit_epochs,
                on_step=_Counter(report, f"{kind}: {start}", steps),
            )
        done = _Counter(report, f"{kind}, {start}: steps", len(features))
        for i, pair in enumerate(features):
            where = {"kind": kind, "start": start, "pair": i}
            rows += [{**where, **row} for row in step_records(head, pair, objectives, sizes)]
            done()
    write_rows(options.out / "steps.csv", rows)
    settings = settings_of(options, len(chosen))
    write_json(
        options.out / "steps.json", {"model": name, "settings": settings, "software": software()}
    )
    return rows


def signs(rows: Sequence[Mapping[str, Any]], side: str = "chosen") -> tuple[int, int]:
    """Returns how many rows have the predicted sign, and the number of rows."""
    right = [row[f"predicted_{side}"] * row[f"measured_{side}"] > 0 for row in rows]
    return sum(right), len(right)


def select(rows: Sequence[Row], **values: Any) -> list[Row]:
    """Returns the rows with the given values."""
    return [row for row in rows if all(row[k] == v for k, v in values.items())]


class _Counter:
    """Reports one more step done on each call."""

    def __init__(self, report: Report, phase: str, total: int) -> None:
        self.report, self.phase, self.total, self.done = report, phase, total, 0
        report(phase, 0, total)

    def __call__(self) -> None:
        self.done += 1
        self.report(self.phase, self.done, self.total)
