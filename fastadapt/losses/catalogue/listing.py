"""The losses by name, in the order in which pages list them."""

from collections.abc import Callable

from torch import Tensor

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

FORMULAS: dict[str, Callable[..., Tensor]] = {
    name: entry.formula for name, entry in CATALOGUE.items()
}
"""Every loss, by the name that `RewardPenalizeLoss` knows it by.

A formula takes the parameters of `RewardPenalizeLoss.forward` by name; its other parameters are
options of the mixture.

Examples:
    >>> from fastadapt.losses import FORMULAS
    >>> FORMULAS["dpo"] is dpo_loss
    True
    >>> [name for name in FORMULAS if name.startswith("exmate")]
    ['exmate', 'exmate_penalty']
"""

CONTAIN_MLE = frozenset({"mle", "unlikelihood", "exmate", "mate", "cpo", "orpo", "slic"})
"""The losses that contain MLE on the chosen responses; a mixture takes one of them at most.

"cpo" and "slic" contain none with `nll_weight=0`.

Examples:
    >>> from fastadapt.losses import CONTAIN_MLE
    >>> "orpo" in CONTAIN_MLE, "dpo" in CONTAIN_MLE
    (True, False)
"""

ALIASES = {"sigmoid": "dpo", "sft": "mle"}
"""Other names of losses: those of trl's `loss_type` that differ.

Examples:
    >>> from fastadapt.losses import ALIASES
    >>> ALIASES["sft"]
    'mle'
"""


# that pages and tables keep apart, by what a loss needs
FAMILIES = (
    "likelihood of the chosen side",
    "penalties on the rejected side",
    "pairs with a reference",
    "pairs without a reference",
    "single responses with a reference",
)


def name_of(name: str) -> str:
    """Returns the name of a loss in `FORMULAS`, given that or an alias; unknown ones as they are.

    Examples:
        >>> from fastadapt.losses import name_of
        >>> name_of("sigmoid"), name_of("orpo")
        ('dpo', 'orpo')
    """
    return ALIASES.get(name, name)


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
