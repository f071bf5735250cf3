"""transformers' `Trainer` without logits: the loss is computed inside the model's forward."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Trainer
from transformers.utils.generic import find_labels

from fastadapt._ops.checks import instance, per_row
from fastadapt._ops.common import check_ids
from fastadapt.log_odds import label_log_odds
from fastadapt.losses import Responses, mle_loss
from fastadapt.training.compiled import head_outside_graphs
from fastadapt.training.head import causal_of, evaluating, layer_of, one_row
from fastadapt.training.head_shape import HALF_TOLERANCE, configurations
from fastadapt.training.log_odds import forward_log_odds
from fastadapt.training.pairs import IGNORED

_TOKENS = 32  # of a text, to compare losses on
_TOLERANCE = 2e-5  # of the model's own loss, which is made of the same logits
_TEXTS = {"input_ids", "attention_mask", "position_ids", "token_type_ids", "labels"}


class LogitsFreeTrainer(Trainer):
    """A `Trainer` for language models that never makes their logits.

    Its loss is that of the model's own forward, the cross-entropy of the next tokens (of an
    encoder–decoder or a masked model: of the labels as they stand), with `num_items_in_batch` and
    `average_tokens_across_devices` as transformers has them; the head's rows of ignored labels are
    not computed. A frozen head (LoRA) takes two products a step, one with LoRA on it three. With
    `torch_compile=True` the body is compiled, and the head runs outside of its graphs. Before the
    first step the model's own loss of one short text is compared with ours, so that nothing is left
    out without a word. Predictions, as `compute_metrics` sees them, are log-odds (B, T-1), (B, T)
    of labels that are aligned, instead of logits.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments
        >>> from fastadapt.hf import LogitsFreeTrainer
        >>> sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
        >>> tokens = torch.arange(8)
        >>> args = TrainingArguments("out", max_steps=2, save_strategy="no")
        >>> trainer = LogitsFreeTrainer(
        ...     model, args, train_dataset=[{"input_ids": tokens, "labels": tokens}] * 4
        ... )
        >>> result = trainer.train()
        {'train_runtime': ...}
        >>> result.global_step
        2

    Args:
        objective: makes the loss of `Responses`, padded, whose `total_tokens` is
            `num_items_in_batch`; by default `mle_loss`.
        *rest: as for `Trainer`.
        **named: as for `Trainer`; batches have "labels", not shifted, as usual.

    Raises:
        ValueError: what needs logits: `compute_loss_func`, `label_smoothing_factor`;
            router logits, whose loss would be left out; at the first batch, a model whose
            own loss is another one, or as `fastadapt.training.forward_log_odds`; a batch without
            labels.
    """

    objective: Callable[[Responses], Tensor]
    _shifts: bool | None = None  # whether the model scores the next label; None: not asked yet
    _divides = True  # whether its loss is divided by num_items_in_batch where that is given

    def __init__(
        self, *rest: Any, objective: Callable[[Responses], Tensor] = mle_loss, **named: Any
    ) -> None:
        model = rest[0] if rest else named.get("model")
        if model is not None:  # a model_init has it then
            causal_of(model)
        super().__init__(*rest, **named)
        if self.args.label_names is None:  # a compiled model has no signature to find them in
            self.label_names = find_labels(type(causal_of(self.model)))
        if not callable(objective) or isinstance(objective, type):
            raise TypeError(f"objective: expected a function of Responses, got {objective!r}")
        self.objective = objective
        if self.compute_loss_func is not None or self.args.label_smoothing_factor:
            raise ValueError(
                "expected neither compute_loss_func nor label_smoothing_factor, which need logits; "
                "objective= has a loss of log-odds, and fastadapt.linear_mle_loss smooths labels"
            )
        parts = configurations(getattr(self.model, "config", None))
        if any(getattr(part, "output_router_logits", False) for part in parts):
            raise ValueError("model.config: expected output_router_logits=False, got True")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Returns the loss of a batch, or its share of the step's loss."""
        if inputs.get("labels") is None:
            raise ValueError(f"inputs: expected labels among them, got {sorted(inputs)}")
        if self._shifts is None:
            self._shifts = self._ask_loss(model, inputs, num_items_in_batch is not None)
        log_odds, mask = self._log_odds(model, inputs, shift=self._shifts)
        items = num_items_in_batch if self._divides else None
        loss = self.objective(Responses(log_odds, mask, total_tokens=items))
        instance("objective", loss, Tensor, "a function that returns a Tensor")
        loss = loss * self._share(num_items_in_batch)
        return (loss, {"loss": loss, "log_odds": log_odds}) if return_outputs else loss

    def _set_signature_columns_if_needed(self) -> None:
        """Reads which columns the model takes; a compiled one's wrapper does not say."""
        given = self.model
        self.model = getattr(given, "_orig_mod", given)
        try:
            super()._set_signature_columns_if_needed()
        finally:
            self.model = given

    def _share(self, items: Tensor | int | None) -> int:
        """Returns the factor by which a process scales its loss, so that their mean is the sum."""
        if not self.args.average_tokens_across_devices or items is None:
            return 1
        return int(self.accelerator.num_processes // self.get_tp_size())

    def _log_odds(
        self, model: nn.Module, inputs: dict[str, Any], *, shift: bool
    ) -> tuple[Tensor, Tensor]:
        """Returns the log-odds of a batch, and which of them count."""
        rest = dict(inputs)
        given = rest.pop("labels")
        labels = _labels_of_positions(given, shift=shift)
        log_odds = forward_log_odds(model, _with_decoder(model, rest, given), labels)
        return _without_last(log_odds, labels != IGNORED, shift=shift)

    @torch.no_grad()
    def _ask_loss(self, model: nn.Module, inputs: dict[str, Any], counted: bool) -> bool:
        """Whether the model's own loss shifts the labels; all processes ask together.

        Raises:
            ValueError: it is neither that of the next labels nor that of the labels as they stand.
        """
        few = _few(inputs)
        given = few["labels"]
        ids = getattr(layer_of(causal_of(model)), "out_features", None)
        if ids is not None and given.device.type == "cpu":  # else the model's loss ends in torch's
            flat = per_row("labels", given, torch.int64, given.shape, given)
            check_ids("labels", flat, ids, IGNORED)
        items = given.ne(IGNORED).sum() * 3 if counted else None
        with evaluating(model), head_outside_graphs(model, others=False):
            loss, output = super().compute_loss(model, dict(few), True, items)
            own, logits = float(loss) / self._share(items), output.get("logits")
            if not isinstance(logits, Tensor) or logits.shape[:-1] != given.shape:
                raise ValueError("model: expected one that returns logits, one row a label")
            seen = dict[tuple[bool, bool], float]()
            for shift, divides in itertools.product((True, False), repeat=2):
                labels = _labels_of_positions(given, shift=shift)
                log_odds = label_log_odds(logits.float(), labels, ignore_index=IGNORED)
                rows = _without_last(log_odds, labels != IGNORED, shift=shift)
                over = items if divides else None
                seen[shift, divides] = float(mle_loss(Responses(*rows, total_tokens=over)))
            fits = [s for s, x in seen.items() if abs(x - own) <= _TOLERANCE * abs(own)]
            name = type(causal_of(model)).__name__
            if not fits:
                raise ValueError(
                    "model: expected a loss that is the cross-entropy of the next labels, "
                    f"{seen[True, True]:.6g}, or of the labels as they stand, "
                    f"{seen[False, True]:.6g}, "
                    f"got {own:.6g} of {name}; transformers' Trainer has its further terms"
                )
            shift, self._divides = fits[0]
            rows = self._log_odds(model, few, shift=shift)
            over = items if self._divides else None
            ours = float(mle_loss(Responses(*rows, total_tokens=over)))
            if abs(ours - own) > HALF_TOLERANCE * abs(own):
                raise ValueError(
                    f"model: expected the loss of its own forward, {own:.6g}, got {ours:.6g} of "
                    f"{name}; with decoder_input_ids in the batch both forwards read the same"
                )
        return shift


def _labels_of_positions(labels: Tensor, *, shift: bool) -> Tensor:
    """Returns the label that each position is to score, (B, T)."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED) if shift else labels


def _without_last(log_odds: Tensor, mask: Tensor, *, shift: bool) -> tuple[Tensor, Tensor]:
    """Drops the last position if labels are shifted: it has no next label."""
    return (log_odds[:, :-1], mask[:, :-1]) if shift else (log_odds, mask)


def _few(inputs: dict[str, Any]) -> dict[str, Any]:
    """Returns the first row (plain text: its beginning) with at least one label that counts."""
    few = one_row(inputs)
    plain = few.keys() <= _TEXTS and all(x.dim() == 2 for x in few.values())
    if plain:
        few = {name: x[:, :_TOKENS] for name, x in few.items()}
    labels = few["labels"].clone()
    labels[:, 1:] = torch.where(labels[:, 1:] == IGNORED, 0, labels[:, 1:])
    return {**few, "labels": labels}


def _with_decoder(model: Any, inputs: dict[str, Any], labels: Tensor) -> dict[str, Any]:
    """Adds the decoder inputs that an encoder–decoder would derive from its labels."""
    causal = causal_of(model)
    given = {"decoder_input_ids", "decoder_inputs_embeds"} & inputs.keys()
    if not getattr(causal.config, "is_encoder_decoder", False) or given:
        return inputs
    if not hasattr(causal, "prepare_decoder_input_ids_from_labels"):
        name = type(causal).__name__
        raise ValueError(f"inputs: expected decoder_input_ids for {name}, got {sorted(inputs)}")
    decoder = causal.prepare_decoder_input_ids_from_labels(labels=labels)
    return {**inputs, "decoder_input_ids": decoder}
