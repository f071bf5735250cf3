"""The operator under `linear_log_odds`: its schema, fakes, autograd and autocast."""

from typing import Any

import torch
from torch import Tensor

from fastadapt._ops.common import Implementations, check_ids, no_double_backward, register
from fastadapt._ops.linear import operator_cuda
from fastadapt._ops.linear.cpu import CpuWork
from fastadapt._ops.linear.driver import (
    FROZEN_HEAD,
    RECOMPUTE,
    Triple,
    backward,
    empty_gradients,
    empty_outputs,
    forward,
    frozen_head_backward,
)
from fastadapt._ops.linear.plan import work_of
from fastadapt._ops.linear.tiles import Problem

_library = torch.library.Library("fastadapt", "FRAGMENT")
_PROBLEM = (
    "Tensor hidden, Tensor weight, Tensor labels, Tensor? bias, float softcap, float logit_scale,"
    " int ignore_index, Tensor? span, str? group"
)  # the fields of a Problem
_FIELDS = len(Problem._fields)
_library.define(
    f"linear_log_odds({_PROBLEM}, int plan, int kept_bytes, bool weighted)"
    " -> (Tensor, Tensor, Tensor)"
)
_library.define(
    f"linear_log_odds_backward({_PROBLEM}, Tensor dlog_odds, Tensor stats, Tensor kept,"
    " bool[] wanted) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "frozen_head_backward(Tensor dlog_odds, Tensor labels, int ignore_index, Tensor stats,"
    " Tensor rows, ScalarType dtype) -> Tensor"
)
_library.define("without_gradient(Tensor values, Tensor log_odds, str name) -> Tensor")
_library.define("refused_gradient(Tensor gradient, str name) -> Tensor")


def _forward_cpu(*arguments: Any) -> Triple:
    """Labels are checked before any work."""
    problem = Problem(*arguments[:_FIELDS])
    v = problem.weight.shape[0] if problem.span is None else int(problem.span[1])
    check_ids("labels", problem.labels, v, problem.ignore_index)
    return forward(CpuWork, problem, *arguments[_FIELDS:])


def _backward_cpu(*arguments: Any) -> Triple:
    """The gradients that are wanted."""
    return backward(CpuWork, Problem(*arguments[:_FIELDS]), *arguments[_FIELDS:])


def _frozen_head_backward_cpu(*arguments: Any) -> Tensor:
    """The gradient of the hidden states."""
    return frozen_head_backward(CpuWork, *arguments)


def _forward_fake(*arguments: Any) -> Triple:
    """Empty outputs."""
    problem, (plan, kept_bytes, _) = Problem(*arguments[:_FIELDS]), arguments[_FIELDS:]
    tile = work_of(problem.hidden).tile
    return empty_outputs(problem.hidden, problem.weight, tile, plan, kept_bytes)


def _backward_fake(*arguments: Any) -> Triple:
    """Empty gradients."""
    problem = Problem(*arguments[:_FIELDS])
    return empty_gradients(problem.hidden, problem.weight, problem.bias, arguments[-1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Triple) -> None:
    """The frozen head needs neither the head nor the hidden states again."""
    problem, ctx.plan = Problem(*inputs[:_FIELDS]), inputs[_FIELDS]
    _, stats, kept = output
    ctx.mark_non_differentiable(stats, kept)
    ctx.set_materialize_grads(False)  # else the backward gets zeros as large as `kept`
    ctx.dtype = problem.hidden.dtype
    ctx.numbers = problem.softcap, problem.logit_scale, problem.ignore_index
    ctx.group = problem.group
    if ctx.plan == FROZEN_HEAD:
        ctx.save_for_backward(problem.labels, stats, kept)
    else:
        ctx.save_for_backward(*problem[:4], problem.span, stats, kept)


def _gradient(ctx: Any, dlog_odds: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    """Gradients of hidden, weight and bias, each only when wanted."""
    if dlog_odds is None:
        return (None,) * (_FIELDS + 3)
    wanted = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    rest = (None,) * (_FIELDS - 4 + 3)
    if ctx.plan == FROZEN_HEAD:
        if wanted[1] or wanted[2]:
            raise RuntimeError("linear_log_odds: a frozen head has no gradient")
        labels, stats, kept = ctx.saved_tensors
        dhidden = torch.ops.fastadapt.frozen_head_backward(
            dlog_odds, labels, ctx.numbers[2], stats, kept, ctx.dtype
        )
        return dhidden, None, None, None, *rest
    if ctx.plan != RECOMPUTE:
        raise RuntimeError("linear_log_odds: the plan without a backward got one")
    *inputs, span, stats, kept = ctx.saved_tensors
    gradients = torch.ops.fastadapt.linear_log_odds_backward(
        *inputs, *ctx.numbers, span, ctx.group, dlog_odds, stats, kept, wanted
    )
    dhidden, dweight, dbias = (g if w else None for g, w in zip(gradients, wanted, strict=True))
    return dhidden, dweight, None, dbias, *rest


def _without_gradient(values: Tensor, log_odds: Tensor, name: str) -> Tensor:
    """The values."""
    return values.clone()


def _refused_gradient(gradient: Tensor, name: str) -> Tensor:
    """Zeros, of a gradient that is zero; an operator, so that compiled graphs keep it."""
    if bool(gradient.any()):
        raise RuntimeError(
            f"outputs: expected a loss without the {name} of linear_log_odds, which has no "
            "gradient here; detach it, or take it from logits"
        )
    return torch.zeros_like(gradient)


def _keep_name(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Nothing else is needed to refuse."""
    ctx.set_materialize_grads(False)
    ctx.name = inputs[-1]


def _refuse(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradient of log-odds: none, or an error."""
    if gradient is None:
        return None, None, None
    return None, torch.ops.fastadapt.refused_gradient(gradient, ctx.name), None


def _autocast(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, *rest: Any
) -> Any:
    """Runs in the type of autocast, as `torch.nn.functional.linear` does."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device)
    if hidden.dtype != torch.float64:
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    with torch.autocast(device, enabled=False):
        return torch.ops.fastadapt.linear_log_odds(hidden, weight, labels, bias, *rest)


def _register() -> None:
    """Implementations, fakes, autograd and autocast."""
    implementations: Implementations = {
        "linear_log_odds": (_forward_cpu, _forward_fake),
        "linear_log_odds_backward": (_backward_cpu, _backward_fake),
        "frozen_head_backward": (
            _frozen_head_backward_cpu,
            lambda dlog_odds, labels, ignored, stats, rows, dtype: rows.new_empty(
                rows.shape, dtype=dtype
            ),
        ),
    }
    register(_library, implementations, operator_cuda)
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
