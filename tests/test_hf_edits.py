"""Processors as edits and masks of the draw, against transformers' own, to the bit."""

import random

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the hooks need transformers")


from fastadapt import hf  # noqa: E402, only where transformers is
from fastadapt.adaptor import Adaptor  # noqa: E402, as above
from fastadapt.hf import _draw as hf_draw  # noqa: E402, as above
from fastadapt.hf._run import Run, splits_at  # noqa: E402, as above
from fastadapt.sampling.functions import filter_logits, sample  # noqa: E402, as above

VOCAB = 67
STEPS = 12
INF = float("inf")


@pytest.fixture(autouse=True)
def _one_thread(num_threads):
    """Models as small as these only lose time to a second thread."""
    num_threads(1)


@pytest.fixture(scope="module")
def model(tiny_llama):
    """A Llama whose vocabulary is so small that everything repeats."""
    return tiny_llama(VOCAB)


@pytest.fixture(scope="module")
def t5():
    """An encoder-decoder, whose first token may be forced."""
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2
    )
    config.decoder_start_token_id = 0
    return transformers.T5ForConditionalGeneration(config).eval()


@pytest.fixture
def prompts():
    """Three prompts of 9, 6 and 2 tokens, padded on the left; the second repeats itself."""
    ids = torch.tensor(
        [
            [5, 8, 13, 21, 34, 55, 22, 10, 32],
            [0, 0, 0, 7, 9, 11, 7, 9, 11],
            [0, 0, 0, 0, 0, 0, 0, 4, 4],
        ]
    )
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


@pytest.fixture
def steps(monkeypatch):
    """Each call of `sample` by the loop: the edited scores, and whether edits or masks came."""
    calls = []

    def recorded(scores, adaptor, *, edits, allowed, **rest):
        edited = filter_logits(scores, Adaptor(), edits=edits, allowed=allowed)
        calls.append((edited, edits is not None or allowed is not None))
        return sample(scores, adaptor, edits=edits, allowed=allowed, **rest)

    monkeypatch.setattr(hf_draw, "sample", recorded)
    return calls


class Noting(transformers.LogitsProcessor):
    """Another's processor: it shifts the scores, in place as many do."""

    def __call__(self, input_ids, scores):
        scores[:, 2::3] += 0.25
        return scores


class OwnPenalty(transformers.RepetitionPenaltyLogitsProcessor):
    """A subclass may do anything."""


def some_tokens(row, tokens):
    """Allows half of the tokens, others in each row and step, and some of them twice."""
    return [i for i in range(VOCAB) if (i + row + len(tokens)) % 2] + [3 + row + len(tokens)] * 2


ENDS = [3, 40, 11]
BIAS = [[[5], 2.5], [[66], -1.5], [[7, 9], 3.0], [[9, 9], 0.1], [[4, 4, 9], 0.7], [[4, 9], 1e-7]]
CONFIGS = {
    "bias": {"sequence_bias": BIAS},
    "bad_words": {"bad_words_ids": [[5], [3], [7, 9], [9, 11, 7], [4, 4]]},
    "bad_words_ends": {"bad_words_ids": [[5], [3], [7, 9]], "eos_token_id": ENDS},
    "only_ends_bad": {"bad_words_ids": [[3]], "eos_token_id": ENDS, "repetition_penalty": 1.1},
    "repetition": {"repetition_penalty": 1.3},
    "reward": {"repetition_penalty": 0.7},
    "encoder_repetition": {"encoder_repetition_penalty": 1.4},
    **{f"ngrams_{n}": {"no_repeat_ngram_size": n} for n in (1, 2, 3, 11)},
    **{f"encoder_ngrams_{n}": {"encoder_no_repeat_ngram_size": n} for n in (1, 2, 3, 8)},
    "min_length": {"min_length": 14, "eos_token_id": ENDS},
    "min_new_tokens": {"min_new_tokens": 5, "eos_token_id": ENDS},
    "forced_end": {"forced_eos_token_id": [3, 40], "repetition_penalty": 1.2},
    "suppressed": {"suppress_tokens": [1, 5, 66], "begin_suppress_tokens": [8, 9]},
    "decay": {"exponential_decay_length_penalty": (3, 1.2), "eos_token_id": ENDS},
    "prefix": {"prefix_allowed_tokens_fn": some_tokens},
    "usual": {
        "sequence_bias": BIAS,
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 3,
        "bad_words_ids": [[6], [8, 13]],
    },
    "all": {
        "sequence_bias": BIAS,
        "encoder_repetition_penalty": 1.1,
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 2,
        "encoder_no_repeat_ngram_size": 3,
        "bad_words_ids": [[6], [8, 13]],
        "min_length": 12,
        "min_new_tokens": 4,
        "prefix_allowed_tokens_fn": some_tokens,
        "forced_bos_token_id": 6,
        "forced_eos_token_id": 3,
        "exponential_decay_length_penalty": (3, 1.2),
        "suppress_tokens": [1, 5, 66],
        "begin_suppress_tokens": [8, 9],
        "eos_token_id": ENDS,
    },
}
KNOBS = {
    "none": ({"top_k": 0}, Adaptor()),
    "filters": (
        {"top_k": 20, "top_p": 0.9, "renormalize_logits": True},
        Adaptor(top_k=20, top_p=0.9),
    ),
}


