"""The others that make log-probabilities of labels from hidden states and a linear head.

Each takes hidden (N, H), weight (V, H) and labels (N,), int64, and returns (N,) log-probabilities,
differentiably. One that this machine lacks is not replaced: making it raises `MissingPeer`. What
`linear_log_odds` returns is the log-odds instead, which has the log-probability in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from missing import MissingPeer, found
from missing import compiled as through_compiler

Logps = Callable[[Tensor, Tensor, Tensor], Tensor]

_TRL_CHUNK = 32_768  # ids; what trl's own training passes


class LossPeer(NamedTuple):
    """How log-probabilities are made, and the mean cross entropy, which None makes from those."""

    logps: Callable[[], Logps]
    cross_entropy: Callable[[], Logps] | None = None


def plain_logps(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Full logits in the dtype of the inputs, float32 log_softmax of them, gather."""
    logits = F.linear(hidden, weight)
    return logits.float().log_softmax(-1).gather(-1, labels[:, None])[:, 0]


def plain_log_odds(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The label's log-odds from full logits in the dtype of the inputs, float32 from there on."""
    logits, own = F.linear(hidden, weight).float(), labels[:, None]
    return logits.gather(-1, own)[:, 0] - logits.scatter(-1, own, -math.inf).logsumexp(-1)


def compiled() -> Logps:
    """`plain_logps` through `torch.compile`; a shape is compiled in its first call."""

    def attempt(call: Logps) -> None:
        small = torch.zeros(2, 3, requires_grad=True), torch.zeros(4, 3, requires_grad=True)
        call(*small, torch.zeros(2, dtype=torch.int64)).sum().backward()

    call: Logps = through_compiler(plain_logps, attempt)
    return call


def torch_own() -> Logps:
    """`torch.nn.functional.linear_cross_entropy`, chunked by its own choice, reduction none."""
    function: Any = getattr(F, "linear_cross_entropy", None)
    if function is None:
        raise MissingPeer(f"torch {torch.__version__} has no linear_cross_entropy")
    chunked: Any = torch.nn.LinearCrossEntropyOptions()  # without options it makes all logits
    return lambda *inputs: -function(*inputs, reduction="none", options=chunked)


def trl() -> Logps:
    """trl's log-probabilities by chunks of the vocabulary, no other output asked for."""
    words = "trl with its chunked log-probabilities"
    function = found("trl.kernels:ChunkedLogProbFunction", words)
    settings = (1.0, _TRL_CHUNK, None, 1.0, ())  # temperature, chunk, no cap, scale, no outputs
    return lambda hidden, weight, labels: function.apply(hidden, weight, None, labels, *settings)[0]


def liger() -> Logps:
    """Liger's selective log-probabilities by chunks of rows and of the vocabulary."""
    words = "liger-kernel with its chunked log-probabilities"
    module = "liger_kernel.chunked_loss.fused_linear_ppo"
    function = found(f"{module}:_ChunkedSelectiveLogProbFunction", words)
    chunk = found(f"{module}:_SELECTIVE_LOGPROB_VOCAB_CHUNK_SIZE", words)
    return lambda hidden, weight, labels: function.apply(hidden, weight, labels, None, 1.0, chunk)


def liger_mean() -> Logps:
    """Liger's fused linear cross entropy."""
    function = found(
        "liger_kernel.ops.fused_linear_cross_entropy:LigerFusedLinearCrossEntropyFunction",
        "liger-kernel with its cross entropy",
    )
    return lambda hidden, weight, labels: function.apply(hidden, weight, labels)[0]


def liger_scaled() -> Logps:
    """Liger's fused scaled cross entropy, one value a token."""
    function = found(
        "liger_kernel.ops.fused_linear_scaled_cross_entropy:"
        "LigerFusedLinearScaledCrossEntropyFunction",
        "liger-kernel with its scaled cross entropy",
    )
    return lambda hidden, weight, labels: -function.apply(hidden, weight, labels)


def quack_mean() -> Logps:
    """QuACK's chunked linear cross entropy, the pipeline of its own choice."""
    function: Logps = found("quack.linear_cross_entropy:chunked_linear_cross_entropy", "quack")
    return function


def quack() -> Logps:
    """QuACK has no value a token."""
    raise MissingPeer("quack: only the mean and the sum of a cross entropy")


def cce_mean() -> Logps:
    """Apple's cut-cross-entropy."""
    function: Logps = found("cut_cross_entropy:linear_cross_entropy", "cut-cross-entropy")
    return function


def cce() -> Logps:
    """Apple's cut-cross-entropy, one value a token."""
    function: Any = cce_mean()
    return lambda *inputs: -function(*inputs, reduction="none")


LOSS_PEERS: dict[str, Callable[[], Logps]] = {
    "plain": lambda: plain_logps,
    "compiled": compiled,
    "torch": torch_own,
    "trl": trl,
    "liger": liger,
}
GPU_LOSS_PEERS = {
    "plain": LossPeer(LOSS_PEERS["plain"]),
    "trl": LossPeer(trl),
    "liger": LossPeer(liger, liger_mean),
    "scaled": LossPeer(liger_scaled),
    "quack": LossPeer(quack, quack_mean),
    "cce": LossPeer(cce, cce_mean),
}
