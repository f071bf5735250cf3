"""What training on preference pairs needs between a causal language model and the losses.

The model is any of transformers' kind: a body that returns hidden states, a linear head. The
margins come from `linear_label_margins`, so the logits (2B, T, V) are not made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

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
        ValueError: the model has no linear head, or one with an adapter of its own, which a product
            with its matrix alone would leave out.
    """
    layer = model.get_output_embeddings()
    weight = getattr(layer, "weight", None)
    if hasattr(layer, "base_layer") or hasattr(layer, "original_module"):
        raise ValueError(f"model: expected a head without an adapter, got {type(layer).__name__}")
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
    return head_margins(head_of(model), hidden_states(model, batch), batch.labels)


def forward_margins(model: Any, inputs: Mapping[str, Any], labels: Tensor) -> Tensor:
    """Returns margins out of the model's own forward, whatever wraps it, without its logits.

    Wrappers of distributed training gather parameters and wait for gradients around that forward;
    the head's product has to be inside of it. Hooks do that: the head scores what reaches it and
    makes no logits, and the model returns the margins. They are gone after the call.

    Args:
        model: a causal language model of transformers whose head is a module that its forward
            calls; as it is, or within DDP, FSDP2 (`fully_shard`) or peft. A head split over ranks
            by vocabulary, a `DTensor` placed as (Shard(0),), is met in its parts.
        inputs: keyword arguments of its forward, no labels among them.
        labels (Tensor): (B, T), int64, at each position the token to score there (the next one), or
            `IGNORED`.

    Returns:
        Tensor: (B, T), float32, nats; 0 where `labels` is ignored.

    Raises:
        ValueError: as `head_of`; positions that are not those of `labels`.
        RuntimeError: the model's forward does not call its head.
    """
    inner = getattr(model, "module", model)
    causal = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    margins: list[Tensor] = []

    def score(_: Any, arguments: tuple[Any, ...]) -> tuple[Tensor]:
        states = arguments[0]
        if states.shape[:-1] != labels.shape:
            got = f"{tuple(states.shape[:-1])} states"
            raise ValueError(f"labels: expected one for each position, got {got}")
        head = head_of(causal)
        margins.append(head_margins(head, states, labels))
        return (_least(states, head.weight),)

    def answer(*_: Any) -> dict[str, Tensor]:
        if not margins:
            name = type(causal).__name__
            raise RuntimeError(f"model: expected a forward that calls its head, got {name}")
        return {"margins": margins.pop()}

    hooks = (
        causal.get_output_embeddings().register_forward_pre_hook(score),
        # before the hooks of wrappers, which look at what the forward returned
        causal.register_forward_hook(answer, prepend=True),
    )
    try:
        result: Tensor = model(**inputs, use_cache=False)["margins"]
    finally:
        for hook in hooks:
            hook.remove()
    return result


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


def head_margins(head: Head, states: Tensor, labels: Tensor) -> Tensor:
    """Returns the margins of labels under a head.

    Args:
        head (Head): from `head_of`.
        states (Tensor): (..., H), what the head reads.
        labels (Tensor): `states.shape[:-1]`, int64; `IGNORED` gives 0.

    Returns:
        Tensor: as `linear_label_margins`.
    """
    return linear_label_margins(
        states,
        head.weight,
        labels,
        head.bias,
        softcap=head.softcap,
        logit_scale=head.logit_scale,
        ignore_index=IGNORED,
    )


def _least(states: Tensor, weight: Tensor) -> Tensor:
    """The fewest states that a head of that weight can take."""
    if not isinstance(weight, DTensor):
        return states[:, :0].detach()
    # a split one takes neither plain tensors beside it nor none at all
    mesh = weight.device_mesh
    return DTensor.from_local(states[:1, :1].detach(), mesh, [Replicate()] * mesh.ndim)
