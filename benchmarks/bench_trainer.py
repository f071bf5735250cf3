"""A DPO step of `RewardPenalizeTrainer` beside one of trl's `DPOTrainer`: time and peak memory.

    fastadapt bench trainer --data PAIRS.jsonl.gz --threads 1 --out benchmarks/results/trainer.json

Both have the same model, batch, loss (`{"dpo": 1.0}`) and default settings: a step is the forward
of the reference, forward and backward of the policy and AdamW's update. Times are of steps in
turns in one process that holds both; the peak of resident memory, over what the trainer and its
models take before the first step, is of a process that holds one of them. malloc returns what is
freed there, so that the peak is of what is alive.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fastadapt._ops.linear.memory import PeakMemory, return_freed_blocks
from fastadapt.study._progress import progress_bar, stepper
from fastadapt.training.pairs import PAIRS, read_pairs
from fastadapt.training.pretrained import load_model
from fresh import in_fresh_process
from host import PACKAGES, host_record, quartiles, write_record

TRAINERS = ("trl", "fastadapt")
HEADS = ("trainable", "frozen")  # all parameters, or LoRA on the body's linear layers
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
RANK = 8


def main() -> None:
    """Measure every cell and write the JSON file."""
    options = _parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    record: dict[str, Any] = {
        "benchmark": "trainer",
        "host": host_record((*PACKAGES, "trl", "peft")),
        "settings": {
            "model": options.model or "SmolLM2-135M-Instruct",
            "data": options.data.name if options.data else "the demo's pairs",
            "batch": options.batch,
            "max_length": options.max_length,
            "steps": options.steps,
            "rank": RANK,
            "seed": options.seed,
        },
        "cells": [],
    }
    work = [(dtype, head) for dtype in options.dtypes for head in HEADS]
    with progress_bar(Console(stderr=True), auto_refresh=False) as bar:
        step = stepper(bar, "cells", len(work) * (1 + len(TRAINERS)))
        for dtype, head in work:
            cell: dict[str, Any] = {"dtype": dtype, "head": head}
            (seen,) = in_fresh_process(measure_time, dtype, head, options)
            cell |= seen
            step()
            cell["peak_mb"] = {}
            for name in TRAINERS:
                (peak,) = in_fresh_process(measure_memory, name, dtype, head, options)
                cell["peak_mb"][name] = peak
                step()
            record["cells"].append(cell)
    _print(record)
    if options.out:
        write_record(options.out, record)


def measure_time(dtype: str, head: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Quartiles of milliseconds of both trainers' steps and of their ratio, and the losses."""
    with tempfile.TemporaryDirectory() as folder:
        steppers = {name: Stepper(name, dtype, head, options, folder) for name in TRAINERS}
        for each in steppers.values():
            each.step(0)  # makes the optimizer's state, and meets what is slow the first time
        took: dict[str, list[float]] = {name: [] for name in TRAINERS}
        losses: dict[str, list[float]] = {name: [] for name in TRAINERS}
        for number in range(1, options.steps + 1):
            order = TRAINERS if number % 2 else TRAINERS[::-1]
            for name in order:
                start = time.perf_counter()
                loss = steppers[name].step(number)
                took[name].append(1e3 * (time.perf_counter() - start))
                losses[name].append(loss)
        ratios = [a / b for a, b in zip(took["trl"], took["fastadapt"], strict=True)]
        yield {
            "step_ms": {name: quartiles(ms, 1) for name, ms in took.items()},
            "trl_to_fastadapt": quartiles(ratios, 3),
            "losses": losses,
            "response_tokens": steppers["trl"].tokens,
        }


def measure_memory(
    name: str, dtype: str, head: str, options: argparse.Namespace
) -> Iterator[dict[str, int]]:
    """Megabytes resident before the first step, and the peak over them in two steps."""
    return_freed_blocks()
    with tempfile.TemporaryDirectory() as folder:
        stepper_ = Stepper(name, dtype, head, options, folder)
        with PeakMemory() as peak:
            stepper_.step(0)
            stepper_.step(1)
        yield {"before": round(peak.before / 1e6), "extra": round(peak.extra / 1e6)}


