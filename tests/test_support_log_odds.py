"""Log-odds on a given support: references, gradients, edges, and the same bits in every run."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fastadapt import (
    Adaptor,
    Support,
    adapted_log_odds,
    filter_logits,
    label_log_odds,
    linear_log_odds,
    linear_support_log_odds,
    reference,
    support_log_odds,
)
from fastadapt._ops.supports import products as ops

INF = float("inf")
HALVES = [torch.bfloat16, torch.float16]


class Case(NamedTuple):
    """What one call is given."""

    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    labels: Tensor  # (N,)
    support: Support
    upstream: Tensor  # (N,), signed

    def to(self, dtype: torch.dtype) -> "Case":
        """The same numbers in another dtype, leaves that want gradients."""
        hidden, weight, bias = (
            None if x is None else x.detach().to(dtype).requires_grad_() for x in self[:3]
        )
        return self._replace(hidden=hidden, weight=weight, bias=bias)

    @property
    def leaves(self) -> list[Tensor]:
        """What gets gradients."""
        return [x for x in self[:3] if x is not None]


def make_case(
    n: int, h: int, v: int, *, seed: int = 0, bias: bool = True, full: bool = True
) -> Case:
    """float64; rows of every density, most labels inside; one in eight ignored."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(n, v, generator=g) < torch.rand(n, 1, generator=g).pow(2) * 1.2 - 0.05
    if not full:
        mask[:, :1] &= ~mask.all(1, keepdim=True)
    labels = torch.randint(v, (n,), generator=g)
    inside = torch.rand(n, generator=g) < 0.8
    some = torch.multinomial(mask.double() + 1e-9, 1, generator=g)[:, 0] if n else labels
    labels = torch.where(inside, some, labels)
    labels = torch.where(torch.rand(n, generator=g) < 0.125, -100, labels)
    return Case(
        torch.randn(n, h, generator=g, dtype=torch.float64),
        torch.randn(v, h, generator=g, dtype=torch.float64) / h**0.5 * 2,
        torch.randn(v, generator=g, dtype=torch.float64) if bias else None,
        labels,
        Support.from_mask(mask),
        torch.randn(n, generator=g, dtype=torch.float64),
    ).to(torch.float64)


def run(function: Any, case: Case, **options: Any) -> tuple[Tensor, ...]:
    """Log-odds and gradients, of the finite rows alone."""
    m = function(case.hidden, case.weight, case.labels, case.support, bias=case.bias, **options)
    finite = m.isfinite()
    gradients = torch.autograd.grad(
        m[finite], case.leaves, case.upstream[finite].to(m.dtype), materialize_grads=True
    )
    return m.detach(), *gradients


def close(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...], bound: float) -> None:
    """Whether each is within a bound of the largest of its kind."""
    for a, b in zip(got, wanted, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a.double(), b.double(), rtol=bound, atol=bound, equal_nan=True)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(bias: bool, softcap: float | None) -> None:
    case = make_case(9, 3, 7, bias=bias)
    finite = linear_support_log_odds(*case[:2], *case[3:5], bias=case.bias).isfinite()
    assert 3 < int(finite.sum()) and bool(case.support.full.any())

    def function(*leaves: Tensor) -> Tensor:
        m = linear_support_log_odds(
            *leaves[:2],
            *case[3:5],
            bias=leaves[2] if bias else None,
            softcap=softcap,
            logit_scale=1.3,
        )
        return m[finite]

    assert torch.autograd.gradcheck(function, case.leaves)


def test_gradcheck_on_logits() -> None:
    case = make_case(9, 3, 7)
    logits = torch.randn(9, 7, dtype=torch.float64, requires_grad=True)
    finite = support_log_odds(logits, case.labels, case.support).isfinite()
    assert torch.autograd.gradcheck(
        lambda z: support_log_odds(z, case.labels, case.support)[finite], logits
    )


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0, "logit_scale": -0.7}])
def test_equals_the_reference(seed: int, options: dict[str, float]) -> None:
    n, h, v = ((1, 1, 1), (3, 5, 2), (40, 17, 11), (160, 33, 90))[seed % 4]
    case = make_case(n, h, v, seed=seed, bias=seed % 3 > 0)
    got = run(linear_support_log_odds, case, **options)
    close(got, run(reference.linear_support_log_odds, case, **options), 1e-11)


