"""References of the policy losses: float64 log-softmax of the two logits [m, 0], token after token.

Numbers are combined as the papers print them, `min(r A, clip(r) A)`; so a ratio that overflows
beside an advantage of 0 is NaN here.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Side = Any  # a fastadapt.Responses, or anything with its attributes
Metrics = dict[str, Tensor]


def clipped_ratio_loss(
    sampled: Side,
    advantages: Tensor,
    sampler_logps: Tensor,
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    level: str = "token",
    reduction: str = "token_mean",
) -> tuple[Tensor, Metrics]:
    """Reference of `fastadapt.clipped_ratio_loss`.

    Examples:
        >>> from fastadapt import reference
        >>> sampled = Responses(torch.tensor([[0.0, 2.0]]), torch.tensor([[True, True]]))
        >>> sampler_logps = torch.tensor([[-0.6931, -0.5]])
        >>> reference.clipped_ratio_loss(sampled, torch.tensor([1.0]), sampler_logps)[0]
        tensor(-1.1000)
    """
    high = 1 + (epsilon if epsilon_high is None else epsilon_high)
    seen = _Seen()
    terms: list[list[Tensor]] = []
    for i, places in enumerate(_places(sampled)):
        inside = [at for at in places if _inside(sampled, at)]
        logs = [_logp(sampled, at) - sampler_logps[at].double() for at in inside]
        seen.of_tokens(logs, len(places) - len(inside))
        if level == "sequence" and inside:
            logs = [torch.stack(logs).mean()] * len(inside)
        own: list[Tensor] = []
        for place, (at, log) in enumerate(zip(inside, logs, strict=True)):
            weight = _advantage(sampled, advantages, i, at)
            ratio = log.exp()
            first = ratio if delta is None else ratio.clamp(max=delta)
            one, two = first * weight, ratio.clamp(1 - epsilon, high) * weight
            own.append(-torch.minimum(one, two))
            if level == "token" or place == 0:
                low = bool(weight < 0 and ratio < 1 - epsilon)
                far = weight < 0 and delta is not None and bool(ratio > delta)
                seen.ratio(ratio, low, bool(weight > 0 and ratio > high) or bool(far))
        terms.append([torch.zeros_like(sampled.log_odds[at]).double() for at in places])
        terms[-1][: len(own)] = own
    metrics = seen.metrics(sampled, ("mean", "beyond_0.1", "clipped", "clipped_low"))
    return _reduced(sampled, terms, reduction), metrics


def reinforce_loss(
    sampled: Side,
    advantages: Tensor,
    sampler_logps: Tensor | None = None,
    *,
    max_weight: float = 2.0,
    reduction: str = "token_mean",
) -> tuple[Tensor, Metrics]:
    """Reference of `fastadapt.reinforce_loss`.

    Examples:
        >>> from fastadapt import reference
        >>> sampled = Responses(torch.tensor([[0.0, 2.0]]), torch.tensor([[True, True]]))
        >>> reference.reinforce_loss(sampled, torch.tensor([-1.0]))[0]
        tensor(-0.4100)
    """

    def term(i: int, at: Any) -> Tensor:
        return -_advantage(sampled, advantages, i, at) * _logp(sampled, at)

    terms, seen = _weighted(sampled, sampler_logps, max_weight, term)
    return _reduced(sampled, terms, reduction), seen


def weighted_reinforce_loss(
    sampled: Side,
    correct: Tensor,
    sampler_logps: Tensor | None = None,
    *,
    positive_weight: float = 0.1,
    negative_weight: float = 1.0,
    penalty: str = "log_prob",
    max_weight: float = 2.0,
    reduction: str = "token_mean",
) -> tuple[Tensor, Metrics]:
    """Reference of `fastadapt.weighted_reinforce_loss`.

    Examples:
        >>> from fastadapt import reference
        >>> mask = torch.tensor([[True, True], [True, True]])
        >>> sampled = Responses(torch.tensor([[0.0, 2.0], [0.0, -2.0]]), mask)
        >>> reference.weighted_reinforce_loss(sampled, torch.tensor([True, False]))[0]
        tensor(-0.6845)
    """

    def side(right: bool) -> tuple[Tensor, Metrics]:
        def term(i: int, at: Any) -> Tensor:
            m = sampled.log_odds[at]
            if bool(correct[i]) != right:
                return torch.zeros_like(m).double()
            if right:
                return -_logp(sampled, at)
            if penalty == "log_prob":
                return _logp(sampled, at)
            return -_logs(m)[1] if m != float("inf") else torch.zeros_like(m).double()

        terms, seen = _weighted(sampled, sampler_logps, max_weight, term)
        return _reduced(sampled, terms, reduction), seen

    (positive, metrics), (negative, _) = side(True), side(False)
    metrics |= {"loss/positive": positive.detach(), "loss/negative": negative.detach()}
    return positive_weight * positive + negative_weight * negative, metrics


class _Seen:
    """What the metrics are made of."""

    def __init__(self) -> None:
        self.ratios: list[float] = []
        self.low: list[bool] = []
        self.high: list[bool] = []
        self.kl: list[float] = []
        self.outside = 0

    def of_tokens(self, logs: list[Tensor], outside: int) -> None:
        """Takes the log-ratios of a response's tokens."""
        self.kl += [float(x.exp() - 1 - x) for x in (log.detach() for log in logs)]
        self.outside += outside

    def ratio(self, ratio: Tensor, low: bool, high: bool) -> None:
        """Takes a ratio and whether a bound holds it."""
        self.ratios.append(float(ratio.detach()))
        self.low.append(low)
        self.high.append(high)

    def metrics(self, sampled: Side, names: tuple[str, ...]) -> Metrics:
        """Returns them by name."""
        bounded = [a or b for a, b in zip(self.low, self.high, strict=True)]
        shares: dict[str, list[Any]] = {
            "mean": self.ratios,
            "beyond_0.1": [not 0.9 <= r <= 1.1 for r in self.ratios],
            "clipped": bounded,
            "truncated": bounded,
            "clipped_low": self.low,
        }
        found = {f"ratios/{name}": sum(shares[name]) / max(len(shares[name]), 1) for name in names}
        if names:
            found["kl/sampler"] = sum(self.kl) / max(len(self.kl), 1)
        found["tokens/outside_support"] = float(self.outside)
        like = _reduced(sampled, [], "token_mean").detach()
        return {name: torch.full_like(like, value) for name, value in found.items()}


