"""The operator under `linear_mle_loss`, whose gradients are made in the forward, and its plan.

The loss is a sum over rows, so that nothing is left to wait for: rows are taken by blocks whose
logits are all held, each block is scored and differentiated at once by `driver.py`, and its
gradients are added to sums in float32 (float64). The backward multiplies the sums by the one number
that comes from above, a divisor in it, and rounds them once.

With 1M = one product of N H V: 1M for the logits and 1M each for dhidden and dweight.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastadapt._ops.common import (
    WAITS,
    Implementations,
    check_ids,
    device_of,
    no_double_backward,
    register_autocast,
    register_everywhere,
)
from fastadapt._ops.linear.cuda import work_of
from fastadapt._ops.linear.driver import (
    FORWARD_ONLY,
    RECOMPUTE,
    Asked,
    Upstream,
    backward,
    forward,
)
from fastadapt._ops.linear.gradients import Triple, empty_gradients
from fastadapt._ops.linear.operator import (
    CASTS,
    MASTERS,
    PROBLEM,
)
from fastadapt._ops.linear.plans import SMALL_BYTES, LinearPlan, cast_bytes, dtype_of
from fastadapt._ops.linear.tiles import Problem, RowWork, places_of
from fastadapt._ops.linear.values import Listed

_PLACES = tuple(map(Problem._fields.index, CASTS))  # of what has gradients

_library = torch.library.Library("fastadapt", "FRAGMENT")
_library.define(
    f"linear_mle({PROBLEM}, *, float z_loss, float label_smoothing, int? memory_budget,"
    " bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=WAITS,
)
_library.define(
    "scaled_gradient(Tensor sums, Tensor factor, Tensor loss, ScalarType dtype) -> Tensor"
)


class Terms(NamedTuple):
    """What a row's loss has beside -log p."""

    z_loss: float  # times the square of the log-sum-exp
    label_smoothing: float  # the share of the mean of -log p over all ids


