"""The families of losses that pages and tables keep apart, by what a loss needs."""

from fastadapt.losses.catalogue.entry import Entry
from fastadapt.losses.catalogue.listing import CATALOGUE

FAMILIES = (
    "likelihood of the chosen side",
    "penalties on the rejected side",
    "pairs with a reference",
    "pairs without a reference",
    "single responses with a reference",
)


def family_of(entry: Entry) -> str:
    """Returns the family of a loss, of `FAMILIES`."""
    if "pairs" in entry.needs:
        return FAMILIES[2] if "reference" in entry.needs else FAMILIES[3]
    if "reference" in entry.needs:
        return FAMILIES[4]
    return FAMILIES[1] if entry.needs & {"unpaired", "candidates"} else FAMILIES[0]


def families() -> dict[str, list[str]]:
    """Returns the names of the losses of each family."""
    found: dict[str, list[str]] = {family: [] for family in FAMILIES}
    for name, entry in CATALOGUE.items():
        found[family_of(entry)].append(name)
    return found
