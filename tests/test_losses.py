"""The losses against the table of their gradients, their references, the truth and other libraries.

Batches and cases are in `loss_cases.py`; what is of preferences alone in
`test_preference_losses.py`, and trl in `test_losses_against_trl.py`.
"""

from inspect import signature

import mpmath
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st

import fastadapt
from fastadapt import Adaptor, Responses, RewardPenalizeLoss, adapted_log_odds, losses, reference
from fastadapt.losses import CATALOGUE, CONTAIN_MLE, FORMULAS
from loss_cases import (
    BESIDE,
    CASES,
    ONE_EACH,
    REFERENCES,
    Batch,
    Case,
    Side,
    V,
    log_odds_of,
    odds,
)

DPO_INPUTS = ("chosen", "rejected", "ref_chosen_logps", "ref_rejected_logps")
each_case = pytest.mark.parametrize("case", CASES, ids=str)
each_loss = pytest.mark.parametrize("case", ONE_EACH, ids=str)
# the published norm is one whose value depends on how the batch is split
SPLITTABLE = [
    case
    for case in CASES
    if case.options.get("norm") != "batch_token_mean" and "batch" not in CATALOGUE[case.name].needs
]


def test_every_loss_has_a_case_and_a_reference():
    assert {case.name for case in CASES} == set(FORMULAS)
    public = {f.__name__ for f in FORMULAS.values()}
    assert public <= set(losses.__all__) and public <= set(reference.__all__)


@pytest.mark.parametrize("name", sorted(set(losses.__all__) & set(reference.__all__)))
def test_references_have_the_signatures_of_the_losses(name):
    own, other = (signature(getattr(package, name)).parameters for package in (losses, reference))
    assert [(p.name, p.kind, p.default) for p in own.values()] == [
        (p.name, p.kind, p.default) for p in other.values()
    ]


@pytest.mark.parametrize("case", [case for case in CASES if case.c], ids=str)
def test_gradient_is_that_of_the_table(case):
    """∂L/∂z through explicit logits, with a signed upstream, against c_t (s - e_y)."""
    for _ in range(3):
        x, upstream = Batch(), torch.randn((), dtype=torch.float64)
        loss = case(x.inputs())
        assert loss.dtype == torch.float64 and loss.shape == ()
        gradients = torch.autograd.grad(loss, x.leaves, upstream, allow_unused=True)
        wanted = case.c(x)
        wanted = (*wanted, *[0] * (3 - len(wanted)))
        sides = (x.chosen, x.rejected, x.gold)
        for side, c, gradient in zip(sides, wanted, gradients, strict=True):
            c = torch.as_tensor(c, dtype=torch.float64) * side.mask
            onehot = F.one_hot(side.y, V)
            expected = upstream * c[..., None] * (side.s - onehot)
            gradient = torch.zeros_like(expected) if gradient is None else gradient
            torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


def test_candidates_gradient_is_that_of_the_table():
    """s (w - Σ a_c) - w e_y + Σ a_c e_c, a_c = α/N p_c/(1-p_c), w = 1/N, for the sum with MLE."""
    x, alpha = Batch(), 0.6
    objective = RewardPenalizeLoss({"mle": 1.0, "candidate_unlikelihood_penalty": alpha})
    inputs = x.inputs()
    loss, _ = objective(inputs["chosen"], candidates=x.candidates, candidate_mask=x.candidate_mask)
    upstream = torch.randn((), dtype=torch.float64)
    (gradient,) = torch.autograd.grad(loss, x.chosen.z, upstream)
    g = x.chosen
    w = 1 / g.N
    a = alpha / g.N * odds(g.s.gather(-1, x.ids)) * x.candidate_mask
    at_candidates = torch.zeros_like(g.s).scatter_add(-1, x.ids, a)
    wanted = g.s * (w - a.sum(-1, keepdim=True)) - w * F.one_hot(g.y, V) + at_candidates
    wanted = upstream * wanted * g.mask[..., None]
    torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-12)


TABLE = {case.name: case.c for case in ONE_EACH}


def options_of(name, options):
    """Those of the options that a loss has."""
    return {k: v for k, v in options.items() if k in signature(FORMULAS[name]).parameters}


MIXES = [
    ({"dpo": 1.0, "mle": 0.4}, {"beta": 0.3}),
    ({"dpo": 1.0, "exmate": 0.5}, {"beta": 0.3, "coefficient": 0.7}),
    ({"dpo": 0.5, "unlikelihood": 2.0}, {"beta": 0.3, "coefficient": 0.7}),
    ({"mle": 1.0, "unlikelihood_penalty": 0.3, "exmate_penalty": 0.2, "mate_penalty": 0.1}, {}),
]


@pytest.mark.parametrize("weights, options", MIXES, ids=["+".join(w) for w, _ in MIXES])
def test_mixture_is_the_weighted_sum_of_the_table(weights, options):
    x = Batch()
    loss, metrics = RewardPenalizeLoss(weights, **options)(*(x.inputs()[k] for k in DPO_INPUTS))
    chosen, rejected, total = 0.0, 0.0, 0.0
    for name, weight in weights.items():
        case = Case(name, options_of(name, options), TABLE[name])
        value = case(x.inputs(), REFERENCES)
        torch.testing.assert_close(metrics[f"loss/{name}"], value.detach(), rtol=1e-12, atol=1e-12)
        c_chosen, c_rejected = case.c(x)
        chosen, rejected, total = (
            chosen + weight * c_chosen,
            rejected + weight * c_rejected,
            total + weight * value,
        )
    torch.testing.assert_close(loss, total, rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad(loss, [x.chosen.z, x.rejected.z])
    for side, c, gradient in zip(
        (x.chosen, x.rejected), (chosen, rejected), gradients, strict=True
    ):
        wanted = (torch.as_tensor(c) * side.mask)[..., None] * (side.s - F.one_hot(side.y, V))
        torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-12)
    # the metric is the share of the norms of these rows
    norms = [float(g.abs().sum()) for g in gradients]
    assert float(metrics["gradients/rejected"]) == pytest.approx(norms[1] / sum(norms), rel=1e-12)


