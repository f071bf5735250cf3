"""The operators under the losses that take logits: log-odds of labels and of candidates.

As in `sampling`: one schema each, chosen by device; arguments come checked and folded by
`fastadapt.log_odds`.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastadapt import _C
from fastadapt._ops.common import (
    Implementations,
    check_ids,
    no_double_backward,
    register,
    rows_of,
)
from fastadapt._ops.outputs import Pair, label_outputs, logits_gradient

_library = torch.library.Library("fastadapt", "FRAGMENT")
_library.define(
    "label_log_odds(Tensor logits, Tensor labels, int ignore_index) -> (Tensor, Tensor)"
)
_library.define(
    "label_log_odds_backward(Tensor dlog_odds, Tensor logits, Tensor labels, int ignore_index,"
    " Tensor stats) -> Tensor"
)
_library.define("candidate_log_odds(Tensor logits, Tensor index, Tensor? mask) -> (Tensor, Tensor)")
_library.define(
    "candidate_log_odds_backward(Tensor dlog_odds, Tensor logits, Tensor index, Tensor? mask,"
    " Tensor stats) -> Tensor"
)


def _label_log_odds_cpu(logits: Tensor, labels: Tensor, ignore_index: int) -> Pair:
    """Computes the labels' log-odds in one read of the logits."""
    check_ids("labels", labels, logits.shape[1], ignore_index)
    log_odds, stats = out = label_outputs(logits, labels)
    _C.label_log_odds(
        rows=rows_of(logits),
        labels=labels,
        ignore_index=ignore_index,
        log_odds=log_odds,
        stats=stats,
        num_threads=torch.get_num_threads(),
    )
    return out


def _label_log_odds_backward_cpu(
    dlog_odds: Tensor, logits: Tensor, labels: Tensor, ignore_index: int, stats: Tensor
) -> Tensor:
    """Computes the gradient in one read of the logits and one write."""
    out = logits.new_empty(logits.shape)
    _C.label_log_odds_backward(
        rows=rows_of(logits),
        labels=labels,
        ignore_index=ignore_index,
        dlog_odds=dlog_odds.contiguous(),
        stats=stats,
        dlogits=out,
        num_threads=torch.get_num_threads(),
    )
    return out


def _candidate_log_odds_cpu(logits: Tensor, index: Tensor, mask: Tensor | None) -> Pair:
    """Computes the candidates' log-odds in two reads, the second from cache."""
    used = index if mask is None else torch.where(mask, index, 0)
    if index.numel():
        check_ids("index", used, logits.shape[1], None)
    log_odds, stats = out = label_outputs(logits, index)
    _C.candidate_log_odds(
        rows=rows_of(logits),
        k=index.shape[1],
        index=index,
        mask=mask,
        log_odds=log_odds,
        stats=stats,
        num_threads=torch.get_num_threads(),
    )
    return out


def _candidate_log_odds_backward_cpu(
    dlog_odds: Tensor, logits: Tensor, index: Tensor, mask: Tensor | None, stats: Tensor
) -> Tensor:
    """Computes the gradient in one read of the logits and one write."""
    out = logits.new_empty(logits.shape)
    _C.candidate_log_odds_backward(
        rows=rows_of(logits),
        k=index.shape[1],
        index=index,
        mask=mask,
        dlog_odds=dlog_odds.contiguous(),
        stats=stats,
        dlogits=out,
        num_threads=torch.get_num_threads(),
    )
    return out


def _save_label(ctx: Any, inputs: tuple[Any, ...], output: Pair) -> None:
    """Saves the logits and four numbers per row."""
    logits, labels, ctx.ignore_index = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(logits, labels, output[1])


def _label_gradient(ctx: Any, dlog_odds: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    """Returns dL/dlogits = dL/dm (onehot(y) - q)."""
    logits, labels, stats = ctx.saved_tensors
    dlogits = torch.ops.fastadapt.label_log_odds_backward(
        dlog_odds, logits, labels, ctx.ignore_index, stats
    )
    return dlogits, None, None


def _save_candidates(ctx: Any, inputs: tuple[Any, ...], output: Pair) -> None:
    """Saves the logits and four numbers per row."""
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs, output[1])


def _candidate_gradient(ctx: Any, dlog_odds: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    """Returns dL/dlogits, the sum over candidates of dL/dm_c (onehot(c) - q_c)."""
    dlogits = torch.ops.fastadapt.candidate_log_odds_backward(dlog_odds, *ctx.saved_tensors)
    return dlogits, None, None


def _launches() -> ModuleType:
    """Those for CUDA tensors."""
    from fastadapt._ops.triton import launch_losses

    return launch_losses


OPERATORS: Implementations = {
    "label_log_odds": (_label_log_odds_cpu, lambda x, labels, ignored: label_outputs(x, labels)),
    "label_log_odds_backward": (_label_log_odds_backward_cpu, logits_gradient),
    "candidate_log_odds": (_candidate_log_odds_cpu, lambda x, index, mask: label_outputs(x, index)),
    "candidate_log_odds_backward": (_candidate_log_odds_backward_cpu, logits_gradient),
}


def _register() -> None:
    """Implementations, fakes and autograd."""
    register(_library, OPERATORS, _launches)
    gradients = {
        "label_log_odds": (_label_gradient, _save_label),
        "candidate_log_odds": (_candidate_gradient, _save_candidates),
    }
    for name, (gradient, save) in gradients.items():
        torch.library.register_autograd(
            f"fastadapt::{name}", gradient, setup_context=save, lib=_library
        )
        torch.library.register_autograd(
            f"fastadapt::{name}_backward", no_double_backward("label log_odds"), lib=_library
        )


_register()
label_log_odds = torch.ops.fastadapt.label_log_odds
candidate_log_odds = torch.ops.fastadapt.candidate_log_odds
