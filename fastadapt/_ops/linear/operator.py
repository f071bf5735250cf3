"""The operator under `linear_log_odds`: its schema, fakes, autograd and autocast."""

from typing import Any

import torch
from torch import Tensor

from fastadapt._ops.common import (
    WAITS,
    Implementations,
    check_ids,
    device_of,
    no_double_backward,
    register_autocast,
    register_everywhere,
)
from fastadapt._ops.linear.cuda import work_of
from fastadapt._ops.linear.driver import (
    FORWARD_ONLY,
    FROZEN_HEAD,
    RECOMPUTE,
    Asked,
    Forward,
    Upstream,
    backward,
    empty_outputs,
    forward,
    frozen_head_backward,
    jacobian_rows,
)
from fastadapt._ops.linear.gradients import Quintuple, empty_gradients, empty_low_gradients
from fastadapt._ops.linear.tiles import Problem

CASTS = ("hidden", "weight", "bias")  # to the type of autocast
MASTERS = ("weight",)  # a float32 head is cast tile by tile
PLACES = tuple(map(Problem._fields.index, (*CASTS, "low_states", "low_weight")))  # of gradients

_library = torch.library.Library("fastadapt", "FRAGMENT")
PROBLEM = (
    "Tensor hidden, Tensor weight, Tensor labels, Tensor? bias, float softcap, float logit_scale,"
    " int ignore_index, Tensor? span, str? group"
)  # the fields of a Problem
LOW = "Tensor? low_states=None, Tensor? low_weight=None"  # the last ones, of an adapter
_SHAPE = "float softcap, float logit_scale, int ignore_index, Tensor? span, str? group"
_UPSTREAM = "Tensor down, Tensor dothers, Tensor? dmoments"  # the fields of an Upstream
_ASKED = "int plan, int kept_bytes, bool moments, bool apart"
_library.define(
    f"linear_log_odds({PROBLEM}, {LOW}, *, {_ASKED}, bool masked)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=WAITS,
)
_library.define(
    f"linear_log_odds_backward({_UPSTREAM}, Tensor own, Tensor stats, Tensor kept, {PROBLEM},"
    f" {LOW}, *, bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=WAITS,
)
_library.define(
    f"frozen_head_backward({_UPSTREAM}, Tensor own, Tensor stats, Tensor rows, Tensor labels,"
    f" Tensor? weight, {_SHAPE}, ScalarType dtype) -> Tensor",
    tags=WAITS,
)
_library.define("without_gradient(Tensor values, Tensor log_odds, str name) -> Tensor")
_library.define("refused_gradient(Tensor gradient, str name) -> Tensor", tags=WAITS)


def _forward(*inputs: Any, masked: bool, **asked: Any) -> Forward:
    """Labels are checked before any work, but not on a GPU, which that would wait for.

    With `masked` they are candidates, and those ignored were left out by their mask.
    """
    problem = Problem(*inputs)
    problem = problem._replace(labels=problem.labels.contiguous())
    if not problem.hidden.is_cuda:
        v = problem.weight.shape[0] if problem.span is None else int(problem.span[1])
        name = "index" if masked else "labels"
        check_ids(name, problem.labels, v, problem.ignore_index, masked=masked)
    with device_of(problem.hidden):
        return forward(work_of(problem.hidden), problem, Asked(**asked))


def _backward(*given: Any, wanted: list[bool]) -> Quintuple:
    """The gradients that are wanted, and those of an adapter."""
    upstream, (own, stats, kept), problem = Upstream(*given[:3]), given[3:6], Problem(*given[6:])
    with device_of(problem.hidden):
        work = work_of(problem.hidden)
        return backward(work, problem, upstream, own, stats, kept, wanted)


def _frozen_head_backward(*given: Any) -> Tensor:
    """The gradient of the hidden states, or of an adapter's with its rows and weight."""
    upstream, (own, stats, rows, labels, weight) = Upstream(*given[:3]), given[3:8]
    *shape, dtype = given[8:]
    nothing = rows.new_empty(0, rows.shape[1])
    # neither hidden states nor a bias are read
    problem = Problem(
        rows.new_empty(rows.shape[0], 0, dtype=dtype),
        nothing if weight is None else weight,
        labels,
        None,
        *shape,
    )
    with device_of(rows):
        apart = weight is not None
        return frozen_head_backward(work_of(rows), problem, upstream, own, stats, rows, apart)


def _empty_outputs(*inputs: Any, masked: bool, **asked: Any) -> Forward:
    """What the forward returns."""
    problem = Problem(*inputs)
    return empty_outputs(problem, work_of(problem.hidden).tile, Asked(**asked))


def _empty_gradients(*given: Any, wanted: list[bool]) -> Quintuple:
    """What the backward returns."""
    problem = Problem(*given[6:])
    of_head = empty_gradients(problem.hidden, problem.weight, problem.bias, wanted)
    return *of_head, *empty_low_gradients(problem.low, problem.hidden)


def _empty_hidden_gradient(*given: Any) -> Tensor:
    """What the frozen head's backward returns."""
    rows: Tensor = given[5]
    return rows.new_empty(rows.shape, dtype=given[-1])


