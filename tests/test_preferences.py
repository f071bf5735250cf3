"""Preference pairs: the built-in set, files, tokens, and training on them without logits."""

import gzip
import json
import warnings

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from fastadapt import RewardPenalizeLoss, training
from fastadapt.training import head_check
from fastadapt.training.pair_forms import pair_of
from fastadapt.training.pairs import IGNORED, PAIRS, Pair, encode_pairs, read_pairs
from fastadapt.training.pretrained import load_model

WORDS = ("<pad>", "<unk>", "<end>", "<user>", *"a b c d e f g h <assistant> <turn>".split())
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <turn> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 2,
    "initializer_range": 0.5,
}


@pytest.fixture
def tokenizer():
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", eos_token="<end>"
    )


@pytest.fixture
def model():
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


@pytest.fixture
def batch(tokenizer):
    return encode_pairs(tokenizer, [Pair("a b", "c", "d e f"), Pair("c", "g h", "a")])


def test_builtin_pairs_differ_in_the_response():
    assert len(PAIRS) >= 24 and len({pair.prompt for pair in PAIRS}) == len(PAIRS)
    for pair in PAIRS:
        assert pair.chosen != pair.rejected and all(text == text.strip() != "" for text in pair)


def test_tokens_masks_and_labels(batch):
    assert batch.tokens.tolist() == [
        [4, 5, 6, 2, 2, 2],
        [6, 10, 11, 2, 2, 2],
        [4, 5, 7, 8, 9, 2],
        [6, 4, 2, 2, 2, 2],
    ]
    assert batch.attention_mask.sum(-1).tolist() == [4, 4, 6, 3]
    x = IGNORED
    assert batch.labels.tolist() == [
        [x, 6, 2, x, x],
        [10, 11, 2, x, x],
        [x, 7, 8, 9, 2],
        [4, 2, x, x, x],
    ]
    assert torch.equal(batch.mask, batch.labels != x)


def test_prompts_go_through_the_chat_template(tokenizer):
    tokenizer.chat_template = TEMPLATE
    chat = encode_pairs(tokenizer, [Pair("a", "b", "c")])
    assert chat.tokens.tolist() == [[3, 4, 13, 12, 5, 13], [3, 4, 13, 12, 6, 13]]
    assert chat.mask.sum(-1).tolist() == [2, 2]
    plain = encode_pairs(tokenizer, [Pair("a", "b", "c")], chat=False)
    assert plain.tokens.tolist() == [[4, 5, 2], [4, 6, 2]]


@pytest.mark.parametrize(
    ("max_length", "tokens"),
    [
        (6, [[4, 5, 6, 7, 8, 2]]),
        (5, [[5, 6, 7, 8, 2]]),
        (4, [[6, 7, 8, 2]]),
        (3, [[6, 7, 8]]),
        (2, [[6, 7]]),
    ],
)
def test_long_pairs_are_cut(max_length, tokens, tokenizer):
    pairs = [Pair("a b c", "d e", "d e")]
    with warnings.catch_warnings() if max_length > 5 else pytest.warns(match="1 of 1 pairs were"):
        batch = encode_pairs(tokenizer, pairs, max_length=max_length)
    assert batch.tokens.tolist() == 2 * tokens
    assert batch.labels[0, -1] == tokens[0][-1]


@pytest.mark.parametrize(
    ("pairs", "options", "message"),
    [
        ([], {}, "pairs: expected at least one, got none"),
        ([Pair("", "a", "b")], {}, r"pairs\[0\]: prompt: expected at least one token, got none"),
        ([Pair("a", "a", "b")], {"max_length": 1}, "max_length: expected at least 2, got 1"),
    ],
)
def test_wrong_pairs_are_refused(pairs, options, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        encode_pairs(tokenizer, pairs, **options)


def test_tokenizer_without_an_end_is_refused(tokenizer):
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="expected one with an end token"):
        encode_pairs(tokenizer, [Pair("a", "b", "c")])


