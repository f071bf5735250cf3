"""The losses beside each other on held-out preference pairs of a real model.

    python benchmarks/compare_losses.py --data PAIRS.jsonl.gz \\
        --out benchmarks/results/compare_losses.json
    python benchmarks/compare_report.py

MLE, ExMATE, MLE + unlikelihood, DPO after MLE, DPO after ExMATE, and jointly DPO + MLE and
DPO + ExMATE, the comparison of Tuan & Wang 2024 (arXiv 2408.16751), in a protocol small enough for
one core: SmolLM2-135M-Instruct, of which the last layers and the final norm are trained. The hidden
states before them are made once for all pairs. Only pairs that fit `--max-length` tokens whole take
part; they are split once, with `--split-seed`, into pairs to train on, pairs to choose the learning
rates on and held-out pairs. A further seed is another order of the training pairs.

A stage goes through the training pairs once. MLE, ExMATE and unlikelihood are one stage from the
model as it is; DPO after one of them is a second stage, whose reference is the model after the
first; the joint losses go through the pairs twice, with the model as it is for reference. There are
two learning rates: that of the likelihood stages has the lowest loss of MLE on the pairs kept for
this, and that of the stages with DPO the lowest loss of DPO; both without ExMATE having a say.
Recorded is log P of every held-out response after each method and seed.
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from fastadapt import RewardPenalizeLoss, linear_log_odds
from fastadapt.training import reference_logps, training_steps
from fastadapt.training.head import Head
from fastadapt.training.head_check import head_of
from fastadapt.training.pairs import IGNORED, PairBatch, encode_pairs, read_pairs
from fastadapt.training.pretrained import load_model, no_progress
from harness import MODEL, PAIRS_FILE, Benchmark, Option, progress, settings_of

RATES = (3e-5, 1e-4, 3e-4)
BENCHMARK = Benchmark(
    "compare_losses",
    __doc__,
    {
        "data": PAIRS_FILE,
        "model": MODEL,
        "layers": Option(2, "to train"),
        "train": Option(256, "pairs at most"),
        "choose": Option(40, "pairs"),
        "held_out": Option(160, "pairs"),
        "batch": Option(4, "pairs a step"),
        "max_length": Option(96, "tokens"),
        "seeds": Option(3),
        "split_seed": Option(0),
    },
)


class Method(NamedTuple):
    """How a model is trained: from the start or from another method's end, by which loss."""

    weights: dict[str, float]
    after: str | None = None
    epochs: int = 1


METHODS = {
    "mle": Method({"mle": 1.0}),
    "exmate": Method({"exmate": 1.0}),
    "unlikelihood": Method({"unlikelihood": 1.0}),
    "mle, dpo": Method({"dpo": 1.0}, "mle"),
    "exmate, dpo": Method({"dpo": 1.0}, "exmate"),
    "dpo + mle": Method({"dpo": 1.0, "mle": 1.0}, epochs=2),
    "dpo + exmate": Method({"dpo": 1.0, "exmate": 1.0}, epochs=2),
}


class Split(NamedTuple):
    """Places of the pairs that take part."""

    train: list[int]
    choose: list[int]
    held_out: list[int]


class Cached(NamedTuple):
    """B pairs as `PairBatch`, with the hidden states (2B, T, H) before the layers to train."""

    hidden: Tensor
    attention_mask: Tensor
    labels: Tensor

    @property
    def mask(self) -> Tensor:
        """(2B, T-1), bool; the tokens of the responses."""
        return self.labels != IGNORED


class Tail(NamedTuple):
    """The layers that are trained, with the final norm, and the frozen head after them."""

    body: Any
    head: Head

    def log_odds(self, batch: Cached) -> Tensor:
        """(2B, T-1), float32: the log-odds of the response tokens."""
        states = self.body(
            inputs_embeds=batch.hidden, attention_mask=batch.attention_mask, use_cache=False
        ).last_hidden_state[:, :-1]
        return linear_log_odds(
            states,
            self.head.weight,
            batch.labels,
            self.head.bias,
            softcap=self.head.softcap,
            logit_scale=self.head.logit_scale,
            ignore_index=IGNORED,
        )


