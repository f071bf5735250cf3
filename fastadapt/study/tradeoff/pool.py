"""The strings of a study as arrays, with counts of those left out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fastadapt.study.tradeoff.grids import Cell
from fastadapt.study.tradeoff.statistics import Array, Indices

Mask = npt.NDArray[np.bool_]


class Pool(NamedTuple):
    """N usable strings of P prompts under A adaptors; log-probabilities are sums, in nats.

    Attributes:
        cells: the A adaptors.
        prompts: P.
        prompt, cell, length: (N,); the columns of `corpora.columns`.
        finished: (N,); whether the string has its end token.
        log_prior, log_alone, log_aligned, reward: (N,).
        log_q, log_norm: (N, A).
        excluded: how many strings were left out, by reason.
        violations: tokens outside the support that they were drawn from, of all strings.
    """

    cells: Sequence[Cell]
    prompts: int
    prompt: Indices
    cell: Indices
    length: Indices
    finished: Mask
    log_prior: Array
    log_alone: Array
    log_aligned: Array
    reward: Array
    log_q: Array
    log_norm: Array
    excluded: dict[str, int]
    violations: int

    @property
    def implicit_reward(self) -> Array:
        """(N,); log p+ - log p, for which the aligned model is optimal at beta = 1."""
        return self.log_aligned - self.log_prior

    @property
    def in_grid(self) -> Mask:
        """(N,), bool; the strings of the grid itself, without the cells with a hidden top-k."""
        return np.array([not cell.hidden_top_k for cell in self.cells])[self.cell]

    @property
    def temperatures(self) -> Array:
        """(A,); the temperature of each adaptor."""
        return np.array([cell.temperature for cell in self.cells])

    def select(self, kept: Mask) -> Pool:
        """Returns the pool of some of its strings."""
        arrays = {
            name: value[kept] for name, value in self._asdict().items() if name in _PER_STRING
        }
        return self._replace(**arrays)


_PER_STRING = (
    "prompt",
    "cell",
    "length",
    "finished",
    "log_prior",
    "log_alone",
    "log_aligned",
    "reward",
    "log_q",
    "log_norm",
)


def pool_of(table: pa.Table, cells: Sequence[Cell]) -> Pool:
    """Returns the usable strings of a table.

    Left out, and counted: strings for which no token could be drawn (NaN, +inf or nothing finite
    among the logits), strings whose log-probability is not finite, and strings with a token outside
    the support that they were drawn from.
    """
    columns: dict[str, Any] = {
        name: table[name].to_numpy() for name in (*_PER_STRING[:8], "status")
    }
    drawn = columns.pop("status") == 0
    violations = table["violations"].to_numpy()
    finite = np.isfinite(columns["log_prior"]) & np.isfinite(columns["log_aligned"])
    kept = drawn & finite & (violations == 0)
    rows = len(kept)
    lists = {
        name: table[name].combine_chunks().flatten().to_numpy().reshape(rows, len(cells))
        for name in ("log_q", "log_norm")
    }
    for name in ("prompt", "cell", "length"):
        columns[name] = columns[name].astype(np.int64)
    pool = Pool(
        cells=cells,
        prompts=int(columns["prompt"].max()) + 1,
        **columns,
        **lists,
        excluded={
            "no token could be drawn": int((~drawn).sum()),
            "log-probability not finite": int((drawn & ~finite).sum()),
            "token outside its support": int((drawn & finite & (violations > 0)).sum()),
        },
        violations=int(violations.sum()),
    )
    return pool.select(kept)
