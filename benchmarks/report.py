"""Writes the README's figures from benchmarks/results/*.json; no figure is typed by hand.

    python benchmarks/report.py           # rewrites README.md
    python benchmarks/report.py --check   # exit code 1 where README.md is not what they say

A result that was measured with uncommitted changes in the tree is refused.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MODES = {
    "greedy": "greedy search",
    "stock": "transformers, {adaptor}",
    "fused": "`fastadapt.hf.generate`, {adaptor}",
}


def main() -> int:
    """Rewrite or check the README."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing, compare")
    options = parser.parse_args()
    readme = ROOT / "README.md"
    before = readme.read_text(encoding="utf-8")
    after = render(before)
    if options.check:
        return int(before != after)
    readme.write_text(after, encoding="utf-8")
    return 0


def render(readme: str) -> str:
    """The README with every marked block made anew."""
    for name, table in (("generation", generation_table),):
        block = f"<!-- {name} -->\n{table(load(name))}<!-- /{name} -->"
        readme, found = re.subn(
            rf"<!-- {name} -->\n.*?<!-- /{name} -->", lambda _, b=block: b, readme, flags=re.DOTALL
        )
        if found != 1:
            raise ValueError(f"README.md: expected one block {name!r}, got {found}")
    return readme


def load(name: str) -> dict[str, Any]:
    """A result, refused where the code that made it is in no commit."""
    path = RESULTS / f"{name}.json"
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if record["host"]["dirty"] or not record["host"]["commit"]:
        raise ValueError(f"{path.name}: expected a result of a committed tree, got a dirty one")
    return record


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
    versions = host["versions"]
    lines += [
        "",
        f"{host['cpu']}, {host['torch_threads']} threads, {settings['dtype']}, vocabulary "
        f"{settings['vocabulary']:,}, {settings['rounds']} rounds in turns, torch "
        f"{versions['torch']}, transformers {versions['transformers']}, commit "
        f"{host['commit'][:7]}.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
