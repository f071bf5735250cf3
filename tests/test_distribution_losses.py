"""Losses that look at a whole distribution or at several of its ids: formulas, edges.

Logits are the hidden states of a head that is the identity, so that a formula on probabilities is
the truth of values and gradients.
"""

import math

import mpmath
import pytest
import torch
import torch.nn.functional as F

import fastadapt
from fastadapt import (
    Responses,
    candidate_log_odds,
    candidate_unlikelihood_penalty,
    entropy_bonus,
    linear_candidate_log_odds,
    linear_log_odds,
    mle_loss,
    previous_tokens,
    reference,
    smoothed_mle_loss,
    top_k_divergence,
    z_loss,
)

V, B, T, K = 11, 3, 5, 4
INF, NAN = float("inf"), float("nan")
KINDS = ("kl", "reverse_kl")
REDUCTIONS = ("token_mean", "sequence_sum")


class Batch:
    """Logits (B, T, V) with labels, some of which do not count, and a teacher's top K."""

    def __init__(self, dtype=torch.float64):
        self.z = (torch.randn(B, T, V, dtype=dtype) * 2).requires_grad_()
        self.y = torch.randint(V, (B, T))
        self.y[torch.rand(B, T) < 0.3] = -100
        self.y[:, 1] = 3
        self.used = self.y != -100
        self.head = torch.eye(V, dtype=dtype)
        self.p = self.z.detach().softmax(-1)
        self.onehot = F.one_hot(self.y.clamp(min=0), V).to(dtype)
        teacher = torch.randn(B, T, V, dtype=dtype) * 2
        logps, self.index = teacher.log_softmax(-1).topk(K)
        self.teacher_logps = logps
        self.teacher_set = linear_candidate_log_odds(
            teacher, self.head, self.index, outputs=("set_log_odds",)
        )[1]
        self.mask = torch.rand(B, T, K) < 0.8
        self.mask[0, 1] = False  # an empty set in a row that counts

    def scored(self):
        """Responses, and by name what the head gives beside their log-odds."""
        names = ("logsumexp", "entropy")
        m, lse, entropy = linear_log_odds(self.z, self.head, self.y, outputs=names)
        return Responses.from_labels(m, self.y), lse, entropy

    def student(self):
        """Candidates, their mask and the log-odds of the set."""
        of_each, of_set = linear_candidate_log_odds(
            self.z, self.head, self.index, self.mask, outputs=("set_log_odds",)
        )
        return of_each, self.mask, of_set

    def weights(self, reduction):
        """(B, T, 1): what each row's gradient is divided by."""
        n = self.used.sum() if reduction == "token_mean" else B
        return (self.used.double() / n)[..., None]


def packed(side, order):
    """A padded side in the packed layout, its tokens in another order."""
    ids = torch.arange(len(side.mask))[:, None].expand_as(side.mask)
    ids = torch.where(side.mask, ids, -1).flatten()[order]
    return Responses(side.log_odds.flatten()[order], segments=ids, num_segments=len(side.mask))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradients_of_regularisers_are_those_of_their_formulas(reduction):
    """∂L/∂z as the docstrings have it, and the value, to 1e-12, with a signed upstream."""
    for _ in range(3):
        x, upstream = Batch(), torch.randn((), dtype=torch.float64)
        w, p, z = x.weights(reduction), x.p, x.z.detach()
        lse, log_p = z.logsumexp(-1, keepdim=True), z.log_softmax(-1)
        entropy = -(p * log_p).sum(-1, keepdim=True)
        chosen, ours_lse, ours_entropy = x.scored()
        mean = x.z.mean(-1)
        nll = F.cross_entropy(
            z.flatten(0, 1), x.y.flatten(), label_smoothing=0.3, reduction="none"
        ).view(B, T, 1)
        cases = (
            (z_loss(chosen, ours_lse, reduction=reduction), lse.square(), 2 * lse * p),
            (
                entropy_bonus(chosen, ours_entropy, reduction=reduction),
                -entropy,
                p * (log_p + entropy),
            ),
            (
                smoothed_mle_loss(chosen, ours_lse, mean, label_smoothing=0.3, reduction=reduction),
                nll,
                p - 0.7 * x.onehot - 0.3 / V,
            ),
        )
        for loss, value, gradient in cases:
            assert loss.dtype == torch.float64 and loss.shape == ()
            torch.testing.assert_close(loss, (w * value).sum(), rtol=1e-12, atol=1e-12)
            (found,) = torch.autograd.grad(loss, x.z, upstream, retain_graph=True)
            torch.testing.assert_close(found, upstream * w * gradient, rtol=0, atol=1e-12)
    plain = smoothed_mle_loss(chosen, ours_lse, mean, label_smoothing=0.0, reduction=reduction)
    assert torch.equal(plain, mle_loss(chosen, reduction=reduction))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("given", (True, False), ids=("teacher's tail", "its sum"))
