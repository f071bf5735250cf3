"""The label, or several candidates, against all other entries of a row of logits.

Each tile of a row is one program. What it leaves is combined by a second launch in one order, so
that a row's result depends on no other row. Tiles are summed in float32 and rows in float64;
everything about float64 logits is float64.
"""

import triton
import triton.language as tl

from fastadapt._ops.triton.bundles import (
    LABEL_LOGIT,
    NUM_STATS,
    OTHERS_MAX,
    OTHERS_SUM,
    OTHERS_WEIGHTED,
    TOP_ID,
    Entries,
    row_at,
)

NOTHING = tl.constexpr(float("-inf"))


@triton.jit
def _load(row, ids, end, DOUBLE: tl.constexpr):
    """Loads logits in the type of the arithmetic, -inf from `end` on."""
    x = tl.load(row + ids, mask=ids < end, other=NOTHING)
    return x.to(tl.float64) if DOUBLE else x.to(tl.float32)


@triton.jit
def _without_nan(x):
    """Replaces NaN for a maximum; the sums still meet it."""
    return tl.where(x != x, NOTHING, x)


@triton.jit
def _exponential(x, top):
    """Returns e^(x - top), 0 where both are -inf, NaN where both are +inf."""
    return tl.exp(x - tl.where(top == NOTHING, 0.0, top))


@triton.jit
def _log_odds(own, top, total):
    """Returns the log-odds of an entry against others of sum total e^top, +inf without others."""
    return tl.where(total == 0, float("inf"), own - top - tl.log(total))


@triton.jit
def _counts(labels, at, v):
    """Returns the label of a row, and whether it is a valid id."""
    label = tl.load(labels.ids + at)
    return label, (label >= 0) & (label < v) & (label != labels.ignore_index)


@triton.jit
def label_sum_kernel(rows, labels, sums, DOUBLE: tl.constexpr, BLOCK: tl.constexpr):
    """Computes maximum and sum of each tile without the label, in one read."""
    at, tile = tl.program_id(0), tl.program_id(1)
    label, good = _counts(labels, at, rows.v)
    ids = tile * BLOCK + tl.arange(0, BLOCK)
    x = _load(row_at(rows, at), ids, tl.where(good, rows.v, 0), DOUBLE)
    x = tl.where(ids == label, NOTHING, x)
    top = tl.max(_without_nan(x), 0)
    place = at.to(tl.int64) * sums.tiles + tile
    tl.store(sums.tops + place, top.to(tl.float64))
    tl.store(sums.totals + place, tl.sum(_exponential(x, top), 0).to(tl.float64))


@triton.jit
def label_log_odds_kernel(
    rows, labels, sums, log_odds, stats, DOUBLE: tl.constexpr, TILES: tl.constexpr
):
    """Computes a row's log-odds and statistics from its tiles."""
    at = tl.program_id(0)
    label, good = _counts(labels, at, rows.v)
    j = tl.arange(0, TILES)
    there = j < sums.tiles
    place = at.to(tl.int64) * sums.tiles + j
    largest = tl.load(sums.tops + place, mask=there, other=NOTHING)
    top = tl.max(largest, 0)
    each = tl.load(sums.totals + place, mask=there, other=0.0)
    total = tl.sum(each * _exponential(largest, top), 0)
    own = _load(row_at(rows, at), tl.where(good, label, 0), rows.v, DOUBLE).to(tl.float64)
    value = tl.where(good, _log_odds(own, top, total), float("nan"))
    value = tl.where(label == labels.ignore_index, 0.0, value)
    tl.store(log_odds + at, value.to(log_odds.dtype.element_ty))
    stats += at.to(tl.int64) * NUM_STATS
    tl.store(stats + OTHERS_MAX, top)
    tl.store(stats + OTHERS_SUM, total)
    tl.store(stats + OTHERS_WEIGHTED, 0.0)
    tl.store(stats + LABEL_LOGIT, tl.where(good, own, 0.0))


@triton.jit
def _write_gradient(
    rows, per_unit, top, one, one_value, out, DOUBLE: tl.constexpr, BLOCK: tl.constexpr
):
    """Writes per_unit e^(x - top) and one entry of its own; skips the read if all units are 0."""
    at, tile = tl.program_id(0), tl.program_id(1)
    ids = tile * BLOCK + tl.arange(0, BLOCK)
    x = _load(row_at(rows, at), ids, tl.where(per_unit == 0, 0, rows.v), DOUBLE)
    dx = per_unit.to(x.dtype) * _exponential(x, top.to(x.dtype))
    dx = tl.where(per_unit == 0, 0.0, dx)
    dx = tl.where(ids == one, one_value.to(x.dtype), dx)
    out += at.to(tl.int64) * rows.v + ids
    tl.store(out, dx.to(out.dtype.element_ty), mask=ids < rows.v)


