"""trl's trainers of online reinforcement learning, on exactly the tokens that were sampled from.

With top-p or top-k rollouts a token is drawn from a truncated distribution; trl scores it under the
whole one, so that its ratio to the sampler is wrong by the kept mass. Here the ids that each token
was drawn from are kept, and are the vocabulary of its row in every score.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
import trl
from torch import Tensor
from transformers import Trainer
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_trainer import RLOOTrainer

from fastadapt.adaptor import Adaptor
from fastadapt.trl._log_probs import SupportLogProbs
from fastadapt.trl._sampled import Batch, Recorder, padded, rows_of
from fastadapt.trl._sampler import check_sampler, filters_of
from fastadapt.trl._served import check_hook, served
from fastadapt.trl._support import Decided, Replayed

Mode = Literal["replay", "recompute", "off"]
_MODES = ("replay", "recompute", "off")
_NEAR = (0.9, 1.1)  # ratios of trainer to sampler that are not counted as far


class _Records(Trainer):
    """Stands behind trl's trainer, which asks it to prepare what `model.generate` gets."""

    _recorder: Recorder | None = None

    def _prepare_inputs(self, inputs: Any) -> Any:
        """Also has a generation that is recorded drawn by the recorder."""
        prepared: Any = super()._prepare_inputs(inputs)
        if self._recorder is None:
            return prepared
        return {**prepared, "custom_generate": self._recorder}


