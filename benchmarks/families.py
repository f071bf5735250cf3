"""What each loss does to the log-probabilities of held-out pairs in a few steps of a real model.

    python benchmarks/families.py --threads 1 --out benchmarks/results/families.json

SmolLM2-135M-Instruct takes the same steps with every loss of the catalogue that pairs of prompt,
chosen and rejected response can serve, all parameters, float32, AdamW, from the same start, on the
package's own pairs; those kept out are scored before and after: each response after its own prompt
x, and after another pair's prompt x'. Those are four cells, in nats a token. A loss that teaches
good text moves (x, y⁺) up; one that penalises moves (x, y⁻) down; what moves after x' too was
learnt or unlearnt about the text and not about the answer.

One learning rate serves all, so that the table compares directions, not what each loss can reach.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastadapt import RewardPenalizeLoss
from fastadapt.losses import CATALOGUE, Responses, kto_reference_point, sequence_logps
from fastadapt.training import reference_logps, response_log_odds, sides
from fastadapt.training.pairs import PAIRS, Pair, PairBatch, encode_pairs
from fastadapt.training.pretrained import load_model, no_progress
from fresh import in_fresh_process
from harness import MODEL, SEED, Axis, Benchmark, Option, progress, settings_of

# what a batch of pairs and a reference give
SERVED = frozenset({"pairs", "unpaired", "reference", "lengths", "batch"})
NAMES = [name for name, entry in CATALOGUE.items() if entry.needs <= SERVED]
CELLS = ("chosen", "rejected", "chosen_elsewhere", "rejected_elsewhere")
BENCHMARK = Benchmark(
    "families",
    __doc__,
    {
        "model": MODEL,
        "losses": Axis(tuple(NAMES)),
        "steps": Option(8, least=1),
        "batch": Option(4, "pairs", least=2),
        "held_out": Option(8, "pairs", least=2),
        "learning_rate": Option(1e-5),
        "seed": SEED,
    },
)


@BENCHMARK
def main(options: argparse.Namespace, record: dict[str, Any]) -> None:
    """Train with every loss, each in a process of its own."""
    record["settings"] = settings_of(
        options, "model", "steps", "batch", "held_out", "learning_rate", "seed"
    )
    record["losses"] = []
    with progress("losses", len(options.losses)) as step:
        for name in options.losses:
            (seen,) = in_fresh_process(measure, name, options)
            record["losses"].append(seen)
            step()


def measure(name: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yields the four cells before and after the steps with one loss, and how long those took."""
    torch.manual_seed(options.seed)
    if options.threads:
        torch.set_num_threads(options.threads)
    model, tokenizer = load_model(options.model, fetch=True, progress=no_progress)
    chat = tokenizer.chat_template is not None
    pairs = random.Random(options.seed).sample(list(PAIRS), len(PAIRS))
    kept, used = pairs[: options.held_out], pairs[options.held_out :]

    def encoded(some: list[Pair]) -> PairBatch:
        return encode_pairs(tokenizer, some, chat=chat)

    before = cells(model, encoded(kept), encoded(elsewhere(kept)))
    batches = []
    for i in range(options.steps):
        some = [used[(i * options.batch + k) % len(used)] for k in range(options.batch)]
        batches.append((encoded(some), encoded(elsewhere(some))))
    start = time.perf_counter()
    losses = train(model, name, batches, options.learning_rate)
    yield {
        "loss": name,
        "seconds": time.perf_counter() - start,
        "curve": losses,
        "before": before,
        "after": cells(model, encoded(kept), encoded(elsewhere(kept))),
    }


def train(
    model: Any, name: str, batches: list[tuple[PairBatch, PairBatch]], learning_rate: float
) -> list[float]:
    """Takes a step a batch and returns the losses."""
    objective = RewardPenalizeLoss({name: 1.0})
    takes, needs = objective.takes("ref_chosen_logps"), objective.needs("reference_point")
    references = [reference_logps(model, batch) if takes else () for batch, _ in batches]
    others = [reference_logps(model, batch) if needs else () for _, batch in batches]
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    rewards: list[float] = []
    curve = []
    model.train()
    for (batch, mismatched), reference, other in zip(batches, references, others, strict=True):
        inputs: dict[str, Tensor] = {}
        if needs:
            inputs["reference_point"] = point(model, mismatched, other)
        if objective.needs("reward_shift"):
            inputs["reward_shift"] = torch.tensor(sum(rewards) / max(len(rewards), 1))
        optimizer.zero_grad()
        chosen, rejected = sides(batch, response_log_odds(model, batch))
        loss, metrics = objective(chosen, rejected, *reference, **inputs)
        loss.backward()
        optimizer.step()
        if "rewards/chosen" in metrics:
            rewards += [float(metrics["rewards/chosen"]), float(metrics["rewards/rejected"])]
        curve.append(float(loss.detach()))
    return curve


@torch.no_grad()
def point(model: Any, mismatched: PairBatch, reference: tuple[Tensor, ...]) -> Tensor:
    """KTO's reference point, of responses after other prompts."""
    chosen, rejected = sides(mismatched, response_log_odds(model, mismatched))
    both = Responses(
        torch.cat([chosen.log_odds, rejected.log_odds]),
        torch.cat([side.mask for side in (chosen, rejected) if side.mask is not None]),
    )
    return kto_reference_point(both, torch.cat(reference))


def elsewhere(pairs: list[Pair]) -> list[Pair]:
    """The responses of each pair after the prompt of the next."""
    return [
        pair._replace(prompt=other.prompt)
        for pair, other in zip(pairs, pairs[1:] + pairs[:1], strict=True)
    ]


@torch.no_grad()
def cells(model: Any, own: PairBatch, other: PairBatch) -> dict[str, float]:
    """Mean log-probability of a token of each response, over the pairs, in four cells."""
    model.eval()
    found = []
    for batch in (own, other):
        for side in sides(batch, response_log_odds(model, batch)):
            assert side.mask is not None
            found.append(float((sequence_logps(side) / side.mask.sum(-1)).mean()))
    return dict(zip(CELLS, found, strict=True))


if __name__ == "__main__":
    sys.exit(main())