@BENCHMARK
def main(options: argparse.Namespace, record: dict[str, Any]) -> None:
    """Choose the learning rates, then train by each method and with each seed."""
    start = time.perf_counter()
    model, tokenizer = load_model(options.model, fetch=True, progress=no_progress)
    pairs = [encode_pairs(tokenizer, [pair], chat=False) for pair in read_pairs(options.data)]
    pairs = [pair for pair in pairs if pair.tokens.shape[1] <= options.max_length]
    split = split_pairs(len(pairs), options)
    runs = len(RATES) * 2 + options.seeds * sum(m.epochs for m in METHODS.values())
    with progress("hidden states, then epochs", 1 + runs) as step:
        front, tail = divide(model, options.layers)
        rows = cache(front, pairs)
        step()
        study = Study(tail, rows, split, options)
        rates = {}
        for kind in ("mle", "dpo"):
            tried = {}
            for rate in RATES:
                tried[rate] = study.validate(kind, rate)
                step()
            rates[kind] = {
                "tried": list(tried.items()),
                "chosen": min(tried, key=lambda rate: tried[rate]),
            }
        cells = [{"method": "start", "seed": None, **study.held_out()}]
        for seed in range(options.seeds):
            for name, seen in study.run(seed, {k: v["chosen"] for k, v in rates.items()}):
                cells.append({"method": name, "seed": seed, **seen})
                for _ in range(METHODS[name].epochs):
                    step()
    names = ("model", "data", "layers", "batch", "max_length", "split_seed", "seeds")
    record["settings"] = {
        **settings_of(options, *names),
        "trained_parameters": sum(p.numel() for p in tail.body.parameters()),
        "pairs": {name: len(places) for name, places in split._asdict().items()},
        "beta": 0.1,
        "rates": rates,
        "seconds": round(time.perf_counter() - start),
    }
    record["tokens"] = [[int(n) for n in rows[i].mask.sum(-1)] for i in split.held_out]
    record["cells"] = cells


def split_pairs(count: int, options: argparse.Namespace) -> Split:
    """Three disjoint sets of pairs, the same for every seed of a run."""
    places = random.Random(options.split_seed).sample(range(count), count)
    rest = count - options.held_out - options.choose
    train = min(options.train, rest) // options.batch * options.batch
    if train < options.batch:
        raise ValueError(f"data: expected more pairs that fit max_length, got {count}")
    held_out, choose = places[: options.held_out], places[options.held_out :][: options.choose]
    return Split(places[-train:], choose, held_out)


def divide(model: Any, layers: int) -> tuple[Any, Tail]:
    """Splits a body of Llama's kind before its last layers; the model is used up."""
    head = head_of(model)
    head = head._replace(weight=head.weight.detach())
    body = model.base_model
    count = len(body.layers)
    if not 0 < layers < count:
        raise ValueError(f"layers: expected a number in [1, {count - 1}], got {layers}")
    tail = copy.deepcopy(body)
    tail.layers, tail.embed_tokens = tail.layers[count - layers :], nn.Identity()
    tail.config.num_hidden_layers = layers
    body.layers, body.norm = body.layers[: count - layers], nn.Identity()
    body.config.num_hidden_layers = count - layers
    return body.requires_grad_(False), Tail(tail.requires_grad_(True), head)


@torch.no_grad()
def cache(front: Any, pairs: Sequence[PairBatch]) -> list[Cached]:
    """What enters the trained layers, pair by pair."""
    rows = []
    for tokens, attention_mask, labels in pairs:
        hidden = front(input_ids=tokens, attention_mask=attention_mask, use_cache=False)
        rows.append(Cached(hidden.last_hidden_state, attention_mask, labels))
    return rows


def collate(rows: Sequence[Cached]) -> Cached:
    """Pairs in one batch, the chosen responses before the rejected ones."""
    padded = []
    for values, padding in zip(zip(*rows, strict=True), (0.0, 0, IGNORED), strict=True):
        sides = [value[side] for side in (0, 1) for value in values]
        padded.append(pad_sequence(sides, batch_first=True, padding_value=padding))
    return Cached(*padded)


