"""The others that make log-probabilities of labels from hidden states and a linear head.

Each takes hidden (N, H), weight (V, H) and labels (N,), int64, and returns (N,) log-probabilities,
differentiably. One that this machine lacks is not replaced: making it raises `MissingPeer`. What
`linear_log_odds` returns is the log-odds instead, which has the log-probability in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from missing import MissingPeer

Logps = Callable[[Tensor, Tensor, Tensor], Tensor]

_TRL_CHUNK = 32_768  # ids; what trl's own training passes


def plain_logps(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Full logits in the dtype of the inputs, float32 log_softmax of them, gather."""
    logits = F.linear(hidden, weight)
    return logits.float().log_softmax(-1).gather(-1, labels[:, None])[:, 0]


def plain_log_odds(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The label's log-odds from full logits in the dtype of the inputs, float32 from there on."""
    logits, own = F.linear(hidden, weight).float(), labels[:, None]
    return logits.gather(-1, own)[:, 0] - logits.scatter(-1, own, -math.inf).logsumexp(-1)


def plain() -> Logps:
    """`plain_logps` as it is."""
    return plain_logps


def compiled() -> Logps:
    """`plain_logps` through `torch.compile`, anew for each shape; compiling is the first call.

    Raises:
        MissingPeer: there is no C++ compiler, or the compiler cannot do it.
    """
    from torch._inductor.exc import InductorError  # takes 3 s, in each process

    torch.compiler.reset()
    call: Logps = torch.compile(plain_logps, dynamic=False)
    try:
        small = torch.zeros(2, 3, requires_grad=True), torch.zeros(4, 3, requires_grad=True)
        call(*small, torch.zeros(2, dtype=torch.int64)).sum().backward()
    except InductorError as error:
        raise MissingPeer(f"torch.compile: {str(error).strip().splitlines()[0]}") from error
    return call


def torch_own() -> Logps:
    """`torch.nn.functional.linear_cross_entropy`, chunked by its own choice, reduction none.

    Raises:
        MissingPeer: this torch has none.
    """
    function: Any = getattr(F, "linear_cross_entropy", None)
    if function is None:
        raise MissingPeer(f"torch {torch.__version__} has no linear_cross_entropy")
    chunked: Any = torch.nn.LinearCrossEntropyOptions()  # without options it makes all logits

    def logps(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        losses: Tensor = function(hidden, weight, labels, reduction="none", options=chunked)
        return -losses

    return logps


def trl() -> Logps:
    """trl's log-probabilities by chunks of the vocabulary, no other output asked for.

    Raises:
        MissingPeer: trl is not installed, or has no such function.
    """
    try:
        from trl.kernels import ChunkedLogProbFunction as Function
    except ImportError as error:
        raise MissingPeer(f"trl with its chunked log-probabilities: {error}") from error
    settings = (1.0, _TRL_CHUNK, None, 1.0, ())  # temperature, chunk, no cap, scale, no outputs
    return lambda hidden, weight, labels: Function.apply(hidden, weight, None, labels, *settings)[0]


def liger() -> Logps:
    """Liger's selective log-probabilities by chunks of rows and of the vocabulary.

    Raises:
        MissingPeer: liger-kernel is not installed, or has no such function.
    """
    try:
        from liger_kernel.chunked_loss import fused_linear_ppo as module

        function: Any = module._ChunkedSelectiveLogProbFunction
        chunk = module._SELECTIVE_LOGPROB_VOCAB_CHUNK_SIZE
    except (ImportError, AttributeError) as error:
        raise MissingPeer(f"liger-kernel with its chunked log-probabilities: {error}") from error
    return lambda hidden, weight, labels: function.apply(hidden, weight, labels, None, 1.0, chunk)


LOSS_PEERS: dict[str, Callable[[], Logps]] = {
    "plain": plain,
    "compiled": compiled,
    "torch": torch_own,
    "trl": trl,
    "liger": liger,
}
