"""Rewards of a user: a function by its name, or a reward model of transformers."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fastadapt.study.corpora import Reward


def reward_function(name: str) -> Reward:
    """Imports a reward.

    Args:
        name: "MODULE:FUNCTION"; the function takes a prompt and a list of texts.

    Raises:
        ValueError: the name has another form, or there is no such module or function.
    """
    module, _, function = name.partition(":")
    if not module or not function:
        raise ValueError(f"reward: expected MODULE:FUNCTION, got {name!r}")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"reward: {name!r} cannot be imported: {error}") from error
    if not callable(found):
        raise ValueError(f"reward: expected a function, got {found!r}")
    reward: Reward = found
    return reward


def reward_model(name: str) -> Reward:
    """Loads a sequence classifier with one output as a reward of prompt and text.

    Raises:
        ValueError: it cannot be loaded, or has another number of outputs.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForSequenceClassification.from_pretrained(name).eval()
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"reward model: {name!r} cannot be loaded: {reason}") from error
    if model.config.num_labels != 1:
        raise ValueError(f"reward model: expected one output, got {model.config.num_labels}")

    @torch.inference_mode()
    def reward(prompt: str, texts: Sequence[str]) -> list[float]:
        if tokenizer.chat_template:
            turns = [
                [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]
                for text in texts
            ]
            whole = [tokenizer.apply_chat_template(turn, tokenize=False) for turn in turns]
        else:
            whole = [f"{prompt}\n\n{text}" for text in texts]
        values = []
        for text in whole:  # one by one: padding needs a pad token, which many lack
            inputs = tokenizer(text, return_tensors="pt", truncation=True)
            values.append(float(model(**inputs).logits[0, 0]))
        return values

    return reward