def _save(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Forward
) -> None:
    """The frozen head needs the hidden states never again, and the head only where `apart`."""
    problem = Problem(*inputs)
    ctx.asked = Asked(**{name: keyword_only_inputs[name] for name in Asked._fields})
    own, _, moments, stats, kept = output
    # a frozen head has Jacobian rows of the others alone
    ctx.mark_non_differentiable(stats, kept, *([moments] if ctx.asked.plan == FROZEN_HEAD else []))
    ctx.set_materialize_grads(False)  # else the backward gets zeros as large as `kept`
    ctx.dtype = problem.hidden.dtype
    ctx.numbers = problem.softcap, problem.logit_scale, problem.ignore_index
    ctx.group = problem.group
    low = problem.low
    ctx.low_dtype = None if low is None else low.states.dtype
    if ctx.asked.plan == FROZEN_HEAD:
        ctx.sizes = problem.sizes
        weights = (problem.weight, problem.low_weight) if ctx.asked.apart else (None, None)
        ctx.save_for_backward(own, stats, kept, problem.labels, problem.span, *weights)
    else:
        ctx.save_for_backward(own, stats, kept, *problem[:4], problem.span, *(low or (None, None)))


def _gradient(
    ctx: Any, down: Tensor | None, dothers: Tensor | None, dmoments: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    """Gradients of hidden, weight, bias and an adapter's two tensors, each only when wanted."""
    gradients: list[Tensor | None] = [None] * len(Problem._fields)
    # an adapter that is not there is not among the inputs, which the dispatcher cuts
    places = PLACES[: 3 if ctx.low_dtype is None else 5]
    wanted = [ctx.needs_input_grad[i] for i in places]
    own, stats, kept, *inputs = ctx.saved_tensors
    down = torch.zeros_like(own) if down is None else down
    dothers = torch.zeros_like(stats[:, 0]) if dothers is None else dothers
    upstream = down, dothers, dmoments
    if ctx.asked.plan == RECOMPUTE:
        *tensors, span, low_states, low_weight = inputs
        problem = (*tensors, *ctx.numbers, span, ctx.group, low_states, low_weight)
        made = torch.ops.fastadapt.linear_log_odds_backward(
            *upstream, own, stats, kept, *problem, wanted=wanted[:3]
        )
        for place, gradient, is_wanted in zip(places, made, wanted, strict=False):
            gradients[place] = gradient if is_wanted else None
    elif ctx.asked.plan == FORWARD_ONLY:
        raise RuntimeError("linear_log_odds: the plan without a backward got one")
    elif any(wanted[1:3]) or any(wanted[4:]):
        raise RuntimeError("linear_log_odds: a frozen head has no gradient")
    else:
        labels, span, *weights = inputs
        rest = (*ctx.numbers, span, ctx.group)
        rows = jacobian_rows(kept, *ctx.sizes)
        of_hidden, of_low = PLACES[0], PLACES[3]
        for place, of_rows, weight, dtype in (
            (of_hidden, rows[0], weights[0], ctx.dtype),
            # in half precision an adapter's weight would be cast like a head's
            *((of_low, low, weights[1], low.dtype) for low in rows[1:]),
        ):
            if ctx.needs_input_grad[place]:
                gradients[place] = torch.ops.fastadapt.frozen_head_backward(
                    *upstream, own, stats, of_rows, labels, weight, *rest, dtype
                )
        if (dlow := gradients[of_low]) is not None:
            gradients[of_low] = dlow.to(ctx.low_dtype)
    return tuple(gradients)


def _without_gradient(values: Tensor, log_odds: Tensor, name: str) -> Tensor:
    """Returns the values unchanged; their gradient is refused."""
    return values.clone()


def _refused_gradient(gradient: Tensor, name: str) -> Tensor:
    """Raises unless a gradient is zero; an operator, so that compiled graphs keep it."""
    if bool(gradient.any()):
        raise RuntimeError(
            f"outputs: expected a loss without the {name} of linear_log_odds, which has no "
            "gradient here; detach it, or take it from logits"
        )
    return torch.zeros_like(gradient)


def _keep_name(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Saves the name of the output for the error."""
    ctx.set_materialize_grads(False)
    ctx.name = inputs[-1]


def _refuse(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
    """Refuses a gradient of an output that has none."""
    if gradient is None:
        return None, None, None
    return None, torch.ops.fastadapt.refused_gradient(gradient, ctx.name), None


def _register() -> None:
    """Implementations, fakes, autograd and autocast; `work_of` tells devices apart."""
    implementations: Implementations = {
        "linear_log_odds": (_forward, _empty_outputs),
        "linear_log_odds_backward": (_backward, _empty_gradients),
        "frozen_head_backward": (_frozen_head_backward, _empty_hidden_gradient),
    }
    register_everywhere(_library, implementations)
    torch.library.register_autograd(
        "fastadapt::linear_log_odds", _gradient, setup_context=_save, lib=_library
    )
    for name in ("linear_log_odds_backward", "frozen_head_backward"):
        torch.library.register_autograd(
            f"fastadapt::{name}", no_double_backward("label log_odds"), lib=_library
        )
    for name, function in (
        ("without_gradient", _without_gradient),
        ("refused_gradient", _refused_gradient),
    ):
        _library.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(
            f"fastadapt::{name}", lambda x, *_: torch.empty_like(x), lib=_library
        )
    torch.library.register_autograd(
        "fastadapt::without_gradient", _refuse, setup_context=_keep_name, lib=_library
    )
    register_autocast(_library, "linear_log_odds", Problem, CASTS, MASTERS)


_register()
linear_log_odds = torch.ops.fastadapt.linear_log_odds
without_gradient = torch.ops.fastadapt.without_gradient
