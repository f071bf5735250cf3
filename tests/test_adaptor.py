"""The adaptor as a value: what it accepts, refuses and packs."""

import pickle
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np
import pytest
import torch

from fastadapt import Adaptor, adapted_log_odds, filter_logits, reference, sample, score

OUT_OF_RANGE = [
    ("temperature", -1.0),
    ("temperature", 1e-7),
    ("temperature", float("inf")),
    ("temperature", float("nan")),
    ("top_k", -1),
    ("top_p", -0.1),
    ("top_p", 1.1),
    ("min_p", 1.5),
    ("typical_p", 0.0),
    ("typical_p", 1.01),
    ("epsilon_cutoff", 1.0),
    ("epsilon_cutoff", -1e-9),
    ("eta_cutoff", 1.0),
    ("min_tokens_to_keep", 0),
]


@pytest.mark.parametrize(("name", "value"), OUT_OF_RANGE)
def test_number_out_of_range_names_argument_and_value(name, value):
    with pytest.raises(ValueError, match=rf"{name}: expected .* got {value}".replace("+", r"\+")):
        Adaptor(**{name: value})


@pytest.mark.parametrize(("name", "value"), OUT_OF_RANGE)
def test_tensor_out_of_range_names_row(name, value):
    good = {"temperature": 1.0, "top_k": 1, "top_p": 0.5, "typical_p": 0.5, "min_tokens_to_keep": 1}
    dtype = torch.int64 if isinstance(value, int) else torch.float64
    knob = torch.tensor([good.get(name, 0), value], dtype=dtype)
    with pytest.raises(ValueError, match=rf"{name}: expected .* in row 1"):
        Adaptor(**{name: knob})


def test_upper_end_of_integers_is_named():
    for name, low in (("top_k", 0), ("min_tokens_to_keep", 1)):
        message = rf"{name}: expected an integer in \[{low}, 2\*\*31\), got 2147483648"
        with pytest.raises(ValueError, match=message):
            Adaptor(**{name: 2**31})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("top_k", 1.5),
        ("top_k", True),
        ("top_k", torch.tensor([1.5])),
        ("top_k", np.float64(3)),
        ("top_k", np.bool_(True)),
        ("top_p", np.bool_(True)),
        ("top_p", np.array([0.9])),
        ("top_p", np.array(0.9)),
        ("top_p", 0.9j),
        ("top_p", [0.5, 0.9]),
        ("min_tokens_to_keep", 2.0),
        ("top_p", None),
        ("top_p", "0.9"),
        ("top_p", torch.tensor([[0.9]])),
        ("top_p", torch.tensor(0.9)),
        ("temperature", torch.tensor([True])),
    ],
)
def test_wrong_type_raises(name, value):
    with pytest.raises(TypeError, match=f"{name}: expected"):
        Adaptor(**{name: value})


@pytest.mark.parametrize(
    ("knobs", "plain"),
    [
        ({"top_p": np.float64(0.9)}, {"top_p": 0.9}),
        ({"top_p": np.float32(0.9)}, {"top_p": float(np.float32(0.9))}),
        ({"min_p": np.float16(0.5)}, {"min_p": 0.5}),
        ({"top_k": np.int64(50)}, {"top_k": 50}),
        ({"min_tokens_to_keep": np.uint8(2)}, {"min_tokens_to_keep": 2}),
        ({"temperature": np.int32(2)}, {"temperature": 2}),
        ({"eta_cutoff": Fraction(1, 4)}, {"eta_cutoff": 0.25}),
    ],
)
def test_numbers_of_other_libraries_become_python_ones(knobs, plain):
    ours = Adaptor(**knobs)
    assert ours == Adaptor(**plain) and hash(ours) == hash(Adaptor(**plain))
    assert repr(ours) == repr(Adaptor(**plain))
    assert type(getattr(ours, next(iter(knobs)))) in (int, float)


@pytest.mark.parametrize("value", [np.float32(1.5), np.float64("nan"), np.int64(-3), 10**400])
def test_numbers_of_other_libraries_have_the_same_ranges(value):
    with pytest.raises(ValueError, match=r"top_p: expected a value in \[0, 1\], got "):
        Adaptor(top_p=value)


