"""Filters of the reference that look at the shape of the logits: deviation, falls, entropy."""

from typing import Any

import torch
from torch import Tensor

Law = Any  # a `Distribution`: s, d, w and u of tokens, which are alive, their ranking and `keep`
NEARLY, MORE = 1 - 2.0**-19, 1 + 2.0**-19
ENTROPY_OF = 100  # tokens that top-h looks at


def top_n_sigma(law: Law, n: Tensor) -> Tensor:
    """Keeps survivors with s >= max - n sigma, sigma their standard deviation, and `keep`."""
    scale = _scale(law) if law.exact else torch.ones_like(law.m)
    q = law.d.clamp(min=torch.finfo(law.d.dtype).min) * -scale
    q = q.round() if law.exact else q
    q = torch.where(law.alive, q, 0.0).to(torch.int64 if law.exact else q.dtype)
    count = law.alive.sum(-1, keepdim=True).double()
    mean = q.sum(-1, keepdim=True).double() / count
    variance = (q * q).sum(-1, keepdim=True).double() / count - mean * mean
    sigma = variance.clamp(min=0).sqrt() / scale.double()
    least = (_top(law).double() - n * sigma * MORE).to(law.s.dtype)
    reach: Tensor = law.s >= least
    return reach | _best(law, law.keep) | (n == 0)


def min_k(law: Law, tau: Tensor) -> Tensor:
    """Keeps the tokens above the steepest fall, each fall divided by its rank, or tau / range."""
    count = law.alive.sum(-1, keepdim=True)
    order = torch.where(law.alive, law.s, float("-inf")).sort(stable=True, dim=-1, descending=True)
    s, place = order.values.double(), torch.arange(1, law.v + 1, device=law.s.device)
    share = (s[:, :-1] - s[:, 1:]) / place[:-1]
    share = torch.where(place[:-1] < count, share, -1.0)  # a fall to -inf is none
    cliff = _first_most(share) + 1 if law.v > 1 else count
    lowest = s.gather(1, (count - 1).clamp(min=0))
    span = s[:, :1] - lowest
    least = (tau / span).clamp(max=float(law.v)).nan_to_num(float(law.v)).long()
    k = torch.maximum(torch.maximum(cliff, least), law.keep.long())
    return _best(law, k) | (span == 0) | (tau == 0)


def top_a(law: Law, a: Tensor) -> Tensor:
    """Keeps survivors with w >= about a (max w)^2 / Z, and the best-ranked `keep`."""
    w = law.w * law.alive
    top, z = w.amax(-1, keepdim=True).double(), w.sum(-1, keepdim=True).double()
    least = law.ceil(a * (top / z) * top * NEARLY)
    reach: Tensor = law.w >= least
    return reach | _best(law, law.keep) | (a == 0)


def top_h(law: Law, h: Tensor) -> Tensor:
    """Keeps the best-ranked of 100 survivors, up to a share of their entropy, and `keep`."""
    alive = law.alive & _best(law, torch.full_like(law.keep, ENTROPY_OF))
    there = alive.gather(1, law.ranking)
    w, u = ((x * alive).gather(1, law.ranking) for x in (law.w, law.u))
    log_z = law.log(w.sum(-1, keepdim=True).clamp(min=1 if law.exact else 0))
    # Z times the entropy: the sum of u + w ln Z
    share = u.cumsum(-1).double() + w.cumsum(-1).double() * log_z
    inside = there & (w > 0) & (share <= h * share[:, -1:] * MORE)
    first = there & (there.cumsum(-1) == 1)
    broken = (there & ~(inside | first)).cumsum(-1) > 0
    kept = torch.zeros_like(alive).scatter(1, law.ranking, there & ~broken)
    return kept | _best(law, law.keep) | (h == 0)


def xtc(law: Law, threshold: Tensor) -> Tensor:
    """Excludes survivors that rank above the last of several with w >= about threshold Z."""
    z = (law.w * law.alive).sum(-1, keepdim=True)
    least = law.ceil(threshold * z.double() * NEARLY)
    least = least.clamp(min=1) if law.exact else least
    ranked = (law.alive & (law.w >= least) & (law.w > 0)).gather(1, law.ranking)
    there = law.alive.gather(1, law.ranking)
    last = ranked.cumsum(-1) == ranked.sum(-1, keepdim=True)  # the last of them, and those behind
    better = there & ~last
    several = (ranked.sum(-1, keepdim=True) > 1) & (threshold <= 0.5)
    enough = there.sum(-1, keepdim=True) - better.sum(-1, keepdim=True) >= law.keep
    better &= several & enough & law.excludes
    return ~torch.zeros_like(better).scatter(1, law.ranking, better)


def _scale(law: Law) -> Tensor:
    """Returns the power of two that takes distances to at most 2^20, float32 (N, 1)."""
    lowest = torch.where(law.alive, law.s, float("inf")).amin(-1, keepdim=True)
    span = (law.m - lowest).clamp(min=0, max=torch.finfo(torch.float32).max)
    exponent = (span.view(torch.int32) >> 23) - 127
    power = (19 - exponent).clamp(max=127)
    scale: Tensor = ((power + 127) << 23).view(torch.float32)
    return scale


def _top(law: Law) -> Tensor:
    """Returns the largest s of the survivors, (N, 1)."""
    return torch.where(law.alive, law.s, float("-inf")).amax(-1, keepdim=True)


def _best(law: Law, count: Tensor) -> Tensor:
    """Returns which are the best-ranked survivors, (N, V)."""
    there = law.alive.gather(1, law.ranking)
    chosen = there & (there.cumsum(-1) <= count)
    return torch.zeros_like(chosen).scatter(1, law.ranking, chosen)


def _first_most(value: Tensor) -> Tensor:
    """Returns the lowest index of the largest value, (N, 1)."""
    most = value.amax(-1, keepdim=True)
    return (value == most).int().argmax(-1, keepdim=True)
