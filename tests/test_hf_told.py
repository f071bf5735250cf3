"""What `generate` tells of its tokens, and the random streams of its rows."""

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the hooks need transformers")


from fastadapt import hf  # noqa: E402, only where transformers is
from fastadapt.adaptor import Adaptor  # noqa: E402, as above
from fastadapt.sampling.functions import filter_logits  # noqa: E402, as above

VOCAB = 97
STEPS = 8
INF = float("inf")
TOLD = ("logprobs", "base_logprobs", "kept", "ranks")
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


class Writes(transformers.LogitsProcessor):
    """A processor that writes into what it gets."""

    def __call__(self, input_ids, scores):
        scores[:, ::2] -= 1.5
        return scores


def run(model, inputs, **config):
    """A run that tells, of rows that do not end unless the config says so."""
    settings = {
        "do_sample": True,
        "max_new_tokens": STEPS,
        "return_dict_in_generate": True,
        "output_logprobs": True,
        "custom_generate": hf.generate,
        "seeds": [5, 6, 7] if config.get("do_sample", True) else None,
        "top_k": 0,
    }
    return model.generate(**inputs, **{**settings, **config})


CONFIGS = {
    "none": {},
    "filters": {"temperature": 0.7, "top_k": 30, "top_p": 0.8},
    "edits": {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "top_p": 0.9},
    "mask": {"prefix_allowed_tokens_fn": lambda *_: list(range(3, 20)), "min_p": 0.1},
    "normalised": {"top_p": 0.8, "renormalize_logits": True},
    "unfused": {"top_h": 0.6, "suppress_tokens": [3]},
    "in_place": {"logits_processor": [Writes()], "top_p": 0.9, "output_logits": False},
    "greedy": {"do_sample": False},
    "greedy_edits": {"do_sample": False, "repetition_penalty": 1.4, "suppress_tokens": [3]},
    "ends": {"eos_token_id": ENDS, "top_p": 0.95},
    "greedy_ends": {"do_sample": False, "eos_token_id": ENDS, "repetition_penalty": 1.4},
}


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_generate_tells_what_it_did(model, prompts, config, half):
    """Beside the rows themselves, which the model gives to a second run."""
    if half:
        model = copy.deepcopy(model).bfloat16()
    out = run(model, prompts, output_scores=True, **{"output_logits": True, **config})
    assert list(out)[-4:] == list(TOLD)
    tokens = out.sequences[:, prompts["input_ids"].shape[1] :]
    steps = tokens.shape[1]
    for name in TOLD:
        assert out[name] is getattr(out, name) and out[name].shape == (3, steps)
    plain = run(model, prompts, **config)  # without any row
    assert plain.scores is None and plain.logits is None
    assert all(torch.equal(out[name], plain[name]) for name in (*TOLD, "sequences"))
    ended = torch.isin(tokens, torch.tensor(config.get("eos_token_id", [-1])))
    over = ended.cumsum(1) - ended.long() > 0
    assert bool(over.any()) == ("eos_token_id" in config)
    logits = out.logits
    if logits is None:  # the loop's would be written into
        logits = []
        for at in range(steps):
            length = prompts["input_ids"].shape[1] + at
            mask = torch.nn.functional.pad(prompts["attention_mask"], (0, at), value=1)
            inputs = {"input_ids": out.sequences[:, :length], "attention_mask": mask}
            free = {"do_sample": False, "output_logits": True, "max_new_tokens": 1}
            logits += run(model, inputs, **free).logits
    for at, (rows, scores) in enumerate(zip(logits, out.scores, strict=True)):
        drawn, live = tokens[:, at, None], ~over[:, at]
        rank = 1 + (rows > rows.gather(1, drawn)).sum(1)
        rank += ((rows == rows.gather(1, drawn)) & (torch.arange(VOCAB) < drawn)).sum(1)
        wanted = {
            "logprobs": scores.log_softmax(-1).gather(1, drawn)[:, 0],
            "base_logprobs": rows.log_softmax(-1).gather(1, drawn)[:, 0],
            "kept": (scores > -INF).sum(1).int(),
            "ranks": rank.int(),
        }
        bound = 5e-2 if half and out.logits is None else 5e-5  # without a cache bfloat16 differs
        for name, values in wanted.items():
            told = out[name][:, at]
            assert told.dtype == values.dtype
            assert (told[~live] == 0).all()
            if values.is_floating_point():
                torch.testing.assert_close(told[live], values[live], rtol=0, atol=bound)
            elif name == "kept" or bound < 1e-2:
                assert torch.equal(told[live], values[live])


