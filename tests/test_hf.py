"""The generation loop and the processor, against transformers' own chain on tiny models."""

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the hooks need transformers")


from fastadapt import hf  # noqa: E402, only where transformers is
from fastadapt.adaptor import Adaptor  # noqa: E402, as above
from fastadapt.hf import _draw as hf_draw  # noqa: E402, only where transformers is
from fastadapt.sampling.functions import filter_logits, sample  # noqa: E402, as above

VOCAB = 199
STEPS = 6
BAND = 1e-5  # how near a threshold a token's fate may depend on rounding
NUDGED = {"top_p": 1.0, "mass": 1.0, "min_p": None, "epsilon": None}  # None: relative to its value
CONFIGS = {
    "default_top_k": {},
    "none": {"top_k": 0},
    "temperature": {"top_k": 0, "temperature": 0.7},
    "top_k": {"top_k": 7},
    "top_p": {"top_k": 0, "top_p": 0.9},
    "min_p": {"top_k": 0, "min_p": 0.05},
    "typical": {"top_k": 0, "typical_p": 0.8},
    "epsilon": {"top_k": 0, "epsilon_cutoff": 0.01},
    "eta": {"top_k": 0, "eta_cutoff": 0.02},
    "all": {
        "temperature": 1.3,
        "top_k": 60,
        "top_p": 0.95,
        "min_p": 0.01,
        "typical_p": 0.9,
        "epsilon_cutoff": 0.003,
        "eta_cutoff": 0.004,
    },
    "repetition_penalty": {"top_k": 0, "top_p": 0.8, "repetition_penalty": 1.7},
    "constraints": {"top_p": 0.8, "no_repeat_ngram_size": 2, "suppress_tokens": [3, 5]},
    "normalised": {"temperature": 0.8, "top_p": 0.8, "renormalize_logits": True},
    "top_h": {"temperature": 0.8, "top_h": 0.6, "top_p": 0.9, "renormalize_logits": True},
}


@pytest.fixture(autouse=True)
def _one_thread(num_threads):
    """Models as small as these only lose time to a second thread."""
    num_threads(1)


@pytest.fixture(scope="module")
def model(tiny_llama):
    """A two-layer Llama."""
    return tiny_llama(VOCAB, num_hidden_layers=2)


@pytest.fixture(scope="module")
def demo(demo_model):
    """The demo's model and two prompts padded on the left."""
    model, tokenizer = demo_model
    texts = ["The three most common colours of cars are", "Once"]
    return model, dict(tokenizer(texts, return_tensors="pt", padding=True))


@pytest.fixture
def prompts(padded_prompts):
    """Three, padded on the left."""
    return padded_prompts(VOCAB)


@pytest.fixture
def draws(monkeypatch):
    """Every call of `sample` made by the loop: (edited scores, adaptor, seeds, positions)."""
    calls = []

    def recorded(scores, adaptor, *, seeds, positions, **changes):
        edited = filter_logits(scores, Adaptor(), **changes)
        calls.append((edited, adaptor, seeds, positions))
        return sample(scores, adaptor, seeds=seeds, positions=positions, **changes)

    monkeypatch.setattr(hf_draw, "sample", recorded)
    return calls


class Recorder(transformers.generation.streamers.BaseStreamer):
    """A streamer that keeps what it was given."""

    def __init__(self):
        self.values, self.ends = [], 0

    def put(self, value):
        self.values.append(value.clone())

    def end(self):
        self.ends += 1


class Spoil(transformers.LogitsProcessor):
    """Overwrites the scores of chosen rows: `rows(input_ids)` gives a (N,) bool mask."""

    def __init__(self, rows, value):
        self.rows, self.value, self.spoilt = rows, value, 0

    def __call__(self, input_ids, scores):
        rows = self.rows(input_ids)
        self.spoilt += int(rows.sum())
        return torch.where(rows[:, None], self.value, scores)


def run(model, inputs, custom_generate=hf.generate, **kwargs):
    """One short sampling run that returns everything it can."""
    settings = {
        "do_sample": True,
        "max_new_tokens": STEPS,
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
    }
    return model.generate(**inputs, custom_generate=custom_generate, **{**settings, **kwargs})


def with_processors(processors, given=None):
    """A callable that gives ours this list of processors, or the prepared one; noted in `given`."""

    def custom_generate(model, input_ids, *, logits_processor, **kwargs):
        chain = logits_processor if processors is None else processors
        if given is not None:
            given.extend(chain)
        chain = transformers.LogitsProcessorList(chain)
        length = len(chain)
        out = hf.generate(model, input_ids, logits_processor=chain, **kwargs)
        assert kwargs["generation_config"].do_sample and len(chain) == length
        return out

    return custom_generate


def apply(processors, input_ids, scores):
    """Transformers' chain on a copy of the scores."""
    return transformers.LogitsProcessorList(processors)(input_ids, scores.clone())


def settled_tokens(processors, input_ids, logits):
    """(N, V) bool: tokens whose fate does not change when a threshold moves by the band."""
    kept = apply(processors, input_ids, logits) > -torch.inf
    settled = torch.ones_like(kept)
    for i, warper in enumerate(processors):
        for name in NUDGED.keys() & vars(warper).keys():
            value = getattr(warper, name)
            size = BAND * (value if NUDGED[name] is None else NUDGED[name])
            for nudge in (-size, size):
                other = copy.copy(warper)
                setattr(other, name, value + nudge)
                nudged = [*processors[:i], other, *processors[i + 1 :]]
                settled &= (apply(nudged, input_ids, logits) > -torch.inf) == kept
    return settled


