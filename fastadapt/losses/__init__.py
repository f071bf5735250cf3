"""Losses that reward chosen responses and penalise rejected ones, as formulas on log-odds."""

from fastadapt.losses.candidates import previous_tokens, top_k_divergence
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
from fastadapt.losses.mixture import CONTAIN_MLE, FORMULAS, RewardPenalizeLoss
from fastadapt.losses.policy import (
    clipped_ratio_loss,
    reinforce_loss,
    weighted_reinforce_loss,
)
from fastadapt.losses.preference import dpo_loss
from fastadapt.losses.regularisers import entropy_bonus, smoothed_mle_loss, z_loss
from fastadapt.losses.responses import Responses, label_logps, sequence_logps
from fastadapt.losses.support import linear_support_log_odds, support_log_odds

__all__ = [
    "CONTAIN_MLE",
    "FORMULAS",
    "Responses",
    "RewardPenalizeLoss",
    "candidate_unlikelihood_penalty",
    "clipped_ratio_loss",
    "dpo_loss",
    "entropy_bonus",
    "exmate_loss",
    "exmate_penalty",
    "label_logps",
    "linear_divergence",
    "linear_mle_loss",
    "linear_support_log_odds",
    "mate_loss",
    "mate_penalty",
    "mle_loss",
    "previous_tokens",
    "reinforce_loss",
    "sequence_logps",
    "smoothed_mle_loss",
    "support_log_odds",
    "top_k_divergence",
    "unlikelihood_loss",
    "unlikelihood_penalty",
    "weighted_reinforce_loss",
    "z_loss",
]
__dir__ = __all__.copy  # what is not public is not listed
