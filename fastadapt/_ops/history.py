"""The rows of a history in C++, and its rules' lists as tensors."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastadapt import _C

Rows = _C.History
Biases = _C.Sequences
COUNTED = ("output", "all", "padded")  # csrc/history_row.h


def rows_of(tokens: Tensor, ends: Tensor, starts: Tensor, prompts: Tensor) -> Rows:
    """Returns rows of tokens (N, T), int64 on the CPU like the places of each row.

    Raises:
        ValueError: an id out of int32's range.
    """
    n, t = tokens.shape
    return Rows(tokens, n, t, ends, starts, prompts)


def biases_of(ids: Sequence[Sequence[int]], biases: Sequence[float]) -> Biases:
    """Returns sequences, by their last ids ascending, with a number each."""
    offsets = [0]
    for one in ids:
        offsets.append(offsets[-1] + len(one))
    return Biases([int(i) for one in ids for i in one], offsets, list(biases))


def listed(
    rule: Callable[..., tuple[int, int]], draft: Tensor | None, rows: int, *numbers: Any
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Returns ids, offsets and columns of a rule's lists, and the largest id or -1.

    First the lengths of the lists are made, then they are filled.

    Args:
        rule (Callable): a method of `Rows`.
        draft (Tensor | None): (N, K), int64 on the CPU.
        rows (int): N * (K + 1).
        *numbers: what the rule takes.
    """
    k, threads = 0 if draft is None else draft.shape[1], torch.get_num_threads()
    offsets = torch.empty(rows + 1, dtype=torch.int64, device="cpu")
    total, largest = rule((draft, k, offsets, None, None, threads), *numbers)
    ids = torch.empty(total, dtype=torch.int32, device="cpu")
    columns = torch.empty(4, total, dtype=torch.float32, device="cpu")
    if total:
        rule((draft, k, offsets, ids, columns, threads), *numbers)
    return ids, offsets, columns, largest
