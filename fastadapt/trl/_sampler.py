"""What trl's samplers do to logits: which can be replayed, and which filters they have."""

from collections.abc import Mapping
from typing import Any

from fastadapt.adaptor import Adaptor

# Options of a generation that change logits other than by removing them, and what leaves them be.
_CHANGES: Mapping[str, tuple[Any, ...]] = {
    "repetition_penalty": (None, 1.0),
    "encoder_repetition_penalty": (None, 1.0),
    "sequence_bias": (None,),
    "exponential_decay_length_penalty": (None,),
    "guidance_scale": (None, 1.0),
    "watermarking_config": (None,),
    "do_sample": (True,),
}
_CHANGES_OF_VLLM = ("presence_penalty", "frequency_penalty", "logit_bias", "logits_processors")
_KNOBS = ("top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h")
_KNOBS_OF_VLLM = ("top_k", "top_p", "min_p")


def check_sampler(trainer: Any, support: str) -> bool:
    """Raises unless a trainer's sampler does what a mode needs.

    Args:
        trainer: trl's, made.
        support: "replay", "recompute" or "off".

    Returns:
        bool: whether the trainer draws by one call of `model.generate` of its own.

    Raises:
        ValueError: it does not.
    """
    options = {} if trainer.use_vllm else options_of(trainer)
    does_not_tell = {
        "use_vllm=True": trainer.use_vllm,
        "use_transformers_continuous_batching=True": trainer.use_transformers_continuous_batching,
        'cache_implementation="paged"': options.get("cache_implementation") == "paged",
        "tools": getattr(trainer, "tools", None),
        "a rollout_func": getattr(trainer, "rollout_func", None),
    }
    found = [name for name, value in does_not_tell.items() if value]
    if support == "replay" and found:
        raise ValueError(
            f"support: expected 'recompute' or 'off' with {found[0]}, whose draws do not tell what "
            "they were from, got 'replay'"
        )
    if support != "off":
        _refuse_changes(trainer, options)
    if support == "recompute" and trainer.beta != 0 and trainer.ref_model is None:
        raise ValueError(
            "support: expected 'replay', or beta=0, where the reference is the policy without its "
            "adapter, got 'recompute'"
        )
    return not found


def options_of(trainer: Any) -> dict[str, Any]:
    """Returns what transformers generates by: the trainer's options, else the model's."""
    own = {k: x for k, x in vars(trainer.generation_config).items() if x is not None}
    return {**vars(trainer.model.generation_config), **own}


def filters_of(trainer: Any) -> Adaptor:
    """Returns the filters of a trainer's sampler, after its temperature."""
    if trainer.use_vllm:
        own = {name: getattr(trainer, name) for name in _KNOBS_OF_VLLM}
        knobs, order = {**own, **_extra(trainer)}, "vllm"
    else:
        knobs, order = options_of(trainer), "hf"
    names = _KNOBS_OF_VLLM if trainer.use_vllm else _KNOBS
    given = {name: knobs[name] for name in names if knobs.get(name) is not None}
    if "top_k" in given:
        given["top_k"] = max(given["top_k"], 0)  # -1 of vLLM is none
    return Adaptor(**given, order=order)


def _extra(trainer: Any) -> dict[str, Any]:
    """Returns what a user's configuration says to the sampler directly."""
    return dict(trainer.args.generation_kwargs or {})


def _refuse_changes(trainer: Any, options: Mapping[str, Any]) -> None:
    """Raises where the sampler's logits are not the trainer's, less what is removed."""
    if trainer.use_vllm:
        extra = _extra(trainer)
        options = {"repetition_penalty": trainer.repetition_penalty, **extra}
        for name in _CHANGES_OF_VLLM:
            if extra.get(name):
                raise ValueError(_message(name, None, extra[name]))
    for name, neutral in _CHANGES.items():
        value = options.get(name, neutral[0])
        if value not in neutral:
            raise ValueError(_message(name, neutral[-1], value))
    temperature = options.get("temperature")
    if temperature not in (None, trainer.temperature):
        raise ValueError(_message("temperature", trainer.temperature, temperature))


def _message(name: str, expected: Any, got: Any) -> str:
    return (
        f"{name}: expected {expected} in a generation whose trainer scores the same logits, got "
        f"{got}; support='off' trains as trl does"
    )
