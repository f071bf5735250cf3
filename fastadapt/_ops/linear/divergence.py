"""The operator under `linear_divergence`: its schema, fakes, autograd, autocast, and its plan."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastadapt._C import JSD, KL, REVERSE_KL
from fastadapt._ops.common import (
    WAITS,
    Implementations,
    device_of,
    no_double_backward,
    register_autocast,
    register_everywhere,
)
from fastadapt._ops.linear.divergence_driver import backward, empty_outputs, forward
from fastadapt._ops.linear.gradients import Quintuple, empty_gradients, empty_low_gradients
from fastadapt._ops.linear.pairs import PairProblem, PairWork
from fastadapt._ops.linear.pairs_cpu import CpuPair
from fastadapt._ops.linear.pairs_cuda import CudaPair, DoubleCudaPair
from fastadapt._ops.linear.plans import cast_bytes, dtype_of, low_bytes

CASTS = PairProblem._fields[:6]  # to the type of autocast
MASTERS = ("weight", "teacher_weight")  # float32 heads are cast tile by tile
KINDS = {"kl": KL, "reverse_kl": REVERSE_KL, "jsd": JSD}

_PLACES = tuple(
    map(PairProblem._fields.index, ("hidden", "weight", "bias", "low_states", "low_weight"))
)  # with gradients
_OF_TEACHER = [i for i, name in enumerate(PairProblem._fields) if name.startswith("teacher")]

_library = torch.library.Library("fastadapt", "FRAGMENT")
_PROBLEM = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor teacher_hidden, Tensor teacher_weight,"
    " Tensor? teacher_bias, Tensor? mask, float softcap, float logit_scale, float teacher_softcap,"
    " float teacher_logit_scale, int kind, float beta, Tensor? low_states=None,"
    " Tensor? low_weight=None, Tensor? teacher_low_states=None, Tensor? teacher_low_weight=None"
)  # the fields of a PairProblem
_library.define(f"linear_divergence({_PROBLEM}) -> (Tensor, Tensor)", tags=WAITS)
_library.define(
    f"linear_divergence_backward(Tensor ddivergence, Tensor stats, {_PROBLEM}, *, bool[] wanted)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=WAITS,
)


def work_of(hidden: Tensor) -> type[PairWork]:
    """The row work of a device."""
    if not hidden.is_cuda:
        return CpuPair
    return DoubleCudaPair if hidden.dtype == torch.float64 else CudaPair


def _forward(*inputs: Any) -> tuple[Tensor, Tensor]:
    """Divergences and statistics."""
    problem = PairProblem(*inputs)
    with device_of(problem.hidden):
        return forward(work_of(problem.hidden), problem)


def _backward(ddivergence: Tensor, stats: Tensor, *inputs: Any, wanted: list[bool]) -> Quintuple:
    """The student's gradients that are wanted, and those of its adapter."""
    problem = PairProblem(*inputs)
    with device_of(problem.hidden):
        return backward(work_of(problem.hidden), problem, ddivergence, stats, wanted)


def _empty_outputs(*inputs: Any) -> tuple[Tensor, Tensor]:
    """What the forward returns."""
    return empty_outputs(PairProblem(*inputs))


def _empty_gradients(
    ddivergence: Tensor, stats: Tensor, *inputs: Any, wanted: list[bool]
) -> Quintuple:
    """What the backward returns."""
    problem = PairProblem(*inputs)
    of_head = empty_gradients(problem.hidden, problem.weight, problem.bias, wanted)
    return *of_head, *empty_low_gradients(problem.low, problem.hidden)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keeps the inputs and a few numbers a row; no logits."""
    stats = output[1]
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)
    problem = PairProblem(*inputs)
    ctx.save_for_backward(stats, *problem[:7], *problem[13:])
    ctx.numbers = problem[7:13]


def _gradient(ctx: Any, ddivergence: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    """Gradients of the student's tensors, each only when wanted."""
    gradients: list[Tensor | None] = [None] * len(PairProblem._fields)
    asked = {i for i, needs in enumerate(ctx.needs_input_grad) if needs}
    if asked.intersection(_OF_TEACHER):
        raise RuntimeError("linear_divergence: a teacher has no gradient")
    if ddivergence is not None:
        stats, *tensors = ctx.saved_tensors
        made = torch.ops.fastadapt.linear_divergence_backward(
            *(ddivergence, stats, *tensors[:7], *ctx.numbers, *tensors[7:]),
            wanted=[place in asked for place in _PLACES[:3]],
        )
        for place, gradient in zip(_PLACES, made, strict=True):
            gradients[place] = gradient if place in asked else None
    return tuple(gradients)


