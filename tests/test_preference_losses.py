"""Losses of preferences at the edges: extreme and long responses, sides of unequal size, weights.

Values, gradients and layouts of every loss are in `test_losses.py`.
"""

import itertools
import math
from inspect import signature

import mpmath as mp
import pytest
import torch
import torch.nn.functional as F

import fastadapt
from fastadapt import Responses, RewardPenalizeLoss, losses, reference, sequence_logps
from fastadapt.losses import ALIASES, CATALOGUE, CONTAIN_MLE, FORMULAS, describe, name_of, ramp
from loss_cases import BETA, CASES, ONE_EACH, REFERENCES, Batch, Case, Side, packed
from loss_truths import POINT, SHIFT, TRUTHS, Pair, truth

EXTREMES = (0, 8, -8, 17, -17, 40, -40, 100, -100, 1000, -1000)
EXTREME_PAIRS = [
    (m, EXTREMES[(i + step) % len(EXTREMES)])
    for i, m in enumerate(EXTREMES)
    for step in (0, 1, 2, 5)
]
REFS = (-1.5, -0.25)
POWERS = ("forward_kl", "alpha_divergence")
WITH_TRUTH = [case for case in CASES if case.name in TRUTHS]


def inputs_of(chosen, rejected, refs, **more):
    """The arguments of one pair's loss, float64 but for the sides."""
    refs = [torch.tensor([ref], dtype=torch.float64) for ref in refs]
    return {
        "chosen": chosen,
        "rejected": rejected,
        "gold": chosen,
        "ref_chosen_logps": refs[0],
        "ref_rejected_logps": refs[1],
        "pair_weights": torch.ones(1, dtype=torch.float64),
        "reference_point": torch.tensor(float(POINT)),
        "reward_shift": torch.tensor(float(SHIFT)),
        "chosen_divergences": torch.zeros_like(chosen.log_odds),
        "rejected_divergences": torch.zeros_like(rejected.log_odds),
        **more,
    }


@pytest.mark.parametrize("case", WITH_TRUTH, ids=str)
def test_exact_at_any_log_odds(case):
    """A pair of one token each: value and slopes against mpmath, finite wherever these are."""
    powers = case.name == "alphapo" or case.options.get("f_divergence") in POWERS
    for m in EXTREME_PAIRS:
        # a slope of 1 beside one of e^1000, and a difference quotient: 434 digits and those wanted
        with mp.workdps(460 if powers and 1000 in map(abs, m) else 100):

            def exact(*m):
                S = tuple(-mp.log1p(mp.exp(-x)) for x in m)
                return truth(case.name, Pair(S, refs=REFS), case.options)

            wanted = [
                exact(*map(mp.mpf, m)),
                mp.diff(lambda x, m=m: exact(x, mp.mpf(m[1])), m[0]),
                mp.diff(lambda x, m=m: exact(mp.mpf(m[0]), x), m[1]),
            ]
        for dtype, rel in ((torch.float64, 1e-11), (torch.float32, 1e-6)):
            leaves = [torch.tensor([[float(x)]], dtype=dtype, requires_grad=True) for x in m]
            sides = [Responses(leaf, torch.ones(1, 1, dtype=torch.bool)) for leaf in leaves]
            loss = case(inputs_of(*sides, REFS))
            slopes = torch.autograd.grad(loss, leaves)
            # a sum of opposite terms has the last digit of its terms, here up to some tens
            slack = (1e-13, 1e-15, 1e-15) if dtype == torch.float64 else (1e-6, 1e-7, 1e-7)
            for got, value, atol in zip((loss, *slopes), wanted, slack, strict=True):
                if abs(value) > torch.finfo(dtype).max / 4:
                    assert not got.isnan().any(), (m, dtype, value)
                else:
                    assert got.item() == pytest.approx(float(value), rel=rel, abs=atol), (m, dtype)


