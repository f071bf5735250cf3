"""The table of coefficients, with the error of each row against autograd and differences.

A row states c_t = -∂L/∂l_t on chosen and on rejected tokens and g_t = ∂L/∂m_t on rejected ones as
expressions, which the tests evaluate; the errors printed are those of `analytic_gradients`, made
when the table is. So neither can drift from the code of the losses.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from fastadapt.losses import Responses
from fastadapt.study.gradients.check import GradientCheck, check_gradients
from fastadapt.study.gradients.named_losses import one_token

SEED = 0
PROBABILITIES = (1e-9, 1e-3, 0.5, 0.999, 1 - 1e-9)
OPTIONS = {"alpha": 0.7, "lambda": 0.6, "mu": 0.4, "beta": 0.3, "epsilon": 0.2}

SYMBOLS = """\
N, B, T: tokens and responses of that side, tokens of that response (of the chosen side for \
candidates); p, l = log p, m = log p/(1-p) \
of the token; S = Σ l, P = exp(S) of the response; L = Σ l / N over all rejected tokens; \
u = β [(S⁺ - S⁺ref) - (S⁻ - S⁻ref)], k = β σ(-u). c = -∂L/∂l, g = ∂L/∂m, and \
∂L/∂z = g (onehot(y) - q) = c (softmax(z) - onehot(y)). Phase: what must be known before the \
gradient of a token is: A nothing, B its row, C its response or pair, D the whole batch."""


class TableRow(NamedTuple):
    """One loss: weights, options, c of chosen and rejected tokens, g of rejected ones, phase."""

    name: str
    weights: Mapping[str, float]
    options: Mapping[str, Any]
    chosen: str
    rejected: str
    log_odds: str
    phase: str


A, LA, MU, BETA, EPS = OPTIONS.values()

ROWS = (
    TableRow("MLE, token mean", {"mle": 1}, {}, "1/N", "0", "0", "A"),
    TableRow("MLE, sum", {"mle": 1}, {"reduction": "sequence_sum"}, "1/B", "0", "0", "A"),
    TableRow(
        "MATE",
        {"mate": 1},
        {"coefficient": LA},
        "1/N",
        "-λ/N",
        "λ/N * σ(-m)",
        "A",
    ),
    TableRow(
        "unlikelihood, token",
        {"unlikelihood": 1},
        {"coefficient": A},
        "1/N",
        "-α/N * exp(m)",
        "α/N * σ(m)",
        "B",
    ),
    TableRow(
        "unlikelihood of candidates (in the place of rejected tokens)",
        {"mle": 1, "candidate_unlikelihood_penalty": A},
        {},
        "1/N",
        "-α/N * exp(m)",
        "α/N * σ(m)",
        "B",
    ),
    TableRow(
        "unlikelihood, sequence",
        {"mle": 1, "unlikelihood_penalty": A},
        {"level": "sequence"},
        "1/N",
        "-α/B / expm1(-S)",
        "α/B / expm1(-S) * σ(-m)",
        "C",
    ),
    TableRow(
        "unlikelihood, sequence mean",
        {"mle": 1, "unlikelihood_penalty": A},
        {"level": "sequence_mean"},
        "1/N",
        "-α/(B*T) / expm1(-S/T)",
        "α/(B*T) / expm1(-S/T) * σ(-m)",
        "C",
    ),
    TableRow(
        "ExMATE, token",
        {"exmate": 1},
        {"coefficient": LA, "norm": "token"},
        "1/N",
        "-λ/N * p",
        "λ/N * p * σ(-m)",
        "B",
    ),
    TableRow(
        "ExMATE, sequence mean",
        {"exmate": 1},
        {"coefficient": LA},
        "1/N",
        "-λ/(B*T) * exp(S/T)",
        "λ/(B*T) * exp(S/T) * σ(-m)",
        "C",
    ),
    TableRow(
        "ExMATE, sequence sum",
        {"exmate": 1},
        {"coefficient": LA, "norm": "sequence_sum"},
        "1/N",
        "-λ/B * P",
        "λ/B * P * σ(-m)",
        "C",
    ),
    TableRow(
        "ExMATE, published code",
        {"exmate": 1},
        {"coefficient": LA, "norm": "batch_token_mean"},
        "1/N",
        "-λ/N * exp(L)",
        "λ/N * exp(L) * σ(-m)",
        "D",
    ),
    TableRow("DPO", {"dpo": 1}, {"beta": BETA}, "k/B", "-k/B", "k/B * σ(-m)", "C"),
    TableRow(
        "DPO, length-normalised",
        {"dpo": 1},
        {"beta": BETA, "length_normalized": True},
        "k/(B*T)",
        "-k/(B*T)",
        "k/(B*T) * σ(-m)",
        "C",
    ),
    TableRow(
        "DPO, conservative",
        {"dpo": 1},
        {"beta": BETA, "label_smoothing": EPS},
        "β/B * ((1-ε)*σ(-u) - ε*σ(u))",
        "-β/B * ((1-ε)*σ(-u) - ε*σ(u))",
        "β/B * ((1-ε)*σ(-u) - ε*σ(u)) * σ(-m)",
        "C",
    ),
    TableRow(
        "DPO, robust",
        {"dpo": 1},
        {"beta": BETA, "label_smoothing": EPS, "loss_type": "robust"},
        "β/B * ((1-ε)*σ(-u) + ε*σ(u)) / (1-2*ε)",
        "-β/B * ((1-ε)*σ(-u) + ε*σ(u)) / (1-2*ε)",
        "β/B * ((1-ε)*σ(-u) + ε*σ(u)) / (1-2*ε) * σ(-m)",
        "C",
    ),
    TableRow(
        "DPO, hinge",
        {"dpo": 1},
        {"beta": BETA, "loss_type": "hinge"},
        "β/B * (u < 1)",
        "-β/B * (u < 1)",
        "β/B * (u < 1) * σ(-m)",
        "C",
    ),
    TableRow(
        "IPO",
        {"dpo": 1},
        {"beta": BETA, "loss_type": "ipo"},
        "(1/β - 2*u/β) / B",
        "-(1/β - 2*u/β) / B",
        "(1/β - 2*u/β) / B * σ(-m)",
        "C",
    ),
    TableRow(
        "DPO + MLE",
        {"dpo": 1, "mle": MU},
        {"beta": BETA},
        "k/B + μ/N",
        "-k/B",
        "k/B * σ(-m)",
        "C",
    ),
    TableRow(
        "DPO + ExMATE",
        {"dpo": 1, "exmate": MU},
        {"beta": BETA, "coefficient": LA},
        "k/B + μ/N",
        "-k/B - μ*λ/(B*T) * exp(S/T)",
        "(k/B + μ*λ/(B*T) * exp(S/T)) * σ(-m)",
        "C",
    ),
    TableRow(
        "DPO + ExMATE, published code",
        {"dpo": 1, "exmate": MU},
        {"beta": BETA, "coefficient": LA, "norm": "batch_token_mean"},
        "k/B + μ/N",
        "-k/B - μ*λ/N * exp(L)",
        "(k/B + μ*λ/N * exp(L)) * σ(-m)",
        "D",
    ),
    TableRow(
        "DPO + unlikelihood",
        {"dpo": 1, "unlikelihood": MU},
        {"beta": BETA, "coefficient": A},
        "k/B + μ/N",
        "-k/B - μ*α/N * exp(m)",
        "k/B * σ(-m) + μ*α/N * σ(m)",
        "C",
    ),
)


def example_batch(*, length: int = 4) -> dict[str, Any]:
    """Returns three pairs of unequal lengths and two candidates a row, log-odds from -5 to 5."""
    generator = torch.Generator().manual_seed(SEED)
    mask = torch.arange(length) < torch.tensor([[length], [length - 1], [2]])
    draw = [torch.randn(3, length, generator=generator).double() for _ in range(2)]
    chosen, rejected = (
        Responses(2 * x, m) for x, m in zip(draw, (mask, mask.flip(0)), strict=True)
    )
    refs = torch.randn(2, 3, generator=generator).double() - 5
    candidates = 2 * torch.randn(3, length, 2, generator=generator).double() - 2
    return {
        "chosen": chosen,
        "rejected": rejected,
        "ref_chosen_logps": refs[0],
        "ref_rejected_logps": refs[1],
        "candidates": candidates,
        "candidate_mask": torch.rand(candidates.shape, generator=generator) < 0.6,
    }


def check_row(row: TableRow) -> GradientCheck:
    """Returns the errors of one row's closed forms on `example_batch`."""
    return check_gradients(row.weights, **example_batch(), **row.options)


