"""Losses that reward chosen responses and penalise rejected ones, as formulas on log-odds."""

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
from fastadapt.losses.mixture import CONTAIN_MLE, FORMULAS, RewardPenalizeLoss
from fastadapt.losses.preference import dpo_loss
from fastadapt.losses.responses import Responses, label_logps, sequence_logps

__all__ = [
    "CONTAIN_MLE",
    "FORMULAS",
    "Responses",
    "RewardPenalizeLoss",
    "candidate_unlikelihood_penalty",
    "dpo_loss",
    "exmate_loss",
    "exmate_penalty",
    "label_logps",
    "linear_divergence",
    "mate_loss",
    "mate_penalty",
    "mle_loss",
    "sequence_logps",
    "unlikelihood_loss",
    "unlikelihood_penalty",
]
__dir__ = __all__.copy  # what is not public is not listed
