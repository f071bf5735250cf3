"""The ids that survive in rows whose vocabulary is split, in compressed rows on every rank."""

import torch
from torch import Tensor

from fastadapt._ops.lists import ends_of
from fastadapt._ops.sharded.exchange import Program, Request
from fastadapt._ops.sharded.slice import Slice
from fastadapt._ops.sharded.support import Support


def kept_ids(part: Slice, support: Support, kept: Tensor) -> Program[tuple[Tensor, Tensor]]:
    """Lists the survivors of each problem (P,), ascending; those that keep all list none.

    Two rounds where some list any: how many each slice has, then these.

    Args:
        part: this rank's slice.
        support: the tests of all problems.
        kept: (P,), how many survive, as all ranks know it.

    Returns:
        Tensor, Tensor: ids (count,) int32, offsets (P + 1,) int64.
    """
    counts = torch.where(kept == part.whole, 0, kept).long()
    offsets = ends_of(counts)
    index = counts.nonzero()[:, 0]
    if len(index) == 0:
        return counts.new_empty(0, dtype=torch.int32), offsets
    mine, ends = part.ids(support.at(index))
    of_ranks = yield Request("gather", ends.diff())  # (ranks, p)
    sizes = of_ranks.sum(1).tolist()
    # slices stand in the order of ranks, so a stable sort by problem leaves ids ascending
    sent = yield Request("gather", torch.nn.functional.pad(mine, (0, max(sizes) - len(mine))))
    ids = torch.cat([row[:size] for row, size in zip(sent, sizes, strict=True)])
    places = torch.arange(len(index), device=index.device).expand_as(of_ranks).flatten()
    order = places.repeat_interleave(of_ranks.flatten()).argsort(stable=True)
    return ids[order], offsets
