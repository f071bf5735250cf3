"""Reference of `fastadapt.verify`: every row's law as integers, judged one after the other."""

from types import SimpleNamespace

import torch
from torch import Tensor

from fastadapt._ops.philox import philox
from fastadapt.reference.distribution import FILTERS, Distribution, Knobs
from fastadapt.reference.edits import Changes, edited
from fastadapt.results import Support, Verified

BAD_DRAFT = 5
KNOBS = (
    "temperature", "min_tokens_to_keep", "xtc_probability", "xtc_threshold",
    *(name for name in FILTERS["hf"] if name != "xtc"),
)  # fmt: skip


def verify(
    logits: Tensor,
    draft: Tensor,
    adaptor: Knobs,
    *,
    draft_lengths: Tensor | None = None,
    draft_logits: Tensor | None = None,
    draft_adaptor: Knobs | None = None,
    seeds: Tensor | None = None,
    positions: Tensor | None = None,
    generator: torch.Generator | None = None,
    support: bool = False,
    edits: Changes | None = None,
    allowed: Tensor | None = None,
    num_tokens: int | None = None,
) -> Verified:
    """Reference of `fastadapt.verify`; float64 logits take the textbook form.

    Examples:
        >>> from fastadapt import reference
        >>> logits = torch.tensor([[[2.0, 1.0, 0.0, -1.0]] * 3])
        >>> verified = reference.verify(logits, torch.tensor([[0, 3]]), Adaptor(temperature=0.0))
        >>> verified.tokens, verified.accepted
        (tensor([[ 0,  0, -1]]), tensor([1]))
    """
    n, k = draft.shape
    x = edited(logits, edits, allowed, num_tokens).flatten(0, 1)
    if seeds is None:
        seeds = torch.randint(2**63 - 1, (n,), generator=generator, device=logits.device)
    first = torch.zeros_like(seeds) if positions is None else positions
    each = (first[:, None] + torch.arange(k + 1, device=first.device)).flatten()
    coin = philox(seeds.repeat_interleave(k + 1), each)[2]
    p = Distribution(x, _repeated(adaptor, k + 1), coin=coin)
    q = None
    if draft_logits is not None:
        of_drafts = edited(draft_logits, num_tokens=num_tokens).flatten(0, 1)
        coins = coin.view(n, k + 1)[:, :k].flatten()
        q = Distribution(of_drafts, _repeated(draft_adaptor or adaptor, k), coin=coins)
    lengths = torch.full_like(seeds, k) if draft_lengths is None else draft_lengths
    tokens = torch.full((n, k + 1), -1, device=logits.device)
    accepted = torch.zeros_like(seeds)
    logprobs = torch.zeros(n, k + 1, device=logits.device)
    kept = torch.zeros(n, k + 1, dtype=torch.int32, device=logits.device)
    status = torch.zeros(n, k + 1, dtype=torch.uint8, device=logits.device)
    for row in range(n):
        for i in range(k + 1):
            at, used = row * (k + 1) + i, i < int(lengths[row])
            judged = q if used else None
            bad = int(p.status[at])
            if bad == 0 and judged is not None and int(judged.status[row * k + i]):
                bad = BAD_DRAFT
            status[row, i] = bad
            if bad:
                logprobs[row, i] = float("nan")
                break
            at_seed, at_position = seeds[row : row + 1], first[row : row + 1] + i
            if judged is None:
                low, high, *_ = philox(at_seed, at_position)
                token = _drawn(p, at, p.w[at] * p.alive[at], low, high)
                stands = used and token == int(draft[row, i])
            else:
                words = philox(at_seed, at_position, stream=1)
                of_draft = row * k + i, int(draft[row, i])
                token, stands = _judged(p, at, judged, *of_draft, words)
            tokens[row, i] = token
            mass = p.log((p.w[at] * p.alive[at]).sum()[None])[0]
            value = p.s[at, token].double() - p.m[at, 0].double() - mass
            logprobs[row, i] = 0.0 if p.greedy[at] else value
            kept[row, i] = p.alive[at].sum()
            if not stands:
                break
            accepted[row] += 1
    survived = p.alive & (kept.view(-1, 1) > 0)
    of_rows = Support.from_mask(survived) if support else None
    return Verified(tokens, accepted, logprobs, kept, status, of_rows)


def _repeated(adaptor: Knobs, times: int) -> Knobs:
    """Returns an adaptor of sequences as one of their rows."""
    knobs = {name: getattr(adaptor, name) for name in KNOBS}
    each = {
        name: value.repeat_interleave(times) if isinstance(value, Tensor) else value
        for name, value in knobs.items()
    }
    return SimpleNamespace(order=adaptor.order, **each)


def _shares(law: Distribution, row: int) -> Tensor:
    """Returns the probabilities of a row in units of 2^-40, rounded down; of float64 not so."""
    if bool(law.greedy[row]):
        return law.alive[row] * law.unit
    w = law.w[row] * law.alive[row]
    per_mass = law.unit / w.sum().double()
    return (w.double() * per_mass).floor() if law.exact else w * per_mass


def _drawn(p: Distribution, row: int, w: Tensor, low: Tensor, high: Tensor) -> int:
    """Returns the token at the draw's target among masses."""
    if bool(p.greedy[row]):
        return int(p.best[row])
    running = w.cumsum(-1)
    target = p.draw_target(low, high, running[-1:])
    return min(int((running <= target).sum()), p.v - 1)


def _judged(
    p: Distribution, at: int, q: Distribution, of_draft: int, token: int, words: tuple[Tensor, ...]
) -> tuple[int, bool]:
    """Returns a draft that stands, or what takes its place; and whether it stands."""
    mine, drafts = _shares(p, at), _shares(q, of_draft)
    coin = int(words[0]) + (int(words[1]) << 32)
    if p.exact:
        stands = coin * int(drafts[token]) < int(mine[token]) << 64
    else:
        stands = coin * float(drafts[token]) < float(mine[token]) * 2.0**64
    if stands:
        return token, True
    rest = (mine - drafts).clamp(min=0)
    if not bool((rest > 0).any()):  # shares are rounded down, or the draft is none of q's
        rest = mine
    return _drawn(p, at, rest.long() if p.exact else rest, *words[2:]), False
