"""Verified drafts: `sample` token by token where nothing is known of them, else its law."""

import itertools
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from bits import assert_same
from fastadapt import Adaptor, Edits, Verified, reference, sample, verify

INF = float("inf")
ADAPTORS = (
    Adaptor(),
    Adaptor(temperature=0.7, top_p=0.9),
    Adaptor(top_k=7, min_p=0.05),
    Adaptor(temperature=1.3, typical_p=0.8, eta_cutoff=1e-3, order="vllm"),
    Adaptor(temperature=0.0),
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def problem(n: int, k: int, v: int, dtype: torch.dtype, near: float = 1.0) -> tuple[Tensor, Tensor]:
    """Logits of rows, and of drafts so near to them."""
    x = (torch.randn(n, k + 1, v) * 3).to(dtype)
    return x, (x[:, :k].float() + torch.randn(n, k, v) * near).to(dtype)


def drafted(logits: Tensor, adaptor: Adaptor, seeds: Tensor, first: Tensor) -> Tensor:
    """What a draft model draws at the same seeds and positions."""
    n, k, _ = logits.shape
    positions = first[:, None] + torch.arange(k)
    each = seeds[:, None].expand(n, k)
    return sample(logits, adaptor, seeds=each, positions=positions).tokens


def assert_the_references(x: Tensor, draft: Tensor, adaptor: Adaptor, **options: Any) -> None:
    options["support"] = True
    wanted = reference.verify(x, draft, adaptor, **options)
    assert_same(verify(x, draft, adaptor, **options), wanted)


def ended(drawn: Any, draft: Tensor, lengths: Tensor) -> Verified:
    """The result, of samples from all rows: cut behind the first that is not its draft."""
    n, k = draft.shape
    stands = (drawn.tokens[:, :k] == draft) & (torch.arange(k) < lengths[:, None])
    accepted = stands.long().cumprod(1).sum(1)
    behind = torch.arange(k + 1) > accepted[:, None]
    fields = (drawn.tokens, drawn.logprobs, drawn.kept, drawn.status)
    tokens, logprobs, kept, status = (
        x.masked_fill(behind, fill) for x, fill in zip(fields, (-1, 0, 0, 0), strict=True)
    )
    return Verified(tokens, accepted, logprobs, kept, status)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("v", [1, 40, 3000])
def test_without_draft_logits_every_token_is_samples(v, dtype, cpu_capability):
    n, k = 24, 4
    for adaptor, drafts in itertools.product(ADAPTORS, ("own", "near", "any")):
        x, near = problem(n, k, v, dtype, 0.3)
        seeds, first = torch.randint(2**62, (n,)), torch.randint(1000, (n,))
        lengths = torch.randint(0, k + 1, (n,))
        draft = drafted(x[:, :k] if drafts == "own" else near, adaptor, seeds, first)
        if drafts == "any":
            draft = torch.randint(v, (n, k))
        each = seeds[:, None].expand(n, k + 1)
        drawn = sample(x, adaptor, seeds=each, positions=first[:, None] + torch.arange(k + 1))
        got = verify(x, draft, adaptor, draft_lengths=lengths, seeds=seeds, positions=first)
        assert_same(got, ended(drawn, draft, lengths))
        if drafts == "own":
            assert torch.equal(got.accepted, lengths)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set_is_the_reference(dtype, cpu_capability):
    for (adaptor, by), (n, k, v) in itertools.product(
        itertools.product(ADAPTORS, ADAPTORS), [(3, 3, 70), (2, 1, 1), (1, 2, 2500), (2, 0, 9)]
    ):
        x, y = problem(n, k, v, dtype, float(torch.rand(())) * 4)
        x[..., ::5] = -INF if v > 1 else 0
        seeds, first = torch.randint(2**62, (n,)), torch.randint(1000, (n,))
        options = {"seeds": seeds, "positions": first, "draft_logits": y, "draft_adaptor": by}
        draft = drafted(y, by, seeds, first)
        assert_same(
            verify(x, draft, adaptor, **options), reference.verify(x, draft, adaptor, **options)
        )
        del options["draft_logits"], options["draft_adaptor"]
        assert_same(
            verify(x, draft, adaptor, **options), reference.verify(x, draft, adaptor, **options)
        )


def test_edits_masks_padding_and_knobs_of_sequences(cpu_capability):
    n, k, v = 4, 3, 100
    x, y = problem(n, k, v, torch.float32)
    ids = torch.arange(0, v, 7).int()
    rows = n * (k + 1)
    offsets = torch.arange(rows + 1) * len(ids)
    edits = Edits(ids.repeat(rows), offsets, pre=torch.randn(rows * len(ids)))
    adaptor = Adaptor(top_k=torch.tensor([1, 5, 20, 0]), temperature=torch.tensor([0.0, 1, 2, 1]))
    seeds = torch.arange(n)
    options = {
        "edits": edits,
        "allowed": torch.randint(-(2**31), 2**31, (n, k + 1, 4)).int(),
        "num_tokens": 90,
        "draft_logits": y,
        "draft_adaptor": Adaptor(top_p=0.9, min_p=torch.tensor([0.1, 0, 0, 0.2])),
        "seeds": seeds,
    }
    draft = drafted(y[..., :90], Adaptor(top_p=0.9), seeds, torch.zeros(n).long())
    assert_same(
        verify(x, draft, adaptor, **options), reference.verify(x, draft, adaptor, **options)
    )


def test_rows_behind_a_rejection_and_drafts_behind_their_length_are_not_looked_at():
    x, y = problem(2, 3, 50, torch.float32)
    draft = x[:, :3].argmin(-1)
    x[0, 1:] = float("nan")
    y[0, 1:] = float("nan")
    draft[1, 1:] = -7
    options = {"draft_lengths": torch.tensor([3, 1]), "seeds": torch.arange(2)}
    for known in ({}, {"draft_logits": y}):
        got = verify(x, draft, Adaptor(temperature=0.0), **options, **known)
        assert got.accepted.tolist() == [0, 0] and got.status.sum() == 0
        assert got.tokens[:, 0].tolist() == x[:, 0].argmax(-1).tolist()
        assert (got.tokens[:, 1:] == -1).all()


def test_a_bad_row_ends_its_sequence_alone():
    x, _ = problem(5, 2, 50, torch.float32)
    y = x[:, :2].clone()
    seeds, greedy = torch.arange(5), Adaptor(temperature=0.0)
    draft = x[:, :2].argmax(-1)
    x[0, 1, 3] = float("nan")
    x[1, 0, 3] = INF
    y[2, 1, 3] = float("nan")
    x[3, 2] = -INF
    options = {"draft_logits": y, "seeds": seeds}
    got = verify(x, draft, greedy, **options)
    assert got.status.tolist() == [[0, 1, 0], [2, 0, 0], [0, 5, 0], [0, 0, 3], [0, 0, 0]]
    assert got.accepted.tolist() == [1, 0, 1, 2, 2]
    bad = got.status > 0
    assert (got.tokens[bad] == -1).all() and got.logprobs[bad].isnan().all()
    assert_same(got, reference.verify(x, draft, greedy, **options))


def assert_law(tokens: Tensor, p: Tensor, name: str) -> None:
    """G-test of drawn ids against probabilities (V,)."""
    counts = torch.bincount(tokens, minlength=len(p))
    assert counts[p == 0].sum() == 0, name
    wanted = p[p > 0] * len(tokens)
    g = stats.power_divergence(counts[p > 0].tolist(), wanted.tolist(), lambda_="log-likelihood")
    assert g.pvalue > 1e-6, f"{name}: G = {g.statistic:.1f}, p = {g.pvalue}"


@pytest.mark.parametrize("near", [0.0, 0.5, 2.0, 20.0])
@pytest.mark.parametrize("adaptor", ADAPTORS[:4], ids=["all", "top_p", "top_k", "typical"])
def test_what_comes_out_is_distributed_as_the_rows_are(adaptor, near):
    """Of the first token, of the second given that the first stands, and how many stand."""
    n, k, v = 200_000, 2, 24
    x, y = problem(1, k, v, torch.float32, near)
    x = x / 2
    by = Adaptor(temperature=1.5, top_k=9)
    seeds = torch.randint(-(2**63), 2**63 - 1, (n,))
    logits, of_drafts = x.expand(n, -1, -1), y.expand(n, -1, -1)
    draft = drafted(of_drafts, by, seeds, torch.zeros(n).long())
    got = verify(logits, draft, adaptor, draft_logits=of_drafts, draft_adaptor=by, seeds=seeds)
    laws = [reference.filter_logits(x[0].double(), adaptor).softmax(-1),
            reference.filter_logits(y[0].double(), by).softmax(-1)]  # fmt: skip
    for i in range(k + 1):
        reached = got.accepted >= i
        if reached.sum() > 5000:
            assert_law(got.tokens[reached, i], laws[0][i], f"row {i}")
    overlap = torch.minimum(laws[0][:k], laws[1]).sum(-1)
    stands = (got.accepted > 0).double().mean()
    assert abs(stands - overlap[0]) < 5 * (overlap[0] * (1 - overlap[0]) / n).sqrt() + 1e-6


def test_float64_is_the_textbook_form():
    x, y = problem(3, 2, 30, torch.float32, 0.5)
    seeds = torch.arange(3)
    draft = drafted(y, ADAPTORS[1], seeds, torch.zeros(3).long())
    narrow, wide = (
        reference.verify(a, draft, ADAPTORS[1], draft_logits=b, seeds=seeds)
        for a, b in ((x, y), (x.double(), y.double()))
    )
    assert torch.equal(narrow.tokens, wide.tokens)
    torch.testing.assert_close(narrow.logprobs, wide.logprobs, rtol=0, atol=2e-5)


def test_seeds_come_from_a_generator():
    x, _ = problem(4, 2, 50, torch.float32)
    draft = torch.zeros(4, 2).long()
    first, second = (
        verify(x, draft, Adaptor(), generator=torch.Generator().manual_seed(3)) for _ in range(2)
    )
    assert_same(first, second)


def test_one_row_on_many_threads():
    x, y = problem(1, 2, 140_000, torch.float32, 0.1)
    seeds, options = torch.arange(1), {"draft_logits": y}
    draft = drafted(y, ADAPTORS[1], seeds, torch.zeros(1).long())
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 4):
            torch.set_num_threads(number)
            results.append(verify(x, draft, ADAPTORS[1], seeds=seeds, support=True, **options))
    finally:
        torch.set_num_threads(threads)
    assert_same(*results)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"logits": torch.zeros(2, 9)}, ValueError, r"expected shape \(N, k \+ 1, V\)"),
        ({"draft": torch.zeros(2, 3).long()}, ValueError, r"draft: expected shape \(2, 2\)"),
        ({"draft": torch.zeros(2, 2)}, TypeError, "draft: expected a tensor of torch.int64"),
        ({"draft": torch.full((2, 2), 9)}, ValueError, r"draft: expected ids in \[0, 9\), got 9"),
        ({"draft_lengths": torch.tensor([0, 3])}, ValueError, "draft_lengths: expected 0 to 2"),
        ({"draft_logits": torch.zeros(2, 3, 9)}, ValueError, r"draft_logits: expected shape"),
        ({"draft_logits": torch.zeros(2, 2, 9).half()}, TypeError, "expected torch.float32"),
        ({"draft_adaptor": Adaptor()}, ValueError, "draft_adaptor: expected None"),
        ({"adaptor": Adaptor(top_k=torch.ones(6).long())}, ValueError, "knobs of 2 values"),
        ({"seeds": torch.zeros(6).long()}, ValueError, r"seeds: expected shape \(2,\)"),
    ],
)
def test_what_does_not_fit_is_refused(changes, error, message):
    given = {"logits": torch.zeros(2, 3, 9), "draft": torch.zeros(2, 2).long(), **changes}
    given.setdefault("adaptor", Adaptor())
    with pytest.raises(error, match=message):
        verify(**given)
