"""Hooks for trl: a trainer for any mixture of losses, and faster scoring in its own trainers.

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

from fastadapt._ops.checks import instance
from fastadapt.losses import Responses, RewardPenalizeLoss
from fastadapt.training.compiled import head_outside_graphs
from fastadapt.training.head import causal_of
from fastadapt.training.lora import has_adapter
from fastadapt.trl._log_probs import LogOdds, LogProbs
from fastadapt.trl._served import check_hook, served

_UNSUPPORTED = {
    "loss_type": "loss=",
    "loss_weights": "loss=",
    "f_divergence_type": "the reverse KL divergence",
    "ld_alpha": "whole responses",
    "use_weighting": "equal weights",
}
_NOT_OF_THE_MODEL = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps")
# Of text: one row a response, the chosen ones first.
_ROWS = frozenset({"input_ids", "attention_mask", "completion_mask", "token_type_ids"})


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


class RewardPenalizeTrainer(DPOTrainer):
    """trl's `DPOTrainer` with any mixture of this package's losses.

    Data, reference (precomputed, the adapter switched off, or a model), PEFT, evaluation,
    checkpoints and resuming are trl's. LoRA may be on the head too, where trl refuses it. A step's
    loss is that of all pairs it takes, however they are split over micro-batches and, with
    `average_tokens_across_devices`, processes: token means divide by all the tokens and sequence
    means by all the pairs of the step. With `{"dpo": 1.0}` it follows trl's loss. Steps of a
    mixture of the chosen responses alone (`{"mle": 1.0}`) leave the rejected ones out, and so do
    their metrics; evaluation looks at both. With `torch_compile=True` the bodies of model and
    reference are compiled, and their heads run outside of the graphs.

    Logged are trl's metrics of DPO and, of `RewardPenalizeLoss`, "loss/NAME", "pairs/margins",
    "pairs/accuracies", "gradients/chosen" and "gradients/rejected"; "rewards/..." only with "dpo".

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
        ref_model: the same; without "dpo" in the mixture none is loaded.
        args (DPOConfig | None): the same; `beta` and `label_smoothing` go to "dpo". What says
            another loss (`loss_type`, `loss_weights`, `f_divergence_type`, `ld_alpha`,
            `use_weighting`) stays as it is by default.
        loss (Mapping[str, float]): names and weights, as for `RewardPenalizeLoss`.
        loss_options (Mapping[str, Any] | None): its options: `coefficient`, `norm`, `level`,
            `loss_type`, ...
        **rest: the other arguments of `DPOTrainer`, by name.

    Raises:
        ValueError: a loss or an option that there is not, or one in `args` that is not supported;
            the norm "batch_token_mean", which no sum over micro-batches gives, with several of
            them.
        RuntimeError: as `fused_log_probs`.
    """

    loss_is_scaled_for_ga = True
    objective: RewardPenalizeLoss
    _splits: bool
    _tag_names = DPOTrainer._tag_names + ["fastadapt"]  # of the model card
    _name = "RewardPenalize"

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: DPOConfig | None = None,
        *,
        loss: Mapping[str, float],
        loss_options: Mapping[str, Any] | None = None,
        **rest: Any,
    ) -> None:
        check_hook()
        if args is not None:
            instance("args", args, DPOConfig, "a DPOConfig")
        args = DPOConfig() if args is None else copy.copy(args)  # the caller's stays as it is
        _check_config(args)
        options = dict(loss_options or {})
        if isinstance(loss, Mapping) and "dpo" in loss:
            options = {"beta": args.beta, "label_smoothing": args.label_smoothing} | options
            if options["beta"] != args.beta:
                raise ValueError(f"loss_options: expected args.beta for beta, got {options}")
        elif ref_model is None:
            args.precompute_ref_log_probs = True  # trl then loads no reference
        self.objective = RewardPenalizeLoss(loss, **options)
        if self.objective.needs("candidates"):
            raise ValueError(f"loss: expected losses of labels, got {list(self.objective.weights)}")
        self._splits = options.get("norm") != "batch_token_mean"
        with contextlib.ExitStack() as self._until_checked:
            self._until_checked.enter_context(_without_adapter_on_its_head(model))
            super().__init__(model, ref_model, args, **rest)
        parts = self.args.gradient_accumulation_steps * self.accelerator.num_processes
        if not self._splits and parts > 1:
            raise ValueError(
                f"norm: expected one that splits over {parts} micro-batches, got batch_token_mean"
            )

    def create_accelerator_and_postprocess(self) -> None:
        """Also shows again what was hidden from trl, which has looked by now and scores next."""
        self._until_checked.close()
        super().create_accelerator_and_postprocess()

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """Computes the reference by our operator, equal to the policy's first step to the bit."""
        if "dpo" not in self.objective.weights:
            return dataset
        with served(LogProbs):
            return super()._precompute_ref_logps(dataset, name, batch_size)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Also counts the divisors of a step, (3,): chosen and rejected tokens, and pairs."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        counts = torch.stack([_counts(batch["completion_mask"]) for batch in batches]).sum(0)
        counts = counts.to(device)
        if self.args.average_tokens_across_devices and self.accelerator.num_processes > 1:
            counts = self.accelerator.gather(counts[None]).sum(0) // self._tp_size
        return batches, counts

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Returns the loss of a batch, or its share of the step's loss."""
        sides = 1 if model.training and self._needs_chosen_alone(inputs) else 2
        if sides == 1:
            inputs = {k: v.chunk(2)[0] if k in _ROWS else v for k, v in inputs.items()}
        keep = {k: v for k, v in inputs.items() if k not in _NOT_OF_THE_MODEL}
        keep["use_cache"] = False
        extra = {"output_router_logits": True} if self.aux_loss_enabled else {}
        mask = inputs["completion_mask"][:, 1:].bool()
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        with served(LogOdds), head_outside_graphs(model):
            outputs = model(**keep, **extra, labels=labels, fused_lm_head=True)
        # prompt-learning adapters put their own positions before those of the tokens
        log_odds = outputs.log_probs[:, -mask.shape[1] :]
        chosen, rejected = self._sides(log_odds, mask, num_items_in_batch, sides)
        loss, metrics = self.objective(chosen, rejected, *self._reference(inputs))
        parts = self._parts(num_items_in_batch)
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss / parts
        counted = _counted(outputs, mask, sides)
        self._note(inputs, counted, {**metrics, **_scaled(metrics, parts)})
        if self._averages(num_items_in_batch):
            loss = loss * (self.accelerator.num_processes // self._tp_size)
        if not return_outputs:
            return loss
        with torch.no_grad():
            return loss, model(**keep)

    def _needs_chosen_alone(self, inputs: Mapping[str, Any]) -> bool:
        """Whether the loss needs only the chosen responses and the batch is text."""
        known = _ROWS.union(_NOT_OF_THE_MODEL)
        return not self.objective.needs("rejected") and inputs.keys() <= known

    def _sides(
        self, log_odds: Tensor, mask: Tensor, counts: Tensor | int | None, sides: int
    ) -> tuple[Responses, Responses | None]:
        """Returns the chosen and, if present, the rejected responses, with the step's divisors."""
        divisors: list[dict[str, Any]] = [{}, {}]
        if isinstance(counts, Tensor) and self._splits:
            chosen, rejected, pairs = counts.unbind()
            divisors = [{"total_tokens": n, "total_sequences": pairs} for n in (chosen, rejected)]
        parts = zip(log_odds.chunk(sides), mask.chunk(sides), divisors[:sides], strict=True)
        first, *rest = (Responses(m, kept, **totals) for m, kept, totals in parts)
        return first, rest[0] if rest else None

    def _reference(self, inputs: dict[str, Any]) -> tuple[Tensor | None, Tensor | None]:
        """Returns log P of both sides under the reference, (B,) each, if a loss needs it."""
        if "dpo" not in self.objective.weights:
            return None, None
        if self.precompute_ref_logps:
            return inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        reference_of: Any = self.compute_ref_log_probs  # trl has no types
        reference = self.model if self.ref_model is None else self.ref_model
        with served(LogProbs), head_outside_graphs(reference):
            chosen, rejected = reference_of(reference, inputs)
        return chosen, rejected

    def _averages(self, counts: Tensor | int | None) -> bool:
        """Whether the step's loss is a mean over all processes' tokens."""
        return counts is not None and bool(self.args.average_tokens_across_devices)

    def _parts(self, counts: Tensor | int | None) -> int:
        """Returns how many micro-batches of this process share a step's loss."""
        return 1 if counts is None else int(self.current_gradient_accumulation_steps)

    def _note(
        self,
        inputs: dict[str, Any],
        counted: dict[str, tuple[Tensor, Tensor | None]],
        metrics: Mapping[str, Tensor],
    ) -> None:
        """Stores the metrics of a batch for the log, over all processes, in one transfer."""
        model: Any = self.model
        mode = "train" if model.training else "eval"
        with torch.no_grad():
            named = {**counted, "tokens": (inputs["attention_mask"].sum().float(), None)}
            ours = {_TRL_NAMES.get(k, k): (v.float(), None) for k, v in metrics.items()}
            named |= ours
            names, values = list(named), [v for v, _ in named.values()]
            weights = [torch.ones_like(v) if w is None else w for v, w in named.values()]
            table = torch.stack([torch.stack(values), torch.stack(weights)]).float()
            if self._averages_metrics:
                table = self.accelerator.gather(table[None])
            sums = table.view(-1, 2, len(names)).sum(0).tolist()
        seen = {k: v / w if w else 0.0 for k, v, w in zip(names, *sums, strict=True)}
        tokens = seen.pop("tokens") * sums[1][names.index("tokens")]
        if mode == "train":
            self._total_train_tokens += round(tokens) // self._tp_size
        for name, value in seen.items():
            self._metrics[mode][name].append(value)
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]

    @property
    def _averages_metrics(self) -> bool:
        """Whether there are other processes."""
        return bool(self.accelerator.num_processes > 1)