def test_generate_tells_of_an_encoder_decoder():
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2
    )
    config.decoder_start_token_id = 0
    t5 = transformers.T5ForConditionalGeneration(config).eval()
    inputs = {"input_ids": torch.randint(2, VOCAB, (3, 5))}
    out = run(t5, inputs, eos_token_id=None, output_scores=True, repetition_penalty=1.3)
    told = t5.compute_transition_scores(out.sequences, out.scores, normalize_logits=True)
    torch.testing.assert_close(out.logprobs, told, rtol=0, atol=5e-5)


def test_generate_tells_no_step_that_was_undone(model, prompts, monkeypatch):
    utils = transformers.generation.utils
    if not hasattr(utils, "StopCheck"):
        pytest.skip(f"transformers {transformers.__version__} never undoes a step")

    class Late(utils.StopCheck):
        """Answers one step late, as transformers does where asking waits for the device."""

        stopped = False

        def __call__(self, *args):
            before, self.stopped = self.stopped, super().__call__(*args)
            return before

        def finish(self):
            return 1

    wanted = run(model, prompts, eos_token_id=ENDS)
    monkeypatch.setattr(utils, "StopCheck", Late)
    out = run(model, prompts, eos_token_id=ENDS, max_new_tokens=30)
    steps = out.sequences.shape[1] - prompts["input_ids"].shape[1]
    assert steps == wanted.sequences.shape[1] - prompts["input_ids"].shape[1]
    assert all(torch.equal(out[name], wanted[name]) for name in TOLD)


def test_generate_tells_of_tokens_that_the_logits_lack_or_spoil(model, prompts):
    class Wider(transformers.LogitsProcessor):
        def __call__(self, input_ids, scores):
            logits = torch.nn.functional.pad(torch.full_like(scores, -INF), (0, 1), value=1.0)
            logits[1:, 4] = 1e9
            return logits

    out = run(model, prompts, logits_processor=[Wider()], max_new_tokens=1)
    assert out.sequences[:, -1].tolist() == [VOCAB, 4, 4]
    assert out.base_logprobs[0] == -INF and out.ranks[0] == 0 and out.kept[0] == 1
    assert (out.base_logprobs[1:] > -INF).all() and (out.ranks[1:] > 0).all()

    spoilt = copy.deepcopy(model)
    spoilt.lm_head.weight.data[9] = torch.nan
    out = run(spoilt, prompts, remove_invalid_values=True)
    assert out.base_logprobs.isnan().all() and (out.ranks == 0).all()
    assert out.logprobs.isfinite().all() and (out.kept == VOCAB).all()


