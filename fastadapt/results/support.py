"""Which ids each row of a batch keeps: what it was sampled from, and what it is trained on."""

from collections.abc import Sequence
from ctypes import string_at
from dataclasses import dataclass
from itertools import accumulate, pairwise
from struct import calcsize, pack, unpack_from

import torch
from torch import Tensor

from fastadapt._ops.checks import instance, integer, per_row

_HEADER = "=qqq"  # of `Support.to_bytes`: the mark, N and the number of ids
_MARK = 0x0001_5355_5050_4654  # of the format and its version; not it on the other byte order
_FULL = -1  # of a row that keeps everything, in place of its number of ids


@dataclass(frozen=True, eq=False, repr=False)
class Support:
    """The ids that each of N rows keeps, in compressed rows: what was sampled from, to train on.

    The ids of row r are `ids[offsets[r]:offsets[r + 1]]`, ascending, each once. A row that keeps
    every id is `full` and stores none; a row that is not and stores none keeps nothing.

    Shapes, dtypes and devices are checked when one is made, values by `check`, which the log-odds,
    `to_mask` and `from_bytes` call.

    Examples:
        >>> support = Support.from_mask(torch.tensor([[True, False, True], [True, True, True]]))
        >>> support
        Support(rows=2, ids=2, full=1)
        >>> support.ids, support.offsets, support.full
        (tensor([0, 2], dtype=torch.int32), tensor([0, 2, 2]), tensor([False,  True]))
        >>> support.contains(torch.tensor([1, 1]))
        tensor([False,  True])
        >>> first, second = support.split([1, 1])
        >>> Support.cat([second, first]) == support.index(torch.tensor([1, 0]))
        True

    Attributes:
        ids: (count,), int32, row by row.
        offsets: (N + 1,), int64, from 0 to count.
        full: (N,), bool; rows that keep the whole vocabulary, against which they are scored: where
            a mask, an edit or padding leaves fewer, there are ids.
    """

    ids: Tensor
    offsets: Tensor
    full: Tensor

    __hash__ = None  # type: ignore[assignment]  # of tensors

    def __post_init__(self) -> None:
        """Checks what costs nothing."""
        for name, x in (("ids", self.ids), ("offsets", self.offsets), ("full", self.full)):
            instance(name, x, Tensor, "a Tensor")
        if self.ids.dim() != 1:
            raise ValueError(f"ids: expected shape (count,), got {tuple(self.ids.shape)}")
        if self.offsets.dim() != 1 or self.offsets.shape[0] == 0:
            raise ValueError(f"offsets: expected shape (N + 1,), got {tuple(self.offsets.shape)}")
        rows = torch.Size((self.offsets.shape[0] - 1,))
        for name, x, dtype, shape in (
            ("ids", self.ids, torch.int32, self.ids.shape),
            ("offsets", self.offsets, torch.int64, self.offsets.shape),
            ("full", self.full, torch.bool, rows),
        ):
            object.__setattr__(self, name, per_row(name, x, dtype, shape, self.ids))

    @classmethod
    def unchecked(cls, ids: Tensor, offsets: Tensor, full: Tensor) -> "Support":
        """Returns the support of tensors that are known to be right: checks cost 4 us a call."""
        made = object.__new__(cls)
        for name, x in (("ids", ids), ("offsets", offsets), ("full", full)):
            object.__setattr__(made, name, x)
        return made

    @classmethod
    def from_mask(cls, mask: Tensor) -> "Support":
        """Returns the support that a mask stands for.

        Args:
            mask (Tensor): (N, V), bool, True where an id is kept; a row that is True throughout is
                full.

        Raises:
            TypeError: another dtype.
            ValueError: another shape.
        """
        instance("mask", mask, Tensor, "a Tensor")
        if mask.dtype != torch.bool:
            raise TypeError(f"mask: expected a tensor of torch.bool, got {mask.dtype}")
        if mask.dim() != 2 or mask.shape[1] == 0:
            raise ValueError(f"mask: expected shape (N, V), V >= 1, got {tuple(mask.shape)}")
        full = mask.all(1)
        stored = mask & ~full[:, None]
        return cls(stored.nonzero()[:, 1].int(), _ends(stored.sum(1)), full)

    @classmethod
    def from_bytes(cls, data: bytes) -> "Support":
        """Returns what `to_bytes` has written, on the CPU.

        Raises:
            TypeError: data that is not bytes.
            ValueError: bytes of something else, or fewer or more of them.
        """
        instance("data", data, bytes | bytearray | memoryview, "bytes")
        data = bytes(data)
        size = calcsize(_HEADER)
        mark, n, count = unpack_from(_HEADER, data) if len(data) >= size else (0, 0, 0)
        if mark != _MARK or n < 0 or count < 0 or len(data) != size + 4 * (n + count):
            raise ValueError(
                f"data: expected what Support.to_bytes writes, got {len(data)} other bytes"
            )
        stored = torch.empty(n + count, dtype=torch.int32, device="cpu")
        if n + count:
            stored.copy_(torch.frombuffer(bytearray(data[size:]), dtype=torch.int32))
        full = stored[:n] == _FULL
        return cls(stored[n:], _ends(stored[:n].long().masked_fill(full, 0)), full).check()

    @classmethod
    def cat(cls, supports: Sequence["Support"]) -> "Support":
        """Returns the rows of several supports, at least one, one after the other.

        Raises:
            TypeError: one that is no support.
            ValueError: none, or on different devices.
        """
        instance("supports", supports, Sequence, "a sequence of Support")
        for i, one in enumerate(supports):
            instance(f"supports[{i}]", one, Support, "a Support")
        devices = {one.ids.device for one in supports}
        if len(devices) != 1:
            got = ", ".join(sorted(map(str, devices))) or "no support"
            raise ValueError(f"supports: expected one device, got {got}")
        return cls(
            torch.cat([one.ids for one in supports]),
            _ends(torch.cat([one.counts for one in supports])),
            torch.cat([one.full for one in supports]),
        )

    @property
    def counts(self) -> Tensor:
        """How many ids each row stores, (N,) int64; 0 in full rows."""
        return self.offsets.diff()

    @property
    def rows(self) -> Tensor:
        """The row of each id, (count,) int64."""
        of_rows = torch.arange(len(self), device=self.ids.device)
        return of_rows.repeat_interleave(self.counts, output_size=self.ids.shape[0])

    def check(self, v: int | None = None) -> "Support":
        """Returns itself if its values are right; on a GPU this waits for the device.

        Args:
            v (int | None): the size of the vocabulary, or None: any.

        Raises:
            ValueError: offsets that do not rise from 0 to the number of ids, ids that do not ascend
                in their row or are not in [0, v), a full row that stores some.
        """
        count, counts = self.ids.shape[0], self.counts
        if int(self.offsets[0]) != 0 or int(self.offsets[-1]) != count or bool((counts < 0).any()):
            raise ValueError(
                f"offsets: expected to rise from 0 to {count}, got {_few(self.offsets)}"
            )
        both = self.full & (counts > 0)
        if bool(both.any()):
            row = int(both.nonzero()[0, 0])
            raise ValueError(
                f"full: expected no ids in full rows, got {int(counts[row])} in {row=}"
            )
        if count == 0:
            return self
        rows = self.rows
        falls = (self.ids[1:] <= self.ids[:-1]) & (rows[1:] == rows[:-1])
        if bool(falls.any()):
            row = int(rows[int(falls.nonzero()[0, 0])])
            own = self.ids[int(self.offsets[row]) : int(self.offsets[row + 1])]
            raise ValueError(f"ids: expected to ascend in a row, got {_few(own)} in {row=}")
        outside = self.ids < 0
        if v is not None:
            outside |= self.ids >= integer("v", v, 1)
        if bool(outside.any()):
            at = int(outside.nonzero()[0, 0])
            limit = "V" if v is None else v
            got, row = int(self.ids[at]), int(rows[at])
            raise ValueError(f"ids: expected ids in [0, {limit}), got {got} in {row=}")
        return self

    def split(self, lengths: Sequence[int]) -> list["Support"]:
        """Returns one support a sequence, of so many rows each; their ids are views.

        Raises:
            TypeError: a length that is no integer.
            ValueError: a negative one, or lengths whose sum is not N.
        """
        instance("lengths", lengths, Sequence, "a sequence of integers")
        sizes = [integer(f"lengths[{i}]", n, 0) for i, n in enumerate(lengths)]
        if sum(sizes) != len(self):
            raise ValueError(f"lengths: expected a sum of {len(self)} rows, got {sum(sizes)}")
        return [self._part(a, b) for a, b in pairwise(accumulate(sizes, initial=0))]

    def index(self, rows: Tensor) -> "Support":
        """Returns the given rows, (M,) int64 in [0, N), which may come repeatedly.

        Raises:
            TypeError: another dtype.
            ValueError: another shape or device, or a row out of range.
        """
        instance("rows", rows, Tensor, "a Tensor")
        rows = per_row("rows", rows, torch.int64, torch.Size((rows.numel(),)), self.ids)
        outside = (rows < 0) | (rows >= len(self))
        if bool(outside.any()):
            got = int(rows[outside][0])
            raise ValueError(f"rows: expected rows in [0, {len(self)}), got {got}")
        counts = self.counts[rows]
        ends = _ends(counts)
        shift = (self.offsets[rows] - ends[:-1]).repeat_interleave(counts)
        places = torch.arange(shift.shape[0], device=shift.device) + shift
        return Support(self.ids[places], ends, self.full[rows])

    def contains(self, tokens: Tensor) -> Tensor:
        """Whether each row keeps its token, (N,) bool, of tokens (N,) int64; never a negative one.

        Raises:
            TypeError: another dtype.
            ValueError: another shape or device.
        """
        tokens = per_row("tokens", tokens, torch.int64, self.full.shape, self.ids)
        rows = self.rows
        found = self.full & (tokens >= 0)
        found[rows[self.ids == tokens[rows]]] = True
        return found

    def to_mask(self, v: int) -> Tensor:
        """Returns the mask (N, v), bool, True where an id is kept.

        Raises:
            ValueError: ids that are not in [0, v).
        """
        self.check(integer("v", v, 1))
        mask = self.full[:, None].repeat(1, v)
        mask[self.rows, self.ids.long()] = True
        return mask

    def to_bytes(self) -> bytes:
        """Returns bytes that `from_bytes` reads: 24, then 4 a row and 4 an id, as the machine's."""
        counts = self.counts.masked_fill(self.full, _FULL).int()
        stored = torch.cat([counts, self.ids]).cpu()
        body = string_at(stored.data_ptr(), 4 * stored.shape[0]) if stored.shape[0] else b""
        return pack(_HEADER, _MARK, len(self), self.ids.shape[0]) + body

    def to(self, device: torch.device | str | int) -> "Support":
        """Returns it on a device."""
        return Support(self.ids.to(device), self.offsets.to(device), self.full.to(device))

    def __len__(self) -> int:
        """The number of rows."""
        return self.full.shape[0]

    def __getitem__(self, rows: slice) -> "Support":
        """The rows of a slice."""
        instance("rows", rows, slice, "a slice")
        chosen = range(len(self))[rows]
        if chosen.step == 1:
            return self._part(chosen.start, max(chosen.start, chosen.stop))
        return self.index(torch.tensor([*chosen], dtype=torch.int64, device=self.ids.device))

    def __eq__(self, other: object) -> bool:
        """Whether both keep the same ids in the same rows, on one device."""
        if not isinstance(other, Support):
            return NotImplemented
        return self.ids.device == other.ids.device and all(
            torch.equal(a, b)
            for a, b in zip(
                (self.ids, self.offsets, self.full),
                (other.ids, other.offsets, other.full),
                strict=True,
            )
        )

    def __repr__(self) -> str:
        """Its sizes, and how many rows are full."""
        return f"Support(rows={len(self)}, ids={self.ids.shape[0]}, full={int(self.full.sum())})"

    def __reduce__(self) -> tuple[type["Support"], tuple[Tensor, ...]]:
        """Pickles what is its own, and not the whole batch that it is a part of."""
        return Support, tuple(x.clone() for x in (self.ids, self.offsets, self.full))

    def _part(self, first: int, last: int) -> "Support":
        """Returns rows [first, last)."""
        offsets = self.offsets[first : last + 1]
        ids = self.ids[int(offsets[0]) : int(offsets[-1])]
        return Support(ids, offsets - offsets[0], self.full[first:last])


def _ends(counts: Tensor) -> Tensor:
    """Returns the offsets (N + 1,) of rows of so many ids."""
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))


def _few(values: Tensor) -> str:
    """Returns the first values as messages show them."""
    shown = ", ".join(map(str, values[:6].tolist()))
    return f"[{shown}, ...]" if values.shape[0] > 6 else f"[{shown}]"
