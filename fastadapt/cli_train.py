"""The command `fastadapt train`: its arguments."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

_OPTIONS: dict[str, tuple[type, Any, str]] = {
    "epochs": (int, 1, "ways through the data in each stage"),
    "max_steps": (int, None, "steps of a stage at most"),
    "batch": (int, 4, "pairs in memory at once"),
    "accumulate": (int, 1, "batches a step"),
    "max_length": (int, 512, "tokens of a prompt and a response"),
    "warmup": (int, 0, "steps over which each stage's learning rate rises"),
    "max_norm": (float, 1.0, "the gradient is cut to this norm"),
    "lora": (int, None, "train adapters of this rank instead of all parameters"),
    "held_out": (float, 0.0, "share of the pairs to evaluate on after each stage"),
    "save_every": (int, 50, "steps between checkpoints"),
    "log_every": (int, 10, "steps between lines of the log"),
    "seed": (int, 0, "of the split, the order of the pairs and the adapters"),
    "threads": (int, None, "threads of torch"),
}


def add_parser(commands: Any) -> None:
    """Adds the command to those there are."""
    parser = commands.add_parser(
        "train",
        help="train a model on preference pairs",
        description="Train a causal language model on preference pairs by any mixture of losses, "
        "in one stage or several, without making logits. Data: JSON Lines (or .gz) with "
        "prompt/chosen/rejected, chat messages or the two dialogues of HH-RLHF, or a data set of "
        "the hub. Writes OUTPUT/model, OUTPUT/metrics.jsonl and a checkpoint.",
    )
    parser.set_defaults(run=_run, subparser=parser)
    add = parser.add_argument
    add("--data", required=True, metavar="FILE_OR_NAME", help="preference pairs")
    add("--output", required=True, type=Path, metavar="FOLDER", help="of this run")
    add("--model", metavar="NAME_OR_PATH", help="a causal language model: folder, .gguf or hub")
    losses = parser.add_mutually_exclusive_group(required=True)
    losses.add_argument("--loss", metavar="LOSSES", help="one stage, such as dpo=1,exmate=1")
    losses.add_argument(
        "--stages", metavar="STAGES", help="several, such as exmate,dpo or mle,dpo=1+exmate=0.5"
    )
    add(
        "--learning-rate",
        default="1e-5",
        metavar="X[,X...]",
        help="one for all stages or one each (default: %(default)s)",
    )
    add("--beta", type=float, metavar="X", help="of DPO (default: 0.1)")
    add("--coefficient", type=float, metavar="X", help="of the penalty in a loss (default: 1)")
    add("--norm", help="of ExMATE: sequence_mean, batch_token_mean, sequence_sum or token")
    add("--split", default="train", help="of a data set of the hub (default: %(default)s)")
    add("--device", default="cpu", help="as torch names it (default: %(default)s)")
    add("--resume", action="store_true", help="go on from the checkpoint, if there is one")
    for name, (kind, default, text) in _OPTIONS.items():
        shown = "" if default is None else " (default: %(default)s)"
        metavar = "N" if kind is int else "X"
        flag = "--" + name.replace("_", "-")
        add(flag, type=kind, default=default, metavar=metavar, help=text + shown)


def _run(arguments: argparse.Namespace) -> int:
    """Check the arguments, then train."""
    from rich.console import Console

    from fastadapt import train_options, train_run
    from fastadapt.pretrained import ModelNotFoundError
    from fastadapt.train_data import DataError
    from fastadapt.train_state import CheckpointError

    named = {"beta": arguments.beta, "coefficient": arguments.coefficient, "norm": arguments.norm}
    try:
        options = train_options.TrainOptions(
            data=arguments.data,
            output=arguments.output,
            stages=train_options.parse_stages(arguments.loss, arguments.stages),
            model=arguments.model,
            learning_rates=train_options.parse_rates(arguments.learning_rate),
            options={k: v for k, v in named.items() if v is not None},
            split=arguments.split,
            device=arguments.device,
            resume=arguments.resume,
            **{name: getattr(arguments, name) for name in _OPTIONS},
        )
    except ValueError as error:
        arguments.subparser.error(str(error))
    try:
        train_run.run(options, Console(highlight=False, soft_wrap=True))
    except (DataError, CheckpointError, ModelNotFoundError) as error:
        sys.stderr.write(f"fastadapt: {error}\n")
        return 1
    return 0
