"""Vector fields: where gradient descent moves the probabilities under each loss.

The descent is on logits, one row for each distinct context, and the arrows are the velocities of
the probabilities, `dP/dt = -Σ ∂P/∂z ∂L/∂z`, all from `analytic_gradients`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from fastadapt.losses import Responses, RewardPenalizeLoss
from fastadapt.study.gradients.named_losses import LOSSES
from fastadapt.tracking.gradients import analytic_gradients, logit

BETA = 0.3
GRID = 11
DPI = 160
_CORNERS = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(3) / 2]], dtype=torch.float64)


class Field(NamedTuple):
    """Points and velocities in the plane, (n, 2) each."""

    points: Tensor
    velocities: Tensor


def plane_field(weights: Mapping[str, float]) -> Field:
    """Returns the motion of (P⁺, P⁻) for two one-token responses in separate contexts.

    A row of its own has dm = -∂L/∂m up to the share of the other entries, so the velocity is
    `dP/dt = -P (1-P) ∂L/∂m`.
    """
    line = torch.linspace(0.04, 0.96, GRID, dtype=torch.float64)
    points = torch.cartesian_prod(line, line)
    chosen, rejected = _slopes(weights, points)
    slopes = torch.stack([chosen, rejected], -1)
    return Field(points, -points * (1 - points) * slopes)


def simplex_field(weights: Mapping[str, float]) -> Field:
    """Returns the motion of (p⁺, p⁻, other) in one row of logits, in the plane of the triangle.

    Chosen and rejected token stand in the same context. With c = -∂L/∂l the row's gradient is
    `Σ c (s - onehot)` and the velocity of s is minus its image under the softmax's Jacobian.
    """
    n = GRID - 1
    shares = [
        (i / n, j / n, (n - i - j) / n)
        for i in range(1, n)
        for j in range(1, n - i)
        if n - i - j > 0
    ]
    s = torch.tensor(shares, dtype=torch.float64)
    log_odds = logit(s[:, :2])
    chosen, rejected = _slopes(weights, torch.sigmoid(log_odds), of="logp")
    onehot = torch.eye(3, dtype=torch.float64)
    gradient = chosen[:, None] * (onehot[0] - s) + rejected[:, None] * (onehot[1] - s)
    velocity = -(s * gradient - s * (s * gradient).sum(-1, keepdim=True))
    return Field(s @ _CORNERS, velocity @ _CORNERS)


def draw_plane(path: Path) -> None:
    """Draws the (P⁺, P⁻) plane with the field of each loss."""
    figure, axes = _axes(3.1)
    for axis, (name, weights) in zip(axes, LOSSES.items(), strict=True):
        _quiver(axis, plane_field(weights))
        axis.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
        axis.set_title(name, fontsize=10)
        axis.set_xticks([0, 0.5, 1])
        axis.set_yticks([0, 0.5, 1])
        axis.tick_params(labelsize=8)
    for axis in axes[3:]:
        axis.set_xlabel("$P^+$")
    for axis in (axes[0], axes[3]):
        axis.set_ylabel("$P^-$")
    figure.savefig(path, dpi=DPI, metadata={"Software": None})


def draw_simplex(path: Path) -> None:
    """Draws the triangle of y⁺, y⁻ and all other classes with the field of each loss."""
    figure, axes = _axes(3.0)
    for axis, (name, weights) in zip(axes, LOSSES.items(), strict=True):
        _quiver(axis, simplex_field(weights))
        corners = [*_CORNERS.tolist(), _CORNERS[0].tolist()]
        axis.plot(*zip(*corners, strict=True), color="black", lw=1)
        for (x, y), text, place in zip(
            _CORNERS.tolist(),
            ("$y^+$", "$y^-$", "other"),
            ((-0.02, -0.09), (0.02, -0.09), (0, 0.04)),
            strict=True,
        ):
            axis.text(x + place[0], y + place[1], text, ha="center", fontsize=10)
        axis.set(xlim=(-0.12, 1.12), ylim=(-0.13, 1.0), aspect="equal")
        axis.set_title(name, fontsize=10)
        axis.axis("off")
    figure.savefig(path, dpi=DPI, metadata={"Software": None})


def _slopes(
    weights: Mapping[str, float], points: Tensor, *, of: str = "log_odds"
) -> tuple[Tensor, Tensor]:
    """Returns ∂L/∂m or ∂L/∂l of both responses at points (P⁺, P⁻), each a pair of its own."""
    mask = torch.ones(len(points), 1, dtype=torch.bool)
    chosen, rejected = (Responses(p[:, None], mask) for p in points.unbind(-1))
    objective = RewardPenalizeLoss(weights, **({"beta": BETA} if "dpo" in weights else {}))
    found = analytic_gradients(objective, chosen, rejected, given="probabilities")
    # the losses are means over the points
    sides = [len(points) * getattr(found[side], of)[:, 0] for side in ("chosen", "rejected")]
    return sides[0], sides[1]


def _axes(height: float) -> tuple[Figure, list[Axes]]:
    """Returns six axes in two rows."""
    figure = Figure(figsize=(9.6, 2 * height), layout="constrained")
    axes = figure.subplots(2, 3)
    return figure, list(axes.flat)


def _quiver(axis: Axes, field: Field) -> None:
    """Draws arrows of nearly equal length, darker where faster (logarithmic)."""
    speed = field.velocities.norm(dim=-1).clamp(min=1e-12)
    longest = float(speed.max())
    shade = 1 + (speed / longest).log10().clamp(min=-2) / 2  # two decades
    length = 0.075 * (0.35 + 0.65 * shade)
    arrows = field.velocities / speed[:, None] * length[:, None]
    axis.quiver(
        *field.points.T.tolist(),
        *arrows.T.tolist(),
        (0.3 + 0.7 * shade).tolist(),
        cmap="Greys",
        clim=(0, 1),
        angles="xy",
        scale_units="xy",
        scale=1,
        pivot="mid",
        width=0.006,
        headwidth=4.5,
    )
