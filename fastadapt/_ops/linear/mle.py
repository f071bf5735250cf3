"""The operator under `linear_mle_loss`, whose gradients are made in the forward, and its plan.

The loss is a sum over rows, so that nothing is left to wait for: rows are taken by blocks whose
logits are all held, each block is scored and differentiated at once by `driver.py`, and its
gradients are added to sums in float32 (float64). The backward multiplies the sums by the one number
that comes from above, a divisor in it, and rounds them once.

With 1M = one product of N H V: 1M for the logits and 1M each for dhidden and dweight. An adapter's
gradients are both made where any is.
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
from fastadapt._ops.linear.gradients import Quintuple, empty_gradients, empty_low_gradients
from fastadapt._ops.linear.operator import CASTS, LOW, MASTERS, PLACES, PROBLEM
from fastadapt._ops.linear.plans import SMALL_BYTES, LinearPlan, cast_bytes, dtype_of, low_bytes
from fastadapt._ops.linear.tiles import Problem, RowWork, places_of
from fastadapt._ops.linear.values import Listed

_library = torch.library.Library("fastadapt", "FRAGMENT")
_library.define(
    f"linear_mle({PROBLEM}, {LOW}, *, float z_loss, float label_smoothing, int? memory_budget,"
    " bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=WAITS,
)
_library.define(
    "scaled_gradient(Tensor sums, Tensor factor, Tensor loss, ScalarType dtype) -> Tensor"
)


Sums = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]  # the loss, and a Quintuple


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
) -> Sums:
    """Computes the sum of the rows' losses, (), and the wanted gradients of it, not rounded.

    Rows that are ignored are dropped first; on a GPU that waits for the device.
    """
    out, dhidden, dweight, dbias, dstates, dlow = _empty_sums(problem, wanted)
    for x in (dweight, dbias, dlow):
        x.zero_()
    index = places_of(problem.used)
    if index is not None:
        problem = _rows(problem, index)
    (n, h), v = problem.hidden.shape, problem.weight.shape[0]
    block = max(n, 1)
    if any(wanted):
        block = block_rows(work, h, v, problem.hidden.element_size(), memory_budget)
    of_rows = [
        x if index is None or not len(x) else x.new_zeros(n, x.shape[1]) for x in (dhidden, dstates)
    ]
    total = out.new_zeros((), dtype=torch.float64)
    for begin in range(0, n, block):
        part = slice(begin, begin + block)
        states, low_states = (x[part] for x in of_rows)
        totals = states, dweight, dbias, low_states, dlow
        total += _block(work, _rows(problem, part), terms, wanted, totals)
    if terms.label_smoothing:
        totals = of_rows[0], dweight, dbias, of_rows[1], dlow
        total += _smooth(work, problem, terms.label_smoothing, totals)
    for x, mine in zip((dhidden, dstates), of_rows, strict=True):
        if mine is not x:
            work.scatter(mine, None, index, x)
    return out.copy_(total), dhidden, dweight, dbias, dstates, dlow


def _rows(problem: Problem, which: Tensor | slice) -> Problem:
    """Selects rows, by their places or a range."""

    def of(x: Tensor) -> Tensor:
        return x[which] if isinstance(which, slice) else x.index_select(0, which)

    low_states = None if problem.low_states is None else of(problem.low_states)
    return problem._replace(
        hidden=of(problem.hidden), labels=of(problem.labels), low_states=low_states
    )


def _block(
    work: type[RowWork], problem: Problem, terms: Terms, wanted: list[bool], totals: Quintuple
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


def _smooth(work: type[RowWork], problem: Problem, share: float, totals: Quintuple) -> Tensor:
    """Returns what the mean of each row's logits takes from the sum of losses, and adds its part.

    The mean of h W_j over j is h times the mean of W_j, so that no logit is needed.
    """
    dhidden, dweight, dbias, dstates, dlow = totals
    n, v = problem.hidden.shape[0], problem.weight.shape[0]
    share *= problem.logit_scale
    products = [(problem.hidden, problem.weight, dhidden, dweight)]
    if problem.low is not None:
        products.append((*problem.low, dstates, dlow))
    mean_bias = 0.0 if problem.bias is None else problem.bias.mean(dtype=torch.float64)
    mean = problem.hidden.new_full((), n, dtype=torch.float64) * mean_bias
    for rows, head, drows, dhead in products:
        of_rows, of_head = _column_sums(rows, work.tile), _column_sums(head, work.tile) / v
        if drows.numel():
            drows -= (share * of_head).to(drows.dtype)
        if dhead.numel():
            dhead -= (share / v * of_rows).to(dhead.dtype)
        mean += of_rows @ of_head
    if dbias.numel():
        dbias -= share * n / v
    return -share * mean


def _column_sums(x: Tensor, block: int) -> Tensor:
    """Returns the sum of all rows, float64, made by blocks of them."""
    total = x.new_zeros(x.shape[1], dtype=torch.float64)
    for begin in range(0, x.shape[0], block):
        total += x[begin : begin + block].sum(0, dtype=torch.float64)
    return total


def _empty_sums(problem: Problem, wanted: list[bool]) -> Sums:
    """Allocates the loss and the gradients, those that are not wanted without numbers."""
    wide = torch.promote_types(problem.hidden.dtype, torch.float32)
    made = empty_gradients(problem.hidden, problem.weight, problem.bias, wanted, dtype=wide)
    low = problem.low if any(wanted) else None
    of_low = empty_low_gradients(low, problem.hidden, dtype=wide)
    return problem.hidden.new_empty((), dtype=wide), *made, *of_low


def _forward(
    *inputs: Any,
    z_loss: float,
    label_smoothing: float,
    memory_budget: int | None,
    wanted: list[bool],
) -> Sums:
    """Labels are checked before any work, but not on a GPU, which that would wait for."""
    problem = Problem(*inputs)
    problem = problem._replace(labels=problem.labels.contiguous())
    if not problem.hidden.is_cuda:
        check_ids("labels", problem.labels, problem.weight.shape[0], problem.ignore_index)
    terms = Terms(z_loss, label_smoothing)
    with device_of(problem.hidden):
        return sum_of_losses(work_of(problem.hidden), problem, terms, wanted, memory_budget)


def _empty_outputs(*inputs: Any, wanted: list[bool], **_: Any) -> Sums:
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
    output: Sums,
) -> None:
    """Of the inputs nothing is needed again, but their dtype; the loss is for `_scaled`."""
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output)
    wanted = keyword_only_inputs["wanted"]
    ctx.wanted = [*wanted[:3], *[any(wanted)] * 2]
    given: tuple[Any, ...] = Problem(*inputs)
    ctx.dtypes = [None if given[i] is None else given[i].dtype for i in PLACES]


def _gradient(ctx: Any, dloss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    """Gradients of hidden, weight, bias and an adapter's two tensors, each only when wanted."""
    gradients: list[Tensor | None] = [None] * len(Problem._fields)
    loss, *found = ctx.saved_tensors
    needs = dict(enumerate(ctx.needs_input_grad))  # cut where there is no adapter
    for place, sums, made, dtype in zip(PLACES, found, ctx.wanted, ctx.dtypes, strict=True):
        if not needs.get(place) or dloss is None:
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


