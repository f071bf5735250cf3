"""A model's head: found, and asked what the model makes of its products.

Configurations do not say it: the same field multiplies in one architecture and divides in another,
and a hook or a class of its own says nothing at all. So the model is asked, once: its own forward
runs with known states put before its head, of sizes at which a cap shows, and what comes out has to
be one of the shapes that the operator has, `softcap * tanh(logit_scale * product / softcap)`.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastadapt.head_shape import fitted_shape, numbers_of

# Largest |product| of the states that are put before the head, one position each: the small ones
# show a factor, the large ones any cap.
LEVELS = (0.25, 2.0, 16.0, 128.0, 1024.0, 4096.0)
_TEXTS = frozenset(  # inputs of which one row says as much as all
    {
        *("input_ids", "attention_mask", "position_ids", "token_type_ids", "inputs_embeds"),
        *("decoder_input_ids", "decoder_attention_mask"),
    }
)
_RECORD = "_fastadapt_head"
_INSTEAD = "fastadapt.training.logits_margins is right for any model"


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


class _Key(NamedTuple):
    """What an answer holds for; another head, hook, number or type of product is asked anew."""

    layer: Any
    forwards: tuple[Any, ...]
    hooks: tuple[int, ...]
    weight: tuple[Any, ...]
    autocast: torch.dtype | None
    numbers: tuple[float, ...]


class _Answer(NamedTuple):
    """What the model makes of its head's products."""

    width: int  # of the vocabulary: the first rows of the weight
    softcap: float | None
    logit_scale: float
    direct: bool  # whether the states of the model's body reach the head unchanged


class _Seen(NamedTuple):
    """What was seen of one forward."""

    states: list[Tensor]  # what the model gave its head
    products: list[Tensor]  # (levels, V), of the states put there
    logits: list[Tensor]  # (levels, width)
    body: list[Tensor]  # what the body returned


def causal_of(model: Any) -> Any:
    """Returns the causal language model inside of wrappers: DDP, FSDP, an engine, peft.

    Raises:
        ValueError: a compiled model; its graph would not see the hooks that score the head's
            states.
    """
    inner = model
    for _ in range(2):
        if hasattr(inner, "_orig_mod") or getattr(inner, "_compiled_call_impl", None) is not None:
            raise ValueError(
                "model: expected one that is not compiled, got one of torch.compile; compile its "
                "layers instead, `layer.compile()`"
            )
        inner = getattr(inner, "module", inner)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def layer_of(model: Any) -> Any:
    """Returns the head of a model: a module with a matrix of floating-point weights.

    Raises:
        ValueError: there is none; one with an adapter of its own, which a product with its matrix
            alone would leave out; a quantised one, whose numbers are codes; one whose trained
            weight a sharded run takes away before the backward.
    """
    layer = causal_of(model).get_output_embeddings()
    weight, kind = getattr(layer, "weight", None), type(layer).__name__
    if hasattr(layer, "base_layer") or hasattr(layer, "original_module"):
        raise ValueError(f"model: expected a head without an adapter, got {kind}; {_INSTEAD}")
    if not isinstance(weight, Tensor):
        raise ValueError(f"model: expected one with a linear head, got {kind}; {_INSTEAD}")
    sharded = hasattr(weight, "ds_id")
    wrapped = not isinstance(weight, DTensor) and _is_wrapped(weight)
    if wrapped or not weight.is_floating_point():
        got = f"{type(weight).__name__} of {weight.dtype} in {kind}"
        raise ValueError(f"model: expected a head that is not quantised, got {got}; {_INSTEAD}")
    if weight.dim() != 2 and not sharded:
        raise ValueError(f"model: expected one with a linear head, got {kind}; {_INSTEAD}")
    if weight.requires_grad and torch.is_grad_enabled():
        if sharded:
            raise ValueError("model: expected a frozen head under ZeRO-3, got one that is trained")
        if _has_its_own_group(layer):
            raise ValueError(
                "model: expected a head that is sharded with the model (FSDP2) or frozen, got a "
                "trained one with fully_shard of its own"
            )
    return layer


