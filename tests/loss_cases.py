"""Batches for the losses, and a case for every loss and option: its gradient in the logits.

`CASES` has a row for every loss and option: adding a loss means adding its row.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature

import torch

from fastadapt import Responses, reference
from fastadapt.losses import FORMULAS

V = 11


def log_odds_of(z, y):
    """z_y - logsumexp of the others, by autograd."""
    others = z.scatter(-1, y[..., None], float("-inf"))
    return z.gather(-1, y[..., None])[..., 0] - others.logsumexp(-1)


class Side:
    """Logits, labels and a mask, and the quantities of the table in probability space."""

    def __init__(self, B=3, T=5, dtype=torch.float64, scale=2.0):
        self.z = (torch.randn(B, T, V, dtype=dtype) * scale).requires_grad_()
        self.y = torch.randint(V, (B, T))
        self.mask = torch.rand(B, T) < 0.7
        self.mask[:, 1] = True
        self.log_odds = log_odds_of(self.z, self.y)
        self.responses = Responses(self.log_odds, self.mask)
        self.s = self.z.detach().softmax(-1)
        self.p = self.s.gather(-1, self.y[..., None])[..., 0]
        self.logp = self.z.detach().log_softmax(-1).gather(-1, self.y[..., None])[..., 0]
        self.N, self.B = self.mask.sum().double(), B
        self.T = self.mask.sum(-1, keepdim=True).double()
        self.S = (self.logp * self.mask).sum(-1, keepdim=True)
        self.P, self.root = self.S.exp(), (self.S / self.T).exp()


class Batch:
    """Chosen, rejected and gold responses, a reference near them, and all else that losses take."""

    def __init__(self, B=3, T=5, dtype=torch.float64):
        self.chosen, self.rejected, self.gold = (Side(B, T, dtype) for _ in range(3))
        self.refs = tuple(
            side.S[:, 0] + torch.randn(B, dtype=dtype) for side in (self.chosen, self.rejected)
        )
        self.ids = torch.rand(B, T, V).argsort(-1)[..., :4]  # no id twice in a row
        self.candidate_mask = (torch.rand(B, T, 4) < 0.6) & (self.ids != self.chosen.y[..., None])
        rows = self.chosen.z[..., None, :].expand(B, T, 4, V)
        self.candidates = log_odds_of(rows, self.ids)
        self.weights = torch.rand(B, dtype=dtype) + 0.5
        self.divergences = tuple(
            divergence(torch.randn(B, T, V, dtype=dtype), side.z)
            for side in (self.chosen, self.rejected)
        )

    def inputs(self):
        """The arguments of `RewardPenalizeLoss.forward`."""
        return {
            "chosen": self.chosen.responses,
            "rejected": self.rejected.responses,
            "ref_chosen_logps": self.refs[0],
            "ref_rejected_logps": self.refs[1],
            "candidates": self.candidates,
            "candidate_mask": self.candidate_mask,
            "gold": self.gold.responses,
            "pair_weights": self.weights,
            "reference_point": torch.tensor(0.7, dtype=torch.float64),
            "reward_shift": torch.tensor(-0.3, dtype=torch.float64),
            "logsumexp": self.chosen.z.logsumexp(-1),
            "mean_logits": self.chosen.z.mean(-1),
            "chosen_divergences": self.divergences[0],
            "rejected_divergences": self.divergences[1],
        }

    def packed_inputs(self, order, names=("chosen", "rejected", "gold")):
        """The same in the packed layout, tokens in another order, those of these sides."""
        inputs = self.inputs()
        for name in names:
            inputs[name] = packed(getattr(self, name), order)
            for beside in BESIDE.get(name, ()):
                inputs[beside] = inputs[beside].flatten(0, 1)[order]
        return inputs

    @property
    def leaves(self):
        """What gradients are taken in."""
        return [side.z for side in (self.chosen, self.rejected, self.gold)]

    @property
    def r(self):
        """(B, 1), twice: the log-ratios."""
        sides = zip((self.chosen, self.rejected), self.refs, strict=True)
        return tuple(side.S - ref[:, None].double() for side, ref in sides)

    def gaps(self, normalized=False):
        """(B, 1): the difference of the log-ratios, u / beta."""
        x, y = self.r
        return x / self.chosen.T - y / self.rejected.T if normalized else x - y


# what has one number a token of a side
BESIDE = {
    "chosen": (
        "candidates",
        "candidate_mask",
        "logsumexp",
        "mean_logits",
        "chosen_divergences",
    ),
    "rejected": ("rejected_divergences",),
}


def divergence(reference_z, z):
    """(B, T): KL(reference || policy)."""
    q = reference_z.softmax(-1)
    return (q * (reference_z.log_softmax(-1) - z.log_softmax(-1))).sum(-1)


def packed(side, order):
    """A padded side in the packed layout, its tokens in another order, ignored ones among them."""
    ids = torch.arange(side.mask.shape[0])[:, None].expand_as(side.mask)
    ids = torch.where(side.mask, ids, -1).flatten()[order]
    return Responses(side.log_odds.flatten()[order], segments=ids, num_segments=len(side.mask))


@dataclass(frozen=True)
class Case:
    """A loss with options, and its c_t in the table: ∂L/∂z = c_t (s - e_y).

    `c` returns those of chosen, rejected and, if there are any, gold tokens; None: of another form.
    `beside` names the optional inputs that it is given, but for the reference.
    """

    name: str
    options: dict
    c: Callable[[Batch], tuple] | None
    beside: tuple[str, ...] = ()

    def __str__(self):
        return "-".join([self.name, *map(str, self.options.values()), *self.beside])

    def takes(self):
        """The names of its inputs."""
        own = signature(FORMULAS[self.name]).parameters.values()
        asked = {*self.beside, "ref_chosen_logps", "ref_rejected_logps"}
        inputs = [p for p in own if p.kind is not p.KEYWORD_ONLY]
        return [p.name for p in inputs if p.default is p.empty or p.name in asked]

    def __call__(self, inputs, functions=FORMULAS):
        """The loss of the inputs that it takes."""
        taken = {k: inputs[k] for k in self.takes() if k in inputs}
        return functions[self.name](**taken, **self.options)


REFERENCES = {name: getattr(reference, f.__name__) for name, f in FORMULAS.items()}
BETA = 0.3


def pair_case(name, k, beside=(), **options):
    """A loss of pairs by -∂L/∂S⁺ and -∂L/∂S⁻ of a pair, functions of a batch."""

    def c(x):
        up, down = k(x)
        return up / x.chosen.B, down / x.chosen.B

    return Case(name, {"beta": BETA} | options, c, beside)


def margin_case(name, slope, beside=(), slopes_of=None, tail=None, **options):
    """A loss of the margin u alone, by -L'(u); of scores by the slopes of theirs in S."""
    scores = slopes_of or (lambda r: r, torch.ones_like)

    def c(x):
        r = x.r if tail is None else desensitized(x, tail)
        u = BETA * (scores[0](r[0]) - scores[0](r[1]))
        weight = BETA * slope(u) / x.chosen.B
        weight = weight * x.weights[:, None] if "pair_weights" in beside else weight
        up, down = weight * scores[1](r[0]), -weight * scores[1](r[1])
        if tail is not None:
            up, down = up * counts(x, tail)[0], down * counts(x, tail)[1]
        return up, down

    return Case(name, {"beta": BETA} | options, c, beside)


