"""Arguments that `model.generate` takes by name and hands to no callable."""

import inspect
from typing import Any

from transformers import GenerationMixin
from transformers.generation.streamers import BaseStreamer

# How to have each.
_UNREACHABLE = {
    "streamer": "pass custom_generate=generate.using(streamer=...) instead",
    "synced_gpus": "pass custom_generate=generate.using(synced_gpus=True) instead",
    "assistant_model": "pass custom_generate=generate.using(assistant_model=...) instead",
}


def refuse_unreachable(model: Any, synced_gpus: bool) -> None:
    """Raises if `model.generate` got an argument that it does not pass on to a callable.

    Such an argument is only in that call's frame. A streamer is ended first: its consumer would
    wait for ever.
    """
    code = inspect.unwrap(GenerationMixin.generate).__code__
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    given = {} if frame is None or frame.f_locals.get("self") is not model else frame.f_locals
    for name, instead in _UNREACHABLE.items():
        value = given.get(name)
        if value is None or value is False or (name == "synced_gpus" and synced_gpus):
            continue
        if isinstance(value, BaseStreamer):
            value.end()
        raise ValueError(
            f"{name}: expected none beside custom_generate, because transformers hands it to no "
            f"callable, got {type(value).__name__}; {instead}"
        )
