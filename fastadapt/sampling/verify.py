"""Drafts of several tokens at once, verified so that what comes out is distributed as `sample`."""

import torch
from torch import Tensor

from fastadapt._ops import verification  # noqa: F401  registers the operator
from fastadapt._ops.checks import flag, fold_rows, per_row
from fastadapt.adaptor import Adaptor
from fastadapt.results import Support, Verified
from fastadapt.sampling.edits import Edits
from fastadapt.sampling.rows import edited_rows, knobs_for, seeds_of


def verify(
    logits: Tensor,
    draft: Tensor,
    adaptor: Adaptor,
    *,
    draft_lengths: Tensor | None = None,
    draft_logits: Tensor | None = None,
    draft_adaptor: Adaptor | None = None,
    seeds: Tensor | None = None,
    positions: Tensor | None = None,
    generator: torch.Generator | None = None,
    support: bool = False,
    edits: Edits | None = None,
    allowed: Tensor | None = None,
    num_tokens: int | None = None,
) -> Verified:
    """Accepts the drafts of each sequence as far as they stand, and draws the token behind them.

    Row i of a sequence is drawn at `positions + i`. Where nothing is known of how the drafts were
    made (prompt lookup, a greedy draft), each row is drawn as `sample` draws it and a draft stands
    while it is that token: the result is `sample`'s, bit for bit.

    With the logits of the draft model, a draft x of its law q stands with probability
    min(1, p(x) / q(x)), p being the law of the row, and another token is drawn from
    max(p - q, 0) where it does not (arXiv 2211.17192, algorithm 1): tokens are distributed by p,
    whatever q is, if drafts were drawn from q. Both laws are integers of unit 2^-40, so that no
    device or instruction set decides otherwise, and differ from p by at most 1.5 V 2^-40 in total
    variation. Coin and second draw have Philox numbers that no `sample` uses, so that a draft model
    may draw by the same seeds and positions.

    Examples:
        >>> logits = torch.tensor([[[2.0, 1.0, 0.0, -1.0]] * 3])
        >>> draft, seeds = torch.tensor([[1, 2]]), torch.tensor([0])
        >>> verified = verify(logits, draft, Adaptor(top_p=0.9), seeds=seeds)
        >>> verified.tokens, verified.accepted
        (tensor([[ 1,  0, -1]]), tensor([1]))

    Args:
        logits (Tensor): (N, k + 1, V), as in `filter_logits`: row i has seen i drafts.
        draft (Tensor): (N, k), int64, ids in [0, V).
        adaptor (Adaptor): its per-row knobs, if any, have N values, one a sequence.
        draft_lengths (Tensor | None): (N,), int64, 0 to k: how many drafts a sequence has. What
            stands behind them is not looked at. None: k.
        draft_logits (Tensor | None): (N, k, V), dtype of `logits`: what the drafts were drawn from,
            edited already if they were. None: each draft stands if it is `sample`'s token.
        draft_adaptor (Adaptor | None): that the drafts were drawn by. None: `adaptor`. With XTC,
            drafts were drawn by these seeds and positions, whose coins are thrown again.
        seeds (Tensor | None): (N,), int64, as in `sample`. None: drawn from `generator`.
        positions (Tensor | None): (N,), int64, of the first row of each sequence. None: 0.
        generator (torch.Generator | None): as in `sample`.
        support (bool): as in `sample`, of N (k + 1) rows.
        edits (Edits | None): as in `filter_logits`, of N (k + 1) rows.
        allowed (Tensor | None): (N, k + 1, ceil(V / 32)), as in `filter_logits`.
        num_tokens (int | None): as in `filter_logits`, of both logits.

    Returns:
        Verified: see there for shapes, dtypes and bad rows. Rows behind the first rejection change
            nothing, NaN included.

    Raises:
        TypeError, ValueError: as `sample`; shapes that do not fit each other; on a CPU an id or a
            length out of range; a draft adaptor without draft logits.
    """
    rows = fold_rows("logits", logits, double=False)
    if logits.dim() != 3 or logits.shape[1] == 0:
        raise ValueError(f"logits: expected shape (N, k + 1, V), got {tuple(logits.shape)}")
    n, k = logits.shape[0], logits.shape[1] - 1
    knobs = knobs_for(logits, adaptor)
    rows, changes = edited_rows(rows, logits.shape[:2], edits, allowed, num_tokens)
    draft = per_row("draft", draft, torch.int64, torch.Size((n, k)), rows).view(n, k)
    each = torch.Size((n,))
    flag("support", support)
    if draft_lengths is not None:
        draft_lengths = per_row("draft_lengths", draft_lengths, torch.int64, each, rows)
    if positions is not None:
        positions = per_row("positions", positions, torch.int64, each, rows)
    by, draft_knobs, draft_rows = adaptor, None, None
    if draft_logits is not None:
        by = adaptor if draft_adaptor is None else draft_adaptor
        draft_knobs = knobs_for(logits, by, "draft_adaptor")
        draft_rows = _draft_rows(draft_logits, logits)[:, : rows.shape[1]]
    elif draft_adaptor is not None:
        raise ValueError("draft_adaptor: expected None without draft_logits, got an Adaptor")
    whole = logits.shape[-1] if support else 0
    out = torch.ops.fastadapt.verify(
        rows, knobs, adaptor.filter_code, draft, draft_lengths, draft_rows, draft_knobs,
        by.filter_code, seeds_of(seeds, generator, each, rows), positions, whole, *changes,
    )  # fmt: skip
    if not support:
        return Verified(*out)
    *out, ids, offsets = out
    full = out[3].view(-1) == whole
    return Verified(*out)._replace(support=Support.unchecked(ids, offsets, full))


def _draft_rows(draft_logits: Tensor, logits: Tensor) -> Tensor:
    """Returns the logits of drafts as (N k, V), checked against those to be verified."""
    rows = fold_rows("draft_logits", draft_logits, double=False)
    n, rows_each, v = logits.shape
    if draft_logits.shape != (n, rows_each - 1, v):
        expected = (n, rows_each - 1, v)
        raise ValueError(
            f"draft_logits: expected shape {expected}, got {tuple(draft_logits.shape)}"
        )
    if rows.dtype != logits.dtype:
        raise TypeError(f"draft_logits: expected {logits.dtype} as logits, got {rows.dtype}")
    if rows.device != logits.device:
        raise ValueError(f"draft_logits: expected device {logits.device}, got {rows.device}")
    return rows