def _dialogue(*turns):
    names = ("Human", "Assistant")
    return "".join(f"\n\n{names[i % 2]}: {turn}" for i, turn in enumerate(turns))


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.jsonl.gz"])
def test_files_are_read(name, tmp_path):
    entries = [
        {"chosen": _dialogue("x\u2028y", "yes"), "rejected": _dialogue("x\u2028y", "no")},
        {"chosen": _dialogue("a", "b", "c", "yes"), "rejected": _dialogue("a", "b", "c", "yes no")},
        {"chosen": _dialogue("a", "b", "c", "d"), "rejected": _dialogue("a", "else")},
    ]
    text = "\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries) + "\n\n"
    data = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    one, two, three = read_pairs(tmp_path / name)
    assert one == ("\n\nHuman: x\u2028y\n\nAssistant:", " yes", " no")
    assert two.prompt.endswith("Human: c\n\nAssistant:") and two[1:] == (" yes", " yes no")
    assert three == ("\n\nHuman: a\n\nAssistant:", " b\n\nHuman: c\n\nAssistant: d", " else")


def _chat(*turns):
    return [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(turns)]


@pytest.mark.parametrize(
    ("entry", "pair"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, ("a", "b", "c")),
        (
            {"prompt": _chat("a"), "chosen": _chat("", "b")[1:], "rejected": _chat("", "c")[1:]},
            (_chat("a"), "b", "c"),
        ),
        (
            {"prompt": "a", "chosen": _chat("a", "b"), "rejected": _chat("a", "c")},
            (_chat("a"), "b", "c"),
        ),
        (
            {"chosen": _chat("a", "x", "y", "b"), "rejected": _chat("a", "x", "y", "c")},
            (_chat("a", "x", "y"), "b", "c"),
        ),
    ],
    ids=["strings", "messages", "repeated prompt", "dialogues"],
)
def test_forms(entry, pair):
    assert pair_of(entry) == pair


def test_messages_go_through_the_template(tokenizer):
    pair = Pair(_chat("a", "b", "c"), "d", "e")
    with pytest.raises(ValueError, match="expected one with a chat template"):
        encode_pairs(tokenizer, [pair])
    tokenizer.chat_template = TEMPLATE
    tokens = encode_pairs(tokenizer, [pair], chat=False).tokens
    assert tokenizer.decode(tokens[0]) == (
        "<user> a <turn> <assistant> b <turn> <user> c <turn> <assistant> d <turn>"
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", ", column 2: expected JSON, got '{': Expecting property name"),
        ("[1]", r": expected an object, got \[1\]"),
        ('{"chosen": "a"}', ": expected 'chosen' and 'rejected', got \\['chosen'\\]"),
        ('{"chosen": "a", "rejected": "b"}', ": expected 'chosen' and 'rejected' that share"),
        ('{"chosen": 1, "rejected": 2}', ": chosen: expected a string or messages, got 1"),
        ('{"chosen": "a", "rejected": []}', ": expected 'chosen' and 'rejected' of one kind"),
        ('{"chosen": [1], "rejected": []}', ": chosen: expected messages with 'role' and"),
        ('{"prompt": 1, "chosen": "a", "rejected": "b"}', ": prompt: expected a string"),
        ('{"prompt": "a", "chosen": "", "rejected": "b"}', ": chosen: expected a response"),
        ('{"chosen": [], "rejected": []}', ": chosen: expected one message of the assistant"),
        (
            json.dumps({"chosen": _chat("a", "b"), "rejected": _chat("b", "b")}),
            r": rejected: expected one message of the assistant, got \['user', 'assistant'\]",
        ),
        (
            json.dumps({"chosen": _chat("", "b")[1:], "rejected": _chat("", "b")[1:]}),
            ": prompt: expected messages before the responses, got none",
        ),
    ],
)
def test_lines_of_another_form_are_named(line, message, tmp_path):
    chosen = json.dumps({"chosen": _dialogue("a", "b"), "rejected": _dialogue("a", "c")})
    (tmp_path / "p.jsonl").write_text(f"{chosen}\n{line}\n")
    with pytest.raises(ValueError, match=f"p.jsonl, line 2{message}"):
        read_pairs(tmp_path / "p.jsonl")


def _models():
    gemma = {"final_logit_softcapping": 3.0, "head_dim": 8, "query_pre_attn_scalar": 8}
    return {
        "llama": LlamaForCausalLM(LlamaConfig(**SIZES)),
        "cohere": CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.3)),
        "granite": GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=2.5)),
        "gemma2": Gemma2ForCausalLM(Gemma2Config(**SIZES, **gemma)),
    }


