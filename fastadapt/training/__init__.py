"""Training a causal language model on pairs of responses: log-odds, losses and steps."""

from importlib import import_module
from typing import Any

from fastadapt.training.steps import (
    MarginsOf,
    Reference,
    forward_margins,
    head_margins,
    hidden_states,
    inputs_of,
    logits_margins,
    pair_loss,
    reference_logps,
    response_margins,
    sides,
    states_at_head,
    training_steps,
)

__all__ = [
    "MarginsOf",
    "Reference",
    "forward_margins",
    "head_margins",
    "hidden_states",
    "inputs_of",
    "logits_margins",
    "pair_loss",
    "reference_logps",
    "response_margins",
    "sides",
    "states_at_head",
    "training_steps",
]

_SUBMODULES = ("head", "head_check", "pairs", "pretrained")


def __getattr__(name: str) -> Any:
    """Loads a module of this folder when it is touched."""
    if name not in _SUBMODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    """Lists the public names and modules."""
    return sorted([*__all__, *_SUBMODULES])
