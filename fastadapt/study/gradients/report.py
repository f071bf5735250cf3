"""The report of the gradient study: a page of Markdown with pictures, made from the tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastadapt.study.gradients import field_plots, plots
from fastadapt.study.gradients.cases import claim_rows, curve_rows, prediction_rows
from fastadapt.study.gradients.one_step import exmate_threshold
from fastadapt.study.gradients.records import Row, read_json, read_rows, write_rows
from fastadapt.study.gradients.steps import select, signs
from fastadapt.study.gradients.table import ROWS, check_row
from fastadapt.study.markdown import table
from fastadapt.tracking.metrics import DEAD_ZONE

NAME = "README.md"


def write_report(
    folder: Path, *, report: Callable[[str, int, int], None] = lambda phase, done, total: None
) -> Path:
    """Writes the report beside `steps.csv` and `training.csv`; returns its path.

    Args:
        folder: what `run_steps` and `run_training` wrote to, and where everything goes.
        report: called with a phase, how much of it is done and its total.

    Raises:
        OSError: one of the tables is not there.
    """
    steps, training = (read_rows(folder / f"{name}.csv") for name in ("steps", "training"))
    about = {name: read_json(folder / f"{name}.json") for name in ("steps", "training")}
    report("cases", 0, 3)
    cases = prediction_rows()
    report("cases", 1, 3)
    claims = claim_rows()
    report("cases", 2, 3)
    curves = curve_rows()
    report("cases", 3, 3)
    write_rows(folder / "cases.csv", cases)
    write_rows(folder / "claims.csv", claims)
    size = float(about["steps"]["settings"]["sizes"][0])
    draw_all(folder, steps, training, curves, about["training"]["example"], size)
    page = "\n\n".join(
        [
            *_head(about),
            *_table_section(),
            *_rho_section(steps, about["steps"]["settings"]["sizes"]),
            *_claims_section(steps, claims, size),
            *_cases_section(cases),
            *_training_section(training, about["training"]),
        ]
    )
    path = folder / NAME
    path.write_text(page + "\n", encoding="utf-8")
    return path


def draw_all(
    folder: Path,
    steps: Sequence[Row],
    training: Sequence[Row],
    curves: Sequence[Row],
    example: Mapping[str, Any],
    size: float,
) -> None:
    """Draws every picture of the report."""
    plots.draw_weights(folder / "weights.png")
    plots.draw_steps(folder / "one_step.png", steps, size)
    plots.draw_four_cells(folder / "four_cells.png", training, plots.KIND_TITLES, "/token")
    toy = {"all different": "toy, both differ"}
    plots.draw_four_cells(folder / "four_cells_toy.png", curves, toy, "")
    plots.draw_masses(folder / "gradient_mass.png", training)
    plots.draw_heat_map(folder / "heat_map.png", example)
    field_plots.draw_plane(folder / "plane.png")
    field_plots.draw_simplex(folder / "simplex.png")


def cases_table(rows: Sequence[Row]) -> str:
    """Returns the case studies in Markdown: change of log P by one step, in 1e-4 nats."""
    return table(
        ("case", "start", "loss", "ρ", "Δ log P(y⁺), predicted", "measured")
        + ("Δ log P(y⁻), predicted", "measured"),
        [
            (
                r["case"],
                r["start"],
                r["loss"],
                f"{r['rho']:.2f}",
                *(f"{1e4 * r[f'{how}_{side}']:+.2f}" for side, how in _CHANGES),
            )
            for r in rows
        ],
    )


_CHANGES = (
    ("chosen", "predicted"),
    ("chosen", "measured"),
    ("rejected", "predicted"),
    ("rejected", "measured"),
)


def _head(about: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Writes title and settings."""
    step, train = about["steps"], about["training"]
    steps, runs = step["settings"], train["settings"]
    software = ", ".join(f"{k} {v}" for k, v in step["software"].items())
    return [
        "# Gradients of losses that reward chosen and penalise rejected responses",
        "Written by `fastadapt gradients run`; every number and picture comes from the tables "
        "beside this page, none is typed. The toys are computed when the page is.",
        f"Single steps: the head of {step['model']}, the first {steps['found']} pairs of "
        f"{steps['data']} of at most {steps['max_length']} tokens; before, where the table "
        f"says so, MLE on one side for {steps['fit_epochs']} epochs. "
        f"Training: {train['model']}, all parameters, {runs['found']} pairs, {runs['steps']} steps "
        f"of AdamW at {runs['learning_rate']:g}. {software}, float32.",
    ]


