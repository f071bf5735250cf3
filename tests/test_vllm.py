"""The draw of vLLM's rows: what requests ask for, batches that change, and both interfaces."""

import json
import random
import re
import stat
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fastadapt import Adaptor, Edits, History, filter_logits, reference, sample
from fastadapt.adaptor import FILTERS
from fastadapt.vllm import _request, supports
from fastadapt.vllm._batch import Batch
from fastadapt.vllm._request import KNOBS, requested
from fastadapt.vllm._row import Row
from fastadapt.vllm._texts import Texts

V = 97
FOLDER = "fastadapt_support_folder"  # of `additional_config`, not a key of requests


@dataclass
class Params:
    """What is read of vLLM's SamplingParams, with its defaults."""

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    extra_args: dict[str, Any] | None = field(default_factory=dict)


def _keys(**knobs: Any) -> dict[str, Any]:
    """Flat keys of a request."""
    return {f"fastadapt_{name}": value for name, value in knobs.items()}


def _asked(*, engine: dict[str, Any] | None = None, **knobs: Any) -> Any:
    return requested(Params(extra_args=_keys(**knobs), **(engine or {})))


def test_the_stand_in_has_vllms_defaults():
    vllm = pytest.importorskip("vllm", reason="compares with vLLM's SamplingParams: needs vllm")
    real, ours = vllm.SamplingParams(), Params(extra_args=None)
    for one in fields(Params):
        assert getattr(real, one.name) == getattr(ours, one.name), one.name


@pytest.mark.parametrize("extra", [None, {}, {"other": 1, "fast": 2}, {1: 2, None: 3}])
def test_requests_without_a_key_are_the_engines(extra):
    assert requested(Params(extra_args=extra, top_p=0.5)) is None


def test_every_knob_of_an_adaptor_is_a_key():
    assert set(KNOBS) == {f.name for f in fields(Adaptor) if f.init}
    example: dict[str, Any] = {
        "temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.05, "typical_p": 0.95,
        "epsilon_cutoff": 3e-4, "eta_cutoff": 2e-4, "min_tokens_to_keep": 2, "top_n_sigma": 1.5,
        "min_k": 3.0, "top_a": 0.2, "top_h": 0.4, "xtc_probability": 0.5, "xtc_threshold": 0.1,
        "order": (
            "xtc", "eta_cutoff", "epsilon_cutoff", "typical_p", "top_a", "min_p", "top_p", "top_k",
            "top_h", "min_k", "top_n_sigma", "temperature",
        ),
    }  # fmt: skip
    assert set(example) == set(KNOBS)
    assert _asked(**example).adaptor == Adaptor(**example)
    text = json.dumps(example | {"seed": 5, "bias_ids": [3], "bias_values": [-1.5]})
    of_text = requested(Params(extra_args={"fastadapt": text}))
    assert of_text is not None and of_text == _asked(**json.loads(text))
    assert (of_text.seed, of_text.bias) == (5, {3: -1.5})


def test_a_new_knob_needs_nothing_here(monkeypatch):
    """Knobs are those that `Adaptor` has: numbers, and what is no number for a group of rows."""
    assert KNOBS == tuple(f.name for f in fields(Adaptor) if f.init)
    seen = {}

    def adaptor(**knobs: Any) -> Adaptor:
        seen.update(knobs)
        return Adaptor(top_p=knobs["top_p"])

    monkeypatch.setattr(_request, "Adaptor", adaptor)
    monkeypatch.setattr(_request, "KNOBS", (*KNOBS, "new"))
    _asked(top_p=0.5, order=["top_p", "top_k"], new=2)
    assert seen == {"top_p": 0.5, "order": ("top_p", "top_k"), "new": 2}


def test_the_engines_knobs_are_adopted():
    engine = {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.1, "seed": 3}
    asked = _asked(engine=engine, typical_p=0.95)
    knobs = {name: x for name, x in engine.items() if name != "seed"}
    assert asked.adaptor == Adaptor(**knobs, typical_p=0.95, order="vllm")
    assert asked.seed == 3
    assert _asked(engine={"top_k": -1}, top_p=0.9).adaptor.top_k == 0
    equal = _asked(engine={"temperature": 0.5, "seed": 4}, temperature=0.5, seed=4)
    assert (equal.adaptor.temperature, equal.seed) == (0.5, 4)
    assert _asked(top_p=0.9).seed is None


def test_penalties_are_the_engines():
    engine = {"repetition_penalty": 1.2, "presence_penalty": -0.5, "frequency_penalty": 0.25}
    asked = _asked(engine=engine, top_p=0.9)
    assert (asked.repetition, asked.presence, asked.frequency) == (1.2, -0.5, 0.25)
    assert asked.penalised and not _asked(top_p=0.9).penalised


def test_greedy_requests_are_the_engines_without_a_bias():
    assert _asked(engine={"temperature": 0.0}, top_p=0.9) is None
    biased = _asked(engine={"temperature": 0.0}, bias_ids=[1], bias_values=[2.0])
    assert biased.adaptor.temperature == 0 and biased.bias == {1: 2.0}
    assert _asked(temperature=0).adaptor.temperature == 0


def test_a_request_that_is_recorded_is_drawn_here():
    """Greedy ones too: what their tokens are drawn from is one id."""
    for engine in ({}, {"temperature": 0.0}):
        asked = _asked(engine=engine, support_id="a-1")
        assert asked.support_id == "a-1" and asked.adaptor.temperature == engine.get(
            "temperature", 1
        )
    assert _asked(support_id="ä" * 128).support_id == "ä" * 128
    text = requested(Params(extra_args={"fastadapt": '{"support_id": "a"}'}))
    assert text is not None and text.support_id == "a"
    assert _asked(top_p=0.9).support_id is None