def counts(x, alpha):
    """(B, T), twice: how often LD-DPO counts a token."""
    shared = torch.minimum(x.chosen.T, x.rejected.T)
    sides = (x.chosen, x.rejected)
    beyond = [(side.mask.cumsum(-1) > shared).double() for side in sides]
    return [1 - (1 - alpha) * tail for tail in beyond]


def desensitized(x, alpha):
    """(B, 1), twice: the log-ratios of LD-DPO."""
    sides = zip((x.chosen, x.rejected), counts(x, alpha), x.refs, strict=True)
    return [
        (side.logp * side.mask * n).sum(-1, keepdim=True) - ref[:, None] for side, n, ref in sides
    ]


def normalized_case(name, slope, **options):
    """A loss of the difference of averages per token, by -∂L of it."""

    def c(x):
        weight = slope(x.gaps(normalized=True)) / x.chosen.B
        return weight / x.chosen.T, -weight / x.rejected.T

    return Case(name, {"beta": BETA} | options, c)


def free_case(name, slope, options, *, mean=False, likelihood=None, beside=()):
    """A loss without a reference, by -L' of the difference of S, or of S / T."""

    def c(x):
        g, b = x.chosen, x.rejected
        ends = (g.S / g.T, b.S / b.T) if mean else (g.S, b.S)
        weight = slope(*ends)
        weight = weight if isinstance(weight, tuple) else (weight, weight)
        up, down = (w / g.B / (s.T if mean else 1) for w, s in zip(weight, (g, b), strict=True))
        if likelihood is None:
            return up, -down
        if "gold" in beside or name == "tpo":
            return up, -down, likelihood(x.gold)
        return up + likelihood(g), -down

    return Case(name, options, c, beside)