@pytest.mark.parametrize("name", ["apo_zero", "apo_zero_unpaired", "kto"])
def test_small_slopes_keep_their_digits(name):
    """At rewards near 60, where σ rounds to 1 and `torch.sigmoid` has a slope of 0."""
    leaves = [torch.zeros(1, 1, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    sides = [Responses(leaf, torch.ones(1, 1, dtype=torch.bool)) for leaf in leaves]
    loss = Case(name, {"beta": 0.1}, None)(inputs_of(*sides, (-600.0, -600.0)))
    slope = torch.autograd.grad(loss, leaves[1])[0].item()
    point = float(POINT) if name == "kto" else 0.0
    reward = 0.1 * (math.log(0.5) + 600 - point)
    share = 1 if name == "apo_zero" else 2  # of the mean over both responses
    assert slope == pytest.approx(0.1 * math.exp(-reward) / 2 / share, rel=1e-11, abs=0)


LONG = 20_000


def long_sides(lengths):
    """Two responses, float32, whose log-probabilities are sums of many tokens; and these, exact."""
    generator = torch.Generator().manual_seed(7)
    sides, sums = [], []
    for n in lengths:
        m = torch.randn(1, n, generator=generator) * 2 + 1
        sides.append(Responses(m, torch.ones(1, n, dtype=torch.bool)))
        sums.append(math.fsum(-math.log1p(math.exp(-x)) for x in m[0].tolist()))
    return sides, sums


@pytest.mark.parametrize("lengths", [(LONG, LONG), (LONG, 1), (1, LONG), (1, 1), (19_999, 313)])
def test_long_responses_keep_their_digits(lengths):
    """float32 log-odds; a reference within a nat, so that the loss is of order 1."""
    sides, sums = long_sides(lengths)
    refs = (sums[0] - 0.7512345, sums[1] + 0.5043)
    inputs = inputs_of(*sides, refs)
    with mp.workdps(40):
        pair = Pair(tuple(map(mp.mpf, sums)), lengths, tuple(map(mp.mpf, refs)))
        for case in WITH_TRUTH:
            if case.options.get("ld_alpha") is None:  # its S is another
                wanted = float(truth(case.name, pair, case.options))
                assert case(inputs).item() == pytest.approx(wanted, rel=3e-7, abs=1e-12), case


@pytest.mark.parametrize("length", [LONG, 1])
def test_long_likelihoods_and_penalties_keep_their_digits(length):
    """The losses of one side, from one sum of many tokens."""
    (side,), (total,) = long_sides([length])
    mean = total / length
    wanted = {
        ("mle", "token_mean"): -mean,
        ("mle", "sequence_sum"): -total,
        ("mate_penalty",): mean,
        ("unlikelihood_penalty", "sequence"): -math.log1p(-math.exp(total)),
        ("unlikelihood_penalty", "sequence_mean"): -math.log1p(-math.exp(mean)),
        ("exmate_penalty", "sequence_mean"): math.exp(mean),
        ("exmate_penalty", "batch_token_mean"): math.exp(mean),
        ("exmate_penalty", "sequence_sum"): math.exp(total),
    }
    seen = 0
    for case in CASES:
        key = (case.name, *case.options.values())
        if key in wanted:
            seen += 1
            loss = case({"chosen": side, "rejected": side})
            assert loss.item() == pytest.approx(wanted[key], rel=3e-7), key
    assert seen == len(wanted)
    assert sequence_logps(side).item() == pytest.approx(total, rel=1e-13)


def test_float32_sums_would_not():
    """What the test above would see: DPO from sums in float32 is off by more than 1e-5."""
    (chosen, rejected), sums = long_sides((LONG, LONG))
    refs = (sums[0] - 0.7512345, sums[1] + 0.5043)
    rounded = [F.logsigmoid(side.log_odds).sum() for side in (chosen, rejected)]
    u = 2.0 * ((rounded[0] - refs[0]) - (rounded[1] - refs[1]))
    wanted = math.log1p(math.exp(-2.0 * (0.7512345 + 0.5043)))
    ours = losses.dpo_loss(*(inputs_of(chosen, rejected, refs)[k] for k in DPO), beta=2.0)
    assert ours.item() == pytest.approx(wanted, rel=2e-7)
    assert abs(-F.logsigmoid(u).item() - wanted) > 1e-5 * wanted


DPO = ("chosen", "rejected", "ref_chosen_logps", "ref_rejected_logps")


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("case", [c for c in CASES if "ld_alpha" in c.options], ids=str)
def test_ld_alpha_is_another_sum_of_the_same_loss(case, layout):
    """With the log-probabilities of `desensitized_logps` for a truth."""
    x = Batch(B=4, T=7)
    order = torch.randperm(28)
    inputs = x.inputs() if layout == "padded" else x.packed_inputs(order)
    alpha = case.options["ld_alpha"]
    sums = losses.desensitized_logps(inputs["chosen"], inputs["rejected"], alpha)
    for ours, wanted in zip(
        sums,
        reference.desensitized_logps(inputs["chosen"], inputs["rejected"], alpha),
        strict=True,
    ):
        torch.testing.assert_close(ours, wanted, rtol=1e-13, atol=0)
    one = Case(case.name, case.options | {"ld_alpha": 1.0}, None, case.beside)
    none = Case(case.name, case.options | {"ld_alpha": None}, None, case.beside)
    torch.testing.assert_close(one(inputs), none(inputs), rtol=1e-13, atol=0)
    assert case(inputs).item() != none(inputs).item()
    if CATALOGUE[case.name].needs & {"lengths", "batch"}:
        return
    with mp.workdps(30):
        pairs = [
            Pair(tuple(s[i].item() for s in sums), refs=tuple(float(r[i]) for r in x.refs))
            for i in range(4)
        ]
        options = {k: v for k, v in case.options.items() if k != "ld_alpha"}
        each = [float(truth(case.name, pair, options)) for pair in pairs]
    weights = x.weights.tolist() if case.beside else [1.0] * 4
    wanted = sum(w * value for w, value in zip(weights, each, strict=True)) / 4
    assert float(case(inputs)) == pytest.approx(wanted, rel=1e-12)


def test_ld_alpha_counts_tokens_in_their_order():
    """The first two of three tokens are shared; those of another response between do not count."""
    m = torch.tensor([0.5, 9.0, -1.0, 2.0], dtype=torch.float64)
    chosen = Responses(m, segments=torch.tensor([1, -1, 1, 1]), num_segments=2)
    rejected = Responses(torch.zeros(3, dtype=torch.float64), segments=torch.tensor([1, 0, 1]))
    logps = F.logsigmoid(m)
    wanted = logps[0] + logps[2] + 0.25 * logps[3]
    of_chosen, of_rejected = losses.desensitized_logps(chosen, rejected, 0.25)
    torch.testing.assert_close(of_chosen, torch.stack([0 * wanted, wanted]))
    half = math.log(0.5)
    torch.testing.assert_close(
        of_rejected, torch.tensor([0.25 * half, 2 * half], dtype=torch.float64)
    )


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_wpo_weights_are_those_of_the_paper(layout):
    x = Batch(B=4, T=6)
    x.rejected.mask[2] = False
    x.rejected.responses = Responses(x.rejected.log_odds, x.rejected.mask)
    order = torch.randperm(24)
    inputs = x.inputs() if layout == "padded" else x.packed_inputs(order)
    sides = [x.chosen, x.rejected]
    wanted = torch.ones(4, dtype=torch.float64)
    squares = [side.s.square().sum(-1).log() for side in sides]
    for side, log in zip(sides, squares, strict=True):
        alike = ((side.logp - log) * side.mask).sum(-1) / side.mask.sum(-1).clamp(min=1)
        wanted = wanted * alike.exp()
    if layout == "packed":
        squares = [log.flatten()[order] for log in squares]
    ours = losses.wpo_weights(inputs["chosen"], inputs["rejected"], *squares)
    theirs = reference.wpo_weights(inputs["chosen"], inputs["rejected"], *squares)
    torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    assert not ours.requires_grad and (ours > 0).all()
    with pytest.raises(ValueError, match="rejected_log_sum_squares: expected shape"):
        losses.wpo_weights(inputs["chosen"], inputs["rejected"], squares[0], torch.zeros(2))


def test_weights_of_pairs_multiply_them():
    """A weight of 0 is a pair less, but not in the divisor; a weight has no gradient."""
    x = Batch(B=3)
    inputs = x.inputs()
    weights = torch.tensor([2.0, 0.0, 1.0], dtype=torch.float64, requires_grad=True)
    sides = [inputs[k] for k in DPO]
    for name in ("dpo", "apo_zero", "dpop", "sigmoid_norm"):
        loss = FORMULAS[name](*sides, weights)
        alone = [
            FORMULAS[name](
                *(Responses(s.log_odds[i : i + 1], s.mask[i : i + 1]) for s in sides[:2]),
                *(r[i : i + 1] for r in x.refs),
            )
            for i in range(3)
        ]
        torch.testing.assert_close(loss, (2 * alone[0] + alone[2]) / 3, rtol=1e-13, atol=0)
        leaves = [weights, x.chosen.z]
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True, retain_graph=True)
        assert gradients[0] is None and (gradients[1][1] == 0).all()
    with pytest.raises(ValueError, match=r"pair_weights: expected \(3,\), got \(2,\)"):
        losses.dpo_loss(*sides, weights[:2])
    with pytest.raises(TypeError, match="pair_weights: expected a float tensor, got torch.int64"):
        losses.dpo_loss(*sides, weights.long())


UNPAIRED = [case for case in CASES if "unpaired" in CATALOGUE[case.name].needs]
SINGLE = [case for case in UNPAIRED if "reference" in CATALOGUE[case.name].needs]


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("sizes", [(4, 2), (1, 3), (0, 3), (3, 0), (2, 2), (0, 0)], ids=str)
@pytest.mark.parametrize("case", UNPAIRED, ids=str)
def test_sides_of_unequal_size(case, sizes, layout):
    """The references count single responses; parts with totals given add up to the whole."""
    sides, refs, inputs = [], [], Batch(B=2).inputs()
    for b in sizes:
        side = Side(B=b, T=5) if b else None
        empty = Responses(
            torch.zeros(0, 5, dtype=torch.float64, requires_grad=True),
            torch.zeros(0, 5, dtype=torch.bool),
        )
        if layout == "padded" or not b:
            sides.append(side.responses if b else empty)
        else:
            sides.append(packed(side, torch.randperm(5 * b)))
        refs.append(side.S[:, 0] + 1 if b else torch.zeros(0, dtype=torch.float64))
    inputs |= dict(zip(DPO, (*sides, *refs), strict=True))
    ours, wanted = case(inputs), case(inputs, REFERENCES)
    torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-14)
    assert ours.isfinite()
    if sizes == (0, 0):
        assert float(ours) == 0
    ours.backward()
    gradients = [s.log_odds.grad for s in sides if s.log_odds.is_leaf]
    assert all(g is None or g.shape == (0, 5) for g in gradients)


