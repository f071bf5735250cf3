"""Edits of few logits a row, as lists of ids: penalties, biases, bans, replaced values."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastadapt._ops.checks import instance, integer, one_of
from fastadapt._ops.edits import joined_lists

COLUMNS = ("pre", "penalty", "post", "last")
NEUTRAL = (0.0, 1.0, 0.0, 0.0)


class Edits:
    """Changes of listed logits, in float32, before temperature and filters.

    Of each listed id `y = x + pre; y = y / penalty where y > 0, else y * penalty; y = y + post;
    y = y + last`, every operation rounded once, which is what transformers, vLLM's kernel and
    llama.cpp compute. x = -inf stays -inf; a ban, an addition of -inf, leaves NaN where x is NaN or
    +inf (what is not `allowed` is -inf whatever it was). Other ids keep their logits.

    Ids are in compressed rows: those of row r are `ids[offsets[r]:offsets[r + 1]]`. The lists are
    not copied, and must not change afterwards.

    Examples:
        >>> edits = Edits.from_rows([{0: 1.0}, {2: -float("inf")}], "pre")
        >>> edits
        Edits(2 rows, 2 ids)
        >>> filter_logits(torch.zeros(2, 3), Adaptor(), edits=edits)
        tensor([[1., 0., 0.],
                [0., 0., -inf]])

    Args:
        ids (Tensor): (E,), int32, >= 0, ascending and each once within a row.
        offsets (Tensor): (N + 1,), int64, from 0 to E, never descending.
        pre (Tensor | None): (E,), float32, finite or -inf (a ban). None: 0.
        penalty (Tensor | None): (E,), float32, finite, > 0. None: 1.
        post (Tensor | None): (E,), float32, finite or -inf. None: 0.
        last (Tensor | None): (E,), float32, finite or -inf. None: 0.

    Raises:
        TypeError: no tensor, another dtype, or one that requires a gradient (`Edits.set` takes it).
        ValueError: another shape or device; on the CPU also wrong ids, offsets or numbers. On CUDA
            these are not read (that would synchronise): ids that are not ascending give undefined
            logits of that row, a NaN among numbers its status.
    """

    def __init__(
        self,
        ids: Tensor,
        offsets: Tensor,
        *,
        pre: Tensor | None = None,
        penalty: Tensor | None = None,
        post: Tensor | None = None,
        last: Tensor | None = None,
    ) -> None:
        """Checks the lists once, so that calls need not."""
        _check_lists(ids, offsets)
        given = dict(zip(COLUMNS, (pre, penalty, post, last), strict=True))
        columns = torch.empty(4, len(ids), dtype=torch.float32, device=ids.device)
        for column, (name, values), neutral in zip(columns, given.items(), NEUTRAL, strict=True):
            if values is None:
                column.fill_(neutral)
                continue
            _check_numbers(name, values, ids)
            if values.requires_grad:
                raise TypeError(f"{name}: expected no gradient, which Edits.set has for its values")
            column.copy_(values)
        self._fill(ids, offsets, columns)

    def _fill(self, ids: Tensor, offsets: Tensor, columns: Tensor) -> "Edits":
        """Sets the fields."""
        self.ids, self.offsets, self.columns = ids.contiguous(), offsets.contiguous(), columns
        # what a vocabulary has to hold; not known on CUDA
        known = ids.device.type == "cpu" and len(ids) > 0
        self.largest = int(ids.max()) if known else -1
        return self

    @classmethod
    def _made(cls, ids: Tensor, offsets: Tensor, columns: Tensor, largest: int) -> "Edits":
        """Returns edits of lists made here, which need no check."""
        made = cls.__new__(cls)
        made.ids, made.offsets, made.columns, made.largest = ids, offsets, columns, largest
        return made

    @classmethod
    def set(cls, ids: Tensor, offsets: Tensor, values: Tensor) -> "Edits":
        """Returns edits that replace listed logits by given values, whatever they were.

        For any other rule: gather the logits, compute, and put the results back. Gradients reach
        `values`, those of `adapted_log_odds`.

        Examples:
            >>> logits = torch.tensor([[2.0, 1.0, 0.0]])
            >>> ids, offsets = torch.tensor([1], dtype=torch.int32), torch.tensor([0, 1])
            >>> edits = Edits.set(ids, offsets, logits[0, 1:2] * 3)
            >>> filter_logits(logits, Adaptor(), edits=edits)
            tensor([[2., 3., 0.]])

        Args:
            ids (Tensor): as for `Edits`.
            offsets (Tensor): as for `Edits`.
            values (Tensor): (E,), float32, finite or -inf.

        Raises:
            TypeError, ValueError: as `Edits`.
        """
        _check_lists(ids, offsets)
        _check_numbers("values", values, ids)
        return cls.__new__(cls)._fill(ids, offsets, values[None].contiguous())

    @classmethod
    def from_rows(
        cls,
        rows: Sequence[Mapping[int, float]],
        column: str,
        *,
        device: torch.device | str | None = None,
    ) -> "Edits":
        """Returns edits of one column from a mapping of ids to numbers a row.

        Examples:
            >>> Edits.from_rows([{3: 1.2, 1: 1.2}, {}], "penalty").ids
            tensor([1, 3], dtype=torch.int32)

        Args:
            rows (Sequence[Mapping[int, float]]): N of them, empty ones for rows without edits; such
                as the `logit_bias` of requests, its ids made integers.
            column (str): "pre", "penalty", "post" or "last".
            device (torch.device | str | None): of the edits. None: the CPU.

        Raises:
            TypeError: a row that is no mapping, an id that is no integer.
            ValueError: no such column, an id out of int32's range; and as `Edits`.
        """
        one_of("column", column, COLUMNS)
        for at, row in enumerate(rows):
            instance(f"rows[{at}]", row, Mapping, "a mapping of ids to numbers")
            for i in row:
                integer(f"rows[{at}]", i, 0, 2**31 - 1)
        ordered = [sorted(row.items()) for row in rows]
        pairs = [pair for row in ordered for pair in row]
        ends = torch.tensor([0, *map(len, ordered)], device="cpu").cumsum(0)
        ids = torch.tensor([i for i, _ in pairs], dtype=torch.int32, device="cpu")
        values = torch.tensor([x for _, x in pairs], dtype=torch.float32, device="cpu")
        return cls(ids, ends, **{column: values}).to(device or "cpu")

    @property
    def rows(self) -> int:
        """The number of rows."""
        return len(self.offsets) - 1

    @property
    def sets(self) -> bool:
        """Whether these replace logits by given values."""
        return len(self.columns) == 1

    def to(self, device: torch.device | str) -> "Edits":
        """Returns the same edits on a device.

        Args:
            device (torch.device | str): where to.
        """
        made = type(self).__new__(type(self))._fill(*self._lists(device))
        made.largest = max(made.largest, self.largest)  # known from the CPU on
        return made

    def _lists(self, device: torch.device | str) -> tuple[Tensor, Tensor, Tensor]:
        """Returns ids, offsets and columns on a device."""
        return self.ids.to(device), self.offsets.to(device), self.columns.to(device)

    def __add__(self, after: "Edits") -> "Edits":
        """Returns both, these first, as edits of the same form.

        That is so where no id needs two penalties, more than one addition before a penalty or more
        than two after it: a sum of numbers would be rounded once instead of twice. Beside given
        values (`Edits.set`) there may be edits of the same ids alone, and values replace what comes
        before them. What one of both bans is banned, of whatever finite logit.

        Examples:
            >>> bias = Edits.from_rows([{0: 1.0}], "pre")
            >>> (bias + Edits.from_rows([{0: 2.0}], "penalty")).columns.flatten()
            tensor([1., 2., 0., 0.])

        Raises:
            ValueError: other rows, an id whose edits do not fit into one, or whose value is not
                given where others' are.
        """
        if not isinstance(after, Edits):
            return NotImplemented
        return joined(self, after)

    def __repr__(self) -> str:
        """Says how many there are."""
        return f"Edits({self.rows} rows, {len(self.ids)} ids{', given values' * self.sets})"


def joined(first: Edits, after: Edits) -> Edits:
    """Returns the edits of two lists, one after the other, as one list."""
    if first.rows != after.rows or first.ids.device != after.ids.device:
        raise ValueError(
            f"edits: expected {first.rows} rows on {first.ids.device}, got {after.rows} on "
            f"{after.ids.device}"
        )
    if first.sets or after.sets:
        return _joined_values(first, after)
    device = first.ids.device
    (ids, offsets, columns), misfit = joined_lists(*(x._lists("cpu") for x in (first, after)))
    if misfit >= 0:
        row = int(torch.searchsorted(offsets, misfit, right=True)) - 1
        raise ValueError(
            "edits: expected at most one addition before a penalty, one penalty and two additions "
            "after it (in a sum biases come first), got more for id "
            f"{int(ids[misfit])} in row {row}"
        )
    largest = max(first.largest, after.largest)
    made = Edits._made(ids, offsets, columns, largest)
    return made if device.type == "cpu" else made.to(device)


def _joined_values(first: Edits, after: Edits) -> Edits:
    """Returns both where one of them gives values."""
    both, place = torch.cat([_keys(first), _keys(after)]).unique(return_inverse=True)
    of_first, of_after = place.split([len(first.ids), len(after.ids)])
    ids = (both & 0xFFFFFFFF).int()  # ascending by row, then by id
    counts = (both >> 32).bincount(minlength=first.rows)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    if not after.sets:  # edits of values are values
        if len(of_first) < len(ids):
            raise _not_given(of_first, ids)
        pre, penalty, post, last = after.columns
        x = first.columns[0][_inverse(of_first)][of_after]
        y = x + pre
        y = torch.where(y > 0, y / penalty, y * penalty) + post + last
        y = torch.where(x == float("-inf"), x, y)
        values = first.columns[0][_inverse(of_first)].index_put((of_after,), y)
    else:
        if not first.sets and len(of_after) < len(ids):
            raise _not_given(of_after, ids)
        values = after.columns.new_zeros(len(ids))
        if first.sets:
            values = values.index_put((of_first,), first.columns[0])
        values = values.index_put((of_after,), after.columns[0])
    return Edits.__new__(Edits)._fill(ids, offsets, values[None])


def _not_given(of_values: Tensor, ids: Tensor) -> ValueError:
    """The error of an id that is edited while the values of others are given."""
    missing = torch.ones_like(ids, dtype=torch.bool).index_fill_(0, of_values, False)
    at = int(missing.nonzero()[0])
    return ValueError(
        "edits: expected edits of ids alone whose values are given beside Edits.set, got one of "
        f"id {int(ids[at])}"
    )


def _inverse(order: Tensor) -> Tensor:
    """Returns the inverse of a permutation."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def _keys(edits: Edits) -> Tensor:
    """Returns one number for each row and id."""
    rows = torch.arange(edits.rows, device=edits.ids.device)
    lengths = edits.offsets.diff()
    return rows.repeat_interleave(lengths, output_size=len(edits.ids)) << 32 | edits.ids