def noting(given):
    """A `custom_generate` that keeps the processors that it was handed."""

    def custom_generate(model, input_ids, *, logits_processor, seeds, **rest):
        given.extend(logits_processor)
        rest |= {"logits_processor": logits_processor, "seeds": seeds}
        return hf.generate(model, input_ids, **rest)

    return custom_generate


def run(model, inputs, custom_generate=hf.generate, **config):
    """A sampling run that returns all it can, of rows that do not end unless the config says so."""
    settings = {
        "do_sample": True,
        "max_new_tokens": STEPS,
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
        "top_k": 0,
    }
    return model.generate(**inputs, custom_generate=custom_generate, **{**settings, **config})


def check(model, inputs, steps, adaptor=Adaptor(), **config):  # noqa: B008, a value
    """Generates, and compares edited values and kept sets of every step with the stock chain's."""
    given = []
    out = run(model, inputs, noting(given), seeds=[3, 4, 5], **config)
    warpers = (transformers.TopKLogitsWarper, transformers.TopPLogitsWarper)
    chain = [p for p in given if type(p) not in (*warpers, transformers.LogitNormalization)]
    start = out.sequences.shape[1] - len(out.logits)
    for at, (logits, (edited, _)) in enumerate(zip(out.logits, steps, strict=True)):
        stock = transformers.LogitsProcessorList(chain)(
            out.sequences[:, : start + at], logits.clone()
        )
        assert torch.equal(edited, stock)
        kept = filter_logits(stock, adaptor)
        assert torch.equal(out.scores[at] > -INF, kept > -INF)
        if config.get("renormalize_logits"):
            kept = kept.log_softmax(-1)
        assert torch.equal(out.scores[at], kept)
    return out


@pytest.mark.parametrize(("knobs", "adaptor"), KNOBS.values(), ids=KNOBS)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_edits_have_the_values_of_the_stock_processors(
    model, prompts, steps, config, knobs, adaptor
):
    check(model, prompts, steps, adaptor, **config, **knobs)
    assert all(fused for _, fused in steps)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_edits_of_an_encoder_decoder(t5, prompts, steps, config):
    check(t5, prompts, steps, **{"eos_token_id": None, **config})
    assert all(fused for _, fused in steps)


def test_edits_of_bfloat16_models(model, prompts, steps):
    half = transformers.LlamaForCausalLM(model.config).eval()
    half.load_state_dict(model.state_dict())
    check(half.bfloat16(), prompts, steps, **CONFIGS["all"])


def test_edits_of_several_sequences_a_prompt_and_of_embeddings(model, prompts, steps):
    one = {"input_ids": prompts["input_ids"][:1]}
    check(model, one, steps, num_return_sequences=3, **CONFIGS["usual"])
    steps.clear()
    embeds = model.get_input_embeddings()(prompts["input_ids"])
    check(model, {"inputs_embeds": embeds}, steps, **CONFIGS["usual"])
    assert all(fused for _, fused in steps)


@pytest.mark.parametrize(
    "name", sorted(CONFIGS.keys() - {"forced_end"})
)  # that has two best tokens
def test_edits_leave_greedy_choices_as_they_are(model, prompts, name):
    """With top_k=1 nothing is random."""
    ours = run(model, prompts, top_k=1, **CONFIGS[name])
    stock = run(model, prompts, None, do_sample=False, **CONFIGS[name])
    assert torch.equal(ours.sequences, stock.sequences)


@pytest.mark.parametrize("name", ["usual", "all"])
def test_edits_on_a_real_model(demo_model, steps, name):
    model, tokenizer = demo_model
    texts = ["The three most common colours of cars are", "One two one two one", "Once"]
    inputs = dict(tokenizer(texts, return_tensors="pt", padding=True))
    config = {"eos_token_id": None, **CONFIGS[name], "top_p": 0.9}
    config.pop("prefix_allowed_tokens_fn", None)
    check(model, inputs, steps, Adaptor(top_p=0.9), **config)
    assert all(fused for _, fused in steps)


def stock_list(*processors):
    """The prepared list in which a user's processor would stand."""

    def custom_generate(model, input_ids, *, logits_processor, **rest):
        chain = transformers.LogitsProcessorList(processors)
        return hf.generate(model, input_ids, logits_processor=chain, **rest)

    return custom_generate


