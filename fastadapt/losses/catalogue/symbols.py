"""What the symbols in the catalogue's expressions stand for."""

import re
from collections.abc import Iterable

SYMBOLS = {
    "l": "log p of the token",
    "m": "log p/(1-p) of the token, its log-odds",
    "p": "probability of the token",
    "S": "Σ l, log P of the response",
    "P": "exp(S), probability of the response",
    "T": "tokens of the response",
    "R": "S under the reference",
    "r": "S - R, the log-ratio of the response; with an f-divergence its score",
    "D": "Σ KL(reference || policy) over the response's rows",
    "N": "tokens of the side",
    "B": "pairs, or responses of the side",
    "Q": "responses whose likelihood is rewarded",
    "M": "responses of both sides",
    "L": "Σ l / N over all rejected tokens of the call",
    "u": "as stated in the row",
    "z": "the reference point, reference_point",
    "σ": "the logistic function",
    "matched": "matched(x, y): x less the value of y that has its rank in the call",
    "α": "alphapo_alpha or tdpo_alpha",
    "β": "beta",
    "γ": "gamma or focal_gamma",
    "δ": "delta; of BCO reward_shift",
    "ε": "label_smoothing",
    "λ": "coefficient or dpop_lambda",
    "λ⁺": "desirable_weight",
    "λ⁻": "undesirable_weight",
    "ν": "nll_weight",
    "τ": "discopop_tau",
}
"""Every symbol of the expressions of a `Gradient`, in words.

⁺ and ⁻ say of which side a number of a response is; without one it is of the token's own side.
"""


def symbols_in(texts: Iterable[str]) -> list[str]:
    """Returns the symbols that expressions have, in the order of `SYMBOLS`."""
    words = {word for text in texts for word in re.findall(r"[^\W\d]+[⁺⁻]?", text)}
    found = {word if word in SYMBOLS else word.rstrip("⁺⁻") for word in words}
    return [symbol for symbol in SYMBOLS if symbol in found]


def times(factor: str, text: str) -> str:
    """Returns a product, or a sum in parentheses, times a symbol: "λ" and "-1/N" give "-λ/N"."""
    if " + " in text or " - " in text:
        return f"{factor}*({text})"
    sign, rest = ("-", text[1:]) if text.startswith("-") else ("", text)
    return f"{sign}{factor}{rest[1:]}" if rest.startswith("1/") else f"{sign}{factor}*{rest}"