LAST = ["top_k", "typical_p", "xtc", "temperature"]


@pytest.mark.parametrize(
    ("knobs", "ours"),
    [
        ({"typical_p": 0.5, "order": LAST}, True),
        ({"xtc_probability": 1.0, "order": LAST}, True),
        ({"xtc_probability": 1.0, "typical_p": 0.5, "order": LAST[:-1]}, False),
        ({"xtc_probability": 1.0, "order": ["temperature", "xtc"]}, False),
        ({"top_k": 3, "order": LAST}, False),
        ({"order": []}, False),
        ({"xtc_probability": 1.0, "typical_p": 0.5}, False),
    ],
)
def test_greedy_requests_whose_filters_may_drop_the_argmax_are_drawn_here(knobs, ours):
    asked = _asked(engine={"temperature": 0.0}, **knobs)
    assert (asked is not None) == ours
    logits = torch.tensor([[2.0, 1.9, 0.0, -5.0]])  # XTC excludes the first of two
    adaptor = Adaptor(**{"order": "vllm", "temperature": 0.0} | knobs)
    best = int(sample(logits, adaptor, seeds=torch.zeros(1).long()).tokens)
    if "xtc_probability" in knobs or not ours:
        assert best == (1 if ours else 0)
    if ours:
        rows = logits.clone()
        Batch([(0, Row(asked, 0))], rows, None).draw(rows, torch.zeros(1).long(), penalties=True)
        assert int(rows.argmax()) == best


@pytest.mark.parametrize(
    ("seed", "wrapped"),
    [
        (2**63 - 1, 2**63 - 1), (2**63, -(2**63)), (2**64 - 1, -1), (-(2**63), -(2**63)),
        (-(2**63) - 1, 2**63 - 1), (2**64 + 5, 5),
    ],
)  # fmt: skip
def test_every_seed_of_the_engines_is_taken(seed, wrapped):
    """With n > 1 vLLM gives child i seed + i, which may leave int64."""
    asked = _asked(engine={"seed": seed}, top_p=0.9)
    assert asked.seed == wrapped
    assert _asked(engine={"seed": seed}, seed=wrapped) == _asked(seed=wrapped)
    logits = torch.randn(2, V)
    given = logits.clone()
    rows = [Row(asked, asked.seed), Row(_asked(top_p=0.5), 1)]
    Batch(list(enumerate(rows)), logits, None).draw(logits, torch.zeros(2).long(), penalties=True)
    for at, row in enumerate(rows):
        assert _drawn(logits, at) == _alone(row, given[at], 0)


def test_whole_temperatures_of_any_size_are_one_batch():
    rows = [Row(_asked(temperature=10**30), 0), Row(_asked(temperature=2), 1)]
    logits = torch.randn(2, V)
    given = logits.clone()
    Batch(list(enumerate(rows)), logits, None).draw(logits, torch.zeros(2).long(), penalties=True)
    for at, row in enumerate(rows):
        assert _drawn(logits, at) == _alone(row, given[at], 0)