def _table_section() -> list[str]:
    """Writes how exact the closed forms are, and the weights against P⁻."""
    checks = [check_row(row) for row in ROWS]
    return [
        "## Coefficients",
        f"`fastadapt gradients table` prints the {len(ROWS)} rows. Largest error to automatic "
        f"differentiation: {max(c.autograd for c in checks):.0e}; to central differences of the "
        f"losses: {max(c.differences or 0 for c in checks):.0e} (float64, relative to 1 + "
        "|gradient|).",
        "![weights](weights.png)",
        "The gradient of each penalty for one rejected token of probability P⁻. Unlikelihood "
        "diverges as P⁻ → 1 in P and in log P; what the row of logits gets is bounded by its "
        "coefficient.",
    ]


def _rho_section(steps: Sequence[Row], sizes: Sequence[float]) -> list[str]:
    """Writes how often ρ predicts the sign of the first step's change of log P(y⁺)."""
    lines = []
    for kind, start in dict.fromkeys((r["kind"], r["start"]) for r in steps):
        own = select(steps, kind=kind, start=start, loss="dpo")
        first = select(own, size=sizes[0])
        above = [r for r in first if r["rho"] > 1]
        lines.append(
            (
                plots.KIND_TITLES[kind],
                start,
                str(len(first)),
                str(len(above)),
                str(sum(r["measured_chosen"] < 0 for r in first)),
                *(_share(*signs(select(own, size=size))) for size in sizes),
            )
        )
    everything = select(steps, loss="dpo")
    lines.append(
        (
            "all",
            "",
            str(len(select(everything, size=sizes[0]))),
            str(sum(r["rho"] > 1 for r in select(everything, size=sizes[0]))),
            str(sum(r["measured_chosen"] < 0 for r in select(everything, size=sizes[0]))),
            *(_share(*signs(select(everything, size=size))) for size in sizes),
        )
    )
    heads = ("pairs", "head", "count", "ρ > 1", "log P(y⁺) fell")
    return [
        "## Displacement: does ρ predict the first step?",
        "ρ = ⟨∇S⁺, ∇S⁻⟩ / ‖∇S⁺‖² in the parameters of the head, without logits. One step of DPO on "
        "the head for each pair, of such a rate that the larger predicted change of log P is the "
        "size given; sign right: log P(y⁺) rose where ρ < 1 and fell where ρ > 1. Where no ρ is "
        "above 1, a guess that it always rises does as well.",
        table((*heads, *(f"sign right, {size:g} nats" for size in sizes)), lines),
        "![one step](one_step.png)",
    ]


def _claims_section(steps: Sequence[Row], claims: Sequence[Row], size: float) -> list[str]:
    """Writes the three claims with their conditions."""
    dpo = select(steps, loss="dpo", size=size)
    toy_dpo = select(claims, loss="DPO")
    lines = []
    for where, rows in (("toys", toy_dpo), ("model", dpo)):
        for text, chosen in (
            ("ρ > 1", [r for r in rows if r["rho"] > 1]),
            ("ρ ≤ 1", [r for r in rows if r["rho"] <= 1]),
        ):
            both = sum(r["measured_chosen"] < 0 and r["measured_rejected"] < 0 for r in chosen)
            lines.append(("DPO lowers both", where, text, str(len(chosen)), str(both)))
    toy_exmate = [(r, float(r["threshold"])) for r in select(claims, loss="ExMATE")]
    exmate = [(r, exmate_threshold(r)) for r in select(steps, loss="exmate", size=size)]
    for where, limited in (("toys", toy_exmate), ("model", exmate)):
        for text, chosen in (
            ("P̄⁻ above its threshold", [r for r, limit in limited if r["p_rejected"] > limit]),
            ("P̄⁻ below it", [r for r, limit in limited if r["p_rejected"] <= limit]),
        ):
            fell = sum(r["measured_rejected"] < 0 for r in chosen)
            lines.append(("ExMATE first lowers P(y⁻)", where, text, str(len(chosen)), str(fell)))
    return [
        "## Three claims, each with its condition",
        table(("claim", "on", "condition", "cases", "of them, it held"), lines),
        "For ExMATE the threshold is ⟨∇S⁺, ∇S⁻⟩ T⁻ / (‖∇S⁻‖² T⁺): where P̄⁻, the geometric mean of "
        "the rejected token probabilities, is above, the penalty outweighs what MLE on y⁺ does "
        "to y⁻. " + _starts_sentence(select(steps, loss="exmate", size=size)),
        "**Unlikelihood's gradients explode** in P-space and not in logit space:",
        _unlikelihood_table(select(steps, loss="exmate", size=size)),
    ]