def single_case(name, slope, **options):
    """A loss of single responses, by -∂L/∂r of a good and of a bad one."""

    def c(x):
        up, down = slope(*x.r)
        return up / (2 * x.chosen.B), down / (2 * x.chosen.B)

    return Case(name, {"beta": BETA} | options, c)


def odds(p):
    return p / (1 - p)


def mle(x):
    return 1 / x.chosen.N


def sigma(x):
    return 1 / (1 + torch.exp(-x))


def bend(x):
    return sigma(x) * sigma(-x)


def discopop(u, tau=0.05):
    """-L'(u)."""
    w = sigma(u / tau)
    curve = w * (1 - w) / tau
    return -(curve * torch.log(sigma(u)) - (1 - w) * sigma(-u) + (curve - w) * torch.exp(-u))


def sorted_case(name, upper_and_lower, **options):
    """Optimal transport, by ranks found one by one."""
    eps = options.get("label_smoothing", 0.0)

    def c(x):
        upper, lower = upper_and_lower(x)
        up, down = torch.zeros_like(upper), torch.zeros_like(lower)
        pairs = zip(upper.sort().indices.tolist(), lower.sort().indices.tolist(), strict=True)
        for i, j in pairs:
            k = BETA * (sigma(-BETA * (upper[i] - lower[j])) - eps) / len(upper)
            up[i], down[j] = k, -k
        return up[:, None], (-up if name == "aot" else down)[:, None]

    return Case(name, {"beta": BETA} | options, c)


def alpha_scores(a):
    """The scores of the alpha divergence, and their slopes."""
    return (
        lambda r: (torch.exp(r * (a - 1)) - 1) / (a - 1),
        lambda r: torch.exp(r * (a - 1)),
    )


FORWARD = (lambda r: 1 - torch.exp(-r), lambda r: torch.exp(-r))
JENSEN = (lambda r: math.log(2) + torch.log(sigma(r)), lambda r: sigma(-r))
DIVERGENCES = {
    "reverse_kl": (None, {}),
    "forward_kl": (FORWARD, {"f_divergence": "forward_kl"}),
    "js_divergence": (JENSEN, {"f_divergence": "js_divergence"}),
    "alpha_divergence": (alpha_scores(0.5), {"f_divergence": "alpha_divergence"}),
    "alpha 1": (None, {"f_divergence": "alpha_divergence", "f_alpha": 1.0}),
    "alpha 1.7": (alpha_scores(1.7), {"f_divergence": "alpha_divergence", "f_alpha": 1.7}),
}
EPS = 0.2
MARGINS = {
    "dpo": (lambda u: sigma(-u), {}),
    "cdpo": (lambda u: sigma(-u) - EPS, {"label_smoothing": EPS}),
    "robust": (
        lambda u: ((1 - EPS) * sigma(-u) + EPS * sigma(u)) / (1 - 2 * EPS),
        {"label_smoothing": EPS},
    ),
    "hinge": (lambda u: (u < 1).double(), {}),
    "exo_pair": (
        lambda u: -bend(u) * (u - math.log((1 - EPS) / EPS)),
        {"label_smoothing": EPS},
    ),
    "discopop": (discopop, {}),
}


def margin_cases():
    """Every loss of the margin with every f-divergence, with LD-DPO's α, and with weights."""
    for name, (slope, own) in MARGINS.items():
        for scores, options in DIVERGENCES.values():
            yield margin_case(name, slope, slopes_of=scores, **own, **options)
        yield margin_case(name, slope, ("pair_weights",), **own)
        for tail in (0.0, 0.4):
            yield margin_case(name, slope, tail=tail, ld_alpha=tail, **own)
    yield margin_case("discopop", lambda u: discopop(u, 0.5), discopop_tau=0.5)
    yield normalized_case("ipo", lambda d: -2 * (d - 0.5 / BETA))
    yield pair_case(
        "ipo",
        lambda x: (-2 * (x.gaps() - 0.5 / BETA), 2 * (x.gaps() - 0.5 / BETA)),
        length_normalized=False,
    )
    yield normalized_case("sigmoid_norm", lambda d: BETA * sigma(-BETA * d))
    for name in ("ipo", "sigmoid_norm"):
        for _, options in list(DIVERGENCES.values())[1:]:
            yield Case(name, {"beta": BETA} | options, None)
        yield Case(name, {"beta": BETA, "ld_alpha": 0.4}, None, ("pair_weights",))