def _register() -> None:
    """Implementations, fakes, autograd and autocast; `work_of` tells devices apart."""
    implementations: Implementations = {
        "linear_divergence": (_forward, _empty_outputs),
        "linear_divergence_backward": (_backward, _empty_gradients),
    }
    register_everywhere(_library, implementations)
    torch.library.register_autograd(
        "fastadapt::linear_divergence", _gradient, setup_context=_save, lib=_library
    )
    torch.library.register_autograd(
        "fastadapt::linear_divergence_backward", no_double_backward("divergence"), lib=_library
    )
    register_autocast(_library, "linear_divergence", PairProblem, CASTS, MASTERS)


_register()
linear_divergence = torch.ops.fastadapt.linear_divergence


class DivergencePlan(NamedTuple):
    """What `linear_divergence` will do.

    Attributes:
        products: of N * H * V, forward and backward together, those with the teacher's states in
            the same unit; fewer where rows do not count.
        peak_bytes: the most that is held over inputs and returned gradients, with every row counted
            and but for what is a few numbers a row.
    """

    products: float
    peak_bytes: int


def plan_of(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    bias: Tensor | None = None,
    *,
    teacher_weight: Tensor | None = None,
    kind: str = "kl",
    lora: tuple[Tensor, Tensor, float] | None = None,
    teacher_lora: tuple[Tensor, Tensor, float] | None = None,
) -> DivergencePlan:
    """Returns what `linear_divergence` will do with these arguments, where gradients are wanted.

    Examples:
        >>> from fastadapt.losses.divergence import plan_of
        >>> hidden, weight = torch.zeros(1024, 576, requires_grad=True), torch.zeros(49_152, 576)
        >>> plan_of(hidden, weight, torch.zeros(1024, 576)).products
        5.0

    Args:
        hidden (Tensor): (..., H), as for `linear_divergence`; only shape, dtype, device and
            whether a gradient is wanted matter, of the others too.
        weight (Tensor): (V, H).
        teacher_hidden (Tensor): (..., H of the teacher).
        bias (Tensor | None): (V,).
        teacher_weight (Tensor | None): (V, H of the teacher); None: of the dtype of `weight`.
        kind (str): "kl", "reverse_kl" or "jsd".
        lora (tuple[Tensor, Tensor, float] | None): (A, B, scale), as for `linear_divergence`.
        teacher_lora (tuple[Tensor, Tensor, float] | None): the same.
    """
    hidden, teacher = (x.reshape(-1, x.shape[-1]) for x in (hidden, teacher_hidden))
    (n, h), v = hidden.shape, weight.shape[0]
    if teacher_weight is None:
        teacher_weight = weight.new_empty(()).expand(v, teacher.shape[1])
    work, itemsize = work_of(hidden), dtype_of(hidden, weight).itemsize
    held = cast_bytes(hidden, weight, labels=False)  # throughout
    held += cast_bytes(teacher, teacher_weight, labels=False)
    held += low_bytes(hidden, weight, lora) + low_bytes(teacher, teacher_weight, teacher_lora)
    scratch, gradient = work.scratch_bytes(n, v, itemsize, KINDS[kind])
    r, of_teacher = (given[0].shape[0] if given else 0 for given in (lora, teacher_lora))
    logits = 1 + (teacher.shape[1] + r + of_teacher) / h
    passes = 2 if kind == "jsd" and work.makes_again() else 1
    inputs = hidden, weight, bias, *(lora or ())[:2]
    if not torch.is_grad_enabled() or not any(x is not None and x.requires_grad for x in inputs):
        return DivergencePlan(passes * logits, held + scratch)
    wide = torch.promote_types(weight.dtype, torch.float32).itemsize
    sums = n * h * wide if hidden.requires_grad and itemsize < wide else 0
    wanted = hidden.requires_grad + weight.requires_grad + 2 * r / h
    peak = held + max(scratch, sums + n * r * wide + gradient)
    return DivergencePlan((passes + 1) * logits + wanted, peak)
