"""The losses against trl's own code, run with given log-probabilities: a thousand cases of each.

Trainers are stand-ins with the attributes that trl's functions read, models return what they are
given. Where trl gives something else, both are held against mpmath.
"""

import math
from types import SimpleNamespace

import mpmath as mp
import pytest
import torch
import torch.nn.functional as F

from fastadapt import Responses, RewardPenalizeLoss, label_logps, losses, sequence_logps
from fastadapt.losses import CATALOGUE
from loss_truths import Pair, truth

pytest.importorskip("trl", minversion="1.16", reason="these are the formulas of trl 1.16")
DPO = pytest.importorskip("trl.trainer.dpo_trainer").DPOTrainer
KTO = pytest.importorskip("trl.trainer.kto_trainer").KTOTrainer
CPO = pytest.importorskip("trl.experimental.cpo.cpo_trainer").CPOTrainer
ORPO = pytest.importorskip("trl.experimental.orpo.orpo_trainer").ORPOTrainer
TPO = pytest.importorskip("trl.experimental.tpo.tpo_trainer").TPOTrainer
BETAS = (0.01, 0.1, 0.5, 2.0)
B, T = 250, 6  # with each of the betas: 1,000 cases


class Lists(dict):
    """A defaultdict of lists."""

    def __missing__(self, key):
        self[key] = []
        return self[key]


class Model(torch.nn.Module):
    """Returns what it is given."""

    def __init__(self, **outputs):
        super().__init__()
        self.outputs = SimpleNamespace(**outputs)

    def forward(self, **_):
        """The outputs."""
        return self.outputs


def trainer_of(kind, **attributes):
    """A trainer of trl's, without its constructor."""

    def same(x):
        return x

    trainer = object.__new__(kind)
    cpu = torch.device("cpu")
    trainer.accelerator = SimpleNamespace(device=cpu, gather=same, gather_for_metrics=same)
    trainer.model = SimpleNamespace(training=True)
    trainer._metrics = {"train": Lists(), "eval": Lists()}
    trainer._total_train_tokens, trainer._tp_size = 0, 1
    trainer.aux_loss_enabled, trainer.precompute_ref_logps = False, True
    for name, value in attributes.items():
        setattr(trainer, name, value)
    return trainer


class Sides:
    """Responses of 1 to 6 tokens on each side, all log-odds leaves; and a reference near them."""

    def __init__(self, count=2, b=B, dtype=torch.float64, spread=3.0):
        self.leaves, self.masks = [], []
        for _ in range(count):
            self.leaves.append((torch.randn(b, T, dtype=dtype) * 2).requires_grad_())
            self.masks.append(torch.arange(T) < torch.randint(1, T + 1, (b, 1)))
        sides = zip(self.leaves, self.masks, strict=True)
        self.responses = [Responses(m, mask) for m, mask in sides]
        self.refs = [
            (sequence_logps(side).detach() + torch.randn(b) * spread).to(dtype)
            for side in self.responses
        ]
        self.log_sum_squares = [-3 * torch.rand(b, T, dtype=dtype) for _ in range(count)]

    def inputs(self):
        """What trl's trainers take: tokens and masks, one more column than predictions."""
        completion = torch.cat(self.masks)
        logps = torch.where(completion, label_logps(torch.cat(self.leaves)), 0)
        ids = F.pad(completion, (1, 0)).long()
        zeros = torch.zeros_like(logps)
        model = Model(
            log_probs=logps, entropy=zeros, mean_logits=zeros, is_top1=completion,
            log_sum_sq_probs=torch.cat(self.log_sum_squares), aux_loss=None,
        )  # fmt: skip
        return model, {"input_ids": ids, "completion_mask": ids, "attention_mask": ids}


def dpo_of_trl(x, loss_type, beta, **options):
    """Through `DPOTrainer._compute_loss`; its metrics beside."""
    trainer = trainer_of(
        DPO, beta=beta, loss_types=[loss_type], loss_weights=[1.0],
        label_smoothing=options.get("label_smoothing", 0.0),
        f_divergence_type=options.get("f_divergence", "reverse_kl"),
        f_alpha_divergence_coef=options.get("f_alpha", 0.5),
        ld_alpha=options.get("ld_alpha"), use_weighting=options.get("use_weighting", False),
        args=SimpleNamespace(discopop_tau=options.get("discopop_tau", 0.05)),
    )  # fmt: skip
    model, inputs = x.inputs()
    inputs |= {"ref_chosen_logps": x.refs[0], "ref_rejected_logps": x.refs[1]}
    loss = DPO._compute_loss(trainer, model, inputs, return_outputs=False)
    return loss, trainer._metrics["train"]