def _weighted(
    sampled: Side,
    sampler_logps: Tensor | None,
    max_weight: float,
    term: Callable[[int, Any], Tensor],
) -> tuple[list[list[Tensor]], Metrics]:
    """Returns the terms of all tokens, times their truncated importance weights, and metrics."""
    seen, terms = _Seen(), []
    for i, places in enumerate(_places(sampled)):
        own = []
        for at in places:
            if not _inside(sampled, at):
                seen.outside += 1
                own.append(torch.zeros_like(sampled.log_odds[at]).double())
                continue
            weight = 1.0
            if sampler_logps is not None:
                log = (_logp(sampled, at) - sampler_logps[at].double()).detach()
                seen.of_tokens([log], 0)
                seen.ratio(log.exp(), False, bool(log.exp() > max_weight))
                weight = min(float(log.exp()), max_weight)
            own.append(weight * term(i, at))
        terms.append(own)
    names = () if sampler_logps is None else ("mean", "beyond_0.1", "truncated")
    return terms, seen.metrics(sampled, names)


def _places(side: Side) -> list[list[Any]]:
    """Returns where the tokens of each response stand."""
    if side.segments is None:
        return [[(i, int(t)) for t in row.nonzero()[:, 0]] for i, row in enumerate(side.mask)]
    ids = side.segments.tolist()
    size = side.num_segments
    if size is None:
        size = max([1, *(1 + i for i in ids)])
    return [[t for t, i in enumerate(ids) if i == response] for response in range(size)]


def _logs(m: Tensor) -> Tensor:
    """Returns log p and log(1 - p)."""
    return torch.stack([m.double(), torch.zeros_like(m).double()]).log_softmax(0)


def _inside(side: Side, at: Any) -> bool:
    """Whether a token is in its support."""
    return bool(side.log_odds[at] != float("-inf"))


def _logp(side: Side, at: Any) -> Tensor:
    """Returns log p of a token in its support."""
    m: Tensor = side.log_odds[at]
    return torch.zeros_like(m).double() if bool(m == float("inf")) else _logs(m)[0]


def _advantage(side: Side, advantages: Tensor, i: int, at: Any) -> Tensor:
    """Returns the advantage of a token, its response's if there is one a response."""
    each = advantages.shape == (len(_places(side)),)
    found: Tensor = advantages[i if each else at]
    return found.detach().double()


def _reduced(side: Side, terms: list[list[Tensor]], reduction: str) -> Tensor:
    """Returns a mean of the terms of all responses."""
    total: Tensor = side.log_odds.flatten()[:0].double().sum()
    for own in terms:
        if own:
            sums = torch.stack(own).sum()
            total = total + (sums / len(own) if reduction == "sequence_mean" else sums)
    if reduction == "token_mean":
        count, lengths = side.total_tokens, [len(own) for own in terms]
    else:
        count, lengths = side.total_sequences, [bool(own) for own in terms]
    divisor = float(sum(lengths) if count is None else count)
    dtype = torch.float64 if side.log_odds.dtype == torch.float64 else torch.float32
    return (total / max(divisor, 1.0)).to(dtype)