@triton.jit
def label_backward_kernel(
    dlog_odds, rows, labels, stats, out, DOUBLE: tl.constexpr, BLOCK: tl.constexpr
):
    """Computes dL/dlogits = dL/dm (onehot(y) - q), q the softmax of the others."""
    at = tl.program_id(0)
    label, good = _counts(labels, at, rows.v)
    stats += at.to(tl.int64) * NUM_STATS
    total = tl.load(stats + OTHERS_SUM)
    # labels without others have no gradient, whatever dL/dm is
    used = good & (total != 0)
    g = tl.where(used, tl.load(dlog_odds + at).to(tl.float64), 0.0)
    per_unit = tl.where(used, -g / tl.where(used, total, 1.0), 0.0)
    _write_gradient(rows, per_unit, tl.load(stats + OTHERS_MAX), label, g, out, DOUBLE, BLOCK)


@triton.jit
def top_sum_kernel(rows, tops, DOUBLE: tl.constexpr, BLOCK: tl.constexpr):
    """Finds the first largest entry of each tile, and maximum and sum of the rest, in one read."""
    at, tile = tl.program_id(0), tl.program_id(1)
    ids = tile * BLOCK + tl.arange(0, BLOCK)
    x = _load(row_at(rows, at), ids, rows.v, DOUBLE)
    top = tl.max(_without_nan(x), 0)
    # in a tile of nothing but NaN, the last id of the row
    first = tl.min(tl.where((x == top) & (ids < rows.v), ids, rows.v - 1), 0)
    x = tl.where(ids == first, NOTHING, x)
    second = tl.max(_without_nan(x), 0)
    place = at.to(tl.int64) * tops.tiles + tile
    tl.store(tops.tops + place, top.to(tl.float64))
    tl.store(tops.first_ids + place, first)
    tl.store(tops.seconds + place, second.to(tl.float64))
    tl.store(tops.totals + place, tl.sum(_exponential(x, second), 0).to(tl.float64))


@triton.jit
def _mass_without(z, known):
    """Sums e^(x - top) over all entries but one of logit z that is not the largest.

    It is at least 1, so nothing cancels; NaN where the largest is +inf.
    """
    rest = known.total * _exponential(known.second, known.top)
    rest = tl.where(known.total == 0, 0.0, rest)
    others = rest - _exponential(z, known.top)
    others = tl.where(known.top == float("inf"), float("nan"), others)
    return 1 + tl.where(others <= 0, 0.0, others)


@triton.jit
def _load_stats(stats, at):
    """Loads the statistics of a row's entries."""
    stats += at.to(tl.int64) * NUM_STATS
    return Entries(
        tl.load(stats + TOP_ID).to(tl.int64),
        tl.load(stats + LABEL_LOGIT),
        tl.load(stats + OTHERS_MAX),
        tl.load(stats + OTHERS_SUM),
    )


@triton.jit
def _load_candidates(rows, candidates, at, k, top_id, MASKED: tl.constexpr, DOUBLE: tl.constexpr):
    """Loads some candidates of a row: ids, which count, which are valid, and their logits."""
    first = at.to(tl.int64) * candidates.number
    there = k < candidates.number
    ids = tl.load(candidates.index + first + k, mask=there, other=-1)
    meant = there
    if MASKED:
        meant = tl.load(candidates.mask + first + k, mask=there, other=0) > 0
    good = meant & (ids >= 0) & (ids < rows.v)
    z = _load(row_at(rows, at), tl.where(good, ids, top_id), rows.v, DOUBLE).to(tl.float64)
    return ids, meant, good, z


