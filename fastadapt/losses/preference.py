"""Direct preference optimisation: chosen against rejected responses, pair by pair."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastadapt._ops.checks import flag, number, one_of
from fastadapt.losses.responses import Responses, Rows, checked

DPO_LOSS_TYPES = ("sigmoid", "hinge", "ipo", "robust")
_SMOOTHED = ("sigmoid", "robust")


def dpo_loss(
    chosen: Responses,
    rejected: Responses,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    length_normalized: bool = False,
) -> Tensor:
    """Returns the mean over pairs of a loss of `u = β [(S⁺ - S⁺_ref) - (S⁻ - S⁻_ref)]`.

    S is log P of a response, pair i the i-th chosen and the i-th rejected one, ε the label
    smoothing.

    - "sigmoid": `-log σ(u)` (Rafailov et al. 2023, arXiv 2305.18290, eq. 7), or with ε
      `-(1-ε) log σ(u) - ε log σ(-u)`, as in the authors' code ("conservative DPO"). Per pair
      ∂L/∂S⁺ = -∂L/∂S⁻ = -k, k = β [(1-ε) σ(-u) - ε σ(u)].
    - "hinge": `max(0, 1 - u)` (SLiC, Zhao et al. 2023, arXiv 2305.10425, as in trl).
    - "ipo": `(u/β - 1/(2β))²` (Azar et al. 2023, arXiv 2310.12036, eq. 17); trl's is that with
      `length_normalized=True`.
    - "robust": `[-(1-ε) log σ(u) + ε log σ(-u)] / (1-2ε)` (Chowdhury et al. 2024, arXiv
      2403.00409), unbiased where a share ε of the pairs is swapped.

    Rows that both responses of a pair share, the same tokens after the same prompt, get a gradient
    of exactly 0, but for `length_normalized` with unequal lengths.

    Examples:
        >>> mask = torch.tensor([[True, True]])
        >>> chosen = Responses(torch.tensor([[0.0, 2.0]]), mask)
        >>> rejected = Responses(torch.tensor([[0.0, -2.0]]), mask)
        >>> dpo_loss(chosen, rejected, beta=0.1)
        tensor(0.5981)
        >>> dpo_loss(chosen, rejected, torch.tensor([-1.0]), torch.tensor([-2.0]), loss_type="ipo")
        tensor(16.)

    Args:
        chosen (Responses): the chosen responses, B of them; see there for layouts and dtypes. The
            mean divides by `chosen.total_sequences`, by default the pairs with any token.
        rejected (Responses): the rejected ones, as many, with the same `total_sequences`.
        ref_chosen_logps (Tensor | None): (B,), a float dtype; the reference model's
            `sequence_logps(chosen)`, held constant. None, both: reference-free, as if the two were
            equal.
        ref_rejected_logps (Tensor | None): the same for `rejected`.
        beta (float): > 0.
        loss_type (str): as above.
        label_smoothing (float): ε in [0, 0.5); 0 for "hinge" and "ipo".
        length_normalized (bool): divide S and S_ref by the response's number of tokens.

    Returns:
        Tensor: a scalar, float32 (float64 for float64 log-odds); 0 with a graph if no token counts.

    Raises:
        TypeError, ValueError: as `mle_loss`; unequal numbers of responses, one reference without
            the other, an option of another type or out of range.
    """
    one_of("loss_type", loss_type, DPO_LOSS_TYPES)
    beta = number("beta", beta, positive=True)
    label_smoothing = number("label_smoothing", label_smoothing)
    flag("length_normalized", length_normalized)
    limit = 0.5 if loss_type in _SMOOTHED else 0.0
    if label_smoothing != 0 and label_smoothing >= limit:
        expected = "a value in [0, 0.5)" if limit else f"0 for {loss_type}"
        raise ValueError(f"label_smoothing: expected {expected}, got {label_smoothing}")
    g, b = checked("chosen", chosen), checked("rejected", rejected)
    if (chosen.total_sequences is None) != (rejected.total_sequences is None):
        raise ValueError("total_sequences: expected it for both sides or for none, got one")
    if g.size != b.size:
        raise ValueError(f"rejected: expected {g.size} responses, as many as chosen, got {b.size}")
    if (ref_chosen_logps is None) != (ref_rejected_logps is None):
        raise ValueError("ref_chosen_logps, ref_rejected_logps: expected both or none, got one")
    delta = log_ratios("ref_chosen_logps", g, ref_chosen_logps, mean=length_normalized)
    delta = delta - log_ratios("ref_rejected_logps", b, ref_rejected_logps, mean=length_normalized)
    losses = _pair_losses(beta, loss_type, label_smoothing, delta)
    pairs = g.lengths + b.lengths > 0
    count = pairs.sum().clamp(min=1) if chosen.total_sequences is None else g.sequences
    return torch.where(pairs, losses, 0).sum() / count


def log_ratios(name: str, rows: Rows, ref_logps: Tensor | None, *, mean: bool = False) -> Tensor:
    """Returns S - S_ref, (B,), S without a reference; divided by the length on request."""
    ratios = rows.logps()
    if ref_logps is not None:
        if not isinstance(ref_logps, Tensor) or not ref_logps.is_floating_point():
            got = ref_logps.dtype if isinstance(ref_logps, Tensor) else type(ref_logps).__name__
            raise TypeError(f"{name}: expected a float tensor, got {got}")
        if ref_logps.shape != (rows.size,):
            raise ValueError(f"{name}: expected ({rows.size},), got {tuple(ref_logps.shape)}")
        if ref_logps.device != rows.log_odds.device:
            expected = f"expected device {rows.log_odds.device}"
            raise ValueError(f"{name}: {expected}, got {ref_logps.device}")
        ratios = ratios - ref_logps.detach().to(ratios.dtype)
    return ratios / rows.lengths.clamp(min=1) if mean else ratios


def _pair_losses(beta: float, loss_type: str, smoothing: float, delta: Tensor) -> Tensor:
    """Returns the loss of each pair, (B,), for u = beta * delta."""
    u = beta * delta
    if loss_type == "hinge":
        return torch.relu(1 - u)
    if loss_type == "ipo":
        return (delta - 1 / (2 * beta)).square()
    right, swapped = -F.logsigmoid(u), -F.logsigmoid(-u)
    if smoothing == 0:
        return right
    if loss_type == "sigmoid":
        return (1 - smoothing) * right + smoothing * swapped
    return ((1 - smoothing) * right - smoothing * swapped) / (1 - 2 * smoothing)
