"""Reference of the divergence of two heads: full logits, log-softmax, autograd."""

import math

import torch
from torch import Tensor

from fastadapt.reference.log_odds import head_logits


def linear_divergence(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
    temperature: float = 1.0,
    kind: str = "kl",
    beta: float = 0.5,
    mask: Tensor | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,
    teacher_lora: tuple[Tensor, Tensor, float] | None = None,
) -> Tensor:
    """Reference of `fastadapt.linear_divergence`; holds both logits, in float32 from there on.

    Examples:
        >>> from fastadapt import reference
        >>> hidden, weight = torch.ones(1, 4), torch.zeros(3, 4)
        >>> reference.linear_divergence(hidden, weight, hidden, torch.eye(3, 4) * 3)
        tensor([0.])
    """
    teacher = teacher_hidden, teacher_weight, teacher_bias, teacher_softcap, teacher_logit_scale
    z = head_logits(hidden, weight, bias, softcap, logit_scale, None, lora)
    other = head_logits(*teacher, None, teacher_lora).detach()
    log_p, log_q = (
        (x if x.dtype == torch.float64 else x.float()).div(temperature).log_softmax(-1)
        for x in (z, other)
    )
    if kind == "kl" or (kind == "jsd" and beta == 0):
        values = _kl(log_q, log_p)
    elif kind == "reverse_kl" or beta == 1:
        values = _kl(log_p, log_q)
    else:
        some = torch.maximum(log_p, log_q) != float(
            "-inf"
        )  # logaddexp of both -inf has no gradient
        log_p, log_q = (torch.where(some, x, -1e4) for x in (log_p, log_q))
        mixture = torch.logaddexp(log_q + math.log(beta), log_p + math.log1p(-beta))
        values = beta * _kl(log_q, mixture) + (1 - beta) * _kl(log_p, mixture)
    return values if mask is None else torch.where(mask, values, 0.0)


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b) of the last dimension; 0 ln 0 is 0, with no gradient."""
    some = log_a != float("-inf")
    a, b = torch.where(some, log_a, 0.0), torch.where(some, log_b, 0.0)
    return torch.where(some, a.exp() * (a - b), 0.0).sum(-1)