def table() -> str:
    """Returns the coefficients, and the weights at given probabilities, in Markdown."""
    lines = [
        "| loss | c, chosen tokens | c, rejected tokens | g, rejected tokens | phase | to autograd "
        "| to differences |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in ROWS:
        check = check_row(row)
        cells = (f"`{text}`" for text in (row.chosen, row.rejected, row.log_odds))
        lines.append(
            f"| {row.name} | {' | '.join(cells)} | {row.phase} "
            f"| {check.autograd:.0e} | {check.differences:.0e} |"
        )
    lines += ["", SYMBOLS, "", *_weights_table()]
    return "\n".join(lines) + "\n"


def _weights_table() -> list[str]:
    """Tabulates each penalty's gradient in three spaces by the rejected token's probability."""
    head = " | ".join(f"p = {_short(p)}" for p in PROBABILITIES)
    lines = [
        "One rejected token of probability p, coefficient 1 (DPO: β = 0.1, no reference, a chosen "
        "token of p = 0.5): ∂L/∂p, ∂L/∂l, ∂L/∂m.",
        "",
        f"| penalty | {head} |",
        "|---|" + "---|" * len(PROBABILITIES),
    ]
    for name, loss in (
        ("MATE", "mate_penalty"),
        ("unlikelihood", "unlikelihood_penalty"),
        ("ExMATE", "exmate_penalty"),
        ("DPO", "dpo"),
    ):
        cells = []
        for p in PROBABILITIES:
            slopes = one_token(loss, p)
            cells.append(", ".join(_short(x) for x in slopes))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _short(x: float) -> str:
    """Formats a number in three digits, as its distance to 1 where that says more."""
    if 1e-12 < 1 - x < 1e-3:
        return f"1-{1 - x:.0e}"
    return f"{x:.3g}"
