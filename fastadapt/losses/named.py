"""Names of losses, and what a mixture of them is told: weights and options."""

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from torch import Tensor

from fastadapt._ops.checks import nearest, number, shown

CONTAIN_MLE = frozenset({"mle", "unlikelihood", "exmate", "mate", "cpo", "orpo", "slic"})
"""The losses that contain MLE on the chosen responses; a mixture takes one of them at most.

"cpo" and "slic" contain none with `nll_weight=0`.

Examples:
    >>> from fastadapt.losses import CONTAIN_MLE
    >>> "orpo" in CONTAIN_MLE, "dpo" in CONTAIN_MLE
    (True, False)
"""

ALIASES = {"sigmoid": "dpo", "sft": "mle"}
"""Other names of losses: those of trl's `loss_type` that differ.

Examples:
    >>> from fastadapt.losses import ALIASES
    >>> ALIASES["sft"]
    'mle'
"""

Formula = Callable[..., Tensor]
Weight = float | Callable[[float], float]
"""The weight of a loss: a number >= 0, or a function of the run's progress in [0, 1] to one."""


def name_of(name: str) -> str:
    """Returns the name of a loss in `FORMULAS`, given that or an alias; unknown ones as they are.

    Examples:
        >>> from fastadapt.losses import name_of
        >>> name_of("sigmoid"), name_of("orpo")
        ('dpo', 'orpo')
    """
    return ALIASES.get(name, name)


def inputs_of(formula: Formula) -> dict[str, bool]:
    """Returns the inputs of a loss, all but keyword options, and whether each must be there."""
    own = inspect.signature(formula).parameters.values()
    return {p.name: p.default is p.empty for p in own if p.kind is not p.KEYWORD_ONLY}


def defaults_of(formula: Formula) -> dict[str, Any]:
    """Returns the options of a loss with their defaults."""
    own = inspect.signature(formula).parameters.values()
    return {p.name: p.default for p in own if p.kind is p.KEYWORD_ONLY}


def options_of(
    options: Mapping[str, Any], losses: Iterable[str], formulas: Mapping[str, Formula]
) -> dict[str, dict[str, Any]]:
    """Returns the options of each loss named: those that all share, and before them its own."""
    known = {name: set(defaults_of(formulas[name])) for name in losses}
    alone = {name_of(k): v for k, v in options.items() if name_of(k) in formulas}
    shared = {k: v for k, v in options.items() if name_of(k) not in formulas}
    for name, own in alone.items():
        if name not in known or not isinstance(own, Mapping):
            expected = "one of the losses named" if name not in known else "a mapping of options"
            raise ValueError(f"options: expected {expected} under {name}, got {shown(own)}")
        _check_known(own, {name: known[name]}, formulas)
    _check_known(shared, known, formulas)
    return {
        name: {k: v for k, v in shared.items() if k in own} | dict(alone.get(name, {}))
        for name, own in known.items()
    }


def _check_known(
    options: Iterable[str], known: Mapping[str, set[str]], formulas: Mapping[str, Formula]
) -> None:
    """Raises for options that none of these losses has."""
    having = set().union(*known.values())
    left = sorted(set(options) - having)
    if left:
        others = [name for name, own in formulas.items() if left[0] in defaults_of(own)]
        elsewhere = f"; {left[0]} is an option of {', '.join(others)}" if others else ""
        names = ", ".join(sorted(having)) or "none"
        raise ValueError(
            f"options: expected those of {', '.join(known)}, got {left}; they have "
            f"{names}{elsewhere or nearest(left, having)}"
        )


def weights_of(weights: object, names: Collection[str]) -> dict[str, Weight]:
    """Checks the weights and returns them by the losses' own names."""
    if not isinstance(weights, Mapping):
        named = [weights] if isinstance(weights, str) else weights
        listed = list(named) if isinstance(named, list | tuple | set | frozenset) else []
        known = [name for name in listed if isinstance(name, str) and name_of(name) in names]
        like = dict.fromkeys(known or ["dpo", "exmate"], 1.0)
        raise TypeError(
            f"weights: expected losses with their weights, such as {like}, got {shown(weights)}"
        )
    unknown = [name for name in weights if name_of(name) not in names]
    if unknown or not weights:
        raise ValueError(
            f"weights: expected some of {', '.join(names)}, got {unknown}{nearest(unknown, names)}"
        )
    found: dict[str, Weight] = {}
    for name, weight in weights.items():
        if name_of(name) in found:
            raise ValueError(f"weights: expected each loss once, got {name_of(name)} twice")
        own = weight if callable(weight) else number(f"weights[{name!r}]", weight)
        found[name_of(name)] = own
    return found


def ramp(
    start: float, end: float, *, begin: float = 0.0, finish: float = 1.0
) -> Callable[[float], float]:
    """Returns a weight that goes from one value to another between two points of the run.

    Examples:
        >>> from fastadapt.losses import ramp
        >>> warm = ramp(0.0, 1.0, finish=0.5)  # up in the first half, then 1
        >>> warm(0.0), warm(0.25), warm(0.75)
        (0.0, 0.5, 1.0)
        >>> objective = RewardPenalizeLoss({"mle": 1.0, "exmate_penalty": warm})

    Args:
        start (float): the weight up to `begin`, >= 0.
        end (float): the weight from `finish` on, >= 0.
        begin (float): share of the run, in [0, 1].
        finish (float): share of the run, in [begin, 1]; equal to `begin`: a step.

    Returns:
        Callable[[float], float]: a function of the progress in [0, 1], linear between the two.

    Raises:
        TypeError, ValueError: no numbers, or out of range.
    """
    start, end = number("start", start), number("end", end)
    begin, finish = number("begin", begin), number("finish", finish)
    if not begin <= finish <= 1:
        expected = "expected begin <= finish <= 1"
        raise ValueError(f"begin, finish: {expected}, got {begin} and {finish}")

    def weight(progress: float) -> float:
        if progress >= finish:
            return end
        share = (progress - begin) / (finish - begin) if progress > begin else 0.0
        return start + (end - start) * share

    return weight