@pytest.mark.parametrize(
    ("engine", "knobs", "message"),
    [
        (
            {},
            {"topp": 0.9},
            r"fastadapt_topp: .*got fastadapt_topp; did you mean fastadapt_top_p\?$",
        ),
        ({}, {"topnsigma": 1}, r"got fastadapt_topnsigma; did you mean fastadapt_top_n_sigma\?$"),
        ({}, {"top_p": 1.5}, r"fastadapt_top_p: expected a value in \[0, 1\], got 1.5"),
        ({}, {"top_p": "0.9"}, "fastadapt_top_p: expected .*got '0.9'"),
        ({}, {"top_p": [0.9, 0.8]}, r"fastadapt_top_p: expected .*got \(0.9, 0.8\)"),
        ({}, {"top_p": torch.ones(1)}, r"fastadapt_top_p: expected a number.*tensor of shape"),
        ({}, {"top_p": None}, r"^fastadapt_top_p: expected a value in \[0, 1\], got None$"),
        ({}, {"top_k": 2.5}, r"^fastadapt_top_k: expected an integer in \[0, 2\*\*31\), got 2.5$"),
        (
            {},
            {"top_k": 10**5000},
            "^fastadapt_top_k: expected an integer in .*, got a value of type",
        ),
        (
            {},
            {"temperature": 10**400},
            "^fastadapt_temperature: expected 0 or a value in .*, got 1000",
        ),
        ({}, {"seed": 10**5000}, "^fastadapt_seed: expected .*, got a value of type int, too long"),
        (
            {},
            {"bias_ids": [1], "bias_values": [-(10**400)]},
            r"^fastadapt_bias_values: expected -1e\+28 to 1e\+28, got -1000",
        ),
        (
            {},
            {"bias_ids": [1], "bias_values": [10**5000]},
            r"^fastadapt_bias_values: expected -1e\+28 to 1e\+28, got a value of type int",
        ),
        ({}, {"bias_ids": [10**5000], "bias_values": [1]}, "^fastadapt_bias_ids: expected 0 to"),
        ({}, {"temperature": True}, "fastadapt_temperature: expected"),
        ({}, {"order": "transformers"}, "fastadapt_order: expected 'hf', 'vllm' or a flat list of"),
        ({}, {"order": [["top_k"]]}, r"fastadapt_order: .* a flat list of .*got \(\['top_k'\],\)"),
        ({}, {"order": 3}, "fastadapt_order: expected 'hf', 'vllm' or a flat list of .*, got 3"),
        ({}, {"order": ["top_q"]}, "fastadapt_order: expected names among .*, got 'top_q'"),
        (
            {"top_p": 0.95},
            {"order": ["xtc", "temperature"], "xtc_probability": 0.5},
            r"^fastadapt_order: expected 'top_p' in it beside top_p=0.95 \(which a server may have "
            r"from the model's generation_config; top_p=1 in the request switches it off\), got",
        ),
        ({"top_k": 2**31}, {"top_p": 0.9}, r"^top_k: expected an integer in .*, got 2147483648$"),
        ({"seed": 1.5}, {"top_p": 0.9}, "^seed: expected an integer, got 1.5"),
        ({}, {"seed": "1"}, "fastadapt_seed: expected an integer, got '1'"),
        ({}, {"seed": 2**63}, "fastadapt_seed: expected"),
        ({"top_p": 0.5}, {"top_p": 0.9}, "fastadapt_top_p=0.9 and top_p=0.5"),
        ({"temperature": 0.0}, {"temperature": 0.9}, "fastadapt_temperature=0.9 and temperature=0"),
        ({"seed": 1}, {"seed": 2}, "fastadapt_seed=2 and seed=1"),
        ({"top_k": 5}, {"top_k": 6}, "fastadapt_top_k=6 and top_k=5"),
        ({"min_p": 0.5}, {"min_p": 0.1}, "fastadapt_min_p=0.1 and min_p=0.5"),
        ({"n": 2}, {"seed": 2}, "fastadapt_seed: expected the engine's seed with n > 1"),
        ({}, {"bias_ids": [1]}, "fastadapt_bias_values: expected as many as bias_ids, 1, got 0"),
        ({}, {"bias_ids": 1, "bias_values": [1.0]}, "fastadapt_bias_ids: expected a list of ids"),
        (
            {},
            {"bias_ids": [1], "bias_values": "1"},
            "fastadapt_bias_values: expected a list of num",
        ),
        ({}, {"bias_ids": [1, 1], "bias_values": [1.0, 2.0]}, "expected each id once, got 1 twice"),
        ({}, {"bias_ids": [-1], "bias_values": [1.0]}, "fastadapt_bias_ids: expected"),
        ({}, {"bias_ids": [1.5], "bias_values": [1.0]}, "fastadapt_bias_ids: expected an integer"),
        ({}, {"bias_ids": [1], "bias_values": [float("inf")]}, "fastadapt_bias_values: expected"),
        ({}, {"bias_ids": [1], "bias_values": [float("nan")]}, "fastadapt_bias_values: expected"),
        ({}, {"support_id": 7}, "^fastadapt_support_id: expected a text of 1 to 256 bytes, got 7"),
        (
            {},
            {"support_id": ""},
            "^fastadapt_support_id: expected a text of 1 to 256 bytes, got ''",
        ),
        ({}, {"support_id": "ä" * 129}, "^fastadapt_support_id: expected a text of 1 to 256 bytes"),
        (
            {"n": 3},
            {"support_id": "a"},
            "^fastadapt_support_id: expected n=1.*got n=3; send 3 requests, each with an id of its",
        ),
        (
            {"repetition_penalty": 1.1},
            {"bias_ids": [1], "bias_values": [1.0]},
            "expected no repetition_penalty beside it .*got repetition_penalty=1.1",
        ),
        ({"repetition_penalty": 1e-30}, {"top_p": 0.9}, "repetition_penalty: expected"),
        ({"repetition_penalty": -1.0}, {"top_p": 0.9}, "repetition_penalty: expected"),
    ],
)
def test_what_cannot_be_is_refused(engine, knobs, message):
    with pytest.raises(ValueError, match=message):
        _asked(engine=engine, **knobs)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"fastadapt": "{"}, "fastadapt: expected a JSON object, got '{'"),
        ({"fastadapt": "[1]"}, r"fastadapt: expected a JSON object, got \[1\]"),
        ({"fastadapt": "[" * 100_000}, "fastadapt: expected a flat JSON object, got '"),
        (
            {"fastadapt": f'{{"top_k": {"9" * 5000}}}'},
            "^fastadapt: expected a JSON object with each",
        ),
        (
            {"fastadapt": f'{{"bias_ids": [1], "bias_values": [{"9" * 400}]}}'},
            "^fastadapt_bias_values: expected",
        ),
        ({"fastadapt": '{"top_p": 0.9, "top_p": 0.8}'}, "^fastadapt: .* with each key once"),
        ({"fastadapt": {1: 2}}, "^fastadapt_1: expected one of"),
        ({"fastadapttop_p": 0.9}, r"^fastadapttop_p: .*; did you mean fastadapt_top_p\?$"),
        ({"fastadapt": 3}, "fastadapt: expected a JSON object, got 3"),
        ({"fastadapt": '{"top_p": 0.9}', "fastadapt_top_p": 0.9}, "expected it once, got it in"),
        ({"fastadapt_": 1}, "fastadapt_: expected one of"),
        ({"fastadapt-top-p": 0.9}, "fastadapt-top-p: expected one of"),
    ],
)
def test_keys_that_cannot_be_are_refused(extra, message):
    with pytest.raises(ValueError, match=message):
        requested(Params(extra_args=extra))


def test_keys_that_are_no_strings_are_not_ours():
    asked = requested(Params(extra_args={1: 2, "fastadapt_top_p": 0.9}))
    assert asked == _asked(top_p=0.9)


def test_an_order_beside_the_engines_neutral_values_is_taken():
    asked = _asked(engine={"top_p": 1.0, "top_k": -1}, order=["xtc"], xtc_probability=0.5)
    assert asked.adaptor == Adaptor(order=("xtc",), xtc_probability=0.5)


def test_an_empty_object_asks_for_the_draw():
    asked = requested(Params(extra_args={"fastadapt": "{}"}, top_p=0.8))
    assert asked.adaptor == Adaptor(top_p=0.8, order="vllm")


