"""Log-odds of a causal language model's tokens, from the states that reach its head.

The model is any of transformers' kind whose forward calls a linear head. The log-odds come from
`linear_log_odds`, so the logits (2B, T, V) are not made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fastadapt._ops.checks import instance
from fastadapt.linear import linear_log_odds
from fastadapt.log_odds import label_log_odds
from fastadapt.training.compiled import head_outside_graphs
from fastadapt.training.head import (
    Head,
    HeadError,
    accepted,
    before_head,
    causal_of,
    layer_of,
    scoring,
    without_positions,
)
from fastadapt.training.head_check import ask, read_head
from fastadapt.training.pairs import IGNORED, PairBatch

_ARGUMENTS = "a mapping, arguments of the model's forward"

LogOddsOf = Callable[[Any, PairBatch], Tensor]
"""A function of a model and a batch of B pairs that returns log-odds (2B, T-1).

Examples:
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from fastadapt import training
    >>> from fastadapt.training.pairs import TokenizedPair, pad_pairs
    >>> sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
    >>> batch = pad_pairs([TokenizedPair([1, 2], [3, 4, 5], [6], False)])
    >>> log_odds_of: training.LogOddsOf = training.logits_log_odds
    >>> objective = RewardPenalizeLoss({"exmate": 1.0})
    >>> loss, metrics = training.pair_loss(model, batch, objective, log_odds_of=log_odds_of)
    >>> loss.shape
    torch.Size([])