def head_of(model: Any, inputs: Mapping[str, Any] | None = None) -> Head:
    """Returns the head of a language model, checked against the model's own logits.

    The check is a forward without gradients, in evaluation mode, with the random generators put
    back; once a model and head, and again after either was changed. Under wrappers of distributed
    training all processes call it together.

    Args:
        model: with `get_output_embeddings()`; as it is, or within DDP, FSDP2 or peft.
        inputs: keyword arguments of its forward, to check with; None: a few tokens.

    Returns:
        Head: what `linear_label_margins` takes of it. Its states are those that reach the head's
        module, which need not be those that the model's body returns.

    Raises:
        ValueError: the model has no linear head, or makes something else of its products.
    """
    layer, answer = layer_of(model), ask(model, inputs)
    return read_head(layer, answer.width, answer.softcap, answer.logit_scale)


def read_head(layer: Any, width: int, softcap: float | None, logit_scale: float) -> Head:
    """Returns a head with its weight as it is now, which sharded training changes."""
    weight, bias = layer.weight, getattr(layer, "bias", None)
    if width != weight.shape[0]:
        weight, bias = weight[:width], None if bias is None else bias[:width]
    return Head(weight, bias, softcap, logit_scale)


def ask(model: Any, inputs: Mapping[str, Any] | None = None) -> _Answer:
    """Returns what a model makes of the products of its head, from the model itself.

    The answer is kept with the model, under a private name of the instance: it lives as long as the
    model, is copied and saved with it, and no table outside needs to be looked after.

    Raises:
        ValueError: as `head_of`.
    """
    causal, layer = causal_of(model), layer_of(model)
    key = _key(causal, layer)
    record = causal.__dict__.get(_RECORD)
    if record is not None and record[0] == key:
        answer: _Answer = record[1]
        return answer
    answer = _answer(causal, layer, _forward(model, causal, layer, inputs))
    object.__setattr__(causal, _RECORD, (key, answer))
    return answer


def accepted(model: Any, **named: Any) -> dict[str, Any]:
    """Returns those arguments that a model's forward takes."""
    parameters = inspect.signature(causal_of(model).forward).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return named
    return {name: value for name, value in named.items() if name in parameters}


