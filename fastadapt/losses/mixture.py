"""Weighted sums of losses, with metrics to watch during training."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastadapt._ops.checks import nearest, number, shown
from fastadapt.losses.formulas import (
    candidate_unlikelihood_penalty,
    exmate_loss,
    exmate_penalty,
    mate_loss,
    mate_penalty,
    mle_loss,
    unlikelihood_loss,
    unlikelihood_penalty,
)
from fastadapt.losses.preference import dpo_loss, log_ratios
from fastadapt.losses.responses import Responses, Rows, accumulated, checked, mean_of

FORMULAS: dict[str, Callable[..., Tensor]] = {
    "mle": mle_loss,
    "unlikelihood": unlikelihood_loss,
    "exmate": exmate_loss,
    "mate": mate_loss,
    "dpo": dpo_loss,
    "unlikelihood_penalty": unlikelihood_penalty,
    "candidate_unlikelihood_penalty": candidate_unlikelihood_penalty,
    "exmate_penalty": exmate_penalty,
    "mate_penalty": mate_penalty,
}
"""Every loss, by the name that `RewardPenalizeLoss` knows it by.

A formula takes the parameters of `RewardPenalizeLoss.forward` by name; its other parameters are
options of the mixture.

Examples:
    >>> from fastadapt.losses import FORMULAS
    >>> FORMULAS["dpo"] is dpo_loss
    True
    >>> [name for name in FORMULAS if name.startswith("exmate")]
    ['exmate', 'exmate_penalty']
"""

CONTAIN_MLE = frozenset({"mle", "unlikelihood", "exmate", "mate"})
"""The losses that contain MLE on the chosen responses; a mixture takes one of them at most.

Examples:
    >>> from fastadapt.losses import CONTAIN_MLE
    >>> sorted(CONTAIN_MLE)
    ['exmate', 'mate', 'mle', 'unlikelihood']
