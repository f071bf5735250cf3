"""Times several calls in turns, so that a ratio compares times of the same moments."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping

Call = Callable[[int], object]
Timer = Callable[[Call, range], float]  # seconds per call of the calls with these numbers


def clock(call: Call, turns: range) -> float:
    """Seconds per call by the clock of the machine."""
    start = time.perf_counter()
    for turn in turns:
        call(turn)
    return (time.perf_counter() - start) / len(turns)


def in_turns(
    calls: Mapping[str, Call],
    *,
    rounds: int,
    budget_s: float = math.inf,
    slice_s: float = 1e-3,
    least_rounds: int = 5,
    timer: Timer = clock,
) -> dict[str, list[float]]:
    """Run every call in every round, each round beginning with another one.

    pytest-benchmark finishes one function before it begins the next; a machine that slows down in
    between would be read as a difference between them.

    Args:
        calls: called with a number that counts up, so that the same call can use other rows. In a
            round all calls begin with the same number.
        rounds: how many, if the budget allows.
        budget_s: seconds after which no further round begins, once there are `least_rounds`.
        slice_s: seconds that a call is repeated for in a round; one call if it takes longer.
        least_rounds: rounds that are run whatever they take, unless `rounds` is less.
        timer: measures a slice; that of a device waits for it.

    Returns:
        For each call its seconds per call, one value per round.
    """
    repeats = {name: _repeats(call, slice_s) for name, call in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    collects = gc.isenabled()
    gc.disable()
    try:
        end = time.perf_counter() + budget_s
        for number in range(rounds):
            if number >= least_rounds and time.perf_counter() > end:
                break
            first = number % len(names)
            for name in names[first:] + names[:first]:
                turns = range(number, number + repeats[name])
                seconds[name].append(timer(calls[name], turns))
    finally:
        if collects:
            gc.enable()
    return seconds


def ratios(values: list[float], base: list[float]) -> list[float]:
    """One ratio per round."""
    return [one / other for one, other in zip(values, base, strict=True)]


def _repeats(call: Call, slice_s: float) -> int:
    """Warm a call up and say how often it fits into a slice."""
    took = []
    for turn in range(3):
        start = time.perf_counter()
        call(turn)
        took.append(time.perf_counter() - start)
        if took[0] > 20 * slice_s:
            return 1
    return max(1, math.ceil(slice_s / min(took)))
