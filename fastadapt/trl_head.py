"""What `fastadapt.trl` puts where trl's models score labels; trl itself is not imported here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastadapt.losses import label_logps
from fastadapt.margins import linear_label_margins

# What the forward of trl 1.16 passes, in this order.
ARGUMENTS = (
    "hidden",
    "weight",
    "bias",
    "targets",
    "temperature",
    "chunk_size",
    "final_logit_softcapping",
    "logit_scale",
    "outputs",
)
_OURS = frozenset({"log_probs", "entropy", "mean_logits", "is_top1"})
_MEAN_ROWS = 1024  # of the head at a time, where its logits are capped

Outputs = tuple[Tensor, Tensor | None, None, Tensor | None, Tensor | None]


class LogProbs:
    """Stands where trl's autograd function does: log-probabilities of labels."""

    @staticmethod
    def apply(*arguments: Any) -> Outputs:
        """Log-probabilities (N,), and what else trl asked for."""
        scored = score(*arguments)
        return (label_logps(scored[0]), *scored[1:])


class Margins:
    """The same with margins where trl has log-probabilities, for `RewardPenalizeTrainer`."""

    @staticmethod
    def apply(*arguments: Any) -> Outputs:
        """Margins (N,), and what else trl asked for."""
        return score(*arguments)


class _WithoutGradient(torch.autograd.Function):
    """Entropy, tied to the hidden states only so that a loss which contains it says so."""

    @staticmethod
    def forward(ctx: Any, entropy: Tensor, hidden: Tensor) -> Tensor:
        """The entropy."""
        return entropy.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """There is none."""
        raise RuntimeError(
            "fused_log_probs: expected a loss without the entropy, which has no gradient here; "
            "train with entropy_coef=0 or outside the block"
        )


def score(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    chunk_size: int,
    softcap: float | None,
    logit_scale: float,
    outputs: Sequence[str],
) -> Outputs:
    """Margins of N rows; entropy, None, mean logit and whether the label is the argmax."""
    missing = sorted(set(outputs) - _OURS)
    if missing:
        raise ValueError(f"outputs: expected some of {sorted(_OURS)}, got {missing} (WPO)")
    if hasattr(weight, "ds_id") and weight.requires_grad:
        raise ValueError("lm_head: expected a frozen one under ZeRO-3, got one that is trained")
    if not torch.is_autocast_enabled(hidden.device.type):
        weight = weight.to(hidden.dtype)
        bias = None if bias is None else bias.to(hidden.dtype)
    # a temperature divides the capped logits: both the cap and what is below it shrink
    scale = logit_scale / temperature
    cap = None if softcap is None else softcap / temperature
    margins, entropy, hit = linear_label_margins(
        hidden,
        weight,
        targets,
        bias,
        softcap=cap,
        logit_scale=scale,
        outputs=("entropy", "hit"),
    )
    tied = None
    if "entropy" in outputs:
        # torch's `apply` has no annotations
        tied = _WithoutGradient.apply(entropy, hidden)  # type: ignore[no-untyped-call]
    mean = None
    if "mean_logits" in outputs:
        with torch.no_grad():
            mean = _mean_logits(hidden, weight, bias, cap, scale)
    return margins, tied, None, mean, hit if "is_top1" in outputs else None


def _mean_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, scale: float
) -> Tensor:
    """(N,) float32: the mean over the vocabulary; linear in the head unless there is a cap."""
    if softcap is None:
        mean = hidden.float() @ weight.mean(0, dtype=torch.float32)
        return scale * (mean if bias is None else mean + bias.float().mean())
    sums = hidden.new_zeros(hidden.shape[0], dtype=torch.float32)
    for first in range(0, weight.shape[0], _MEAN_ROWS):
        ids = slice(first, first + _MEAN_ROWS)
        x = (hidden @ weight[ids].t()).float()
        x = x if bias is None else x + bias[ids].float()
        sums += softcap * torch.tanh(scale * x / softcap).sum(-1)
    return sums / weight.shape[0]