def reward_cases():
    """The losses of both rewards, with their slopes in them, and with α and weights."""
    goal, lamb = 0.5 / BETA, 5.0

    def dpop(x):
        g, b = x.r
        v = BETA * (g - b - lamb * torch.relu(-g))
        k = BETA * sigma(-v)
        return k * (1 + lamb * (g < 0)), -k

    def apo_down(x):
        g, b = x.r
        u = BETA * (g - b)
        return BETA * (bend(u) - bend(BETA * g)), -BETA * bend(u)

    slopes = {
        "nca_pair": lambda x: (
            BETA * (sigma(-BETA * x.r[0]) - sigma(BETA * x.r[0]) / 2),
            -BETA * sigma(BETA * x.r[1]) / 2,
        ),
        "bco_pair": lambda x: (BETA * sigma(-BETA * x.r[0]), -BETA * sigma(BETA * x.r[1])),
        "sppo_hard": lambda x: (2 * (goal - x.r[0]), -2 * (goal + x.r[1])),
        "apo_zero": lambda x: (BETA * bend(BETA * x.r[0]), -BETA * bend(BETA * x.r[1])),
        "apo_down": apo_down,
        "cal_dpo": lambda x: (
            sigma(-x.gaps()) + 2 * (goal - x.r[0]),
            -sigma(-x.gaps()) - 2 * (goal + x.r[1]),
        ),
        "dpop": dpop,
    }
    for name, k in slopes.items():
        own = {"dpop_lambda": lamb} if name == "dpop" else {}
        yield pair_case(name, k, **own)
        yield Case(name, {"beta": BETA, "ld_alpha": 0.4} | own, None, ("pair_weights",))
    for options in ({}, {"tdpo_alpha": 0.0}, {"variant": "tdpo1"}):  # its c goes on in D
        yield Case("tdpo", {"beta": BETA} | options, None)


def free_cases():
    """The losses without a reference: types, smoothing, a likelihood of others."""

    def logistic(eps=0.0, beta=BETA, gamma=0.0):
        return lambda g, b: beta * (sigma(-(beta * (g - b) - gamma)) - eps)

    def hinge(g, b):
        return BETA * (BETA * (g - b) < 1).double()

    def square(g, b):
        return 2 * (0.5 / BETA - g + b)

    def token_mean(weight):
        return lambda side: weight / side.N

    for name, weight in (("cpo", 1.0), ("tpo", 1.0)):
        own, nll = {"beta": BETA}, token_mean(weight)
        yield free_case(name, logistic(), own, likelihood=nll)
        yield free_case(
            name,
            logistic(EPS),
            own | {"label_smoothing": EPS, "nll_weight": 0.0},
            likelihood=lambda s: 0.0,
        )
        yield free_case(
            name, hinge, own | {"loss_type": "hinge", "nll_weight": 0.3}, likelihood=token_mean(0.3)
        )
        yield free_case(name, square, own | {"loss_type": "ipo"}, mean=True, likelihood=nll)
    yield free_case("cpo", logistic(), {"beta": BETA}, likelihood=token_mean(1.0), beside=("gold",))
    for eps in (0.0, EPS):
        yield free_case(
            "tpo",
            logistic(eps, 2.0, 0.4),
            {"beta": 2.0, "gamma": 0.4, "loss_type": "tpo-l", "label_smoothing": eps},
            mean=True,
            likelihood=token_mean(1.0),
        )
        own = {"beta": 2.0, "gamma": 0.4, "label_smoothing": eps}
        yield free_case("simpo", logistic(eps, 2.0, 0.4), own, mean=True)
    for a in (0.25, -0.5, 0.0):

        def bent(g, b, a=a):
            of_g, of_b = ((1 - torch.exp(-a * s)) / a if a else s for s in (g, b))
            k = 2.0 * sigma(-(2.0 * (of_g - of_b) - 0.4))
            return k * torch.exp(-a * g), k * torch.exp(-a * b)

        own = {"beta": 2.0, "gamma": 0.4, "alphapo_alpha": a}
        yield free_case("alphapo", bent, own, mean=True)
    yield Case("alphapo", {"label_smoothing": EPS}, None)

    def of_odds(g, b):
        h = torch.log(odds(torch.exp(g))) - torch.log(odds(torch.exp(b)))
        return BETA * sigma(-h) / (1 - torch.exp(g)), BETA * sigma(-h) / (1 - torch.exp(b))

    for beside in ((), ("gold",)):
        yield free_case(
            "orpo", of_odds, {"beta": BETA}, mean=True, likelihood=token_mean(1.0), beside=beside
        )
        yield free_case(
            "slic",
            lambda g, b: (g - b < 2.0).double(),
            {"delta": 2.0, "nll_weight": 0.3},
            likelihood=lambda side: 0.3 / side.B,
            beside=beside,
        )


