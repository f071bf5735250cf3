"""A linear head met tile by tile of its vocabulary, on the CPU: forward and backward.

The products are torch's, the work on the rows between them is C++. `plan` says what the backward
will want: nothing (0), gradients of the head too (1), or those of the hidden states alone (2, the
frozen head, whose forward makes the Jacobian row W_y - sum of q_j W_j). With 1M = one product of
N H V: 1M forward, and backward 3M (plan 1; 2M for the tiles whose logits were kept), or with plan 2
2M forward and no product backward.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastadapt import _C
from fastadapt.loss_ops import address
from fastadapt.ops import DTYPE_CODES, check_ids, rows_of
from fastadapt.outputs import NUM_STATS, wide_dtype

FORWARD_ONLY, RECOMPUTE, FROZEN_HEAD = 0, 1, 2  # plans
TILE = 2048  # ids a tile; csrc/kernels.h: at most 4096
OTHERS_MAX, OTHERS_SUM, OTHERS_WEIGHTED, LABEL_LOGIT = range(NUM_STATS)  # csrc/kernels.h, Stat
_PRODUCT_ELEMENTS = 1 << 20  # of a bfloat16 product that is added to float32 sums

Triple = tuple[Tensor, Tensor, Tensor]


class _Head(NamedTuple):
    """The rows that are not ignored, and the head that they meet."""

    hidden: Tensor  # (n, H), contiguous rows
    weight: Tensor
    labels: Tensor  # (n,)
    places: Tensor | None  # (n,), their places among all rows; None: all of them
    bias: Tensor | None  # (V,), float32 or float64
    softcap: float
    scale: float

    def tiles(self) -> Iterator[tuple[int, int]]:
        """First id of each tile and the one after its last."""
        v = self.weight.shape[0]
        return ((first, min(first + TILE, v)) for first in range(0, v, TILE))

    def tile(self, x: Tensor, first: int) -> tuple[Any, int, int, int, float, float]:
        """What the kernels need to know of a tile of products."""
        bias = 0 if self.bias is None else self.bias[first:].data_ptr()
        return rows_of(x), first, self.labels.data_ptr(), bias, self.scale, self.softcap

    def products(self, first: int, last: int, out: Tensor) -> Tensor:
        """hidden @ weight.T over a tile, (n, last - first) at the start of a flat buffer."""
        n = self.hidden.shape[0]
        tile = out[: n * (last - first)].view(n, last - first)
        return torch.mm(self.hidden, self.weight[first:last].t(), out=tile)

    def slope(self, logits: Tensor) -> Tensor:
        """dz / dx at mapped logits."""
        if self.softcap == 0:
            return torch.full_like(logits, self.scale)
        return self.scale * (1 - (logits / self.softcap).square())


def _head(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    softcap: float,
    scale: float,
    ignore_index: int,
) -> _Head:
    """Drops the ignored rows before the first product."""
    used = labels != ignore_index
    index = None if bool(used.all()) else used.nonzero()[:, 0]
    if index is not None:
        hidden, labels = hidden.index_select(0, index), labels.index_select(0, index)
    bias = None if bias is None else bias.to(wide_dtype(hidden.dtype)).contiguous()
    return _Head(hidden, weight, labels, index, bias, softcap, scale)


def _label_logits(head: _Head) -> Tensor:
    """(n,) float64: the labels' own logits, float32 dot products."""
    index: Tensor | None = head.labels
    weight = head.weight
    if weight.stride(1) != 1:
        weight, index = weight.index_select(0, head.labels), None
    n, h = head.hidden.shape
    out = head.hidden.new_empty(n, dtype=torch.float64)
    _C.dot(
        DTYPE_CODES[weight.dtype],
        n,
        h,
        head.hidden.data_ptr(),
        head.hidden.stride(0),
        weight.data_ptr(),
        weight.stride(0),
        address(index),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    if head.bias is not None:
        out += head.bias.index_select(0, head.labels)
    out *= head.scale
    return out if head.softcap == 0 else head.softcap * (out / head.softcap).tanh()


def _mix(
    sums: Tensor,
    source: Tensor,
    *,
    factor: Tensor | None = None,
    gain: Tensor | None = None,
    index: Tensor | None = None,
) -> None:
    """sums[r] = factor[r] sums[r] + gain[r] source[index[r]], source rounded to nothing less."""
    if source.stride(1) != 1:
        source, index = (source if index is None else source.index_select(0, index)), None
        source = source.contiguous()
    n, h = sums.shape
    _C.mix(
        DTYPE_CODES[source.dtype],
        n,
        h,
        sums.data_ptr(),
        address(factor),
        address(gain),
        address(index),
        source.data_ptr(),
        source.stride(0),
        torch.get_num_threads(),
    )


def _add_product(sums: Tensor, a: Tensor, b: Tensor, factor: Tensor | None = None) -> None:
    """sums = factor sums + a @ b: half types by blocks of rows, each product rounded once."""
    if sums.dtype == a.dtype:
        if factor is not None:
            sums.mul_(factor[:, None].to(sums.dtype))
        sums.addmm_(a, b)
        return
    n, h = sums.shape
    block = max(1, min(n, _PRODUCT_ELEMENTS // h))
    out = a.new_empty(block, h)
    for r in range(0, n, block):
        rows = slice(r, min(r + block, n))
        product = torch.mm(a[rows], b, out=out[: rows.stop - r])
        _mix(sums[rows], product, factor=None if factor is None else factor[rows])


def _scatter(sums: Tensor, out: Tensor, gain: Tensor | None, index: Tensor | None) -> None:
    """out[index[r]] = gain[r] sums[r], rounded once."""
    n, h = sums.shape
    _C.scatter(
        DTYPE_CODES[out.dtype],
        n,
        h,
        sums.data_ptr(),
        address(gain),
        address(index),
        out.data_ptr(),
        torch.get_num_threads(),
    )


def _kept_tiles(n: int, v: int, itemsize: int, plan: int, kept_bytes: int) -> int:
    """How many tiles of logits the forward leaves to the backward."""
    if plan != RECOMPUTE or n == 0:
        return 0
    tiles = (v + TILE - 1) // TILE
    return tiles if n * v * itemsize <= kept_bytes else kept_bytes // (n * TILE * itemsize)


def empty_outputs(hidden: Tensor, weight: Tensor, plan: int, kept_bytes: int) -> Triple:
    """Margins, statistics, and what is kept: Jacobian rows, tiles of logits or nothing."""
    n, h = hidden.shape
    v = weight.shape[0]
    wide = wide_dtype(hidden.dtype)
    if plan == FROZEN_HEAD:
        kept = hidden.new_empty(n, h, dtype=wide)
    else:
        tiles = _kept_tiles(n, v, hidden.element_size(), plan, kept_bytes)
        kept = hidden.new_empty(n * min(tiles * TILE, v))
    stats = hidden.new_empty(n, NUM_STATS, dtype=torch.float64)
    return hidden.new_empty(n, dtype=wide), stats, kept


def _spread(values: Tensor, out: Tensor, index: Tensor | None) -> None:
    """Values of the used rows among all rows; 0 elsewhere."""
    if index is None:
        out.copy_(values)
    else:
        out.zero_().index_copy_(0, index, values.to(out.dtype))


def forward(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    softcap: float,
    logit_scale: float,
    ignore_index: int,
    plan: int,
    kept_bytes: int,
    weighted: bool,
) -> Triple:
    """One product a tile, two with a frozen head."""
    v = weight.shape[0]
    check_ids("labels", labels, v, ignore_index)
    margins, all_stats, kept = out = empty_outputs(hidden, weight, plan, kept_bytes)
    head = _head(hidden, weight, labels, bias, softcap, logit_scale, ignore_index)
    n = head.hidden.shape[0]
    stats = all_stats.new_zeros(n, NUM_STATS)
    stats[:, OTHERS_MAX] = float("-inf")
    stats[:, LABEL_LOGIT] = _label_logits(head)
    buffer = hidden.new_empty(n * min(TILE, v))
    frozen = plan == FROZEN_HEAD
    sums = kept[:n].zero_() if frozen else None
    shrinks = stats.new_empty(n)
    _C.prefer_huge_pages(kept.data_ptr(), kept.nbytes)
    held = 0 if frozen else kept.shape[0] // max(1, hidden.shape[0])  # ids whose logits are kept
    for first, last in head.tiles():
        tile = head.products(first, last, kept[n * first :] if last <= held else buffer)
        _C.tile(
            head.tile(tile, first),
            weighted,
            stats.data_ptr(),
            tile.data_ptr() if frozen else 0,
            shrinks.data_ptr(),
            torch.get_num_threads(),
        )
        if sums is not None:
            _add_product(sums, tile, weight[first:last], shrinks)
    mass, alone = stats[:, OTHERS_SUM], stats[:, OTHERS_SUM] == 0
    value = stats[:, LABEL_LOGIT] - stats[:, OTHERS_MAX] - mass.log()
    _spread(torch.where(alone, float("inf"), value), margins, head.places)
    if sums is not None:
        _mix(
            sums,
            weight,
            factor=torch.where(alone, 0.0, -logit_scale / mass),
            gain=torch.where(alone, 0.0, head.slope(stats[:, LABEL_LOGIT])),
            index=head.labels,
        )
    _spread(stats, all_stats, head.places)
    return out


def backward(
    dmargins: Tensor,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    softcap: float,
    logit_scale: float,
    ignore_index: int,
    stats: Tensor,
    kept: Tensor,
    wanted: list[bool],
) -> Triple:
    """Each block of the head's gradient is finished in one product and written once."""
    head = _head(hidden, weight, labels, bias, softcap, logit_scale, ignore_index)
    held = kept.shape[0] // max(1, hidden.shape[0])
    gains = dmargins.double()
    if head.places is not None:
        gains, stats = gains.index_select(0, head.places), stats.index_select(0, head.places)
    gains = torch.where(stats[:, OTHERS_SUM] == 0, 0.0, gains).contiguous()
    label_gains = gains * head.slope(stats[:, LABEL_LOGIT])
    (n, h), v = head.hidden.shape, weight.shape[0]
    dhidden, dweight, dbias = empty_gradients(hidden, weight, bias, wanted)
    _C.prefer_huge_pages(dweight.data_ptr(), dweight.nbytes)
    whole = hidden.dtype == wide_dtype(hidden.dtype) and head.places is None
    rows = n if wanted[0] else 0
    sums = dhidden if whole else hidden.new_empty(rows, h, dtype=wide_dtype(hidden.dtype))
    sums.zero_()
    buffer = hidden.new_empty(n * min(TILE, v))
    ones = hidden.new_ones(1, n)
    for first, last in head.tiles():
        out = buffer[: n * (last - first)].view(n, last - first)
        tile = out
        if last <= held:
            tile = kept[n * first : n * last].view(n, last - first)
        else:
            head.products(first, last, buffer)
        _C.tile_backward(
            head.tile(tile, first),
            stats.data_ptr(),
            gains.data_ptr(),
            out.data_ptr(),
            torch.get_num_threads(),
        )
        if wanted[0]:  # the label's share, still 0 here, is added in float32 below
            _add_product(sums, out, weight[first:last])
        if wanted[1] or wanted[2]:
            here = ((head.labels >= first) & (head.labels < last)).nonzero()[:, 0]
            out[here, head.labels[here] - first] = label_gains[here].to(out.dtype)
        if wanted[1]:
            torch.mm(out.t(), head.hidden, out=dweight[first:last])
        if wanted[2]:
            dbias[first:last] = torch.mm(ones, out)[0]
    if wanted[0]:
        _mix(sums, weight, gain=label_gains, index=head.labels)
        if not whole:
            _scatter(sums, dhidden, None, head.places)
    return dhidden, dweight, dbias


def empty_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: list[bool]
) -> Triple:
    """Room for those wanted; zeros, because ignored rows have none."""
    return (
        hidden.new_zeros(hidden.shape if wanted[0] else (0, hidden.shape[1])),
        weight.new_empty(weight.shape if wanted[1] else (0, weight.shape[1])),
        weight.new_empty(weight.shape[0] if wanted[2] and bias is not None else 0),
    )


def frozen_head_backward(
    dmargins: Tensor,
    labels: Tensor,
    ignore_index: int,
    stats: Tensor,
    rows: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """dL/dhidden = dL/dm times the Jacobian row: no product, no head."""
    used = labels != ignore_index
    index = None if bool(used.all()) else used.nonzero()[:, 0]
    gains = torch.where(stats[:, OTHERS_SUM] == 0, 0.0, dmargins.double())
    if index is not None:
        gains = gains.index_select(0, index)
    out = rows.new_zeros(rows.shape, dtype=dtype)
    _scatter(rows[: gains.shape[0]], out, gains, index)
    return out