def wanted_of(*inputs: Tensor | None) -> list[bool]:
    """Which gradients the backward will want, of hidden, weight, bias and an adapter's tensors."""
    return [x is not None and x.requires_grad and torch.is_grad_enabled() for x in inputs]


def plan_of(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    memory_budget: int | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,
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
        lora (tuple[Tensor, Tensor, float] | None): (A, B, scale), as for `linear_mle_loss`.
    """
    hidden = hidden.reshape(-1, hidden.shape[-1])
    (n, h), v = hidden.shape, weight.shape[0]
    itemsize, work = dtype_of(hidden, weight).itemsize, work_of(hidden)
    held = cast_bytes(hidden, weight) + low_bytes(hidden, weight, lora)
    wanted = wanted_of(hidden, weight, bias, *(lora[:2] if lora else ()))
    r = lora[0].shape[0] if lora else 0
    one = 1 + r / h
    if not any(wanted):
        return LinearPlan("forward only", one, 0, held + work.scratch_bytes(n, v, itemsize)[0])
    rows = min(n, block_rows(work, h, v, itemsize, memory_budget))
    wide = torch.promote_types(weight.dtype, torch.float32).itemsize
    sums = wide * sum(x * y for x, y in zip(wanted, (n * h, v * h, v), strict=False))
    sums += wide * (n + v) * r
    peak = held + sums + rows * v * itemsize + max(work.scratch_bytes(rows, v, itemsize))
    products = one + wanted[0] + wanted[1] + 2 * r / h
    return LinearPlan("gradients in the forward", products, sums, peak)