"""

_REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")


class RewardPenalizeLoss(nn.Module):
    """A weighted sum of losses that reward chosen responses and penalise rejected ones.

    Examples:
        >>> objective = RewardPenalizeLoss({"dpo": 1.0, "exmate": 0.5}, beta=0.1)
        >>> labels = torch.tensor([[5, 7, 2]])
        >>> chosen = Responses.from_labels(torch.full((1, 3), 1.0, requires_grad=True), labels)
        >>> rejected = Responses.from_labels(torch.full((1, 3), -1.0), labels)
        >>> loss, metrics = objective(chosen, rejected, torch.tensor([-2.0]), torch.tensor([-3.0]))
        >>> loss.backward()
        >>> metrics["loss/dpo"]
        tensor(0.5981)

    Args:
        weights (Mapping[str, float]): names of `FORMULAS` and their weights: "mle", "unlikelihood",
            "exmate", "mate", "dpo", "unlikelihood_penalty", "candidate_unlikelihood_penalty",
            "exmate_penalty", "mate_penalty". Finite, >= 0: a penalty is added, not subtracted.
        **options (Any): keyword arguments of the losses named (`beta`, `coefficient`, `norm`,
            ...), each given to every one of them that has it, and checked at once.

    Raises:
        TypeError: not a mapping, or a weight or an option of another type.
        ValueError: no loss or an unknown one; more than one that contains MLE ("mle",
            "unlikelihood", "exmate", "mate"), which would count twice; a weight or an option out of
            range; an option of none of them.
    """

    def __init__(self, weights: Mapping[str, float], **options: Any) -> None:
        super().__init__()
        self.weights = _checked(weights)
        self.options = dict(options)
        inputs = inspect.signature(self.forward).parameters
        self._inputs: dict[str, dict[str, bool]] = {}  # of each loss, and whether it must be there
        self._options: dict[str, dict[str, Any]] = {}
        self._beta = options.get("beta", inspect.signature(dpo_loss).parameters["beta"].default)
        known: set[str] = set()
        for name in self.weights:
            own = inspect.signature(FORMULAS[name]).parameters
            self._inputs[name] = {k: p.default is p.empty for k, p in own.items() if k in inputs}
            self._options[name] = {k: options[k] for k in own if k in options and k not in inputs}
            known |= own.keys() - inputs.keys()
        left = sorted(options.keys() - known)
        if left:
            names = ", ".join(sorted(known)) or "none"
            raise ValueError(
                f"options: expected those of {', '.join(self.weights)}, got {left}; they have "
                f"{names}{nearest(left, known)}"
            )
        self._try_options()

    def _try_options(self) -> None:
        """Calls every loss once on one token, so that wrong options raise here."""
        log_odds = torch.zeros(1, 1, dtype=torch.float32, device="cpu")
        mask = torch.ones(1, 1, dtype=torch.bool, device="cpu")
        one = Responses(log_odds, mask)
        inputs = {"candidates": log_odds[None], "candidate_mask": mask[None]}
        self._terms({"chosen": one, "rejected": one, **dict.fromkeys(_REFERENCE), **inputs})

    def extra_repr(self) -> str:
        """Shows the weights and options."""
        options = "".join(f", {k}={v!r}" for k, v in self.options.items())
        return f"{self.weights}{options}"

    def needs(self, name: str) -> bool:
        """Returns whether any of the losses needs the input of `forward` with this name."""
        return any(wanted.get(name, False) for wanted in self._inputs.values())

    def forward(
        self,
        chosen: Responses,
        rejected: Responses | None = None,
        ref_chosen_logps: Tensor | None = None,
        ref_rejected_logps: Tensor | None = None,
        *,
        candidates: Tensor | None = None,
        candidate_mask: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss and its metrics.

        The metrics are made without reading the device. Means are over this call's responses or
        pairs:

        - "loss/NAME": each loss named, before its weight.
        - "logps/chosen", "logps/rejected": mean log P of a response.
        - "pairs/margins", "pairs/accuracies": mean log P⁺ - log P⁻, and how often it is > 0.
          Only with as many chosen as rejected responses: the i-th against the i-th.
        - "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies": of DPO,
          with the reward β (S - S_ref). Only with "dpo".
        - "gradients/chosen", "gradients/rejected": shares, in [0, 1], of Σ ‖∂L/∂z_t‖₁ = 2 Σ |g_t|
          that fall on chosen and on rejected labels, from one more forward and a backward of these
          formulas on the log-odds alone; the rows of logits are not visited. 0 both where no
          gradient is. A row in both counts in both; candidates count in neither.

        Args:
            chosen (Responses): the responses to reward.
            rejected (Responses | None): those to penalise. None: for losses on the chosen side
                alone.
            ref_chosen_logps (Tensor | None): as in `dpo_loss`.
            ref_rejected_logps (Tensor | None): as in `dpo_loss`.
            candidates (Tensor | None): as in `candidate_unlikelihood_penalty`.
            candidate_mask (Tensor | None): as in `candidate_unlikelihood_penalty`.

        Returns:
            tuple[Tensor, dict[str, Tensor]]: the loss, a scalar, and its metrics, detached scalars
            of its dtype.

        Raises:
            TypeError, ValueError: those of the losses; an input that one needs is None.
        """
        inputs = {
            "chosen": chosen,
            "rejected": rejected,
            "ref_chosen_logps": ref_chosen_logps,
            "ref_rejected_logps": ref_rejected_logps,
            "candidates": candidates,
            "candidate_mask": candidate_mask,
        }
        terms = self._terms(inputs)
        loss = self._total(terms)
        metrics = {f"loss/{name}": term.detach() for name, term in terms.items()}
        with torch.no_grad():
            metrics |= self._sides(chosen, rejected, ref_chosen_logps, ref_rejected_logps)
        metrics |= self._gradient_shares(chosen, rejected, inputs)
        return loss, metrics

    def _terms(self, inputs: Mapping[str, object]) -> dict[str, Tensor]:
        """Returns each loss before its weight."""
        terms = {}
        for name, wanted in self._inputs.items():
            missing = [k for k, required in wanted.items() if required and inputs[k] is None]
            if missing:
                raise ValueError(f"{missing[0]}: expected it for the loss {name}, got None")
            own = {k: inputs[k] for k in wanted}
            terms[name] = FORMULAS[name](**own, **self._options[name])
        return terms

    def _total(self, terms: Mapping[str, Tensor]) -> Tensor:
        """Returns the weighted sum."""
        weighted = [weight * terms[name] for name, weight in self.weights.items()]
        return torch.stack(weighted).sum()

    def _sides(
        self,
        chosen: Responses,
        rejected: Responses | None,
        ref_chosen_logps: Tensor | None,
        ref_rejected_logps: Tensor | None,
    ) -> dict[str, Tensor]:
        """Returns the metrics of log-probabilities, pairs and rewards."""
        g = checked("chosen", chosen)
        metrics = {"logps/chosen": mean_of(g.logps(), g.lengths > 0)}
        if rejected is None:
            return metrics
        b = checked("rejected", rejected)
        metrics["logps/rejected"] = mean_of(b.logps(), b.lengths > 0)
        if g.size == b.size:
            metrics |= _compare("pairs", g, b, g.logps(), b.logps())
        if "dpo" in self.weights:
            beta = self._beta
            of_chosen = beta * log_ratios("ref_chosen_logps", g, ref_chosen_logps)
            of_rejected = beta * log_ratios("ref_rejected_logps", b, ref_rejected_logps)
            pairs = g.lengths + b.lengths > 0
            metrics["rewards/chosen"] = mean_of(of_chosen, pairs)
            metrics["rewards/rejected"] = mean_of(of_rejected, pairs)
            metrics |= _compare("rewards", g, b, of_chosen, of_rejected)
        return metrics

    def _gradient_shares(
        self, chosen: Responses, rejected: Responses | None, inputs: Mapping[str, object]
    ) -> dict[str, Tensor]:
        """Returns each side's share of Σ |g_t|, by the gradient in the log-odds."""
        sides = {"chosen": chosen} if rejected is None else {"chosen": chosen, "rejected": rejected}

        def loss_of(log_odds: Mapping[str, Tensor]) -> Tensor:
            moved = {k: _at(log_odds[k], side) for k, side in sides.items()}
            return self._total(self._terms({**inputs, **moved}))

        points = {k: accumulated(k, side.log_odds).detach() for k, side in sides.items()}
        with torch.inference_mode(False):  # inside inference mode torch 2.8 makes zeros
            slopes = torch.func.grad(loss_of)(points)
        masses = {k: g.abs().sum() for k, g in slopes.items()}
        total = torch.stack(list(masses.values())).sum()
        return {f"gradients/{k}": m / torch.where(total > 0, total, 1) for k, m in masses.items()}