@triton.jit
def candidate_log_odds_kernel(
    rows, candidates, tops, log_odds, stats,
    MASKED: tl.constexpr, DOUBLE: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
    CANDIDATES: tl.constexpr,
):  # fmt: skip
    """Computes a row's statistics from its tiles, and its candidates' log-odds from those."""
    at = tl.program_id(0)
    j = tl.arange(0, TILES)
    there = j < tops.tiles
    place = at.to(tl.int64) * tops.tiles + j
    tile_top = tl.load(tops.tops + place, mask=there, other=NOTHING)
    tile_id = tl.load(tops.first_ids + place, mask=there, other=2**31 - 1)
    top = tl.max(tile_top, 0)
    best = tl.min(tl.where(tile_top == top, tile_id, 2**31 - 1), 0)
    # the largest entries of the other tiles are among the rest of the row
    tile_top = tl.where(j == best // BLOCK, NOTHING, tile_top)
    tile_second = tl.load(tops.seconds + place, mask=there, other=NOTHING)
    second = tl.max(tl.maximum(tile_top, tile_second), 0)
    each = tl.load(tops.totals + place, mask=there, other=0.0)
    each = each * _exponential(tile_second, second) + _exponential(tile_top, second)
    total = tl.sum(tl.where(there, each, 0.0), 0)
    top = _load(row_at(rows, at), best, rows.v, DOUBLE).to(tl.float64)  # NaN, of nothing else
    stats += at.to(tl.int64) * NUM_STATS
    tl.store(stats + OTHERS_MAX, second)
    tl.store(stats + OTHERS_SUM, total)
    tl.store(stats + TOP_ID, best.to(tl.float64))
    tl.store(stats + LABEL_LOGIT, top)
    known = Entries(best, top, second, total)
    log_odds += at.to(tl.int64) * candidates.number
    for begin in range(0, candidates.number, CANDIDATES):
        k = begin + tl.arange(0, CANDIDATES)
        ids, meant, good, z = _load_candidates(rows, candidates, at, k, best, MASKED, DOUBLE)
        value = z - top - tl.log(_mass_without(z, known))
        value = tl.where((top == NOTHING) & (total == 0), float("inf"), value)
        value = tl.where(ids == best, _log_odds(top, second, total), value)
        value = tl.where(good, value, float("nan"))
        value = tl.where(meant, value, 0.0)
        value = value.to(log_odds.dtype.element_ty)
        tl.store(log_odds + k, value, mask=k < candidates.number)


@triton.jit
def candidate_factor_kernel(
    dlog_odds, rows, candidates, stats,
    factors,  # (rows, 2) float64: the gradient for each e^(x - second), and of the largest entry
    MASKED: tl.constexpr, DOUBLE: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """Computes the factor that all entries of a row's gradient share."""
    at = tl.program_id(0)
    known = _load_stats(stats, at)
    upstream = dlog_odds + at.to(tl.int64) * candidates.number
    own = tl.zeros([CANDIDATES], tl.float64)  # of the largest entry
    beside = tl.zeros([CANDIDATES], tl.float64)  # of the others, by the mass without each
    for begin in range(0, candidates.number, CANDIDATES):
        k = begin + tl.arange(0, CANDIDATES)
        ids, _, good, z = _load_candidates(rows, candidates, at, k, known.best, MASKED, DOUBLE)
        g = tl.load(upstream + k, mask=k < candidates.number, other=0.0).to(tl.float64)
        own += tl.where(good & (ids == known.best), g, 0.0)
        share = g / _mass_without(z, known)
        beside += tl.where(good & (ids != known.best), share, 0.0)
    of_top, of_others = tl.sum(own, 0), tl.sum(beside, 0)
    of_top = tl.where(known.total == 0, 0.0, of_top)
    of_others = tl.where((known.top == NOTHING) & (known.total == 0), 0.0, of_others)
    per_unit = -of_top / tl.where(known.total == 0, 1.0, known.total)
    per_unit -= of_others * _exponential(known.second, known.top)
    # without upstream gradients there is none, whatever the row holds
    nothing = (of_top == 0) & (of_others == 0)
    per_unit = tl.where(nothing | (known.total == 0), 0.0, per_unit)
    tl.store(factors + 2 * at, per_unit)
    tl.store(factors + 2 * at + 1, of_top - of_others)


@triton.jit
def candidate_backward_kernel(rows, stats, factors, out, DOUBLE: tl.constexpr, BLOCK: tl.constexpr):
    """Computes a row's gradient but for the candidates' own entries."""
    at = tl.program_id(0)
    known = _load_stats(stats, at)
    per_unit, of_top = tl.load(factors + 2 * at), tl.load(factors + 2 * at + 1)
    _write_gradient(rows, per_unit, known.second, known.best, of_top, out, DOUBLE, BLOCK)


@triton.jit
def candidate_own_kernel(
    dlog_odds, rows, candidates, stats, factors, out,
    MASKED: tl.constexpr, DOUBLE: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """Overwrites the candidates' own entries of the gradient; equal ids write equal sums."""
    at, some = tl.program_id(0), tl.program_id(1)
    known = _load_stats(stats, at)
    upstream = dlog_odds + at.to(tl.int64) * candidates.number
    own_k = some * CANDIDATES + tl.arange(0, CANDIDATES)
    own_ids, _, own_good, own_z = _load_candidates(
        rows, candidates, at, own_k, known.best, MASKED, DOUBLE
    )
    total = tl.zeros([CANDIDATES], tl.float64)
    for begin in range(0, candidates.number, CANDIDATES):
        k = begin + tl.arange(0, CANDIDATES)
        ids, _, good, z = _load_candidates(rows, candidates, at, k, known.best, MASKED, DOUBLE)
        g = tl.load(upstream + k, mask=k < candidates.number, other=0.0).to(tl.float64)
        same = (own_ids[:, None] == ids[None, :]) & good[None, :]
        total += tl.sum(tl.where(same, g[None, :], 0.0), 1)
    # its own share, which every candidate has taken from its entry, comes back
    dx = total * (1 + _exponential(own_z, known.top) / _mass_without(own_z, known))
    per_unit = tl.load(factors + 2 * at)
    dx += tl.where(per_unit == 0, 0.0, per_unit * _exponential(own_z, known.second))
    dx = tl.where((known.top == NOTHING) & (known.total == 0), 0.0, dx)
    out += at.to(tl.int64) * rows.v + own_ids
    if not DOUBLE:
        dx = dx.to(tl.float32)  # half precision is rounded from there
    tl.store(out, dx.to(out.dtype.element_ty), mask=own_good & (own_ids != known.best))
