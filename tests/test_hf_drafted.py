"""Drafts in the generation loop: the tokens that it draws without them, in fewer calls."""

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the hooks need transformers")


from fastadapt import hf  # noqa: E402, only where transformers is

VOCAB, STEPS = 61, 24


@pytest.fixture(scope="module")
def model(tiny_llama):
    return tiny_llama(VOCAB, num_hidden_layers=2)


class Calls:
    """Counts the calls of a model."""

    def __init__(self, model):
        self.number = 0
        self.handle = model.register_forward_pre_hook(self.count)

    def count(self, *_):
        self.number += 1


SETTINGS = {
    "top_p": {"top_k": 0, "top_p": 0.9, "temperature": 0.6},
    "edits": {
        "top_k": 20,
        "repetition_penalty": 1.1,
        "no_repeat_ngram_size": 4,
        "temperature": 0.5,
    },
    "cold": {"top_k": 3, "temperature": 0.2},
}
PROMPT = torch.tensor([[5, 9, 12, 30, 5, 9, 12, 31, 5, 9]])


def run(model, custom=hf.generate, **options):
    given = {"do_sample": True, "max_new_tokens": STEPS, "return_dict_in_generate": True, **options}
    if given["do_sample"]:
        given.setdefault("seeds", [7])
    calls = Calls(model)
    try:
        out = model.generate(PROMPT, custom_generate=custom, **given)
    finally:
        calls.handle.remove()
    return out, calls.number


@pytest.mark.parametrize("name", SETTINGS)
def test_prompt_lookup_draws_the_tokens_without_it(model, name):
    telling = {"output_logprobs": True, "output_scores": True, **SETTINGS[name]}
    plain, steps = run(model, **telling)
    fast, fewer = run(model, prompt_lookup_num_tokens=4, **telling)
    assert torch.equal(fast.sequences, plain.sequences)
    assert fewer < steps == STEPS
    for field in ("logprobs", "base_logprobs", "kept", "ranks"):
        torch.testing.assert_close(fast[field], plain[field], rtol=0, atol=1e-4)
    assert len(fast.scores) == STEPS
    for a, b in zip(fast.scores, plain.scores, strict=True):
        assert torch.equal(a.isinf(), b.isinf())
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


@pytest.mark.parametrize("drafter", ["same", "other"])
def test_an_assistants_drafts_leave_the_tokens_as_they_are(model, tiny_llama, drafter):
    assistant = model if drafter == "same" else tiny_llama(VOCAB, 1, hidden_size=16)
    plain, steps = run(model, **SETTINGS["cold"])
    custom = hf.generate.using(assistant_model=assistant, seeds=[7])
    fast, calls = run(model, custom, seeds=None, **SETTINGS["cold"])
    assert torch.equal(fast.sequences, plain.sequences)
    if drafter == "other":
        assert calls <= steps


def test_a_greedy_search_with_drafts_is_transformers(model):
    options = {"do_sample": False, "prompt_lookup_num_tokens": 4}
    stock, calls = run(model, custom=None, **options)
    ours, fewer = run(model, **options)
    told, _ = run(model, output_logprobs=True, **options)
    assert torch.equal(ours.sequences, stock.sequences) and calls == fewer
    assert torch.equal(told.sequences, stock.sequences) and told.logprobs.shape == (1, STEPS)


def test_drafts_end_where_the_sequence_does(model):
    plain, _ = run(model, **SETTINGS["cold"])
    end = int(plain.sequences[0, PROMPT.shape[1] + 9])
    options = {"eos_token_id": end, "output_logprobs": True, **SETTINGS["cold"]}
    plain, _ = run(model, **options)
    fast, _ = run(model, prompt_lookup_num_tokens=6, **options)
    assert torch.equal(fast.sequences, plain.sequences)
    assert fast.logprobs.shape == plain.logprobs.shape


def test_unseeded_draws_come_from_the_default_generator(model):
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        results.append(run(model, seeds=None, prompt_lookup_num_tokens=4)[0].sequences)
    assert torch.equal(*results)


def test_an_assistant_is_a_model_of_the_same_vocabulary(model, tiny_llama):
    for assistant, error, message in (
        (tiny_llama(VOCAB + 3), ValueError, f"expected a vocabulary of {VOCAB} tokens, got"),
        ("small", TypeError, "assistant_model: expected a PreTrainedModel, got str"),
    ):
        with pytest.raises(error, match=message):
            run(model, hf.generate.using(assistant_model=assistant))


def test_several_sequences_are_refused_as_in_transformers(model):
    with pytest.raises(ValueError, match="batch_size = 1"):
        model.generate(
            PROMPT.repeat(2, 1), custom_generate=hf.generate, do_sample=True,
            prompt_lookup_num_tokens=3, max_new_tokens=4,
        )  # fmt: skip
