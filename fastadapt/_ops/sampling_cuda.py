"""The operators of sampling for CUDA tensors: outputs, and the Triton kernels that fill them.

Triton is imported when the first CUDA tensor meets an operator. `plan`, a `triton.launch.Plan`, is
for tests: they run the same functions under Triton's interpreter on small sizes.
"""

from typing import Any

import torch
from torch import Tensor

from fastadapt._ops.common import device_of, filled, given
from fastadapt._ops.filter_code import joined, order_of
from fastadapt._ops.outputs import (
    LogOdds,
    Scores,
    log_odds_outputs,
    sample_fields,
    sample_outputs,
    score_outputs,
)


def filter_logits(logits: Tensor, knobs: Tensor, order: int, *, plan: Any = None) -> Tensor:
    """(N, V) in the dtype of the logits."""
    from fastadapt._ops.triton import launch

    out = logits.new_empty(logits.shape)
    return filled(out, launch.filter_logits, logits, knobs, order, plan=plan)


def sample(
    logits: Tensor,
    knobs: Tensor,
    order: int,
    seeds: Tensor,
    positions: Tensor | None,
    base_logprobs: bool,
    log_mass: bool,
    top_n: int,
    *,
    plan: Any = None,
) -> list[Tensor]:
    """Draws; only what was asked for is computed."""
    from fastadapt._ops.triton import launch

    out = sample_outputs(logits, base_logprobs, log_mass, top_n)
    base, mass, *top = sample_fields(out, base_logprobs, log_mass, top_n)[4:]
    with device_of(logits):
        launch.sample(
            *(logits, knobs, order, seeds, positions, out[:4], base, mass),
            [field for field in top if field is not None],
            **given(plan),
        )
    return out


def score(
    logits: Tensor,
    tokens: Tensor,
    knobs: list[Tensor],
    orders: list[int],
    ignore_index: int,
    *,
    plan: Any = None,
) -> Scores:
    """All adaptors of one order at a time."""
    from fastadapt._ops.triton import launch

    out = score_outputs(logits, len(knobs))
    for order in sorted({order_of(code) for code in orders}):
        members = [i for i, code in enumerate(orders) if order_of(code) == order]
        code = joined(orders[i] for i in members)
        rows = max(knobs[i].shape[1] for i in members)
        packed = torch.stack([knobs[i].expand(-1, rows) for i in members])
        part = out if len(members) == len(knobs) else score_outputs(logits, len(members))
        filled(part, launch.score, logits, tokens, packed, code, ignore_index, plan=plan)
        if part is not out:
            for whole, some in zip(out[:3], part[:3], strict=True):
                for column, i in enumerate(members):
                    whole[:, i] = some[:, column]
            out = (*out[:3], *part[3:])
    return out


def adapted_log_odds(
    logits: Tensor,
    tokens: Tensor,
    knobs: Tensor,
    order: int,
    ignore_index: int,
    *,
    plan: Any = None,
) -> LogOdds:
    """Forward; the last two outputs are what the backward needs."""
    from fastadapt._ops.triton import launch

    arguments = logits, tokens, knobs, order, ignore_index
    return filled(log_odds_outputs(logits), launch.adapted_log_odds, *arguments, plan=plan)


def adapted_log_odds_backward(
    dlog_odds: Tensor,
    logits: Tensor,
    tokens: Tensor,
    knobs: Tensor,
    order: int,
    ignore_index: int,
    support: Tensor,
    stats: Tensor,
    *,
    plan: Any = None,
) -> Tensor:
    """One read of the logits, one write of their gradient."""
    from fastadapt._ops.triton import launch

    out = logits.new_empty(logits.shape)
    arguments = dlog_odds.contiguous(), logits, tokens, knobs, ignore_index, support, stats
    return filled(out, launch.adapted_log_odds_backward, *arguments, plan=plan)
