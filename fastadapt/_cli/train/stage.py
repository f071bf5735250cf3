"""One stage of a training run: our trainer with the run's data, reference and files."""

from __future__ import annotations

import contextlib
import copy
import math
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, ProgressCallback, set_seed
from transformers.trainer_utils import rotate_checkpoints
from trl.trainer.dpo_config import DPOConfig

from fastadapt._cli.errors import CommandError
from fastadapt._cli.train.folder import seal, unseal
from fastadapt.trl.trainer import RewardPenalizeTrainer

_OF_TORCHS_WRITER = "PytorchStreamWriter|inline_container"
_REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")
Advance = Callable[[str, int, int], None]


class StageTrainer(RewardPenalizeTrainer):
    """A `RewardPenalizeTrainer` for pairs that are tokenised already.

    What it adds: the reference is that of the model it is given, for the pairs that its steps will
    take and no others, in the batches in which they take them first, and is kept in a file; numbers
    that are not finite stop it before a parameter changes; a checkpoint counts once it is sealed.

    Args:
        model: as the stage finds it.
        config: of the stage; `output_dir` is its folder.
        label: names the stage in messages.
        loss: its mixture.
        loss_options: as for `RewardPenalizeTrainer`, and so `negatives` and `negative_options`.
        train: prompt_ids, chosen_ids, rejected_ids of each pair.
        held_out: the same of the pairs to evaluate on, or None.
        tokenizer: of the model.
        advance: called with what is done, how much of it and its total.

    Raises:
        CommandError: numbers that are not finite, files that cannot be written.
    """

    def __init__(
        self,
        model: Any,
        config: DPOConfig,
        *,
        label: str,
        loss: Mapping[str, float],
        loss_options: Mapping[str, Any],
        train: Dataset,
        held_out: Dataset | None,
        tokenizer: Any,
        advance: Advance,
        negatives: str | None = None,
        negative_options: Mapping[str, Any] | None = None,
    ) -> None:
        self.label, self.advance = label, advance
        config = copy.copy(config)
        config.precompute_ref_log_probs = True  # a reference beside the model is never loaded
        config.max_length = None  # the pairs have been cut
        for name in ("beta", "label_smoothing"):  # the options hold those of this stage
            setattr(config, name, DPOConfig.__dataclass_fields__[name].default)
        check_parameters(model, f"{label}, before its first step")
        super().__init__(
            model.eval(),
            args=config,
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=tokenizer,
            loss=loss,
            loss_options=loss_options,
            negatives=negatives,
            negative_options=negative_options,
        )
        if "ref" in getattr(model, "peft_config", {}):
            model.delete_adapter("ref")  # trl's copy of the adapter, read above
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        set_seed(config.seed)  # whether the reference was computed or read

    @property
    def folder(self) -> Path:
        """The folder of the stage's checkpoints and of its reference."""
        return Path(str(self.args.output_dir))

    def total_steps(self) -> int:
        """Returns the number of steps of the stage."""
        with torch.random.fork_rng(devices=[]):
            return int(self.set_initial_training_values(self.args, self.get_train_dataloader())[-1])

    def restore_token_count(self) -> None:
        """Restores the count of tokens from the last logged step."""
        seen = [entry["num_tokens"] for entry in self.state.log_history if "num_tokens" in entry]
        self._total_train_tokens = int(seen[-1]) if seen else 0

    def _send_telemetry(self) -> None:
        """Does nothing: the command reports to `report_to` alone."""

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, dataset_name: str
    ) -> Any:
        """Returns the data set as it is: its pairs are tokenised already."""
        return dataset

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """Adds log P under the present model for the pairs that will be used, NaN for others."""
        if not self._uses_reference:
            return dataset
        path = self.folder / f"reference-{name}.safetensors"
        known = _read(path, len(dataset))
        with torch.random.fork_rng(devices=[]):  # loaders draw a seed
            if name == "train":
                batches, total = self._first_batches(dataset), self._count_batches(dataset)
            else:
                places = torch.arange(len(dataset), device=self.args.device)
                rank, world = self.accelerator.process_index, self.accelerator.num_processes
                parts = list(places.split(batch_size))
                batches, total = iter(parts[rank::world]), len(parts[rank::world])
            label = f"{self.label}, reference of {name} pairs"
            found = self._fill(dataset, known.clone(), batches, label, total)
        if not torch.equal(found, known) and self.is_world_process_zero():
            self._write_reference(path, found)
        columns = dict(zip(_REFERENCE, found.tolist(), strict=True))
        for column, values in columns.items():
            dataset = dataset.add_column(column, values)
        return dataset

    def _positions(self, dataset: Any) -> Any:
        """Returns a loader of the indices of the pairs in each batch of this process."""
        loader: DataLoader[Any] = DataLoader(
            range(len(dataset)),  # type: ignore[arg-type]  # a Dataset by its methods
            batch_size=self._train_batch_size,
            sampler=self._get_train_sampler(dataset),
            drop_last=self.args.dataloader_drop_last,
            collate_fn=torch.tensor,
        )
        return self.accelerator.prepare(loader)

    def _count_batches(self, dataset: Any) -> int:
        """Returns the number of batches that `_first_batches` yields."""
        loader = self._positions(dataset)
        epochs, per_epoch, *_, steps = self.set_initial_training_values(self.args, loader)
        whole, rest = divmod(steps, per_epoch)
        extra = min(rest * self.args.gradient_accumulation_steps, len(loader))
        return int(min(whole, epochs) * len(loader) + extra)

    def _first_batches(self, dataset: Any) -> Iterable[Tensor]:
        """Yields the indices of the batches that the stage's steps take, in order."""
        left = self._count_batches(dataset)
        loader, epoch = self._positions(dataset), 0
        while left > 0:
            loader.set_epoch(epoch)
            for places in loader:
                if left > 0:
                    yield places
                left -= 1
            epoch += 1

    def _fill(
        self, dataset: Any, known: Tensor, batches: Iterable[Tensor], label: str, total: int
    ) -> Tensor:
        """Computes missing reference values (NaN) of batches, (2, N) float64, on all processes."""
        for done, batch in enumerate(batches, start=1):
            places = [i for i in batch.tolist() if known[:, i].isnan().any()]
            if places:
                inputs = self._prepare_inputs(self.data_collator([dataset[i] for i in places]))
                reference_of: Any = self.compute_ref_log_probs  # trl has no types
                logps = reference_of(self.model, inputs)
                values = torch.stack(logps).double().cpu()
                rejected = [
                    i for i, fine in zip(places, values.isfinite().all(0), strict=True) if not fine
                ]
                if rejected:
                    raise CommandError(
                        f"{self.label}: expected finite log-probabilities under the reference, got "
                        f"{values[:, places.index(rejected[0])].tolist()} of pair {rejected[0] + 1}"
                    )
                known[:, places] = values
            self.advance(label, done, total)
        if self.accelerator.num_processes > 1:
            shared = self.accelerator.gather(known[None].to(self.args.device)).cpu()
            for other in shared:
                known = torch.where(known.isnan(), other, known)
        return known

    def _write_reference(self, path: Path, found: Tensor) -> None:
        """Writes the reference atomically."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        try:
            save_file(dict(zip(_REFERENCE, found.contiguous().unbind(), strict=True)), part)
            part.replace(path)
        except (OSError, SafetensorError) as error:
            part.unlink(missing_ok=True)
            raise CommandError(f"{path}: cannot be written: {error}") from error

    def training_step(self, *rest: Any, **named: Any) -> Tensor:
        """Takes a step on a micro-batch; raises if the loss is not finite."""
        loss: Tensor = super().training_step(*rest, **named)  # type: ignore[no-untyped-call]
        self._check("loss", float(loss))
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Returns the gradient's norm; raises if it is not finite, unless float16 is scaled."""
        norm = super()._get_grad_norm(  # type: ignore[no-untyped-call]
            model, grad_norm=grad_norm
        )
        if self.accelerator.scaler is None:
            self._check("gradient norm", float(norm))
        return norm

    def _check(self, name: str, value: float) -> None:
        """Raises if a number is not finite, before any parameter changes."""
        if not math.isfinite(value):
            step = self.state.global_step + 1
            raise CommandError(f"{self.label}, step {step}: expected a finite {name}, got {value}")

    def evaluate(self, *rest: Any, **named: Any) -> dict[str, float]:
        """Evaluates, and raises if a metric is not finite."""
        seen: dict[str, float] = super().evaluate(*rest, **named)
        for name, value in seen.items():
            if not math.isfinite(value):
                where = f"{self.label}, evaluation after step {self.state.global_step}"
                raise CommandError(f"{where}: expected a finite {name}, got {value}")
        return seen

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Writes a checkpoint, seals it, and only then removes older ones."""
        step, limit = self.state.global_step, self.args.save_total_limit
        check_parameters(model, f"{self.label}, after step {step}")
        folder = self.folder / f"checkpoint-{step}"
        if self.is_world_process_zero():
            unseal(folder)
        self.args.save_total_limit = None
        try:
            with writing(folder):
                super()._save_checkpoint(model, trial)  # type: ignore[no-untyped-call]
                self.accelerator.wait_for_everyone()
                if self.is_world_process_zero():
                    seal(folder)
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            rotate_checkpoints(str(self.folder), limit, best)


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turns any library's error about a full disk or a lost folder into a one-line error.

    Args:
        folder: that is written; what is there of it is removed then, to leave room.

    Raises:
        CommandError: the folder and the reason.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch's writer has no type of its own, and may say nothing of the disk
        if isinstance(error, RuntimeError) and not re.search(_OF_TORCHS_WRITER, str(error)):
            raise
        free = shutil.disk_usage(next(p for p in folder.parents if p.exists())).free
        shutil.rmtree(folder, ignore_errors=True)
        raise CommandError(
            f"{folder}: cannot be written ({free / 1e6:.1f} MB free): {error}"
        ) from error


def check_parameters(model: nn.Module, where: str) -> None:
    """Raises unless all parameters of a model are finite.

    Args:
        model: whose parameters are looked at.
        where: in the run, for the message.

    Raises:
        CommandError: the first that is not.
    """
    for name, value in model.named_parameters():
        if value.is_floating_point() and not bool(torch.isfinite(value.detach()).all()):
            raise CommandError(f"{where}: expected finite parameters, got NaN or inf in {name}")


def _read(path: Path, count: int) -> Tensor:
    """Reads a stored reference, (2, count) float64, NaN where nothing is stored."""
    try:
        with safe_open(path, framework="pt") as file:
            found = torch.stack([file.get_tensor(name) for name in _REFERENCE])
    except (OSError, SafetensorError):
        found = torch.empty(0)
    if found.shape != (2, count):
        return torch.full((2, count), math.nan, dtype=torch.float64)
    return found
