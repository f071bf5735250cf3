"""Cost of a generation step: greedy, transformers' own sampling and the fused one, in turns.

    python benchmarks/bench_generation.py --out benchmarks/results/generation.json

A step is one forward pass and one draw for the whole batch; the prefill is recorded apart. Every
round runs all three modes, so a ratio compares runs of the same minutes. Run it on an idle machine:
the host record holds the load average at the start.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

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
from fastadapt.study._progress import progress_bar, stepper
from fastadapt.training.pretrained import load_model
from host import host_record, quartiles


def main() -> None:
    """Run the benchmark, print a table and write the JSON file."""
    options = _parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    host = host_record()
    model, tokenizer = load_model(options.model, fetch=True)
    inputs = encode_prompts(tokenizer, [PROMPTS[i % len(PROMPTS)] for i in range(options.batch)])
    adaptor = Adaptor(top_p=options.top_p)
    modes = mode_kwargs(adaptor, seeds=options.seed + torch.arange(options.batch))
    steps = options.rounds * len(modes) * options.max_new_tokens
    with progress_bar(Console(stderr=True), auto_refresh=False) as bar:
        runs = time_generation(
            model,
            inputs,
            modes,
            rounds=options.rounds,
            length=options.max_new_tokens,
            seed=options.seed,
            on_step=stepper(bar, "generating", steps),
        )
    record = {
        "benchmark": "generation",
        "host": host,
        "settings": {
            "model": options.model or "SmolLM2-135M-Instruct",
            "parameters": sum(p.numel() for p in model.parameters()),
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
            "vocabulary": model.get_output_embeddings().weight.shape[0],
            "adaptor": repr(adaptor),
            "batch": options.batch,
            "prompt_tokens": inputs["input_ids"].shape[1],
            "max_new_tokens": options.max_new_tokens,
            "rounds": options.rounds,
            "seed": options.seed,
        },
        "modes": {name: _mode_record(runs[name], runs["greedy"]) for name in runs},
    }
    _print(record)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _parse() -> argparse.Namespace:
    """Read the arguments."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, help="JSON file to write")
    add("--model", metavar="NAME_OR_PATH", help="default: SmolLM2-135M-Instruct")
    add("--batch", type=int, default=32)
    add("--max-new-tokens", type=int, default=48)
    add("--rounds", type=int, default=7)
    add("--top-p", type=float, default=0.9)
    add("--seed", type=int, default=0)
    add("--threads", type=int, help="default: torch's own choice")
    options = parser.parse_args()
    for name, low in (("batch", 1), ("max_new_tokens", 2), ("rounds", 2)):
        if getattr(options, name) < low:
            parser.error(f"{name}: expected at least {low}, got {getattr(options, name)}")
    return options


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
    low, middle, high = quartiles(values)
    return {"median": middle, "q1": low, "q3": high}


def _print(record: dict[str, Any]) -> None:
    """Print the result as a table."""
    host, settings = record["host"], record["settings"]
    table = Table(
        title=f"{settings['model']}, {settings['adaptor']}, batch {settings['batch']}, "
        f"{settings['max_new_tokens']} tokens, {settings['rounds']} rounds\n"
        f"{host['cpu']}, {host['torch_threads']} threads, torch {host['versions']['torch']}",
        title_justify="left",
    )
    table.add_column("mode")
    for name in ("ms/step", "quartiles", "x greedy", "quartiles", "tokens/s"):
        table.add_column(name, justify="right")
    for name, mode in record["modes"].items():
        cost, ratio = mode["step_ms"], mode["ratio_to_greedy"]
        table.add_row(
            name,
            f"{cost['median']:.1f}",
            f"{cost['q1']:.1f} {cost['q3']:.1f}",
            f"{ratio['median']:.3f}",
            f"{ratio['q1']:.3f} {ratio['q3']:.3f}",
            f"{mode['tokens_per_s']:.1f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
