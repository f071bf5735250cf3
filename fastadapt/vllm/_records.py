"""Records of what tokens were drawn from: written in the engine's process, read in the caller's.

A file for each id that a request names, so that one is read and removed without the others. Its
name is a digest of the id, which may come from anybody. It is a list of records, each of one token
and in one piece: 48 bytes and 4 for each id of the support, as the machine's integers.
"""

import hashlib
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from struct import Struct
from typing import NamedTuple
from zlib import crc32

import torch
from torch import Tensor

from fastadapt._ops.checks import instance, integer, shown
from fastadapt.results import Sample, Support

# the mark, the writer, the position, the token, its log-probability, how many ids follow
_HEAD = Struct("=qqqqfi")
_SUM = Struct("=I")  # behind the head and behind the ids, of what is before it
_VERSION = 1
_NAME = 0x4452_5450_5346_0000  # of the format; its last bytes are the version
_FULL = -1  # in place of the number of ids, of a row that keeps everything
MOST_BYTES = 256  # of an id

log = logging.getLogger("fastadapt.vllm")


class Drawn(NamedTuple):
    """What N tokens of a request were drawn from, in their order.

    Examples:
        >>> from fastadapt.vllm import Drawn
        >>> support = Support.from_mask(torch.tensor([[True, False, True]]))
        >>> drawn = Drawn(support, logprobs=torch.tensor([-0.5]), tokens=torch.tensor([2]))
        >>> drawn.support.contains(drawn.tokens)
        tensor([True])

    Attributes:
        support: of N rows, the ids that each token was drawn from.
        logprobs: (N,), float32, nats; of each token under the distribution it was drawn from.
        tokens: (N,), int64.
    """

    support: Support
    logprobs: Tensor
    tokens: Tensor


class Sheet:
    """The records of one request, from when it comes to the engine's batch until it leaves it.

    An error of the file system ends the records, not the engine: whoever reads them is told which
    token has none.

    Args:
        folder: of all records.
        of: the id that the request names.
        first: the position that it goes on from; draws of positions before it are for nothing.
    """

    def __init__(self, folder: Path, of: str, first: int) -> None:
        """Writes nothing yet."""
        self.path, self.first = _path(folder, of), first
        self.writer = int.from_bytes(os.urandom(8), "little", signed=True)
        self.begun = self.failed = False

    def append(self, records: bytes) -> None:
        """Appends records by one call; a reader ignores the last one until it is whole."""
        if self.failed or not records:
            return
        try:
            if not self.begun:  # somebody may have removed the folder with what it had
                self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                self.begun = True
            with self.path.open("ab", buffering=0) as file:
                written = file.write(records)
            self.failed = written != len(records)
            error = f"{written} bytes of {len(records)}"
        except OSError as raised:
            self.failed, error = True, str(raised)
        if self.failed:
            log.error("%s: no more records of this request: %s", self.path, error)


def record(sheets: Sequence[Sheet | None], positions: Tensor, drawn: Sample) -> None:
    """Appends a record of each row that was drawn to its sheet, and waits for the device.

    Args:
        sheets: of N rows; one may be that of several, None where nothing is kept.
        positions (Tensor): (N,), int64.
        drawn: of N rows, with their supports.
    """
    assert drawn.support is not None
    data = drawn.support.to_bytes()
    ids = memoryview(data)[len(data) - 4 * drawn.support.ids.shape[0] :]
    ends = drawn.support.offsets.tolist()
    parts: dict[Sheet, list[bytes]] = {}
    rows = zip(
        sheets,
        positions.tolist(),
        drawn.tokens.tolist(),
        drawn.logprobs.tolist(),
        drawn.support.full.tolist(),
        strict=True,
    )
    for row, (sheet, position, token, logprob, full) in enumerate(rows):
        if sheet is None or position < sheet.first:
            continue
        begin, end = ends[row], ends[row + 1]
        count = _FULL if full else end - begin
        head = _HEAD.pack(_NAME + _VERSION, sheet.writer, position, token, logprob, count)
        kept = bytes(ids[4 * begin : 4 * end])
        its = parts.setdefault(sheet, [])
        its += (head, _SUM.pack(crc32(head)), kept, _SUM.pack(crc32(kept)))
    for sheet, its in parts.items():
        sheet.append(b"".join(its))


def supports(
    folder: str | os.PathLike[str], outputs: Mapping[str, Sequence[int]]
) -> dict[str, Drawn]:
    """Returns what each output token of vLLM's requests was drawn from, and how probable it was.

    For engines whose `FusedSampler` keeps records in that folder
    (`additional_config={"fastadapt_support_folder": folder}`), and requests that name themselves by
    `fastadapt_support_id`, each by an id of its own. There is exactly one row for each of the
    tokens: what the engine drew and dropped, as behind a stop string or of a draft that was
    refused, is left out, and where it drew a position again after it had preempted a request, the
    last draw counts.

    Records stay until `forget` removes them, and may be read while an engine writes others.

    Examples:
        >>> import tempfile
        >>> from fastadapt.vllm import supports
        >>> supports(tempfile.mkdtemp(), {"a": [3, 5]})
        Traceback (most recent call last):
        LookupError: 'a': expected records of it in ...

    Args:
        folder: that the engine was given; records do not leave its machine by themselves.
        outputs: the tokens that the engine returned (`CompletionOutput.token_ids`), by the id that
            the request named.

    Returns:
        dict[str, Drawn]: for each id, one row for each of its tokens, on the CPU.

    Raises:
        LookupError: no records of an id.
        ValueError: a token without a record, or with one of another token; records of two requests
            that ran at the same time under one id; a file that is damaged or of another version.
        TypeError: ids that are no texts, tokens that are no integers.
    """
    instance("outputs", outputs, Mapping, "token ids by the id of their request")
    return {of: _of_one(Path(folder), of, tokens) for of, tokens in outputs.items()}


