"""What training on preference pairs needs between a causal language model and the losses.

The model is any of transformers' kind: a body that returns hidden states, a linear head. The
margins come from `linear_label_margins`, so the logits (2B, T, V) are not made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastadapt.losses import Responses, RewardPenalizeLoss, sequence_logps
from fastadapt.margins import label_margins, linear_label_margins
from fastadapt.preferences import IGNORED, PairBatch

MarginsOf = Callable[[Any, PairBatch], Tensor]
Reference = tuple[Tensor, Tensor]


class Head(NamedTuple):
    """A linear head and what its model does to the logits.

    Attributes:
        weight: (V, H).
        bias: (V,) or None.
        softcap: as in `linear_label_margins`.
        logit_scale: as in `linear_label_margins`.
    """

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float


def head_of(model: Any) -> Head:
    """Returns the head of a causal language model.

    Args:
        model: with `get_output_embeddings()`; its `config` may name `final_logit_softcapping`
            (Gemma), `logit_scale` (Cohere: a factor) or `logits_scaling` (Granite: a divisor).
            Whatever else a model does to its logits is not seen; `logits_margins` has it.

    Raises:
        ValueError: the model has no linear head.
    """
    layer = model.get_output_embeddings()
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise ValueError(f"model: expected one with a linear head, got {type(layer).__name__}")
    config = model.config
    factor = getattr(config, "logit_scale", None)
    divisor = getattr(config, "logits_scaling", None)
    scale = (1.0 if factor is None else float(factor)) / (1.0 if divisor is None else divisor)
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(weight, getattr(layer, "bias", None), softcap, scale)


def hidden_states(model: Any, batch: PairBatch) -> Tensor:
    """Returns what the head would read: (2B, T-1, H), position t before token t+1.

    Raises:
        ValueError: the model's body, `model.base_model`, returns no hidden states.
    """
    output = model.base_model(
        input_ids=batch.tokens, attention_mask=batch.attention_mask, use_cache=False
    )
    states = getattr(output, "last_hidden_state", None)
    if not isinstance(states, Tensor):
        name = type(model).__name__
        raise ValueError(f"model: expected one whose body returns hidden states, got {name}")
    return states[:, :-1]


def response_margins(model: Any, batch: PairBatch) -> Tensor:
    """Returns the margins of the response tokens, differentiably and without logits.

    Args:
        model: a causal language model of transformers.
        batch: B pairs.

    Returns:
        Tensor: (2B, T-1), float32, nats; 0 where `batch.labels` is ignored.
    """
    head = head_of(model)
    return linear_label_margins(
        hidden_states(model, batch),
        head.weight,
        batch.labels,
        head.bias,
        softcap=head.softcap,
        logit_scale=head.logit_scale,
        ignore_index=IGNORED,
    )


def logits_margins(model: Any, batch: PairBatch) -> Tensor:
    """Returns the same as `response_margins` from the logits (2B, T, V) of the whole model.

    For comparison, and for models whose head is more than a matrix. It makes the logits and their
    gradient, no further copy of them.
    """
    logits = model(
        input_ids=batch.tokens, attention_mask=batch.attention_mask, use_cache=False
    ).logits
    # ignoring the last position costs nothing; cutting it off would copy the rest
    labels = F.pad(batch.labels, (0, 1), value=IGNORED)
    return label_margins(logits, labels, ignore_index=IGNORED)[:, :-1]


def sides(batch: PairBatch, margins: Tensor) -> tuple[Responses, Responses]:
    """Returns the good and the bad responses of margins (2B, T-1)."""
    good, bad = margins.chunk(2)
    good_mask, bad_mask = batch.mask.chunk(2)
    return Responses(good, good_mask), Responses(bad, bad_mask)


@torch.no_grad()
def reference_logps(
    model: Any, batch: PairBatch, *, margins_of: MarginsOf = response_margins
) -> Reference:
    """Returns log P of the good and of the bad responses, (B,) each, to be held constant.

    The reference of DPO is the model before its first step, so this is called before that.
    """
    good, bad = sides(batch, margins_of(model, batch))
    return sequence_logps(good), sequence_logps(bad)


def pair_loss(
    model: Any,
    batch: PairBatch,
    objective: RewardPenalizeLoss,
    reference: Reference | None = None,
    *,
    margins_of: MarginsOf = response_margins,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the loss of a batch with its metrics, as `RewardPenalizeLoss` does.

    Args:
        model: a causal language model of transformers.
        batch: B pairs.
        objective: the loss.
        reference: what `reference_logps` returned; None: reference-free.
        margins_of: makes the margins (2B, T-1) of a batch.
    """
    good, bad = sides(batch, margins_of(model, batch))
    result: tuple[Tensor, dict[str, Tensor]] = objective(good, bad, *(reference or (None, None)))
    return result


def training_steps(
    model: Any,
    batches: Iterable[tuple[PairBatch, Reference | None]],
    objective: RewardPenalizeLoss,
    optimizer: torch.optim.Optimizer,
    *,
    margins_of: MarginsOf = response_margins,
) -> Iterator[dict[str, Tensor]]:
    """Takes one step per batch and yields what it saw: "loss" and the metrics, detached.

    Args:
        model: a causal language model of transformers, in the mode it shall train in.
        batches: each with its reference.
        objective: the loss.
        optimizer: of the model's parameters.
        margins_of: as in `pair_loss`.
    """
    for batch, reference in batches:
        optimizer.zero_grad()
        loss, metrics = pair_loss(model, batch, objective, reference, margins_of=margins_of)
        loss.backward()
        optimizer.step()
        yield {"loss": loss.detach(), **metrics}
