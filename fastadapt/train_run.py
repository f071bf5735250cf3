"""A training run from pairs to a saved model: stages, log, checkpoints (`fastadapt train`)."""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastadapt.losses import RewardPenalizeLoss
from fastadapt.pair_forms import Pair
from fastadapt.preferences import PairBatch, encode_pairs
from fastadapt.pretrained import load_demo_model, load_model
from fastadapt.train_data import DataError, load_pairs, split_pairs
from fastadapt.train_options import TrainOptions
from fastadapt.train_state import Metrics, TrainState, load_checkpoint, save_checkpoint
from fastadapt.training import Reference, reference_logps, response_margins, sides

_LORA_MODULES = "all-linear"


def run(options: TrainOptions, out: Console) -> None:
    """Trains and saves a model.

    Args:
        options: see there.
        out: where the log goes.

    Raises:
        DataError: the data, before the model is loaded; messages without a chat template, after.
        CheckpointError: the folder's checkpoint, before the model is loaded.
        ModelNotFoundError: the model.
    """
    if options.threads:
        torch.set_num_threads(options.threads)
    pairs = load_pairs(options.data, split=options.split)
    train, held_out = split_pairs(pairs, options.held_out, options.seed)
    if len(train) < options.batch:
        raise DataError(
            f"{options.data}: expected a batch of {options.batch} pairs or more, got {len(train)}"
        )
    settings = options.settings(pairs)
    options.output.mkdir(parents=True, exist_ok=True)
    checkpoint = load_checkpoint(options.output, settings, resume=options.resume)
    out.print(f"{len(train)} pairs to train on, {len(held_out)} held out")
    torch.manual_seed(options.seed)
    name = options.model
    load = load_demo_model if name is None else functools.partial(load_model, name)
    model, tokenizer = load(progress=lambda phase, done, total: None)
    if tokenizer.chat_template is None and any(not isinstance(p.prompt, str) for p in pairs):
        raise DataError(f"{options.data}: has messages, but the model has no chat template")
    wrapped = _with_adapters(model, options.lora) if options.lora else model
    model.to(options.device)  # in place, adapters and all
    job = _Job(options, model, tokenizer, train, held_out, out)
    job.restore(checkpoint)
    job.metrics = Metrics(options.output, job.state)
    try:
        while job.state.stage < len(options.stages):
            job.train_stage(settings)
    finally:
        job.metrics.close()
    wrapped.save_pretrained(options.output / "model")
    tokenizer.save_pretrained(options.output / "model")
    out.print(f"saved in {options.output / 'model'}")