class _OnSupports:
    """Stands before trl's trainer: keeps supports with their sequences, and scores on them."""

    def __init__(self, *arguments: Any, support: Mode = "replay", **named: Any) -> None:
        if support not in _MODES:
            raise ValueError(f"support: expected one of {_MODES}, got {support!r}")
        check_hook()
        self._batch, self._adaptor = Batch(), Adaptor()
        super().__init__(*arguments, **named)
        trainer: Any = self
        self._mode, self._draws = support, check_sampler(trainer, support)
        self._scorer = SupportLogProbs()
        self._trains_entropy = bool(getattr(trainer, "_entropy_bonus_enabled", False))
        if support == "recompute":
            self._adaptor = filters_of(trainer)

    def _generate_single_turn(self, *arguments: Any, **named: Any) -> Any:
        """Generates, and keeps what was drawn from where this process's model draws."""
        parent: Any = super()
        if not self._draws:
            return parent._generate_single_turn(*arguments, **named)  # noqa: SLF001, it overrides
        recorder = Recorder(self._mode == "replay")
        self._recorder: Recorder | None = recorder
        try:
            made = parent._generate_single_turn(*arguments, **named)  # noqa: SLF001, it overrides
        finally:
            self._recorder = None
        completions = made[0] if isinstance(made, tuple) else made
        lengths = [len(ids) for ids in completions]
        self._batch.drawn = recorder.logps(lengths)
        if self._mode == "replay":
            self._batch.supports = recorder.supports_of(lengths)
        if self._mode == "off" or not isinstance(made, tuple):
            return made
        return completions, [row.tolist() for row in self._batch.drawn]

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        """Also puts supports and the sampler's log-probabilities beside the sequences.

        Supports are a list with one of each sequence, which trl shuffles and splits by sequences.
        """
        parent: Any = super()
        with self._at_work(Batch()) as batch:
            output = parent._generate_and_score_completions(inputs)  # noqa: SLF001, it overrides
        logps = output.get("sampling_per_token_logps")
        if batch.drawn:
            logps = padded(batch.drawn, output["completion_ids"].shape[1])
        kept = {"supports": batch.supports, "sampler_logps": logps, "removed": batch.removed}
        return {**output, **{name: value for name, value in kept.items() if value is not None}}

    def _compute_loss(self, model: Any, inputs: Mapping[str, Any]) -> Any:
        """Returns trl's loss, of log-probabilities on the supports of these sequences."""
        parent: Any = super()
        mask = inputs["completion_mask"].bool()
        if "tool_mask" in inputs:
            mask = mask & inputs["tool_mask"].bool()
        supports, logps = inputs.get("supports"), inputs.get("sampler_logps")
        with self._at_work(Batch(supports, logps, inputs.get("removed"), mask)) as batch:
            loss = parent._compute_loss(model, inputs)  # noqa: SLF001, it overrides
        if self._mode != "off" and not batch.scored:
            raise RuntimeError(
                f"trl {trl.__version__}: expected a loss that scores its tokens by "
                "_get_per_token_logps_and_entropies, as in trl 1.16.0, got another"
            )
        return loss

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        *rest: Any,
        **named: Any,
    ) -> Any:
        """Returns trl's three outputs, the first two on the supports of the batch at work."""
        parent: Any = super()
        trainer: Any = self
        given = (model, input_ids, attention_mask, logits_to_keep, *rest)
        score: Any = parent._get_per_token_logps_and_entropies  # noqa: SLF001, it overrides
        batch = self._batch
        if self._mode == "off":
            made = score(*given, **named)
            self._note(made[0], batch, None, None)
            return made
        scored = attention_mask[:, -logits_to_keep:].bool()
        if batch.supports is None and model is trainer.ref_model:  # it is the policy that decides
            self._get_per_token_logps_and_entropies(trainer.model, *given[1:], **named)
        source: Replayed | Decided
        if batch.supports is not None:
            labels = input_ids[:, -logits_to_keep:][scored]
            source = Replayed(rows_of(batch.supports, scored), labels, self._trains_entropy)
        elif self._mode == "recompute":
            source = Decided(self._adaptor, self._trains_entropy)
        else:
            raise RuntimeError("supports: expected those of a generation of this trainer, got none")
        with served(self._scorer), self._scorer.reading(source):
            made = score(*given, **named)
        if isinstance(source, Decided):
            batch.supports = source.support.split(scored.sum(1).tolist())
            batch.removed = torch.zeros_like(scored).masked_scatter(scored, source.removed)
        else:
            source.check_end()
        batch.scored = True
        self._note(made[0], batch, source, scored)
        return made

    @contextlib.contextmanager
    def _at_work(self, batch: Batch) -> Iterator[Batch]:
        """Has the scores in the block be those of a batch."""
        before, self._batch = self._batch, batch
        try:
            yield batch
        finally:
            self._batch = before

    @torch.no_grad()
    def _note(
        self, logps: Tensor, batch: Batch, source: Replayed | Decided | None, scored: Tensor | None
    ) -> None:
        """Adds means over the tokens of a loss, of all processes, to trl's metrics."""
        if batch.mask is None:
            return
        trainer: Any = self
        of: dict[str, Tensor] = {}
        if batch.logps is not None:
            ratio = (logps - batch.logps)[batch.mask].exp()
            ratio = ratio[~ratio.isnan()]  # what an engine could not score
            of["ratio"] = ratio
            of["ratio_far"] = (ratio < _NEAR[0]) | (ratio > _NEAR[1])
        if source is not None:
            in_loss = batch.mask[scored]
            of["full"] = source.support.full[in_loss]
            of["kept"] = source.support.counts[in_loss][~of["full"]]
        if batch.removed is not None:
            of["removed"] = batch.removed[batch.mask]
        if not of:
            return
        sums = [
            torch.stack([x.double().sum(), x.new_tensor(len(x), dtype=torch.float64)])
            for x in of.values()
        ]
        totals = trainer.accelerator.reduce(torch.stack(sums), reduction="sum").tolist()
        mode = "train" if trainer.model.training else "eval"
        for name, (total, count) in zip(of, totals, strict=True):
            value = total / count if count else float("nan")  # trl leaves these out
            trainer._metrics[mode][f"support/{name}"].append(value)  # noqa: SLF001, its only address


