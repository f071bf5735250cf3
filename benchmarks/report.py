"""Writes the documents' figures from benchmarks/results/*.json; no figure is typed by hand.

    python benchmarks/report.py           # rewrites README.md, docs/benchmarks.md and sampling.png
    python benchmarks/report.py --check   # exit code 1 where they are not what the results say

A result that was measured with uncommitted changes in the tree is refused.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from limits import (
    GPU_CELL,
    GPU_LOSS_PEERS,
    geometric_mean,
    gpu_losses_limits,
    gpu_sampling_limits,
    limit_rows,
    losses_limits,
    sampling_limits,
    score_limits,
    train_limits,
)
from report_generation import generation_table
from report_headline import BUILT_FROM, FIGURE, headline
from report_redesign import redesign_table
from report_tracker import tracker_table
from report_tradeoff import tradeoff_table
from report_trainer import trainer_table
from report_words import host_words, peer_versions, software_words

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BENCHMARKS = "docs/benchmarks.md"
LOSS_NAMES = {
    "fastadapt": "`linear_log_odds`",
    "plain": "plain PyTorch",
    "compiled": "`torch.compile` of it",
    "torch": "`linear_cross_entropy`",
    "trl": "trl",
    "liger": "Liger",
}
GPU_MODE = "cold, graph"  # the way of timing that the table shows
GPU_PEERS = {
    "flashinfer": "FlashInfer",
    "vllm": "vLLM",
    "stock": "transformers",
    "compiled": "`torch.compile`",
}
# blocks that may lack a result
UNMEASURED = {
    **dict.fromkeys(("gpu_sampling", "gpu_losses"), "Not yet measured on a GPU.\n"),
    **dict.fromkeys(("tracker", "tradeoff", "trainer"), "Not yet measured.\n"),
}
TRAINING = {"linear": "`linear_log_odds`", "logits": "full logits, `label_log_odds`"}


def main() -> int:
    """Rewrite or check the pages and the figure."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing, compare")
    options = parser.parse_args()
    before = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
    after = {page: render(text, page) for page, text in before.items()}
    shows = any(FIGURE in text for text in after.values())
    if options.check:
        return int(before != after or (shows and not figure_is_current()))
    for page, text in after.items():
        (ROOT / page).write_text(text, encoding="utf-8")
    if shows:
        import figure  # the tables need no matplotlib

        figure.draw(load("sampling"), RESULTS / FIGURE)
    return 0


def render(text: str, page: str = BENCHMARKS) -> str:
    """A page with every marked block made anew; each result has one, each block a result.

    Where a block may lack its result it says so.
    """
    for name, table in PAGES[page].items():
        sources = SOURCES.get(name, (name,))
        measured = all((RESULTS / f"{source}.json").exists() for source in sources)
        if not measured and f"<!-- {name} -->" not in text:
            continue
        known = measured or name not in UNMEASURED
        made = table(*map(load, sources)) if known else UNMEASURED[name]
        block = f"<!-- {name} -->\n{made}<!-- /{name} -->"
        text, found = re.subn(
            rf"<!-- {name} -->\n.*?<!-- /{name} -->", lambda _, b=block: b, text, flags=re.DOTALL
        )
        if found != 1:
            raise ValueError(f"{page}: expected one block {name!r}, got {found}")
    return text


def load(name: str) -> dict[str, Any]:
    """A result, refused where the code that made it is in no commit."""
    path = RESULTS / f"{name}.json"
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if record["host"]["dirty"] or not record["host"]["commit"]:
        raise ValueError(f"{path.name}: expected a result of a committed tree, got a dirty one")
    return record


def figure_is_current() -> bool:
    """Whether the figure was drawn from the result that is there: it names the commit."""
    path = RESULTS / FIGURE
    return path.exists() and load("sampling")["host"]["commit"].encode() in path.read_bytes()


