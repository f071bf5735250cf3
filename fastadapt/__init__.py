"""Fused sampling adaptors and reward-penalise losses for language models."""

from importlib.metadata import version

from fastadapt.adaptor import Adaptor
from fastadapt.margins import candidate_margins, label_margins, linear_label_margins
from fastadapt.results import Sample, Score
from fastadapt.sampling import adapted_logps, adapted_margins, filter_logits, sample, score

__version__ = version("fastadapt")
__all__ = [
    "Adaptor",
    "Sample",
    "Score",
    "adapted_logps",
    "adapted_margins",
    "candidate_margins",
    "filter_logits",
    "label_margins",
    "linear_label_margins",
    "sample",
    "score",
]
