"""Compiles what draws on a GPU need before the first of them."""

import os
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch

from fastadapt._ops.checks import FLOATS, instance, integer
from fastadapt._ops.common import current

MAX_VOCABULARY = 1 << 22  # csrc/kernels.h


class WarmUp(NamedTuple):
    """The result of `warm_up`.

    Examples:
        >>> WarmUp(kernels=12, seconds=31.5).kernels
        12

    Attributes:
        kernels: number of compiled kernels that are ready, at least 12 for each dtype.
        seconds: that it took.
    """

    kernels: int
    seconds: float


def warm_up(
    device: torch.device | str,
    vocabulary: int,
    dtypes: Sequence[torch.dtype],
    *,
    top_logprobs: int = 0,
) -> WarmUp:
    """Compiles every kernel that `sample` can launch on a GPU for one vocabulary.

    Without it the first call with an adaptor of a new kind compiles for tens of seconds. What is
    compiled depends on the vocabulary and on the dtype of the logits, not on the number of rows, on
    the values of knobs or on which outputs are asked for: afterwards no call with contiguous rows
    and this many `top_logprobs` compiles, if its filters and their order are of transformers or
    vLLM: others have kernels of their own, as do `filter_logits`, `score` and `adapted_log_odds`.

    Triton compiles as for a launch, in a thread for each core of this process (it releases the
    interpreter's lock meanwhile), and keeps the result on disk: another process that finds it there
    is ready within seconds. Nothing runs on the GPU. Triton 3.4 compiles one kernel after another.

    Examples:
        >>> warm_up("cuda", 128_256, [torch.bfloat16])  # doctest: +SKIP
        WarmUp(kernels=12, seconds=31.5)
        >>> warm_up("cpu", 128_256, [torch.bfloat16])
        Traceback (most recent call last):
        ValueError: device: expected a CUDA device, got cpu

    Args:
        device (torch.device | str): a CUDA device.
        vocabulary (int): V, the length of a row, 1 to 4,194,304.
        dtypes (Sequence[torch.dtype]): of the logits: float32, bfloat16 or float16, at least one.
        top_logprobs (int): that `sample` will be asked for, 0 to 1024 and at most V: kernels of
            their own for each power of two up to which the number is rounded.

    Returns:
        WarmUp: how many kernels are ready, and how long it took.

    Raises:
        TypeError: an argument of another type, or another dtype.
        ValueError: a device that is none of CUDA's, no dtype, a number out of range.
    """
    instance("device", device, torch.device | str, "a torch.device or its name")
    where = torch.device(device)
    if where.type != "cuda":
        raise ValueError(f"device: expected a CUDA device, got {where}")
    v = integer("vocabulary", vocabulary, 1, MAX_VOCABULARY)
    top = integer("top_logprobs", top_logprobs, 0, min(1024, v))
    _check_dtypes(dtypes)
    from fastadapt._ops.triton import launch

    began = time.perf_counter()
    with current(where):
        kernels = launch.compile_draws(where, v, dtypes, top, _cores())
    return WarmUp(kernels, time.perf_counter() - began)


def _check_dtypes(dtypes: object) -> None:
    """Raises unless these are dtypes of logits."""
    if isinstance(dtypes, str) or not isinstance(dtypes, Sequence):
        raise TypeError(f"dtypes: expected a sequence of dtypes, got {type(dtypes).__name__}")
    if not dtypes:
        raise ValueError("dtypes: expected at least one, got none")
    for dtype in dtypes:
        if dtype not in FLOATS:
            raise TypeError(f"dtypes: expected float32, bfloat16 or float16, got {dtype}")


def _cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
