"""Weights that follow the progress of a run."""

from collections.abc import Callable

from fastadapt._ops.checks import number


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
