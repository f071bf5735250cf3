"""Records of what vLLM's tokens were drawn from: their format, and which of them count."""

import logging
import stat
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from fastadapt import (
    Adaptor,
    Edits,
    Support,
    filter_logits,
    label_logps,
    linear_support_log_odds,
    sample,
    support_log_odds,
)
from fastadapt.vllm import forget, supports
from fastadapt.vllm._batch import Batch
from fastadapt.vllm._records import Sheet, record
from fastadapt.vllm._request import Request
from fastadapt.vllm._row import Row

V = 97
NO_PENALTIES = {"repetition": 1.0, "presence": 0.0, "frequency": 0.0}


def _drawn(n: int, adaptor: Adaptor | None = None, seed: int = 0) -> Any:
    """N rows that were drawn, among them one that keeps all ids but one."""
    torch.manual_seed(seed)
    logits = 2 * torch.randn(n, V)
    logits[0, 5] = -float("inf")
    by = Adaptor(top_p=0.8) if adaptor is None else adaptor
    return sample(logits, by, seeds=torch.arange(n), support=True)


def _recorded(folder: Path, of: str = "a", n: int = 6, **knobs: Any) -> tuple[Any, Path]:
    """What was drawn, and its file."""
    drawn, sheet = _drawn(n, **knobs), Sheet(folder, of, 0)
    record([sheet] * n, torch.arange(n), drawn)
    return drawn, sheet.path


def _one(token: int) -> Any:
    """A row of one id."""
    logits = torch.full((1, V), -float("inf"))
    logits[0, token] = 0
    return sample(logits, Adaptor(), seeds=torch.zeros(1).long(), support=True)


def _write(folder: Path, of: str, runs: list[tuple[int, list[int]]]) -> None:
    """Records of several sheets of one id: the position that each begins at, and its tokens."""
    for first, tokens in runs:
        sheet = Sheet(folder, of, first)
        for at, token in enumerate(tokens):
            record([sheet], torch.tensor([first + at]), _one(token))


def _read(folder: Path, tokens: list[int], of: str = "a") -> list[int]:
    return supports(folder, {of: tokens})[of].support.ids.tolist()


@pytest.mark.parametrize(
    "adaptor", [Adaptor(top_p=0.8), Adaptor(), Adaptor(typical_p=0.5), Adaptor(temperature=0)]
)
def test_what_is_read_is_what_was_drawn(tmp_path, adaptor):
    drawn, _ = _recorded(tmp_path, adaptor=adaptor)
    got = supports(tmp_path, {"a": drawn.tokens.tolist()})["a"]
    assert got.support == drawn.support
    assert torch.equal(got.logprobs, drawn.logprobs) and torch.equal(got.tokens, drawn.tokens)
    assert got.logprobs.dtype == torch.float32 and got.tokens.dtype == torch.int64
    with torch.device("meta"):  # another default device
        assert supports(tmp_path, {"a": drawn.tokens.tolist()})["a"].support == drawn.support
    few = supports(str(tmp_path), {"a": drawn.tokens[:2].numpy()})["a"]  # the rest was dropped
    assert few.support == drawn.support[:2] and len(few.logprobs) == 2


def test_a_record_is_48_bytes_and_its_ids(tmp_path):
    drawn, path = _recorded(tmp_path)
    assert path.stat().st_size == 48 * 6 + 4 * drawn.support.ids.shape[0]


def test_no_tokens_are_no_rows(tmp_path):
    got = supports(tmp_path, {"of a request that was refused": []})
    assert [len(x) for x in got["of a request that was refused"]] == [0, 0, 0]
    assert supports(tmp_path, {}) == {}


