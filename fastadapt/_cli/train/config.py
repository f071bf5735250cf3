"""The flags of `fastadapt train`: our own dataclass and trl's, read by trl's parser."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import yaml
from transformers import Trainer, get_scheduler
from transformers.integrations.integration_utils import get_available_reporting_integrations
from trl.scripts.utils import TrlParser
from trl.trainer.dpo_config import DPOConfig

from fastadapt._cli.errors import CommandParser, did_you_mean, one_line
from fastadapt._cli.train.options import CANDIDATES, RunArguments, check_losses
from fastadapt.trl._negatives import KINDS, Negatives

# Where this command begins from other values than trl's.
DEFAULTS: dict[str, Any] = {
    "beta": None,  # each loss has its own
    "bf16": False,
    "gradient_checkpointing": None,
    "label_smoothing": None,
    "learning_rate": 1e-5,
    "logging_steps": 1,
    "lr_scheduler_type": "constant_with_warmup",
    "num_train_epochs": 1.0,
    "per_device_train_batch_size": 4,
    "save_steps": 50,
    "save_total_limit": 2,
}
# What trl's arguments say that is said otherwise here, or by nobody.
_INSTEAD = {
    "discopop_tau": "--loss_options discopop_tau=0.1",
    "f_alpha_divergence_coef": "--loss_options f_alpha=0.3",
    "f_divergence_type": "--loss_options f_divergence=forward_kl",
    "ld_alpha": "--loss_options ld_alpha=0.5",
    "loss_type": "losses are named by --loss or --stages",
    "loss_weights": "weights stand in --loss or --stages, as dpo=1+exmate=0.5",
    "model_init_kwargs": "the model is loaded in float32",
    "padding_free": "trl has it switched off",
    "resume_from_checkpoint": "--resume goes on from the newest whole checkpoint",
    "sync_ref_model": "the reference is the model at a stage's beginning",
    "truncation_mode": "--truncation says what is cut",
    "use_weighting": "pairs have equal weights",
    "auto_find_batch_size": "a run must have one batch size to be resumed",
    "ignore_data_skip": "a resumed run sees the pairs that are left",
    "load_best_model_at_end": "a stage goes on from where it is",
    "push_to_hub": "upload the run's model folder when it is done",
    "save_only_model": "a checkpoint without its optimizer cannot be resumed",
    "torch_compile": "a run resumes to the same bits, which graphs do not promise",
    "use_liger_kernel": "log-odds are made without logits already",
}
_DECIDE_NOTHING = (
    *("output_dir", "report_to", "run_name", "disable_tqdm", "log_level", "log_on_each_node"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor"),
    *("max_steps", "num_train_epochs"),
)
_OF_LOSSES = ("beta", "label_smoothing")  # flags of trl's that are options of losses here
_CONSTANT = ("constant", "constant_with_warmup")


class TrainParser(CommandParser, TrlParser):
    """trl's parser with one-line errors."""


def make_parser() -> TrainParser:
    """Returns the parser of all flags, ours and trl's."""
    parser = TrainParser(dataclass_types=[RunArguments, DPOConfig], prog="fastadapt train")
    parser.set_defaults(**DEFAULTS)
    switch = next(action.type for action in parser._actions if action.dest == "use_cpu")
    for action in parser._actions:
        if action.dest == "output_dir":
            action.required = True
        if action.type is switch and action.nargs is None:  # bool | None, as bf16
            action.nargs, action.const = "?", True
    return parser


def parse(argv: Sequence[str]) -> tuple[RunArguments, DPOConfig]:
    """Parses the command line and the file named by --config.

    Everything that can be refused before data and a model are read is refused here, in one line
    and with exit code 2, through `SystemExit`.
    """
    parser = make_parser()
    words = [part for word in argv for part in _apart(word)]
    if words[-1:] == ["--config"]:
        parser.error("config: expected a file, got nothing")
    try:
        with warnings.catch_warnings():
            # transformers has a new name for what trl calls gradient_checkpointing
            warnings.simplefilter("ignore", FutureWarning)
            run, config = parser.parse_args_and_config(words)
        for name in _OF_LOSSES:
            if (value := getattr(config, name)) is None:
                setattr(config, name, DPOConfig.__dataclass_fields__[name].default)
            else:
                run.of_trl[name] = value
        _check(run, config)
    except ValueError as error:
        message = one_line(error)
        flags = {action.dest for action in parser._actions}
        if message.startswith("Unknown arguments from config file"):
            first = message.partition("'--")[2].partition("'")[0]
            message = f"config: expected names of flags, got {first!r}{did_you_mean(first, flags)}"
        parser.error(message)
    except (TypeError, ImportError, OSError, RuntimeError, yaml.YAMLError) as error:
        parser.error(one_line(error))
    return run, config


def settings_of(run: RunArguments, config: DPOConfig, pairs: str) -> dict[str, Any]:
    """Returns the settings that shape the training curve; a resumed run must have the same.

    Args:
        run: our arguments.
        config: trl's.
        pairs: a digest of the data.
    """
    ours = {name: value for name, value in vars(run).items() if name not in ("resume", "data")}
    del ours["of_trl"]
    ours["loss_options"] = run.options_of_losses() or None
    ours |= {"loss": None, "stages": list(run.mixtures()), "eval_data": bool(run.eval_data)}
    theirs = {
        name: value
        for name, value in as_plain(config).items()
        if name not in _DECIDE_NOTHING and not name.startswith(("logging_", "save_", "hub_"))
    }
    length = {"max_steps": config.max_steps, "num_train_epochs": config.num_train_epochs}
    return {**theirs, **ours, **length, "pairs": pairs, "processes": config.world_size}


