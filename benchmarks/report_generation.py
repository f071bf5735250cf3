"""The documents' table of a result of bench_generation.py."""

from __future__ import annotations

from typing import Any

from report_words import host_words, software_words

MODES = {
    "greedy": "greedy search",
    "stock": "transformers, {adaptor}",
    "fused": "`fastadapt.hf.generate`, {adaptor}",
}


def generation_table(record: dict[str, Any]) -> str:
    """Cost of a generation step, a row per mode, and the machine below."""
    host, settings = record["host"], record["settings"]
    knobs = settings["adaptor"].removeprefix("Adaptor(").removesuffix(")")
    lines = ["| step | ms, median | ratio to greedy, median (quartiles) |", "|---|---|---|"]
    for name, mode in record["modes"].items():
        ratio = mode["ratio_to_greedy"]
        label = MODES[name].format(adaptor=knobs)
        spread = f"{ratio['median']:.3f} ({ratio['q1']:.3f} to {ratio['q3']:.3f})"
        lines.append(f"| {label} | {mode['step_ms']['median']:.1f} | {spread} |")
    lines += ["", f"{host_words(host, settings['dtype'])}, vocabulary {settings['vocabulary']:,}, "]
    lines[-1] += f"{settings['rounds']} rounds in turns, {software_words(host)}."
    return "\n".join(lines) + "\n"
