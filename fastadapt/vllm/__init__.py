"""vLLM: a logits processor that draws the rows of requests with our knobs."""

from typing import Any

from fastadapt._ops.config import needs

__all__ = ["FusedSampler"]
__dir__ = __all__.copy  # what is not public is not listed


def __getattr__(name: str) -> Any:
    """Imports the processor on first use, since it alone needs vLLM, which takes seconds."""
    if name != "FusedSampler":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with needs("fastadapt.vllm.FusedSampler", "pip install vllm"):
        from fastadapt.vllm.sampler import FusedSampler

        return FusedSampler
