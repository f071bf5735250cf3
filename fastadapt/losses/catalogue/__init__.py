"""What is known of every loss beside its code."""

from fastadapt.losses.catalogue.describe import describe
from fastadapt.losses.catalogue.entry import Entry, Gradient
from fastadapt.losses.catalogue.listing import (
    CATALOGUE,
    FAMILIES,
    families,
    family_of,
)
from fastadapt.losses.catalogue.symbols import SYMBOLS, symbols_in, times

__all__ = [
    "CATALOGUE",
    "FAMILIES",
    "SYMBOLS",
    "Entry",
    "Gradient",
    "describe",
    "families",
    "family_of",
    "symbols_in",
    "times",
]
