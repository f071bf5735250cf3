"""Writes the documents' figures from benchmarks/results/*.json; no figure is typed by hand.

    python benchmarks/report.py           # rewrites README.md, pages of docs/ and sampling.png
    python benchmarks/report.py --check   # exit code 1 where they are not what the results say

Each table and the words around it are a macro of report.md.jinja. A result that was measured with
uncommitted changes in the tree is refused.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

import figure
from limit import geometric_mean
from limits import (
    GPU_CELL,
    GPU_LOSS_PEERS,
    LIMITS,
    chain_times,
    memory_shares,
)
from support_limits import SUPPORT_LIMITS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
FIGURE = RESULTS / "sampling.png"
GPU_MODE = "cold, graph"  # the way of timing that the table shows
# blocks that may lack a result
UNMEASURED = {
    **dict.fromkeys(
        ("gpu_sampling", "gpu_sampling_earlier", "gpu_sampling_peers", "gpu_losses"),
        "Not yet measured on a GPU.\n",
    ),
    **dict.fromkeys(
        (
            *("divergence", "edits", "filters", "history", "tracker", "tradeoff", "trainer"),
            *("sharded", "verify", "vllm", "kept", "support", "ratios", "train_supports"),
            "families",
        ),
        "Not yet measured.\n",
    ),
}
Record = Mapping[str, Any]
Columns = Mapping[str, str | Sequence[str]]  # the title of each, and the format of its fields


def main(
    pages: Sequence[str] = (
        *("README.md", "docs/benchmarks.md", "docs/choosing.md", "docs/sharded.md"),
        "docs/losses.md",
    ),
    source: str = "sampling",
    drawing: Path = FIGURE,
    draw: Callable[[Any, Path], None] = figure.draw,
) -> int:
    """Rewrite or check some pages and the figure that is drawn from one of their results."""
    parser = argparse.ArgumentParser(description="Rewrite pages from benchmarks/results/.")
    parser.add_argument("--check", action="store_true", help="change nothing, compare")
    options = parser.parse_args()
    before = {page: (ROOT / page).read_text(encoding="utf-8") for page in pages}
    after = {page: render(text, page) for page, text in before.items()}
    shows = any(drawing.name in text for text in after.values())
    if options.check:
        return int(before != after or (shows and not figure_is_current(source, drawing)))
    for page, text in after.items():
        (ROOT / page).write_text(text, encoding="utf-8")
    if shows:
        draw(load(source), drawing)
    return 0


def render(text: str, page: str = "docs/benchmarks.md") -> str:
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


def figure_is_current(source: str = "sampling", drawing: Path = FIGURE) -> bool:
    """Whether a figure was drawn from the result that is there: it names the commit."""
    return drawing.exists() and load(source)["host"]["commit"].encode() in drawing.read_bytes()


def table(rows: Mapping[str, Record] | Iterable[Record], *columns: Columns, **words: Any) -> str:
    """A table in Markdown, with a row for each of a result's cells.

    Args:
        rows: the cells; those of a mapping have their key as the field `name`.
        *columns: title and format, or several formats. Where the first lacks its field the entry is
            "-", a later one is left out.
        **words: for a field, what to show in place of each of its values.
    """
    if isinstance(rows, Mapping):
        rows = [{"name": name, **row} for name, row in rows.items()]
    titles = {title: form for some in columns for title, form in some.items()}
    shown = [{**row, **{key: known[row[key]] for key, known in words.items()}} for row in rows]
    entries = [[_entry(form, row) for form in titles.values()] for row in shown]
    head, *body = (
        "|" + "".join(f" {x} |" if x else " |" for x in row) for row in (titles, *entries)
    )
    return "\n".join([head, "|" + "---|" * len(titles), *body])


def _entry(forms: str | Sequence[str], row: Record) -> str:
    """The text of a cell's fields."""
    parts = []
    for form in [forms] if isinstance(forms, str) else forms:
        try:
            parts.append(form.format(**row))
        except KeyError:
            parts.append("" if parts else "-")
    return "".join(parts)


def each(names: Iterable[str], titles: Mapping[str, str], *forms: str) -> Columns:
    """Columns of a kind, one for each of some names, in whose formats NAME is the name."""
    return {titles[name]: [form.replace("NAME", name) for form in forms] for name in names}


def summary(record: Record) -> str:
    """What a benchmark prints: its block, or where there can be none what it must show."""
    name = record["benchmark"]
    if name in TABLES | TABLES_OF_SUPPORTS and record["host"].get("gpu", True):
        return block(name, record)
    return str(_templates().demands(record)) if name in LIMITS | SUPPORT_LIMITS else ""


def comparison(record: Record) -> Any:
    """The comparison of losses, whose intervals need NumPy."""
    from compare_report import Comparison

    return Comparison(record)


def runs_of(record: Record) -> tuple[Any, str | None]:
    """The rows of runs of GRPO, and the difference of two ways."""
    import support_report

    return support_report.arms(dict(record)), support_report.difference(dict(record))


@functools.cache
def _templates() -> Any:
    """The macros of report.md.jinja."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
    )
    environment.filters |= {
        "line": lambda text: " ".join(text.split()) + "\n",
        "to": format,
    }
    environment.globals |= {
        "chain_times": chain_times,
        "comparison": comparison,
        "each": each,
        "limits_of": lambda record: (LIMITS | SUPPORT_LIMITS)[record["benchmark"]](record),
        "runs_of": runs_of,
        "memory_shares": memory_shares,
        "table": table,
        "gpu_cell": GPU_CELL,
        "gpu_loss_peers": GPU_LOSS_PEERS,
        "gpu_mode": GPU_MODE,
        "mean": geometric_mean,
    }
    return environment.get_template("report.md.jinja").module


def block(name: str, *records: Record) -> str:
    """What a page has of some results."""
    for record in records:
        if record["host"].get("gpu", True) is None:
            raise ValueError(f"{name}: expected a result of a GPU, got one of the CPU")
    return str(getattr(_templates(), name)(*records))


TABLES: dict[str, Callable[..., str]] = {
    name: functools.partial(block, name)
    for name in (
        *("generation", "sampling", "gpu_redesign", "gpu_sampling", "gpu_predicted", "score"),
        *("edits", "filters", "losses", "divergence", "gpu_losses", "gpu_loss_static"),
        *("history", "train_preferences", "trainer", "verify", "vllm"),
        *("tradeoff", "tracker"),
    )
} | dict.fromkeys(
    ("gpu_sampling_earlier", "gpu_sampling_peers"), functools.partial(block, "gpu_sampling")
)
TABLES_OF_SUPPORTS: dict[str, Callable[..., str]] = {
    name: functools.partial(block, name) for name in ("ratios", "train_supports", "support", "kept")
}
# of blocks that are not made of the one result of their name
SOURCES = {
    "headline": ("sampling", "generation", "losses", "trainer"),
    "choosing": ("sampling", "generation", "gpu_sampling_peers"),
}
PAGES: dict[str, dict[str, Callable[..., str]]] = {
    "README.md": {"headline": functools.partial(block, "headline")},
    "docs/benchmarks.md": TABLES,
    "docs/choosing.md": {"choosing": functools.partial(block, "choosing")},
    "docs/sharded.md": {"sharded": functools.partial(block, "sharded")},
    "docs/losses.md": {"families": functools.partial(block, "families")},
    "docs/results.md": {"compare_losses": functools.partial(block, "compare_losses")},
    "docs/supports.md": TABLES_OF_SUPPORTS,
}


if __name__ == "__main__":
    sys.exit(main())
