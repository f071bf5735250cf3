"""vLLM: a logits processor that draws requests' rows with our knobs, and what it drew from."""

from typing import Any

from fastadapt._ops.config import needs
from fastadapt.vllm._records import Drawn, forget, supports

__all__ = ["Drawn", "FusedSampler", "forget", "supports"]
__dir__ = __all__.copy  # what is not public is not listed


def __getattr__(name: str) -> Any:
    """Imports the processor on first use, since it alone needs vLLM, which takes seconds."""
    if name != "FusedSampler":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with needs("fastadapt.vllm.FusedSampler", "pip install vllm"):
        from fastadapt.vllm.sampler import FusedSampler

        return FusedSampler
