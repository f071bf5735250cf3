"""The adapted distribution of each row: scaled logits, masses, ranking, survivors."""

from typing import Any

import torch
from torch import Tensor

from fastadapt.reference import shapes
from fastadapt.reference.arithmetic import UNIT, exp64, log64, masses

Knobs = Any  # an Adaptor, or anything with its attributes
# Factors of a threshold, so that a mass that reaches it but for rounding does: of few tokens, the
# polynomial's error stands between; of many, only the rounding of p and Z.
NEARLY, ALMOST = 1 - 2.0**-19, 1 - 2.0**-52
_BY_LOGITS, _LAST = ("top_n_sigma", "min_k", "top_h"), ("typical_p", "epsilon_cutoff", "eta_cutoff")
FILTERS = {
    "hf": (*_BY_LOGITS, "top_k", "top_p", "min_p", "top_a", *_LAST, "xtc"),
    "vllm": (*_BY_LOGITS, "min_p", "top_k", "top_p", "top_a", *_LAST, "xtc"),
}
# The knob of a filter, where it has another name, and what a knob that an adaptor lacks is.
_KNOB = {"xtc": "xtc_threshold"}


class Distribution:
    """The adapted distribution of each row: scaled logits, masses, ranking, survivors, status."""

    def __init__(
        self,
        x: Tensor,
        adaptor: Knobs | None,
        survivors: Tensor | None = None,
        coin: Tensor | None = None,
    ) -> None:
        """Runs steps 1 to 4 of the rule; `survivors` replaces the filters by a given support.

        The coin of XTC is a 32-bit number a row, (N,); without it the filter acts always or never.
        """
        names: tuple[str, ...] = ()
        if adaptor is not None and survivors is None:
            names = FILTERS.get(adaptor.order, adaptor.order)
        last = "temperature" in names
        self.exact = x.dtype != torch.float64
        self.x = x.float() if self.exact else x
        self.n, self.v = x.shape
        self.unit = UNIT if self.exact else 1.0
        self.temperature = self._knob(adaptor, "temperature", 1.0)
        self.greedy = self.temperature == 0
        divisor = torch.where(self.greedy, 1.0, self.temperature)
        self.inverse = 1 / divisor.float() if self.exact else 1 / divisor
        scaled = self.x * self.inverse if self.exact else self.x / divisor
        self.s = self.x if last else scaled
        self.m = self.s.amax(-1, keepdim=True)
        self.row_m = scaled.amax(-1, keepdim=True)
        self.status = self._status(adaptor)
        usable = (self.status == 0)[:, None]
        self._weigh(self.m)
        self.ranking = self.s.sort(stable=True, dim=-1, descending=True).indices
        self.best = self.ranking[:, 0]
        self.alive = (self.s > float("-inf")) & usable
        if survivors is not None:
            self.alive = survivors
        elif adaptor is not None:
            self.keep = self._knob(adaptor, "min_tokens_to_keep", 1)
            self.excludes = self._excludes(adaptor, coin)
            for name in names:
                if name == "temperature":
                    continue
                knob = self._knob(adaptor, _KNOB.get(name, name), 0.0)
                of_shape = getattr(shapes, name, None)
                kept = of_shape(self, knob) if of_shape else getattr(self, f"_{name}")(knob)
                self.alive &= kept | (self.greedy & (not last))
            if last:  # the best that is left
                there = self.alive.gather(1, self.ranking).int().argmax(1, keepdim=True)
                self.best = self.ranking.gather(1, there)[:, 0]
            only_best = torch.zeros_like(self.alive).scatter(1, self.best[:, None], True)
            self.alive &= only_best | ~self.greedy
        if last:
            self.s = scaled
            self.alive &= scaled > float("-inf")
            largest = torch.where(self.alive, scaled, float("-inf")).amax(-1, keepdim=True)
            self.m = torch.where(self.inverse == 1, self.m, largest)  # T is 1 as rounded
            beyond = torch.where(self.m == float("-inf"), 3, 0)
            beyond = torch.where(self.row_m == float("inf"), 2, beyond)
            self.status = torch.where(usable, beyond, self.status[:, None])[:, 0].to(torch.uint8)
            self.alive &= (self.status == 0)[:, None]
            self._weigh(self.m)

    def _weigh(self, m: Tensor) -> None:
        """Makes distances, masses and surprisal masses, relative to a maximum."""
        usable = (self.status == 0)[:, None]
        self.d = torch.where(usable, self.s - m, 0.0)
        self.w, self.u = masses(self.d) if self.exact else self._probabilities()

    def _excludes(self, adaptor: Knobs, coin: Tensor | None) -> Tensor:
        """Returns the rows in which XTC acts, (N, 1)."""
        p = self._knob(adaptor, "xtc_probability", 0.0)
        if coin is not None:
            return coin.double()[:, None] < p * 2.0**32
        if ((p > 0) & (p < 1)).any():
            raise ValueError("xtc_probability: expected 0 or 1 where nothing is drawn")
        return p == 1

    def log_of_all(self) -> Tensor:
        """Returns the log of the mass of all tokens at the temperature, in units of `log`, (N,)."""
        d = torch.where((self.status == 0)[:, None], self.s - self.row_m, 0.0)
        w = masses(d)[0] if self.exact else d.exp()
        return self.log(w.sum(-1)) + (self.row_m.double() - self.m.double())[:, 0]

    def _knob(self, adaptor: Knobs | None, name: str, default: float) -> Tensor:
        """Returns a knob as float64 (N, 1)."""
        value = default if adaptor is None else getattr(adaptor, name)
        column = torch.as_tensor(value, dtype=torch.float64, device=self.x.device)
        return column.reshape(-1, 1).expand(self.n, 1)

    def _status(self, adaptor: Knobs | None) -> Tensor:
        """Returns the first failing condition of each row, uint8."""
        status = torch.where(self.m == float("-inf"), 3, 0)
        status = torch.where(self.m == float("inf"), 2, status)
        status = torch.where(self.s.isnan().any(-1, keepdim=True), 1, status)
        if adaptor is not None:
            status = torch.where(self._bad_knobs(adaptor), 4, status)
        return status[:, 0].to(torch.uint8)

    def _bad_knobs(self, adaptor: Knobs) -> Tensor:
        """Returns the rows with a knob out of range; only per-row tensors on CUDA can have one."""
        t = self.temperature
        bad = ~((t == 0) | ((t >= 1e-6) & (t <= torch.finfo(torch.float32).max)))
        bad |= ~(self._knob(adaptor, "top_k", 0) >= 0)
        bad |= ~(self._knob(adaptor, "min_tokens_to_keep", 1) >= 1)
        for name in ("top_n_sigma", "min_k"):
            knob = self._knob(adaptor, name, 0.0)
            bad |= ~((knob >= 0) & (knob <= 1e6))
        of_xtc = ("xtc_probability", "xtc_threshold")
        for name in ("top_p", "min_p", "typical_p", "top_a", "top_h", *of_xtc):
            knob = self._knob(adaptor, name, 0.0)
            low = knob > 0 if name == "typical_p" else knob >= 0
            bad |= ~(low & (knob <= 1))
        for name in ("epsilon_cutoff", "eta_cutoff"):
            knob = self._knob(adaptor, name, 0.0)
            bad |= ~((knob >= 0) & (knob < 1))
        return bad

    def _probabilities(self) -> tuple[Tensor, Tensor]:
        """Returns the float64 counterparts of the masses, not normalised."""
        w = self.d.exp()
        return w, torch.where(w > 0, w * -self.d, 0.0)

    def log(self, mass: Tensor) -> Tensor:
        """Returns ln(mass / unit) in float64; for integers by the polynomial of the rule."""
        return log64(mass.double() / self.unit) if self.exact else mass.log()

    def entropy(self, alive: Tensor) -> Tensor:
        """Returns the entropy in nats of the distribution restricted to `alive`, float64 (N,)."""
        z, u = (self.w * alive).sum(-1), (self.u * alive).sum(-1)
        return self.log(z) + u.double() / z.double()

    def fitted(self, dtype: torch.dtype) -> Tensor:
        """Returns scaled logits that fit a dtype; no survivor becomes infinite.

        In half precision a row is less by its maximum m where that is beyond the range of the
        dtype, or so low that others may be: the same distribution. What is still too low is the
        lowest value of the dtype.
        """
        if dtype not in (torch.bfloat16, torch.float16):
            return self.s
        most = torch.finfo(dtype).max
        m = self.row_m
        beyond = (self.inverse > 1) & ((m > most) | (m < -most / 2))
        return (self.s - torch.where(beyond, m, 0.0)).clamp(min=-most)

    def draw_target(self, low: Tensor, high: Tensor, total: Tensor) -> Tensor:
        """Returns floor(x * S / 2^64), x = low + 2^32 high (step 5); not floored for float64."""
        if not self.exact:
            return (high.double() + low.double() / 2.0**32) / 2.0**32 * total
        mask = 0xFFFFFFFF
        s0, s1 = total & mask, total >> 32
        lowest = ((low * s0) >> 32) & mask
        middle = high * s0 + lowest  # below 2^64: its bits are right although int64 wraps
        cross = (middle & mask) + low * s1
        return high * s1 + ((middle >> 32) & mask) + (cross >> 32)

    def ceil(self, value: Tensor) -> Tensor:
        """Rounds integer thresholds up; leaves float64 ones."""
        return value.ceil().to(torch.int64) if self.exact else value

    def _sums(self) -> list[Tensor]:
        """Returns Z and U of the survivors, (N, 1)."""
        return [(a * self.alive).sum(-1, keepdim=True) for a in (self.w, self.u)]

    def _before(self, order: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the survivors in `order`, their running count, and the mass before each."""
        there = self.alive.gather(1, order)
        mass = self.w.gather(1, order) * there
        return there, there.cumsum(-1), mass.cumsum(-1) - mass

    def _in_place(self, order: Tensor, chosen: Tensor) -> Tensor:
        """Moves a mask given in `order` back to token ids."""
        return torch.zeros_like(chosen).scatter(1, order, chosen)

    def _smallest(self, value: Tensor, order: Tensor, chosen: Tensor) -> Tensor:
        """Returns the smallest value among the masked ones, (N, 1)."""
        inf = float("inf")
        return torch.where(chosen, value.gather(1, order), inf).amin(-1, keepdim=True)

    def _top_k(self, k: Tensor) -> Tensor:
        """Keeps survivors with s >= the k'-th largest; ties stay."""
        there, count, _ = self._before(self.ranking)
        limit = torch.maximum(k, self.keep)
        threshold = self._smallest(self.s, self.ranking, there & (count <= limit))
        return (self.s >= threshold) | (k == 0)

    def _targets(self, part: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the threshold of a share of Z for heavy and for light tokens."""
        return self.ceil(part * z.double() * NEARLY), self.ceil(part * z.double() * ALMOST)

    def _is_heavy(self, mass: Tensor, z: Tensor) -> Tensor:
        """Whether a mass is at least a 1024th of Z."""
        return mass >= ((z + 1023) >> 10 if self.exact else z / 1024)

    def _top_p(self, p: Tensor) -> Tensor:
        """Keeps survivors with less mass than about p Z before them, in rank order."""
        there, count, before = self._before(self.ranking)
        z = self._sums()[0]
        least, most = self._targets(p, z)
        heavy = self._is_heavy(self.w.gather(1, self.ranking), z)
        kept = there & ((before < torch.where(heavy, least, most)) | (count <= self.keep))
        return self._in_place(self.ranking, kept) | (p == 1)

    def _min_p(self, min_p: Tensor) -> Tensor:
        """Keeps survivors with w >= about f32(min_p) max w, and the best-ranked `keep`."""
        there, count, _ = self._before(self.ranking)
        top = (self.w * self.alive).amax(-1, keepdim=True)
        kept = self.w >= self.ceil(min_p.float().double() * top.double() * NEARLY)
        best = self._in_place(self.ranking, there & (count <= self.keep))
        return kept | best | (min_p == 0)

    def _typical_p(self, tau: Tensor) -> Tensor:
        """Keeps the tokens nearest to the entropy, up to mass tau; equally near ones together."""
        z, u = self._sums()
        centre = (u.double() / z.double()).to(self.d.dtype)
        kappa = torch.where(self.alive, (self.d + centre).abs(), float("inf"))
        order = kappa.sort(stable=True, dim=-1).indices
        there, count, before = self._before(order)
        least, most = self._targets(tau, z)
        nearest = kappa <= self._radius(kappa, self._in_place(order, there & (before < most)))
        last = nearest & (kappa == self._radius(kappa, nearest))
        inside, at_last = ((self.w * kept).sum(-1, keepdim=True) for kept in (nearest ^ last, last))
        nearest &= ~(last & self._is_heavy(at_last, z) & (inside >= least))
        first = self._in_place(order, there & (count <= self.keep))
        return nearest | first | (tau == 1)

    def _radius(self, kappa: Tensor, chosen: Tensor) -> Tensor:
        """Returns the largest distance among the masked tokens, (N, 1)."""
        return torch.where(chosen, kappa, -1.0).amax(-1, keepdim=True)

    def _at_least(self, cutoff: Tensor) -> Tensor:
        """Keeps survivors with w >= about cutoff Z, or s >= the keep-th largest."""
        there, count, _ = self._before(self.ranking)
        z = self._sums()[0]
        threshold = self._smallest(self.s, self.ranking, there & (count <= self.keep))
        return (self.w >= self.ceil(cutoff * z.double() * NEARLY)) | (self.s >= threshold)

    def _epsilon_cutoff(self, epsilon: Tensor) -> Tensor:
        """Keeps survivors of probability >= epsilon."""
        return self._at_least(epsilon) | (epsilon == 0)

    def _eta_cutoff(self, eta: Tensor) -> Tensor:
        """Keeps survivors of probability >= min(eta, sqrt(eta) e^-H)."""
        minus_h = -self.entropy(self.alive)[:, None]
        decay = exp64(minus_h) if self.exact else minus_h.exp()
        return self._at_least(torch.minimum(eta, eta.sqrt() * decay)) | (eta == 0)
