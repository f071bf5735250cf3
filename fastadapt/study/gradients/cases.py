"""`fastadapt gradients cases`: a head with frozen features, small enough to see everything.

V ids, one good and one bad response of a few tokens, and hidden states from a sum of embeddings of
the context, of the tokens so far and of the place. So two responses share a row exactly where their
contexts and tokens so far are the same, as in a language model. Only the head is trained, by plain
gradient descent, in float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastadapt.log_odds import label_margins
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
# context and tokens of the good and of the bad response
CASES: dict[str, tuple[tuple[int, tuple[int, ...]], tuple[int, tuple[int, ...]]]] = {
    "one timestep, shared context": ((0, (3,)), (0, (4,))),
    "shared prefix": ((0, (3, 5, 7, 9, 11, 13)), (0, (3, 5, 7, 10, 12, 14))),
    "several timesteps": ((0, (3, 5, 7, 9, 11, 13)), (0, (4, 6, 8, 10, 12, 14))),
    "same response, other context": ((0, (3, 5, 7, 9, 11, 13)), (1, (3, 5, 7, 9, 11, 13))),
    "all different": ((0, (3, 5, 7, 9, 11, 13)), (1, (3, 6, 8, 10, 12, 14))),
}


class ToyPair(NamedTuple):
    """A pair of the toy: (x⁺, y⁺) and (x⁻, y⁻), and the cross cells (x⁻, y⁺) and (x⁺, y⁻)."""

    own: PairFeatures
    cross: PairFeatures


def toy_pair(case: str) -> ToyPair:
    """Returns the tokens and hidden states of a case.

    Raises:
        KeyError: no such case.
    """
    (_, good), (_, bad) = CASES[case]
    parts = {key: _hidden(context, tokens) for key, (context, tokens) in _cells(case).items()}
    labels = {"good": torch.tensor(good), "bad": torch.tensor(bad)}
    own = torch.cat([parts["good_in_good"], parts["bad_in_bad"]])
    cross = torch.cat([parts["good_in_bad"], parts["bad_in_good"]])
    both = torch.cat([labels["good"], labels["bad"]])
    return ToyPair(PairFeatures(own, both, len(good)), PairFeatures(cross, both, len(good)))


def toy_head() -> Head:
    """Returns the head that every case starts from, float64."""
    generator = torch.Generator().manual_seed(SEED)
    return Head(0.1 * torch.randn(V, H, generator=generator).double(), None, None, 1.0)


def descend(
    head: Head, pair: ToyPair, weights: Mapping[str, float], *, steps: int
) -> tuple[Head, list[Row]]:
    """Trains the head on one pair; returns it and the four cells before each step and at the end.

    Args:
        head: where to start, and the reference of DPO; not changed.
        pair: what to train on.
        weights: of `RewardPenalizeLoss`; β = 0.3.
        steps: of gradient descent; the loss is times the number of good tokens, so that the rate
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
        good, bad = _responses(weight, pair.own)
        inputs = {"good": good, "bad": bad, "ref_good_logps": refs[0], "ref_bad_logps": refs[1]}
        loss = loss_value(objective, inputs)
        scale = 1.0 if "dpo" in weights else float(pair.own.good)
        (gradient,) = torch.autograd.grad(scale * loss, [weight])
        weight = (weight.detach() - RATE * gradient).requires_grad_()
    return head._replace(weight=weight.detach()), rows


def prediction_rows() -> list[Row]:
    """Returns, for each case and loss, one step predicted and measured; fields of `step_records`.

    Every case is met twice: at the start and after MLE on the good response.
    """
    rows: list[Row] = []
    for case in CASES:
        pair = toy_pair(case)
        for start, head in _starts(pair, ("base", "MLE on good")).items():
            objectives = {
                name: RewardPenalizeLoss(w, **({"beta": BETA} if "dpo" in w else {}))
                for name, w in WITH_MATE.items()
            }
            sizes = dict.fromkeys(objectives, (SIZE,))
            where = {"case": case, "start": start}
            rows += [{**where, **row} for row in step_records(head, pair.own, objectives, sizes)]
    return rows


