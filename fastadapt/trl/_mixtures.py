"""What the trainers of mixtures share, whatever their rows are: forwards, divisors, metrics."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from fastadapt.losses.mixture import RewardPenalizeLoss
from fastadapt.losses.responses import Responses
from fastadapt.losses.rows import sequence_logps
from fastadapt.training.pairs import IGNORED
from fastadapt.trl._inputs import RewardShift
from fastadapt.trl._log_probs import LogOdds, Scorer
from fastadapt.trl._more_rows import LogOddsAnd
from fastadapt.trl._negatives import Batch, CandidateLogOdds, scorer_of
from fastadapt.trl._scoring import Scored, check_packing, score_rows

ROWS = frozenset({"input_ids", "attention_mask", "completion_mask", "token_type_ids"})  # of text
_OF_RESPONSES = {"logps", "rewards"}  # means over the responses of a side
_NOT_MADE = {  # inputs that a trainer has not, and what has them
    "gold": "losses of chosen and rejected responses; RewardPenalizeLoss takes gold ones from a "
    "loop of your own, and so does trl's experimental TPOTrainer",
}


class MixtureTrainer:
    """Trains on a mixture; goes before a trainer of trl, which brings rows, reference and loop.

    A subclass says what the sides of a batch are and how many tokens and responses they have.
    """

    mixture: RewardPenalizeLoss
    args: Any
    model: Any
    ref_model: Any
    state: Any
    accelerator: Any
    callback_handler: Any
    precompute_ref_logps: bool
    aux_loss_enabled: bool
    router_aux_loss_coef: float
    current_gradient_accumulation_steps: int
    _tp_size: int
    _metrics: Any
    _total_train_tokens: int
    _not_of_the_model: frozenset[str]
    _until_checked: contextlib.ExitStack
    add_callback: Any

    def _set_objective(
        self, loss: Any, options: Mapping[str, Any], args: Any, ref_model: Any
    ) -> None:
        """Makes the mixture and checks that its inputs are to be had."""
        self.mixture = RewardPenalizeLoss(loss, **options)
        for name, expected in _NOT_MADE.items():
            if self.mixture.needs(name):
                needing = [k for k in self.mixture.weights if name in self.mixture.inputs_of(k)]
                names = ", ".join(needing)
                raise ValueError(f"loss: expected {expected}; got {names}, which needs {name}")
        self._uses_reference = self.mixture.takes("ref_chosen_logps")
        self._without_reference = not self._uses_reference and ref_model is None
        if args.sync_ref_model and not self._uses_reference:
            names = ", ".join(self.mixture.weights)
            raise ValueError(f"args.sync_ref_model: expected False without a reference: {names}")
        smooths, diverges = (self.mixture.takes(x) for x in ("logsumexp", "chosen_divergences"))
        self._rows = LogOddsAnd(smooths=smooths) if smooths or diverges else None
        self._of_reference = LogOddsAnd(keeps=True) if diverges else None
        self._packs, self._asked_packing = getattr(args, "padding_free", False), False

    def _set_candidates(self, negatives: str | None, options: Mapping[str, Any] | None) -> None:
        """Says what candidates the chosen rows have, if a loss takes any."""
        self._candidates: CandidateLogOdds | None = scorer_of(negatives, options, self.mixture)

    def _finish(self, args: Any, tracker: Any = None) -> None:
        """Does what is left when trl's trainer is made.

        Args:
            args: as they were asked for, where trl has got others.
            tracker: what records the run, or None.

        Raises:
            TypeError: no tracker.
            ValueError: a step has parts that the mixture cannot be split over.
        """
        for name in ("padding_free", "precompute_ref_log_probs", "loss_type"):
            if hasattr(args, name):
                setattr(self.args, name, getattr(args, name))
        if self.mixture.takes("reward_shift"):
            self.add_callback(RewardShift())
        parts = self.args.gradient_accumulation_steps * self.accelerator.num_processes
        if not self.mixture.splits and parts > 1:
            raise ValueError(
                f"norm: expected one that splits over {parts} micro-batches, got batch_token_mean"
            )
        if tracker is not None:
            follow = getattr(tracker, "follow", None)
            if follow is None:
                raise TypeError(
                    "tracker: expected a RewardPenalizeTracker, such as "
                    f"RewardPenalizeTracker(interval=10), got {tracker!r}"
                )
            follow(self)

    def create_accelerator_and_postprocess(self) -> None:
        """Also shows again what was hidden from trl, which has looked by now and scores next."""
        self._until_checked.close()
        # trl then loads no reference; what it computes beforehand is ours
        self.args.precompute_ref_log_probs |= self._without_reference
        super().create_accelerator_and_postprocess()  # type: ignore[misc]

    @property
    def progress(self) -> float:
        """How much of the run's steps are done, in [0, 1]; what schedules of weights see."""
        steps = self.state.max_steps
        return min(self.state.global_step / steps, 1.0) if steps > 0 else 0.0

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Also counts the divisors of a step over its micro-batches and processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)  # type: ignore[misc]
        if not batches:
            return batches, None
        counts = torch.stack([self._counts(batch) for batch in batches]).sum(0).to(device)
        if self.args.average_tokens_across_devices and self.accelerator.num_processes > 1:
            counts = self.accelerator.gather(counts[None]).sum(0) // self._tp_size
        return batches, counts

    def _counts(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Returns the counts of a batch that the means of a step divide by."""
        raise NotImplementedError

    def _own(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Returns the part of a batch that the step needs."""
        return inputs

    def _labels(self, inputs: Mapping[str, Any]) -> Tensor:
        """Returns the labels to score, (R, T)."""
        labels: Tensor = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, IGNORED)
        return labels

    def _sides(
        self, inputs: Mapping[str, Any], scored: Scored, counts: Tensor | None
    ) -> tuple[Responses, Responses | None]:
        """Returns the chosen and, if present, the rejected responses, with the step's divisors."""
        raise NotImplementedError

    def _reference(self, inputs: dict[str, Any]) -> tuple[Tensor | None, Tensor | None]:
        """Returns log P of both sides under the reference, if a loss looks at it."""
        raise NotImplementedError

    def _more(
        self,
        model: Any,
        inputs: dict[str, Any],
        scored: Scored,
        sides: tuple[Responses, Responses | None],
        counts: Tensor | None,
    ) -> dict[str, Any]:
        """Returns the other inputs of the mixture."""
        raise NotImplementedError

    def _on_sides(self, inputs: Mapping[str, Any], x: Tensor) -> tuple[Tensor, ...]:
        """Returns per-row values of the sides there are, chosen ones first."""
        raise NotImplementedError

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Returns the loss of a batch, or its share of the step's loss."""
        inputs = self._own(inputs)
        extra: dict[str, Any] = {"output_router_logits": True} if self.aux_loss_enabled else {}
        labels = self._labels(inputs)
        with contextlib.ExitStack() as stack:
            keeper = self._of_reference
            if keeper is not None:
                stack.enter_context(keeper.reading())
            reference = self._reference(inputs)
            if self._candidates is not None:
                batch = self._of_candidates(inputs, labels)
                stack.enter_context(self._candidates.reading(batch))
            if self._rows is not None:
                teacher = None if keeper is None else keeper.known
                stack.enter_context(self._rows.reading(teacher, self._candidates))
            scored = self._score(model, inputs, labels, **extra)
        split = isinstance(num_items_in_batch, Tensor) and self.mixture.splits
        counts = num_items_in_batch if split else None
        sides = self._sides(inputs, scored, counts)  # type: ignore[arg-type]
        given = dict(zip(("ref_chosen_logps", "ref_rejected_logps"), reference, strict=True))
        given |= self._more(model, inputs, scored, sides, counts)  # type: ignore[arg-type]
        if scored.logsumexp is not None:
            for name in ("logsumexp", "mean_logits"):
                given[name] = self._on_sides(inputs, getattr(scored, name))[0]
        if self.mixture.takes("reward_shift"):
            given["reward_shift"] = self._reward_shift(model, sides, reference)
        if self._candidates is not None:
            rows = self._candidates.inputs(batch)
            given |= {name: self._on_sides(inputs, x)[0] for name, x in rows.items()}
        loss, metrics = self.mixture(*sides, progress=self.progress, **given)
        if self._candidates is not None:
            metrics["negatives/per_token"] = self._candidates.per_token
        told = {"reference_point": "kl", "reward_shift": "rewards/shift"}
        metrics |= {told[k]: given[k] for k in told if given.get(k) is not None}
        parts = 1 if num_items_in_batch is None else int(self.current_gradient_accumulation_steps)
        if scored.aux_loss is not None:
            loss = loss + self.router_aux_loss_coef * scored.aux_loss / parts
            metrics["aux_loss"] = scored.aux_loss.detach()
        scaled = {k: v * parts for k, v in metrics.items() if k.startswith("loss/")}
        self._note(inputs, scored, {**metrics, **scaled, "loss": loss.detach()})
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * (self.accelerator.num_processes // self._tp_size)
        if not return_outputs:
            return loss
        with torch.no_grad():
            return loss, model(**self._of_the_model(inputs), use_cache=False)

    def _of_the_model(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Returns what the model takes of a batch."""
        return {k: v for k, v in inputs.items() if k not in self._not_of_the_model}

    def _score(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        labels: Tensor,
        scorer: type | Scorer | None = None,
        **more: Any,
    ) -> Scored:
        """Scores the labels of a batch, in rows or packed; packing is asked of the model once."""
        if self._packs and not self._asked_packing:
            check_packing(model, self.model.config)
            self._asked_packing = True
        own = self._of_the_model(inputs)
        scorer = scorer or self._rows or self._candidates or LogOdds
        return score_rows(model, own, labels, scorer, packs=self._packs, **more)

    def _of_candidates(self, inputs: Mapping[str, Any], labels: Tensor) -> Batch:
        """Returns the tokens of a batch, and which of them have candidates: the chosen ones."""
        mask = inputs["completion_mask"][:, 1:].bool()
        rows = torch.arange(len(mask), device=mask.device)
        chosen = torch.isin(rows, self._on_sides(inputs, rows)[0])
        there = inputs["attention_mask"].bool()
        return Batch(inputs["input_ids"], labels[:, 1:], mask & chosen[:, None], there)

    @contextlib.contextmanager
    def _as_reference(self) -> Iterator[Any]:
        """Yields the reference: a model, or the policy with its adapter off or as it was."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stop: Any = disable_gradient_checkpointing  # trl has no types
            stack.enter_context(stop(self.model, self.args.gradient_checkpointing_kwargs))
            stack.enter_context(self.accelerator.autocast())
            policy = self.accelerator.unwrap_model(self.model)
            if self.ref_model is None and hasattr(policy, "peft_config"):
                switch: Any = use_adapter
                stack.enter_context(switch(policy, "ref" if "ref" in policy.peft_config else None))
            yield self.model if self.ref_model is None else self.ref_model

    def _completions(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        labels: Tensor | None = None,
        scorer: Scorer | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns the log-odds of a batch's completions and their mask, without a gradient.

        Args:
            model: policy or reference.
            inputs: the batch.
            labels: those to score; by default the completions.
            scorer: what scores them; by default what scores the policy's.
        """
        labels = MixtureTrainer._labels(self, inputs) if labels is None else labels
        with torch.no_grad():
            log_odds = self._score(model, inputs, labels, scorer).log_odds
        return log_odds.detach(), inputs["completion_mask"][:, 1:].bool()

    def _row_logps(self, model: Any, inputs: Mapping[str, Any]) -> Tensor:
        """Returns log P of each row's completion, (R,), without a gradient."""
        return sequence_logps(Responses(*self._completions(model, inputs)))

    def _over_ranks(self, total: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """Returns a sum and a count over all processes."""
        table = torch.stack([total.double(), count.double()])
        if self.accelerator.num_processes > 1:
            table = self.accelerator.gather(table[None]).sum(0)
        total, count = table.unbind()
        return total, count

    def _reward_shift(
        self,
        model: Any,
        sides: tuple[Responses, Responses | None],
        reference: tuple[Tensor | None, Tensor | None],
    ) -> Tensor:
        """Returns the mean reward of the run so far, this batch's included in training."""
        handler = self.callback_handler
        shift = next(x for x in handler.callbacks if isinstance(x, RewardShift))
        if model.training:
            beta = self.mixture.options_of("bco")["beta"]
            rewards = [
                beta * (sequence_logps(side).detach() - ref)
                for side, ref in zip(sides, reference, strict=True)
                if side is not None and ref is not None
            ]
            every = torch.cat(rewards)
            shift.add(*self._over_ranks(every.sum(), every.new_tensor(len(every))))
        return shift.mean(sides[0].log_odds)

    def _note(
        self, inputs: Mapping[str, Any], scored: Scored, metrics: Mapping[str, Tensor]
    ) -> None:
        """Stores the metrics of a batch for the log, over all processes, in one transfer.

        Raises before the backward of a loss that is not finite.

        A mean over the responses of a side weighs by their number; what is of none is left out.
        """
        mode = "train" if self.model.training else "eval"
        with torch.no_grad():
            named = self._counted(inputs, scored)
            named["tokens"] = inputs["attention_mask"].sum(), None
            some = inputs["completion_mask"][:, 1:].any(-1)
            sizes = [side.sum() for side in self._on_sides(inputs, some)]
            weights = dict(zip(("chosen", "rejected"), sizes, strict=False))
            for name, value in metrics.items():
                kind, _, side = name.partition("/")
                size = weights.get(side) if kind in _OF_RESPONSES else None
                named[name] = (value, None) if size is None else (value * size, size)
            names, values = list(named), [v for v, _ in named.values()]
            counts = [torch.ones_like(v) if w is None else w for v, w in named.values()]
            rows = [torch.stack([x.float() for x in each]) for each in (values, counts)]
            table = torch.stack(rows)
            if self.accelerator.num_processes > 1:
                table = self.accelerator.gather(table[None])
            sums = table.view(-1, 2, len(names)).sum(0).tolist()
        seen = {k: v / w for k, v, w in zip(names, *sums, strict=True) if w}
        value = seen.pop("loss")
        if mode == "train" and not math.isfinite(value):
            step = self.state.global_step + 1
            raise FloatingPointError(f"loss: expected a finite number in step {step}, got {value}")
        tokens = seen.pop("tokens") * sums[1][names.index("tokens")]
        if mode == "train":
            self._total_train_tokens += round(tokens) // self._tp_size
        for name, value in seen.items():
            self._metrics[mode][name].append(value)
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]

    def _counted(
        self, inputs: Mapping[str, Any], scored: Scored
    ) -> dict[str, tuple[Tensor, Tensor | None]]:
        """Returns what trl logs of tokens: sums, and the tokens they are over."""
        mask = inputs["completion_mask"][:, 1:].bool()
        found: dict[str, tuple[Tensor, Tensor | None]] = {}
        if scored.entropy is not None:
            found["entropy"] = (scored.entropy * mask).sum(), mask.sum()
        if scored.mean_logits is not None:
            sums, counts = (scored.mean_logits * mask).sum(-1), mask.sum(-1)
            sides = zip(self._on_sides(inputs, sums), self._on_sides(inputs, counts), strict=True)
            for name, (total, count) in zip(("chosen", "rejected"), sides, strict=False):
                found[f"logits/{name}"] = total.sum(), count.sum()
        if scored.hits is not None:
            hits = (scored.hits.bool() & mask).sum(-1)
            chosen, tokens = (self._on_sides(inputs, x)[0].sum() for x in (hits, mask.sum(-1)))
            found["mean_token_accuracy"] = chosen, tokens
        return found
