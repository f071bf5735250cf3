"""What a rank does to draw from rows, and to score tokens, whose vocabulary is split."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastadapt._ops.common import check_ids
from fastadapt._ops.lists import ends_of
from fastadapt._ops.sharded.arithmetic import draw_target, key_of, log_mass
from fastadapt._ops.sharded.exchange import Program, Request
from fastadapt._ops.sharded.filters import Filters
from fastadapt._ops.sharded.kept import kept_ids
from fastadapt._ops.sharded.lists import Law, Lists, listed
from fastadapt._ops.sharded.opening import Given, Opened, opened
from fastadapt._ops.sharded.state import State
from fastadapt._ops.sharded.support import COUNT, MASS, SURPRISAL, Support, Tokens


class Draw(NamedTuple):
    """What `sample` is asked for."""

    law: Law
    seeds: Tensor  # (N,)
    positions: Tensor  # (N,)
    own_seeds: bool  # they are this rank's own, and those of the first rank hold
    base_logprobs: bool
    log_mass: bool
    top_n: int
    support: bool


class Marks(NamedTuple):
    """What `score` is asked for."""

    laws: list[Law]
    tokens: Tensor  # (N,)
    ignore_index: int
    support: bool


def draw(given: Given, asked: Draw) -> Program[list[Tensor]]:
    """Draws a token per row; the fields of `Sample` that are asked for, three of a support."""
    whole = yield from opened(given)
    if asked.top_n > whole.real:
        raise ValueError(f"top_logprobs: expected 0 to {whole.real}, got {asked.top_n}")
    law = asked.law
    status = _status(whole.x_max, law.inverse)
    ok = status == 0
    x_max = torch.where(ok, whole.x_max, float("inf"))  # bad rows have no masses
    active = ok & ~law.greedy
    support = law.support(x_max, active)
    rows = Support.whole(support.row, support.inverse, support.m)
    base = Support.whole(support.row, torch.ones_like(support.m), x_max)
    wanted = [support]
    wanted += [rows] * asked.log_mass + [base] * (asked.base_logprobs or asked.top_n > 0)
    count = max(law.tokens_sent, asked.top_n)
    own = [asked.seeds] * asked.own_seeds
    lists, sums, seeds = yield from listed(whole, count, wanted, own)
    state = lists.state(whole, support, sums[0])
    yield from Filters(state, law.knobs, active).run(law.rest)
    yield from state.settle(active)
    target = draw_target(
        seeds[0][0] if asked.own_seeds else asked.seeds, asked.positions, state.sums[:, MASS]
    )
    x, tokens = yield from _drawn(given.rank, state, active, target)
    x = torch.where(law.greedy, lists.x[:, 0], x)
    tokens = torch.where(law.greedy, lists.ids[:, 0], tokens)

    nan = float("nan")
    log_s = log_mass(state.sums[:, MASS])
    logprobs = _log_ratio(x, support, log_s)
    out = [
        torch.where(ok, tokens, -1),
        torch.where(ok, torch.where(law.greedy, 0.0, logprobs), nan),
        torch.where(ok, torch.where(law.greedy, 1, state.sums[:, COUNT]), 0).int(),
        status,
    ]
    log_z = log_mass(sums[-1].sum(0)[:, MASS])  # of the base law, where it is asked for
    if asked.base_logprobs:
        out.append(torch.where(ok, _log_ratio(x, base, log_z), nan))
    if asked.log_mass:
        part = (log_s - log_mass(sums[1].sum(0)[:, MASS])).float()
        out.append(torch.where(ok, torch.where(law.greedy, 0.0, part), nan))
    if asked.top_n:
        ids, best = lists.ids[:, : asked.top_n], lists.x[:, : asked.top_n]
        values = (best.double() - x_max[:, None].double() - log_z[:, None]).float()
        rank = yield from _rank(whole, lists, base, x, tokens, ok)
        out += [torch.where(ok[:, None], ids, -1), torch.where(ok[:, None], values, nan)]
        out.append(torch.where(ok, rank, 0).int())
    if asked.support:
        # of a row at temperature 0 the best survives
        first = Tokens.of(state.support, lists.x[:, :1], lists.ids[:, :1]).by_rank[:, 0]
        cut = torch.where(law.greedy, first, state.support.cut)
        survivors = state.support._replace(cut=cut)
        listed_ids = yield from kept_ids(whole.part, survivors, out[2])
        out += [*listed_ids, out[2] == whole.part.whole]
    return out


def score(given: Given, asked: Marks) -> Program[list[Tensor]]:
    """Scores tokens; the fields of `Score`, then supports, one adaptor's after the other's."""
    whole = yield from opened(given)
    tokens, n = asked.tokens, len(asked.tokens)
    check_ids("tokens", tokens, whole.real, asked.ignore_index)
    used = tokens != asked.ignore_index
    y = torch.where(used, tokens, 0)
    here = y - whole.part.first
    inside = (here >= 0) & (here < whole.part.v)
    own = torch.zeros_like(whole.x_max)
    index = inside.nonzero()[:, 0]
    own[index] = whole.part.rows[index, here[index]].float()

    base_ok = (_status(whole.x_max, torch.ones_like(own)) == 0) & used
    x_max = torch.where(base_ok, whole.x_max, float("inf"))
    ok = [(_status(whole.x_max, law.inverse) == 0) & used for law in asked.laws]
    supports = [law.support(x_max, good) for law, good in zip(asked.laws, ok, strict=True)]
    base = Support.whole(supports[0].row, torch.ones_like(own), x_max)
    count = max(law.tokens_sent for law in asked.laws)
    lists, sums, others = yield from listed(whole, count, [*supports, base], [own])
    x = others[0].gather(0, whole.owner(y)[None])[0]
    z, u = sums[-1].sum(0)[:, MASS], sums[-1].sum(0)[:, SURPRISAL]
    log_z = log_mass(z)
    bad = torch.where(used, float("nan"), 0.0)

    columns: list[tuple[Tensor, ...]] = [()] * len(asked.laws)
    found: list[tuple[Tensor, Tensor]] = [(tokens, tokens)] * len(asked.laws)  # ids, their numbers
    for rest in dict.fromkeys(law.rest for law in asked.laws):
        group = [i for i, law in enumerate(asked.laws) if law.rest == rest]
        of_group = [asked.laws[i].knobs for i in group]
        knobs = {name: torch.cat([k[name] for k in of_group]) for name in of_group[0]}
        active = torch.cat([ok[i] for i in group])
        support = Support(*map(torch.cat, zip(*(supports[i] for i in group), strict=True)))
        state = lists.state(whole, support, torch.cat([sums[i] for i in group], 1))
        yield from Filters(state, knobs, active).run(rest)
        yield from state.settle(active)
        many = len(group)
        marked = Tokens.of(state.support, x.repeat(many)[:, None], y.repeat(many)[:, None])
        stays = marked.survive(state.support)[:, 0]
        log_s = log_mass(state.sums[:, MASS])
        logprobs = torch.where(stays, _log_ratio(x.repeat(many), support, log_s), float("-inf"))
        inverse = support.inverse.double()
        shift = support.m.double() - x_max.repeat(many).double() * inverse
        log_norm = (shift + log_s - log_z.repeat(many) * inverse).float()
        fill = bad.repeat(many)
        values = (
            torch.where(active, logprobs, fill),
            torch.where(active, log_norm, fill),
            torch.where(active, state.sums[:, COUNT], 0).int(),
        )
        for i, *column in zip(group, *(v.view(many, n) for v in values), strict=True):
            columns[i] = tuple(column)
        if asked.support:
            ids, offsets = yield from kept_ids(whole.part, state.support, values[2])
            counts = offsets.diff().view(many, n)
            parts = ids.split(counts.sum(1).tolist())
            for i, part, number in zip(group, parts, counts, strict=True):
                found[i] = part, number
    logprobs, log_norm, kept = (torch.stack(c, -1) for c in zip(*columns, strict=True))
    base_logprobs = torch.where(base_ok, _log_ratio(x, base, log_z), bad)
    entropy = torch.where(base_ok, (log_z + u.double() / z.double()).float(), bad)
    out = [logprobs, log_norm, kept, base_logprobs, entropy]
    if asked.support:
        ids, counts = (torch.cat(x) for x in zip(*found, strict=True))
        full = (kept == whole.part.whole).t().reshape(-1)
        out += [ids, ends_of(counts.view(-1)), full]
    return out


def _status(x_max: Tensor, inverse: Tensor) -> Tensor:
    """The status of rows by their largest logit, uint8."""
    m = x_max * inverse
    status = torch.where(m == float("-inf"), 3, torch.where(m == float("inf"), 2, 0))
    return torch.where(m.isnan(), 1, status).to(torch.uint8)


def _log_ratio(x: Tensor, support: Support, log_total: Tensor) -> Tensor:
    """s - m - ln of a mass, float32 (P,), computed in float64."""
    s = x * support.inverse
    return (s.double() - support.m.double() - log_total).float()


def _drawn(
    rank: int, state: State, active: Tensor, target: Tensor
) -> Program[tuple[Tensor, Tensor]]:
    """The first survivor by id whose running mass exceeds a target (P,): its logit and its id."""
    ids = torch.where(state.alive, state.tokens.ids, 1 << 31)
    order = ids.argsort(1)
    running = (state.tokens.w * state.alive).gather(1, order).cumsum(1)
    place = (running <= target[:, None]).sum(1, keepdim=True).clamp(max=ids.shape[1] - 1)
    at = order.gather(1, place)
    x, tokens = (t.gather(1, at)[:, 0] for t in (state.tokens.x, state.tokens.ids))
    index = (active & ~state.complete).nonzero()[:, 0]
    if len(index) == 0:
        return x, tokens
    ends = state.by_rank[index].cumsum(1)
    owner = (ends <= target[index, None]).sum(1)
    before = target[index] - (ends - state.by_rank[index]).gather(1, owner[:, None])[:, 0]
    found = index.new_zeros(2, len(index))
    own = (owner == rank).nonzero()[:, 0]
    if len(own):
        logit, name = state.part.find(state.support.at(index[own]), before[own])
        found[0, own], found[1, own] = logit.view(torch.int32).long(), name
    found = yield Request("sum", found)
    logit = found[0].int().view(torch.float32)
    return x.index_put((index,), logit), tokens.index_put((index,), found[1])


def _rank(
    whole: Opened, lists: Lists, base: Support, x: Tensor, tokens: Tensor, ok: Tensor
) -> Program[Tensor]:
    """1 + how many tokens stand before those drawn, by logit and id."""
    key = key_of(x, tokens.clamp(min=0))
    rank = (lists.key >= key[:, None]).sum(1)
    index = (ok & (key < lists.cover)).nonzero()[:, 0]
    if len(index) == 0:
        return rank
    upto = base._replace(cut=key).at(index)
    counts = yield Request("sum", whole.part.tally(upto)[:, COUNT])
    return rank.index_put((index,), counts)
