"""References of the losses of preferences: float64, one pair or response after another."""

from fastadapt.reference.preference.batches import (
    aot_loss,
    aot_unpaired_loss,
    desensitized_logps,
    rrhf_loss,
    wpo_weights,
)
from fastadapt.reference.preference.margins import (
    cdpo_loss,
    discopop_loss,
    dpo_loss,
    exo_pair_loss,
    hinge_loss,
    ipo_loss,
    robust_loss,
    sigmoid_norm_loss,
)
from fastadapt.reference.preference.reference_free import (
    alphapo_loss,
    cpo_loss,
    orpo_loss,
    simpo_loss,
    slic_loss,
    tpo_loss,
)
from fastadapt.reference.preference.rewards import (
    apo_down_loss,
    apo_zero_loss,
    bco_pair_loss,
    cal_dpo_loss,
    dpop_loss,
    nca_pair_loss,
    sppo_hard_loss,
    tdpo_loss,
)
from fastadapt.reference.preference.single import (
    apo_zero_unpaired_loss,
    bco_loss,
    kto_loss,
    kto_reference_point,
)

__all__ = [
    "alphapo_loss",
    "aot_loss",
    "aot_unpaired_loss",
    "apo_down_loss",
    "apo_zero_loss",
    "apo_zero_unpaired_loss",
    "bco_loss",
    "bco_pair_loss",
    "cal_dpo_loss",
    "cdpo_loss",
    "cpo_loss",
    "desensitized_logps",
    "discopop_loss",
    "dpo_loss",
    "dpop_loss",
    "exo_pair_loss",
    "hinge_loss",
    "ipo_loss",
    "kto_loss",
    "kto_reference_point",
    "nca_pair_loss",
    "orpo_loss",
    "robust_loss",
    "rrhf_loss",
    "sigmoid_norm_loss",
    "simpo_loss",
    "slic_loss",
    "sppo_hard_loss",
    "tdpo_loss",
    "tpo_loss",
    "wpo_weights",
]
