"""Bad input raises before any work with what was expected and what came; bad rows get a status."""

import numpy as np
import pytest
import torch

from fastadapt import Adaptor, adapted_log_odds, filter_logits, reference, sample, score

X = torch.randn(3, 10)
Y = torch.zeros(3, dtype=torch.int64)
REFERENCES = (
    reference.sample,
    reference.score,
    reference.filter_logits,
    reference.adapted_log_odds,
)
VERBS = {
    "filter_logits": lambda x, a: filter_logits(x, a),
    "sample": lambda x, a: sample(x, a),
    "score": lambda x, a: score(x, Y, [a]),
    "adapted_log_odds": lambda x, a: adapted_log_odds(x, Y, a),
}


@pytest.mark.parametrize("verb", VERBS)
def test_logits_of_a_wrong_kind(verb):
    call = VERBS[verb]
    with pytest.raises(TypeError, match="logits: expected a Tensor, got list"):
        call([[1.0]], Adaptor())
    floats = "float32, bfloat16( or float16|, float16 or float64)"
    with pytest.raises(TypeError, match=f"logits: expected {floats}, got torch.int64"):
        call(Y[:, None], Adaptor())
    with pytest.raises(
        ValueError, match=r"logits: expected \(..., V\) with V >= 1, got shape \(3, 0\)"
    ):
        call(X[:, :0], Adaptor())
    with pytest.raises(ValueError, match=r"got shape \(\)"):
        call(torch.tensor(1.0), Adaptor())


@pytest.mark.parametrize("verb", ["filter_logits", "sample", "score"])
def test_float64_names_the_reference(verb):
    with pytest.raises(TypeError, match=r"got torch.float64; fastadapt.reference takes it"):
        VERBS[verb](X.double(), Adaptor())


@pytest.mark.parametrize("verb", VERBS)
def test_adaptor_of_a_wrong_kind_or_length(verb):
    name = r"adaptors\[0\]" if verb == "score" else "adaptor"
    with pytest.raises(TypeError, match=f"{name}: expected an Adaptor, got float"):
        VERBS[verb](X, 0.9)
    with pytest.raises(TypeError, match=f"{name}: expected an Adaptor, got list"):
        VERBS[verb](X, [Adaptor()])
    with pytest.raises(ValueError, match=f"{name}: expected per-row knobs of 3 values, got 2"):
        VERBS[verb](X, Adaptor(top_p=torch.tensor([0.5, 0.9])))
    with pytest.raises(ValueError, match="per-row knobs of 3 values, got 1"):
        VERBS[verb](X, Adaptor(top_p=torch.tensor([0.5])))


@pytest.mark.parametrize("name", ["seeds", "positions"])
@pytest.mark.parametrize(
    "value", [[1, None], [2**63], 2**63, -1, (1, 2, 3), [0.5, 1.0, 2.0], 0.5, "7", True, {}]
)
def test_seeds_and_positions_are_tensors(name, value):
    """No list is guessed at: what has to be int64 is made so by whoever knows what it means."""
    before = torch.get_rng_state()
    expected = f"{name}: expected a tensor of torch.int64, got {type(value).__name__}"
    with pytest.raises(TypeError, match=expected):
        sample(X, Adaptor(), **{name: value})
    assert torch.equal(torch.get_rng_state(), before), "no seed was drawn before the refusal"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bool, torch.uint8])
def test_seeds_of_another_dtype(dtype):
    with pytest.raises(TypeError, match=f"seeds: expected a tensor of torch.int64, got {dtype}"):
        sample(X, Adaptor(), seeds=Y.to(dtype))


def test_generator(generator):
    with pytest.raises(TypeError, match="generator: expected a torch.Generator, got int"):
        sample(X, Adaptor(), generator=7)
    with pytest.raises(ValueError, match="generator: expected None beside seeds"):
        sample(X, Adaptor(), seeds=torch.zeros(len(X), dtype=torch.int64), generator=generator)


