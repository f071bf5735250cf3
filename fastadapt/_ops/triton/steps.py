"""Which passes are launched: what rows of an adaptor can need, as far as the host knows."""

from functools import lru_cache
from typing import NamedTuple

from fastadapt._ops.filter_code import is_known, may_act, order_of
from fastadapt._ops.triton.rows import (
    EPSILON,
    ETA,
    MIN_P,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    TYPICAL_P,
)

# The order of the filters by the code of an order: that of `rows.filter_at`.
FILTERS = (
    (TOP_K, TOP_P, MIN_P, TYPICAL_P, EPSILON, ETA),
    (MIN_P, TOP_K, TOP_P, TYPICAL_P, EPSILON, ETA),
)


class Steps(NamedTuple):
    """Which passes some row of a call can need."""

    order: int
    weighs: bool = True  # masses of whole rows
    bins: bool = True  # a nucleus, or typical, of a whole row
    sketches: bool = True  # top-p, for which the largest of groups may do
    filters: bool = True  # a list, and its filters
    sums: bool = True  # of survivors that no list holds


@lru_cache
def steps_of(code: int, rows: int) -> Steps:
    """The passes for bounds of a code whose knobs have so many rows, 1 where all are numbers."""
    order = order_of(code)
    used = [knob.value for knob in FILTERS[order] if may_act(code, knob.value)]
    one_bounds = rows == 1 and is_known(code)
    first = set(used[:1]) if one_bounds else set(used)
    return Steps(
        order,
        weighs=not used or not one_bounds or not first <= {TOP_K.value, MIN_P.value},
        bins=bool(first & {TOP_P.value, TYPICAL_P.value}),
        sketches=TOP_P.value in first,
        filters=bool(used) or may_act(code, TEMPERATURE.value),
        sums=not first <= {TOP_K.value},
    )
