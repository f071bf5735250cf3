"""The operator under `linear_label_margins`: its schema, fakes, autograd and autocast."""

from typing import Any

import torch
from torch import Tensor

from fastadapt.linear_head import (
    FROZEN_HEAD,
    RECOMPUTE,
    Triple,
    backward,
    empty_gradients,
    empty_outputs,
    forward,
    frozen_head_backward,
)
from fastadapt.ops import Implementations, no_double_backward, register

_library = torch.library.Library("fastadapt", "FRAGMENT")
_library.define(
    "linear_label_margins(Tensor hidden, Tensor weight, Tensor labels, Tensor? bias,"
    " float softcap, float logit_scale, int ignore_index, int plan, int kept_bytes,"
    " bool weighted) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "linear_label_margins_backward(Tensor dmargins, Tensor hidden, Tensor weight, Tensor labels,"
    " Tensor? bias, float softcap, float logit_scale, int ignore_index, Tensor stats, Tensor kept,"
    " bool[] wanted) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "frozen_head_backward(Tensor dmargins, Tensor labels, int ignore_index, Tensor stats,"
    " Tensor rows, ScalarType dtype) -> Tensor"
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Triple) -> None:
    """The frozen head needs neither the head nor the hidden states again."""
    hidden, weight, labels, bias, ctx.softcap, ctx.logit_scale, ctx.ignore_index, ctx.plan, *_ = (
        inputs
    )
    _, stats, kept = output
    ctx.mark_non_differentiable(stats, kept)
    ctx.set_materialize_grads(False)  # else the backward gets zeros as large as `kept`
    ctx.dtype = hidden.dtype
    if ctx.plan == FROZEN_HEAD:
        ctx.save_for_backward(labels, stats, kept)
    else:
        ctx.save_for_backward(hidden, weight, labels, bias, stats, kept)


def _gradient(ctx: Any, dmargins: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    """Gradients of hidden, weight and bias, each only when wanted."""
    if dmargins is None:
        return (None,) * 10
    wanted = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    rest = (None,) * 6
    if ctx.plan == FROZEN_HEAD:
        if wanted[1] or wanted[2]:
            raise RuntimeError("linear_label_margins: a frozen head has no gradient")
        labels, stats, kept = ctx.saved_tensors
        dhidden = torch.ops.fastadapt.frozen_head_backward(
            dmargins, labels, ctx.ignore_index, stats, kept, ctx.dtype
        )
        return dhidden, None, None, None, *rest
    if ctx.plan != RECOMPUTE:
        raise RuntimeError("linear_label_margins: the plan without a backward got one")
    hidden, weight, labels, bias, stats, kept = ctx.saved_tensors
    gradients = torch.ops.fastadapt.linear_label_margins_backward(
        dmargins,
        hidden,
        weight,
        labels,
        bias,
        ctx.softcap,
        ctx.logit_scale,
        ctx.ignore_index,
        stats,
        kept,
        wanted,
    )
    dhidden, dweight, dbias = (g if w else None for g, w in zip(gradients, wanted, strict=True))
    return dhidden, dweight, None, dbias, *rest


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
        return torch.ops.fastadapt.linear_label_margins(hidden, weight, labels, bias, *rest)


def _register() -> None:
    """Implementations, fakes, autograd and autocast."""
    implementations: Implementations = {
        "linear_label_margins": (
            forward,
            lambda hidden, weight, labels, bias, cap, scale, ignored, plan, kept_bytes, weighted: (
                empty_outputs(hidden, weight, plan, kept_bytes)
            ),
        ),
        "linear_label_margins_backward": (
            backward,
            lambda dmargins, hidden, weight, labels, bias, *rest: empty_gradients(
                hidden, weight, bias, rest[-1]
            ),
        ),
        "frozen_head_backward": (
            frozen_head_backward,
            lambda dmargins, labels, ignored, stats, rows, dtype: rows.new_empty(
                rows.shape, dtype=dtype
            ),
        ),
    }
    register(_library, implementations)
    torch.library.register_autograd(
        "fastadapt::linear_label_margins", _gradient, setup_context=_save, lib=_library
    )
    for name in ("linear_label_margins_backward", "frozen_head_backward"):
        torch.library.register_autograd(
            f"fastadapt::{name}", no_double_backward("label margins"), lib=_library
        )
    for key in ("AutocastCPU", "AutocastCUDA"):
        _library.impl("linear_label_margins", _autocast, key)


_register()
linear_label_margins = torch.ops.fastadapt.linear_label_margins
