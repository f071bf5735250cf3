"""What one step on a model's head does to each response, predicted from inner products.

The gradients of a head's label log-probabilities are outer products,
`∂l_t/∂W = d_t ⊗ h_t` with `d_t = (onehot(y_t) - s_t) dz/dx`, so that

    ⟨∇l_t, ∇l_u⟩ = (d_t·d_u) (h_t·h_u),

plus d_t·d_u for a bias. Of a head with LoRA, z = W h + s B A h, they are those of the adapter,
which is what is trained: with u_t = s Bᵀ d_t

    ⟨∇l_t, ∇l_u⟩ = (d_t·d_u) (s A h_t · s A h_u) + (u_t·u_u) (h_t·h_u).

The factor d_t·d_u is added up over tiles of the vocabulary: logits (N, V)
are never held. From the matrix of these products over the tokens of a pair follows, to first order
in the step size, the change of log P of each response under any loss of `fastadapt.losses`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastadapt.linear import linear_log_odds
from fastadapt.training.head import Head
from fastadapt.training.pairs import IGNORED

TILE = 2048  # ids whose logits are held at once


class Displacement(NamedTuple):
    """Inner products of the gradients of log P of pairs, in the parameters of the head, or of LoRA.

    Attributes:
        chosen: (B,), float64; ‖∇S⁺‖².
        rejected: (B,); ‖∇S⁻‖².
        cross: (B,); ⟨∇S⁺, ∇S⁻⟩.
    """

    chosen: Tensor
    rejected: Tensor
    cross: Tensor

    @property
    def rho(self) -> Tensor:
        """(B,): ρ = ⟨∇S⁺, ∇S⁻⟩ / ‖∇S⁺‖²; NaN where the chosen response has no gradient."""
        return self.cross / self.chosen

    @property
    def flagged(self) -> Tensor:
        """(B,), bool; ρ > 1, where a small step of DPO lowers both probabilities.

        DPO steps along k (∇S⁺ - ∇S⁻), so ΔS⁺ = ηk ‖∇S⁺‖² (1 - ρ), negative for ρ > 1; by Cauchy and
        Schwarz ‖∇S⁻‖² >= ρ ⟨∇S⁺, ∇S⁻⟩, so that ΔS⁻ = ηk (⟨∇S⁺, ∇S⁻⟩ - ‖∇S⁻‖²) is negative too.
        """
        return self.rho > 1


@torch.no_grad()
def token_products(
    hidden: Tensor, labels: Tensor, head: Head, groups: list[Tensor]
) -> list[Tensor]:
    """Returns ⟨∇l_t, ∇l_u⟩ over the tokens of each group, in the parameters of the head.

    Of a head with LoRA they are those of A and B.

    Two products of N * H * V, as a forward pass that makes the logits twice, and of each group
    n² * V; beside them N tiles of 2048 logits and of each group n² numbers are held.

    Args:
        hidden (Tensor): (N, H), a float dtype; what the head reads before label t. It is cast to
            that of the head, and autocast is off.
        labels (Tensor): (N,), int64, ids in [0, V).
        head (Head): as `fastadapt.training.head_check.head_of` returns it.
        groups (list[Tensor]): places (n,) in [0, N), int64, of the tokens of each group, such as a
            chosen and a rejected response.

    Returns:
        list[Tensor]: (n, n) each, float64, in the order of the group.

    Raises:
        TypeError, ValueError: those of `linear_log_odds`.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        return _products(hidden.to(head.weight.dtype), labels, head, groups)


def _products(hidden: Tensor, labels: Tensor, head: Head, groups: list[Tensor]) -> list[Tensor]:
    """Computes these products in the dtype of the head."""
    _, lse = linear_log_odds(
        hidden,
        head.weight,
        labels,
        head.bias,
        softcap=head.softcap,
        logit_scale=head.logit_scale,
        ignore_index=IGNORED,
        lora=head.lora,
        outputs=("logsumexp",),
    )
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    found = [hidden.new_zeros(len(g), len(g), dtype=torch.float64) for g in groups]
    none = hidden.new_empty(0, hidden.shape[1]), hidden.new_empty(head.weight.shape[0], 0), 1.0
    a, b, scale = none if head.lora is None else head.lora
    low = scale * torch.nn.functional.linear(hidden.to(a.dtype), a).to(wide)
    through = torch.zeros_like(low)  # s Bᵀ d
    for first in range(0, head.weight.shape[0], TILE):
        part = b[first : first + TILE].to(wide)
        z = (hidden @ head.weight[first : first + TILE].t()).to(wide) + low @ part.t()
        if head.bias is not None:
            z += head.bias[first : first + TILE]
        z *= head.logit_scale
        slope = None
        if head.softcap is not None:
            z = head.softcap * torch.tanh(z / head.softcap)
            slope = 1 - (z / head.softcap).square()
        d = -torch.exp(z - lse[:, None].to(wide))
        here = (labels >= first) & (labels < first + z.shape[1])
        rows = here.nonzero()[:, 0]
        d[rows, labels[rows] - first] += 1
        d *= head.logit_scale
        if slope is not None:
            d *= slope
        through += scale * (d @ part)
        for group, products in zip(groups, found, strict=True):
            own = d[group]
            products += own @ own.t()
    for group, products in zip(groups, found, strict=True):
        h, of_low, u = hidden[group].to(wide), low[group], through[group]
        if head.lora is None:
            products *= h @ h.t() + (head.bias is not None)
        else:
            products.mul_(of_low @ of_low.t()).add_((u @ u.t()) * (h @ h.t()))
    return found


def displacement(hidden: Tensor, labels: Tensor, head: Head) -> Displacement:
    """Returns the inner products ‖∇S⁺‖², ‖∇S⁻‖², ⟨∇S⁺, ∇S⁻⟩ of B pairs.

    Args:
        hidden (Tensor): (2B, T, H), the chosen responses before the rejected ones.
        labels (Tensor): (2B, T), int64; `IGNORED` where a position belongs to no response.
        head (Head): as in `token_products`.

    Returns:
        Displacement: with ρ and the pairs with ρ > 1.
    """
    rows = labels != IGNORED
    groups, sizes = [], []
    flat = rows.flatten().nonzero()[:, 0]
    order = torch.full((rows.numel(),), -1, device=rows.device)
    order[flat] = torch.arange(len(flat), device=rows.device)
    order = order.view_as(rows)
    for chosen, rejected in zip(*order.chunk(2), strict=True):
        chosen, rejected = chosen[chosen >= 0], rejected[rejected >= 0]
        groups.append(torch.cat([chosen, rejected]))
        sizes.append(len(chosen))
    products = token_products(hidden.flatten(0, 1)[flat], labels.flatten()[flat], head, groups)
    blocks = [
        (p[:n, :n].sum(), p[n:, n:].sum(), p[:n, n:].sum())
        for p, n in zip(products, sizes, strict=True)
    ]
    return Displacement(*(torch.stack(column) for column in zip(*blocks, strict=True)))


def predicted_change(products: Tensor, slopes: Tensor, step: float = 1.0) -> Tensor:
    """Returns the change of each token's log-probability by one gradient-descent step.

    To first order in the step: Δl_t = -η Σ_u ⟨∇l_t, ∇l_u⟩ ∂L/∂l_u. The change of log P of a
    response is the sum over its tokens.

    Args:
        products (Tensor): (n, n), of `token_products`.
        slopes (Tensor): (n,), ∂L/∂l of the same tokens, of `analytic_gradients`.
        step (float): the step size η.

    Returns:
        Tensor: (n,), float64, nats.
    """
    return -step * (products @ slopes.to(products.dtype))
