"""Edits, allowed tokens, a real vocabulary: as if the logits had been so, bit for bit."""

import itertools

import pytest
import torch
from torch import Tensor

from bits import assert_same, same
from fastadapt import (
    Adaptor,
    Edits,
    adapted_log_odds,
    adapted_logps,
    filter_logits,
    reference,
    sample,
    score,
)
from fastadapt.reference.edits import edited

INF = float("inf")
ADAPTORS = (
    Adaptor(),
    Adaptor(temperature=0.7, top_p=0.9),
    Adaptor(top_k=7, min_p=0.05),
    Adaptor(temperature=1.3, typical_p=0.8, eta_cutoff=1e-3, order="vllm"),
    Adaptor(temperature=0.0),
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def some_edits(n: int, v: int, share: float = 0.1, *, given: bool = False) -> Edits:
    """Edits of about a share of the ids of each row, a few of which are bans."""
    listed = torch.rand(n, v) < share
    ids = listed.nonzero()[:, 1].int()
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), listed.sum(1).cumsum(0)])
    pre, post, last = torch.randn(3, len(ids)) * 3
    pre[torch.rand(len(ids)) < 0.05] = -INF
    if given:
        return Edits.set(ids, offsets, pre)
    penalty = torch.rand(len(ids)) + 0.6
    return Edits(ids, offsets, pre=pre, penalty=penalty, post=post, last=last)


