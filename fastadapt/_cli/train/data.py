"""Preference pairs for a training run: files, folders of `datasets`, data sets of the hub."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastadapt.training.pair_files import numbered_rows, pairs_of, read_pairs
from fastadapt.training.pair_forms import Pair

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_FILE_NAME = re.compile(r".*\.(jsonl?|csv|tsv|parquet|arrow|txt|gz|zst|zip|bz2|xz)", re.IGNORECASE)


class DataError(ValueError):
    """The data set does not exist, or one of its entries has an unknown form."""


def load_pairs(
    sources: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], *, split: str = "train"
) -> list[Pair]:
    """Reads preference pairs from one source or several, in order.

    Args:
        sources: one or several, each a file as `read_pairs` takes it, a folder that `save_to_disk`
            of `datasets` wrote, or the name of a data set on the hub ("owner/name"). The last two
            need the package datasets, the last one the network too, or the data set in its cache.
        split: of a data set of the hub, or of a folder with several.

    Raises:
        DataError: there is no such file, folder or data set, it cannot be read or is empty, or an
            entry is in none of the forms of `pair_of`: the source, the line or row, and what is
            wrong.
    """
    sources = [sources] if isinstance(sources, str | os.PathLike) else sources
    if not sources:
        raise DataError("data: expected at least one source, got none")
    return [pair for source in sources for pair in _load(os.fspath(source), split)]


def split_pairs(pairs: Sequence[Pair], share: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Splits pairs into those to train on and those to evaluate on."""
    count = round(share * len(pairs))
    shuffled = random.Random(seed).sample(list(pairs), len(pairs))
    return shuffled[count:], shuffled[:count]


def _load(source: str, split: str) -> list[Pair]:
    """Reads the pairs of one source."""
    try:
        path = Path(os.path.expanduser(source))
        if path.is_dir():
            pairs = pairs_of(source, numbered_rows(_saved_rows(path, split)))
        elif path.exists():
            pairs = read_pairs(path)
        elif _HUB_NAME.fullmatch(source) and not _FILE_NAME.fullmatch(source):
            pairs = pairs_of(f"{source}, split {split}", numbered_rows(_hub_rows(source, split)))
        else:
            raise DataError(f"no such data: the file {source!r} does not exist")
    except OSError as error:
        raise DataError(f"{source}: {error.strerror or error}") from error
    except ImportError as error:
        raise DataError(
            f"{source}: expected the package datasets, which reads this: {error}"
        ) from error
    except DataError:
        raise
    except ValueError as error:
        raise DataError(str(error)) from error
    if not pairs:
        raise DataError(f"{source}: expected at least one pair, got none")
    return pairs


def _saved_rows(folder: Path, split: str) -> list[Any]:
    """Reads the rows of a folder that `save_to_disk` wrote."""
    import datasets

    try:
        saved: Any = datasets.load_from_disk(str(folder))
        if isinstance(saved, datasets.DatasetDict):
            if split not in saved:
                raise DataError(
                    f"{folder}: expected one of the splits {sorted(saved)}, got {split!r}"
                )
            saved = saved[split]
        return list(saved)
    except DataError:
        raise
    except Exception as error:  # of Arrow, of JSON or of datasets, by what is damaged
        raise DataError(
            f"{folder}: expected a file, or a folder written by save_to_disk of datasets: {error}"
        ) from error


def _hub_rows(name: str, split: str) -> list[Any]:
    """Reads the rows of a data set on the hub."""
    import datasets

    load: Any = datasets.load_dataset
    try:
        return list(load(name, split=split))
    except Exception as error:  # of the hub's client, of the network, of any format of a data set
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"no data could be loaded from {name!r}: there is no such file, and the hub says: "
            f"{reason}"
        ) from error
