"""What a model does to its head's products, found by running the model itself.

Configurations do not say it: the same field multiplies in one architecture and divides in another,
and a hook or a class of its own says nothing at all. So the model is asked, once: its own forward
runs with known states put before its head, of sizes at which a cap shows, and what comes out has to
be one of the shapes that the operator has, `softcap * tanh(logit_scale * product / softcap)`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from operator import attrgetter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from fastadapt.training.compiled import head_outside_graphs
from fastadapt.training.head import (
    INSTEAD,
    Head,
    HeadError,
    accepted,
    before_head,
    beside,
    causal_of,
    evaluating,
    layer_of,
    matrix_of,
    one_row,
)
from fastadapt.training.head_shape import fitted_shape, numbers_of, tolerance_of
from fastadapt.training.lora import Lora, lora_of

# Largest |product| of the states that are put before the head, one position each: the small ones
# show a factor, the large ones any cap.
LEVELS = (0.25, 2.0, 16.0, 128.0, 1024.0, 4096.0)
_RECORD = "_fastadapt_head"


class Answer(NamedTuple):
    """What a model does to its head's products.

    Attributes:
        width: of its vocabulary: the first rows of the weight.
        softcap: as in `linear_log_odds`.
        logit_scale: as in `linear_log_odds`.
        offset: the name of a tensor of the model that is added to the products, or None.
        direct: whether the states that the model's body returns reach the head unchanged.
    """

    width: int
    softcap: float | None
    logit_scale: float
    offset: str | None
    direct: bool


class _Key(NamedTuple):
    """What an answer depends on; if any of it changes, the model is asked again."""

    layer: Any
    forwards: tuple[Any, ...]
    hooks: tuple[int, ...]
    weight: tuple[Any, ...]
    lora: tuple[Any, ...]
    autocast: torch.dtype | None
    numbers: tuple[float, ...]


class _Seen(NamedTuple):
    """What one forward showed."""

    states: list[Tensor]  # what the model gave its head, of the first row
    products: list[Tensor]  # (levels, V), of the states put there
    logits: list[Tensor]  # (levels, width)
    body: list[Tensor]  # what the body returned
    offsets: dict[str, Tensor]  # what may have been added to the products


def head_of(model: Any, inputs: Mapping[str, Any] | None = None) -> Head:
    """Returns the head of a language model, checked against the model's own logits.

    The check is a forward without gradients, in evaluation mode, with the random generators put
    back; once a model and head, and again after either was changed. Under wrappers of distributed
    training all processes call it together.

    Args:
        model: with `get_output_embeddings()`; as it is, or within DDP, FSDP2 or peft.
        inputs: keyword arguments of its forward, to check with; None: a few tokens.

    Returns:
        Head: what `linear_log_odds` takes of it. Its states are those that reach the head's
        module, which need not be those that the model's body returns.

    Raises:
        ValueError: the model has no linear head, or makes something else of its products.
    """
    answer = ask(model, inputs)
    return read_head(model, answer)


# A caller's compiled step would make graphs of it, of a hundred frames.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def ask(model: Any, inputs: Mapping[str, Any] | None = None) -> Answer:
    """Finds what a model does to its head's products, from the model's own forward.

    The answer is kept with the model, under a private name of the instance: it lives as long as the
    model, is copied and saved with it, and no table outside needs to be looked after.

    Raises:
        ValueError: as `head_of`.
    """
    causal, layer = causal_of(model), layer_of(model)
    return remembered(
        causal, _RECORD, (), lambda: _answer(causal, layer, _forward(model, causal, layer, inputs))
    )


def read_head(model: Any, answer: Answer, dtype: torch.dtype | None = None) -> Head:
    """Returns a head with its present weight, which sharded training changes.

    A quantised head's is its whole matrix, in a dtype if given; it is made in each call.
    """
    causal = causal_of(model)
    layer, width = layer_of(causal), answer.width
    weight, bias, lora = matrix_of(layer, dtype), getattr(layer, "bias", None), lora_of(layer)
    if answer.offset is not None:
        offset = attrgetter(answer.offset)(causal).flatten()
        bias = offset if bias is None else bias + offset
    adapter = None
    if lora is not None:
        bias = lora.with_bias(bias, weight.dtype)
        adapter = lora.a, lora.b if width == weight.shape[0] else lora.b[:width], lora.scale
    if width != weight.shape[0]:
        weight, bias = weight[:width], None if bias is None else bias[:width]
    return Head(weight, bias, answer.softcap, answer.logit_scale, adapter)


def remembered(causal: Any, name: str, more: tuple[Any, ...], make: Callable[[], Answer]) -> Answer:
    """Returns an answer stored on the model, made again if its key has changed.

    One for each head that the model has, and each adapter on it: a reference is often the original
    head where the policy is its trained copy or has an adapter, turn by turn.
    """
    layer = layer_of(causal)
    lora = lora_of(layer)
    place = layer, None if lora is None else lora.name
    key = (_key(causal, layer), *more)
    records = causal.__dict__.get(name, {})
    record = records.get(place)
    if record is None or record[0] != key:
        record = key, make()
        present = set(causal.modules())
        kept = {place: old for place, old in records.items() if place[0] in present}
        object.__setattr__(causal, name, {**kept, place: record})
    answer: Answer = record[1]
    return answer


def fitted(
    causal: Any, products: Tensor, logits: Tensor, offset: Tensor | None = None
) -> tuple[float | None, float] | None:
    """Returns the cap and the factor between products and logits, None if none fit."""
    width = logits.shape[-1]
    if logits.shape[:-1] != products.shape[:-1] or width > products.shape[-1]:
        return None
    tolerance = tolerance_of(products, logits)
    x = products if offset is None else products.double() + offset
    return fitted_shape(x[:, :width], logits, numbers_of(causal), tolerance)


def products_of(states: Tensor, weight: Tensor, bias: Tensor | None, lora: Lora | None) -> Tensor:
    """Returns the products of a head and its adapter, (..., V), whole, added as peft adds them."""
    products = whole(F.linear(beside(states, weight), weight, bias))
    if lora is None:
        return products
    if isinstance(weight, DTensor) or isinstance(lora.b, DTensor):
        raise HeadError(
            f"model: expected a head with LoRA that is whole, got one split over ranks; {INSTEAD}"
        )
    low = F.linear(states.to(lora.a.dtype), lora.a)
    return (products + F.linear(low, lora.b, lora.bias) * lora.scale).to(products.dtype)


def known_states(states: Tensor, weight: Tensor, lora: Lora | None) -> Tensor:
    """Returns states (levels, H) that are equal on all processes."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(len(LEVELS), weight.shape[1], generator=generator).to(states)
    plain = None if lora is None else lora._replace(bias=None)
    sizes = products_of(directions, weight, None, plain).abs().amax(-1).double()
    levels = sizes.new_tensor(LEVELS)
    return (directions.double() * (levels / sizes.clamp(min=1e-30))[:, None]).to(states.dtype)


