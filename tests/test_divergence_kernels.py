"""Two heads for CUDA under Triton's interpreter, against the CPU and float64: values, gradients.

The driver and the kernels are those of a GPU; only cuBLAS's products, float32 of half precision,
are replaced, and the interpreter's conversion to half precision, which cuts off, by torch's.
"""

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from fastadapt import reference
from fastadapt._C import JSD, KL, REVERSE_KL
from fastadapt._ops.linear.cuda import backward_tile
from fastadapt._ops.linear.divergence_driver import backward, forward
from fastadapt._ops.linear.pairs import PairProblem
from fastadapt._ops.linear.pairs_cpu import CpuPair
from fastadapt._ops.linear.pairs_cuda import CudaPair, CudaSide

pytest.importorskip("triton", reason="triton is not installed: it has wheels for Linux")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("a GPU is there: the tests marked gpu run these kernels", allow_module_level=True)

from fastadapt._ops.triton.divergence import launch  # noqa: E402
from fastadapt._ops.triton.linear import launch as launch_linear  # noqa: E402  (the interpreter is chosen before)

# of rows that hold NaN or infinities, where the interpreter is NumPy
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
INF, NAN = float("inf"), float("nan")
N, V, TILE, ROWS = 7, 150, 64, 4  # of rows and of tiles a part is left
KIND = {"kl": (KL, 0.5), "reverse_kl": (REVERSE_KL, 0.5), "jsd": (JSD, 0.5), "skewed": (JSD, 0.9)}
SHAPES = {  # softcap, scale, the teacher's
    "plain": (0.0, 1.0, 0.0, 1.0),
    "capped": (5.0, 1.5, 0.0, 0.8),
    "both_capped": (3.0, 0.7, 2.0, -1.5),
}


