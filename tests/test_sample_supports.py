"""The ids that a draw keeps: those that `filter_logits` leaves, however many, in every call."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from bits import assert_same
from fastadapt import (
    Adaptor,
    Edits,
    Support,
    filter_logits,
    linear_support_log_odds,
    reference,
    sample,
    score,
    support_log_odds,
    verify,
)

INF = float("inf")
KINDS = ["normal", "spread", "flat", "ties", "two_level", "one_hot", "holes", "far", "bf16"]
KNOBS: dict[str, Any] = {
    "top_k": 50,
    "top_p": 0.9,
    "min_p": 0.01,
    "typical_p": 0.9,
    "epsilon_cutoff": 9e-4,
    "eta_cutoff": 9e-4,
}
SUBSETS = [c for n in range(7) for c in itertools.combinations(KNOBS, n)]


def supports(x: Tensor, adaptor: Adaptor, **options: Any) -> Support:
    """That of a draw, whose other fields do not change for it, and that of a score."""
    seeds = torch.arange(len(x))
    drawn = sample(x, adaptor, seeds=seeds, support=True, **options)
    assert drawn.support is not None
    assert_same(drawn._replace(support=None), sample(x, adaptor, seeds=seeds, **options))
    if adaptor.greedy:
        return drawn.support
    tokens = drawn.tokens.clamp(min=0)
    scored = score(x, tokens, [adaptor, Adaptor(), adaptor], support=True, **options)
    alone = score(x, tokens, [adaptor, Adaptor(), adaptor], **options)
    assert_same(scored._replace(supports=None), alone)
    assert scored.supports is not None
    assert scored.supports[0] == scored.supports[2] == drawn.support
    return drawn.support


def left_by(x: Tensor, adaptor: Adaptor, **options: Any) -> Support:
    """That of the filtered logits, of rows that are not bad."""
    left = filter_logits(x, adaptor, **options) > -INF
    good = sample(x, adaptor, seeds=torch.zeros(len(x)).long(), **options).status == 0
    return Support.from_mask(left & good[:, None])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("v", [1, 33, 1000, 5000])
def test_they_are_what_the_filters_leave(rows, cpu_capability, kind, v):
    for i, names in enumerate(SUBSETS):
        x = rows(kind, 3, v).to((torch.float32, torch.bfloat16, torch.float16)[i % 3])
        x[0, v // 2] = (0.0, -INF, INF, float("nan"))[i % 4]
        keep = (1, 1, 3)[i % 3]
        knobs = {name: KNOBS[name] for name in names}
        adaptor = Adaptor(**knobs, temperature=1 - i % 2 / 4, min_tokens_to_keep=keep)
        assert supports(x, adaptor) == left_by(x, adaptor), adaptor


def test_knobs_of_rows(rows, cpu_capability, per_row_adaptor):
    for kind in KINDS:
        adaptor = per_row_adaptor(20, 3000)
        x = rows(kind, 20, 3000)
        assert supports(x, adaptor) == left_by(x, adaptor)


@pytest.mark.parametrize("v", [128_256, 262_144])
def test_long_rows_on_many_threads(rows, num_threads, v):
    for kind, knobs in itertools.product(
        ("spread", "near_flat", "ties"), ({"top_p": 0.9}, {"top_k": 9000}, {"typical_p": 0.9})
    ):
        x, adaptor = rows(kind, 1, v), Adaptor(**knobs)
        wanted = left_by(x, adaptor)
        for threads in (1, 3, 8):
            num_threads(threads)
            assert supports(x, adaptor) == wanted
            assert sample(x.expand(9, v), adaptor, support=True).support == Support.cat(
                [wanted] * 9
            )


@pytest.mark.parametrize("knobs", [{"top_k": 90}, {"top_p": 1 - 1e-12}, {"min_tokens_to_keep": 90}])
def test_tokens_without_mass_are_among_them(knobs, cpu_capability):
    """Below e^-28 of the largest a token weighs nothing, and yet it may be kept."""
    x = -torch.arange(3000.0).mul(0.5).repeat(4, 1)[:, torch.randperm(3000)]
    adaptor = Adaptor(**{"top_p": 0.5, **knobs}, order="vllm")
    assert supports(x, adaptor) == left_by(x, adaptor)
    drawn = sample(x, Adaptor(**{"top_k": 90, **knobs}), support=True)
    assert int(drawn.support.counts.min()) >= int(drawn.kept.min())


def test_a_row_that_keeps_all_stores_none(rows):
    x = rows("normal", 6, 500)
    x[1, 3], x[2, 0] = -INF, float("nan")
    support = sample(x, Adaptor(temperature=0.7), support=True).support
    assert support.full.tolist() == [True, False, False, True, True, True]
    assert support.counts.tolist() == [0, 499, 0, 0, 0, 0]
    greedy = sample(x[:2], Adaptor(temperature=0.0), support=True)
    assert greedy.support.ids.tolist() == greedy.tokens.tolist()
    assert sample(x[:1, :1], Adaptor(temperature=0.0), support=True).support.full.tolist() == [True]


def test_edits_masks_and_padding(rows, cpu_capability):
    n, v, real = 5, 1000, 990
    ids = torch.arange(0, v, 7).int()[: real // 7].repeat(n)
    offsets = torch.arange(n + 1) * (real // 7)
    edits = Edits(
        ids, offsets, post=torch.where(torch.rand(len(ids)) < 0.2, -INF, torch.randn(len(ids)) * 4)
    )
    allowed = torch.randint(-(2**31), 2**31 - 1, (n, -(-v // 32))).int()
    for kind, knobs in itertools.product(KINDS, ({}, {"top_p": 0.9}, {"top_k": 40, "min_p": 0.02})):
        x, adaptor = rows(kind, n, v), Adaptor(**knobs)
        for changes in (
            {"edits": edits},
            {"allowed": allowed},
            {"num_tokens": real},
            {"edits": edits, "allowed": allowed[:, : -(-real // 32)], "num_tokens": real},
        ):
            assert supports(x, adaptor, **changes) == left_by(x, adaptor, **changes)
            drawn = sample(x, adaptor, seeds=torch.arange(n), support=True, **changes)
            wanted = reference.sample(x, adaptor, seeds=torch.arange(n), support=True, **changes)
            assert_same(drawn, wanted)


def test_padding_is_not_in_what_a_token_is_scored_on():
    """A row that keeps all real tokens is not full where the head has more."""
    hidden, weight = torch.randn(6, 16), torch.randn(64, 16)
    x, words = hidden @ weight.T, torch.tensor([[-1, (1 << 28) - 1]] * 6).int()
    for changes in ({"num_tokens": 60}, {"allowed": words}):
        drawn = sample(x, Adaptor(), support=True, **changes)
        assert drawn.support.counts.tolist() == [60] * 6
        log_odds = linear_support_log_odds(hidden, weight, drawn.tokens, drawn.support)
        logps = torch.nn.functional.logsigmoid(log_odds)
        torch.testing.assert_close(logps, drawn.logprobs, rtol=0, atol=1e-5)
        scored = score(x, drawn.tokens, [Adaptor()], support=True, **changes)
        assert scored.supports == (drawn.support,)


def test_shapes_and_no_rows():
    x = torch.randn(2, 3, 40)
    drawn = sample(x, Adaptor(top_k=4), support=True)
    assert drawn.support == sample(x.view(6, 40), Adaptor(top_k=4), support=True).support
    assert bool(drawn.support.contains(drawn.tokens.view(-1)).all())
    empty = sample(x[:0], Adaptor(top_k=4), support=True).support
    assert len(empty) == 0 and empty.check(40) is empty
    scored = score(x[:0], torch.empty(0, 3).long(), [Adaptor()], support=True)
    assert [len(s) for s in scored.supports] == [0]
    verified = verify(x[:0], torch.empty(0, 2).long(), Adaptor(), support=True)
    assert len(verified.support) == 0
    ignored = score(x, torch.full((2, 3), -100), [Adaptor(top_k=4)], support=True).supports[0]
    assert ignored.counts.tolist() == [0] * 6 and not bool(ignored.full.any())


def test_they_are_what_a_token_is_scored_on():
    """The sampler's bits on equal rows, from logits and, within rounding, from a head."""
    hidden, weight = torch.randn(200, 64), torch.randn(3000, 64) / 4
    logits = hidden @ weight.T
    adaptor = Adaptor(temperature=0.7, top_p=0.9)
    drawn = sample(logits, adaptor, support=True)
    again = score(logits, drawn.tokens, [adaptor])
    assert torch.equal(again.logprobs[:, 0], drawn.logprobs)
    log_odds = support_log_odds(logits / 0.7, drawn.tokens, drawn.support)
    logps = torch.nn.functional.logsigmoid(log_odds)
    torch.testing.assert_close(logps, drawn.logprobs, rtol=0, atol=2e-6)
    log_odds = linear_support_log_odds(
        hidden, weight, drawn.tokens, drawn.support, logit_scale=1 / 0.7
    )
    logps = torch.nn.functional.logsigmoid(log_odds)
    torch.testing.assert_close(logps, drawn.logprobs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("call", ["sample", "score"])
def test_compiled(call):
    x, seeds = torch.randn(4, 100), torch.arange(4)

    def run(x: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if call == "sample":
            support = sample(x, Adaptor(top_p=0.5), seeds=seeds, support=True).support
        else:
            support = score(x, seeds, [Adaptor(top_p=0.5)], support=True).supports[0]
        return support.ids, support.offsets, support.full

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(x, seeds), run(x, seeds), strict=True):
        assert torch.equal(a, b)


def test_another_default_device_changes_nothing():
    x, seeds = torch.randn(4, 100), torch.arange(4)
    wanted = sample(x, Adaptor(top_p=0.5), seeds=seeds, support=True)
    with torch.device("meta"):
        got = sample(x, Adaptor(top_p=0.5), seeds=seeds, support=True)
    assert_same(got, wanted)


def test_what_is_no_flag_is_refused():
    x = torch.randn(2, 10)
    with pytest.raises(TypeError, match="support: expected True or False"):
        sample(x, Adaptor(), support=1)
    with pytest.raises(TypeError, match="support: expected True or False"):
        score(x, torch.zeros(2).long(), [Adaptor()], support="yes")
    with pytest.raises(TypeError, match="support: expected True or False"):
        verify(x[None], torch.zeros(1, 1).long(), Adaptor(), support=None)