def assert_equal(x, ours, theirs, tolerance):
    """The means, and each case's own gradient, which has the divisor of the batch."""
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, check_dtype=False)
    gradients = [
        torch.autograd.grad(loss, x.leaves, allow_unused=True, retain_graph=True)
        for loss in (ours, theirs)
    ]
    for of_ours, of_theirs in zip(*gradients, strict=True):
        if of_ours is None and of_theirs is None:
            continue
        zero = torch.zeros_like(x.leaves[0])
        of_ours = zero if of_ours is None else of_ours * len(zero)
        of_theirs = zero if of_theirs is None else of_theirs * len(zero)
        torch.testing.assert_close(of_ours, of_theirs, rtol=tolerance, atol=tolerance)


KINDS = {  # trl's names by ours, with options
    "dpo": ("sigmoid", {}),
    "hinge": ("hinge", {}),
    "ipo": ("ipo", {}),
    "exo_pair": ("exo_pair", {"label_smoothing": 1e-3}),
    "nca_pair": ("nca_pair", {}),
    "robust": ("robust", {"label_smoothing": 0.1}),
    "bco_pair": ("bco_pair", {}),
    "sppo_hard": ("sppo_hard", {}),
    "aot": ("aot", {"label_smoothing": 0.1}),
    "aot_unpaired": ("aot_unpaired", {"label_smoothing": 0.1}),
    "apo_zero": ("apo_zero", {}),
    "apo_down": ("apo_down", {}),
    "discopop": ("discopop", {"discopop_tau": 0.5}),
    "sigmoid_norm": ("sigmoid_norm", {}),
}
SCORED = ("dpo", "hinge", "ipo", "exo_pair", "robust", "discopop", "sigmoid_norm")
# trl has the shares of "exo_pair" in float32
LOOSE = {"exo_pair": 1e-6}


def run(name, extra, dtype=torch.float64, tolerance=None, spread=3.0, gradients=True):
    """Compares one of trl's types at every beta."""
    theirs, options = KINDS[name]
    options = options | extra
    for beta in BETAS:
        x = Sides(dtype=dtype, spread=spread)
        wanted, metrics = dpo_of_trl(x, theirs, beta, **options)
        own = {k: v for k, v in options.items() if k != "use_weighting"}
        more = {}
        if options.get("use_weighting"):
            more["pair_weights"] = losses.wpo_weights(*x.responses, *x.log_sum_squares)
        objective = RewardPenalizeLoss({name: 1.0}, beta=beta, **own)
        loss, told = objective(*x.responses, *x.refs, **more)
        tolerance = tolerance or LOOSE.get(name, 1e-10)
        if gradients:
            assert_equal(x, loss, wanted, tolerance)
        else:
            torch.testing.assert_close(loss, wanted, rtol=tolerance, atol=tolerance)
        for key in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"):
            if options.get("ld_alpha") is None:
                assert float(told[key]) == pytest.approx(metrics[key][0], rel=1e-5, abs=1e-6), key


@pytest.mark.parametrize("name", KINDS)
def test_every_type_of_dpo(name):
    run(name, {})


@pytest.mark.parametrize("name", KINDS)
def test_ld_dpo(name):
    for alpha in (0.0, 0.3):
        run(name, {"ld_alpha": alpha})


@pytest.mark.parametrize("name", [n for n in KINDS if "batch" not in CATALOGUE[n].needs])
def test_wpo(name):
    # trl multiplies its hinge in place, so that it has no backward
    run(name, {"use_weighting": True}, gradients=name != "hinge")


@pytest.mark.parametrize("name", SCORED)
@pytest.mark.parametrize("kind", ["forward_kl", "js_divergence"])
def test_f_divergences(name, kind):
    run(name, {"f_divergence": kind}, spread=1.0)


@pytest.mark.parametrize("name", SCORED)
@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.7])
def test_alpha_divergence(name, alpha):
    """In float32: trl refuses float64."""
    options = {"f_divergence": "alpha_divergence", "f_alpha": alpha}
    run(name, options, torch.float32, tolerance=1e-5, spread=1.0)