@pytest.mark.parametrize("kind", KINDS)
def test_top_k_divergence_is_its_formula(kind, given, reduction):
    """On the K + 1 probabilities; the gradient by autograd of those, and of "kl" as printed."""
    for _ in range(3):
        x, upstream = Batch(), torch.randn((), dtype=torch.float64)
        chosen = x.scored()[0]
        if not given:  # candidates without a mask: what is masked would be in the tail
            x.mask[1:] = True
        inside = torch.zeros(B, T, V, dtype=torch.bool)
        inside.scatter_(2, x.index, x.mask)  # ids of a row are distinct
        z = x.z.detach().requires_grad_()
        p = z.softmax(-1)
        q = torch.zeros(B, T, V, dtype=torch.float64).scatter_(2, x.index, x.teacher_logps.exp())
        q = torch.where(inside, q, 0.0)
        big_q, big_p = q.sum(-1, keepdim=True), torch.where(inside, p, 0.0).sum(-1, keepdim=True)
        a, b = (q, p) if kind == "kl" else (p, q)
        tail_a, tail_b = (1 - big_q, 1 - big_p) if kind == "kl" else (1 - big_p, 1 - big_q)
        terms = torch.where(inside, a * (a / torch.where(inside, b, 1.0)).log(), 0.0)
        rows = terms.sum(-1, keepdim=True) + tail_a * (tail_a / tail_b).log()
        rows = torch.where(inside.any(-1, keepdim=True), rows, 0.0)
        truth = (x.weights(reduction) * rows).sum()
        tail = None
        if given:  # that of the ids that count
            lost = 1 - big_q[..., 0]
            tail = (big_q[..., 0] / lost).log()
        loss = top_k_divergence(
            chosen, *x.student(), x.teacher_logps, teacher_set_log_odds=tail, kind=kind,
            reduction=reduction,
        )  # fmt: skip
        torch.testing.assert_close(loss, truth, rtol=1e-12, atol=1e-12)
        (found,) = torch.autograd.grad(loss, x.z, upstream)
        (wanted,) = torch.autograd.grad(truth, z, upstream)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
        if kind == "kl":
            p, big_p = p.detach(), big_p.detach()
            printed = torch.where(inside, p - q, p * (big_q - big_p) / (1 - big_p))
            printed = torch.where(inside.any(-1, keepdim=True), printed, 0.0)
            printed = upstream * x.weights(reduction) * printed
            torch.testing.assert_close(found, printed, rtol=0, atol=1e-12)


def losses_of(package, x, chosen, flat, **options):
    """Every loss of these numbers, by name; `flat` lays them out as the responses are."""
    m, lse, entropy = x.scored()
    of_each, mask, of_set = x.student()
    mean, rest = x.z.mean(-1), (flat(x.teacher_logps),)
    sets = chosen, flat(of_each), flat(mask), flat(of_set)
    named = {
        "z": package.z_loss(chosen, flat(lse), **options),
        "entropy": package.entropy_bonus(chosen, flat(entropy), **options),
        "smoothed": package.smoothed_mle_loss(chosen, flat(lse), flat(mean), **options),
    }
    for kind in KINDS:
        for tail in (None, flat(x.teacher_set)):
            named[f"{kind} {tail is None}"] = package.top_k_divergence(
                *sets, *rest, teacher_set_log_odds=tail, kind=kind, **options
            )
    return named


