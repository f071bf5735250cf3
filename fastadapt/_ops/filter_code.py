"""An integer that tells an operator the filter order and which knobs may act.

Bit 0 is the order of the filters. Knobs may be on a device, where the host does not read them: bit
1 says that the following bits are known, one for each knob in the order of `adaptor.KNOBS`, set
where the knob may do something in some row (temperature: where it may be 0; min_tokens_to_keep:
where it may be more than 1). A code without bit 1 leaves all open.
"""

from collections.abc import Iterable
from functools import reduce
from operator import or_

_ORDER = 1
_KNOWN = 2
_FIRST_KNOB = 2
_END = 1 << 10  # of codes: there are eight knobs


def filter_code(order: int, may_act: Iterable[bool]) -> int:
    """Encodes an order (0 or 1) and which knobs may act."""
    return order | _KNOWN | sum(acts << (_FIRST_KNOB + i) for i, acts in enumerate(may_act))


def order_of(code: int) -> int:
    """Decodes the order.

    Raises:
        ValueError: it is no code.
    """
    if not (code in (0, 1) or (0 < code < _END and is_known(code))):
        raise ValueError(f"order: expected 0, 1 or the filter_code of an Adaptor, got {code}")
    return code & _ORDER


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
