"""Losses of a pair's margin over a reference: DPO and those that bend or bound its logistic loss.

Notation as in `rows.py`: u = β Δ, or β times the gap of other scores than r with `f_divergence`.
Where a loss is a function of u alone, ∂L/∂S⁺ = -∂L/∂S⁻ = β L'(u) per pair, and rows that both
responses share, the same tokens after the same prompt, get a gradient of exactly 0.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastadapt._ops.checks import flag, number
from fastadapt.losses.responses import Responses
from fastadapt.losses.rows import pairs_of
from fastadapt.losses.scores import logistic, margin, probability, smoothing_of


def dpo_loss(
    chosen: Responses,
    rejected: Responses,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    pair_weights: Tensor | None = None,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    f_divergence: str = "reverse_kl",
    f_alpha: float = 0.5,
    ld_alpha: float | None = None,
) -> Tensor:
    """Returns DPO, the mean over pairs of `-log σ(u)`, u = β [(S⁺ - S⁺_ref) - (S⁻ - S⁻_ref)].

    Rafailov et al. 2023, arXiv 2305.18290, eq. 7; "sigmoid" in trl. Per pair ∂L/∂S⁺ = -β σ(-u).

    Examples:
        >>> mask = torch.tensor([[True, True]])
        >>> chosen = Responses(torch.tensor([[0.0, 2.0]]), mask)
        >>> rejected = Responses(torch.tensor([[0.0, -2.0]]), mask)
        >>> dpo_loss(chosen, rejected, beta=0.1)
        tensor(0.5981)
        >>> dpo_loss(chosen, rejected, torch.tensor([-1.0]), torch.tensor([-2.0]))
        tensor(0.6444)

    Args:
        chosen (Responses): the chosen responses, B of them; see there for layouts and dtypes. The
            mean divides by `chosen.total_sequences`, by default the pairs with any token.
        rejected (Responses): the rejected ones, as many, with the same `total_sequences`.
        ref_chosen_logps (Tensor | None): (B,), a float dtype; the reference model's
            `sequence_logps(chosen)`, held constant. None, both: reference-free, as if the two were
            equal.
        ref_rejected_logps (Tensor | None): the same for `rejected`.
        pair_weights (Tensor | None): (B,), a float dtype; what the loss of each pair is multiplied
            by, held constant, such as `wpo_weights`.
        beta (float): > 0.
        label_smoothing (float): 0: `cdpo_loss` and `robust_loss` have one.
        f_divergence (str): whose penalty the margin comes from (f-DPO, Wang et al. 2023, arXiv
            2309.16240): "reverse_kl"; "forward_kl", "js_divergence" and "alpha_divergence" take
            1 - e^-r, log 2 + log σ(r) and (e^(r(a-1)) - 1) / (a-1) in the place of r = S - S_ref.
            ∂L/∂S is multiplied by the slope, e^-r, σ(-r) and e^(r(a-1)).
        f_alpha (float): a of "alpha_divergence".
        ld_alpha (float | None): LD-DPO (Liu et al. 2024, arXiv 2409.06411): tokens beyond the
            shorter response's length count this often, in [0, 1], in S; so they must in S_ref
            (`desensitized_logps`). None: 1.

    Returns:
        Tensor: a scalar, float32 (float64 for float64 log-odds); 0 with a graph if no token counts.

    Raises:
        TypeError, ValueError: as `mle_loss`; unequal numbers of responses, one reference without
            the other, an option of another type or out of range.
    """
    if number("label_smoothing", label_smoothing) != 0:
        raise ValueError(
            f"label_smoothing: expected 0 for dpo, got {label_smoothing}; the conservative DPO is "
            "cdpo, and robust has it too"
        )
    pairs = pairs_of(chosen, rejected)
    ratios = pairs.ratios(ref_chosen_logps, ref_rejected_logps, ld_alpha)
    u = margin(ratios, beta, f_divergence, f_alpha)
    return pairs.mean(logistic(u), pair_weights)


def cdpo_loss(
    chosen: Responses,
    rejected: Responses,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    pair_weights: Tensor | None = None,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.1,
    f_divergence: str = "reverse_kl",
    f_alpha: float = 0.5,
    ld_alpha: float | None = None,
) -> Tensor:
    """Returns the conservative DPO, `-(1-ε) log σ(u) - ε log σ(-u)`, ε in [0, 1/2).

    As in the DPO authors' code: a share ε of the pairs is taken for swapped. Per pair ∂L/∂S⁺ = -β
    [σ(-u) - ε]: it vanishes at the margin log (1-ε)/ε. Arguments as `dpo_loss`.

    Examples:
        >>> mask = torch.tensor([[True, True]])
        >>> chosen = Responses(torch.tensor([[0.0, 2.0]]), mask)
        >>> rejected = Responses(torch.tensor([[0.0, -2.0]]), mask)
        >>> cdpo_loss(chosen, rejected, label_smoothing=0.2)
        tensor(0.6381)
    """
    share = smoothing_of(label_smoothing)
    pairs = pairs_of(chosen, rejected)
    ratios = pairs.ratios(ref_chosen_logps, ref_rejected_logps, ld_alpha)
    u = margin(ratios, beta, f_divergence, f_alpha)
    return pairs.mean(logistic(u, share), pair_weights)


def robust_loss(
    chosen: Responses,
    rejected: Responses,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    pair_weights: Tensor | None = None,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    f_divergence: str = "reverse_kl",
    f_alpha: float = 0.5,
    ld_alpha: float | None = None,
) -> Tensor:
    """Returns the robust DPO, `[-(1-ε) log σ(u) + ε log σ(-u)] / (1-2ε)`, ε in [0, 1/2).

    Chowdhury et al. 2024, arXiv 2403.00409: unbiased where a share ε of the pairs is swapped. It is
    not bounded below. Per pair ∂L/∂S⁺ = -β [(1-ε) σ(-u) + ε σ(u)] / (1-2ε). Arguments as
    `dpo_loss`.

    Examples:
        >>> mask = torch.tensor([[True, True]])
        >>> chosen = Responses(torch.tensor([[0.0, 2.0]]), mask)
        >>> rejected = Responses(torch.tensor([[0.0, -2.0]]), mask)
        >>> robust_loss(chosen, rejected, label_smoothing=0.2)
        tensor(0.5315)
    """
    share = smoothing_of(label_smoothing)
    pairs = pairs_of(chosen, rejected)
    ratios = pairs.ratios(ref_chosen_logps, ref_rejected_logps, ld_alpha)
    u = margin(ratios, beta, f_divergence, f_alpha)
    losses = ((1 - share) * logistic(u) - share * logistic(-u)) / (1 - 2 * share)
    return pairs.mean(losses, pair_weights)


def hinge_loss(
    chosen: Responses,
    rejected: Responses,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    pair_weights: Tensor | None = None,
    *,
    beta: float = 0.1,
    f_divergence: str = "reverse_kl",
    f_alpha: float = 0.5,
    ld_alpha: float | None = None,
) -> Tensor:
    """Returns the hinge of the margin, `max(0, 1 - u)`.

    The normalised likelihood ratio's loss of RSO (Liu et al. 2023, arXiv 2309.06657, eq. 11);
    `slic_loss` is the one without a reference. Per pair ∂L/∂S⁺ = -β where u < 1. Arguments as
    `dpo_loss`.

    Examples:
        >>> mask = torch.tensor([[True, True]])
        >>> chosen = Responses(torch.tensor([[0.0, 2.0]]), mask)
        >>> rejected = Responses(torch.tensor([[0.0, -2.0]]), mask)
        >>> hinge_loss(chosen, rejected)
        tensor(0.8000)
    """
    pairs = pairs_of(chosen, rejected)
    ratios = pairs.ratios(ref_chosen_logps, ref_rejected_logps, ld_alpha)
    u = margin(ratios, beta, f_divergence, f_alpha)
    return pairs.mean(torch.relu(1 - u), pair_weights)


def ipo_loss(
    chosen: Responses,
    rejected: Responses,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    pair_weights: Tensor | None = None,
    *,
    beta: float = 0.1,
    length_normalized: bool = True,
    f_divergence: str = "reverse_kl",
    f_alpha: float = 0.5,
    ld_alpha: float | None = None,
) -> Tensor:
    """Returns IPO, `(r⁺/T⁺ - r⁻/T⁻ - 1/(2β))²`.

    Azar et al. 2023, arXiv 2310.12036, eq. 17, whose τ is β, on token averages, as its authors and
    trl have it; sums with `length_normalized=False`. Per pair ∂L/∂S⁺ = 2 (· - 1/(2β)) / T⁺: the
    margin is pulled to 1/(2β) from both sides. Arguments as `dpo_loss`.

    Examples:
        >>> mask = torch.tensor([[True, True]])
        >>> chosen = Responses(torch.tensor([[0.0, 2.0]]), mask)
        >>> rejected = Responses(torch.tensor([[0.0, -2.0]]), mask)
        >>> ipo_loss(chosen, rejected)
        tensor(16.)
    """
    flag("length_normalized", length_normalized)
    beta = number("beta", beta, positive=True)
    pairs = pairs_of(chosen, rejected)
    ratios = pairs.ratios(ref_chosen_logps, ref_rejected_logps, ld_alpha)
    lengths = pairs.lengths if length_normalized else None
    gap = margin(ratios, 1.0, f_divergence, f_alpha, lengths)
    return pairs.mean((gap - 1 / (2 * beta)).square(), pair_weights)


def sigmoid_norm_loss(
    chosen: Responses,
    rejected: Responses,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    pair_weights: Tensor | None = None,
    *,
    beta: float = 0.1,
    f_divergence: str = "reverse_kl",
    f_alpha: float = 0.5,
    ld_alpha: float | None = None,
) -> Tensor:
    """Returns the length-normalised DPO, `-log σ(β (r⁺/T⁺ - r⁻/T⁻))`.

    Tülu 3 (Lambert et al. 2024, arXiv 2411.15124, eq. 6), which has β = 5. Per pair ∂L/∂S⁺ = -β
    σ(-u) / T⁺: a shared row has a gradient where the lengths differ. Arguments as `dpo_loss`.

    Examples:
        >>> mask = torch.tensor([[True, True]])
        >>> chosen = Responses(torch.tensor([[0.0, 2.0]]), mask)
        >>> rejected = Responses(torch.tensor([[0.0, -2.0]]), mask)
        >>> sigmoid_norm_loss(chosen, rejected, beta=5.0)
        tensor(0.0067)
    """
    pairs = pairs_of(chosen, rejected)
    ratios = pairs.ratios(ref_chosen_logps, ref_rejected_logps, ld_alpha)
    u = margin(ratios, beta, f_divergence, f_alpha, pairs.lengths)
    return pairs.mean(logistic(u), pair_weights)


def exo_pair_loss(
    chosen: Responses,
    rejected: Responses,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    pair_weights: Tensor | None = None,
    *,
    beta: float = 0.1,
    label_smoothing: float = 1e-3,
    f_divergence: str = "reverse_kl",
    f_alpha: float = 0.5,
    ld_alpha: float | None = None,
) -> Tensor:
    """Returns EXO of pairs, `σ(u) log(σ(u)/(1-ε)) + σ(-u) log(σ(-u)/ε)`, ε in (0, 1/2).

    Ji et al. 2024, arXiv 2402.00856, eq. 16: the KL divergence from the preference of the policy to
    that of the data, 1-ε and ε. Per pair ∂L/∂S⁺ = β σ(u) σ(-u) [u - log (1-ε)/ε]: it fades at both
    ends. Arguments as `dpo_loss`.

    Examples:
        >>> mask = torch.tensor([[True, True]])
        >>> chosen = Responses(torch.tensor([[0.0, 2.0]]), mask)
        >>> rejected = Responses(torch.tensor([[0.0, -2.0]]), mask)
        >>> exo_pair_loss(chosen, rejected, label_smoothing=0.1)
        tensor(0.4063)
    """
    share = smoothing_of(label_smoothing, positive=True)
    pairs = pairs_of(chosen, rejected)
    ratios = pairs.ratios(ref_chosen_logps, ref_rejected_logps, ld_alpha)
    u = margin(ratios, beta, f_divergence, f_alpha)
    right = probability(u) * (F.logsigmoid(u) - math.log1p(-share))
    swapped = probability(-u) * (F.logsigmoid(-u) - math.log(share))
    return pairs.mean(right + swapped, pair_weights)


def discopop_loss(
    chosen: Responses,
    rejected: Responses,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    pair_weights: Tensor | None = None,
    *,
    beta: float = 0.1,
    discopop_tau: float = 0.05,
    f_divergence: str = "reverse_kl",
    f_alpha: float = 0.5,
    ld_alpha: float | None = None,
) -> Tensor:
    """Returns DiscoPOP, `-(1-w) log σ(u) + w e^-u` with w = σ(u/τ).

    Lu et al. 2024, arXiv 2406.08414, eq. 5. Per pair ∂L/∂S⁺ = β [-(1-w) σ(-u) - w e^-u + w (1-w)
    (e^-u + log σ(u)) / τ]. It is not monotonic. trl has NaN below u = -88, where w e^-u is 0 times
    infinity in float32; it is 0. Arguments as `dpo_loss`.

    Examples:
        >>> mask = torch.tensor([[True, True]])
        >>> chosen = Responses(torch.tensor([[0.0, 2.0]]), mask)
        >>> rejected = Responses(torch.tensor([[0.0, -2.0]]), mask)
        >>> discopop_loss(chosen, rejected)
        tensor(0.8148)
    """
    tau = number("discopop_tau", discopop_tau, positive=True)
    pairs = pairs_of(chosen, rejected)
    ratios = pairs.ratios(ref_chosen_logps, ref_rejected_logps, ld_alpha)
    u = margin(ratios, beta, f_divergence, f_alpha)
    exponential = torch.exp(F.logsigmoid(u / tau) - u)
    losses = probability(-u / tau) * logistic(u) + exponential
    return pairs.mean(losses, pair_weights)
