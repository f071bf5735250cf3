"""What `RewardPenalizeTracker` adds to a training run at its default interval, without forwards.

    python benchmarks/bench_tracker.py --out benchmarks/results/tracker.json

One call is as many training steps as the interval has, of which one is recorded: without a tracker,
with one that sees the log-odds, and with one that sees the model too and computes ρ. All three run
in every round, on the same model and pairs, the learning rate being 0 so that no call changes what
the next one does. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fastadapt import RewardPenalizeLoss
from fastadapt.tracking.tracker import INTERVAL, RewardPenalizeTracker
from fastadapt.training import reference_logps, training_steps
from fastadapt.training.pairs import PAIRS, encode_pairs, read_pairs
from fastadapt.training.pretrained import load_model
from host import host_record, quartiles, write_record
from limits import print_limits, tracker_limits
from timing import in_turns, ratios

MODES = ("none", "log_odds", "rho")


def main() -> None:
    """Time all modes in turns, print what it must show and write the JSON file."""
    options = _parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    host = host_record()
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
    record: dict[str, Any] = {
        "benchmark": "tracker",
        "host": host,
        "settings": {
            "model": options.model or "SmolLM2-135M-Instruct",
            "data": options.data.name if options.data else "built-in pairs",
            "interval": INTERVAL,
            "batch": options.batch,
            "positions": batch.labels.numel(),
            "response_tokens": int(batch.mask.sum()),
            "rounds": options.rounds,
        },
        "step_ms": {
            mode: quartiles([1e3 * s / INTERVAL for s in seconds[mode]], 2) for mode in MODES
        },
        "to_none": {
            mode: quartiles(ratios(seconds[mode], seconds["none"]), 4) for mode in MODES[1:]
        },
    }
    Console(stderr=True).print(record["step_ms"])
    print_limits(tracker_limits(record))
    if options.out:
        write_record(options.out, record)


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


def _parse() -> argparse.Namespace:
    """Read the arguments."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, help="JSON file to write")
    add("--model", metavar="NAME_OR_PATH", help="default: SmolLM2-135M-Instruct")
    add("--data", type=Path, help="pairs, JSON Lines or .gz (default: the built-in ones)")
    add("--batch", type=int, default=4, help="pairs (default: %(default)s)")
    add("--max-length", type=int, default=128, help="tokens (default: %(default)s)")
    add("--rounds", type=int, default=5, help="(default: %(default)s)")
    add("--threads", type=int, help="default: torch's own choice")
    options = parser.parse_args()
    for name, low in (("batch", 1), ("max_length", 2), ("rounds", 2)):
        if getattr(options, name) < low:
            parser.error(f"{name}: expected at least {low}, got {getattr(options, name)}")
    return options


if __name__ == "__main__":
    main()
