"""Every loss by its name: its function, and what is known of it."""

from fastadapt.losses.catalogue.describe import describe
from fastadapt.losses.catalogue.entry import Entry, Gradient
from fastadapt.losses.catalogue.listing import ALIASES, CATALOGUE, CONTAIN_MLE, FORMULAS, name_of

__all__ = [
    "ALIASES",
    "CATALOGUE",
    "CONTAIN_MLE",
    "FORMULAS",
    "Entry",
    "Gradient",
    "describe",
    "name_of",
]