def check_kept_sets(model, prompts, config, returned=1, processors=None):
    """Generates, and compares the scores of every step with those of the stock chain."""
    chain = []
    out = run(
        model, prompts, with_processors(processors, chain), num_return_sequences=returned, **config
    )
    length = prompts["input_ids"].shape[1]
    rows = prompts["input_ids"].shape[0] * returned
    assert out.sequences.shape == (rows, length + STEPS)
    assert len(out.scores) == len(out.logits) == STEPS
    doubtful = 0
    for step, (scores, logits) in enumerate(zip(out.scores, out.logits, strict=True)):
        input_ids = out.sequences[:, : length + step]
        stock = apply(chain, input_ids, logits)
        settled = settled_tokens(chain, input_ids, logits)
        assert torch.equal((scores > -torch.inf) & settled, (stock > -torch.inf) & settled)
        both = (scores > -torch.inf) & (stock > -torch.inf)
        torch.testing.assert_close(scores[both], stock[both], rtol=1e-6, atol=2e-5)
        drawn = scores.gather(1, out.sequences[:, length + step, None])
        assert (drawn > -torch.inf).all()
        doubtful += int((~settled).sum())
    assert doubtful <= 0.001 * STEPS * stock.numel()


@pytest.mark.parametrize("returned", [1, 3])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_generate_keeps_what_the_stock_chain_keeps(model, prompts, config, returned):
    check_kept_sets(model, prompts, config, returned)


@pytest.mark.parametrize("name", ["top_p", "all", "repetition_penalty"])
def test_generate_keeps_what_the_stock_chain_keeps_on_a_real_model(demo, name):
    model, prompts = demo
    check_kept_sets(model, prompts, {**CONFIGS[name], "eos_token_id": None}, 2)


@pytest.mark.parametrize("config", [{"top_k": 1}, {"top_k": 1, "repetition_penalty": 1.3}])
def test_generate_returns_what_stock_returns_where_no_choice_is_left(model, prompts, config):
    ours, stock = (run(model, prompts, custom, **config) for custom in (hf.generate, None))
    assert type(ours) is type(stock)
    assert torch.equal(ours.sequences, stock.sequences)
    assert list(ours) == list(stock)
    for name in ("scores", "logits"):
        torch.testing.assert_close(getattr(ours, name), getattr(stock, name))
    plain = run(model, prompts, return_dict_in_generate=False, **config)
    assert torch.equal(plain, stock.sequences)


def test_generate_leaves_greedy_search_alone(model, prompts, draws):
    ours, stock = (run(model, prompts, custom, do_sample=False) for custom in (hf.generate, None))
    assert torch.equal(ours.sequences, stock.sequences)
    assert torch.equal(torch.stack(ours.scores), torch.stack(stock.scores))
    assert not draws


FUSED = {
    "nothing": ([], Adaptor()),
    "one": ([transformers.TopKLogitsWarper(5)], Adaptor(top_k=5)),
    "keep": (
        [
            transformers.TemperatureLogitsWarper(0.5),
            transformers.TopPLogitsWarper(0.7, min_tokens_to_keep=3),
            transformers.EtaLogitsWarper(0.01, min_tokens_to_keep=3),
        ],
        Adaptor(
            temperature=0.5,
            top_p=0.7,
            eta_cutoff=float(torch.tensor(0.01)),
            min_tokens_to_keep=3,
        ),
    ),
    "keep_of_top_k": (
        [
            transformers.TopKLogitsWarper(3, min_tokens_to_keep=5),
            transformers.TopPLogitsWarper(0.5),
        ],
        Adaptor(top_k=5, top_p=0.5),
    ),
    "behind_others": (
        [
            transformers.LogitNormalization(),
            transformers.RepetitionPenaltyLogitsProcessor(1.2),
            transformers.MinPLogitsWarper(0.1),
            transformers.LogitNormalization(),
        ],
        Adaptor(min_p=0.1),
    ),
    "top_h": (
        [transformers.TemperatureLogitsWarper(0.5), transformers.TopHLogitsWarper(0.4)],
        Adaptor(temperature=0.5, top_h=0.4),
    ),
    "another_order": (
        [
            transformers.TopPLogitsWarper(0.9),
            transformers.TopKLogitsWarper(5),
            transformers.TemperatureLogitsWarper(0.5),
        ],
        Adaptor(temperature=0.5, top_p=0.9, top_k=5, order=("top_p", "top_k", "temperature")),
    ),
    "extremes": (
        [transformers.TopPLogitsWarper(0.0), transformers.MinPLogitsWarper(0)],
        Adaptor(top_p=0.0),
    ),
}


@pytest.mark.parametrize(("processors", "adaptor"), FUSED.values(), ids=FUSED)
def test_generate_fuses_the_warpers_at_the_end(model, prompts, draws, processors, adaptor):
    check_kept_sets(model, prompts, {}, processors=processors)
    assert len(draws) == STEPS
    assert all(used == adaptor for _, used, *_ in draws)


