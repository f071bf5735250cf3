"""transformers: generation with filters and draw fused, and a trainer without logits."""

from typing import Any

from fastadapt.hf.generation import FusedLogitsWarper, Generate, generate

__all__ = ["FusedLogitsWarper", "Generate", "LogitsFreeTrainer", "generate"]


def __getattr__(name: str) -> Any:
    """Loads the trainer when it is asked for: transformers takes seconds to import its own."""
    if name != "LogitsFreeTrainer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fastadapt.hf.trainer import LogitsFreeTrainer

    return LogitsFreeTrainer


def __dir__() -> list[str]:
    """Lists the public names."""
    return __all__
