"""The tables of coefficients, with the error of each row against autograd and differences.

A row states c_t = -∂L/∂l_t on chosen and on rejected tokens as the catalogue does, in expressions
that `analytic_gradients` evaluates; the errors printed are those of its values, made when the table
is. So neither can drift from the code of the losses.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from fastadapt.losses import CATALOGUE, FORMULAS, Responses, RewardPenalizeLoss
from fastadapt.losses.catalogue import SYMBOLS, Gradient, families, symbols_in, times
from fastadapt.study.gradients.check import GradientCheck, check_gradients
from fastadapt.study.gradients.named_losses import has_rejected_side, one_token
from fastadapt.tracking.closed_forms import OPTION_SYMBOLS, gradient_of

SEED = 0
PROBABILITIES = (1e-9, 1e-3, 0.5, 0.999, 1 - 1e-9)
MU = 0.4  # weight of the other losses in the mixtures
# values of options for the checks, where a row has their symbols: others than the defaults
OPTIONS = {
    "alphapo_alpha": 0.4,
    "beta": 0.3,
    "coefficient": 0.6,
    "delta": 4.0,
    "desirable_weight": 1.2,
    "discopop_tau": 0.3,
    "dpop_lambda": 2.0,
    "focal_gamma": 1.5,
    "gamma": 0.3,
    "label_smoothing": 0.2,
    "nll_weight": 0.7,
    "tdpo_alpha": 0.8,
    "undesirable_weight": 0.9,
}
# Differences move the probability that DFT holds constant.
NO_DIFFERENCES = frozenset({"dft"})
MIXTURES: dict[str, tuple[dict[str, float], dict[str, Any]]] = {
    "DPO + μ MLE": ({"dpo": 1.0, "mle": MU}, {}),
    "DPO + μ ExMATE": ({"dpo": 1.0, "exmate": MU}, {}),
    "DPO + μ ExMATE, published code": (
        {"dpo": 1.0, "exmate": MU},
        {"norm": "batch_token_mean"},
    ),
    "DPO + μ unlikelihood": ({"dpo": 1.0, "unlikelihood": MU}, {}),
    "MLE + μ unlikelihood of candidates": (
        {"mle": 1.0, "candidate_unlikelihood_penalty": MU},
        {},
    ),
}
LETTERS = (
    "c = -∂L/∂l and g = ∂L/∂m of a token, and ∂L/∂z = g (onehot(y) - q) = c (softmax(z) - "
    "onehot(y)), q the softmax over the other entries; g = -c σ(-m), and stands in the table where "
    "it is bounded though c is not. Phase: what must be known before the gradient of a token is: "
    "A nothing, B its row, C its response or pair, D the whole batch. With an f-divergence c is "
    "multiplied by the slope of the score, with ld_alpha by the weight of the token, with "
    "pair_weights by that of the pair."
)


class TableRow(NamedTuple):
    """One loss or mixture: its weights, options and expressions, as in `Gradient`."""

    name: str
    family: str
    weights: Mapping[str, float]
    options: Mapping[str, Any]
    gradient: Gradient


def _rows_of(name: str, family: str) -> list[TableRow]:
    """Returns the rows of a loss, one for each variant."""
    entry = CATALOGUE[name]
    found = []
    for row in entry.gradients:
        title = f"{entry.title}, {row.title}" if row.title else entry.title
        options = {**_options([name], [row]), **row.given}
        found.append(TableRow(f"{title} (`{name}`)", family, {name: 1.0}, options, row))
    return found


def _mixed(title: str, weights: Mapping[str, float], options: Mapping[str, Any]) -> TableRow:
    """Returns the row of a mixture, whose expressions are sums of those of its losses."""
    parts = {
        name: gradient_of(name, RewardPenalizeLoss(weights, **options).options_of(name))
        for name in weights
    }
    stated = [row.u for row in parts.values() if row.u]
    if len(stated) > 1:
        raise ValueError(f"weights: expected one loss with a u of its own, got {list(weights)}")

    def total(texts: Mapping[str, str]) -> str:
        return " + ".join(
            text if weights[name] == 1 else times("μ", text)
            for name, text in texts.items()
            if text != "0"
        )

    unbounded = any(row.log_odds for row in parts.values())
    slopes = {k: r.log_odds or f"{r.rejected.removeprefix('-')}*σ(-m)" for k, r in parts.items()}
    there = {k: text for k, text in slopes.items() if parts[k].rejected != "0"}
    row = Gradient(
        total({k: r.chosen for k, r in parts.items()}),
        total({k: r.rejected for k, r in parts.items()}),
        max(r.phase for r in parts.values()),
        "".join(stated),
        total(there) if unbounded else None,
    )
    own = {**_options(weights, parts.values()), **options}
    return TableRow(title, "mixtures", weights, own, row)


def _options(names: Any, rows: Any) -> dict[str, Any]:
    """Returns values for the options whose symbols the rows have."""
    texts = [part for r in rows for part in (r.chosen, r.rejected, r.u)]
    known = set().union(*map(_parameters, names))
    symbols = symbols_in(texts)
    return {k: v for k, v in OPTIONS.items() if k in known and OPTION_SYMBOLS[k] in symbols}


def _parameters(name: str) -> set[str]:
    """Returns the names of a loss's parameters."""
    return set(inspect.signature(FORMULAS[name]).parameters)


ROWS = (
    *(
        row
        for family, names in families().items()
        for name in names
        for row in _rows_of(name, family)
    ),
    *(_mixed(title, *mixture) for title, mixture in MIXTURES.items()),
)