@each_case
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_equals_its_reference(case, layout, dtype):
    x = Batch(B=4, T=6, dtype=dtype)
    x.rejected.mask[2] = False  # a response without tokens, whose log P is 0
    x.refs[1][2] = -0.5
    x.rejected.responses = Responses(x.rejected.log_odds, x.rejected.mask)
    inputs = x.inputs() if layout == "padded" else x.packed_inputs(torch.randperm(24))
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    values = [case(inputs, f) for f in (FORMULAS, REFERENCES)]
    assert values[0].dtype == values[1].dtype == dtype
    torch.testing.assert_close(*values, rtol=tolerance, atol=tolerance)
    gradients = [
        torch.autograd.grad(v, x.leaves, allow_unused=True, retain_graph=True) for v in values
    ]
    for ours, expected in zip(*gradients, strict=True):
        ours, expected = (torch.zeros(()) if g is None else g for g in (ours, expected))
        ours = ours.expand_as(expected) if ours.dim() == 0 else ours
        torch.testing.assert_close(
            ours, expected.expand_as(ours), rtol=tolerance, atol=tolerance, check_dtype=False
        )


@pytest.mark.parametrize("segments", [[2, 0, -1, 2, 0], [-1] * 5, []], ids=str)
def test_logps_equal_their_references(segments):
    ids, m = torch.tensor(segments, dtype=torch.int64), torch.randn(len(segments)) * 20
    given_b = Responses(m, segments=ids, num_segments=4)
    assert fastadapt.sequence_logps(given_b).shape == (4,)
    for responses in (given_b, Responses(m, segments=ids)):
        ours, expected = (f.sequence_logps(responses) for f in (fastadapt, reference))
        torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(fastadapt.label_logps(m), reference.label_logps(m))


@pytest.mark.parametrize("m", [0, 8, 17, 40, 100, -8, -100])
def test_float32_is_exact_at_any_log_odds(m):
    """Values and gradients against 60 digits; l = z_y - lse rounds to 0 from m = 17 on."""
    with mpmath.workdps(60):
        p = 1 / (1 + mpmath.exp(-mpmath.mpf(m)))
        rest = 1 / (1 + mpmath.exp(mpmath.mpf(m)))
        wanted = {  # value and ∂/∂m for one response of one token
            "mle": (-mpmath.log(p), -rest),
            "unlikelihood_penalty": (-mpmath.log(rest), p),
            "exmate_penalty": (p, p * rest),
            "mate_penalty": (mpmath.log(p), rest),
        }
        levels = [("unlikelihood_penalty", {"level": k}) for k in ("sequence", "sequence_mean")]
        norms = [("exmate_penalty", {"norm": k}) for k in ("batch_token_mean", "token")]
        for name, options in [(name, {}) for name in wanted] + levels + norms:
            leaf = torch.tensor([float(m)], requires_grad=True)
            loss = FORMULAS[name](Responses(leaf, segments=torch.tensor([0])), **options)
            (gradient,) = torch.autograd.grad(loss, leaf)
            value, slope = (float(v) for v in wanted[name])
            # from m = 100 on p rounds to 1, and p - p² is within the last digit of that
            assert loss.item() == pytest.approx(value, rel=1e-6, abs=1e-42), (name, options)
            assert float(gradient) == pytest.approx(slope, rel=1e-6, abs=1e-42), (name, options)
    logp = fastadapt.label_logps(torch.tensor(float(m)))
    assert float(logp) == pytest.approx(float(mpmath.log(p)), rel=1e-6)


any_float32 = st.floats(width=32, allow_nan=False, allow_infinity=False)


def truth_of_a_pair(m):
    """-log(1 - P) of two tokens and its two slopes: 1 - P = q1 + p1 q2, nothing cancels."""
    with mpmath.workdps(50):
        q = [1 / (1 + mpmath.exp(mpmath.mpf(x))) for x in m]
        p = [1 / (1 + mpmath.exp(-mpmath.mpf(x))) for x in m]
        miss = q[0] + p[0] * q[1]
        slopes = [float(p[0] * p[1] / miss * x) for x in q]
        return float(-mpmath.log(miss)), slopes


@given(any_float32, any_float32)
@example(0.0, 3.4e38)
@example(20.0, 20.000002)
@example(-0.0, 1e-45)
@example(104.0, 104.0)
@example(200.0, 300.0)
@example(-3.4e38, -3.4e38)
def test_unlikelihood_has_no_dead_zone(first, second):
    """Finite, and right, for every float32 log-odds: a certain rejected token is pushed hardest."""
    leaf = torch.tensor([[first, second]], requires_grad=True)
    rejected = Responses(leaf, torch.ones(1, 2, dtype=torch.bool))
    loss = fastadapt.unlikelihood_penalty(rejected._replace(total_tokens=1))
    (gradient,) = torch.autograd.grad(loss, leaf)
    wanted = [1 / (1 + mpmath.exp(-mpmath.mpf(m))) for m in (first, second)]
    assert gradient.tolist()[0] == pytest.approx([float(g) for g in wanted], rel=1e-6, abs=1e-37)
    loss = fastadapt.unlikelihood_penalty(rejected, level="sequence")
    (gradient,) = torch.autograd.grad(loss, leaf)
    value, slopes = truth_of_a_pair((first, second))
    # digits of m itself are lost in m - m: the last of them bounds what a slope can have
    slack = 1e-5 + 1e-7 * min(abs(first - second), 100)
    assert loss.item() == pytest.approx(value, rel=3e-6, abs=1e-37)
    assert gradient.tolist()[0] == pytest.approx(slopes, rel=slack, abs=1e-37)


@pytest.mark.parametrize("m", [(20.5, 21.0), (19.0, 20.1), (300.0, 301.0), (-0.4, 3.0), (1.0, -9)])
def test_sequence_unlikelihood_in_float64(m):
    """Near the joints of its branches, m = 20 and P = 1/e."""
    leaf = torch.tensor([m], dtype=torch.float64, requires_grad=True)
    rejected = Responses(leaf, torch.ones(1, 2, dtype=torch.bool))
    loss = fastadapt.unlikelihood_penalty(rejected, level="sequence")
    (gradient,) = torch.autograd.grad(loss, leaf)
    value, slopes = truth_of_a_pair(m)
    assert loss.item() == pytest.approx(value, rel=1e-14)
    assert gradient.tolist()[0] == pytest.approx(slopes, rel=1e-12)


DIVERGENCES_OF_SIDES = ("chosen_divergences", "rejected_divergences")


def overflows(case, m):
    """Whether the gradient, of a square or an exponential of log p, is beyond float32."""
    square = case.name in ("sppo_hard", "cal_dpo") or case.options.get("loss_type") == "ipo"
    kinds = ("forward_kl", "alpha_divergence")
    power = case.options.get("f_divergence") in kinds or case.name == "alphapo"
    return (square and m < -1e18) or (power and m < -80)


