"""Lists of a `History`: from nothing, and a step after that, beside transformers' processors.

    python benchmarks/bench_history.py --threads 1 --out benchmarks/results/history.json

Ids follow Zipf's law as Mandelbrot has it, (rank + 5) ** -1.3, so that one in twenty is the most
frequent and 32,768 have about as many distinct ones as texts; every fourth passage of 64 tokens is
one that was there, and what is appended goes on with a passage. The first half of each row is its
prompt. In each cell every call runs in every round: a history made with its first list, and a step,
`append` and a list, of one that grows. transformers' step is its repetition penalty alone, or its
n-grams. Times are the processor's, which others on the machine do not lengthen much.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastadapt import Edits, History
from harness import SEED, Axis, Benchmark, Option, progress, settings_of
from timing import Call, in_turns, processor, quartiles

VOCABULARY, SHIFT, EXPONENT, PASSAGE = 128_256, 5, 1.3, 64
PENALTIES = {"repetition": 1.2, "frequency": 0.1, "presence": 0.5}
RULES: dict[str, Callable[[History], Edits]] = {
    "penalties": lambda history: history.edits(**PENALTIES),
    "the last 1,024": lambda history: history.edits(**PENALTIES, counts="all", window=1024),
    "3-grams": lambda history: history.ban_ngrams(3),
    "DRY": lambda history: history.dry(0.8),
}
BENCHMARK = Benchmark(
    "history",
    __doc__,
    {
        "rules": Axis(tuple(RULES)),
        "batch": Axis((1, 16), kind=int),
        "tokens": Option(32_768, "of each row", least=4 * PASSAGE),
        "rounds": Option(40, least=2),
        "seed": SEED,
    },
)


@BENCHMARK
def main(options: argparse.Namespace, record: dict[str, Any]) -> None:
    """Time every cell."""
    record["settings"] = settings_of(options, "tokens", "rounds", "seed")
    record["cells"] = []
    grid = list(itertools.product(options.rules, options.batch))
    texts = texts_of(max(options.batch), options.tokens, options.seed)
    with progress("histories", len(grid)) as step:
        for rule, batch in grid:
            record["cells"].append(measure_cell(rule, texts[:batch].contiguous(), options.rounds))
            step()


def measure_cell(rule: str, texts: Tensor, rounds: int) -> dict[str, Any]:
    """Time one cell; times in microseconds a row."""
    batch, tokens = texts.shape
    listed, prompt = RULES[rule], tokens // 2
    going = History(texts, prompt_length=prompt)
    listed(going)
    # the row again, token by token
    following = itertools.cycle(texts.T.contiguous().unbind())

    def step(_: int) -> Edits:
        going.append(next(following))
        return listed(going)

    calls: dict[str, Call] = {
        "from nothing": lambda _: listed(History(texts, prompt_length=prompt)),
        "step": step,
    }
    stock = stock_rule(rule, texts)
    if stock is not None:
        calls["stock"] = stock
    took = in_turns(calls, rounds=rounds, timer=processor)
    us = {name: quartiles([1e6 * s / batch for s in took[name]], 2) for name in took}
    ids = len(listed(going).ids) // batch
    return {"rule": rule, "batch": batch, "ids": ids, "us": us}


def texts_of(n: int, tokens: int, seed: int) -> Tensor:
    """(N, T): ids by Zipf's law, every fourth passage an earlier one."""
    generator = torch.Generator().manual_seed(seed)
    ranks = torch.arange(1, VOCABULARY + 1, dtype=torch.float64)
    weights = (ranks + SHIFT) ** -EXPONENT
    ids = torch.randperm(VOCABULARY, generator=generator)
    drawn = torch.multinomial(weights.expand(n, -1), tokens, replacement=True, generator=generator)
    texts = ids[drawn]
    for at in range(3 * PASSAGE, tokens - PASSAGE, 4 * PASSAGE):
        place = int(torch.randint(at - PASSAGE, (), generator=generator))
        texts[:, at : at + PASSAGE] = texts[:, place : place + PASSAGE].clone()
    return texts


def stock_rule(rule: str, texts: Tensor) -> Call | None:
    """transformers' way to a rule on the same tokens, where it has one."""
    from transformers import NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor

    processors: dict[str, Any] = {
        "penalties": RepetitionPenaltyLogitsProcessor(PENALTIES["repetition"]),
        "3-grams": NoRepeatNGramLogitsProcessor(3),
    }
    if rule not in processors:
        return None
    logits = torch.randn(len(texts), VOCABULARY)
    return lambda _: processors[rule](texts, logits)


if __name__ == "__main__":
    sys.exit(main())
