"""A training run from pairs to a saved model: data, stages one after the other"""

from __future__ import annotations

import contextlib
import copy
import gc
import hashlib
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import set_seed
from trl.trainer.dpo_config import DPOConfig

from fastadapt._cli.errors import CommandError, check_folder
from fastadapt._cli.train.config import check_resumed, settings_of
from fastadapt._cli.train.data import load_pairs, split_pairs
from fastadapt._cli.train.folder import RunFolder, sole_writer, step_of
from fastadapt._cli.train.log import Reporter, StageCallback
from fastadapt._cli.train.options import CANDIDATES, RunArguments, objective_of
from fastadapt._cli.train.stage import StageTrainer, check_parameters, writing
from fastadapt.training.pair_forms import Pair
from fastadapt.training.pairs import Truncation, tokenize_pair
from fastadapt.training.pretrained import load_model, no_progress, silenced


def run(arguments: RunArguments, config: DPOConfig, reporter: Reporter) -> None:
    """Trains and saves a model.

    Args:
        arguments: ours.
        config: trl's.
        reporter: for a person.

    Raises:
        CommandError: what the user can mend.
        DataError: the data, before the folder is made and the model is loaded.
        ModelNotFoundError: the model.
    """
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    path = Path(str(config.output_dir))
    check_folder("output_dir", path)
    pairs = _read_data(arguments, config)
    main = PartialState().is_main_process
    with sole_writer(path) if main else contextlib.nullcontext(), _quiet():
        Job(arguments, config, reporter, RunFolder(path), pairs).run()


class Job:
    """The work of a run: trains a model through the stages that are left.

    Args:
        arguments: ours.
        config: trl's.
        reporter: for a person.
        folder: of the run, its lock held.
        pairs: to train on, and to evaluate on.
    """

    def __init__(
        self,
        arguments: RunArguments,
        config: DPOConfig,
        reporter: Reporter,
        folder: RunFolder,
        pairs: tuple[list[Pair], list[Pair]],
    ) -> None:
        self.arguments, self.config, self.reporter = arguments, config, reporter
        self.folder, self.pairs = folder, pairs
        self.mixtures = arguments.mixtures()
        self.tokenizer: Any = None

    def run(self) -> None:
        """Trains from the folder's last checkpoint to the saved model."""
        number, checkpoint, settings = self._begin()
        model = self._load(number)
        counts = [len(side) for side in self.pairs]
        self.reporter.say(f"{counts[0]} pairs to train on, {counts[1]} held out")
        train, held_out = (self._tokens(side, model) for side in self.pairs)
        if settings is not None:  # what was refused until here leaves no run behind
            self.folder.keep_settings(settings)
            self.folder.rewind_metrics(number, step_of(checkpoint) if checkpoint else 0)
        while number < len(self.mixtures):
            self._train_stage(number, model, train, held_out, checkpoint)
            checkpoint = None
            number += 1
        self._save(model)

    def _begin(self) -> tuple[int, Path | None, dict[str, Any] | None]:
        """Returns the stage to begin with (from 0), its checkpoint and the settings to write."""
        processes = PartialState()
        settings = None
        with processes.main_process_first():
            if processes.is_main_process:
                settings = self._check_settings()
            number, checkpoint, damaged = self.folder.last_checkpoint(len(self.mixtures))
        for text in damaged:
            self.reporter.say(f"damaged, set aside: {text}")
        if checkpoint is not None:
            self.reporter.say(f"going on from {checkpoint}")
        return number, checkpoint, settings

    def _check_settings(self) -> dict[str, Any]:
        """Returns the settings of this run, checked against those in the folder."""
        digest = hashlib.sha256(repr(self.pairs).encode()).hexdigest()
        settings = settings_of(self.arguments, self.config, digest)
        had = self.folder.settings()
        if had is None:
            self.folder.check_unused()
            return settings
        if not self.arguments.resume:
            raise CommandError(
                f"output_dir: {self.folder.path} has a run; go on with --resume or name another"
            )
        try:
            check_resumed(had, settings)
        except ValueError as error:
            raise CommandError(error) from error
        return settings

    def _load(self, number: int) -> Any:
        """Loads the model that a stage starts from: the previous stage's, or the original."""
        arguments = self.arguments
        before = self.folder.end_of_stage(number - 1) if number else None
        name: Any = before if before and not arguments.lora_r else arguments.model
        model, self.tokenizer = load_model(name, fetch=True, progress=no_progress)
        if getattr(model, "peft_config", None):
            raise CommandError(
                f"model: expected a whole model, got adapters in {name}; peft merges them into "
                "their model with merge_and_unload"
            )
        if arguments.lora_r:
            set_seed(self.config.seed)
            model = _with_adapters(model, arguments, before)
        return model

    def _tokens(self, pairs: Sequence[Pair], model: Any) -> Dataset | None:
        """Tokenises the pairs, and reports how many were cut."""
        if not pairs:
            return None
        if self.arguments.chat and not getattr(self.tokenizer, "chat_template", None):
            raise CommandError(
                "chat: expected a tokenizer with a chat template, got none of "
                f"{self.arguments.model or 'the default model'}"
            )
        limit = self._max_length(model)
        kept = []
        for number, pair in enumerate(pairs, start=1):
            try:
                kept.append(
                    tokenize_pair(
                        self.tokenizer,
                        pair,
                        max_length=limit,
                        truncation=cast(Truncation, self.arguments.truncation),
                        chat=self.arguments.chat,
                    )
                )
            except ValueError as error:
                raise CommandError(f"data: pair {number} of {len(pairs)}: {error}") from error
        cut = sum(pair.truncated for pair in kept)
        if cut:
            what = self.arguments.truncation
            self.reporter.say(f"{cut} of {len(pairs)} pairs cut to {limit} tokens (the {what})")
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        return Dataset.from_dict({name: [getattr(pair, name) for pair in kept] for name in names})

    def _max_length(self, model: Any) -> int | None:
        """Returns the length limit of a sequence: as asked for, at most the model's context."""
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        limits = [n for n in (self.config.max_length, positions) if n]
        return min(limits) if limits else None

    def _train_stage(
        self,
        number: int,
        model: Any,
        train: Dataset | None,
        held_out: Dataset | None,
        checkpoint: Path | None,
    ) -> None:
        """Runs the remaining steps of a stage."""
        stage, count = self.mixtures[number], len(self.mixtures)
        label = f"stage {number + 1}/{count} ({_named(stage)})"
        negatives: dict[str, Any] = {}
        if CANDIDATES in stage:
            negatives["negatives"] = self.arguments.negatives
            negatives["negative_options"] = self.arguments.options_of_negatives()
        try:
            trainer = StageTrainer(
                model,
                self._stage_config(number),
                label=label,
                loss=stage,
                loss_options=objective_of(stage, self.arguments.options_of_losses()),
                train=train,
                held_out=held_out,
                tokenizer=self.tokenizer,
                advance=self.reporter.advance,
                **negatives,
            )
        except ValueError as error:  # what a trainer refuses of a model or its arguments
            raise CommandError(f"{label}: {error}") from error
        callback = StageCallback(
            self.folder, number, label, self.reporter, evaluates=held_out is not None
        )
        callback.on_begin = trainer.restore_token_count
        trainer.add_callback(callback)
        total = trainer.total_steps()
        taken = step_of(checkpoint) if checkpoint else 0
        if taken > total:
            raise CommandError(f"max_steps: expected at least the {taken} steps taken, got {total}")
        if checkpoint is not None and taken == total:
            trainer._load_from_checkpoint(str(checkpoint))
        else:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        check_parameters(model, f"{label}, after its last step")
        trainer.accelerator.free_memory()
        del trainer
        gc.collect()

    def _stage_config(self, number: int) -> DPOConfig:
        """Returns trl's arguments for a stage: its folder, seed and learning rate."""
        config = copy.copy(self.config)
        config.output_dir = str(self.folder.stage(number))
        config.seed = self.config.seed + number
        config.dataloader_pin_memory &= torch.accelerator.is_available()
        if self.arguments.learning_rates:
            config.learning_rate = self.arguments.learning_rates[number]
        return config

    def _save(self, model: Any) -> None:
        """Writes the model and its tokenizer atomically."""
        if not PartialState().is_main_process:
            return
        part = self.folder.path / ".model.part"
        shutil.rmtree(part, ignore_errors=True)
        with writing(part):
            model.save_pretrained(part)
            self.tokenizer.save_pretrained(part)
            self.folder.place_model(part)
        self.reporter.say(f"saved in {self.folder.model}")