def test_the_page_has_keys_that_are_taken():
    """Its request by HTTP, and each key and knob of vLLM's that it names."""
    page = (Path(__file__).parents[1] / "docs" / "engines.md").read_text(encoding="utf-8")
    (body,) = re.findall(r"-d '(\{.*?\})'\n", page, re.DOTALL)
    request = json.loads(body)
    asked = requested(
        Params(
            temperature=request["temperature"],
            seed=request["seed"],
            extra_args=request["vllm_xargs"],
        )
    )
    assert asked.bias == {198: -2.0} and asked.adaptor.typical_p == 0.95
    (order,) = re.findall(r"```json\n\"vllm_xargs\": (\{.*?\})\n```", page, re.DOTALL)
    asked = requested(Params(extra_args=json.loads(order)))
    assert asked.adaptor.order == ("top_n_sigma", "xtc", "temperature")
    (row,) = re.findall(r"\| `fastadapt_order` \| (.*)", page)
    named = re.findall(r"`(\w+)`", row.split("first or last")[0])
    assert tuple(named) == (*FILTERS, "temperature")
    for name in re.findall(r"fastadapt_(\w+)", page):
        assert name in (*KNOBS, *_request.BESIDE, FOLDER.removeprefix("fastadapt_")), name
    for name in (*_request.ENGINE, *(f"{penalty}_penalty" for penalty in _request.PENALTIES)):
        assert f"`{name}`" in page, name


def _row(rng: random.Random, *, engine: dict[str, Any] | None = None, **knobs: Any) -> Row:
    prompt = [rng.randrange(V) for _ in range(rng.randint(0, 9))]
    output = [rng.randrange(V) for _ in range(rng.randint(0, 5))]
    seed = rng.randrange(-(2**63), 2**63)
    return Row(_asked(engine=engine, **knobs), seed, prompt, output, len(prompt))


PENALISED = {"repetition_penalty": 1.3, "presence_penalty": 0.2, "frequency_penalty": 0.4}


def _edits(row: Row, penalties: bool = True) -> Edits:
    """The changes of one row's logits, made anew from the whole text."""
    bias = {i: x for i, x in row.request.bias.items() if i < V}
    made = Edits.from_rows([bias], "pre")
    if penalties and row.request.penalised:
        tokens = torch.tensor([[*row.prompt, *row.output]], dtype=torch.int64)
        history = History(tokens, prompt_length=len(row.prompt))
        request = row.request
        made += history.edits(
            repetition=request.repetition,
            presence=request.presence,
            frequency=request.frequency,
            counts="output",
        )
    return made


def _alone(row: Row, logits: torch.Tensor, position: int, penalties: bool = True) -> int:
    """The token of one row by the reference, which knows no batch."""
    drawn = reference.sample(
        logits[None].clone(),
        row.request.adaptor,
        seeds=torch.tensor([row.seed]),
        positions=torch.tensor([position]),
        edits=_edits(row, penalties),
    )
    return int(drawn.tokens[0])


def _rows(rng: random.Random) -> list[Row]:
    """Rows of every kind: three orders and knobs, penalties, biases."""
    return [
        _row(rng, top_p=0.9),
        _row(rng, engine=PENALISED, top_p=0.5, temperature=1.5),
        _row(rng, typical_p=0.8, bias_ids=[1, 5, V + 3], bias_values=[2.0, -float("inf"), 9.0]),
        _row(rng, engine=PENALISED, order="hf", min_p=0.01, top_k=30),
        _row(rng, order="hf", epsilon_cutoff=1e-3, top_k=40),
        _row(rng, bias_ids=[0], bias_values=[3.0], temperature=0),
        _row(rng, engine={"frequency_penalty": 1.5}, eta_cutoff=1e-3),
        _row(rng, engine={"presence_penalty": 1.5}, bias_ids=[7], bias_values=[0.1], top_p=0.95),
    ]


def _drawn(logits: torch.Tensor, at: int) -> int:
    """The token of a one-hot row."""
    row = logits[at]
    token = int(row.argmax())
    assert row[token] == 0 and int((row == float("-inf")).sum()) == V - 1
    return token


@pytest.mark.parametrize("mixed", [False, True])
def test_a_batch_draws_each_row_as_if_it_were_alone(mixed):
    rng = random.Random(0)
    rows = _rows(rng)
    places = range(1, 2 * len(rows), 2) if mixed else range(len(rows))
    placed = list(zip(places, rows, strict=True))
    logits = 2 * torch.randn(placed[-1][0] + 1, V)
    given = logits.clone()
    positions = torch.tensor([len(row.output) for row in rows])
    Batch(placed, logits, None).draw(logits, positions, penalties=True)
    for at, row in placed:
        assert _drawn(logits, at) == _alone(row, given[at], len(row.output))
    others = sorted(set(range(len(logits))) - set(places))
    assert torch.equal(logits[others], given[others])


