"""References of the functions of an adapted distribution: its logits, draws, scores, log-odds.

The rule that they follow is told in `fastadapt.reference`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastadapt._ops.philox import philox
from fastadapt.reference.distribution import Distribution, Knobs
from fastadapt.reference.edits import Changes, edited
from fastadapt.reference.ranks import of_first_rank, whole_rows
from fastadapt.results import Sample, Score, Support

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def filter_logits(
    logits: Tensor,
    adaptor: Knobs,
    *,
    edits: Changes | None = None,
    allowed: Tensor | None = None,
    num_tokens: int | None = None,
) -> Tensor:
    """Reference of `fastadapt.filter_logits`; float64 logits take the textbook form.

    Examples:
        >>> from fastadapt import reference
        >>> logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
        >>> reference.filter_logits(logits, Adaptor(top_k=2))
        tensor([[2., 1., -inf, -inf]])
    """
    x = _fold(edited(logits, edits, allowed, num_tokens))
    distribution = Distribution(x, adaptor)
    scaled = torch.where(distribution.greedy, distribution.x, distribution.fitted(logits.dtype)).to(
        logits.dtype
    )
    out = torch.where(distribution.alive, scaled, float("-inf"))
    good = (distribution.status == 0)[:, None]
    return torch.where(good, out, x.to(logits.dtype)).view(logits.shape)


def sample(
    logits: Tensor,
    adaptor: Knobs,
    *,
    seeds: Tensor | None = None,
    positions: Tensor | None = None,
    generator: torch.Generator | None = None,
    base_logprobs: bool = False,
    log_mass: bool = False,
    top_logprobs: int = 0,
    support: bool = False,
    edits: Changes | None = None,
    allowed: Tensor | None = None,
    num_tokens: int | None = None,
    group: "ProcessGroup | None" = None,
) -> Sample:
    """Reference of `fastadapt.sample`; float64 logits take the textbook form.

    With a group every rank gathers the logits and does everything itself.

    Examples:
        >>> from fastadapt import reference
        >>> logits, seeds = torch.randn(4, 1000), torch.arange(4)
        >>> drawn = reference.sample(logits, Adaptor(top_p=0.9), seeds=seeds)
        >>> torch.equal(drawn.tokens, sample(logits, Adaptor(top_p=0.9), seeds=seeds).tokens)
        True
    """
    logits = whole_rows(logits, group)
    x, shape = _fold(edited(logits, edits, allowed, num_tokens)), logits.shape[:-1]
    n = x.shape[0]
    if seeds is None:
        seeds = torch.randint(2**63 - 1, (n,), generator=generator, device=x.device)
        seeds = of_first_rank(seeds, group)
    positions = torch.zeros_like(seeds) if positions is None else positions
    low, high, coin, _ = philox(seeds.reshape(-1), positions.reshape(-1))
    distribution = Distribution(x, adaptor, coin=coin)
    ok = distribution.status == 0
    w = distribution.w * distribution.alive
    running = w.cumsum(-1)  # (N, V)
    target = distribution.draw_target(low, high, running[:, -1])
    tokens = (running <= target[:, None]).sum(-1).clamp(max=x.shape[1] - 1)
    tokens = torch.where(distribution.greedy[:, 0], distribution.best, tokens)
    logprobs = _log_ratio(distribution, tokens, distribution.log(w.sum(-1)))
    logprobs = torch.where(distribution.greedy[:, 0], 0.0, logprobs)
    result = {
        "tokens": torch.where(ok, tokens, -1),
        "logprobs": torch.where(ok, logprobs, float("nan")),
        "kept": torch.where(ok, distribution.alive.sum(-1), 0).int(),
        "status": distribution.status,
    }
    base = Distribution(x, None)
    log_z = base.log(base.w.sum(-1))
    if base_logprobs:
        value = _log_ratio(base, tokens, log_z)
        result["base_logprobs"] = torch.where(ok, value, float("nan"))
    if log_mass:
        value = (distribution.log(w.sum(-1)) - distribution.log_of_all()).float()
        value = torch.where(distribution.greedy[:, 0], 0.0, value)
        result["log_mass"] = torch.where(ok, value, float("nan"))
    if top_logprobs:
        top = base.ranking[:, :top_logprobs]
        values = (base.x.gather(1, top).double() - base.m.double() - log_z[:, None]).float()
        result["top_ids"] = torch.where(ok[:, None], top, -1)
        result["top_logprobs"] = torch.where(ok[:, None], values, float("nan"))
        position = (base.ranking == tokens[:, None]).int().argmax(-1) + 1
        result["rank"] = torch.where(ok, position, 0).int()
    fields = {k: v.reshape(shape + v.shape[1:]) for k, v in result.items()}
    survived = distribution.alive & ok[:, None]
    return Sample(**fields, support=Support.from_mask(survived) if support else None)


def score(
    logits: Tensor,
    tokens: Tensor,
    adaptors: Sequence[Knobs],
    *,
    ignore_index: int = -100,
    support: bool = False,
    edits: Changes | None = None,
    allowed: Tensor | None = None,
    num_tokens: int | None = None,
    group: "ProcessGroup | None" = None,
) -> Score:
    """Reference of `fastadapt.score`; float64 logits take the textbook form.

    With a group every rank gathers the logits and does everything itself.

    Examples:
        >>> from fastadapt import reference
        >>> logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
        >>> scores = reference.score(logits, torch.tensor([1]), [Adaptor(), Adaptor(top_k=1)])
        >>> scores.logprobs, scores.kept
        (tensor([[-1.4402,    -inf]]), tensor([[4, 1]], dtype=torch.int32))
    """
    if any(adaptor.greedy for adaptor in adaptors):
        raise ValueError("score: expected temperature > 0, got 0")
    logits = whole_rows(logits, group)
    x, shape = _fold(edited(logits, edits, allowed, num_tokens)), tokens.shape
    flat = tokens.reshape(-1)
    used = flat != ignore_index
    y = torch.where(used, flat, 0)
    base = Distribution(x, None)
    log_z = base.log(base.w.sum(-1))
    columns, supports = [], []
    for adaptor in adaptors:
        distribution = Distribution(x, adaptor)
        ok = (distribution.status == 0) & used
        log_s = distribution.log((distribution.w * distribution.alive).sum(-1))
        supports.append(Support.from_mask(distribution.alive & ok[:, None]))
        inside = distribution.alive.gather(1, y[:, None])[:, 0]
        logprobs = torch.where(inside, _log_ratio(distribution, y, log_s), float("-inf"))
        inverse = distribution.inverse[:, 0].double()
        shift = distribution.m[:, 0].double() - base.m[:, 0].double() * inverse
        log_norm = (shift + log_s - log_z * inverse).float()
        kept = torch.where(ok, distribution.alive.sum(-1), 0).int()
        bad = torch.where(used, float("nan"), 0.0).float()
        columns.append((torch.where(ok, logprobs, bad), torch.where(ok, log_norm, bad), kept))
    logprobs, log_norm, kept = (torch.stack(c, -1) for c in zip(*columns, strict=True))
    ok, bad = (base.status == 0) & used, torch.where(used, float("nan"), 0.0).float()
    base_logprobs = torch.where(ok, _log_ratio(base, y, log_z), bad)
    entropy = torch.where(ok, base.entropy(base.alive).float(), bad)
    many = (*shape, len(adaptors))
    return Score(
        logprobs.view(many),
        log_norm.view(many),
        kept.view(many),
        base_logprobs.view(shape),
        entropy.view(shape),
        tuple(supports) if support else None,
    )


def adapted_log_odds(
    logits: Tensor,
    tokens: Tensor,
    adaptor: Knobs,
    *,
    ignore_index: int = -100,
    edits: Changes | None = None,
    allowed: Tensor | None = None,
    num_tokens: int | None = None,
) -> Tensor:
    """Reference of `fastadapt.adapted_log_odds`, differentiable through autograd.

    Examples:
        >>> from fastadapt import reference
        >>> logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
        >>> reference.adapted_log_odds(logits, torch.tensor([0]), Adaptor(top_k=2))
        tensor([1.])
    """
    x, flat = _fold(edited(logits, edits, allowed, num_tokens)), tokens.reshape(-1)
    used = flat != ignore_index
    y = torch.where(used, flat, 0)[:, None]
    decided = Distribution(x.detach().float(), adaptor)
    distribution = Distribution(x, adaptor, survivors=decided.alive)
    others = decided.alive.scatter(1, y, False)
    some = others.any(-1)
    # a row without other survivors has m = +inf and no gradient: keep logsumexp away from it
    best = torch.where(others, distribution.s, float("-inf")).amax(-1, keepdim=True).detach()
    d = distribution.s - torch.where(
        some[:, None], best, 0.0
    )  # subtracting first keeps far rows exact
    lse = torch.where(some[:, None], torch.where(others, d, float("-inf")), 0.0).logsumexp(-1)
    inside = decided.alive.gather(1, y)[:, 0]
    log_odds = torch.where(inside & some, d.gather(1, y)[:, 0] - lse, 0.0)
    log_odds = torch.where(some, log_odds, float("inf"))
    log_odds = torch.where(inside, log_odds, float("-inf"))
    log_odds = torch.where(decided.status == 0, log_odds, float("nan"))
    return torch.where(used, log_odds, 0.0).view(tokens.shape)


def adapted_logps(
    logits: Tensor,
    tokens: Tensor,
    adaptor: Knobs,
    *,
    ignore_index: int = -100,
    edits: Changes | None = None,
    allowed: Tensor | None = None,
    num_tokens: int | None = None,
) -> Tensor:
    """Reference of `fastadapt.adapted_logps`.

    Examples:
        >>> from fastadapt import reference
        >>> logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
        >>> reference.adapted_logps(logits, torch.tensor([0]), Adaptor(top_k=2))
        tensor([-0.3133])
    """
    log_odds = adapted_log_odds(
        logits,
        tokens,
        adaptor,
        ignore_index=ignore_index,
        edits=edits,
        allowed=allowed,
        num_tokens=num_tokens,
    )
    logps = torch.nn.functional.logsigmoid(log_odds)
    return torch.where(tokens == ignore_index, 0.0, logps)


def _fold(logits: Tensor) -> Tensor:
    """Reshapes (..., V) to (N, V)."""
    return logits.reshape(-1, logits.shape[-1])


def _log_ratio(distribution: Distribution, tokens: Tensor, log_mass: Tensor) -> Tensor:
    """Returns s_y - m - log mass, float32 (N,), computed in float64."""
    y = tokens.clamp(0, distribution.v - 1)[:, None]
    return (
        (distribution.s.gather(1, y).double() - distribution.m.double())[:, 0] - log_mass
    ).float()