@pytest.mark.parametrize("case", SINGLE, ids=str)
def test_the_mean_is_over_the_responses_of_both_sides(case):
    """Of three good and one bad response without tokens it is the mean of three."""
    x = Batch(B=3)
    inputs = x.inputs()
    nothing = Responses(torch.zeros(1, 2, dtype=torch.float64), torch.zeros(1, 2, dtype=torch.bool))
    inputs |= {"rejected": nothing, "ref_rejected_logps": torch.zeros(1)}
    each = []
    for i in range(3):
        part = Responses(x.chosen.log_odds[i : i + 1], x.chosen.mask[i : i + 1])
        each.append(case(inputs | {"chosen": part, "ref_chosen_logps": x.refs[0][i : i + 1]}))
    torch.testing.assert_close(case(inputs), sum(each) / 3, rtol=1e-13, atol=0)
    given = [inputs[k]._replace(total_sequences=n) for k, n in (("chosen", 5), ("rejected", 2))]
    scaled = case(inputs | dict(zip(DPO[:2], given, strict=True)))
    torch.testing.assert_close(scaled, sum(each) / 7, rtol=1e-13, atol=0)
    with pytest.raises(ValueError, match="total_sequences: expected it for both sides or for none"):
        case(inputs | {"chosen": given[0]})


