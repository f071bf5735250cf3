"""Fused sampling adaptors and reward-penalise losses for language models."""

# ruff: noqa: E402, nothing is imported where the extension is not built

from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from os.path import dirname
from typing import Any

try:
    __version__ = version("fastadapt")
    # A finder of an editable installation offers its own checkout's to the sources of another.
    if (_spec := find_spec("fastadapt._C")) is None or dirname(_spec.origin or "") != __path__[0]:
        raise ModuleNotFoundError("No module named 'fastadapt._C'")
except ModuleNotFoundError as error:
    raise ImportError(
        f"fastadapt is imported from {__path__[0]}, where it is not built for this Python: run "
        "`pip install -e .` in the checkout; or, if it is installed elsewhere, start Python "
        "outside the checkout or with -P"
    ) from error

import torch  # noqa: F401  before the extension, which runs on the OpenMP runtime that torch loads

import fastadapt._C as _C  # noqa: F401
from fastadapt._ops.config import show_config
from fastadapt._ops.warm_up import WarmUp, warm_up
from fastadapt.adaptor import Adaptor
from fastadapt.linear import linear_candidate_log_odds, linear_log_odds
from fastadapt.log_odds import candidate_log_odds, label_log_odds
from fastadapt.losses import (
    Responses,
    RewardPenalizeLoss,
    candidate_unlikelihood_penalty,
    clipped_ratio_loss,
    dpo_loss,
    entropy_bonus,
    exmate_loss,
    exmate_penalty,
    label_logps,
    linear_divergence,
    linear_mle_loss,
    linear_support_log_odds,
    linear_top_k,
    mate_loss,
    mate_penalty,
    mle_loss,
    previous_tokens,
    reinforce_loss,
    repeated_ngrams,
    sequence_logps,
    smoothed_mle_loss,
    support_log_odds,
    top_k_divergence,
    unlikelihood_loss,
    unlikelihood_penalty,
    weighted_reinforce_loss,
    z_loss,
)
from fastadapt.results import Sample, Score, Support, Verified
from fastadapt.sampling.edits import Edits
from fastadapt.sampling.functions import (
    adapted_log_odds,
    adapted_logps,
    filter_logits,
    sample,
    score,
)
from fastadapt.sampling.history import History
from fastadapt.sampling.sequences import Sequences
from fastadapt.sampling.verify import verify

__all__ = [
    "Adaptor",
    "Edits",
    "History",
    "Responses",
    "RewardPenalizeLoss",
    "Sample",
    "Score",
    "Sequences",
    "Support",
    "Verified",
    "WarmUp",
    "adapted_logps",
    "adapted_log_odds",
    "candidate_log_odds",
    "candidate_unlikelihood_penalty",
    "clipped_ratio_loss",
    "dpo_loss",
    "entropy_bonus",
    "exmate_loss",
    "exmate_penalty",
    "filter_logits",
    "label_logps",
    "label_log_odds",
    "linear_candidate_log_odds",
    "linear_divergence",
    "linear_log_odds",
    "linear_mle_loss",
    "linear_support_log_odds",
    "linear_top_k",
    "mate_loss",
    "mate_penalty",
    "mle_loss",
    "previous_tokens",
    "reinforce_loss",
    "repeated_ngrams",
    "sample",
    "score",
    "sequence_logps",
    "show_config",
    "smoothed_mle_loss",
    "support_log_odds",
    "top_k_divergence",
    "unlikelihood_loss",
    "unlikelihood_penalty",
    "verify",
    "warm_up",
    "weighted_reinforce_loss",
    "z_loss",
]

_SUBMODULES = ("hf", "losses", "reference", "sglang", "study", "tracking", "training", "trl")


def __getattr__(name: str) -> Any:
    """Loads a submodule; those that need an extra which is not installed count as absent."""
    if name not in _SUBMODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return import_module(f"fastadapt.{name}")
    except ImportError as error:
        if name not in ("hf", "trl"):
            raise
        raise AttributeError(str(error)) from error  # it says what to install


def __dir__() -> list[str]:
    """Lists the public names and the submodules."""
    return sorted([*__all__, *_SUBMODULES, "__version__"])
