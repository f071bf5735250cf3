"""Kernels against their PyTorch references, bit for bit: random knobs, rows, sizes and dtypes."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bits import assert_same
from fastadapt import Adaptor, filter_logits, reference, sample, score
from fastadapt._ops.philox import philox
from fastadapt.reference import arithmetic

KINDS = ["normal", "spread", "near_flat", "flat", "ties", "two_level", "one_hot", "holes", "far"]
KINDS += ["huge", "power"]
# around one vector, one block of 1024, the sizes where sampling of pivots starts
SIZES = [
    1,
    2,
    3,
    7,
    8,
    9,
    15,
    16,
    17,
    31,
    33,
    100,
    1000,
    1023,
    1024,
    1025,
    1500,
    2047,
    5000,
    20_000,
]
CHOICES = {
    "temperature": [1.0, 0.7, 1.3, 0.1, 2.5, 0.0, 1e-6, 100.0],
    "top_k": [0, 1, 2, 5, 50, 200, 1000, 10**6],
    "top_p": [0.0, 0.1, 0.5, 0.9, 0.95, 0.999, 0.999999, 1.0, 1e-6],
    "min_p": [0.0, 0.01, 0.1, 0.5, 1.0, 1e-7],
    "typical_p": [0.1, 0.5, 0.9, 0.95, 0.999, 1.0, 1e-6],
    "epsilon_cutoff": [0.0, 1e-5, 3e-4, 0.01, 0.5, 0.99],
    "eta_cutoff": [0.0, 1e-5, 3e-4, 0.01, 0.5, 0.99],
    "min_tokens_to_keep": [1, 2, 3, 10, 70, 5000],
}
INTEGERS = ("top_k", "min_tokens_to_keep")


@st.composite
def adaptors(draw, n, greedy=True):
    """An adaptor with some knobs set, numbers or one value per row."""
    knobs = {}
    for name in draw(st.sets(st.sampled_from(sorted(CHOICES)))):
        values = [v for v in CHOICES[name] if greedy or name != "temperature" or v > 0]
        one = st.sampled_from(values)
        if draw(st.integers(0, 3)) == 0:
            dtype = torch.int64 if name in INTEGERS else torch.float64
            knobs[name] = torch.tensor(draw(st.lists(one, min_size=n, max_size=n)), dtype=dtype)
        else:
            knobs[name] = draw(one)
    return Adaptor(**knobs, order=draw(st.sampled_from(["hf", "vllm"])))


@st.composite
def cases(draw, greedy=True):
    """(kind, n, v, dtype, special, adaptor, seed)"""
    n = draw(st.integers(1, 4))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    special = draw(st.sampled_from([None, None, None, "nan", "inf", "none", "largest", "smallest"]))
    kind, v = draw(st.sampled_from(KINDS)), draw(st.sampled_from(SIZES))
    return kind, n, v, dtype, special, draw(adaptors(n, greedy)), draw(st.integers(0, 2**31))


def make(rows, kind, n, v, dtype, special, seed):
    """The rows of a case; a special value spoils or stretches its first row."""
    torch.manual_seed(seed)
    x = rows(kind, n, v)
    if special is not None:
        values = {"nan": float("nan"), "inf": float("inf"), "largest": 3e38, "smallest": -3e38}
        x[0, seed % v] = values.get(special, 0.0)
        if special == "none":
            x[0] = float("-inf")
    return x.to(dtype).cpu()  # where the reference runs


exhaustive = settings(
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@exhaustive
@given(case=cases(), optional=st.booleans())
def test_sample_and_filter_equal_their_references(rows, on_device, each_capability, case, optional):
    *made, adaptor, seed = case
    x = make(rows, *made, seed)
    n, v = x.shape
    asked = {
        "seeds": torch.randint(-(2**63), 2**63 - 1, (n,)),
        "positions": torch.randint(-(2**63), 2**63 - 1, (n,)),
        "base_logprobs": optional,
        "log_mass": optional,
        "top_logprobs": min(7, v) if optional else 0,
        "support": optional,
    }
    drawn, masked = reference.sample(x, adaptor, **asked), reference.filter_logits(x, adaptor)
    for _ in each_capability():
        assert_same(on_device(sample, x, adaptor, **asked), drawn)
        ours = on_device(filter_logits, x, adaptor)
        assert ours.dtype == masked.dtype
        torch.testing.assert_close(ours, masked, rtol=0, atol=0, equal_nan=True)


@exhaustive
@given(case=cases(greedy=False), data=st.data())
def test_score_equals_its_reference(rows, on_device, each_capability, case, data):
    *made, adaptor, seed = case
    x = make(rows, *made, seed)
    n, v = x.shape
    many = [adaptor, *data.draw(st.lists(adaptors(n, greedy=False), max_size=4))]
    tokens = torch.where(torch.rand(n) < 0.2, -100, torch.randint(v, (n,)))
    asked = {"support": data.draw(st.booleans())}
    expected = reference.score(x, tokens, many, **asked)
    for _ in each_capability():
        assert_same(on_device(score, x, tokens, many, **asked), expected)


# vocabularies of models; the reference sorts each row: every kind at two or three sizes, not at all
LARGE = [
    *((kind, 50_257) for kind in ("normal", "spread", "flat", "ties", "power")),
    *[("normal", 128_256), ("power", 128_256), ("spread", 151_936), ("ties", 151_936)],
    *[("normal", 262_144), ("flat", 262_144)],
]


@pytest.mark.parametrize(("kind", "v"), LARGE)
def test_large_rows_equal_their_references(rows, each_capability, kind, v):
    x = rows(kind, 1, v)
    seeds = torch.tensor([v])
    for adaptor in (
        Adaptor(),
        Adaptor(temperature=0.8, top_p=0.9),
        Adaptor(top_k=v // 3, typical_p=0.9),
        Adaptor(top_p=0.99, min_p=1e-4, epsilon_cutoff=1e-5, min_tokens_to_keep=4),
        Adaptor(min_p=0.02, eta_cutoff=3e-4, order="vllm"),
    ):
        drawn = reference.sample(x, adaptor, seeds=seeds, support=True)
        masked = reference.filter_logits(x, adaptor)
        for _ in each_capability():
            assert_same(sample(x, adaptor, seeds=seeds, support=True), drawn)
            assert torch.equal(filter_logits(x, adaptor), masked)


MANY = [
    Adaptor(temperature=t, **knobs)
    for t in (0.7, 1.0)
    for knobs in (
        {"top_k": 50},
        {"top_k": 9000},
        {"top_p": 0.5},
        {"top_p": 0.95},
        {"min_p": 0.05},
        {"typical_p": 0.2},
        {"typical_p": 0.9},
        {"epsilon_cutoff": 1e-3},
        {"eta_cutoff": 9e-4},
        {"typical_p": 0.3, "min_tokens_to_keep": 9, "epsilon_cutoff": 0.01},
        {"top_k": 200, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.9, "eta_cutoff": 1e-3},
    )
]


@pytest.mark.parametrize("kind", ["normal", "spread", "ties", "holes", "power", "two_level"])
def test_many_adaptors_of_one_temperature_equal_their_references(
    rows, on_device, each_capability, kind
):
    """Adaptors of equal temperature share masses, and many adaptors the row in pieces."""
    x = rows(kind, 2, 30_000).cpu()
    for tokens in (x.argmax(-1), torch.tensor([17, 29_999])):
        expected = reference.score(x, tokens, MANY)
        for _ in each_capability():
            assert_same(on_device(score, x, tokens, MANY), expected)


def test_generator_and_default_seeds_are_those_of_the_reference(rows):
    x = rows("spread", 5, 100)
    for generator in (None, torch.Generator()):
        drawn = []
        for draw in (sample, reference.sample):
            (torch.manual_seed if generator is None else generator.manual_seed)(11)
            drawn.append(draw(x, Adaptor(top_p=0.9), generator=generator).tokens)
        assert torch.equal(*drawn)


def test_reference_takes_the_textbook_form_in_float64(rows):
    """The integer rule and plain float64 probabilities agree away from the thresholds."""
    x = rows("spread", 64, 500)
    y = torch.randint(500, (64,))
    adaptor = Adaptor(temperature=0.9, top_k=300, top_p=0.9, typical_p=0.95, eta_cutoff=1e-3)
    wide, narrow = (reference.score(z, y, [adaptor]) for z in (x.double(), x))
    assert torch.equal(wide.kept, narrow.kept)
    for name in ("logprobs", "log_norm", "base_logprobs", "entropy"):
        torch.testing.assert_close(getattr(wide, name), getattr(narrow, name), rtol=0, atol=2e-5)
    seeds = torch.arange(64)
    drawn = [reference.sample(z, adaptor, seeds=seeds).tokens for z in (x.double(), x)]
    assert torch.equal(*drawn)


def test_a_last_temperature_that_rounds_to_one_divides_nothing():
    """Masses stay relative to the largest logit of the row, which XTC has excluded."""
    logits, seeds = torch.randn(50, 300) * 3, torch.arange(50)
    knobs = {"xtc_probability": 1.0, "xtc_threshold": 0.02, "order": ("xtc", "temperature")}
    adaptor = Adaptor(temperature=1 + 1e-9, **knobs)
    drawn = sample(logits, adaptor, seeds=seeds)
    assert torch.equal(drawn.logprobs, sample(logits, Adaptor(**knobs), seeds=seeds).logprobs)
    wanted = reference.sample(logits, adaptor, seeds=seeds)
    assert torch.equal(drawn.logprobs, wanted.logprobs)


def test_philox_known_answers():
    """The vector of zeros of Random123's philox4x32-10; the others have a counter above 2^96."""
    words = philox(torch.tensor([0]), torch.tensor([0]))
    assert [x.item() for x in words] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_specified_logarithm_and_exponential():
    x = torch.logspace(-12, 18, 10_001, dtype=torch.float64)
    assert (arithmetic.log64(x) - x.log()).abs().max() < 1e-14
    y = torch.linspace(-40, 10, 10_001, dtype=torch.float64)
    assert (arithmetic.exp64(y) / y.exp() - 1).abs().max() < 1e-15
