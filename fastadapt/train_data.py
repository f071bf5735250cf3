"""Preference pairs for a training run: a file, or a data set of the hub."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastadapt.pair_forms import Pair, pair_of
from fastadapt.preferences import read_pairs


class DataError(ValueError):
    """There is no such data, or an entry of it has no known form."""


def load_pairs(sources: str | Sequence[str], *, split: str = "train") -> list[Pair]:
    """Reads preference pairs, of several sources one after the other.

    Args:
        sources: one or several, each a file, as for `read_pairs`, or the name of a data set on the
            hub ("owner/name"), which needs the package datasets and the network, or that data set
            in its cache.
        split: of a data set on the hub.

    Raises:
        DataError: there is no such file or data set, it is empty, or an entry is in none of the
            forms of `pair_of`: its line or row, and what is wrong with it.
    """
    sources = [sources] if isinstance(sources, str) else sources
    if not sources:
        raise DataError("data: expected at least one source, got none")
    return [pair for source in sources for pair in _load(source, split)]


def _load(source: str, split: str) -> list[Pair]:
    """The pairs of one source."""
    path = Path(source).expanduser()
    if path.exists():
        try:
            pairs = read_pairs(path)
        except (OSError, ValueError) as error:
            raise DataError(str(error)) from error
    elif source.count("/") == 1 and not path.suffix and not source.startswith((".", "~")):
        pairs = _load_hub(source, split)
    else:
        raise DataError(f"no such data: the file {source!r} does not exist")
    if not pairs:
        raise DataError(f"{source}: expected at least one pair, got none")
    return pairs


def split_pairs(pairs: Sequence[Pair], share: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Splits off a share of the pairs to evaluate on: (pairs to train on, the others)."""
    count = round(share * len(pairs))
    shuffled = random.Random(seed).sample(list(pairs), len(pairs))
    return shuffled[count:], shuffled[:count]


def _load_hub(name: str, split: str) -> list[Pair]:
    """A data set of the hub."""
    import datasets

    load: Any = datasets.load_dataset
    try:
        rows = load(name, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(
            f"no data could be loaded from {name!r}: there is no such file, and the hub says: "
            f"{reason}"
        ) from error
    pairs = []
    for number, row in enumerate(rows):
        try:
            pairs.append(pair_of(row))
        except ValueError as error:
            raise DataError(f"{name}, split {split}, row {number}: {error}") from error
    return pairs