def test_the_reference_point_of_kto():
    x = Batch(B=4)
    side, refs = x.chosen.responses, x.refs[0]
    for shift in (-3.0, 0.0, 3.0):
        ours = losses.kto_reference_point(side, refs + shift)
        wanted = max(0.0, float((sequence_logps(side) - refs - shift).mean()))
        assert float(ours) == pytest.approx(wanted, rel=1e-13)
        assert float(reference.kto_reference_point(side, refs + shift)) == pytest.approx(wanted)
        assert not ours.requires_grad and ours.dtype == torch.float64
    assert float(losses.kto_reference_point(side)) == 0  # log P < 0
    none = Responses(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool))
    assert losses.kto_reference_point(none).item() == 0
    inputs = x.inputs()
    for value in (0.7, torch.tensor([0.7])):
        loss = losses.kto_loss(inputs["chosen"], inputs["rejected"], value, *x.refs)
        wanted = reference.kto_loss(inputs["chosen"], inputs["rejected"], value, *x.refs)
        torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match=r"reference_point: expected one value, got shape \(2,\)"):
        losses.kto_loss(inputs["chosen"], inputs["rejected"], torch.zeros(2))


def test_kto_at_a_point_of_0_is_apo_zero_unpaired_and_bco_without_shift_is_bco_pair():
    x = Batch(B=4)
    sides = [x.inputs()[k] for k in DPO]
    zero = torch.tensor(0.0)
    torch.testing.assert_close(
        losses.kto_loss(*sides[:2], zero, *x.refs), losses.apo_zero_unpaired_loss(*sides)
    )
    pairs = (losses.bco_pair_loss(*sides), losses.apo_zero_loss(*sides))
    alone = (losses.bco_loss(*sides[:2], zero, *x.refs), losses.apo_zero_unpaired_loss(*sides))
    for of_pairs, of_both in zip(pairs, alone, strict=True):
        torch.testing.assert_close(of_pairs, 2 * of_both, rtol=1e-13, atol=0)


def test_losses_without_a_reference_count_pairs_with_both_responses():
    """A pair with an empty side counts where there is a reference, and not where there is none."""
    x = Batch(B=3)
    x.rejected.mask[1] = False
    inputs = x.inputs() | {"rejected": Responses(x.rejected.log_odds, x.rejected.mask)}
    kept = torch.tensor([0, 2])
    fewer = {
        k: Responses(inputs[k].log_odds[kept], inputs[k].mask[kept]) for k in ("chosen", "rejected")
    }
    for name in ("simpo", "alphapo"):
        torch.testing.assert_close(
            FORMULAS[name](inputs["chosen"], inputs["rejected"]), FORMULAS[name](**fewer)
        )
    for name in ("cpo", "orpo", "slic"):
        gold = inputs["chosen"]
        torch.testing.assert_close(
            FORMULAS[name](inputs["chosen"], inputs["rejected"]),
            FORMULAS[name](**fewer, gold=gold),
        )
    loss = losses.dpo_loss(*(inputs[k] for k in DPO))
    others = losses.dpo_loss(**fewer, **{k: inputs[k][kept] for k in DPO[2:]})
    apart = (loss * 3 - others * 2).item()
    r = x.r[0][1].item() + float(x.refs[1][1])
    assert apart == pytest.approx(math.log1p(math.exp(-0.1 * r)), rel=1e-10)


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_optimal_transport_sorts_the_call(name):
    """The order of the pairs is free, the batch is not: its catalogue entry says so."""
    m = torch.tensor([[0.0, 3.0, -2.0, 1.0], [1.0, -4.0, 2.0, 0.5]], dtype=torch.float64)
    refs = torch.tensor([[-5.0, -1.0, -3.0, -2.0], [-1.0, -0.5, -2.0, -0.25]], dtype=torch.float64)

    def loss(rows, **totals):
        mask = torch.ones(len(m[0, rows]), 1, dtype=torch.bool)
        sides = [Responses(side[rows, None], mask, **totals) for side in m]
        return float(FORMULAS[name](*sides, *(ref[rows] for ref in refs), beta=1.0))

    whole = loss(slice(None))
    assert loss(torch.tensor([2, 0, 3, 1])) == pytest.approx(whole, rel=1e-14)
    halves = [loss(slice(i, i + 2), total_sequences=4) for i in (0, 2)]
    assert abs(sum(halves) - whole) > 1e-3
    assert {n for n, entry in CATALOGUE.items() if "batch" in entry.needs} == {
        "aot",
        "aot_unpaired",
    }