def everything(logits):
    """An adaptor made here, and what the verbs and their references say with it."""
    adaptor = Adaptor(temperature=0.7, top_p=0.9, typical_p=0.95, eta_cutoff=1e-3)
    seeds, tokens = logits.argmax(-1), logits.argmax(-1)
    results = []
    for verbs in (
        (filter_logits, sample, score, adapted_log_odds),
        (reference.filter_logits, reference.sample, reference.score, reference.adapted_log_odds),
    ):
        masked, drawn, scored, log_odds = verbs
        results += [masked(logits, adaptor), log_odds(logits, tokens, adaptor)]
        results += drawn(logits, adaptor, seeds=seeds, base_logprobs=True, top_logprobs=2)
        results += scored(logits, torch.where(tokens == 3, -100, tokens), [adaptor] * 2)
    return adaptor, [t for t in results if t is not None]


@pytest.mark.parametrize("how", ["device", "set_default_device"])
@pytest.mark.parametrize("other", ["meta", "cuda"])
def test_another_default_device_changes_nothing(how, other):
    """The numbers are packed on the CPU, where models are built on the meta device too."""
    if other == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device: torch.cuda.is_available() is False")
    logits = torch.randn(5, 40)
    adaptor, wanted = everything(logits)

    def elsewhere():
        if how == "set_default_device":
            torch.set_default_device(other)
            return everything(logits)
        with torch.device(other):
            return everything(logits)

    # A default device is a thread's own; torch 2.8 cannot put back that there was none.
    with ThreadPoolExecutor(1) as thread:
        same, got = thread.submit(elsewhere).result()
    assert same.packed.device.type == "cpu"
    assert same == adaptor
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_another_default_dtype_changes_nothing(dtype):
    logits = torch.randn(5, 40)
    adaptor, wanted = everything(logits)
    torch.set_default_dtype(dtype)
    try:
        same, got = everything(logits)
    finally:
        torch.set_default_dtype(torch.float32)
    assert same == adaptor and same.packed.dtype == torch.float64
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)  # and the same dtype


@pytest.mark.parametrize("order", [None, [1], {}, 3, (None,), torch.zeros(2)])
def test_order_that_is_no_name_is_refused(order):
    with pytest.raises(TypeError, match="order: expected a name or a sequence of names, got "):
        Adaptor(order=order)


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ("sglang", "expected 'hf', 'vllm' or a sequence of names of filters, got 'sglang'"),
        (("top_q",), "got 'top_q'"),
        (("top_p", "top_p"), "expected each name once"),
        (("top_k", "temperature", "top_p"), "expected temperature first or last"),
        (("temperature", "temperature"), "expected each name once"),
        (("top_k",), "expected 'top_p' in it, whose knob is set, got"),
        ((), "expected 'top_p' in it"),
    ],
)
def test_unknown_order_raises(order, message):
    with pytest.raises(ValueError, match=f"order: .*{message}"):
        Adaptor(order=order, top_p=0.9)


def test_orders_of_names():
    a = Adaptor(top_p=0.9, top_k=5, order=["temperature", "top_p", "top_k"])
    assert a.order == ("top_p", "top_k")
    assert a == Adaptor(top_p=0.9, top_k=5, order=("top_p", "top_k"))
    assert a != Adaptor(top_p=0.9, top_k=5) and hash(a) != hash(Adaptor(top_p=0.9, top_k=5))
    last = Adaptor(top_p=0.9, order=("top_p", "temperature"))
    assert last.order == ("top_p", "temperature") and eval(repr(last)) == last
    # the same as a name's, whatever is neutral: kernels know it by that name
    assert Adaptor(top_k=5, order=("top_k",)).filter_code == Adaptor(top_k=5).filter_code
    named = Adaptor(min_p=0.1, top_k=5, order="vllm").filter_code
    assert Adaptor(min_p=0.1, top_k=5, order=("min_p", "top_k", "xtc")).filter_code == named