def _check_lists(ids: Tensor, offsets: Tensor) -> None:
    """Raises unless ids and offsets are compressed rows."""
    for name, x, dtype in (("ids", ids, torch.int32), ("offsets", offsets, torch.int64)):
        instance(name, x, Tensor, f"a tensor of {dtype}")
        if x.dtype != dtype:
            raise TypeError(f"{name}: expected a tensor of {dtype}, got {x.dtype}")
        if x.dim() != 1 or x.device != ids.device:
            raise ValueError(
                f"{name}: expected one dimension on {ids.device}, got shape {tuple(x.shape)} on "
                f"{x.device}"
            )
    if len(offsets) == 0:
        raise ValueError("offsets: expected N + 1 of them, got none")
    if ids.device.type != "cpu":
        return
    if int(offsets[0]) != 0 or int(offsets[-1]) != len(ids) or bool((offsets.diff() < 0).any()):
        raise ValueError(
            f"offsets: expected to ascend from 0 to {len(ids)}, got {offsets.tolist()[:8]}"
        )
    if len(ids) == 0:
        return
    if int(ids.min()) < 0:
        raise ValueError(f"ids: expected none below 0, got {int(ids.min())}")
    ascends = ids.diff() > 0
    begins = offsets[1:-1]
    ascends[begins[(begins > 0) & (begins < len(ids))] - 1] = True  # another row
    if not bool(ascends.all()):
        at = int((~ascends).nonzero()[0])
        row = int(torch.searchsorted(offsets, at, right=True)) - 1
        raise ValueError(
            f"ids: expected ascending ones, each once, got {int(ids[at + 1])} after {int(ids[at])} "
            f"in row {row}"
        )


def _check_numbers(name: str, values: Tensor, ids: Tensor) -> None:
    """Raises unless there is a number for each id."""
    instance(name, values, Tensor, "a tensor of torch.float32")
    if values.dtype != torch.float32:
        raise TypeError(f"{name}: expected a tensor of torch.float32, got {values.dtype}")
    if values.shape != ids.shape or values.device != ids.device:
        raise ValueError(
            f"{name}: expected shape {tuple(ids.shape)} on {ids.device}, got "
            f"{tuple(values.shape)} on {values.device}"
        )
    if values.device.type != "cpu":
        return
    if name == "penalty":
        good, expected = (values > 0) & (values < float("inf")), "finite values > 0"
    else:
        good, expected = values < float("inf"), "finite values or -inf"
    if not bool(good.all()):
        raise ValueError(f"{name}: expected {expected}, got {float(values[~good][0])}")
