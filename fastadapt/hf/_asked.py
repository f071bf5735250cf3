"""What a call of `model.generate` asks for, read from its arguments and the model."""

from typing import Any

import torch
from transformers import GenerationConfig
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_managed_module

from fastadapt._ops.checks import flag


def is_asked(name: str, value: bool, config: GenerationConfig) -> bool:
    """Returns a flag whose results are in a dictionary; raises where there is none."""
    flag(name, value)
    if value and not config.return_dict_in_generate:
        raise ValueError(f"{name}: expected return_dict_in_generate=True beside it, got False")
    return value


def has_drafts(config: GenerationConfig, assistant_model: Any) -> bool:
    """Whether tokens are drafted; raises unless one sequence a row is sampled or searched."""
    mode = config.get_generation_mode(assistant_model)
    if mode not in ("sample", "greedy_search", "assisted_generation"):
        raise ValueError(
            f"generation mode: expected sampling or greedy search, got {mode.value}; "
            "set num_beams=1 and no contrastive, DoLa or constraint option"
        )
    return mode == "assisted_generation"


def is_sharded(model: Any) -> bool:
    """Whether ranks share the weights and so must call the model equally often."""
    zero3 = is_deepspeed_zero3_enabled()
    if not (zero3 or is_fsdp_managed_module(model)):
        return False
    distributed = torch.distributed
    return (
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    )
