"""Training of a causal language model on pairs of responses: log-odds, losses and steps."""

from importlib import import_module
from typing import Any

from fastadapt.training.log_odds import (
    LogOddsOf,
    forward_log_odds,
    head_log_odds,
    hidden_states,
    inputs_of,
    logits_log_odds,
    response_log_odds,
    states_at_head,
)
from fastadapt.training.steps import (
    Reference,
    pair_loss,
    reference_logps,
    sides,
    training_steps,
)

__all__ = [
    "LogOddsOf",
    "Reference",
    "forward_log_odds",
    "head_log_odds",
    "hidden_states",
    "inputs_of",
    "logits_log_odds",
    "pair_loss",
    "reference_logps",
    "response_log_odds",
    "sides",
    "states_at_head",
    "training_steps",
]

_SUBMODULES = ("head", "head_check", "pairs", "pretrained")


def __getattr__(name: str) -> Any:
    """Imports a module of this package on first use."""
    if name not in _SUBMODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    """Lists the public names and modules."""
    return sorted([*__all__, *_SUBMODULES])
