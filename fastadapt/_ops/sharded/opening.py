"""The first round: sizes, what has to be alike on all ranks, and the largest logits."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastadapt._ops.sharded.arithmetic import from_ordered
from fastadapt._ops.sharded.exchange import Program, Request
from fastadapt._ops.sharded.slice import NAN, Slice

WORDS = 64  # of the first message, however many rows: so ranks that differ find out
HEAD = 4  # of them: whether all is well, size of the slice, rows, digest of the arguments
MOST_TOKENS = 1 << 22  # csrc/kernels.h: sums of masses stay below 2^62


class Given(NamedTuple):
    """A rank's arguments.

    Attributes:
        rank: which one it is.
        logits: (N, V_r), as they are.
        digest: of what has to be the same on all ranks, in [0, 2^31).
        edited: makes the slice's logits from its first id and the size of the whole; None where
            they stay as they are.
        real: how many tokens the whole has without its padding; None: all.
    """

    rank: int
    logits: Tensor
    digest: int
    edited: Callable[[int, int], Tensor] | None
    real: int | None = None


class Opened(NamedTuple):
    """What is known after the first round.

    Attributes:
        part: this rank's slice, edited.
        ends: (ranks,) int64, where the ids of each slice end; the last is V.
        x_max: (N,) float32, the largest logit of each row; NaN where there is one.
        real: how many tokens there are.
    """

    part: Slice
    ends: Tensor
    x_max: Tensor
    real: int

    def owner(self, ids: Tensor) -> Tensor:
        """The rank of each id."""
        return torch.searchsorted(self.ends, ids, right=True).clamp(max=len(self.ends) - 1)


def refused(error: Exception, device: torch.device) -> Program[None]:
    """Tells the other ranks that this one does not take its arguments.

    Raises:
        Exception: the one that is given.
    """
    words = torch.zeros(WORDS, dtype=torch.int32, device=device)
    words[0] = 1
    yield Request("gather", words)
    raise error


def opened(given: Given) -> Program[Opened]:
    """Exchanges sizes and maxima.

    Raises:
        RuntimeError: another rank did not take its arguments.
        ValueError: ranks whose arguments differ, a vocabulary that is empty or too large.
    """
    (n, size), device = given.logits.shape, given.logits.device
    words = torch.zeros(WORDS, dtype=torch.int32, device=device)
    words[:HEAD] = torch.tensor([0, size, n, given.digest], dtype=torch.int32)
    sent = 0
    if given.edited is None:
        part = Slice(given.logits)
        maxima = part.maxima()
        sent = min(n, WORDS - HEAD)
        words[HEAD : HEAD + sent] = maxima[:sent]
    heads = yield Request("gather", words)
    _check(heads[:, :HEAD].tolist())
    ends = heads[:, 1].long().cumsum(0)
    v = int(ends[-1])
    if not 1 <= v <= MOST_TOKENS:
        raise ValueError(f"logits: expected 1 to {MOST_TOKENS} tokens of all ranks, got {v}")
    if given.real is not None and given.real > v:
        raise ValueError(f"num_tokens: expected 1 to {v}, got {given.real}")
    first = int(ends[given.rank]) - size
    if given.edited is not None:
        part = Slice(given.edited(first, v))
        maxima = part.maxima()
    part.first, part.whole = first, v
    whole = heads[:, HEAD : HEAD + sent].amax(0)
    if sent < n:
        rest = yield Request("max", maxima[sent:])
        whole = torch.cat([whole, rest])
    x_max = from_ordered(whole.long())
    x_max = torch.where(whole == NAN, float("nan"), x_max)
    return Opened(part, ends, x_max, v if given.real is None else given.real)


def _check(heads: list[list[int]]) -> None:
    """Raises, on all ranks alike, unless all have taken the same arguments."""
    failed = [rank for rank, head in enumerate(heads) if head[0]]
    if failed:
        raise RuntimeError(
            f"group: expected arguments that all ranks take, got an error on {failed}"
        )
    rows = [head[2] for head in heads]
    if len(set(rows)) > 1:
        raise ValueError(f"logits: expected as many rows on all ranks, got {rows}")
    if len({head[3] for head in heads}) > 1:
        raise ValueError(
            "group: expected the same adaptor, seeds, positions, tokens and options on all ranks, "
            "got others"
        )
