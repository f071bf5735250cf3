"""The operator under `linear_log_odds`: its schema, fakes, autograd, autocast, and its plans."""

from collections.abc import Sequence
from typing import Any, NamedTuple

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
from fastadapt._ops.linear.cpu import CpuWork
from fastadapt._ops.linear.cuda import CudaWork, DoubleCudaWork
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
    kept_ids,
)
from fastadapt._ops.linear.gradients import Quintuple, empty_gradients, empty_low_gradients
from fastadapt._ops.linear.tiles import LowRank, Problem, RowWork

MOMENTS = ("entropy", "sum_of_squares")  # outputs that the moments of the others make
CASTS = ("hidden", "weight", "bias")  # to the type of autocast
_PLACES = (0, 1, 3, 9, 10)  # of what has gradients, in a Problem
KEPT_BYTES = 1 << 27  # of logits, so many are kept for the backward of a small head

_library = torch.library.Library("fastadapt", "FRAGMENT")
PROBLEM = (
    "Tensor hidden, Tensor weight, Tensor labels, Tensor? bias, float softcap, float logit_scale,"
    " int ignore_index, Tensor? span, str? group"
)  # the fields of a Problem
_LOW = "Tensor? low_states=None, Tensor? low_weight=None"  # the last ones, of an adapter
_SHAPE = "float softcap, float logit_scale, int ignore_index, Tensor? span, str? group"
_UPSTREAM = "Tensor down, Tensor dothers, Tensor? dmoments"  # the fields of an Upstream
_ASKED = "int plan, int kept_bytes, bool moments, bool apart"
_library.define(
    f"linear_log_odds({PROBLEM}, {_LOW}, *, {_ASKED}, bool masked)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=WAITS,
)
_library.define(
    f"linear_log_odds_backward({_UPSTREAM}, Tensor own, Tensor stats, Tensor kept, {PROBLEM},"
    f" {_LOW}, *, bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=WAITS,
)
_library.define(
    f"frozen_head_backward({_UPSTREAM}, Tensor own, Tensor stats, Tensor rows, Tensor labels,"
    f" Tensor? weight, {_SHAPE}, ScalarType dtype) -> Tensor",
    tags=WAITS,
)
_library.define("without_gradient(Tensor values, Tensor log_odds, str name) -> Tensor")
_library.define("refused_gradient(Tensor gradient, str name) -> Tensor", tags=WAITS)


def work_of(hidden: Tensor) -> type[RowWork]:
    """The row work of a device."""
    if not hidden.is_cuda:
        return CpuWork
    return DoubleCudaWork if hidden.dtype == torch.float64 else CudaWork


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
    places = _PLACES[: 3 if ctx.low_dtype is None else 5]
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
        parts = zip((0, 9), rows, weights, (ctx.dtype, ctx.low_dtype), strict=False)
        for place, of_rows, weight, dtype in parts:
            if ctx.needs_input_grad[place]:
                gradients[place] = torch.ops.fastadapt.frozen_head_backward(
                    *upstream, own, stats, of_rows, labels, weight, *rest, dtype
                )
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
    register_autocast(_library, "linear_log_odds", Problem, CASTS)


_register()
linear_log_odds = torch.ops.fastadapt.linear_log_odds
without_gradient = torch.ops.fastadapt.without_gradient


class LinearPlan(NamedTuple):
    """What `linear_log_odds` will do; another plan has the same results beyond rounding.

    Attributes:
        name: "forward only"; "recompute", "partly grouped" and "grouped", which make none, some or
            all products again in the backward; "frozen head".
        products: of N * H * V, forward and backward together; fewer where rows are ignored.
        kept_bytes: logits, or Jacobian rows of a frozen head, from the forward to the backward.
        peak_bytes: the most that is held over inputs and returned gradients, with no row ignored
            and but for what is a few numbers a row.
    """

    name: str
    products: float
    kept_bytes: int
    peak_bytes: int


