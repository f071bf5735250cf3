"""Scores of given tokens: closed forms in float64, and consistency with what was drawn."""

import pytest
import torch

from fastadapt import Adaptor, filter_logits, sample, score

pytestmark = pytest.mark.usefixtures("device")

ADAPTORS = [
    Adaptor(),
    Adaptor(temperature=0.7),
    Adaptor(temperature=1.5, top_p=0.9),
    Adaptor(top_k=40),
    Adaptor(temperature=0.7, typical_p=0.8),
    Adaptor(eta_cutoff=1e-3),
    Adaptor(temperature=1.5, min_p=0.05, order="vllm"),
]
CLOSE = {"rtol": 0, "atol": 2e-5}
# five temperatures of six truncations, as in the trade-off study, chains, and minima of tokens
MANY = [
    Adaptor(temperature=t, **knobs)
    for t in (0.5, 0.75, 1.0, 1.25, 1.5)
    for knobs in (
        {"top_k": 50},
        {"top_p": 0.9},
        {"min_p": 0.02},
        {"typical_p": 0.9},
        {"eta_cutoff": 9e-4},
        {"epsilon_cutoff": 3e-4},
        {"top_p": 0.9, "typical_p": 0.5, "top_k": 300},
        {"top_p": 0.5, "min_tokens_to_keep": 70},
        {"typical_p": 0.2, "min_tokens_to_keep": 70},
    )
]


def test_scores_are_those_of_float64(rows):
    for kind in ("normal", "spread", "far", "ties", "holes"):
        x = rows(kind, 6, 3000)
        y = sample(x, Adaptor(temperature=1.5)).tokens
        got = score(x, y, ADAPTORS)
        z = x.double()
        base = z.log_softmax(-1)
        torch.testing.assert_close(
            got.base_logprobs.double(), base.gather(1, y[:, None])[:, 0], **CLOSE
        )
        entropy = torch.special.entr(base.exp()).sum(-1)
        torch.testing.assert_close(got.entropy.double(), entropy, **CLOSE)
        for a, adaptor in enumerate(ADAPTORS):
            s = filter_logits(x, Adaptor(temperature=adaptor.temperature)).double()
            support = filter_logits(x, adaptor) > float("-inf")
            kept = s.masked_fill(~support, float("-inf"))
            logprobs = kept.log_softmax(-1).gather(1, y[:, None])[:, 0]
            torch.testing.assert_close(got.logprobs[:, a].double(), logprobs, **CLOSE)
            assert torch.equal(got.kept[:, a].long(), support.sum(-1))
            if kind != "far":  # z / T in float32 is 1e-3 off z / T in float64 there
                log_norm = kept.logsumexp(-1) - z.logsumexp(-1) / adaptor.temperature
                torch.testing.assert_close(got.log_norm[:, a].double(), log_norm, **CLOSE)


def test_every_sampled_token_is_inside_the_support_it_is_scored_under(rows):
    x = torch.cat([rows(kind, 50, 2000) for kind in ("normal", "ties", "holes", "bf16")])
    for adaptor in ADAPTORS:
        drawn = sample(x, adaptor)
        got = score(x, drawn.tokens, [adaptor])
        assert torch.equal(got.logprobs[:, 0], drawn.logprobs)
        assert torch.equal(got.kept[:, 0], drawn.kept)


def test_many_adaptors_are_each_alone(rows):
    x = rows("spread", 5, 3000)
    y = torch.randint(3000, (5,)).to(x.device)
    together = score(x, y, ADAPTORS)
    for a, adaptor in enumerate(ADAPTORS):
        alone = score(x, y, [adaptor])
        for name in ("logprobs", "log_norm", "kept"):
            assert torch.equal(getattr(together, name)[:, a], getattr(alone, name)[:, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "kind", ["normal", "spread", "far", "flat", "ties", "holes", "power", "two_level", "one_hot"]
)
def test_a_row_in_pieces_gives_what_each_adaptor_alone_does(rows, cpu_capability, kind, dtype):
    for v in (1024, 9000):
        x = rows(kind, 1, v).to(dtype).expand(6, v)
        # two tokens that were drawn, and of the 90 % that are kept at temperature 1 the last four:
        # of equal logits some stay, and it is by id that they do
        order = x[0].float().argsort(descending=True, stable=True)
        kept = int(score(x[:1], order[:1], [Adaptor(top_p=0.9)]).kept)
        near = order[torch.arange(kept - 2, kept + 2, device=x.device).clamp(0, v - 1)]
        y = torch.cat([sample(x[:2], Adaptor()).tokens, near])
        together = score(x, y, MANY)
        for a, adaptor in enumerate(MANY):
            alone = score(x, y, [adaptor])
            for name in ("logprobs", "log_norm", "kept"):
                assert torch.equal(getattr(together, name)[:, a], getattr(alone, name)[:, 0])


def test_logits_that_scaling_makes_equal_keep_the_order_of_their_ids(device, cpu_capability):
    """Neighbouring floats fall together when they are scaled, also where they are in two pieces."""
    v = 2000
    x = torch.tensor(1.0) + torch.arange(v) % 97 * 2.0**-23
    x = x[torch.randperm(v)].to(device).expand(v, v)
    adaptors = [Adaptor(temperature=t, top_p=p) for t in (0.7, 1.3, 1.9) for p in (0.3, 0.6, 0.9)]
    got = score(x, torch.arange(v, device=device), adaptors)
    for a, adaptor in enumerate(adaptors):
        support = filter_logits(x[0], adaptor) > float("-inf")
        assert torch.equal(got.logprobs[:, a].isfinite(), support)


def test_identity_of_truncation_and_temperature(rows):
    """log q = log p / T - log Z_t for a token inside the support (arXiv 2406.10203)."""
    x = rows("spread", 64, 2000)
    y = sample(x, Adaptor(top_k=5)).tokens
    got = score(x, y, ADAPTORS)
    for a, adaptor in enumerate(ADAPTORS):
        inside = got.logprobs[:, a].isfinite()
        assert inside.any()
        predicted = got.base_logprobs / adaptor.temperature - got.log_norm[:, a]
        torch.testing.assert_close(got.logprobs[inside, a], predicted[inside], rtol=0, atol=4e-5)


def test_ignored_rows_are_zero_and_outside_is_minus_infinity(rows):
    x = rows("spread", 3, 100)
    y = torch.tensor([-100, int(x[1].argmin()), int(x[2].argmax())], device=x.device)
    got = score(x, y, [Adaptor(top_k=3)])
    for field in got[:5]:
        assert (field[0] == 0).all()
    assert got.logprobs[1, 0] == float("-inf")
    assert got.logprobs[2, 0] > -5
    last = torch.tensor([1, 2, -1], device=x.device)
    assert score(x, last, [Adaptor()], ignore_index=-1).kept[2, 0] == 0


def test_shapes_fold(rows):
    x = rows("spread", 6, 100).view(2, 3, 100)
    got = score(x, torch.zeros(2, 3, dtype=torch.int64, device=x.device), ADAPTORS[:2])
    assert [tuple(t.shape) for t in got[:5]] == [(2, 3, 2)] * 3 + [(2, 3)] * 2
