"""A model's head: found inside wrappers, and reached by hooks in the model's forward."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from fastadapt._ops.checks import instance
from fastadapt.training.lora import has_adapter, refusal_of
from fastadapt.training.quantised import dequantiser_of, is_quantised

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
        lora: (A, B, scale) of an adapter in force, as in `linear_log_odds`, or None.
    """

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float
    lora: tuple[Tensor, Tensor, float] | None = None


def causal_of(model: Any) -> Any:
    """Returns the causal language model inside DDP, FSDP, an engine, torch.compile or peft.

    Raises:
        TypeError: no module.
    """
    *_, causal = wrappers_of(model)
    return causal


def wrappers_of(model: Any) -> Iterator[Any]:
    """Yields a model, what it wraps, and so on; the causal language model is the last.

    Raises:
        TypeError: no module.
    """
    instance("model", model, torch.nn.Module, "a language model of transformers")
    inner: Any = None
    while inner is not model:
        inner, model = model, _inside(model)
        yield inner


def _inside(model: Any) -> Any:
    """Returns what a wrapper wraps, the module itself if it is none."""
    if "_orig_mod" in model._modules:
        return model._orig_mod
    inner = getattr(model, "module", None)
    if isinstance(inner, torch.nn.Module):
        return inner
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def layer_of(model: Any) -> Any:
    """Returns the head of a model, a module with one matrix as its weight.

    That of an adapter that trains and saves the whole head (peft's `modules_to_save`) is its copy
    while the adapter is active, else the original. That of LoRA on the head is the adapter's layer,
    whose weight is that below it.

    Raises:
        ValueError: there is none; one with another adapter, or with LoRA that does more than add
            its product (`fastadapt.training.lora.refusal_of`) or is gathered for the call alone; a
            quantised one that is trained, or of which nothing makes the matrix.
    """
    causal = causal_of(model)
    if not hasattr(causal, "get_output_embeddings"):
        got = type(causal).__name__
        raise ValueError(f"model: expected a language model of transformers, got {got}")
    layer = _saved(causal.get_output_embeddings())
    weight, kind = getattr(layer, "weight", None), type(layer).__name__
    refusal = refusal_of(layer)
    if hasattr(layer, "original_module"):
        refusal = f"a head without an adapter, got {kind}"
    if refusal is not None:
        raise HeadError(f"model: expected {refusal}; {INSTEAD}")
    if not isinstance(weight, Tensor):
        raise HeadError(f"model: expected one with a linear head, got {kind}; {INSTEAD}")
    if is_quantised(weight):
        got = f"{type(weight).__name__} of {weight.dtype} in {kind}"
        if dequantiser_of(weight) is None:
            raise HeadError(
                f"model: expected a head that is not quantised, or whose weight can be "
                f"dequantised, got {got}; {INSTEAD}"
            )
        if weight.requires_grad:
            raise HeadError(f"model: expected a quantised head that is frozen, got {got}")
    elif weight.dim() != 2 and not hasattr(weight, "ds_id"):
        raise HeadError(f"model: expected one with a linear head, got {kind}; {INSTEAD}")
    if has_adapter(layer) and is_gathered(layer):
        raise HeadError(
            f"model: expected a head with LoRA that is not gathered for its own forward alone "
            f"(fully_shard of the head, ZeRO-3), got {kind}; {INSTEAD}"
        )
    return layer


def _saved(layer: Any) -> Any:
    """Returns the module that a wrapper of peft's `modules_to_save` calls, or what is none."""
    copies = getattr(layer, "modules_to_save", None)
    if not isinstance(copies, torch.nn.ModuleDict):
        return layer
    active = list(layer.active_adapters)
    if layer.disable_adapters or not active or active[0] not in copies:
        return layer.original_module
    return copies[active[0]]


def matrix_of(layer: Any, dtype: torch.dtype | None = None) -> Tensor:
    """Returns the matrix of a head, (V, H); a quantised one is made anew, in a dtype if given."""
    weight: Tensor = layer.weight
    make = dequantiser_of(weight) if is_quantised(weight) else None
    if make is None:
        return weight
    matrix = make().detach()
    return matrix if dtype is None else matrix.to(dtype)


def is_gathered(layer: Any) -> bool:
    """Whether hooks gather a head for its own forward and backward alone (FSDP2, ZeRO-3)."""
    from torch.distributed.fsdp import FSDPModule

    shards = any(isinstance(module, FSDPModule) for module in layer.modules())
    return shards or any(hasattr(x, "ds_id") for x in (layer.weight, *layer.parameters()))


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
def scoring(layer: Any, score: Callable[[Tensor], Tensor]) -> Iterator[list[Tensor]]:
    """Has a function score the states that reach a head, which then makes no logits.

    Where hooks gather a trained head for its own forward and backward alone, the scores leave the
    head's module beside its output. So these hooks gather it again before the backward of the
    scores, as before that of logits, and reduce its gradient after; between the two passes this
    process holds no more than its shard.

    Yields:
        list[Tensor]: the scores, one tensor for each call of the head.
    """
    scores: list[Tensor] = []

    def on_states(states: Tensor) -> Tensor:
        scores.append(score(states))
        return without_positions(states, layer.weight)

    def show(_: Any, arguments: Any, output: Any) -> tuple[Any, Tensor]:
        scores[-1] = scores[-1].clone()  # a view would lose their hooks where it is written to
        return output, scores[-1]

    def hide(_: Any, arguments: Any, output: tuple[Any, Tensor]) -> Any:
        logits, seen = output
        if seen.dtype == scores[-1].dtype:  # else rounded on the way; those before are watched too
            scores[-1] = seen
        return logits

    trained = torch.is_grad_enabled() and any(p.requires_grad for p in layer.parameters())
    with before_head(layer, on_states), contextlib.ExitStack() as stack:
        if trained and is_gathered(layer):
            for hook, first in ((show, True), (hide, False)):
                stack.callback(layer.register_forward_hook(hook, prepend=first).remove)
        yield scores


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
