"""The operators of log-odds of logits for CUDA tensors.

`plan`, a `triton.launch_losses.Plan`, is for tests as in `sampling_cuda`.
"""

from typing import Any

from torch import Tensor

from fastadapt._ops.common import filled
from fastadapt._ops.outputs import Pair, label_outputs


def label_log_odds(logits: Tensor, labels: Tensor, ignore_index: int, *, plan: Any = None) -> Pair:
    """One read of the logits."""
    from fastadapt._ops.triton import launch_losses

    arguments = logits, labels, ignore_index
    return filled(
        label_outputs(logits, labels), launch_losses.label_log_odds, *arguments, plan=plan
    )


def label_log_odds_backward(
    dlog_odds: Tensor,
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    stats: Tensor,
    *,
    plan: Any = None,
) -> Tensor:
    """One read of the logits, one write of their gradient."""
    from fastadapt._ops.triton import launch_losses

    out = logits.new_empty(logits.shape)
    arguments = dlog_odds.contiguous(), logits, labels, ignore_index, stats
    return filled(out, launch_losses.label_log_odds_backward, *arguments, plan=plan)


def candidate_log_odds(
    logits: Tensor, index: Tensor, mask: Tensor | None, *, plan: Any = None
) -> Pair:
    """One read of the logits."""
    from fastadapt._ops.triton import launch_losses

    out = label_outputs(logits, index)
    return filled(out, launch_losses.candidate_log_odds, logits, index, mask, plan=plan)


def candidate_log_odds_backward(
    dlog_odds: Tensor,
    logits: Tensor,
    index: Tensor,
    mask: Tensor | None,
    stats: Tensor,
    *,
    plan: Any = None,
) -> Tensor:
    """One read of the logits, one write of their gradient; the candidates' own entries after it."""
    from fastadapt._ops.triton import launch_losses

    out = logits.new_empty(logits.shape)
    arguments = dlog_odds.contiguous(), logits, index, mask, stats
    return filled(out, launch_losses.candidate_log_odds_backward, *arguments, plan=plan)