def test_a_record_counts_when_it_is_whole(tmp_path):
    drawn, path = _recorded(tmp_path, n=3)
    whole, tokens = path.read_bytes(), drawn.tokens.tolist()
    last = 48 + 4 * int(drawn.support.counts[2])
    for cut in range(1, last + 1):
        path.write_bytes(whole[:-cut])
        assert supports(tmp_path, {"a": tokens[:2]})["a"].support == drawn.support[:2]
        with pytest.raises(
            ValueError, match="'a': expected a record of each of 3 tokens, got none"
        ):
            supports(tmp_path, {"a": tokens})


def test_damage_is_an_error(tmp_path):
    drawn, path = _recorded(tmp_path, n=3)
    whole, tokens = path.read_bytes(), drawn.tokens.tolist()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(ValueError, match=r"\.drawn: expected records"):
            supports(tmp_path, {"a": tokens})
    path.write_bytes(whole[:20] + whole)  # the rest after a record that was begun
    with pytest.raises(ValueError, match="expected records as they were written"):
        supports(tmp_path, {"a": tokens})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda mark: mark + 1, "expected records of version 1, got version 2"),
        (lambda mark: 0, "expected records of version 1, got something else"),
        (
            lambda mark: int.from_bytes(mark.to_bytes(8, "big"), "little", signed=True),
            "expected records of version 1, got something else",
        ),
    ],
)
def test_other_versions_and_machines_are_refused(tmp_path, change, message):
    drawn, path = _recorded(tmp_path)
    (mark,) = struct.unpack_from("=q", path.read_bytes())
    path.write_bytes(struct.pack("=q", change(mark)) + path.read_bytes()[8:])
    with pytest.raises(ValueError, match=message):
        supports(tmp_path, {"a": drawn.tokens.tolist()})


@pytest.mark.parametrize(
    ("runs", "tokens"),
    [
        ([(0, [1, 2, 3])], [1, 2, 3]),
        ([(0, [1, 2, 3]), (2, [7, 8])], [1, 2, 7, 8]),  # preempted, the third drawn again
        ([(0, [1, 2, 3]), (0, [4, 5])], [4, 5]),  # from the beginning
        ([(0, [1, 2, 3]), (1, [4]), (2, [5, 6])], [1, 4, 5]),
        ([(0, [1]), (0, [1, 2]), (0, [1, 2])], [1, 2]),
    ],
)
def test_the_last_draw_of_a_position_counts(tmp_path, runs, tokens):
    _write(tmp_path, "a", runs)
    assert _read(tmp_path, tokens) == tokens


def test_one_writer_may_draw_positions_again(tmp_path):
    """As for each part of a prompt, and behind a draft that was refused."""
    sheet = Sheet(tmp_path, "a", 0)
    for position, token in [(0, 9), (0, 1), (1, 2), (2, 8), (3, 8), (2, 3), (3, 4), (4, 5)]:
        record([sheet], torch.tensor([position]), _one(token))
    assert _read(tmp_path, [1, 2, 3, 4]) == [1, 2, 3, 4]


def test_positions_that_are_known_are_not_recorded(tmp_path):
    """V2 draws rows of a prompt that is read in parts, or of a text that is read again."""
    _write(tmp_path, "a", [(0, [1, 2, 3])])
    sheet = Sheet(tmp_path, "a", 3)
    for position in (-2, 0, 1, 3):
        record([sheet], torch.tensor([position]), _one(50))
    assert _read(tmp_path, [1, 2, 3, 50]) == [1, 2, 3, 50]


def test_tokens_of_another_request_are_refused(tmp_path):
    _write(tmp_path, "a", [(0, [1, 2, 3, 4]), (0, [1, 2])])
    with pytest.raises(ValueError, match="^'a': expected token 1 to be 2, as it was drawn, got 9"):
        _read(tmp_path, [1, 9])
    with pytest.raises(
        ValueError, match="expected a record of each of 3 tokens, got none of token 2"
    ):
        _read(tmp_path, [1, 2, 3])


