"""A step of our trainers beside one of trl's for the same loss: time and peak memory.

    fastadapt bench trainer --data PAIRS.jsonl.gz --threads 1 --out benchmarks/results/trainer.json

Both have the same model, batch, loss and default settings: a step is the forward of the reference,
where the loss has one, forward and backward of the policy and AdamW's update. trl's trainers of DPO
and KTO make no logits; those of CPO, SimPO and ORPO hold them all. Times are of steps in turns in
one process that holds both; the peak of resident memory, over what the trainer and its models take
before the first step, is of a process that holds one of them. malloc returns what is freed there,
so that the peak is of what is alive.
"""

from __future__ import annotations

import argparse
import importlib
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

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


class Peer(NamedTuple):
    """A trainer of trl, and the mixture of ours that is its loss."""

    module: str
    name: str  # NAMETrainer and NAMEConfig
    loss: str
    settings: dict[str, Any] = {}  # of trl's configuration
    ours: str = "RewardPenalizeTrainer"
    options: dict[str, Any] = {}  # of our trainer
    reference: bool = False


PEERS = {
    "dpo": Peer("trl", "DPO", "dpo", reference=True),
    "kto": Peer("trl", "KTO", "kto", ours="UnpairedRewardPenalizeTrainer", reference=True),
    "cpo": Peer("trl.experimental.cpo", "CPO", "cpo"),
    "simpo": Peer(
        "trl.experimental.cpo",
        "CPO",
        "simpo",
        {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 0.5},
    ),
    "orpo": Peer("trl.experimental.orpo", "ORPO", "orpo", options={"nll_on_prompt": True}),
}


class Cell(NamedTuple):
    """What is measured: a loss, a dtype and what is trained."""

    loss: str
    dtype: str
    head: str


BENCHMARK = Benchmark(
    "trainer",
    __doc__,
    {
        "data": Option(help="preference pairs, JSON Lines or .gz (default: the demo's)", kind=Path),
        "model": MODEL,
        "steps": Option(9, "of each trainer", least=2),
        "batch": Option(2, "pairs", least=1),
        "max_length": Option(256, "tokens", least=2),
        "losses": Axis(tuple(PEERS)),
        "dtypes": Axis(tuple(DTYPES)),
        "heads": Axis(HEADS),
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
    # DPO in all ways; the others as they are used most, all parameters in float32
    work = [
        Cell(loss, dtype, head)
        for loss in options.losses
        for dtype in options.dtypes
        for head in options.heads
        if loss == "dpo" or (dtype, head) == ("float32", "trainable")
    ]
    with progress("cells", len(work) * (1 + len(TRAINERS))) as step:
        for cell in work:
            entry: dict[str, Any] = {**cell._asdict(), "peak_mb": {}}
            (seen,) = in_fresh_process(measure_time, cell, options)
            entry |= seen
            step()
            for name in TRAINERS:
                (peak,) = in_fresh_process(measure_memory, name, cell, options)
                entry["peak_mb"][name] = peak
                step()
            record["cells"].append(entry)


def measure_time(cell: Cell, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Quartiles of milliseconds of both trainers' steps and of their ratio, and the losses."""
    with tempfile.TemporaryDirectory() as folder:
        steppers = {name: Stepper(name, cell, options, folder) for name in TRAINERS}
        steps = {name: each.step for name, each in steppers.items()}
        # before them one that makes the optimizer's state, and meets what is slow the first time
        took = in_turns(steps, rounds=options.steps, slice_s=0.0, least_rounds=options.steps)
        yield {
            "step_ms": {name: milliseconds(seconds) for name, seconds in took.items()},
            "trl_to_fastadapt": ratios(took, "fastadapt", ("trl",), 3)["trl"],
            "losses": {name: each.losses[1:] for name, each in steppers.items()},
            "response_tokens": steppers["fastadapt"].tokens,
        }


def measure_memory(name: str, cell: Cell, options: argparse.Namespace) -> Iterator[dict[str, int]]:
    """Megabytes resident before the first step, and the peak over them in two steps."""
    return_freed_blocks()
    with tempfile.TemporaryDirectory() as folder:
        stepper = Stepper(name, cell, options, folder)
        with PeakMemory() as peak:
            stepper.step(0)
            stepper.step(1)
        yield {"before": round(peak.before / 1e6), "extra": round(peak.extra / 1e6)}


class Stepper:
    """A trainer that takes one step at a time."""

    def __init__(self, name: str, cell: Cell, options: argparse.Namespace, folder: str) -> None:
        import datasets
        import peft
        import trl

        import fastadapt.trl

        torch.manual_seed(options.seed)
        if options.threads:
            torch.set_num_threads(options.threads)
        peer, of_trl = PEERS[cell.loss], name == "trl"
        quiet = {"progress": no_progress, "dtype": DTYPES[cell.dtype]}
        model, tokenizer = load_model(options.model, fetch=True, **quiet)
        frozen = cell.head == "frozen"
        reference = None
        if peer.reference and not frozen:
            reference = load_model(options.model, fetch=True, **quiet)[0]
        module: Any = importlib.import_module(peer.module)
        unpaired = peer.name == "KTO"
        config: Any = getattr(module, f"{peer.name}Config") if of_trl or unpaired else trl.DPOConfig
        arguments = config(
            folder,
            per_device_train_batch_size=options.batch * (2 if unpaired else 1),
            max_length=options.max_length,
            learning_rate=1e-6,
            use_cpu=True,
            bf16=False,
            report_to=[],
            disable_tqdm=True,
            seed=options.seed,
            **(peer.settings if of_trl else {}),
        )
        lora = peft.LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        pairs = read_pairs(options.data) if options.data else list(PAIRS)
        chosen = random.Random(options.seed).sample(pairs, options.batch)
        rows = [dict(zip(("prompt", "chosen", "rejected"), pair, strict=True)) for pair in chosen]
        if unpaired:
            rows = [
                {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
                for row in rows
                for side in ("chosen", "rejected")
            ]
        kind: Any = getattr(module, f"{peer.name}Trainer")
        given: dict[str, Any] = {"ref_model": reference} if peer.reference else {}
        if not of_trl:
            kind = getattr(fastadapt.trl, peer.ours)
            given |= {"loss": {peer.loss: 1.0}, **peer.options}
        self.trainer = kind(
            model,
            args=arguments,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=lora if frozen else None,
            **given,
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
        mask = self.batch.get("completion_mask")
        self.tokens = 0 if mask is None else int(mask.sum())

    def step(self, _: int) -> None:
        """Takes a step and keeps its loss."""
        self.optimizer.zero_grad()
        loss = self.trainer.training_step(self.trainer.model, dict(self.batch), self.counts)
        self.optimizer.step()
        self.losses.append(float(loss))


if __name__ == "__main__":
    sys.exit(main())
