"""Cost of a generation step: greedy, transformers' own sampling and the fused one, in turns.

    python benchmarks/bench_generation.py --out benchmarks/results/generation.json

Both ways of sampling run with filters alone, and with a repetition penalty, n-grams, bad words and
biases too. A step is one forward pass and one draw for the whole batch; the prefill is recorded
apart. Prompt lookup is timed on one sequence, a text that begins to repeat itself, beside the fused
draw without it. Every round runs all modes, so a ratio compares runs of the same minutes. Run it on
an idle machine: the host record holds the load average at the start.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastadapt import Adaptor
from fastadapt._cli.demo import PROMPTS
from fastadapt._cli.measure import (
    Generation,
    encode_prompts,
    mode_kwargs,
    step_ms,
    step_ratios,
    time_generation,
    tokens_per_s,
)
from fastadapt.hf import generate
from fastadapt.training.pretrained import load_model
from harness import MODEL, SEED, Benchmark, Option, progress, settings_of
from timing import Call, in_turns, quartiles, ratios

BENCHMARK = Benchmark(
    "generation",
    __doc__,
    {
        "model": MODEL,
        "batch": Option(32, least=1),
        "max_new_tokens": Option(48, least=2),
        "rounds": Option(7, least=2),
        "top_p": Option(0.9),
        "repetition_penalty": Option(1.1),
        "no_repeat_ngram_size": Option(3, least=1),
        "words": Option(40, least=2),  # bad ones, and as many biases; half of each of two tokens
        "drafts": Option(6, "tokens of a prompt lookup", least=1),
        "seed": SEED,
    },
)


@BENCHMARK
def main(options: argparse.Namespace, record: dict[str, Any]) -> None:
    """Time the modes."""
    model, tokenizer = load_model(options.model, fetch=True)
    inputs = encode_prompts(tokenizer, [PROMPTS[i % len(PROMPTS)] for i in range(options.batch)])
    adaptor = Adaptor(top_p=options.top_p)
    vocabulary = model.get_output_embeddings().weight.shape[0]
    modes = mode_kwargs(adaptor, seeds=options.seed + torch.arange(options.batch))
    edits = _edits(options, vocabulary)
    modes |= {f"{name}_edits": {**modes[name], **edits} for name in ("stock", "fused")}
    with progress("generating", options.rounds * len(modes) * options.max_new_tokens) as step:
        runs = time_generation(
            model,
            inputs,
            modes,
            rounds=options.rounds,
            length=options.max_new_tokens,
            seed=options.seed,
            on_step=step,
        )
    record["drafts"] = _drafts(model, tokenizer, options)
    record["settings"] = {
        **settings_of(options, "model", "batch", "max_new_tokens", "rounds", "seed", "drafts"),
        **settings_of(options, "repetition_penalty", "no_repeat_ngram_size", "words"),
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "vocabulary": vocabulary,
        "adaptor": repr(adaptor),
        "prompt_tokens": inputs["input_ids"].shape[1],
    }
    record["modes"] = {name: _mode_record(runs[name], runs["greedy"]) for name in runs}


def _edits(options: argparse.Namespace, vocabulary: int) -> dict[str, Any]:
    """Arguments of `model.generate` for the processors."""
    chosen = torch.Generator().manual_seed(options.seed)
    ids = torch.randint(vocabulary, (2, options.words, 2), generator=chosen)
    bad, biased = ([x[: 1 + at % 2] for at, x in enumerate(two.tolist())] for two in ids)
    return {
        "repetition_penalty": options.repetition_penalty,
        "no_repeat_ngram_size": options.no_repeat_ngram_size,
        "bad_words_ids": bad,
        "sequence_bias": [[x, 1.5] for x in biased],
    }


def _drafts(model: Any, tokenizer: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Time prompt lookup on a text that repeats itself, and compare the tokens."""
    text = " ".join(PROMPTS)
    inputs = dict(tokenizer(f"{text}\n{text}\n{text[: len(text) // 4]}", return_tensors="pt"))
    settings = {"do_sample": True, "top_k": 0, "top_p": options.top_p, "temperature": 0.7}
    settings |= {"custom_generate": generate, "max_new_tokens": options.max_new_tokens}
    settings["min_new_tokens"] = options.max_new_tokens
    modes = {"plain": {}, "lookup": {"prompt_lookup_num_tokens": options.drafts}}

    def run(name: str, seed: int) -> Tensor:
        return model.generate(**inputs, **settings, **modes[name], seeds=[seed])

    pairs = [[run(name, seed) for name in modes] for seed in range(options.rounds)]
    calls: dict[str, Call] = {name: partial(run, name) for name in modes}
    took = in_turns(calls, rounds=options.rounds, slice_s=0)
    return {
        "tokens_per_s": {
            name: round(options.max_new_tokens / statistics.median(seconds), 2)
            for name, seconds in took.items()
        },
        "plain_to_lookup": ratios(took, "lookup", ["plain"], 3)["plain"],
        "equal": [sum(torch.equal(*pair) for pair in pairs), len(pairs)],
    }


def _mode_record(runs: Sequence[Generation], greedy: Sequence[Generation]) -> dict[str, Any]:
    """Summarise one mode."""
    ratios = step_ratios(runs, greedy)
    return {
        "step_ms": _summary([1e3 * step for run in runs for step in run.steps_s]),
        "step_ms_by_round": [round(step_ms([run]), 3) for run in runs],
        "ratio_to_greedy": _summary(ratios),
        "ratio_to_greedy_by_round": [round(ratio, 4) for ratio in ratios],
        "prefill_ms": _summary([1e3 * run.prefill_s for run in runs]),
        "tokens_per_s": round(tokens_per_s(runs), 2),
    }


def _summary(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    return dict(zip(("q1", "median", "q3"), quartiles(values), strict=True))


if __name__ == "__main__":
    sys.exit(main())
