"""An integer that tells an operator the order of the filters and which knobs may act.

Knobs may be on a device, where the host does not read them. Bit 0 is a named order, 0 or 1. Bit 1
says that the following bits are known, one for each knob in the order of `adaptor.KNOBS`, set where
the knob may do something in some row (temperature: where it may be 0; min_tokens_to_keep: where it
may be more than 1). A code without bit 1 leaves all open. Then come the filters of an order without
a name, four bits each, and a bit that is set where the temperature comes last.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache, reduce
from operator import or_

NUM_KNOBS = 14
XTC = 12  # the knob of a filter is its number; of XTC, that of its probability
# Named orders. Those of logits come first, as their papers and llama.cpp have them, XTC last.
ORDERS = ((8, 9, 11, 1, 2, 3, 10, 4, 5, 6, XTC), (8, 9, 11, 3, 1, 2, 10, 4, 5, 6, XTC))

_ORDER = 1
_KNOWN = 2
_FIRST_KNOB = 2
_FILTERS = _FIRST_KNOB + NUM_KNOBS
_BITS = 4  # of a filter: csrc/kernels.h
_LAST = 1 << (_FILTERS + _BITS * len(ORDERS[0]))
_SEQUENCE = _LAST - (1 << _FILTERS)
_END = 2 * _LAST  # of codes


def filter_code(
    order: int | Sequence[int], may_act: Iterable[bool], temperature_last: bool = False
) -> int:
    """Encodes an order, 0 or 1 or filters, and which knobs may act."""
    sequence = 0
    if not isinstance(order, int):
        sequence = _packed(order) << _FILTERS
        order = 0
    known = sum(acts << (_FIRST_KNOB + i) for i, acts in enumerate(may_act))
    return order | _KNOWN | known | sequence | (_LAST if temperature_last else 0)


def _packed(filters: Sequence[int]) -> int:
    """Packs filters, the first in the lowest bits."""
    return sum(knob << (_BITS * i) for i, knob in enumerate(filters))


def order_of(code: int) -> int:
    """Decodes what a code says of the order: a code that leaves open which knobs may act.

    Raises:
        ValueError: it is no code.
    """
    if not (code in (0, 1) or (0 < code < _END and is_known(code))):
        raise ValueError(f"order: expected 0, 1 or the filter_code of an Adaptor, got {code}")
    return code & (_ORDER | _SEQUENCE | _LAST)


def temperature_last(code: int) -> bool:
    """Whether filters run before the temperature divides."""
    return bool(code & _LAST)


@lru_cache
def filters_of(code: int) -> tuple[int, ...]:
    """Decodes the filters that may act, by their knobs, in their order."""
    sequence = (order_of(code) & _SEQUENCE) >> _FILTERS
    if not sequence:
        return tuple(knob for knob in ORDERS[code & _ORDER] if may_act(code, knob))
    places = range(0, sequence.bit_length(), _BITS)
    filters = ((sequence >> at) & (2**_BITS - 1) for at in places)
    return tuple(knob for knob in filters if may_act(code, knob))


@lru_cache
def packed_filters(code: int) -> int:
    """Returns the same as the kernels take them: four bits each, the first in the lowest ones."""
    return _packed(filters_of(code))


def is_known(code: int) -> bool:
    """Whether a code says which knobs may act."""
    return bool(code & _KNOWN)


def may_act(code: int, knob: int) -> bool:
    """Whether the knob at a position may act in some row."""
    return not is_known(code) or bool(code >> (_FIRST_KNOB + knob) & 1)


def joined(codes: Iterable[int]) -> int:
    """Combines the codes of several adaptors of one order."""
    codes = list(codes)
    if not all(map(is_known, codes)):
        return order_of(codes[0])
    return reduce(or_, codes)
