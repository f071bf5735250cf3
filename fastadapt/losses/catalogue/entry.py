"""What is known of a loss beside its code: source, needs, gradient, when to take it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

NEEDS = (
    "pairs",
    "unpaired",
    "reference",
    "lengths",
    "batch",
    "gold",
    "candidates",
    "sum_squares",
    "mean_logits",
    "divergences",
)


class Gradient(NamedTuple):
    """The coefficients of a loss, as expressions in the symbols of `SYMBOLS`.

    Attributes:
        chosen: c = -∂L/∂l at each chosen token, before the weights of pairs and tokens.
        rejected: c at each rejected token; at each candidate for losses of candidates.
        phase: what must be known before the gradient of a token is: A nothing, B its row, C its
            response or pair, D the whole batch.
        u: what the symbol u stands for in them.
        log_odds: g = ∂L/∂m at each rejected token (at each chosen one, of a loss on that side
            alone), where it is stabler than -c (1-p).
        given: values of the loss's options for which this row is; those that are not named may have
            any.
        title: what the variant is called.
    """

    chosen: str
    rejected: str
    phase: str
    u: str = ""
    log_odds: str | None = None
    given: Mapping[str, Any] = {}
    title: str = ""


class Entry(NamedTuple):
    """A loss of the catalogue.

    Attributes:
        title: its usual name.
        source: paper or code, and the equation.
        needs: what it needs beside the log-odds of the chosen side, of `NEEDS`.
        gradients: its coefficients, by options.
        limits: c of a rejected token where P⁻ goes to 0 and to 1 with the default options,
            expressions as in `Gradient`, "inf" and "-inf" where it grows without end; none for
            losses of the chosen side, and where they depend on an option's sign.
        when: when to take it, in a sentence.
    """

    title: str
    source: str
    needs: frozenset[str]
    gradients: tuple[Gradient, ...]
    limits: tuple[str, str] | None
    when: str
