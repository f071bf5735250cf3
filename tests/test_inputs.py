"""Bad input raises before any work with what was expected and what came; bad rows get a status."""

import pytest
import torch

from fastadapt import Adaptor, adapted_margins, filter_logits, reference, sample, score

X = torch.randn(3, 10)
Y = torch.zeros(3, dtype=torch.int64)
VERBS = {
    "filter_logits": lambda x, a: filter_logits(x, a),
    "sample": lambda x, a: sample(x, a),
    "score": lambda x, a: score(x, Y, [a]),
    "adapted_margins": lambda x, a: adapted_margins(x, Y, a),
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
    with pytest.raises(TypeError, match="adaptor: expected an Adaptor, got float"):
        VERBS[verb](X, 0.9)
    with pytest.raises(ValueError, match="adaptor: expected per-row knobs of 3 values, got 2"):
        VERBS[verb](X, Adaptor(top_p=torch.tensor([0.5, 0.9])))
    with pytest.raises(ValueError, match="per-row knobs of 3 values, got 1"):
        VERBS[verb](X, Adaptor(top_p=torch.tensor([0.5])))


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
    for n in (-1, 11):
        with pytest.raises(ValueError, match=f"top_logprobs: expected 0 to 10, got {n}"):
            sample(X, Adaptor(), top_logprobs=n)


@pytest.mark.parametrize("verb", ["score", "adapted_margins"])
def test_tokens(verb):
    call = {
        "score": lambda y: score(X, y, [Adaptor()]),
        "adapted_margins": lambda y: adapted_margins(X, y, Adaptor()),
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


def test_temperature_zero_has_no_law_to_score_under():
    with pytest.raises(ValueError, match="score: expected temperature > 0, got 0"):
        score(X, Y, [Adaptor(), Adaptor(temperature=0)])
    with pytest.raises(ValueError, match="score: expected temperature > 0, got 0"):
        reference.score(X, Y, [Adaptor(temperature=0)])
    with pytest.raises(ValueError, match="adapted_margins: expected temperature > 0, got 0"):
        adapted_margins(X, Y, Adaptor(temperature=torch.tensor([1.0, 0.0, 1.0])))


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
    margins = adapted_margins(bad.requires_grad_(), tokens, adaptor)
    (gradient,) = torch.autograd.grad(margins, bad, torch.ones(6, device=device))
    assert margins.isnan().tolist() == [False, *[True] * 4, False]
    assert (gradient[1:5] == 0).all()
    assert gradient.isfinite().all()


def test_scaling_that_overflows_is_status_two(device):
    x = torch.tensor([[1e38, 0.0], [1.0, 0.0]], device=device)
    assert sample(x, Adaptor(temperature=1e-3)).status.tolist() == [2, 0]


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
