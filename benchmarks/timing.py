"""Times several calls in turns, so that a ratio compares times of the same moments."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Call = Callable[[int], object]
Timer = Callable[[Call, range], float]  # seconds per call of the calls with these numbers


def clock(call: Call, turns: range) -> float:
    """Seconds per call by the clock of the machine."""
    start = time.perf_counter()
    for turn in turns:
        call(turn)
    return (time.perf_counter() - start) / len(turns)


def processor(call: Call, turns: range) -> float:
    """Seconds per call of the processor: of work on one thread, where others use the machine."""
    start = time.process_time()
    for turn in turns:
        call(turn)
    return (time.process_time() - start) / len(turns)


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

    Calls get a number that counts up, so that the same call can use other rows. All begin a round
    with the same one and are repeated for `slice_s` in it. After `budget_s` no further round
    begins, once there are `least_rounds`.

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


def quartiles(values: Iterable[float], digits: int = 4) -> list[float]:
    """Lower quartile, median and upper quartile."""
    found = statistics.quantiles(values, n=4, method="inclusive")
    return [round(q, digits) for q in found]


def milliseconds(seconds: Iterable[float], digits: int = 1) -> list[float]:
    """Quartiles in milliseconds."""
    return quartiles([1e3 * s for s in seconds], digits)


def microseconds(took: Mapping[str, Iterable[float]], digits: int = 2) -> dict[str, list[float]]:
    """Quartiles of each call's seconds in microseconds."""
    return {name: quartiles([1e6 * s for s in took[name]], digits) for name in took}


def times_us(took: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """How many rounds there were, and the quartiles of each call in microseconds."""
    return {"rounds": len(next(iter(took.values()))), "us": microseconds(took)}


def ratios(
    took: Mapping[str, Sequence[float]], base: str, names: Iterable[str], digits: int = 4
) -> dict[str, list[float]]:
    """Quartiles of some calls' times to those of another in the same rounds."""
    return {
        name: quartiles([a / b for a, b in zip(took[name], took[base], strict=True)], digits)
        for name in names
        if name in took
    }


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