@pytest.mark.parametrize("seed", range(4))
def test_log_odds_of_the_whole_vocabulary_beside_them(seed: int) -> None:
    case, results = make_case(40, 17, 11, seed=seed, bias=seed % 2 > 0), []
    for function in (linear_support_log_odds, reference.linear_support_log_odds):
        head = case.hidden, case.weight, case.labels, case.support
        on_support, whole = function(*head, bias=case.bias, softcap=2.0, full=True)
        both = torch.stack([on_support, whole * 0.7])
        finite = both.isfinite()
        upstream = torch.stack([case.upstream, case.upstream.flip(0)])
        gradients = torch.autograd.grad(both[finite], case.leaves, upstream[finite])
        results.append((both.detach(), *gradients))
    close(*results, 1e-11)
    whole, full = results[0][0][1] / 0.7, case.support.full
    torch.testing.assert_close(results[0][0][0][full], whole[full])
    alone = linear_log_odds(*case[:2], case.labels, case.bias, softcap=2.0)
    assert torch.equal(
        linear_support_log_odds(*head, bias=case.bias, softcap=2.0, full=True)[1], alone
    )
    trained = [*head[:1], head[1].detach().requires_grad_(), *head[2:]]
    with pytest.raises(ValueError, match="sparse: expected False with full=True"):
        linear_support_log_odds(*trained, bias=case.bias, sparse=True, full=True)
    trained[1] = trained[1] * 2
    with pytest.raises(ValueError, match="sparse: expected a weight that is a leaf"):
        linear_support_log_odds(*trained, bias=case.bias, sparse=True)


@pytest.mark.parametrize("h", [1, 7, 16, 70])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES])
def test_every_instruction_set(cpu_capability: str, dtype: torch.dtype, h: int) -> None:
    """Of inputs rounded to the dtype the log-odds are float32's; gradients are rounded once."""
    case = make_case(50, h, 31, seed=h, full=False).to(dtype)
    got = run(linear_support_log_odds, case)
    wanted = run(reference.linear_support_log_odds, case.to(torch.float64))
    sums = 1e-12 if dtype == torch.float64 else 1e-5
    close(got[:1], wanted[:1], sums)
    close(got[1:], wanted[1:], sums + (torch.finfo(dtype).eps if dtype in HALVES else 0))


