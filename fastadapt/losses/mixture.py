"""Weighted sums of losses, with metrics to watch during training."""

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
from fastadapt.losses.named import (
    CONTAIN_MLE,
    Weight,
    defaults_of,
    inputs_of,
    options_of,
    weights_of,
)
from fastadapt.losses.preference.margins import (
    cdpo_loss,
    discopop_loss,
    dpo_loss,
    exo_pair_loss,
    hinge_loss,
    ipo_loss,
    robust_loss,
    sigmoid_norm_loss,
)
from fastadapt.losses.preference.reference_free import (
    alphapo_loss,
    cpo_loss,
    orpo_loss,
    simpo_loss,
    slic_loss,
    tpo_loss,
)
from fastadapt.losses.preference.rewards import (
    apo_down_loss,
    apo_zero_loss,
    bco_pair_loss,
    cal_dpo_loss,
    dpop_loss,
    nca_pair_loss,
    sppo_hard_loss,
    tdpo_loss,
)
from fastadapt.losses.preference.single import apo_zero_unpaired_loss, bco_loss, kto_loss
from fastadapt.losses.preference.transport import aot_loss, aot_unpaired_loss
from fastadapt.losses.regularisers import smoothed_mle_loss
from fastadapt.losses.responses import Responses
from fastadapt.losses.rows import Rows, checked, mean_of, reference
from fastadapt.losses.shapes import accumulated
from fastadapt.losses.weighted import dft_loss, focal_mle_loss

