"""Losses of preference pairs under a causal language model, and training steps on them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastadapt._ops.checks import instance
from fastadapt.losses.mixture import RewardPenalizeLoss
from fastadapt.losses.responses import Responses
from fastadapt.losses.rows import sequence_logps
from fastadapt.training.log_odds import LogOddsOf, response_log_odds
from fastadapt.training.pairs import IGNORED, PairBatch

_WITH_REFERENCE = "tuples of a PairBatch and its reference or None"
Reference = tuple[Tensor, Tensor]
"""log P of the chosen and of the rejected responses under a reference model, (B,) each.

Examples:
    >>> from fastadapt import training
    >>> reference: training.Reference = (torch.tensor([-1.0]), torch.tensor([-2.0]))
    >>> labels = torch.tensor([[5, 7]])
    >>> chosen = Responses.from_labels(torch.zeros(1, 2), labels)
    >>> rejected = Responses.from_labels(torch.zeros(1, 2), labels)
    >>> dpo_loss(chosen, rejected, *reference)
    tensor(0.7444)
"""


def sides(batch: PairBatch, log_odds: Tensor) -> tuple[Responses, Responses]:
    """Splits log-odds (2B, T-1) into the chosen and the rejected responses.

    Examples:
        >>> from fastadapt import training
        >>> from fastadapt.training.pairs import TokenizedPair, pad_pairs
        >>> batch = pad_pairs([TokenizedPair([1, 2], [3, 4, 5], [6], False)])
        >>> chosen, rejected = training.sides(batch, torch.zeros(2, 4))
        >>> chosen.mask, rejected.mask
        (tensor([[False,  True,  True,  True]]), tensor([[False,  True, False, False]]))
    """
    _check_batch("batch", batch, "a PairBatch")
    instance("log_odds", log_odds, Tensor, "a Tensor")
    parts = zip(log_odds.chunk(2), batch.labels.chunk(2), strict=True)
    chosen, rejected = (Responses.from_labels(m, y, ignore_index=IGNORED) for m, y in parts)
    return chosen, rejected


def _check_batch(name: str, batch: object, expected: str) -> None:
    """Raises unless a batch has labels; one for another `log_odds_of` may be no `PairBatch`."""
    if not isinstance(getattr(batch, "labels", None), Tensor):
        raise TypeError(f"{name}: expected {expected}, got {type(batch).__name__}")


@torch.no_grad()
def reference_logps(
    model: Any, batch: PairBatch, *, log_odds_of: LogOddsOf = response_log_odds
) -> Reference:
    """Returns log P of the chosen and of the rejected responses, (B,) each, as constants.

    The reference of DPO is the model before its first step, so this is called before that.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from fastadapt import training
        >>> from fastadapt.training.pairs import TokenizedPair, pad_pairs
        >>> sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
        >>> batch = pad_pairs([TokenizedPair([1, 2], [3, 4, 5], [6], False)])
        >>> chosen, rejected = training.reference_logps(model, batch)
        >>> chosen.shape, rejected.requires_grad
        (torch.Size([1]), False)
    """
    chosen, rejected = sides(batch, log_odds_of(model, batch))
    return sequence_logps(chosen), sequence_logps(rejected)


def pair_loss(
    model: Any,
    batch: PairBatch,
    objective: RewardPenalizeLoss,
    reference: Reference | None = None,
    *,
    log_odds_of: LogOddsOf = response_log_odds,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the loss of a batch and its metrics, as `RewardPenalizeLoss` does.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from fastadapt import training
        >>> from fastadapt.training.pairs import TokenizedPair, pad_pairs
        >>> sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
        >>> batch = pad_pairs([TokenizedPair([1, 2], [3, 4, 5], [6], False)])
        >>> reference = training.reference_logps(model, batch)
        >>> objective = RewardPenalizeLoss({"dpo": 1.0, "exmate": 0.5})
        >>> loss, metrics = training.pair_loss(model, batch, objective, reference)
        >>> loss.backward()
        >>> metrics["loss/dpo"]  # log 2: the model is its own reference
        tensor(0.6931)

    Args:
        model: a causal language model of transformers.
        batch: B pairs.
        objective: the loss.
        reference: what `reference_logps` returned; None: reference-free.
        log_odds_of: makes the log-odds (2B, T-1) of a batch.

    Raises:
        TypeError: an objective, a batch, a reference or a model that is something else.
        ValueError: as `forward_log_odds` and the losses.
    """
    instance("objective", objective, torch.nn.Module, "a RewardPenalizeLoss")
    given: object = reference
    if given is not None and not (isinstance(given, tuple | list) and len(given) == 2):
        got = type(given).__name__
        raise TypeError(f"reference: expected two tensors, as of reference_logps, got {got}")
    chosen, rejected = sides(batch, log_odds_of(model, batch))
    result: tuple[Tensor, dict[str, Tensor]] = objective(
        chosen, rejected, *(reference or (None, None))
    )
    return result


def training_steps(
    model: Any,
    batches: Iterable[tuple[PairBatch, Reference | None]],
    objective: RewardPenalizeLoss,
    optimizer: torch.optim.Optimizer,
    *,
    log_odds_of: LogOddsOf = response_log_odds,
) -> Iterator[dict[str, Tensor]]:
    """Takes one step per batch and yields its "loss" and metrics, detached.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from fastadapt import training
        >>> from fastadapt.training.pairs import TokenizedPair, pad_pairs
        >>> sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
        >>> batch = pad_pairs([TokenizedPair([1, 2], [3, 4, 5], [6], False)])
        >>> batches = [(batch, training.reference_logps(model, batch))] * 3
        >>> objective = RewardPenalizeLoss({"dpo": 1.0})
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> steps = training.training_steps(model, batches, objective, optimizer)
        >>> first, *_, last = [float(seen["loss"]) for seen in steps]
        >>> first > last
        True

    Args:
        model: a causal language model of transformers, in the mode it shall train in.
        batches: each with its reference.
        objective: the loss.
        optimizer: of the model's parameters.
        log_odds_of: as in `pair_loss`.
    """
    if not (hasattr(optimizer, "step") and hasattr(optimizer, "zero_grad")):
        got = type(optimizer).__name__
        raise TypeError(f"optimizer: expected an optimizer of torch, or one like it, got {got}")
    for item in batches:
        instance("batches", item, tuple | list, _WITH_REFERENCE)
        _check_batch("batches", item[0], _WITH_REFERENCE)
        if len(item) != 2:
            raise ValueError(f"batches: expected {_WITH_REFERENCE}, got {len(item)} in one")
        batch, reference = item
        optimizer.zero_grad()
        loss, metrics = pair_loss(model, batch, objective, reference, log_odds_of=log_odds_of)
        loss.backward()
        optimizer.step()
        yield {"loss": loss.detach(), **metrics}
