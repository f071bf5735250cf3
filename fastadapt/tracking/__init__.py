"""Tracks what training steps do to the chosen and the rejected responses."""

from typing import Any

from fastadapt._ops.config import needs_extra
from fastadapt.tracking.tracker import RewardPenalizeTracker, track

__all__ = ["RewardPenalizeTracker", "TrackerCallback", "track"]
__dir__ = __all__.copy  # what is not public is not listed


def __getattr__(name: str) -> Any:
    """Imports the callback on first use, since it needs transformers."""
    if name != "TrackerCallback":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        with needs_extra("fastadapt.tracking.TrackerCallback", "demo"):
            from fastadapt.tracking.callback import TrackerCallback
    except ImportError as error:
        raise AttributeError(str(error)) from error

    return TrackerCallback
