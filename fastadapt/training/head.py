"""A model's head: found inside wrappers, and reached by hooks in the model's forward."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastadapt._ops.checks import instance
from fastadapt.linear import linear_log_odds

INSTEAD = "fastadapt.training.logits_log_odds is right for any model"


class HeadError(ValueError):
    """A model cannot be scored without its logits; the message says why and what to use."""


class Head(NamedTuple):
    """A linear head and what its model does to the logits.

    Attributes:
        weight: (V, H).
        bias: (V,) or None.
        softcap: as in `linear_log_odds`.
        logit_scale: as in `linear_log_odds`.
    """

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float


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
    )


def causal_of(model: Any) -> Any:
    """Returns the causal language model inside DDP, FSDP, an engine or peft.

    Raises:
        TypeError: no module.
        ValueError: a compiled model; its graph would not see the hooks that score the head's
            states.
    """
    instance("model", model, torch.nn.Module, "a language model of transformers")
    inner = model
    for _ in range(2):
        if hasattr(inner, "_orig_mod") or getattr(inner, "_compiled_call_impl", None) is not None:
            raise HeadError(
                "model: expected one that is not compiled, got one of torch.compile; compile its "
                "layers instead, `layer.compile()`"
            )
        inner = getattr(inner, "module", inner)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def layer_of(model: Any) -> Any:
    """Returns the head of a model, a module with a floating-point weight.

    Raises:
        ValueError: there is none; one with an adapter of its own, which a product with its matrix
            alone would leave out; a quantised one, whose numbers are codes.
    """
    causal = causal_of(model)
    if not hasattr(causal, "get_output_embeddings"):
        got = type(causal).__name__
        raise ValueError(f"model: expected a language model of transformers, got {got}")
    layer = causal.get_output_embeddings()
    weight, kind = getattr(layer, "weight", None), type(layer).__name__
    if hasattr(layer, "base_layer") or hasattr(layer, "original_module"):
        raise HeadError(f"model: expected a head without an adapter, got {kind}; {INSTEAD}")
    if not isinstance(weight, Tensor):
        raise HeadError(f"model: expected one with a linear head, got {kind}; {INSTEAD}")
    wrapped = not isinstance(weight, DTensor) and _is_wrapped(weight)
    if wrapped or not weight.is_floating_point():
        got = f"{type(weight).__name__} of {weight.dtype} in {kind}"
        raise HeadError(f"model: expected a head that is not quantised, got {got}; {INSTEAD}")
    if weight.dim() != 2 and not hasattr(weight, "ds_id"):
        raise HeadError(f"model: expected one with a linear head, got {kind}; {INSTEAD}")
    return layer


def check_sharding(layer: Any) -> None:
    """Raises if sharded training frees a trained head before its backward."""
    from torch.distributed.fsdp import FSDPModule

    if not layer.weight.requires_grad or not torch.is_grad_enabled():
        return
    if hasattr(layer.weight, "ds_id"):
        raise HeadError("model: expected a frozen head under ZeRO-3, got one that is trained")
    if isinstance(layer, FSDPModule):
        raise HeadError(
            "model: expected a head that is sharded with the model (FSDP2) or frozen, got a "
            "trained one with fully_shard of its own"
        )


def accepted(model: Any, **named: Any) -> dict[str, Any]:
    """Returns the arguments that a model's forward accepts."""
    parameters = inspect.signature(causal_of(model).forward).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return named
    return {name: value for name, value in named.items() if name in parameters}


def one_row(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the first row of a batch, or all of it if some tensor has no row per sequence.

    Images and the like are counted by themselves, so that what belongs to a row cannot be told.
    """
    tensors = {name: x for name, x in inputs.items() if isinstance(x, Tensor)}
    whole = {name for name, x in tensors.items() if x.dim() != 2 and name == "position_ids"}
    if whole or len({x.shape[:1] for x in tensors.values()}) != 1:
        return dict(inputs)
    return {name: x[:1] if name in tensors else x for name, x in inputs.items()}


@contextlib.contextmanager
def before_head(layer: Any, meet: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Passes the states that reach a head through a function, within the block."""

    def on_call(_: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        if not arguments or not isinstance(arguments[0], Tensor):
            got = [type(argument).__name__ for argument in arguments]
            raise HeadError(f"model: expected a head called with states, got {got}; {INSTEAD}")
        return (meet(arguments[0]), *arguments[1:])

    handle = layer.register_forward_pre_hook(on_call)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Puts a model into evaluation mode; modes and generators are restored afterwards."""
    modes = {module: module.training for module in model.modules()}
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=sorted(d for d in devices if d is not None)):
            model.eval()
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def without_positions(states: Tensor, weight: Tensor) -> Tensor:
    """Returns the fewest states that a head with this weight accepts."""
    if not isinstance(weight, DTensor):
        return states[..., :0, :].detach()
    # a split one takes neither plain tensors beside it nor none at all
    return beside(states[:1, :1].detach(), weight)


def beside(states: Tensor, weight: Tensor) -> Tensor:
    """Prepares plain states for a weight that is split by vocabulary."""
    if not isinstance(weight, DTensor):
        return states
    mesh = weight.device_mesh
    return DTensor.from_local(states, mesh, [Replicate()] * mesh.ndim)


def _is_wrapped(weight: object) -> bool:
    """Whether a tensor is made of others, such as codes and scales."""
    return is_traceable_wrapper_subclass(weight)