class Study:
    """Trains the tail by each method and looks at the held-out pairs."""

    def __init__(
        self, tail: Tail, rows: list[Cached], split: Split, options: argparse.Namespace
    ) -> None:
        self.tail, self.rows, self.split = tail, rows, split
        self.batch = options.batch
        self.start = copy.deepcopy(tail.body.state_dict())
        places = split.train + split.choose
        self.before = dict(zip(places, zip(*self.logps(places), strict=True), strict=True))

    def run(self, seed: int, rates: dict[str, float]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Every method with one order of the training pairs: its name and what it came to."""
        states = {None: self.start}
        for name, method in METHODS.items():
            self.tail.body.load_state_dict(states[method.after])
            first = 1 if method.after else 0
            orders = [self.order(seed, first + i) for i in range(method.epochs)]
            rate = rates["dpo" if "dpo" in method.weights else "mle"]
            curve = self.train(method, rate, [i for order in orders for i in order])
            states[name] = copy.deepcopy(self.tail.body.state_dict())
            yield name, {"steps": len(curve), "curve": curve, **self.held_out()}

    def order(self, seed: int, number: int) -> list[int]:
        """One way through the training pairs: their places."""
        return random.Random(f"{seed}, {number}").sample(self.split.train, len(self.split.train))

    def batches(self, places: Sequence[int]) -> list[Cached]:
        """Pairs by place, `batch` at a time."""
        chosen = [self.rows[i] for i in places]
        return [collate(chosen[i : i + self.batch]) for i in range(0, len(chosen), self.batch)]

    def train(self, method: Method, rate: float, places: Sequence[int]) -> list[list[float]]:
        """Takes a step per batch; log P of its chosen and its rejected responses before each."""
        references = [None] * (len(places) // self.batch)
        if "dpo" in method.weights:
            known = [self.before[i] for i in places]
            chosen, rejected = map(torch.stack, zip(*known, strict=True))
            if method.after:
                chosen, rejected = self.logps(places)  # the model is still that of the stage before
            references = list(
                zip(chosen.split(self.batch), rejected.split(self.batch), strict=True)
            )
        parameters = self.tail.body.parameters()
        steps = training_steps(
            self.tail,
            zip(self.batches(places), references, strict=True),
            RewardPenalizeLoss(method.weights),
            torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0, fused=True),
            log_odds_of=Tail.log_odds,
        )
        return [
            [round(float(seen[f"logps/{s}"]), 3) for s in ("chosen", "rejected")] for seen in steps
        ]

    def logps(self, places: Sequence[int]) -> tuple[Tensor, Tensor]:
        """log P of the chosen and of the rejected responses of some pairs."""
        seen = [
            reference_logps(self.tail, batch, log_odds_of=Tail.log_odds)
            for batch in self.batches(places)
        ]
        chosen, rejected = (torch.cat(side) for side in zip(*seen, strict=True))
        return chosen, rejected

    def held_out(self) -> dict[str, Any]:
        """log P of the held-out responses, nats."""
        chosen, rejected = self.logps(self.split.held_out)
        return {
            "chosen": [round(float(x), 3) for x in chosen],
            "rejected": [round(float(x), 3) for x in rejected],
        }

    def validate(self, kind: str, rate: float) -> float:
        """The loss on the pairs kept for choosing, after an epoch from the start with one rate."""
        self.tail.body.load_state_dict(self.start)
        self.train(Method({kind: 1.0}), rate, self.order(0, 0))
        chosen, rejected = self.logps(self.split.choose)
        if kind == "dpo":
            known = [self.before[i] for i in self.split.choose]
            ref_chosen, ref_rejected = map(torch.stack, zip(*known, strict=True))
            u = 0.1 * ((chosen - ref_chosen) - (rejected - ref_rejected))
            return float(-nn.functional.logsigmoid(u).mean())
        tokens = sum(int(self.rows[i].mask[0].sum()) for i in self.split.choose)
        return float(-chosen.sum() / tokens)


if __name__ == "__main__":
    sys.exit(main())
