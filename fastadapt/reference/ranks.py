"""The whole out of the slices that the ranks of a process group hold."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def gathered(mine: Tensor, group: "ProcessGroup") -> Tensor:
    """Gathers all slices in the order of the ranks; this rank's slice keeps its gradient."""
    import torch.distributed as dist

    ranks = dist.get_world_size(group)
    sizes = [torch.empty(1, dtype=torch.int64, device=mine.device) for _ in range(ranks)]
    dist.all_gather(sizes, torch.tensor([mine.shape[0]], device=mine.device), group)
    longest = max(int(size) for size in sizes)
    padded = mine.new_zeros(longest, *mine.shape[1:])
    padded[: mine.shape[0]] = mine.detach()
    slices = [torch.empty_like(padded) for _ in range(ranks)]
    dist.all_gather(slices, padded, group)
    parts = [part[: int(size)] for part, size in zip(slices, sizes, strict=True)]
    parts[dist.get_rank(group)] = mine
    return torch.cat(parts)


def whole_rows(logits: Tensor, group: "ProcessGroup | None") -> Tensor:
    """Logits (..., V) out of this rank's (..., V_r); without a group they are."""
    if group is None:
        return logits
    return gathered(logits.movedim(-1, 0).contiguous(), group).movedim(0, -1)


def of_first_rank(mine: Tensor, group: "ProcessGroup | None") -> Tensor:
    """The first rank's numbers, of as many on all ranks; without a group this one's."""
    return mine if group is None else gathered(mine[None], group)[0]
