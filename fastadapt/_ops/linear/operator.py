"""The operator under `linear_log_odds`: its schema, fakes, autograd, autocast, and its plans."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastadapt._ops.common import Implementations, check_ids, device_of, no_double_backward
from fastadapt._ops.linear.cpu import CpuWork
from fastadapt._ops.linear.cuda import CudaWork, DoubleCudaWork
from fastadapt._ops.linear.driver import (
    FORWARD_ONLY,
    FROZEN_HEAD,
    RECOMPUTE,
    Triple,
    backward,
    empty_gradients,
    empty_outputs,
    forward,
    frozen_head_backward,
    kept_ids,
)
from fastadapt._ops.linear.tiles import Problem, RowWork

KEPT_BYTES = 1 << 27  # logits kept for the backward where no budget is given and all fit

_library = torch.library.Library("fastadapt", "FRAGMENT")
_PROBLEM = (
    "Tensor hidden, Tensor weight, Tensor labels, Tensor? bias, float softcap, float logit_scale,"
    " int ignore_index, Tensor? span, str? group"
)  # the fields of a Problem
_library.define(
    f"linear_log_odds({_PROBLEM}, *, int plan, int kept_bytes, bool weighted)"
    " -> (Tensor, Tensor, Tensor)"
)
_library.define(
    f"linear_log_odds_backward(Tensor dlog_odds, Tensor stats, Tensor kept, {_PROBLEM}, *,"
    " bool[] wanted) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "frozen_head_backward(Tensor dlog_odds, Tensor labels, int ignore_index, Tensor stats,"
    " Tensor rows, ScalarType dtype) -> Tensor"
)
_library.define("without_gradient(Tensor values, Tensor log_odds, str name) -> Tensor")
_library.define("refused_gradient(Tensor gradient, str name) -> Tensor")


def work_of(hidden: Tensor) -> type[RowWork]:
    """The row work of a device."""
    if not hidden.is_cuda:
        return CpuWork
    return DoubleCudaWork if hidden.dtype == torch.float64 else CudaWork


def _forward(*inputs: Any, plan: int, kept_bytes: int, weighted: bool) -> Triple:
    """Labels are checked before any work, but not on a GPU, which that would wait for."""
    problem = Problem(*inputs)
    if not problem.hidden.is_cuda:
        v = problem.weight.shape[0] if problem.span is None else int(problem.span[1])
        check_ids("labels", problem.labels, v, problem.ignore_index)
    with device_of(problem.hidden):
        return forward(work_of(problem.hidden), problem, plan, kept_bytes, weighted)


def _backward(
    dlog_odds: Tensor, stats: Tensor, kept: Tensor, *inputs: Any, wanted: list[bool]
) -> Triple:
    """The gradients that are wanted."""
    problem = Problem(*inputs)
    with device_of(problem.hidden):
        return backward(work_of(problem.hidden), problem, dlog_odds, stats, kept, wanted)


def _frozen_head_backward(
    dlog_odds: Tensor,
    labels: Tensor,
    ignore_index: int,
    stats: Tensor,
    rows: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """The gradient of the hidden states."""
    with device_of(rows):
        work = work_of(rows)
        return frozen_head_backward(work, dlog_odds, labels, ignore_index, stats, rows, dtype)


def _empty_outputs(*inputs: Any, plan: int, kept_bytes: int, weighted: bool) -> Triple:
    """What the forward returns."""
    hidden, weight, *_ = inputs
    return empty_outputs(hidden, weight, work_of(hidden).tile, plan, kept_bytes)


def _empty_gradients(
    dlog_odds: Tensor, stats: Tensor, kept: Tensor, *inputs: Any, wanted: list[bool]
) -> Triple:
    """What the backward returns."""
    problem = Problem(*inputs)
    return empty_gradients(problem.hidden, problem.weight, problem.bias, wanted)


def _save(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Triple
) -> None:
    """The frozen head needs neither the head nor the hidden states again."""
    problem, ctx.plan = Problem(*inputs), keyword_only_inputs["plan"]
    _, stats, kept = output
    ctx.mark_non_differentiable(stats, kept)
    ctx.set_materialize_grads(False)  # else the backward gets zeros as large as `kept`
    ctx.dtype = problem.hidden.dtype
    ctx.numbers = problem.softcap, problem.logit_scale, problem.ignore_index
    ctx.group = problem.group
    if ctx.plan == FROZEN_HEAD:
        ctx.save_for_backward(problem.labels, stats, kept)
    else:
        ctx.save_for_backward(stats, kept, *problem[:4], problem.span)


def _gradient(ctx: Any, dlog_odds: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    """Gradients of hidden, weight and bias, each only when wanted."""
    dhidden = dweight = dbias = None
    wanted = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    if dlog_odds is None:
        pass
    elif ctx.plan == RECOMPUTE:
        stats, kept, *inputs, span = ctx.saved_tensors
        gradients = torch.ops.fastadapt.linear_log_odds_backward(
            dlog_odds, stats, kept, *inputs, *ctx.numbers, span, ctx.group, wanted=wanted
        )
        dhidden, dweight, dbias = (g if w else None for g, w in zip(gradients, wanted, strict=True))
    elif ctx.plan == FORWARD_ONLY:
        raise RuntimeError("linear_log_odds: the plan without a backward got one")
    elif wanted[1] or wanted[2]:
        raise RuntimeError("linear_log_odds: a frozen head has no gradient")
    else:
        labels, stats, kept = ctx.saved_tensors
        dhidden = torch.ops.fastadapt.frozen_head_backward(
            dlog_odds, labels, ctx.numbers[2], stats, kept, ctx.dtype
        )
    return dhidden, dweight, None, dbias, None, None, None, None, None


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


def _autocast(*inputs: Any, **options: Any) -> Any:
    """Runs in the type of autocast, as `torch.nn.functional.linear` does."""
    problem = Problem(*inputs)
    device = problem.hidden.device.type
    dtype = torch.get_autocast_dtype(device)
    if problem.hidden.dtype != torch.float64:
        bias = None if problem.bias is None else problem.bias.to(dtype)
        hidden, weight = problem.hidden.to(dtype), problem.weight.to(dtype)
        problem = problem._replace(hidden=hidden, weight=weight, bias=bias)
    with torch.autocast(device, enabled=False):
        return torch.ops.fastadapt.linear_log_odds(*problem, **options)


def _register() -> None:
    """Implementations, fakes, autograd and autocast; `work_of` tells devices apart."""
    implementations: Implementations = {
        "linear_log_odds": (_forward, _empty_outputs),
        "linear_log_odds_backward": (_backward, _empty_gradients),
        "frozen_head_backward": (
            _frozen_head_backward,
            lambda dlog_odds, labels, ignored, stats, rows, dtype: rows.new_empty(
                rows.shape, dtype=dtype
            ),
        ),
    }
    for name, (implementation, fake) in implementations.items():
        for device in ("CPU", "CUDA"):
            _library.impl(name, implementation, device)
        torch.library.register_fake(f"fastadapt::{name}", fake, lib=_library)
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
    for key in ("AutocastCPU", "AutocastCUDA"):
        _library.impl("linear_log_odds", _autocast, key)


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
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None, *, memory_budget: int | None = None
) -> LinearPlan:
    """Returns the plan of `linear_log_odds` for these arguments, where gradients are wanted.

    Args:
        hidden (Tensor): (..., H), as for `linear_log_odds`; only shape, dtype, device and
            whether a gradient is wanted matter, of the others too.
        weight (Tensor): (V, H), with a group this rank's slice.
        bias (Tensor | None): (V,).
        memory_budget (int | None): bytes.
    """
    h, v = hidden.shape[-1], weight.shape[0]
    n = hidden.numel() // h
    itemsize = max(hidden.element_size(), weight.element_size())
    work = work_of(hidden)
    forward, backward = work.scratch_bytes(n, v, itemsize)
    wide = torch.promote_types(weight.dtype, torch.float32).itemsize
    number = number_of(hidden, weight, bias)
    if number == FORWARD_ONLY:
        return LinearPlan("forward only", 1.0, 0, forward)
    if number == FROZEN_HEAD:
        rows = n * h * wide
        forward += work.exps_bytes(n, v, itemsize)
        return LinearPlan("frozen head", 2.0, rows, rows + forward)
    ids = kept_ids(n, v, itemsize, work.tile, kept_bytes(n * v * itemsize, memory_budget))
    kept = n * ids * itemsize
    sums = n * h * wide if hidden.requires_grad and itemsize < wide else 0
    name = "grouped" if ids == v else "partly grouped" if ids else "recompute"
    wanted = hidden.requires_grad + weight.requires_grad  # a bias costs no product
    again = 1 - ids / v if v else 0.0
    return LinearPlan(name, 1 + wanted + again, kept, kept + max(forward, sums + backward))


def number_of(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> int:
    """The operator's plan: what the backward will want."""
    if not torch.is_grad_enabled():
        return FORWARD_ONLY
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return RECOMPUTE
    return FROZEN_HEAD if hidden.requires_grad else FORWARD_ONLY


def kept_bytes(logits: int, memory_budget: int | None) -> int:
    """Of the bytes of all logits: all or none where the budget is left to us."""
    if memory_budget is not None:
        return memory_budget
    return KEPT_BYTES if logits <= KEPT_BYTES else 0