def some_words(n: int, v: int) -> Tensor:
    return torch.randint(-(2**31), 2**31, (n, -(-v // 32)), dtype=torch.int64).int()


def choices(n: int, v: int) -> list[dict[str, object]]:
    edits, given, words = some_edits(n, v), some_edits(n, v, given=True), some_words(n, v)
    return [
        {"edits": edits},
        {"edits": given},
        {"allowed": words},
        {"edits": edits, "allowed": words, "num_tokens": v - v // 7},
        {"edits": given, "allowed": words},
        {"num_tokens": v - v // 3},
    ]


def rows_of(dtype: torch.dtype, n: int, v: int) -> Tensor:
    x = torch.randn(n, v) * 3
    x[0, ::5] = -INF
    if n > 2:
        x[1] = 0.0
        x[2, v // 2] = float("nan")
    return x.to(dtype)


@pytest.mark.parametrize("v", [1, 31, 200, 5000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_if_the_logits_were_edited(dtype, v, cpu_capability):
    x, seeds, tokens = rows_of(dtype, 4, v), torch.arange(4), torch.randint(v, (4,))
    asked = {"seeds": seeds, "base_logprobs": True, "log_mass": True, "top_logprobs": min(3, v)}
    for adaptor, changes in itertools.product(ADAPTORS, choices(4, v)):
        if v == 1 and "num_tokens" in changes:
            continue
        y = edited(x, **changes)
        real = changes.get("num_tokens", v)
        found = sample(x, adaptor, **{**asked, "top_logprobs": min(3, real)}, **changes)
        expected = sample(y, adaptor, **{**asked, "top_logprobs": min(3, real)})
        assert_same(found, expected, (adaptor, changes))
        filtered = filter_logits(x, adaptor, **changes)
        assert same(filtered, reference.filter_logits(x, adaptor, **changes)), (adaptor, changes)
        if dtype == torch.float32:
            assert same(filtered, filter_logits(y, adaptor))
        if adaptor.greedy:
            continue
        tokens = tokens.clamp(max=real - 1)
        for a, b in zip(
            score(x, tokens, [adaptor] * 5, **changes), score(y, tokens, [adaptor] * 5), strict=True
        ):
            assert same(a, b), (adaptor, changes)
        assert same(
            adapted_log_odds(x, tokens, adaptor, **changes), adapted_log_odds(y, tokens, adaptor)
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_pass_through(dtype, cpu_capability):
    n, v = 6, 300
    for adaptor, changes in itertools.product(ADAPTORS[:-1], choices(n, v)):
        x = (torch.randn(n, v) * 3).to(dtype)
        tokens = edited(x, **changes).argmax(-1)
        tokens[0] = -100
        given = [e.columns for e in changes.values() if isinstance(e, Edits) and e.sets]
        wanted = [[x.clone().requires_grad_(), *(c.requires_grad_() for c in given)] for _ in "ab"]
        upstream = torch.randn(n)
        got, expected = (
            torch.autograd.grad(call(w[0], tokens, adaptor, **changes), w, upstream)
            for call, w in zip((adapted_log_odds, reference.adapted_log_odds), wanted, strict=True)
        )
        rounding = 2 * torch.finfo(dtype).eps if dtype != torch.float32 else 2e-5
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=rounding, atol=1e-6)


def test_values_alone_have_a_gradient():
    x, ids, offsets = torch.randn(1, 50), torch.tensor([3, 9], dtype=torch.int32), [0, 2]
    values = torch.tensor([2.0, 1.0], requires_grad=True)
    edits = Edits.set(ids, torch.tensor(offsets), values)
    adapted_logps(x, torch.tensor([3]), Adaptor(), edits=edits).sum().backward()
    p = edited(x, edits).detach().softmax(-1)[0, ids.long()]
    torch.testing.assert_close(values.grad, torch.tensor([1.0, 0.0]) - p)


def test_float64_of_the_reference():
    edits, tokens = some_edits(2, 9), torch.tensor([1, 4])
    x = torch.randn(2, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x: reference.adapted_log_odds(x, tokens, Adaptor(top_k=8), edits=edits), x
    )
    with pytest.raises(TypeError, match=r"edits: expected float32.*got torch\.float64"):
        adapted_log_odds(x, tokens, Adaptor(), edits=edits)


def test_the_three_operations_are_rounded_one_by_one():
    x = torch.tensor([[-1.0, 1.0, 3.0, 0.0, -INF]])
    edits = Edits(
        torch.arange(5, dtype=torch.int32),
        torch.tensor([0, 5]),
        pre=torch.tensor([3.0, 0.0, -4.0, 0.0, 5.0]),
        penalty=torch.tensor([1.5, 3.0, 1.1, 2.0, 2.0]),
        post=torch.tensor([0.25, -0.1, 0.0, -1.0, 1.0]),
        last=torch.tensor([0.0, 0.7, 0.0, 0.0, 0.0]),
    )
    third = torch.tensor(1.0) / 3 - 0.1 + 0.7
    wanted = torch.tensor([[2 / 1.5 + 0.25, third, -1.1, -1.0, -INF]])
    assert torch.equal(filter_logits(x, Adaptor(), edits=edits), wanted)


def test_threads_that_share_a_row(num_threads):
    v = 150_000
    x, edits, words = torch.randn(1, v) * 2, some_edits(1, v, 0.01), some_words(1, v)
    changes = {"edits": edits, "allowed": words}
    alone = filter_logits(x, ADAPTORS[1], **changes)
    num_threads(5)
    assert torch.equal(filter_logits(x, ADAPTORS[1], **changes), alone)
    assert torch.equal(alone, filter_logits(edited(x, **changes), ADAPTORS[1]))


def test_many_rows_draw_the_same_tokens():
    """A hundred thousand, of every kind of change."""
    n, v = 17_000, 64
    for dtype, changes in zip(itertools.cycle(DTYPES), choices(n, v), strict=False):
        x = (torch.randn(n, v) * 3).to(dtype)
        adaptor = Adaptor(temperature=0.8, top_p=0.95, min_p=0.01)
        found = sample(x, adaptor, seeds=torch.arange(n), **changes)
        y = edited(x, **changes)
        for a, b in zip(found[:4], sample(y, adaptor, seeds=torch.arange(n))[:4], strict=True):
            assert same(a, b)


def test_nothing_allowed_is_a_row_without_finite_logits():
    x, words = torch.randn(2, 40), torch.zeros(2, 2, dtype=torch.int32)
    words[1, 1] = 1 << 7  # token 39
    drawn = sample(x, Adaptor(top_p=0.5), allowed=words)
    assert drawn.status.tolist() == [3, 0]
    assert drawn.tokens.tolist() == [-1, 39]


def test_a_mask_may_have_the_words_of_the_real_vocabulary():
    x, words = torch.randn(3, 130), some_words(3, 70)
    for adaptor in ADAPTORS[:2]:
        given = {"allowed": words, "num_tokens": 70}
        found = filter_logits(x, adaptor, **given)
        assert torch.equal(found, reference.filter_logits(x, adaptor, **given))
        assert torch.equal(found[:, :70], filter_logits(x[:, :70], adaptor, allowed=words))
        assert (found[:, 70:] == -INF).all()
    with pytest.raises(ValueError, match=r"expected shape \(3, 5\), got \(3, 3\)"):
        filter_logits(x, Adaptor(), allowed=words, num_tokens=97)


def test_leading_dimensions_and_strides():
    x, words = torch.randn(2, 3, 70), some_words(6, 70)
    edits = some_edits(6, 70)
    wide = torch.cat([words, words], 1)[:, :3].view(2, 3, 3)
    found = filter_logits(x, Adaptor(), edits=edits, allowed=wide)
    assert torch.equal(found, edited(x, edits, words.view(2, 3, 3)))
    strided = torch.cat([words, words], 1)[:, 3:]
    assert strided.stride(0) == 6
    assert torch.equal(filter_logits(x.view(6, 70), Adaptor(), allowed=strided), edited(
        x.view(6, 70), allowed=words
    ))  # fmt: skip


def test_sums_of_edits():
    x = torch.randn(3, 20) * 2

    def of(column: str, number: float, ids: tuple[int, ...] = (1, 2, 3)) -> Edits:
        return Edits.from_rows([dict.fromkeys(ids, number)] * 3, column)

    cases = [
        of("pre", 0.3) + of("penalty", 1.7, (2, 3, 4)) + of("post", -0.6, (3, 4, 5)),
        of("penalty", 1.7) + of("pre", 0.1),  # which comes after, as post
        of("post", 0.3) + of("post", 0.4),  # before and after a penalty of 1
        of("post", 0.3) + of("penalty", 0.7),
        of("pre", -INF, (1,)) + of("pre", 0.1) + of("post", 0.1),
        of("pre", 0.1) + of("pre", 0.2) + of("pre", -INF),
        of("pre", 0.1, (7,)) + of("penalty", 1.1, (9,)),
        of("penalty", 1.7) + of("post", -0.1) + of("post", -0.7),
        of("pre", 0.1) + of("last", 0.3) + of("post", 0.7),
    ]
    parts = [
        [of("pre", 0.3), of("penalty", 1.7, (2, 3, 4)), of("post", -0.6, (3, 4, 5))],
        [of("penalty", 1.7), of("pre", 0.1)],
        [of("post", 0.3), of("post", 0.4)],
        [of("post", 0.3), of("penalty", 0.7)],
        [of("pre", -INF, (1,)), of("pre", 0.1), of("post", 0.1)],
        [of("pre", 0.1), of("pre", 0.2), of("pre", -INF)],
        [of("pre", 0.1, (7,)), of("penalty", 1.1, (9,))],
        [of("penalty", 1.7), of("post", -0.1), of("post", -0.7)],
        [of("pre", 0.1), of("last", 0.3), of("post", 0.7)],
    ]
    for whole, steps in zip(cases, parts, strict=True):
        y = x
        for step in steps:
            y = edited(y, step)
        assert torch.equal(edited(x, whole), y), steps
    for more in (["penalty"], ["post", "pre", "last"]):
        with pytest.raises(ValueError, match="for id 1 in row 0"):
            sum((of(column, 1.3) for column in more), start=of("penalty", 1.2))
    with pytest.raises(ValueError, match="for id 1 in row 0"):
        of("pre", 0.1) + of("pre", 0.2) + of("penalty", 1.2)
    with pytest.raises(ValueError, match="expected 3 rows"):
        of("pre", 1.0) + Edits.from_rows([{}], "pre")


def test_sums_of_any_edits():
    """Where two lists are one, it has the bits of one after the other; else it is refused."""
    kinds = torch.tensor([0.0, 0.0, 0.0, 0.3, -0.7, 1e8, -INF]), torch.tensor([1.0, 1.0, 1.7, 0.6])
    fine, refused = 0, 0
    for seed in range(400):
        generator = torch.Generator().manual_seed(seed)

        def some(generator: torch.Generator = generator, v: int = 3 + seed % 9) -> Edits:
            listed = torch.rand(3, v, generator=generator) < 0.4
            ids = listed.nonzero()[:, 1].int()
            offsets = torch.nn.functional.pad(listed.sum(1).cumsum(0), (1, 0))

            def of(values: Tensor) -> Tensor:
                return values[torch.randint(len(values), ids.shape, generator=generator)]

            pre, post, last = (of(kinds[0]) for _ in range(3))
            return Edits(ids, offsets, pre=pre, penalty=of(kinds[1]), post=post, last=last)

        first, after = some(), some()
        x = torch.randn(3, 11, generator=generator) * 4
        try:
            both = first + after
        except ValueError as error:
            assert "at most one addition before a penalty" in str(error)
            refused += 1
            continue
        assert torch.equal(edited(x, both), edited(edited(x, first), after))
        assert both.largest == max(first.largest, after.largest)
        fine += 1
    assert fine > 50 and refused > 50


def test_sums_with_given_values():
    x = torch.randn(2, 9)
    ids, offsets = torch.tensor([1, 4, 0], dtype=torch.int32), torch.tensor([0, 2, 3])
    values = torch.tensor([0.5, -INF, 2.0], requires_grad=True)
    given, scaled = (
        Edits.set(ids, offsets, values),
        Edits.from_rows([{4: 3.0}, {0: 3.0}], "penalty"),
    )
    both = given + scaled
    assert torch.equal(edited(x, both), edited(edited(x, given), scaled))
    both.columns[0, 2].backward()
    torch.testing.assert_close(values.grad, torch.tensor([0.0, 0.0, 1 / 3]))
    assert torch.equal(edited(x, scaled + given), edited(x, given))
    more = Edits.set(ids, offsets, torch.zeros(3))
    assert torch.equal(edited(x, given + more), edited(x, more))
    elsewhere = Edits.from_rows([{5: 3.0}, {}], "penalty")
    for first, after in ((given, elsewhere), (elsewhere, given)):
        with pytest.raises(ValueError, match=r"beside Edits\.set, got one of id 5"):
            first + after


def lists(ids: list[int], offsets: list[int]) -> tuple[Tensor, Tensor]:
    return torch.tensor(ids, dtype=torch.int32), torch.tensor(offsets)


@pytest.mark.parametrize(("ids", "offsets", "message"), [
    ([1, 1], [0, 2], "got 1 after 1 in row 0"),
    ([1, 3, 2], [0, 1, 3], "got 2 after 3 in row 1"),
    ([-1], [0, 1], "none below 0, got -1"),
    ([1, 2], [0, 1], "ascend from 0 to 2"),
    ([1, 2], [0, 2, 1, 2], "ascend from 0 to 2"),
    ([1], [], "N \\+ 1 of them, got none"),
])  # fmt: skip
def test_wrong_lists_are_refused(ids, offsets, message):
    ids, offsets = lists(ids, offsets)
    with pytest.raises(ValueError, match=message):
        Edits(ids, offsets.long())


def test_rows_may_be_empty():
    edits = Edits(*lists([3, 1, 0, 2], [0, 0, 1, 1, 2, 4, 4]), pre=torch.ones(4))
    assert edits.rows == 6
    assert edited(torch.zeros(6, 4), edits).sum(1).tolist() == [0, 1, 0, 1, 2, 0]
    none = Edits(*lists([], [0, 0]))
    assert torch.equal(filter_logits(torch.ones(1, 3), Adaptor(), edits=none), torch.ones(1, 3))


@pytest.mark.parametrize(("column", "number"), [
    ("pre", INF), ("post", float("nan")), ("penalty", 0.0), ("penalty", INF), ("penalty", -1.0),
])  # fmt: skip
def test_wrong_numbers_are_refused(column, number):
    with pytest.raises(ValueError, match=f"{column}: expected finite values"):
        Edits.from_rows([{1: number}], column)


def test_wrong_arguments_are_refused():
    x, edits = torch.randn(2, 40), Edits.from_rows([{39: 1.0}, {}], "pre")
    ids, offsets = lists([1], [0, 1])
    for call, message in (
        (lambda: sample(x[:, :39], Adaptor(), edits=edits), r"ids in \[0, 39\), got 39"),
        (lambda: sample(x[:1], Adaptor(), edits=edits), "expected 1 rows, got 2"),
        (lambda: sample(x, Adaptor(), num_tokens=41), "num_tokens: expected 1 to 40, got 41"),
        (lambda: sample(x, Adaptor(), num_tokens=0), "num_tokens"),
        (lambda: sample(x, Adaptor(), num_tokens=3, top_logprobs=4), "top_logprobs"),
        (lambda: filter_logits(x, Adaptor(), allowed=some_words(2, 33)), None),
        (
            lambda: filter_logits(x, Adaptor(), allowed=some_words(2, 65)),
            r"expected shape \(2, 2\)",
        ),
        (lambda: filter_logits(x, Adaptor(), allowed=some_words(1, 40)), r"got \(1, 2\)"),
        (lambda: filter_logits(x, Adaptor(), allowed=some_words(2, 40).long()), "torch.int32"),
        (lambda: filter_logits(x, Adaptor(), edits={1: 2.0}), "edits: expected Edits, got dict"),
        (lambda: Edits(ids.long(), offsets), "ids: expected a tensor of torch.int32"),
        (lambda: Edits.from_rows([{}, {"1": 1.0}], "pre"), r"rows\[1\]: expected an integer"),
        (lambda: Edits.from_rows([{1.7: 1.0}], "pre"), r"rows\[0\]: expected an integer, got 1.7"),
        (lambda: Edits.from_rows([{2**31: 1.0}], "pre"), "got 2147483648"),
        (lambda: Edits.from_rows([None], "pre"), "mapping of ids to numbers, got NoneType"),
        (lambda: Edits(ids, offsets.int()), "offsets: expected a tensor of torch.int64"),
        (lambda: Edits(ids, offsets, pre=torch.ones(2)), r"pre: expected shape \(1,\)"),
        (lambda: Edits(ids, offsets, pre=torch.ones(1).double()), "pre: expected a tensor"),
        (lambda: Edits(ids, offsets, pre=torch.ones(1, requires_grad=True)), "no gradient"),
        (
            lambda: Edits.from_rows([{}], "bias"),
            "expected one of pre, penalty, post, last, got 'bias'",
        ),
    ):
        if message is None:
            call()
            continue
        with pytest.raises((TypeError, ValueError), match=message):
            call()


def test_of_autograd_and_compiler():
    x, edits, words = torch.randn(3, 90), some_edits(3, 90), some_words(3, 90)
    tokens = edited(x, edits, words).argmax(-1)

    def call(x: Tensor) -> Tensor:
        return adapted_log_odds(x, tokens, ADAPTORS[1], edits=edits, allowed=words)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    a, b = (x.clone().requires_grad_() for _ in "ab")
    compiled(a).sum().backward()
    call(b).sum().backward()
    assert torch.equal(a.grad, b.grad)


def listed_once(history: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The ids of each row of a history, how many rows' ids come before each, how often they do."""
    rows = [row.unique(return_counts=True) for row in history]
    offsets = torch.tensor([0, *(len(ids) for ids, _ in rows)]).cumsum(0)
    ids, counts = (torch.cat(x) for x in zip(*rows, strict=True))
    return ids.int(), offsets, counts


@pytest.mark.parametrize("penalty", [1.3, 0.7, 2.0])
def test_transformers_penalty_and_bias(penalty):
    """Bit for bit, with a prompt of repeated ids."""
    transformers = pytest.importorskip("transformers")
    x, history = torch.randn(4, 500) * 3, torch.randint(500, (4, 90))
    ids, offsets, _ = listed_once(history)
    repetition = Edits(ids, offsets, penalty=torch.full((len(ids),), penalty))
    wanted = transformers.RepetitionPenaltyLogitsProcessor(penalty)(history, x)
    assert torch.equal(edited(x, repetition), wanted)
    assert torch.equal(filter_logits(x, Adaptor(), edits=repetition), wanted)
    bias = transformers.SequenceBiasLogitsProcessor([[[3], 1.1], [[499], -2.7]])
    ours = Edits.from_rows([{3: 1.1, 499: -2.7}] * 4, "post")
    wanted = bias(history, wanted)
    assert torch.equal(filter_logits(x, Adaptor(), edits=repetition + ours), wanted)
    wanted = transformers.SuppressTokensLogitsProcessor([7, 8])(history, wanted)
    bans = Edits.from_rows([dict.fromkeys((7, 8), -INF)] * 4, "last")
    assert torch.equal(filter_logits(x, Adaptor(), edits=repetition + ours + bans), wanted)


def test_three_penalties_one_after_the_other():
    """Repetition of prompt and output, then frequency and presence of the output, as in vLLM."""
    v, x = 300, torch.randn(4, 300) * 3
    prompt, output = torch.randint(v, (4, 50)), torch.randint(v, (4, 60))
    both, of_both, _ = listed_once(torch.cat([prompt, output], 1))
    ids, offsets, counts = listed_once(output)
    seen, number = torch.zeros(4, v, dtype=torch.bool), torch.zeros(4, v)
    seen.scatter_(1, torch.cat([prompt, output], 1), True)
    number.scatter_add_(1, output, torch.ones(4, 60))
    y = torch.where(seen, torch.where(x > 0, x / 1.2, x * 1.2), x)
    y = y - 0.3 * number
    y = y - 0.7 * (number > 0)
    edits = Edits(both, of_both, penalty=torch.full((len(both),), 1.2))
    edits = edits + Edits(ids, offsets, post=-(0.3 * counts), last=torch.full((len(ids),), -0.7))
    assert torch.equal(filter_logits(x, Adaptor(), edits=edits), y)
