"""The documents' table of a result of bench_trainer.py."""

from __future__ import annotations

from typing import Any


def trainer_table(record: dict[str, Any], machine: str) -> str:
    """A DPO step beside trl's, and the machine in words."""
    settings = record["settings"]
    lines = [
        "| model | `RewardPenalizeTrainer`, ms | trl, ms | trl's to ours, median (quartiles) | "
        "peak memory, MB | trl's, MB |",
        "|---|---|---|---|---|---|",
    ]
    for cell in record["cells"]:
        low, middle, high = cell["trl_to_fastadapt"]
        times = " | ".join(f"{cell['step_ms'][name][1]:,.0f}" for name in ("fastadapt", "trl"))
        peaks = " | ".join(f"{cell['peak_mb'][n]['extra']:,}" for n in ("fastadapt", "trl"))
        trained = "all parameters" if cell["head"] == "trainable" else f"LoRA {settings['rank']}"
        ratio = f"{middle:.2f} ({low:.2f} to {high:.2f})"
        lines.append(f"| {cell['dtype']}, {trained} | {times} | {ratio} | {peaks} |")
    tokens = record["cells"][0]["response_tokens"]
    lines += [
        "",
        f"{settings['model']}, {settings['batch']} pairs of at most {settings['max_length']} "
        f"tokens ({tokens} of responses), {settings['steps']} steps in turns, medians; memory over "
        f"the loaded models, gradients and optimizer in it. {machine}.",
    ]
    return "\n".join(lines) + "\n"