"""


def head_log_odds(head: Head, states: Tensor, labels: Tensor) -> Tensor:
    """Returns the log-odds of labels under a head.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from fastadapt import training
        >>> from fastadapt.training.head_check import head_of
        >>> sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
        >>> head = head_of(model)
        >>> training.head_log_odds(head, torch.zeros(2, 64), torch.tensor([3, -100])).detach()
        tensor([-3.4340,  0.0000])

    Args:
        head (Head): from `fastadapt.training.head_check.head_of`.
        states (Tensor): (..., H), what the head reads.
        labels (Tensor): `states.shape[:-1]`, int64; -100, `training.pairs.IGNORED`, gives 0.

    Returns:
        Tensor: as `linear_log_odds`.
    """
    return linear_log_odds(
        states,
        head.weight,
        labels,
        head.bias,
        softcap=head.softcap,
        logit_scale=head.logit_scale,
        lora=head.lora,
    )


def hidden_states(model: Any, batch: PairBatch) -> Tensor:
    """Returns the states that the head reads, (2B, T-1, H), position t before token t+1.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from fastadapt import training
        >>> from fastadapt.training.pairs import TokenizedPair, pad_pairs
        >>> sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
        >>> batch = pad_pairs([TokenizedPair([1, 2], [3, 4, 5], [6], False)])
        >>> training.hidden_states(model, batch).shape
        torch.Size([2, 4, 64])

    Raises:
        ValueError: the model's forward does not call its head, or calls it with something else.
    """
    return states_at_head(model, inputs_of(batch))[0][:, :-1]


def states_at_head(model: Any, inputs: Mapping[str, Any]) -> tuple[Tensor, Any]:
    """Returns the states that reach a model's head, and the forward's output without logits.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from fastadapt import training
        >>> from fastadapt.training.pairs import TokenizedPair, pad_pairs
        >>> sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
        >>> batch = pad_pairs([TokenizedPair([1, 2], [3, 4, 5], [6], False)])
        >>> states, _ = training.states_at_head(model, training.inputs_of(batch))
        >>> states.shape  # the last position too
        torch.Size([2, 5, 64])

    Args:
        model: a language model of transformers.
        inputs: keyword arguments of its forward.

    Raises:
        TypeError: inputs that are no mapping, or as `forward_log_odds`.
        ValueError: the model's forward does not call its head, or calls it with something else.
    """
    layer, met = layer_of(model), list[Tensor]()
    instance("inputs", inputs, Mapping, _ARGUMENTS)

    def keep(states: Tensor) -> Tensor:
        met.append(states)
        return without_positions(states, layer.weight)

    with head_outside_graphs(model), before_head(layer, keep):
        output = model(**(accepted(model, use_cache=False) | dict(inputs)))
    if len(met) != 1:
        raise HeadError(f"model: expected a forward that calls its head once, got {len(met)}")
    return met[0], output


def inputs_of(batch: PairBatch) -> dict[str, Any]:
    """Returns the arguments of a model's forward for a batch of pairs.

    Examples:
        >>> from fastadapt import training
        >>> from fastadapt.training.pairs import TokenizedPair, pad_pairs
        >>> batch = pad_pairs([TokenizedPair([1, 2], [3, 4, 5], [6], False)])
        >>> training.inputs_of(batch)["input_ids"]
        tensor([[1, 2, 3, 4, 5],
                [1, 2, 6, 0, 0]])
    """
    instance("batch", batch, PairBatch, "a PairBatch")
    return {"input_ids": batch.tokens, "attention_mask": batch.attention_mask}


def response_log_odds(model: Any, batch: PairBatch) -> Tensor:
    """Returns the log-odds of the response tokens, differentiably and without logits.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from fastadapt import training
        >>> from fastadapt.training.pairs import TokenizedPair, pad_pairs
        >>> sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
        >>> batch = pad_pairs([TokenizedPair([1, 2], [3, 4, 5], [6], False)])
        >>> training.response_log_odds(model, batch).shape
        torch.Size([2, 4])

    Args:
        model: a causal language model of transformers; as for `forward_log_odds`.
        batch: B pairs.

    Returns:
        Tensor: (2B, T-1), float32, nats; 0 where `batch.labels` is ignored.

    Raises:
        ValueError: as `forward_log_odds`.
    """
    return forward_log_odds(model, inputs_of(batch), _of_all_positions(batch))[:, :-1]


def forward_log_odds(model: Any, inputs: Mapping[str, Any], labels: Tensor) -> Tensor:
    """Returns log-odds from the model's own forward, without its logits, in any wrapper.

    Wrappers of distributed training gather parameters and wait for gradients around that forward;
    the head's product has to be inside of it. Hooks do that: the head scores what reaches it and
    makes no logits, and the model returns the log-odds. They are gone after the call. The first
    call asks the model what it makes of its head's products (`fastadapt.training.head_check`): one
    forward more.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from fastadapt import training
        >>> sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
        >>> labels = torch.tensor([[5, 6, -100]])  # of each position the next token
        >>> training.forward_log_odds(model, {"input_ids": torch.tensor([[4, 5, 6]])}, labels).shape
        torch.Size([1, 3])

    Args:
        model: a language model of transformers whose head is a module that its forward calls; as it
            is, or within DDP, FSDP2 (`fully_shard`), ZeRO-3, torch.compile or peft. A compiled
            one's head runs outside of its graphs, what its forward calls beside it inside. A head
            split over ranks by vocabulary, a `DTensor` placed as (Shard(0),), is met in its parts.
            LoRA on the head counts as it is in force in this call.
        inputs: keyword arguments of its forward, no labels among them.
        labels (Tensor): (B, T), int64, at each position the token to score there (of a decoder
            without an encoder the next one), or -100, `training.pairs.IGNORED`.

    Returns:
        Tensor: (B, T), float32, nats; 0 where `labels` is ignored.

    Raises:
        ValueError: as `fastadapt.training.head_check.head_of`, among which a model that makes
            something else of its head's products, a quantised head that offers no matrix, or an
            adapter on the head that does more than add its product;
            positions that are not those of `labels`; labels among the inputs.
        TypeError: inputs that are no mapping, labels that are no tensor, a model that is no module.
    """
    instance("inputs", inputs, Mapping, _ARGUMENTS)
    instance("labels", labels, Tensor, "a Tensor")
    if inputs.get("labels") is not None:
        raise ValueError("inputs: expected no labels among them, got labels")
    causal, layer = causal_of(model), layer_of(model)
    answer = ask(model, inputs)

    def score(states: Tensor) -> Tensor:
        if states.shape[:-1] != labels.shape:
            want, got = tuple(states.shape[:-1]), tuple(labels.shape)
            raise ValueError(f"labels: expected one for each position, {want}, got {got}")
        return head_log_odds(read_head(causal, answer, states.dtype), states, labels)

    with head_outside_graphs(model), scoring(layer, score) as log_odds:

        def give(*_: Any) -> dict[str, Tensor]:
            if len(log_odds) != 1:
                name = type(causal).__name__
                raise HeadError(f"model: expected a forward that calls its head once, got {name}")
            return {"log_odds": log_odds.pop()}

        # before the hooks of wrappers, which look at what the forward returned
        handle = causal.register_forward_hook(give, prepend=True)
        try:
            result: Tensor = model(**inputs, **accepted(model, use_cache=False))["log_odds"]
        finally:
            handle.remove()
    return result


def logits_log_odds(model: Any, batch: PairBatch) -> Tensor:
    """Returns the result of `response_log_odds` computed from the logits (2B, T, V).

    For comparison, and for models whose head is more than a matrix. It makes the logits and their
    gradient, no further copy of them.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from fastadapt import training
        >>> from fastadapt.training.pairs import TokenizedPair, pad_pairs
        >>> sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
        >>> batch = pad_pairs([TokenizedPair([1, 2], [3, 4, 5], [6], False)])
        >>> expected = training.response_log_odds(model, batch)
        >>> torch.allclose(training.logits_log_odds(model, batch), expected, atol=1e-5)
        True
    """
    logits = model(**inputs_of(batch), **accepted(model, use_cache=False)).logits
    return label_log_odds(logits, _of_all_positions(batch), ignore_index=IGNORED)[:, :-1]


def _of_all_positions(batch: PairBatch) -> Tensor:
    """Returns labels (2B, T), the last ignored, which is cheaper than cutting states off."""
    return F.pad(batch.labels, (0, 1), value=IGNORED)
