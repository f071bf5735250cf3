"""Maximum likelihood from hidden states, without logits, its gradients made in the forward."""

import torch
from torch import Tensor

from fastadapt._ops.checks import instance, integer, number, one_of, per_row
from fastadapt._ops.linear import mle as mle_ops
from fastadapt._ops.linear.mle import plan_of as plan_of
from fastadapt._ops.linear.plans import low_rank
from fastadapt._ops.linear.vocab_parallel import rows_of_slice
from fastadapt.losses.rows import divisor

REDUCTIONS = ("mean", "sum")


def linear_mle_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    lora: tuple[Tensor, Tensor, float] | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    """Returns the cross-entropy of a linear head in three products, without its (N, V) logits.

    With the logits `z = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap)`, their
    log-sum-exp lse and p = softmax(z), a row with label y has, in nats,

    `(1 - label_smoothing) (-log p_y) + label_smoothing mean_j(-log p_j) + z_loss lse²`,

    the cross-entropy of torch, with the smoothing of Szegedy et al. 2016 (arXiv 1512.00567,
    section 7) and the z-loss of PaLM (Chowdhery et al. 2022, arXiv 2204.02311, section 5; 1e-4
    there, `lse_square_scale` in Liger). It equals `mle_loss` of `linear_log_odds`. As it is known
    in advance that rows are summed, their gradients are made with the logits: with 1M = one product
    of N * H * V it costs 3M for any number of rows, 2M with a frozen head, its adapter trained or
    not, and 1M without gradients, where `linear_log_odds`, which serves any loss, may cost 4M.

    Rows are taken by blocks whose logits are held at once. Ignored rows are dropped before the
    first product. Gradients are summed in float32 (float64), multiplied in the backward by what
    comes from above, and rounded once; on the CPU the products of half precision that are added
    are rounded too, one a block. Beside inputs and returned gradients are held those sums, the
    logits of one block and one tile; `fastadapt.losses.linear_mle.plan_of` tells. Logits and their
    sums are those of `linear_log_odds`, kept in the dtype of the inputs within a block. On CUDA the
    forward waits for the device, to learn how many rows take part; half precision needs torch 2.8.

    Examples:
        >>> hidden = torch.ones(2, 4, requires_grad=True)
        >>> weight = torch.zeros(3, 4, requires_grad=True)
        >>> loss = linear_mle_loss(hidden, weight, torch.tensor([1, -100]))
        >>> loss
        tensor(1.0986, grad_fn=<...>)
        >>> loss.backward()
        >>> weight.grad[:, 0]
        tensor([ 0.3333, -0.6667,  0.3333])

    Args:
        hidden (Tensor): (..., H), float32, bfloat16, float16, or float64 (for checks). Under
            autocast hidden, weight and bias are cast to its dtype; a float32 weight tile by tile.
        weight (Tensor): (V, H), dtype of `hidden`; or float32 over half hidden states, which are
            then taken as float32, products too.
        labels (Tensor): `hidden.shape[:-1]`, int64, the id to score at each position, in [0, V), or
            `ignore_index`. Nothing is shifted: of a causal model it is the next token's, as in
            `hidden[:, :-1]` with `labels[:, 1:]`.
        bias (Tensor | None): (V,), dtype of `weight`.
        softcap (float | None): above 0, bounds the logits smoothly.
        logit_scale (float): finite, multiplies the logits before the cap.
        ignore_index (int): rows with this label add nothing and have no gradient.
        reduction (str): "mean" divides the sum over rows by `num_items`, "sum" does not.
        num_items (int | Tensor | None): what the mean divides by, an integer or a tensor of one,
            such as transformers' `num_items_in_batch`; the losses of micro-batches then add up to
            that of the whole batch. None: the rows that are not ignored.
        z_loss (float): >= 0, times the square of the log-sum-exp.
        label_smoothing (float): in [0, 1]; 0 with a softcap.
        lora (tuple[Tensor, Tensor, float] | None): (A, B, scale) of a LoRA adapter of the head, as
            in `linear_log_odds`: `scale * (hidden @ A.T) @ B.T` is added to the products. A trained
            A takes hidden states that are finite, in ignored rows too.
        memory_budget (int | None): bytes of logits to hold at once; at least those of 64 rows (1024
            on CUDA). None: as many as the head's own, at least 128 MiB.

    Returns:
        Tensor: a scalar, float32 (float64 for float64 inputs), nats; 0 with a graph if no row
        counts. Infinite if a label has a logit of -inf, or with smoothing any id; NaN where a row
        has NaN or +inf, on CUDA also where a label is out of range. Raises when differentiated
        twice.

    Raises:
        TypeError: inputs of another dtype than `hidden`'s.
        ValueError: shapes or devices that do not agree, a head split over ranks, an option out of
            its range; on the CPU a label out of range, before any work.
    """
    options = _checked_options(softcap, logit_scale, z_loss, label_smoothing, memory_budget)
    one_of("reduction", reduction, REDUCTIONS)
    if reduction == "sum" and num_items is not None:
        raise ValueError("num_items: expected None with reduction='sum', which divides by nothing")
    ignore_index = integer("ignore_index", ignore_index)
    instance("labels", labels, Tensor, "a Tensor")
    part, rows = rows_of_slice(hidden, weight, labels, bias, None, lora)
    if part.group is not None:
        raise ValueError("weight: expected a whole head, got a DTensor; linear_log_odds takes it")
    low = low_rank(rows, lora)
    flat = per_row("labels", labels, torch.int64, hidden.shape[:-1], rows)
    total: Tensor = mle_ops.linear_mle(
        rows,
        weight,
        flat[:, None],
        bias,
        0.0 if softcap is None else float(softcap),
        float(logit_scale),
        ignore_index,
        None,
        None,
        *(low or ()),
        **options,
        memory_budget=memory_budget,
        wanted=mle_ops.wanted_of(rows, weight, bias, *(low or ())),
    )[0]
    if reduction == "sum":
        return total
    return total / divisor("num_items", num_items, flat != ignore_index)


def _checked_options(
    softcap: float | None,
    logit_scale: float,
    z_loss: float,
    label_smoothing: float,
    memory_budget: int | None,
) -> dict[str, float]:
    """Checks the numbers, and returns those of the terms of the loss."""
    if softcap is not None:
        number("softcap", softcap, positive=True)
    number("logit_scale", logit_scale, signed=True)
    if memory_budget is not None:
        integer("memory_budget", memory_budget, 0)
    smoothing = float(number("label_smoothing", label_smoothing))
    if smoothing > 1 or (smoothing and softcap is not None):
        expected = "a value in [0, 1]" if smoothing > 1 else "0 with a softcap"
        raise ValueError(f"label_smoothing: expected {expected}, got {label_smoothing}")
    return {"z_loss": float(number("z_loss", z_loss)), "label_smoothing": smoothing}
