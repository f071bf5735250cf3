"""LoRA on a head: the adapter that is in force in a layer of peft's, or why none can be taken."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn


class Lora(NamedTuple):
    """An adapter in force: `scale * (B (A x) + bias)` is added to what its layer makes of x.

    Attributes:
        name: of the adapter in its layer.
        a: (r, H).
        b: (V, r).
        scale: its factor, of any way to choose it (rslora).
        bias: (V,) of B (`lora_bias`), or None.
    """

    name: str
    a: Tensor
    b: Tensor
    scale: float
    bias: Tensor | None

    def with_bias(self, bias: Tensor | None, dtype: Any) -> Tensor | None:
        """Returns a head's bias and the adapter's, in a dtype; each has its gradient."""
        if self.bias is None:
            return bias
        mine = self.scale * self.bias
        return (mine if bias is None else bias + mine).to(dtype)


def has_adapter(layer: Any) -> bool:
    """Whether a layer is one of an adapter's around another, in force or not."""
    return hasattr(layer, "base_layer")


def lora_of(layer: Any) -> Lora | None:
    """Returns the adapter that a layer's forward adds, None if it adds none.

    That is none while adapters are disabled; merged ones are in the weight already.

    Args:
        layer: of which `refusal_of` is None.
    """
    names = _added(layer) if has_adapter(layer) else []
    if not names:
        return None
    (name,) = names
    b = layer.lora_B[name]
    scale = float(layer.scaling[name])
    return Lora(name, layer.lora_A[name].weight, b.weight, scale, b.bias)


def refusal_of(layer: Any) -> str | None:
    """Returns what is expected of a head instead of its adapter, and what came; None: nothing."""
    if not has_adapter(layer):
        return None
    kind = type(layer).__name__
    parts = getattr(layer, "lora_A", None), getattr(layer, "lora_B", None)
    plain = all(isinstance(part, nn.ModuleDict) for part in parts) and hasattr(layer, "scaling")
    if not plain or has_adapter(layer.base_layer):
        return f"a head without an adapter or with one layer of LoRA, got {kind}"
    if layer.disable_adapters and layer.merged:
        return f"merged adapters to be unmerged before they are disabled, got {kind} with both"
    names = _added(layer)
    if len(names) > 1:
        return f"a head with one active adapter, got {names}"
    if not names:
        return None
    (name,) = names
    if name in getattr(layer, "lora_variant", {}):
        return f"a head with plain LoRA, got {type(layer.lora_variant[name]).__name__}"
    if getattr(layer, "use_dora", {}).get(name):
        return "a head with plain LoRA, got DoRA"
    dropout = layer.lora_dropout[name]
    if dropout.training and getattr(dropout, "p", 0.0) > 0:
        return (
            f"a head whose LoRA has no dropout in training (lora_dropout=0, or exclude the head), "
            f"got {dropout.p}"
        )
    return None


def _added(layer: Any) -> list[str]:
    """Returns the names of the adapters that the layer's forward adds."""
    if layer.disable_adapters or layer.merged:
        return []
    return [name for name in layer.active_adapters if name in layer.lora_A]
