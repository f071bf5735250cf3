"""The operators of margins of logits for CUDA tensors.

`plan`, a `kernels.launch_losses.Plan`, is for tests as in `cuda_ops`.
"""

from typing import Any

from torch import Tensor

from fastadapt.cuda_ops import device_of, given
from fastadapt.outputs import Pair, candidate_outputs, label_outputs


def label_margins(logits: Tensor, labels: Tensor, ignore_index: int, *, plan: Any = None) -> Pair:
    """One read of the logits."""
    from fastadapt.kernels import launch_losses

    out = label_outputs(logits)
    with device_of(logits):
        launch_losses.label_margins(logits, labels, ignore_index, out, **given(plan))
    return out


def label_margins_backward(
    dmargins: Tensor,
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    stats: Tensor,
    *,
    plan: Any = None,
) -> Tensor:
    """One read of the logits, one write of their gradient."""
    from fastadapt.kernels import launch_losses

    out = logits.new_empty(logits.shape)
    with device_of(logits):
        launch_losses.label_margins_backward(
            dmargins.contiguous(), logits, labels, ignore_index, stats, out, **given(plan)
        )
    return out


def candidate_margins(
    logits: Tensor, index: Tensor, mask: Tensor | None, *, plan: Any = None
) -> Pair:
    """One read of the logits."""
    from fastadapt.kernels import launch_losses

    out = candidate_outputs(logits, index)
    with device_of(logits):
        launch_losses.candidate_margins(logits, index, mask, out, **given(plan))
    return out


def candidate_margins_backward(
    dmargins: Tensor,
    logits: Tensor,
    index: Tensor,
    mask: Tensor | None,
    stats: Tensor,
    *,
    plan: Any = None,
) -> Tensor:
    """One read of the logits, one write of their gradient; the candidates' own entries after it."""
    from fastadapt.kernels import launch_losses

    out = logits.new_empty(logits.shape)
    with device_of(logits):
        launch_losses.candidate_margins_backward(
            dmargins.contiguous(), logits, index, mask, stats, out, **given(plan)
        )
    return out
