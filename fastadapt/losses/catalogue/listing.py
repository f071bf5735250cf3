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


def name_of(name: str) -> str:
    """Returns the name of a loss in `FORMULAS`, given that or an alias; unknown ones as they are.

    Examples:
        >>> from fastadapt.losses import name_of
        >>> name_of("sigmoid"), name_of("orpo")
        ('dpo', 'orpo')
    """
    return ALIASES.get(name, name)
