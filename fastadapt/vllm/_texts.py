"""The history of a batch of requests, which come and go between steps."""

from collections.abc import Sequence
from itertools import takewhile

import torch
from torch import Tensor

from fastadapt.sampling.edits import Edits
from fastadapt.sampling.history import History
from fastadapt.vllm._request import PENALTIES
from fastadapt.vllm._row import Row


class Texts:
    """Penalties of rows, whose texts are read once and then token by token.

    A row without penalties counts as one without a text.

    Args:
        size: of the vocabulary; ids of a prompt from there on, as those of images, have no logit.
    """

    def __init__(self, size: int) -> None:
        """Starts without rows."""
        self.size = size
        self.rows: list[Row] = []
        self.read: list[int] = []  # how many output tokens of each
        self.history = History(torch.zeros(0, 0, dtype=torch.int64))
        self.numbers: list[Tensor] = []  # repetition, presence, frequency

    def edits(self, rows: Sequence[Row]) -> Edits | None:
        """Returns the penalties of these rows, on the CPU; None where there are none."""
        if not any(row.request.penalised for row in rows):
            return None
        self._follow(list(rows))
        repetition, presence, frequency = self.numbers
        return self.history.edits(repetition=repetition, presence=presence, frequency=frequency)

    def _follow(self, rows: list[Row]) -> None:
        """Makes the history that of these rows as they are now."""
        cut = any(len(r.output) < n for r, n in zip(self.rows, self.read, strict=True))
        if cut or rows != self.rows:
            self._replace(rows)
        fresh = [self._fresh(row, n) for row, n in zip(rows, self.read, strict=True)]
        counts = torch.tensor([len(tokens) for tokens in fresh])
        if most := int(counts.max()):
            padded = [tokens + [0] * (most - len(tokens)) for tokens in fresh]
            self.history.append(torch.tensor(padded), counts)
            self.read = [n + len(tokens) for n, tokens in zip(self.read, fresh, strict=True)]

    def _replace(self, rows: list[Row]) -> None:
        """Keeps the texts of rows that stay, reads those of others, and puts all in order."""
        places = {
            row: at
            for at, (row, n) in enumerate(zip(self.rows, self.read, strict=True))
            if len(row.output) >= n  # the engine took tokens back
        }
        stay = [row for row in rows if row in places]
        new = [row for row in rows if row not in places]
        read = {row: self.read[places[row]] for row in stay} | dict.fromkeys(new, 0)
        self.history.keep([places[row] for row in stay])
        if new:
            self.history.extend(self._prompts(new))
        after = {row: at for at, row in enumerate([*stay, *new])}
        self.history.keep([after[row] for row in rows])
        self.rows, self.read = rows, [read[row] for row in rows]
        self.numbers = [
            torch.tensor([getattr(row.request, name) for row in rows], dtype=torch.float64)
            for name in PENALTIES
        ]

    def _prompts(self, rows: list[Row]) -> History:
        """Returns the history of prompts alone."""
        texts = [
            torch.tensor(row.prompt if row.request.penalised else (), dtype=torch.int64)
            for row in rows
        ]
        texts = [text[(text >= 0) & (text < self.size)] for text in texts]
        padded = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
        return History(padded, length=torch.tensor([len(text) for text in texts]))

    @staticmethod
    def _fresh(row: Row, read: int) -> list[int]:
        """Returns the output that was not read, as far as the engine knows it: -1 is to come."""
        if not row.request.penalised:
            return []
        return list(takewhile(lambda token: token >= 0, row.output[read:]))
