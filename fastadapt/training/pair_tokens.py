"""The token ids of a preference pair: one prompt for both responses."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

from fastadapt._ops.checks import flag, instance, integer, one_of
from fastadapt.training.pair_forms import Message, Pair

Truncation = Literal["prompt", "response", "error"]
"""What is cut from a pair that is too long; see `tokenize_pair`."""

_Ids = tuple[list[int], list[int], list[int]]


class TokenizedPair(NamedTuple):
    """The token ids of a prompt and of both responses.

    Examples:
        >>> from fastadapt.training.pairs import TokenizedPair
        >>> pair = TokenizedPair([1, 2], [3, 4, 5], [6], truncated=False)
        >>> pair.prompt_ids + pair.chosen_ids
        [1, 2, 3, 4, 5]

    Attributes:
        prompt_ids: of the prompt that both responses follow.
        chosen_ids: of the chosen response, at least one.
        rejected_ids: of the rejected response, at least one.
        truncated: whether anything was cut to fit `max_length`.
    """

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    truncated: bool


def tokenize_pair(
    tokenizer: Any,
    pair: Pair,
    *,
    max_length: int | None = None,
    truncation: Truncation = "prompt",
    chat: bool = True,
) -> TokenizedPair:
    """Returns the token ids of a pair, with one prompt for both responses.

    In a chat, all tokens are those of the chat template: it renders the prompt with its generation
    prompt, and the conversation with either response. The prompt is what the three begin with; all
    that follows belongs to a response, such as an empty block of thoughts before its text and what
    ends a turn (also a line break after the end token), and nothing is added to it. trl's
    `DPOTrainer` does the same.

    Text is tokenised as it is, with the special tokens that the tokenizer begins a text with (a
    beginning-of-sequence token once, also where the text begins with it) and its end token after
    each response. A response has the tokens that it has behind the prompt, unless those of prompt
    and response merge there: then the ones it has by itself.

    Examples:
        >>> from tokenizers import Tokenizer, models
        >>> from transformers import PreTrainedTokenizerFast
        >>> words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, "?"))
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="?")
        >>> from fastadapt.training.pairs import Pair, tokenize_pair
        >>> tokenize_pair(tokenizer, Pair("a", chosen="b", rejected="a")).chosen_ids
        [1, 2]

    Args:
        tokenizer: of transformers' kind.
        pair: to tokenise.
        max_length: tokens of the longer sequence at most, at least 2; None: as many as there are.
        truncation: what is cut from a pair that is longer:

            - "prompt": the beginning of the prompt, by what the longer response needs; where a
              response leaves no room for a token of the prompt, the ends of the responses too;
            - "response": the ends of the responses; where the prompt leaves no room for a token of
              a response, the beginning of the prompt too;
            - "error": nothing, a `ValueError` is raised.

            A beginning-of-sequence token stays; a system message is not spared. Of each response at
            least a token stays, and what lost its end has no end token.
        chat: a prompt that is text is a user's message and goes through the tokenizer's chat
            template, if it has one. Otherwise it is taken as it is. Messages always go through it.

    Raises:
        TypeError: no tokenizer, no `Pair`, or one whose prompt is neither text nor messages or
            whose responses are no text; an argument of another type.
        ValueError: a prompt or response without tokens; text for a tokenizer without an end token;
            messages without a chat template, or that it refuses, whose text it leaves out, or
            whose prompt it renders differently before a response; a `max_length` below 2; an
            unknown `truncation`; a pair that is too long, with "error".
    """
    _check(tokenizer, pair)
    if max_length is not None:
        max_length = integer("max_length", max_length, 2)
    one_of("truncation", truncation, get_args(Truncation))
    flag("chat", chat)
    is_text = isinstance(pair.prompt, str)
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if not is_text and not has_template:
        raise ValueError("tokenizer: expected one with a chat template, for prompts of messages")
    in_chat = has_template and (chat or not is_text)
    prompt, chosen, rejected = (_chat_ids if in_chat else _text_ids)(tokenizer, pair)
    named = zip(("prompt", "chosen", "rejected"), (prompt, chosen, rejected), pair, strict=True)
    for name, ids, text in named:
        if not ids:
            raise ValueError(f"{name}: expected at least one token, got none for {text!r:.60}")
    longest = max(len(chosen), len(rejected))
    if max_length is None or len(prompt) + longest <= max_length:
        return TokenizedPair(prompt, chosen, rejected, truncated=False)
    if truncation == "error":
        got = f"got {len(prompt)} of the prompt {pair.prompt!r:.60} and {longest} of a response"
        raise ValueError(f"max_length: expected a pair of at most {max_length} tokens, {got}")
    head = int(prompt[0] == tokenizer.bos_token_id)
    if truncation == "prompt":
        room = max(max_length - longest, min(head + 1, len(prompt), max_length - 1))
    else:
        room = min(len(prompt), max_length - 1)
    kept = prompt[:head] + prompt[max(len(prompt) - room + head, head) :]
    left = max_length - room
    return TokenizedPair(kept, chosen[:left], rejected[:left], truncated=True)


def _check(tokenizer: Any, pair: Pair) -> None:
    """Raises unless these are a tokenizer and a pair."""
    if not callable(tokenizer) or not hasattr(tokenizer, "eos_token_id"):
        got = type(tokenizer).__name__
        raise TypeError(f"tokenizer: expected one of transformers, got {got}")
    instance("pair", pair, Pair, "a Pair(prompt, chosen, rejected)")
    instance("prompt", pair.prompt, str | Sequence, "a string or messages")
    for name in ("chosen", "rejected"):
        instance(name, getattr(pair, name), str, "a string")


def _text_ids(tokenizer: Any, pair: Pair) -> _Ids:
    """Returns token ids of a text prompt and both responses, each with the end token."""
    end = tokenizer.eos_token_id
    if end is None:
        raise ValueError("tokenizer: expected one with an end token, got none")
    text = str(pair.prompt)
    prompt, *wholes = _beginnings(tokenizer, [text, text + pair.chosen, text + pair.rejected])
    responses = []
    for whole, response in zip(wholes, (pair.chosen, pair.rejected), strict=True):
        ids = whole[len(prompt) :]
        if whole[: len(prompt)] != prompt:  # they merge
            ids = tokenizer(response, add_special_tokens=False).input_ids
        responses.append(ids if ids and ids[-1] == end else [*ids, end])
    return prompt, responses[0], responses[1]


def _beginnings(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Returns token ids of unfinished texts: one beginning token and no end token."""
    encoded = tokenizer(texts, return_special_tokens_mask=True)
    found = []
    for ids, added in zip(encoded.input_ids, encoded.special_tokens_mask, strict=True):
        last = len(ids)
        while last > 1 and added[last - 1]:
            last -= 1
        twice = last > 1 and added[0] and ids[0] == ids[1] == tokenizer.bos_token_id
        found.append(list(ids[int(twice) : last]))
    return found


