"""The functions that score labels in place of trl's own; imports nothing of trl."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fastadapt.linear import linear_log_odds
from fastadapt.losses.rows import label_logps
from fastadapt.training.compiled import head_outside_graphs
from fastadapt.training.head import (
    HeadError,
    causal_of,
    evaluating,
    is_gathered,
    layer_of,
    matrix_of,
    scoring,
)
from fastadapt.training.head_check import Answer, fitted, known_states, products_of, remembered
from fastadapt.training.lora import Lora, lora_of
from fastadapt.training.quantised import is_quantised

_OURS = {  # outputs of the same pass, by their names in trl
    "entropy": "entropy",
    "log_sum_sq_probs": "sum_of_squares",
    "is_top1": "hit",
}
_NAMES = {"log_probs", "mean_logits", *_OURS}
_ON_SUPPORTS = {"log_probs", "entropy"}
_FORWARD = "_fused_forward"  # of trl 1.16
_RECORD = "_fastadapt_trl_head"
_MEAN_ROWS = 1024  # of the head at a time, where its logits are capped

Outputs = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class Head(NamedTuple):
    """A head whose logits are `softcap * tanh(scale * (h @ weight.T + bias) / softcap)`.

    With an adapter, as `linear_log_odds` takes it, its product is added before the bias.
    """

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    scale: float
    lora: tuple[Tensor, Tensor, float] | None = None


class Source(Protocol):
    """Scores labels on the supports of their rows."""

    trains_entropy: bool  # whether the entropies have a gradient

    def __call__(self, hidden: Tensor, labels: Tensor, head: Head) -> tuple[Tensor, Tensor]:
        """Returns log-odds and entropies of the next rows, (N,) each."""


class Beside(Protocol):
    """Scores more than the labels of the same rows, by the same head."""

    found: Tensor | None  # its numbers of the last call

    def of(self, hidden: Tensor, labels: Tensor, head: Head) -> Tensor:
        """Returns numbers of the rows, (C,), as wide as log-odds."""


class More(Protocol):
    """Makes more of the rows that are scored, within the forward."""

    @property
    def smooths(self) -> bool:
        """Whether log-sum-exp and mean logit have gradients."""

    def see(self, hidden: Tensor, head: Head, logsumexp: Tensor | None) -> None:
        """Takes rows (N, H), their head, and if they are smoothed the log-sum-exp, (N,)."""


class LogProbs:
    """Replaces trl's autograd function: log-probabilities of labels."""

    of_fastadapt = True

    @staticmethod
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def apply(*arguments: Any) -> Outputs:
        """Returns log-probabilities (N,), and the other outputs of trl's function."""
        scored = score(*arguments)
        return (label_logps(scored[0]), *scored[1:])


class LogOdds:
    """Replaces it by one that returns log-odds, for `RewardPenalizeTrainer`."""

    of_fastadapt = True

    @staticmethod
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def apply(*arguments: Any) -> Outputs:
        """Returns log-odds (N,), and the other outputs of trl's function."""
        return score(*arguments)


class Scorer:
    """What replaces it and knows a batch.

    One object serves all calls of a trainer, so that graphs that torch.compile has cut at it stay.
    """

    of_fastadapt = True

    def apply(self, *arguments: Any) -> Outputs:
        """Returns log-probabilities or log-odds (N,), and the other outputs of trl's function."""
        raise NotImplementedError


class SupportLogProbs(Scorer):
    """Replaces it by one whose log-probabilities and entropies are those on supports."""

    def __init__(self) -> None:
        self.source: Source | None = None

    @contextlib.contextmanager
    def reading(self, source: Source) -> Iterator[None]:
        """Has a source score all rows of the block."""
        self.source = source
        try:
            yield
        finally:
            self.source = None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def apply(self, *arguments: Any) -> Outputs:
        """Returns log-probabilities (N,), and the other outputs of trl's function."""
        scored = score(*[*arguments, self.source])
        return (label_logps(scored[0]), *scored[1:])


