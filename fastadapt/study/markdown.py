"""Pieces of Markdown for the studies' reports: numbers, paragraphs, lists, tables."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from itertools import pairwise

Estimate = Sequence[float | None]

_CODE = 92  # characters of code that a page of the documents shows; docs/site.css
_WORD = re.compile(r"""(?:'[^']*'|"(?:[^"\\]|\\.)*"|\\.|\S)+""")  # of a shell, quotes and all


def sign(found: Estimate) -> str:
    """Describes what an interval says about a sign."""
    value, low, high = (float("nan") if v is None else v for v in found)
    if value != value:  # NaN
        return "not defined"
    if low > 0:
        return "positive"
    return "negative" if high < 0 else "of undecided sign"


def shown(found: Estimate, digits: int = 2) -> str:
    """Formats an estimate with its interval."""
    value, low, high = (number(one, digits) for one in found)
    return value if value == "–" else f"{value} [{low}, {high}]"


def number(value: float | None, digits: int = 2) -> str:
    """Formats a number, a dash for none."""
    return "–" if value is None or value != value else f"{value:.{digits}f}".replace("-", "−")


def flow(text: str) -> str:
    """Wraps a paragraph to 100 characters, indented or not."""
    return textwrap.fill(" ".join(text.split()), 98, break_long_words=False, break_on_hyphens=False)


def listed(items: Sequence[str]) -> str:
    """Formats paragraphs as a list."""
    return "\n".join("- " + flow(item).replace("\n", "\n  ") for item in items)


def shell(command: str) -> str:
    """Formats a shell command as code, broken before options where a page would not show it."""
    options = [word.start() for word in _WORD.finditer(command) if word[0].startswith("--")]
    lines: list[str] = []
    for first, last in pairwise([0, *options, len(command)]):
        part = command[first:last].rstrip()
        if lines and len(f"{lines[-1]} {part} \\") <= _CODE:
            lines[-1] += f" {part}"
        else:
            lines.append(f"    {part}" if lines else part)
    return "\n".join(["```", " \\\n".join(lines), "```"])


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Formats a table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
