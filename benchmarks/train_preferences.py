"""A real training run, with and without logits: the same loss curve, in less memory.

    python benchmarks/train_preferences.py --data PAIRS.jsonl.gz \\
        --out benchmarks/results/train_preferences.json

SmolLM2-135M-Instruct takes some steps of DPO+ExMATE on preference pairs in the form of HH-RLHF,
all parameters, float32, AdamW: once through `linear_log_odds`, once from the full logits. Both
have the same batches and the same start, and each a process of its own, so that the peak of its
resident memory, over what the loaded model takes, is its own. The logits go through
`label_log_odds`, which makes no further copy of them, as plain PyTorch would. malloc returns what
is freed in both, so that the peak is of what is alive; that makes the steps a little slower.
"""

from __future__ import annotations

import argparse
import itertools
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fastadapt import RewardPenalizeLoss
from fastadapt._ops.linear.memory import PeakMemory, return_freed_blocks
from fastadapt.study._progress import progress_bar, stepper
from fastadapt.training import logits_log_odds, reference_logps, response_log_odds, training_steps
from fastadapt.training.pairs import Pair, encode_pairs, read_pairs
from fastadapt.training.pretrained import load_model
from fresh import in_fresh_process
from host import host_record, quartiles, write_record
from limits import print_limits, train_limits

VARIANTS = {"linear": response_log_odds, "logits": logits_log_odds}
METRICS = ("loss", "logps/chosen", "logps/rejected", "pairs/accuracies", "rewards/accuracies")


def main() -> None:
    """Train both ways, print what it must show and write the JSON file."""
    options = _parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    pairs = choose_pairs(read_pairs(options.data), options.steps * options.batch, options.seed)
    record: dict[str, Any] = {
        "benchmark": "train_preferences",
        "host": host_record(),
        "settings": {
            "model": options.model or "SmolLM2-135M-Instruct",
            "data": options.data.name,
            "losses": {"dpo": 1.0, "exmate": 1.0},
            "steps": options.steps,
            "batch": options.batch,
            "max_length": options.max_length,
            "learning_rate": options.learning_rate,
            "dtype": "float32",
            "seed": options.seed,
        },
        "variants": {},
    }
    with progress_bar(Console(stderr=True), auto_refresh=False) as bar:
        step = stepper(bar, "training", len(VARIANTS) * options.steps)
        for name in VARIANTS:
            *seen, last = (
                (item, step())[0] for item in in_fresh_process(train, name, pairs, options)
            )
            curves = {key: [metrics[key] for metrics in seen] for key in METRICS}
            record["variants"][name] = {"curves": curves, **last}
    print_limits(train_limits(record))
    if options.out:
        write_record(options.out, record)


def choose_pairs(pairs: list[Pair], count: int, seed: int) -> list[Pair]:
    """As many pairs as asked for, without repetition while there are new ones, in random order."""
    if not pairs:
        raise ValueError("data: expected at least one pair, got none")
    shuffled = random.Random(seed).sample(pairs, len(pairs))
    return list(itertools.islice(itertools.cycle(shuffled), count))


def train(name: str, pairs: list[Pair], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Trains one variant: yields what each step saw, then times and memory."""
    return_freed_blocks()
    torch.manual_seed(options.seed)
    if options.threads:
        torch.set_num_threads(options.threads)
    log_odds_of = VARIANTS[name]
    quiet = {"progress": lambda phase, done, total: None}
    model, tokenizer = load_model(options.model, fetch=True, **quiet)
    batches = [
        encode_pairs(
            tokenizer,
            pairs[i : i + options.batch],
            max_length=options.max_length,
            chat=False,
        )
        for i in range(0, len(pairs), options.batch)
    ]
    objective = RewardPenalizeLoss({"dpo": 1.0, "exmate": 1.0})
    # unfused, its temporary tensors would be the peak of both
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, fused=True)
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    sum(float(p.detach().sum()) for p in model.parameters())  # a mapped file is resident once read
    seconds: list[float] = []
    with PeakMemory() as peak:
        references = [reference_logps(model, batch, log_odds_of=log_odds_of) for batch in batches]
        rows = zip(batches, references, strict=True)
        start = time.perf_counter()
        for seen in training_steps(model, rows, objective, optimizer, log_odds_of=log_odds_of):
            seconds.append(time.perf_counter() - start)
            yield {key: float(seen[key]) for key in METRICS}
            start = time.perf_counter()
    yield {
        "step_s": quartiles(seconds, 3),
        "memory_mb": {
            "before": round(peak.before / 1e6),
            "extra": round(peak.extra / 1e6),
            "gradients_and_optimizer": round(3 * parameters / 1e6),  # part of it
        },
        "positions": [batch.labels.numel() for batch in batches],
        "response_tokens": [int(batch.mask.sum()) for batch in batches],
    }


def _parse() -> argparse.Namespace:
    """Read the arguments."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--data", type=Path, required=True, help="JSON Lines of chosen and rejected, or .gz")
    add("--out", type=Path, help="JSON file to write")
    add("--model", metavar="NAME_OR_PATH", help="default: SmolLM2-135M-Instruct")
    add("--steps", type=int, default=30, help="(default: %(default)s)")
    add("--batch", type=int, default=2, help="pairs (default: %(default)s)")
    add("--max-length", type=int, default=256, help="tokens (default: %(default)s)")
    add("--learning-rate", type=float, default=1e-5, help="(default: %(default)s)")
    add("--seed", type=int, default=0)
    add("--threads", type=int, help="default: torch's own choice")
    options = parser.parse_args()
    for name, low in (("steps", 1), ("batch", 1), ("max_length", 2)):
        if getattr(options, name) < low:
            parser.error(f"{name}: expected at least {low}, got {getattr(options, name)}")
    return options


if __name__ == "__main__":
    main()
