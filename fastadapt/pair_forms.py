"""The forms in which people keep preference pairs, and what is wrong with an entry of none."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

_TURN = "\n\nAssistant:"

Message = Mapping[str, str]


class Pair(NamedTuple):
    """A prompt, text or the messages of a chat, with a good and a bad response."""

    prompt: str | Sequence[Message]
    good: str
    bad: str


def pair_of(entry: Any) -> Pair:
    """Returns the pair that an entry of a data set holds.

    Args:
        entry: a mapping with "chosen" and "rejected", and perhaps "prompt":

            - three strings: a prompt and two responses, as they are;
            - "chosen" and "rejected" alone, strings: two dialogues of HH-RLHF
              (`\\n\\nHuman: ... \\n\\nAssistant: ...`), whose prompt is what they share up to the
              last turn of the assistant that both begin;
            - lists of messages `{"role": ..., "content": ...}`: the responses are the last ones, of
              the assistant, after the prompt's or after the same messages in both. A prompt that is
              a string is the user's message.

    Raises:
        ValueError: what was expected and what there is instead.
    """
    if not isinstance(entry, Mapping):
        raise ValueError(f"expected an object, got {_short(entry)}")
    for name in ("chosen", "rejected"):
        if name not in entry:
            raise ValueError(f"expected 'chosen' and 'rejected', got {_short(sorted(entry))}")
        if not isinstance(entry[name], str | list):
            raise ValueError(f"{name}: expected a string or messages, got {_short(entry[name])}")
    good, bad, prompt = entry["chosen"], entry["rejected"], entry.get("prompt")
    if type(good) is not type(bad):
        raise ValueError("expected 'chosen' and 'rejected' of one kind, got a string and a list")
    if isinstance(good, list):
        return _chat(prompt, good, bad)
    if prompt is None:
        return _dialogues(good, bad)
    if not isinstance(prompt, str) or not prompt:
        raise ValueError(f"prompt: expected a string that is not empty, got {_short(prompt)}")
    for name, text in (("chosen", good), ("rejected", bad)):
        if not text:
            raise ValueError(f"{name}: expected a response that is not empty, got ''")
    return Pair(prompt, good, bad)


def _dialogues(good: str, bad: str) -> Pair:
    """Two dialogues of HH-RLHF."""
    shared = os.path.commonprefix([good, bad]).rfind(_TURN)
    if shared < 0:
        raise ValueError(
            "expected 'chosen' and 'rejected' that share all up to a turn of the assistant "
            f"({_TURN!r}) or a 'prompt', got {_short(good)}"
        )
    end = shared + len(_TURN)
    return Pair(good[:end], good[end:], bad[end:])


def _chat(prompt: Any, good: list[Any], bad: list[Any]) -> Pair:
    """Two lists of messages."""
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    lists = {"prompt": [] if prompt is None else prompt, "chosen": good, "rejected": bad}
    for name, messages in lists.items():
        _check_messages(name, messages)
    first = lists["prompt"] or good[:-1]
    responses = []
    for name, messages in (("chosen", good), ("rejected", bad)):
        # some data sets repeat the prompt
        rest = messages[len(first) :] if messages[: len(first)] == first else messages
        if len(rest) != 1 or rest[0]["role"] != "assistant":
            roles = [message["role"] for message in rest]
            raise ValueError(f"{name}: expected one message of the assistant, got {roles}")
        responses.append(rest[0]["content"])
    if not first:
        raise ValueError("prompt: expected messages before the responses, got none")
    return Pair(first, *responses)


def _check_messages(name: str, messages: Any) -> None:
    """Raises unless these are messages."""
    for message in messages if isinstance(messages, list) else [messages]:
        fields = message if isinstance(message, Mapping) else {}
        if not all(isinstance(fields.get(k), str) for k in ("role", "content")):
            expected = "messages with 'role' and 'content'"
            raise ValueError(f"{name}: expected {expected}, got {_short(message)}")


def _short(value: Any) -> str:
    """A value as it is shown in an error."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
