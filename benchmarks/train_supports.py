"""GRPO on what top-p samples, with the support of each token replayed and without: reward curves.

    python benchmarks/train_supports.py --out benchmarks/results/train_supports.json

SmolLM2-135M-Instruct learns to alliterate: the reward of a sentence is the share of its words that
begin with s, each counted once, of at least eight. Rollouts have top-p 0.9; one update is made of
each batch of them. "replay" scores a token on the ids that it was drawn from, "off" on the whole
vocabulary, as trl does. Each run is a process of its own, of the same prompts in the same order.
"""

from __future__ import annotations

import argparse
import itertools
import random
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from transformers import TrainerCallback

from fastadapt.training.pretrained import load_model, no_progress
from fresh import in_fresh_process
from harness import MODEL, Axis, Benchmark, Option, progress, settings_of
from timing import quartiles

TOPICS = (
    "the sea", "a garden", "winter", "a long walk", "the moon", "a market", "old friends", "music",
    "a river", "the city", "a storm", "breakfast", "a journey", "the forest", "a birthday", "birds",
    "a lighthouse", "the desert", "a football game", "bread", "an island", "a train", "painting",
    "a cat", "the stars", "a mountain", "sailing", "a letter", "summer", "a secret", "the harbour",
    "a school",
)  # fmt: skip
ASK = "A sentence about {topic} in which as many words as possible begin with s:"
LETTER, LEAST_WORDS = "s", 8
# of trl's log and ours
CURVES = {
    "reward": "reward",
    "reward_std": "reward_std",
    "entropy": "entropy",
    "length": "completions/mean_length",
    "ratio": "support/ratio",
    "ratio_far": "support/ratio_far",
    "kept": "support/kept",
    "full": "support/full",
    "grad_norm": "grad_norm",
}
BENCHMARK = Benchmark(
    "train_supports",
    __doc__,
    {
        "supports": Axis(("replay", "off"), ["replay"]),
        "seeds": Axis((1, 2, 3), [1], kind=int),
        "model": MODEL,
        "steps": Option(40, least=1),
        "prompts": Option(4, "of a step", least=1),
        "generations": Option(8, "of a prompt", least=2),
        "tokens": Option(32, "at most, of a generation", least=1),
        "top_p": Option(0.9),
        "learning_rate": Option(2e-5),
        "at_once": Option(1, "runs side by side, of --threads each", least=1),
    },
    ("trl", "transformers"),
)


def reward_of(text: str) -> float:
    """The share of words that begin with the letter, of at least eight; each counts once."""
    words = re.findall(r"[a-z']+", text.lower())
    good = {word for word in words if word.startswith(LETTER)}
    return len(good) / max(len(words), LEAST_WORDS)


@BENCHMARK
def main(options: argparse.Namespace, record: dict[str, Any]) -> None:
    """Train every way from every seed."""
    names = (
        *("model", "steps", "prompts", "generations", "tokens", "top_p", "learning_rate"),
        "at_once",
    )
    record["settings"] = {**settings_of(options, *names), "dtype": "bfloat16 autocast"}
    runs = list(itertools.product(options.seeds, options.supports))
    with progress("training", len(runs)) as step, ThreadPoolExecutor(options.at_once) as pool:

        def one(run: tuple[int, str]) -> dict[str, Any]:
            *seen, last = in_fresh_process(train, *run, options)
            curves = {name: [line.get(key) for line in seen] for name, key in CURVES.items()}
            step()
            return {"seed": run[0], "support": run[1], "curves": curves, **last}

        record["runs"] = list(pool.map(one, runs))


def train(seed: int, support: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Trains one way: yields what trl logs of each step, then the time of a step."""
    import datasets
    from trl import GRPOConfig

    from fastadapt.trl import SupportGRPOTrainer

    if options.threads:
        torch.set_num_threads(options.threads)
    model, tokenizer = load_model(options.model, fetch=True, progress=no_progress)
    topics = random.Random(seed).sample(TOPICS, len(TOPICS))
    prompts = [ASK.format(topic=topic) for topic in topics]
    seconds = Seconds()
    with tempfile.TemporaryDirectory() as folder:
        trainer = SupportGRPOTrainer(
            model,
            reward_funcs=lambda completions, **_: [reward_of(text) for text in completions],
            args=GRPOConfig(
                folder,
                seed=seed,
                max_steps=options.steps,
                per_device_train_batch_size=options.prompts * options.generations,
                num_generations=options.generations,
                max_completion_length=options.tokens,
                temperature=1.0,
                top_p=options.top_p,
                learning_rate=options.learning_rate,
                lr_scheduler_type="constant",
                beta=0.0,
                bf16=True,
                use_cpu=True,
                gradient_checkpointing=False,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=datasets.Dataset.from_dict({"prompt": prompts}),
            processing_class=tokenizer,
            callbacks=[seconds],
            support=support,
        )
        trainer.train()
    yield from trainer.state.log_history[: options.steps]
    yield {"step_s": quartiles(seconds.taken, 3)}


class Seconds(TrainerCallback):
    """Notes how long each step takes, its generation in it."""

    def __init__(self) -> None:
        self.taken: list[float] = []
        self._start = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Starts the clock: trl generates within the step."""
        self._start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Notes the time."""
        self.taken.append(time.perf_counter() - self._start)


if __name__ == "__main__":
    sys.exit(main())
