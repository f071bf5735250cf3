"""Hooks for trl: a trainer of pairs for any mixture of losses, and faster scoring in its own.

trl's models compute the log-probabilities of labels through one autograd function, which their
forward looks up at each call; both hooks put `linear_log_odds` in its place for a while. So it
runs inside the model's forward, where the wrappers of distributed training expect it. A head that
is not trained (LoRA) takes two products instead of trl's three, and none in the backward.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from fastadapt._ops.checks import flag, instance
from fastadapt.losses.preference.weights import desensitized_logps, wpo_weights
from fastadapt.losses.responses import Responses
from fastadapt.losses.rows import sequence_logps
from fastadapt.training.pairs import IGNORED
from fastadapt.trl._arguments import KINDS_OF_DPO, OF_DPO, ld_alpha_of, options_of, refuse
from fastadapt.trl._inputs import after_other_prompts
from fastadapt.trl._log_probs import LogProbs
from fastadapt.trl._mixtures import ROWS, MixtureTrainer
from fastadapt.trl._scoring import Scored, without_adapter_on_its_head
from fastadapt.trl._served import check_hook, served

_REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")
_REPLACED = {"loss_type": "loss=", "loss_weights": "loss="}


@contextlib.contextmanager
def fused_log_probs() -> Iterator[None]:
    """Makes trl's own trainers use `linear_log_odds` inside a `with` block.

    SFT, DPO, KTO, GRPO and RLOO take their log-probabilities, their entropy, mean logit and token
    accuracy from it; the same losses and gradients, to rounding. Blocks may nest. Cap, factor and
    vocabulary of a head are those of the model's own logits, asked once a model, where trl reads
    its configuration; a model whose logits are no products with its head's matrix is refused
    (ValueError) by its first forward; so is a head with an adapter when one of trl's trainers is
    made. With `torch_compile=True` its graph breaks where the head is scored. The entropy has a
    gradient where the head is trained; with a frozen one, for which it would cost a product more in
    every step, and with one that FSDP2 or ZeRO-3 gathers, a loss that contains it (GRPO's
    `entropy_coef`) fails in its backward.

    Examples:
        >>> import datasets, tokenizers, transformers, trl
        >>> from fastadapt.trl import fused_log_probs
        >>> words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, "?"))
        >>> tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="?")
        >>> config = transformers.LlamaConfig(
        ...     vocab_size=3, hidden_size=64, intermediate_size=64, num_hidden_layers=1
        ... )
        >>> model = transformers.LlamaForCausalLM(config)
        >>> args = trl.SFTConfig("out", max_steps=1, bf16=False, save_strategy="no")
        >>> data = {"train_dataset": datasets.Dataset.from_dict({"input_ids": [[0, 1, 0, 2]]})}
        >>> trainer = trl.SFTTrainer(model, args=args, processing_class=tokenizer, **data)
        >>> with fused_log_probs():
        ...     result = trainer.train()
        {'train_runtime': ...}
        >>> result.global_step
        1

    Raises:
        RuntimeError: the installed trl has no such hook, or another one; 1.16.0 has it.
    """
    with served(LogProbs):
        yield


class RewardPenalizeTrainer(MixtureTrainer, DPOTrainer):
    """trl's `DPOTrainer` with any mixture of this package's losses.

    Data, reference (precomputed, the adapter switched off, or a model), PEFT, evaluation,
    checkpoints and resuming are trl's. LoRA may be on the head too, where trl refuses it. A step's
    loss is that of all pairs it takes, however they are split over micro-batches and, with
    `average_tokens_across_devices`, processes: token means divide by all the tokens and sequence
    means by all the pairs of the step. What looks at the batch is that of a micro-batch, as in trl:
    the sorting of "aot", the mean reward of "bco" and the reference point of "kto", which
    is 0 for a batch of one prompt, such as the last of an epoch. A
    reference is there for losses that look at one. Weights that are functions see the share of the
    run's steps that are done. Steps of a mixture of the chosen responses alone (`{"mle": 1.0}`)
    leave the rejected ones out, and so do their metrics; evaluation looks at both. With
    `torch_compile=True` the bodies of model and reference are compiled, and their heads run outside
    of the graphs. With `padding_free=True`, of text, the rows of a batch go through the models as
    one; the model is asked first whether it keeps their sequences apart.

    Logged are trl's metrics of DPO and those of `RewardPenalizeLoss`; "kl" is KTO's reference
    point, "rewards/shift" BCO's mean of all rewards of the run.

    Examples:
        >>> import datasets, tokenizers, transformers, trl
        >>> from fastadapt.trl import RewardPenalizeTrainer
        >>> words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, "?"))
        >>> tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="?")
        >>> config = transformers.LlamaConfig(
        ...     vocab_size=3, hidden_size=64, intermediate_size=64, num_hidden_layers=1
        ... )
        >>> model = transformers.LlamaForCausalLM(config)
        >>> pair = {"prompt": "a", "chosen": "b", "rejected": "a"}
        >>> args = trl.DPOConfig("out", max_steps=1, bf16=False, save_strategy="no")
        >>> pairs = datasets.Dataset.from_list([pair])
        >>> data = {"train_dataset": pairs, "processing_class": tokenizer}
        >>> trainer = RewardPenalizeTrainer(model, args=args, loss={"exmate": 1.0}, **data)
        >>> result = trainer.train()
        {'train_runtime': ...}
        >>> result.global_step
        1

    Args:
        model: as for `DPOTrainer`; a model and not its name where LoRA is on the head.
        ref_model: the same; without a loss that looks at a reference none is loaded.
        args (DPOConfig | None): the same. `beta` goes to every loss that is a loss type of trl's,
            and to any other that has a β where it is not the default; `label_smoothing`,
            `ld_alpha`, `f_divergence_type`, `f_alpha_divergence_coef` and `discopop_tau`, where
            changed, to all losses that have such an option; what `loss_options` says stays.
            `use_weighting` weighs pairs as WPO does. `loss_type` and `loss_weights` stay as they
            are by default.
        loss (Mapping[str, Any]): names and weights, as for `RewardPenalizeLoss`.
        loss_options (Mapping[str, Any] | None): its options: `coefficient`, `norm`, `level`, ...;
            under the name of a loss a mapping of those of that loss alone.
        nll_on_prompt (bool): the likelihood inside "orpo", "cpo" and "slic" is that of prompt and
            response of the chosen row, as in trl's `ORPOTrainer`.
        negatives (str | None): what "candidate_unlikelihood_penalty" makes less likely in the rows
            of the chosen responses, never the label: "previous", the earlier tokens; "top_k", the
            most probable ids, the model's mistakes; "repeated_ngrams", tokens that would complete
            an n-gram again. Logged is "negatives/per_token", how many a token has.
        negative_options (Mapping[str, Any] | None): `window` (None: all) of "previous"; `k` (1) of
            "top_k"; `n` (4) of "repeated_ngrams"; of the first and the last `context`: "response",
            or "sequence", the prompt before it too.
        tracker (fastadapt.tracking.RewardPenalizeTracker | None): one without an objective, which
            then records this run, its checkpoints included.
        **rest: the other arguments of `DPOTrainer`, by name.

    Raises:
        ValueError: a loss or an option that there is not; a loss whose inputs no trainer has; an
            argument that reaches no loss; the norm "batch_token_mean", which no sum over
            micro-batches gives, with several of them; `padding_free` with a model that mixes
            sequences.
        RuntimeError: as `fused_log_probs`.
    """

    loss_is_scaled_for_ga = True
    _not_of_the_model = frozenset({"completion_mask", *_REFERENCE})
    _tag_names = DPOTrainer._tag_names + ["fastadapt"]  # of the model card
    _name = "RewardPenalize"

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: DPOConfig | None = None,
        *,
        loss: Mapping[str, Any],
        loss_options: Mapping[str, Any] | None = None,
        nll_on_prompt: bool = False,
        negatives: str | None = None,
        negative_options: Mapping[str, Any] | None = None,
        tracker: Any = None,
        **rest: Any,
    ) -> None:
        check_hook()
        if args is not None:
            instance("args", args, DPOConfig, "a DPOConfig")
        asked = DPOConfig() if args is None else args
        args = copy.copy(asked)  # the caller's stays as it is
        refuse(args, _REPLACED)
        flag("nll_on_prompt", nll_on_prompt)
        _check_rows(rest.get("train_dataset"))
        options = options_of(loss, loss_options, args, OF_DPO, KINDS_OF_DPO)
        self._nll_on_prompt = nll_on_prompt
        self._set_objective(loss, options, args, ref_model)
        self._set_candidates(negatives, negative_options)
        self._ld_alpha = ld_alpha_of(self.mixture)
        self._check_inputs(args)
        args.padding_free = False  # rows are packed here
        with contextlib.ExitStack() as self._until_checked:
            self._until_checked.enter_context(without_adapter_on_its_head(model))
            super().__init__(model, ref_model, args, **rest)
        for name, on in (("args.padding_free", self._packs), ("nll_on_prompt", nll_on_prompt)):
            if on and self._is_vision_dataset:
                raise ValueError(f"{name}: expected False with images, got True")
        self._finish(asked, tracker)

    def _check_inputs(self, args: DPOConfig) -> None:
        """Raises if the arguments ask for inputs that no loss takes, or that cannot be made."""
        names = ", ".join(self.mixture.weights)
        for asked, name, argument in (
            (self._nll_on_prompt, "gold", "nll_on_prompt"),
            (args.use_weighting, "pair_weights", "args.use_weighting"),
        ):
            if asked and not self.mixture.takes(name):
                raise ValueError(f"{argument}: expected False for losses without {name}: {names}")
        for name, why in (
            ("reference_point", "kto, which asks it of the completions of other prompts"),
            ("chosen_divergences", "tdpo, which looks at all of its distributions"),
        ):
            if args.precompute_ref_log_probs and self.mixture.takes(name):
                raise ValueError(f"args.precompute_ref_log_probs: expected False for {why}")
        if not self.mixture.takes("reference_point"):
            return
        if args.per_device_train_batch_size < 2:
            raise ValueError(
                "args.per_device_train_batch_size: expected at least 2 for kto, whose reference "
                "point is of the completions of other prompts, got 1"
            )

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """Computes the reference by our operator, if a loss looks at it."""
        if not self._uses_reference:
            return dataset
        known = self._precompute_model_hash  # trl keeps what it computes by this
        self._precompute_model_hash = f"fastadapt {known} {self._ld_alpha}"
        try:
            return super()._precompute_ref_logps(dataset, name, batch_size)
        finally:
            self._precompute_model_hash = known

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Returns log P of the chosen and the rejected responses under the reference."""
        with self._as_reference():
            keeper = self._of_reference  # of the rows that the step scores, prompts among them
            labels = None if keeper is None else self._labels(inputs)
            found = self._completions(model, inputs, labels, keeper)
            parts = (x.chunk(2) for x in found)
            chosen, rejected = (Responses(*side) for side in zip(*parts, strict=True))
        if self._ld_alpha is not None:
            return desensitized_logps(chosen, rejected, self._ld_alpha)
        return sequence_logps(chosen), sequence_logps(rejected)

    def _counts(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Returns (4,): the chosen tokens, the rejected tokens, the pairs and the gold tokens."""
        chosen, rejected = inputs["completion_mask"][:, 1:].bool().chunk(2)
        pairs = (chosen.any(-1) | rejected.any(-1)).sum()
        gold = inputs["attention_mask"][:, 1:].bool().chunk(2)[0]
        return torch.stack([chosen.sum(), rejected.sum(), pairs, gold.sum()])

    def _own(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Leaves the rejected rows out where the loss needs none of them and the batch is text."""
        alone = not self.mixture.takes("rejected") and inputs.keys() <= {*ROWS, *_REFERENCE}
        self._width = 1 if alone and self.model.training else 2
        if self._width == 2:
            return inputs
        return {k: v.chunk(2)[0] if k in ROWS else v for k, v in inputs.items()}

    def _labels(self, inputs: Mapping[str, Any]) -> Tensor:
        """Returns the completions, and the prompts of the chosen rows too if they are scored."""
        labels = super()._labels(inputs)
        if not self._nll_on_prompt:
            return labels
        ids, there = inputs["input_ids"], inputs["attention_mask"].bool()
        whole = torch.where(there, ids, IGNORED).chunk(self._width)[0]
        return torch.cat([whole, labels[len(whole) :]])

    def _on_sides(self, inputs: Mapping[str, Any], x: Tensor) -> tuple[Tensor, ...]:
        """Returns the values of the chosen rows and of the rejected rows."""
        return x.chunk(self._width)

    def _sides(
        self, inputs: Mapping[str, Any], scored: Scored, counts: Tensor | None
    ) -> tuple[Responses, Responses | None]:
        """Returns the chosen and, if present, the rejected responses, with the step's divisors."""
        mask = inputs["completion_mask"][:, 1:].bool()
        divisors: list[dict[str, Any]] = [{}, {}]
        if counts is not None:
            chosen, rejected, pairs, _ = counts.unbind()
            divisors = [{"total_tokens": n, "total_sequences": pairs} for n in (chosen, rejected)]
        own = zip(
            self._on_sides(inputs, scored.log_odds), self._on_sides(inputs, mask), strict=True
        )
        first, *rest = (
            Responses(log_odds, kept, **totals)
            for (log_odds, kept), totals in zip(own, divisors[: self._width], strict=True)
        )
        return first, rest[0] if rest else None

    def _reference(self, inputs: dict[str, Any]) -> tuple[Tensor | None, Tensor | None]:
        """Returns log P of both sides under the reference, (B,) each, if a loss looks at it."""
        if not self._uses_reference:
            return None, None
        if self.precompute_ref_logps:
            return inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        with self._as_reference() as reference:
            return self.compute_ref_log_probs(reference, inputs)

    def _more(
        self,
        model: Any,
        inputs: dict[str, Any],
        scored: Scored,
        sides: tuple[Responses, Responses | None],
        counts: Tensor | None,
    ) -> dict[str, Any]:
        """Returns the gold responses, weights of pairs and KTO's reference point that are asked."""
        given: dict[str, Any] = {}
        if self._nll_on_prompt:
            there = self._on_sides(inputs, inputs["attention_mask"][:, 1:].bool())[0]
            total = None if counts is None else counts[3]
            log_odds = self._on_sides(inputs, scored.log_odds)[0]
            given["gold"] = Responses(log_odds, there, total_tokens=total)
        if self.args.use_weighting:
            squares = self._on_sides(inputs, scored.log_sum_squares)  # type: ignore[arg-type]
            given["pair_weights"] = wpo_weights(*sides, *squares)  # type: ignore[arg-type]
        if scored.divergences is not None:
            of_sides = self._on_sides(inputs, scored.divergences)
            names = ("chosen_divergences", "rejected_divergences")
            given |= dict(zip(names, of_sides, strict=True))
        if self.mixture.takes("reference_point"):
            given["reference_point"] = self._reference_point(model, inputs)
        return given

    def _reference_point(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """Returns KTO's z: the mean log-ratio of completions of other prompts, at least 0."""
        tokens = {k: v for k, v in inputs.items() if k in ROWS or k == "mm_token_type_ids"}
        rows = after_other_prompts(tokens, 2, self.args.max_length)
        ratios = torch.zeros(0, dtype=torch.float64, device=inputs["input_ids"].device)
        if rows is not None:
            moved = {**inputs, **rows}
            own = self._row_logps(model, moved)
            with self._as_reference() as reference:
                ratios = own - self._row_logps(reference, moved)
        total, count = self._over_ranks(ratios.sum(), ratios.new_tensor(len(ratios)))
        return (total / count.clamp(min=1)).clamp(min=0)


def _check_rows(dataset: Any) -> None:
    """Raises if rows are single responses with labels."""
    first: Any = {} if dataset is None else next(iter(dataset), {})
    if isinstance(first, Mapping) and "label" in first and "chosen" not in first:
        raise ValueError(
            f"train_dataset: expected pairs with chosen and rejected, got columns {sorted(first)}; "
            "UnpairedRewardPenalizeTrainer takes completions with a label each"
        )