def test_generate_refuses_to_tell_of_rows_that_it_does_not_have(model, prompts):
    class Halves(transformers.LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores[:3]

    class Doubles(torch.nn.Module):
        """A head with two rows a sequence, as guided models have."""

        def __init__(self, head):
            super().__init__()
            self.head, self.weight = head, head.weight

        def forward(self, hidden):
            return self.head(hidden).repeat(2, 1, 1)

    guided = copy.deepcopy(model)
    guided.lm_head = Doubles(guided.lm_head)
    run(guided, prompts, logits_processor=[Halves()], output_logprobs=False)
    with pytest.raises(ValueError, match=r"one row of logits a sequence, 3, got shape \(6, 97\)"):
        run(guided, prompts, logits_processor=[Halves()])


@pytest.mark.parametrize("do_sample", [True, False])
def test_generate_tells_in_a_dictionary_alone(model, prompts, do_sample):
    with pytest.raises(ValueError, match="^output_logprobs: expected return_dict_in_generate=True"):
        run(model, prompts, return_dict_in_generate=False, do_sample=do_sample)
    with pytest.raises(TypeError, match="^output_logprobs: expected"):
        run(model, prompts, output_logprobs=1, do_sample=do_sample)


@pytest.mark.parametrize("cut", [1, 3, 5])
def test_positions_go_on_where_a_generation_was_cut(model, prompts, cut):
    settings = {"temperature": 2.0, "repetition_penalty": 1.2, "no_repeat_ngram_size": 3}
    whole = run(model, prompts, **settings)
    length = prompts["input_ids"].shape[1] + cut
    mask = torch.nn.functional.pad(prompts["attention_mask"], (0, cut), value=1)
    begun = {"input_ids": whole.sequences[:, :length], "attention_mask": mask}
    rest = {"max_new_tokens": STEPS - cut, **settings}
    again = run(model, begun, positions=[cut] * 3, **rest)
    assert torch.equal(again.sequences, whole.sequences)
    other = run(model, begun, positions=torch.tensor([cut, cut + 1, 0]), **rest)
    same = (other.sequences == whole.sequences).all(1)
    assert same.tolist() == [True, False, False]


BAD_POSITIONS = [
    (ValueError, "expected seeds beside them, got none", [1, 2, 3], {"seeds": None}),
    (ValueError, r"expected shape \(3,\), .* got \(2,\)", [1, 2], {}),
    (ValueError, r"expected shape \(3,\), .* got \(\)", 4, {}),
    (ValueError, r"expected integers >= 0, got \[1, -1, 2\]", [1, -1, 2], {}),
    (TypeError, "expected integers in .*, got", [1, None, 2], {}),
    (TypeError, "expected integers, got torch.float32", [0.5, 1.0, 2.0], {}),
]


@pytest.mark.parametrize(("error", "message", "positions", "config"), BAD_POSITIONS)
def test_positions_are_checked(model, prompts, error, message, positions, config):
    with pytest.raises(error, match="^positions: " + message):
        run(model, prompts, positions=positions, **config)


def test_rows_without_a_seed_draw_as_if_none_had_one(model, prompts, recwarn):
    def sequences(seeds, state):
        torch.manual_seed(state)
        return run(model, prompts, seeds=seeds, temperature=3.0).sequences

    free, seeded = sequences(None, 1), sequences([5, 6, 7], 1)
    for seeds in ([5, None, 7], (None, 6, None), [None, None, 7], [None] * 3):
        has = torch.tensor([seed is not None for seed in seeds])
        wanted = torch.where(has[:, None], seeded, free)
        assert torch.equal(sequences(seeds, 1), wanted)
    others = sequences([5, None, 7], 2)
    assert (others == seeded).all(1).tolist() == [True, False, True]
    assert not [w for w in recwarn if "default generator" in str(w.message)]


def test_seeds_beside_none_still_say_who_else_draws(model, prompts):
    class DrawsByItself(transformers.LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores + torch.rand_like(scores)

    with pytest.warns(UserWarning, match="drew from torch's default generator too"):
        run(model, prompts, seeds=[1, None, 3], logits_processor=[DrawsByItself()])


def test_edits_and_adaptors_of_a_warper(model, prompts):
    warper = hf.FusedLogitsWarper(Adaptor(top_p=torch.tensor([0.5, 0.7, 0.9])))
    settings = warper.generate_kwargs() | {"repetition_penalty": 1.5}
    out = run(model, prompts, output_scores=True, output_logits=True, **settings)
    penalty = transformers.RepetitionPenaltyLogitsProcessor(1.5, torch.tensor([0, 3, 5]))
    for at, (scores, logits) in enumerate(zip(out.scores, out.logits, strict=True)):
        edited = penalty(out.sequences[:, : 7 + at], logits)
        assert torch.equal(scores, filter_logits(edited, warper.adaptor))
        assert torch.equal(out.kept[:, at], (scores > -INF).sum(1).int())
