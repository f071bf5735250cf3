"""transformers: generation with fused filters and draw, and a trainer without logits."""

from typing import Any

from fastadapt._ops.config import needs_extra

with needs_extra("fastadapt.hf", "demo"):
    from fastadapt.hf.generation import FusedLogitsWarper, Generate, generate

__all__ = ["FusedLogitsWarper", "Generate", "LogitsFreeTrainer", "generate"]
__dir__ = __all__.copy  # what is not public is not listed


def __getattr__(name: str) -> Any:
    """Imports the trainer on first use, since that of transformers takes seconds to import."""
    if name != "LogitsFreeTrainer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fastadapt.hf.trainer import LogitsFreeTrainer

    return LogitsFreeTrainer
