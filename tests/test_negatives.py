"""Ids that a row makes less likely: repeated n-grams, and the most probable that are no label."""

import pytest
import torch

from fastadapt import linear_top_k, previous_tokens, reference, repeated_ngrams
from fastadapt.losses import negatives

V = 50


def sets_of(index, mask):
    """The candidates of each position, as lists that would show one that comes twice."""
    return [
        [sorted(i[m].tolist()) for i, m in zip(row, kept, strict=True)]
        for row, kept in zip(index, mask, strict=True)
    ]


@pytest.mark.parametrize("n", (1, 2, 3, 20))
def test_repeated_ngrams_are_those_of_plain_loops(n):
    found = 0
    for ids in (2, 3, 30):
        labels = torch.randint(ids, (4, 14))
        labels[torch.rand(4, 14) < 0.1] = -100
        index, mask = repeated_ngrams(labels, n)
        assert index.shape == mask.shape == (4, 14, 14)
        assert index.dtype == torch.int64 and (index >= 0).all()
        assert sets_of(index, mask) == sets_of(*reference.repeated_ngrams(labels, n))
        found += int(mask.sum())
        if n == 1:
            assert sets_of(index, mask) == sets_of(*previous_tokens(labels))
    assert (found > 0) == (n < 20)
    for shape in ((0, 4), (2, 0), (3, 1)):
        index, mask = repeated_ngrams(torch.zeros(shape, dtype=torch.int64), n)
        assert not mask.any() and index.shape == (*shape, shape[1])


def test_repeated_ngrams_are_what_a_ban_forbids():
    """transformers' processor bans them at the next position, the label among them."""
    processors = pytest.importorskip("transformers.generation.logits_process")
    labels = torch.randint(4, (3, 12))
    for n in (1, 2, 3):
        index, mask = repeated_ngrams(labels, n)
        ban = processors.NoRepeatNGramLogitsProcessor(n)
        for t in range(1, 12):
            banned = ban(labels[:, :t], torch.zeros(3, 4)) == -torch.inf
            banned.scatter_(1, labels[:, t, None], False)
            ours = torch.zeros_like(banned).long().scatter_add(1, index[:, t], mask[:, t].long())
            assert torch.equal(ours, banned.long())


HEADS = {
    "plain": {},
    "scaled down": {"logit_scale": -0.7},
    "capped": {"softcap": 0.5, "logit_scale": 2.0},
    "all": {"softcap": 3.0, "bias": True, "lora": True},
}


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16))
@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("k", (1, 7, V + 3))
def test_top_k_is_that_of_all_logits(name, dtype, k, monkeypatch):
    """Over several tiles and blocks of rows; numbers of eighths, so that products are exact."""
    monkeypatch.setattr(negatives, "_TILE", 16)
    monkeypatch.setattr(negatives, "_NUMBERS", 64)
    options = dict(HEADS[name])

    def eighths(*shape):
        return (torch.randint(-8, 9, shape) / 8).to(dtype)

    hidden, weight = eighths(3, 5, 4), eighths(V, 4)
    labels = torch.randint(V, (3, 5))
    labels[0, 1] = labels[2, 4] = -100
    bias = eighths(V) if options.pop("bias", False) else None
    if options.pop("lora", False):
        options["lora"] = eighths(2, 4), eighths(V, 2), 0.5
    for given in (labels, None):
        ours = linear_top_k(hidden, weight, k, given, bias, **options)
        theirs = reference.linear_top_k(
            hidden.float() if dtype == torch.bfloat16 else hidden,
            weight.float() if dtype == torch.bfloat16 else weight,
            k,
            given,
            None if bias is None else bias.to(dtype if dtype != torch.bfloat16 else torch.float32),
            **options,
        )
        assert ours[0].shape == ours[1].shape == (3, 5, k)
        assert torch.equal(ours[1], theirs[1])
        if dtype != torch.bfloat16:  # whose products are rounded to it
            assert torch.equal(ours[0], theirs[0])
        if given is not None:
            assert not (ours[1] & (ours[0] == labels[..., None])).any()
            assert not ours[1][labels == -100].any() and ours[1][labels != -100].any()


def test_top_k_of_equal_infinite_and_nan_logits():
    hidden = torch.tensor([[1.0], [0.0], [float("nan")]])
    weight = torch.tensor([[1.0], [2.0], [2.0], [float("-inf")], [2.0]])
    index, mask = linear_top_k(hidden[:1], weight, 4, torch.tensor([1]))
    assert index.tolist() == [[2, 4, 0, 0]] and mask.tolist() == [[True, True, True, False]]
    index, mask = linear_top_k(hidden[1:2], weight[:3], 2)
    assert index.tolist() == [[0, 1]]  # all logits are 0
    index, mask = linear_top_k(hidden[2:], weight, 2)
    assert index.tolist() == [[0, 1]] and mask.all()
    index, mask = linear_top_k(torch.zeros(0, 1), weight, 2)
    assert index.shape == (0, 2)


def test_top_k_has_no_gradient_and_holds_no_logits():
    hidden = torch.randn(64, 8, requires_grad=True)
    weight = torch.randn(40_000, 8, requires_grad=True)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            outs = out if isinstance(out, tuple) else (out,)
            made = [x.numel() for x in outs if isinstance(x, torch.Tensor) and not x._is_view()]
            largest = max([largest, *made])
            return out

    with Watch():
        index, mask = linear_top_k(hidden, weight, 3)
    assert not index.requires_grad and mask.all()
    assert 64 * 4096 <= largest <= 64 * (4096 + 3)  # a tile; all logits would be 2,560,000


LABELS = torch.zeros(2, 3, dtype=torch.int64)
ONES = torch.ones(2, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: repeated_ngrams(LABELS[0]), ValueError, r"labels: expected shape \(B, T\), got"),
        (
            lambda: repeated_ngrams(LABELS.int()),
            TypeError,
            "labels: expected a tensor of torch.int64",
        ),
        (lambda: repeated_ngrams(LABELS, 0), ValueError, "n: expected at least 1, got 0"),
        (lambda: linear_top_k(ONES, ONES, 0), ValueError, "k: expected at least 1, got 0"),
        (lambda: linear_top_k(ONES, ONES[:, :3], 1), ValueError, "weight: expected shape"),
        (lambda: linear_top_k(ONES, ONES, 1, LABELS), ValueError, "labels: expected shape"),
        (lambda: linear_top_k(ONES, ONES, 1, softcap=0.0), ValueError, "softcap: expected"),
        (lambda: linear_top_k(ONES, ONES, 1, lora=(ONES,)), TypeError, "lora: expected"),
        (lambda: linear_top_k(ONES, ONES.double(), 1), TypeError, "weight: expected torch.float32"),
    ],
)
def test_wrong_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
