"""Files of preference pairs: JSON Lines, JSON arrays, CSV and Parquet, gzipped or not.

JSON and CSV are read value by value as they stand. (`datasets` infers one type for each column: it
makes text of numbers, numbers of text and nothing of "None" or "NA", and cannot name a line.)
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import os
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fastadapt._ops.checks import instance
from fastadapt.training.pair_forms import Pair, pair_of

_GZIP, _PARQUET = b"\x1f\x8b", b"PAR1"
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_COLUMNS = ("prompt", "chosen", "rejected")

# Where each entry stands, such as "line 3", and the entry.
Entries = Iterable[tuple[str, Any]]


def read_pairs(path: str | os.PathLike[str]) -> list[Pair]:
    """Reads the preference pairs of a file, whose entries are in the forms of `pair_of`.

    Examples:
        >>> import json
        >>> from pathlib import Path
        >>> from fastadapt.training.pairs import read_pairs
        >>> pair = {"prompt": "Two and two?", "chosen": " Four.", "rejected": " Guess."}
        >>> length = Path("pairs.jsonl").write_text(json.dumps(pair))
        >>> read_pairs("pairs.jsonl")[0].chosen
        ' Four.'

    Args:
        path: JSON Lines; a JSON array; CSV or values between tabs, if the name says so (".csv",
            ".tsv"; the first line names the columns); or Parquet, which needs the package datasets.
            Any of them may be gzipped. Text is UTF-8, with or without a byte order mark, UTF-16 or
            UTF-32.

    Raises:
        TypeError: no path.
        OSError: the file cannot be read.
        ImportError: the file is Parquet and datasets is not installed.
        ValueError: the file is damaged, or an entry has no known form: the file, the line where the
            entry begins (from 1; of Parquet the row, from 0), and what is wrong.
    """
    instance("path", path, str | os.PathLike, "a path")
    name, path = os.fspath(path), Path(path)
    data = path.read_bytes()
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if data.startswith(_GZIP) or suffixes[-1:] == [".gz"]:
        data = _decompressed(name, data)
    kind = next((suffix for suffix in reversed(suffixes) if suffix != ".gz"), "")
    if data.startswith(_PARQUET) or kind == ".parquet":
        return pairs_of(name, _parquet_rows(name, data))
    text = _decoded(name, data)
    if kind in _DELIMITERS:
        return pairs_of(name, _csv_rows(name, text, _DELIMITERS[kind]))
    if text.lstrip().startswith("["):
        return pairs_of(name, _json_array(name, text))
    return pairs_of(name, _json_lines(name, text))


def pairs_of(name: str, entries: Entries) -> list[Pair]:
    """Returns the pairs of entries.

    Args:
        name: of what they were read from.
        entries: in the forms of `pair_of`.

    Raises:
        ValueError: an entry has none of them: the name, where it stands and what is wrong.
    """
    pairs = []
    for where, entry in entries:
        try:
            pairs.append(pair_of(entry))
        except ValueError as error:
            raise ValueError(f"{name}, {where}: {error}") from error
    return pairs


def numbered_rows(rows: Iterable[Any]) -> Entries:
    """Returns the rows of a data set as entries, numbered from 0 as in `datasets`."""
    return ((f"row {number}", row) for number, row in enumerate(rows))


def _decompressed(name: str, data: bytes) -> bytes:
    """Returns the contents of a gzip file."""
    try:
        return gzip.decompress(data)
    except EOFError as error:
        raise ValueError(f"{name}: expected a whole gzip file, got a truncated one") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{name}: expected a gzip file, got a damaged one: {error}") from error


def _decoded(name: str, data: bytes) -> str:
    """Returns the text of a file."""
    data = data.removeprefix(codecs.BOM_UTF8)
    encoding = json.detect_encoding(data)
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].decode(encoding, "replace").count("\n") + 1
        got = f"got the byte 0x{data[error.start]:02x}"
        raise ValueError(f"{name}, line {line}: expected {encoding} text, {got}") from error


def _parquet_rows(name: str, data: bytes) -> Entries:
    """Returns the rows of a Parquet file."""
    import datasets
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(pyarrow.BufferReader(data))
        return numbered_rows(list(datasets.Dataset(table)))
    except Exception as error:  # of Arrow, of Python or of datasets, by what is damaged
        raise ValueError(f"{name}: expected Parquet, got a damaged file: {error}") from error


def _json_lines(name: str, text: str) -> Iterator[tuple[str, Any]]:
    """Returns the entries of JSON Lines, without blank lines."""
    # not splitlines, which also ends lines at separators that JSON strings may hold
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"line {number}", _json_value(name, line, number)


def _json_array(name: str, text: str) -> Iterator[tuple[str, Any]]:
    """Returns the entries of a JSON array."""
    decoder, between = json.JSONDecoder(), re.compile(r"[\s,]*")
    place, line = text.index("[") + 1, 1
    passed = 0
    for entry in _json_value(name, text, 1):
        place = _end(between, text, place)
        line += text.count("\n", passed, place)
        passed = place
        yield f"line {line}", entry
        place = decoder.raw_decode(text, place)[1]


def _end(pattern: re.Pattern[str], text: str, place: int) -> int:
    """Returns where a match that begins at a position ends."""
    match = pattern.match(text, place)
    return match.end() if match else place


def _json_value(name: str, text: str, line: int) -> Any:
    """Parses a JSON text; errors count lines from where it begins in its file."""
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        where = f"{name}, line {line + error.lineno - 1}, column {error.colno}"
        got = text.split("\n")[error.lineno - 1].strip()[:60]
        raise ValueError(f"{where}: expected JSON, got {got!r}: {error.msg}") from error
    except RecursionError as error:
        raise ValueError(f"{name}, line {line}: expected JSON nested less deeply") from error
    except ValueError as error:
        raise ValueError(f"{name}, line {line}: {error}") from error


def _object(items: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Returns a JSON object; raises if a key comes twice."""
    found = dict(items)
    if len(found) < len(items):
        keys = [key for key, _ in items]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"expected each key of an object once, got {twice!r} twice")
    return found


def _csv_rows(name: str, text: str, delimiter: str) -> Iterator[tuple[str, Any]]:
    """Returns the rows of a table as objects by column, without blank lines."""
    limit = csv.field_size_limit(sys.maxsize)  # of all readers, and put back below
    try:
        yield from _csv_objects(name, text, delimiter)
    finally:
        csv.field_size_limit(limit)


def _csv_objects(name: str, text: str, delimiter: str) -> Iterator[tuple[str, Any]]:
    """Returns the rows of a table, without a limit on a cell's size."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    names: list[str] = []
    while True:
        line = reader.line_num + 1
        try:
            values = next(reader, None)
        except csv.Error as error:
            raise ValueError(f"{name}, line {line}: expected CSV: {error}") from error
        if values is None:
            return
        if not values:
            continue
        if not names:
            names = values
            if twice := {column for column in _COLUMNS if names.count(column) > 1}:
                raise ValueError(
                    f"{name}, line {line}: expected each column once, got {sorted(twice)} twice"
                )
            continue
        if len(values) != len(names):
            raise ValueError(
                f"{name}, line {line}: expected {len(names)} values, got {len(values)}"
            )
        yield f"line {line}", dict(zip(names, values, strict=True))
