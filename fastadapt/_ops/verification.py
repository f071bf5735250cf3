"""The operator that verifies drafts: its schema, CPU implementation and fake.

Inputs arrive checked by `sampling`. Rows of N sequences stand one after the other, K + 1 of each;
knobs, seeds and positions are of sequences, an order is the `filter_code` of an adaptor, and the
four tensors of a `RowEdits`, of rows, come last.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastadapt import _C
from fastadapt._ops.common import Implementations, check_ids, register, rows_of
from fastadapt._ops.lists import joined, unknown
from fastadapt._ops.outputs import verification_outputs
from fastadapt._ops.sampling import EDITS, edits_of, knobs_of

_library = torch.library.Library("fastadapt", "FRAGMENT")
_library.define(
    "verify(Tensor logits, Tensor knobs, int order, Tensor draft, Tensor? lengths,"
    " Tensor? draft_logits, Tensor? draft_knobs, int draft_order, Tensor seeds, Tensor? positions,"
    f" int whole, {EDITS}) -> Tensor[]"
)


def _verify_cpu(
    logits: Tensor,
    knobs: Tensor,
    order: int,
    draft: Tensor,
    lengths: Tensor | None,
    draft_logits: Tensor | None,
    draft_knobs: Tensor | None,
    draft_order: int,
    seeds: Tensor,
    positions: Tensor | None,
    whole: int,
    *edits: Tensor | None,
) -> list[Tensor]:
    """Verifies the drafts of each sequence until one is rejected."""
    n, k = draft.shape
    v = logits.shape[1]
    _check_drafts(draft, lengths, v)
    tokens, accepted, logprobs, kept, status = out = verification_outputs(logits, draft)
    lists = _C.IdLists(n * (k + 1), whole) if whole else None
    _C.verify(
        rows=(*rows_of(logits)[:2], n, v, logits.stride(0)),
        knobs=knobs_of(knobs, order),
        edits=edits_of(*edits),
        k=k,
        draft=draft,
        lengths=lengths,
        draft_rows=None if draft_logits is None else rows_of(draft_logits),
        draft_knobs=None if draft_knobs is None else knobs_of(draft_knobs, draft_order),
        seeds=seeds,
        positions=positions,
        tokens=tokens,
        accepted=accepted,
        logprobs=logprobs,
        kept=kept,
        status=status,
        supports=lists,
        num_threads=torch.get_num_threads(),
    )
    return [*out, *joined(lists, n * (k + 1))]


def _check_drafts(draft: Tensor, lengths: Tensor | None, v: int) -> None:
    """Raises for an id that is to be verified and is none, or a length that is too large."""
    if lengths is None:
        return check_ids("draft", draft, v, None)
    k = draft.shape[1]
    bad = (lengths < 0) | (lengths > k)
    if bool(bad.any()):
        raise ValueError(f"draft_lengths: expected 0 to {k}, got {int(lengths[bad][0])}")
    used = torch.arange(k) < lengths[:, None]
    return check_ids("draft", draft.where(used, 0), v, None)


def _launches() -> ModuleType:
    """Those for CUDA tensors."""
    from fastadapt._ops.triton.verification import launch

    return launch


OPERATORS: Implementations = {
    "verify": (
        _verify_cpu,
        lambda x, knobs, order, draft, *rest: list(verification_outputs(x, draft)),
    ),
}


def _fake(logits: Tensor, knobs: Tensor, order: int, draft: Tensor, *rest: Any) -> list[Tensor]:
    """What verification returns."""
    ids = unknown(logits, logits.shape[0], wanted=rest[6] > 0)
    return [*verification_outputs(logits, draft), *ids]


def _register() -> None:
    """Implementations and fake; outputs have no gradients."""
    register(_library, OPERATORS, _launches, {"verify": _fake})
    _library.impl("verify", torch.library.fallthrough_kernel, "Autograd")


_register()
