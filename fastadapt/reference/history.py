"""A history of tokens as lists of Python, whose every list is made anew from all of them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

BAN, NEUTRAL = -float("inf"), (0.0, 1.0, 0.0, 0.0)
Entries = dict[int, tuple[float, float, float, float]]  # pre, penalty, post, last of an id


class Lists(NamedTuple):
    """What `Edits` has."""

    ids: Tensor
    offsets: Tensor
    columns: Tensor


class Row(NamedTuple):
    """Tokens of a row, how many of the first are padding, and how many come before the output."""

    tokens: list[int]
    start: int
    prompt: int

    def read(self, counts: str, window: int | None = None) -> list[int]:
        """Returns the tokens that count, of the last `window` ones."""
        first = {"output": self.prompt, "all": self.start, "padded": 0}[counts]
        return self.tokens[max(first, 0 if window is None else len(self.tokens) - window) :]


class History:
    """As `fastadapt.History`, without checks.

    Examples:
        >>> import fastadapt.reference
        >>> history = fastadapt.reference.History(torch.tensor([[7, 5, 7]]))
        >>> history.ban_ngrams(2).ids
        tensor([5], dtype=torch.int32)
    """

    def __init__(
        self,
        tokens: Tensor,
        start: int | Tensor = 0,
        length: int | Tensor | None = None,
        prompt_length: int | Tensor | None = None,
    ) -> None:
        """Copies the tokens."""
        self._rows = []
        for r, row in enumerate(tokens.tolist()):
            first = int(_of(start, r))
            count = len(row) - first if length is None else int(_of(length, r))
            prompt = count if prompt_length is None else int(_of(prompt_length, r))
            self._rows.append(Row(row[: first + count], first, first + prompt))
        self._k = 0

    def append(self, tokens: Tensor, lengths: int | Tensor | None = None) -> None:
        """Adds tokens to each row."""
        for r, row in enumerate(self._rows):
            more = tokens[r].reshape(-1).tolist()
            row.tokens.extend(more[: len(more) if lengths is None else int(_of(lengths, r))])

    def keep(self, rows: Iterable[int]) -> None:
        """Keeps some rows, in this order."""
        self._rows = [self._rows[r]._replace(tokens=self._rows[r].tokens[:]) for r in rows]

    def extend(self, other: "History") -> None:
        """Adds copies of another history's rows."""
        self._rows += [row._replace(tokens=row.tokens[:]) for row in other._rows]

    def with_drafts(self, draft: Tensor, lengths: int | Tensor | None = None) -> "History":
        """Returns the history of every position of a draft; tokens 0 stand behind the lengths."""
        if lengths is not None:
            counts = torch.as_tensor(lengths).reshape(-1, 1)
            draft = draft.where(torch.arange(draft.shape[1]) < counts, 0)
        made = History(torch.empty(0, 0, dtype=torch.int64))
        made._k = draft.shape[1]
        for row, more in zip(self._rows, draft.tolist(), strict=True):
            for j in range(made._k + 1):
                made._rows.append(row._replace(tokens=row.tokens + more[:j]))
        return made

    def edits(
        self,
        *,
        repetition: float | Tensor = 1.0,
        presence: float | Tensor = 0.0,
        frequency: float | Tensor = 0.0,
        repeats: str = "all",
        counts: str = "output",
        window: int | Tensor | None = None,
    ) -> Lists:
        """Returns penalties of tokens that are there."""

        def of_row(row: Row, r: int) -> Entries:
            factor = float(_of(repetition, r))
            f, p = (torch.tensor(float(_of(x, r))) for x in (frequency, presence))  # float32
            last = None if window is None else int(_of(window, r))
            repeated = row.read(repeats, last) if factor != 1 else []
            counted = row.read(counts, last) if f != 0 or p != 0 else []
            found: Entries = {}
            for i in {*repeated, *counted}:
                penalty, times = factor if i in repeated else 1.0, counted.count(i)
                if counts == "all":
                    found[i] = (0.0, penalty, -float(times * f + p), 0.0)
                else:
                    found[i] = (0.0, penalty, -float(times * f), -float(p) if times else 0.0)
            return found

        return self._listed(of_row)

    def ban_ngrams(self, n: int, *, counts: str = "all") -> Lists:
        """Returns bans of tokens that would complete n-grams which are there."""

        def of_row(row: Row, _: int) -> Entries:
            tokens = row.read(counts)
            end = tokens[len(tokens) - n + 1 :] if len(tokens) >= n else None
            grams = [tokens[i : i + n] for i in range(len(tokens) - n + 1)]
            return {gram[-1]: (BAN, *NEUTRAL[1:]) for gram in grams if gram[:-1] == end}

        return self._listed(of_row)

    def dry(
        self,
        multiplier: float | Tensor,
        *,
        base: float = 1.75,
        allowed_length: int = 2,
        breakers: Sequence[int] = (),
        window: int | Tensor | None = None,
        longest: int | None = None,
        counts: str = "all",
    ) -> Lists:
        """Returns the penalties of DRY."""

        def of_row(row: Row, r: int) -> Entries:
            tokens = row.read(counts, None if window is None else int(_of(window, r)))
            lengths: dict[int, int] = {}
            for at in range(len(tokens) - 1):  # the tokens up to this one, beside the last ones
                length = 0
                while length <= at and tokens[at - length] == tokens[-1 - length] not in breakers:
                    length += 1
                after = tokens[at + 1]
                if after not in breakers:
                    lengths[after] = max(lengths.get(after, 0), length)
            factor, found = float(_of(multiplier, r)), {}
            most = 88.7228391 / float(torch.tensor(base).log()) if base > 1.000001 else None
            for i, length in lengths.items():
                power = (length if longest is None else min(length, longest)) - allowed_length
                if power >= 0 and factor != 0:
                    grown = base ** (power if most is None else min(power, int(most)))
                    found[i] = (*NEUTRAL[:3], -float(torch.tensor(factor * grown)))
            return found

        return self._listed(of_row)

    def sequences(self, biases: Any, *, counts: str = "all") -> Lists:
        """Returns additions to tokens that would complete sequences, of a mapping or of rows."""

        def of_row(row: Row, r: int) -> Entries:
            given = biases if isinstance(biases, Mapping) else biases[r]
            tokens = row.read(counts)
            lengths = list(dict.fromkeys([1, *map(len, given)]))  # that of the first comes first
            sums: dict[int, Tensor] = {}
            for ids, bias in sorted(given.items(), key=lambda pair: lengths.index(len(pair[0]))):
                before = list(ids[:-1])
                if tokens[len(tokens) - len(before) :] == before and len(before) <= len(tokens):
                    sums[ids[-1]] = sums.get(ids[-1], torch.zeros(())) + torch.tensor(float(bias))
            return {i: (float(x), *NEUTRAL[1:]) for i, x in sums.items()}

        return self._listed(of_row)

    def min_length(
        self, eos: int | Sequence[int], n: int | Tensor, *, counts: str = "output"
    ) -> Lists:
        """Returns bans of the tokens that end a text, in rows of fewer than n tokens."""
        ids = [eos] if isinstance(eos, int) else eos

        def of_row(row: Row, r: int) -> Entries:
            short = len(row.read(counts)) < int(_of(n, r))
            return {i: (BAN, *NEUTRAL[1:]) for i in ids} if short else {}

        return self._listed(of_row)

    def _listed(self, of_row: Callable[[Row, int], Entries]) -> Lists:
        """Returns the entries of all rows."""
        rows = [sorted(of_row(row, r // (self._k + 1)).items()) for r, row in enumerate(self._rows)]
        columns = [numbers for row in rows for _, numbers in row]
        return Lists(
            torch.tensor([i for row in rows for i, _ in row], dtype=torch.int32),
            torch.tensor([0, *map(len, rows)]).cumsum(0),
            torch.tensor(columns, dtype=torch.float32).reshape(-1, 4).T.contiguous(),
        )


def _of(value: float | Tensor, r: int) -> float | Tensor:
    """Returns what a number, or one for each row, is for a row."""
    return value[r] if isinstance(value, Tensor) else value
