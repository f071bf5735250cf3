"""This rank's slice of the vocabulary, and what its tokens come to, on the CPU."""

import torch
from torch import Tensor

from fastadapt import _C
from fastadapt._ops.common import rows_of
from fastadapt._ops.lists import joined
from fastadapt._ops.sharded.arithmetic import MINUS_INF, ordered
from fastadapt._ops.sharded.support import Support

NAN = 0x7FFFFFFF  # the ordered integer of a row with NaN: above +inf's


class Slice:
    """Rows (N, V_r) of ids [first, first + V_r) of a whole of some size, edited."""

    def __init__(self, rows: Tensor, first: int = 0, whole: int = 0) -> None:
        """Takes float32, bfloat16 or float16."""
        self.rows, self.first, self.whole = rows, first, whole
        self.v = rows.shape[1]

    def _problems(self, support: Support) -> "_C.Problems":
        """What the kernels take of problems."""
        data, dtype, _, v, stride = rows_of(self.rows)
        tests = {name: x.contiguous() for name, x in support._asdict().items()}
        return {"rows": (data, dtype, len(support.row), v, stride), "first": self.first, **tests}  # type: ignore[typeddict-item]

    def maxima(self) -> Tensor:
        """The largest logit of each row as an ordered integer, int32 (N,)."""
        if self.v == 0:
            return torch.full((len(self.rows),), MINUS_INF, dtype=torch.int32)
        most = self.rows.amax(1).float()
        return torch.where(most.isnan(), NAN, ordered(most)).int()

    def best(self, count: int) -> tuple[Tensor, Tensor]:
        """The best of each row by (logit, id), those that are -inf too.

        Returns:
            Tensor, Tensor: (N, count), float32 logits and int32 ids, -1 behind the last; of rows
            with NaN or +inf none.
        """
        x, ids = self._empty(len(self.rows), count)
        if self.v:
            _C.slice_top(
                rows=rows_of(self.rows),
                first=self.first,
                count=count,
                x=x,
                ids=ids,
                num_threads=torch.get_num_threads(),
            )
        return x, ids

    def tally(self, support: Support) -> Tensor:
        """Number, mass and surprisal mass of the survivors, int64 (P, 3)."""
        sums = torch.zeros(len(support.row), 3, dtype=torch.int64)
        if self.v:
            _C.slice_tally(
                **self._problems(support),
                typicality=False,
                g=0,
                pivots=None,
                sums=sums,
                num_threads=torch.get_num_threads(),
            )
        return sums

    def tally_above(self, support: Support, kind: str, pivots: Tensor) -> Tensor:
        """The same of survivors from pivots on, ascending (P, G): (P, G, 3)."""
        sums = torch.zeros(*pivots.shape, 3, dtype=torch.int64)
        if self.v:
            _C.slice_tally(
                **self._problems(support),
                typicality=kind == "typicality",
                g=pivots.shape[1],
                pivots=pivots.contiguous(),
                sums=sums,
                num_threads=torch.get_num_threads(),
            )
        return sums

    def best_below(
        self, support: Support, kind: str, end: Tensor, count: int
    ) -> tuple[Tensor, Tensor]:
        """The best survivors with keys below `end` (P,): logits and ids (P, count) as `best`."""
        x, ids = self._empty(len(support.row), count)
        if self.v:
            _C.slice_best(
                **self._problems(support),
                typicality=kind == "typicality",
                end=end.contiguous(),
                count=count,
                x=x,
                ids=ids,
                num_threads=torch.get_num_threads(),
            )
        return x, ids

    def find(self, support: Support, target: Tensor) -> tuple[Tensor, Tensor]:
        """The first survivor by id whose running mass exceeds `target` (P,): its logit and id."""
        x = torch.empty(len(target), dtype=torch.float32)
        ids = torch.empty_like(target)
        _C.slice_find(
            **self._problems(support),
            target=target.contiguous(),
            x=x,
            ids=ids,
            num_threads=torch.get_num_threads(),
        )
        return x, ids

    def ids(self, support: Support) -> tuple[Tensor, Tensor]:
        """The survivors of each problem, ascending: ids (count,) int32, offsets (P + 1,) int64."""
        lists = _C.IdLists(len(support.row), self.whole)
        if self.v:
            _C.slice_list(
                **self._problems(support), supports=lists, num_threads=torch.get_num_threads()
            )
        ids, offsets = joined(lists, len(support.row))
        return ids, offsets

    @staticmethod
    def _empty(n: int, count: int) -> tuple[Tensor, Tensor]:
        """Lists without tokens."""
        x = torch.full((n, count), float("-inf"))
        return x, torch.full((n, count), -1, dtype=torch.int32)