def test_two_requests_of_one_id_at_a_time_are_refused(tmp_path):
    first, second = Sheet(tmp_path, "a", 0), Sheet(tmp_path, "a", 0)
    for position in (0, 1):
        record([first, second], torch.tensor([position] * 2), _pair(_one(1), _one(1)))
    with pytest.raises(
        ValueError, match="^'a': expected one request of this id, got two at a time"
    ):
        _read(tmp_path, [1])


def _pair(a: Any, b: Any) -> Any:
    joined = [None if x is None else torch.cat([x, y]) for x, y in zip(a[:-1], b[:-1], strict=True)]
    return type(a)(*joined, support=Support.cat([a.support, b.support]))


def test_requests_do_not_mix(tmp_path):
    ids = ["a", "A", "", "../a", "/etc/passwd", "a/b", "\0", "ä", "\ud800", "x" * 300]
    (tmp_path / "in").mkdir()
    for at, of in enumerate(ids):
        _write(tmp_path / "in", of, [(0, [at, at + 1])])
    got = supports(tmp_path / "in", {of: [at, at + 1] for at, of in enumerate(ids)})
    assert list(got) == ids
    assert [x.support.ids.tolist() for x in got.values()] == [[i, i + 1] for i in range(len(ids))]
    assert [p.name for p in tmp_path.iterdir()] == ["in"]
    assert len(list((tmp_path / "in").iterdir())) == len(ids)


def test_what_is_forgotten_is_not_there(tmp_path):
    for of in "abc":
        _write(tmp_path, of, [(0, [1])])
    forget(tmp_path, ["a", "c", "never"])
    assert _read(tmp_path, [1], "b") == [1]
    for of in ("a", "c"):
        with pytest.raises(LookupError, match=f"^'{of}': expected records of it in {tmp_path}"):
            _read(tmp_path, [1], of)


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ([("a", [1])], "^outputs: expected token ids by the id of their request, got list"),
        ({1: [1]}, "^id: expected a text, got int"),
        ({"a": [1.5]}, r"^outputs\['a'\]: expected an integer, got 1.5"),
        ({"a": ["x"]}, r"^outputs\['a'\]: expected an integer, got 'x'"),
        ({"a": 3}, r"^outputs\['a'\]: expected token ids, got int"),
        ({"a": "text"}, r"^outputs\['a'\]: expected token ids, got str"),
    ],
)
def test_what_is_no_output_is_refused(tmp_path, outputs, message):
    with pytest.raises(TypeError, match=message):
        supports(tmp_path, outputs)


def test_ids_to_forget_are_texts(tmp_path):
    with pytest.raises(TypeError, match="^ids: expected a list of ids, got str"):
        forget(tmp_path, "abc")
    _write(tmp_path, "a", [(0, [1])])
    with pytest.raises(TypeError, match="^id: expected a text, got int"):
        forget(tmp_path, ["a", 1])
    assert _read(tmp_path, [1]) == [1]  # none is forgotten


def test_an_error_of_the_file_system_is_the_readers(tmp_path, caplog):
    """The engine goes on; it is said once for a request."""
    folder = tmp_path / "gone"
    folder.mkdir()
    sheet = Sheet(folder, "a", 0)
    record([sheet], torch.tensor([0]), _one(1))
    sheet.path.unlink()
    folder.rmdir()
    with caplog.at_level(logging.ERROR, "fastadapt.vllm"):
        for position in (1, 2):
            record([sheet], torch.tensor([position]), _one(2))
    assert len(caplog.records) == 1 and "no more records" in caplog.text
    folder.mkdir()
    record([sheet], torch.tensor([3]), _one(3))
    with pytest.raises(LookupError, match="'a': expected records"):
        _read(folder, [1, 2, 2, 3])
    folder.rmdir()
    _write(folder, "b", [(0, [4, 5])])  # requests after it have theirs
    assert _read(folder, [4, 5], "b") == [4, 5]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_short_write_ends_the_records(tmp_path, monkeypatch, caplog):
    """As on a full disk."""
    sheet = Sheet(tmp_path, "a", 0)
    record([sheet], torch.tensor([0]), _one(1))
    opened = Path.open

    def full(self: Path, *given: Any, **options: Any) -> Any:
        return _Short(opened(self, *given, **options))

    monkeypatch.setattr(Path, "open", full)
    record([sheet], torch.tensor([1]), _one(2))
    monkeypatch.undo()
    record([sheet], torch.tensor([2]), _one(3))
    assert "9 bytes of 52" in caplog.text
    assert _read(tmp_path, [1]) == [1]
    with pytest.raises(
        ValueError, match="expected a record of each of 2 tokens, got none of token 1"
    ):
        _read(tmp_path, [1, 2])


