"""Reads transformers' list of processors: warpers at its end become an adaptor, others edits."""

import math
import warnings
from typing import Any, NamedTuple

from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitNormalization,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from fastadapt.adaptor import Adaptor
from fastadapt.hf._run import splits_at

# In the order in which transformers runs them: the knob of ours, the attribute of theirs.
_WARPERS = {
    TemperatureLogitsWarper: ("temperature", "temperature"),
    TopHLogitsWarper: ("top_h", "top_h"),
    TopKLogitsWarper: ("top_k", "top_k"),
    TopPLogitsWarper: ("top_p", "top_p"),
    MinPLogitsWarper: ("min_p", "min_p"),
    TypicalLogitsWarper: ("typical_p", "mass"),
    EpsilonLogitsWarper: ("epsilon_cutoff", "epsilon"),
    EtaLogitsWarper: ("eta_cutoff", "epsilon"),
}


class Chain(NamedTuple):
    """A list of processors, split into the adaptor and what comes before it.

    Attributes:
        before: the processors that run as they are.
        edits: the ones after them that become edits and masks.
        warpers: the ones after these that `adaptor` stands for.
        adaptor: what is fused with the draw.
        normalised: whether a `LogitNormalization` follows.
    """

    before: list[LogitsProcessor]
    edits: list[LogitsProcessor]
    warpers: list[LogitsProcessor]
    adaptor: Adaptor
    normalised: bool


def chain_of(processors: LogitsProcessorList, fused_warper: type[Any]) -> Chain:
    """Splits a prepared list of processors.

    Args:
        processors: as `model.generate` prepares them.
        fused_warper: a processor class of this package, with an `adaptor`; one at the end is used
            as it is.

    Returns:
        Chain: with everything in `before` and a neutral adaptor where the warpers cannot be fused.

    Warns:
        UserWarning: a warper has a value that no `Adaptor` takes (a temperature of 1e-7, say).
    """
    body: list[Any] = list(processors)
    normalised = bool(body) and type(body[-1]) is LogitNormalization
    if normalised:
        body.pop()
    if body and type(body[-1]) is fused_warper:
        warpers, adaptor = body[-1:], body[-1].adaptor
    else:
        warpers = body[len(body) - sum(type(p) in _WARPERS for p in body) :]
        adaptor = _adaptor_of(warpers)
    if adaptor is None:
        return Chain(list(processors), [], [], Adaptor(), False)
    before = body[: len(body) - len(warpers)]
    split = splits_at(before)
    return Chain(before[:split], before[split:], warpers, adaptor, normalised)


def _adaptor_of(warpers: list[Any]) -> Adaptor | None:
    """Returns the adaptor equivalent to these warpers, None if there is none."""
    kinds = [type(warper) for warper in warpers]
    if any(kind not in _WARPERS for kind in kinds):
        return None
    names = [_WARPERS[kind][0] for kind in kinds]
    # a temperature among filters, or one filter twice, is what no adaptor has
    if len(set(names)) < len(names) or "temperature" in names[1:-1]:
        return None
    # top-k has its own minimum in top_k already, top-h has none
    own = (TemperatureLogitsWarper, TopKLogitsWarper)
    guarded = [w for w in warpers if type(w) not in own]
    keep = {getattr(w, "min_tokens_to_keep", 1) for w in guarded} or {1}
    few = any(w.top_k < max(keep) for w in warpers if type(w) is TopKLogitsWarper)
    finite = any(getattr(w, "filter_value", -math.inf) != -math.inf for w in warpers)
    if few or finite or len(keep) > 1:
        return None
    knobs: dict[str, Any] = {}
    try:
        for warper in warpers:
            knob, attribute = _WARPERS[type(warper)]
            value = getattr(warper, attribute)
            knobs[knob] = int(value) if knob == "top_k" else float(value)
        ordered = kinds == [kind for kind in _WARPERS if kind in kinds]
        order = "hf" if ordered else tuple(names)
        return Adaptor(**knobs, min_tokens_to_keep=keep.pop(), order=order)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        warnings.warn(f"{error}; transformers' own warpers run instead of fused ones", stacklevel=6)
        return None