FORMULAS: dict[str, Callable[..., Tensor]] = {
    "mle": mle_loss,
    "smoothed_mle": smoothed_mle_loss,
    "focal_mle": focal_mle_loss,
    "dft": dft_loss,
    "unlikelihood": unlikelihood_loss,
    "exmate": exmate_loss,
    "mate": mate_loss,
    "unlikelihood_penalty": unlikelihood_penalty,
    "exmate_penalty": exmate_penalty,
    "mate_penalty": mate_penalty,
    "candidate_unlikelihood_penalty": candidate_unlikelihood_penalty,
    "dpo": dpo_loss,
    "cdpo": cdpo_loss,
    "robust": robust_loss,
    "hinge": hinge_loss,
    "ipo": ipo_loss,
    "sigmoid_norm": sigmoid_norm_loss,
    "exo_pair": exo_pair_loss,
    "discopop": discopop_loss,
    "nca_pair": nca_pair_loss,
    "bco_pair": bco_pair_loss,
    "sppo_hard": sppo_hard_loss,
    "apo_zero": apo_zero_loss,
    "apo_down": apo_down_loss,
    "cal_dpo": cal_dpo_loss,
    "dpop": dpop_loss,
    "tdpo": tdpo_loss,
    "aot": aot_loss,
    "aot_unpaired": aot_unpaired_loss,
    "cpo": cpo_loss,
    "simpo": simpo_loss,
    "alphapo": alphapo_loss,
    "orpo": orpo_loss,
    "slic": slic_loss,
    "tpo": tpo_loss,
    "kto": kto_loss,
    "apo_zero_unpaired": apo_zero_unpaired_loss,
    "bco": bco_loss,
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


_REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")
_UNUSED = {*_REFERENCE, "candidates", "candidate_mask"}  # may be given beside losses without them


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
        >>> warm = RewardPenalizeLoss(
        ...     {"mle": lambda progress: 1 - progress, "simpo": 1.0, "dpo": 0.5},
        ...     beta=0.1,
        ...     simpo={"beta": 2.0, "gamma": 1.0},
        ... )
        >>> warm.weights_at(0.25)
        {'mle': 0.75, 'simpo': 1.0, 'dpo': 0.5}

    Args:
        weights (Mapping[str, float | Callable[[float], float]]): names of `FORMULAS`
            (`fastadapt.losses.describe` says what each is), or of `ALIASES`, and their weights:
            numbers, finite and >= 0, since a penalty is added and not subtracted; or functions to
            such of how much of the run is done, from 0 to 1, as `ramp` returns.
        **options (Any): keyword arguments of the losses named (`beta`, `coefficient`, `norm`,
            ...), each given to every one of them that has it, and checked at once. A mapping under
            the name of a loss holds options of that loss alone, which go before the others.

    Raises:
        TypeError: not a mapping, or a weight or an option of another type. ValueError: no loss or
            an unknown one; more than one that contains MLE (`CONTAIN_MLE`), which would count
            twice; a weight or an option out of range; an option of none of them.
    """

    def __init__(self, weights: Mapping[str, Weight], **options: Any) -> None:
        super().__init__()
        self.weights = weights_of(weights, FORMULAS)
        self.options = dict(options)
        # of each loss: its inputs, and whether each must be there; and the options that it is given
        self._inputs = {name: inputs_of(FORMULAS[name]) for name in self.weights}
        self._options = options_of(options, self.weights, FORMULAS)
        twice = [name for name in self.weights if self._contains_mle(name)]
        if len(twice) > 1:
            raise ValueError(
                f"weights: expected one loss that contains MLE, got {', '.join(twice)}; "
                "name the bare penalties beside it, such as exmate_penalty"
            )
        self._try_options()

    def _try_options(self) -> None:
        """Calls every loss once on one token, so that wrong options raise here."""
        one = torch.zeros(1, 1, dtype=torch.float32, device="cpu")
        mask = torch.ones(1, 1, dtype=torch.bool, device="cpu")
        inputs = {
            **dict.fromkeys(("chosen", "rejected", "gold"), Responses(one, mask)),
            **dict.fromkeys(("logsumexp", "mean_logits"), one),
            **dict.fromkeys(("chosen_divergences", "rejected_divergences"), one),
            **dict.fromkeys(("reference_point", "reward_shift"), one[0, 0]),
            **{"candidates": one[None], "candidate_mask": mask[None]},
        }
        self._terms(inputs)

    def _contains_mle(self, name: str) -> bool:
        """Whether a loss contains MLE with the options that it is given."""
        return name in CONTAIN_MLE and self._options[name].get("nll_weight", 1.0) != 0

    def extra_repr(self) -> str:
        """Shows the weights and options."""
        options = "".join(f", {k}={v!r}" for k, v in self.options.items())
        return f"{self.weights}{options}"

    def needs(self, name: str) -> bool:
        """Returns whether any of the losses must have the input of `forward` with this name."""
        return any(wanted.get(name, False) for wanted in self._inputs.values())

    def takes(self, name: str) -> bool:
        """Returns whether any of the losses has an input of this name, needed or not."""
        return any(name in wanted for wanted in self._inputs.values())

    def options_of(self, name: str) -> dict[str, Any]:
        """Returns all options of a loss of the mixture: those that it is given, and defaults."""
        return defaults_of(FORMULAS[name]) | self._options[name]

    def inputs_of(self, name: str) -> frozenset[str]:
        """Returns the names of the inputs that a loss of the mixture takes."""
        return frozenset(self._inputs[name])

    @property
    def splits(self) -> bool:
        """Whether micro-batches can share a step's divisors: not one mean of it, then one power."""
        norms = [self.options_of(name).get("norm") for name in self.weights]
        return "batch_token_mean" not in norms

    def weights_at(self, progress: float) -> dict[str, float]:
        """Returns the weights when a share of the run, in [0, 1], is done."""
        progress = number("progress", progress)
        if progress > 1:
            raise ValueError(f"progress: expected a value in [0, 1], got {progress}")
        return {
            name: number(f"weights[{name!r}]", weight(progress) if callable(weight) else weight)
            for name, weight in self.weights.items()
        }

    def forward(
        self,
        chosen: Responses,
        rejected: Responses | None = None,
        ref_chosen_logps: Tensor | None = None,
        ref_rejected_logps: Tensor | None = None,
        *,
        progress: float = 0.0,
        **inputs: Responses | Tensor | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss and its metrics.

        The metrics are made without reading the device. Means are over this call's responses or
        pairs:

        - "loss/NAME": each loss named, before its weight.
        - "logps/chosen", "logps/rejected": mean log P of a response.
        - "pairs/margins", "pairs/accuracies": mean log P⁺ - log P⁻, and how often it is > 0.
          Only with as many chosen as rejected responses: the i-th against the i-th.
        - "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies": the same of
          the reward β (S - S_ref), with the β of the first loss that takes a reference. Only with
          such a loss; the last two as above.
        - "gradients/chosen", "gradients/rejected": shares, in [0, 1], of Σ ‖∂L/∂z_t‖₁ = 2 Σ |g_t|
          that fall on chosen and on rejected labels, from one more forward and a backward of these
          formulas on the log-odds alone; the rows of logits are not visited. 0 both where no
          gradient is. A row in both counts in both; candidates and gold responses count in neither.

        Args:
            chosen (Responses): the responses to reward.
            rejected (Responses | None): those to penalise. None: for losses on the chosen side
                alone.
            ref_chosen_logps (Tensor | None): as in `dpo_loss`.
            ref_rejected_logps (Tensor | None): as in `dpo_loss`.
            progress (float): how much of the run is done, in [0, 1], for weights that follow it.
            **inputs (Responses | Tensor | None): what else the losses named take, by the names of
                their parameters: `candidates` and `candidate_mask`, `gold`, `pair_weights`,
                `reference_point`, `reward_shift`, `logsumexp` and `mean_logits`,
                `chosen_divergences` and `rejected_divergences`.

        Returns:
            tuple[Tensor, dict[str, Tensor]]: the loss, a scalar, and its metrics, detached scalars.

        Raises:
            TypeError, ValueError: those of the losses; an input that one needs is None; one that
                none of them takes, but for the reference and candidates.
        """
        self._check_taken(inputs)
        given = {
            "chosen": chosen,
            "rejected": rejected,
            "ref_chosen_logps": ref_chosen_logps,
            "ref_rejected_logps": ref_rejected_logps,
            **inputs,
        }
        weights = self.weights_at(progress)
        terms = self._terms(given)
        loss = _total(weights, terms)
        metrics = {f"loss/{name}": term.detach() for name, term in terms.items()}
        with torch.no_grad():
            metrics |= self._sides(chosen, rejected, ref_chosen_logps, ref_rejected_logps)
        metrics |= self._gradient_shares(chosen, rejected, given, weights)
        return loss, metrics

    def _check_taken(self, inputs: Mapping[str, object]) -> None:
        """Raises for an input that no loss of the mixture takes."""
        for name, value in inputs.items():
            if not self.takes(name) and (value is not None and name not in _UNUSED):
                known = {k for wanted in self._inputs.values() for k in wanted}
                names = ", ".join(sorted(known))
                raise ValueError(
                    f"{name}: expected inputs of {', '.join(self.weights)}, which take {names}; "
                    f"got {shown(value)}{nearest([name], known)}"
                )

    def _terms(self, inputs: Mapping[str, object]) -> dict[str, Tensor]:
        """Returns each loss before its weight."""
        terms = {}
        for name, wanted in self._inputs.items():
            missing = [k for k, must in wanted.items() if must and inputs.get(k) is None]
            if missing:
                raise ValueError(f"{missing[0]}: expected it for the loss {name}, got None")
            own = {k: inputs.get(k) for k in wanted}
            terms[name] = FORMULAS[name](**own, **self._options[name])
        return terms

    def _sides(
        self,
        chosen: Responses,
        rejected: Responses | None,
        ref_chosen_logps: Tensor | None,
        ref_rejected_logps: Tensor | None,
    ) -> dict[str, Tensor]:
        """Returns the metrics of log-probabilities, pairs and rewards."""
        g = checked("chosen", chosen)
        metrics = {"logps/chosen": mean_of(g.logps(), g.lengths > 0, g.dtype)}
        if rejected is None:
            return metrics
        b = checked("rejected", rejected)
        metrics["logps/rejected"] = mean_of(b.logps(), b.lengths > 0, b.dtype)
        if g.size == b.size:
            metrics |= _compare("pairs", g, b, g.logps(), b.logps())
        beta = self._beta()
        if beta is not None:
            of_chosen = beta * (g.logps() - reference("ref_chosen_logps", g, ref_chosen_logps))
            of_rejected = beta * (
                b.logps() - reference("ref_rejected_logps", b, ref_rejected_logps)
            )
            metrics["rewards/chosen"] = mean_of(of_chosen, g.lengths > 0, g.dtype)
            metrics["rewards/rejected"] = mean_of(of_rejected, b.lengths > 0, b.dtype)
            if g.size == b.size:
                metrics |= _compare("rewards", g, b, of_chosen, of_rejected)
        return metrics

    def _beta(self) -> float | None:
        """Returns β of the first loss with a reference, None without one."""
        for name, wanted in self._inputs.items():
            if "ref_chosen_logps" in wanted:
                return float(self.options_of(name)["beta"])
        return None

    def _gradient_shares(
        self,
        chosen: Responses,
        rejected: Responses | None,
        inputs: Mapping[str, object],
        weights: Mapping[str, float],
    ) -> dict[str, Tensor]:
        """Returns each side's share of Σ |g_t|, by the gradient in the log-odds."""
        sides = {"chosen": chosen} if rejected is None else {"chosen": chosen, "rejected": rejected}

        def loss_of(log_odds: Mapping[str, Tensor]) -> Tensor:
            moved = {k: _at(log_odds[k], side) for k, side in sides.items()}
            return _total(weights, self._terms({**inputs, **moved}))

        points = {k: accumulated(k, side.log_odds).detach() for k, side in sides.items()}
        with torch.inference_mode(False):  # inside inference mode torch 2.8 makes zeros
            slopes = torch.func.grad(loss_of)(points)
        masses = {k: g.abs().sum() for k, g in slopes.items()}
        total = torch.stack(list(masses.values())).sum()
        return {f"gradients/{k}": m / torch.where(total > 0, total, 1) for k, m in masses.items()}


def _total(weights: Mapping[str, float], terms: Mapping[str, Tensor]) -> Tensor:
    """Returns the weighted sum."""
    return torch.stack([weight * terms[name] for name, weight in weights.items()]).sum()


def _at(log_odds: Tensor, side: Responses) -> Responses:
    """A side at other log-odds; `_replace` and slices of a side break torch 2.8's compiler."""
    _, mask, segments, size, tokens, sequences = side
    return Responses(log_odds, mask, segments, size, tokens, sequences)


def _compare(name: str, g: Rows, b: Rows, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Returns by how much and how often the chosen response of a pair is ahead."""
    pairs = g.lengths + b.lengths > 0
    return {
        f"{name}/margins": mean_of(x - y, pairs, g.dtype),
        f"{name}/accuracies": mean_of((x > y).double(), pairs, g.dtype),
    }
