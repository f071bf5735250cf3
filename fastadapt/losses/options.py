"""Checks of the names and numbers that losses take as options."""

from collections.abc import Collection, Iterable
from difflib import get_close_matches
from math import inf
from numbers import Real
from typing import cast

from torch import Tensor


def one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises unless an option is one of the choices.

    Raises:
        TypeError: not a string.
        ValueError: another string; the message has the nearest one.
    """
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected one of {', '.join(choices)}, got {shown(value)}")
    if value not in choices:
        meant = nearest([value], choices)
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}{meant}")


def number(name: str, value: object, *, positive: bool = False) -> float:
    """Returns a finite number >= 0 (or > 0) as an int or a float; NumPy's are accepted.

    Raises:
        TypeError: not a number: text, None, a bool, a tensor.
        ValueError: negative, 0 where it has to be positive, infinite or NaN.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, Real)):
        raise TypeError(f"{name}: expected a number, got {shown(value)}")
    found = cast(float, value)
    if not (found > 0 if positive else found >= 0):
        raise ValueError(f"{name}: expected a value {'>' if positive else '>='} 0, got {found}")
    if not found < inf:
        raise ValueError(f"{name}: expected a finite value, got {found}")
    # numpy's multiply tensors in their own way
    return found if type(found) is int or type(found) is float else float(found)


def flag(name: str, value: object) -> None:
    """Raises unless an option is True or False.

    Raises:
        TypeError: anything else, such as the text "false", which is true.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {shown(value)}")


def nearest(names: Iterable[object], choices: Collection[str]) -> str:
    """Returns "; did you mean X?" with choices spelt similarly, or an empty string."""
    close = [found for name in names for found in get_close_matches(str(name), choices, 1)]
    return f"; did you mean {', '.join(dict.fromkeys(close))}?" if close else ""


def shown(value: object) -> str:
    """Returns a value as messages show it, cut if it is long."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