def sampling_table(record: dict[str, Any]) -> str:
    """What `sample` must show, where it is fast and slow, the figure and the machine."""
    cells = record["cells"]
    kinds = list(record["settings"]["rows"])
    lines = [*limit_rows(sampling_limits(record)), ""]
    lines += [
        "Time of `sample` to that of torch.softmax of the same rows: geometric mean (largest).",
        "",
        f"| adaptor | {' | '.join(kinds)} |",
        "|---|" + "---|" * len(kinds),
    ]
    for adaptor in record["settings"]["adaptors"]:
        entries = []
        for kind in kinds:
            ratios = [
                cell["to_softmax"]["fastadapt"][1]
                for cell in cells
                if cell["adaptor"] == adaptor and cell["rows"] == kind
            ]
            entries.append(f"{geometric_mean(ratios):.2f} ({max(ratios):.2f})")
        lines.append(f"| {adaptor} | {' | '.join(entries)} |")
    lines += [
        "",
        f"{host_words(record['host'], ' and '.join(record['settings']['dtypes']))}, "
        f"{len(cells)} cells of {_counts(cells)}, up to {record['settings']['rounds']} rounds in "
        "turns, medians, "
        f"{software_words(record['host'])}.",
        *(f"Note: {note}." for note in record["notes"]),
    ]
    return "\n".join(lines) + "\n"


def gpu_sampling_table(record: dict[str, Any]) -> str:
    """What `sample` must show on a GPU, its times, those of the others, and the machine."""
    gpu, settings = record["host"]["gpu"], record["settings"]
    if gpu is None:
        raise ValueError("gpu_sampling.json: expected a result of a GPU, got one of the CPU")
    place = {key: GPU_CELL[key] for key in ("vocabulary", "rows", "dtype")}
    found = {
        (c["adaptor"], c["batch"]): c
        for c in record["cells"]
        if c["mode"] == GPU_MODE and all(c[key] == value for key, value in place.items())
    }
    batches = sorted({batch for _, batch in found})
    lines = [*limit_rows(gpu_sampling_limits(record)), ""]
    lines += [
        f"Time in µs (times that of one read of the rows), V = {place['vocabulary']:,}, "
        f"{place['rows']}, {place['dtype']}, {GPU_MODE}:",
        "",
        f"| adaptor | {' | '.join(f'N = {batch}' for batch in batches)} |",
        "|---|" + "---|" * len(batches),
    ]
    for adaptor in settings["adaptors"]:
        entries = []
        for batch in batches:
            cell = found.get((adaptor, batch))
            ratio = cell and cell["to_bound"]["fastadapt"][1]
            entries.append(f"{cell['us']['fastadapt'][1]:.1f} ({ratio:.2f})" if cell else "-")
        lines.append(f"| {adaptor} | {' | '.join(entries)} |")
    lines += ["", *_gpu_peer_rows(record["peers"])]
    versions = record["host"]["versions"]
    others = "".join(
        f", {name} {versions[name]}"
        for name in ("triton", "flashinfer-python", "vllm")
        if versions.get(name)
    )
    lines += [
        f"{gpu['name']}, driver {gpu['driver']}, CUDA {gpu['cuda']}, {len(record['cells'])} cells, "
        f"up to {settings['rounds']} rounds in turns, medians, "
        f"{software_words(record['host'])}{others}.",
        *(f"Note: {note}." for note in record["notes"]),
    ]
    return "\n".join(lines) + "\n"


def _gpu_peer_rows(peers: list[dict[str, Any]]) -> list[str]:
    """A table of the others' times to ours, a row per adaptor; empty where none was measured."""
    names = [name for name in GPU_PEERS if any(name in p["to_fastadapt"] for p in peers)]
    if not names:
        return []
    lines = [
        "Time of others to ours, geometric mean over N and the ways of timing:",
        "",
        f"| adaptor | {' | '.join(GPU_PEERS[name] for name in names)} |",
        "|---|" + "---|" * len(names),
    ]
    for adaptor in dict.fromkeys(p["adaptor"] for p in peers):
        entries = []
        for name in names:
            sides = [p["to_fastadapt"].get(name) for p in peers if p["adaptor"] == adaptor]
            mean = geometric_mean([side[1] for side in sides if side])
            entries.append("-" if mean is None else f"{mean:.1f} x")
        lines.append(f"| {adaptor} | {' | '.join(entries)} |")
    return [*lines, ""]