def block_rows(
    work: type[RowWork], h: int, v: int, itemsize: int, memory_budget: int | None
) -> int:
    """Returns how many rows are taken at once; a function of the head alone.

    Left to us, their logits are as many as the head has weights: its gradient is read and written
    for each block, 2 H V numbers for 3 H V products of each row.
    """
    budget = max(SMALL_BYTES, h * v * itemsize) if memory_budget is None else memory_budget
    return max(1, budget // (v * itemsize) // work.rows) * work.rows


def sum_of_losses(
    work: type[RowWork],
    problem: Problem,
    terms: Terms,
    wanted: list[bool],
    memory_budget: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes the sum of the rows' losses, (), and the wanted gradients of it, not rounded.

    Rows that are ignored are dropped first; on a GPU that waits for the device.
    """
    out, dhidden, dweight, dbias = _empty_sums(problem, wanted)
    for x in (dweight, dbias):
        x.zero_()
    index = places_of(problem.used)
    if index is not None:
        rows, labels = (x.index_select(0, index) for x in (problem.hidden, problem.labels))
        problem = problem._replace(hidden=rows, labels=labels)
    (n, h), v = problem.hidden.shape, problem.weight.shape[0]
    block = max(n, 1)
    if any(wanted):
        block = block_rows(work, h, v, problem.hidden.element_size(), memory_budget)
    mine = dhidden if index is None or not wanted[0] else dhidden.new_zeros(n, h)
    total = out.new_zeros((), dtype=torch.float64)
    for begin in range(0, n, block):
        part = slice(begin, begin + block)
        some = problem._replace(hidden=problem.hidden[part], labels=problem.labels[part])
        total += _block(work, some, terms, wanted, (mine[part], dweight, dbias))
    if terms.label_smoothing:
        total += _smooth(work, problem, terms.label_smoothing, (mine, dweight, dbias))
    if mine is not dhidden:
        work.scatter(mine, None, index, dhidden)
    return out.copy_(total), dhidden, dweight, dbias


def _block(
    work: type[RowWork], problem: Problem, terms: Terms, wanted: list[bool], totals: Triple
) -> Tensor:
    """Returns a block's sum of losses, (), and adds its gradients to the totals."""
    logits = problem.hidden.shape[0] * problem.weight.shape[0] * problem.hidden.element_size()
    plan = RECOMPUTE if any(wanted) else FORWARD_ONLY
    own, others, moments, stats, kept = forward(work, problem, Asked(plan, logits, False, False))
    listed = Listed(own, others, moments)
    m, lse = listed.set_log_odds(), listed.logsumexp()
    p, rest = m.sigmoid(), (-m).sigmoid()
    losses = -torch.nn.functional.logsigmoid(m)
    # d lse / down = p and d lse / dothers = rest
    by_lse = torch.full_like(m, terms.label_smoothing)
    if terms.label_smoothing:
        losses = (1 - terms.label_smoothing) * losses + terms.label_smoothing * lse
    if terms.z_loss:
        losses = losses + terms.z_loss * lse.square()
        by_lse += 2 * terms.z_loss * lse
    if any(wanted):
        down = by_lse * p - (1 - terms.label_smoothing) * rest
        dothers = rest * (1 - terms.label_smoothing + by_lse)
        upstream = Upstream(down[:, None], dothers, None)
        backward(work, problem, upstream, own, stats, kept, wanted, totals)
    return losses.sum()


def _smooth(work: type[RowWork], problem: Problem, share: float, totals: Triple) -> Tensor:
    """Returns what the mean of each row's logits takes from the sum of losses, and adds its part.

    The mean of h W_j over j is h times the mean of W_j, so that no logit is needed.
    """
    dhidden, dweight, dbias = totals
    (n, h), v = problem.hidden.shape, problem.weight.shape[0]
    share *= problem.logit_scale
    sums = [problem.hidden.new_zeros(h, dtype=torch.float64) for _ in range(2)]
    for x, total in zip((problem.hidden, problem.weight), sums, strict=True):
        for begin in range(0, x.shape[0], work.tile):
            total += x[begin : begin + work.tile].sum(0, dtype=torch.float64)
    of_rows, of_head = sums[0], sums[1] / v
    mean_bias = 0.0 if problem.bias is None else problem.bias.mean(dtype=torch.float64)
    if dhidden.numel():
        dhidden -= (share * of_head).to(dhidden.dtype)
    if dweight.numel():
        dweight -= (share / v * of_rows).to(dweight.dtype)
    if dbias.numel():
        dbias -= share * n / v
    return -share * (of_rows @ of_head + n * mean_bias)


def _empty_sums(problem: Problem, wanted: list[bool]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Allocates the loss and the gradients, those that are not wanted without numbers."""
    wide = torch.promote_types(problem.hidden.dtype, torch.float32)
    made = empty_gradients(problem.hidden, problem.weight, problem.bias, wanted, dtype=wide)
    return problem.hidden.new_empty((), dtype=wide), *made


def _forward(
    *inputs: Any,
    z_loss: float,
    label_smoothing: float,
    memory_budget: int | None,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Labels are checked before any work, but not on a GPU, which that would wait for."""
    problem = Problem(*inputs)
    problem = problem._replace(labels=problem.labels.contiguous())
    if not problem.hidden.is_cuda:
        check_ids("labels", problem.labels, problem.weight.shape[0], problem.ignore_index)
    terms = Terms(z_loss, label_smoothing)
    with device_of(problem.hidden):
        return sum_of_losses(work_of(problem.hidden), problem, terms, wanted, memory_budget)


def _empty_outputs(
    *inputs: Any, wanted: list[bool], **_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the forward returns."""
    return _empty_sums(Problem(*inputs), wanted)


def _scaled(sums: Tensor, factor: Tensor, loss: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns factor times the sums, rounded once.

    Of the loss nothing is read: it ties the gradient to what it is the gradient of, so that another
    backward through it is refused and does not end here, in zeros.
    """
    out = _empty_scaled(sums, factor, loss, dtype)
    rows = sums.view(-1, sums.shape[-1])
    gain = factor.double().expand(rows.shape[0]).contiguous()
    with device_of(sums):
        work_of(sums).scatter(rows, gain, None, out.view(rows.shape))
    return out


def _empty_scaled(sums: Tensor, factor: Tensor, loss: Tensor, dtype: torch.dtype) -> Tensor:
    """What that returns."""
    return sums.new_empty(sums.shape, dtype=dtype)


def _save(
    ctx: Any,
    inputs: tuple[Any, ...],
    keyword_only_inputs: dict[str, Any],
    output: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    """Of the inputs nothing is needed again, but their dtype; the loss is for `_scaled`."""
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output)
    ctx.wanted = keyword_only_inputs["wanted"]
    ctx.dtypes = [None if inputs[place] is None else inputs[place].dtype for place in _PLACES]


def _gradient(ctx: Any, dloss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    """Gradients of hidden, weight and bias, each only when wanted."""
    gradients: list[Tensor | None] = [None] * len(Problem._fields)
    loss, *found = ctx.saved_tensors
    for place, sums, made, dtype in zip(_PLACES, found, ctx.wanted, ctx.dtypes, strict=True):
        if not ctx.needs_input_grad[place] or dloss is None:
            continue
        if not made:
            name = Problem._fields[place]
            raise RuntimeError(
                f"linear_mle_loss: expected no gradient of {name}, got one; the forward made none"
            )
        gradients[place] = torch.ops.fastadapt.scaled_gradient(sums, dloss, loss, dtype)
    return tuple(gradients)


def _register() -> None:
    """Implementations, fakes, autograd and autocast; `work_of` tells devices apart."""
    implementations: Implementations = {
        "linear_mle": (_forward, _empty_outputs),
        "scaled_gradient": (_scaled, _empty_scaled),
    }
    register_everywhere(_library, implementations)
    torch.library.register_autograd(
        "fastadapt::linear_mle", _gradient, setup_context=_save, lib=_library
    )
    torch.library.register_autograd(
        "fastadapt::scaled_gradient", no_double_backward("linear_mle_loss"), lib=_library
    )
    register_autocast(_library, "linear_mle", Problem, CASTS, MASTERS)


_register()
linear_mle = torch.ops.fastadapt.linear_mle


def wanted_of(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> list[bool]:
    """Which gradients the backward will want, of hidden, weight and bias."""
    inputs = (hidden, weight, bias)
    return [x is not None and x.requires_grad and torch.is_grad_enabled() for x in inputs]


def plan_of(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    memory_budget: int | None = None,
) -> LinearPlan:
    """Returns what `linear_mle_loss` will do with these arguments.

    It is named "gradients in the forward" or, where none is wanted, "forward only"; `kept_bytes`
    are the sums of the gradients, in float32 (float64), from the forward to the backward.

    Examples:
        >>> from fastadapt.losses.linear_mle import plan_of
        >>> hidden = torch.zeros(16_384, 576, requires_grad=True)
        >>> plan_of(hidden, torch.zeros(49_152, 576, requires_grad=True)).products
        3.0

    Args:
        hidden (Tensor): (..., H), as for `linear_mle_loss`; only shape, dtype, device and
            whether a gradient is wanted matter, of the others too.
        weight (Tensor): (V, H).
        bias (Tensor | None): (V,).
        memory_budget (int | None): bytes.
    """
    hidden = hidden.reshape(-1, hidden.shape[-1])
    (n, h), v = hidden.shape, weight.shape[0]
    itemsize, held = dtype_of(hidden, weight).itemsize, cast_bytes(hidden, weight)
    work, wanted = work_of(hidden), wanted_of(hidden, weight, bias)
    if not any(wanted):
        return LinearPlan("forward only", 1.0, 0, held + work.scratch_bytes(n, v, itemsize)[0])
    rows = min(n, block_rows(work, h, v, itemsize, memory_budget))
    wide = torch.promote_types(weight.dtype, torch.float32).itemsize
    sums = wide * sum(x * y for x, y in zip(wanted, (n * h, v * h, v), strict=True))
    peak = held + sums + rows * v * itemsize + max(work.scratch_bytes(rows, v, itemsize))
    return LinearPlan("gradients in the forward", 1.0 + wanted[0] + wanted[1], sums, peak)
