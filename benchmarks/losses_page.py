"""Writes the tables of docs/losses.md from the catalogue of losses; no formula is typed by hand.

python benchmarks/losses_page.py           # rewrites the blocks
python benchmarks/losses_page.py --check   # exit code 1 where they are not what it says
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from fastadapt.losses import CATALOGUE
from fastadapt.losses.catalogue import families
from fastadapt.study.gradients.table import (
    LETTERS,
    ROWS,
    TableRow,
    columns_of,
    markdown,
    symbols_list,
)

ROOT = Path(__file__).resolve().parent.parent
PAGE = "docs/losses.md"


def all_losses() -> str:
    """Every loss, a table a family."""
    parts = []
    for family, names in families().items():
        entries = [CATALOGUE[name] for name in names]
        columns = {
            "name": [f"`{name}`" for name in names],
            "loss": [entry.title for entry in entries],
            "source": [entry.source for entry in entries],
            "needs": [", ".join(sorted(entry.needs)) or "-" for entry in entries],
            "take it": [entry.when for entry in entries],
        }
        parts.append(_section(family, columns))
    return "\n".join(parts)


def gradients() -> str:
    """The coefficients of every loss and variant, a table a family, and what the symbols are."""
    parts = []
    for family in families():
        rows = [row for row in ROWS if row.family == family]
        limits = [_limits(row, rows[:i]) for i, row in enumerate(rows)]
        columns = columns_of(rows)
        if any(limits):
            for i, title in enumerate(("P⁻ → 0", "P⁻ → 1")):
                columns[title] = [pair[i] if pair else "-" for pair in limits]
        parts.append(_section(family, columns))
    symbols = "\n".join(f"- {symbol}: {words}" for symbol, words in symbols_list())
    return "\n".join([*parts, f"{symbols}\n\n{LETTERS}\n"])


def _limits(row: TableRow, before: Sequence[TableRow]) -> tuple[str, ...]:
    """The limits of a loss at its first row, which is that of the default options; else nothing."""
    (name,) = row.weights
    found = CATALOGUE[name].limits
    if found is None or any(name in other.weights for other in before):
        return ()
    return tuple("c there" if x == row.gradient.rejected else f"`{x}`" for x in found)


BLOCKS: dict[str, Callable[[], str]] = {"all": all_losses, "gradients": gradients}


def render(text: str) -> str:
    """The page with its blocks made anew."""
    for name, make in BLOCKS.items():
        block = f"<!-- {name} -->\n{make()}<!-- /{name} -->"
        text, found = re.subn(
            rf"<!-- {name} -->\n.*?<!-- /{name} -->", lambda _, b=block: b, text, flags=re.DOTALL
        )
        if found != 1:
            raise ValueError(f"{PAGE}: expected one block {name!r}, got {found}")
    return text


def main(words: Sequence[str] | None = None) -> int:
    """Rewrite or check the page."""
    parser = argparse.ArgumentParser(description="Rewrite docs/losses.md from the catalogue.")
    parser.add_argument("--check", action="store_true", help="change nothing, compare")
    options = parser.parse_args(words)
    before = (ROOT / PAGE).read_text(encoding="utf-8")
    after = render(before)
    if options.check:
        return int(before != after)
    (ROOT / PAGE).write_text(after, encoding="utf-8")
    return 0


def _section(title: str, columns: dict[str, list[str]]) -> str:
    """A table below its heading."""
    return "\n".join([f"### {title[0].upper()}{title[1:]}", "", *markdown(columns), ""])


if __name__ == "__main__":
    sys.exit(main())