@pytest.mark.parametrize("verb", ["score", "adapted_log_odds"])
@pytest.mark.parametrize("value", [None, -1.0, "-100", True])
def test_ignore_index_is_an_integer(verb, value):
    call, adaptors = {
        "score": (score, [Adaptor()]),
        "adapted_log_odds": (adapted_log_odds, Adaptor()),
    }[verb]
    with pytest.raises(TypeError, match="ignore_index: expected an integer, got "):
        call(X, Y, adaptors, ignore_index=value)
    with pytest.raises(ValueError, match=f"ignore_index: expected .* got {2**63}"):
        call(X, Y, adaptors, ignore_index=2**63)
    result = call(X, Y, adaptors, ignore_index=np.int64(0))
    assert not (result.logprobs if verb == "score" else result).any(), "all rows are ignored"


@pytest.mark.parametrize("name", ["seeds", "positions"])
def test_seeds_and_positions(name):
    good = {"seeds": Y}
    with pytest.raises(
        TypeError, match=f"{name}: expected a tensor of torch.int64, got torch.int32"
    ):
        sample(X, Adaptor(), **{**good, name: Y.int()})
    with pytest.raises(TypeError, match=f"{name}: expected a tensor of torch.int64, got int"):
        sample(X, Adaptor(), **{**good, name: 5})
    with pytest.raises(ValueError, match=rf"{name}: expected shape \(3,\), got \(2,\)"):
        sample(X, Adaptor(), **{**good, name: Y[:2]})
    with pytest.raises(ValueError, match=f"{name}: expected device cpu, got meta"):
        sample(X, Adaptor(), **{**good, name: Y.to("meta")})


def test_top_logprobs_range():
    for value in (1.0, "2", None, True):
        with pytest.raises(TypeError, match="top_logprobs: expected an integer, got "):
            sample(X, Adaptor(), top_logprobs=value)
    assert sample(X, Adaptor(), top_logprobs=np.int64(2)).top_ids.shape == (3, 2)
    for n in (-1, 11):
        with pytest.raises(ValueError, match=f"top_logprobs: expected 0 to 10, got {n}"):
            sample(X, Adaptor(), top_logprobs=n)


@pytest.mark.parametrize("verb", ["score", "adapted_log_odds"])
def test_tokens(verb):
    call = {
        "score": lambda y: score(X, y, [Adaptor()]),
        "adapted_log_odds": lambda y: adapted_log_odds(X, y, Adaptor()),
    }[verb]
    with pytest.raises(
        ValueError, match=r"tokens: expected ids in \[0, 10\) or -100, got 10 in row=1"
    ):
        call(torch.tensor([0, 10, -5]))
    with pytest.raises(ValueError, match="got -1 in row=2"):
        call(torch.tensor([0, -100, -1]))
    with pytest.raises(TypeError, match="tokens: expected a tensor of torch.int64"):
        call(Y.float())
    with pytest.raises(ValueError, match=r"tokens: expected shape \(3,\), got \(3, 1\)"):
        call(Y[:, None])


def test_temperature_zero_has_no_distribution_to_score_under():
    with pytest.raises(ValueError, match="score: expected temperature > 0, got 0"):
        score(X, Y, [Adaptor(), Adaptor(temperature=0)])
    with pytest.raises(ValueError, match="score: expected temperature > 0, got 0"):
        reference.score(X, Y, [Adaptor(temperature=0)])
    with pytest.raises(ValueError, match="adapted_log_odds: expected temperature > 0, got 0"):
        adapted_log_odds(X, Y, Adaptor(temperature=torch.tensor([1.0, 0.0, 1.0])))


@pytest.mark.parametrize(
    "adaptors", [Adaptor(), None, 0.9, "hf", {"a": Adaptor()}, {Adaptor()}, iter([Adaptor()])]
)
def test_adaptors_of_score_are_a_sequence(adaptors):
    expected = f"adaptors: expected a sequence of Adaptors, got {type(adaptors).__name__}"
    with pytest.raises(TypeError, match=expected):
        score(X, Y, adaptors)


def test_the_wrong_one_of_many_adaptors_is_named():
    for wrong in (None, 0.9, {"top_p": 0.9}, [Adaptor()]):
        expected = rf"adaptors\[1\]: expected an Adaptor, got {type(wrong).__name__}"
        with pytest.raises(TypeError, match=expected):
            score(X, Y, (Adaptor(), wrong))