@given(any_float32)
@example(3.4e38)
@example(-3.4e38)
def test_every_gradient_is_finite_for_every_float32(m):
    one = torch.tensor([0])
    for case in CASES:
        if case.name == "candidate_unlikelihood_penalty":
            continue  # the formula of unlikelihood_penalty
        if overflows(case, m):
            continue
        leaf = torch.tensor([m], requires_grad=True)
        side, zero = Responses(leaf, segments=one, num_segments=1), torch.zeros(1)
        inputs = dict.fromkeys(DPO_INPUTS[2:], torch.tensor([-1.0]))
        inputs |= dict.fromkeys(("chosen", "rejected", "gold"), side)
        inputs |= dict.fromkeys(("reference_point", "reward_shift", "pair_weights"), zero + 1)
        inputs |= dict.fromkeys(("logsumexp", "mean_logits", *DIVERGENCES_OF_SIDES), zero)
        (gradient,) = torch.autograd.grad(case(inputs), leaf)
        assert gradient.isfinite().all(), (case, m)


@pytest.mark.parametrize("level", ["token", "sequence", "sequence_mean"])
@pytest.mark.parametrize("infinite", [float("inf"), float("-inf")], ids=str)
def test_infinite_log_odds_take_the_limit(level, infinite):
    """A rejected token outside the truncated support has m = -inf: no penalty, and no NaN."""
    leaf = torch.tensor([[infinite, infinite]], requires_grad=True)
    rejected = Responses(leaf, torch.ones(1, 2, dtype=torch.bool))
    loss = fastadapt.unlikelihood_penalty(rejected, level=level)
    assert loss.item() == max(infinite, 0.0)
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert not gradient.isnan().any()
    exmate = fastadapt.exmate_penalty(rejected)
    assert exmate.item() == (infinite > 0)
    assert (torch.autograd.grad(exmate, leaf)[0] == 0).all()
    assert fastadapt.mle_loss(rejected).item() == max(-infinite, 0.0)


def test_dpo_gradient_is_zero_on_a_shared_prefix():
    prefix = torch.randn(2, 3, V, requires_grad=True)
    y = torch.randint(V, (2, 7))
    tails = [torch.randn(2, 4, V, requires_grad=True) for _ in range(2)]
    mask = torch.ones(2, 7, dtype=torch.bool)
    labels = [y, torch.cat([y[:, :3], torch.randint(V, (2, 4))], 1)]
    log_odds = [
        log_odds_of(torch.cat([prefix, t], 1), lab) for t, lab in zip(tails, labels, strict=True)
    ]
    masks = [mask, mask & (torch.arange(7) < 5)]  # unequal lengths
    sides = [Responses(m, k) for m, k in zip(log_odds, masks, strict=True)]
    whole = [lambda *x: losses.ipo_loss(*x, length_normalized=False)]
    for function in (losses.dpo_loss, losses.hinge_loss, losses.robust_loss, *whole):
        loss = function(*sides)
        shared, *apart = torch.autograd.grad(loss, [prefix, *tails], retain_graph=True)
        assert (shared == 0).all()
        assert all(g.abs().sum() > 0 for g in apart)
    normalized = losses.sigmoid_norm_loss(*sides)
    assert torch.autograd.grad(normalized, prefix)[0].abs().sum() > 0


def test_the_reference_is_held_constant():
    x = Batch()
    refs = [r.clone().requires_grad_() for r in x.refs]
    loss = fastadapt.dpo_loss(x.chosen.responses, x.rejected.responses, *refs)
    assert torch.autograd.grad(loss, [x.chosen.z, *refs], allow_unused=True)[1:] == (None, None)


@pytest.mark.parametrize("alpha", [0.25, 1.0, 3.0])
def test_unlikelihood_fixed_point_on_a_shared_row(alpha):
    """MLE + α UL on one and the same row has its minimum at p = 1/(1+α), log-odds -log α."""

    def slope(m):
        leaf = torch.tensor([[m]], dtype=torch.float64, requires_grad=True)
        side = Responses(leaf, torch.ones(1, 1, dtype=torch.bool))
        loss = fastadapt.unlikelihood_loss(side, side, coefficient=alpha)
        return float(torch.autograd.grad(loss, leaf)[0])

    fixed = -float(torch.tensor(alpha, dtype=torch.float64).log())
    assert abs(slope(fixed)) < 1e-15
    assert slope(fixed - 0.01) < 0 < slope(fixed + 0.01)


@pytest.mark.parametrize("case", SPLITTABLE, ids=str)
def test_micro_batches_add_up(case):
    """With the totals given, the losses of parts of a batch sum to the loss of the batch."""
    x = Batch(B=5)
    inputs = x.inputs()
    whole = case(inputs)
    sides = {}
    for i, k in enumerate(("chosen", "rejected", "gold")):
        count = inputs[k].mask.sum()
        total = count if i else int(count)
        sides[k] = inputs[k]._replace(total_tokens=total, total_sequences=5)
    parts = []
    for rows in (slice(0, 2), slice(2, 5)):
        part = {k: v[rows] if v.dim() else v for k, v in inputs.items() if k not in sides}
        for k, side in sides.items():
            part[k] = side._replace(log_odds=side.log_odds[rows], mask=side.mask[rows])
        parts.append(case(part))
    torch.testing.assert_close(sum(parts), whole, rtol=1e-12, atol=1e-14)


def test_published_exmate_depends_on_the_split():
    m = torch.tensor([[-1.0, -2.0], [-3.0, -4.0], [-0.5, 0.5], [1.0, -6.0]], dtype=torch.float64)
    mask = torch.ones(4, 2, dtype=torch.bool)

    def mean_of_halves(norm):
        halves = [Responses(h, k) for h, k in zip(m.chunk(2), mask.chunk(2), strict=True)]
        return sum(float(fastadapt.exmate_penalty(h, norm=norm)) for h in halves) / 2

    whole = Responses(m, mask)
    by_sequence = float(fastadapt.exmate_penalty(whole))
    by_batch = float(fastadapt.exmate_penalty(whole, norm="batch_token_mean"))
    assert mean_of_halves("sequence_mean") == pytest.approx(by_sequence, rel=1e-14)
    assert by_batch == pytest.approx(0.1019, abs=5e-5)
    assert mean_of_halves("batch_token_mean") == pytest.approx(0.1079, abs=5e-5)
    with pytest.raises(ValueError, match=r"rejected.total_tokens: expected None"):
        fastadapt.exmate_penalty(whole._replace(total_tokens=8), norm="batch_token_mean")


