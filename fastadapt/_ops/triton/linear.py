"""Row work of a linear head between the products of two tiles of its vocabulary.

One program has one row of a tile. Tiles come one after another in one order, so that a row's
statistics depend on no other row. Arithmetic is float32, and float64 from tile to tile; of float64
heads everything is float64.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from fastadapt._ops.triton.bundles import NUM_STATS, OTHERS_MAX, OTHERS_SUM, OTHERS_WEIGHTED

NOTHING = tl.constexpr(float("-inf"))
LEAST_EXPONENT = tl.constexpr(-87.0)  # e^d times d is as good as 0 below, and never 0 times -inf
# tanh x = x - x^3/3 + ..., used where (1 - e^-2x) / (1 + e^-2x) would cancel: its error there is
# below 2e-10 for float32, to 0.17, and 2e-17 for float64, to 0.04
TANH = tl.constexpr((21844 / 6081075, -1382 / 155925, 62 / 2835, -17 / 315, 2 / 15, -1 / 3, 1.0))


class Tile(NamedTuple):
    """Products of rows with ids [first, first + width) of the head."""

    products: object  # (n, width)
    stride: object
    first: object
    width: object
    labels: object  # (n,) int64, rows of the head; negative: elsewhere
    bias: object  # (V,) of the head
    numbers: object  # (2,) float64: the scale, the softcap


class Kind(NamedTuple):
    """The compile-time constants of a tile."""

    BIASED: object
    CAPPED: object
    WEIGHTED: object  # whether the weighted sum is made
    EXPS: object  # whether the exponentials are written
    KEEP: object  # whether the products are
    DOUBLE: object
    BLOCK: object  # ids of a tile


@triton.jit
def _without_nan(x):
    """Replaces NaN for a maximum; the sums still meet it."""
    return tl.where(x != x, NOTHING, x)


@triton.jit
def _tanh(x, DOUBLE: tl.constexpr):
    """Returns tanh to the rounding of the type, from e^-2|x|."""
    a = tl.abs(x)
    e = tl.exp(-2.0 * a)
    t = (1.0 - e) / (1.0 + e)
    square = x * x
    series = square * 0.0 + TANH[0]
    for i in tl.static_range(1, 7):
        series = series * square + TANH[i]
    small = 0.04 if DOUBLE else 0.17
    return tl.where(a < small, x * series, tl.where(x < 0, -t, t))


@triton.jit
def _load_tile(tile, ids, kind):
    """Returns a row's logits, -inf past the end, with z / cap (0 without a cap) and products."""
    row = tile.products + tl.program_id(0).to(tl.int64) * tile.stride
    inside = ids < tile.width
    x = tl.load(row + ids, mask=inside, other=0.0)
    z = x.to(tl.float64) if kind.DOUBLE else x.to(tl.float32)
    scale = tl.load(tile.numbers).to(z.dtype)
    if kind.BIASED:
        z += tl.load(tile.bias + tile.first + ids, mask=inside, other=0.0).to(z.dtype)
    z = z * scale
    unit = z * 0.0
    if kind.CAPPED:
        cap = tl.load(tile.numbers + 1).to(z.dtype)
        unit = _tanh(z / cap, kind.DOUBLE)
        z = unit * cap
    return tl.where(inside, z, NOTHING), unit, x


@triton.jit
def tile_sum_kernel(tile, stats, shrinks, exps, kept, kept_stride, kind):
    """Adds a tile to the statistics of its rows.

    `shrinks` gets the factor of what was summed before; `exps`, (n, width), e^(z - largest so far)
    dz/dx / scale, 0 at the label; `kept` the products, rounded.
    """
    at = tl.program_id(0).to(tl.int64)
    ids = tl.arange(0, kind.BLOCK)
    z, unit, x = _load_tile(tile, ids, kind)
    inside = ids < tile.width
    if kind.KEEP:
        tl.store(kept + at * kept_stride + ids, x.to(kept.dtype.element_ty), mask=inside)
    z = tl.where(ids == tl.load(tile.labels + at) - tile.first, NOTHING, z)
    stats += at * NUM_STATS
    before, total = tl.load(stats + OTHERS_MAX), tl.load(stats + OTHERS_SUM)
    high = tl.max(_without_nan(z), 0)
    top = tl.maximum(before, high.to(tl.float64))
    # 0 where there was nothing before, 1 where there is still nothing
    shift = tl.where(top == NOTHING, 0.0, before - tl.where(top == NOTHING, 0.0, top))
    shrink = tl.exp(shift)
    d = z - tl.where(top == NOTHING, 0.0, top).to(z.dtype)
    e = tl.exp(d)
    tl.store(stats + OTHERS_MAX, top)
    tl.store(stats + OTHERS_SUM, total * shrink + tl.sum(e, 0).to(tl.float64))
    if kind.WEIGHTED:
        weighted = tl.load(stats + OTHERS_WEIGHTED)
        # without anything before, the shift is -inf and the sum 0
        weighted = shrink * (weighted + total * tl.maximum(shift, -1e300))
        here = tl.sum(e * tl.maximum(d, LEAST_EXPONENT), 0)
        tl.store(stats + OTHERS_WEIGHTED, weighted + here.to(tl.float64))
    if kind.EXPS:
        tl.store(shrinks + at, shrink)
        e = e * (1.0 - unit * unit) if kind.CAPPED else e
        tl.store(exps + at * tile.width + ids, e.to(exps.dtype.element_ty), mask=inside)