FOREIGN = {"another": Noting, "subclass": lambda: OwnPenalty(1.7)}


@pytest.mark.parametrize("foreign", FOREIGN.values(), ids=FOREIGN)
def test_edits_begin_behind_a_foreign_processor(model, prompts, monkeypatch, foreign):
    seen = []
    monkeypatch.setattr(
        hf_draw,
        "sample",
        lambda scores, *rest, **named: (
            seen.append((scores.clone(), named)) or sample(scores, *rest, **named)
        ),
    )
    before = [transformers.SuppressTokensLogitsProcessor([7]), foreign()]
    after = [
        transformers.SequenceBiasLogitsProcessor(BIAS),
        transformers.NoRepeatNGramLogitsProcessor(2),
    ]
    out = run(model, prompts, stock_list(*before, *after), output_logits=False)
    raw = run(model, {"input_ids": out.sequences[:, :9]}, None, do_sample=False, max_new_tokens=1)
    assert splits_at([*before, *after]) == 2
    for at, (scores, named) in enumerate(seen):
        ids = out.sequences[:, : 9 + at]
        if at == 0:
            alone = {"input_ids": ids[:1]}
            raw = run(model, alone, None, do_sample=False, max_new_tokens=1).logits[0]
            some = transformers.LogitsProcessorList(before)(ids[:1], raw.clone())
            torch.testing.assert_close(scores[:1], some, rtol=1e-5, atol=1e-5)
        stock = transformers.LogitsProcessorList(after)(ids, scores.clone())
        assert named["edits"] is not None
        changes = {name: named[name] for name in ("edits", "allowed")}
        assert torch.equal(filter_logits(scores, Adaptor(), **changes), stock)
        assert torch.equal(out.scores[at], stock)


def processors_of(pick, rows):
    """One of each processor that has a rule, with settings drawn by `pick`."""
    ids = [[pick.randrange(VOCAB) for _ in range(6)] for _ in range(rows)]
    pairs = {(pick.randrange(VOCAB),): pick.uniform(-3, 3) for _ in range(4)}
    pairs |= {(pick.randrange(4), pick.randrange(4)): pick.uniform(-3, 3) for _ in range(9)}
    encoder = torch.tensor(ids)
    skipped = pick.choice([None, 2, 100, torch.tensor([pick.randrange(7) for _ in range(rows)])])
    ends = pick.sample(range(VOCAB), 3)
    return [
        transformers.SequenceBiasLogitsProcessor(pairs),
        transformers.NoBadWordsLogitsProcessor([[pick.randrange(5)], [1, 2], [3, 1, 2]], ends),
        transformers.RepetitionPenaltyLogitsProcessor(pick.uniform(0.5, 2), skipped),
        transformers.EncoderRepetitionPenaltyLogitsProcessor(pick.uniform(0.5, 2), encoder),
        transformers.NoRepeatNGramLogitsProcessor(pick.randrange(1, 5)),
        transformers.EncoderNoRepeatNGramLogitsProcessor(pick.randrange(1, 4), encoder % 4),
        transformers.MinLengthLogitsProcessor(pick.randrange(9), [*ends, VOCAB + 5]),
        transformers.MinNewTokensLengthLogitsProcessor(4, pick.randrange(5), ends),
        transformers.SuppressTokensLogitsProcessor(pick.sample(range(VOCAB), 2)),
        transformers.SuppressTokensAtBeginLogitsProcessor(ends, pick.randrange(4, 9)),
        transformers.ForcedBOSTokenLogitsProcessor(pick.randrange(VOCAB)),
        transformers.ForcedEOSTokenLogitsProcessor(pick.randrange(4, 12), ends),
        transformers.ExponentialDecayLengthPenalty((pick.randrange(4), 1.3), ends, 3),
        transformers.PrefixConstrainedLogitsProcessor(some_tokens, 1),
    ]


def same(ours, stock):
    """Whether two rows are equal, NaN to NaN."""
    return torch.equal(ours.nan_to_num(9e9, 8e8, -8e8), stock.nan_to_num(9e9, 8e8, -8e8))