def forget(folder: str | os.PathLike[str], ids: Sequence[str]) -> None:
    """Removes the records of requests; ids without any are none.

    A request that still runs begins a new file, in which its first tokens are missing.

    Examples:
        >>> import tempfile
        >>> from fastadapt.vllm import forget
        >>> forget(tempfile.mkdtemp(), ["a", "b"])
        >>> forget(tempfile.mkdtemp(), "a")
        Traceback (most recent call last):
        TypeError: ids: expected a list of ids, got str

    Args:
        folder: that the engine was given.
        ids: that requests named.

    Raises:
        TypeError: ids that are no texts, or one text.
        OSError: a file cannot be removed.
    """
    if isinstance(ids, str) or not isinstance(ids, Sequence):
        raise TypeError(f"ids: expected a list of ids, got {type(ids).__name__}")
    for path in [_path(Path(folder), of) for of in ids]:
        path.unlink(missing_ok=True)


class _Record(NamedTuple):
    """A record as it is read; `ids` are bytes."""

    writer: int
    position: int
    token: int
    logprob: float
    full: bool
    ids: bytes


def _path(folder: Path, of: str) -> Path:
    """Returns the file of an id."""
    instance("id", of, str, "a text")
    digest = hashlib.sha256(of.encode("utf-8", "surrogatepass")).hexdigest()
    return folder / f"{digest[:32]}.drawn"


def _of_one(folder: Path, of: str, outputs: object) -> Drawn:
    """Returns what the tokens of one id were drawn from."""
    path, name = _path(folder, of), f"outputs[{of!r}]"
    if not isinstance(outputs, Iterable) or isinstance(outputs, str | bytes):
        raise TypeError(f"{name}: expected token ids, got {type(outputs).__name__}")
    tokens = [integer(name, token) for token in outputs]
    try:
        data = path.read_bytes() if tokens else b""
    except FileNotFoundError as error:
        raise LookupError(
            f"{shown(of)}: expected records of it in {folder}, got none: an engine writes them "
            "with FusedSampler among its logits_processors and "
            f'additional_config={{"fastadapt_support_folder": {str(folder)!r}}}, of requests with '
            f'extra_args={{"fastadapt_support_id": {shown(of)}}}'
        ) from error
    last = _last(of, _records(path, data))
    for position, token in enumerate(tokens):
        if position not in last:
            raise ValueError(
                f"{shown(of)}: expected a record of each of {len(tokens)} tokens, got none of "
                f"token {position}: the records were forgotten or could not be written while it "
                "ran, or the tokens are of another request"
            )
        if last[position].token != token:
            raise ValueError(
                f"{shown(of)}: expected token {position} to be {last[position].token}, as it was "
                f"drawn, got {token}: another request has this id too, or the engine put its own "
                "token there"
            )
    return _joined([last[position] for position in range(len(tokens))])


def _last(of: str, records: Iterator[_Record]) -> dict[int, _Record]:
    """Returns the last record of each position since the request came to its position 0.

    Raises:
        ValueError: two requests wrote in turns.
    """
    last: dict[int, _Record] = {}
    writers: list[int] = []  # of one request: a new one each time that it comes to the batch
    for one in records:
        if not writers or one.writer != writers[-1]:
            if one.writer in writers:
                raise ValueError(f"{shown(of)}: expected one request of this id, got two at a time")
            writers.append(one.writer)
            if one.position == 0:
                last.clear()
        last[one.position] = one
    return last


def _records(path: Path, data: bytes) -> Iterator[_Record]:
    """Yields the records of a file but for one at its end that is not whole.

    Raises:
        ValueError: something else, or of another version.
    """
    at = 0
    while len(data) - at >= _HEAD.size + _SUM.size:
        mark, writer, position, token, logprob, count = _HEAD.unpack_from(data, at)
        if mark != _NAME + _VERSION:
            version = mark - _NAME
            other = f"version {version}" if 0 <= version < 2**16 else "something else"
            raise ValueError(f"{path}: expected records of version {_VERSION}, got {other}")
        begin = at + _HEAD.size + _SUM.size
        end = begin + 4 * max(count, 0)
        _intact(path, data[at : begin - _SUM.size], data[begin - _SUM.size : begin])
        if end + _SUM.size > len(data):
            return
        ids = data[begin:end]
        _intact(path, ids, data[end : end + _SUM.size])
        yield _Record(writer, position, token, logprob, count == _FULL, ids)
        at = end + _SUM.size


def _intact(path: Path, part: bytes, checksum: bytes) -> None:
    """Raises unless the bytes of a part have its checksum.

    Raises:
        ValueError: they do not.
    """
    if _SUM.pack(crc32(part)) != checksum:
        raise ValueError(f"{path}: expected records as they were written, got damaged ones")


def _joined(records: Sequence[_Record]) -> Drawn:
    """Returns the rows of records."""
    ids = bytearray().join(one.ids for one in records)
    joined = torch.empty(len(ids) // 4, dtype=torch.int32, device="cpu")
    if ids:
        joined.copy_(torch.frombuffer(ids, dtype=torch.int32))
    counts = [0, *(len(one.ids) // 4 for one in records)]
    return Drawn(
        Support(
            joined,
            torch.tensor(counts, dtype=torch.int64, device="cpu").cumsum(0),
            torch.tensor([one.full for one in records], dtype=torch.bool, device="cpu"),
        ),
        torch.tensor([one.logprob for one in records], dtype=torch.float32, device="cpu"),
        torch.tensor([one.token for one in records], dtype=torch.int64, device="cpu"),
    )
