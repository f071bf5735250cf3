"""Rewards of a user: a function given by name, or a reward model of transformers."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from operator import attrgetter
from textwrap import shorten
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

Reward = Callable[[str, Sequence[str]], Sequence[float]]


def reward_function(name: str) -> Reward:
    """Imports a reward function, also from the current folder, as `python -m` would.

    Args:
        name: "MODULE:FUNCTION"; the function takes a prompt and a list of texts.

    Returns:
        The function; what it raises comes as a ValueError of one line that names it.

    Raises:
        ValueError: the name has another form, there is no such module or function, or the module
            cannot be imported.
    """
    module, _, function = name.partition(":")
    if not module or not function or "/" in module or module.endswith(".py"):
        raise ValueError(f"reward: expected MODULE:FUNCTION, got {name!r}")
    folder = os.getcwd()
    try:
        with _importable(folder):
            found = attrgetter(function)(importlib.import_module(module))
    except (Exception, SystemExit) as error:  # the module's own errors are of any kind
        raise ValueError(
            f"reward: {name!r} cannot be imported, from {folder} or as installed: {_line(error)}"
        ) from error
    if not callable(found):
        raise ValueError(f"reward: expected a function, got {found!r}")

    def reward(*arguments: Any) -> Any:
        try:
            with _importable(folder):
                return found(*arguments)
        except (Exception, SystemExit) as error:
            prompt = shorten(str(arguments[0]), 40)
            raise ValueError(
                f"reward: {name} raised {_line(error)}, for the prompt {prompt!r}"
            ) from error

    return reward


@contextmanager
def _importable(folder: str) -> Iterator[None]:
    """Puts a folder first on the import path, within the block."""
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with suppress(ValueError):  # whoever took it away has done so for good
            sys.path.remove(folder)


def _line(error: BaseException) -> str:
    """Formats an error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def reward_model(name: str) -> Reward:
    """Loads a sequence classifier with one output as a reward of prompt and text.

    Raises:
        ValueError: it cannot be loaded, or has another number of outputs.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForSequenceClassification.from_pretrained(name).eval()
    except Exception as error:  # what damaged files raise is of any kind
        reason = _line(error)
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
