"""`fastadapt gradients cases`: single steps on a toy head with frozen features.

V ids, one chosen and one rejected response of a few tokens, and hidden states from a sum of
embeddings of the context, of the tokens so far and of the place. So two responses share a row
exactly where their contexts and tokens so far are the same, as in a language model. Only the head
is trained, by plain gradient descent, in float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastadapt.log_odds import label_log_odds
from fastadapt.losses import Responses, RewardPenalizeLoss
from fastadapt.study.gradients.named_losses import LOSSES
from fastadapt.study.gradients.one_step import PairFeatures, exmate_threshold, step_records
from fastadapt.study.gradients.records import Row
from fastadapt.tracking.gradients import loss_value
from fastadapt.training.head import Head

V, H, SEED = 50, 32, 0
RATE = 0.05  # of gradient descent on the sums below
SIZE = 1e-3  # nats; of the single steps
WITH_MATE = {**LOSSES, "MATE": {"mate": 1.0}}  # which runs away: in no picture
BETA = 0.3
# context and tokens of the chosen and of the rejected response
CASES: dict[str, tuple[tuple[int, tuple[int, ...]], tuple[int, tuple[int, ...]]]] = {
    "one timestep, shared context": ((0, (3,)), (0, (4,))),
    "shared prefix": ((0, (3, 5, 7, 9, 11, 13)), (0, (3, 5, 7, 10, 12, 14))),
    "several timesteps": ((0, (3, 5, 7, 9, 11, 13)), (0, (4, 6, 8, 10, 12, 14))),
    "same response, other context": ((0, (3, 5, 7, 9, 11, 13)), (1, (3, 5, 7, 9, 11, 13))),
    "all different": ((0, (3, 5, 7, 9, 11, 13)), (1, (3, 6, 8, 10, 12, 14))),
}


class ToyPair(NamedTuple):
    """A toy pair: (x⁺, y⁺) and (x⁻, y⁻), and the cross cells (x⁻, y⁺) and (x⁺, y⁻)."""

    own: PairFeatures
    cross: PairFeatures


def toy_pair(case: str) -> ToyPair:
    """Returns the tokens and hidden states of a case.

    Raises:
        KeyError: no such case.
    """
    (_, chosen), (_, rejected) = CASES[case]
    parts = {key: _hidden(context, tokens) for key, (context, tokens) in _cells(case).items()}
    labels = {"chosen": torch.tensor(chosen), "rejected": torch.tensor(rejected)}
    own = torch.cat([parts["chosen_in_chosen"], parts["rejected_in_rejected"]])
    cross = torch.cat([parts["chosen_in_rejected"], parts["rejected_in_chosen"]])
    both = torch.cat([labels["chosen"], labels["rejected"]])
    return ToyPair(PairFeatures(own, both, len(chosen)), PairFeatures(cross, both, len(chosen)))


def toy_head() -> Head:
    """Returns the head that every case starts from, float64."""
    generator = torch.Generator().manual_seed(SEED)
    return Head(0.1 * torch.randn(V, H, generator=generator).double(), None, None, 1.0)


def descend(
    head: Head, pair: ToyPair, weights: Mapping[str, float], *, steps: int
) -> tuple[Head, list[Row]]:
    """Trains the head on a pair; returns it with the four cells before each step and at the end.

    Args:
        head: where to start, and the reference of DPO; not changed.
        pair: what to train on.
        weights: of `RewardPenalizeLoss`; β = 0.3.
        steps: of gradient descent; the loss is times the number of chosen tokens, so that the rate
            is that of a sum over tokens.
    """
    weight = head.weight.clone().requires_grad_()
    options = {"beta": BETA} if "dpo" in weights else {}
    objective = RewardPenalizeLoss(weights, **options)
    refs = tuple(s.detach()[None] for s in _sums(head.weight, pair.own))
    rows = []
    for step in range(steps + 1):
        rows.append({"step": step, **_four_cells(weight.detach(), pair)})
        if step == steps:
            break
        chosen, rejected = _responses(weight, pair.own)
        inputs = {
            "chosen": chosen,
            "rejected": rejected,
            "ref_chosen_logps": refs[0],
            "ref_rejected_logps": refs[1],
        }
        loss = loss_value(objective, inputs)
        scale = 1.0 if "dpo" in weights else float(pair.own.chosen)
        (gradient,) = torch.autograd.grad(scale * loss, [weight])
        weight = (weight.detach() - RATE * gradient).requires_grad_()
    return head._replace(weight=weight.detach()), rows


def prediction_rows() -> list[Row]:
    """Returns the predicted and the measured step of each case and loss, as in `step_records`.

    Every case is met twice: at the start and after MLE on the chosen response.
    """
    rows: list[Row] = []
    for case in CASES:
        pair = toy_pair(case)
        for start, head in _starts(pair, ("base", "MLE on chosen")).items():
            objectives = {
                name: RewardPenalizeLoss(w, **({"beta": BETA} if "dpo" in w else {}))
                for name, w in WITH_MATE.items()
            }
            sizes = dict.fromkeys(objectives, (SIZE,))
            where = {"case": case, "start": start}
            rows += [{**where, **row} for row in step_records(head, pair.own, objectives, sizes)]
    return rows


def claim_rows(*, steps: int = 60) -> list[Row]:
    """Returns the check of each claim about DPO and ExMATE on the toys.

    For each case and start: ρ with the change of both mean log-probabilities by the first step and
    by all steps of DPO; the threshold of P̄⁻ with the same of ExMATE.

    Args:
        steps: of each run.
    """
    rows: list[Row] = []
    for case in CASES:
        pair = toy_pair(case)
        for start, head in _starts(pair, ("base", "MLE on chosen", "MLE on rejected")).items():
            for name in ("DPO", "ExMATE"):
                weights = LOSSES[name]
                options = {"beta": BETA} if name == "DPO" else {}
                objective = RewardPenalizeLoss(weights, **options)
                (one,) = step_records(head, pair.own, {name: objective}, {name: (SIZE,)})
                _, path = descend(head, pair, weights, steps=steps)
                row = {"case": case, "start": start, "loss": name, "rho": one["rho"]}
                row |= {"p_rejected": one["p_rejected"], "threshold": exmate_threshold(one)}
                row |= {k: one[k] for k in ("measured_chosen", "measured_rejected")}
                for side in ("chosen_in_chosen", "rejected_in_rejected"):
                    row[f"{side}/first"] = path[0][side]
                    row[f"{side}/last"] = path[-1][side]
                    row[f"{side}/least"] = min(p[side] for p in path)
                rows.append(row)
    return rows


def curve_rows(*, steps: int = 100, cases: Sequence[str] = ("all different",)) -> list[Row]:
    """Returns the four cells of the toy at every step of training, for each loss."""
    rows: list[Row] = []
    for case in cases:
        pair = toy_pair(case)
        for name, weights in LOSSES.items():
            _, path = descend(toy_head(), pair, weights, steps=steps)
            rows += [{"case": case, "loss": name, **row} for row in path]
    return rows


def _cells(case: str) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Returns context and tokens of the four cells."""
    (x, chosen), (y, rejected) = CASES[case]
    return {
        "chosen_in_chosen": (x, chosen),
        "rejected_in_rejected": (y, rejected),
        "rejected_in_chosen": (x, rejected),
        "chosen_in_rejected": (y, chosen),
    }