class _Job:
    """A model on its way through the stages."""

    metrics: Metrics

    def __init__(
        self,
        options: TrainOptions,
        model: Any,
        tokenizer: Any,
        train: list[Pair],
        held_out: list[Pair],
        out: Console,
    ) -> None:
        """Keeps what it gets."""
        self.options, self.model, self.tokenizer, self.out = options, model, tokenizer, out
        self.train, self.held_out = train, held_out
        self.state = TrainState()
        self.trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.optimizer = self._new_optimizer()

    def restore(self, checkpoint: dict[str, Any] | None) -> None:
        """Goes to where a checkpoint was."""
        if checkpoint is None:
            return
        self.state = TrainState(**checkpoint["state"])
        for name in ("references", "held_out"):
            kept = getattr(self.state, name)
            if kept is not None:
                setattr(self.state, name, tuple(x.to(self.options.device) for x in kept))
        with torch.no_grad():
            for name, value in checkpoint["parameters"].items():
                self.trained[name].copy_(value)
        if checkpoint["optimizer"] is not None:
            self.optimizer.load_state_dict(checkpoint["optimizer"])
        torch.set_rng_state(checkpoint["rng"])
        self.out.print(f"going on in stage {self.state.stage + 1} after step {self.state.step}")

    def train_stage(self, settings: Mapping[str, Any]) -> None:
        """Takes the steps of a stage that are left, and saves where it came to."""
        options, state = self.options, self.state
        stage = options.stages[state.stage]
        objective = options.objective(stage)
        total = self._steps()
        if state.step == 0:
            self.optimizer = self._new_optimizer()
            if "dpo" in stage:
                self.model.eval()
                state.references = self._logps(self.train, "reference")
                state.held_out = self._logps(self.held_out, "reference, held out")
        label = _stage_label(state.stage, stage, len(options.stages))
        with self._bar() as bar:
            task = bar.add_task(label, total=total, completed=state.step)
            while state.step < total:
                self._step(objective, label, total)
                bar.advance(task)
                if state.step % options.save_every == 0 and state.step < total:
                    self._save(settings, self.optimizer.state_dict())
        self._evaluate(label)
        self.state = TrainState(state.stage + 1)
        self._save(settings, None)

    def _step(self, objective: RewardPenalizeLoss, label: str, total: int) -> None:
        """Takes one step, over `accumulate` batches whose shares add up to its loss."""
        state, options = self.state, self.options
        start = time.perf_counter()
        places = self._places(state.step)
        parts = [places[i : i + options.batch] for i in range(0, len(places), options.batch)]
        batches = [self._encode([self.train[i] for i in part]) for part in parts]
        totals = [sum(int(b.mask.chunk(2)[side].sum()) for b in batches) for side in (0, 1)]
        self.model.train()
        rate = options.rate(state.stage, state.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        seen: dict[str, float] = {}
        for part, batch in zip(parts, batches, strict=True):
            good, bad = sides(batch, response_margins(self.model, batch))
            if objective.options.get("norm") != "batch_token_mean":
                good = good._replace(total_tokens=totals[0], total_sequences=len(places))
                bad = bad._replace(total_tokens=totals[1], total_sequences=len(places))
            references: tuple[Any, Any] = (None, None)
            if "dpo" in objective.weights and state.references is not None:
                references = (state.references[0][part], state.references[1][part])
            loss, metrics = objective(good, bad, *references)
            loss.backward()
            share = len(part) / len(places)
            for name, value in {"loss": loss.detach(), **metrics}.items():
                weight = 1.0 if name.startswith("loss") else share
                seen[name] = seen.get(name, 0.0) + weight * float(value)
        norm = torch.nn.utils.clip_grad_norm_(self.trained.values(), options.max_norm)
        self.optimizer.step()
        state.step += 1
        seen |= {"grad_norm": float(norm), "learning_rate": rate}
        self.metrics.write(
            stage=state.stage + 1, step=state.step, **seen, seconds=time.perf_counter() - start
        )
        if state.step % options.log_every == 0 or state.step in (1, total):
            self.out.print(f"{label}, step {state.step}/{total}: {_shown(seen)}")

    def _evaluate(self, label: str) -> None:
        """Looks at the pairs held out, at a stage's end."""
        if not self.held_out:
            return
        self.model.eval()
        good, bad = self._logps(self.held_out, "held out")
        seen = {
            "eval/logps/good": float(good.mean()),
            "eval/logps/bad": float(bad.mean()),
            "eval/pairs/accuracies": float((good > bad).float().mean()),
        }
        if self.state.held_out is not None:
            ahead = (good - self.state.held_out[0]) > (bad - self.state.held_out[1])
            seen["eval/rewards/accuracies"] = float(ahead.float().mean())
        self.metrics.write(stage=self.state.stage + 1, step=self.state.step, **seen)
        plain = {k.removeprefix("eval/"): v for k, v in seen.items()}
        self.out.print(f"{label}, held out: {_shown(plain)}")

    def _logps(self, pairs: list[Pair], label: str) -> Reference:
        """log P of both responses of pairs, (N,) each."""
        seen: list[Reference] = []
        size = self.options.batch
        with self._bar() as bar:
            for i in bar.track(range(0, len(pairs), size), description=label):
                seen.append(reference_logps(self.model, self._encode(pairs[i : i + size])))
        if not seen:
            return torch.zeros(0), torch.zeros(0)
        good, bad = (torch.cat(side) for side in zip(*seen, strict=True))
        return good, bad

    def _places(self, step: int) -> list[int]:
        """The pairs of a step: a further part of an order that each epoch has anew."""
        size = self.options.batch * self.options.accumulate
        per_epoch = self._steps_per_epoch()
        epoch, first = divmod(step, per_epoch)
        order = random.Random(f"{self.options.seed}, {self.state.stage}, {epoch}")
        shuffled = order.sample(range(len(self.train)), len(self.train))
        return shuffled[first * size : (first + 1) * size]

    def _steps_per_epoch(self) -> int:
        """How many steps go once through the data; the last may be smaller."""
        size = self.options.batch * self.options.accumulate
        return -(-len(self.train) // size)

    def _steps(self) -> int:
        """How many steps a stage has."""
        steps = self.options.epochs * self._steps_per_epoch()
        return steps if self.options.max_steps is None else min(steps, self.options.max_steps)

    def _encode(self, pairs: Sequence[Pair]) -> PairBatch:
        """Pairs as a batch."""
        options = self.options
        batch = encode_pairs(self.tokenizer, pairs, max_length=options.max_length, chat=False)
        return PairBatch(*(x.to(options.device) for x in batch))

    def _new_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer of a stage."""
        return torch.optim.AdamW(self.trained.values(), weight_decay=0.0, fused=True)

    def _save(self, settings: Mapping[str, Any], optimizer: dict[str, Any] | None) -> None:
        """Writes the checkpoint."""
        save_checkpoint(self.options.output, settings, self.state, self.trained, optimizer)

    def _bar(self) -> Progress:
        """A progress display, where there is a terminal."""
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self.out,
            transient=True,
            disable=not self.out.is_terminal,
        )


def _with_adapters(model: Any, rank: int) -> Any:
    """Puts LoRA adapters on the body's linear layers and freezes the rest."""
    import peft

    config = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=_LORA_MODULES, task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(model, config)


def _stage_label(number: int, stage: Mapping[str, float], count: int) -> str:
    """Names a stage."""
    losses = " + ".join(k if v == 1 else f"{v:g} {k}" for k, v in stage.items())
    return f"stage {number + 1}/{count} ({losses})"


def _shown(seen: Mapping[str, float]) -> str:
    """Metrics as a person reads them."""
    texts = {
        "loss": "loss {:.4f}",
        "logps/good": "log P good {:.2f}",
        "logps/bad": "bad {:.2f}",
        "pairs/accuracies": "good ahead {:.0%}",
        "rewards/accuracies": "more than before {:.0%}",
        "grad_norm": "gradient {:.2g}",
    }
    return ", ".join(text.format(seen[k]) for k, text in texts.items() if k in seen)
