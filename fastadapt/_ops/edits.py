"""Two lists of edits as one, in C++."""

import torch
from torch import Tensor

from fastadapt import _C

Lists = tuple[Tensor, Tensor, Tensor]  # ids, offsets and columns, on the CPU


def joined_lists(first: Lists, after: Lists) -> tuple[Lists, int]:
    """Returns the lists of both, and the place of the first id that has no one edit, or -1."""
    n = len(first[1]) - 1
    a, b = ((*lists, len(lists[0]), False, None, 0) for lists in (first, after))
    offsets = torch.empty(n + 1, dtype=torch.int64, device="cpu")
    _C.join_edits(a, b, n, offsets, None, None)
    total = int(offsets[-1])
    ids = torch.empty(total, dtype=torch.int32, device="cpu")
    columns = torch.empty(4, total, dtype=torch.float32, device="cpu")
    misfit = _C.join_edits(a, b, n, offsets, ids, columns)
    return (ids, offsets, columns), misfit
