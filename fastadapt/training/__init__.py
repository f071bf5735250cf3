"""Training a causal language model on pairs of responses: log-odds, losses and steps."""

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
