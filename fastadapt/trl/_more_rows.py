"""Log-odds with more of the same rows: smoothed labels, and divergences from another model.

Within the forward, where the head is whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastadapt.losses.divergence import linear_divergence
from fastadapt.training.head import HeadError
from fastadapt.trl._log_probs import Beside, Head, Outputs, Scorer, score


class Known(NamedTuple):
    """The rows that a forward has scored and the head it has done that with, all constants."""

    hidden: Tensor  # (N, H)
    head: Head


class LogOddsAnd(Scorer):
    """Replaces trl's function by one that returns log-odds and makes more of the same rows.

    Within `reading` alone.

    Args:
        smooths: make the log-sum-exp, and give it and the mean logit gradients.
        keeps: keep the rows and the head.

    Attributes:
        made: "logsumexp" and "divergences", (N,), that were asked for.
        known: what was kept.
    """

    def __init__(self, *, smooths: bool = False, keeps: bool = False) -> None:
        self._smooths, self._keeps, self._reads = smooths, keeps, False
        self._teacher: Known | None = None
        self._beside: Beside | None = None
        self.made: dict[str, Tensor] = {}
        self.known: Known | None = None

    @contextlib.contextmanager
    def reading(self, teacher: Known | None = None, beside: Beside | None = None) -> Iterator[None]:
        """Has the call of the block make what is asked for; afterwards nothing of it is held.

        Args:
            teacher: what another model has kept of the same rows; KL(teacher || model) is made.
            beside: scores more of the rows too.
        """
        self._reads, self._teacher, self._beside = True, teacher, beside
        try:
            yield
        finally:
            self._reads, self._teacher, self._beside = False, None, None
            self.made, self.known = {}, None

    @property
    def smooths(self) -> bool:
        """Whether log-sum-exp and mean logit of the next rows have gradients."""
        return self._smooths and self._reads

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def apply(self, *arguments: Any) -> Outputs:
        """Returns log-odds (N,), and the other outputs of trl's function."""
        return score(*[*arguments, None, self._beside, self if self._reads else None])

    def see(self, hidden: Tensor, head: Head, logsumexp: Tensor | None) -> None:
        """Makes of scored rows what is asked for."""
        if logsumexp is not None:
            if head.softcap is not None:
                raise HeadError(
                    f"model: expected logits without a cap for the mean of smoothed labels, got "
                    f"one of {head.softcap}"
                )
            self.made["logsumexp"] = logsumexp
        if self._keeps:
            bias = None if head.bias is None else head.bias.detach()
            lora = head.lora and (head.lora[0].detach(), head.lora[1].detach(), head.lora[2])
            constant = head._replace(weight=head.weight.detach(), bias=bias, lora=lora)
            self.known = Known(hidden.detach(), constant)
        if self._teacher is not None:
            other, theirs = self._teacher
            self.made["divergences"] = linear_divergence(
                hidden,
                head.weight,
                other,
                theirs.weight,
                bias=head.bias,
                teacher_bias=theirs.bias,
                softcap=head.softcap,
                logit_scale=head.scale,
                teacher_softcap=theirs.softcap,
                teacher_logit_scale=theirs.scale,
                lora=head.lora,
                teacher_lora=theirs.lora,
            )
