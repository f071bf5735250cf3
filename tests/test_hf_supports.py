"""`output_supports` of `generate`: the ids that each token was drawn from, beside the scores."""

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the hooks need transformers")


from fastadapt import Support, hf  # noqa: E402, only where transformers is
from fastadapt.adaptor import Adaptor  # noqa: E402, as above

VOCAB = 97
STEPS = 8
ENDS = list(range(2, VOCAB, 4))


@pytest.fixture(autouse=True)
def _one_thread(num_threads):
    """Models as small as these only lose time to a second thread."""
    num_threads(1)


@pytest.fixture(scope="module")
def model(tiny_llama):
    """A one-layer Llama."""
    return tiny_llama(VOCAB)


@pytest.fixture
def prompts(padded_prompts):
    """Three, padded on the left."""
    return padded_prompts(VOCAB)


def run(model, inputs, **config):
    """A run whose output holds supports."""
    settings = {
        "do_sample": True,
        "max_new_tokens": STEPS,
        "return_dict_in_generate": True,
        "output_supports": True,
        "custom_generate": hf.generate,
        "top_k": 0,
    }
    torch.manual_seed(5)
    return model.generate(**inputs, **{**settings, **config})


class Shifts(transformers.LogitsProcessor):
    """A warper of no known class, so that the chain runs as it is."""

    def __call__(self, input_ids, scores):
        return scores.masked_fill(scores < scores.mean(-1, keepdim=True), -torch.inf)


class Wide(transformers.LogitsProcessor):
    """One that returns float64, so that nothing is fused."""

    def __call__(self, input_ids, scores):
        return scores.double()


def per_row():
    """Knobs that differ by row."""
    adaptor = Adaptor(top_p=torch.tensor([0.3, 0.6, 0.95]), temperature=torch.tensor([1, 0.5, 2.0]))
    return hf.FusedLogitsWarper(adaptor).generate_kwargs()


def coined():
    """A filter that throws coins."""
    adaptor = Adaptor(xtc_probability=0.5, xtc_threshold=0.01, temperature=0.2)
    return hf.FusedLogitsWarper(adaptor).generate_kwargs()


CONFIGS = {
    "full": {},
    "filters": {"temperature": 0.7, "top_k": 30, "top_p": 0.8},
    "typical": {"typical_p": 0.5},
    "rows": per_row(),
    "cold": hf.FusedLogitsWarper(Adaptor(temperature=0.0)).generate_kwargs(),
    "coin": {**coined(), "seeds": [5, 6, 7]},
    "edits": {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "top_p": 0.9},
    "bans": {"suppress_tokens": [3, 40]},
    "mask": {"prefix_allowed_tokens_fn": lambda *_: list(range(3, 20)), "min_p": 0.1},
    "normalised": {"top_p": 0.8, "renormalize_logits": True},
    "unfused": {"logits_processor": [Shifts()]},
    "ends": {"eos_token_id": ENDS, "top_p": 0.95},
    "several": {"eos_token_id": ENDS, "top_p": 0.9, "num_return_sequences": 3},
    "greedy": {"do_sample": False},
    "greedy_ends": {"do_sample": False, "eos_token_id": ENDS, "suppress_tokens": [3]},
}


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_supports_are_the_finite_scores(model, prompts, config, half):
    """Of every token through the end of its sequence, and nothing behind it."""
    if half:
        model = copy.deepcopy(model).bfloat16()
    out = run(model, prompts, output_scores=True, output_logprobs=True, **config)
    tokens = out.sequences[:, prompts["input_ids"].shape[1] :]
    assert isinstance(out.supports, list) and len(out.supports) == len(tokens)
    assert out["supports"] is out.supports
    ended = torch.isin(tokens, torch.tensor(config.get("eos_token_id", [-1])))
    over = ended.cumsum(1) - ended.long() > 0
    assert bool(over.any()) == ("eos_token_id" in config)
    scores = torch.stack(out.scores, 1)
    for row, support in enumerate(out.supports):
        live = ~over[row]
        assert isinstance(support, Support) and len(support) == int(live.sum())
        mask = scores[row, live] > -torch.inf
        assert torch.equal(support.check(VOCAB).to_mask(VOCAB), mask)
        assert torch.equal(support.full, mask.all(1))
        assert support.contains(tokens[row, live]).all()
        kept = torch.where(support.full, VOCAB, support.counts)
        assert torch.equal(kept.int(), out.kept[row, live])
    alone = run(model, prompts, **config)  # without scores or numbers
    assert alone.scores is None and torch.equal(alone.sequences, out.sequences)
    assert alone.supports == out.supports


def test_supports_where_warpers_run_unfused(model, prompts):
    with pytest.warns(UserWarning, match="expected float32, bfloat16 or float16"):
        out = run(model, prompts, output_scores=True, top_p=0.8, logits_processor=[Wide()])
    scores = torch.stack(out.scores, 1)
    for row, support in enumerate(out.supports):
        assert torch.equal(support.to_mask(VOCAB), scores[row] > -torch.inf)


@pytest.mark.parametrize("do_sample", [True, False])
def test_supports_with_drafts(model, do_sample):
    prompt = {"input_ids": torch.tensor([[5, 9, 12, 30, 5, 9, 12, 31, 5, 9]])}
    warm = {"top_p": 0.9, "temperature": 0.6, "seeds": [7]} if do_sample else {}
    settings = {"do_sample": do_sample, "max_new_tokens": 40, "eos_token_id": 96, **warm}
    plain = run(model, prompt, **settings)
    fast = run(model, prompt, prompt_lookup_num_tokens=4, **settings)
    assert torch.equal(fast.sequences, plain.sequences)
    assert fast.supports == plain.supports
    assert len(fast.supports[0]) == fast.sequences.shape[1] - 10


@pytest.mark.parametrize("do_sample", [True, False])
def test_supports_come_in_a_dictionary_alone(model, prompts, do_sample):
    with pytest.raises(ValueError, match="^output_supports: expected return_dict_in_generate=True"):
        run(model, prompts, return_dict_in_generate=False, do_sample=do_sample)
    with pytest.raises(TypeError, match="^output_supports: expected"):
        run(model, prompts, output_supports=1, do_sample=do_sample)
