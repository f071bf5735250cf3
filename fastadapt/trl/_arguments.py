"""What trl's configurations say of losses, as options of a mixture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastadapt.losses.mixture import FORMULAS, RewardPenalizeLoss
from fastadapt.losses.named import defaults_of, name_of

OF_DPO = {  # options of losses, by trl's arguments for them
    "beta": "beta",
    "label_smoothing": "label_smoothing",
    "ld_alpha": "ld_alpha",
    "f_divergence_type": "f_divergence",
    "f_alpha_divergence_coef": "f_alpha",
    "discopop_tau": "discopop_tau",
}
OF_KTO = {
    "beta": "beta",
    "desirable_weight": "desirable_weight",
    "undesirable_weight": "undesirable_weight",
}
# The losses of trl's two trainers: their β is that of the arguments, changed or not.
KINDS_OF_DPO = frozenset(
    {
        *("dpo", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair"),
        *("sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down", "discopop", "sigmoid_norm"),
        "cdpo",  # trl's "sigmoid" with label smoothing
    }
)
KINDS_OF_KTO = frozenset({"kto", "apo_zero_unpaired"})


def refuse(args: Any, named: Mapping[str, str]) -> None:
    """Raises if an argument that another one replaces is not as it is by default."""
    for name, instead in named.items():
        usual, value = _usual(args, name), getattr(args, name)
        if value != usual:
            raise ValueError(f"args.{name}: expected {usual!r} ({instead} here), got {value!r}")


def options_of(
    losses: object,
    options: Mapping[str, Any] | None,
    args: Any,
    handed: Mapping[str, str],
    kinds: frozenset[str],
) -> dict[str, Any]:
    """Returns the options of a mixture, those that trl's arguments say among them.

    An argument goes to every loss that has it as an option: one that is changed, and the β of the
    kinds of the trainer. What `options` says, of all losses or of one, stays.

    Args:
        losses: the mixture, by its names.
        options: what the caller says of it.
        args: trl's arguments.
        handed: the arguments, with the names of the options.
        kinds: the losses of trl's own trainer.

    Raises:
        ValueError: an argument that is changed and reaches no loss.
    """
    known = _options_of_losses(losses)
    result: dict[str, Any] = {name_of(name): value for name, value in (options or {}).items()}
    for argument, option in handed.items():
        usual, value = _usual(args, argument), getattr(args, argument)
        value = getattr(value, "value", value)  # of an enumeration
        changed, reached = value != getattr(usual, "value", usual), False
        for name in (name for name, own in known.items() if option in own):
            own = result.get(name, {})
            said = own[option] if isinstance(own, Mapping) and option in own else None
            said = result.get(option) if said is None else said
            if said is None and (changed or (option == "beta" and name in kinds)):
                result[name] = {**own, option: value}
                said = value
            reached |= said == value
        if changed and not reached:
            raise ValueError(
                f"args.{argument}: expected {usual!r}, or a loss whose {option} it is, got "
                f"{value!r} for {', '.join(known) or 'none'}"
            )
    return result


def ld_alpha_of(mixture: RewardPenalizeLoss) -> float | None:
    """Returns how the log P of a reference counts tokens beyond the shorter response's length.

    Raises:
        ValueError: losses that look at the reference count them differently.
    """
    found = {
        name: mixture.options_of(name).get("ld_alpha")
        for name in mixture.weights
        if "ref_chosen_logps" in mixture.inputs_of(name)
    }
    values = set(found.values())
    if len(values) > 1:
        raise ValueError(
            f"ld_alpha: expected the same of all losses that look at the reference, got {found}"
        )
    value: float | None = next(iter(values), None)
    return value


def _options_of_losses(losses: object) -> dict[str, set[str]]:
    """Returns the names of the options of each loss that there is."""
    named = losses if isinstance(losses, Mapping) else {}
    names = [name_of(name) for name in named if name_of(name) in FORMULAS]
    return {name: set(defaults_of(FORMULAS[name])) for name in names}


def _usual(args: Any, name: str) -> Any:
    """Returns an argument's default."""
    default = type(args).__dataclass_fields__[name]
    return default.default_factory() if callable(default.default_factory) else default.default
