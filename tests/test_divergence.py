"""Divergence of two heads: every kind against float64 truth, edges, and what autograd may do."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastadapt import linear_divergence, reference
from fastadapt._C import JSD
from fastadapt._ops.linear import divergence_driver
from fastadapt._ops.linear.divergence import KINDS
from fastadapt._ops.linear.pairs import PairProblem
from fastadapt._ops.linear.pairs_cpu import CpuPair
from fastadapt.losses.divergence import plan_of

OPS = torch.ops.fastadapt
V = 4099  # two whole tiles and a part
KIND = {
    "kl": {"kind": "kl"},
    "reverse_kl": {"kind": "reverse_kl"},
    "jsd": {"kind": "jsd"},
    "skewed_jsd": {"kind": "jsd", "beta": 0.1},
}
SHAPES = {
    "plain": {},
    "scaled": {"logit_scale": 0.3, "teacher_logit_scale": -1.2, "temperature": 0.7},
    "capped": {
        **{"softcap": 5.0, "logit_scale": 1.5, "teacher_softcap": 3.0},
        **{"teacher_logit_scale": 0.8, "temperature": 2.0},
    },
}
INF = float("inf")


def heads(n, h, teacher_h, v, dtype, bias=True):
    """Two heads with divergences of a nat or so, as keyword arguments."""
    given = {"hidden": torch.randn(n, h), "weight": torch.randn(v, h) * 2 / h**0.5}
    given["teacher_hidden"] = torch.randn(n, teacher_h)
    given["teacher_weight"] = torch.randn(v, teacher_h) * 2 / teacher_h**0.5
    if bias:
        given |= {"bias": torch.randn(v), "teacher_bias": torch.randn(v)}
    return {name: x.to(dtype) for name, x in given.items()}


def of_logits(student, teacher):
    """Heads whose products are exactly these logits, (N, V) each: states are unit vectors."""
    unit = torch.eye(len(student), dtype=student.dtype)
    return {
        **{"hidden": unit, "weight": student.t().contiguous()},
        **{"teacher_hidden": unit, "teacher_weight": teacher.t().contiguous()},
    }


def gradients(f, given, upstream, *, wanted=("hidden", "weight", "bias"), **options):
    """Divergences, and gradients of what is wanted of the student, by name."""
    leaves = {name: given[name].clone().requires_grad_() for name in wanted if name in given}
    values = f(**{**given, **leaves}, **options)
    made = torch.autograd.grad(values, list(leaves.values()), upstream.to(values.dtype))
    return {"divergence": values.detach(), **dict(zip(leaves, made, strict=True))}


def in_double(given):
    return {name: x.double() for name, x in given.items()}


@pytest.mark.parametrize("n", (0, 1, 127, 513))
@pytest.mark.parametrize("kind", KIND)
def test_equals_the_truth_in_float64(kind, n):
    for shape in SHAPES.values() if n < 513 else (SHAPES["capped"],):
        given, upstream = heads(n, 33, 21, V, torch.float64), torch.randn(n)
        mask = torch.rand(n) > 0.2
        ours, truth = (
            gradients(f, given, upstream, mask=mask, **KIND[kind], **shape)
            for f in (linear_divergence, reference.linear_divergence)
        )
        for name, x in ours.items():
            assert x.dtype == torch.float64
            torch.testing.assert_close(x, truth[name], rtol=1e-11, atol=1e-12)
        for name in ("divergence", "hidden"):
            assert (ours[name][~mask] == 0).all()
        if n > 1:
            assert (ours["divergence"][mask] > 1e-3).all()


@pytest.mark.parametrize("kind", KIND)
def test_gradcheck(kind, monkeypatch):
    monkeypatch.setattr(CpuPair, "tile", 7)
    given = heads(5, 4, 3, 17, torch.float64)
    mask = torch.tensor([True, False, True, True, True])
    leaves = [given.pop(name).requires_grad_() for name in ("hidden", "weight", "bias")]
    for shape in SHAPES.values():
        torch.autograd.gradcheck(
            lambda h, w, b: linear_divergence(
                hidden=h,
                weight=w,
                bias=b,
                mask=mask,
                **given,
                **KIND[kind],
                **shape,  # noqa: B023
            ),
            leaves,
        )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("kind", KIND)
def test_error_is_no_more_than_that_of_plain_torch(each_capability, kind, dtype, shape):
    """Of logits of the same bits: without a bias, which plain torch adds before it rounds.

    Half precision rounds the logits and their gradients, in both alike: errors agree to 2 %. The
    gradient of the hidden states is a sum of products of tiles, each rounded in addition, by at
    most half an epsilon: by a quarter or so in the root mean square.
    """
    given, upstream = heads(64, 96, 40, V, dtype, bias=False), torch.randn(64)
    options = {**KIND[kind], **SHAPES[shape]}
    plain = gradients(reference.linear_divergence, given, upstream, **options)
    truth = gradients(reference.linear_divergence, in_double(given), upstream, **options)
    for _ in each_capability():
        ours = gradients(linear_divergence, given, upstream, **options)
        for name, exact in truth.items():
            error, allowed = (
                float((x[name].double() - exact).norm() / exact.norm()) for x in (ours, plain)
            )
            if dtype == torch.float32:  # both are a few roundings: which has more is chance
                assert error <= max(allowed, 1e-6), name
            else:
                rounding = torch.finfo(dtype).eps / 4 if name == "hidden" else 0.0
                assert error <= math.hypot(allowed * 1.02, rounding) + 1e-7, name


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_biases_are_added_without_rounding(cpu_capability, dtype):
    """Added to the products in float32: logits that are biases alone have float32's error."""
    given, upstream = heads(3, 8, 5, V, dtype), torch.randn(3)
    given["hidden"].zero_()
    given["teacher_hidden"].zero_()
    for options in KIND.values():
        ours, truth = (
            gradients(f, x, upstream, wanted=("hidden", "bias"), **options)
            for f, x in (
                (linear_divergence, given),
                (reference.linear_divergence, in_double(given)),
            )
        )
        for name, rtol in (
            ("divergence", 1e-6),
            ("bias", 3e-2 if dtype != torch.float32 else 1e-5),
        ):
            exact = truth[name].to(ours[name].dtype)
            torch.testing.assert_close(ours[name], exact, rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("kind", KIND)
def test_equal_distributions_have_no_divergence(cpu_capability, kind):
    """The same bits give exactly 0, and no gradient but for the rounding of a probability."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        given = heads(33, 24, 24, V, dtype)
        for name in ("hidden", "weight", "bias"):
            given[f"teacher_{name}"] = given[name]
        for shape in ({}, {"softcap": 4.0, "teacher_softcap": 4.0, "temperature": 1.7}):
            out = gradients(linear_divergence, given, torch.ones(33), **KIND[kind], **shape)
            assert (out["divergence"] == 0).all()
            for name in ("hidden", "weight", "bias"):
                assert (out[name] == 0).all(), name


@pytest.mark.parametrize("kind", KIND)
def test_near_distributions(cpu_capability, kind):
    """Within 2e-7 of the truth and not below 0, which the truth approaches as a square."""
    base = torch.randn(7, V) * 3
    for distance in (1e-1, 1e-2, 1e-3, 1e-4, 1e-6):
        given = of_logits(base, base + distance * torch.randn(7, V))
        ours = linear_divergence(**given, **KIND[kind])
        truth = reference.linear_divergence(**in_double(given), **KIND[kind])
        assert (ours >= 0).all()
        assert (ours.double() - truth).abs().max() <= 2e-7 + 1e-6 * distance


@pytest.mark.parametrize("kind", KIND)
def test_a_constant_changes_nothing(cpu_capability, kind):
    """Logits are multiples of 2^-10, so that the sum is exact; distances are, too."""
    base, other = (torch.randint(-4000, 4000, (5, V)) / 1024 for _ in range(2))
    assert (linear_divergence(**of_logits(base, base + 512.0), **KIND[kind]) <= 2e-7).all()
    near, far = (
        linear_divergence(**of_logits(base, x), **KIND[kind]) for x in (other, other + 512)
    )
    torch.testing.assert_close(near, far, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KIND)
def test_distributions_on_one_id(cpu_capability, kind):
    """Teachers, and students, with all their mass on one id, up to 80 nats above the others.

    A value and the mean in a gradient are float sums that hold a term of the gap and up to 63 terms
    more, each addition rounded by half an ulp: by eight of those, as their root of squares.
    """
    spread = torch.randn(6, V)
    for gap in (20.0, 80.0):
        one = torch.zeros(6, V)
        one[torch.arange(6), torch.tensor([0, 1, 2047, 2048, 4097, 4098])] = gap
        for given in (
            of_logits(spread, one),
            of_logits(one, spread),
            of_logits(one, one.roll(1, 1)),
        ):
            ours, truth = (
                gradients(f, x, torch.ones(6), wanted=("weight",), **KIND[kind])
                for f, x in (
                    (linear_divergence, given),
                    (reference.linear_divergence, in_double(given)),
                )
            )
            for name, x in ours.items():
                torch.testing.assert_close(
                    x.double(), truth[name], rtol=2e-6, atol=8 * gap * 2**-24
                )


@pytest.mark.parametrize("beta", (1e-30, 1e-6, 0.5, 1 - 1e-6, 1 - 1e-12))
def test_every_share_of_the_mixture(cpu_capability, beta):
    """Towards 0 and 1 a divergence becomes beta KL(q || p) and (1 - beta) KL(p || q).

    The share of the student is 1 - beta in float64, so it may be far below float32's epsilon.
    """
    given = of_logits(torch.randn(5, V) * 4, torch.randn(5, V) * 4)
    ours = gradients(
        linear_divergence, given, torch.ones(5), wanted=("weight",), kind="jsd", beta=beta
    )
    truth = gradients(
        reference.linear_divergence, in_double(given), torch.ones(5), wanted=("weight",),
        kind="jsd", beta=beta,
    )  # fmt: skip
    share = min(beta, 1 - beta)
    scale = max(float(truth["divergence"].max()), share)
    assert (ours["divergence"].double() - truth["divergence"]).abs().max() <= 2e-6 * max(scale, 0.1)
    assert (ours["weight"].double() - truth["weight"]).abs().max() <= 1e-6
    assert all(x.isfinite().all() for x in ours.values())


def test_ends_of_the_mixture_are_the_other_kinds():
    given, upstream = heads(4, 8, 6, V, torch.float32), torch.randn(4)
    for beta, kind in ((0, "kl"), (1.0, "reverse_kl")):
        for f in (linear_divergence, reference.linear_divergence):
            ours = gradients(f, given, upstream, kind="jsd", beta=beta)
            wanted = gradients(f, given, upstream, kind=kind)
            assert all(torch.equal(x, wanted[name]) for name, x in ours.items())


def test_agrees_with_gkd_of_trl():
    gkd = pytest.importorskip("trl.experimental.gkd", reason="trl with its GKD")
    given = heads(12, 16, 24, 999, torch.float64, bias=False)
    logits = [given[f"{who}hidden"] @ given[f"{who}weight"].t() for who in ("", "teacher_")]
    for beta in (0.0, 0.1, 0.5, 0.9, 1.0):
        theirs = gkd.GKDTrainer.generalized_jsd_loss(
            *(x.view(3, 4, -1) for x in logits), beta=beta, temperature=1.5, reduction="none"
        ).sum(-1)
        ours = linear_divergence(**given, kind="jsd", beta=beta, temperature=1.5).view(3, 4)
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KIND)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_biases_may_forbid_ids(cpu_capability, kind, dtype):
    """-inf in both takes an id away, whole tiles of them, the first and the last, too."""
    for forbidden in (slice(0, 2048), slice(2000, 4099), slice(5, 6), slice(1, 4098)):
        given, upstream = heads(6, 8, 5, V, dtype), torch.randn(6)
        given["bias"][forbidden] = given["teacher_bias"][forbidden] = -INF
        ours = gradients(linear_divergence, given, upstream, **KIND[kind])
        truth = gradients(reference.linear_divergence, in_double(given), upstream, **KIND[kind])
        for name, x in ours.items():
            tolerance = 1e-5 if dtype == torch.float32 else 1e-11
            torch.testing.assert_close(x.double(), truth[name], rtol=tolerance, atol=tolerance / 5)
        assert (ours["weight"][forbidden] == 0).all()


@pytest.mark.parametrize("first", (0, 2047, 3000))
def test_what_one_head_alone_forbids(cpu_capability, first):
    given, upstream = heads(4, 8, 5, V, torch.float32), torch.randn(4)
    for who, infinite in (("", "kl"), ("teacher_", "reverse_kl")):
        some = {**given, f"{who}bias": given["bias"].clone()}
        some[f"{who}bias"][first : first + 600] = -INF
        for kind, options in KIND.items():
            ours = gradients(linear_divergence, some, upstream, **options)
            truth = gradients(reference.linear_divergence, in_double(some), upstream, **options)
            assert (ours["divergence"] == INF).all() == (kind == infinite)
            names = (
                "divergence",
                *(() if kind == "reverse_kl" == infinite else ("hidden", "bias")),
            )
            for name in names:
                torch.testing.assert_close(ours[name].double(), truth[name], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("value", (float("nan"), INF, -INF))
@pytest.mark.parametrize("kind", KIND)
def test_bad_rows_stay_alone(cpu_capability, kind, value):
    """NaN, +inf, and nothing above -inf: in the student's row 1 and the teacher's row 3."""
    for at in (slice(0, 1), slice(2050, 2051), slice(4098, 4099)):
        at = slice(0, V) if value == -INF else at
        student, teacher = torch.randn(5, V), torch.randn(5, V)
        clean = gradients(
            linear_divergence, of_logits(student, teacher), torch.randn(5), wanted=("hidden",),
            **KIND[kind],
        )  # fmt: skip
        # another row's 0 times what is not finite is NaN in a product: so by biases, row by row
        for who, x in (("", student), ("teacher_", teacher)):
            bias = x[1].clone()
            bias[at] = value
            others = {
                **{"hidden": torch.zeros(1, 1), "weight": torch.zeros(V, 1)},
                **{"teacher_hidden": torch.zeros(1, 1), "teacher_weight": torch.zeros(V, 1)},
                **{"bias": student[1], "teacher_bias": teacher[1], f"{who}bias": bias},
            }
            assert linear_divergence(**others, **KIND[kind]).isnan().all()
        assert clean["divergence"].isfinite().all()


def test_nan_stays_in_its_row():
    given = heads(4, 8, 6, V, torch.float32)
    for who in ("", "teacher_"):
        hidden = given[f"{who}hidden"].clone()
        hidden[1, 3] = float("nan")
        for options in KIND.values():
            out = gradients(
                linear_divergence, {**given, f"{who}hidden": hidden}, torch.randn(4), **options
            )
            assert out["divergence"].isnan().tolist() == [False, True, False, False]
            assert out["hidden"].isnan().all(-1).tolist() == [False, True, False, False]


def test_rows_without_a_part_change_nothing():
    """Those that do not count or have no upstream gradient, whatever is in them."""
    given, upstream = heads(9, 8, 6, V, torch.float32), torch.randn(9)
    mask = torch.tensor([True] * 9)
    mask[[0, 5]], upstream[[2, 7]] = False, 0.0
    for options in KIND.values():
        clean = gradients(linear_divergence, given, upstream, mask=mask, **options)
        spoilt = {name: x.clone() for name, x in given.items()}
        for name in ("hidden", "teacher_hidden"):
            spoilt[name][[0, 2, 5]] = float("nan")
        out = gradients(linear_divergence, spoilt, upstream, mask=mask, **options)
        assert out["divergence"].isnan().tolist() == [i == 2 for i in range(9)]
        for name in ("hidden", "weight", "bias"):
            assert torch.equal(out[name], clean[name])
        assert (clean["hidden"][[0, 2, 5, 7]] == 0).all()
        for all_or_none in (torch.ones(9, dtype=torch.bool), torch.zeros(9, dtype=torch.bool)):
            out = gradients(linear_divergence, given, upstream, mask=all_or_none, **options)
            if all_or_none[0]:
                wanted = gradients(linear_divergence, given, upstream, **options)
                assert all(torch.equal(x, wanted[name]) for name, x in out.items())
            else:
                assert all((x == 0).all() for x in out.values())


def exact_heads(n, dtype=torch.float32):
    """Small multiples of a power of two: products have the same bits in whatever order they add."""
    shapes = {"hidden": (n, 16), "weight": (V, 16), "bias": (V,)}
    shapes |= {f"teacher_{name}": shape for name, shape in shapes.items()}
    return {name: (torch.randint(-8, 9, shape) / 8).to(dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("kind", KIND)
def test_a_row_depends_on_no_other_and_on_no_threads(
    cpu_capability, kind, dtype, num_threads, monkeypatch
):
    """To the last bit, of the same logits: torch's products of other rows may round otherwise."""
    given = exact_heads(11, dtype)
    num_threads(1)
    whole = linear_divergence(**given, **KIND[kind], softcap=7.0)
    for rows in ([5], [0, 5, 10, 6, 2], list(range(10, -1, -1))):
        some = {name: x[rows] if "hidden" in name else x for name, x in given.items()}
        assert torch.equal(linear_divergence(**some, **KIND[kind], softcap=7.0), whole[rows])
    for threads in (2, 3):
        num_threads(threads)
        assert torch.equal(linear_divergence(**given, **KIND[kind], softcap=7.0), whole)
    monkeypatch.setattr("fastadapt._ops.linear.pairs_cpu.MIXTURE_BYTES", 0)
    monkeypatch.setattr("fastadapt._ops.linear.pairs_cpu.LEAST_ROWS", 3)
    assert torch.equal(linear_divergence(**given, **KIND[kind], softcap=7.0), whole)


@pytest.mark.parametrize("kind", KIND)
def test_strides_and_shapes_change_no_bit(kind):
    given, upstream = exact_heads(12), torch.randint(-8, 9, (12,)) / 8
    mask = torch.rand(12) > 0.3
    wanted = gradients(linear_divergence, given, upstream, mask=mask, **KIND[kind])
    wide = torch.zeros(12, 40)
    wide[:, 3:19] = given["hidden"]
    strided = torch.zeros(24, dtype=torch.bool)[::2].copy_(mask)
    views = (
        {**given, "hidden": wide[:, 3:19], "mask": mask},
        {**given, "teacher_hidden": given["teacher_hidden"].t().contiguous().t(), "mask": strided},
        {name: x.view(3, 4, 16) if "hidden" in name else x for name, x in given.items()}
        | {"mask": mask.view(3, 4)},
        {**given, "bias": torch.zeros(V, 2)[:, 0].copy_(given["bias"]), "mask": mask},
        {**given, "teacher_weight": given["teacher_weight"].t().contiguous().t(), "mask": mask},
    )
    for view in views:
        got = gradients(linear_divergence, view, upstream.view(view["mask"].shape), **KIND[kind])
        assert got["divergence"].shape == view["mask"].shape
        for name, x in got.items():
            assert torch.equal(x.reshape(wanted[name].shape), wanted[name]), name


def test_only_the_wanted_gradients_are_made():
    given, upstream = heads(6, 8, 5, V, torch.float32), torch.randn(6)
    for options in KIND.values():
        whole = gradients(linear_divergence, given, upstream, **options)
        for wanted in (("hidden",), ("weight",), ("bias",), ("hidden", "bias"), ("weight", "bias")):
            some = gradients(linear_divergence, given, upstream, wanted=wanted, **options)
            for name, x in some.items():
                torch.testing.assert_close(x, whole[name], rtol=1e-5, atol=1e-6)
    assert not linear_divergence(**given).requires_grad
    given["weight"].requires_grad_()
    with torch.no_grad():
        assert not linear_divergence(**given).requires_grad


def test_one_id():
    given = heads(3, 8, 4, 1, torch.float32)
    for options in KIND.values():
        out = gradients(linear_divergence, given, torch.ones(3), **options)
        assert all((x == 0).all() for x in out.values())


def test_a_teacher_is_a_constant():
    """By its name: a gradient would be left out silently; without gradients nothing is."""
    given = heads(3, 8, 4, 20, torch.float32)
    for name in ("teacher_hidden", "teacher_weight", "teacher_bias"):
        some = {**given, name: given[name].clone().requires_grad_()}
        with pytest.raises(ValueError, match=f"^{name}: expected a teacher without a gradient"):
            linear_divergence(**some)
        with torch.no_grad():
            linear_divergence(**some)
    teacher = given["teacher_hidden"].requires_grad_()
    rest = (given["teacher_weight"], None, None, 0.0, 1.0, 0.0, 1.0, 0, 0.5)
    values, _ = OPS.linear_divergence(given["hidden"], given["weight"], None, teacher, *rest)
    with pytest.raises(RuntimeError, match="a teacher has no gradient"):
        values.sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": [1.0]}, TypeError, "hidden: expected a Tensor, got list"),
        ({"hidden": torch.zeros(3, 8).int()}, TypeError, "hidden: expected float32, .* .*int32"),
        ({"teacher_hidden": torch.zeros(4, 5)}, ValueError,
         r"teacher_hidden: expected shape \(3, 5\), got \(4, 5\)"),
        ({"weight": torch.nn.Linear(8, 20)}, TypeError, "weight: expected a Tensor, got Linear"),
        ({"weight": torch.zeros(8, 20)}, ValueError,
         r"weight: expected shape \(V, 8\), V >= 1, got \(8, 20\)"),
        ({"weight": torch.zeros(0, 8)}, ValueError,
         r"weight: expected shape \(V, 8\), V >= 1, got \(0, 8\)"),
        ({"weight": torch.zeros(160)}, ValueError, r"weight: expected shape \(V, 8\)"),
        ({"teacher_weight": torch.zeros(19, 5)}, ValueError,
         r"teacher_weight: expected shape \(20, 5\), got \(19, 5\)"),
        ({"teacher_weight": None}, TypeError, "teacher_weight: expected a Tensor, got NoneType"),
        ({"bias": torch.zeros(19)}, ValueError, r"bias: expected shape \(20,\), got \(19,\)"),
        ({"teacher_bias": 1.0}, TypeError, "teacher_bias: expected a Tensor or None, got float"),
        ({"weight": torch.zeros(20, 8).bfloat16()}, TypeError,
         "weight: expected torch.float32 as hidden, got torch.bfloat16"),
        ({"teacher_weight": torch.zeros(20, 5, dtype=torch.int8)}, TypeError,
         "teacher_weight: expected floating-point numbers, got torch.int8"),
        ({"weight": torch.zeros(20, 8, device="meta")}, ValueError,
         "weight: expected device cpu, got meta"),
        ({"mask": torch.ones(3)}, TypeError, "mask: expected a tensor of torch.bool, got"),
        ({"mask": torch.ones(2) > 0}, ValueError, r"mask: expected shape \(3,\), got \(2,\)"),
        ({"softcap": 0}, ValueError, "softcap: expected a value > 0, got 0"),
        ({"teacher_softcap": -1.0}, ValueError, "teacher_softcap: expected a value > 0, got -1"),
        ({"logit_scale": INF}, ValueError, "logit_scale: expected a finite value, got inf"),
        ({"teacher_logit_scale": "1"}, TypeError, "teacher_logit_scale: expected a number, got "),
        ({"temperature": 0}, ValueError, "temperature: expected a value > 0, got 0"),
        ({"kind": "jds"}, ValueError, "kind: expected one of kl, reverse_kl, jsd, got 'jds'"),
        ({"kind": 1}, TypeError, "kind: expected one of kl, reverse_kl, jsd, got 1"),
        ({"beta": 1.5}, ValueError, r"beta: expected a value in \[0, 1\], got 1.5"),
        ({"beta": -0.1}, ValueError, "beta: expected a value >= 0, got -0.1"),
    ],
)  # fmt: skip
def test_arguments_are_checked(change, error, message):
    given = heads(3, 8, 5, 20, torch.float32)
    with pytest.raises(error, match=f"^{message}"):
        linear_divergence(**{**given, **change})