def test_batch_token_mean_is_the_published_code():
    """The coefficient times exp of minus the cross-entropy of the rejected batch."""
    x = Batch()
    y = torch.where(x.rejected.mask, x.rejected.y, -100)
    wanted = 0.05 * torch.exp(-F.cross_entropy(x.rejected.z.flatten(0, 1), y.flatten()))
    ours = 0.05 * fastadapt.exmate_penalty(x.rejected.responses, norm="batch_token_mean")
    torch.testing.assert_close(ours, wanted, rtol=1e-13, atol=0)


def test_mle_is_the_loss_of_transformers():
    loss_utils = pytest.importorskip("transformers.loss.loss_utils")
    side = Side(dtype=torch.float32)
    shifted = torch.where(side.mask, side.y, -100)
    for items in (None, torch.tensor(17), 17):
        theirs = loss_utils.ForCausalLMLoss(
            side.z, None, V, num_items_in_batch=items, shift_labels=shifted
        )
        ours = fastadapt.mle_loss(side.responses._replace(total_tokens=items))
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
        gradients = [torch.autograd.grad(x, side.z, retain_graph=True)[0] for x in (ours, theirs)]
        torch.testing.assert_close(*gradients, rtol=0, atol=1e-7)


def test_metrics_by_hand():
    """Two pairs, p = 1/2 and 3/4, 1/4: every number is a logarithm of small integers."""
    log3 = float(torch.tensor(3.0, dtype=torch.float64).log())
    log2 = float(torch.tensor(2.0, dtype=torch.float64).log())
    half, high, low = 0.0, log3, -log3  # log-odds of p = 1/2, 3/4, 1/4
    chosen = torch.tensor([[half, high], [low, 9.0]], dtype=torch.float64)
    rejected = torch.tensor([[low, half], [half, 9.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True], [True, False]])
    objective = RewardPenalizeLoss({"dpo": 1.0, "exmate_penalty": 1.0}, beta=0.5)
    refs = torch.tensor([-1.0, -2.0]), torch.tensor([-3.0, -1.0])
    _, metrics = objective(Responses(chosen, mask), Responses(rejected, mask), *refs)
    s_chosen = [log3 - 3 * log2, -2 * log2]  # 3/8, 1/4
    s_rejected = [-3 * log2, -log2]  # 1/8, 1/2
    chosen = [0.5 * (s_chosen[0] + 1), 0.5 * (s_chosen[1] + 2)]
    rejected = [0.5 * (s_rejected[0] + 3), 0.5 * (s_rejected[1] + 1)]
    u = [c - r for c, r in zip(chosen, rejected, strict=True)]
    k = [0.5 / (1 + float(torch.tensor(v, dtype=torch.float64).exp())) / 2 for v in u]
    root = 8**-0.5
    # |g| = |c| (1 - p): c of DPO and, on the rejected side, of ExMATE, (1/B) e^S̄ / T
    g_chosen = k[0] * (1 / 2 + 1 / 4) + k[1] * 3 / 4
    g_rejected = (k[0] + root / 4) * (3 / 4 + 1 / 2) + (k[1] + 1 / 2 / 2) * 1 / 2
    wanted = {
        "logps/chosen": sum(s_chosen) / 2,
        "logps/rejected": sum(s_rejected) / 2,
        "pairs/margins": (log3 - log2) / 2,
        "pairs/accuracies": 1 / 2,
        "rewards/chosen": sum(chosen) / 2,
        "rewards/rejected": sum(rejected) / 2,
        "rewards/margins": sum(u) / 2,
        "rewards/accuracies": sum(v > 0 for v in u) / 2,
        "loss/exmate_penalty": (root + 1 / 2) / 2,
        "gradients/chosen": g_chosen / (g_chosen + g_rejected),
        "gradients/rejected": g_rejected / (g_chosen + g_rejected),
    }
    assert set(metrics) == set(wanted) | {"loss/dpo"}
    for key, value in wanted.items():
        assert float(metrics[key]) == pytest.approx(value, rel=1e-12), key
    assert not any(v.requires_grad for v in metrics.values())


def test_gradient_shares_take_each_row_by_its_size():
    """IPO pushes pairs up or down: rows of both signs are on each side."""
    x = Batch(B=4)
    objective = RewardPenalizeLoss({"ipo": 1.0, "mle": 2.0}, beta=1.0)
    loss, metrics = objective(x.chosen.responses, x.rejected.responses)
    log_odds = [x.chosen.log_odds, x.rejected.log_odds]
    slopes = torch.autograd.grad(loss, log_odds, retain_graph=True)
    assert all((g > 0).any() and (g < 0).any() for g in slopes)
    norms = [float(g.abs().sum()) for g in torch.autograd.grad(loss, [x.chosen.z, x.rejected.z])]
    for k, norm in zip(("chosen", "rejected"), norms, strict=True):
        assert float(metrics[f"gradients/{k}"]) == pytest.approx(norm / sum(norms), rel=1e-12)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_metrics_do_not_need_a_graph(mode):
    x = Batch()
    objective = RewardPenalizeLoss({"dpo": 1.0, "exmate": 1.0})
    _, training = objective(x.chosen.responses, x.rejected.responses, *x.refs)
    with mode():
        loss, evaluating = objective(x.chosen.responses, x.rejected.responses, *x.refs)
    assert not loss.requires_grad
    assert {k: float(v) for k, v in training.items()} == pytest.approx(
        {k: float(v) for k, v in evaluating.items()}
    )