@pytest.mark.parametrize("seed", range(60))
def test_run_is_any_chain_in_any_order(seed):
    """Chains of every order and repetition; rows that go on, change, or have bad logits."""
    pick = random.Random(seed)
    torch.manual_seed(seed)
    rows = pick.randrange(1, 4)
    known = [*processors_of(pick, rows), *processors_of(pick, rows)]
    chain = pick.sample(known, pick.randrange(1, 9))
    assert splits_at(chain) == 0
    edits, tokens = Run(chain), pick.choice([4, VOCAB, VOCAB + 9])
    ids = torch.randint(tokens, (rows, pick.randrange(7)))
    fused = 0
    for step in range(8):
        scores = torch.randn(rows, VOCAB).mul(4)
        scores[scores > 9] = -INF
        if step == 5:
            scores[0, pick.randrange(VOCAB)] = pick.choice([INF, float("nan"), -INF])
        stock = transformers.LogitsProcessorList(chain)(ids, scores.clone())
        done = edits(ids, scores)
        ours = filter_logits(done.scores, Adaptor(), edits=done.edits, allowed=done.allowed)
        assert same(ours, stock)
        fused += done.scores is scores
        if step == 6:  # others go on in these rows
            ids = ids.flip(0).roll(1, 1)
        ids = torch.cat([ids, torch.randint(tokens, (rows, 1))], 1)
    assert fused >= 5 or any(type(p).__name__.startswith("Prefix") for p in chain)


def test_run_reads_others_ids_anew():
    chain = [transformers.NoRepeatNGramLogitsProcessor(2)]
    edits, scores = Run(chain), torch.zeros(2, VOCAB)
    for ids in ([[1, 2, 1], [3, 3, 3]], [[3, 3, 3, 5], [1, 2, 1, 2]], [[1, 2, 1], [3, 3, 3]]):
        given = torch.tensor(ids)
        done = edits(given, scores)
        ours = filter_logits(scores, Adaptor(), edits=done.edits)
        assert torch.equal(ours, chain[0](given, scores.clone()))


FORMS = {
    "float64": lambda scores: scores.double(),
    "bfloat16": lambda scores: scores.bfloat16(),
    "more_rows": lambda scores: scores.repeat(2, 1),
    "narrower": lambda scores: scores[:, :-3],
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_run_leaves_other_scores_to_the_stock_processors(form):
    chain = [transformers.SuppressTokensLogitsProcessor([5, 7])]
    edits, ids = Run(chain), torch.tensor([[1], [2]])
    edits(ids, torch.randn(2, VOCAB))
    scores = form(torch.randn(2, VOCAB))
    done = edits(torch.tensor([[1, 3], [2, 4]]), scores)
    ours = done.scores
    if done.edits is not None:
        ours = filter_logits(done.scores, Adaptor(), edits=done.edits)
    assert ours.dtype == scores.dtype
    assert torch.equal(ours, chain[0](ids, scores))


MISFITS = {
    "bias": (lambda: transformers.SequenceBiasLogitsProcessor([[[VOCAB], 1.0]]), ValueError),
    "forced": (lambda: transformers.ForcedBOSTokenLogitsProcessor(VOCAB), IndexError),
    "skipped": (
        lambda: transformers.RepetitionPenaltyLogitsProcessor(1.5, torch.tensor([1, 2])),
        ValueError,
    ),
    "nothing_allowed": (
        lambda: transformers.PrefixConstrainedLogitsProcessor(lambda *_: [], 1),
        ValueError,
    ),
}


@pytest.mark.parametrize(("make", "error"), MISFITS.values(), ids=MISFITS)
def test_run_raises_what_the_stock_processors_raise(make, error):
    ids, scores = torch.tensor([[1]]), torch.randn(1, VOCAB)
    with pytest.raises(error) as stock:
        make()(ids, scores)
    with pytest.raises(error) as ours:
        Run([make()])(ids, scores)
    assert str(ours.value) == str(stock.value)


def test_run_asks_a_prefix_function_once_a_row_and_step():
    calls = []

    def function(row, tokens):
        calls.append((row, tokens.tolist()))
        return [5, 7]

    ids = torch.tensor([[1, 2], [3, 4]])
    chain = [
        transformers.SuppressTokensLogitsProcessor([5, 7]),  # so that nothing is left
        transformers.PrefixConstrainedLogitsProcessor(function, 1),
    ]
    done = Run(chain)(ids, torch.randn(2, VOCAB))
    assert calls == [(0, [1, 2]), (1, [3, 4])]
    assert (done.scores[:, [5, 7]] == 0).all() and (done.scores > -INF).sum() == 4


def test_run_takes_no_processor_of_several_beams():
    of_beams = transformers.PrefixConstrainedLogitsProcessor(some_tokens, 2)
    others = [transformers.SuppressTokensLogitsProcessor([5]), of_beams]
    assert splits_at(others) == 2
    assert splits_at([*others, transformers.NoRepeatNGramLogitsProcessor(2), *others[:1]]) == 2


@pytest.mark.parametrize("value", [float("nan"), INF])
def test_edits_of_a_bad_row_raise_as_without(model, prompts, value):
    class Spoil(transformers.LogitsProcessor):
        def __call__(self, input_ids, scores):
            scores[1, 7] = value
            return scores

    processors = stock_list(Spoil(), transformers.RepetitionPenaltyLogitsProcessor(1.5))
    with pytest.raises(RuntimeError, match="no token can be drawn: row 1 has "):
        run(model, prompts, processors)