class TopKOfAUser(transformers.TopKLogitsWarper):
    """A subclass may do anything."""


UNFUSED = {
    "unknown_among": [
        transformers.TemperatureLogitsWarper(0.5),
        transformers.WatermarkLogitsProcessor(VOCAB, "cpu"),
        transformers.TopKLogitsWarper(5),
    ],
    "unknown_after": [
        transformers.TopKLogitsWarper(50),
        transformers.WatermarkLogitsProcessor(VOCAB, "cpu"),
        transformers.LogitNormalization(),
    ],
    "subclass_among": [
        transformers.TemperatureLogitsWarper(0.5),
        TopKOfAUser(50),
        transformers.TopPLogitsWarper(0.9),
    ],
    "unequal_keep": [
        transformers.TopPLogitsWarper(0.9, min_tokens_to_keep=2),
        transformers.MinPLogitsWarper(0.1),
    ],
    "top_k_below_keep": [
        transformers.TopKLogitsWarper(2),
        transformers.TopPLogitsWarper(0.9, min_tokens_to_keep=3),
    ],
    "temperature_among": [
        transformers.TopPLogitsWarper(0.9),
        transformers.TemperatureLogitsWarper(0.5),
        transformers.TopKLogitsWarper(5),
    ],
    "keep_of_top_h": [
        transformers.TopHLogitsWarper(0.5),
        transformers.TopPLogitsWarper(0.9, min_tokens_to_keep=2),
    ],
    "twice": [transformers.TopKLogitsWarper(9), transformers.TopKLogitsWarper(5)],
    "finite_filter_value": [transformers.TopKLogitsWarper(5, filter_value=-20.0)],
}


@pytest.mark.parametrize("processors", UNFUSED.values(), ids=UNFUSED)
def test_generate_leaves_other_chains_as_they_are(model, prompts, draws, processors):
    out = run(model, prompts, with_processors(processors))
    assert len(draws) == STEPS
    for step, (scores, adaptor, *_) in enumerate(draws):
        input_ids = out.sequences[:, : prompts["input_ids"].shape[1] + step]
        assert adaptor == Adaptor()
        assert torch.equal(scores, apply(processors, input_ids, out.logits[step]))
        assert torch.equal(scores, out.scores[step])


def test_generate_draws_each_sequence_by_its_seed_and_its_length(model, prompts):
    seeds = [7, 7, -3, 2**62, 11, 0]
    out = run(model, prompts, seeds=seeds, num_return_sequences=2, top_p=0.9)
    generated = out.sequences[:, prompts["input_ids"].shape[1] :]
    for step, logits in enumerate(out.logits):
        drawn = sample(
            logits,
            Adaptor(top_k=50, top_p=0.9),
            seeds=torch.tensor(seeds),
            positions=torch.full((6,), step),
        )
        assert torch.equal(generated[:, step], drawn.tokens)
    assert torch.equal(generated[0], generated[1])
    assert generated.unique(dim=0).shape[0] == 5


def test_generate_by_seed_ignores_padding_batch_mates_and_the_default_generator(model, prompts):
    """A row draws from its own logits by its seed and step.

    Alone, its logits may be rounded otherwise: both runs are held to their own.
    """
    torch.manual_seed(1)
    batch = run(model, prompts, seeds=torch.tensor([5, 6, 7]), temperature=2.0)
    torch.manual_seed(2)
    for row, (length, seed) in enumerate(zip((7, 4, 2), (5, 6, 7), strict=True)):
        alone = {"input_ids": prompts["input_ids"][row : row + 1, -length:]}
        custom = hf.generate.using(seeds=[seed])
        out = run(model, alone, custom, temperature=2.0)
        same = True  # the tokens before this step, and so the logits
        for step in range(STEPS):
            drawn = []
            for logits, tokens, at in (
                (out.logits[step], out.sequences, 0),
                (batch.logits[step], batch.sequences, row),
            ):
                wanted = sample(
                    logits[at : at + 1],
                    Adaptor(temperature=2.0, top_k=50),
                    seeds=torch.tensor([seed]),
                    positions=torch.tensor([step]),
                ).tokens
                drawn.append(int(tokens[at, step - STEPS]))
                assert drawn[-1] == int(wanted)
            if same:
                torch.testing.assert_close(
                    out.logits[step][0], batch.logits[step][row], rtol=1e-3, atol=1e-4
                )
            same = same and drawn[0] == drawn[1]


def test_generate_without_seeds_follows_the_default_generator(model, prompts):
    def sequences(seed):
        torch.manual_seed(seed)
        return run(model, prompts, temperature=2.0).sequences

    assert torch.equal(sequences(3), sequences(3))
    assert not torch.equal(sequences(3), sequences(4))


def test_generate_counts_positions_from_the_prompt_of_embeddings(model, prompts):
    ids = prompts["input_ids"][:1]
    embeds = {"inputs_embeds": model.get_input_embeddings()(ids)}
    by_id, by_embedding = (
        run(model, inputs, seeds=[9]).sequences[:, -STEPS:]
        for inputs in ({"input_ids": ids}, embeds)
    )
    assert torch.equal(by_id, by_embedding)