def score_table(record: dict[str, Any]) -> str:
    """What `score` must show, its times and the machine."""
    host, settings = record["host"], record["settings"]
    count = settings["adaptors"]
    lines = [*limit_rows(score_limits(record)), ""]
    lines += [
        f"| V, rows | one adaptor, µs | {count} in one call, µs | {count} calls, µs | "
        f"transformers, {count} chains, µs |",
        "|---|---|---|---|---|",
    ]
    for cell in record["cells"]:
        times = [f"{cell['us'][name][1]:,.0f}" for name in ("one", "all", "calls", "stock")]
        lines.append(f"| {cell['vocabulary']:,}, {cell['rows']} | {' | '.join(times)} |")
    lines += [
        "",
        f"{host_words(host, settings['dtype'])}, N = {record['cells'][0]['batch']}, "
        f"{settings['rounds']} rounds in turns, medians, {software_words(host)}.",
        *(f"Note: {note}." for note in record["notes"]),
    ]
    return "\n".join(lines) + "\n"


def losses_table(record: dict[str, Any]) -> str:
    """What `linear_log_odds` must show, its times and memory, and the machine."""
    names = ["fastadapt", *record["settings"]["peers"]]
    head = " | ".join(LOSS_NAMES[name] for name in names)
    lines = [*limit_rows(losses_limits(record)), ""]
    lines += [
        "Forward and backward, ms (peak memory over inputs and gradients, MB):",
        "",
        f"| N, H, V, dtype, head | {head} | formula |",
        "|---|" + "---|" * (len(names) + 1),
    ]
    for cell in record["cells"]:
        memory = cell.get("memory_mb", {})
        entries = []
        for name in names:
            took = cell["ms"].get(name)
            text = f"{took['both'][1]:,.0f}" if took else "-"
            entries.append(f"{text} ({memory[name]:,.0f})" if name in memory else text)
        formula = cell.get("memory_formula_mb")
        shape = f"{cell['n']:,}, {cell['h']:,}, {cell['v']:,}, {cell['dtype']}, {cell['head']}"
        entries.append("-" if formula is None else f"({formula:,.0f})")
        lines.append(f"| {shape} | {' | '.join(entries)} |")
    counts = sorted({cell["rounds"] for cell in record["cells"]})
    rounds = " to ".join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))
    lines += [
        "",
        f"{host_words(record['host'], 'medians')} of {rounds} rounds in turns, "
        f"{software_words(record['host'])}{peer_versions(record['host'])}. -: not run there, since "
        "a round would take minutes.",
        *(f"Note: {note}." for note in record["notes"]),
    ]
    return "\n".join(lines) + "\n"


def gpu_losses_table(record: dict[str, Any]) -> str:
    """What `linear_log_odds` must show on a GPU, times and peaks, and the machine."""
    gpu, settings, host = record["host"]["gpu"], record["settings"], record["host"]
    if gpu is None:
        raise ValueError("gpu_losses.json: expected a result of a GPU, got one of the CPU")
    ours = {"fastadapt": "`linear_log_odds`", "nothing kept": "the same, nothing kept"}
    names = {"products": "its products", **ours, **GPU_LOSS_PEERS}
    lines = [*limit_rows(gpu_losses_limits(record)), ""]
    lines += [
        f"Forward and backward, ms (peak memory over inputs and gradients, MiB), H = "
        f"{settings['hidden']:,}, V = {settings['vocabulary']:,}, {settings['dtype']}:",
        "",
        f"| N, task, plan | {' | '.join(names.values())} |",
        "|---|" + "---|" * len(names),
    ]
    for cell in record["cells"]:
        entries = []
        for name in names:
            took, peak = cell["ms"].get(name), cell["peak_mib"].get(name)
            text = f"{took[1]:,.1f}" if took else "-"
            entries.append(text if peak is None else f"{text} ({peak:,.0f})")
        lines.append(f"| {cell['n']:,}, {cell['task']}, {cell['plan']} | {' | '.join(entries)} |")
    versions = ((name, host["versions"].get(name)) for name in ("triton", "cut-cross-entropy"))
    others = "".join(f", {name} {version}" for name, version in versions if version)
    lines += [
        "",
        f"{gpu['name']}, driver {gpu['driver']}, CUDA {gpu['cuda']}, up to {settings['rounds']} "
        f"rounds in turns, medians, {software_words(host)}{peer_versions(host)}{others}.",
        *(f"Note: {note}." for note in record["notes"]),
    ]
    return "\n".join(lines) + "\n"