def _chat_ids(tokenizer: Any, pair: Pair) -> _Ids:
    """Returns token ids of a prompt and both responses as the chat template renders them."""
    prompt = pair.prompt
    messages: Sequence[Message] = (
        [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    )
    texts = [_rendered(tokenizer, messages, add_generation_prompt=True)]
    for response in (pair.chosen, pair.rejected):
        turn = {"role": "assistant", "content": response}
        texts.append(_rendered(tokenizer, [*messages, turn]))
    _check_texts(pair, messages, texts)
    if not texts[1].startswith(texts[0]) or not texts[2].startswith(texts[0]):
        _check_prompt(messages, texts, _rendered(tokenizer, messages))
    sequences = tokenizer(texts, add_special_tokens=False).input_ids
    shared = len(os.path.commonprefix(sequences))
    return sequences[0][:shared], sequences[1][shared:], sequences[2][shared:]


def _rendered(
    tokenizer: Any, messages: Sequence[Message], *, add_generation_prompt: bool = False
) -> str:
    """Returns messages as the chat template renders them."""
    from jinja2.exceptions import TemplateError

    try:
        text: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except (TemplateError, TypeError, ValueError) as error:
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(
            f"chat template: expected messages that it takes, got {roles}: {error}"
        ) from error
    return text


def _check_texts(pair: Pair, messages: Sequence[Message], texts: Sequence[str]) -> None:
    """Raises if the template drops the text of messages."""
    last = messages[-1]
    said = str(last.get("content") or "")
    if last["role"] == "user" and "".join(said.split()) not in "".join(texts[0].split()):
        raise ValueError(
            f"chat template: expected one that renders a text, got none of {said!r:.60}"
        )
    if texts[1] == texts[2] and pair.chosen.strip() != pair.rejected.strip():
        raise ValueError(
            "chat template: expected one that renders two responses differently, got "
            f"{texts[1][-40:]!r} for {pair.chosen!r:.60} and {pair.rejected!r:.60}"
        )


def _check_prompt(messages: Sequence[Message], texts: Sequence[str], alone: str) -> None:
    """Raises if the template renders a prompt differently before a response.

    The generation prompt may be another (a block of thoughts that it opens and a finished turn
    lacks): then the model will meet a context that it was not trained in, which is worth a warning.

    Args:
        messages: of the prompt.
        texts: the prompt with its generation prompt, and with either response.
        alone: the prompt without either.
    """
    prompt, shared = texts[0], len(os.path.commonprefix(texts))
    said = os.path.commonprefix([prompt, alone])
    last = str(messages[-1].get("content") or "").strip()
    place = said.rfind(last) if last else -1
    if shared < (len(said) if place < 0 else place + len(last)):
        raise ValueError(
            "chat template: expected one that renders the prompt alike with and without a response "
            f"after it, got {prompt[shared:]!r:.60} only without"
        )
    warnings.warn(
        f"the chat template ends a prompt with {prompt[shared:]!r}, but not before a response: "
        "the responses are trained without it",
        stacklevel=4,
    )
