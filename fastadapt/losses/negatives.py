"""Ids of a row that a loss makes less likely beside its label: repeated n-grams and mistakes.

Both are for `candidate_unlikelihood_penalty`, as `previous_tokens` is. Nothing here has a gradient.
"""

import torch
from torch import Tensor

from fastadapt._ops.checks import (
    head_rows,
    instance,
    integer,
    lora_fits,
    lora_parts,
    number,
    per_row,
)
from fastadapt._ops.linear.vocab_parallel import is_distributed
from fastadapt.losses.shapes import labels_in_rows

_TILE = 4096  # ids whose logits are held at once
_NUMBERS = 1 << 22  # of logits that are held at once: 16 MiB


def repeated_ngrams(
    labels: Tensor, n: int = 4, *, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    """Returns the tokens that would complete an n-gram which the sequence has already.

    C_t = {y_s : s < t, (y_{s-n+1}, ..., y_{s-1}) = (y_{t-n+1}, ..., y_{t-1})} without y_t: what
    a ban of repeated n-grams (transformers' `no_repeat_ngram_size`) would forbid at t, less the
    label. The two n-grams may overlap. With n = 1 they are `previous_tokens`.

    Welleck et al. 2020 (arXiv 1908.04319) penalise repetition on sequences that the model has
    decoded: there the token itself is the candidate wherever it is part of a repeated n-gram. Here
    the sequence is one to learn, whose own tokens are rewarded, so that only the other ways to
    repeat are penalised.

    Examples:
        >>> labels = torch.tensor([[5, 7, 8, 5, 7, 2]])
        >>> index, mask = repeated_ngrams(labels, n=3)
        >>> [index[0, t][mask[0, t]].tolist() for t in range(6)]
        [[], [], [], [], [], [8]]

    Args:
        labels (Tensor): (B, T), int64, the token to score at each position, those of a prompt too
            if n-grams may begin there.
        n (int): at least 1.
        ignore_index (int): labels that are in no n-gram and have no candidates.

    Returns:
        tuple[Tensor, Tensor]: (B, T, T): ids, int64, and which of them are candidates, bool, each
        id once.

    Raises:
        TypeError: labels that are no int64, an n that is no integer.
        ValueError: another shape, an n below 1.
    """
    labels_in_rows(labels)
    n, ignore_index = integer("n", n, 1), integer("ignore_index", ignore_index)
    t = labels.shape[1]
    known = labels != ignore_index
    same = labels[:, :, None] == labels[:, None, :]  # (B, T, T): at t and at s
    earlier = torch.ones(t, t, dtype=torch.bool, device=labels.device).tril(-1)
    found = earlier & ~same & known[:, :, None] & known[:, None, :]
    for back in range(1, n):
        before = torch.zeros_like(found)
        both = (same & known[:, :, None])[:, : max(t - back, 0), : max(t - back, 0)]
        before[:, back:, back:] = both
        found &= before
    # places in the order of their ids: of those with one id the last that was found is kept
    ids, order = labels.sort(dim=1, stable=True)
    found = found.gather(2, order[:, None].expand_as(found))
    from_here = found.flip(2).cumsum(2).flip(2)  # how many were found from a place on
    after = torch.nn.functional.pad(from_here, (0, 1))
    ends = torch.searchsorted(ids, ids, right=True)  # (B, T), where the next id begins
    beyond = after.gather(2, ends[:, None].expand_as(found))
    kept = found & (from_here - beyond == 1)
    ids = torch.where(ids == ignore_index, 0, ids)
    return ids[:, None].expand_as(kept).contiguous(), kept


@torch.no_grad()
def linear_top_k(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    labels: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    lora: tuple[Tensor, Tensor, float] | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns the K most probable ids of each row under a linear head, without its logits.

    With labels these are mistakes: the K most probable ids that are not the label, which
    `candidate_unlikelihood_penalty` makes less likely where they are most so. Equal logits rank by
    id. One product of N * H * V in tiles of 4096 ids, of which 16 MiB of logits are held; products
    are in the dtype of the inputs, as torch makes them, so that in half precision ids rank by
    logits that are rounded to it.

    Examples:
        >>> hidden, weight = torch.ones(1, 1), torch.tensor([[3.0], [1.0], [2.0]])
        >>> linear_top_k(hidden, weight, 2)[0]
        tensor([[0, 2]])
        >>> linear_top_k(hidden, weight, 2, labels=torch.tensor([0]))[0]
        tensor([[2, 1]])

    Args:
        hidden (Tensor): (..., H), as in `linear_log_odds`.
        weight (Tensor): (V, H), as there; whole, no DTensor.
        k (int): at least 1.
        labels (Tensor | None): `hidden.shape[:-1]`, int64; ids that are left out of their rows, or
            `ignore_index`.
        bias (Tensor | None): (V,), as there.
        softcap (float | None): as there.
        logit_scale (float): as there.
        ignore_index (int): rows with this label have no candidates.
        lora (tuple[Tensor, Tensor, float] | None): as there.

    Returns:
        tuple[Tensor, Tensor]: `(*hidden.shape[:-1], k)`: ids, int64, the most probable first, and
        which of them there are, bool: fewer than k where V is smaller, or logits are -inf. A NaN
        counts as the largest logit.

    Raises:
        TypeError, ValueError: as `linear_log_odds`; a head that is split over ranks.
    """
    k = integer("k", k, 1)
    if softcap is not None:
        number("softcap", softcap, positive=True)
    number("logit_scale", logit_scale, signed=True)
    for name, given in (("hidden", hidden), ("weight", weight)):
        instance(name, given, Tensor, "a Tensor")
        if is_distributed(given):
            raise ValueError(f"{name}: expected a whole tensor, got a DTensor")
    rows = head_rows(hidden, weight, bias, empty=False)
    wide = torch.promote_types(torch.promote_types(rows.dtype, weight.dtype), torch.float32)
    adapter = None
    if lora is not None:
        lora_parts("lora", lora)
        a, b, scale = lora
        lora_fits("lora", rows, weight, a, b)
        adapter = (rows.to(a.dtype) @ a.t()).to(wide) * float(scale), b.to(wide)
    used = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    if labels is not None:
        flat = per_row("labels", labels, torch.int64, hidden.shape[:-1], rows)
        used = flat != ignore_index
    index = torch.zeros(len(rows), k, dtype=torch.int64, device=rows.device)
    values = torch.full((len(rows), k), float("-inf"), dtype=wide, device=rows.device)
    tile = min(_TILE, weight.shape[0])
    block = max(1, _NUMBERS // tile)
    for begin in range(0, len(rows), block):
        some = slice(begin, begin + block)
        for first in range(0, weight.shape[0], tile):
            last = min(first + tile, weight.shape[0])
            ids = torch.arange(first, last, device=rows.device)
            z = (rows[some] @ weight[first:last].t()).to(wide)
            if adapter is not None:
                low, high = adapter
                z += low[some] @ high[first:last].t()
            z = logit_scale * (z if bias is None else z + bias[first:last])
            z = z if softcap is None else softcap * (z / softcap).tanh()
            z = torch.where(z.isnan(), float("inf"), z)
            if labels is not None:
                z = z.masked_fill(flat[some, None] == ids, float("-inf"))
            values[some], index[some] = _largest(
                torch.cat([values[some], z], 1), torch.cat([index[some], ids.expand_as(z)], 1), k
            )
    values, order = values.sort(dim=1, descending=True, stable=True)
    there = (values > float("-inf")) & used[:, None]
    index = torch.where(there, index.gather(1, order), 0)
    shape = (*hidden.shape[:-1], k)
    return index.view(shape), there.view(shape)


def _largest(z: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Returns the k largest numbers of each row and their ids; of equal ones the first."""
    low = z.topk(k, dim=1).values[:, -1:]
    above, tied = z > low, z == low
    taken = above | (tied & (tied.cumsum(1) <= k - above.sum(1, keepdim=True)))
    places = torch.arange(z.shape[1], device=z.device)
    places = torch.where(taken, places, z.shape[1]).topk(k, dim=1, largest=False).values
    places = places.sort(dim=1).values
    return z.gather(1, places), ids.gather(1, places)