def example_batch(*, length: int = 3) -> dict[str, Any]:
    """Returns three pairs of unequal lengths with all that losses take, log-odds from -5 to 5.

    "inputs" holds the others of `RewardPenalizeLoss.forward`.
    """
    generator = torch.Generator().manual_seed(SEED)
    mask = torch.arange(length) < torch.tensor([[length], [length - 1], [1]])
    draw = [torch.randn(3, length, generator=generator).double() for _ in range(2)]
    chosen, rejected = (
        Responses(2 * x, m) for x, m in zip(draw, (mask, mask.flip(0)), strict=True)
    )
    refs = torch.randn(2, 3, generator=generator).double() - 5
    candidates = 2 * torch.randn(3, length, 2, generator=generator).double() - 2
    there = torch.rand(candidates.shape, generator=generator) < 0.6
    tokens = torch.rand(4, 3, length, generator=generator).double()
    return {
        "chosen": chosen,
        "rejected": rejected,
        "ref_chosen_logps": refs[0],
        "ref_rejected_logps": refs[1],
        "candidates": candidates,
        "candidate_mask": there,
        "inputs": {
            "gold": Responses(torch.randn(2, length, generator=generator).double(), mask[:2]),
            "pair_weights": torch.rand(3, generator=generator).double() + 0.5,
            "reference_point": torch.tensor(0.7).double(),
            "reward_shift": torch.tensor(-0.3).double(),
            "logsumexp": 5 * tokens[0],
            "mean_logits": tokens[1] - 4,
            "chosen_divergences": tokens[2],
            "rejected_divergences": tokens[3],
        },
    }


def check_row(row: TableRow) -> GradientCheck:
    """Returns the errors of one row's closed forms on `example_batch`.

    The likelihood is that of the chosen responses where a loss can do without gold ones, and pairs
    have equal weights, as the expressions say it.
    """
    batch = example_batch()
    needed = {name for loss in row.weights for name in _required(loss)}
    batch["inputs"] = {k: v for k, v in batch["inputs"].items() if k in needed}
    check = check_gradients(row.weights, **batch, **row.options)
    return check._replace(differences=None) if NO_DIFFERENCES & set(row.weights) else check


def _required(name: str) -> set[str]:
    """Returns the parameters of a loss that have no default."""
    own = inspect.signature(FORMULAS[name]).parameters.values()
    return {p.name for p in own if p.default is p.empty}


def table() -> str:
    """Returns the coefficients, and the weights at given probabilities, in Markdown."""
    parts = []
    for family in dict.fromkeys(row.family for row in ROWS):
        rows = [row for row in ROWS if row.family == family]
        parts.append("\n".join([f"### {family}", "", *_family(rows)]))
    parts += [symbols_text(), "\n".join(_weights_table())]
    return "\n\n".join(parts) + "\n"


def symbols_list() -> list[tuple[str, str]]:
    """Returns the symbols of the tables with their meanings."""
    sides = "⁺, ⁻", "after a number of a response: of the chosen, of the rejected one"
    return [*SYMBOLS.items(), sides, ("μ", "weight of the other losses of a mixture")]


def symbols_text() -> str:
    """Returns what all symbols of the tables are."""
    return f"{'; '.join(f'{k}: {v}' for k, v in symbols_list())}. {LETTERS}"


def columns_of(rows: Sequence[TableRow]) -> dict[str, list[str]]:
    """Returns the columns of a table of coefficients, without those that no row fills."""
    parts = [row.gradient for row in rows]
    columns = {"loss": [row.name for row in rows], "c, chosen": [_code(x.chosen) for x in parts]}
    if any(x.rejected != "0" for x in parts):
        columns["c, rejected"] = [_code(x.rejected) for x in parts]
    if any(x.u for x in parts):
        columns["u"] = [_code(x.u) for x in parts]
    if any(x.log_odds for x in parts):
        columns["g"] = [_code(x.log_odds) for x in parts]
    return columns | {"phase": [x.phase for x in parts]}


def _family(rows: Sequence[TableRow]) -> list[str]:
    """Tabulates the rows of a family with their errors."""
    checks = [check_row(row) for row in rows]
    columns = columns_of(rows)
    columns["to autograd"] = [f"{x.autograd:.0e}" for x in checks]
    columns["to differences"] = [
        "-" if x.differences is None else f"{x.differences:.0e}" for x in checks
    ]
    return markdown(columns)


def markdown(columns: Mapping[str, Sequence[str]]) -> list[str]:
    """Returns the lines of a table in Markdown."""
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return lines + [f"| {' | '.join(cells)} |" for cells in zip(*columns.values(), strict=True)]


def _code(text: str | None) -> str:
    """Formats an expression, or what is not there."""
    return f"`{text}`" if text else "-"


def _weights_table() -> list[str]:
    """Tabulates each loss's gradient in three spaces by the rejected token's probability."""
    lines = [
        "One rejected token of probability p beside a chosen one of 0.5, the default options, no "
        "reference, the reference point, the shift and divergences 0: ∂L/∂p, ∂L/∂l, ∂L/∂m.",
        "",
    ]
    found: dict[tuple[str, ...], list[str]] = {}
    for name, entry in CATALOGUE.items():
        if has_rejected_side(entry):
            cells = tuple(", ".join(map(_short, one_token(name, p))) for p in PROBABILITIES)
            found.setdefault(cells, []).append(name)
    columns = {"loss": [", ".join(names) for names in found.values()]}
    for p, column in zip(PROBABILITIES, zip(*found, strict=True), strict=True):
        columns[f"p = {_short(p)}"] = list(column)
    return lines + markdown(columns)


def _short(x: float) -> str:
    """Formats a number in three digits, as its distance to 1 where that says more."""
    if 1e-12 < 1 - x < 1e-3:
        return f"1-{1 - x:.0e}"
    return f"{x:.3g}"
