"""The command `fastadapt train`: its help and its error handling."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from fastadapt._cli.errors import CommandError

HELP = "train a model on preference pairs"
_DESCRIPTION = (
    "Train a causal language model on preference pairs by any mixture of losses, in one stage or "
    "several, without making logits. Writes OUTPUT_DIR/model, metrics.jsonl and checkpoints."
)
_DATA = ("data", "split", "eval_data", "eval_split", "eval_fraction", "chat", "truncation")
_LOSSES = (
    *("loss", "stages", "coefficient", "norm", "level", "loss_options"),
    *("negatives", "negative_options"),
)
# Of trl's flags those that most runs need, as a person would say them; --help_all has the rest.
_TRLS = {
    "output_dir": "folder of the run (required)",
    "max_length": "most tokens of a prompt and its response (default: 1024)",
    "beta": "of all losses that have one (default: each its own)",
    "label_smoothing": "share of swapped labels, of cdpo, robust, ... (default: each its own)",
    "learning_rate": "of all stages (default: 1e-05)",
    "lr_scheduler_type": "linear, cosine, ... (default: constant_with_warmup)",
    "warmup_steps": "of each stage (default: 0)",
    "weight_decay": "of AdamW (default: 0)",
    "max_grad_norm": "clip the norm of the gradient to this (default: 1)",
    "per_device_train_batch_size": "pairs per batch (default: 4)",
    "gradient_accumulation_steps": "batches per step (default: 1)",
    "num_train_epochs": "passes over the data in each stage (default: 1)",
    "max_steps": "of each stage, in place of epochs",
    "bf16": "compute in bfloat16 where that is safe",
    "gradient_checkpointing": "recompute activations in the backward, to save memory",
    "use_cpu": "train on the CPU, even where there is a GPU",
    "seed": "of the split, the order of the pairs and the adapters (default: 42)",
    "logging_steps": "steps between lines of metrics.jsonl (default: 1)",
    "eval_strategy": "no, steps or epoch: when, besides at each stage's end (default: no)",
    "eval_steps": "steps between evaluations",
    "save_steps": "steps between checkpoints (default: 50)",
    "save_total_limit": "checkpoints to keep per stage (default: 2)",
    "report_to": "also log to tensorboard, wandb, ... (default: none)",
    "config": "a YAML file of flags, as trl's commands read it",
}
_GROUPS: dict[str, tuple[str, ...]] = {
    "data and model": ("output_dir", *_DATA, "max_length", "model"),
    "losses": (*_LOSSES, "beta", "label_smoothing"),
    "steps": (
        *("learning_rate", "learning_rates", "lr_scheduler_type", "warmup_steps", "weight_decay"),
        *("max_grad_norm", "per_device_train_batch_size", "gradient_accumulation_steps"),
        *("num_train_epochs", "max_steps", "seed"),
    ),
    "memory and processor": (
        *("lora_r", "lora_alpha", "lora_target_modules", "bf16", "gradient_checkpointing"),
        *("use_cpu", "threads"),
    ),
    "metrics and checkpoints": (
        *("logging_steps", "eval_strategy", "eval_steps", "report_to", "save_steps"),
        *("save_total_limit", "resume", "config"),
    ),
}


def main(argv: Sequence[str]) -> int:
    """Runs the command and returns 0.

    Raises:
        CommandError: what the user can mend; wrong arguments leave through `SystemExit` with
            code 2.
    """
    if set(argv) & {"-h", "--help"}:
        sys.stdout.write(short_help())
        return 0
    from fastadapt._cli.train import config as train_config

    if set(argv) & {"--help_all", "--help-all"}:
        sys.stdout.write(train_config.make_parser().format_help())
        return 0
    arguments, config = train_config.parse(argv)

    import torch
    from accelerate import PartialState
    from rich.console import Console

    from fastadapt._cli.train.data import DataError
    from fastadapt._cli.train.log import Reporter
    from fastadapt._cli.train.run import run
    from fastadapt.training.head import HeadError

    out = Console(highlight=False, soft_wrap=True, markup=False)
    reporter = Reporter(out, active=PartialState().is_main_process)
    try:
        run(arguments, config, reporter)
    except (DataError, HeadError) as error:
        raise CommandError(error) from error
    except torch.OutOfMemoryError as error:
        raise CommandError(f"expected room for a batch, got: {error}") from error
    finally:
        reporter.close()
    return 0


def short_help() -> str:
    """Returns the help of the flags that most runs need, without importing trl."""
    from fastadapt._cli.train.options import RunArguments

    ours = {field.name: field.metadata["help"] for field in fields(RunArguments) if field.init}
    parser = argparse.ArgumentParser(
        prog="fastadapt train",
        usage="fastadapt train --data FILE --output_dir FOLDER (--loss | --stages) LOSSES [flags]",
        description=_DESCRIPTION,
        epilog="All flags of trl's DPOConfig are accepted too: --help_all lists them.",
        add_help=False,
    )
    for title, names in _GROUPS.items():
        group: Any = parser.add_argument_group(title)
        for name in names:
            group.add_argument(f"--{name}", metavar="", help=_TRLS.get(name) or ours[name])
    return parser.format_help()