class InterpretedSide(CudaSide):
    """Small sizes, products without cuBLAS."""

    tile, rows = TILE, ROWS
    gradient_width = TILE

    def backward_tile(self) -> int:
        """As asked."""
        return self.gradient_width

    def product(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        """Float32 of half precision."""
        out.copy_(a.to(out.dtype) @ b.to(out.dtype))

    def add_product(self, sums: Tensor, a: Tensor, b: Tensor) -> None:
        """The same."""
        sums += a.to(sums.dtype) @ b.to(sums.dtype)


class NarrowSide(InterpretedSide):
    """Tiles of the backward that are parts of those of the forward."""

    gradient_width = TILE // 4


class Interpreted(CudaPair):
    """Two of those."""

    side, tile = InterpretedSide, TILE


class Narrow(CudaPair):
    """Two of those."""

    side, tile = NarrowSide, TILE


@pytest.fixture(autouse=True)
def _rounded_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the launches write in half precision is float32 first, and then rounded."""
    gradient_tile, mix = launch.gradient_tile, launch_linear.mix

    def rounded_gradient_tile(pair: Any, stats: Tensor, gains: Tensor, out: Tensor) -> None:
        wide = torch.empty(out.shape, dtype=torch.promote_types(out.dtype, torch.float32))
        gradient_tile(pair, stats, gains, wide)
        out.copy_(wide)

    def rounded_mix(sums: Tensor, out: Tensor, **given: Any) -> None:
        wide = out.to(sums.dtype)
        mix(sums, wide, **given)
        out.copy_(wide)

    monkeypatch.setattr(launch, "gradient_tile", rounded_gradient_tile)
    monkeypatch.setattr(launch_linear, "mix", rounded_mix)


def problem(
    n: int, h: int, v: int, dtype: torch.dtype, kind: str = "kl", shape: str = "plain"
) -> PairProblem:
    """Divergences of a nat or so, some rows not counted; the teacher is narrower."""
    given = torch.randn(n, h), torch.randn(v, h) * 2 / h**0.5, torch.randn(v)
    narrow = h // 2
    teacher = torch.randn(n, narrow), torch.randn(v, narrow) * 2 / narrow**0.5, torch.randn(v)
    mask = torch.arange(n) % 7 != 2
    tensors = (x.to(dtype) for x in (*given, *teacher))
    return PairProblem(*tensors, mask, *SHAPES[shape], *KIND[kind])


def results(work: type, given: PairProblem, upstream: Tensor) -> dict[str, Tensor]:
    """Divergences, statistics and gradients."""
    values, stats = forward(work, given)
    wanted = [True, True, given.bias is not None]
    gradients = backward(work, given, upstream.to(values.dtype), stats, wanted)
    names = ("dhidden", "dweight", "dbias", "dlow", "dlow_weight")[: 3 if given.low is None else 5]
    return {"divergence": values, "stats": stats, **dict(zip(names, gradients, strict=False))}


def truth(given: PairProblem, upstream: Tensor) -> dict[str, Tensor]:
    """In float64; adapters are further columns of states and weights."""
    leaves = [x.double().requires_grad_() for x in (*given[:3], *(given.low or ()))]
    teacher = [x.double() for x in given[3:6]]
    hidden, weight, bias, *low = leaves
    if low:
        hidden, weight = torch.cat([hidden, low[0]], 1), torch.cat([weight, low[1]], 1)
    if given.teacher_low_states is not None:
        for i, x in enumerate(given[-2:]):
            teacher[i] = torch.cat([teacher[i], x.double()], 1)
    names = {KL: "kl", REVERSE_KL: "reverse_kl", JSD: "jsd"}
    values = reference.linear_divergence(
        hidden, weight, *teacher[:2], bias=bias, teacher_bias=teacher[2],
        softcap=given.softcap or None, logit_scale=given.logit_scale,
        teacher_softcap=given.teacher_softcap or None,
        teacher_logit_scale=given.teacher_logit_scale,
        kind=names[given.kind], beta=given.beta, mask=given.mask,
    )  # fmt: skip
    gradients = torch.autograd.grad(values, leaves, upstream.double())
    names = ("divergence", "dhidden", "dweight", "dbias", "dlow", "dlow_weight")
    return dict(zip(names, (values.detach(), *gradients), strict=False))


def with_adapters(given: PairProblem, dtype: torch.dtype, of: str = "both") -> PairProblem:
    """The same with adapters of the student's head, the teacher's or both."""
    n, v, r = len(given.hidden), len(given.weight), 3
    of_student, of_teacher = (
        {f"{who}low_states": torch.randn(n, r).to(dtype), f"{who}low_weight": weight.to(dtype)}
        for who, weight in (("", torch.randn(v, r)), ("teacher_", torch.randn(v, r)))
    )
    added = {} if of == "teacher" else of_student
    return given._replace(**added, **({} if of == "student" else of_teacher))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KIND)
def test_float_heads_equal_the_cpu_and_the_truth(kind, shape, monkeypatch):
    """Within float32 rounding, of the sums and of products in another order; float64 in its own."""
    monkeypatch.setattr(launch, "GRADIENT_BLOCK", 32)  # two of them in a tile
    for work in (Interpreted, Narrow) if shape == "capped" else (Interpreted,):
        for dtype, rtol in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
            given, upstream = problem(N, 12, V, dtype, kind, shape), torch.randn(N)
            ours, cpu = (results(w, given, upstream) for w in (work, CpuPair))
            exact = truth(given, upstream)
            assert ours.keys() == cpu.keys()
            for name, x in ours.items():
                assert x.dtype == cpu[name].dtype
                torch.testing.assert_close(x, cpu[name], rtol=rtol, atol=rtol / 3, msg=name)
                if name in exact:
                    wanted = exact[name].to(x.dtype)
                    torch.testing.assert_close(x, wanted, rtol=rtol, atol=rtol / 3, msg=name)


@pytest.mark.parametrize("of", ("student", "teacher", "both"))
@pytest.mark.parametrize("kind", KIND)
def test_adapters_equal_the_cpu_and_the_truth(kind, of):
    """Of the student, the teacher, or both."""
    for dtype, rtol in ((torch.float32, 2e-5), (torch.float64, 1e-11)):
        given, upstream = problem(N, 12, V, dtype, kind, "capped"), torch.randn(N)
        given = with_adapters(given, dtype, of)
        ours, cpu = (results(w, given, upstream) for w in (Narrow, CpuPair))
        exact = truth(given, upstream)
        assert ("dlow" in ours) == (of != "teacher")
        for name, x in ours.items():
            torch.testing.assert_close(x, cpu[name], rtol=rtol, atol=rtol / 2, msg=name)
            if name in exact:
                wanted = exact[name].to(x.dtype)
                torch.testing.assert_close(x, wanted, rtol=rtol, atol=rtol / 2, msg=name)


@pytest.mark.parametrize("lora_dtype", (torch.float32, torch.bfloat16), ids=str)
def test_adapters_of_half_heads(lora_dtype):
    """No logit is rounded: divergences have float32's error, no gradient more than the CPU's."""
    for kind in KIND:
        given, upstream = problem(N, 32, V, torch.bfloat16, kind), torch.randn(N)
        given = with_adapters(given, lora_dtype)
        ours, cpu = (results(w, given, upstream) for w in (Interpreted, CpuPair))
        exact = truth(given, upstream)
        torch.testing.assert_close(
            ours["divergence"].double(), exact["divergence"], rtol=1e-5, atol=2e-6
        )
        for name in ours.keys() & exact.keys() - {"divergence"}:
            error, allowed = ((x[name].double() - exact[name]).norm() for x in (ours, cpu))
            assert error <= 1.3 * allowed, name


@pytest.mark.parametrize("kind", KIND)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_half_types_are_rounded_once(kind, dtype):
    """No logit is: divergences have float32's error alone, gradients that of their own rounding."""
    given, upstream = problem(N, 32, V, dtype, kind, "capped"), torch.randn(N)
    ours, exact = results(Interpreted, given, upstream), truth(given, upstream)
    torch.testing.assert_close(
        ours["divergence"].double(), exact["divergence"], rtol=1e-5, atol=2e-6
    )
    for name in ("dhidden", "dweight", "dbias"):
        assert ours[name].dtype == dtype
        error = (ours[name].double() - exact[name]).norm() / exact[name].norm()
        assert error <= torch.finfo(dtype).eps, name  # of a tile's gradient, and of the sum


@pytest.mark.parametrize("kind", KIND)
def test_float32_heads_are_cast_by_tiles(kind):
    """The same bits as of their copies; the student's gradient is not rounded."""
    given, upstream = problem(N, 32, V, torch.float32, kind), torch.randn(N)
    half = PairProblem(*(x.bfloat16() for x in given[:6]), *given[6:])
    wanted = results(Narrow, half, upstream)
    masters = half._replace(weight=given.weight, teacher_weight=given.teacher_weight)
    ours = results(Narrow, masters, upstream)
    assert ours["dweight"].dtype == torch.float32
    for name, x in ours.items():
        assert torch.equal(x.to(wanted[name].dtype), wanted[name]), name


@pytest.mark.parametrize("kind", KIND)
def test_a_row_depends_on_no_other(kind):
    """To the last bit: alone, among others, in another block of rows, and again."""
    given = problem(11, 16, V, torch.float32, kind)
    # multiples of a power of two: products have the same bits in whatever order they add
    tensors = [torch.randint(-8, 9, x.shape) / 8 for x in given[:6]]
    given = PairProblem(*tensors, None, *given[7:])
    values, stats = forward(Interpreted, given)
    for rows in ([5], [0, 5, 10, 6, 2], list(range(10, 3, -1)), list(range(11))):
        part = given._replace(hidden=given.hidden[rows], teacher_hidden=given.teacher_hidden[rows])
        some, of_some = forward(Interpreted, part)
        assert torch.equal(some, values[rows])
        assert torch.equal(of_some, stats[rows])


@pytest.mark.parametrize("kind", KIND)
def test_equal_distributions_have_no_divergence(kind):
    """The same bits give exactly 0, and no gradient."""
    given = problem(N, 12, V, torch.float32, kind)
    given = given._replace(
        teacher_hidden=given.hidden, teacher_weight=given.weight, teacher_bias=given.bias
    )
    out = results(Interpreted, given, torch.ones(N))
    for name in ("divergence", "dhidden", "dweight", "dbias"):
        assert (out[name] == 0).all(), name


@pytest.mark.parametrize("kind", KIND)
def test_edges(kind):
    """Biases that forbid ids and whole tiles, of one head or both; NaN in its own row; one id."""
    for forbidden in (slice(0, 2 * TILE), slice(3, 4), slice(TILE, V)):
        given = problem(9, 8, V, torch.float32, kind)
        given.bias[forbidden] = given.teacher_bias[forbidden] = -INF
        hidden = given.hidden.clone()
        hidden[1, 0] = NAN
        given = given._replace(hidden=hidden)
        ours, cpu = (results(w, given, torch.ones(9)) for w in (Interpreted, CpuPair))
        ok = [0, 2, 3, 4, 5, 6, 7, 8]
        for name in ("divergence", "dhidden"):
            torch.testing.assert_close(ours[name][ok], cpu[name][ok], rtol=1e-5, atol=2e-6)
        assert ours["divergence"].isnan().tolist() == [i == 1 for i in range(9)]
        for who, infinite in (("bias", KL), ("teacher_bias", REVERSE_KL)):
            given = problem(9, 8, V, torch.float32, kind)
            getattr(given, who)[forbidden] = -INF
            values, _ = forward(Interpreted, given)
            expected, _ = forward(CpuPair, given)
            assert (values[given.mask] == INF).all() == (given.kind == infinite)
            torch.testing.assert_close(values, expected, rtol=1e-5, atol=2e-6)
    given = problem(3, 8, 1, torch.float32, kind)
    assert not any(x.any() for name, x in results(Interpreted, given, torch.ones(3)).items()
                   if name != "stats")  # fmt: skip


def test_no_rows_and_none_that_count():
    for kind in KIND:
        for n in (0, 3):
            given = problem(n, 8, V, torch.bfloat16, kind)
            given = given._replace(mask=torch.zeros(n, dtype=torch.bool))
            out = results(Interpreted, given, torch.randn(n))
            assert all((x == 0).all() for x in out.values())
            assert out["dhidden"].shape == (n, 8)


def test_bytes_on_cuda():
    """Two blocks of products of 8192 ids; in the backward the gradient of a tile, too."""
    for kind in (KL, JSD):
        forward_bytes, backward_bytes = CudaPair.scratch_bytes(4096, 128_256, 2, kind)
        assert forward_bytes == 2 * 1024 * 8192 * 4
        assert backward_bytes == forward_bytes + 4096 * backward_tile(4096, 2) * 2