def test_optimal_transport_leaves_out_pairs_without_tokens():
    x = Batch(B=4)
    for side in (x.chosen, x.rejected):
        side.mask[1] = False
        side.responses = Responses(side.log_odds, side.mask)
    inputs, kept = x.inputs(), torch.tensor([0, 2, 3])
    for name in ("aot", "aot_unpaired"):
        case = Case(name, {"beta": BETA}, None)
        fewer = {k: Responses(inputs[k].log_odds[kept], inputs[k].mask[kept]) for k in DPO[:2]}
        fewer |= {k: inputs[k][kept] for k in DPO[2:]}
        torch.testing.assert_close(case(inputs), case(fewer), rtol=1e-13, atol=0)
        gradients = torch.autograd.grad(case(inputs), [x.chosen.log_odds, x.rejected.log_odds])
        assert all((g[1] == 0).all() and g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_rrhf_equals_its_reference(layout, dtype):
    """Lists in any order, equal scores, an empty response, a list without tokens."""
    x = Side(B=8, T=5, dtype=dtype)
    x.mask[3] = False
    x.mask[7] = False
    side = Responses(x.log_odds, x.mask)
    side = packed(x, torch.randperm(40)) if layout == "packed" else side
    scores = torch.tensor([0.5, 2.0, 0.5, 9.0, 1.0, 2.0, -1.0, 0.0], dtype=dtype)
    lists = torch.tensor([0, 4, 0, 0, 4, 4, 0, 2])
    for total in (None, 3):
        given = side._replace(total_sequences=total)
        ours, wanted = (f.rrhf_loss(given, scores, lists) for f in (losses, reference))
        tolerance = 1e-12 if dtype == torch.float64 else 1e-5
        assert ours.dtype == wanted.dtype == dtype
        torch.testing.assert_close(ours, wanted, rtol=tolerance, atol=tolerance)
        gradients = [torch.autograd.grad(v, x.z, retain_graph=True)[0] for v in (ours, wanted)]
        torch.testing.assert_close(*gradients, rtol=0, atol=tolerance)


def test_rrhf_by_hand_and_its_errors():
    """p = 1/2 and 3/4 of one token each; the worse scored one is likelier by log 3/2."""
    m = torch.tensor([[0.0], [math.log(3)]], dtype=torch.float64)
    side = Responses(m, torch.ones(2, 1, dtype=torch.bool))
    lists = torch.zeros(2, dtype=torch.int64)
    loss = losses.rrhf_loss(side, torch.tensor([1.0, 0.0]), lists)
    assert float(loss) == pytest.approx(math.log(3 / 2) + math.log(2), rel=1e-14)
    loss = losses.rrhf_loss(side, torch.tensor([0.0, 1.0]), lists)
    assert float(loss) == pytest.approx(-math.log(3 / 4), rel=1e-14)
    with pytest.raises(TypeError, match="lists: expected a tensor of torch.int64, got torch.int32"):
        losses.rrhf_loss(side, torch.tensor([1.0, 0.0]), lists.int())
    with pytest.raises(ValueError, match=r"scores: expected \(2,\), got \(3,\)"):
        losses.rrhf_loss(side, torch.zeros(3), lists)
    with pytest.raises(ValueError, match=r"lists: expected \(2,\), got \(1,\)"):
        losses.rrhf_loss(side, torch.zeros(2), lists[:1])


# the log-odds of the chosen side are not read by that of candidates
READ = [case for case in ONE_EACH if case.name != "candidate_unlikelihood_penalty"]


@pytest.mark.parametrize("case", READ, ids=str)
def test_grad_and_vmap(case):
    """The functional gradient is that of autograd, and a stack of batches is a loop over them."""
    x, y = Batch(B=2, T=3), Batch(B=2, T=3)
    inputs = {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in x.inputs().items()}
    names = ("chosen", "rejected", "gold")

    def loss(*log_odds):
        sides = zip(names, log_odds, strict=True)
        return case(inputs | {k: Responses(m, inputs[k].mask) for k, m in sides})

    points = [
        torch.stack([getattr(b, k).log_odds.detach() for b in (x, y)]).requires_grad_()
        for k in names
    ]
    slopes = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2)))(*points)
    for i in range(2):
        value = loss(*(p[i] for p in points))
        wanted = torch.autograd.grad(value, points, allow_unused=True)
        for ours, g in zip(slopes, wanted, strict=True):
            g = torch.zeros_like(ours) if g is None else g
            torch.testing.assert_close(ours[i], g[i], rtol=1e-12, atol=1e-13)