def _checked(weights: object) -> dict[str, float]:
    """Checks the weights and returns them as numbers by name."""
    if not isinstance(weights, Mapping):
        named = [weights] if isinstance(weights, str) else weights
        listed = list(named) if isinstance(named, list | tuple | set | frozenset) else []
        names = [name for name in listed if isinstance(name, str) and name in FORMULAS]
        like = dict.fromkeys(names or ["dpo", "exmate"], 1.0)
        raise TypeError(
            f"weights: expected losses with their weights, such as {like}, got {shown(weights)}"
        )
    unknown = [name for name in weights if name not in FORMULAS]
    if unknown or not weights:
        raise ValueError(
            f"weights: expected some of {', '.join(FORMULAS)}, got {unknown}"
            f"{nearest(unknown, FORMULAS)}"
        )
    twice = [name for name in weights if name in CONTAIN_MLE]
    if len(twice) > 1:
        raise ValueError(
            f"weights: expected one loss that contains MLE, got {', '.join(twice)}; "
            "name the bare penalties beside it, such as exmate_penalty"
        )
    return {name: number(f"weights[{name!r}]", weight) for name, weight in weights.items()}


def _at(log_odds: Tensor, side: Responses) -> Responses:
    """A side at other log-odds; `_replace` and slices of a side break torch 2.8's compiler."""
    _, mask, segments, size, tokens, sequences = side
    return Responses(log_odds, mask, segments, size, tokens, sequences)


def _compare(name: str, g: Rows, b: Rows, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Returns by how much and how often the chosen response of a pair is ahead."""
    pairs = g.lengths + b.lengths > 0
    return {
        f"{name}/margins": mean_of(x - y, pairs),
        f"{name}/accuracies": mean_of((x > y).to(x.dtype), pairs),
    }
