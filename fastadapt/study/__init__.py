"""Two studies built on the public functions: `tradeoff` and `gradients`."""

from importlib import import_module
from typing import Any

_SUBMODULES = ("gradients", "tradeoff")


def __getattr__(name: str) -> Any:
    """Imports a study on first use."""
    if name not in _SUBMODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    """Lists the studies."""
    return list(_SUBMODULES)
