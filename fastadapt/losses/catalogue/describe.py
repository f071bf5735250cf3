"""A loss in words, for people at a prompt."""

import inspect

from fastadapt._ops.checks import instance, nearest
from fastadapt.losses.catalogue.listing import CATALOGUE
from fastadapt.losses.catalogue.symbols import SYMBOLS, symbols_in
from fastadapt.losses.mixture import FORMULAS
from fastadapt.losses.named import ALIASES, inputs_of, name_of

NEEDS_IN_WORDS = {
    "pairs": "the i-th chosen against the i-th rejected response",
    "unpaired": "any numbers of responses of each side",
    "reference": "log P of both sides under a reference (ref_chosen_logps, ref_rejected_logps); "
    "without one as if both were equal",
    "lengths": "divides by the responses' lengths",
    "batch": "depends on which responses share a call",
    "gold": "a third response (gold)",
    "candidates": "log-odds of other ids in the chosen rows (candidates, candidate_mask)",
    "sum_squares": "the sum of squared probabilities of each row",
    "mean_logits": "the log-sum-exp and the mean logit of each row (logsumexp, mean_logits)",
    "divergences": "the KL divergence of each row (chosen_divergences, rejected_divergences)",
}


def describe(name: str) -> str:
    """Returns what is known of a loss: formula, source, options, gradient, limits, needs, use.

    Examples:
        >>> from fastadapt.losses import describe
        >>> print(describe("simpo").splitlines()[0])
        simpo: SimPO (Meng et al. 2024, arXiv 2405.14734, eq. 6)

    Args:
        name (str): of `FORMULAS`, or an alias such as "sigmoid".

    Returns:
        str: several lines.

    Raises:
        ValueError: a loss that there is not.
    """
    instance("name", name, str, "a name")
    known = name_of(name)
    if known not in CATALOGUE:
        names, hint = ", ".join(CATALOGUE), nearest([name], [*CATALOGUE, *ALIASES])
        raise ValueError(f"name: expected one of {names}, got {name!r}{hint}")
    entry = CATALOGUE[known]
    options = [
        f"{key}={p.default!r}"
        for key, p in inspect.signature(FORMULAS[known]).parameters.items()
        if p.kind is p.KEYWORD_ONLY
    ]
    lines = [
        f"{known}: {entry.title} ({entry.source})",
        _formula(inspect.getdoc(FORMULAS[known]) or ""),
        f"Take it: {entry.when}",
        f"Options: {', '.join(options) or 'none'}",
    ]
    must = [k for k, needed in inputs_of(FORMULAS[known]).items() if needed]
    lines.append(f"Takes: {', '.join(must)}")
    for need in sorted(entry.needs):
        lines.append(f"Needs {need}: {NEEDS_IN_WORDS[need]}")
    for row in entry.gradients:
        about = f" ({row.title})" if row.title else ""
        where = f", u = {row.u}" if row.u else ""
        lines.append(f"c = -∂L/∂l{about}: chosen {row.chosen}; rejected {row.rejected}{where}")
    if entry.limits is not None:
        lines.append(f"c rejected as P⁻ → 0: {entry.limits[0]}; as P⁻ → 1: {entry.limits[1]}")
    texts = [part for row in entry.gradients for part in (row.chosen, row.rejected, row.u)]
    lines.append("; ".join(f"{symbol}: {SYMBOLS[symbol]}" for symbol in symbols_in(texts)))
    return "\n".join(lines)


def _formula(doc: str) -> str:
    """Returns the first sentence of a docstring without its first word."""
    return doc.split("\n\n")[0].removeprefix("Returns ").strip()
