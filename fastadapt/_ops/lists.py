"""The ids that rows keep, as operators return them behind their other outputs: ids and offsets."""

import torch
from torch import Tensor

from fastadapt import _C


def ends_of(counts: Tensor) -> Tensor:
    """Returns the offsets (n + 1,) int64 of lists of so many entries (n,)."""
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))


def rows_of(counts: Tensor, total: int) -> Tensor:
    """Returns the list (total,) int64 that each entry is of; total, the sum of the counts (n,)."""
    rows = torch.arange(counts.shape[0], device=counts.device)
    return rows.repeat_interleave(counts, output_size=total)


def joined(lists: "_C.IdLists | None", n: int) -> list[Tensor]:
    """Returns ids (count,) int32 and offsets (n + 1,) int64 of lists; nothing of None."""
    if lists is None:
        return []
    ids = torch.empty(lists.count(), dtype=torch.int32, device="cpu")
    offsets = torch.empty(n + 1, dtype=torch.int64, device="cpu")
    lists.join(offsets, ids)
    return [ids, offsets]


def unknown(like: Tensor, n: int, *, wanted: bool) -> list[Tensor]:
    """Returns the same for a fake: how many ids there are depends on values."""
    if not wanted:
        return []
    count = torch.library.get_ctx().new_dynamic_size()
    return [
        like.new_empty(count, dtype=torch.int32),
        like.new_empty(n + 1, dtype=torch.int64),
    ]
