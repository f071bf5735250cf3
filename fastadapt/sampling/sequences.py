"""Sequences of tokens with biases, made ready once for every step."""

from collections.abc import Mapping, Sequence
from typing import Any

from fastadapt._ops.checks import instance, integer
from fastadapt._ops.history import biases_of
from fastadapt.sampling.numbers import real


class Sequences:
    """Biases of the last tokens of sequences, which `History.sequences` gives where the others are.

    Examples:
        >>> Sequences({(5,): 1.0, (1, 2, 3): -float("inf")})
        Sequences(2 sequences)

    Args:
        biases (Mapping): of sequences of one id or more, each a tuple, to numbers: those that are
            added, in [-1e28, 1e28], or -inf for what must not be.

    Raises:
        TypeError: no mapping, a key that is no tuple of integers, a value that is no number.
        ValueError: an empty sequence, an id out of int32's range, another number.
    """

    def __init__(self, biases: Mapping[Sequence[int], float]) -> None:
        """Checks and orders the sequences."""
        instance("sequences", biases, Mapping, "a mapping of tuples of ids to numbers")
        for ids, bias in biases.items():
            instance("sequences", ids, tuple, "tuples of ids")
            if not ids:
                raise ValueError("sequences: expected one id or more, got ()")
            for i in ids:
                integer("sequences", i, 0, 2**31 - 1)
            if bias != float("-inf"):
                real(f"sequences[{ids}]", bias, signed=True)
        # Biases of one id add up in the order of transformers: single ids, then the others by
        # length, of which the first that was given comes first.
        lengths = dict.fromkeys([1, *map(len, biases)])
        places = {length: at for at, length in enumerate(lengths)}
        ordered = sorted(biases, key=lambda ids: (ids[-1], places[len(ids)]))
        self._of = biases_of(ordered, [float(biases[ids]) for ids in ordered])
        self._given = {ids: float(biases[ids]) for ids in biases}

    def __len__(self) -> int:
        """Returns how many there are."""
        return len(self._given)

    def __reduce__(self) -> tuple[Any, ...]:
        """Returns what makes an equal one: it can be sent to a process."""
        return type(self), (self._given,)

    def __repr__(self) -> str:
        """Says how many there are."""
        return f"Sequences({len(self)} sequences)"