@contextlib.contextmanager
def before_head(layer: Any, meet: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Calls a function with the states that reach a head; the head reads what it returns."""

    def on_call(_: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        if not arguments or not isinstance(arguments[0], Tensor):
            got = [type(argument).__name__ for argument in arguments]
            raise ValueError(f"model: expected a head called with states, got {got}; {_INSTEAD}")
        return (meet(arguments[0]), *arguments[1:])

    handle = layer.register_forward_pre_hook(on_call)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards each module's own mode and the generators are as before."""
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
    """Returns the fewest states that a head of that weight can take."""
    if not isinstance(weight, DTensor):
        return states[..., :0, :].detach()
    # a split one takes neither plain tensors beside it nor none at all
    return _beside(states[:1, :1].detach(), weight)


def _key(causal: Any, layer: Any) -> _Key:
    """What is looked at in every call."""
    weight = layer.weight
    device = weight.device.type
    hooks = (
        *layer._forward_pre_hooks,
        *layer._forward_hooks,
        *causal._forward_hooks,
    )
    return _Key(
        layer,
        (layer.__dict__.get("forward"), causal.__dict__.get("forward")),
        hooks,
        (weight.dtype, getattr(layer, "bias", None) is None),
        torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None,
        tuple(numbers_of(causal)),
    )


def _forward(model: Any, causal: Any, layer: Any, inputs: Mapping[str, Any] | None) -> _Seen:
    """The model's own forward with known states before its head."""
    seen = _Seen([], [], [], [])

    def put(states: Tensor) -> Tensor:
        weight, bias = layer.weight, getattr(layer, "bias", None)
        if states.shape[-1] != weight.shape[-1] or not states.is_floating_point():
            got = f"{tuple(states.shape)} states and a matrix of {tuple(weight.shape)}"
            raise ValueError(f"model: expected a head that reads its states, got {got}")
        known = _known_states(states, weight)
        seen.states.append(states)
        seen.products.append(_whole(F.linear(_beside(known, weight), weight, bias)))
        shape = (*states.shape[:-2], *known.shape)
        return _beside(known.expand(shape), weight)

    def read(module: Any, arguments: Any, output: Any) -> None:
        logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        if isinstance(logits, Tensor):
            logits = _whole(logits)
            seen.logits.append(logits.reshape(-1, *logits.shape[-2:])[0])

    def look(module: Any, arguments: Any, output: Any) -> None:
        states = getattr(output, "last_hidden_state", None)
        if isinstance(states, Tensor):
            seen.body.append(states)

    handles = [
        causal.register_forward_hook(read, prepend=True),
        causal.base_model.register_forward_hook(look),
    ]
    given = _a_few_tokens(causal) if inputs is None else _one_row(inputs)
    try:
        with torch.no_grad(), evaluating(model), before_head(layer, put):
            model(**given, **accepted(model, use_cache=False))
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _answer(causal: Any, layer: Any, seen: _Seen) -> _Answer:
    """What was seen, as a shape."""
    name = type(causal).__name__
    if len(seen.states) != 1:
        times = {0: "never calls it", 2: "calls it twice"}.get(len(seen.states), "calls it often")
        raise ValueError(
            f"model: expected a forward that calls its head once, {name} {times}; {_INSTEAD}"
        )
    if len(seen.logits) != 1:
        raise ValueError(f"model: expected a forward that returns logits, {name} does not")
    products, logits = seen.products[0], seen.logits[0]
    rows = (logits.shape[0], products.shape[0])
    width = logits.shape[-1]
    found = None
    if rows[0] == rows[1] and width <= products.shape[1]:
        found = fitted_shape(products[:, :width], logits, numbers_of(causal))
    if found is None:
        raise ValueError(
            f"model: expected logits that are products with the head's matrix, scaled and capped "
            f"by numbers of its configuration; {name} with {type(layer).__name__} as head makes "
            f"others; {_INSTEAD}"
        )
    direct = len(seen.body) == 1 and torch.equal(seen.body[0], seen.states[0])
    return _Answer(width, *found, direct)


def _known_states(states: Tensor, weight: Tensor) -> Tensor:
    """(levels, H): the same on all processes, whatever the model computed from its inputs."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(len(LEVELS), weight.shape[1], generator=generator).to(states)
    sizes = _whole(F.linear(_beside(directions, weight), weight)).abs().amax(-1).double()
    levels = sizes.new_tensor(LEVELS)
    return (directions.double() * (levels / sizes.clamp(min=1e-30))[:, None]).to(states.dtype)


def _beside(states: Tensor, weight: Tensor) -> Tensor:
    """Plain states as a weight that is split by vocabulary can meet them."""
    if not isinstance(weight, DTensor):
        return states
    mesh = weight.device_mesh
    return DTensor.from_local(states, mesh, [Replicate()] * mesh.ndim)


def _whole(x: Tensor) -> Tensor:
    """All of a tensor that may be split over ranks."""
    whole: Tensor = x.full_tensor() if isinstance(x, DTensor) else x
    return whole


def _one_row(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Of plain texts the first row; whatever else there is has no rows that one could tell."""
    tensors = {name: x for name, x in inputs.items() if isinstance(x, Tensor)}
    if not tensors.keys() <= _TEXTS:
        return dict(inputs)
    return {name: x[:1] if name in tensors else x for name, x in inputs.items()}


def _a_few_tokens(causal: Any) -> dict[str, Any]:
    """Inputs of a model of texts."""
    embedding = causal.get_input_embeddings()
    tokens = torch.arange(4, device=embedding.weight.device)[None] % embedding.weight.shape[0]
    both = causal.config.is_encoder_decoder
    return {"input_ids": tokens, **({"decoder_input_ids": tokens} if both else {})}


def _is_wrapped(weight: object) -> bool:
    """Whether it is a tensor of other tensors, such as codes and scales."""
    return is_traceable_wrapper_subclass(weight)


def _has_its_own_group(layer: Any) -> bool:
    """Whether FSDP2 shards it apart from the model, and takes it away after its forward."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(layer, FSDPModule)
