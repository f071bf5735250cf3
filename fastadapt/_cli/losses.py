"""The command `fastadapt losses`: the catalogue of losses, as a table or one of them in words."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from fastadapt._cli.errors import fail


def add_parser(commands: Any) -> None:
    """Adds the command to the subcommands of the parser."""
    parser = commands.add_parser(
        "losses",
        help="list the losses, or say what is known of one",
        description="List all losses with their needs, or print formula, source, options, gradient "
        "and limits of one.",
    )
    parser.set_defaults(run=_run, subparser=parser)
    parser.add_argument("name", nargs="?", metavar="NAME", help="a loss, such as simpo")


def _run(arguments: argparse.Namespace) -> int:
    """Prints the table, or one loss; 2 after one line about a name that there is not."""
    from fastadapt.losses import describe

    if arguments.name is None:
        _print_all()
        return 0
    try:
        text = describe(arguments.name)
    except ValueError as error:
        return fail(error)
    sys.stdout.write(f"{text}\n")
    return 0


def _print_all() -> None:
    """Prints a table of all losses, a family after the other."""
    from rich.console import Console
    from rich.table import Table

    from fastadapt.losses import CATALOGUE
    from fastadapt.losses.catalogue import families

    width, out = max(map(len, CATALOGUE)), Console(highlight=False)
    for family, names in families().items():
        table = Table(title=family, title_justify="left", box=None, pad_edge=False)
        table.add_column("name", no_wrap=True, min_width=width)
        table.add_column("loss", min_width=27)
        table.add_column("needs")
        for name in names:
            entry = CATALOGUE[name]
            table.add_row(name, entry.title, ", ".join(sorted(entry.needs)))
        out.print(table, "")
