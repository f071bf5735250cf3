"""Row work of a linear head between the products of two tiles of its vocabulary.

One program has one row of a tile. Tiles come one after another in one order, so that a row's
statistics depend on no other row. Arithmetic is float32, and float64 from tile to tile; of float64
heads everything is float64.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from fastadapt._ops.triton.bundles import (
    NUM_TILE_STATS,
    OTHERS_MAX,
    OTHERS_REST,
    OTHERS_SQUARED,
    OTHERS_SUM,
    OTHERS_WEIGHTED,
)

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
    labels: object  # (n,) int64, rows of the head; negative: elsewhere; not read if MARKED
    bias: object  # (V,) of the head
    numbers: object  # (2,) float64: the scale, the softcap


class Kind(NamedTuple):
    """The compile-time constants of a tile."""

    BIASED: object
    CAPPED: object
    MOMENTS: object  # whether the sums of e d and of e^2, or their gradients, are made
    MARKED: object  # whether products of labels are -inf already
    EXPS: object  # whether the exponentials are written
    KEEP: object  # whether the products are
    DOUBLE: object
    BLOCK: object  # ids of a tile


@triton.jit
def without_nan(x):
    """Replaces NaN for a maximum; the sums still meet it."""
    return tl.where(x != x, NOTHING, x)


@triton.jit
def tanh(x, DOUBLE: tl.constexpr):
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
        unit = tanh(z / cap, kind.DOUBLE)
        z = unit * cap
    return tl.where(inside, z, NOTHING), unit, x


@triton.jit
def _is_label(tile, ids, x, kind):
    """Returns which entries of a tile are labels, from its products."""
    if kind.MARKED:
        found = x == NOTHING
    else:
        found = ids == tl.load(tile.labels + tl.program_id(0)) - tile.first
    return found


class Mass(NamedTuple):
    """What a second product adds to, and reads; of a tile whose kind has EXPS."""

    sums: object  # (n, depth): those before are multiplied by what they shrink to
    depth: object
    exps: object  # (n, width): e^(z - largest so far) dz/dx / scale, 0 at labels
    shrinks: object  # (n,) float64: the factors of what was summed before


@triton.jit
def tile_sum_kernel(tile, stats, mass, kept, kept_stride, kind):
    """Adds a tile to the statistics of its rows; `kept` gets the products, rounded."""
    at = tl.program_id(0).to(tl.int64)
    ids = tl.arange(0, kind.BLOCK)
    z, unit, x = _load_tile(tile, ids, kind)
    inside = ids < tile.width
    label = _is_label(tile, ids, x, kind)
    z = tl.where(label, NOTHING, z)
    if kind.KEEP:
        tl.store(kept + at * kept_stride + ids, x.to(kept.dtype.element_ty), mask=inside)
    stats += at * NUM_TILE_STATS
    before, total = tl.load(stats + OTHERS_MAX), tl.load(stats + OTHERS_SUM)
    high = tl.max(without_nan(z), 0)
    top = tl.maximum(before, high.to(tl.float64))
    # 0 where there was nothing before, 1 where there is still nothing
    shift = tl.where(top == NOTHING, 0.0, before - tl.where(top == NOTHING, 0.0, top))
    shrink = tl.exp(shift)
    d = z - tl.where(top == NOTHING, 0.0, top).to(z.dtype)
    e = tl.exp(d)
    tl.store(stats + OTHERS_MAX, top)
    tl.store(stats + OTHERS_SUM, total * shrink + tl.sum(e, 0).to(tl.float64))
    if kind.MOMENTS:
        weighted = tl.load(stats + OTHERS_WEIGHTED)
        # without anything before, the shift is -inf and the sum 0
        weighted = shrink * (weighted + total * tl.maximum(shift, -1e300))
        here = tl.sum(e * tl.maximum(d, LEAST_EXPONENT), 0)
        tl.store(stats + OTHERS_WEIGHTED, weighted + here.to(tl.float64))
        squared = tl.load(stats + OTHERS_SQUARED) * shrink * shrink
        tl.store(stats + OTHERS_SQUARED, squared + tl.sum(e * e, 0).to(tl.float64))
        rest = tl.where(shift < 0, total * shrink, tl.load(stats + OTHERS_REST))
        here = tl.sum(tl.where(d < 0, e, 0.0), 0)
        tl.store(stats + OTHERS_REST, rest + here.to(tl.float64))
    if kind.EXPS:
        tl.store(mass.shrinks + at, shrink)
        e = tl.where(label, 0.0, e * (1.0 - unit * unit)) if kind.CAPPED else e
        place = mass.exps + at * tile.width + ids
        tl.store(place, e.to(mass.exps.dtype.element_ty), mask=inside)
        if shrink != 1.0:  # of most rows the largest is found in the first tiles
            for begin in range(0, mass.depth, kind.BLOCK):
                own = mass.sums + at * mass.depth + begin + ids
                x = tl.load(own, mask=begin + ids < mass.depth, other=0.0)
                tl.store(own, x * shrink.to(x.dtype), mask=begin + ids < mass.depth)


@triton.jit
def tile_gradient_kernel(tile, stats, gains, out, out_stride, kind):
    """Computes dL/dx = e (a + b d + c e) dz/dx, e = e^d, d = z - m; 0 at labels.

    `gains` has a, b, c of each row; rows whose are 0 are skipped.
    """
    at = tl.program_id(0).to(tl.int64)
    ids = tl.arange(0, kind.BLOCK)
    inside = ids < tile.width
    a = tl.load(gains + 3 * at)
    nothing_comes = a == 0
    if kind.MOMENTS:
        b, c = tl.load(gains + 3 * at + 1), tl.load(gains + 3 * at + 2)
        nothing_comes = nothing_comes & (b == 0) & (c == 0)
    out += at * out_stride
    if nothing_comes:
        nothing = tl.zeros([kind.BLOCK], tl.float32)
        tl.store(out + ids, nothing.to(out.dtype.element_ty), mask=inside)
    else:
        z, unit, x = _load_tile(tile, ids, kind)
        label = _is_label(tile, ids, x, kind)
        scale = tl.load(tile.numbers)
        d = z - tl.load(stats + at * NUM_TILE_STATS + OTHERS_MAX).to(z.dtype)
        e = tl.exp(d)
        per_e = (a * scale).to(z.dtype)
        if kind.MOMENTS:
            per_e += (c * scale).to(z.dtype) * e
            per_e += (b * scale).to(z.dtype) * tl.maximum(d, LEAST_EXPONENT)
        dx = per_e * e
        dx = dx * (1.0 - unit * unit) if kind.CAPPED else dx
        dx = tl.where(label, 0.0, dx)
        tl.store(out + ids, dx.to(out.dtype.element_ty), mask=inside)


@triton.jit
def label_entry_kernel(
    labels, gains, entries, labels_a_row, first, out, out_stride, width, MARK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes out[r, labels[r, k] - first] = gains[r, k], or -inf, for labels in the tile."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.load(labels + at, mask=at < entries, other=-1) - first
    here = (at < entries) & (column >= 0) & (column < width)
    gain = tl.full([BLOCK], float("-inf"), tl.float64)
    if not MARK:
        gain = tl.load(gains + at, mask=here, other=0.0)
    if out.dtype.element_ty != tl.float64:
        gain = gain.to(tl.float32)  # half precision is rounded from there
    place = out + (at // labels_a_row).to(tl.int64) * out_stride + column
    tl.store(place, gain.to(out.dtype.element_ty), mask=here)


class Mix(NamedTuple):
    """The compile-time constants of a mix."""

    FACTOR: object  # whether there are factors
    SOURCE: object  # whether there is a source
    PLACES: object  # whether rows go to other places
    IN_PLACE: object  # whether `out` is `sums`
    BLOCK: object


@triton.jit
def mix_kernel(sums, width, factors, source, source_stride, index, gains, number, places, out, mix):
    """Computes out[places[r]] = factors[r] sums[r] + gains[r] source[index[r]], rounded once.

    With several gains and indices a row, `number` of them, the sum over all.

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
            for k in range(number):
                row = source + tl.load(index + at * number + k) * source_stride
                gain = tl.load(gains + at * number + k).to(x.dtype)
                y += gain * tl.load(row + ids, mask=ids < width, other=0.0).to(x.dtype)
        tl.store(out + to * width + ids, y.to(out.dtype.element_ty), mask=ids < width)


@triton.jit
def dot_kernel(a, a_stride, b, b_stride, index, number, width, out, DOUBLE: tl.constexpr,
               BLOCK: tl.constexpr):  # fmt: skip
    """Computes out[r, k] = a[r] b[index[r, k]]: float64 sums of float32 products of blocks."""
    at = tl.program_id(0).to(tl.int64)
    a += at // number * a_stride
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