def as_plain(config: DPOConfig) -> dict[str, Any]:
    """Returns trl's arguments as values that JSON can hold."""
    untyped: Any = config
    return dict(untyped.to_dict())


def check_resumed(had: dict[str, Any], got: dict[str, Any]) -> None:
    """Raises if the settings differ from those of the run to resume.

    Its length may change where nothing else depends on it: in a run of one stage with a constant
    learning rate and a warmup that is counted in steps.

    Raises:
        ValueError: the setting, and why.
    """
    for name, value in got.items():
        if had.get(name) == value:
            continue
        expected = f"{name}: expected {had.get(name)!r} as in the run, got {value!r}"
        if name not in ("max_steps", "num_train_epochs"):
            raise ValueError(expected)
        if len(got["stages"]) > 1:
            raise ValueError(f"{expected}; only a run of one stage can change its length")
        if got["lr_scheduler_type"] not in _CONSTANT:
            schedule = got["lr_scheduler_type"]
            raise ValueError(f"{expected}; the schedule {schedule} depends on it")
        if 0 < float(got["warmup_steps"] or 0) < 1:
            raise ValueError(f"{expected}; warmup_steps is a share of it")


def _check(run: RunArguments, config: DPOConfig) -> None:
    """Raises if arguments contradict each other."""
    plain = {field.name: field for field in DPOConfig.__dataclass_fields__.values()}
    for name, instead in _INSTEAD.items():
        field = plain[name]
        factory: Any = field.default_factory
        usual = factory() if callable(factory) else field.default
        value = getattr(config, name)
        if value != usual and (value or usual):
            raise ValueError(f"{name}: expected {usual!r}, got {value!r}: {instead}")
    for name in ("learning_rate", "max_grad_norm", "weight_decay", "beta", "adam_epsilon"):
        value = getattr(config, name)
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name}: expected a finite value of at least 0, got {value}")
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}: expected at least 1, got {getattr(config, name)}")
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"{name}: expected a value in [0, 1), got {getattr(config, name)}")
    if config.dataloader_num_workers < 0:
        got = config.dataloader_num_workers
        raise ValueError(f"dataloader_num_workers: expected at least 0, got {got}")
    for name in ("eval_accumulation_steps", "pad_to_multiple_of", "dataloader_prefetch_factor"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if config.gradient_accumulation_steps < 1:
        got = config.gradient_accumulation_steps
        raise ValueError(f"gradient_accumulation_steps: expected at least 1, got {got}")
    if config.max_steps == 0 or config.max_steps < -1 or not config.num_train_epochs > 0:
        length = f"{config.max_steps} and {config.num_train_epochs}"
        raise ValueError(f"max_steps, num_train_epochs: expected values above 0, got {length}")
    if not 0 <= config.seed < 2**32:
        raise ValueError(f"seed: expected a value in [0, 2**32), got {config.seed}")
    if config.max_length is not None and config.max_length < 2:
        raise ValueError(f"max_length: expected at least 2, got {config.max_length}")
    evaluates = bool(run.eval_data or run.eval_fraction)
    if config.eval_strategy != "no" and not evaluates:
        raise ValueError(
            f"eval_strategy: expected --eval_data or --eval_fraction beside "
            f"{as_plain(config)['eval_strategy']}, got neither"
        )
    if config.eval_on_start and not evaluates:
        raise ValueError("eval_on_start: expected --eval_data or --eval_fraction too, got neither")
    stages = run.mixtures()
    options = run.options_of_losses()
    _check_negatives(run)
    check_losses(stages, options, config.gradient_accumulation_steps * config.world_size)
    available = get_available_reporting_integrations()
    for name in config.report_to or ():
        if name not in available:
            hint = did_you_mean(name, available)
            known = ", ".join(available) or "none"
            raise ValueError(f"report_to: expected what is installed ({known}), got {name!r}{hint}")
    Trainer.get_optimizer_cls_and_kwargs(config)  # refuses what is not installed
    _check_schedule(config)
    sharded = config.deepspeed or config.fsdp
    if sharded and len(stages) > 1:
        raise ValueError("stages: expected one with FSDP or DeepSpeed, got several")


def _check_negatives(run: RunArguments) -> None:
    """Raises unless candidates are said where a stage has a loss of them, and nowhere else."""
    there = any(CANDIDATES in stage for stage in run.mixtures())
    if there and run.negatives is None:
        kinds = ", ".join(KINDS)
        raise ValueError(f"negatives: expected one of {kinds} beside {CANDIDATES}, got None")
    for name in ("negatives", "negative_options"):
        if not there and (value := getattr(run, name)) is not None:
            raise ValueError(f"{name}: expected a stage with {CANDIDATES} beside, got {value!r}")
    if run.negatives is not None:
        Negatives(run.negatives, run.options_of_negatives())


def _check_schedule(config: DPOConfig) -> None:
    """Raises if the learning-rate schedule lacks an option, or has one that it does not take."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    kwargs: Any = config.lr_scheduler_kwargs
    try:
        get_scheduler(config.lr_scheduler_type, optimizer, 0, 10, scheduler_specific_kwargs=kwargs)
    except (ValueError, TypeError) as error:
        raise ValueError(f"lr_scheduler_kwargs: {error}") from error


def _apart(word: str) -> tuple[str, ...]:
    """Splits `--config=FILE` into two words, as trl's parser expects."""
    flag, equals, value = word.partition("=")
    return (flag, value) if flag == "--config" and equals else (word,)