def claim_rows(*, steps: int = 60) -> list[Row]:
    """Returns what the claims about DPO and ExMATE come to on the toys.

    For each case and start: ρ with the change of both mean log-probabilities by the first step and
    by all steps of DPO; the threshold of P̄⁻ with the same of ExMATE.

    Args:
        steps: of each run.
    """
    rows: list[Row] = []
    for case in CASES:
        pair = toy_pair(case)
        for start, head in _starts(pair, ("base", "MLE on good", "MLE on bad")).items():
            for name in ("DPO", "ExMATE"):
                weights = LOSSES[name]
                options = {"beta": BETA} if name == "DPO" else {}
                objective = RewardPenalizeLoss(weights, **options)
                (one,) = step_records(head, pair.own, {name: objective}, {name: (SIZE,)})
                _, path = descend(head, pair, weights, steps=steps)
                row = {"case": case, "start": start, "loss": name, "rho": one["rho"]}
                row |= {"p_bad": one["p_bad"], "threshold": exmate_threshold(one)}
                row |= {k: one[k] for k in ("measured_good", "measured_bad")}
                for side in ("good_in_good", "bad_in_bad"):
                    row[f"{side}/first"] = path[0][side]
                    row[f"{side}/last"] = path[-1][side]
                    row[f"{side}/least"] = min(p[side] for p in path)
                rows.append(row)
    return rows


def curve_rows(*, steps: int = 100, cases: Sequence[str] = ("all different",)) -> list[Row]:
    """Returns the four cells of the toy at every step of training with each loss."""
    rows: list[Row] = []
    for case in cases:
        pair = toy_pair(case)
        for name, weights in LOSSES.items():
            _, path = descend(toy_head(), pair, weights, steps=steps)
            rows += [{"case": case, "loss": name, **row} for row in path]
    return rows


def _cells(case: str) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Context and tokens of the four cells."""
    (x, good), (y, bad) = CASES[case]
    return {
        "good_in_good": (x, good),
        "bad_in_bad": (y, bad),
        "bad_in_good": (x, bad),
        "good_in_bad": (y, good),
    }


def _hidden(context: int, tokens: Sequence[int]) -> Tensor:
    """(T, H): what the head reads before each token, of mean square 1."""
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
    """Heads to start from; MLE on the bad response is MLE on the pair turned round."""
    base = toy_head()
    n = pair.own.good
    turned = PairFeatures(
        torch.cat([pair.own.hidden[n:], pair.own.hidden[:n]]),
        torch.cat([pair.own.labels[n:], pair.own.labels[:n]]),
        len(pair.own.labels) - n,
    )
    found = {"base": base}
    if "MLE on good" in names:
        found["MLE on good"] = descend(base, pair, {"mle": 1.0}, steps=60)[0]
    if "MLE on bad" in names:
        found["MLE on bad"] = descend(base, ToyPair(turned, turned), {"mle": 1.0}, steps=60)[0]
    return found


def _responses(weight: Tensor, pair: PairFeatures) -> tuple[Responses, Responses]:
    """Margins through logits, as one pair."""
    margins = label_margins(pair.hidden @ weight.t(), pair.labels)
    good, bad = margins[None, : pair.good], margins[None, pair.good :]
    mask = torch.ones_like(good, dtype=torch.bool)
    return Responses(good, mask), Responses(bad, torch.ones_like(bad, dtype=torch.bool))


def _sums(weight: Tensor, pair: PairFeatures) -> tuple[Tensor, Tensor]:
    """log P of both responses."""
    good, bad = _responses(weight, pair)
    return F.logsigmoid(good.margins).sum(), F.logsigmoid(bad.margins).sum()


def _four_cells(weight: Tensor, pair: ToyPair) -> Row:
    """The mean log-probability of the tokens of each cell."""
    n, m = pair.own.good, len(pair.own.labels) - pair.own.good
    good, bad = _sums(weight, pair.own)
    good_in_bad, bad_in_good = _sums(weight, pair.cross)
    return {
        "good_in_good": float(good) / n,
        "bad_in_bad": float(bad) / m,
        "bad_in_good": float(bad_in_good) / m,
        "good_in_bad": float(good_in_bad) / n,
    }
