"""Every loss by its name: its function, and what is known of it."""

from fastadapt.losses.catalogue.describe import describe
from fastadapt.losses.catalogue.entry import Entry, Gradient
from fastadapt.losses.catalogue.listing import (
    ALIASES,
    CATALOGUE,
    CONTAIN_MLE,
    FAMILIES,
    FORMULAS,
    families,
    family_of,
    name_of,
)
from fastadapt.losses.catalogue.symbols import SYMBOLS, symbols_in, times

__all__ = [
    "ALIASES",
    "CATALOGUE",
    "CONTAIN_MLE",
    "FAMILIES",
    "FORMULAS",
    "SYMBOLS",
    "Entry",
    "Gradient",
    "describe",
    "families",
    "family_of",
    "name_of",
    "symbols_in",
    "times",
]