def test_generate_serves_encoder_decoder_models(draws):
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2
    )
    config.decoder_start_token_id = 0
    t5 = transformers.T5ForConditionalGeneration(config).eval()
    inputs = {"input_ids": torch.randint(2, VOCAB, (2, 5))}
    out = run(t5, inputs, seeds=[1, 2], top_p=0.9, top_k=0, eos_token_id=None)
    assert out.sequences.shape == (2, 1 + STEPS)
    assert [positions.tolist() for *_, positions in draws] == [[i, i] for i in range(STEPS)]
    for scores, logits in zip(out.scores, out.logits, strict=True):
        assert torch.equal(scores, filter_logits(logits, Adaptor(top_p=0.9)))


@pytest.mark.parametrize("do_sample", [True, False])
def test_using_streams_prompt_tokens_and_end(model, prompts, do_sample):
    ours, stock = Recorder(), Recorder()
    run(model, prompts, hf.generate.using(streamer=ours), do_sample=do_sample, top_k=1)
    run(model, prompts, None, streamer=stock, do_sample=do_sample, top_k=1)
    assert ours.ends == stock.ends == 1
    assert len(ours.values) == len(stock.values) == 1 + STEPS
    assert all(map(torch.equal, ours.values, stock.values))


@pytest.mark.parametrize("synced_gpus", [None, False, True])
def test_using_hands_synced_gpus_to_the_loop(model, prompts, monkeypatch, synced_gpus):
    seen = []

    def has_unfinished(this_peer_finished, synced_gpus, device):
        seen.append(synced_gpus)
        return not this_peer_finished

    monkeypatch.setattr(model, "_has_unfinished_sequences", has_unfinished)
    run(model, prompts, hf.generate.using(synced_gpus=synced_gpus))
    assert set(seen) == {bool(synced_gpus)}


def test_generate_stops_rows_at_the_end_token(model, prompts, draws):
    ends = list(range(2, VOCAB, 3))
    out = run(model, prompts, seeds=[1, 2, 3], eos_token_id=ends, max_new_tokens=30)
    generated = out.sequences[:, prompts["input_ids"].shape[1] :]
    lengths = []
    for row in generated.tolist():
        first = next(i for i, token in enumerate(row) if token in ends)
        assert set(row[first + 1 :]) <= {0}
        lengths.append(first + 1)
    assert len(set(lengths)) > 1 and max(lengths) == generated.shape[1] == len(draws)


def test_generate_shows_true_scores_to_stopping_criteria(model, prompts):
    seen = []

    class Watch(transformers.StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            seen.append(scores)
            return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    out = run(model, prompts, stopping_criteria=[Watch()], top_k=5)
    assert [len(scores) for scores in seen] == list(range(1, STEPS + 1))
    assert all(map(torch.equal, seen[-1], out.scores))
    run(model, prompts, stopping_criteria=[Watch()], output_scores=False)
    assert seen[-1] is None


BAD = {"NaN": (torch.nan, 1), "+inf": (torch.inf, 2), "no finite": (-torch.inf, 3)}


@pytest.mark.parametrize(("value", "status"), BAD.values(), ids=BAD)
def test_generate_names_a_bad_row(model, prompts, value, status):
    spoil = Spoil(lambda ids: (torch.arange(3) == 1) & (ids.shape[1] == 9), value)
    streamer = Recorder()
    with pytest.raises(RuntimeError, match=rf"row 1 has .*\(status {status}\)$"):
        run(model, prompts, hf.generate.using(streamer=streamer), logits_processor=[spoil])
    assert len(streamer.values) == 1 + 2


def test_generate_defers_the_error_where_reading_a_value_waits(model, prompts, monkeypatch):
    monkeypatch.setattr(hf_draw, "_reads_are_free", lambda device: False)
    spoil = Spoil(lambda ids: (torch.arange(3) == 1) & (ids.shape[1] == 9), torch.nan)
    streamer = Recorder()
    custom = hf.generate.using(streamer=streamer, seeds=[1, 2, 3])
    with pytest.raises(RuntimeError, match=r"row 1 has NaN .*\(status 1\)$"):
        run(model, prompts, custom, logits_processor=[spoil], eos_token_id=[VOCAB - 1])
    tokens = torch.stack(streamer.values[1:])
    assert tokens.shape == (STEPS, 3) and streamer.ends == 1
    clean = run(model, prompts, seeds=[1, 2, 3]).sequences[:, -STEPS:].T
    assert torch.equal(tokens[:, [0, 2]], clean[:, [0, 2]])
    assert torch.equal(tokens[:2, 1], clean[:2, 1])
    assert (tokens[2:, 1] == 0).all()


def test_generate_ends_when_every_row_is_bad(model, prompts, monkeypatch):
    monkeypatch.setattr(hf_draw, "_reads_are_free", lambda device: False)
    spoil = Spoil(lambda ids: torch.tensor([True] * 3) & (ids.shape[1] == 8), torch.nan)
    streamer = Recorder()
    with pytest.raises(RuntimeError, match="row 0 .*; row 1 .*; row 2 "):
        run(model, prompts, hf.generate.using(streamer=streamer), logits_processor=[spoil])
    assert len(streamer.values) == 1 + 2


@pytest.mark.parametrize("at_once", [True, False])
def test_generate_lets_finished_rows_be_bad(model, prompts, monkeypatch, at_once):
    monkeypatch.setattr(hf_draw, "_reads_are_free", lambda device: at_once)
    ends = torch.arange(2, VOCAB, 3)

    def finished(ids):
        return torch.isin(ids[:, prompts["input_ids"].shape[1] :], ends).any(1)

    arguments = {"seeds": [1, 2, 3], "eos_token_id": ends.tolist(), "max_new_tokens": 30}
    spoil = Spoil(finished, torch.nan)
    out = run(model, prompts, logits_processor=[spoil], **arguments)
    assert spoil.spoilt > 0
    assert torch.equal(out.sequences, run(model, prompts, **arguments).sequences)


def test_generate_returns_no_scores_of_undone_steps(model, prompts, draws, monkeypatch):
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

    monkeypatch.setattr(utils, "StopCheck", Late)
    ends = list(range(2, VOCAB, 2))
    out = run(model, prompts, seeds=[1, 2, 3], eos_token_id=ends, max_new_tokens=30)
    steps = out.sequences.shape[1] - prompts["input_ids"].shape[1]
    assert len(out.scores) == steps == len(draws) - 1
    for scores, logits in zip(out.scores, out.logits, strict=True):
        assert torch.equal(scores, filter_logits(logits, Adaptor(top_k=50)))


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("beam_sample", {"num_beams": 2}),
        ("beam_search", {"num_beams": 2, "do_sample": False}),
        ("contrastive_search", {"do_sample": False, "penalty_alpha": 0.6, "top_k": 4}),
        ("dola_generation", {"dola_layers": "high", "do_sample": False}),
    ],
)
def test_generate_refuses_other_modes(model, prompts, draws, mode, options):
    with pytest.raises(ValueError, match=f"expected sampling or greedy search, got {mode}"):
        run(model, prompts, **options)
    assert not draws


