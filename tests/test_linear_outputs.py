"""What else a linear head gives in the same pass: outputs with gradients, several ids a row."""

import itertools

import pytest
import torch

import fastadapt
from fastadapt import linear_candidate_log_odds, linear_log_odds, reference
from fastadapt.linear import plan_of

V = 5003  # two whole tiles and a part
INF = float("inf")
SHAPES = {"plain": {}, "capped": {"softcap": 5.0, "logit_scale": 1.5}}
PLANS = {
    "recompute": {"memory_budget": 0},
    "half_kept": {"memory_budget": 12 * 3000 * 8},
    "kept": {"memory_budget": 1 << 30},
    "frozen": {},
}
OF_LABELS = ("entropy", "logsumexp", "sum_of_squares")
OF_SETS = ("set_log_odds", *OF_LABELS)


def head(n, h, v, dtype, k=4):
    """hidden, weight, index (n, k) with repeated and masked ids, its mask, bias."""
    hidden, weight, bias = torch.randn(n, h), torch.randn(v, h) * 2 / h**0.5, torch.randn(v)
    index, mask = torch.randint(v, (n, k)), torch.rand(n, k) > 0.3
    if k > 1:
        index[::3, 1] = index[::3, 0]
    if n:
        mask[n // 2] = False
    index = torch.where(mask, index, -7)
    return hidden.to(dtype), weight.to(dtype), index, mask, bias.to(dtype)


def results(package, given, plan, names, upstream, **options):
    """Log-odds, outputs, and the gradients of all of them together."""
    hidden, weight, index, mask, bias = given
    leaves = [x.clone() for x in (hidden, weight, bias)]
    for leaf in leaves[: 1 if plan == "frozen" else 3]:
        leaf.requires_grad_()
    rows = leaves[0], leaves[1], index
    if mask is None:
        found = package.linear_log_odds(*rows, leaves[2], outputs=names, **options)
    else:
        found = package.linear_candidate_log_odds(*rows, mask, leaves[2], outputs=names, **options)
    total = sum((x.double() * u.view(x.shape)).sum() for x, u in zip(found, upstream, strict=True))
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return [x.detach() for x in (*found, *torch.autograd.grad(total, wanted))]


def upstream_of(n, k, names):
    """Random signs and sizes, some of them 0."""
    every = [torch.randn(n, k).double(), *(torch.randn(n).double() for _ in names)]
    every[0][0] = 0.0
    return every


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("k", (0, 1, 4), ids=("label", "one candidate", "candidates"))
def test_equals_the_truth_in_float64(k, plan, shape):
    """A frozen head in both of its ways: with and without what takes one more product."""
    names = OF_SETS if k else OF_LABELS
    hidden, weight, index, mask, bias = head(12, 33, V, torch.float64, max(k, 1))
    if k == 0:
        index, mask = torch.where(mask, index, -100)[:, 0], None
    given = (hidden, weight, index, mask, bias)
    subsets = [names, ("logsumexp",), ()] if plan == "frozen" else [names]
    for some in subsets:
        upstream = upstream_of(12, max(k, 1), some)
        upstream = upstream if some else [*upstream]
        options = {**SHAPES[shape]}
        if not some:
            some, upstream = ("logsumexp",), [upstream[0], torch.zeros(12).double()]
        ours = results(fastadapt, given, plan, some, upstream, **options, **PLANS[plan])
        truth = results(reference, given, plan, some, upstream, **options)
        assert len(ours) == 1 + len(some) + (1 if plan == "frozen" else 3)
        for a, b in zip(ours, truth, strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("plan", PLANS)
def test_gradcheck(plan, monkeypatch):
    monkeypatch.setattr("fastadapt._ops.linear.cpu.CpuWork.tile", 7)
    hidden, weight, index, mask, bias = head(4, 3, 11, torch.float64, 3)
    leaves = [hidden.requires_grad_(), weight, bias]
    for leaf in leaves[1:]:
        leaf.requires_grad_(plan != "frozen")
    labels = torch.where(mask, index, -100)[:, 0]
    for shape in SHAPES.values():
        options = {**shape, **PLANS[plan]}

        def of_sets(h, w, b, options=options):
            rows = h, w, index, mask, b
            return linear_candidate_log_odds(*rows, outputs=OF_SETS, **options)

        def of_labels(h, w, b, options=options):
            return linear_log_odds(h, w, labels, b, outputs=OF_LABELS, **options)

        torch.autograd.gradcheck(of_sets, leaves)
        torch.autograd.gradcheck(of_labels, leaves)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("plan", PLANS)
def test_error_is_no_more_than_that_of_plain_torch(each_capability, plan, dtype):
    """Against float64 truth of the same numbers, by norm; plain torch holds all logits."""
    given = head(40, 48, V, dtype, 3)
    upstream = upstream_of(40, 3, OF_SETS)

    def run(package, dtype, **options):
        inputs = tuple(x.to(dtype) if x.is_floating_point() else x for x in given)
        return results(package, inputs, plan, OF_SETS, upstream, **options)

    truth, plain = run(reference, torch.float64), run(reference, dtype)
    for _ in each_capability():
        ours = run(fastadapt, dtype, **PLANS[plan])
        for exact, theirs, mine in zip(truth, plain, ours, strict=True):
            allowed, error = ((x.double() - exact).norm() / exact.norm() for x in (theirs, mine))
            assert error <= 1.3 * allowed + 3e-7


@pytest.mark.parametrize("tail", (1e-3, 1e-7, 1e-12, 1e-30))
def test_a_set_that_holds_nearly_all_the_mass(tail):
    """1 - Q has no digits left; the set's log-odds have all, and so have the shares within it."""
    logits = torch.full((1, V), float(torch.tensor(tail / (V - 3)).log()))
    logits[0, :3] = torch.tensor([0.5, 0.3, 0.2]).log()
    hidden, weight = torch.eye(1, dtype=torch.float32), logits.t().contiguous()
    hidden.requires_grad_()
    index = torch.tensor([[2, 0, 1, 0]])
    of_each, of_set = linear_candidate_log_odds(hidden, weight, index, outputs=("set_log_odds",))
    (gradient,) = torch.autograd.grad(of_set.sum(), hidden)
    of_each, of_set = of_each.detach(), of_set.detach()
    exact = weight.double()[:, 0]
    outside = exact[3:].logsumexp(0)
    assert abs(float(of_set.double() - (exact[:3].logsumexp(0) - outside))) < 1e-5
    left = torch.nn.functional.logsigmoid(-of_set)  # the logarithm of the mass left
    assert abs(float(left) - float(outside - exact.logsumexp(0))) < 1e-5
    for column, c in enumerate(index[0].tolist()):
        others = torch.cat([exact[:c], exact[c + 1 :]]).logsumexp(0)
        assert abs(float(of_each[0, column].double() - (exact[c] - others))) < 1e-5
    inside, rest = exact[:3].softmax(0) @ exact[:3], exact[3:].softmax(0) @ exact[3:]
    assert abs(float(gradient) - float(inside - rest)) < 1e-5 * abs(float(inside - rest))


@pytest.mark.parametrize("gap", (0.0, 5.0, 20.0, 60.0, 300.0))
def test_entropies_near_zero(gap):
    """To the digits of their type, and their gradients, however sure the model is."""
    logits = torch.zeros(2, V)
    logits[0, 4], logits[1, 9] = gap, gap
    hidden, weight = torch.eye(2), logits.t().contiguous()
    hidden.requires_grad_()
    labels = torch.tensor([4, 3])  # the sure token is the label, or another
    _, entropy = linear_log_odds(hidden, weight, labels, outputs=("entropy",))
    (gradient,) = torch.autograd.grad(entropy.sum(), hidden)
    mass = V - 1
    exact = torch.tensor(gap, dtype=torch.float64, requires_grad=True)
    m = exact - torch.tensor(float(mass)).double().log()
    p, q = m.sigmoid(), (-m).sigmoid()
    softplus = torch.nn.functional.softplus
    truth = p * softplus(-m, threshold=800) + q * softplus(m, threshold=800) + q * (exact - m)
    slope = torch.autograd.grad(truth, exact)[0] * gap  # h moves the gap and nothing else
    for row in range(2):
        assert float(entropy[row]) == pytest.approx(float(truth), rel=2e-5, abs=1e-37)
    assert float(gradient[0, 0]) == pytest.approx(float(slope), rel=2e-4, abs=1e-36)
    assert gradient.isfinite().all()


def test_where_nothing_is_left():
    """All others are -inf, the label is, or everything but one id: finite gradients."""
    hidden = torch.randn(3, 4, requires_grad=True)
    weight, bias = torch.randn(6, 4, requires_grad=True), torch.full((6,), -INF)
    bias[[1, 2]] = 0.0
    both = torch.tensor([[1, 2], [1, 3], [3, 4]])
    every = linear_candidate_log_odds(hidden, weight, both, None, bias, outputs=OF_SETS)
    assert every[1].tolist()[0] == INF
    assert every[1].tolist()[2] == -INF
    truth = reference.linear_candidate_log_odds(
        hidden.double(), weight.double(), both, None, bias.double(), outputs=OF_SETS
    )
    for a, b in zip(every, truth, strict=True):
        torch.testing.assert_close(a, b.float(), rtol=1e-5, atol=3e-6)
    shares = [torch.where(x.isfinite(), x, 0.0).sum() for x in every]
    gradients = torch.autograd.grad(sum(shares), (hidden, weight))
    assert all(g.isfinite().all() for g in gradients)
    alone = linear_log_odds(hidden, weight[1:2], torch.zeros(3).long(), outputs=OF_LABELS)
    assert (alone[0] == INF).all()
    assert alone[1].tolist() == [0.0] * 3
    assert alone[3].tolist() == [1.0] * 3
    (gradient,) = torch.autograd.grad(alone[2].sum(), hidden)
    torch.testing.assert_close(gradient, weight[1:2].detach().expand(3, 4))


def test_metrics_cost_a_frozen_head_no_product():
    hidden, weight = torch.zeros(8, 64, requires_grad=True), torch.zeros(V, 64)
    assert plan_of(hidden, weight).products == 2.0
    assert plan_of(hidden, weight, outputs=("logsumexp", "hit")).products == 2.0
    for name in ("entropy", "sum_of_squares"):
        told = plan_of(hidden, weight, outputs=(name,), memory_budget=0)
        assert (told.name, told.products) == ("recompute", 3.0)
        kept = plan_of(hidden, weight, outputs=(name,), memory_budget=1 << 30)
        assert (kept.name, kept.products) == ("grouped", 2.0)


@pytest.mark.parametrize(("k", "frozen"), [*itertools.product((1, 3), (False, True))])
def test_candidates_are_compiled_without_graph_breaks(k, frozen):
    hidden, weight, index, mask, bias = head(6, 16, V, torch.float32, k)
    leaves = [hidden.requires_grad_()]
    if not frozen:
        leaves.append(weight.requires_grad_())

    def loss(h, w):
        rows = h * 2, w, index, mask, bias
        m, of_set = linear_candidate_log_odds(*rows, outputs=("set_log_odds",))
        return torch.nn.functional.logsigmoid(m).mean() + of_set.mean()

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got, wanted = (torch.autograd.grad(f(hidden, weight), leaves) for f in (compiled, loss))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_candidates_of_autocast_shapes_and_no_rows():
    hidden, weight, index, mask, bias = head(6, 16, V, torch.float32, 3)
    flat = linear_candidate_log_odds(hidden, weight, index, mask, bias, outputs=("entropy",))
    rows = hidden.view(2, 3, 16), weight, index.view(2, 3, 3), mask.view(2, 3, 3), bias
    folded = linear_candidate_log_odds(*rows, outputs=("entropy",))
    assert [x.shape for x in folded] == [(2, 3, 3), (2, 3)]
    for a, b in zip(folded, flat, strict=True):
        assert torch.equal(a.flatten(), b.flatten())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = linear_candidate_log_odds(hidden, weight, index, mask, bias)
    half = [x.bfloat16() for x in (hidden, weight)]
    assert torch.equal(cast, linear_candidate_log_odds(*half, index, mask, bias.bfloat16()))
    empty = linear_candidate_log_odds(hidden[:0], weight, index[:0], outputs=OF_SETS)
    assert [x.shape for x in empty] == [(0, 3), *[(0,)] * 4]


def test_threads_change_no_bit(num_threads):
    given, upstream = head(9, 24, V, torch.bfloat16, 3), upstream_of(9, 3, OF_SETS)
    num_threads(1)
    once = results(fastadapt, given, "recompute", OF_SETS, upstream)[:5]
    num_threads(2)
    again = results(fastadapt, given, "recompute", OF_SETS, upstream)[:5]
    for a, b in zip(once, again, strict=True):
        assert torch.equal(a, b)


def test_arguments_are_checked():
    hidden, weight, index, mask, bias = head(4, 8, 50, torch.float32, 3)
    index = index.clamp(min=0)
    cases = (
        ((hidden, weight, index[:, :0]), {}, ValueError, r"index: expected K >= 1 ids a row, got"),
        ((hidden, weight, index[0]), {}, ValueError, "index: expected"),
        ((hidden, weight, index.int()), {}, TypeError, "index: expected"),
        ((hidden, weight, index + 50), {}, ValueError, r"index: expected ids in \[0, 50\), got"),
        ((hidden, weight, index - 100), {}, ValueError, r"index: expected ids in \[0, 50\), got"),
        ((hidden, weight, index, mask[:2]), {}, ValueError, "mask: expected"),
        ((hidden, weight, index, mask.long()), {}, TypeError, "mask: expected"),
        ((hidden, weight, index), {"outputs": ["hit"]}, ValueError, "outputs: expected names of"),
        ((hidden, weight, index), {"outputs": "entropy"}, TypeError, "got the string 'entropy'"),
        ((hidden, weight, index), {"softcap": 0.0}, ValueError, "softcap: expected"),
        ((hidden, weight, index), {"differentiable": 1}, TypeError, "differentiable: expected"),
        ((hidden, weight[:, :3], index), {}, ValueError, "weight: expected shape"),
    )
    for given, options, kind, message in cases:
        with pytest.raises(kind, match=message):
            linear_candidate_log_odds(*given, **options)