def test_options_of_other_values():
    run("discopop", {"discopop_tau": 0.05})
    run("exo_pair", {"label_smoothing": 0.2})
    run("aot", {"label_smoothing": 0.0})
    run("robust", {"label_smoothing": 0.0})


def test_sft():
    """trl's mean over the tokens of the batch."""
    for _ in BETAS:
        x = Sides()
        wanted, _ = dpo_of_trl(x, "sft", 0.1)
        loss, _ = RewardPenalizeLoss({"sft": 1.0})(*x.responses, *x.refs)
        assert_equal(x, loss, wanted, 1e-10)


def one(*m, dtype=torch.float32):
    """Responses of one token each, leaves."""
    x = Sides(count=len(m), b=1, dtype=dtype)
    x.leaves = [torch.tensor([[float(v)]], dtype=dtype, requires_grad=True) for v in m]
    x.masks = [torch.ones(1, 1, dtype=torch.bool)] * len(m)
    x.responses = [Responses(leaf, mask) for leaf, mask in zip(x.leaves, x.masks, strict=True)]
    x.log_sum_squares = [torch.zeros_like(leaf) for leaf in x.leaves]
    return x


def exact(name, m, refs, options):
    """The loss of one token against another, from log-odds that float32 has."""
    with mp.workdps(60):
        S = tuple(-mp.log1p(mp.exp(-mp.mpf(float(x)))) for x in m)
        return float(truth(name, Pair(S, refs=tuple(map(float, refs))), options))


def test_discopop_where_trl_is_nan():
    """Below u = -88 its w e^-u is 0 times infinity."""
    x = one(-100.0, 2.0)
    x.refs = [torch.zeros(1), torch.zeros(1)]
    wanted, _ = dpo_of_trl(x, "discopop", 1.0)
    assert wanted.isnan()
    loss = losses.discopop_loss(*x.responses, *x.refs, beta=1.0)
    value = exact("discopop", (-100.0, 2.0), (0.0, 0.0), {"beta": 1.0})
    assert loss.item() == pytest.approx(value, rel=1e-6)
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, x.leaves))


def test_alpha_divergence_beyond_the_clamp_of_trl():
    """The exponent is clamped at 80 there, and the gradient ends with it."""
    x = one(0.0, 0.0)
    x.refs = [torch.tensor([-0.5]), torch.tensor([-95.0])]
    options = {"f_divergence": "alpha_divergence", "f_alpha": 1.875, "beta": 1.0}
    wanted, _ = dpo_of_trl(x, "hinge", **options)
    loss = losses.hinge_loss(*x.responses, *x.refs, **options)
    value = exact("hinge", (0.0, 0.0), (-0.5, -95.0), options)
    assert value > 5 * wanted.item()
    assert loss.item() == pytest.approx(value, rel=1e-6)
    assert torch.autograd.grad(wanted, x.leaves[1])[0].item() == 0
    assert torch.autograd.grad(loss, x.leaves[1])[0].item() > 1e30


