"""The parser of `fastadapt gradients`; what it runs is imported when it runs."""

from __future__ import annotations

import argparse
import sys
from typing import Any


def add_parser(commands: Any) -> None:
    """Adds the command to the subcommands of the parser."""
    parser = commands.add_parser(
        "gradients",
        help="the gradients of the losses: their table, cases, and a training run with each",
        description="Analyse the gradients of losses that reward good and penalise bad responses.",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    table = actions.add_parser(
        "table",
        help="print the coefficients of every loss, checked as they are printed",
        description="Print the coefficients of every loss in Markdown, each row with its distance "
        "from automatic differentiation and from finite differences of the loss.",
    )
    table.set_defaults(run=_run_table, subparser=table, extra="study")


def _run_table(arguments: argparse.Namespace) -> int:
    """Print the table."""
    from fastadapt.study.gradient_table import table

    sys.stdout.write(table())
    return 0