_TRL_NAMES = {"logps/chosen": "logps/chosen", "logps/rejected": "logps/rejected"}


def _counts(completion_mask: Tensor) -> Tensor:
    """Returns (3,): the chosen tokens, the rejected tokens and the pairs of a batch."""
    chosen, rejected = completion_mask[:, 1:].bool().chunk(2)
    pairs = (chosen.any(-1) | rejected.any(-1)).sum()
    return torch.stack([chosen.sum(), rejected.sum(), pairs])


def _scaled(metrics: Mapping[str, Tensor], parts: int) -> dict[str, Tensor]:
    """Scales the shares of a step's loss by their number, so that their mean is the loss."""
    return {k: v * parts for k, v in metrics.items() if k.startswith("loss/")}


@torch.no_grad()
def _counted(outputs: Any, mask: Tensor, sides: int) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Returns what trl's DPO logs of tokens: sums, and the tokens they are over."""
    t = mask.shape[1]
    parts = mask.chunk(sides)
    means = (outputs.mean_logits[:, -t:] * mask).chunk(sides)
    hits = outputs.is_top1[:, -t:].chunk(sides)[0] & parts[0]
    logits = zip(("logits/chosen", "logits/rejected"), means, parts, strict=False)
    return {
        "entropy": ((outputs.entropy[:, -t:] * mask).sum(), mask.sum()),
        **{name: (mean.sum(), part.sum()) for name, mean, part in logits},
        "mean_token_accuracy": (hits.sum(), parts[0].sum()),
    }


@contextlib.contextmanager
def _without_adapter_on_its_head(model: Any) -> Iterator[None]:
    """Makes a model name the layer below an adapter as its head, within the block.

    trl's trainers look for an adapter there when they are made and refuse it: their own scoring
    would leave it out.
    """
    causal: Any = causal_of(model) if isinstance(model, torch.nn.Module) else None
    if not hasattr(causal, "get_output_embeddings"):
        yield
        return
    own = causal.get_output_embeddings

    def below() -> Any:
        layer = own()
        return layer.base_layer if has_adapter(layer) else layer

    object.__setattr__(causal, "get_output_embeddings", below)
    try:
        yield
    finally:
        object.__delattr__(causal, "get_output_embeddings")


def _check_config(args: DPOConfig) -> None:
    """Raises if the arguments ask for another loss than the mixture."""
    for name, instead in _UNSUPPORTED.items():
        default = DPOConfig.__dataclass_fields__[name]
        usual = default.default_factory() if callable(default.default_factory) else default.default
        value = getattr(args, name)
        if value != usual:
            raise ValueError(f"args.{name}: expected {usual!r} ({instead} here), got {value!r}")
