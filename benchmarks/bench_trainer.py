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
import itertools
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from cases import DTYPES
from fastadapt._ops.memory import PeakMemory, return_freed_blocks
from fastadapt.training.pairs import PAIRS, read_pairs
from fastadapt.training.pretrained import load_model, no_progress
from fresh import in_fresh_process
from harness import MODEL, SEED, Axis, Benchmark, Option, progress, settings_of
from timing import in_turns, milliseconds, ratios

TRAINERS = ("trl", "fastadapt")
HEADS = ("trainable", "frozen")  # all parameters, or LoRA on the body's linear layers
RANK = 8
BENCHMARK = Benchmark(
    "trainer",
    __doc__,
    {
        "data": Option(help="preference pairs, JSON Lines or .gz (default: the demo's)", kind=Path),
        "model": MODEL,
        "steps": Option(9, "of each trainer", least=2),
        "batch": Option(2, "pairs", least=1),
        "max_length": Option(256, "tokens", least=2),
        "dtypes": Axis(tuple(DTYPES)),
        "seed": SEED,
    },
    ("trl", "peft"),
)


@BENCHMARK
def main(options: argparse.Namespace, record: dict[str, Any]) -> None:
    """Measure every cell, each time and peak in a process of its own."""
    record["settings"] = {
        **settings_of(options, "model", "batch", "max_length", "steps", "seed"),
        "data": options.data.name if options.data else "the demo's pairs",
        "rank": RANK,
    }
    record["cells"] = []
    work = list(itertools.product(options.dtypes, HEADS))
    with progress("cells", len(work) * (1 + len(TRAINERS))) as step:
        for dtype, head in work:
            cell: dict[str, Any] = {"dtype": dtype, "head": head, "peak_mb": {}}
            (seen,) = in_fresh_process(measure_time, dtype, head, options)
            cell |= seen
            step()
            for name in TRAINERS:
                (peak,) = in_fresh_process(measure_memory, name, dtype, head, options)
                cell["peak_mb"][name] = peak
                step()
            record["cells"].append(cell)


def measure_time(dtype: str, head: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Quartiles of milliseconds of both trainers' steps and of their ratio, and the losses."""
    with tempfile.TemporaryDirectory() as folder:
        steppers = {name: Stepper(name, dtype, head, options, folder) for name in TRAINERS}
        steps = {name: each.step for name, each in steppers.items()}
        # before them one that makes the optimizer's state, and meets what is slow the first time
        took = in_turns(steps, rounds=options.steps, slice_s=0.0, least_rounds=options.steps)
        yield {
            "step_ms": {name: milliseconds(seconds) for name, seconds in took.items()},
            "trl_to_fastadapt": ratios(took, "fastadapt", ("trl",), 3)["trl"],
            "losses": {name: each.losses[1:] for name, each in steppers.items()},
            "response_tokens": steppers["trl"].tokens,
        }


def measure_memory(
    name: str, dtype: str, head: str, options: argparse.Namespace
) -> Iterator[dict[str, int]]:
    """Megabytes resident before the first step, and the peak over them in two steps."""
    return_freed_blocks()
    with tempfile.TemporaryDirectory() as folder:
        stepper = Stepper(name, dtype, head, options, folder)
        with PeakMemory() as peak:
            stepper.step(0)
            stepper.step(1)
        yield {"before": round(peak.before / 1e6), "extra": round(peak.extra / 1e6)}


class Stepper:
    """A trainer that takes one step at a time."""

    def __init__(
        self, name: str, dtype: str, head: str, options: argparse.Namespace, folder: str
    ) -> None:
        import datasets
        import peft
        import trl

        from fastadapt.trl import RewardPenalizeTrainer

        torch.manual_seed(options.seed)
        if options.threads:
            torch.set_num_threads(options.threads)
        quiet = {"progress": no_progress, "dtype": DTYPES[dtype]}
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
        self.losses: list[float] = []
        self.trainer.current_gradient_accumulation_steps = 1
        trained = [p for p in self.trainer.model.parameters() if p.requires_grad]
        # unfused, its temporary tensors would be the peak of both
        self.optimizer = torch.optim.AdamW(trained, lr=arguments.learning_rate, fused=True)
        batch = next(iter(self.trainer.get_train_dataloader()))
        (self.batch,), self.counts = self.trainer.get_batch_samples(
            iter([batch]), 1, arguments.device
        )
        self.tokens = int(self.batch["completion_mask"].sum())

    def step(self, _: int) -> None:
        """Takes a step and keeps its loss."""
        self.optimizer.zero_grad()
        loss = self.trainer.training_step(self.trainer.model, dict(self.batch), self.counts)
        self.optimizer.step()
        self.losses.append(float(loss))


if __name__ == "__main__":
    sys.exit(main())