def test_generate_names_the_way_to_stop_strings(model, prompts):
    with pytest.raises(ValueError, match=r"pass stopping_criteria=\[StopStringCriteria"):
        run(model, prompts, stop_strings=["."], tokenizer=object())


BAD_SEEDS = [
    (ValueError, r"shape \(6,\).*got \(3,\)", [1, 2, 3], {"num_return_sequences": 2}),
    (ValueError, r"shape \(3,\).*got \(\)", 5, {}),
    (ValueError, r"shape \(3,\).*got \(3, 1\)", [[1], [2], [3]], {}),
    (TypeError, "expected integers, got torch.float32", [0.5, 1.0, 2.0], {}),
    (TypeError, "expected integers, got torch.bool", [True, False, True], {}),
    (TypeError, r"expected integers in .* or None, got \[1, None, 2.0\]", [1, None, 2.0], {}),
    (ValueError, r"expected .* or None, got \[None, None, 92", [None, None, 2**63], {}),
    (ValueError, r"shape \(3,\).*got \(2,\)", [1, None], {}),
    (TypeError, r"expected integers in .*, got \['1', '2', '3'\]", ["1", "2", "3"], {}),
    (TypeError, "expected integers in .*, got <object", object(), {}),
    (TypeError, r"expected integers in .*, got \[\[1\], \[2, 3\]\]", [[1], [2, 3]], {}),
    (ValueError, r"expected integers in \[-2\*\*63, 2\*\*63\), got \[1, 2, 92", [1, 2, 2**63], {}),
    (ValueError, "expected integers in .*, got", [1, 2, -(2**63) - 1], {}),
    (
        ValueError,
        "expected integers in .*, got",
        torch.tensor([1, 2, 2**63], dtype=torch.uint64),
        {},
    ),
    (ValueError, "got do_sample=False", [1, 2, 3], {"do_sample": False}),
]


@pytest.mark.parametrize(("error", "message", "seeds", "options"), BAD_SEEDS)
def test_generate_checks_seeds(model, prompts, draws, error, message, seeds, options):
    with pytest.raises(error, match="^seeds: .*" + message):
        run(model, prompts, seeds=seeds, **options)
    with pytest.raises(error, match="^seeds: .*" + message):
        run(model, prompts, hf.generate.using(seeds=seeds), **options)
    assert not draws


def test_generate_takes_integers_of_every_kind(model, prompts):
    ids = [3, 2**31 - 1, 0]
    as_list = run(model, prompts, seeds=ids, temperature=2.0).sequences
    kinds = [torch.tensor(ids, dtype=t) for t in (torch.int32, torch.uint32, torch.uint64)]
    for seeds in (tuple(ids), torch.tensor(ids).numpy(), list(torch.tensor(ids)), *kinds):
        assert torch.equal(run(model, prompts, seeds=seeds, temperature=2.0).sequences, as_list)


def test_generate_refuses_seeds_from_two_places(model, prompts):
    with pytest.raises(ValueError, match="got them in both"):
        run(model, prompts, hf.generate.using(seeds=[1, 2, 3]), seeds=[1, 2, 3])


PER_ROW = Adaptor(temperature=torch.tensor([0.5, 1.0, 2.0]), top_k=torch.tensor([3, 0, 9]))