def test_unpaired_responses_have_no_pair_metrics():
    chosen, rejected = Side(B=3).responses, Side(B=2).responses
    _, metrics = RewardPenalizeLoss({"exmate": 1.0})(chosen, rejected)
    assert set(metrics) == {
        "loss/exmate", "logps/chosen", "logps/rejected", "gradients/chosen", "gradients/rejected",
    }  # fmt: skip
    with pytest.raises(
        ValueError, match="rejected: expected 3 responses, as many as chosen, got 2"
    ):
        fastadapt.dpo_loss(chosen, rejected)


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_nothing_reads_the_device(layout):
    """Tensors of the meta device have no values: whatever asks for one raises."""
    m = torch.randn(3, 4, device="meta", requires_grad=True)
    side = Responses(m, torch.ones(3, 4, dtype=torch.bool, device="meta"))
    if layout == "packed":
        ids = torch.ones(12, dtype=torch.int64, device="meta")
        side = Responses(m.flatten(), segments=ids, num_segments=3, total_tokens=m.sum().long())
    weights = dict.fromkeys([*FORMULAS.keys() - CONTAIN_MLE, "exmate"], 1.0)
    shape = (*side.log_odds.shape, 2)
    loss, metrics = RewardPenalizeLoss(weights)(
        side,
        side,
        candidates=torch.randn(shape, device="meta"),
        candidate_mask=torch.ones(shape, dtype=torch.bool, device="meta"),
        gold=side,
        pair_weights=torch.ones(3, device="meta"),
        **dict.fromkeys(("reference_point", "reward_shift"), torch.ones((), device="meta")),
        **dict.fromkeys(("logsumexp", "mean_logits", *DIVERGENCES_OF_SIDES), side.log_odds),
    )
    loss.backward()
    assert {v.device.type for v in metrics.values()} == {"meta"} and m.grad.shape == m.shape


@each_case
@pytest.mark.parametrize("kind", ["all masked", "B = 0", "T = 0", "N = 0", "all negative"])
def test_nothing_to_learn_from_is_zero_with_a_graph(case, kind):
    B, T = (0 if kind == "B = 0" else 2), (0 if kind == "T = 0" else 3)
    leaf = torch.full((B, T), float("nan"), requires_grad=True)
    side, refs = Responses(leaf, torch.zeros(B, T, dtype=torch.bool)), torch.randn(2, B)
    if kind in ("N = 0", "all negative"):
        leaf = torch.randn(0 if kind == "N = 0" else 4, requires_grad=True)
        ids = torch.full(leaf.shape, -1)
        side, refs = Responses(leaf, segments=ids), torch.randn(2, 1)
    shape = (*leaf.shape, 2)
    inputs = {
        **dict.fromkeys(("chosen", "rejected", "gold"), side),
        "ref_chosen_logps": refs[0], "ref_rejected_logps": refs[1], "pair_weights": refs[0],
        "candidates": leaf[..., None].expand(shape),
        "candidate_mask": torch.zeros(shape, dtype=torch.bool),
        **dict.fromkeys(("logsumexp", "mean_logits", *DIVERGENCES_OF_SIDES), leaf),
        **dict.fromkeys(("reference_point", "reward_shift"), torch.ones(())),
    }  # fmt: skip
    loss = case(inputs)
    assert loss.item() == 0 and loss.requires_grad
    loss.backward()
    assert leaf.grad is not None and (leaf.grad == 0).all()
    assert case(inputs, REFERENCES).item() == 0