class SupportGRPOTrainer(_OnSupports, GRPOTrainer, _Records):
    """trl's `GRPOTrainer`, whose scores are on exactly the tokens that were sampled from.

    Rollouts are drawn by `fastadapt.hf.generate`, which tells the ids that each token was drawn
    from. Policy, old policy and reference are scored on these ids alone, from hidden states and
    head (`linear_support_log_odds`), and the entropy is that on them; so the ratio of trainer to
    sampler is 1, to rounding, whatever the filters. A row where nothing was filtered is scored
    whole. The rest (data, rewards, advantages, loss, PEFT, checkpoints) is trl's.

    Logged beside trl's metrics are, over the tokens of the loss: "support/ratio", the mean ratio of
    trainer to sampler, and "support/ratio_far", the share of ratios outside [0.9, 1.1] (the policy
    moves away from the sampler with every optimizer step on the same rollouts); "support/kept", the
    mean number of ids, of tokens for which some were removed; "support/full", the share of the
    others; "support/removed", with "recompute", the share of tokens that the trainer's own logits
    had removed.

    Examples:
        >>> import datasets, tokenizers, transformers, trl
        >>> from fastadapt.trl import SupportGRPOTrainer
        >>> words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, "?"))
        >>> tokenizer = transformers.PreTrainedTokenizerFast(
        ...     tokenizer_object=words, eos_token="?", pad_token="?"
        ... )
        >>> config = transformers.LlamaConfig(
        ...     vocab_size=3, hidden_size=64, intermediate_size=64, num_hidden_layers=1
        ... )
        >>> model = transformers.LlamaForCausalLM(config)
        >>> sizes = {"max_completion_length": 4, "num_generations": 4, "max_steps": 1}
        >>> sizes["per_device_train_batch_size"] = 4
        >>> args = trl.GRPOConfig("out", top_p=0.7, bf16=False, save_strategy="no", **sizes)
        >>> trainer = SupportGRPOTrainer(
        ...     model,
        ...     reward_funcs=lambda completions, **_: [float("b" in text) for text in completions],
        ...     args=args,
        ...     train_dataset=datasets.Dataset.from_dict({"prompt": ["a", "b"] * 4}),
        ...     processing_class=tokenizer,
        ... )
        >>> result = trainer.train()
        {'train_runtime': ...}
        >>> abs(trainer.state.log_history[0]["support/ratio"] - 1) < 1e-3
        True

    Args:
        *arguments: those of `GRPOTrainer`.
        support (str): "replay": the ids that were kept in the draw. "recompute": the filters of
            `args` decide again, on the policy's logits before its first step on the rollouts; for
            samplers that do not tell (vLLM, continuous batching, tools, a rollout function). A
            token that they would remove is kept. Tokens that something else than a filter had
            removed (a ban) count as kept. "off": scores are trl's, on the whole vocabulary, and
            the ratios are logged.
        **named: those of `GRPOTrainer`.

    Raises:
        ValueError: another `support`; with "replay", a sampler that does not tell; with both, what
            makes the sampler's logits others than the trainer's (a repetition penalty, another
            temperature); with "recompute", a reference that is the policy without its adapter.
        RuntimeError: as `fused_log_probs`.
        NotImplementedError: (in training) a model that is not on the CPU.
    """

    _tag_names = GRPOTrainer._tag_names + ["fastadapt"]  # of the model card


class SupportRLOOTrainer(_OnSupports, RLOOTrainer, _Records):
    """trl's `RLOOTrainer`, whose scores are on exactly the tokens that were sampled from.

    Modes, metrics and errors are those of `SupportGRPOTrainer`; the KL divergence in the reward is
    one of distributions on what was sampled from, too.

    Examples:
        >>> import datasets, tokenizers, transformers, trl
        >>> from fastadapt.trl import SupportRLOOTrainer
        >>> words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, "?"))
        >>> tokenizer = transformers.PreTrainedTokenizerFast(
        ...     tokenizer_object=words, eos_token="?", pad_token="?"
        ... )
        >>> config = transformers.LlamaConfig(
        ...     vocab_size=3, hidden_size=64, intermediate_size=64, num_hidden_layers=1
        ... )
        >>> sizes = {"max_completion_length": 4, "num_generations": 4, "max_steps": 1}
        >>> sizes["per_device_train_batch_size"] = 4
        >>> args = trl.RLOOConfig(
        ...     "out", min_p=0.1, beta=0.0, bf16=False, save_strategy="no", **sizes
        ... )
        >>> trainer = SupportRLOOTrainer(
        ...     transformers.LlamaForCausalLM(config),
        ...     reward_funcs=lambda completions, **_: [float("b" in text) for text in completions],
        ...     args=args,
        ...     train_dataset=datasets.Dataset.from_dict({"prompt": ["a", "b"] * 4}),
        ...     processing_class=tokenizer,
        ... )
        >>> result = trainer.train()
        {'train_runtime': ...}
        >>> result.global_step
        1

    Args:
        *arguments: those of `RLOOTrainer`.
        support (str): as of `SupportGRPOTrainer`.
        **named: those of `RLOOTrainer`.
    """

    _tag_names = RLOOTrainer._tag_names + ["fastadapt"]  # of the model card
