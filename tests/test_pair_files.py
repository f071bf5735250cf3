"""Files of preference pairs: the formats people keep them in, and what is said of damaged ones."""

import csv
import gzip
import io
import json
import sys

import datasets
import pytest

from fastadapt._cli.train.data import DataError, load_pairs
from fastadapt.training.pair_forms import pair_of
from fastadapt.training.pairs import read_pairs

COLUMNS = ("prompt", "chosen", "rejected")
# What a reader that guesses types would change, and what needs quoting.
TEXTS = [
    ("What is 7 x 6?", "42", "007"),
    ("Is it?", "None", "NA"),
    ("null", "true", "1e5"),
    ('a "quoted",\nsecond line', "é\u2028日本", " spaces "),
]
ROWS = [dict(zip(COLUMNS, row, strict=True)) for row in TEXTS]
GOOD = json.dumps(ROWS[0])


def _chat(*turns):
    return [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(turns)]


def _lines(rows=ROWS):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _table(rows=ROWS, delimiter=","):
    out = io.StringIO(newline="")
    writer = csv.writer(out, delimiter=delimiter)
    writer.writerows([COLUMNS, *([row[c] for c in COLUMNS] for row in rows)])
    return out.getvalue()


def _parquet(rows=ROWS):
    out = io.BytesIO()
    datasets.Dataset.from_list(rows).to_parquet(out)
    return out.getvalue()


FILES = {
    "lines.jsonl": _lines().encode(),
    "crlf.jsonl": _lines().replace("\n", "\r\n").encode(),
    "blank.jsonl": ("\n \n" + _lines().replace("\n", "\n\n")).encode(),
    "no end of line.json": _lines().rstrip().encode(),
    "bom.jsonl": _lines().encode("utf-8-sig"),
    "utf16.jsonl": _lines().encode("utf-16"),
    "utf16 without mark.jsonl": _lines().encode("utf-16-le"),
    "array.json": json.dumps(ROWS).encode(),
    "array.jsonl": json.dumps(ROWS, indent=2).encode(),
    "bom array.json": ("\n " + json.dumps(ROWS)).encode("utf-8-sig"),
    "lines.jsonl.gz": gzip.compress(_lines().encode()),
    "two members.jsonl.gz": b"".join(gzip.compress(_lines([row]).encode()) for row in ROWS),
    "array.json.gz": gzip.compress(json.dumps(ROWS).encode()),
    "gzip by its contents.jsonl": gzip.compress(_lines().encode()),
    "table.csv": _table().encode(),
    "TABLE.CSV": _table().encode("utf-8-sig"),
    "utf16.csv": _table().encode("utf-16"),
    "table.csv.gz": gzip.compress(_table().encode()),
    "table.tsv": _table(delimiter="\t").encode(),
    "rows.parquet": _parquet(),
    "parquet by its contents.jsonl": _parquet(),
    "key=value.parquet": _parquet(),
    "lines": _lines().encode(),
}


@pytest.mark.parametrize("name", FILES)
def test_formats(name, tmp_path):
    (tmp_path / name).write_bytes(FILES[name])
    assert load_pairs(str(tmp_path / name)) == TEXTS
    assert read_pairs(tmp_path / name) == TEXTS


def test_several_sources_are_one(tmp_path):
    for name in ("lines.jsonl", "table.csv", "rows.parquet"):
        (tmp_path / name).write_bytes(FILES[name])
    paths = [str(tmp_path / name) for name in ("table.csv", "lines.jsonl", "rows.parquet")]
    assert load_pairs(paths) == 3 * TEXTS
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match=r"empty.jsonl: expected at least one pair, got none"):
        load_pairs([*paths, str(tmp_path / "empty.jsonl")])
    with pytest.raises(DataError, match="expected at least one source, got none"):
        load_pairs([])


