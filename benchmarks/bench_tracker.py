"""What `RewardPenalizeTracker` adds to a training run at its default interval, without forwards.

    python benchmarks/bench_tracker.py --out benchmarks/results/tracker.json

One call is as many training steps as the interval has, of which one is recorded: without a tracker,
with one that sees the log-odds, and with one that sees the model too and computes ρ. All three run
in every round, on the same model and pairs, the learning rate being 0 so that no call changes what
the next one does. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastadapt import RewardPenalizeLoss
from fastadapt.tracking.tracker import INTERVAL, RewardPenalizeTracker
from fastadapt.training import reference_logps, training_steps
from fastadapt.training.pairs import PAIRS, encode_pairs, read_pairs
from fastadapt.training.pretrained import load_model
from harness import MODEL, Benchmark, Option, settings_of
from timing import in_turns, milliseconds, ratios

MODES = ("none", "log_odds", "rho")
BENCHMARK = Benchmark(
    "tracker",
    __doc__,
    {
        "model": MODEL,
        "data": Option(help="pairs, JSON Lines or .gz (default: the built-in ones)", kind=Path),
        "batch": Option(4, "pairs", least=1),
        "max_length": Option(128, "tokens", least=2),
        "rounds": Option(5, least=2),
    },
)


@BENCHMARK
def main(options: argparse.Namespace, record: dict[str, Any]) -> None:
    """Time all modes in turns."""
    model, tokenizer = load_model(options.model, fetch=True)
    pairs = read_pairs(options.data) if options.data else list(PAIRS)
    batch = encode_pairs(
        tokenizer,
        pairs[: options.batch],
        max_length=options.max_length,
        chat=options.data is None,
    )
    seconds = in_turns(
        {mode: training_call(mode, model, batch) for mode in MODES},
        rounds=options.rounds,
        least_rounds=options.rounds,
    )
    record["settings"] = {
        **settings_of(options, "model", "batch", "rounds"),
        "data": options.data.name if options.data else "built-in pairs",
        "interval": INTERVAL,
        "positions": batch.labels.numel(),
        "response_tokens": int(batch.mask.sum()),
    }
    record["step_ms"] = {
        mode: milliseconds([s / INTERVAL for s in seconds[mode]], 2) for mode in MODES
    }
    record["to_none"] = ratios(seconds, "none", MODES[1:])


def training_call(mode: str, model: Any, batch: Any) -> Callable[[int], None]:
    """A call that takes `INTERVAL` steps, the first of which the tracker records."""
    objective = RewardPenalizeLoss({"dpo": 1.0, "exmate": 1.0})
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, fused=True)
    rows = [(batch, reference_logps(model, batch))] * INTERVAL

    def call(turn: int) -> None:
        if mode == "none":
            for _ in training_steps(model, rows, objective, optimizer):
                pass
            return
        seen = model if mode == "rho" else None
        with RewardPenalizeTracker(objective, model=seen) as tracker:
            for _ in training_steps(model, tracker.watch(rows), objective, optimizer):
                pass
        if len(tracker.records) != 1:
            raise RuntimeError(f"tracker: expected one record a call, got {len(tracker.records)}")

    return call


if __name__ == "__main__":
    sys.exit(main())