@each_case
def test_what_does_not_count_changes_nothing(case):
    """Ignored log-odds and candidates may hold anything; their gradient is 0."""
    x = Batch()
    results = []
    for junk in (0.0, float("nan"), float("inf")):
        inputs, leaves = x.inputs(), []
        for k in ("chosen", "rejected", "gold"):
            out = ~inputs[k].mask
            m = inputs[k].log_odds.detach().masked_fill(out, junk).requires_grad_()
            inputs[k] = inputs[k]._replace(log_odds=m)
            leaves.append(m)
            for beside in (name for name in BESIDE.get(k, ()) if "candidate" not in name):
                leaves.append(inputs[beside].detach().masked_fill(out, junk).requires_grad_())
                inputs[beside] = leaves[-1]
        c = x.candidates.detach().masked_fill(~x.candidate_mask, junk).requires_grad_()
        inputs["candidates"] = c
        loss = case(inputs)
        gradients = torch.autograd.grad(loss, [*leaves, c], allow_unused=True)
        results.append((loss.detach(), *(g for g in gradients if g is not None)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@each_case
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_lower_precision_is_summed_in_float64(case, dtype):
    x = Batch(B=2, T=4, dtype=torch.float32)
    results = []
    for kind in (dtype, torch.float32):
        inputs = x.inputs()
        leaves = []
        for k in ("chosen", "rejected", "gold"):
            m = inputs[k].log_odds.detach().to(dtype).to(kind).requires_grad_()
            inputs[k] = inputs[k]._replace(log_odds=m)
            leaves.append(m)
        inputs["candidates"] = inputs["candidates"].detach().to(dtype).to(kind).requires_grad_()
        loss = case(inputs)
        gradients = torch.autograd.grad(loss, [*leaves, inputs["candidates"]], allow_unused=True)
        results.append((loss, [g for g in gradients if g is not None]))
    (low, low_gradients), (full, full_gradients) = results
    assert low.dtype == torch.float32 and torch.equal(low, full)
    for g, wanted in zip(low_gradients, full_gradients, strict=True):
        assert g.dtype == dtype and torch.equal(g, wanted.to(dtype))


def with_leaves(x):
    """The inputs with log-odds that are leaves, chosen padded and rejected packed."""
    inputs = x.packed_inputs(torch.randperm(x.rejected.mask.numel()), ["rejected"])
    inputs = {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    sides = ("chosen", "rejected", "gold")
    for k in sides:
        inputs[k] = inputs[k]._replace(log_odds=inputs[k].log_odds.detach().requires_grad_())
    inputs["candidates"].requires_grad_()
    return inputs, [*(inputs[k].log_odds for k in sides), inputs["candidates"]]


@each_loss
def test_compiles_without_a_graph_break(case):
    torch.compiler.reset()  # one compiled `case` a test, or the limit of variants is met
    inputs, leaves = with_leaves(Batch(dtype=torch.float32))
    results = []
    for f in (torch.compile(case, fullgraph=True, backend="aot_eager"), case):
        loss = f(inputs)
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
        results.append([loss.detach(), *(g for g in gradients if g is not None)])
    torch.testing.assert_close(*results)


def test_mixture_and_metrics_compile_without_a_graph_break():
    x = Batch(dtype=torch.float32)
    inputs, leaves = with_leaves(x)
    objective = RewardPenalizeLoss({"dpo": 1.0, "exmate": 0.5, "unlikelihood_penalty": 1.0})
    results = []
    for f in (torch.compile(objective, fullgraph=True, backend="aot_eager"), objective):
        loss, metrics = f(inputs["chosen"], inputs["rejected"], *x.refs)
        results.append((metrics, loss.detach(), *torch.autograd.grad(loss, leaves[:2])))
    torch.testing.assert_close(*results)


def test_gradcheck_and_second_derivatives():
    """The formulas are ordinary torch, so they differentiate twice as well."""
    mask = torch.tensor([[True, True, False], [True, False, True]])
    m = [torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def loss(chosen, rejected):
        sides = Responses(chosen, mask), Responses(rejected, mask)
        sequence = fastadapt.unlikelihood_penalty(sides[1], level="sequence")
        return fastadapt.dpo_loss(*sides) + fastadapt.exmate_loss(*sides) + sequence

    torch.autograd.gradcheck(loss, m)
    torch.autograd.gradgradcheck(loss, m)


def test_trains_on_the_support_that_was_sampled_from():
    """The losses take `adapted_log_odds`: tokens outside the support get and give nothing."""
    torch.manual_seed(1)
    z = (torch.randn(2, 4, 50) * 3).requires_grad_()
    y = z.detach().topk(3).indices[..., 2]  # the third most probable
    rejected_y = z.detach().argmin(-1)
    adaptor = Adaptor(top_k=5)
    mask = torch.ones(2, 4, dtype=torch.bool)
    chosen, rejected = (
        Responses(adapted_log_odds(z, ids, adaptor), mask) for ids in (y, rejected_y)
    )
    loss, metrics = RewardPenalizeLoss({"unlikelihood": 1.0})(chosen, rejected)
    loss.backward()
    dead = fastadapt.filter_logits(z.detach(), adaptor) == float("-inf")
    assert loss.isfinite() and float(metrics["loss/unlikelihood"]) > 0
    assert (z.grad[dead] == 0).all() and (z.grad.gather(-1, y[..., None]) < 0).all()
    assert float(metrics["gradients/rejected"]) == 0


PAIR = Responses(torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool))
ROW = Responses(torch.zeros(3), segments=torch.tensor([0, 1, 1]))
LABELS = torch.tensor([[-100, 1, 2], [3, -100, -100]])


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: fastadapt.mle_loss(PAIR.log_odds), TypeError, "chosen: expected Responses.*Tens"),
        (lambda: fastadapt.label_logps(torch.ones(3).int()), TypeError, "log_odds: expected fl"),
        (lambda: fastadapt.label_logps([0.0]), TypeError, "got list"),
        (
            lambda: fastadapt.mle_loss(PAIR._replace(log_odds=torch.zeros(2, 3).long())),
            TypeError,
            r"chosen.log_odds: expected float32, float64, bfloat16 or float16, got torch.int64",
        ),
        (
            lambda: fastadapt.mle_loss(PAIR._replace(mask=torch.ones(2, 3))),
            TypeError,
            r"chosen.mask: expected a tensor of torch.bool, got torch.float32",
        ),
        (
            lambda: fastadapt.mle_loss(PAIR._replace(mask=PAIR.mask[:1])),
            ValueError,
            r"chosen.mask: .* log-odds, \(B, T\), got \(1, 3\) beside \(2, 3\)",
        ),
        (
            lambda: fastadapt.mle_loss(Responses(torch.zeros(3), PAIR.mask[0])),
            ValueError,
            r"log-odds, \(B, T\), got \(3,\) beside \(3,\)",
        ),
        (
            lambda: fastadapt.mle_loss(Responses(PAIR.log_odds, segments=PAIR.mask.long())),
            ValueError,
            r"log-odds, \(N,\), got \(2, 3\)",
        ),
        (lambda: fastadapt.mle_loss(Responses(PAIR.log_odds)), ValueError, "got neither"),
        (
            lambda: fastadapt.mle_loss(PAIR._replace(segments=ROW.segments)),
            ValueError,
            "got both",
        ),
        (
            lambda: fastadapt.mle_loss(PAIR._replace(num_segments=2)),
            ValueError,
            "num_segments: expected None beside a mask, got 2",
        ),
        (
            lambda: fastadapt.mle_loss(ROW._replace(segments=ROW.segments.int())),
            TypeError,
            "chosen.segments: expected a tensor of torch.int64, got torch.int32",
        ),
        (
            lambda: fastadapt.mle_loss(ROW._replace(num_segments=0)),
            ValueError,
            "chosen.num_segments: expected an integer >= 1, got 0",
        ),
        (
            lambda: fastadapt.mle_loss(ROW._replace(num_segments=1)),
            ValueError,
            "chosen.segments: expected ids < 1, got 1",
        ),
        (
            lambda: fastadapt.mle_loss(PAIR._replace(total_tokens=-1)),
            ValueError,
            "chosen.total_tokens: expected an integer >= 0, got -1",
        ),
        (
            lambda: fastadapt.mle_loss(PAIR._replace(total_tokens=1.5)),
            TypeError,
            "chosen.total_tokens: expected an integer or a tensor, got 1.5",
        ),
        (
            lambda: fastadapt.mle_loss(PAIR._replace(total_tokens=torch.ones(2))),
            ValueError,
            r"chosen.total_tokens: expected one value, got shape \(2,\)",
        ),
        (
            lambda: fastadapt.mle_loss(
                Responses(PAIR.log_odds, torch.ones(2, 3, dtype=torch.bool, device="meta"))
            ),
            ValueError,
            "chosen.mask: expected device cpu, got meta",
        ),
        (lambda: fastadapt.mle_loss(PAIR, reduction="mean"), ValueError, "one of token_mean, seq"),
        (lambda: fastadapt.unlikelihood_penalty(PAIR, level="x"), ValueError, "level: .*got 'x'"),
        (lambda: fastadapt.exmate_penalty(PAIR, norm="sum"), ValueError, "norm: .*got 'sum'"),
        (lambda: losses.cpo_loss(PAIR, PAIR, loss_type="kto"), ValueError, "got 'kto'"),
        (lambda: fastadapt.dpo_loss(PAIR, PAIR, beta=0), ValueError, "beta: expected a value > 0"),
        (
            lambda: losses.cdpo_loss(PAIR, PAIR, label_smoothing=0.5),
            ValueError,
            r"label_smoothing: expected a value in \[0, 0.5\), got 0.5",
        ),
        (
            lambda: losses.exo_pair_loss(PAIR, PAIR, label_smoothing=0.0),
            ValueError,
            "label_smoothing: expected a value > 0, got 0",
        ),
        (
            lambda: losses.cpo_loss(PAIR, PAIR, loss_type="ipo", label_smoothing=0.1),
            ValueError,
            "label_smoothing: expected 0 for ipo, got 0.1",
        ),
        (
            lambda: losses.dpo_loss(PAIR, PAIR, label_smoothing=0.1),
            ValueError,
            "label_smoothing: expected 0 for dpo, got 0.1; the conservative DPO is cdpo",
        ),
        (
            lambda: fastadapt.dpo_loss(PAIR, PAIR, torch.zeros(2)),
            ValueError,
            "ref_chosen_logps, ref_rejected_logps: expected both or none, got one",
        ),
        (
            lambda: fastadapt.dpo_loss(PAIR, PAIR, torch.zeros(2), torch.zeros(3)),
            ValueError,
            r"ref_rejected_logps: expected \(2,\), got \(3,\)",
        ),
        (
            lambda: fastadapt.dpo_loss(PAIR, PAIR, torch.zeros(2).long(), torch.zeros(2)),
            TypeError,
            "ref_chosen_logps: expected a float tensor, got torch.int64",
        ),
        (
            lambda: fastadapt.dpo_loss(PAIR._replace(total_sequences=4), PAIR),
            ValueError,
            "total_sequences: expected it for both sides or for none, got one",
        ),
        (
            lambda: fastadapt.candidate_unlikelihood_penalty(PAIR, torch.zeros(2, 4), PAIR.mask),
            ValueError,
            r"candidates: expected shape \(2, 3, K\), got \(2, 4\)",
        ),
        (
            lambda: fastadapt.candidate_unlikelihood_penalty(PAIR, torch.zeros(2, 3, 4), PAIR.mask),
            ValueError,
            "candidate_mask: expected shape",
        ),
        (lambda: RewardPenalizeLoss({}), ValueError, "weights: expected some of mle, "),
        (lambda: RewardPenalizeLoss({"grpo": 1.0}), ValueError, r"got \['grpo'\]"),
        (
            lambda: RewardPenalizeLoss({"mle": 1.0, "exmate": 1.0}),
            ValueError,
            "one loss that contains MLE, got mle, exmate; name the bare penalties",
        ),
        (
            lambda: RewardPenalizeLoss({"dpo": 1.0}, norm="token"),
            ValueError,
            r"options: expected those of dpo, got \['norm'\]",
        ),
        (
            lambda: RewardPenalizeLoss({"dpo": 1.0, "mle": 1.0})(PAIR),
            ValueError,
            "rejected: expected it for the loss dpo, got None",
        ),
        (lambda: fastadapt.dpo_loss(PAIR.log_odds, PAIR), TypeError, "chosen: expected Responses"),
        (lambda: fastadapt.mle_loss((PAIR.log_odds, PAIR.mask)), TypeError, "got tuple"),
        (lambda: fastadapt.exmate_loss(PAIR, None), TypeError, "rejected: expected Resp.*got N"),
        (
            lambda: fastadapt.mle_loss(Responses(PAIR.log_odds, PAIR.mask.long())),
            TypeError,
            "chosen.mask: expected .*bool, got torch.int64; Responses.from_labels takes labels",
        ),
        (
            lambda: fastadapt.mle_loss(PAIR._replace(total_tokens=torch.tensor(True))),
            TypeError,
            "chosen.total_tokens: expected an integer or a tensor of one, got torch.bool",
        ),
        (
            lambda: fastadapt.candidate_unlikelihood_penalty(
                PAIR, torch.zeros(2, 3, 4), torch.ones(2, 3, 4)
            ),
            ValueError,
            r"candidate_mask: expected torch.bool \(2, 3, 4\), got torch.float32 \(2, 3, 4\)",
        ),
        (
            lambda: fastadapt.candidate_unlikelihood_penalty(
                PAIR, torch.zeros(2, 3, 4).long(), torch.ones(2, 3, 4).bool()
            ),
            TypeError,
            "candidates: expected float32, .* got torch.int64",
        ),
        (lambda: Responses.from_labels(PAIR.log_odds, PAIR.mask), TypeError, "takes a mask"),
        (
            lambda: Responses.from_labels(PAIR.log_odds, LABELS.clamp(min=-1)),
            ValueError,
            "labels: expected ids from 0 on or -100, got -1",
        ),
        (
            lambda: Responses.from_labels(PAIR.log_odds, LABELS.int()),
            TypeError,
            "labels: expected a tensor of torch.int64, got torch.int32",
        ),
        (
            lambda: Responses.from_labels(PAIR.log_odds, LABELS[:, 1:]),
            ValueError,
            r"labels: expected the shape of the log-odds, \(B, T\), got \(2, 2\) beside \(2, 3\)",
        ),
        (
            lambda: Responses.from_labels(PAIR.log_odds[0], LABELS[0]),
            ValueError,
            r"log-odds, \(B, T\), got \(3,\) beside \(3,\)",
        ),
        (lambda: Responses.from_labels([0.0], LABELS), TypeError, "log_odds: expected .*got list"),
        (lambda: Responses.from_labels(LABELS, LABELS), TypeError, "log_odds: .*got torch.int64"),
        (
            lambda: Responses.from_labels(PAIR.log_odds, LABELS, ignore_index=None),
            TypeError,
            "ignore_index: expected an integer, got None",
        ),
        (
            lambda: Responses.from_logps(PAIR.log_odds, LABELS[0]),
            ValueError,
            r"labels: expected .* \(B, T\), got \(3,\) beside \(2, 3\)",
        ),
    ],
)  # fmt: skip
def test_wrong_input_says_what_is_wrong(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    "weights, error, message",
    [
        ("dpo", TypeError, r"such as \{'dpo': 1.0\}, got 'dpo'"),
        (["dpo", "exmate"], TypeError, r"such as \{'dpo': 1.0, 'exmate': 1.0\}, got \['dpo', 'ex"),
        (
            [{"dpo": 1.0}],
            TypeError,
            r"expected losses with their weights, .* got \[\{'dpo': 1.0\}\]",
        ),
        (None, TypeError, "expected losses with their weights, .* got None"),
        ({"dpo": "1"}, TypeError, "expected a number, got '1'"),
        ({"dpo": None}, TypeError, "expected a number, got None"),
        ({"dpo": True}, TypeError, "expected a number, got True"),
        ({"dpo": torch.ones(2)}, TypeError, r"expected a number, got a tensor of shape \(2,\)"),
        ({"dpo": -1}, ValueError, "expected a value >= 0, got -1"),
        ({"dpo": float("nan")}, ValueError, "expected a value >= 0, got nan"),
        ({"dpo": float("inf")}, ValueError, "expected a finite value, got inf"),
        (
            {"exmate-penalty": 1.0},
            ValueError,
            r"\['exmate-penalty'\]; did you mean exmate_penalty\?",
        ),
        ({1: 1.0}, ValueError, r"got \[1\]$"),
    ],
)
def test_weights_that_are_none(weights, error, message):
    with pytest.raises(error, match=f"^weights.*{message}"):
        RewardPenalizeLoss(weights)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"beta": "0.1"}, TypeError, "beta: expected a number, got '0.1'"),
        ({"beta": None}, TypeError, "beta: expected a number, got None"),
        ({"beta": float("nan")}, ValueError, "beta: expected a value > 0, got nan"),
        ({"beta": float("inf")}, ValueError, "beta: expected a finite value, got inf"),
        ({"Beta": 0.1}, ValueError, r"got \['Beta'\]; they have .*; did you mean beta\?"),
        ({"f_divergence": "reverse-kl"}, ValueError, r"f_divergence: .*; did you mean reverse_kl"),
        ({"f_divergence": ["js_divergence"]}, TypeError, r"f_divergence: .* got \['js_diver"),
        ({"f_alpha": "1"}, TypeError, "f_alpha: expected a number, got '1'"),
        ({"ld_alpha": 1.5}, ValueError, r"ld_alpha: expected a value in \[0, 1\], got 1.5"),
        ({"label_smoothing": "0"}, TypeError, "label_smoothing: expected a number, got '0'"),
        ({"coefficient": None}, TypeError, "coefficient: expected a number, got None"),
        ({"coefficient": -1}, ValueError, "coefficient: expected a value >= 0, got -1"),
        ({"norm": "sequence-mean"}, ValueError, r"norm: .*; did you mean sequence_mean\?"),
        ({"norm": None}, TypeError, "norm: expected one of .* got None"),
        ({"chosen": PAIR}, ValueError, r"options: expected those of dpo, exmate, got \['chosen'\]"),
    ],
)
def test_options_raise_where_they_are_given(options, error, message):
    """Not at the first step, which may be minutes later."""
    with pytest.raises(error, match=message):
        RewardPenalizeLoss({"dpo": 1.0, "exmate": 1.0}, **options)
    name, value = next(iter(options.items()))
    functions = [fastadapt.dpo_loss, fastadapt.exmate_loss]
    for function in (f for f in functions if name in signature(f).parameters and name != "chosen"):
        with pytest.raises(error, match=message):
            function(PAIR, PAIR, **{name: value})


