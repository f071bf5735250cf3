"""The place where trl's models score labels, and what is put there for a while."""

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import trl
from trl.trainer import utils as trl_utils

# What the forward of trl 1.16 passes, in this order.
ARGUMENTS = (
    "hidden",
    "weight",
    "bias",
    "targets",
    "temperature",
    "chunk_size",
    "final_logit_softcapping",
    "logit_scale",
    "outputs",
)
# What the forward of trl 1.16 looks up.
_FUNCTION, _COMPACTS = "_ChunkedLogProbFunction", "_use_triton"


@contextlib.contextmanager
def served(function: Any) -> Iterator[None]:
    """Replaces trl's function within the block; only used rows are scored."""
    check_hook()
    before = {name: getattr(trl_utils, name) for name in (_FUNCTION, _COMPACTS)}
    try:
        setattr(trl_utils, _FUNCTION, function)
        setattr(trl_utils, _COMPACTS, lambda device: True)
        yield
    finally:
        for name, value in before.items():
            setattr(trl_utils, name, value)


def check_hook() -> None:
    """Raises unless trl calls the function that we replace, with known arguments."""
    found = getattr(trl_utils, _FUNCTION, None)
    if getattr(found, "of_fastadapt", False):
        return
    arguments: tuple[str, ...] = ()
    if found is not None and hasattr(trl_utils, _COMPACTS):
        arguments = tuple(inspect.signature(found.forward).parameters)[1:]
    if arguments != ARGUMENTS:
        raise RuntimeError(
            f"trl {trl.__version__}: expected trl.trainer.utils.{_FUNCTION}, called with "
            f"{', '.join(ARGUMENTS)}, as in trl 1.16.0, got {', '.join(arguments) or 'none'}"
        )