def test_folders_of_datasets(tmp_path):
    rows = datasets.Dataset.from_list(ROWS)
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(tmp_path / "two")
    assert load_pairs(tmp_path / "one") == TEXTS
    assert load_pairs(str(tmp_path / "two")) == TEXTS
    assert load_pairs(str(tmp_path / "two"), split="test") == [TEXTS[1]]
    with pytest.raises(DataError, match=r"two: expected one of the splits \['test', 'train'\], go"):
        load_pairs(str(tmp_path / "two"), split="dev")
    with pytest.raises(DataError, match="expected a file, or a folder written by save_to_disk"):
        load_pairs(str(tmp_path))
    datasets.Dataset.from_list([*ROWS, {"prompt": "a", "chosen": "b"}]).save_to_disk(tmp_path / "x")
    with pytest.raises(DataError, match="x, row 4: rejected: expected a string or messages, got N"):
        load_pairs(str(tmp_path / "x"))


@pytest.mark.parametrize("name", ["chat.jsonl", "chat.csv", "chat.parquet", "text.jsonl"])
def test_messages(name, tmp_path):
    rows = [
        {"prompt": _chat("a"), "chosen": _chat("", "b")[1:], "rejected": _chat("", "c")[1:]},
        {
            "prompt": _chat("a", "x", "y"),
            "chosen": _chat("", "[1]")[1:],
            "rejected": _chat("", "{")[1:],
        },
    ]
    as_text = [{key: json.dumps(value) for key, value in row.items()} for row in rows]
    if name in ("chat.csv", "text.jsonl"):
        data = (_table if name.endswith(".csv") else _lines)(as_text)
    else:
        data = _lines(rows) if name.endswith("l") else _parquet(rows)
    (tmp_path / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    want = [(_chat("a"), "b", "c"), (_chat("a", "x", "y"), "[1]", "{")]
    assert load_pairs(str(tmp_path / name)) == want


def test_cells_that_only_look_like_messages_are_text(tmp_path):
    row = ('[{"name": 1}]', "[1, 2", "[{'role': 'x'}] is a list")
    (tmp_path / "p.csv").write_text(_table([dict(zip(COLUMNS, row, strict=True))]))
    assert load_pairs(str(tmp_path / "p.csv")) == [row]


def test_long_lines_and_cells(tmp_path):
    row = {**ROWS[0], "chosen": "long " * 50_000}
    limit = csv.field_size_limit()
    for name, text in (("p.jsonl", _lines([row])), ("p.csv", _table([row]))):
        (tmp_path / name).write_text(text)
        assert load_pairs(str(tmp_path / name))[0].chosen == row["chosen"]
    assert csv.field_size_limit() == limit


# A file of two entries, the second one damaged: its name, contents and what is said.
DAMAGED = {
    "duplicate.jsonl": ('{"prompt": "a", "chosen": "b", "chosen": "c", "rejected": "d"}', "line 2: "
        "expected each key of an object once, got 'chosen' twice"),
    "comma.jsonl": (GOOD + ",", "line 2, column .*: expected JSON, got .*: Extra data"),
    "cut.jsonl": (GOOD[:40], "line 2, column .*: expected JSON, got .*: Unterminated string"),
    "text.jsonl": ("hello", "line 2, column 1: expected JSON, got 'hello': Expecting value"),
    "deep.jsonl": ("[" * 100_000, "line 2: expected JSON nested less deeply"),
    "number.jsonl": ('{"prompt": "a", "chosen": 4, "rejected": "b"}', "line 2: chosen: expected a "
        "string or messages, got 4"),
    "nan.jsonl": ('{"prompt": NaN, "chosen": "a", "rejected": "b"}', "line 2: prompt: expected a "
        "string that is not empty, as the responses are, got nan"),
    "null.jsonl": ('{"prompt": "a", "chosen": "a", "rejected": null}', "line 2: rejected: expected "
        "a string or messages, got None"),
    "surrogate.jsonl": (r'{"prompt": "a", "chosen": "\ud83d", "rejected": "b"}', "line 2: chosen: "
        "expected text, got half of a surrogate pair"),
    "bom inside.jsonl": ("\ufeff" + GOOD, "line 2, column 1: expected JSON, got .* BOM"),
    "digits.jsonl": ('{"prompt": "a", "n": ' + "1" * 5000 + "}", "line 2: Exceeds the limit"),
    "kto.jsonl": ('{"prompt": "a", "completion": "b", "label": true}', "line 2: expected 'chosen' "
        r"and 'rejected', got \['completion', 'label', 'prompt'\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_a_bad_line_is_named(name, tmp_path):
    line, message = DAMAGED[name]
    path = tmp_path / name
    path.write_text(f"{GOOD}\n{line}\n", encoding="utf-8")
    with pytest.raises(DataError, match=f"^{path}, {message}"):
        load_pairs(str(path))


BROKEN = {
    "a.json": (b'[\n{"a": 1},\n]', "line 3, column 1: expected JSON, got ']'|line 2, column .*com"),
    "b.json": (f"[\n{GOOD},\n\n{GOOD},\n  [3]]".encode(), r"line 5: expected an object, got \[3\]"),
    "c.json": (f"[{GOOD}\n{GOOD}]".encode(), "line 2, column 1: expected JSON, got .*delimiter"),
    "d.json": (b'{"data": [\n{"a": 1}]}', "line 1, column 11: expected JSON, got "),
    "e.csv": (b"prompt;chosen;rejected\na;b;c\n", r"line 2: expected 'chosen' and .*prompt;chosen"),
    "f.csv": (b'prompt,chosen,rejected\n"a\n\nb",c,d\na,b\n', "line 5: expected 3 values, got 2"),
    "g.csv": (b"prompt,chosen,rejected\na,b,c,\n", "line 2: expected 3 values, got 4"),
    "h.csv": (b'prompt,chosen,rejected\na,b,c\na,"b,c\n', "line 3: expected CSV: unexpected end"),
    "i.csv": (b'prompt,chosen,rejected\na,"b"x,c\n', "line 2: expected CSV: ',' expected after"),
    "j.csv": (b"prompt,chosen,chosen\na,b,c\n", r"line 1: expected each column once, got \['chos"),
    "k.csv": (b"prompt,chosen,rejected\na,,c\n", "line 2: chosen: expected a response that is not"),
    "l.csv": (
        b"prompt,chosen,rejected\na,\"[{'role': 'assistant', 'content': 'x'}]\",c\n",
        "line 2: chosen: expected messages as a list or as JSON, got Python's text of them",
    ),
    "m.csv": (
        b"prompt,chosen,rejected\na,b,c\na,caf\xe9,c",
        "line 3: expected utf-8 text, got the",
    ),
    "n.jsonl": (b"\x89PNG\r\n\x1a\n", "line 1: expected utf-8 text, got the byte 0x89"),
    "o.jsonl.gz": (
        gzip.compress(_lines().encode())[:-20],
        "expected a whole gzip file, got a trun",
    ),
    "p.csv.gz": (gzip.compress(b"x" * 99)[:-6] + b"12abcd", "expected a gzip file, got a damaged"),
    "q.jsonl.gz": (GOOD.encode(), "expected a gzip file, got a damaged one: Not a gzipped file"),
    "r.parquet": (FILES["rows.parquet"][:-30], "expected Parquet, got a damaged file"),
    "s.parquet": (GOOD.encode(), "expected Parquet, got a damaged file"),
    "t.parquet": (_parquet([*ROWS, {"prompt": "a"}]), "row 4: chosen: expected a string or mess"),
    "names.parquet": (
        _parquet().replace(b"prompt", b"promp\xff"),
        "expected Parquet, got a damaged",
    ),
    "u.jsonl": (b"\n", "expected at least one pair, got none"),
    "v.csv": (b"prompt,chosen,rejected\n", "expected at least one pair, got none"),
    "w.json": (b"[]", "expected at least one pair, got none"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_damaged_files_are_named(name, tmp_path):
    data, message = BROKEN[name]
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(DataError, match=f"^{path}(: |, )({message})"):
        load_pairs(str(path))


def test_files_that_cannot_be_read(tmp_path, monkeypatch):
    path = tmp_path / "p.jsonl"
    path.write_text(GOOD)

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    with pytest.raises(DataError, match="p.jsonl: Permission denied$"):
        load_pairs(str(path))
    for source in ("a\0b", "x" * 5000, "~nobody-has-this-name/p.jsonl", ""):
        with pytest.raises(DataError):
            load_pairs(source)


def test_without_datasets(tmp_path, monkeypatch):
    for name in ("lines.jsonl", "array.json", "table.csv", "rows.parquet"):
        (tmp_path / name).write_bytes(FILES[name])
    monkeypatch.setitem(sys.modules, "datasets", None)
    for name in ("lines.jsonl", "array.json", "table.csv"):
        assert read_pairs(tmp_path / name) == TEXTS
    for source in (str(tmp_path / "rows.parquet"), "owner/name"):
        with pytest.raises(DataError, match=f"{source}: expected the package datasets, which"):
            load_pairs(source)


ASKED = {"prompt": "a", "chosen": _chat("a", "b"), "rejected": _chat("a", "c")}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
RESULT = {"role": "tool", "content": "1", "name": None}
SYSTEM = {"role": "system", "content": "s"}


@pytest.mark.parametrize(
    ("entry", "pair"),
    [
        ({**ASKED, "tools": None, "images": [], "score": 1.5}, (_chat("a"), "b", "c")),
        (
            {
                "prompt": "a",
                "chosen": [SYSTEM, *_chat("a", "b")],
                "rejected": [SYSTEM, *_chat("a", "")],
            },
            None,
        ),
        (
            {
                "prompt": "a",
                "chosen": [SYSTEM, *_chat("a", "b")],
                "rejected": [SYSTEM, *_chat("a", "c")],
            },
            ([SYSTEM, *_chat("a")], "b", "c"),
        ),
        (
            {
                "prompt": "a",
                "chosen": _chat("a", "x", "y", "b"),
                "rejected": _chat("a", "x", "y", "c"),
            },
            (_chat("a", "x", "y"), "b", "c"),
        ),
        (
            {
                "prompt": [*_chat("a"), CALL, RESULT],
                "chosen": _chat("", "b")[1:],
                "rejected": _chat("", "c")[1:],
            },
            (
                [
                    *_chat("a"),
                    {k: CALL[k] for k in ("role", "tool_calls")},
                    {"role": "tool", "content": "1"},
                ],
                "b",
                "c",
            ),
        ),
    ],
    ids=["empty columns", "an empty response", "system", "dialogues beside a prompt", "tool calls"],
)
def test_forms_of_messages(entry, pair):
    if pair is None:
        with pytest.raises(ValueError, match="rejected: expected a response that is not empty"):
            pair_of(entry)
    else:
        assert pair_of(entry) == pair


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tools": [{"name": "f"}]}, "tools: expected pairs of prompts and responses alone, got"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs: expected"),
        ({"system": "Be kind."}, "system: expected pairs of prompts and responses alone, got 'Be"),
        ({"images": ["a.png"]}, "images: expected pairs of prompts and responses alone, got"),
        ({"chosen": [*_chat("a"), CALL]}, r"chosen: .* a role and a content, got \['tool_calls'\]"),
        (
            {"chosen": [*_chat("a"), {**_chat("", "b")[1], "reasoning_content": "hm"}]},
            r"chosen: .* a role and a content, got \['reasoning_content'\] too",
        ),
        ({"chosen": _chat("a", "b", "c", "d")}, "chosen: expected one message of the assistant"),
        ({"chosen": [{"from": "gpt", "value": "b"}]}, "chosen: expected messages with 'role' and"),
        (
            {"chosen": [{"role": "assistant", "content": [{"type": "text", "text": "b"}]}]},
            "chosen: expected messages with 'role' and 'content', got",
        ),
        ({"chosen": _chat("z", "b"), "rejected": _chat("z", "c")}, "chosen: expected one message"),
        ({"prompt": "z"}, "chosen: expected one message of the assistant, got"),
        ({"chosen": [{"role": "model", "content": "b"}]}, r"one message of the .* got \['model'\]"),
    ],
)  # fmt: skip
def test_what_would_be_lost_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        pair_of({**ASKED, **change})
