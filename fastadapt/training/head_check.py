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
    weight, bias = matrix_of(layer, dtype), getattr(layer, "bias", None)
    if answer.offset is not None:
        offset = attrgetter(answer.offset)(causal).flatten()
        bias = offset if bias is None else bias + offset
    if width != weight.shape[0]:
        weight, bias = weight[:width], None if bias is None else bias[:width]
    return Head(weight, bias, answer.softcap, answer.logit_scale)


def remembered(causal: Any, name: str, more: tuple[Any, ...], make: Callable[[], Answer]) -> Answer:
    """Returns an answer stored on the model, made again if its key has changed.

    One for each head that the model has: a reference is often the original head where the policy
    is its trained copy, turn by turn.
    """
    layer = layer_of(causal)
    key = (_key(causal, layer), *more)
    records = causal.__dict__.get(name, {})
    record = records.get(layer)
    if record is None or record[0] != key:
        record = key, make()
        present = set(causal.modules())
        kept = {head: old for head, old in records.items() if head in present}
        object.__setattr__(causal, name, {**kept, layer: record})
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


def known_states(states: Tensor, weight: Tensor) -> Tensor:
    """Returns states (levels, H) that are equal on all processes."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(len(LEVELS), weight.shape[1], generator=generator).to(states)
    sizes = whole(F.linear(beside(directions, weight), weight)).abs().amax(-1).double()
    levels = sizes.new_tensor(LEVELS)
    return (directions.double() * (levels / sizes.clamp(min=1e-30))[:, None]).to(states.dtype)


def whole(x: Tensor) -> Tensor:
    """Gathers a tensor that may be split over ranks."""
    whole: Tensor = x.full_tensor() if isinstance(x, DTensor) else x
    return whole


def _key(causal: Any, layer: Any) -> _Key:
    """Returns the key of the present call."""
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
    """Runs the model's own forward with known states before its head."""
    offsets = _offsets_of(causal, layer)
    seen = _Seen([], [], [], [], {})

    def put(states: Tensor) -> Tensor:
        weight, bias = matrix_of(layer, states.dtype), getattr(layer, "bias", None)
        if states.shape[-1] != weight.shape[-1] or not states.is_floating_point():
            got = f"{tuple(states.shape)} states and a matrix of {tuple(weight.shape)}"
            raise HeadError(f"model: expected a head that reads its states, got {got}")
        known = known_states(states, weight)
        seen.states.append(states.reshape(-1, *states.shape[-2:])[0])
        seen.products.append(whole(F.linear(beside(known, weight), weight, bias)))
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
    weight, own = matrix_of(layer), getattr(layer, "bias", None)
    size = getattr(weight, "ds_shape", weight.shape)[0]
    return {
        name: x
        for name, x in (*causal.named_parameters(), *causal.named_buffers())
        if name.endswith("bias") and x.numel() == size and x is not own
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
