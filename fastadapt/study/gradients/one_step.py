"""One step of last-layer training on one pair: predicted and measured.

The body of the model is frozen, so that its hidden states are made once. For each pair the inner
products of the gradients say what a step of gradient descent on the head will do to log P of both
responses; then the step is taken, by autograd through `linear_log_odds`, and both are measured
again. The head is taken as a matrix of its own, also where a model ties it to its embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastadapt.losses import Responses, RewardPenalizeLoss
from fastadapt.tracking.displacement import token_products
from fastadapt.tracking.gradients import analytic_gradients, loss_value
from fastadapt.tracking.pair_contexts import ContextPair, encode_contexts
from fastadapt.training.head import Head
from fastadapt.training.head_check import head_of
from fastadapt.training.log_odds import head_log_odds, hidden_states
from fastadapt.training.pairs import IGNORED

FORWARD_BATCH = 4  # pairs
REFERENCES = ("ref_chosen_logps", "ref_rejected_logps")
Record = dict[str, Any]


class PairFeatures(NamedTuple):
    """The response tokens of a pair with their hidden states, chosen before rejected.

    Attributes:
        hidden: (n, H).
        labels: (n,), int64.
        chosen: how many belong to the chosen response.
    """

    hidden: Tensor
    labels: Tensor
    chosen: int


@torch.no_grad()
def pair_features(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[ContextPair],
    *,
    max_length: int | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> list[PairFeatures]:
    """Returns the hidden states before the response tokens of each pair.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        pairs: at least one.
        max_length: tokens of a sequence at most; None: as many as it has.
        on_step: called after each `FORWARD_BATCH` pairs.
    """
    found = []
    for i in range(0, len(pairs), FORWARD_BATCH):
        batch = encode_contexts(tokenizer, pairs[i : i + FORWARD_BATCH], max_length=max_length)
        hidden = hidden_states(model, batch)
        b = len(hidden) // 2
        for j in range(b):
            rows = [(hidden[k], batch.labels[k]) for k in (j, b + j)]
            kept = [labels != IGNORED for _, labels in rows]
            found.append(
                PairFeatures(
                    torch.cat([h[k] for (h, _), k in zip(rows, kept, strict=True)]),
                    torch.cat([y[k] for (_, y), k in zip(rows, kept, strict=True)]),
                    int(kept[0].sum()),
                )
            )
        on_step()
    return found


def trained_head(
    head: Head,
    features: Sequence[PairFeatures],
    *,
    side: str,
    learning_rate: float = 3e-4,
    epochs: int = 2,
    batch: int = 20,
    on_step: Callable[[], None] = lambda: None,
) -> Head:
    """Returns the head after MLE on one side of the pairs with AdamW: supervised fine-tuning.

    Args:
        head: where to start; not changed.
        features: of the pairs.
        side: "chosen" or "rejected".
        learning_rate: of AdamW, without weight decay.
        epochs: times through the pairs.
        batch: pairs a step.
        on_step: called after each step.
    """
    weight = head.weight.detach().clone().requires_grad_()
    optimizer = torch.optim.AdamW([weight], lr=learning_rate, weight_decay=0.0, fused=True)
    trained = head._replace(weight=weight)
    for _ in range(epochs):
        for i in range(0, len(features), batch):
            parts = [_side(pair, side) for pair in features[i : i + batch]]
            hidden, labels = (torch.cat(x) for x in zip(*parts, strict=True))
            optimizer.zero_grad()
            (-F.logsigmoid(head_log_odds(trained, hidden, labels)).mean()).backward()
            optimizer.step()
            on_step()
    return head._replace(weight=weight.detach())


def step_records(
    head: Head,
    pair: PairFeatures,
    losses: Mapping[str, RewardPenalizeLoss],
    sizes: Mapping[str, Sequence[float]],
) -> Iterator[Record]:
    """Yields a prediction and a measurement of one step, for each loss and step size.

    A step is gradient descent on the head's matrix with the loss of this pair alone, the reference
    of DPO being the head before it. Its rate is such that the larger of the two predicted changes
    of log P is `size` nats: first order is an approximation for small changes only.

    Args:
        head: its matrix is the parameter; not changed.
        pair: the tokens.
        losses: by name.
        sizes: nats > 0, by the name of the loss.

    Yields:
        dict[str, Any]: loss; size; rho, chosen_norm, rejected_norm, cross (inner products, nats²
        per squared unit of the matrix); predicted_chosen, predicted_rejected, measured_chosen,
        measured_rejected (changes of log P, nats); logp_chosen, logp_rejected (before);
        tokens_chosen, tokens_rejected; p_rejected, the geometric mean of the rejected token
        probabilities; rate, the step size; log_odds_rejected, the largest log-odds of a rejected
        token.
    """
    leaf = head.weight.detach().clone().requires_grad_()
    moving = head._replace(weight=leaf)
    everything = torch.arange(len(pair.labels))
    # a matrix alone is moved: the bias, if there is one, is a constant here
    products = token_products(pair.hidden, pair.labels, head, [everything])[0]
    if head.bias is not None:
        h = pair.hidden.double()
        products = products * (h @ h.t()) / (h @ h.t() + 1)
    n = pair.chosen
    blocks = (products[:n, :n].sum(), products[n:, n:].sum(), products[:n, n:].sum())
    chosen_norm, rejected_norm, cross = (float(x) for x in blocks)
    before: Tensor | None = None
    for name, objective in losses.items():
        log_odds = head_log_odds(moving, pair.hidden, pair.labels)
        before = F.logsigmoid(log_odds.detach()).double()
        sides = _sides(log_odds, n)
        refs = (before[:n].sum()[None], before[n:].sum()[None])
        found = analytic_gradients(objective, _detached(sides[0]), _detached(sides[1]), *refs)
        slopes = torch.cat([found["chosen"].logp[0], found["rejected"].logp[0]])
        inputs = dict(zip(("chosen", "rejected", *REFERENCES), (*sides, *refs), strict=True))
        loss = loss_value(objective, inputs)
        (gradient,) = torch.autograd.grad(loss, [leaf])
        along = products @ slopes
        predicted = torch.stack([-along[:n].sum(), -along[n:].sum()])
        for size in sizes[name]:
            rate = size / float(predicted.abs().max())
            with torch.no_grad():
                moved = head._replace(weight=leaf - rate * gradient)
                after = F.logsigmoid(head_log_odds(moved, pair.hidden, pair.labels)).double()
            change = after - before
            yield {
                "loss": name,
                "size": size,
                "rho": cross / chosen_norm,
                "chosen_norm": chosen_norm,
                "rejected_norm": rejected_norm,
                "cross": cross,
                "predicted_chosen": rate * float(predicted[0]),
                "predicted_rejected": rate * float(predicted[1]),
                "measured_chosen": float(change[:n].sum()),
                "measured_rejected": float(change[n:].sum()),
                "logp_chosen": float(before[:n].sum()),
                "logp_rejected": float(before[n:].sum()),
                "tokens_chosen": n,
                "tokens_rejected": len(pair.labels) - n,
                "p_rejected": float(before[n:].mean().exp()),
                "rate": rate,
                "log_odds_rejected": float(log_odds.detach()[n:].max()),
            }


def exmate_threshold(record: Mapping[str, Any], coefficient: float = 1.0) -> float:
    """Returns the P̄⁻ above which a small step of ExMATE lowers log P of the rejected response.

    With the loss -S⁺/T⁺ + λ e^{S⁻/T⁻} of one pair, ΔS⁻ = η (⟨∇S⁺, ∇S⁻⟩/T⁺ - λ P̄⁻ ‖∇S⁻‖²/T⁻), which
    is negative for P̄⁻ > ⟨∇S⁺, ∇S⁻⟩ T⁻ / (λ ‖∇S⁻‖² T⁺). 0 or less: always.

    Args:
        record: of `step_records`.
        coefficient: λ.
    """
    ratio = record["cross"] * record["tokens_rejected"]
    return float(ratio / (coefficient * record["rejected_norm"] * record["tokens_chosen"]))


def head_copy(model: Any) -> Head:
    """Returns the head of a model with a matrix of its own, in which an adapter is merged."""
    head = head_of(model)
    weight = head.weight.detach().clone()
    if head.lora is not None:
        a, b, scale = head.lora
        weight += (scale * (b.detach() @ a.detach())).to(weight.dtype)
    return head._replace(weight=weight, lora=None)


def _side(pair: PairFeatures, side: str) -> tuple[Tensor, Tensor]:
    """Returns hidden states and labels of one response."""
    part = slice(None, pair.chosen) if side == "chosen" else slice(pair.chosen, None)
    return pair.hidden[part], pair.labels[part]


def _sides(log_odds: Tensor, n: int) -> tuple[Responses, Responses]:
    """Returns log-odds of one pair as two `Responses`."""
    chosen, rejected = log_odds[None, :n], log_odds[None, n:]
    return (
        Responses(chosen, torch.ones_like(chosen, dtype=torch.bool)),
        Responses(rejected, torch.ones_like(rejected, dtype=torch.bool)),
    )


def _detached(side: Responses) -> Responses:
    """Returns the responses without a graph."""
    return side._replace(log_odds=side.log_odds.detach())
