"""The options of `fastadapt gradients`; the code of an action is imported when it runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastadapt._cli.errors import EXPECTED, INTERRUPTED, check_folder, fail

_STEPS = (
    ("--step-pairs", 200, "pairs to take single steps on"),
    ("--step-max-length", 64, "most tokens of a sequence; longer pairs are left out"),
)
_TRAINING = (
    ("--train-pairs", 4, "pairs to train on"),
    ("--train-batch", 4, "pairs per step"),
    ("--train-steps", 10, "steps of each run"),
    ("--train-max-length", 32, "most tokens of a sequence; longer pairs are left out"),
    ("--train-learning-rate", 2e-5, "of AdamW"),
)
_PARTS = {"step": ("step",), "train": ("train",), "run": ("step", "train", "report")}


def add_parser(commands: Any) -> None:
    """Adds the command to the subcommands of the parser."""
    parser = commands.add_parser(
        "gradients",
        help="analyse the gradients of the losses: table, case studies, training runs",
        description=(
            "Analyse the gradients of losses that reward chosen and penalise rejected responses."
        ),
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    table = actions.add_parser(
        "table",
        help="print the coefficients of every loss, each checked against autograd",
        description="Print the coefficients of every loss in Markdown, each row with its distance "
        "from automatic differentiation and from finite differences of the loss.",
    )
    table.set_defaults(run=_run_table, subparser=table)
    cases = actions.add_parser(
        "cases",
        help="take single steps on toy pairs, predicted and measured",
        description="Print what one step of each loss does to both log-probabilities of small "
        "pairs, predicted from inner products of gradients and measured, in Markdown.",
    )
    cases.set_defaults(run=_run_cases, subparser=cases)
    for name, text, groups in (
        ("step", "one step on the head of a model, predicted and measured", (_STEPS,)),
        ("train", "a brief training run with each loss, under the tracker", (_TRAINING,)),
        ("run", "step, train and report, one after the other", (_STEPS, _TRAINING)),
    ):
        action = actions.add_parser(name, help=text, description=f"{text.capitalize()}.")
        action.set_defaults(run=_run_model, subparser=action, parts=_PARTS[name])
        _add_common(action)
        for flag, default, meaning in (option for group in groups for option in group):
            kind = type(default)
            metavar = "X" if kind is float else "N"
            shown = f"{meaning} (default: {default})"
            action.add_argument(flag, type=kind, default=default, metavar=metavar, help=shown)
    report = actions.add_parser(
        "report",
        help="write the report again from the tables in a folder",
        description="Write the report and its pictures from the tables of `run` in a folder.",
    )
    report.set_defaults(run=_run_report, subparser=report)
    report.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder")


def _add_common(parser: argparse.ArgumentParser) -> None:
    """Adds the options that all actions with a model share."""
    add = parser.add_argument
    add("--data", type=Path, required=True, help="JSON Lines of chosen and rejected, or .gz")
    add("--out", type=Path, required=True, metavar="DIR", help="folder to write into")
    add("--model", metavar="NAME_OR_PATH", help="default: SmolLM2-135M-Instruct")
    add("--threads", type=int, metavar="N", help="threads of torch (default: torch's own choice)")


def _run_table(arguments: argparse.Namespace) -> int:
    """Print the table."""
    from fastadapt.study.gradients.table import table

    sys.stdout.write(table())
    return 0


def _run_cases(arguments: argparse.Namespace) -> int:
    """Print the case studies."""
    from fastadapt.study.gradients.cases import prediction_rows
    from fastadapt.study.gradients.report import cases_table

    sys.stdout.write(cases_table(prediction_rows()) + "\n")
    return 0


def _run_model(arguments: argparse.Namespace) -> int:
    """Take single steps, train, and write the report, as the action asks."""
    from fastadapt.study._progress import phases
    from fastadapt.study.gradients.report import write_report
    from fastadapt.study.gradients.steps import StepOptions, run_steps
    from fastadapt.study.gradients.training import TrainingOptions, run_training
    from fastadapt.training.pairs import read_pairs

    common = {name: getattr(arguments, name) for name in ("data", "out", "threads")}
    works: list[Any] = []
    try:
        if arguments.threads is not None and arguments.threads < 1:
            raise ValueError(f"threads: expected at least 1, got {arguments.threads}")
        if "step" in arguments.parts:
            works.append((run_steps, StepOptions(**common, **_prefixed(arguments, "step_"))))
        if "train" in arguments.parts:
            works.append(
                (run_training, TrainingOptions(**common, **_prefixed(arguments, "train_")))
            )
    except ValueError as error:
        arguments.subparser.error(str(error))

    def work() -> None:
        check_folder("out", arguments.out)
        read_pairs(arguments.data)  # what is wrong with it is said before a model is loaded
        with phases() as report:
            model, tokenizer, name = _load(arguments)
            for run, options in works:
                run(model, tokenizer, options, name=name, report=report)
            if "report" in arguments.parts:
                write_report(arguments.out, report=report)

    return _ended(work)


def _run_report(arguments: argparse.Namespace) -> int:
    """Write the report again from the stored tables."""
    from fastadapt.study._progress import phases
    from fastadapt.study.gradients.report import write_report

    def work() -> None:
        with phases() as report:
            path = write_report(arguments.out, report=report)
        sys.stdout.write(f"{path}\n")

    return _ended(work)


def _ended(work: Callable[[], None]) -> int:
    """Runs a function and returns an exit code: 0, or 2 after a one-line error."""
    try:
        work()
    except EXPECTED as error:
        return fail(error)
    except KeyboardInterrupt:
        return fail("interrupted; tables that were written before are kept", INTERRUPTED)
    return 0


def _prefixed(arguments: argparse.Namespace, prefix: str) -> dict[str, Any]:
    """Returns the options that begin with a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in vars(arguments).items() if k.startswith(prefix)}


def _load(arguments: argparse.Namespace) -> tuple[Any, Any, str]:
    """Loads the model and returns it with its tokenizer and its name."""
    from fastadapt.training.pretrained import DEFAULT_MODEL, load_model, no_progress

    loaded = load_model(arguments.model, fetch=True, progress=no_progress)
    return *loaded, arguments.model or DEFAULT_MODEL
