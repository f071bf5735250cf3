"""The ids of each row that a chain of processors may touch, ascending, kept from step to step."""

from array import array
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor


class Lists(NamedTuple):
    """The touched ids of all rows at one step.

    Attributes:
        ids: (E,), int32; ascending within a row.
        rows: (E,), int64; of each id its row.
        offsets: (N + 1,), int64; the ids of row r are `ids[offsets[r]:offsets[r + 1]]`.
        marks: (E,), bool, for each set; which of the ids it holds.
        shared: (N, S), int64; where in `ids` the ids are that every row has.
    """

    ids: Tensor
    rows: Tensor
    offsets: Tensor
    marks: list[Tensor]
    shared: Tensor


class Touched:
    """Ids that every row has, and sets of ids that differ by row and grow token by token.

    A new token costs a search and a move of bytes, so a step does not read a long history again.

    Args:
        shared: ids of every row, ascending, each once.
        sets: (M, N) sets of ids.
        vocabulary: ids outside [0, vocabulary) are left out.
    """

    def __init__(
        self, shared: Sequence[int], sets: Sequence[Sequence[set[int]]], vocabulary: int, rows: int
    ) -> None:
        """Sorts the ids of each row."""
        self.vocabulary = vocabulary
        everywhere = set(shared)
        self.ids: list[array[int]] = []
        self.marks: list[list[array[int]]] = [[] for _ in sets]
        self._shared = torch.tensor(shared, dtype=torch.int64)
        self._place = torch.empty(rows, len(shared), dtype=torch.int64)
        for row in range(rows):
            found = everywhere.union(*(held[row] for held in sets))
            ids = sorted(i for i in found if 0 <= i < vocabulary)
            self.ids.append(array("i", ids))
            for marks, held in zip(self.marks, sets, strict=True):
                marks.append(array("b", [i in held[row] for i in ids]))
            self._place[row] = torch.searchsorted(
                torch.tensor(ids, dtype=torch.int64), self._shared
            )

    def add(self, tokens: Sequence[int], sets: Sequence[Sequence[int]]) -> None:
        """Adds one token a row, to these of the row's sets."""
        added = [self.vocabulary] * len(tokens)  # behind all shared ids, whose places stay
        for row, (token, of) in enumerate(zip(tokens, sets, strict=True)):
            if not of or not 0 <= token < self.vocabulary:
                continue
            at, known = self._find(row, token)
            if not known:
                self.ids[row].insert(at, token)
                for marks in self.marks:
                    marks[row].insert(at, 0)
                added[row] = token
            for held in of:
                self.marks[held][row][at] = 1
        self._place += self._shared > torch.tensor(added)[:, None]

    def places(self, tokens: Sequence[tuple[int, int]]) -> Tensor:
        """Returns where some tokens, each with its row, are in `Lists.ids`; others are left out."""
        starts = [0, *accumulate(map(len, self.ids))]
        found = [(starts[row], *self._find(row, token)) for row, token in tokens]
        places = [start + at for start, at, known in found if known]
        return torch.tensor(places, dtype=torch.int64)

    def _find(self, row: int, token: int) -> tuple[int, bool]:
        """Returns where an id is, or would be, among those of its row, and whether it is."""
        ids = self.ids[row]
        at = bisect_left(ids, token)
        return at, at < len(ids) and ids[at] == token

    def lists(self) -> Lists:
        """Returns the ids of all rows as they stand."""
        lengths = [len(ids) for ids in self.ids]
        offsets = torch.tensor([0, *accumulate(lengths)])
        rows = [array("q", [row]) * length for row, length in enumerate(lengths)]
        marks = [_joined(of_rows, torch.bool) for of_rows in self.marks]
        return Lists(
            _joined(self.ids, torch.int32),
            _joined(rows, torch.int64),
            offsets,
            marks,
            self._place + offsets[:-1, None],
        )


def _joined(rows: Sequence["array[int]"], dtype: torch.dtype) -> Tensor:
    """Returns the numbers of all rows, one after the other."""
    joined = bytearray().join(rows)
    return torch.frombuffer(joined, dtype=dtype) if joined else torch.empty(0, dtype=dtype)
