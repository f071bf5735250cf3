"""The losses of one pair of responses, in as many digits as mpmath is asked for.

Written from the papers, in log-probabilities of responses and nothing else: no log-odds, no torch.
"""

from inspect import Parameter, signature
from types import SimpleNamespace
from typing import NamedTuple

import mpmath as mp

from fastadapt.losses import FORMULAS


class Pair(NamedTuple):
    """Log-probabilities of the chosen and the rejected one, lengths, and those of the reference."""

    S: tuple
    T: tuple = (1, 1)
    refs: tuple = (0, 0)
    D: tuple = (0, 0)

    @property
    def r(self):
        """The log-ratios."""
        return tuple(s - ref for s, ref in zip(self.S, self.refs, strict=True))

    @property
    def means(self):
        """The mean log-probabilities of tokens."""
        return tuple(s / n for s, n in zip(self.S, self.T, strict=True))


def log_sigma(x):
    return -mp.log1p(mp.exp(-x))


def nll(x, eps=0.0):
    """-log σ(x), smoothed."""
    return -(1 - mp.mpf(eps)) * log_sigma(x) - mp.mpf(eps) * log_sigma(-x)


def sigma(x):
    return mp.exp(log_sigma(x))


def scores(x, o):
    a = mp.mpf(o.f_alpha)
    return [
        {
            "reverse_kl": lambda r: r,
            "forward_kl": lambda r: -mp.expm1(-r),
            "js_divergence": lambda r: mp.log(2) + log_sigma(r),
            "alpha_divergence": lambda r: r if a == 1 else mp.expm1(r * (a - 1)) / (a - 1),
        }[o.f_divergence](r)
        for r in x.r
    ]


def margin(x, o):
    good, bad = scores(x, o)
    return o.beta * (good - bad)


def average(x, o):
    good, bad = scores(x, o)
    return good / x.T[0] - bad / x.T[1]


def exo(u, eps):
    eps = mp.mpf(eps)
    right = sigma(u) * (log_sigma(u) - mp.log(1 - eps))
    return right + sigma(-u) * (log_sigma(-u) - mp.log(eps))


def robust(u, eps):
    eps = mp.mpf(eps)
    return ((1 - eps) * nll(u) - eps * nll(-u)) / (1 - 2 * eps)


def discopop(u, tau):
    return sigma(-u / tau) * nll(u) + sigma(u / tau) * mp.exp(-u)


def squares(x, o):
    goal = 1 / (2 * o.beta)
    return (x.r[0] - goal) ** 2 + (x.r[1] + goal) ** 2


def dpop(x, o):
    good, bad = x.r
    return nll(o.beta * (good - bad - o.dpop_lambda * max(0, -good)))


def tdpo(x, o):
    alpha = 1 if o.variant == "tdpo1" else o.tdpo_alpha
    return nll(o.beta * (x.r[0] - x.r[1] - alpha * (x.D[1] - x.D[0])))


def typed(x, o, gamma=0):
    """The types of CPO and TPO."""
    if o.loss_type == "ipo":
        return (x.means[0] - x.means[1] - 1 / (2 * o.beta)) ** 2
    if o.loss_type == "hinge":
        return max(0, 1 - o.beta * (x.S[0] - x.S[1]))
    good, bad = x.means if o.loss_type == "tpo-l" else x.S
    gamma = gamma if o.loss_type == "tpo-l" else 0
    return nll(o.beta * (good - bad) - gamma, o.label_smoothing)


def alphapo(x, o):
    a = o.alphapo_alpha
    good, bad = (-mp.expm1(-a * s) / a if a else s for s in x.means)
    return nll(o.beta * (good - bad) - o.gamma, o.label_smoothing)


def log_odds(s):
    """Of a log-probability."""
    return s - mp.log(-mp.expm1(s))


def kto(x, o, z):
    up, down = o.desirable_weight, o.undesirable_weight
    return (up * sigma(-o.beta * (x.r[0] - z)) + down * sigma(o.beta * (x.r[1] - z))) / 2


POINT, SHIFT = mp.mpf("0.75"), mp.mpf("-0.25")  # of KTO and BCO
TRUTHS = {
    "dpo": lambda x, o: nll(margin(x, o)),
    "cdpo": lambda x, o: nll(margin(x, o), o.label_smoothing),
    "robust": lambda x, o: robust(margin(x, o), o.label_smoothing),
    "hinge": lambda x, o: max(0, 1 - margin(x, o)),
    "exo_pair": lambda x, o: exo(margin(x, o), o.label_smoothing),
    "discopop": lambda x, o: discopop(margin(x, o), o.discopop_tau),
    "ipo": lambda x, o: (
        ((average(x, o) if o.length_normalized else margin(x, o) / o.beta) - 1 / (2 * o.beta)) ** 2
    ),
    "sigmoid_norm": lambda x, o: nll(o.beta * average(x, o)),
    "nca_pair": lambda x, o: (
        nll(o.beta * x.r[0]) + nll(-o.beta * x.r[0]) / 2 + nll(-o.beta * x.r[1]) / 2
    ),
    "bco_pair": lambda x, o: nll(o.beta * x.r[0]) + nll(-o.beta * x.r[1]),
    "sppo_hard": squares,
    "apo_zero": lambda x, o: sigma(-o.beta * x.r[0]) + sigma(o.beta * x.r[1]),
    "apo_down": lambda x, o: sigma(o.beta * x.r[0]) + sigma(-o.beta * (x.r[0] - x.r[1])),
    "cal_dpo": lambda x, o: nll(x.r[0] - x.r[1]) + squares(x, o),
    "dpop": dpop,
    "tdpo": tdpo,
    "aot": lambda x, o: nll(o.beta * (x.r[0] - x.r[1]), o.label_smoothing),
    "aot_unpaired": lambda x, o: nll(o.beta * (x.r[0] - x.r[1]), o.label_smoothing),
    "cpo": lambda x, o: typed(x, o) - o.nll_weight * x.means[0],
    "tpo": lambda x, o: typed(x, o, o.gamma) - o.nll_weight * x.means[0],  # gold: the chosen one
    "simpo": lambda x, o: nll(o.beta * (x.means[0] - x.means[1]) - o.gamma, o.label_smoothing),
    "alphapo": alphapo,
    "orpo": lambda x, o: -x.means[0] + o.beta * nll(log_odds(x.means[0]) - log_odds(x.means[1])),
    "slic": lambda x, o: max(0, o.delta - x.S[0] + x.S[1]) - o.nll_weight * x.S[0],
    "kto": lambda x, o: kto(x, o, POINT),
    "apo_zero_unpaired": lambda x, o: kto(x, o, 0),
    "bco": lambda x, o: (nll(o.beta * x.r[0] - SHIFT) + nll(SHIFT - o.beta * x.r[1])) / 2,
}


def truth(name, pair, options):
    """The loss of one pair, with the defaults of the function of this name."""
    own = signature(FORMULAS[name]).parameters.values()
    given = {p.name: p.default for p in own if p.kind is Parameter.KEYWORD_ONLY} | options
    exact = {k: mp.mpf(v) if isinstance(v, float) else v for k, v in given.items()}
    return TRUTHS[name](pair, SimpleNamespace(**exact))