@pytest.mark.parametrize("name", ["llama", "cohere", "granite", "gemma2"])
def test_log_odds_are_those_of_the_model(name, batch):
    model = _models()[name].eval()
    ours = training.response_log_odds(model, batch)
    through_logits = training.logits_log_odds(model, batch)
    inputs = {"input_ids": batch.tokens, "attention_mask": batch.attention_mask}
    logps = model(**inputs).logits[:, :-1].double().log_softmax(-1)
    labels = batch.labels.clamp(min=0)[..., None]
    logp = logps.gather(-1, labels)[..., 0]
    truth = torch.where(batch.mask, torch.logit(logp.exp()), 0)
    for log_odds in (ours, through_logits):
        assert log_odds.shape == batch.labels.shape and log_odds.dtype == torch.float32
        torch.testing.assert_close(log_odds.double(), truth, atol=2e-5, rtol=1e-5)


def test_gradients_reach_every_parameter_alike(model, batch):
    upstream = torch.randn(batch.labels.shape)
    grads = []
    for log_odds_of in (training.response_log_odds, training.logits_log_odds):
        model.zero_grad()
        log_odds_of(model, batch).backward(upstream)
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(float(g.abs().max()) > 0 for g in grads[0])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, atol=2e-6, rtol=2e-4)


def test_model_without_a_linear_head_is_refused(model):
    model.get_output_embeddings = lambda: None
    with pytest.raises(ValueError, match="expected one with a linear head, got NoneType"):
        head_check.head_of(model)


def test_the_body_may_have_any_name(model, batch):
    """What reaches the head is asked for, so that it does not matter what the body is called."""
    expected = training.logits_log_odds(model, batch)
    model.base_model_prefix = "none"  # transformers then takes the model for its own body
    log_odds = training.response_log_odds(model, batch)
    torch.testing.assert_close(log_odds, expected, atol=2e-5, rtol=1e-5)


def test_sides_are_chosen_and_rejected(model, batch):
    log_odds = training.response_log_odds(model, batch)
    chosen, rejected = training.sides(batch, log_odds)
    assert torch.equal(torch.cat([chosen.log_odds, rejected.log_odds]), log_odds)
    assert (chosen.mask.sum(-1).tolist(), rejected.mask.sum(-1).tolist()) == ([2, 3], [4, 2])


def test_loss_at_the_reference_is_log_two(model, batch):
    objective = RewardPenalizeLoss({"dpo": 1.0})
    reference = training.reference_logps(model, batch)
    assert not any(side.requires_grad for side in reference)
    loss, _ = training.pair_loss(model, batch, objective, reference)
    assert loss.item() == pytest.approx(0.6931471805599453, abs=1e-6)


def test_training_without_logits_is_training_with_them(batch):
    curves = []
    for log_odds_of in (training.response_log_odds, training.logits_log_odds):
        torch.manual_seed(1)
        model = LlamaForCausalLM(LlamaConfig(**SIZES))
        rows = [(batch, training.reference_logps(model, batch, log_odds_of=log_odds_of))] * 8
        steps = training.training_steps(
            model,
            rows,
            RewardPenalizeLoss({"dpo": 1.0, "exmate": 1.0}),
            torch.optim.SGD(model.parameters(), lr=0.05),
            log_odds_of=log_odds_of,
        )
        curves.append([float(seen["loss"]) for seen in steps])
    assert len(curves[0]) == 8 and curves[0][-1] < 0.9 * curves[0][0]
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


@pytest.mark.demo_model
def test_demo_model_learns_a_pair():
    model, tokenizer = load_model(None, fetch=True)
    batch = encode_pairs(tokenizer, PAIRS[:1])
    shown = tokenizer.decode(batch.tokens[0][batch.attention_mask[0] > 0])
    assert shown.endswith(f"assistant\n{PAIRS[0].chosen}<|im_end|>\n")
    reference = training.reference_logps(model, batch)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    objective = RewardPenalizeLoss({"dpo": 1.0, "exmate": 1.0})
    losses = training.training_steps(model, [(batch, reference)] * 2, objective, optimizer)
    first, second = (float(seen["loss"]) for seen in losses)
    assert second < first
    assert model.lm_head.weight.grad is model.model.embed_tokens.weight.grad
