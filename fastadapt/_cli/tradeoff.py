"""The options of `fastadapt tradeoff`; the work is in `fastadapt.study.tradeoff.command`."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from fastadapt._cli.errors import EXPECTED, INTERRUPTED, check_folder, fail

_HELP = "find how quality and probability trade off under sampling adaptors"
_DESCRIPTION = (
    "Sample strings of an aligned model under a grid of sampling adaptors, score each under its "
    "prior and under all adaptors, and write tables, figures and a report in Markdown. The aligned "
    "model is one with a system prompt and the prior the same model without one, unless --prior "
    "names another. What is sampled is kept in DIR, and the same command resumes it."
)


def add_parser(commands: Any) -> None:
    """Adds the command to the subparsers of argparse."""
    parser = commands.add_parser("tradeoff", help=_HELP, description=_DESCRIPTION)
    parser.set_defaults(run=_run, subparser=parser)
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the study")
    add("--model", metavar="NAME_OR_PATH", help="the aligned model (default: the demo's)")
    add("--prior", metavar="NAME_OR_PATH", help="the prior (default: the aligned model)")
    add(
        "--system",
        metavar="TEXT",
        help="its system prompt (default: asks for safe and helpful answers; none with --prior)",
    )
    add("--prior-system", metavar="TEXT", help="the prior's system prompt (default: none)")
    add(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="one prompt per line, or JSON Lines with prompts "
        "or HH-RLHF dialogues, .gz or not (default: 32 built-in prompts)",
    )
    add("--count", type=int, metavar="N", help="use this many prompts (default: all)")
    add(
        "--grid",
        metavar="NAME_OR_FILE",
        help="'paper', 31 adaptors, 'small', 15 of them, or a "
        "JSON list of adaptors (default: paper; with --quick small)",
    )
    add(
        "--strings",
        type=int,
        default=2,
        metavar="N",
        help="strings per adaptor and prompt (default: %(default)s)",
    )
    add("--max-new-tokens", type=int, metavar="N", help="(default: 24; with --quick 16)")
    reward = parser.add_mutually_exclusive_group()
    reward.add_argument(
        "--reward",
        metavar="MODULE:FUNCTION",
        help="a reward of your own: takes a prompt and a list of texts, returns as many numbers",
    )
    reward.add_argument(
        "--reward-model", metavar="NAME_OR_PATH", help="a sequence classifier with one output"
    )
    add("--seed", type=int, default=0, metavar="N", help="(default: %(default)s)")
    add("--threads", type=int, metavar="N", help="threads of torch (default: torch's own choice)")
    add(
        "--quick",
        action="store_true",
        help="15 adaptors, 16 tokens, 24 prompts: about two minutes "
        "on two cores with the demo's model",
    )


def _run(arguments: argparse.Namespace) -> int:
    """Check the arguments, then run the study."""
    from fastadapt.study.tradeoff import command

    try:
        names = [field.name for field in dataclasses.fields(command.Options)]
        options = command.Options(**{name: getattr(arguments, name) for name in names})
        settings = command.settings_of(options)
    except (OSError, ValueError) as error:
        arguments.subparser.error(str(error))
    try:
        check_folder("out", options.out)
        command.run(options, settings)
    except EXPECTED as error:
        return fail(error)
    except KeyboardInterrupt:
        kept = f"what was sampled is kept in {options.out}, the same command resumes"
        return fail(f"interrupted; {kept}", INTERRUPTED)
    return 0
