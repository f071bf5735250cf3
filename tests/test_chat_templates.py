"""Pairs in the chat templates of model families, and text as tokenizers of several kinds see it.

The templates are written for these tests, with the peculiarities of the families they are named
after.
"""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fastadapt.training.pairs import IGNORED, Pair, encode_pairs, pad_pairs, tokenize_pair

SPECIAL = [
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|head|>", "<|tail|>", "<|eot|>"),
    *("<turn>", "<end_turn>", "<|user|>", "<|assistant|>", "[INST]", "[/INST]"),
]
LOOP = "{% for m in messages %}"
CHATML = (
    LOOP + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The last turn of the assistant has a block of thoughts; those before it lose theirs.
THINKING = (
    LOOP + "{% set parts = m.content.split('</think>') %}{% set text = parts[-1].lstrip('\n') %}"
    "{% set thoughts = parts[0].split('<think>')[-1].strip('\n') if parts | length > 1 else '' %}"
    "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}"
    "{{ '<think>\n' + thoughts + '\n</think>\n\n' }}{% endif %}{{ text }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The generation prompt opens thoughts, which a finished turn does not have.
OPENED = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
HEADERS = (
    "<s>" + LOOP + "<|head|>{{ m.role }}<|tail|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant<|tail|>\n\n{% endif %}"
)
MODEL = (
    "<s>{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    + LOOP
    + "<turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<turn>model\n{% endif %}"
)
# No generation prompt; the system's text stands in the last message, if that is the user's.
INST = (
    "<s>{% set texts = messages | selectattr('role', 'ne', 'system') | list %}"
    "{% for m in texts %}{% if m.role == 'user' %}[INST] "
    "{% if loop.last and messages[0].role == 'system' %}{{ messages[0].content }}\n\n{% endif %}"
    "{{ m.content }}[/INST]{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
ZEPHYR = (
    LOOP + "<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# An end of the whole conversation, where no turn of the assistant is asked for.
CLOSED = CHATML.replace("{% endif %}", "{% else %}</s>{% endif %}")
BARE = LOOP + "{{ m.role }}: {{ m.content }}\n{% endfor %}"
PARTS = LOOP + "{{ m.role }}:{% for part in m.content %}{{ part.text }}{% endfor %}\n{% endfor %}"


def _chat(*turns, system=None):
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [
        {"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)
    ]


def _byte_tokenizer(merges=()):
    """A byte a token, but for special tokens and merges."""
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet()) + ["".join(merge) for merge in merges]
    model = models.BPE({piece: i for i, piece in enumerate(pieces)}, list(merges))
    words = Tokenizer(model)
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>")
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[2:]})
    return tokenizer


@pytest.fixture
def tokenizer():
    return _byte_tokenizer()


def _texts(tokenizer, pair, **options):
    tokens = tokenize_pair(tokenizer, pair, **options)
    return tuple(tokenizer.decode(ids) for ids in tokens[:3])


CASES = {
    "chatml": (
        CHATML,
        (_chat("hi", system="be kind"), "yes", " no\n"),
        (
            "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
            "<|im_start|>assistant\n",
            "yes<|im_end|>\n",
            " no\n<|im_end|>\n",
        ),
    ),
    "a thinking model": (
        THINKING,
        (_chat("hi", "<think>a</think>b", "c"), "yes", "<think>why</think>no"),
        (
            "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
            "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n",
            "<think>\n\n</think>\n\nyes<|im_end|>\n",
            "<think>\nwhy\n</think>\n\nno<|im_end|>\n",
        ),
    ),
    "headers": (
        HEADERS,
        (" hi ", " yes ", "no"),
        (
            "<s><|head|>user<|tail|>\n\nhi<|eot|><|head|>assistant<|tail|>\n\n",
            "yes<|eot|>",
            "no<|eot|>",
        ),
    ),
    "role model": (
        MODEL,
        (_chat("hi", "ho", "hm"), "yes\n", "no"),
        (
            "<s><turn>user\nhi<end_turn>\n<turn>model\nho<end_turn>\n<turn>user\nhm<end_turn>\n"
            "<turn>model\n",
            "yes<end_turn>\n",
            "no<end_turn>\n",
        ),
    ),
    "inst": (
        INST,
        (_chat("hi", "ho", "hm"), "yes", "no"),
        ("<s>[INST] hi[/INST] ho</s>[INST] hm[/INST]", " yes</s>", " no</s>"),
    ),
    "zephyr": (
        ZEPHYR,
        ("hi", "yes", "no"),
        ("<|user|>\nhi</s>\n<|assistant|>\n", "yes</s>\n", "no</s>\n"),
    ),
    "closed": (
        CLOSED,
        ("hi", "yes", "no"),
        (
            "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
            "yes<|im_end|>\n</s>",
            "no<|im_end|>\n</s>",
        ),
    ),
    "bare": (BARE, ("hi", "yes", "no"), ("user: hi\n", "assistant: yes\n", "assistant: no\n")),
}


@pytest.mark.parametrize("name", CASES)
def test_pairs_are_as_the_template_renders_them(name, tokenizer):
    template, pair, texts = CASES[name]
    tokenizer.chat_template = template
    pair = Pair(*pair)
    assert _texts(tokenizer, pair) == texts
    messages = _chat(pair.prompt) if isinstance(pair.prompt, str) else pair.prompt
    prompt, *responses, truncated = tokenize_pair(tokenizer, pair)
    for ids, text in zip(responses, pair[1:], strict=True):
        whole = [*messages, {"role": "assistant", "content": text}]
        assert prompt + ids == tokenizer.apply_chat_template(whole)["input_ids"]
        assert (prompt + ids).count(tokenizer.bos_token_id) == template.count("<s>")
    assert not truncated
    batch = encode_pairs(tokenizer, [pair])
    assert [len(ids) for ids in responses] == (batch.labels != IGNORED).sum(-1).tolist()


def test_tokens_that_merge_over_the_end_of_a_prompt():
    """The prompt is what all three sequences begin with, token by token."""
    tokenizer = _byte_tokenizer([("Ċ", "Ċ")])
    tokenizer.chat_template = CHATML
    prompt, chosen, rejected, _ = tokenize_pair(tokenizer, Pair("hi", "\nyes", "no"))
    assert tokenizer.decode(prompt).endswith("<|im_start|>assistant")
    assert [tokenizer.decode(ids) for ids in (chosen, rejected)] == [
        "\n\nyes<|im_end|>\n",
        "\nno<|im_end|>\n",
    ]


def test_a_generation_prompt_that_a_finished_turn_lacks(tokenizer):
    tokenizer.chat_template = OPENED
    with pytest.warns(UserWarning, match=r"ends a prompt with '<think>\\n', but not before a resp"):
        texts = _texts(tokenizer, Pair("hi", "yes", "no"))
    assert texts[0].endswith("<|im_start|>assistant\n") and texts[1] == "yes<|im_end|>\n"


@pytest.mark.parametrize(
    ("template", "prompt", "message"),
    [
        (MODEL, _chat("hi", system="s"), "got system, user: no system role"),
        (INST, _chat("hi", system="be kind"), r"renders the prompt alike .* got 'be kind\\n\\nhi"),
        (INST, _chat("a", "b", "be", system="be kind"), "renders the prompt alike with and"),
        (PARTS, "hi", "expected one that renders a text, got none of 'hi'"),
        (PARTS, _chat("hi", "ho"), "expected one that renders two responses differently"),
        (LOOP + "{{ m.content + m.name }}{% endfor %}", "hi", "expected messages that it takes"),
        (LOOP + "{{ m.content }{% endfor %}", "hi", "expected messages that it takes, got user"),
        ({"tool_use": CHATML}, "hi", "expected messages that it takes, got user"),
        ("{{ messages[0].content }}", "hi", "expected one that renders two responses differently"),
    ],
    ids="system,lost system,later lost system,parts,parts,other fields,syntax,named,first".split(
        ","
    ),
)
def test_templates_that_do_not_fit_are_refused(template, prompt, message, tokenizer):
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=f"^chat template: .*{message}"):
        tokenize_pair(tokenizer, Pair(prompt, "yes", "no"))


def test_tool_calls_in_a_prompt(tokenizer):
    tokenizer.chat_template = CHATML.replace("m.content", "(m.content or m.tool_calls | tojson)")
    call = {"role": "assistant", "tool_calls": [{"name": "f"}]}
    prompt = [*_chat("hi"), call, {"role": "tool", "content": "1"}]
    rendered, chosen, _ = _texts(tokenizer, Pair(prompt, "yes", "no"))
    assert json.dumps(call["tool_calls"]) in rendered and chosen == "yes<|im_end|>\n"


# Text without a template.


def _metaspace_tokenizer():
    """SentencePiece's way: a text begins with a space of its own, and a special token."""
    pieces = ["<s>", "</s>", *"▁abc:Xyesno", "▁a", "▁X", "ye", "yes", "▁yes", "no"]
    merges = [("▁", "a"), ("▁", "X"), ("y", "e"), ("ye", "s"), ("▁", "yes"), ("n", "o")]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    words = Tokenizer(models.BPE(vocabulary, merges))
    words.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    words.decoder = decoders.Metaspace(prepend_scheme="first")
    return words, vocabulary


@pytest.mark.parametrize("ends", [False, True])
def test_text_has_the_tokens_that_it_has_behind_the_prompt(ends):
    """With one beginning and one end, also where the tokenizer ends each text."""
    words, vocabulary = _metaspace_tokenizer()
    template = "<s> $A </s>" if ends else "<s> $A"
    tokens = [("<s>", vocabulary["<s>"]), ("</s>", vocabulary["</s>"])]
    words.post_processor = processors.TemplateProcessing(single=template, special_tokens=tokens)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>")
    for prompt in ("a X:", "<s>a X:"):
        ids = tokenize_pair(tokenizer, Pair(prompt, " yes", "no</s>"))
        pieces = [tokenizer.convert_ids_to_tokens(part) for part in ids[:3]]
        assert pieces[0][0] == "<s>" and pieces[0].count("<s>") == 1
        assert pieces[1:] == [["▁yes", "</s>"], ["no", "</s>"]]
        assert pieces[0][-2:] == ["▁X", ":"]


def test_text_that_merges_with_the_prompt_is_tokenised_apart():
    tokenizer = _byte_tokenizer([("a", "b")])
    assert _texts(tokenizer, Pair("xa", "bc", "c")) == ("xa", "bc</s>", "c</s>")
    assert len(tokenize_pair(tokenizer, Pair("xa", "bc", "c")).prompt_ids) == 2


# Pairs that are too long.


@pytest.mark.parametrize(
    ("truncation", "max_length", "want"),
    [
        ("prompt", 9, ("abcd", "xy</s>", "wxyz</s>")),
        ("prompt", 8, ("bcd", "xy</s>", "wxyz</s>")),
        ("prompt", 6, ("d", "xy</s>", "wxyz</s>")),
        ("prompt", 5, ("d", "xy</s>", "wxyz")),
        ("prompt", 3, ("d", "xy", "wx")),
        ("prompt", 2, ("d", "x", "w")),
        ("response", 8, ("abcd", "xy</s>", "wxyz")),
        ("response", 6, ("abcd", "xy", "wx")),
        ("response", 5, ("abcd", "x", "w")),
        ("response", 3, ("cd", "x", "w")),
        ("response", 2, ("d", "x", "w")),
    ],
)
def test_both_responses_follow_one_prompt(truncation, max_length, want, tokenizer):
    pair = Pair("abcd", "xy", "wxyz")
    options = {"max_length": max_length, "truncation": truncation}
    tokens = tokenize_pair(tokenizer, pair, **options)
    assert tuple(tokenizer.decode(ids) for ids in tokens[:3]) == want
    assert tokens.truncated == (max_length < 9)
    assert max(len(tokens.prompt_ids) + len(ids) for ids in tokens[1:3]) <= max_length
    pairs = [Pair("abcdefgh", "x", "y"), pair, pair]
    with pytest.warns(
        match=f"^{1 if max_length == 9 else 3} of 3 pairs were cut to {max_length} t"
    ):
        batch = encode_pairs(tokenizer, pairs, **options)
    for row, ids in zip(batch.tokens[1::3], tokens[1:3], strict=True):
        whole = tokens.prompt_ids + ids
        assert row[: len(whole)].tolist() == whole


@pytest.mark.parametrize("max_length", [16, 9, 4, 3, 2])
def test_a_token_that_begins_a_prompt_stays(max_length, tokenizer):
    tokenizer.chat_template = HEADERS
    pair = Pair("hello", "y", "no")
    tokens = tokenize_pair(tokenizer, pair, max_length=max_length)
    whole = tokenize_pair(tokenizer, pair).prompt_ids
    length = len(tokens.prompt_ids)
    assert tokens.truncated and tokens.prompt_ids == [whole[0], *whole[len(whole) - length + 1 :]]
    longest = max(len(ids) for ids in tokens[1:3])
    assert longest == min(3, max(max_length - 2, 1)) and length + longest == max_length


def test_a_pair_that_is_too_long_can_be_an_error(tokenizer):
    pairs = [Pair("a", "b", "c"), Pair("abcd", "xy", "wxyz")]
    with pytest.raises(ValueError, match=r"^pairs\[1\]: max_length: .* at most 8 tokens, got 4 of"):
        encode_pairs(tokenizer, pairs, max_length=8, truncation="error")
    encode_pairs(tokenizer, pairs, max_length=9, truncation="error")
    with pytest.raises(ValueError, match="truncation: expected one of .*, got 'keep_start'"):
        encode_pairs(tokenizer, pairs, truncation="keep_start")


def test_padded_pairs(tokenizer):
    pairs = [Pair("a", "b", "c"), Pair("abcd", "xy", "wxyz")]
    tokens = [tokenize_pair(tokenizer, pair) for pair in pairs]
    batch, plain = encode_pairs(tokenizer, pairs), pad_pairs(tokens)
    assert (batch.labels == plain.labels).all() and plain.tokens[0, -1] == 0
    assert batch.tokens[0, -1] == tokenizer.eos_token_id
    with pytest.raises(ValueError, match="pairs: expected at least one, got none"):
        pad_pairs([])