def test_number_of_adaptors():
    with pytest.raises(ValueError, match="adaptors: expected 1 to 256, got 0"):
        score(X, Y, [])
    with pytest.raises(ValueError, match="adaptors: expected 1 to 256, got 257"):
        score(X, Y, [Adaptor()] * 257)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "adaptor", [Adaptor(), Adaptor(top_k=3, top_p=0.9), Adaptor(typical_p=0.9)]
)
def test_bad_rows_get_a_status_and_disturb_nobody(rows, device, cpu_capability, adaptor, dtype):
    x, seeds = rows("spread", 6, 100).to(dtype), torch.arange(6, device=device)
    clean = sample(x, adaptor, seeds=seeds, base_logprobs=True, top_logprobs=2)
    bad = x.clone()
    bad[1, 99], bad[2, 0], bad[3] = float("nan"), float("inf"), float("-inf")
    bad[4, 5], bad[4, 6] = float("nan"), float("inf")
    got = sample(bad, adaptor, seeds=seeds, base_logprobs=True, log_mass=True, top_logprobs=2)
    assert got.status.tolist() == [0, 1, 2, 3, 1, 0]
    assert got.tokens[1:5].tolist() == [-1] * 4
    assert got.kept[1:5].tolist() == [0] * 4
    assert got.logprobs[1:5].isnan().all()
    assert got.log_mass[1:5].isnan().all()
    assert (got.top_ids[1:5] == -1).all()
    assert got.rank[1:5].tolist() == [0] * 4
    for field in ("tokens", "logprobs", "kept", "base_logprobs", "top_ids", "rank"):
        for r in (0, 5):
            assert torch.equal(getattr(got, field)[r], getattr(clean, field)[r]), field
    masked = filter_logits(bad, adaptor)
    torch.testing.assert_close(masked[1:5], bad[1:5], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(masked[0], filter_logits(x, adaptor)[0])
    tokens = torch.zeros(6, dtype=torch.int64, device=device)
    scored = score(bad, tokens, [adaptor])
    assert scored.logprobs[1:5].isnan().all()
    assert scored.entropy[1:5].isnan().all()
    assert not scored.base_logprobs[[0, 5]].isnan().any()
    log_odds = adapted_log_odds(bad.requires_grad_(), tokens, adaptor)
    (gradient,) = torch.autograd.grad(log_odds, bad, torch.ones(6, device=device))
    assert log_odds.isnan().tolist() == [False, *[True] * 4, False]
    assert (gradient[1:5] == 0).all()
    assert gradient.isfinite().all()


def test_scaling_that_overflows_is_a_bad_row_everywhere(device, cpu_capability):
    """In float32: the row is refused by its status, whichever verb it meets."""
    x = torch.tensor([[1e35, 0.0], [1.0, 0.0], [-1e35, -2e35], [0.0, -1e35]], device=device)
    adaptor, y = Adaptor(temperature=1e-6), torch.zeros(4, dtype=torch.int64, device=device)
    for verbs in ((sample, score, filter_logits, adapted_log_odds), REFERENCES):
        drawn, scored, masked, log_odds = verbs
        got = drawn(x, adaptor, seeds=y)
        assert got.status.tolist() == [2, 0, 3, 0]
        assert got.kept.tolist() == [0, 2, 0, 1], "x / T below the range is -inf: removed"
        many = scored(x, y, [adaptor])
        assert many.logprobs[:, 0].isnan().tolist() == [True, False, True, False]
        assert many.kept[:, 0].tolist() == got.kept.tolist()
        assert log_odds(x, y, adaptor).isnan().tolist() == [True, False, True, False]
        out = masked(x, adaptor)
        assert torch.equal(out[[0, 2]], x[[0, 2]]), "a bad row comes back as it is"
        assert (out > float("-inf")).sum(-1)[[1, 3]].tolist() == [2, 1]


HALVES = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("temperature", [1e-6, 1e-4, 1e-3, 0.7])
@pytest.mark.parametrize(
    "knobs",
    [{}, {"top_k": 4}, {"top_p": 0.9}, {"typical_p": 0.5, "min_tokens_to_keep": 6}, {"min_p": 0.1}],
    ids=str,
)
def test_survivors_are_finite(rows, device, cpu_capability, dtype, temperature, knobs):
    """However small T is: what `sample` counts is what is above -inf."""
    x = torch.cat([rows(kind, 3, 1030) for kind in ("normal", "spread", "ties", "holes")])
    scale = 1e37 * temperature if dtype == torch.bfloat16 else 1  # at the end of its range too
    for moved in (x, x - 90, x + 90):
        z = (moved * scale).to(dtype)
        adaptor = Adaptor(temperature=temperature, **knobs)
        out, drawn = filter_logits(z, adaptor), sample(z, adaptor)
        ok = drawn.status == 0
        assert ok.all() or dtype == torch.float32 or scale != 1
        assert torch.equal((out > float("-inf")).sum(-1)[ok].int(), drawn.kept[ok])
        assert not (out[ok] == float("inf")).any()
        # the distribution of the row is that of its float32 values, as far as the dtype can tell
        wide = filter_logits(z.float(), adaptor)
        assert torch.equal((out > float("-inf"))[ok], (wide > float("-inf"))[ok])
        assert torch.equal(out.cpu(), reference.filter_logits(z.cpu(), adaptor))
        # and the largest is the largest
        top = wide.argmax(-1, keepdim=True)
        assert torch.equal(out.gather(1, top)[ok], out.amax(-1, keepdim=True)[ok])


@pytest.mark.parametrize("dtype", HALVES)
def test_softmax_is_right_where_scaling_leaves_the_range(device, cpu_capability, dtype):
    """Rows whose tokens would all be +inf, or all -inf, or of both signs."""
    most = torch.finfo(dtype).max
    unit = most / 64  # of x; exact
    x = torch.tensor([[2.0, 2.0, 1.0, -2.0], [-2.0, -3.0, -2.0, -4.0], [1.0, -1.0, 0.5, 1.0]])
    adaptor = Adaptor(temperature=1e-2)
    out = filter_logits((x * unit).to(dtype).to(device), adaptor).cpu()
    assert out.isfinite().all()
    wanted = torch.tensor([[0.5, 0.5, 0, 0], [0.5, 0, 0.5, 0], [0.5, 0, 0, 0.5]])
    assert torch.equal(out.float().softmax(-1), wanted)
    # near the end of the range differences still count
    near = torch.tensor([[10.0, 10 - 2**-6, -9.0]], dtype=dtype, device=device)
    if dtype == torch.float16:
        got = filter_logits(near, Adaptor(temperature=1e-4)).cpu()
        assert got.tolist() == [[0.0, -156.25, -65504.0]]


@pytest.mark.parametrize("dtype", HALVES)
def test_rows_within_the_range_are_divided_and_nothing_else(device, cpu_capability, dtype):
    most = torch.finfo(dtype).max
    x = torch.tensor([[most, -most, 0.0], [-most, -most, -most], [1.0, -1.0, 2.0]], dtype=dtype)
    x = x.to(device)
    assert torch.equal(filter_logits(x, Adaptor()), x)
    assert torch.equal(filter_logits(x, Adaptor(temperature=2)), x / 2)
    assert torch.equal(filter_logits(x, Adaptor(temperature=0.5))[2], x[2] * 2)


def test_temperature_zero_is_the_argmax_of_lowest_id(device, cpu_capability):
    x = torch.full((2, 100), -3.0, device=device)
    x[0, [40, 70]], x[1, 99] = 5.0, 6.0
    mixed = Adaptor(temperature=torch.tensor([0.0, 0.5], device=device), top_k=2)
    got = sample(x, Adaptor(temperature=0, top_p=0.1, typical_p=0.2), log_mass=True)
    assert got.tokens.tolist() == [40, 99]
    assert got.logprobs.tolist() == [0.0, 0.0]
    assert got.kept.tolist() == [1, 1]
    assert got.log_mass.tolist() == [0.0, 0.0]
    masked = filter_logits(x, Adaptor(temperature=0))
    assert masked[0, 40] == 5.0
    assert (masked[0] > float("-inf")).sum() == 1
    assert sample(x, mixed).tokens[0] == 40
    assert filter_logits(x, mixed)[1, 99] == 12.0


def test_typical_keeps_its_minimum_where_distances_overflow(device, cpu_capability):
    x = torch.tensor([[3e38, -3e38, -3e38, -3e38]], device=device)
    kept = filter_logits(x, Adaptor(typical_p=0.5, min_tokens_to_keep=2)) > float("-inf")
    assert kept.tolist() == [[True, True, False, False]]
