"""Prompts, and what a model reads before it answers, with or without a system prompt."""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jinja2 import TemplateError
from torch import Tensor

from fastadapt.training.pairs import PAIRS

# Asks for what alignment aims at; the prior reads no system prompt.
SYSTEM = (
    "You are a safe, honest and helpful assistant. Give helpful answers, and refuse politely "
    "whatever could harm anyone."
)
MAX_CHARACTERS = 256  # the released code keeps prompts shorter than that
_FIRST_TURN = re.compile(r"\n\nHuman:(.*?)(?:\n\nAssistant:|$)", re.DOTALL)


class Side(NamedTuple):
    """One of the two distributions: a model on the CPU, its tokenizer, a system prompt or none."""

    model: Any
    tokenizer: Any
    system: str | None = None


class Prompts(NamedTuple):
    """Prompts, with counts of those that were left out.

    Attributes:
        texts: those that are used.
        read: entries of the file.
        duplicates, too_long, empty: entries left out for that reason.
    """

    texts: list[str]
    read: int
    duplicates: int
    too_long: int
    empty: int


def builtin_prompts() -> Prompts:
    """Returns the prompts of the package's own preference pairs, for a quick study."""
    texts = [pair.prompt for pair in PAIRS if isinstance(pair.prompt, str)]
    return Prompts(texts, len(texts), 0, 0, 0)


def read_prompts(path: str | os.PathLike[str], *, seed: int = 42) -> Prompts:
    """Reads prompts and shuffles them.

    As in the released code, dialogues give their first human turn, and what has 256 characters or
    more is left out. Unlike there, so is what has been seen before.

    Args:
        path: a text file with a prompt a line, or JSON Lines (`.jsonl`), each a string, an object
            with "prompt", or one with "chosen", a dialogue in the form of HH-RLHF; gzipped if the
            name ends in ".gz".
        seed: of the order.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line has another form (the message has its number), or no prompt is left.
    """
    path = Path(path)
    data = path.read_bytes()
    try:
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected text in UTF-8, gzipped for .gz, got {error}") from error
    is_json = ".jsonl" in path.suffixes[-2:]
    lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    found = [_prompt_of(path.name, n, line) if is_json else line.strip() for n, line in lines]
    full = [prompt for prompt in found if prompt]
    short = [prompt for prompt in full if len(prompt) < MAX_CHARACTERS]
    unique = list(dict.fromkeys(short))
    if not unique:
        raise ValueError(
            f"{path.name}: expected prompts of 1 to {MAX_CHARACTERS - 1} characters, got none in "
            f"{len(found)} lines"
        )
    random.Random(seed).shuffle(unique)
    return Prompts(
        unique, len(found), len(short) - len(unique), len(full) - len(short), len(found) - len(full)
    )


def context_ids(side: Side, prompt: str) -> Tensor:
    """Returns the tokens before an answer, (1, T), int64.

    The prompt is a user message of the chat template. Without a system prompt there is no system
    turn at all, even where the template has a default one. Tokenizers without a template get
    system prompt and prompt as two paragraphs.

    Raises:
        ValueError: the template takes no system prompt, or nothing is left to read.
    """
    tokenizer = side.tokenizer
    if tokenizer.chat_template:
        ids = tokenizer(_render(tokenizer, side.system, prompt), add_special_tokens=False).input_ids
    else:
        text = prompt if side.system is None else f"{side.system}\n\n{prompt}"
        ids = tokenizer(text).input_ids
    if not ids:
        raise ValueError(f"prompt: expected one with at least one token, got {prompt!r}")
    return torch.tensor([ids])


def start_ids(side: Side) -> Tensor:
    """Returns the first token of a text without a prompt, (1, 1), int64."""
    tokenizer = side.tokenizer
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return torch.tensor([[token]])
    raise ValueError("tokenizer: expected one with a first or an end token, got neither")


def end_ids(side: Side) -> Tensor:
    """Returns the tokens that end an answer, (E,), int64.

    Raises:
        ValueError: neither the model nor the tokenizer names one.
    """
    ends = side.model.generation_config.eos_token_id
    listed = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    if side.tokenizer.eos_token_id is not None:
        listed.append(side.tokenizer.eos_token_id)
    if not listed:
        raise ValueError("tokenizer: expected one with an end token, got none")
    return torch.tensor(sorted(set(listed)))


def check_sides(aligned: Side, prior: Side) -> None:
    """Raises unless both sides give a distribution over the same tokens.

    Raises:
        ValueError: the vocabularies differ, or the heads have different sizes.
    """
    ours, theirs = aligned.tokenizer.get_vocab(), prior.tokenizer.get_vocab()
    if ours != theirs:
        differing = [
            token for token in ours.keys() | theirs if ours.get(token) != theirs.get(token)
        ]
        raise ValueError(
            f"vocabularies: expected the same tokens for both models, got {len(ours)} and "
            f"{len(theirs)} tokens, {len(differing)} with different ids, such as "
            f"{min(differing)!r}"
        )
    heads = [side.model.get_output_embeddings().weight.shape[0] for side in (aligned, prior)]
    if heads[0] != heads[1]:
        raise ValueError(f"vocabularies: expected heads of one size, got {heads[0]} and {heads[1]}")


def check_lengths(sides: Sequence[Side], prompts: Sequence[str], new_tokens: int) -> None:
    """Raises unless every prompt and its answer fit both models.

    Raises:
        ValueError: one does not; the message has its number and the lengths.
    """
    for side in sides:
        limit = getattr(side.model.config, "max_position_embeddings", None)
        if limit is None:
            continue
        for number, prompt in enumerate(prompts, 1):
            length = context_ids(side, prompt).shape[1]
            if length + new_tokens > limit:
                raise ValueError(
                    f"prompt {number}: expected at most {limit - new_tokens} tokens, with its "
                    f"system prompt, beside {new_tokens} new ones, since the model has {limit} "
                    f"positions; got {length}"
                )


def _render(tokenizer: Any, system: str | None, prompt: str) -> str:
    """Returns the chat template's text; without a system prompt, the part after the system turn."""
    turn = {"role": "system", "content": SYSTEM if system is None else system}
    user = {"role": "user", "content": prompt}

    def rendered(messages: list[dict[str, str]], answers: bool) -> str:
        return str(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answers)
        )

    try:
        whole, head = rendered([turn, user], True), rendered([turn], False)
    except TemplateError as error:
        if system is None:
            return rendered([user], True)  # a template without system turns has no default one
        raise ValueError(
            f"chat template: expected one that takes a system prompt, got: {error}"
        ) from error
    if system is not None:
        return whole
    rest = whole.removeprefix(head)
    # a template that puts the system prompt into the user's turn has no turn to leave out
    return rendered([user], True) if turn["content"] in rest else rest


def _prompt_of(name: str, number: int, line: str) -> str:
    """Returns the prompt of a JSON line."""
    try:
        entry = json.loads(line)
        if isinstance(entry, str):
            return entry.strip()
        if "prompt" in entry:
            return str(entry["prompt"]).strip()
        turn = _FIRST_TURN.search(entry["chosen"])
        if turn is None:
            raise ValueError("no human turn")
        return turn[1].strip()
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{name}, line {number}: expected a string, an object with 'prompt', or one with "
            f"'chosen', a dialogue that begins with a human turn; got {line[:60]!r}"
        ) from error
