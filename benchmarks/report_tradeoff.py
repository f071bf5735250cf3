"""The documents' table of a result of bench_tradeoff.py."""

from __future__ import annotations

from typing import Any

from limits import limit_rows, tradeoff_limits

WAYS = {
    "fastadapt": "`draw_strings` (scores under all adaptors too), `score_strings`",
    "stock": "`generate` with transformers' warpers, three passes an adaptor",
}


def tradeoff_table(record: dict[str, Any], machine: str) -> str:
    """What the study's sampling must show, the seconds of both ways, and the machine in words."""
    settings = record["settings"]
    lines = [
        *limit_rows(tradeoff_limits(record)),
        "",
        "| | sampling, s | scoring, s | all, s |",
        "|---|---|---|---|",
    ]
    for way, label in WAYS.items():
        parts = record["seconds"][way]
        seconds = [parts[part][1] for part in ("sampling", "scoring", "all")]
        lines.append(f"| {label} | {' | '.join(f'{s:.1f}' for s in seconds)} |")
    without = record["stock_to_ours"]["without the repeated pass"][1]
    lines += [
        "",
        "Without its third pass, which repeats the second, transformers' way takes "
        f"{without:.2f} x our time.",
        "",
        f"{settings['model']}, {settings['prompts']} prompts, {settings['adaptors']} adaptors, "
        f"{settings['strings']} strings of {settings['max_new_tokens']} tokens each, "
        f"{settings['rounds']} rounds in turns, medians. {machine}.",
    ]
    return "\n".join(lines) + "\n"