class Stepper:
    """A trainer that takes one step at a time."""

    def __init__(
        self, name: str, dtype: str, head: str, options: argparse.Namespace, folder: str
    ) -> None:
        """Builds the trainer with its reference."""
        import datasets
        import peft
        import trl

        from fastadapt.trl import RewardPenalizeTrainer

        torch.manual_seed(options.seed)
        if options.threads:
            torch.set_num_threads(options.threads)
        quiet = {"progress": lambda phase, done, total: None, "dtype": DTYPES[dtype]}
        model, tokenizer = load_model(options.model, fetch=True, **quiet)
        frozen = head == "frozen"
        reference = None if frozen else load_model(options.model, fetch=True, **quiet)[0]
        arguments = trl.DPOConfig(
            folder,
            per_device_train_batch_size=options.batch,
            max_length=options.max_length,
            learning_rate=1e-6,
            use_cpu=True,
            bf16=False,
            report_to=[],
            disable_tqdm=True,
            seed=options.seed,
        )
        config = peft.LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        pairs = read_pairs(options.data) if options.data else list(PAIRS)
        chosen = random.Random(options.seed).sample(pairs, options.batch)
        keys = ("prompt", "chosen", "rejected")
        rows = [dict(zip(keys, pair, strict=True)) for pair in chosen]
        kind: Any = trl.DPOTrainer if name == "trl" else RewardPenalizeTrainer
        self.trainer = kind(
            model,
            reference,
            arguments,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=config if frozen else None,
            **({} if name == "trl" else {"loss": {"dpo": 1.0}}),
        )
        self.trainer.current_gradient_accumulation_steps = 1
        trained = [p for p in self.trainer.model.parameters() if p.requires_grad]
        # unfused, its temporary tensors would be the peak of both
        self.optimizer = torch.optim.AdamW(trained, lr=arguments.learning_rate, fused=True)
        batch = next(iter(self.trainer.get_train_dataloader()))
        (self.batch,), self.counts = self.trainer.get_batch_samples(
            iter([batch]), 1, arguments.device
        )
        self.tokens = int(self.batch["completion_mask"].sum())

    def step(self, _: int) -> float:
        """Takes a step and returns its loss."""
        self.optimizer.zero_grad()
        loss = self.trainer.training_step(self.trainer.model, dict(self.batch), self.counts)
        self.optimizer.step()
        return float(loss)


def _print(record: dict[str, Any]) -> None:
    """Print the cells."""
    out = Console()
    for cell in record["cells"]:
        ours, theirs = (cell["step_ms"][name][1] for name in ("fastadapt", "trl"))
        peaks = [cell["peak_mb"][name]["extra"] for name in ("fastadapt", "trl")]
        out.print(
            f"{cell['dtype']}, {cell['head']} head: {ours:.0f} ms against {theirs:.0f} ms, "
            f"{peaks[0]} MB against {peaks[1]} MB"
        )


def _parse() -> argparse.Namespace:
    """Read the arguments."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--data", type=Path, help="preference pairs, JSON Lines or .gz (default: the demo's)")
    add("--out", type=Path, help="JSON file to write")
    add("--model", metavar="NAME_OR_PATH", help="default: SmolLM2-135M-Instruct")
    add("--steps", type=int, default=9, help="of each trainer (default: %(default)s)")
    add("--batch", type=int, default=2, help="pairs (default: %(default)s)")
    add("--max-length", type=int, default=256, help="tokens (default: %(default)s)")
    add("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="of the model")
    add("--seed", type=int, default=0)
    add("--threads", type=int, help="default: torch's own choice")
    options = parser.parse_args()
    for name, low in (("steps", 2), ("batch", 1), ("max_length", 2)):
        if getattr(options, name) < low:
            parser.error(f"{name}: expected at least {low}, got {getattr(options, name)}")
    return options


if __name__ == "__main__":
    main()
