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
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from fastadapt._cli.measure import generate, mode_kwargs, stock_chain
from fastadapt.study._progress import progress_bar, stepper
from fastadapt.study.tradeoff import contexts
from fastadapt.study.tradeoff.decoding import draw_strings, score_strings
from fastadapt.study.tradeoff.grids import Cell, paper_grid, small_grid
from fastadapt.training.pretrained import load_model
from filters import at_least
from host import host_record, quartiles, write_record
from limits import print_limits, tradeoff_limits
from timing import ratios

GRIDS = {"paper": paper_grid, "small": small_grid}
PARTS = {
    "fastadapt": ("sampling", "scoring"),
    "stock": ("sampling", "scoring", "repeated"),
}


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


def main() -> None:
    """Run both ways in turns, print what it must show and write the JSON file."""
    options = _parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    model, tokenizer = load_model(options.model, fetch=True)
    aligned = contexts.Side(model, tokenizer, contexts.SYSTEM)
    prompts = contexts.builtin_prompts().texts[: options.prompts]
    cells = GRIDS[options.grid]()
    study = Study(
        aligned,
        aligned._replace(system=None),
        prompts,
        cells,
        options.strings,
        options.max_new_tokens,
        options.batch,
    )
    host = host_record()
    with progress_bar(Console(stderr=True), auto_refresh=False) as bar:
        step = stepper(bar, "rounds, both ways", 1 + 2 * options.rounds)
        rounds = measure(study, options.seed, options.rounds, step)
    took: dict[str, dict[str, list[float]]] = {
        way: {part: [one[way][part] for one in rounds["seconds"]] for part in (*PARTS[way], "all")}
        for way in PARTS
    }
    without = [one["all"] - one["repeated"] for one in (r["stock"] for r in rounds["seconds"])]
    record: dict[str, Any] = {
        "benchmark": "tradeoff",
        "host": host,
        "settings": {
            "model": options.model or "SmolLM2-135M-Instruct",
            "adaptors": len(cells),
            "prompts": len(prompts),
            "strings": options.strings,
            "max_new_tokens": options.max_new_tokens,
            "batch": options.batch,
            "rounds": options.rounds,
            "seed": options.seed,
            "dtype": "float32",
        },
        "seconds": {
            way: {part: quartiles(values, 3) for part, values in parts.items()}
            for way, parts in took.items()
        },
        "stock_to_ours": {
            "all": quartiles(ratios(took["stock"]["all"], took["fastadapt"]["all"]), 3),
            "without the repeated pass": quartiles(ratios(without, took["fastadapt"]["all"]), 3),
        },
        **{name: rounds[name] for name in ("agreement", "tokens", "violations")},
    }
    print_limits(tradeoff_limits(record))
    if options.out:
        write_record(options.out, record)


def measure(
    study: Study, seed: int, rounds: int, step: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Run both ways in turns on the same strings, after a first run of ours that draws them.

    Returns:
        `seconds` of each round, way and part; `agreement`, the largest difference of the two ways'
        sums in nats, over strings inside their support in both; `tokens` of all strings;
        `violations`, how many of them each way's scorer puts outside the support they were drawn
        from.
    """
    tokens = ours(study, seed)[2]
    step()
    seconds: list[dict[str, dict[str, float]]] = []
    for number in range(rounds):
        took: dict[str, dict[str, float]] = {}
        for way in list(PARTS)[:: 1 if number % 2 else -1]:
            if way == "stock":
                took[way], theirs, outside = stock(study, tokens, seed)
            else:
                took[way], scores, again, violations = ours(study, seed)
                assert torch.equal(again, tokens)
            took[way]["all"] = sum(took[way].values())
            step()
        seconds.append(took)
    inside = torch.isfinite(theirs.log_q) & torch.isfinite(scores.log_q)
    return {
        "seconds": seconds,
        "agreement": {
            name: float((one - other)[inside].abs().max())
            for name, one, other in zip(Scores._fields, scores, theirs, strict=True)
        },
        "tokens": tokens.numel(),
        "violations": {"fastadapt": violations, "stock": outside},
    }


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
    length = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), length, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, length - len(row) :] = row
        mask[i, length - len(row) :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def _parse() -> argparse.Namespace:
    """Read the arguments."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, help="JSON file to write")
    add("--model", help="a causal language model (default: the demo's)")
    add("--grid", choices=tuple(GRIDS), default="small", help="(default: %(default)s)")
    add("--prompts", type=int, default=8, help="(default: %(default)s)")
    add("--strings", type=int, default=2, help="of each adaptor and prompt (default: %(default)s)")
    add("--max-new-tokens", type=int, default=24, help="(default: %(default)s)")
    add("--batch", type=int, default=16, help="rows of the other way (default: %(default)s)")
    add("--rounds", type=int, default=3, help="(default: %(default)s)")
    add("--seed", type=int, default=0)
    add("--threads", type=int, help="default: torch's own choice")
    options = parser.parse_args()
    least = {"prompts": 1, "strings": 1, "max_new_tokens": 1, "batch": 1, "rounds": 2}
    for name, low in least.items():
        at_least(parser, name, getattr(options, name), low)
    return options


if __name__ == "__main__":
    main()
