"""The trade-off study's sampling and scoring, end to end, beside transformers' own way of doing it.

    python benchmarks/bench_tradeoff.py --threads 1 --out benchmarks/results/tradeoff.json

Ours draws the strings of all adaptors of a prompt in one batch, scores each under every adaptor in
the same visit of the logits, and under the prior in one more pass. The other way runs each adaptor
alone: `model.generate` with transformers' warpers, then three forward passes over the same strings
(the prior; the aligned model, through the warpers at every position; the aligned model as it is).
It scores a string under its own adaptor only, ours under all. The third pass repeats the second, as
the released code does; the ratio without it is given too. Both generate as many tokens for the
same prompts, and score ours. The other way gets all prompts of an adaptor in batches of `--batch`
rows, padded on the left; the released code had 2 rows. Model loading, tables on disk and statistics
are in neither.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fastadapt._cli.measure import generate, mode_kwargs, stock_chain
from fastadapt.study.tradeoff import contexts
from fastadapt.study.tradeoff.decoding import draw_strings, score_strings
from fastadapt.study.tradeoff.grids import Cell, paper_grid, small_grid
from fastadapt.training.pretrained import load_model
from harness import MODEL, SEED, Benchmark, Option, progress, settings_of
from timing import quartiles, ratios

GRIDS = {"paper": paper_grid, "small": small_grid}
PARTS = {
    "fastadapt": ("sampling", "scoring"),
    "stock": ("sampling", "scoring", "repeated"),
}
BENCHMARK = Benchmark(
    "tradeoff",
    __doc__,
    {
        "model": MODEL,
        "grid": Option("small", choices=tuple(GRIDS)),
        "prompts": Option(8, least=1),
        "strings": Option(2, "of each adaptor and prompt", least=1),
        "max_new_tokens": Option(24, least=1),
        "batch": Option(16, "rows of the other way", least=1),
        "rounds": Option(3, least=2),
        "seed": SEED,
    },
)


class Study(NamedTuple):
    """What both ways do: prompts, adaptors, sizes."""

    aligned: contexts.Side
    prior: contexts.Side
    prompts: list[str]
    cells: list[Cell]
    strings: int
    length: int
    batch: int


class Scores(NamedTuple):
    """Sums over each string, (P, A * S) each, in the order of prompts and adaptors."""

    log_prior: Tensor
    log_aligned: Tensor
    log_q: Tensor


@BENCHMARK
def main(options: argparse.Namespace, record: dict[str, Any]) -> None:
    """Run both ways in turns."""
    model, tokenizer = load_model(options.model, fetch=True)
    aligned = contexts.Side(model, tokenizer, contexts.SYSTEM)
    prompts = contexts.builtin_prompts().texts[: options.prompts]
    sizes = options.strings, options.max_new_tokens, options.batch
    prior = aligned._replace(system=None)
    study = Study(aligned, prior, prompts, GRIDS[options.grid](), *sizes)
    took: dict[str, dict[str, list[float]]]
    took = {way: {part: [] for part in (*PARTS[way], "all")} for way in PARTS}
    with progress("rounds, both ways", 1 + 2 * options.rounds) as step:
        tokens = ours(study, options.seed)[2]
        step()
        for number in range(options.rounds):
            for way in list(PARTS)[:: 1 if number % 2 else -1]:
                if way == "stock":
                    spent, theirs, outside = stock(study, tokens, options.seed)
                else:
                    spent, scores, again, violations = ours(study, options.seed)
                    assert torch.equal(again, tokens)
                for part, seconds in {**spent, "all": sum(spent.values())}.items():
                    took[way][part].append(seconds)
                step()
    record["settings"] = {
        **settings_of(options, "model", "strings", "max_new_tokens", "batch", "rounds", "seed"),
        "adaptors": len(study.cells),
        "prompts": len(prompts),
        "dtype": "float32",
    }
    record["seconds"] = {
        way: {part: quartiles(values, 3) for part, values in parts.items()}
        for way, parts in took.items()
    }
    whole, repeated = took["stock"]["all"], took["stock"]["repeated"]
    ways = {
        "ours": took["fastadapt"]["all"],
        "all": whole,
        "without the repeated pass": [a - b for a, b in zip(whole, repeated, strict=True)],
    }
    record["stock_to_ours"] = ratios(ways, "ours", ("all", "without the repeated pass"), 3)
    # the largest difference of a string's sums, nats, of those inside the support in both ways
    inside = torch.isfinite(theirs.log_q) & torch.isfinite(scores.log_q)
    record["agreement"] = {
        name: float((one - other)[inside].abs().max())
        for name, one, other in zip(Scores._fields, scores, theirs, strict=True)
    }
    record["tokens"] = tokens.numel()
    # how many tokens each way's scorer puts outside the support that they were drawn from
    record["violations"] = {"fastadapt": violations, "stock": outside}


def ours(study: Study, seed: int) -> tuple[dict[str, float], Scores, Tensor, int]:
    """The study's own way; seconds, scores, tokens (P, A * S, n) and violations.

    Drawing scores under the aligned model and all adaptors as well, so that is sampling's time.
    """
    own = [cell for cell in range(len(study.cells)) for _ in range(study.strings)]
    adaptors = [cell.adaptor for cell in study.cells]
    seeds = torch.arange(len(own)) + seed * 1_000_003
    spent = dict.fromkeys(PARTS["fastadapt"], 0.0)
    found, tokens, violations = [], [], 0
    for number, prompt in enumerate(study.prompts):
        start = time.perf_counter()
        strings = draw_strings(
            study.aligned.model,
            contexts.context_ids(study.aligned, prompt),
            own,
            adaptors,
            seeds + number * len(own),
            ends=torch.tensor([-1]),  # an id that never comes: all strings have the same length
            max_new_tokens=study.length,
        )
        drawn = time.perf_counter()
        context = contexts.context_ids(study.prior, prompt)
        log_prior = score_strings(study.prior.model, context, strings.tokens)
        spent["sampling"] += drawn - start
        spent["scoring"] += time.perf_counter() - drawn
        log_q = strings.log_q.gather(1, torch.tensor(own)[:, None])[:, 0]
        found.append(Scores(log_prior, strings.log_aligned, log_q))
        violations += int(strings.violations.sum())
        tokens.append(strings.tokens)
    stacked = Scores(*(torch.stack(parts) for parts in zip(*found, strict=True)))
    return spent, stacked, torch.stack(tokens), violations


@torch.inference_mode()
def stock(study: Study, tokens: Tensor, seed: int) -> tuple[dict[str, float], Scores, int]:
    """transformers' way, an adaptor after the other; seconds, scores of the tokens, violations."""
    spent = dict.fromkeys(PARTS["stock"], 0.0)
    found, outside = torch.zeros(3, *tokens.shape[:2], dtype=torch.float64), 0
    rows = [(p, s) for p in range(len(study.prompts)) for s in range(study.strings)]
    for number, cell in enumerate(study.cells):
        chain: Any = stock_chain(cell.adaptor)
        for first in range(0, len(rows), study.batch):
            chosen = [p for p, _ in rows[first : first + study.batch]]
            repetition = torch.tensor([s for _, s in rows[first : first + study.batch]])
            column = number * study.strings + repetition
            texts, given = [study.prompts[p] for p in chosen], tokens[chosen, column]
            times = [time.perf_counter()]
            kwargs = mode_kwargs(cell.adaptor, seeds=torch.arange(len(chosen)))["stock"]
            torch.manual_seed(seed)
            inputs = padded(study.aligned, texts)
            generate(study.aligned.model, inputs, kwargs, length=study.length)
            times.append(time.perf_counter())
            log_prior = gathered(forward(study.prior, texts, given), given)
            logits = forward(study.aligned, texts, given)
            warped = chain(given.reshape(-1, 1), logits.reshape(-1, logits.shape[-1]))
            log_q = gathered(warped.view(logits.shape), given)
            times.append(time.perf_counter())
            log_aligned = gathered(forward(study.aligned, texts, given), given)
            times.append(time.perf_counter())
            for part, (start, end) in zip(PARTS["stock"], pairwise(times), strict=True):
                spent[part] += end - start
            outside += int(torch.isneginf(log_q).sum())
            for i, values in enumerate((log_prior, log_aligned, log_q)):
                found[i, chosen, column] = values.sum(-1)
    return spent, Scores(*found), outside


def forward(side: contexts.Side, prompts: list[str], tokens: Tensor) -> Tensor:
    """The logits of strings after their prompts, (N, n, V), in one pass."""
    inputs = padded(side, prompts)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(tokens)], 1)
    output = side.model(
        input_ids=torch.cat([inputs["input_ids"], tokens], 1),
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
        logits_to_keep=tokens.shape[1] + 1,
        use_cache=False,
    )
    logits: Tensor = output.logits[:, :-1]
    return logits


def gathered(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probabilities of tokens (N, n), float64."""
    return logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0].double()


def padded(side: contexts.Side, prompts: list[str]) -> dict[str, Tensor]:
    """Contexts in one batch, padded on the left."""
    rows = [contexts.context_ids(side, prompt)[0] for prompt in prompts]
    pad = partial(pad_sequence, batch_first=True, padding_side="left")
    return {"input_ids": pad(rows), "attention_mask": pad([torch.ones_like(r) for r in rows])}


if __name__ == "__main__":
    sys.exit(main())