@pytest.mark.parametrize("kind", KIND)
def test_autocast(kind):
    """A float32 student and a teacher of any type run in that of autocast; gradients in theirs.

    A float32 head is cast tile by tile: the same bits as of its copy, its gradient not rounded.
    """
    given, upstream = heads(6, 16, 8, V, torch.float32), torch.randn(6)
    half = {name: x.bfloat16() for name, x in given.items()}
    mixed = {**given, **{name: x for name, x in half.items() if name.startswith("teacher")}}
    third = {**mixed, "teacher_weight": given["teacher_weight"]}
    wanted = gradients(linear_divergence, half, upstream, **KIND[kind])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = [
            gradients(linear_divergence, x, upstream, **KIND[kind]) for x in (given, mixed, third)
        ]
        with pytest.raises(TypeError, match="weight: expected torch.float64 as hidden, got .*32"):
            linear_divergence(**{**given, "hidden": given["hidden"].double()})
        with pytest.raises(TypeError, match="weight: expected floating-point numbers, got .*int8"):
            linear_divergence(**{**given, "weight": given["weight"].to(torch.int8)})
    for got in results:
        for name, x in got.items():
            assert x.dtype == torch.float32
            assert torch.equal(x.to(wanted[name].dtype), wanted[name])


def test_double_backward_raises():
    given = heads(3, 8, 5, 50, torch.float32)
    given["hidden"].requires_grad_()
    values = linear_divergence(**given)
    (gradient,) = torch.autograd.grad(values.square().sum(), given["hidden"], create_graph=True)
    with pytest.raises(RuntimeError, match="divergence: expected a first-order gradient"):
        gradient.sum().backward()