class _Short:
    """A file on a disk that has room for nine more bytes."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def __enter__(self) -> "_Short":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, data: bytes) -> int:
        return int(self.file.write(data[:9]))


def _row(folder: Path | None, of: str, seed: int, bias: Any = None, **knobs: Any) -> Row:
    request = Request(
        adaptor=Adaptor(**{"order": "vllm"} | knobs), seed=seed, bias=bias or {}, support_id=of,
        **NO_PENALTIES,
    )  # fmt: skip
    return Row(request, seed, sheet=None if folder is None else Sheet(folder, of, 0))


ASKED: list[dict[str, Any]] = [
    {"top_p": 0.8}, {"temperature": 1.5, "top_k": 7}, {"min_p": 0.05, "order": "hf"}, {},
    {"typical_p": 0.6}, {"temperature": 0}, {"top_p": 0.9, "bias": {3: 2.0, 4: -float("inf")}},
]  # fmt: skip


def _edited(row: Row, logits: torch.Tensor) -> torch.Tensor:
    """The row's kept logits by `filter_logits`."""
    edits = Edits.from_rows([row.request.bias], "pre")
    return filter_logits(logits[None], row.request.adaptor, edits=edits)[0]


def _mask_of(support: Support) -> torch.Tensor:
    return support.to_mask(V)


def test_rows_that_ask_are_recorded_and_no_others(tmp_path, monkeypatch):
    """Of those that ask the sets of `filter_logits`; the tokens are those of rows that do not."""
    calls = []

    def counted(logits: torch.Tensor, *given: Any, support: bool, **options: Any) -> Any:
        calls.append((len(logits), support))
        return sample(logits, *given, support=support, **options)

    monkeypatch.setattr("fastadapt.vllm._batch.sample", counted)
    asking = [_row(tmp_path, f"{i}", i, **knobs) for i, knobs in enumerate(ASKED)]
    silent = [_row(None, "", i, **knobs) for i, knobs in enumerate(ASKED)]
    outputs: dict[str, list[int]] = {row.request.support_id: [] for row in asking}
    masks: dict[str, list[torch.Tensor]] = {of: [] for of in outputs}
    logps: dict[str, list[torch.Tensor]] = {of: [] for of in outputs}
    batch = None
    for step in range(5):
        given = 2 * torch.randn(len(ASKED), V).repeat(2, 1)
        batch = Batch(list(enumerate([*asking, *silent])), given, batch)
        logits = given.clone()
        batch.draw(logits, torch.full((2 * len(ASKED),), step), penalties=True)
        tokens = logits.argmax(-1).tolist()
        assert tokens[: len(ASKED)] == tokens[len(ASKED) :]
        for at, row in enumerate(asking):
            kept, of = _edited(row, given[at]), row.request.support_id
            outputs[of].append(tokens[at])
            masks[of].append(kept > -float("inf"))
            logps[of].append(kept.double().log_softmax(-1)[tokens[at]])
    assert sorted(calls) == sorted([(6, True), (1, True), (6, False), (1, False)] * 5)
    for of, got in supports(tmp_path, outputs).items():
        assert torch.equal(_mask_of(got.support), torch.stack(masks[of]))
        torch.testing.assert_close(got.logprobs.double(), torch.stack(logps[of]), rtol=0, atol=2e-5)
    assert len(list(tmp_path.iterdir())) == len(ASKED)