def test_coins_are_thrown_by_seeds():
    seeds, positions = torch.arange(100), torch.arange(100) % 7
    xtc = Adaptor(xtc_probability=0.3, top_p=0.9)
    tossed = xtc.tossed(seeds, positions)
    assert xtc.has_coin and not tossed.has_coin and tossed.top_p == 0.9
    assert 10 < int(tossed.xtc_probability.sum()) < 50
    assert set(tossed.xtc_probability.tolist()) == {0.0, 1.0}
    assert Adaptor(xtc_probability=1.0).tossed(seeds) == Adaptor(xtc_probability=1.0)
    for given, kind, message in (
        (([1, 2],), TypeError, "seeds: expected an int64 tensor, got"),
        ((seeds, seeds.float()), TypeError, "positions: expected an int64 tensor"),
        ((seeds, seeds[:3]), ValueError, r"positions: expected shape \(100,\), got \(3,\)"),
    ):
        with pytest.raises(kind, match=message):
            xtc.tossed(*given)
    with pytest.raises(ValueError, match="seeds: expected one for each of 2 rows, got 100"):
        Adaptor(xtc_probability=torch.tensor([0.5, 1.0])).tossed(seeds)
    assert xtc.tossed(seeds.view(4, 25), positions.view(4, 25)) == tossed
    with torch.device("meta"):
        assert xtc.tossed(seeds, positions) == tossed


def test_a_tensor_that_changes_later_changes_nothing():
    knob = torch.full((2,), 0.9)
    adaptor = Adaptor(top_p=knob, xtc_probability=1.0)
    before, shown = adaptor.packed.clone(), repr(adaptor)
    knob.fill_(0.05)
    again = adaptor.tossed(torch.arange(2))
    assert repr(adaptor) == shown and torch.equal(again.packed, before)


def test_per_row_lengths_must_agree():
    with pytest.raises(ValueError, match="expected tensors of one length"):
        Adaptor(top_p=torch.tensor([0.5, 0.9]), top_k=torch.tensor([1, 2, 3]))


def test_packed_holds_numbers_once_and_rows_each():
    one = Adaptor(temperature=0.5, top_k=3)
    neutral = [[0]] * 5 + [[0.1]]  # XTC's threshold is of no use without its probability
    assert one.packed.tolist() == [[0.5], [3], [1], [0], [1], [0], [0], [1], *neutral]
    assert one.rows is None
    many = Adaptor(temperature=0.5, top_p=torch.tensor([0.25, 0.75]))
    assert many.packed[0].tolist() == [0.5, 0.5]
    assert many.packed[2].tolist() == [0.25, 0.75]
    assert many.rows == 2


def test_packed_is_a_copy():
    top_p = torch.tensor([0.25, 0.75])
    adaptor = Adaptor(top_p=top_p)
    top_p.fill_(7.0)
    assert adaptor.packed[2].tolist() == [0.25, 0.75]


def test_equality_and_hash_are_those_of_the_knobs():
    assert Adaptor(top_p=0.9) == Adaptor(top_p=0.9)
    assert hash(Adaptor(top_p=0.9)) == hash(Adaptor(top_p=0.9))
    assert Adaptor(top_p=0.9) != Adaptor(top_p=0.9, order="vllm")
    assert Adaptor(top_k=2) != Adaptor(top_k=3)
    rows = torch.tensor([0.5, 0.9])
    assert Adaptor(top_p=rows) == Adaptor(top_p=rows.clone())
    assert Adaptor(top_p=rows) != Adaptor(top_p=rows.flip(0))
    assert Adaptor(top_p=0.9) != "Adaptor(top_p=0.9)"


def test_repr_shows_what_is_not_neutral():
    assert repr(Adaptor()) == "Adaptor()"
    assert repr(Adaptor(top_p=0.9, order="vllm")) == "Adaptor(top_p=0.9, order='vllm')"
    assert "tensor" in repr(Adaptor(top_k=torch.tensor([1, 2])))


def test_made_in_inference_mode_trains_outside() -> None:
    with torch.inference_mode():
        adaptor = Adaptor(top_k=3, temperature=0.5)
    logits = torch.randn(2, 7, requires_grad=True)
    adapted_log_odds(logits, logits.argmax(-1), adaptor).sum().backward()
    assert logits.grad.abs().sum() > 0


def test_copies_stay_behind_when_pickled() -> None:
    adaptor = Adaptor(top_p=0.9)
    meta = torch.device("meta")
    assert adaptor.packed_on(meta) is adaptor.packed_on(meta)
    other = pickle.loads(pickle.dumps(adaptor))
    assert other == adaptor and not other._copies
