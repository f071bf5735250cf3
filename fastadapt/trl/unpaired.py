"""A trainer of single responses, each desirable or not, for any mixture of losses on them."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from trl.trainer.kto_config import KTOConfig
from trl.trainer.kto_trainer import KTOTrainer

from fastadapt._ops.checks import instance
from fastadapt.losses.catalogue.listing import CATALOGUE
from fastadapt.losses.responses import Responses
from fastadapt.trl._arguments import KINDS_OF_KTO, OF_KTO, options_of, refuse
from fastadapt.trl._mixtures import MixtureTrainer
from fastadapt.trl._scoring import Scored, without_adapter_on_its_head
from fastadapt.trl._served import check_hook

_REPLACED = {"loss_type": "loss="}
_OTHER_ROWS = ("KL_input_ids", "KL_attention_mask", "KL_completion_mask")
_OTHER_TYPES = ("KL_token_type_ids", "KL_mm_token_type_ids")


class UnpairedRewardPenalizeTrainer(MixtureTrainer, KTOTrainer):
    """trl's `KTOTrainer` with any mixture of this package's losses that needs no pairs.

    Rows have a prompt, a completion and a label: True for responses to reward, False for those to
    penalise, in any order and number; pairs are made into such rows. Those labelled True are the
    chosen side of each loss, the others the rejected side. Data, reference, PEFT, evaluation,
    checkpoints and resuming are trl's. A step's loss is that of all rows it takes, however they are
    split over micro-batches and processes, but for what KTO and BCO compare rewards with: KTO's
    reference point is that of each micro-batch over all processes, as in trl, and BCO's shift the
    mean of all rewards so far. With `{"kto": 1.0}` it follows trl's loss.

    Logged are trl's metrics of KTO and those of `RewardPenalizeLoss` that need no pairs.

    Examples:
        >>> import datasets, tokenizers, transformers, trl
        >>> from fastadapt.trl import UnpairedRewardPenalizeTrainer
        >>> words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, "?"))
        >>> tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="?")
        >>> config = transformers.LlamaConfig(
        ...     vocab_size=3, hidden_size=64, intermediate_size=64, num_hidden_layers=1
        ... )
        >>> model = transformers.LlamaForCausalLM(config)
        >>> good = {"prompt": "a", "completion": "b", "label": True}
        >>> bad = {"prompt": "a", "completion": "a", "label": False}
        >>> args = trl.KTOConfig("out", max_steps=1, bf16=False, save_strategy="no")
        >>> rows = datasets.Dataset.from_list([good, bad])
        >>> data = {"train_dataset": rows, "processing_class": tokenizer}
        >>> loss = {"mle": 1.0, "exmate_penalty": 0.5}
        >>> trainer = UnpairedRewardPenalizeTrainer(model, args=args, loss=loss, **data)
        >>> result = trainer.train()
        {'train_runtime': ...}
        >>> result.global_step
        1

    Args:
        model: as for `KTOTrainer`; a model and not its name where LoRA is on the head.
        ref_model: the same; without a loss that looks at a reference none is loaded.
        args (KTOConfig | None): the same; `beta`, `desirable_weight` and `undesirable_weight` go to
            the losses that have them. `loss_type` stays as it is by default.
        loss (Mapping[str, Any]): names and weights, as for `RewardPenalizeLoss`; those of
            `CATALOGUE` that do not need "pairs".
        loss_options (Mapping[str, Any] | None): its options.
        negatives (str | None): as of `RewardPenalizeTrainer`, in the rows labelled True.
        negative_options (Mapping[str, Any] | None): as there.
        tracker (fastadapt.tracking.RewardPenalizeTracker | None): as there; without pairs there is
            no margin and no ρ.
        **rest: the other arguments of `KTOTrainer`, by name.

    Raises:
        ValueError: a loss of pairs, a loss or an option that there is not, an argument that reaches
            no loss.
        RuntimeError: as `fused_log_probs`.
    """

    loss_is_scaled_for_ga = True
    _not_of_the_model = frozenset(
        {"completion_mask", "label", "ref_logps", "ref_KL_logps", *_OTHER_ROWS, *_OTHER_TYPES}
    )
    _tag_names = KTOTrainer._tag_names + ["fastadapt"]  # of the model card
    _name = "UnpairedRewardPenalize"

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: KTOConfig | None = None,
        *,
        loss: Mapping[str, Any],
        loss_options: Mapping[str, Any] | None = None,
        negatives: str | None = None,
        negative_options: Mapping[str, Any] | None = None,
        tracker: Any = None,
        **rest: Any,
    ) -> None:
        check_hook()
        if args is not None:
            instance("args", args, KTOConfig, "a KTOConfig")
        asked = KTOConfig() if args is None else args
        args = copy.copy(asked)  # the caller's stays as it is
        refuse(args, _REPLACED)
        options = options_of(loss, loss_options, args, OF_KTO, KINDS_OF_KTO)
        self._set_objective(loss, options, args, ref_model)
        self._set_candidates(negatives, negative_options)
        paired = [name for name in self.mixture.weights if "pairs" in CATALOGUE[name].needs]
        if paired:
            raise ValueError(
                f"loss: expected losses of single responses, got {', '.join(paired)} of pairs; "
                "RewardPenalizeTrainer takes chosen and rejected responses of the same prompts"
            )
        if not self.mixture.takes("reference_point"):
            args.loss_type = "apo_zero_unpaired"  # trl then makes no rows for it
        for name in ("train_dataset", "eval_dataset"):
            _check_labels(name, rest.get(name))
        with contextlib.ExitStack() as self._until_checked:
            self._until_checked.enter_context(without_adapter_on_its_head(model))
            super().__init__(model, ref_model, args, **rest)
        self._finish(asked, tracker)

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """Computes the reference by our operator, if a loss looks at it."""
        if not self._uses_reference:
            return dataset
        return super()._precompute_ref_logps(dataset, name, batch_size)

    def compute_ref_log_probs(
        self, model: Any, inputs: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """Returns log P under the reference of the rows and of those of other prompts."""
        with self._as_reference():
            own = self._row_logps(model, inputs)
            if not self.mixture.takes("reference_point"):
                return own, None
            return own, self._row_logps(model, _of_other_prompts(inputs))

    def _counts(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Returns (4,): tokens and responses labelled True, those labelled False."""
        label = inputs["label"]
        if label.dtype != torch.bool and not bool(((label == 0) | (label == 1)).all()):
            raise ValueError(f"label: expected True or False, got {label.tolist()}")
        lengths = inputs["completion_mask"][:, 1:].sum(-1)
        sides = self._on_sides(inputs, lengths)
        return torch.stack([n for side in sides for n in (side.sum(), (side > 0).sum())])

    def _on_sides(self, inputs: Mapping[str, Any], x: Tensor) -> tuple[Tensor, ...]:
        """Returns the values of the rows labelled True and of the others."""
        label = inputs["label"].bool()
        return x[label], x[~label]

    def _sides(
        self, inputs: Mapping[str, Any], scored: Scored, counts: Tensor | None
    ) -> tuple[Responses, Responses | None]:
        """Returns the responses labelled True and the others, with the step's divisors."""
        mask = inputs["completion_mask"][:, 1:].bool()
        totals: tuple[Any, ...] = (None,) * 4 if counts is None else counts.unbind()
        good, bad = self._on_sides(inputs, scored.log_odds)
        of_good, of_bad = self._on_sides(inputs, mask)
        return (
            Responses(good, of_good, total_tokens=totals[0], total_sequences=totals[1]),
            Responses(bad, of_bad, total_tokens=totals[2], total_sequences=totals[3]),
        )

    def _reference(self, inputs: dict[str, Any]) -> tuple[Tensor | None, Tensor | None]:
        """Returns log P of both sides under the reference, if a loss looks at it."""
        if not self._uses_reference:
            return None, None
        if self.precompute_ref_logps:
            logps = inputs["ref_logps"]
        else:
            with self._as_reference() as reference:
                logps = self._row_logps(reference, inputs)
        good, bad = self._on_sides(inputs, logps)
        return good, bad

    def _more(
        self,
        model: Any,
        inputs: dict[str, Any],
        scored: Scored,
        sides: tuple[Responses, Responses | None],
        counts: Tensor | None,
    ) -> dict[str, Any]:
        """Returns KTO's reference point: the mean log-ratio of trl's rows of other prompts."""
        if not self.mixture.takes("reference_point"):
            return {}
        moved = _of_other_prompts(inputs)
        own = self._row_logps(model, moved)
        if self.precompute_ref_logps:
            ratios = own - inputs["ref_KL_logps"]
        else:
            with self._as_reference() as reference:
                ratios = own - self._row_logps(reference, moved)
        others = ~_same_rows(inputs)  # a batch of one, or the last of an epoch, has its own again
        total, count = self._over_ranks(ratios[others].sum(), others.sum())
        return {"reference_point": (total / count.clamp(min=1)).clamp(min=0)}

    def _note(
        self, inputs: Mapping[str, Any], scored: Scored, metrics: Mapping[str, Tensor]
    ) -> None:
        """Leaves out what compares the i-th response of one side with that of the other."""
        of_pairs = {"rewards/margins", "rewards/accuracies"}
        own = {k: v for k, v in metrics.items() if k not in of_pairs and k[:6] != "pairs/"}
        seen = self._metrics["train" if self.model.training else "eval"]
        names = ("rewards/chosen", "rewards/rejected")
        before = [len(seen.get(name, ())) for name in names]
        super()._note(inputs, scored, own)
        if all(len(seen.get(name, ())) > n for name, n in zip(names, before, strict=True)):
            seen["rewards/margins"].append(seen[names[0]][-1] - seen[names[1]][-1])


