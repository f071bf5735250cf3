"""Divergence of two heads between the products of two tiles of their vocabulary.

One program has one row of a tile, in the gradient a part of it. Statistics of a row are those of
csrc/kernels.h, from tile to tile float64; arithmetic within a tile is float32, of float64 heads
float64.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastadapt import _C
from fastadapt._ops.triton.linear.kernels import LEAST_EXPONENT, NOTHING, _load_tile, without_nan

NUM_PAIR_STATS = tl.constexpr(_C.NUM_PAIR_STATS)
STUDENT_MAX = tl.constexpr(_C.STUDENT_MAX)
STUDENT_SUM = tl.constexpr(_C.STUDENT_SUM)
TEACHER_MAX = tl.constexpr(_C.TEACHER_MAX)
TEACHER_SUM = tl.constexpr(_C.TEACHER_SUM)
DIVERGENCE = tl.constexpr(_C.DIVERGENCE)
CENTRE = tl.constexpr(_C.CENTRE)
KL = tl.constexpr(_C.KL)
REVERSE_KL = tl.constexpr(_C.REVERSE_KL)
JSD = tl.constexpr(_C.JSD)

LN2 = tl.constexpr(0.6931471805599453)
# (e^x - 1) / x = 1 + x/2 + x^2/6 + ..., used for x in (-0.5, 0], where the first term left out is
# 2e-18; float32 would need eight of them
EXPM1 = tl.constexpr(
    (1 / 20922789888000, 1 / 1307674368000, 1 / 87178291200, 1 / 6227020800, 1 / 479001600,
     1 / 39916800, 1 / 3628800, 1 / 362880, 1 / 40320, 1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6,
     1 / 2, 1.0)
)  # fmt: skip
# atanh(s) / s = 1 + s^2/3 + ... for |s| <= 0.172: the first term left out is 1e-18
ATANH = tl.constexpr(tuple(1 / odd for odd in range(21, 0, -2)))


class Sides(NamedTuple):
    """The tiles of both heads, and what of them is known when a kernel is compiled."""

    student: Any  # linear.Tile
    teacher: Any
    student_kind: Any  # linear.Kind
    teacher_kind: Any
    beta: Any  # (1,) float64


@triton.jit
def _origin(top):
    """Returns a maximum as the origin of distances: 0 where nothing lies above -inf."""
    return tl.where(top == NOTHING, 0.0, top)


@triton.jit
def _rescaled(z, top, total):
    """Takes the largest logit of a tile into a maximum.

    Returns it, the sum rescaled to it, its factor, and by how much distances to it moved.
    """
    high = tl.maximum(top, tl.max(without_nan(z), 0).to(tl.float64))
    shift = _origin(top) - _origin(high)
    shrink = tl.where(top == NOTHING, 0.0, tl.exp(shift))
    return high, tl.where(total == 0, 0.0, total * shrink), shrink, shift


@triton.jit
def _times(e, d):
    """Returns e d, 0 where e is 0."""
    return tl.where(e == 0, 0.0, e * d)


@triton.jit
def _power(x):
    """Returns e^x and e^x - 1 for x <= 0, neither by cancellation."""
    near = tl.maximum(x, -0.5)
    series = near * 0.0 + EXPM1[0]
    for i in tl.static_range(1, 16):
        series = series * near + EXPM1[i]
    e = tl.exp(x)
    return e, tl.where(x > -0.5, x * series, e - 1.0)


@triton.jit
def _log(w, y, DOUBLE: tl.constexpr):
    """Returns ln w for w in (0, 1], of which y = w - 1 has more digits near 1."""
    if DOUBLE:
        b = w.to(tl.int64, bitcast=True)
        exponent = (b - 0x3FE6A09E667F3BCD) >> 52
        f = (b - (exponent << 52)).to(tl.float64, bitcast=True)
    else:
        b = w.to(tl.int32, bitcast=True)
        exponent = (b - 0x3F3504F3) >> 23  # of sqrt(1/2): f lies between it and its double
        f = (b - (exponent << 23)).to(tl.float32, bitcast=True)
    g = tl.where(exponent == 0, y, f - 1.0)
    s = g / (2.0 + g)
    square = s * s
    series = square * 0.0 + ATANH[0]
    for i in tl.static_range(1, 11):
        series = series * square + ATANH[i]
    return exponent.to(w.dtype) * LN2 + 2.0 * s * series


@triton.jit
def _mixture(log_p, log_q, beta, rest, DOUBLE: tl.constexpr):
    """Returns p, u = ln(p / m) and beta q ln(q / m) + (1 - beta) p u; m = beta q + (1 - beta) p.

    From the larger of p and q, and their ratio e^x, x <= 0: ln(larger / m) = -ln(1 + c (e^x - 1)),
    c the share of the smaller. So p = q gives 0, and a share of 0 none.
    """
    ratio = log_p - log_q
    student = ratio >= 0  # has the larger one
    c = tl.where(student, beta, rest)
    d = tl.where(student, rest, beta)
    x = tl.where(tl.abs(ratio) > -LEAST_EXPONENT, LEAST_EXPONENT, -tl.abs(ratio))
    e, less = _power(x)
    upper = -_log(d + c * e, c * less, DOUBLE)
    lower = upper + x
    larger = tl.exp(tl.where(student, log_p, log_q))
    nothing = (log_p == NOTHING) & (log_q == NOTHING)
    p = tl.where(nothing, 0.0, tl.where(student, larger, larger * e))
    u = tl.where(nothing, 0.0, tl.where(student, upper, lower))
    return p, u, tl.where(nothing, 0.0, larger * (d * upper + c * e * lower))


@triton.jit
def _load_pair(sides, ids):
    """Returns a row's logits of both heads, and the student's z / cap."""
    s, unit, _ = _load_tile(sides.student, ids, sides.student_kind)
    t, _, _ = _load_tile(sides.teacher, ids, sides.teacher_kind)
    return s, t, unit


@triton.jit
def _logarithms(s, t, stats):
    """Returns ln p and ln q of a tile."""
    log_p = (s - _origin(tl.load(stats + STUDENT_MAX)).to(s.dtype)) - tl.log(
        tl.load(stats + STUDENT_SUM)
    ).to(s.dtype)
    log_q = (t - _origin(tl.load(stats + TEACHER_MAX)).to(s.dtype)) - tl.log(
        tl.load(stats + TEACHER_SUM)
    ).to(s.dtype)
    return log_p, log_q


@triton.jit
def pair_sum_kernel(sides, stats, KIND: tl.constexpr):
    """Adds a tile to the sums of its rows: those of both, and the difference of their distances."""
    ids = tl.arange(0, sides.student_kind.BLOCK)
    s, t, _ = _load_pair(sides, ids)
    stats += tl.program_id(0).to(tl.int64) * NUM_PAIR_STATS
    p_before, q_before = tl.load(stats + STUDENT_SUM), tl.load(stats + TEACHER_SUM)
    s_top, p_sum, s_shrink, s_shift = _rescaled(s, tl.load(stats + STUDENT_MAX), p_before)
    t_top, q_sum, t_shrink, t_shift = _rescaled(t, tl.load(stats + TEACHER_MAX), q_before)
    ds = s - _origin(s_top).to(s.dtype)
    dt = t - _origin(t_top).to(t.dtype)
    es, et = tl.exp(ds), tl.exp(dt)
    tl.store(stats + STUDENT_MAX, s_top)
    tl.store(stats + STUDENT_SUM, p_sum + tl.sum(es, 0).to(tl.float64))
    tl.store(stats + TEACHER_MAX, t_top)
    tl.store(stats + TEACHER_SUM, q_sum + tl.sum(et, 0).to(tl.float64))
    if KIND != JSD:
        cross = tl.load(stats + DIVERGENCE)
        if KIND == KL:
            cross = _times(t_shrink, cross + q_before * (t_shift - s_shift))
            here = tl.sum(_times(et, dt - ds), 0)
        else:
            cross = _times(s_shrink, cross + p_before * (s_shift - t_shift))
            here = tl.sum(_times(es, ds - dt), 0)
        tl.store(stats + DIVERGENCE, cross + here.to(tl.float64))


@triton.jit
def pair_mixing_kernel(sides, stats):
    """Adds a tile to the divergence from the mixture, and to that of the student alone."""
    ids = tl.arange(0, sides.student_kind.BLOCK)
    s, t, _ = _load_pair(sides, ids)
    stats += tl.program_id(0).to(tl.int64) * NUM_PAIR_STATS
    log_p, log_q = _logarithms(s, t, stats)
    beta = tl.load(sides.beta)
    p, u, terms = _mixture(
        log_p, log_q, beta.to(s.dtype), (1.0 - beta).to(s.dtype), sides.student_kind.DOUBLE
    )
    divergence, centre = tl.load(stats + DIVERGENCE), tl.load(stats + CENTRE)
    tl.store(stats + DIVERGENCE, divergence + tl.sum(terms, 0).to(tl.float64))
    tl.store(stats + CENTRE, centre + tl.sum(p * u, 0).to(tl.float64))


@triton.jit
def pair_gradient_kernel(sides, stats, gains, out, out_stride, KIND: tl.constexpr):
    """Computes dL/dx of the student's products x.

    That is gain dz/dx times p - q for KL, and else times p (v - centre): v is the difference of the
    distances to both maxima for reverse KL and (1 - beta) ln(p / m) for JSD.
    """
    at = tl.program_id(0).to(tl.int64)
    ids = tl.program_id(1) * sides.student_kind.BLOCK + tl.arange(0, sides.student_kind.BLOCK)
    s, t, unit = _load_pair(sides, ids)
    stats += at * NUM_PAIR_STATS
    gain = tl.load(gains + at) * tl.load(sides.student.numbers)
    centre = tl.load(stats + CENTRE).to(s.dtype)
    if KIND == JSD:
        beta = tl.load(sides.beta)
        log_p, log_q = _logarithms(s, t, stats)
        p, u, _ = _mixture(
            log_p, log_q, beta.to(s.dtype), (1.0 - beta).to(s.dtype), sides.student_kind.DOUBLE
        )
        dx = (gain * (1.0 - beta)).to(s.dtype) * (p * (u - centre))
    else:
        ds = s - _origin(tl.load(stats + STUDENT_MAX)).to(s.dtype)
        dt = t - _origin(tl.load(stats + TEACHER_MAX)).to(s.dtype)
        es = (gain / tl.load(stats + STUDENT_SUM)).to(s.dtype) * tl.exp(ds)
        if KIND == KL:
            dx = es - (gain / tl.load(stats + TEACHER_SUM)).to(s.dtype) * tl.exp(dt)
        else:
            dx = _times(es, (ds - dt) - centre)
    dx = dx * (1.0 - unit * unit) if sides.student_kind.CAPPED else dx
    place = out + at * out_stride + ids
    tl.store(place, dx.to(out.dtype.element_ty), mask=ids < sides.student.width)