def train_table(record: dict[str, Any]) -> str:
    """What the training run must show, where it began and ended, and the machine."""
    host, settings = record["host"], record["settings"]
    lines = [*limit_rows(train_limits(record)), ""]
    lines += [
        "| run | loss, first and last step | s/step, median | peak memory over the model, MB |",
        "|---|---|---|---|",
    ]
    for name, label in TRAINING.items():
        run = record["variants"][name]
        first, *_, last = run["curves"]["loss"]
        seconds, memory = run["step_s"][1], run["memory_mb"]["extra"]
        lines.append(f"| {label} | {first:.5f}, {last:.5f} | {seconds:.1f} | {memory:,} |")
    fixed = record["variants"]["linear"]["memory_mb"]["gradients_and_optimizer"]
    lines += [
        "",
        f"{settings['model']}, {settings['steps']} steps of DPO+ExMATE, {settings['batch']} pairs "
        f"each, at most {settings['max_length']} tokens with a prompt, AdamW; gradients and its "
        f"state take {fixed:,} MB in both. {host_words(host, settings['dtype'])}, "
        f"{software_words(host)}.",
    ]
    return "\n".join(lines) + "\n"


def _trainer(record: dict[str, Any]) -> str:
    """A DPO step beside trl's."""
    host = record["host"]
    machine = f"{host_words(host, 'AdamW')}, {software_words(host)}{peer_versions(host)}"
    return trainer_table(record, machine)


def _tradeoff(record: dict[str, Any]) -> str:
    """The study's sampling and scoring beside transformers' way."""
    host = record["host"]
    return tradeoff_table(
        record, f"{host_words(host, record['settings']['dtype'])}, {software_words(host)}"
    )


def _tracker(record: dict[str, Any]) -> str:
    """The cost of the tracker."""
    host = record["host"]
    return tracker_table(record, f"{host_words(host, 'AdamW')}, {software_words(host)}")


def _counts(cells: list[dict[str, Any]]) -> str:
    """How many values each axis of the grid has."""
    axes = {"vocabulary": "V", "batch": "N", "rows": "rows", "adaptor": "adaptors"}
    names = {**axes, "dtype": "dtypes"}
    return " x ".join(f"{len({cell[key] for cell in cells})} {name}" for key, name in names.items())


def _redesign(record: dict[str, Any]) -> str:
    """The GPU's sampling kernels before and after."""
    return redesign_table(record, software_words(record["host"]))


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "generation": generation_table,
    "sampling": sampling_table,
    "gpu_redesign": _redesign,
    "gpu_sampling": gpu_sampling_table,
    "score": score_table,
    "losses": losses_table,
    "gpu_losses": gpu_losses_table,
    "train_preferences": train_table,
    "trainer": _trainer,
    "tradeoff": _tradeoff,
    "tracker": _tracker,
}
SOURCES = {"headline": BUILT_FROM}  # of blocks that are not made of the one result of their name
PAGES: dict[str, dict[str, Callable[..., str]]] = {
    "README.md": {"headline": headline},
    BENCHMARKS: TABLES,
}


if __name__ == "__main__":
    sys.exit(main())