def _starts_sentence(rows: Sequence[Row]) -> str:
    """Writes how the start decides about ExMATE on preference data."""
    parts = []
    for start in dict.fromkeys(r["start"] for r in rows if r["kind"] == "same-prompt"):
        own = select(rows, kind="same-prompt", start=start)
        p = sorted(r["p_rejected"] for r in own)[len(own) // 2]
        fell = sum(r["measured_rejected"] < 0 for r in own)
        never = sum(exmate_threshold(r) <= 0 for r in own)
        parts.append(
            f"{start}: median P̄⁻ {p:.2f}, log P(y⁻) fell in {fell} of {len(own)}, "
            f"the threshold was 0 or less in {never}"
        )
    return (
        "At 0 or less MLE on y⁺ does not raise y⁻ to begin with, and no high P⁻ is needed. Two "
        "responses to one prompt, by the start of the head: " + "; ".join(parts) + "."
    )


def _unlikelihood_table(rows: Sequence[Row]) -> str:
    """Tabulates the largest slopes of token unlikelihood on rejected tokens, by start."""
    lines = []
    for kind, start in dict.fromkeys((r["kind"], r["start"]) for r in rows):
        own = select(rows, kind=kind, start=start)
        m = max(r["log_odds_rejected"] for r in own)
        p = 1 / (1 + math.exp(-m))
        dead = sum(r["log_odds_rejected"] > DEAD_ZONE for r in own)
        lines.append(
            (
                plots.KIND_TITLES[kind],
                start,
                f"{math.exp(m) + 1:.3g}",
                f"{math.exp(m):.3g}",
                f"{p:.6f}",
                f"{dead} of {len(own)}",
            )
        )
    heads = ("pairs", "head", "largest ∂L/∂p", "largest ∂L/∂l", "the same token's ∂L/∂m")
    return table((*heads, "pairs with a token in the published clamp's dead zone"), lines)


def _cases_section(cases: Sequence[Row]) -> list[str]:
    """Writes how well predictions and measurements of the toys agree, and the fields."""
    pairs = [
        (r[f"predicted_{side}"], r[f"measured_{side}"])
        for r in cases
        for side in ("chosen", "rejected")
    ]
    worst = max(abs(a - b) for a, b in pairs)
    right = sum(a * b > 0 for a, b in pairs)
    return [
        "## Case studies",
        f"`fastadapt gradients cases` prints {len(cases)} single steps on toys (one timestep, "
        "shared prefix, several timesteps, the same response in another context, everything "
        "different; before and after MLE), the larger change "
        f"{1e4 * _largest(cases):.0f}e-4 nats: the sign is right in {right} of {len(pairs)} "
        f"changes, the largest error {1e4 * worst:.2g}e-4 nats.",
        "![four cells, toy](four_cells_toy.png)",
        "![plane](plane.png)",
        "Descent on logits, each response one token in a context of its own; the darker, the "
        "faster (two decades). DPO without a reference, β = 0.3.",
        "![simplex](simplex.png)",
        "Chosen and rejected token in one row of logits: MLE + unlikelihood pushes the other "
        "classes up where P⁻ > 1/2, ExMATE never does, and DPO puts no gradient on them.",
    ]


def _largest(cases: Sequence[Row]) -> float:
    """Returns the largest predicted change."""
    return max(abs(float(r[f"predicted_{side}"])) for r in cases for side in ("chosen", "rejected"))


def _training_section(training: Sequence[Row], about: Mapping[str, Any]) -> list[str]:
    """Writes what a short training run with each loss did."""
    lines = []
    for kind, loss in dict.fromkeys((r["kind"], r["loss"]) for r in training):
        own = select(training, kind=kind, loss=loss)
        first, last = own[0], own[-1]
        lines.append(
            (
                plots.KIND_TITLES[kind],
                loss,
                *(
                    f"{first[f'{cell}/token']:.2f} → {last[f'{cell}/token']:.2f}"
                    for cell in ("chosen_in_chosen", "rejected_in_rejected")
                ),
                f"{first['rho/median']:.2f} → {last['rho/median']:.2f}",
                f"{first['rho/above_one']} → {last['rho/above_one']} of {last['rho/pairs']}",
            )
        )
    return [
        "## Training",
        "Before the first and before the last step, mean over the pairs:",
        table(
            ("pairs", "loss", "mean log p of y⁺", "mean log p of y⁻", "median ρ", "ρ > 1"), lines
        ),
        "![four cells](four_cells.png)",
        "![gradient mass](gradient_mass.png)",
        "Shares of Σ |∂L/∂z|; above each picture the sum, first and last. A row of its own puts "
        "half on its label; rows that both responses share are one row.",
        "![heat map](heat_map.png)",
        f"100 ∂L/∂m at the tokens of a pair that begins alike, {about['model']}; negative: descent "
        "raises the token. On shared tokens of which the model is sure, unlikelihood outweighs "
        "MLE; DPO leaves all shared tokens alone.",
    ]


def _share(right: int, count: int) -> str:
    """Formats a count with its share."""
    return f"{right} of {count} ({100 * right / count:.1f} %)"
