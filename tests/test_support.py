"""The kept set of a batch as a value: what it holds, what it refuses."""

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from fastadapt import Adaptor, Support, filter_logits


def masks(n: int, v: int, seed: int = 0) -> Tensor:
    """(N, V), bool; rows of every density, empty and full ones among them."""
    generator = torch.Generator().manual_seed(seed)
    density = torch.rand(n, 1, generator=generator) * 1.6 - 0.3
    return torch.rand(n, v, generator=generator) < density


@pytest.mark.parametrize(("n", "v"), [(0, 3), (1, 1), (6, 1), (9, 4), (200, 37)])
def test_support_is_its_mask(n: int, v: int) -> None:
    mask = masks(n, v)
    support = Support.from_mask(mask)
    assert torch.equal(support.to_mask(v), mask) and len(support) == n
    assert torch.equal(support.full, mask.all(1))
    assert torch.equal(support.counts, torch.where(mask.all(1), 0, mask.sum(1)))
    assert support.check(v) is support
    tokens = torch.randint(v, (n,), generator=torch.Generator().manual_seed(1))
    assert torch.equal(support.contains(tokens), mask.gather(1, tokens[:, None])[:, 0])
    for copy in (
        Support.from_bytes(support.to_bytes()),
        pickle.loads(pickle.dumps(support)),
        support.to("cpu"),
        Support.cat(support.split([n // 2, 0, n - n // 2])),
    ):
        assert copy == support
    assert len(support.to_bytes()) == 24 + 4 * (n + support.ids.shape[0])


def test_rows_of_a_support() -> None:
    mask = masks(50, 11)
    support = Support.from_mask(mask)
    rows = torch.randint(50, (90,), generator=torch.Generator().manual_seed(2))
    assert torch.equal(support.index(rows).to_mask(11), mask[rows])
    for part in (slice(3, 9), slice(9, 3), slice(-5, None), slice(None, None, 7)):
        assert torch.equal(support[part].to_mask(11), mask[part])
    assert torch.equal(support[::-1].to_mask(11), mask.flip(0))
    assert [len(x) for x in support.split([20, 30])] == [20, 30]
    assert torch.equal(support.split([20, 30])[1].to_mask(11), mask[20:])


def test_a_part_is_pickled_alone() -> None:
    support = Support.from_mask(masks(500, 400))
    part = support.split([499, 1])[1]
    assert pickle.loads(pickle.dumps(part)) == part
    assert len(pickle.dumps(part)) < 5000 < len(pickle.dumps(support)) // 10


def test_no_row_keeps_what_is_no_id() -> None:
    support = Support.from_mask(torch.tensor([[True, True], [True, False], [False, False]]))
    for token in (-1, -100):
        assert not bool(support.contains(torch.full((3,), token)).any())


def test_support_of_an_adaptor() -> None:
    logits = torch.randn(64, 500, generator=torch.Generator().manual_seed(3)) * 3
    mask = filter_logits(logits, Adaptor(top_p=0.9)) > -torch.inf
    assert torch.equal(Support.from_mask(mask).to_mask(500), mask)


def test_supports_that_differ_are_unequal() -> None:
    mask = torch.tensor([[True, False, False], [True, True, False]])
    support = Support.from_mask(mask)
    assert support == Support.from_mask(mask.clone())
    assert support != Support.from_mask(mask.flip(0))
    assert support != Support.from_mask(mask | True)
    assert support != 3
    with pytest.raises(TypeError, match="unhashable"):
        hash(support)


def made(ids: Any, offsets: Any, full: Any) -> Support:
    """A support of numbers."""
    return Support(torch.tensor(ids, dtype=torch.int32), torch.tensor(offsets), torch.tensor(full))


@pytest.mark.parametrize(
    ("ids", "offsets", "full", "message"),
    [
        ([1], [0, 2], [False], r"offsets: expected to rise from 0 to 1, got \[0, 2\]"),
        ([1], [1, 1], [False], "offsets: expected to rise"),
        ([1, 2], [0, 3, 2], [False, False], "offsets: expected to rise"),
        ([1, 1], [0, 2], [False], r"ids: expected to ascend in a row, got \[1, 1\] in row=0"),
        ([4, 1, 0], [0, 1, 3], [False, False], r"got \[1, 0\] in row=1"),
        ([-1], [0, 1], [False], r"ids: expected ids in \[0, 5\), got -1 in row=0"),
        ([0, 5], [0, 1, 2], [False, False], r"got 5 in row=1"),
        ([0], [0, 1], [True], "full: expected no ids in full rows, got 1 in row=0"),
    ],
)
def test_wrong_values_are_named(ids: Any, offsets: Any, full: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(ids, offsets, full).check(5)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: made([[1]], [0, 1], [False]), ValueError, r"ids: expected shape \(count,\)"),
        (lambda: made([1], [[0, 1]], [False]), ValueError, r"offsets: expected shape \(N \+ 1,\)"),
        (lambda: made([1], [0, 1], [0]), TypeError, "full: expected a tensor of torch.bool"),
        (lambda: made([1], [0, 1], [False] * 2), ValueError, r"full: expected shape \(1,\)"),
        (lambda: Support([1], None, None), TypeError, "ids: expected a Tensor, got list"),
        (lambda: Support.from_mask(torch.ones(2, 2)), TypeError, "mask: .*got torch.float32"),
        (lambda: Support.from_mask(torch.ones(2) > 0), ValueError, r"mask: expected shape"),
        (lambda: Support.from_bytes(b"abc"), ValueError, "got 3 other bytes"),
        (lambda: Support.from_bytes(ONE.to_bytes() + b"1"), ValueError, "other bytes"),
        (lambda: Support.cat([]), ValueError, "got no support"),
        (lambda: Support.cat([ONE, 1]), TypeError, r"supports\[1\]: expected a Support"),
        (lambda: ONE.split([2]), ValueError, "expected a sum of 1 rows, got 2"),
        (lambda: ONE.split([2, -1]), ValueError, r"lengths\[1\]: expected at least 0"),
        (lambda: ONE.index(torch.tensor([1])), ValueError, r"rows in \[0, 1\), got 1"),
        (lambda: ONE.contains(torch.zeros(1)), TypeError, "tokens: expected .*int64"),
        (lambda: ONE.to_mask(1), ValueError, r"ids: expected ids in \[0, 1\), got 1"),
        (lambda: ONE[0], TypeError, "rows: expected a slice, got int"),
    ],
)
def test_wrong_arguments_are_named(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


ONE = made([1], [0, 1], [False])