def whole(x: Tensor) -> Tensor:
    """Gathers a tensor that may be split over ranks."""
    whole: Tensor = x.full_tensor() if isinstance(x, DTensor) else x
    return whole


def _key(causal: Any, layer: Any) -> _Key:
    """Returns the key of the present call."""
    weight, lora = layer.weight, lora_of(layer)
    device = weight.device.type
    within = list(layer.modules())  # of an adapter's layer, those below it and its own
    hooks = (
        *(
            hook
            for module in within
            for hook in (*module._forward_pre_hooks, *module._forward_hooks)
        ),
        *causal._forward_hooks,
    )
    return _Key(
        layer,
        (*(module.__dict__.get("forward") for module in within), causal.__dict__.get("forward")),
        hooks,
        (weight.dtype, getattr(layer, "bias", None) is None),
        () if lora is None else (lora.scale, lora.a.dtype, lora.b.dtype, lora.bias is None),
        torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None,
        tuple(numbers_of(causal)),
    )


def _forward(model: Any, causal: Any, layer: Any, inputs: Mapping[str, Any] | None) -> _Seen:
    """Runs the model's own forward with known states before its head."""
    offsets = _offsets_of(causal, layer)
    seen = _Seen([], [], [], [], {})

    def put(states: Tensor) -> Tensor:
        weight, bias = matrix_of(layer, states.dtype), getattr(layer, "bias", None)
        lora = lora_of(layer)
        if states.shape[-1] != weight.shape[-1] or not states.is_floating_point():
            got = f"{tuple(states.shape)} states and a matrix of {tuple(weight.shape)}"
            raise HeadError(f"model: expected a head that reads its states, got {got}")
        known = known_states(states, weight, lora)
        seen.states.append(states.reshape(-1, *states.shape[-2:])[0])
        seen.products.append(products_of(known, weight, bias, lora))
        shape = (*states.shape[:-2], *known.shape)
        return beside(known.expand(shape), weight)

    def read(module: Any, arguments: Any, output: Any) -> None:
        logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        if isinstance(logits, Tensor):
            logits = whole(logits)
            seen.logits.append(logits.reshape(-1, *logits.shape[-2:])[0])

    def look(module: Any, arguments: Any, output: Any) -> None:
        states = getattr(output, "last_hidden_state", None)
        if isinstance(states, Tensor):
            seen.body.append(states.reshape(-1, *states.shape[-2:])[0])

    handles = [
        causal.register_forward_hook(read),
        causal.base_model.register_forward_hook(look),
    ]
    given = _a_few_tokens(causal) if inputs is None else one_row(inputs)
    try:
        with (
            torch.no_grad(),
            evaluating(model),
            head_outside_graphs(model, others=False),
            before_head(layer, put),
            _visible(offsets),
        ):
            seen.offsets.update({name: x.flatten().clone() for name, x in offsets.items()})
            model(**given, **accepted(model, use_cache=False))
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _answer(causal: Any, layer: Any, seen: _Seen) -> Answer:
    """Turns what a forward showed into an answer."""
    name = type(causal).__name__
    if len(seen.states) != 1:
        times = {0: "never calls it", 2: "calls it twice"}.get(len(seen.states), "calls it often")
        raise HeadError(
            f"model: expected a forward that calls its head once, {name} {times}; {INSTEAD}"
        )
    if len(seen.logits) != 1:
        raise HeadError(f"model: expected a forward that returns logits, {name} does not")
    direct = len(seen.body) == 1 and torch.equal(seen.body[0], seen.states[0])
    for offset, values in ((None, None), *seen.offsets.items()):
        found = fitted(causal, seen.products[0], seen.logits[0], values)
        if found is not None:
            return Answer(seen.logits[0].shape[-1], *found, offset, direct)
    raise HeadError(
        f"model: expected logits that are products with the head's matrix, scaled and capped by "
        f"numbers of its configuration; {name} with {type(layer).__name__} as head makes others; "
        f"{INSTEAD}"
    )