@pytest.mark.parametrize("custom_generate", [None, hf.generate], ids=["stock", "fused"])
@pytest.mark.parametrize("adaptor", [Adaptor(top_p=0.8, order="vllm"), PER_ROW])
def test_warper_is_the_only_mask(model, prompts, adaptor, custom_generate):
    inherited = copy.deepcopy(model.generation_config)
    inherited.update(top_p=0.3, min_p=0.5, typical_p=0.5, temperature=3.0, top_h=0.1)
    inherited.update(epsilon_cutoff=0.1, eta_cutoff=0.1, do_sample=True)
    tiny = copy.copy(model)
    tiny.generation_config = inherited
    kwargs = hf.FusedLogitsWarper(adaptor).generate_kwargs()
    out = run(tiny, prompts, custom_generate, **kwargs)
    for scores, logits in zip(out.scores, out.logits, strict=True):
        assert torch.equal(scores, filter_logits(logits, adaptor))


def test_warper_is_fused_with_the_draw(model, prompts, draws):
    kwargs = hf.FusedLogitsWarper(PER_ROW).generate_kwargs()
    out = run(model, prompts, **{"repetition_penalty": 1.5, "do_sample": None, **kwargs})
    assert len(draws) == STEPS
    penalty = transformers.RepetitionPenaltyLogitsProcessor(1.5)
    for step, (scores, adaptor, *_) in enumerate(draws):
        assert adaptor is PER_ROW
        assert torch.equal(out.scores[step], filter_logits(scores, PER_ROW))
        if step == 0:
            ids = prompts["input_ids"][:1]
            assert torch.equal(scores[:1], penalty(ids, out.logits[0][:1].clone()))


@pytest.mark.parametrize("custom_generate", [None, hf.generate], ids=["stock", "fused"])
def test_warper_checks_that_per_row_knobs_fit_the_batch(model, prompts, custom_generate):
    kwargs = hf.FusedLogitsWarper(PER_ROW).generate_kwargs()
    with pytest.raises(ValueError, match="for 6 sequences .* got 3; repeat_interleave"):
        run(model, prompts, custom_generate, num_return_sequences=2, **kwargs)
    expanded = Adaptor(top_k=torch.tensor([3, 0, 9]).repeat_interleave(2))
    kwargs = hf.FusedLogitsWarper(expanded).generate_kwargs()
    out = run(model, prompts, custom_generate, num_return_sequences=2, **kwargs)
    kept = (out.scores[0] > -torch.inf).sum(1)
    assert kept.tolist() == [3, 3, VOCAB, VOCAB, 9, 9]


def test_warper_takes_an_adaptor_only():
    with pytest.raises(TypeError, match="expected an Adaptor, got dict"):
        hf.FusedLogitsWarper({"top_p": 0.9})


def test_warper_filters_float64_as_float32():
    logits = torch.randn(3, VOCAB, dtype=torch.float64)
    scores = hf.FusedLogitsWarper(PER_ROW)(torch.zeros(3, 1, dtype=torch.int64), logits)
    assert scores.dtype == torch.float64
    assert torch.equal(scores, filter_logits(logits.float(), PER_ROW).double())


@pytest.mark.parametrize("through", [hf.generate, with_processors(None)], ids=["direct", "wrapped"])
@pytest.mark.parametrize("do_sample", [True, False])
def test_generate_refuses_a_streamer_that_it_cannot_have(model, prompts, draws, through, do_sample):
    streamer = Recorder()
    with pytest.raises(ValueError, match=r"^streamer: expected none .*using\(streamer="):
        run(model, prompts, through, streamer=streamer, do_sample=do_sample)
    assert streamer.ends == 1  # who waits for its end has it
    assert not draws


def test_generate_refuses_an_assistant_that_it_cannot_have(model, prompts, draws):
    one = {name: tensor[:1] for name, tensor in prompts.items()}
    with pytest.raises(
        ValueError, match=r"^assistant_model: expected none .*using\(assistant_model"
    ):
        run(model, one, assistant_model=copy.copy(model))
    assert not draws


def test_generate_refuses_synced_gpus_that_it_cannot_have(model, prompts, monkeypatch):
    def has_unfinished(this_peer_finished, synced_gpus, device):
        return not this_peer_finished

    monkeypatch.setattr(model, "_has_unfinished_sequences", has_unfinished)
    with pytest.raises(ValueError, match=r"^synced_gpus: expected none .*using\(synced_gpus=True"):
        run(model, prompts, synced_gpus=True)
    run(model, prompts, hf.generate.using(synced_gpus=True), synced_gpus=True)
    run(model, prompts, synced_gpus=False)


class DrawsByItself(transformers.LogitsProcessor):
    """Adds noise out of the default generator."""

    def __call__(self, input_ids, scores):
        return scores + torch.rand_like(scores)


@pytest.mark.parametrize("seeds", [[1, 2, 3], None])
def test_generate_says_where_seeds_do_not_reach(model, prompts, recwarn, seeds):
    run(model, prompts, seeds=seeds, logits_processor=[DrawsByItself()])
    seen = [str(w.message) for w in recwarn if "default generator" in str(w.message)]
    assert len(seen) == (seeds is not None)
    assert all(text.startswith("seeds: LlamaForCausalLM or one of its proc") for text in seen)
    recwarn.clear()
    run(model, prompts, seeds=[1, 2, 3])
    assert not [w for w in recwarn if "seeds" in str(w.message)]