@pytest.mark.parametrize("layout", ("padded", "packed"))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
def test_equals_its_reference(dtype, layout):
    x = Batch(dtype)
    chosen, order = x.scored()[0], torch.randperm(B * T)
    if layout == "packed":
        chosen = packed(chosen, order)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5

    def flat(numbers):
        return numbers.flatten(0, 1)[order] if layout == "packed" else numbers

    for divisors in ({}, {"total_tokens": 40, "total_sequences": 9}):
        side = chosen._replace(**divisors)
        for reduction in REDUCTIONS:
            ours, truth = (
                losses_of(package, x, side, flat, reduction=reduction)
                for package in (fastadapt, reference)
            )
            for name, loss in ours.items():
                assert loss.dtype == truth[name].dtype == dtype
                torch.testing.assert_close(loss, truth[name], rtol=tolerance, atol=tolerance)
                found, wanted = (
                    torch.autograd.grad(v[name], x.z, retain_graph=True)[0] for v in (ours, truth)
                )
                torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)


def test_gradcheck():
    """Of the numbers that the losses take."""
    x = Batch()
    chosen = x.scored()[0]
    m, lse = (y.detach().clone().requires_grad_() for y in (chosen.log_odds, x.scored()[1]))
    mean = torch.randn(B, T).double().requires_grad_()
    of_each, of_set = (x.student()[i].detach().requires_grad_() for i in (0, 2))
    mask = chosen.mask
    torch.autograd.gradcheck(lambda a: z_loss(chosen, a), lse)
    torch.autograd.gradcheck(lambda a: entropy_bonus(chosen, a), lse)
    torch.autograd.gradcheck(
        lambda a, b, c: smoothed_mle_loss(Responses(a, mask), b, c), (m, lse, mean)
    )
    for kind in KINDS:
        torch.autograd.gradcheck(
            lambda a, b: top_k_divergence(
                chosen,
                a,
                x.mask,
                b,
                x.teacher_logps,
                kind=kind,  # noqa: B023
            ),
            (of_each, of_set),
        )


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", (1, 3))
@pytest.mark.parametrize("tails", ((1e-12, 3e-12), (1e-12, 1e-3), (1e-30, 1e-12)), ids=str)
def test_tails_are_exact(tails, k, kind, dtype):
    """At Q = 1 - 1e-12, against 60 digits: values, and the gradient on an id of the tail.

    A sum of K + 1 terms that cancel keeps the digits of its largest term; of one id there is no
    term but those of the tail. 1 - Σ p would have none in float32, and four in float64.
    """
    shares = torch.tensor([1.0] if k == 1 else [0.5, 0.3, 0.2]).double()

    def logits(tail):
        z = torch.full((1, 1, V), math.log(tail / (V - k)), dtype=torch.float64)
        z[0, 0, :k] = shares.log()
        return z.to(dtype)

    teacher, student = logits(tails[0]), logits(tails[1]).requires_grad_()
    head, index = torch.eye(V, dtype=dtype), torch.arange(k).expand(1, 1, k)
    mask = torch.ones_like(index, dtype=torch.bool)
    of_each, of_set = linear_candidate_log_odds(student, head, index, outputs=("set_log_odds",))
    known, known_set = linear_candidate_log_odds(teacher, head, index, outputs=("set_log_odds",))
    chosen = Responses(of_set.detach(), torch.ones(1, 1, dtype=torch.bool))
    loss = top_k_divergence(
        chosen, of_each, mask, of_set, fastadapt.label_logps(known),
        teacher_set_log_odds=known_set, kind=kind,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(loss, student)
    with mpmath.workdps(60):
        q, p = (
            [mpmath.exp(mpmath.mpf(v)) for v in z.detach().double().flatten().tolist()]
            for z in (teacher, student)
        )
        q, p = ([v / sum(row) for v in row] for row in (q, p))
        tail_q, tail_p = sum(q[k:]), sum(p[k:])
        events = [*q[:k], tail_q], [*p[:k], tail_p]
        a, b = events if kind == "kl" else events[::-1]
        value = sum(x * mpmath.log(x / y) for x, y in zip(a, b, strict=True))
        largest = max(abs(x * mpmath.log(x / y)) for x, y in zip(a, b, strict=True))
        scale = largest if k == 1 else mpmath.mpf(1)  # logarithms of the shares are of that size
        if kind == "kl":
            slope = p[k] * (tail_p - tail_q) / tail_p
        else:
            slope = p[k] * (mpmath.log(tail_p / tail_q) - value)
        value, scale, slope = float(value), float(scale), float(slope)
    # logits near -30 have half a step of 1e-6 in float32, and the log-sum-exp some of them
    eps = 64 * torch.finfo(dtype).eps
    assert abs(float(loss.detach()) - value) <= eps * scale
    assert float(gradient[0, 0, k]) == pytest.approx(slope, rel=eps * (1 if k == 1 else 4))
    assert gradient.isfinite().all()


def test_ids_that_come_twice_count_once():
    """Where the mask leaves each once; the set's log-odds count it once in any case."""
    x = Batch()
    twice = torch.cat([x.index, x.index[..., :2]], -1)
    mask = torch.cat([x.mask, torch.zeros_like(x.mask[..., :2])], -1)
    student = linear_candidate_log_odds(x.z, x.head, twice, mask, outputs=("set_log_odds",))
    teacher = torch.cat([x.teacher_logps, x.teacher_logps[..., :2]], -1)
    chosen = x.scored()[0]
    for kind in KINDS:
        once = top_k_divergence(chosen, *x.student(), x.teacher_logps, kind=kind)
        loss = top_k_divergence(chosen, student[0], mask, student[1], teacher, kind=kind)
        torch.testing.assert_close(loss, once, rtol=1e-12, atol=1e-12)


def one_row(dtype=torch.float64):
    """Responses of one token that counts."""
    return Responses(torch.zeros(1, 1, dtype=dtype), torch.ones(1, 1, dtype=torch.bool))


@pytest.mark.parametrize("stated", (True, False))
def test_a_teacher_without_a_tail(stated):
    """Q = 1: the tail adds nothing to "kl"; "reverse_kl" is +inf unless the student has none.

    Where it is not stated, a tail below the rounding of the sum counts as that in "reverse_kl".
    """
    z = torch.randn(1, 1, V).double().requires_grad_()
    index = torch.tensor([[[2, 5]]])
    mask = torch.ones_like(index, dtype=torch.bool)
    q = torch.tensor([[[0.25, 0.75]]]).double()
    student = linear_candidate_log_odds(z, torch.eye(V).double(), index, outputs=("set_log_odds",))
    tail = torch.full((1, 1), INF).double() if stated else None
    given = one_row(), student[0], mask, student[1], q.log()
    loss = top_k_divergence(*given, teacher_set_log_odds=tail)
    (gradient,) = torch.autograd.grad(loss, z, retain_graph=True)
    p = z.detach().softmax(-1)
    truth = (q * (q.log() - p[..., [2, 5]].log())).sum()
    torch.testing.assert_close(loss, truth, rtol=1e-12, atol=1e-12)
    at = torch.zeros_like(p).scatter_(2, index, q)
    torch.testing.assert_close(gradient, p - at, rtol=0, atol=1e-12)
    if not stated:  # a sum that is more than 1 by its rounding leaves nothing
        more = top_k_divergence(*given[:-1], q.log() + 1e-14)
        torch.testing.assert_close(more, truth, rtol=1e-12, atol=1e-12)
    reverse = top_k_divergence(*given, teacher_set_log_odds=tail, kind="reverse_kl")
    if stated:
        assert reverse == INF
    else:
        known = (
            4 * torch.finfo(torch.float64).eps
            - torch.finfo(torch.float64).eps * (q * q.log()).sum()
        )
        rest = 1 - p[..., [2, 5]].sum()
        of_ids = (p[..., [2, 5]] * (p[..., [2, 5]].log() - q.log())).sum()
        truth = of_ids + rest * (rest.log() - known.log())
        torch.testing.assert_close(reverse, truth, rtol=1e-12, atol=0)
    both = torch.randn(1, 1, 2).double().requires_grad_()
    index = torch.tensor([[[0, 1]]])
    student = linear_candidate_log_odds(
        both, torch.eye(2).double(), index, outputs=("set_log_odds",)
    )
    for kind in KINDS:
        given = one_row(), student[0], mask, student[1], q.log()
        loss = top_k_divergence(*given, teacher_set_log_odds=tail, kind=kind)
        a, b = (q.log(), both.log_softmax(-1))[:: 1 if kind == "kl" else -1]
        truth = (a.exp() * (a - b)).sum()
        torch.testing.assert_close(loss, truth, rtol=1e-12, atol=1e-12)
        found, wanted = (torch.autograd.grad(v, both, retain_graph=True)[0] for v in (loss, truth))
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("way", ("all ids", "forbidden ids"))
def test_a_tail_below_the_rounding_of_the_teacher_is_none(way, dtype):
    """Of all ids, or of those that a bias leaves: the sum of q is 1 but for its rounding."""
    k = 31 if way == "all ids" else 6
    hidden, weight = torch.randn(1, 5, 8), torch.randn(31, 8)
    bias = torch.zeros(31).index_fill_(0, torch.arange(k, 31), -INF)
    teacher = (torch.randn(1, 5, k) * 3).log_softmax(-1).to(dtype)
    index = torch.arange(k).expand(1, 5, k).contiguous()
    mask = torch.ones_like(index, dtype=torch.bool)
    student = linear_candidate_log_odds(
        hidden, weight, index, mask, bias, outputs=("set_log_odds",)
    )
    rows = Responses(torch.zeros(1, 5), torch.ones(1, 5, dtype=torch.bool))
    logps = torch.nn.functional.linear(hidden, weight, bias).double().log_softmax(-1)[..., :k]
    q = teacher.double()
    for kind, terms in (("kl", q.exp() * (q - logps)), ("reverse_kl", logps.exp() * (logps - q))):
        for package in (fastadapt, reference):
            loss = package.top_k_divergence(rows, student[0], mask, student[1], teacher, kind=kind)
            torch.testing.assert_close(
                loss.double(), terms.sum(-1).mean(), rtol=2e-6, atol=2e-6, msg=f"{kind} {package}"
            )


def test_reverse_kl_of_confident_teachers_is_no_noise():
    """Tails of 1e-9 to 1e-7 in float32, of which log-probabilities know nothing: much the same."""
    student = torch.zeros(1, 1, 2), torch.zeros(1, 1)
    mask = torch.ones(1, 1, 2, dtype=torch.bool)
    values = []
    for teacher in ([-1e-9, -22.0], [-3e-8, -17.3], [-6e-8, -17.3], [-1.2e-7, -17.3]):
        given = one_row(torch.float32), student[0], mask, student[1], torch.tensor([[teacher]])
        assert top_k_divergence(*given).isfinite()
        values.append(float(top_k_divergence(*given, kind="reverse_kl")))
        terms = [0.5 * (math.log(0.5) - x) for x in (*teacher, math.log(4 * 2**-23))]
        assert values[-1] == pytest.approx(sum(terms), rel=1e-5)


def test_probabilities_without_a_logarithm_are_no_number():
    student = torch.zeros(1, 1, 2), torch.zeros(1, 1)
    mask = torch.ones(1, 1, 2, dtype=torch.bool)
    for package in (fastadapt, reference):
        given = one_row(torch.float32), student[0], mask, student[1], torch.tensor([[[0.5, 0.25]]])
        assert package.top_k_divergence(*given).isnan()


def test_events_of_probability_zero():
    """0 ln 0 is 0; what the second distribution alone forbids is +inf, and no gradient is NaN."""
    index = torch.tensor([[[0, 1]]])
    mask = torch.ones_like(index, dtype=torch.bool)
    bias = torch.tensor([-INF, 0.0, 0.0, 0.0]).double()
    hidden = torch.zeros(1, 1, 4).double().requires_grad_()
    student = linear_candidate_log_odds(
        hidden, torch.eye(4).double(), index, None, bias, outputs=("set_log_odds",)
    )
    given = one_row(), student[0], mask, student[1]
    for q, kind, expected in (
        ([0.0, 1 / 3], "kl", 0.0),
        ([0.0, 1 / 3], "reverse_kl", 0.0),
        ([0.1, 0.5], "kl", INF),
        ([0.1, 0.5], "reverse_kl", 1 / 3 * math.log(2 / 3) + 2 / 3 * math.log(2 / 3 / 0.4)),
        ([0.5, 0.0], "reverse_kl", INF),
    ):
        loss = top_k_divergence(*given, torch.tensor([[q]], dtype=torch.float64).log(), kind=kind)
        assert float(loss.detach()) == pytest.approx(expected, rel=1e-12, abs=1e-12), (q, kind)
        (gradient,) = torch.autograd.grad(loss, hidden, retain_graph=True)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("gap", (0.0, 5.0, 20.0, 60.0, 300.0))
def test_entropies_near_zero(gap):
    """A bonus in float32 has the digits of float64's formula, and a finite gradient."""
    z = torch.zeros(1, 1, V)
    z[..., 4] = gap
    z.requires_grad_()
    m, entropy = linear_log_odds(z, torch.eye(V), torch.tensor([[4]]), outputs=("entropy",))
    loss = entropy_bonus(Responses(m, torch.ones(1, 1, dtype=torch.bool)), entropy)
    (gradient,) = torch.autograd.grad(loss, z)
    with mpmath.workdps(200):
        weights = [mpmath.exp(v) for v in z.detach().double().flatten().tolist()]
        p = [w / sum(weights) for w in weights]
        h = -sum(x * mpmath.log(x) for x in p)
        slope = p[0] * (mpmath.log(p[0]) + h)
    # flat rows have a slope of 0 from terms near 2; float32 flushes what is below 1e-37
    abs_error = 1e-7 if gap == 0 else 1e-37
    assert float(loss.detach()) == pytest.approx(-float(h), rel=1e-5, abs=1e-37)
    assert float(gradient[0, 0, 0]) == pytest.approx(float(slope), rel=1e-5, abs=abs_error)
    assert gradient.isfinite().all()


def test_logits_of_minus_infinity():
    """Ids without mass change nothing but a smoothed label, which is then infinite."""
    bias = torch.zeros(V).double()
    bias[[0, 7]] = -INF
    hidden = torch.randn(1, 2, V).double().requires_grad_()
    labels, names = torch.tensor([[3, 1]]), ("logsumexp", "entropy")
    m, lse, entropy = linear_log_odds(hidden, torch.eye(V).double(), labels, bias, outputs=names)
    chosen = Responses.from_labels(m, labels)
    z = (hidden.detach() + bias)[..., [i for i in range(V) if i not in (0, 7)]]
    p, log_p = z.softmax(-1), z.log_softmax(-1)
    for loss, truth in (
        (z_loss(chosen, lse), z.logsumexp(-1).square().mean()),
        (entropy_bonus(chosen, entropy), (p * log_p).sum(-1).mean()),
    ):
        torch.testing.assert_close(loss, truth, rtol=1e-12, atol=1e-12)
        assert torch.autograd.grad(loss, hidden, retain_graph=True)[0].isfinite().all()
    assert smoothed_mle_loss(chosen, lse, (hidden + bias).mean(-1)) == INF
    exact = smoothed_mle_loss(chosen, lse, (hidden + bias).mean(-1), label_smoothing=0.0)
    assert torch.equal(exact, mle_loss(chosen))


def leaves_of(x, chosen, junk):
    """Every loss, and the gradients of the numbers that it takes, with junk where none counts."""
    leaves = []

    def flat(numbers):
        used = x.used if numbers.dim() == 2 else x.used[..., None]
        if numbers.dtype == torch.bool:
            return numbers
        spoilt = torch.where(used, numbers.detach(), junk).requires_grad_(numbers.requires_grad)
        leaves.append(spoilt)
        return spoilt

    found = {}
    for name, loss in losses_of(fastadapt, x, chosen, flat).items():
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        grads = torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True)
        found[name] = [loss.detach(), *(g for g in grads if g is not None)]
    return found


