"""Edited rows of the Triton kernels under Triton's interpreter: the CPU's values, bit for bit."""

import os

import pytest
import torch
from torch import Tensor

from bits import assert_same, same
from fastadapt import (
    Adaptor,
    Edits,
    Support,
    adapted_log_odds,
    filter_logits,
    reference,
    sample,
    score,
)
from fastadapt._ops.common import RowEdits
from fastadapt._ops.sampling import OPERATORS
from fastadapt.reference.edits import edited

triton = pytest.importorskip("triton", reason="triton is not installed: it has wheels for Linux")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("a GPU is there: the tests marked gpu run these kernels", allow_module_level=True)

from fastadapt._ops.triton.chains import launch as functions  # noqa: E402  (as the next)
from fastadapt._ops.triton.edits import launch  # noqa: E402  (the interpreter is chosen before)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
INF = float("inf")
V = 150


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """So that rows have several, and edits of a block are made in turns of four."""
    monkeypatch.setattr(launch, "BLOCK", 64)
    monkeypatch.setattr(launch, "TOGETHER", 4)


def some_edits(n: int, v: int, given: bool) -> Edits:
    listed = torch.rand(n, v) < torch.tensor([0.3, 0.0, 1.0, 0.02] * n)[:n, None]
    ids = listed.nonzero()[:, 1].int()
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), listed.sum(1).cumsum(0)])
    pre, post, last = torch.randn(3, len(ids)) * 3
    pre[::9] = -INF
    if given:
        return Edits.set(ids, offsets, pre)
    penalty = torch.rand(len(ids)) + 0.6
    return Edits(ids, offsets, pre=pre, penalty=penalty, post=post, last=last)


def choices(n: int, v: int) -> dict[str, RowEdits]:
    words = torch.randint(-(2**31), 2**31, (n, -(-v // 32) + 2), dtype=torch.int64).int()[:, :-2]
    edits, given = some_edits(n, v, False), some_edits(n, v, True)
    return {
        "edits": RowEdits(edits.ids, edits.offsets, edits.columns),
        "given": RowEdits(given.ids, given.offsets, given.columns),
        "allowed": RowEdits(allowed=words),
        "both": RowEdits(edits.ids, edits.offsets, edits.columns, words),
        "given and allowed": RowEdits(given.ids, given.offsets, given.columns, words),
    }


def public(changes: RowEdits) -> dict[str, object]:
    """The arguments of the public functions."""
    ids, offsets, columns, allowed = changes
    edits = None
    if ids is not None:
        edits = Edits.__new__(Edits)._fill(ids, offsets, columns)
    return {"edits": edits, "allowed": allowed}


def launched(name: str, *arguments: object) -> object:
    out = OPERATORS[name][1](*arguments)
    getattr(functions, name)(*arguments, out)
    return out


def rows_of(dtype: torch.dtype) -> Tensor:
    x = torch.randn(4, V) * 3
    x[0, ::5] = -INF
    x[2, 7] = float("nan")
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["edits", "given", "allowed", "both", "given and allowed"])
def test_all_functions_equal_the_cpu(dtype, kind):
    x, changes = rows_of(dtype), choices(4, V)[kind]
    assert same(launch.edited(x, changes), edited(x, **public(changes)))
    adaptor, seeds = Adaptor(temperature=0.8, top_p=0.9), torch.arange(4)
    knobs = adaptor.packed, adaptor.filter_code
    *fields, ids, offsets = launched("sample", x, *knobs, seeds, None, False, False, 0, V, *changes)
    drawn = sample(x, adaptor, seeds=seeds, support=True, **public(changes))
    support = Support(ids, offsets, fields[2] == V)
    assert_same(drawn, [*fields, *[None] * 5, support])
    out = torch.empty_like(x, dtype=torch.float32)  # the interpreter cuts bfloat16 off
    functions.filter_logits(x, *knobs, *changes, out)
    assert same(out.to(dtype), filter_logits(x, adaptor, **public(changes)))
    tokens = drawn.tokens.clamp(min=0)
    own = [knobs[0]] * 2, [knobs[1]] * 2
    *fields, ids, offsets = launched("score", x, tokens, *own, -100, V, *changes)
    full = (fields[2] == V).t().reshape(-1)
    supports = (*Support(ids, offsets, full).split([4, 4]),)
    wanted = score(x, tokens, [adaptor] * 2, support=True, **public(changes))
    assert_same(wanted, [*fields, supports])


@pytest.mark.parametrize("kind", ["edits", "given", "allowed", "both", "given and allowed"])
def test_gradients_equal_the_cpu(kind):
    for dtype in (torch.float32, torch.bfloat16):
        x, changes = rows_of(dtype)[:2], choices(2, V)[kind]
        adaptor, tokens = Adaptor(temperature=0.8, top_k=30), edited(x, **public(changes)).argmax(1)
        arguments = tokens, adaptor.packed, adaptor.filter_code, -100
        log_odds, support, stats = launched("adapted_log_odds", x, *arguments, *changes)
        of_values = changes.columns is not None and len(changes.columns) == 1
        mine = x.clone().requires_grad_()
        wanted = [mine, changes.columns.requires_grad_()] if of_values else [mine]
        ours = adapted_log_odds(mine, tokens, adaptor, **public(changes))
        assert same(ours.detach(), log_odds)
        upstream = torch.randn(2)
        expected = torch.autograd.grad(ours, wanted, upstream)
        changes = RowEdits(*(t if t is None else t.detach() for t in changes))
        given = upstream, x, *arguments, support, stats, *changes, of_values
        dlogits, dvalues = launched("adapted_log_odds_backward", *given)
        if dtype == torch.float32:
            assert same(dlogits, expected[0])
        torch.testing.assert_close(dlogits, expected[0], rtol=1e-2, atol=1e-4)
        if of_values:
            assert same(dvalues, expected[1])


def test_the_reference_equals_the_kernel_on_whole_vocabularies(monkeypatch):
    monkeypatch.undo()
    x = torch.randn(1, 50_257) * 3
    edits = some_edits(1, 50_257, False)
    changes = RowEdits(edits.ids, edits.offsets, edits.columns)
    assert torch.equal(launch.edited(x, changes), edited(x, edits))
    assert same(
        reference.filter_logits(x, Adaptor(top_k=9), edits=edits),
        filter_logits(x, Adaptor(top_k=9), edits=edits),
    )


def test_no_rows():
    assert launch.edited(torch.empty(0, 9), RowEdits(allowed=torch.zeros(0, 1).int())).shape == (
        0,
        9,
    )