def test_rows_of_one_order_are_one_call(monkeypatch):
    rng = random.Random(1)
    placed = list(enumerate(_rows(rng)))
    calls = []

    def counted(logits: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        calls.append(len(logits))
        return sample(logits, *arguments, **options)

    monkeypatch.setattr("fastadapt.vllm._batch.sample", counted)
    logits = torch.randn(len(placed), V)
    zeros = torch.zeros(len(placed), dtype=torch.int64)
    Batch(placed, logits, None).draw(logits, zeros, penalties=True)
    assert sorted(calls) == [2, len(placed) - 2]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_without_a_token_is_nan_and_disturbs_no_other(bad):
    rng = random.Random(2)
    rows = [_row(rng, top_p=0.9) for _ in range(3)]
    logits = torch.randn(3, V)
    given = logits.clone()
    logits[1] = bad
    zeros = torch.zeros(3, dtype=torch.int64)
    Batch(list(enumerate(rows)), logits, None).draw(logits, zeros, penalties=True)
    assert bool(logits[1].isnan().all())
    for at in (0, 2):
        assert _drawn(logits, at) == _alone(rows[at], given[at], 0)


@pytest.mark.parametrize("penalty", [1e-20, 0.5, 1.0, 2.0, 1e20])
def test_one_hot_rows_survive_what_the_engine_does_later(penalty):
    """Its penalties, temperature, min-p and softmax leave the token the probability 1."""
    logits = torch.randn(1, V)
    row = _row(random.Random(3), top_p=0.9)
    Batch([(0, row)], logits, None).draw(logits, torch.zeros(1).long(), penalties=True)
    token = _drawn(logits, 0)
    after = logits * torch.where(logits > 0, 1.0 / penalty, penalty)
    after = (after - 2.0 * 1000 - 2.0) / 0.01
    probs = after.softmax(-1)
    assert float(probs[0, token]) == 1 and float(probs.sum()) == 1


def test_texts_follow_rows_that_come_go_and_change_places():
    """The lists are those of histories made anew, whatever happened before."""
    rng = random.Random(4)
    texts, rows = Texts(V), []
    for _ in range(150):
        what = rng.random()
        if what < 0.25 or not rows:
            engine = PENALISED if rng.random() < 0.7 else {}
            rows.insert(rng.randint(0, len(rows)), _row(rng, engine=engine, top_p=0.9))
        elif what < 0.35:
            rows.pop(rng.randrange(len(rows)))
        elif what < 0.45:
            rng.shuffle(rows)
        elif what < 0.5:
            del rows[rng.randrange(len(rows))].output[-2:]  # tokens are taken back
        for row in rows:
            row.output.extend(rng.randrange(V) for _ in range(rng.choice((0, 1, 1, 1, 2))))
        found = texts.edits(rows)
        if not any(row.request.penalised for row in rows):
            assert found is None
            continue
        assert found.rows == len(rows)
        for at, row in enumerate(rows):
            wanted, begin, end = _edits(row), int(found.offsets[at]), int(found.offsets[at + 1])
            assert torch.equal(found.ids[begin:end], wanted.ids)
            assert torch.equal(found.columns[:, begin:end], wanted.columns)


def test_tokens_to_come_are_read_when_they_are_there():
    """With asynchronous scheduling -1 stands for a token that is still on the device."""
    row = _row(random.Random(5), engine=PENALISED, top_p=0.9)
    texts = Texts(V)
    texts.edits([row])
    known = list(row.output)
    row.output.append(-1)
    assert torch.equal(
        texts.edits([row]).columns, _edits(Row(row.request, 0, row.prompt, known)).columns
    )
    row.output[-1] = 3
    assert torch.equal(texts.edits([row]).ids, _edits(row).ids)


def test_ids_beyond_the_vocabulary_have_no_logit():
    row = Row(_asked(engine=PENALISED, top_p=0.9), 0, [V + 5, 2], [3], 2)
    assert Texts(V).edits([row]).ids.tolist() == [2, 3]


def _config(*, replica: int = 0, rank: int = 0, folder: Path | None = None, **changed: Any) -> Any:
    model = {"logprobs_mode": "raw_logprobs", "seed": 0} | changed
    parallel = SimpleNamespace(
        data_parallel_rank=replica,
        rank=rank,
        tensor_parallel_size=2,
        prefill_context_parallel_size=1,
    )
    return SimpleNamespace(
        model_config=SimpleNamespace(**model),
        parallel_config=parallel,
        additional_config={} if folder is None else {FOLDER: str(folder)},
    )


@pytest.fixture
def vllm() -> Any:
    """The interfaces as they are installed."""
    pytest.importorskip("vllm", reason="vLLM's own interfaces: needs vllm")
    from vllm import SamplingParams
    from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality
    from vllm.v1.worker.gpu.sample.logits_processor import interface

    from fastadapt.vllm import FusedSampler

    return SimpleNamespace(
        FusedSampler=FusedSampler,
        SamplingParams=SamplingParams,
        BatchUpdate=BatchUpdate,
        MoveDirectionality=MoveDirectionality,
        second=interface,
    )


def test_the_class_is_of_both_interfaces(vllm):
    from vllm.v1.sample.logits_processor import _load_custom_logitsprocs
    from vllm.v1.worker.gpu.sample.logits_processor import loader

    place = "fastadapt.vllm:FusedSampler"
    assert _load_custom_logitsprocs([place]) == [vllm.FusedSampler]
    assert loader._load_v2_logitsprocs([place]) == [vllm.FusedSampler]
    validate = loader.build_custom_logits_processors_params_validator([place])
    validate(vllm.SamplingParams(extra_args=_keys(top_p=0.9)))
    with pytest.raises(Exception, match="fastadapt_top_p: expected .*got 2"):
        validate(vllm.SamplingParams(extra_args=_keys(top_p=2)))


@pytest.mark.parametrize("mode", ["processed_logprobs", "processed_logits"])
def test_processed_logprobs_are_refused(vllm, mode):
    with pytest.raises(ValueError, match=f"logprobs_mode: expected raw_.*got {mode}"):
        vllm.FusedSampler(_config(logprobs_mode=mode), torch.device("cpu"), False)


@pytest.mark.parametrize(
    ("additional", "message"),
    [
        (
            {"fastadapt_support": "/tmp"},
            "^additional_config: expected fastadapt_support_folder, got fastadapt_support$",
        ),
        ({FOLDER: "here"}, f"^{FOLDER}: expected the absolute path of a folder, got 'here'"),
        ({FOLDER: None}, f"^{FOLDER}: expected the absolute path of a folder, got None"),
        ({FOLDER: "/dev/null/x"}, f"^{FOLDER}: expected a folder, got '/dev/null/x'"),
    ],
)
def test_folders_that_cannot_be_are_refused(vllm, additional, message):
    config = _config()
    config.additional_config = additional
    with pytest.raises(ValueError, match=message):
        vllm.FusedSampler(config, torch.device("cpu"), False)


@pytest.mark.parametrize("additional", [{}, {"other": 1, 2: 3}, object()])
def test_other_additional_config_is_not_ours(vllm, additional):
    config = _config()
    config.additional_config = additional
    vllm.FusedSampler(config, torch.device("cpu"), False)


def test_a_folder_is_its_owners(vllm, tmp_path):
    _first(vllm, folder=tmp_path / "a" / "b")
    assert stat.S_IMODE((tmp_path / "a" / "b").stat().st_mode) == 0o700


def _first(vllm: Any, **changed: Any) -> Any:
    return vllm.FusedSampler(_config(**changed), torch.device("cpu"), False)


def test_penalties_are_those_that_vllm_applies(vllm):
    """Its rule on its own tensors, but for the rounding of its reciprocal."""
    from vllm.v1.sample.ops.penalties import apply_all_penalties

    rng = random.Random(8)
    known = Row(_asked(engine=PENALISED, top_p=0.9), 0, [*range(9)], [3, 3, 20, 3])
    rows = [known, *(_row(rng, engine=PENALISED, top_p=0.9) for _ in range(3))]
    logits = 3 * torch.randn(len(rows), V)
    most = max(len(row.prompt) for row in rows)
    prompts = [[*row.prompt, *[V] * (most - len(row.prompt))] for row in rows]
    theirs = apply_all_penalties(
        logits.clone(),
        torch.tensor(prompts),
        *(
            torch.tensor([getattr(row.request, name) for row in rows])
            for name in ("presence", "frequency", "repetition")
        ),
        [row.output for row in rows],
    )
    ours = filter_logits(logits, Adaptor(), edits=Texts(V).edits(rows))
    assert not torch.equal(ours, logits)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


ASKED: list[dict[str, Any]] = [
    {"extra_args": _keys(typical_p=0.9), "seed": 1},
    {"extra_args": _keys(top_p=0.8, seed=2), **PENALISED},
    {"top_p": 0.5},
    {"extra_args": _keys(min_p=0.02, seed=3, order="hf"), "temperature": 0.8},
    {"temperature": 0.0, "extra_args": _keys(top_p=0.8)},
    {"extra_args": _keys(top_p=0.7, bias_ids=[4], bias_values=[2.0]), "seed": -5},
]


def test_the_v1_interface_follows_its_batch(vllm):
    """Requests come, go, move and swap; each row is drawn as the request's alone."""
    rng, sampler = random.Random(6), _first(vllm)
    assert not sampler.is_argmax_invariant()
    one_way = vllm.MoveDirectionality.UNIDIRECTIONAL
    swap = vllm.MoveDirectionality.SWAP
    held: dict[int, Any] = {}

    def update(**changes: Any) -> None:
        known = {"removed": (), "added": (), "moved": ()} | changes
        sampler.update_state(vllm.BatchUpdate(batch_size=len(held), **known))

    def step() -> None:
        given = 2 * torch.randn(len(held), V)
        logits = sampler.apply(given.clone())
        for at, (params, prompt, output) in held.items():
            asked = requested(params)
            if asked is None:
                assert torch.equal(logits[at], given[at])
                token = 0
            else:
                row = Row(asked, asked.seed, prompt, output)
                token = _drawn(logits, at)
                assert token == _alone(row, given[at], len(output))
            output.append(token)

    def new(at: int) -> Any:
        params = vllm.SamplingParams(**ASKED[rng.randrange(len(ASKED))])
        held[at] = (params, [rng.randrange(V) for _ in range(4)], [])
        return (at, *held[at])

    update(added=[new(at) for at in range(6)])
    for _ in range(40):
        step()
        what = rng.randrange(5)
        if what == 0:  # one ends and another comes to its place
            update(added=[new(rng.randrange(len(held)))])
        elif what == 1 and len(held) > 2:  # one ends and the last moves there
            at, last = rng.randrange(len(held) - 1), len(held) - 1
            held[at] = held.pop(last)
            update(removed=[at], moved=[(last, at, one_way)])
        elif what == 2:
            update(added=[new(len(held))])
        elif what == 3:
            a, b = rng.sample(range(len(held)), 2)
            held[a], held[b] = held[b], held[a]
            update(moved=[(a, b, swap)])
        else:
            sampler.update_state(None)
    update(removed=list(range(len(held))))
    held.clear()
    nothing = torch.randn(3, V)
    assert sampler.apply(nothing) is nothing


def test_a_preempted_request_goes_on_at_its_position(vllm):
    params = vllm.SamplingParams(**ASKED[1])
    prompt, output = [1, 2, 3], [4, 5, 6, 7]
    given = torch.randn(1, V)
    tokens = []
    for steps in (4, 0):  # held all the time, or again after the tokens that it has
        sampler, kept = _first(vllm), output[: 4 - steps]
        update = {"removed": (), "added": [(0, params, prompt, kept)], "moved": ()}
        sampler.update_state(vllm.BatchUpdate(batch_size=1, **update))
        for at in range(4 - steps, 4):
            sampler.apply(torch.randn(1, V))
            kept.append(output[at])
        tokens.append(_drawn(sampler.apply(given.clone()), 0))
    assert tokens[0] == tokens[1]


def _kept(asked: Any, logits: torch.Tensor, edits: Edits) -> torch.Tensor:
    """What a row keeps, by `filter_logits`."""
    return filter_logits(logits[None], asked.adaptor, edits=edits)[0]


RECORDED: list[dict[str, Any]] = [
    {"extra_args": _keys(typical_p=0.9), "seed": 1},
    {"extra_args": _keys(top_p=0.8, seed=2), **PENALISED},
    {"top_p": 0.5},
    {"extra_args": _keys(min_p=0.02, seed=3, order="hf"), "temperature": 0.8},
    {"temperature": 0.0},
    {"extra_args": _keys(top_p=0.7, bias_ids=[4], bias_values=[2.0])},
    {},
]


class _Told:
    """What requests' rows kept, as the test knows it."""

    def __init__(self) -> None:
        self.number = 0
        self.outputs: dict[str, list[int]] = {}
        self.kept: dict[str, list[torch.Tensor]] = {}

    def params(self, vllm: Any, rng: random.Random) -> Any:
        """A request that asks, or does not."""
        chosen = dict(RECORDED[rng.randrange(len(RECORDED))])
        if rng.random() < 0.7:
            self.number += 1
            extra = _keys(support_id=f"request {self.number}")
            chosen["extra_args"] = chosen.get("extra_args", {}) | extra
        return vllm.SamplingParams(**chosen)

    def compare(self, folder: Path) -> int:
        """All of them with what is recorded; returns how many tokens there are."""
        got = supports(folder, self.outputs)
        for of, one in got.items():
            kept = torch.stack(self.kept[of])
            assert torch.equal(one.support.to_mask(V), kept > -float("inf"))
            law = kept.double().log_softmax(-1).gather(1, one.tokens[:, None])[:, 0]
            torch.testing.assert_close(one.logprobs.double(), law, rtol=0, atol=2e-5)
        assert len(got) <= len(list(folder.iterdir())) <= self.number
        return sum(map(len, self.outputs.values()))


def test_the_v1_interface_records_its_rows(vllm, tmp_path):
    """Of requests that come, go, move, are preempted, and whose prompt is read in parts."""
    rng, told = random.Random(11), _Told()
    sampler = _first(vllm, folder=tmp_path)
    held: dict[int, Any] = {}
    waiting: list[Any] = []

    def update(**changes: Any) -> None:
        known = {"removed": (), "added": (), "moved": ()} | changes
        sampler.update_state(vllm.BatchUpdate(batch_size=len(held), **known))

    def step() -> None:
        given = 2 * torch.randn(len(held), V)
        logits = sampler.apply(given.clone())
        for at, (params, prompt, output, _) in held.items():
            if rng.random() < 0.2:  # a part of a prompt or text: its token is dropped
                continue
            asked = requested(params)
            if asked is not None and asked.support_id is not None:
                row = Row(asked, 0, prompt, output)
                token = _drawn(logits, at)
                told.outputs.setdefault(asked.support_id, []).append(token)
                kept = told.kept.setdefault(asked.support_id, [])
                kept.append(_kept(asked, given[at], _edits(row)))
            output.append(int(logits[at].argmax()))

    def new(at: int) -> Any:
        prompt = [rng.randrange(V) for _ in range(4)]
        held[at] = (told.params(vllm, rng), prompt, [], None)
        return (at, *held[at][:3])

    update(added=[new(at) for at in range(6)])
    for _ in range(60):
        step()
        what, at = rng.randrange(4), rng.randrange(len(held))
        if what == 0:
            update(added=[new(at)])
        elif what == 1:  # preempted for another, and back later
            waiting.append(held[at])
            update(added=[new(at)])
        elif what == 2 and waiting:
            params, prompt, output, _ = held[at] = waiting.pop(0)
            update(added=[(at, params, prompt, output)])
        elif what == 3:
            other = (at + 1) % len(held)
            held[at], held[other] = held[other], held[at]
            update(moved=[(at, other, vllm.MoveDirectionality.SWAP)])
    assert told.compare(tmp_path) > 100


@pytest.mark.parametrize("most", [0, 3])
def test_the_v2_interface_records_its_rows(vllm, tmp_path, most):
    """With drafts that stand or fall, preempted requests, and texts that are read in parts."""
    rng, told = random.Random(12), _Told()
    runner = _Slots(vllm.second, 9)
    sampler = vllm.FusedSampler(_config(folder=tmp_path), runner.states)
    held: dict[int, Any] = {}
    waiting: list[Any] = []

    def admit(slot: int, params: Any, prompt: int, total: int) -> None:
        runner.prompt_len.np[slot], runner.prefill_len.np[slot] = prompt, total
        sampler.add_request(slot, params)
        held[slot] = [params, prompt, total, total]

    def new(slot: int) -> None:
        length = rng.randint(2, 5)
        admit(slot, told.params(vllm, rng), length, length)

    for slot in range(6):
        new(slot)
    for _ in range(60):
        slots = rng.sample(list(held), rng.randint(1, len(held)))
        parts = [rng.random() < 0.2 and held[s][2] == held[s][3] for s in slots]
        drafts = [0 if part else rng.randint(0, most) for part in parts]
        ends = [
            rng.randint(1, held[s][2] - 1) if part else held[s][2]
            for s, part in zip(slots, parts, strict=True)
        ]
        given = 2 * torch.randn(sum(drafts) + len(drafts), V)
        logits = sampler.apply(given.clone(), runner.of(slots, ends, drafts))
        at = 0
        for slot, part, k in zip(slots, parts, drafts, strict=True):
            asked, rows = requested(held[slot][0]), range(at, at + k + 1)
            at += k + 1
            if part:
                continue
            stand = rng.randint(1, k + 1)
            held[slot][2] += stand
            if asked is not None and asked.support_id is not None:
                edits = Edits.from_rows([asked.bias], "pre")
                for i in rows[:stand]:
                    told.outputs.setdefault(asked.support_id, []).append(_drawn(logits, i))
                    kept = told.kept.setdefault(asked.support_id, [])
                    kept.append(_kept(asked, given[i], edits))
        what, slot = rng.randrange(4), rng.randrange(9)
        if what == 0:
            new(slot)
        elif what == 1 and slot in held:
            waiting.append(held.pop(slot))
            new(slot)
        elif what == 2 and waiting:
            admit(slot, *waiting.pop(0)[:3])
    assert told.compare(tmp_path) > 100


def test_the_first_of_the_ranks_records(vllm, tmp_path, monkeypatch):
    """All draw the same tokens; of two replicas of two ranks each the first ones write."""
    params = vllm.SamplingParams(extra_args=_keys(top_p=0.8, support_id="a"), seed=3)
    given, tokens, files = torch.randn(1, V), [], []
    for rank in range(4):
        folder = tmp_path / str(rank)
        sampler = _first(vllm, folder=folder, rank=rank)
        update = {"removed": (), "added": [(0, params, [1], [])], "moved": ()}
        sampler.update_state(vllm.BatchUpdate(batch_size=1, **update))
        tokens.append(_drawn(sampler.apply(given.clone()), 0))
        files.append(len(list(folder.iterdir())))
    assert len(set(tokens)) == 1 and files == [1, 0, 1, 0]


def test_an_engine_without_a_folder_says_so_once(vllm, caplog):
    sampler = _first(vllm)
    params = vllm.SamplingParams(extra_args=_keys(top_p=0.8, support_id="a"))
    added = [(at, params, [1], []) for at in range(3)]
    update = vllm.BatchUpdate(batch_size=3, removed=(), added=added, moved=())
    sampler.update_state(update)
    logits = sampler.apply(torch.randn(3, V))
    assert [_drawn(logits, at) >= 0 for at in range(3)] == [True] * 3
    assert caplog.text.count("fastadapt_support_id: no records") == 1


def test_requests_without_a_seed_differ_and_ranks_agree(vllm):
    params = vllm.SamplingParams(extra_args=_keys(top_p=1.0))
    added = [(at, params, [1], []) for at in range(32)]
    given = torch.zeros(32, V)

    def tokens(**changed: Any) -> list[int]:
        sampler = _first(vllm, **changed)
        update = vllm.BatchUpdate(batch_size=32, removed=(), added=added, moved=())
        sampler.update_state(update)
        return sampler.apply(given.clone()).argmax(-1).tolist()

    assert len(set(tokens())) > 10
    assert tokens() == tokens(seed=None) != tokens(seed=1)
    assert tokens() != tokens(replica=1)


class _Slots:
    """Stand-in of the V2 runner: what `LogitsProcRequestState` and `LogitsContext` hold."""

    def __init__(self, second: Any, slots: int) -> None:
        self.prompt_len, self.prefill_len = (
            SimpleNamespace(np=np.zeros(slots, dtype=np.int32)) for _ in range(2)
        )
        none: Any = None
        self.states = second.LogitsProcRequestState(
            device=torch.device("cpu"), max_num_reqs=slots, vocab_size=V, all_token_ids=none,
            prompt_len=self.prompt_len, prefill_len=self.prefill_len, total_len=none,
        )  # fmt: skip
        self.context = second.LogitsContext

    def of(self, slots: list[int], totals: list[int], drafts: list[int]) -> Any:
        """The layout of a step: tokens of each request so far, and its drafts."""
        of_rows = [slot for slot, k in zip(slots, drafts, strict=True) for _ in range(k + 1)]
        local = [j for k in drafts for j in range(k + 1)]
        pos = [t - 1 + j for t, k in zip(totals, drafts, strict=True) for j in range(k + 1)]
        return self.context(
            expanded_idx_mapping=torch.tensor(of_rows, dtype=torch.int32),
            idx_mapping=torch.tensor(slots, dtype=torch.int32),
            idx_mapping_np=np.array(slots, dtype=np.int32),
            expanded_local_pos=torch.tensor(local, dtype=torch.int32),
            input_ids=torch.zeros(len(of_rows), dtype=torch.int32),
            pos=torch.tensor(pos),
            seq_lens_upper_bound_np=np.array(totals),
        )


@pytest.mark.parametrize("most", [0, 3])
def test_the_v2_interface_follows_its_slots(vllm, most):
    """Rows in any order, slots that are used again, and rows of drafts at their own positions."""
    rng = random.Random(7)
    runner = _Slots(vllm.second, 9)
    sampler = vllm.FusedSampler(_config(), runner.states)
    held: dict[int, Any] = {}

    def admit(slot: int) -> None:
        params = vllm.SamplingParams(**ASKED[rng.randrange(len(ASKED))])
        length = rng.randint(1, 5)
        runner.prompt_len.np[slot] = runner.prefill_len.np[slot] = length
        asked = requested(params)
        assert sampler.add_request(slot, params) == (asked is not None)
        held[slot] = [asked, length, length]

    for slot in range(6):
        admit(slot)
    for _ in range(40):
        slots = rng.sample(list(held), rng.randint(1, len(held)))
        drafts = [rng.randint(0, most) for _ in slots]
        context = runner.of(slots, [held[slot][2] for slot in slots], drafts)
        sampler.apply_staged_writes()
        given = 2 * torch.randn(sum(drafts) + len(drafts), V)
        logits = sampler.apply(given.clone(), context)
        at = 0
        for slot, k in zip(slots, drafts, strict=True):
            asked, prompt, total = held[slot]
            for j in range(k + 1):
                if asked is None:
                    assert torch.equal(logits[at], given[at])
                else:
                    row = Row(asked, asked.seed)
                    expected = _alone(row, given[at], total - prompt + j, penalties=False)
                    assert _drawn(logits, at) == expected
                at += 1
            held[slot][2] += rng.randint(1, k + 1)
        if rng.random() < 0.5:
            slot = rng.randrange(9)
            held.pop(slot, None)
            admit(slot)
