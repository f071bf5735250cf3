"""Random calls of `sample` and `score`, in one piece and split over ranks."""

import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastadapt import Adaptor, Edits, sample, score
from fastadapt._ops.sharded.exchange import side_by_side
from fastadapt.results import Sample, Score, Support
from fastadapt.sampling.sharded import draw_of, score_of

INF = float("inf")
NO_EDITS = {"edits": None, "allowed": None, "num_tokens": None}
# a number for all rows, or one for each; values at and around what ranks send at first
KNOBS: dict[str, tuple[float, list[Any]]] = {  # how often a knob is given, and its values
    "temperature": (0.5, [0.0, 0.3, 0.7, 1.0, 1.3, 2.0, 0.001]),
    "top_k": (0.4, [0, 1, 5, 20, 63, 64, 65, 100, 1500, 10**6]),
    "top_p": (0.4, [0.0, 0.1, 0.25, 0.5, 0.9, 0.95, 0.99, 0.9999, 1.0]),
    "min_p": (0.3, [0.0, 1e-6, 0.001, 0.02, 0.3, 1.0]),
    "typical_p": (0.35, [0.1, 0.5, 0.9, 0.95, 0.999, 1.0]),
    "epsilon_cutoff": (0.3, [0.0, 1e-9, 1e-5, 3e-4, 0.02, 0.5]),
    "eta_cutoff": (0.3, [0.0, 1e-8, 3e-4, 9e-4, 0.1]),
    "min_tokens_to_keep": (0.25, [1, 2, 7, 70, 200]),
}
ROWS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "normal1": lambda x, g: x,
    "normal3": lambda x, g: x * 3,
    "bfloat16": lambda x, g: (x * 3).bfloat16(),
    "float16": lambda x, g: (x * 2).half(),
    "flat": lambda x, g: torch.zeros_like(x),
    "levels": lambda x, g: torch.randint(0, 4, x.shape, generator=g).float() * 1.5,
    "peak": lambda x, g: x.index_add(
        1, torch.tensor([x.shape[1] // 2]), x.new_full((len(x), 1), 40)
    ),
    "holes": lambda x, g: torch.where(torch.rand(x.shape, generator=g) < 0.7, -INF, x * 3),
    "far": lambda x, g: x * 3 + 1e4,
    "huge": lambda x, g: x * 1e30,
    "bad": lambda x, g: _bad(x * 3, g),
}


class Case(NamedTuple):
    """One call of each function; `sizes` are those of the slices."""

    name: str
    logits: Tensor
    sizes: list[int]
    adaptor: Adaptor
    options: dict[str, Any]  # of `sample`
    adaptors: list[Adaptor]
    edits: dict[str, Any]  # of both

    def slice(self, rank: int) -> Tensor:
        """A rank's logits."""
        return self.logits.split(self.sizes, -1)[rank]

    def sampled(self, logits: Tensor, **group: Any) -> Sample:
        """The draw."""
        return sample(logits, self.adaptor, **self.options, **self.edits, **group)

    def scored(self, logits: Tensor, tokens: Tensor, **group: Any) -> Score:
        """The scores of tokens."""
        wanted = {"support": self.options["support"]}
        return score(logits, tokens, self.adaptors, **wanted, **self.edits, **group)

    def tokens(self, drawn: Sample) -> Tensor:
        """Tokens to score: some of those drawn, any others, and ignored ones."""
        g = torch.Generator().manual_seed(len(self.logits))
        real = self.edits.get("num_tokens") or self.logits.shape[-1]
        any_ = torch.randint(real, drawn.tokens.shape, generator=g)
        chosen = torch.rand(drawn.tokens.shape, generator=g)
        tokens = torch.where(chosen < 0.5, drawn.tokens.clamp(min=0), any_)
        return torch.where(chosen > 0.9, -100, tokens)


def made(seed: int, ranks: int | None = None) -> Case:
    """The case of a number, for so many ranks."""
    r, g = random.Random(seed), torch.Generator().manual_seed(seed)
    v, n = r.choice([1, 2, 17, 64, 65, 130, 300, 1000, 1000, 3000]), r.choice([1, 3, 8, 30, 70])
    kind = r.choice(list(ROWS))
    logits = ROWS[kind](torch.randn(n, v, generator=g), g)
    sizes = _sizes(v, r.choice([1, 2, 3, 4, 8]) if ranks is None else ranks, r)
    options = {
        "seeds": torch.randint(-(2**62), 2**62, (n,), generator=g),
        "positions": torch.randint(2**40, (n,), generator=g) if r.random() < 0.7 else None,
        "base_logprobs": r.random() < 0.5,
        "log_mass": r.random() < 0.5,
        "support": r.random() < 0.5,
    }
    edits = _edits(n, v, r, g) if r.random() < 0.4 else {}
    options["top_logprobs"] = min(edits.get("num_tokens") or v, r.choice([0, 0, 0, 1, 5, 100]))
    adaptors = [_adaptor(n, r, greedy=False) for _ in range(r.choice([1, 2, 3]))]
    return Case(f"{seed}: {kind}", logits, sizes, _adaptor(n, r), options, adaptors, edits)


def differing_rows(case: Case) -> tuple[int, int]:
    """How many rows of a draw and of scores have another bit on some rank than in one piece."""
    edits = {**NO_EDITS, **case.edits}
    ranks = range(len(case.sizes))
    whole = case.sampled(case.logits)
    parts = side_by_side(
        [draw_of(case.slice(i), case.adaptor, i, **case.options, **edits) for i in ranks]
    )
    tokens = case.tokens(whole)
    scores = case.scored(case.logits, tokens)
    scored = side_by_side(
        [
            score_of(
                case.slice(i), tokens, case.adaptors, i, support=case.options["support"], **edits
            )
            for i in ranks
        ]
    )
    return _differing(whole, parts), _differing(scores, scored)


def _differing(result: Sample | Score, parts: Sequence[Sequence[Tensor]]) -> int:
    whole = [x for x in result if isinstance(x, Tensor)]  # what is asked for
    bad = torch.zeros(len(whole[0]), dtype=torch.bool)
    kept = result.support if isinstance(result, Sample) else result.supports
    for part in parts:
        if kept is not None:
            *part, ids, offsets, full = part
            wanted = kept if isinstance(kept, Support) else Support.cat(kept)
            if Support(ids, offsets, full) != wanted:
                return len(bad)
        for a, b in zip(whole, part, strict=True):
            if a.dtype != b.dtype or a.shape != b.shape:
                return len(bad)
            bad |= (_bits(a) != _bits(b)).view(len(bad), -1).any(1)
    return int(bad.sum())


def unlike(one: tuple[Any, ...], other: tuple[Any, ...]) -> list[str]:
    """The fields of two results that differ in a bit."""
    # one of the two is a named tuple, which the types do not say
    names = getattr(one, "_fields", None) or other._fields  # type: ignore[attr-defined]
    pairs = zip(names, one, other, strict=True)
    return [name for name, a, b in pairs if not _same_bits(a, b)]


def _same_bits(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return bool(a == b)  # supports, or None
    return a.dtype == b.dtype and torch.equal(_bits(a), _bits(b))


def _bits(x: Tensor) -> Tensor:
    """Integers, NaN being one number."""
    if x.dtype != torch.float32:
        return x
    return torch.where(x.isnan(), -1, x.contiguous().view(torch.int32))


def _adaptor(n: int, r: random.Random, *, greedy: bool = True) -> Adaptor:
    free = ("eta_cutoff", "min_p", "top_p", "epsilon_cutoff", "typical_p", "top_k")
    knobs: dict[str, Any] = {"order": r.choice(["hf", "vllm", free])}
    for name, (often, values) in KNOBS.items():
        some = values if greedy or name != "temperature" else values[1:]
        if r.random() < often:
            each = [r.choice(some) for _ in range(n)]
            knobs[name] = each[0] if r.random() < 0.5 else torch.tensor(each, dtype=_kind(name))
    return Adaptor(**knobs)


def _kind(name: str) -> torch.dtype:
    return torch.int64 if name in ("top_k", "min_tokens_to_keep") else torch.float64


def _sizes(v: int, ranks: int, r: random.Random) -> list[int]:
    """Any sizes, even ones, or mostly empty slices."""
    how, each = r.random(), -(-v // ranks)
    if how < 0.4:
        cuts = sorted(r.randint(0, v) for _ in range(ranks - 1))
    elif how < 0.8:
        cuts = [min(v, each * (i + 1)) for i in range(ranks - 1)]
    else:
        cuts = sorted(r.choice([0, v, v // 2, 1, v - 1]) for _ in range(ranks - 1))
    return [b - a for a, b in zip([0, *cuts], [*cuts, v], strict=True)]


def _edits(n: int, v: int, r: random.Random, g: torch.Generator) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if r.random() < 0.6:
        rows = [sorted(r.sample(range(v), min(v, r.choice([0, 1, 9])))) for _ in range(n)]
        ids = torch.tensor([i for row in rows for i in row], dtype=torch.int32)
        offsets = torch.tensor([0, *map(len, rows)]).cumsum(0)
        numbers = torch.rand(4, len(ids), generator=g)
        pre = torch.where(numbers[0] < 0.2, -INF, numbers[0])
        found["edits"] = Edits(
            ids, offsets, pre=pre, penalty=numbers[1] + 0.5, post=-numbers[2], last=-numbers[3]
        )
    if r.random() < 0.6:
        bits = torch.randint(-(2**31), 2**31, (n, -(-v // 32)), generator=g).int()
        found["allowed"] = bits | torch.randint(-(2**31), 2**31, bits.shape, generator=g).int()
    if r.random() < 0.5:
        found["num_tokens"] = r.randint(1, v)
    return found


def _bad(x: Tensor, g: torch.Generator) -> Tensor:
    """Rows with NaN, with +inf, without anything finite, and good ones."""
    kind, v = torch.rand(len(x), generator=g), x.shape[1]
    x[kind < 0.2, v // 2] = float("nan")
    x[(kind >= 0.2) & (kind < 0.4), v // 3] = INF
    x[(kind >= 0.4) & (kind < 0.6)] = -INF
    return x
