"""Losses that reward chosen responses and penalise rejected ones, as formulas on log-odds."""

from fastadapt.losses.candidates import previous_tokens, top_k_divergence
from fastadapt.losses.catalogue.describe import describe
from fastadapt.losses.catalogue.listing import CATALOGUE
from fastadapt.losses.divergence import linear_divergence
from fastadapt.losses.formulas import (
    candidate_unlikelihood_penalty,
    exmate_loss,
    exmate_penalty,
    mate_loss,
    mate_penalty,
    mle_loss,
    unlikelihood_loss,
    unlikelihood_penalty,
)
from fastadapt.losses.linear_mle import linear_mle_loss
from fastadapt.losses.mixture import FORMULAS, RewardPenalizeLoss
from fastadapt.losses.named import ALIASES, CONTAIN_MLE, name_of
from fastadapt.losses.negatives import linear_top_k, repeated_ngrams
from fastadapt.losses.policy import (
    clipped_ratio_loss,
    reinforce_loss,
    weighted_reinforce_loss,
)
from fastadapt.losses.preference import (
    alphapo_loss,
    aot_loss,
    aot_unpaired_loss,
    apo_down_loss,
    apo_zero_loss,
    apo_zero_unpaired_loss,
    bco_loss,
    bco_pair_loss,
    cal_dpo_loss,
    cdpo_loss,
    cpo_loss,
    desensitized_logps,
    discopop_loss,
    dpo_loss,
    dpop_loss,
    exo_pair_loss,
    hinge_loss,
    ipo_loss,
    kto_loss,
    kto_reference_point,
    nca_pair_loss,
    orpo_loss,
    robust_loss,
    rrhf_loss,
    sigmoid_norm_loss,
    simpo_loss,
    slic_loss,
    sppo_hard_loss,
    tdpo_loss,
    tpo_loss,
    wpo_weights,
)
from fastadapt.losses.regularisers import entropy_bonus, smoothed_mle_loss, z_loss
from fastadapt.losses.responses import Responses
from fastadapt.losses.rows import label_logps, sequence_logps
from fastadapt.losses.schedules import ramp
from fastadapt.losses.support import linear_support_log_odds, support_log_odds
from fastadapt.losses.weighted import dft_loss, focal_mle_loss

__all__ = [
    "ALIASES",
    "CATALOGUE",
    "CONTAIN_MLE",
    "FORMULAS",
    "Responses",
    "RewardPenalizeLoss",
    "alphapo_loss",
    "aot_loss",
    "aot_unpaired_loss",
    "apo_down_loss",
    "apo_zero_loss",
    "apo_zero_unpaired_loss",
    "bco_loss",
    "bco_pair_loss",
    "cal_dpo_loss",
    "candidate_unlikelihood_penalty",
    "cdpo_loss",
    "clipped_ratio_loss",
    "cpo_loss",
    "describe",
    "desensitized_logps",
    "dft_loss",
    "discopop_loss",
    "dpo_loss",
    "dpop_loss",
    "entropy_bonus",
    "exmate_loss",
    "exmate_penalty",
    "exo_pair_loss",
    "focal_mle_loss",
    "hinge_loss",
    "ipo_loss",
    "kto_loss",
    "kto_reference_point",
    "label_logps",
    "linear_divergence",
    "linear_mle_loss",
    "linear_support_log_odds",
    "linear_top_k",
    "mate_loss",
    "mate_penalty",
    "mle_loss",
    "name_of",
    "nca_pair_loss",
    "orpo_loss",
    "previous_tokens",
    "ramp",
    "reinforce_loss",
    "repeated_ngrams",
    "robust_loss",
    "rrhf_loss",
    "sequence_logps",
    "sigmoid_norm_loss",
    "simpo_loss",
    "slic_loss",
    "smoothed_mle_loss",
    "sppo_hard_loss",
    "support_log_odds",
    "tdpo_loss",
    "top_k_divergence",
    "tpo_loss",
    "unlikelihood_loss",
    "unlikelihood_penalty",
    "weighted_reinforce_loss",
    "wpo_weights",
    "z_loss",
]
__dir__ = __all__.copy  # what is not public is not listed