def test_long_responses_in_float32():
    """trl adds 20,000 float32 log-probabilities: the sum has steps of 0.002 nats."""
    n = 20_000
    m = torch.randn(2, n) * 2 + 1
    x = one(0.0, 0.0)
    x.leaves = [m[:1].clone().requires_grad_(), m[1:].clone().requires_grad_()]
    x.masks = [torch.ones(1, n, dtype=torch.bool)] * 2
    x.responses = [Responses(leaf, mask) for leaf, mask in zip(x.leaves, x.masks, strict=True)]
    x.log_sum_squares = [torch.zeros(1, n)] * 2
    sums = [math.fsum(-math.log1p(math.exp(-v)) for v in row.tolist()) for row in m]
    refs = (sums[0] - 0.7512345, sums[1] + 0.5043)
    x.refs = [torch.tensor([ref], dtype=torch.float32) for ref in refs]
    wanted, _ = dpo_of_trl(x, "sigmoid", 1.0)
    ours = losses.dpo_loss(
        *x.responses, *(torch.tensor([ref], dtype=torch.float64) for ref in refs), beta=1.0
    )
    value = math.log1p(math.exp(-(0.7512345 + 0.5043)))
    assert ours.item() == pytest.approx(value, rel=2e-7)
    assert abs(wanted.item() - value) > 1e-5 * value


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("shift", [0.0, -9.0, 2.0])
def test_kto(loss_type, shift):
    """Loss, gradients and the reference point; good and bad responses in any order."""
    for beta in BETAS:
        x, other = Sides(count=1, b=B), Sides(count=1, b=B)
        labels = torch.rand(B) < 0.3
        model, inputs = x.inputs()
        kl_logps = sequence_logps(other.responses[0]).detach()
        ref_kl = kl_logps + torch.randn(B) + shift
        trainer = trainer_of(
            KTO, loss_type=loss_type, beta=beta, desirable_weight=1.3, undesirable_weight=0.6,
            calculate_KL=loss_type == "kto", _compute_kl_logps=lambda *_, own=kl_logps: own,
        )  # fmt: skip
        inputs |= {"label": labels, "ref_logps": x.refs[0], "ref_KL_logps": ref_kl}
        wanted = KTO._compute_loss(trainer, model, inputs, return_outputs=False)
        sides = [Responses(x.leaves[0][chosen], x.masks[0][chosen]) for chosen in (labels, ~labels)]
        refs = [x.refs[0][labels], x.refs[0][~labels]]
        more = {}
        if loss_type == "kto":
            more["reference_point"] = losses.kto_reference_point(other.responses[0], ref_kl)
            told = trainer._metrics["train"]["kl"][0]
            assert float(more["reference_point"]) == pytest.approx(told, rel=1e-12)
        weights = {"desirable_weight": 1.3, "undesirable_weight": 0.6}
        objective = RewardPenalizeLoss({loss_type: 1.0}, beta=beta, **weights)
        loss, _ = objective(*sides, *refs, **more)
        assert_equal(x, loss, wanted, 1e-10)


def each_pair(function, x):
    """The losses of the pairs by themselves, (B,)."""

    def own(chosen, rejected, chosen_mask, rejected_mask):
        return function(
            Responses(chosen[None], chosen_mask[None]),
            Responses(rejected[None], rejected_mask[None]),
        )

    return torch.func.vmap(own)(*x.leaves, *x.masks)


def logps_of(x, mean):
    """What trl's forward gives its losses."""
    found = []
    for side in x.responses:
        logps = torch.where(side.mask, label_logps(side.log_odds), 0).sum(-1)
        found.append(logps / side.mask.sum(-1) if mean else logps)
    return found


@pytest.mark.parametrize(
    "loss_type, options, name, own",
    [
        ("sigmoid", {}, "cpo", {}),
        ("sigmoid", {"label_smoothing": 0.2}, "cpo", {"label_smoothing": 0.2}),
        ("hinge", {}, "cpo", {"loss_type": "hinge"}),
        ("ipo", {}, "cpo", {"loss_type": "ipo"}),
        ("simpo", {}, "simpo", {"gamma": 0.7}),
        ("simpo", {"label_smoothing": 0.2}, "simpo", {"gamma": 0.7, "label_smoothing": 0.2}),
        ("simpo", {"alpha": 0.25}, "alphapo", {"gamma": 0.7, "alphapo_alpha": 0.25}),
        ("simpo", {"alpha": -0.5}, "alphapo", {"gamma": 0.7, "alphapo_alpha": -0.5}),
        ("simpo", {"alpha": 0.0}, "alphapo", {"gamma": 0.7, "alphapo_alpha": 0.0}),
    ],
)
def test_cpo_simpo_and_alphapo(loss_type, options, name, own):
    """Each pair's loss, and their mean with its gradient; the likelihood is a mean of tokens."""
    for beta in BETAS:
        x = Sides()
        trainer = trainer_of(
            CPO, beta=beta, loss_type=loss_type, simpo_gamma=0.7,
            alpha=options.get("alpha", 0.0), label_smoothing=options.get("label_smoothing", 0.0),
        )  # fmt: skip
        wanted, _, _ = trainer.cpo_loss(*logps_of(x, loss_type in ("ipo", "simpo")))
        given = own | {"beta": beta} | ({"nll_weight": 0.0} if name == "cpo" else {})
        function = getattr(losses, f"{name}_loss")
        torch.testing.assert_close(
            each_pair(lambda *s, f=function, o=given: f(*s, **o), x), wanted, rtol=1e-10, atol=1e-10
        )
        if name != "cpo":
            assert_equal(x, function(*x.responses, **given), wanted.mean(), 1e-10)
            continue
        nll = F.cross_entropy(*as_logits(x, 0))
        theirs = wanted.mean() + 0.7 * nll
        assert_equal(x, function(*x.responses, **given | {"nll_weight": 0.7}), theirs, 1e-10)


