"""The adaptor of a batch of SGLang's requests, made anew only when the batch changes."""

from typing import Any

import torch
from torch import Tensor

from fastadapt.adaptor import Adaptor


class Knobs:
    """Makes adaptors of SGLang's `SamplingBatchInfo`, and keeps the last one.

    A batch keeps its tensors from step to step, and gets others when requests come or go.
    """

    def __init__(self) -> None:
        """Begins without a batch."""
        self._made_of: tuple[Any, ...] = ()
        self._adaptor = Adaptor()

    def of(self, info: Any) -> Adaptor:
        """Returns the adaptor of a batch; values on a GPU are not read.

        Args:
            info: SGLang's `SamplingBatchInfo`.
        """
        made_of = _given(info)
        same = len(made_of) == len(self._made_of) and all(
            a is b for a, b in zip(made_of, self._made_of, strict=True)
        )
        if not same:
            self._adaptor, self._made_of = _adaptor_of(*made_of), made_of
        return self._adaptor

    def select(self, info: Any, indices: Tensor) -> Adaptor:
        """Returns the adaptor of some rows of a batch.

        Args:
            info: SGLang's `SamplingBatchInfo`.
            indices (Tensor): (M,), int64; which rows.
        """
        chosen: list[Any] = [x[indices] if isinstance(x, Tensor) else x for x in _given(info)]
        return _adaptor_of(*chosen)


def _given(info: Any) -> tuple[Any, ...]:
    """Returns what the adaptor depends on: tensors where some request may have that filter."""
    return (
        info.temperatures,
        info.top_ks,
        info.need_top_k_sampling,
        info.is_any_greedy,
        info.top_ps if info.need_top_p_sampling else 1.0,
        info.min_ps if info.need_min_p_sampling else 0.0,
    )


def _adaptor_of(
    temperatures: Tensor, top_ks: Tensor, cut: bool, greedy: bool, top_p: Any, min_p: Any
) -> Adaptor:
    """Returns the adaptor; a request with top-k 1 is greedy to SGLang, whatever its temperature."""
    temperature = temperatures.view(-1)
    if greedy:
        temperature = torch.where(top_ks <= 1, 0.0, temperature)
    return Adaptor(temperature=temperature, top_k=top_ks if cut else 0, top_p=top_p, min_p=min_p)
