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
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

from fastadapt import RewardPenalizeLoss
from fastadapt._ops.memory import PeakMemory, return_freed_blocks
from fastadapt.training import logits_log_odds, reference_logps, response_log_odds, training_steps
from fastadapt.training.pairs import Pair, encode_pairs, read_pairs
from fastadapt.training.pretrained import load_model, no_progress
from fresh import in_fresh_process
from harness import MODEL, PAIRS_FILE, SEED, Benchmark, Option, progress, settings_of
from timing import quartiles

LOSSES = {"dpo": 1.0, "exmate": 1.0}
VARIANTS = {"linear": response_log_odds, "logits": logits_log_odds}
METRICS = ("loss", "logps/chosen", "logps/rejected", "pairs/accuracies", "rewards/accuracies")
BENCHMARK = Benchmark(
    "train_preferences",
    __doc__,
    {
        "data": PAIRS_FILE,
        "model": MODEL,
        "steps": Option(30, least=1),
        "batch": Option(2, "pairs", least=1),
        "max_length": Option(256, "tokens", least=2),
        "learning_rate": Option(1e-5),
        "seed": SEED,
    },
)


@BENCHMARK
def main(options: argparse.Namespace, record: dict[str, Any]) -> None:
    """Train both ways, each in a process of its own."""
    pairs = choose_pairs(read_pairs(options.data), options.steps * options.batch, options.seed)
    names = ("model", "data", "steps", "batch", "max_length", "learning_rate", "seed")
    record["settings"] = {**settings_of(options, *names), "losses": LOSSES, "dtype": "float32"}
    record["variants"] = {}
    with progress("training", len(VARIANTS) * options.steps) as step:
        for name in VARIANTS:
            *seen, last = (
                (item, step())[0] for item in in_fresh_process(train, name, pairs, options)
            )
            curves = {key: [metrics[key] for metrics in seen] for key in METRICS}
            record["variants"][name] = {"curves": curves, **last}


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
    model, tokenizer = load_model(options.model, fetch=True, progress=no_progress)
    batches = [
        encode_pairs(
            tokenizer,
            pairs[i : i + options.batch],
            max_length=options.max_length,
            chat=False,
        )
        for i in range(0, len(pairs), options.batch)
    ]
    objective = RewardPenalizeLoss(LOSSES)
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


if __name__ == "__main__":
    sys.exit(main())