def _read_data(arguments: RunArguments, config: DPOConfig) -> tuple[list[Pair], list[Pair]]:
    """Reads the pairs and splits off those to evaluate on."""
    pairs = load_pairs(arguments.data, split=arguments.split)
    share = arguments.eval_fraction
    train, held_out = split_pairs(pairs, share, config.seed) if share else (pairs, [])
    if share and not (train and held_out):
        raise CommandError(
            f"eval_fraction: expected a share that leaves a pair on either side, got {share} of "
            f"{len(pairs)}"
        )
    if arguments.eval_data:
        held_out = load_pairs(arguments.eval_data, split=arguments.eval_split)
    size = config.per_device_train_batch_size * config.world_size
    if size > len(train):
        raise CommandError(
            f"per_device_train_batch_size: expected no more than the {len(train)} pairs, got {size}"
        )
    return train, held_out


def _with_adapters(model: Any, arguments: RunArguments, before: Path | None) -> Any:
    """Adds LoRA adapters to a model, new or from a checkpoint, and freezes the rest."""
    import peft

    if before is not None:
        return peft.PeftModel.from_pretrained(model, str(before), is_trainable=True)
    config = peft.LoraConfig(
        r=arguments.lora_r or 1,
        lora_alpha=arguments.lora_alpha or 2 * (arguments.lora_r or 1),
        target_modules=arguments.lora_target_modules or "all-linear",
        task_type="CAUSAL_LM",
    )
    try:
        return peft.get_peft_model(model, config)
    except ValueError as error:
        raise CommandError(f"lora_target_modules: {error}") from error


def _named(stage: Mapping[str, float]) -> str:
    """Formats a mixture for a person."""
    return " + ".join(name if w == 1 else f"{w:g} {name}" for name, w in stage.items())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences transformers' progress bars and warnings; its errors stay."""
    with silenced(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        yield