def test_rows_that_do_not_count_may_hold_anything():
    """NaN and infinities there change no bit of a loss, and get a gradient of 0."""
    x = Batch(torch.float32)
    chosen = x.scored()[0]
    clean = leaves_of(x, chosen, 0.5)
    for junk in (NAN, INF, -INF):
        for name, found in leaves_of(x, chosen, junk).items():
            assert len(found) > 1, name
            for a, b in zip(found, clean[name], strict=True):
                assert torch.equal(a, b), name
            assert all((g[~x.used] == 0).all() for g in found[1:])


def test_nothing_counts():
    x = Batch()
    x.y[:] = -100
    chosen = x.scored()[0]
    for loss in losses_of(fastadapt, x, chosen, lambda numbers: numbers).values():
        assert float(loss.detach()) == 0
        assert (torch.autograd.grad(loss, x.z, retain_graph=True)[0] == 0).all()


def sets_of(index, mask):
    """The candidates of each position, as lists that would show one that comes twice."""
    return [
        [sorted(i[m].tolist()) for i, m in zip(row, kept, strict=True)]
        for row, kept in zip(index, mask, strict=True)
    ]


@pytest.mark.parametrize("window", (None, 1, 3, 50))
def test_previous_tokens_are_those_of_the_paper(window):
    """Each earlier token once and never the label, in no other sequence: sets, by plain loops."""
    for ids in (2, 5, 30):
        labels = torch.randint(ids, (4, 9))
        labels[torch.rand(4, 9) < 0.2] = -100
        ours = previous_tokens(labels, window=window)
        assert ours[0].shape == ours[1].shape == (4, 9, min(window or 9, 9))
        assert ours[1].any() and not ours[1][:, 0].any()
        assert sets_of(*ours) == sets_of(*reference.previous_tokens(labels, window=window))
    for shape in ((0, 4), (2, 0), (3, 1)):
        index, mask = previous_tokens(torch.zeros(shape, dtype=torch.int64), window=window)
        assert not mask.any() and index.shape[:2] == shape


