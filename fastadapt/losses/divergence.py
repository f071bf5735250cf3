"""Distillation: the divergence of a student's next tokens from a teacher's, without logits."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fastadapt._ops.checks import (
    alike,
    head_rows,
    instance,
    lora_fits,
    lora_parts,
    number,
    one_of,
    per_row,
    rows_of_head,
)
from fastadapt._ops.linear import divergence as divergence_ops
from fastadapt._ops.linear.divergence import KINDS
from fastadapt._ops.linear.divergence import plan_of as plan_of
from fastadapt._ops.linear.plans import low_rank
from fastadapt._ops.linear.tiles import Lora, LowRank
from fastadapt._ops.linear.vocab_parallel import is_distributed


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
    """Returns a student's divergence from a teacher, one value a row, without their logits.

    With `z = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap)`, its distribution
    `p = softmax(z / temperature)` and the teacher's `q` alike, a row has, in nats,

    - "kl": KL(q || p) = sum of q ln(q / p), which spreads the student over what the teacher does;
    - "reverse_kl": KL(p || q), which keeps it to what the teacher finds likely;
    - "jsd": beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p, the generalised
      Jensen-Shannon divergence of Agarwal et al. 2024 (arXiv 2306.13649, equation 1). As in trl's
      GKD, beta = 0 is "kl" and beta = 1 is "reverse_kl", to which it tends when it is divided by
      beta or by 1 - beta.

    The temperature divides both logits, and nothing is multiplied by its square. 0 ln 0 is 0: an id
    that both forbid (a bias of -inf) adds nothing. One that only the teacher allows with "kl", or
    only the student with "reverse_kl", makes the value +inf, with the latter without a finite
    gradient. What lies more than 87 nats below the largest logit of a tile counts as 0, except in
    float64. A row whose logits are NaN, +inf or all -inf is NaN.

    Logits are made tile by tile, 2048 ids at a time (8192 on CUDA), by torch's products: in the
    dtype of the inputs on the CPU, in float32 on CUDA (TF32 of float32 inputs if torch is told to
    use it; half precision needs torch 2.8). Sums are float32 over at most 1024 logits of a row
    (a tile on CUDA) and float64 beyond; float64 inputs are float64 throughout. Equal heads give 0
    where their logits are the same bits, else 2e-7 or so; no value is negative.

    With 1M = one product of N * H * V the forward takes 2M and the backward 4M, 3M where the
    student's head is frozen: logits are made again, not kept. On CUDA the forward of "jsd" makes
    them twice. Beside inputs and gradients are held two tiles of logits, with "jsd" on the CPU the
    logits of as many rows as fit 128 MiB, and in the backward N H numbers of float32;
    `fastadapt.losses.divergence.plan_of` tells both. The gradient of each block of the head
    is finished in one product and rounded once. Rows that do not count, and in the backward those
    without an upstream gradient, are dropped before the first product; on CUDA that waits for the
    device. A row depends on no other as far as torch's products compute equal rows alike.

    Examples:
        >>> hidden, teacher_hidden = torch.zeros(2, 4), torch.ones(2, 8)
        >>> weight, teacher_weight = torch.zeros(3, 4), torch.eye(3, 8)
        >>> mask = torch.tensor([True, False])
        >>> linear_divergence(hidden, weight, teacher_hidden, 2 * teacher_weight, mask=mask)
        tensor([0., 0.])
        >>> teacher_weight[0] *= 3
        >>> linear_divergence(hidden, weight, teacher_hidden, teacher_weight, kind="jsd")
        tensor([0.1087, 0.1087])

    Args:
        hidden (Tensor): (..., H), float32, bfloat16, float16, or float64 (for checks). Under
            autocast all of these and the next three are cast to its dtype; a float32 head tile by
            tile, so that no copy of it is held, the student's with a float32 gradient.
        weight (Tensor): (V, H), dtype of `hidden`; or float32 over half hidden states, which are
            then taken as float32, products too. The same of the teacher's.
        teacher_hidden (Tensor): (..., H of the teacher), dtype and leading shape of `hidden`. The
            teacher is a constant: an input of its that requires a gradient is refused.
        teacher_weight (Tensor): (V, H of the teacher), dtype of `hidden`; `weight.detach()`
            for a head of both.
        bias (Tensor | None): (V,), dtype of `hidden`; -inf forbids an id.
        teacher_bias (Tensor | None): (V,), dtype of `hidden`.
        softcap (float | None): above 0, bounds the student's logits smoothly.
        logit_scale (float): finite, multiplies the student's logits before the cap.
        teacher_softcap (float | None): as `softcap`.
        teacher_logit_scale (float): as `logit_scale`.
        temperature (float): above 0, divides both logits after the caps.
        kind (str): "kl", "reverse_kl" or "jsd".
        beta (float): in [0, 1], the teacher's share in the mixture of "jsd"; else of no effect.
        mask (Tensor | None): `hidden.shape[:-1]`, bool, the rows that count; the others are 0 and
            have no gradient. None: all.
        lora (tuple[Tensor, Tensor, float] | None): (A, B, scale) of a LoRA adapter of the student's
            head, as in `linear_log_odds`: `scale * (hidden @ A.T) @ B.T` is added to the products.
            A trained A takes hidden states that are finite, in rows that do not count too.
        teacher_lora (tuple[Tensor, Tensor, float] | None): the same of the teacher's head; a
            constant.

    Returns:
        Tensor: `hidden.shape[:-1]`, float32 (float64 for float64 inputs), nats, in [0, +inf], at
        most ln 2 with "jsd". Differentiable in `hidden`, `weight`, `bias` and the student's
        adapter; raises when differentiated twice.

    Raises:
        TypeError: inputs of another dtype than `hidden`'s, a kind that is no string.
        ValueError: shapes or devices that do not agree, a teacher that requires a gradient, an
            unknown kind, a number out of its range.
    """
    for name, given in (("weight", weight), ("teacher_weight", teacher_weight)):
        instance(name, given, Tensor, "a Tensor")
        if is_distributed(given):
            raise ValueError(f"{name}: expected a whole head, got a DTensor; gather it first")
    for name, vector in (("bias", bias), ("teacher_bias", teacher_bias)):
        if vector is not None:
            instance(name, vector, Tensor, "a Tensor or None")
    rows = head_rows(hidden, weight, bias, empty=False)
    teacher_rows = rows_of_head("teacher_hidden", teacher_hidden, teacher_weight)
    if hidden.shape[:-1] != teacher_hidden.shape[:-1]:
        expected = (*hidden.shape[:-1], teacher_hidden.shape[-1])
        raise ValueError(
            f"teacher_hidden: expected shape {expected}, got {tuple(teacher_hidden.shape)}"
        )
    _check_teacher(rows, weight.shape[0], teacher_rows, teacher_weight, teacher_bias)
    flat = None if mask is None else per_row("mask", mask, torch.bool, hidden.shape[:-1], rows)
    low = _low_rank("lora", lora, rows, weight)
    teacher_low = _low_rank("teacher_lora", teacher_lora, teacher_rows, teacher_weight)
    if teacher_lora is not None:
        _is_constant({"teacher_lora[0]": teacher_lora[0], "teacher_lora[1]": teacher_lora[1]})
    temperature = float(number("temperature", temperature, positive=True))
    one_of("kind", kind, tuple(KINDS))
    beta = float(number("beta", beta))
    if beta > 1:
        raise ValueError(f"beta: expected a value in [0, 1], got {beta}")
    if kind == "jsd" and beta in (0.0, 1.0):
        kind = "reverse_kl" if beta else "kl"
    values: Tensor
    values, _ = divergence_ops.linear_divergence(
        rows,
        weight,
        bias,
        teacher_rows,
        teacher_weight,
        teacher_bias,
        flat,
        _cap("softcap", softcap) / temperature,
        float(number("logit_scale", logit_scale, signed=True)) / temperature,
        _cap("teacher_softcap", teacher_softcap) / temperature,
        float(number("teacher_logit_scale", teacher_logit_scale, signed=True)) / temperature,
        KINDS[kind],
        beta,
        *(low or (None, None)),
        *(teacher_low or (None, None)),
    )
    return values.view(hidden.shape[:-1])


def _cap(name: str, softcap: float | None) -> float:
    """Returns a cap as the operator has it, 0 for none."""
    return 0.0 if softcap is None else float(number(name, softcap, positive=True))


def _check_teacher(
    rows: Tensor, v: int, teacher_rows: Tensor, weight: Tensor, bias: Tensor | None
) -> None:
    """Checks a teacher against the student's rows and number of ids; it has no gradient."""
    h = teacher_rows.shape[1]
    if weight.shape != (v, h):
        raise ValueError(f"teacher_weight: expected shape ({v}, {h}), got {tuple(weight.shape)}")
    if bias is not None and bias.shape != (v,):
        raise ValueError(f"teacher_bias: expected shape ({v},), got {tuple(bias.shape)}")
    given = {"teacher_weight": weight, "teacher_hidden": teacher_rows, "teacher_bias": bias}
    alike(rows, given)
    _is_constant(given)


def _low_rank(name: str, lora: Lora | None, rows: Tensor, weight: Tensor) -> LowRank | None:
    """Checks an adapter against the rows and the head beside it, and makes its states."""
    if lora is not None:
        lora_parts(name, lora)
        for i in range(2):
            if is_distributed(lora[i]):
                raise ValueError(f"{name}[{i}]: expected a whole tensor, got a DTensor")
        lora_fits(name, rows, weight, *lora[:2])
    return low_rank(rows, lora)


def _is_constant(given: Mapping[str, Tensor | None]) -> None:
    """Raises for what a teacher has that requires a gradient."""
    for name, x in given.items():
        if x is not None and x.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name}: expected a teacher without a gradient, got requires_grad=True; detach it"
            )
