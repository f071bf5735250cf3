"""The others on a GPU: losses from hidden states (N, H), a head (V, H) and labels (N,).

A peer makes log-probabilities of labels, as in `loss_peers`, and where it has a cross entropy of
its own that too. One that this machine lacks is not replaced: making it raises `MissingPeer`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from loss_peers import Logps, liger, plain, trl
from missing import MissingPeer

CrossEntropy = Callable[[Tensor, Tensor, Tensor], Tensor]


class Peer(NamedTuple):
    """How its log-probabilities and its mean cross entropy are made; None: from those."""

    logps: Callable[[], Logps]
    cross_entropy: Callable[[], CrossEntropy] | None = None


def cce() -> Logps:
    """Apple's cut-cross-entropy, one value a token.

    Raises:
        MissingPeer: it is not installed.
    """
    function = _cce()
    return lambda hidden, weight, labels: -function(hidden, weight, labels, reduction="none")


def cce_mean() -> CrossEntropy:
    """The same with its own mean.

    Raises:
        MissingPeer: it is not installed.
    """
    return _cce()


def _cce() -> Any:
    """Its function."""
    try:
        from cut_cross_entropy import linear_cross_entropy
    except ImportError as error:
        raise MissingPeer(f"cut-cross-entropy: {error}") from error
    return linear_cross_entropy


def liger_mean() -> CrossEntropy:
    """Liger's fused linear cross entropy.

    Raises:
        MissingPeer: liger-kernel is not installed, or has no such function.
    """
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import (
            LigerFusedLinearCrossEntropyFunction as Function,
        )
    except ImportError as error:
        raise MissingPeer(f"liger-kernel with its cross entropy: {error}") from error
    return lambda hidden, weight, labels: Function.apply(hidden, weight, labels)[0]


GPU_LOSS_PEERS = {
    "plain": Peer(plain),
    "trl": Peer(trl),
    "liger": Peer(liger, liger_mean),
    "cce": Peer(cce, cce_mean),
}