@pytest.mark.parametrize("of_logits", (True, False), ids=("logits", "head"))
def test_welleck_objective(of_logits):
    """-log p(y) - α Σ_{c in C} log(1 - p(c)), on probabilities and sets; values and gradients."""
    labels = torch.randint(4, (B, 7))
    labels[0, 5:] = -100
    z = torch.randn(B, 7, V).double().requires_grad_()
    index, mask = previous_tokens(labels)
    if of_logits:
        candidates = candidate_log_odds(z, index, mask)
    else:
        candidates = linear_candidate_log_odds(z, torch.eye(V).double(), index, mask)
    chosen = Responses.from_labels(z, labels, total_tokens=1)  # the sum of the published code
    loss = mle_loss(chosen) + 0.6 * candidate_unlikelihood_penalty(chosen, candidates, mask)
    p, truth = z.softmax(-1), 0.0
    for b, row in enumerate(labels.tolist()):
        for t, y in enumerate(row):
            if y != -100:
                truth = truth - p[b, t, y].log()
                for c in set(row[:t]) - {y, -100}:
                    truth = truth - 0.6 * (1 - p[b, t, c]).log()
    torch.testing.assert_close(loss, truth, rtol=1e-12, atol=1e-12)
    found, wanted = (torch.autograd.grad(v, z, retain_graph=True)[0] for v in (loss, truth))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_candidates_that_are_certain_are_pushed_down():
    """p(c) rounds to 1 in float32: published code clamps there, and its gradient is 0."""
    labels = torch.tensor([[1, 2, 1, 0]])
    index, mask = previous_tokens(labels)
    z = torch.zeros(1, 4, V)
    z[0, 1, 1] = 40.0
    z.requires_grad_()
    candidates = linear_candidate_log_odds(z, torch.eye(V), index, mask)
    chosen = Responses.from_labels(z, labels, total_tokens=1)
    loss = candidate_unlikelihood_penalty(chosen, candidates, mask)
    (gradient,) = torch.autograd.grad(loss, z)
    assert float(gradient[0, 1, 1]) == pytest.approx(1.0, rel=1e-6)
    assert (gradient[0, 0] == 0).all()  # no candidates yet


