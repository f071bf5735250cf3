"""transformers: generation with filters and draw fused, and a trainer without logits."""

from typing import Any

try:
    from fastadapt.hf.generation import FusedLogitsWarper, Generate, generate
except (ImportError, RuntimeError) as error:  # transformers raises both
    why = str(error).partition("\n")[0]
    raise ImportError(
        f"fastadapt.hf cannot be imported ({why}): what it needs comes with "
        'pip install "fastadapt[demo]"'
    ) from error

__all__ = ["FusedLogitsWarper", "Generate", "LogitsFreeTrainer", "generate"]
__dir__ = __all__.copy  # what is not public is not listed


def __getattr__(name: str) -> Any:
    """Loads the trainer when it is asked for: transformers takes seconds to import its own."""
    if name != "LogitsFreeTrainer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fastadapt.hf.trainer import LogitsFreeTrainer

    return LogitsFreeTrainer