def score(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    chunk_size: int,
    softcap: float | None,
    logit_scale: float,
    outputs: Sequence[str],
    source: Source | None = None,
    beside: Beside | None = None,
    more: More | None = None,
) -> Outputs:
    """Returns log-odds of N rows and what trl asks for.

    That is the entropy, the logarithm of the sum of all squared probabilities (for WPO), the mean
    logit, and whether the label is largest. The entropy has a gradient where the head has one; that
    of a frozen head, which would cost a product more in every step, and of one that is gathered for
    the call is refused. With a source both are on the support that it has for each row. What is
    scored `beside`, and what `more` makes of the rows, is left there.
    """
    names = _NAMES if source is None else _ON_SUPPORTS
    missing = sorted(set(outputs) - names)
    if missing:
        raise ValueError(f"outputs: expected some of {sorted(names)}, got {missing}")
    caller, layer, width, lora = _forward_of_trl(), None, None, None
    if caller is not None:
        layer = layer_of(causal_of(caller["self"]))
        if is_quantised(weight):
            weight = matrix_of(layer, hidden.dtype)
        lora = lora_of(layer)
        answer = _ask(caller, weight, bias, lora)
        softcap, logit_scale, width = answer.softcap, answer.logit_scale, answer.width
    # a temperature divides the capped logits: both the cap and what is below it shrink
    scale = logit_scale / temperature
    cap = None if softcap is None else softcap / temperature
    asked = [name for name in outputs if name in _OURS]
    gathered = layer is not None and is_gathered(layer)
    if source is not None and (lora is not None or (gathered and source.trains_entropy)):
        what = "a head without an adapter" if lora is not None else "no entropy in the loss"
        raise HeadError(f"model: expected {what} beside supports, got {type(layer).__name__}")
    if more is not None and gathered:
        raise HeadError(
            f"model: expected a head that is whole for smoothed labels and for divergences from a "
            f"reference, got {type(layer).__name__} that is gathered for each call"
        )
    smooths = more is not None and more.smooths
    smoothed = ["logsumexp"] if smooths else []
    made: dict[str, Tensor] = {}  # outputs beside the log-odds
    # whether the entropy's gradient costs no product more
    trained = weight.requires_grad or (lora is not None and lora.b.requires_grad)

    def scored(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        adapter = None
        if lora is not None:
            bias = lora.with_bias(bias, weight.dtype)
            adapter = lora.a, lora.b[:width], lora.scale
        if width is not None and width != weight.shape[0]:
            weight, bias = weight[:width], None if bias is None else bias[:width]
        if not torch.is_autocast_enabled(hidden.device.type):
            weight = weight.to(hidden.dtype)
            bias = None if bias is None else bias.to(hidden.dtype)
        if source is not None:
            on_support, made["entropy"] = source(hidden, targets, Head(weight, bias, cap, scale))
            return on_support
        log_odds, *found = linear_log_odds(
            hidden,
            weight,
            targets,
            bias,
            softcap=cap,
            logit_scale=scale,
            lora=adapter,
            outputs=["hit", *(_OURS[name] for name in asked), *smoothed],
            differentiable=(trained or smooths) and not gathered,
        )
        made.update(zip([*asked, *smoothed], found[1:], strict=True))
        head = Head(weight, bias, cap, scale, adapter)
        if more is not None:
            more.see(hidden, head, made.get("logsumexp"))
        if beside is not None:
            log_odds = torch.cat([log_odds, beside.of(hidden, targets, head)])
        if "mean_logits" in outputs:
            plain = torch.autocast(hidden.device.type, enabled=False)
            with plain, contextlib.nullcontext() if smooths else torch.no_grad():
                made["mean_logits"] = _mean_logits(hidden, weight, bias, cap, scale, adapter)
        return log_odds

    # the weight that trl gathered is gone before the backward, or its gradient is no mean of ranks
    if layer is not None and gathered:
        with scoring(layer, lambda x: scored(x, layer.weight, layer.bias)) as found:
            layer(hidden)
        (log_odds,) = found
    else:
        log_odds = scored(hidden, weight, bias)
    if beside is not None:
        n = targets.shape[0]
        log_odds, beside.found = log_odds.split([n, log_odds.shape[0] - n])
    squares = made.get("log_sum_sq_probs")
    if squares is not None:  # 0 in rows that are ignored
        squares = torch.where(squares == 0, 0.0, squares.log()).detach()
    return (
        log_odds,
        made.get("entropy"),
        squares,
        made.get("mean_logits"),
        made.get("is_top1"),
    )


def _forward_of_trl() -> Mapping[str, Any] | None:
    """Returns the variables of the calling forward of trl, which passes no model on.

    Where torch.compile has cut that forward in parts, the caller is one of them, with the variables
    that are used from there on.

    Raises:
        ValueError: what asks the model is not among them.
    """
    frame = inspect.currentframe()
    while frame is not None and _FORWARD not in frame.f_code.co_name:
        frame = frame.f_back
    if frame is None:
        return None
    found = dict(frame.f_locals)
    if frame.f_code.co_name == _FORWARD:
        return found
    if not {"self", "backbone_outputs", "kwargs"} <= found.keys():
        raise HeadError(
            f"model: expected a forward of trl that torch.compile cuts where its head is scored, "
            f"got one with {sorted(found)}; compile the model's layers instead"
        )
    original = inspect.getclosurevars(found["self"].forward.__func__).nonlocals["original_forward"]
    return {"args": (), "original_forward": original, **found}


def _ask(
    caller: Mapping[str, Any], weight: Tensor, bias: Tensor | None, lora: Lora | None
) -> Answer:
    """Finds what the model does to the products of its head with the states of its body.

    trl scores those states by what it reads in the configuration. The model's own forward says what
    is right: it runs once, with known states in the place of those that its body returned; the body
    itself does not run.

    Raises:
        ValueError: a head that is no matrix, or logits that are no products of it.
    """
    causal = causal_of(caller["self"])
    return remembered(causal, _RECORD, (), lambda: _look(causal, caller, weight, bias, lora))


@torch.no_grad()
def _look(
    causal: Any,
    caller: Mapping[str, Any],
    weight: Tensor,
    bias: Tensor | None,
    lora: Lora | None,
) -> Answer:
    """Finds the same by running the model's forward."""
    body, given = causal.base_model, copy.copy(caller["backbone_outputs"])
    states = given.last_hidden_state
    if not torch.is_autocast_enabled(states.device.type):
        states = states.to(weight.dtype)
    known = known_states(states, weight, lora)
    products = products_of(known, weight, bias, lora)
    given.last_hidden_state = known.expand(*states.shape[:-2], *known.shape)
    with (
        evaluating(causal),
        head_outside_graphs(causal, others=False),
        contextlib.ExitStack() as stack,
    ):
        for module in {body, causal.get_decoder()} - {causal, None}:  # some call the inner one
            stack.enter_context(_returning(module, given))
        output = caller["original_forward"](*caller["args"], **caller["kwargs"])
    logits = output.logits.reshape(-1, *output.logits.shape[-2:])[0]
    found = fitted(causal, products, logits)
    if found is None:
        raise HeadError(
            f"model: expected logits that are products of the states of its body with the head's "
            f"matrix, scaled and capped by numbers of its configuration; "
            f"{type(causal).__name__} makes others; trl's loss needs logits here"
        )
    return Answer(logits.shape[-1], *found, None, direct=True)


@contextlib.contextmanager
def _returning(module: torch.nn.Module, output: Any) -> Iterator[None]:
    """Makes a module return a given output without computing it, within the block."""
    before = module.__dict__.get("forward")
    object.__setattr__(module, "forward", lambda *_, **__: output)
    try:
        yield
    finally:
        object.__delattr__(module, "forward")
        if before is not None:
            object.__setattr__(module, "forward", before)


def _mean_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    adapter: tuple[Tensor, Tensor, float] | None,
) -> Tensor:
    """Returns the mean over the vocabulary, (N,) float32; a product unless logits are capped."""
    none = hidden.new_empty(0, hidden.shape[1]), weight.new_empty(weight.shape[0], 0), 1.0
    a, b, factor = none if adapter is None else adapter
    low = F.linear(hidden.to(a.dtype), a).float() * factor
    if softcap is None:
        mean = hidden.float() @ weight.mean(0, dtype=torch.float32)
        mean += low @ b.mean(0, dtype=torch.float32)
        return scale * (mean if bias is None else mean + bias.float().mean())
    sums = hidden.new_zeros(hidden.shape[0], dtype=torch.float32)
    for first in range(0, weight.shape[0], _MEAN_ROWS):
        ids = slice(first, first + _MEAN_ROWS)
        x = (hidden @ weight[ids].t()).float() + low @ b[ids].float().t()
        x = x if bias is None else x + bias[ids].float()
        sums += softcap * torch.tanh(scale * x / softcap).sum(-1)
    return sums / weight.shape[0]