@pytest.mark.parametrize("seed", range(3))
def test_many_rows_equal_the_reference(seed: int) -> None:
    """Several blocks of ids whose gradients are summed at once."""
    h = 512
    case = make_case(300, h, 3 * ops.BLOCK_NUMBERS // h + 5, seed=seed, full=False)
    got = run(linear_support_log_odds, case)
    close(got, run(reference.linear_support_log_odds, case), 1e-10)


@pytest.mark.parametrize("adaptor", [Adaptor(top_p=0.9), Adaptor(top_k=7), Adaptor(typical_p=0.6)])
def test_equals_the_adaptor_on_full_logits(adaptor: Adaptor) -> None:
    g = torch.Generator().manual_seed(5)
    hidden = torch.randn(60, 20, generator=g, dtype=torch.float64)
    weight = torch.randn(300, 20, generator=g, dtype=torch.float64)
    logits = (hidden @ weight.t()).requires_grad_()
    support = Support.from_mask(filter_logits(logits.detach().float(), adaptor) > -INF)
    labels = torch.randint(300, (60,), generator=g)
    kept = support.index(torch.arange(0, 60, 2))
    labels[::2] = kept.ids[kept.offsets[:-1]].long()  # inside
    wanted = adapted_log_odds(logits, labels, adaptor)
    for got in (
        support_log_odds(logits, labels, support),
        linear_support_log_odds(hidden, weight, labels, support),
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    finite = wanted.isfinite()
    assert 10 <= int(finite.sum()) < 60
    by_logits, of_adaptor = (
        torch.autograd.grad(m[finite].sum(), logits)[0]
        for m in (support_log_odds(logits, labels, support), wanted)
    )
    torch.testing.assert_close(by_logits, of_adaptor, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("sparse", [False, True])
def test_bits_do_not_depend_on_threads_or_runs(
    dtype: torch.dtype, sparse: bool, num_threads: Any
) -> None:
    case = make_case(130, 70, 50, full=False).to(dtype)
    runs = []
    for threads in (1, 2, 4, 4, 1):
        num_threads(threads)
        runs.append(run(linear_support_log_odds, case, sparse=sparse))
    for again in runs[1:]:
        for a, b in zip(runs[0], again, strict=True):
            a, b = (x.to_dense() if x.is_sparse else x for x in (a, b))
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_a_row_does_not_depend_on_its_mates() -> None:
    case = make_case(64, 40, 60, full=False).to(torch.float32)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    m, by_hidden, *_ = run(linear_support_log_odds, case)
    moved = case._replace(
        hidden=case.hidden.detach()[order].requires_grad_(),
        labels=case.labels[order],
        support=case.support.index(order),
        upstream=case.upstream[order],
    )
    m_moved, by_moved, *_ = run(linear_support_log_odds, moved)
    assert torch.equal(m[order], m_moved) and torch.equal(by_hidden[order], by_moved)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_sparse_gradient_is_the_dense_one(dtype: torch.dtype) -> None:
    case = make_case(80, 24, 200, full=False).to(dtype)
    dense, sparse = (run(linear_support_log_odds, case, sparse=s)[2] for s in (False, True))
    assert sparse.is_sparse and sparse.is_coalesced() and sparse.dtype == dtype
    assert torch.equal(sparse.to_dense(), dense)
    ids = sparse.indices()[0]
    assert torch.equal(ids, ids.unique()) and set(ids.tolist()) <= set(case.support.ids.tolist())


@pytest.mark.parametrize("sparse", [False, True])
def test_rows_without_an_upstream_gradient_are_dropped(sparse: bool) -> None:
    case = make_case(80, 24, 200, full=False).to(torch.float32)
    rewarded = torch.arange(80) % 5 == 0
    masked = case._replace(upstream=case.upstream.masked_fill(~rewarded, 0.0))
    _, by_hidden, by_weight, _ = run(linear_support_log_odds, masked, sparse=sparse)
    ignored = case._replace(labels=case.labels.masked_fill(~rewarded, -100))
    _, wanted, wanted_weight, _ = run(linear_support_log_odds, ignored, sparse=sparse)
    assert torch.equal(by_hidden, wanted) and by_hidden.any()
    assert torch.equal(by_weight.to_dense(), wanted_weight.to_dense())
    if sparse:
        assert torch.equal(by_weight.indices(), wanted_weight.indices())


def test_sparse_gradient_takes_a_step() -> None:
    case = make_case(30, 8, 20, full=False).to(torch.float32)
    before = case.weight.detach().clone()
    m = linear_support_log_odds(*case[:2], *case[3:5], sparse=True)
    m[m.isfinite()].sum().backward()
    torch.optim.SGD([case.weight], lr=0.5).step()
    wanted = before - 0.5 * case.weight.grad.to_dense()
    torch.testing.assert_close(case.weight.detach(), wanted)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_only_what_is_wanted_gets_a_gradient(wanted: tuple[int, ...]) -> None:
    case = make_case(40, 12, 30)
    every = run(linear_support_log_odds, case)[1:]
    leaves = [x.detach().requires_grad_(i in wanted) for i, x in enumerate(case.leaves)]
    m = linear_support_log_odds(*leaves[:2], *case[3:5], bias=leaves[2])
    finite = m.isfinite()
    (m[finite] * case.upstream[finite]).sum().backward()
    for i, (leaf, gradient) in enumerate(zip(leaves, every, strict=True)):
        assert (leaf.grad is None) == (i not in wanted)
        if i in wanted:
            torch.testing.assert_close(leaf.grad, gradient, rtol=1e-13, atol=1e-13)


def test_frozen_everywhere() -> None:
    case = make_case(20, 6, 9)
    hidden, weight, bias = (x.detach() for x in case.leaves)
    m = linear_support_log_odds(hidden, weight, *case[3:5], bias=bias)
    assert not m.requires_grad


def rows_of(*rows: Any) -> Support:
    """A support of V = 4 of rows of ids, or None: full."""
    mask = torch.zeros(len(rows), 4, dtype=torch.bool)
    for r, ids in enumerate(rows):
        mask[r, slice(None) if ids is None else ids] = True
    return Support.from_mask(mask)


def test_edges() -> None:
    support = rows_of([0, 1], [0, 1], [2], [], [], None, [1, 3], [2], None)
    labels = torch.tensor([0, 2, 2, 1, -100, 3, -100, 1, -100])
    hidden = torch.randn(9, 5, requires_grad=True)
    weight = torch.randn(4, 5, requires_grad=True)
    z = hidden @ weight.t()
    m = linear_support_log_odds(hidden, weight, labels, support)
    wanted = [z[0, 0] - z[0, 1], -INF, INF, -INF, 0, z[5, 3] - z[5, :3].logsumexp(0), 0, -INF, 0]
    torch.testing.assert_close(m, torch.stack([torch.as_tensor(x) for x in wanted]).float())
    torch.testing.assert_close(support_log_odds(z, labels, support), m)
    by_hidden, by_weight = torch.autograd.grad(m[m.isfinite()].sum(), [hidden, weight])
    used = torch.tensor([0, 5])
    assert bool((by_hidden[used] != 0).all())
    rest = [r for r in range(9) if r not in used]
    assert not by_hidden[rest].any() and not by_weight.isnan().any()
    # a loss of log p that takes the infinite rows has no NaN either
    again = linear_support_log_odds(hidden, weight, labels, support)
    for gradient in torch.autograd.grad(again.sigmoid().sum(), [hidden, weight]):
        assert bool(gradient.isfinite().all())


def test_ignored_and_lonely_rows_may_hold_anything() -> None:
    support = rows_of([0, 1], [0, 1], [2], [0, 2], None)
    labels = torch.tensor([0, -100, 2, 1, -100])
    hidden = torch.randn(5, 6)
    hidden[1:] = float("nan")
    hidden.requires_grad_()
    weight = torch.randn(4, 6, requires_grad=True)
    m = linear_support_log_odds(hidden, weight, labels, support)
    assert m[1:].tolist() == [0, INF, -INF, 0]
    for gradient in torch.autograd.grad(m[0], [hidden, weight]):
        assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("n", [0, 3])
def test_nothing_to_do_has_a_graph(n: int) -> None:
    hidden = torch.randn(n, 5, requires_grad=True)
    weight = torch.randn(4, 5, requires_grad=True)
    labels = torch.full((n,), -100)
    m = linear_support_log_odds(hidden, weight, labels, rows_of(*[[0, 1], None, []][:n]))
    assert m.tolist() == [0.0] * n
    m.sum().backward()
    assert not hidden.grad.any() and not weight.grad.any()
    assert hidden.grad.shape == hidden.shape and weight.grad.shape == weight.shape


def test_vocabulary_of_one() -> None:
    hidden, weight = torch.randn(2, 3), torch.randn(1, 3)
    full = Support.from_mask(torch.ones(2, 1, dtype=torch.bool))
    stored = Support(torch.zeros(2).int(), torch.arange(3), torch.zeros(2, dtype=torch.bool))
    for support in (full, stored):
        m = linear_support_log_odds(hidden, weight, torch.zeros(2).long(), support)
        assert m.tolist() == [INF, INF]


def test_all_full_rows_are_the_dense_ones() -> None:
    case = make_case(30, 16, 40).to(torch.float32)
    support = Support.from_mask(torch.ones(30, 40, dtype=torch.bool))
    case = case._replace(support=support)
    m, *gradients = run(linear_support_log_odds, case)
    dense = linear_log_odds(*case[:2], case.labels, case.bias)
    torch.testing.assert_close(m, dense)
    wanted = torch.autograd.grad(dense, case.leaves, case.upstream.float())
    close(tuple(gradients), wanted, 1e-5)
    logits = torch.randn(30, 40)
    assert torch.equal(
        support_log_odds(logits, case.labels, support), label_log_odds(logits, case.labels)
    )


def test_others_that_are_minus_infinity() -> None:
    logits = torch.tensor([[1.0, -INF, -INF, 2.0], [1.0, INF, 0.0, 0.0], [-INF, 0.0, 1.0, 0.0]])
    support = rows_of([0, 1, 2], [0, 1], [0, 1])
    logits.requires_grad_()
    m = support_log_odds(logits, torch.tensor([0, 0, 0]), support)
    assert m[0] == INF and m[1].isnan() and m[2] == -INF
    gradient = torch.autograd.grad(m[0] + 0 * m[2].nan_to_num(), logits)[0]
    assert not gradient[0].any()


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_is_no_worse_than_plain_pytorch(dtype: torch.dtype) -> None:
    case = make_case(200, 96, 60, full=False).to(dtype)
    truth = run(reference.linear_support_log_odds, case.to(torch.float64))
    plain, got = (
        run(f, case) for f in (reference.linear_support_log_odds, linear_support_log_odds)
    )
    finite = truth[0].isfinite()
    for i, (x, y, z) in enumerate(zip(got, plain, truth, strict=True)):
        rows = finite if i == 0 else slice(None)
        ours, theirs = ((a.double() - z)[rows].square().mean().sqrt() for a in (x, y))
        assert ours <= theirs, (i, float(ours), float(theirs))
        assert i > 0 or ours < 1e-5


def test_float32_head_over_half_hidden_states() -> None:
    case = make_case(40, 24, 30)
    hidden = case.hidden.detach().bfloat16().requires_grad_()
    weight = case.weight.detach().float().requires_grad_()
    m = linear_support_log_odds(hidden, weight, *case[3:5])
    wide = linear_support_log_odds(hidden.float(), weight, *case[3:5])
    assert m.dtype == torch.float32 and torch.equal(m, wide)
    by_hidden, by_weight = torch.autograd.grad(m[m.isfinite()].sum(), [hidden, weight])
    assert by_hidden.dtype == torch.bfloat16 and by_weight.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        cast = linear_support_log_odds(hidden.float(), weight.bfloat16(), *case[3:5])
    close((cast,), (linear_support_log_odds(hidden, weight.bfloat16(), *case[3:5]),), 1e-6)


def test_layouts_and_shapes() -> None:
    case = make_case(24, 10, 30).to(torch.float32)
    wanted = run(linear_support_log_odds, case)
    wide = torch.randn(24, 30)
    wide[:, :10] = case.hidden.detach()
    columns = case.weight.detach().t().contiguous().t()
    for hidden, weight in (
        (wide[:, :10], case.weight.detach()),
        (case.hidden.detach(), columns),
        (case.hidden.detach().t().contiguous().t(), case.weight.detach()),
    ):
        given = case._replace(hidden=hidden.requires_grad_(), weight=weight.requires_grad_())
        close(run(linear_support_log_odds, given), wanted, 1e-6)
    shaped = linear_support_log_odds(
        case.hidden.view(4, 6, 10),
        case.weight,
        case.labels.view(4, 6),
        case.support,
        bias=case.bias,
    )
    assert torch.equal(shaped.view(-1), wanted[0])


def test_another_default_device_changes_nothing() -> None:
    case = make_case(30, 8, 20).to(torch.float32)
    wanted = run(linear_support_log_odds, case)
    with torch.device("meta"):
        got = run(linear_support_log_odds, case)
        assert Support.from_bytes(case.support.to_bytes()) == case.support
        assert case.support[::-1].ids.device.type == "cpu"
        case.support.check(20).split([30])
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)


def test_no_second_derivative() -> None:
    case = make_case(10, 6, 9, full=False)
    m = linear_support_log_odds(*case[:2], *case[3:5])
    (gradient,) = torch.autograd.grad(m[m.isfinite()].sum(), case.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="support log-odds: expected a first-order"):
        gradient.sum().backward()


X, W, Y = torch.randn(2, 3), torch.randn(4, 3), torch.tensor([0, 1])
S = rows_of([0, 1], None)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"support": None}, TypeError, "support: expected a Support, got NoneType"),
        ({"support": S[:1]}, ValueError, "support: expected 2 rows, got 1"),
        ({"support": rows_of([0], [3])}, ValueError, r"ids: expected ids in \[0, 3\), got 3"),
        ({"labels": torch.tensor([0, 9])}, ValueError, "labels: expected ids .* got 9 in row=1"),
        ({"labels": Y.int()}, TypeError, "labels: expected a tensor of torch.int64"),
        ({"labels": Y[:1]}, ValueError, r"labels: expected shape \(2,\), got \(1,\)"),
        ({"softcap": 0.0}, ValueError, "softcap: expected a value > 0"),
        ({"logit_scale": INF}, ValueError, "logit_scale: expected a finite"),
        ({"sparse": 1}, TypeError, "sparse: expected True or False"),
        ({"sparse": True, "weight": W.clone().requires_grad_()}, ValueError, "got 1 of these"),
        ({"weight": W[:, :2]}, ValueError, r"weight: expected shape \(V, 3\)"),
        ({"bias": torch.zeros(3)}, ValueError, r"bias: expected shape \(4,\)"),
        ({"group": object()}, NotImplementedError, "group: expected None"),
        (
            {"hidden": X.to("meta")},
            NotImplementedError,
            "hidden: expected a CPU or CUDA tensor, got one on meta",
        ),
    ],
)
def test_wrong_arguments_are_named(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    given = {"hidden": X, "weight": W, "labels": Y, "support": S} | change
    if "[0, 3)" in message.replace("\\", ""):
        given["weight"] = W[:3]
    with pytest.raises(error, match=message):
        linear_support_log_odds(**given)


@pytest.mark.parametrize("sparse", [False, True])
def test_operators_keep_their_promises(sparse: bool) -> None:
    """Schemas, fakes and autograd registrations, as torch checks them."""
    case = make_case(12, 6, 9, full=False)
    ids, offsets = case.support.ids.long(), case.support.offsets
    inputs = (case.hidden.detach(), case.weight.detach(), ids, offsets)
    torch.library.opcheck(ops.support_products, inputs, {"sparse": sparse})
    upstream = torch.randn(ids.shape[0], dtype=torch.float64)
    torch.library.opcheck(
        torch.ops.fastadapt.support_products_backward,
        (upstream, *inputs),
        {"wanted": [True, True], "sparse": sparse},
        test_utils=("test_schema", "test_faketensor"),
    )