def test_numbers_of_numpy_are_numbers():
    np = pytest.importorskip("numpy")
    x = Batch(dtype=torch.float32)
    sides = x.chosen.responses, x.rejected.responses
    ours = RewardPenalizeLoss({"dpo": np.float32(2.0)}, beta=np.float32(0.5))(*sides)[0]
    assert type(ours) is torch.Tensor
    torch.testing.assert_close(ours, 2 * fastadapt.dpo_loss(*sides, beta=0.5), rtol=1e-6, atol=0)
    some = sides[0]._replace(total_tokens=np.int64(7))
    assert fastadapt.mle_loss(some) == fastadapt.mle_loss(sides[0]._replace(total_tokens=7))
    labels = LABELS.masked_fill(LABELS == -100, -7)
    plain, numpy = (
        Responses.from_labels(PAIR.log_odds, labels, ignore_index=kind(-7))
        for kind in (int, np.int64)
    )
    assert torch.equal(plain.mask, numpy.mask)


@pytest.mark.parametrize("kind", ["log_odds", "logits", "logps"])
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("ignored", [-100, -1, 3])
def test_labels_that_are_ignored_do_not_count(kind, layout, ignored):
    """The loss of labels is cross-entropy, whatever stands where they are ignored."""
    z = torch.randn(3, 5, V, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(V, (3, 5)).masked_fill(torch.rand(3, 5) < 0.4, ignored)
    labels[1, 2:] = ignored
    labels[0, 0] = 5
    wanted = F.cross_entropy(z.flatten(0, 1), labels.flatten(), ignore_index=ignored)
    at = labels.masked_fill(labels == ignored, 0)[..., None]
    values = {
        "log_odds": fastadapt.label_log_odds(z, labels, ignore_index=ignored),
        "logits": z,
        # 0 where ignored, as other libraries have them: no log-odds there, and no NaN in a gradient
        "logps": z.log_softmax(-1).gather(-1, at)[..., 0].masked_fill(labels == ignored, 0),
    }[kind]
    named = {"ignore_index": ignored, "total_sequences": 3}
    if layout == "packed":
        values, labels = values.flatten(0, 1), labels.flatten()
        named |= {"segments": torch.arange(3).repeat_interleave(5), "num_segments": 3}
    make = Responses.from_logps if kind == "logps" else Responses.from_labels
    responses = make(values, labels, **named)
    assert responses.total_sequences == 3 and responses.total_tokens is None
    loss = fastadapt.mle_loss(responses)
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=0)
    ours, theirs = (torch.autograd.grad(x, z, retain_graph=True)[0] for x in (loss, wanted))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_log_probabilities_at_the_edges():
    """0 is certain and has no gradient left, -inf is impossible, above 0 there is nothing."""
    leaf = torch.tensor([[0.0, -float("inf"), -1e-7, -50.0]], requires_grad=True)
    labels = torch.ones(1, 4, dtype=torch.int64)
    responses = Responses.from_logps(leaf, labels)
    inf = float("inf")
    assert responses.log_odds.tolist()[0] == pytest.approx([inf, -inf, 16.118096, -50.0], rel=1e-5)
    kept = responses._replace(mask=torch.tensor([[True, False, True, True]]))
    (gradient,) = torch.autograd.grad(fastadapt.mle_loss(kept), leaf)
    assert gradient.tolist()[0] == pytest.approx([0.0, 0.0, -1 / 3, -1 / 3], rel=1e-5)
    above = Responses.from_logps(torch.tensor([[0.25]]), labels[:, :1])
    assert fastadapt.mle_loss(above).isnan()


def test_labels_compile_without_a_graph_break():
    z, labels = torch.randn(2, 3, V), LABELS

    def loss(z, labels):
        chosen = Responses.from_labels(fastadapt.label_log_odds(z, labels), labels)
        rejected = Responses.from_logps(z[..., 0].clamp(max=-0.1), labels)
        return fastadapt.exmate_loss(chosen, rejected)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(z, labels), loss(z, labels))