def _of_other_prompts(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the batch with trl's rows of other prompts in place of its own."""
    own = {k: v for k, v in inputs.items() if not k.startswith("KL_")}
    return own | {k.removeprefix("KL_"): v for k, v in inputs.items() if k.startswith("KL_")}


def _same_rows(inputs: Mapping[str, Any]) -> Tensor:
    """Which of trl's rows of other prompts are the batch's own rows, (R,) bool."""
    own, other = (
        (inputs[f"{k}input_ids"], inputs[f"{k}attention_mask"].bool()) for k in ("", "KL_")
    )
    width = min(own[0].shape[1], other[0].shape[1])
    alike = (own[0][:, :width] == other[0][:, :width]) | ~own[1][:, :width]
    same: Tensor = alike.all(-1) & (own[1].sum(-1) == other[1].sum(-1))
    return same


def _check_labels(name: str, dataset: Any) -> None:
    """Raises if rows of a data set have labels that are neither True nor False."""
    sets = dataset.items() if isinstance(dataset, Mapping) else [(name, dataset)]
    for each, rows in sets:
        columns = getattr(rows, "column_names", None) or ()
        if "label" not in columns or not hasattr(rows, "unique"):
            continue  # pairs, or a stream, whose batches are looked at
        wrong = [x for x in rows.unique("label") if x not in (0, 1)]
        if wrong:
            raise ValueError(f"{each}: expected labels of True or False, got {wrong[:5]}")