def as_logits(x, i):
    """Logits of two ids, the label's and another's, and labels, of the tokens that count."""
    logits = torch.stack([x.leaves[i], torch.zeros_like(x.leaves[i])], -1)
    labels = torch.where(x.masks[i], 0, -100)
    return logits.flatten(0, 1), labels.flatten()


def test_orpo():
    """Each pair's odds ratio, which trl takes in float32, and the whole loss."""
    for beta in BETAS:
        x = Sides()
        trainer = trainer_of(ORPO, beta=beta)
        terms, *_ = trainer.odds_ratio_loss(*logps_of(x, mean=True))

        def ratio(g, b, beta=beta):
            return losses.orpo_loss(g, b, beta=beta) - losses.mle_loss(g)

        torch.testing.assert_close(
            each_pair(ratio, x), -terms, rtol=1e-5, atol=1e-6, check_dtype=False
        )
        theirs = F.cross_entropy(*as_logits(x, 0)) - terms.mean()
        assert_equal(x, losses.orpo_loss(*x.responses, beta=beta), theirs, 1e-5)


@pytest.mark.parametrize("certain", [0, 1], ids=["chosen", "rejected"])
def test_orpo_where_a_response_is_certain(certain):
    """From m = 17 on float32 logits give log P = 0: trl's odds are infinite, its gradient NaN."""
    m = [0.5, 0.5]
    m[certain] = 40.0
    x = one(*m)
    logps = []
    for leaf in x.leaves:
        z = torch.stack([leaf[:, 0], torch.zeros(1)], -1)
        logps.append(z.log_softmax(-1)[:, 0])
    terms, *_ = trainer_of(ORPO, beta=0.1).odds_ratio_loss(*logps)
    gradient = torch.autograd.grad(terms.sum(), x.leaves[certain])[0]
    assert not gradient.isfinite().all() or not terms.isfinite().all()
    loss = losses.orpo_loss(*x.responses, beta=0.1)
    value = exact("orpo", m, (0.0, 0.0), {"beta": 0.1})
    assert loss.item() == pytest.approx(value, rel=1e-6)
    slopes = torch.autograd.grad(loss, x.leaves)
    with mp.workdps(80):
        h = mp.mpf(m[0]) - mp.mpf(m[1])  # of one token the log-odds are m
        pull = mp.mpf(0.1) / (1 + mp.exp(h))
        wanted = (-pull - 1 / (1 + mp.exp(mp.mpf(m[0]))), pull)
        for slope, expected in zip(slopes, wanted, strict=True):
            assert slope.item() == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize(
    "loss_type, smoothing", [("sigmoid", 0.0), ("sigmoid", 0.2), ("hinge", 0.0), ("ipo", 0.0),
                             ("tpo-l", 0.0), ("tpo-l", 0.2)],
)  # fmt: skip
@pytest.mark.parametrize("nll_weight", [0.0, 0.8])
def test_tpo(loss_type, smoothing, nll_weight):
    """Through `TPOTrainer._compute_loss`, from logits of two ids."""
    for beta in BETAS:
        x = Sides(count=3)
        n = 3 if nll_weight else 2
        logits = torch.stack([torch.cat(x.leaves[:n]), torch.zeros(n * B, T)], -1)
        completion = F.pad(torch.cat(x.masks[:n]), (1, 0)).long()
        trainer = trainer_of(
            TPO, beta=beta, loss_type=loss_type, tpo_l_gamma=0.4, label_smoothing=smoothing,
            tpo_alpha=nll_weight,
        )  # fmt: skip
        inputs = {
            "input_ids": torch.zeros_like(completion),
            "completion_mask": completion,
            "attention_mask": completion,
        }
        # one more position: the last predicts nothing; ids that are 0 are the labels
        model = Model(logits=F.pad(logits, (0, 0, 0, 1)))
        wanted = TPO._compute_loss(trainer, model, inputs, return_outputs=False)
        own = {"beta": beta, "loss_type": loss_type, "label_smoothing": smoothing}
        if loss_type == "tpo-l":
            own["gamma"] = 0.4
        loss = losses.tpo_loss(*x.responses, nll_weight=nll_weight, **own)
        assert_equal(x, loss, wanted, 1e-10)