# No adaptor takes these; transformers' warpers do.
BEYOND = {
    "almost_greedy": {"temperature": 1e-7, "top_k": 0, "top_p": 0.9},
    "tiny": {"temperature": 1e-30, "top_k": 5},
    "huge": {"temperature": 1e39, "top_k": 20},
    "infinite": {"temperature": float("inf"), "top_k": 7},
    "top_k": {"top_k": 2**31, "top_p": 0.8},
}


@pytest.mark.parametrize("config", BEYOND.values(), ids=BEYOND)
def test_generate_runs_stock_warpers_on_values_that_no_adaptor_takes(model, prompts, draws, config):
    with pytest.warns(UserWarning, match="transformers' own warpers run") as seen:
        check_kept_sets(model, prompts, config)
    assert len([w for w in seen if "own warpers" in str(w.message)]) == 1
    assert all(adaptor == Adaptor() for _, adaptor, *_ in draws)


def test_generate_is_almost_greedy_at_almost_no_temperature(model, prompts):
    with pytest.warns(UserWarning, match=r"temperature: expected .*, got 1e-07; "):
        out = run(model, prompts, seeds=[1, 2, 3], temperature=1e-7)
    greedy = run(model, prompts, do_sample=False)
    assert torch.equal(out.sequences, greedy.sequences)


@pytest.mark.parametrize("top_k", [VOCAB - 1, VOCAB, VOCAB + 1, 2**31 - 1])
def test_generate_takes_any_top_k(model, prompts, draws, top_k):
    check_kept_sets(model, prompts, {"top_k": top_k})
    assert all(adaptor == Adaptor(top_k=top_k) for _, adaptor, *_ in draws)


class Returns(transformers.LogitsProcessor):
    """Returns what a function makes of the scores."""

    def __init__(self, function):
        self.function = function

    def __call__(self, input_ids, scores):
        return self.function(scores)


@pytest.mark.parametrize(
    "config", [{"top_k": 0}, CONFIGS["all"], CONFIGS["normalised"]], ids=["no", "all", "normalised"]
)
def test_generate_runs_stock_warpers_on_float64(model, prompts, config):
    processors = [Returns(torch.Tensor.double)]
    with pytest.warns(UserWarning, match="expected float32, .*, got torch.float64") as seen:
        check_kept_sets(model, prompts, {**config, "logits_processor": processors})
        out = run(model, prompts, seeds=[1, 2, 3], logits_processor=processors, **config)
    assert len([w for w in seen if "float64" in str(w.message)]) == 2  # once a call
    assert all(scores.dtype == torch.float64 for scores in out.scores)
    plain = run(model, prompts, seeds=[1, 2, 3], **config)
    assert torch.equal(out.sequences, plain.sequences)


def test_generate_draws_from_float64_that_float32_does_not_hold(model, prompts):
    spread = Returns(lambda scores: scores.double() * 1e60)
    with pytest.warns(UserWarning, match="got torch.float64"):
        out = run(model, prompts, seeds=[1, 2, 3], logits_processor=[spread], top_k=0)
    assert torch.equal(out.sequences, run(model, prompts, do_sample=False).sequences)


@pytest.mark.parametrize(("value", "status"), BAD.values(), ids=BAD)
def test_generate_names_a_bad_row_of_float64(model, prompts, value, status):
    spoil = Spoil(lambda ids: torch.arange(3) == 1, value)
    processors = [spoil, Returns(torch.Tensor.double)]
    with (
        pytest.warns(UserWarning, match="got torch.float64"),
        pytest.raises(RuntimeError, match=rf"row 1 has .*\(status {status}\)$"),
    ):
        run(model, prompts, logits_processor=processors, top_k=0)


FORMS = {
    "bfloat16": torch.Tensor.bfloat16,
    "float16": torch.Tensor.half,
    "transposed": lambda scores: scores.T.contiguous().T,
    "every_second": lambda scores: scores.repeat_interleave(2, dim=1)[:, ::2],
    "expanded": lambda scores: scores[:1].expand(3, -1),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_generate_takes_scores_of_every_form(model, prompts, draws, form):
    run(model, prompts, seeds=[1, 2, 3], logits_processor=[Returns(form)], top_k=9)
    assert len(draws) == STEPS
    for scores, adaptor, seeds, positions in draws:
        out = sample(scores, adaptor, seeds=seeds, positions=positions)
        assert adaptor == Adaptor(top_k=9)
        assert (out.status == 0).all() and (out.kept == 9).all() or scores.dtype != torch.float32


def test_generate_follows_scores_whose_width_and_type_change(model, prompts):
    widths = [VOCAB, VOCAB + 7, VOCAB - 3, VOCAB - 3, VOCAB, VOCAB + 1]
    types = [torch.float32, torch.float32, torch.float32, torch.bfloat16, torch.float32] * 2
    steps = iter(zip(widths, types, strict=False))

    def change(scores):
        width, dtype = next(steps)
        wider = torch.nn.functional.pad(scores, (0, max(0, width - VOCAB)), value=-torch.inf)
        return wider[:, :width].to(dtype)

    processors = [Returns(change)]
    out = run(model, prompts, seeds=[1, 2, 3], logits_processor=processors, top_p=0.9)
    assert [scores.shape[1] for scores in out.scores] == widths
    length = prompts["input_ids"].shape[1]
    for step, (scores, logits) in enumerate(zip(out.scores, out.logits, strict=True)):
        width, dtype = widths[step], types[step]
        kept = filter_logits(logits[:, : min(width, VOCAB)].to(dtype), Adaptor(top_k=50, top_p=0.9))
        assert torch.equal(scores[:, : kept.shape[1]], kept)
        assert (scores[:, kept.shape[1] :] == -torch.inf).all()
        drawn = sample(
            scores,
            Adaptor(),
            seeds=torch.tensor([1, 2, 3]),
            positions=torch.full((3,), step),
        )
        assert torch.equal(out.sequences[:, length + step], drawn.tokens)


@pytest.fixture(scope="module")
def whisper():
    """A one-layer Whisper whose window is 128 frames."""
    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        vocab_size=260,
        num_mel_bins=16,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_source_positions=64,
        max_target_positions=32,
        decoder_start_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        bos_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        init_std=0.3,
    )
    model = transformers.WhisperForConditionalGeneration(config).eval()
    model.generation_config.no_timestamps_token_id = 99
    model.generation_config.max_length = 24
    model.generation_config.is_multilingual = False
    return model