def _offsets_of(causal: Any, layer: Any) -> dict[str, Tensor]:
    """Returns vectors of vocabulary size that a model may add to its head's products."""
    weight, own = matrix_of(layer), [*layer.parameters(), *layer.buffers()]
    size = getattr(weight, "ds_shape", weight.shape)[0]
    return {
        name: x
        for name, x in (*causal.named_parameters(), *causal.named_buffers())
        if name.endswith("bias") and x.numel() == size and all(x is not each for each in own)
        if x.is_floating_point() and not isinstance(x, DTensor)
    }


@contextlib.contextmanager
def _visible(offsets: Mapping[str, Tensor]) -> Iterator[None]:
    """Makes offsets of 0 non-zero within the block, so that a forward shows them."""
    hidden = {name: x.clone() for name, x in offsets.items() if not bool(x.any())}
    try:
        for name, x in hidden.items():
            steps = torch.linspace(-1, 1, x.numel(), device=x.device)
            offsets[name].copy_(steps.view_as(x))
        yield
    finally:
        for name, x in hidden.items():
            offsets[name].copy_(x)


def _a_few_tokens(causal: Any) -> dict[str, Any]:
    """Returns inputs for a model of texts."""
    embedding = causal.get_input_embeddings()
    tokens = torch.arange(4, device=embedding.weight.device)[None] % embedding.weight.shape[0]
    both = causal.config.is_encoder_decoder
    return {"input_ids": tokens, **({"decoder_input_ids": tokens} if both else {})}
