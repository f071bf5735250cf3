"""The forms of preference pairs in data sets, and what is wrong with an entry of none."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

_TURN = "\n\nAssistant:"
# What Python writes for messages, where JSON was meant.
_PYTHON_MESSAGES = re.compile(r"\s*\[\s*\{\s*'(role|content)'.*\}\s*\]\s*", re.DOTALL)
# Columns that change what the model sees. An entry that has one is refused, rather than trained on
# without it.
_CONTEXT = (
    *("tools", "chat_template_kwargs", "system", "documents"),
    *("image", "images", "video", "videos", "audio", "audios"),
)

Message = Mapping[str, Any]


class Pair(NamedTuple):
    """A prompt, text or the messages of a chat, with a chosen and a rejected response.

    Examples:
        >>> from fastadapt.training.pairs import Pair
        >>> Pair("Two and two?", chosen=" Four.", rejected=" Guess.").chosen
        ' Four.'
    """

    prompt: str | Sequence[Message]
    chosen: str
    rejected: str


def pair_of(entry: Any) -> Pair:
    """Returns the pair in an entry of a data set.

    Args:
        entry: a mapping with "chosen" and "rejected", and perhaps "prompt":

            - three strings: a prompt and two responses, as they are;
            - "chosen" and "rejected" alone, strings: two dialogues of HH-RLHF
              (`\\n\\nHuman: ... \\n\\nAssistant: ...`), whose prompt is what they share up to the
              last turn of the assistant that both begin;
            - lists of messages `{"role": ..., "content": ...}`: the responses are the last ones, of
              the assistant, after the prompt's or after the same messages in both, which begin
              with the prompt's. A prompt that is a string is a user's message. Messages of a prompt
              may have other fields (tool calls), which the chat template sees; fields that are
              None count as absent, here and in the entry. A list may also be JSON in a string, as
              a table has it.

            Other columns are left out, but for those that change what the model sees (tools, a
            system message, images).

    Raises:
        ValueError: what was expected and what there is instead.
    """
    if not isinstance(entry, Mapping):
        raise ValueError(f"expected an object, got {_short(entry)}")
    for name in ("chosen", "rejected"):
        if name not in entry:
            raise ValueError(
                f"expected 'chosen' and 'rejected', got {_short(sorted(map(str, entry)))}"
            )
        if not isinstance(entry[name], str | list):
            raise ValueError(f"{name}: expected a string or messages, got {_short(entry[name])}")
    for name in _CONTEXT:
        if entry.get(name):
            raise ValueError(
                f"{name}: expected pairs of prompts and responses alone, got {_short(entry[name])}"
            )
    chosen, rejected, prompt = (_value(n, entry.get(n)) for n in ("chosen", "rejected", "prompt"))
    if type(chosen) is not type(rejected):
        raise ValueError("expected 'chosen' and 'rejected' of one kind, got a string and a list")
    if isinstance(chosen, list):
        return _chat(prompt, chosen, rejected)
    if prompt is None:
        return _dialogues(_text("chosen", chosen), _text("rejected", rejected))
    if not isinstance(prompt, str) or not prompt:
        raise ValueError(
            f"prompt: expected a string that is not empty, as the responses are, got "
            f"{_short(prompt)}"
        )
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        if not text:
            raise ValueError(f"{name}: expected a response that is not empty, got ''")
    return Pair(_text("prompt", prompt), _text("chosen", chosen), _text("rejected", rejected))


def _dialogues(chosen: str, rejected: str) -> Pair:
    """Splits two dialogues of HH-RLHF into prompt and responses."""
    shared = os.path.commonprefix([chosen, rejected]).rfind(_TURN)
    if shared < 0:
        raise ValueError(
            "expected 'chosen' and 'rejected' that share all up to a turn of the assistant "
            f"({_TURN!r}) or a 'prompt', got {_short(chosen)}"
        )
    end = shared + len(_TURN)
    return Pair(chosen[:end], chosen[end:], rejected[end:])


def _chat(prompt: Any, chosen: list[Any], rejected: list[Any]) -> Pair:
    """Splits two lists of messages into prompt and responses."""
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}] if prompt else []
    first = [] if prompt is None else _messages("prompt", prompt)
    chosen, rejected = _messages("chosen", chosen), _messages("rejected", rejected)
    shared = chosen[:-1]
    if not first or (shared and shared == rejected[:-1] and _has(shared, first)):
        first = shared  # whole dialogues, beside which many data sets have the prompt again
    responses = []
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        rest = messages[len(first) :] if messages[: len(first)] == first else messages
        responses.append(_response(name, rest))
    if not first:
        raise ValueError("prompt: expected messages before the responses, got none")
    return Pair(first, *responses)


def _has(dialogue: Sequence[Message], prompt: Sequence[Message]) -> bool:
    """Whether a dialogue begins with a prompt's messages, a leading system message aside."""
    system = int(bool(prompt) and dialogue[0]["role"] == "system" != prompt[0]["role"])
    return list(dialogue[system : system + len(prompt)]) == list(prompt)


def _response(name: str, messages: Sequence[Message]) -> str:
    """Returns the text of a response that is one message of the assistant."""
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        roles = [message["role"] for message in messages]
        raise ValueError(f"{name}: expected one message of the assistant, got {_short(roles)}")
    others = sorted(set(messages[0]) - {"role", "content"})
    if others:
        raise ValueError(f"{name}: expected a response with a role and a content, got {others} too")
    if not messages[0]["content"]:
        raise ValueError(f"{name}: expected a response that is not empty, got ''")
    return str(messages[0]["content"])


def _messages(name: str, messages: Any) -> list[Message]:
    """Checks messages and drops fields that are None, which Arrow adds."""
    found: list[Message] = []
    for message in messages if isinstance(messages, list) else [messages]:
        fields = message if isinstance(message, Mapping) else {}
        said = {key: value for key, value in fields.items() if value is not None}
        calls = said.get("tool_calls") and "content" not in said
        texts = {"role": said.get("role"), "content": "" if calls else said.get("content")}
        if not all(isinstance(text, str) for text in texts.values()):
            expected = "messages with 'role' and 'content'"
            raise ValueError(f"{name}: expected {expected}, got {_short(message)}")
        for text in texts.values():
            _text(name, text)
        found.append(said)
    return found


def _value(name: str, value: Any) -> Any:
    """Returns the messages that a string holds as JSON; anything else as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    if _PYTHON_MESSAGES.fullmatch(value):
        expected = "messages as a list or as JSON"
        raise ValueError(f"{name}: expected {expected}, got Python's text of them: {_short(value)}")
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError):
        return value
    is_chat = bool(parsed) and all(isinstance(m, dict) and "role" in m for m in parsed)
    return parsed if is_chat else value


def _text(name: str, text: Any) -> str:
    """Returns a text after checking that it can be encoded."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name}: expected text, got half of a surrogate pair in {_short(text)}"
        ) from error
    return str(text)


def _short(value: Any) -> str:
    """Shortens a value for an error message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
