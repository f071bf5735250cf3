"""Why ratios break: the trainer's probability of a sampled token over the sampler's, three ways.

    python benchmarks/ratios.py --out benchmarks/results/ratios.json

SmolLM2-135M-Instruct draws under top-p; then the same model makes the logits of all tokens again,
in one pass over whole sequences in other batches, as a trainer does before its first update. A
ratio of 1 is right. A token is scored on the whole vocabulary ("whole"), on what the filters leave
of the trainer's own logits ("recompute"), or on the ids that it was drawn from ("replay").
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from torch import Tensor

import fastadapt.hf
from fastadapt import (
    Adaptor,
    Support,
    adapted_logps,
    label_logps,
    linear_log_odds,
    linear_support_log_odds,
)
from fastadapt.training.pretrained import load_model, no_progress
from harness import MODEL, SEED, Axis, Benchmark, Option, progress, settings_of

ASKS = (
    "Why is the sky blue?", "Tell me a short story about a fox.", "How do I boil an egg?",
    "Name three rivers.", "What is a prime number?", "Write a poem about rain.",
    "Explain how a bicycle stays up.", "What should I cook tonight?",
    "Describe a city at night.", "How does a battery work?", "Give me advice for an exam.",
    "What did the Romans build?", "Write a letter to a friend.", "Why do cats purr?",
    "Plan a day in the mountains.", "What is music for?",
)  # fmt: skip
WAYS = ("whole", "recompute", "replay")
NEAR = (0.9, 1.1)
# edges of bins of ratios, 1 in the middle of one; the outermost hold what is beyond
BINS = [round(0.49 + 0.02 * i, 2) for i in range(53)]
BENCHMARK = Benchmark(
    "ratios",
    __doc__,
    {
        "dtypes": Axis(("float32", "bfloat16")),
        "model": MODEL,
        "sequences": Option(4, "of each of 16 prompts", least=1),
        "tokens": Option(64, "of a sequence, at most", least=1),
        "batch": Option(8, "sequences of the trainer's", least=1),
        "top_p": Option(0.9),
        "temperature": Option(0.7),
        "seed": SEED,
    },
    ("transformers",),
)


@BENCHMARK
def main(options: argparse.Namespace, record: dict[str, Any]) -> bool:
    """Draw and score in each dtype; fails where a replayed ratio of float32 is off by 1e-3."""
    names = ("model", "sequences", "tokens", "batch", "top_p", "temperature", "seed")
    record["settings"] = {**settings_of(options, *names), "bins": BINS}
    record["cells"] = []
    good = True
    with progress("scoring", len(options.dtypes)) as step:
        for dtype in options.dtypes:
            cells = ratios_of(getattr(torch, dtype), options)
            record["cells"] += [{"dtype": dtype, **cell} for cell in cells]
            exact = cells[-1]["largest_log"] <= 1e-3 or dtype != "float32"
            good &= exact and cells[-1]["outside"] == 0
            step()
    return not good


@torch.no_grad()
def ratios_of(dtype: torch.dtype, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The ratios of one dtype, a cell for each way."""
    if options.threads:
        torch.set_num_threads(options.threads)
    model, tokenizer = load_model(options.model, fetch=True, progress=no_progress)
    model.to(dtype).eval()
    tokenizer.padding_side = "left"
    asks = [[{"role": "user", "content": ask}] for ask in ASKS]
    prompts = tokenizer.apply_chat_template(
        asks, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
    )
    drawn = model.generate(
        **prompts,
        custom_generate=fastadapt.hf.generate,
        seeds=[options.seed + i for i in range(len(ASKS) * options.sequences)],
        num_return_sequences=options.sequences,
        do_sample=True,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=0,
        max_new_tokens=options.tokens,
        return_dict_in_generate=True,
        output_logprobs=True,
        output_supports=True,
    )
    first = prompts["input_ids"].shape[1]
    lengths = [len(support) for support in drawn.supports]
    mask = prompts["attention_mask"].repeat_interleave(options.sequences, 0)
    mask = torch.cat([mask, torch.ones_like(drawn.sequences[:, first:])], 1)
    parts = [
        hidden_of(model, drawn.sequences[i : i + options.batch], mask[i : i + options.batch], first)
        for i in range(0, len(lengths), options.batch)
    ]
    used = torch.arange(drawn.logprobs.shape[1]) < torch.tensor(lengths)[:, None]
    hidden, tokens = torch.cat(parts)[used], drawn.sequences[:, first:][used]
    sampler, support = drawn.logprobs[used].double(), Support.cat(drawn.supports)
    return [
        {"way": way, **summed(logps.double() - sampler)}
        for way, logps in scored(model.get_output_embeddings(), hidden, tokens, support, options)
    ]


def hidden_of(model: Any, ids: Tensor, mask: Tensor, first: int) -> Tensor:
    """The states that tokens are predicted from, (B, T, H)."""
    places = (mask.cumsum(1) - 1).clamp(min=0)
    states = model.base_model(ids, attention_mask=mask, position_ids=places).last_hidden_state
    made: Tensor = states[:, first - 1 : -1]
    return made


def scored(
    head: Any, hidden: Tensor, tokens: Tensor, support: Support, options: argparse.Namespace
) -> list[tuple[str, Tensor]]:
    """The trainer's log-probability of each token, (N,), three ways."""
    scale = 1 / options.temperature
    adaptor = Adaptor(temperature=options.temperature, top_p=options.top_p)
    decided = torch.cat(
        [
            adapted_logps(head(rows).float(), own, adaptor)
            for rows, own in zip(hidden.split(256), tokens.split(256), strict=True)
        ]
    )
    given = hidden, head.weight, tokens
    whole = linear_log_odds(*given, logit_scale=scale)
    replayed = linear_support_log_odds(*given, support, logit_scale=scale)
    return [
        ("whole", label_logps(whole)),
        ("recompute", decided),
        ("replay", label_logps(replayed)),
    ]


def summed(log_ratios: Tensor) -> dict[str, Any]:
    """What log ratios (N,), float64, come to; a token outside its support has one of -inf."""
    inside = log_ratios.isfinite()
    ratios = log_ratios.exp()
    far = (ratios < NEAR[0]) | (ratios > NEAR[1])
    edges = torch.tensor(BINS[1:-1], dtype=torch.float64)
    counts = torch.bucketize(ratios, edges, right=True).bincount(minlength=len(BINS) - 1)
    return {
        "tokens": len(ratios),
        "outside": int((~inside).sum()),
        "mean": float(ratios.mean()),
        "far": float(far.double().mean()),
        "largest_log": float(log_ratios[inside].abs().max()),
        "counts": counts.tolist(),
    }


if __name__ == "__main__":
    sys.exit(main())
