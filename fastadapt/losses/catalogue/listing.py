"""The losses by name, in the order in which pages list them."""

from fastadapt.losses.catalogue import likelihood, others, with_reference
from fastadapt.losses.catalogue.entry import Entry

CATALOGUE: dict[str, Entry] = {
    **likelihood.ENTRIES,
    **with_reference.ENTRIES,
    **others.ENTRIES,
}
"""What is known of every loss, by the name that `RewardPenalizeLoss` knows it by.

Examples:
    >>> from fastadapt.losses import CATALOGUE
    >>> CATALOGUE["simpo"].source
    'Meng et al. 2024, arXiv 2405.14734, eq. 6'
    >>> sorted(name for name, entry in CATALOGUE.items() if "gold" in entry.needs)
    ['tpo']
"""

# that pages and tables keep apart, by what a loss needs
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