def _hidden(context: int, tokens: Sequence[int]) -> Tensor:
    """Returns the states before each token, (T, H), of mean square 1."""
    generator = torch.Generator().manual_seed(SEED + 1)
    contexts = torch.randn(2, H, generator=generator).double()
    ids = torch.randn(V, H, generator=generator).double()
    places = torch.randn(8, H, generator=generator).double()
    # a context outweighs no more than one token
    so_far = torch.zeros(H, dtype=torch.float64)
    rows = []
    for place, token in enumerate(tokens):
        rows.append(0.6 * contexts[context] + 0.8 * so_far + 0.6 * places[place])
        so_far = ids[token]
    hidden = torch.stack(rows)
    return hidden / hidden.square().mean(-1, keepdim=True).sqrt()


def _starts(pair: ToyPair, names: Sequence[str]) -> dict[str, Head]:
    """Returns the heads to start from; MLE on the rejected response swaps the two sides."""
    base = toy_head()
    n = pair.own.chosen
    turned = PairFeatures(
        torch.cat([pair.own.hidden[n:], pair.own.hidden[:n]]),
        torch.cat([pair.own.labels[n:], pair.own.labels[:n]]),
        len(pair.own.labels) - n,
    )
    found = {"base": base}
    if "MLE on chosen" in names:
        found["MLE on chosen"] = descend(base, pair, {"mle": 1.0}, steps=60)[0]
    if "MLE on rejected" in names:
        found["MLE on rejected"] = descend(base, ToyPair(turned, turned), {"mle": 1.0}, steps=60)[0]
    return found


def _responses(weight: Tensor, pair: PairFeatures) -> tuple[Responses, Responses]:
    """Returns the log-odds of a pair, computed through logits."""
    log_odds = label_log_odds(pair.hidden @ weight.t(), pair.labels)
    chosen, rejected = log_odds[None, : pair.chosen], log_odds[None, pair.chosen :]
    mask = torch.ones_like(chosen, dtype=torch.bool)
    return Responses(chosen, mask), Responses(rejected, torch.ones_like(rejected, dtype=torch.bool))


def _sums(weight: Tensor, pair: PairFeatures) -> tuple[Tensor, Tensor]:
    """Returns log P of both responses."""
    chosen, rejected = _responses(weight, pair)
    return F.logsigmoid(chosen.log_odds).sum(), F.logsigmoid(rejected.log_odds).sum()


def _four_cells(weight: Tensor, pair: ToyPair) -> Row:
    """Returns the mean token log-probability of each cell."""
    n, m = pair.own.chosen, len(pair.own.labels) - pair.own.chosen
    chosen, rejected = _sums(weight, pair.own)
    chosen_in_rejected, rejected_in_chosen = _sums(weight, pair.cross)
    return {
        "chosen_in_chosen": float(chosen) / n,
        "rejected_in_rejected": float(rejected) / m,
        "rejected_in_chosen": float(rejected_in_chosen) / m,
        "chosen_in_rejected": float(chosen_in_rejected) / n,
    }