def single_cases():
    """The losses of single responses, and of sorted batches."""

    def kto(z, up=1.0, down=1.0):
        return lambda g, b: (
            up * BETA * bend(BETA * (g - z)),
            -down * BETA * bend(BETA * (b - z)),
        )

    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.4}
    for own, factors in (({}, (1.0, 1.0)), (weights, (1.5, 0.4))):
        yield single_case("kto", kto(0.7, *factors), **own)
        yield single_case("apo_zero_unpaired", kto(0.0, *factors), **own)
    yield single_case(
        "bco", lambda g, b: (BETA * sigma(-BETA * g - 0.3), -BETA * sigma(BETA * b + 0.3))
    )

    def margins(x):
        return (x.chosen.S - x.rejected.S)[:, 0], x.refs[0] - x.refs[1]

    def rewards(x):
        return x.r[0][:, 0], x.r[1][:, 0]

    for eps in (0.0, EPS):
        yield sorted_case("aot", margins, label_smoothing=eps)
        yield sorted_case("aot_unpaired", rewards, label_smoothing=eps)
    yield Case("aot", {"beta": BETA, "ld_alpha": 0.4}, None)
    yield Case("aot_unpaired", {"beta": BETA, "ld_alpha": 0.4}, None)


def chosen_cases():
    """The likelihood losses of the chosen side."""

    def focal(gamma, over):
        def c(x):
            x, n = x.chosen, over(x.chosen)
            rest = 1 - x.p
            return (rest**gamma - gamma * x.p * rest ** (gamma - 1) * x.logp) / n, 0

        return c

    for reduction, over in (("token_mean", lambda x: x.N), ("sequence_sum", lambda x: x.B)):
        own = {"reduction": reduction}
        yield Case("mle", own, lambda x, n=over: (1 / n(x.chosen), 0))
        yield Case("dft", own, lambda x, n=over: (x.chosen.p / n(x.chosen), 0))
        for gamma in (2.0, 0.5, 0.0):
            yield Case("focal_mle", own | {"focal_gamma": gamma}, focal(gamma, over))
        yield Case("smoothed_mle", own, None)  # not of this form
        yield Case("smoothed_mle", own | {"label_smoothing": 0.0}, None)


def rejected_cases():
    """Unlikelihood, MATE and ExMATE, and their sums with MLE."""

    def of_level(level):
        return {
            "token": lambda x: odds(x.p) / x.N,
            "sequence": lambda x: odds(x.P) / x.B,
            "sequence_mean": lambda x: odds(x.root) / (x.B * x.T),
        }[level]

    def of_norm(norm):
        return {
            "sequence_mean": lambda x: x.root / (x.B * x.T),
            "sequence_sum": lambda x: x.P / x.B,
            "token": lambda x: x.p / x.N,
            "batch_token_mean": lambda x: ((x.logp * x.mask).sum() / x.N).exp() / x.N,
        }[norm]

    def both(name, option, values, penalty):
        for value in values:
            own, k = {option: value}, penalty(value)
            yield Case(f"{name}_penalty", own, lambda x, k=k: (0, -k(x.rejected)))
            yield Case(
                name,
                own | {"coefficient": 0.7},
                lambda x, k=k: (mle(x), -0.7 * k(x.rejected)),
            )

    yield from both("unlikelihood", "level", ("token", "sequence", "sequence_mean"), of_level)
    norms = ("sequence_mean", "sequence_sum", "token", "batch_token_mean")
    yield from both("exmate", "norm", norms, of_norm)
    yield Case("candidate_unlikelihood_penalty", {}, None)  # not of this form
    yield Case("mate", {"coefficient": 0.05}, lambda x: (mle(x), -0.05 / x.rejected.N))
    yield Case("mate_penalty", {}, lambda x: (0, -1 / x.rejected.N))


CASES = [
    *chosen_cases(),
    *rejected_cases(),
    *margin_cases(),
    *reward_cases(),
    *free_cases(),
    *single_cases(),
]
ONE_EACH = list({case.name: case for case in reversed(CASES)}.values())[::-1]