def plan_of(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    memory_budget: int | None = None,
    outputs: Sequence[str] = (),
    lora: tuple[Tensor, Tensor, float] | None = None,
) -> LinearPlan:
    """Returns the plan of `linear_log_odds` for these arguments, where gradients are wanted.

    Args:
        hidden (Tensor): (..., H), as for `linear_log_odds`; only shape, dtype, device and
            whether a gradient is wanted matter, of the others too.
        weight (Tensor): (V, H), with a group this rank's slice.
        bias (Tensor | None): (V,).
        memory_budget (int | None): bytes.
        outputs (Sequence[str]): as for `linear_log_odds`, differentiable: those of `MOMENTS` take
            one more product with a frozen head.
        lora (tuple[Tensor, Tensor, float] | None): (A, B, scale), as for `linear_log_odds`.
    """
    hidden = hidden.reshape(-1, hidden.shape[-1])
    (n, h), v = hidden.shape, weight.shape[0]
    itemsize = max(hidden.element_size(), weight.element_size())
    work = work_of(hidden)
    low, r, held = None, 0, 0  # of an adapter: bytes that are held throughout
    if lora is not None:
        a, b, _ = lora
        r, held = a.shape[0], _low_bytes(work, hidden, itemsize, a, b)
        states = hidden.new_empty(0, r, requires_grad=hidden.requires_grad or a.requires_grad)
        low = LowRank(states, b)
    one = 1 + r / h  # its products with a column of states and weight for each of H
    number = number_of(hidden, weight, bias, any(name in MOMENTS for name in outputs), low)
    if number != RECOMPUTE:
        forward, _ = work.scratch_bytes(n, v, itemsize)
        if number == FORWARD_ONLY:
            return LinearPlan("forward only", one, 0, held + forward)
        rows = n * (h + r) * torch.promote_types(weight.dtype, torch.float32).itemsize
        forward += work.exps_bytes(n, v, itemsize)
        return LinearPlan("frozen head", 2 * one, rows, held + rows + forward)
    ids = kept_ids(n, v, itemsize, work.tile, kept_bytes(hidden, weight, memory_budget))
    kept = n * ids * itemsize
    name = "grouped" if ids == v else "partly grouped" if ids else "recompute"
    wanted = hidden.requires_grad + weight.requires_grad  # a bias costs no product
    again = 1 - ids / v if v else 0.0
    products = (1 + again) * one + wanted + 2 * r / h
    return LinearPlan(name, products, kept, held + kept + _beside(hidden, weight, r))


def _low_bytes(work: type[RowWork], hidden: Tensor, itemsize: int, a: Tensor, b: Tensor) -> int:
    """The bytes that an adapter takes: states, what is made wide for it, at once or by blocks."""
    (v, r), h, n = b.shape, a.shape[1], hidden.numel() // hidden.shape[-1]
    wide = max(itemsize, 4)
    states = 2 * n * r * wide  # as they are made, and filled up or selected
    cast = n * h * a.element_size() if a.element_size() != itemsize else 0
    weight = v * r * wide if b.element_size() < wide else 0
    block = min(work.wide_numbers, n * min(work.tile, v)) * wide if itemsize < wide else 0
    return states + cast + weight + block


def number_of(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    moments: bool,
    low: LowRank | None = None,
) -> int:
    """The operator's plan: what the backward will want, gradients of moments among it."""
    if not torch.is_grad_enabled():
        return FORWARD_ONLY
    of_head = (weight, bias, None if low is None else low.weight)
    if any(x is not None and x.requires_grad for x in of_head):
        return RECOMPUTE
    if not hidden.requires_grad:  # an adapter's A alone is trained: a frozen head costs the same
        return RECOMPUTE if low is not None and low.states.requires_grad else FORWARD_ONLY
    return RECOMPUTE if moments else FROZEN_HEAD


def kept_bytes(hidden: Tensor, weight: Tensor, memory_budget: int | None) -> int:
    """Returns how many bytes of logits are kept for the backward of a trained head.

    Left to us, as many as the head's gradient has, or twice what a small head has; and of many
    logits not the last, so that no more is held in all than full logits would take.
    """
    if memory_budget is not None:
        return memory_budget
    (n, h), v = hidden.shape, weight.shape[0]
    itemsize = max(hidden.element_size(), weight.element_size())
    head, logits = v * h * itemsize, n * v * itemsize
    kept = max(head if weight.requires_grad else 0, min(2 * head, KEPT_BYTES))
    return kept if logits <= KEPT_BYTES else min(kept, logits - _beside(hidden, weight))


def _beside(hidden: Tensor, weight: Tensor, r: int = 0) -> int:
    """Returns the bytes that forward and backward hold at most beside what is kept.

    With the sums of r columns of an adapter's states.
    """
    (n, h), v = hidden.shape, weight.shape[0]
    itemsize = max(hidden.element_size(), weight.element_size())
    forward, backward = work_of(hidden).scratch_bytes(n, v, itemsize)
    wide = torch.promote_types(weight.dtype, torch.float32).itemsize
    sums = n * h * wide if hidden.requires_grad and itemsize < wide else 0
    return max(forward, sums + n * r * wide + backward)