# what is held constant is not in a difference quotient
SMOOTH = [case for case in READ if case.name not in ("dft", "tdpo")]


@pytest.mark.parametrize("case", SMOOTH, ids=str)
def test_gradcheck(case):
    x = Batch(B=2, T=3)
    inputs = {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in x.inputs().items()}
    names = [k for k in ("chosen", "rejected", "gold") if k in case.takes()]

    def loss(*log_odds):
        sides = zip(names, log_odds, strict=True)
        return case(inputs | {k: Responses(m, inputs[k].mask) for k, m in sides})

    points = [inputs[k].log_odds.detach().requires_grad_() for k in names]
    assert torch.autograd.gradcheck(loss, points)
    assert torch.autograd.gradgradcheck(loss, points)


def test_gradcheck_of_what_holds_a_side_constant():
    """TDPO2 holds D of the chosen side, TDPO1 does not; DFT holds p."""
    x = Batch(B=2, T=3)
    inputs = x.inputs()
    kl = [
        inputs[k].detach().requires_grad_() for k in ("chosen_divergences", "rejected_divergences")
    ]
    sides = inputs["chosen"], inputs["rejected"]

    def loss(of_chosen, of_rejected, variant="tdpo1"):
        fixed = [Responses(s.log_odds.detach(), s.mask) for s in sides]
        return losses.tdpo_loss(*fixed, of_chosen, of_rejected, variant=variant)

    assert torch.autograd.gradcheck(loss, kl)
    first, second = torch.autograd.grad(loss(*kl, variant="tdpo2"), kl, allow_unused=True)
    assert first is None or (first == 0).all()
    assert (second[sides[1].mask] != 0).all()
    value = losses.dft_loss(sides[0])
    p = x.chosen.p
    assert float(value) == pytest.approx(float(-(p * p.log())[x.chosen.mask].mean()), rel=1e-12)


def test_a_loss_has_options_of_its_own():
    x = Batch(B=3, dtype=torch.float32)
    sides = [x.inputs()[k] for k in DPO]
    objective = RewardPenalizeLoss(
        {"dpo": 1.0, "simpo": 0.5, "cpo": 2.0},
        beta=0.3,
        simpo={"beta": 2.0, "gamma": 1.0},
        cpo={"nll_weight": 0.0, "loss_type": "hinge"},
    )
    loss, metrics = objective(*sides)
    wanted = {
        "dpo": losses.dpo_loss(*sides, beta=0.3),
        "simpo": losses.simpo_loss(*sides[:2], beta=2.0, gamma=1.0),
        "cpo": losses.cpo_loss(*sides[:2], beta=0.3, nll_weight=0.0, loss_type="hinge"),
    }
    for name, value in wanted.items():
        assert torch.equal(metrics[f"loss/{name}"], value.detach())
    total = wanted["dpo"] + 0.5 * wanted["simpo"] + 2 * wanted["cpo"]
    torch.testing.assert_close(loss, total)
    usual = {"label_smoothing": 0.0}
    assert objective.options_of("simpo") == {"beta": 2.0, "gamma": 1.0, **usual}
    assert objective.options_of("dpo")["beta"] == 0.3


@pytest.mark.parametrize(
    "weights, options, error, message",
    [
        ({"dpo": 1.0}, {"simpo": {"beta": 2.0}}, ValueError, "one of the losses named under simpo"),
        ({"simpo": 1.0}, {"simpo": 2.0}, ValueError, "a mapping of options under simpo, got 2.0"),
        ({"simpo": 1.0}, {"simpo": {"delta": 2.0}}, ValueError, r"expected those of simpo, got \["),
        ({"simpo": 1.0}, {"simpo": {"gamma": -1.0}}, ValueError, "gamma: expected a value >= 0"),
        ({"dpo": 1.0}, {"label_smoothing": 0.1}, ValueError, "the conservative DPO is cdpo"),
        ({"dpo": 1.0}, {"loss_type": "ipo"}, ValueError, "loss_type is an option of cpo, tpo"),
        ({"dpo": 1.0, "sigmoid": 1.0}, {}, ValueError, "expected each loss once, got dpo twice"),
        ({"cpo": 1.0, "mle": 1.0}, {}, ValueError, "one loss that contains MLE, got cpo, mle"),
        ({"sft": 1.0, "orpo": 1.0}, {}, ValueError, "one loss that contains MLE, got mle, orpo"),
    ],
)
def test_mixtures_that_cannot_be(weights, options, error, message):
    with pytest.raises(error, match=message):
        RewardPenalizeLoss(weights, **options)