def test_replay_gives_the_samplers_log_probabilities(tmp_path):
    torch.manual_seed(1)
    head, temperature = torch.randn(V, 16), 0.8
    row = _row(tmp_path, "a", 3, temperature=temperature, top_p=0.9)
    states, tokens, batch = torch.randn(64, 16), [], None
    for step in range(64):
        logits = states[step : step + 1] @ head.t()
        batch = Batch([(0, row)], logits, batch)
        batch.draw(logits, torch.tensor([step]), penalties=True)
        tokens.append(int(logits.argmax()))
    got = supports(tmp_path, {"a": tokens})["a"]
    rows = torch.cat([states[i : i + 1] @ head.t() for i in range(64)])
    of_logits = support_log_odds(rows / temperature, got.tokens, got.support)
    of_head = linear_support_log_odds(
        states, head, got.tokens, got.support, logit_scale=1 / temperature
    )
    for log_odds in (of_logits, of_head):
        torch.testing.assert_close(label_logps(log_odds), got.logprobs, rtol=0, atol=2e-6)


def test_rows_of_drafts_are_recorded_at_their_positions(tmp_path):
    """Also among rows of requests that do not ask, and of none."""
    rows = [_row(tmp_path, "a", 1, top_p=0.8), _row(None, "", 2, top_p=0.8)]
    rows.append(_row(tmp_path, "c", 3, top_p=0.5, bias={1: 3.0}))
    given = 2 * torch.randn(9, V)
    places = torch.tensor([0, 0, 0, 1, 1, -1, 2, 2, -1])
    positions = torch.tensor([4, 5, 6, 0, 1, 7, 0, 1, 0])
    sheet = rows[0].sheet
    record([sheet] * 4, torch.arange(4), _drawn(4))
    batch = Batch(list(enumerate(rows)), torch.zeros(3, V), None)
    logits = batch.draw_drafts(given.clone(), places, positions)
    tokens = logits.argmax(-1)
    before = _drawn(4).tokens.tolist()
    got = supports(tmp_path, {"a": before + tokens[:3].tolist(), "c": tokens[6:8].tolist()})
    for of, at, row in (("a", [0, 1, 2], rows[0]), ("c", [6, 7], rows[2])):
        kept = torch.stack([_edited(row, given[i]) > -float("inf") for i in at])
        assert torch.equal(_mask_of(got[of].support)[-len(at) :], kept)
        alone = sample(
            given[at], row.request.adaptor, seeds=torch.full((len(at),), row.seed),
            positions=positions[at], edits=Edits.from_rows([row.request.bias] * len(at), "pre"),
        )  # fmt: skip
        assert torch.equal(alone.tokens, tokens[at])
        assert torch.equal(alone.logprobs, got[of].logprobs[-len(at) :])
    silent = _row(None, "", 1, top_p=0.8), rows[1], _row(None, "", 3, top_p=0.5, bias={1: 3.0})
    others = Batch(list(enumerate(silent)), torch.zeros(3, V), None)
    assert torch.equal(others.draw_drafts(given.clone(), places, positions), logits)
    assert torch.equal(logits[[5, 8]], given[[5, 8]])


@pytest.mark.parametrize("bad", [float("nan"), -float("inf")])
def test_a_row_without_a_token_is_told_by_its_reader(tmp_path, bad):
    row, logits = _row(tmp_path, "a", 0, top_p=0.9), torch.full((1, V), bad)
    Batch([(0, row)], logits, None).draw(logits, torch.zeros(1).long(), penalties=True)
    with pytest.raises(ValueError, match="'a': expected token 0 to be -1, as it was drawn, got 3"):
        _read(tmp_path, [3])