def test_tail_bucket_of_trl():
    """Where its subtraction has digits left; there the same K + 1 numbers."""
    name = "trl.experimental.server_distillation.server_distillation_trainer"
    trl = pytest.importorskip(name, reason="trl is not installed")
    x = Batch()
    x.mask[:] = True
    of_each, mask, of_set = x.student()
    student, kept = trl._add_tail_bucket(fastadapt.label_logps(of_each), mask)
    teacher, _ = trl._add_tail_bucket(x.teacher_logps, mask)
    assert kept.all()
    rows = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    chosen = x.scored()[0]
    loss = top_k_divergence(
        chosen, of_each, mask, of_set, x.teacher_logps, teacher_set_log_odds=x.teacher_set
    )
    torch.testing.assert_close(loss, rows[x.used].mean(), rtol=1e-10, atol=1e-12)


def test_compiled_without_graph_breaks():
    x = Batch(torch.float32)

    def total(z):
        m, lse, entropy = linear_log_odds(z, x.head, x.y, outputs=("logsumexp", "entropy"))
        chosen = Responses.from_labels(m, x.y)
        index, mask = previous_tokens(x.y, window=2)
        candidates = linear_candidate_log_odds(z, x.head, index, mask)
        of_each, of_set = linear_candidate_log_odds(
            z, x.head, x.index, x.mask, outputs=("set_log_odds",)
        )
        return (
            z_loss(chosen, lse)
            + entropy_bonus(chosen, entropy)
            + smoothed_mle_loss(chosen, lse, z.mean(-1))
            + candidate_unlikelihood_penalty(chosen, candidates, mask)
            + top_k_divergence(chosen, of_each, x.mask, of_set, x.teacher_logps)
        )

    torch.compiler.reset()
    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    got, wanted = (torch.autograd.grad(f(x.z), x.z)[0] for f in (compiled, total))
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-7)


