"""The operators of sampling: one schema each, CPU implementations, fakes and autograd.

PyTorch's dispatcher chooses the implementation by device. Inputs arrive checked and folded by
`sampling`; rows may have any stride, the last dimension is contiguous. Knobs are the packed
(14, R) float64 tensor of an `Adaptor`, an order is its `filter_code`, and the four tensors of a
`RowEdits` come last. Where `whole` is not 0, ids and offsets of what rows keep come behind the
other outputs, none for a row that keeps so many: a whole vocabulary, whose padding is not in the
logits here. Operators without a gradient fall through autograd: their outputs are detached.
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
from fastadapt._ops.filter_code import packed_filters, temperature_last
from fastadapt._ops.lists import joined, unknown
from fastadapt._ops.outputs import (
    LogOdds,
    Pair,
    edited_gradients,
    log_odds_outputs,
    sample_fields,
    sample_outputs,
    score_outputs,
)

_library = torch.library.Library("fastadapt", "DEF")
EDITS = "Tensor? ids, Tensor? offsets, Tensor? columns, Tensor? allowed"  # of a `RowEdits`
_library.define(f"filter_logits(Tensor logits, Tensor knobs, int order, {EDITS}) -> Tensor")
_library.define(
    "sample(Tensor logits, Tensor knobs, int order, Tensor seeds, Tensor? positions,"
    f" bool base_logprobs, bool log_mass, int top_n, int whole, {EDITS}) -> Tensor[]"
)
_library.define(
    "score(Tensor logits, Tensor tokens, Tensor[] knobs, int[] orders, int ignore_index,"
    f" int whole, {EDITS}) -> Tensor[]"
)
_library.define(
    "adapted_log_odds(Tensor logits, Tensor tokens, Tensor knobs, int order, int ignore_index,"
    f" {EDITS}) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "adapted_log_odds_backward(Tensor dlog_odds, Tensor logits, Tensor tokens, Tensor knobs,"
    f" int order, int ignore_index, Tensor support, Tensor stats, {EDITS}, bool of_values)"
    " -> (Tensor, Tensor)"
)


def knobs_of(knobs: Tensor, order: int) -> "_C.Knobs":
    """What the kernels need to know of packed knobs."""
    return knobs, knobs.shape[1], packed_filters(order), temperature_last(order)


def edits_of(
    ids: Tensor | None, offsets: Tensor | None, columns: Tensor | None, allowed: Tensor | None
) -> "_C.Edits | None":
    """What the kernels need to know of a `RowEdits`."""
    if ids is None and allowed is None:
        return None
    given = columns is not None and columns.shape[0] == 1
    count = 0 if ids is None else ids.shape[0]
    stride = 0 if allowed is None else allowed.stride(0)
    return ids, offsets, columns, count, given, allowed, stride


def _filter_logits_cpu(logits: Tensor, knobs: Tensor, order: int, *edits: Tensor | None) -> Tensor:
    """Filters (N, V) logits, in their dtype."""
    out = logits.new_empty(logits.shape)
    _C.filter(
        rows=rows_of(logits),
        knobs=knobs_of(knobs, order),
        edits=edits_of(*edits),
        out=out,
        num_threads=torch.get_num_threads(),
    )
    return out


def _sample_cpu(
    logits: Tensor,
    knobs: Tensor,
    order: int,
    seeds: Tensor,
    positions: Tensor | None,
    base_logprobs: bool,
    log_mass: bool,
    top_n: int,
    whole: int,
    *edits: Tensor | None,
) -> list[Tensor]:
    """Draws a token per row; allocates only the outputs asked for."""
    lists = _C.IdLists(logits.shape[0], whole) if whole else None
    out = sample_outputs(logits, base_logprobs, log_mass, top_n)
    fields = sample_fields(out, base_logprobs, log_mass, top_n)
    tokens, logprobs, kept, status, *asked = fields
    base, mass, top_ids, top_logprobs, rank = asked
    _C.sample(
        rows=rows_of(logits),
        knobs=knobs_of(knobs, order),
        edits=edits_of(*edits),
        seeds=seeds,
        positions=positions,
        tokens=tokens,
        logprobs=logprobs,
        kept=kept,
        status=status,
        base_logprobs=base,
        log_mass=mass,
        top_n=top_n,
        top_ids=top_ids,
        top_logprobs=top_logprobs,
        rank=rank,
        supports=lists,
        num_threads=torch.get_num_threads(),
    )
    return out + joined(lists, logits.shape[0])


def _score_cpu(
    logits: Tensor,
    tokens: Tensor,
    knobs: list[Tensor],
    orders: list[int],
    ignore_index: int,
    whole: int,
    *edits: Tensor | None,
) -> list[Tensor]:
    """Scores tokens under all adaptors in one visit of each row."""
    check_ids("tokens", tokens, logits.shape[1], ignore_index)
    out = score_outputs(logits, len(knobs))
    logprobs, log_norm, kept, base_logprobs, entropy = out
    rows = len(knobs) * logits.shape[0]
    lists = _C.IdLists(rows, whole) if whole else None
    _C.score(
        rows=rows_of(logits),
        knobs=[knobs_of(k, o) for k, o in zip(knobs, orders, strict=True)],
        edits=edits_of(*edits),
        tokens=tokens,
        ignore_index=ignore_index,
        logprobs=logprobs,
        log_norm=log_norm,
        kept=kept,
        base_logprobs=base_logprobs,
        entropy=entropy,
        supports=lists,
        num_threads=torch.get_num_threads(),
    )
    return [*out, *joined(lists, rows)]


def _adapted_log_odds_cpu(
    logits: Tensor,
    tokens: Tensor,
    knobs: Tensor,
    order: int,
    ignore_index: int,
    *edits: Tensor | None,
) -> LogOdds:
    """Computes log-odds on the support; the last two outputs are for the backward."""
    check_ids("tokens", tokens, logits.shape[1], ignore_index)
    log_odds, support, stats = out = log_odds_outputs(logits)
    _C.log_odds(
        rows=rows_of(logits),
        knobs=knobs_of(knobs, order),
        edits=edits_of(*edits),
        tokens=tokens,
        ignore_index=ignore_index,
        log_odds=log_odds,
        support=support,
        stats=stats,
        num_threads=torch.get_num_threads(),
    )
    return out


def _adapted_log_odds_backward_cpu(
    dlog_odds: Tensor,
    logits: Tensor,
    tokens: Tensor,
    knobs: Tensor,
    order: int,
    ignore_index: int,
    support: Tensor,
    stats: Tensor,
    *edits_and: Any,
) -> Pair:
    """Computes the gradient in one read of the logits and one write, and that of given values."""
    *edits, of_values = edits_and
    out, dvalues = edited_gradients(logits, edits[2], of_values)
    _C.log_odds_backward(
        rows=rows_of(logits),
        knobs=knobs_of(knobs, order),
        edits=edits_of(*edits),
        tokens=tokens,
        ignore_index=ignore_index,
        dlog_odds=dlog_odds.contiguous(),
        support=support,
        stats=stats,
        dlogits=out,
        dgiven=dvalues if of_values else None,
        num_threads=torch.get_num_threads(),
    )
    return out, dvalues


def _save_for_log_odds(ctx: Any, inputs: tuple[Any, ...], output: LogOdds) -> None:
    """Saves the logits and one bit per token."""
    logits, tokens, knobs, ctx.order, ctx.ignore_index, *edits = inputs
    _, support, stats = output
    ctx.mark_non_differentiable(support, stats)
    ctx.set_materialize_grads(False)  # else the backward gets zeros as large as the support
    ctx.save_for_backward(logits, tokens, knobs, support, stats, *edits)


def _log_odds_gradient(ctx: Any, dlog_odds: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    """Returns dL/dlogits = dL/dm / T * (onehot(y) - q), and that of values that replace logits."""
    if dlog_odds is None:
        return (None,) * 9
    logits, tokens, knobs, support, stats, *edits = ctx.saved_tensors
    of_values = ctx.needs_input_grad[7]
    dlogits, dvalues = torch.ops.fastadapt.adapted_log_odds_backward(
        dlog_odds, logits, tokens, knobs, ctx.order, ctx.ignore_index, support, stats, *edits,
        of_values,
    )  # fmt: skip
    return dlogits, *(None,) * 6, dvalues if of_values else None, None


def _launches() -> ModuleType:
    """Those for CUDA tensors."""
    from fastadapt._ops.triton.chains import launch

    return launch


OPERATORS: Implementations = {
    "filter_logits": (_filter_logits_cpu, lambda x, knobs, order, *edits: x.new_empty(x.shape)),
    "sample": (
        _sample_cpu,
        lambda x, knobs, order, seeds, positions, *asked: sample_outputs(x, *asked[:3]),
    ),
    "score": (
        _score_cpu,
        lambda x, tokens, knobs, orders, *rest: list(score_outputs(x, len(knobs))),
    ),
    "adapted_log_odds": (
        _adapted_log_odds_cpu,
        lambda x, tokens, knobs, order, *rest: log_odds_outputs(x),
    ),
    "adapted_log_odds_backward": (
        _adapted_log_odds_backward_cpu,
        lambda dlog_odds, x, *rest: edited_gradients(x, rest[-3], rest[-1]),
    ),
}


def _fake_sample(logits: Tensor, *rest: Any) -> list[Tensor]:
    """What a draw returns."""
    base, log_mass, top_n, whole = rest[4:8]
    ids = unknown(logits, logits.shape[0], wanted=whole > 0)
    return sample_outputs(logits, base, log_mass, top_n) + ids


def _fake_score(logits: Tensor, tokens: Tensor, knobs: list[Tensor], *rest: Any) -> list[Tensor]:
    """What scores are."""
    ids = unknown(logits, len(knobs) * logits.shape[0], wanted=rest[2] > 0)
    return [*score_outputs(logits, len(knobs)), *ids]


def _register() -> None:
    """Implementations, fakes and autograd of every operator."""
    register(_library, OPERATORS, _launches, {"sample": _fake_sample, "score": _fake_score})
    for name in ("filter_logits", "sample", "score"):
        _library.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_autograd(
        "fastadapt::adapted_log_odds",
        _log_odds_gradient,
        setup_context=_save_for_log_odds,
        lib=_library,
    )
    torch.library.register_autograd(
        "fastadapt::adapted_log_odds_backward", no_double_backward("adapted_log_odds"), lib=_library
    )


_register()