def transcribe(whisper, custom_generate, frames=128, rows=3, **kwargs):
    """Token ids of three recordings, the second and third of them shorter."""
    features = torch.randn(3, 16, frames, generator=torch.Generator().manual_seed(4))[:rows]
    mask = torch.ones(3, frames, dtype=torch.int64)[:rows]
    mask[1:2, frames // 2 :] = 0
    return whisper.generate(
        features, attention_mask=mask, custom_generate=custom_generate, **kwargs
    )


def test_whisper_is_greedy_with_seeds_and_no_temperature(whisper, draws):
    kwargs = {"do_sample": True, "seeds": [1, 2, 3]}
    ours = transcribe(whisper, hf.generate, **kwargs)
    assert torch.equal(ours, transcribe(whisper, None, do_sample=True)) and not draws


@pytest.mark.filterwarnings("ignore:seeds. WhisperForConditionalGeneration:UserWarning")
def test_whisper_falls_back_to_temperatures_with_seeds(whisper, draws):
    def ours(seeds, state):
        torch.manual_seed(state)
        # hardly a recording is good enough
        return transcribe(
            whisper,
            hf.generate,
            temperature=(0.0, 0.5, 1.0),
            logprob_threshold=0.0,
            compression_ratio_threshold=0.0,
            max_new_tokens=8,
            suppress_tokens=list(range(99, 260)),  # of times, which could stand still
            seeds=seeds,
        )

    by_seed = ours([1, 2, 3], 0)
    assert {adaptor.temperature for _, adaptor, *_ in draws} == {0.5, 1.0}
    assert draws[0][2].tolist() == [1, 2, 3]
    assert torch.equal(by_seed, ours([1, 2, 3], 1))
    assert not torch.equal(by_seed, ours([4, 5, 6], 0))


def test_whisper_goes_on_where_rows_leave(whisper, draws):
    def ours(state):
        torch.manual_seed(state)
        return transcribe(
            whisper,
            hf.generate,
            frames=400,
            return_timestamps=True,
            do_sample=True,
            temperature=1.0,
            seeds=[1, 2, 3],
        )

    with pytest.warns(UserWarning, match=r"generate goes on with \d of 3 rows and does not say"):
        first = ours(0)
        second = ours(1)
    assert torch.equal(first, second)
    assert {len(seeds) for *_, seeds, _ in draws} > {3}
    assert all(seeds.tolist() == [1, 2, 3][: len(seeds)] for *_, seeds, _ in draws)


def test_whisper_checks_that_seeds_are_enough(whisper):
    with pytest.raises(ValueError, match=r"seeds: expected shape \(3,\).*got \(2,\)"):
        transcribe(whisper, hf.generate, do_sample=True, temperature=1.0, seeds=[1, 2])


@pytest.mark.parametrize("seeds", [None, [3, 4, 5]])
def test_coins_of_xtc_are_those_of_the_draws(model, prompts, draws, seeds):
    """Recorded scores show what each token was drawn from; a warper of its own throws its own."""
    adaptor = Adaptor(xtc_probability=0.5, xtc_threshold=0.001)
    warper = hf.FusedLogitsWarper(adaptor)
    given = {} if seeds is None else {"seeds": seeds}
    out = run(model, prompts, **warper.generate_kwargs(), **given)
    generated = out.sequences[:, prompts["input_ids"].shape[1] :]
    kept = torch.stack([(scores > -torch.inf).sum(-1) for scores in out.scores])
    assert 0 < int((kept < VOCAB).sum()) < kept.numel(), "some coins, not all"
    for step, scores in enumerate(out.scores):
        assert (scores.gather(1, generated[:, step : step + 1]) > -torch.inf).all()
    torch.manual_seed(0)
    acted = torch.stack(
        [(warper(None, out.logits[0]) > -torch.inf).sum(-1) < VOCAB for _ in range(40)]
    )
    assert 0.2 < acted.float().mean() < 0.8
