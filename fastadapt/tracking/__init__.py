"""What a step does to the chosen and the rejected responses, watched while a model trains."""

from typing import Any

from fastadapt.tracking.tracker import RewardPenalizeTracker

__all__ = ["RewardPenalizeTracker", "TrackerCallback"]
__dir__ = __all__.copy  # what is not public is not listed


def __getattr__(name: str) -> Any:
    """Loads the callback when it is asked for: it needs transformers."""
    if name != "TrackerCallback":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from fastadapt.tracking.callback import TrackerCallback
    except ImportError as error:
        raise AttributeError(f"fastadapt.tracking.TrackerCallback: {error}") from error

    return TrackerCallback