def test_arguments_are_checked():
    x = Batch()
    chosen, lse, _ = x.scored()
    of_each, mask, of_set = x.student()
    sets = chosen, of_each, mask, of_set
    teacher = x.teacher_logps
    labels = x.y
    cases = (
        (z_loss, (chosen, lse[:1]), {}, ValueError, r"logsumexp: expected shape \(3, 5\), got"),
        (z_loss, (chosen, lse.long()), {}, TypeError, "logsumexp: expected float32, float64"),
        (z_loss, (chosen, 1.0), {}, TypeError, "logsumexp: expected a Tensor, got float"),
        (z_loss, (lse, lse), {}, TypeError, "chosen: expected Responses, got Tensor"),
        (z_loss, (chosen, lse), {"reduction": "mean"}, ValueError, "reduction: expected one of"),
        (entropy_bonus, (chosen, lse[0]), {}, ValueError, "entropy: expected shape"),
        (smoothed_mle_loss, (chosen, lse, lse[0]), {}, ValueError, "mean_logits: expected shape"),
        (
            smoothed_mle_loss,
            (chosen, lse, lse),
            {"label_smoothing": 1.1},
            ValueError,
            r"label_smoothing: expected a value in \[0, 1\], got 1.1",
        ),
        (previous_tokens, (labels[0],), {}, ValueError, r"labels: expected shape \(B, T\), got"),
        (previous_tokens, (labels.int(),), {}, TypeError, "labels: expected a tensor of torch.int"),
        (previous_tokens, (labels,), {"window": 0}, ValueError, "window: expected at least 1"),
        (top_k_divergence, (*sets, teacher), {"kind": "js"}, ValueError, "kind: expected one of"),
        (top_k_divergence, (*sets, teacher[0]), {}, ValueError, "teacher_logps: expected shape"),
        (
            top_k_divergence,
            (*sets, teacher[..., :2]),
            {},
            ValueError,
            r"teacher_logps: expected shape \(3, 5, 4\), got \(3, 5, 2\)",
        ),
        (
            top_k_divergence,
            (*sets, teacher),
            {"teacher_set_log_odds": teacher},
            ValueError,
            r"teacher_set_log_odds: expected shape \(3, 5\), got",
        ),
        (
            top_k_divergence,
            (*sets, teacher.clone().requires_grad_()),
            {},
            ValueError,
            "teacher_logps: expected a teacher without a gradient",
        ),
        (
            top_k_divergence,
            (chosen, of_each, mask[..., :2], of_set, teacher),
            {},
            ValueError,
            "candidate_mask: expected torch.bool",
        ),
        (
            top_k_divergence,
            (chosen, of_each, mask, of_set[0], teacher),
            {},
            ValueError,
            "set_log_odds: expected shape",
        ),
    )
    for function, given, options, kind, message in cases:
        with pytest.raises(kind, match=message):
            function(*given, **options)