def test_losses_without_their_likelihood_contain_no_mle():
    """CPO and SLiC with a weight of 0 may stand beside MLE."""
    x = Batch()
    for name in ("cpo", "slic"):
        objective = RewardPenalizeLoss({name: 1.0, "mle": 1.0}, nll_weight=0.0)
        loss, _ = objective(x.chosen.responses, x.rejected.responses)
        whole = FORMULAS[name](x.chosen.responses, x.rejected.responses, nll_weight=0.0)
        torch.testing.assert_close(loss, whole + losses.mle_loss(x.chosen.responses))


def test_what_contains_mle_has_its_gradient_alone_where_the_sides_agree():
    """On one response for both sides the preference cancels, and MLE's gradient is left."""
    side = Side(B=2)
    both = {"chosen": side.responses, "rejected": side.responses}
    for name in CONTAIN_MLE & {"cpo", "orpo", "slic"}:
        (gradient,) = torch.autograd.grad(FORMULAS[name](**both), side.z, retain_graph=True)
        reduction = "sequence_sum" if name == "slic" else "token_mean"
        scale = 0.1 if name == "slic" else 1.0
        likelihood = scale * losses.mle_loss(side.responses, reduction=reduction)
        (wanted,) = torch.autograd.grad(likelihood, side.z, retain_graph=True)
        torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-14)


def test_aliases_are_other_names():
    x = Batch(dtype=torch.float32)
    sides = [x.inputs()[k] for k in DPO]
    for alias, name in ALIASES.items():
        assert name in FORMULAS and alias not in FORMULAS and name_of(alias) == name
        loss, metrics = RewardPenalizeLoss({alias: 1.0})(*sides)
        plain, wanted = RewardPenalizeLoss({name: 1.0})(*sides)
        assert torch.equal(loss, plain) and set(metrics) == set(wanted)
        assert describe(alias) == describe(name)


@pytest.mark.parametrize("name", list(FORMULAS))
def test_every_loss_is_described(name):
    entry, text = CATALOGUE[name], describe(name)
    assert text.startswith(f"{name}: {entry.title} ({entry.source})")
    assert entry.when in text
    assert sum(line.startswith("Needs ") for line in text.splitlines()) == len(entry.needs)
    assert "Options: " in text and "None" not in text.splitlines()[0]


def test_describe_names_what_is_near():
    with pytest.raises(ValueError, match=r"got 'simp0'; did you mean simpo\?"):
        describe("simp0")


def test_needs_and_takes_name_the_inputs():
    for name, entry in CATALOGUE.items():
        objective = RewardPenalizeLoss({name: 1.0})
        assert objective.takes("ref_chosen_logps") == ("reference" in entry.needs)
        assert not objective.needs("ref_chosen_logps")  # without them it is reference-free
        assert objective.needs("rejected") == bool(entry.needs & {"pairs", "unpaired"})
        assert objective.needs("gold") == ("gold" in entry.needs)
        assert objective.needs("candidates") == ("candidates" in entry.needs)
        assert objective.needs("mean_logits") == ("mean_logits" in entry.needs)
        assert objective.needs("chosen_divergences") == ("divergences" in entry.needs)
    assert RewardPenalizeLoss({"kto": 1.0}).needs("reference_point")
    assert RewardPenalizeLoss({"bco": 1.0}).needs("reward_shift")
    assert not RewardPenalizeLoss({"dpo": 1.0}).takes("reference_point")


def test_inputs_that_are_missing_or_not_taken():
    x = Batch()
    sides = [x.inputs()[k] for k in DPO]
    for name, missing in (
        ("kto", "reference_point"),
        ("bco", "reward_shift"),
        ("tpo", "gold"),
        ("tdpo", "chosen_divergences"),
        ("smoothed_mle", "logsumexp"),
    ):
        with pytest.raises(ValueError, match=f"^{missing}: expected it for the loss {name}, got N"):
            RewardPenalizeLoss({name: 1.0})(*sides)
    with pytest.raises(ValueError, match="^pair_weights: expected inputs of simpo, which take"):
        RewardPenalizeLoss({"simpo": 1.0})(*sides, pair_weights=x.weights)
    loss, _ = RewardPenalizeLoss({"simpo": 1.0})(*sides, pair_weights=None)
    assert loss.isfinite()