@triton.jit
def tile_gradient_kernel(tile, stats, gains, out, out_stride, kind):
    """Computes dL/dx = -gain e^(z - m) dz/dx / sum, 0 at the label; skips rows without gain."""
    at = tl.program_id(0).to(tl.int64)
    ids = tl.arange(0, kind.BLOCK)
    inside = ids < tile.width
    gain = tl.load(gains + at)
    out += at * out_stride
    if gain == 0:
        nothing = tl.zeros([kind.BLOCK], tl.float32)
        tl.store(out + ids, nothing.to(out.dtype.element_ty), mask=inside)
    else:
        z, unit, _ = _load_tile(tile, ids, kind)
        top = tl.load(stats + at * NUM_STATS + OTHERS_MAX)
        total = tl.load(stats + at * NUM_STATS + OTHERS_SUM)
        per_unit = (-gain / total * tl.load(tile.numbers)).to(z.dtype)
        dx = per_unit * tl.exp(z - top.to(z.dtype))
        dx = dx * (1.0 - unit * unit) if kind.CAPPED else dx
        dx = tl.where(ids == tl.load(tile.labels + at) - tile.first, 0.0, dx)
        tl.store(out + ids, dx.to(out.dtype.element_ty), mask=inside)


@triton.jit
def label_entry_kernel(labels, gains, rows, first, out, out_stride, width, BLOCK: tl.constexpr):
    """Writes out[r, labels[r] - first] = gains[r] for labels in the tile."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.load(labels + at, mask=at < rows, other=-1) - first
    here = (at < rows) & (column >= 0) & (column < width)
    gain = tl.load(gains + at, mask=here, other=0.0)
    if out.dtype.element_ty != tl.float64:
        gain = gain.to(tl.float32)  # half precision is rounded from there
    place = out + at.to(tl.int64) * out_stride + column
    tl.store(place, gain.to(out.dtype.element_ty), mask=here)


class Mix(NamedTuple):
    """The compile-time constants of a mix."""

    FACTOR: object  # whether there are factors
    SOURCE: object  # whether there is a source
    PLACES: object  # whether rows go to other places
    IN_PLACE: object  # whether `out` is `sums`
    BLOCK: object


@triton.jit
def mix_kernel(sums, width, factors, source, source_stride, index, gains, places, out, mix):
    """Computes out[places[r]] = factors[r] sums[r] + gains[r] source[index[r]], rounded once.

    Without a source, rows whose factor is 1 stay as they are in place.
    """
    at = tl.program_id(0).to(tl.int64)
    ids = tl.program_id(1) * mix.BLOCK + tl.arange(0, mix.BLOCK)
    factor = tl.full([], 1.0, tl.float64)
    if mix.FACTOR:
        factor = tl.load(factors + at)
    to = tl.load(places + at) if mix.PLACES else at
    stays = factor == 1.0
    if mix.SOURCE or not mix.IN_PLACE:
        stays = at < 0
    if stays == 0:
        x = tl.load(sums + at * width + ids, mask=ids < width, other=0.0)
        y = x * factor.to(x.dtype)
        if mix.SOURCE:
            row = source + tl.load(index + at) * source_stride
            gain = tl.load(gains + at).to(x.dtype)
            y += gain * tl.load(row + ids, mask=ids < width, other=0.0).to(x.dtype)
        tl.store(out + to * width + ids, y.to(out.dtype.element_ty), mask=ids < width)


@triton.jit
def dot_kernel(a, a_stride, b, b_stride, index, width, out, DOUBLE: tl.constexpr,
               BLOCK: tl.constexpr):  # fmt: skip
    """Computes out[r] = a[r] b[index[r]]: float64 sums of float32 products of blocks."""
    at = tl.program_id(0).to(tl.int64)
    a += at * a_stride
    b += tl.load(index + at) * b_stride
    total = tl.full([], 0.0, tl.float64)
    for begin in range(0, width, BLOCK):
        ids = begin + tl.arange(0, BLOCK)
        x = tl.load(a + ids, mask=ids < width, other=0.0)
        y = tl.load(b + ids, mask=ids < width, other=0.0)
        if DOUBLE:
            total += tl.sum(x.to(tl.float64) * y.to(tl.float64), 0)
        else:
            total += tl.sum(x.to(tl.float32) * y.to(tl.float32), 0).to(tl.float64)
    tl.store(out + at, total)
