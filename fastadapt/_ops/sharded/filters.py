"""The filters of an adaptor on a split vocabulary, one after the other.

Each decides among the tokens that were sent where its cut is before their cover, and searches
where it is not. Both end in the same tests.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from fastadapt._ops.sharded.arithmetic import (
    ALMOST,
    LOWEST,
    NEARLY,
    UNIT,
    exp64,
    from_ordered,
    key_of,
    log_mass,
    masses,
    with_ties,
)
from fastadapt._ops.sharded.exchange import Program, Request, packed, unpacked
from fastadapt._ops.sharded.select import ALL_TIES, ONE, Found, Search, search
from fastadapt._ops.sharded.state import State, sums_of
from fastadapt._ops.sharded.support import (
    COUNT,
    CUTS,
    MASS,
    NEUTRAL,
    SENT,
    SURPRISAL,
    Tokens,
    above,
)

HIGHEST = 1 << 62  # above every key


class Filters:
    """Runs filters on problems; all methods that yield are parts of a rank's program."""

    def __init__(self, state: State, knobs: Mapping[str, Tensor], active: Tensor) -> None:
        """Takes knobs by name, (P,) float64 each, and which problems have a support (P,)."""
        self.state, self.knobs, self.active = state, knobs, active
        self.keep = knobs["min_tokens_to_keep"].clamp(max=2.0**31).long()

    def run(self, names: tuple[str, ...]) -> Program[None]:
        """Runs those of some names in this order, each on the survivors of the one before."""
        for name in names:
            acting = self.active & (self.knobs[name] != NEUTRAL[name])
            if bool(acting.any()):
                yield from getattr(self, f"_{name}")(acting, self.knobs[name])

    def _cut(self, where: Tensor, **tests: Tensor) -> None:
        """Sets tests (P,) of some problems, of which all survivors are known."""
        support = self.state.support
        for name, value in tests.items():
            old = getattr(support, name)
            # all ties of a value may be more than an earlier filter has left of them
            support = support._replace(**{name: torch.where(where, torch.maximum(old, value), old)})
        self.state.support = support
        self.state.complete = self.state.complete | where
        self.state.refresh(where)

    def _found(self, index: Tensor, found: Found, test: str, counted: Tensor) -> None:
        """Takes the cuts of a search, and what stays there where that is `counted` (p,)."""
        old = getattr(self.state.support, test)
        cut = torch.maximum(old[index], found.cut)  # a guard may be below those that are left
        self.state.support = self.state.support._replace(**{test: old.index_put((index,), cut)})
        self.state.refresh(torch.zeros_like(self.active).index_fill(0, index, True))
        self.state.take(index[counted], found.sums[counted], found.by_rank[counted])

    def _search(
        self, index: Tensor, kind: str, weight: int, target: Tensor, unit: int
    ) -> Program[Found]:
        """Searches the cuts of problems (p,) from the best key on."""
        state = self.state
        total, support = state.sums[index], state.support.at(index)
        if kind == "rank":
            end = above(key_of(support.m, torch.zeros_like(target)))
            # what was sent need not be searched
            cover = state.cover[index] if unit == ONE else with_ties(state.cover[index] + unit - 1)
            sent = state.alive[index] & (state.tokens.by_rank[index] >= cover[:, None])
            listed = sums_of(state.tokens.at(index), sent)
            useful = listed[:, weight] < target
            end = torch.where(useful, cover, end)
            above_end = torch.where(useful[:, None], listed, 0)
        else:
            end, above_end = torch.full_like(target, ALL_TIES), torch.zeros_like(total)  # above -0
        task = Search(support, kind, weight, target, end, above_end, total, unit)
        return (yield from search(state.part, task))

    def _nth(self, where: Tensor, kind: str) -> Program[Tensor]:
        """The key of the last of the best `keep` survivors; of all where there are no more."""
        state = self.state
        yield from state.settle(where & ~self._listed(kind))
        position = state.alive.cumsum(1)
        reached = (position >= self.keep[:, None]) & state.alive
        key = torch.where(reached, state.tokens.by_rank, LOWEST).amax(1)
        fewer = self.state.counted & (state.sums[:, COUNT] <= self.keep)
        key = torch.where(fewer, LOWEST, key)
        index = (where & ~self._listed(kind) & ~fewer).nonzero()[:, 0]
        if len(index):
            found = yield from self._search(index, kind, COUNT, self.keep[index], ONE)
            key = key.index_put((index,), found.cut)
        return key

    def _listed(self, kind: str) -> Tensor:
        """Whether the best `keep` survivors are among the tokens."""
        if kind != "rank":
            return torch.zeros_like(self.active)
        return self.state.complete | (self.state.alive.sum(1) >= self.keep)

    def _top_k(self, acting: Tensor, k: Tensor) -> Program[None]:
        """Keeps those of at least the k-th largest logit."""
        state = self.state
        yield from state.settle(acting)
        limit = torch.maximum(k.clamp(max=2.0**31).long(), self.keep)
        acting = acting & (state.sums[:, COUNT] > limit)
        position = state.alive.cumsum(1)
        reached = (position >= limit[:, None]) & state.alive
        tie = with_ties(torch.where(reached, state.tokens.by_rank, LOWEST).amax(1))
        known = reached.any(1) & (state.complete | (tie >= state.cover))
        index = (acting & ~known).nonzero()[:, 0]
        if len(index):
            found = yield from self._search(index, "rank", COUNT, limit[index], ALL_TIES)
            self._found(index, found, "cut", torch.ones_like(index, dtype=torch.bool))
        self._cut(acting & known, cut=tie)

    def _targets(self, part: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The targets of heavy and of light tokens, and the least mass of a heavy one."""
        z = self.state.sums[:, MASS]
        wanted = part * z.double()
        least, most = ((wanted * c).ceil().long().clamp(min=1) for c in (NEARLY, ALMOST))
        return least, most, (z + 1023) >> 10

    def _top_p(self, acting: Tensor, p: Tensor) -> Program[None]:
        """Keeps those with less mass than about p Z before them, in rank order."""
        state = self.state
        yield from state.settle(acting)
        least, most, heavy = self._targets(p)
        w = state.tokens.w * state.alive
        before = w.cumsum(1) - w
        target = torch.where(w >= heavy[:, None], least[:, None], most[:, None])
        position = state.alive.cumsum(1)
        kept = state.alive & ((before < target) | (position <= self.keep[:, None]))
        enough = (w.sum(1) >= most) & (position[:, -1] >= self.keep)
        known = state.complete | enough | (kept.sum(1) < position[:, -1])
        cut = torch.where(kept, state.tokens.by_rank, HIGHEST).amin(1)
        # rounding may set the target of a large Z above it
        index = (acting & ~known & (most <= state.sums[:, MASS])).nonzero()[:, 0]
        if len(index):
            found = yield from self._search(index, "rank", MASS, most[index], ONE)
            yield from self._nucleus(index, found, "cut", least, heavy, ONE)
        self._cut(acting & known, cut=cut)

    def _nucleus(
        self, index: Tensor, found: Found, test: str, least: Tensor, heavy: Tensor, unit: int
    ) -> Program[None]:
        """Takes cuts for the targets of light tokens, of which a last heavy one may go."""
        last = found.sums[:, MASS] - found.before[:, MASS]
        drop = (last >= heavy[index]) & (found.before[:, MASS] >= least[index])
        fewer = torch.where(drop, found.before[:, COUNT], found.sums[:, COUNT])
        some = torch.zeros_like(self.active)
        some[index[fewer < self.keep[index]]] = True
        guard = None
        if bool(some.any()):
            guard = yield from self._nth(some, "rank" if test == "cut" else "typicality")
        cut = torch.where(drop, found.cut + unit, found.cut)
        if guard is not None:
            cut = torch.where(some[index], torch.minimum(cut, guard[index]), cut)
        self._found(index, found._replace(cut=cut), test, cut == found.cut)

    def _min_p(self, acting: Tensor, min_p: Tensor) -> Program[None]:
        """Keeps those of a mass of about min_p of the largest, and the best `keep`."""
        state = self.state
        # the most probable token has this mass; only typical removes it, and does not come before
        largest = (state.tokens.w * state.alive).amax(1).double()
        largest = torch.where(state.complete, largest, UNIT)
        least = (min_p.float().double() * largest * NEARLY).ceil().long()
        guard = yield from self._nth(acting, "rank")
        self._heavy("min_p", acting, least, guard)

    def _epsilon_cutoff(self, acting: Tensor, epsilon: Tensor) -> Program[None]:
        """Keeps those of probability >= epsilon."""
        yield from self._at_least("epsilon_cutoff", acting, epsilon)

    def _eta_cutoff(self, acting: Tensor, eta: Tensor) -> Program[None]:
        """Keeps those of probability >= min(eta, sqrt(eta) e^-H)."""
        state = self.state
        yield from state.settle(acting)
        z, u = (torch.where(acting, state.sums[:, i], 1) for i in (MASS, SURPRISAL))
        decay = exp64(-(log_mass(z) + u.double() / z.double()))
        yield from self._at_least("eta_cutoff", acting, torch.minimum(eta, eta.sqrt() * decay))

    def _at_least(self, name: str, acting: Tensor, part: Tensor) -> Program[None]:
        """Keeps those of about a part of Z, and all from the `keep`-th largest logit on."""
        state = self.state
        yield from state.settle(acting)
        least = (part * state.sums[:, MASS].double() * NEARLY).ceil().long()
        guard = yield from self._nth(acting, "rank")
        self._heavy(name, acting, least, with_ties(guard))

    def _heavy(self, name: str, acting: Tensor, least: Tensor, guard: Tensor) -> None:
        """Sets a test of masses. All survivors are known where nothing below the cover passes."""
        state, at = self.state, CUTS.index(name)
        support = state.support
        column = torch.arange(len(CUTS), device=least.device) == at
        where = acting[:, None] & column
        state.support = support._replace(
            least=torch.where(where, least[:, None], support.least),
            guard=torch.where(where, guard[:, None], support.guard),
        )
        # masses fall with s but for twice the polynomial's error, 3.6e-6
        most = masses(from_ordered(state.cover >> 31) - support.m)[0]
        state.complete |= acting & (most + (most >> 16) + 1 < least) & (guard >= state.cover)
        state.refresh(acting)

    def _typical_p(self, acting: Tensor, tau: Tensor) -> Program[None]:
        """Keeps the tokens nearest to the entropy, up to a mass; equally near ones together."""
        state = self.state
        yield from state.settle(acting)
        acting = acting & (state.sums[:, COUNT] > self.keep)
        targets = self._targets(tau)
        z, u = (torch.where(acting, state.sums[:, i], 1) for i in (MASS, SURPRISAL))
        centre = (u.double() / z.double()).float()
        state.support = state.support._replace(
            centre=torch.where(acting, centre, state.support.centre)
        )
        index = (acting & ~state.complete).nonzero()[:, 0]
        all_here = acting & state.complete
        state.tokens = Tokens.of(state.support, state.tokens.x, state.tokens.ids)
        band = self._band(state.tokens, state.alive, self.keep, *targets)
        if len(index):
            yield from self._gather_band(index, *targets)
        self._cut(all_here, band=band[0])

    def _gather_band(
        self, index: Tensor, least: Tensor, most: Tensor, heavy: Tensor
    ) -> Program[None]:
        """Typical of problems (p,) of which not all survivors are known."""
        state = self.state
        support = state.support.at(index)
        end = torch.full_like(index, HIGHEST)
        mine = state.part.best_below(support, "typicality", end, SENT)
        words = yield Request("gather", packed(*mine))
        x, ids = unpacked(words, *mine)
        flat = (t.transpose(0, 1).flatten(1) for t in (x, ids.long()))
        tokens = Tokens.of(support, *flat)
        alive = tokens.ids >= 0
        last = tokens.by_typicality.view(len(index), len(x), SENT)[..., -1]
        more = alive.view(len(index), len(x), SENT)[..., -1]  # or may be
        cover = torch.where(more, last, LOWEST).amax(1)
        alive &= tokens.by_typicality >= cover[:, None]
        part = [t[index] for t in (self.keep, least, most, heavy)]
        cut, crossed, tie = self._band(tokens, alive, *part)
        everything = alive.sum(1) == state.sums[index, COUNT]
        enough = alive.sum(1) >= self.keep[index]
        known = everything | (crossed & (tie >= cover) & enough)
        fits = most[index] <= state.sums[index, MASS]  # else rounding keeps all
        rest = index[~known & fits]
        if len(rest):
            found = yield from self._search(rest, "typicality", MASS, most[rest], ALL_TIES)
            yield from self._nucleus(rest, found, "band", least, heavy, ALL_TIES)
        done = index[known]
        if len(done):
            band = state.support.band.index_put((done,), cut[known])
            state.support = state.support._replace(band=band)
            state.replace(done, Tokens(*(t[known] for t in tokens)))

    def _band(
        self,
        tokens: Tokens,
        alive: Tensor,
        keep: Tensor,
        least: Tensor,
        most: Tensor,
        heavy: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The cut among known tokens, whether they reach the target, and where its ties begin."""
        key = torch.where(alive, tokens.by_typicality, 2 * LOWEST)
        key, order = key.sort(1, descending=True)
        w = (tokens.w * alive).gather(1, order)
        there = alive.gather(1, order)
        before = w.cumsum(1) - w
        near = there & (before < most[:, None])
        tie = with_ties(torch.where(near, key, HIGHEST).amin(1))
        inside = (w * (key >= above(tie)[:, None])).sum(1)
        last = (w * (key >= tie[:, None])).sum(1) - inside
        cut = torch.where((last >= heavy) & (inside >= least), above(tie), tie)
        position = there.cumsum(1)
        best = torch.where(there & (position <= keep[:, None]), key, HIGHEST).amin(1)
        return torch.minimum(cut, best), w.sum(1) >= most, tie