def test_weights_that_follow_the_run():
    x = Batch(dtype=torch.float32)
    sides = [x.inputs()[k] for k in DPO]
    up = ramp(0.0, 2.0, begin=0.25, finish=0.75)
    assert [up(p) for p in (0.0, 0.25, 0.5, 0.75, 1.0)] == [0.0, 0.0, 1.0, 2.0, 2.0]
    step = ramp(1.0, 0.0, begin=0.5, finish=0.5)
    assert [step(p) for p in (0.0, 0.49, 0.5, 1.0)] == [1.0, 1.0, 0.0, 0.0]
    objective = RewardPenalizeLoss({"mle": 1.0, "dpo": up})
    parts = {name: RewardPenalizeLoss({name: 1.0})(*sides)[0] for name in ("mle", "dpo")}
    for progress in (0.0, 0.5, 1.0):
        loss, metrics = objective(*sides, progress=progress)
        torch.testing.assert_close(loss, parts["mle"] + up(progress) * parts["dpo"])
        assert torch.equal(metrics["loss/dpo"], parts["dpo"].detach())
        assert objective.weights_at(progress) == {"mle": 1.0, "dpo": up(progress)}
    falling = RewardPenalizeLoss({"mle": lambda progress: 0.5 - progress})
    with pytest.raises(ValueError, match=r"weights\['mle'\]: expected a value >= 0, got -0.5"):
        falling(*sides, progress=1.0)
    for wrong in ({"begin": 0.5, "finish": 0.25}, {"finish": 1.5}):
        with pytest.raises(ValueError, match="begin, finish: expected begin <= finish <= 1"):
            ramp(0.0, 1.0, **wrong)
    with pytest.raises(ValueError, match="start: expected a value >= 0, got -1"):
        ramp(-1.0, 1.0)


@pytest.mark.parametrize("case", [c for c in CASES if "pairs" in CATALOGUE[c.name].needs], ids=str)
def test_pairs_are_as_many(case):
    inputs = Batch(B=3).inputs()
    fewer = Responses(inputs["rejected"].log_odds[:2], inputs["rejected"].mask[:2])
    with pytest.raises(ValueError, match="rejected: expected 3 responses, as many as chosen, got"):
        case(inputs | {"rejected": fewer})
    given = inputs["chosen"]._replace(total_sequences=3)
    with pytest.raises(ValueError, match="total_sequences: expected it for both sides or for none"):
        case(inputs | {"chosen": given})


def test_cases_cover_every_option():
    """Each keyword option of each loss is set by one of its cases."""
    for name, formula in FORMULAS.items():
        own = {p.name for p in keyword_options(formula)}
        seen = set(itertools.chain.from_iterable(c.options for c in CASES if c.name == name))
        unset = {"label_smoothing"} if name in ("dpo", "tpo", "aot") else set()
        assert own - seen - unset == set(), name


def keyword_options(formula):
    """The keyword-only parameters of a loss."""
    own = signature(formula).parameters.values()
    return [p for p in own if p.kind is p.KEYWORD_ONLY]


def test_metrics_have_the_dtype_of_results():
    for dtype in (torch.float32, torch.float64):
        x = Batch(dtype=dtype)
        loss, metrics = RewardPenalizeLoss({"dpo": 1.0, "exmate": 1.0})(
            *(x.inputs()[k] for k in DPO)
        )
        assert loss.dtype == dtype
        assert {k: v.dtype for k, v in metrics.items()} == dict.fromkeys(metrics, dtype)
    assert fastadapt.sequence_logps(x.chosen.responses).dtype == torch.float64


@pytest.mark.parametrize("side", ["chosen", "rejected"])
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_nan_log_odds_are_not_hidden(side, layout):
    """Of a loss that looks at that side, also of the sums in the log domain."""
    m = {k: torch.tensor([[0.5, -1.0]]) for k in ("chosen", "rejected")}
    m[side][0, 1] = float("nan")
    mask, ids = torch.ones(1, 2, dtype=torch.bool), torch.zeros(2, dtype=torch.int64)
    given = {
        k: Responses(x, mask) if layout == "padded" else Responses(x[0], segments=ids)
        for k, x in m.items()
    }
    gold = Responses(torch.zeros(1, 2), mask)
    for name in ("dpo", "ipo", "simpo", "alphapo", "slic", "nca_pair", "exo_pair"):
        assert FORMULAS[name](**given).isnan(), name
    assert losses.orpo_loss(**given, gold=gold).isnan()
    penalty = losses.unlikelihood_penalty(given["rejected"], level="sequence_mean")
    assert penalty.isnan() == (side == "rejected")


@pytest.mark.parametrize("progress", [-0.1, 1.5, float("nan")])
def test_progress_is_a_share_of_the_run(progress):
    objective = RewardPenalizeLoss({"mle": lambda x: x})
    with pytest.raises(ValueError, match="progress: expected"):
        objective.weights_at(progress)


def test_pairs_have_one_number_of_pairs():
    mask = torch.ones(4, 2, dtype=torch.bool)
    sides = [Responses(torch.zeros(4, 2), mask, total_sequences=n) for n in (4, 8)]
    with pytest.raises(ValueError, match="total_sequences: expected the same of both sides"):
        losses.simpo_loss(*sides)