def problem(given, kind, beta=0.5, mask=None):
    """The arguments of the operators."""
    return PairProblem(
        *(given["hidden"], given["weight"], given.get("bias"), given["teacher_hidden"]),
        *(given["teacher_weight"], given.get("teacher_bias"), mask, 0.0, 1.0, 0.0, 1.0),
        *(KINDS[kind], beta),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind):
    given = heads(3, 8, 5, V, torch.float32)
    leaves = {name: given[name].clone().requires_grad_() for name in ("hidden", "weight", "bias")}
    mask = torch.tensor([True, False, True])
    arguments = problem({**given, **leaves}, kind, mask=mask)
    torch.library.opcheck(OPS.linear_divergence.default, tuple(arguments))
    arguments = problem(given, kind, mask=mask)
    _, stats = OPS.linear_divergence(*arguments)
    torch.library.opcheck(
        OPS.linear_divergence_backward.default,
        (torch.randn(3), stats, *arguments),
        {"wanted": [True, True, True]},
    )


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_float32_heads_over_half_states(dtype):
    """As of states that were float32: the bits, and gradients in the dtypes of the inputs."""
    given, upstream = heads(9, 16, 6, V, torch.float32), torch.randn(9)
    half = {n: x.to(dtype) if n.endswith("hidden") else x for n, x in given.items()}
    results = []
    for inputs in (half, {n: x.float() for n, x in half.items()}):
        leaves = [inputs[n].detach().requires_grad_() for n in ("hidden", "weight", "bias")]
        inputs = {**inputs, **dict(zip(("hidden", "weight", "bias"), leaves, strict=True))}
        values = linear_divergence(**inputs)
        results.append((values.detach(), *torch.autograd.grad(values, leaves, upstream)))
    assert [x.dtype for x in results[0]] == [torch.float32, dtype, torch.float32, torch.float32]
    for ours, wide in zip(*results, strict=True):
        assert torch.equal(ours, wide.to(ours.dtype))
    with pytest.raises(TypeError, match="teacher_weight: expected torch.float32 as hidden"):
        linear_divergence(**{**half, "teacher_weight": half["teacher_weight"].to(dtype)})


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_without_graph_breaks(kind):
    given = heads(6, 16, 8, V, torch.float32)
    mask = torch.tensor([True, True, False, True, True, True])
    leaves = [given.pop(name).requires_grad_() for name in ("hidden", "weight", "bias")]

    def loss(h, w, b):
        values = linear_divergence(h * 2, w, bias=b, mask=mask, kind=kind, softcap=9.0, **given)
        return values.square().mean()

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got, wanted = (torch.autograd.grad(f(*leaves), leaves) for f in (compiled, loss))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("wants", "products"), [((True, True), 6.0), ((True, False), 5.0), ((False, True), 5.0)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_the_plan_is_carried_out(kind, wants, products):
    """Products are counted; a teacher of half the width counts half."""
    n, h = 8, 64
    for teacher_h, less in ((h, 0.0), (h // 2, 1.0)):
        given = heads(n, h, teacher_h, V, torch.float32, bias=False)
        arguments = problem(given, kind)
        leaves = [
            given[x].clone().requires_grad_(w)
            for x, w in zip(("hidden", "weight"), wants, strict=True)
        ]
        plan = plan_of(*leaves, given["teacher_hidden"], kind=kind)
        assert plan.products == products - less
        with FlopCounterMode(display=False) as flops:  # it does not look into operators
            _, stats = divergence_driver.forward(CpuPair, arguments)
            divergence_driver.backward(CpuPair, arguments, torch.ones(n), stats, [*wants, False])
        assert flops.get_total_flops() == pytest.approx(plan.products * 2 * n * h * V)
    with torch.no_grad():
        assert plan_of(*leaves, given["teacher_hidden"], kind=kind).products == 1.5


@pytest.mark.parametrize("kind", KINDS)
def test_peaks_of_the_plan(kind):
    """Two tiles, or both logits of the rows that fit 128 MiB; the sums of dhidden, two tiles."""
    n, h, v = 1024, 576, 49_152
    hidden = torch.zeros(n, h, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.zeros(v, h, dtype=torch.bfloat16, device="meta", requires_grad=True)
    tiles = 2 * n * 2048 * 2
    forward = 2 * (n // 2) * v * 2 if kind == "jsd" else tiles
    assert plan_of(hidden, weight, hidden, kind=kind).peak_bytes == max(forward, n * h * 4 + tiles)
    assert forward <= 1 << 27


@pytest.mark.parametrize(
    ("n", "v", "rows"),
    [(0, 100, 0), (10, 100, 10), (682, 49_152, 682), (683, 49_152, 342), (1024, 49_152, 512),
     (4096, 49_152, 586), (1000, 1 << 22, 63), (64, 1 << 22, 64)],
)  # fmt: skip
def test_rows_of_a_mixture(n, v, rows):
    """As many as fit, in blocks of equal size; no block is left with a few rows."""
    assert CpuPair.mixture_rows(n, v, 2) == rows
    assert CpuPair.scratch_bytes(n, v, 2, JSD)[0] == 2 * rows * v * 2
