"""Fused sampling adaptors and reward-penalise losses for language models."""

from importlib.metadata import version

from fastadapt.adaptor import Adaptor
from fastadapt.losses import (
    Responses,
    RewardPenalizeLoss,
    candidate_unlikelihood_penalty,
    dpo_loss,
    exmate_loss,
    exmate_penalty,
    label_logps,
    mate_loss,
    mate_penalty,
    mle_loss,
    sequence_logps,
    unlikelihood_loss,
    unlikelihood_penalty,
)
from fastadapt.margins import candidate_margins, label_margins, linear_label_margins
from fastadapt.results import Sample, Score
from fastadapt.sampling import adapted_logps, adapted_margins, filter_logits, sample, score

__version__ = version("fastadapt")
__all__ = [
    "Adaptor",
    "Responses",
    "RewardPenalizeLoss",
    "Sample",
    "Score",
    "adapted_logps",
    "adapted_margins",
    "candidate_margins",
    "candidate_unlikelihood_penalty",
    "dpo_loss",
    "exmate_loss",
    "exmate_penalty",
    "filter_logits",
    "label_logps",
    "label_margins",
    "linear_label_margins",
    "mate_loss",
    "mate_penalty",
    "mle_loss",
    "sample",
    "score",
    "sequence_logps",
    "unlikelihood_loss",
    "unlikelihood_penalty",
]
