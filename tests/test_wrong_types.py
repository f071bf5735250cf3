"""Wrong types where a loss, a model, a batch or a pair is expected: one sentence, of one kind."""

import functools
import re
from typing import NamedTuple

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import fastadapt
from fastadapt import Adaptor, Responses, RewardPenalizeLoss, training
from fastadapt.tracking import RewardPenalizeTracker, TrackerCallback
from fastadapt.tracking.gradients import analytic_gradients
from fastadapt.training.pairs import (
    Pair,
    TokenizedPair,
    encode_pairs,
    pad_pairs,
    read_pairs,
    tokenize_pair,
)
from fastadapt.training.pretrained import load_model

OBJECTIVE = RewardPenalizeLoss({"dpo": 1.0})
BATCH = pad_pairs([TokenizedPair([1, 2], [3, 4], [5], False)])
PAIR = Pair("a", "b", "a")
ONE = Responses(torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool))
ROWS, HEAD, LABELS = torch.zeros(2, 4), torch.zeros(5, 4), torch.tensor([1, 0])


@pytest.fixture(scope="module")
def model():
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=8, num_hidden_layers=1, **sizes))


@pytest.fixture
def tokenizer():
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, "?"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="?")


def _refused(message, call, error=TypeError):
    with pytest.raises(error, match=f"^{re.escape(message)}") as raised:
        call()
    assert type(raised.value) is error and "\n" not in str(raised.value)


@pytest.mark.parametrize("wrong", ["dpo", {"dpo": 1.0}, None, fastadapt.dpo_loss])
def test_losses_that_are_none(wrong, model):
    expected = f"objective: expected a RewardPenalizeLoss, got {type(wrong).__name__}"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _refused(expected, lambda: training.pair_loss(model, BATCH, wrong))
    steps = training.training_steps(model, [(BATCH, None)], wrong, optimizer)
    _refused(expected, lambda: next(steps))
    if wrong is not None:  # which is the loss of the trainer that the tracker is given to
        _refused(expected, lambda: RewardPenalizeTracker(wrong))
    training.pair_loss(model, BATCH, torch.compile(OBJECTIVE, backend="eager"))


@pytest.mark.parametrize("wrong", ["gpt2", {}, None])
def test_models_that_are_none(wrong):
    expected = "model: expected a language model of transformers, got "
    inputs = training.inputs_of(BATCH)
    for call in (
        lambda: training.pair_loss(wrong, BATCH, OBJECTIVE),
        lambda: training.reference_logps(wrong, BATCH),
        lambda: training.hidden_states(wrong, BATCH),
        lambda: training.states_at_head(wrong, inputs),
        lambda: training.forward_log_odds(wrong, inputs, BATCH.labels),
        lambda: training.logits_log_odds(wrong, BATCH),
    ):
        _refused(expected + type(wrong).__name__, call)
    if wrong is not None:
        _refused(expected, lambda: RewardPenalizeTracker(OBJECTIVE, model=wrong))
        _refused(expected, lambda: fastadapt.hf.LogitsFreeTrainer(wrong))


@pytest.mark.parametrize("wrong", ["text", {"input_ids": LABELS}, [PAIR]])
def test_batches_that_are_none(wrong, model):
    expected = f"batch: expected a PairBatch, got {type(wrong).__name__}"
    for call in (
        lambda: training.pair_loss(model, wrong, OBJECTIVE),
        lambda: training.logits_log_odds(model, wrong),
        lambda: training.sides(wrong, torch.zeros(2, 3)),
        lambda: RewardPenalizeTracker(OBJECTIVE).see(wrong),
    ):
        _refused(expected, call)


def test_other_arguments_of_training(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for reference in ("base", torch.zeros(2), (torch.zeros(1),)):
        _refused(
            "reference: expected two tensors, as of reference_logps, got ",
            lambda given=reference: training.pair_loss(model, BATCH, OBJECTIVE, given),
        )
    assert training.pair_loss(model, BATCH, OBJECTIVE, [torch.zeros(1)] * 2)[0] > 0
    for optimizer_or_not, batches, message in (
        (
            "adam",
            [(BATCH, None)],
            "optimizer: expected an optimizer of torch, or one like it, got str",
        ),
        (optimizer, [BATCH], "batches: expected tuples of a PairBatch and its reference"),
    ):
        steps = training.training_steps(model, batches, OBJECTIVE, optimizer_or_not)
        _refused(message, lambda steps=steps: next(steps))
    with pytest.raises(ValueError, match="batches: expected tuples .* reference or None, got 3 in"):
        next(training.training_steps(model, [(BATCH, None, None)], OBJECTIVE, optimizer))
    _refused("inputs: expected a mapping", lambda: training.states_at_head(model, "ids"))
    inputs = training.inputs_of(BATCH)
    _refused("labels: expected a Tensor", lambda: training.forward_log_odds(model, inputs, [[1]]))
    _refused("log_odds: expected a Tensor", lambda: training.sides(BATCH, [0.0]))
    _refused("interval: expected an int", lambda: RewardPenalizeTracker(OBJECTIVE, interval="2"))
    _refused("tracker: expected a RewardPenalizeTracker", lambda: TrackerCallback(OBJECTIVE))


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([("a", "b")], "pairs[0]: expected a Pair(prompt, chosen, rejected), got tuple"),
        (
            [PAIR, {"prompt": "a"}],
            "pairs[1]: expected a Pair(prompt, chosen, rejected), got dict",
        ),
        ([Pair("a", 1, "a")], "pairs[0]: chosen: expected a string, got int"),
        ([Pair(1, "b", "a")], "pairs[0]: prompt: expected a string or messages, got int"),
        (PAIR, "pairs: expected a sequence of Pairs, got Pair"),
        ("pairs.jsonl", "pairs: expected a sequence of Pairs, got str"),
        (None, "pairs: expected a sequence of Pairs, got NoneType"),
    ],
)
def test_pairs_that_are_none(pairs, message, tokenizer):
    _refused(message, lambda: encode_pairs(tokenizer, pairs))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tokenizer": "gpt2"}, "tokenizer: expected one of transformers, got str"),
        ({"max_length": "8"}, "max_length: expected an integer, got '8'"),
        ({"max_length": 2.5}, "max_length: expected an integer, got 2.5"),
        ({"truncation": 3}, "truncation: expected one of prompt, response, error, got 3"),
        ({"chat": "no"}, "chat: expected True or False, got 'no'"),
    ],
)
def test_arguments_of_tokenize_pair(changed, message, tokenizer):
    _refused(message, lambda: tokenize_pair(**({"tokenizer": tokenizer, "pair": PAIR} | changed)))


def test_other_arguments_of_pairs():
    _refused("pairs[0]: expected a TokenizedPair, got Pair", lambda: pad_pairs([PAIR]))
    one = TokenizedPair([1], [2], [3], False)
    _refused("fill: expected an integer, got 'x'", lambda: pad_pairs([one], fill="x"))
    _refused("path: expected a path, got int", lambda: read_pairs(3))
    _refused("name_or_path: expected a name, a path or None, got int", lambda: load_model(3))
    _refused("dtype: expected a dtype of torch, got str", lambda: load_model(None, dtype="half"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"bias": "no"}, "bias: expected a Tensor or None, got str"),
        ({"softcap": "30"}, "softcap: expected a number, got '30'"),
        ({"logit_scale": None}, "logit_scale: expected a number, got None"),
        ({"memory_budget": 1.5}, "memory_budget: expected an integer, got 1.5"),
        ({"ignore_index": "-100"}, "ignore_index: expected an integer, got '-100'"),
        ({"outputs": 3}, "outputs: expected a sequence of names, got int"),
        ({"group": 3}, "group: expected a ProcessGroup or None, got int"),
    ],
)
def test_arguments_of_linear_log_odds(changed, message):
    _refused(message, lambda: fastadapt.linear_log_odds(ROWS, HEAD, LABELS, **changed))


def test_arguments_of_rows():
    log_odds = fastadapt.label_log_odds
    _refused("ignore_index: expected an int", lambda: log_odds(ROWS, LABELS, ignore_index=1.5))
    _refused("index: expected a Tensor", lambda: fastadapt.candidate_log_odds(ROWS, [[1], [0]]))
    flat = torch.zeros(len(ROWS), dtype=torch.int64)
    of_head = functools.partial(fastadapt.linear_candidate_log_odds, weight=HEAD)
    for call in (fastadapt.candidate_log_odds, of_head):
        with pytest.raises(ValueError, match=rf"index: expected shape \({len(ROWS)}, K\), got"):
            call(ROWS, index=flat)
    for name in ("base_logprobs", "log_mass"):
        expected = f"{name}: expected True or False, got 3"
        _refused(expected, lambda name=name: fastadapt.sample(ROWS, Adaptor(), **{name: 3}))
    _refused("order: expected a name or a sequence of names, got 3", lambda: Adaptor(order=3))
    penalty = fastadapt.candidate_unlikelihood_penalty
    _refused("candidates: expected a Tensor, got str", lambda: penalty(ONE, "a", None))
    given = "given: expected one of log_odds, probabilities, got 3"
    _refused(given, lambda: analytic_gradients("mle", ONE, given=3))


@pytest.mark.parametrize("name", ["total_tokens", "total_sequences"])
def test_totals_of_nothing_where_some_count(name):
    some = ONE._replace(**{name: 0})
    message = f"chosen.{name}: expected at least 1 where some count, got 0"
    _refused(message, lambda: fastadapt.mle_loss(some), ValueError)
    assert fastadapt.mle_loss(some._replace(mask=~ONE.mask)) == 0


def test_nothing_depends_on_the_value_of_a_total():
    log_odds, mask = torch.randn(4, 1, 2), ONE.mask
    totals = torch.tensor([0, 1, 2, 3])

    def loss(x, total):
        return fastadapt.mle_loss(Responses(x, mask, total_tokens=total))

    mapped = torch.func.vmap(loss)(log_odds, totals)
    torch.testing.assert_close(mapped, torch.stack(list(map(loss, log_odds, totals))))
    traced = torch.fx.experimental.proxy_tensor.make_fx(loss)(log_odds[0], totals[2])
    torch.testing.assert_close(traced(log_odds[1], totals[3]), loss(log_odds[1], 3))


def test_pairs_in_turn(tokenizer):
    one = TokenizedPair([1], [2], [3], False)
    assert torch.equal(pad_pairs(iter([one])).tokens, pad_pairs([one]).tokens)
    words = tokenizer.backend_tokenizer
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="?")
    long = [Pair("a a a a", "b", "a")] * 2
    with pytest.warns(UserWarning, match="2 of 2 pairs were cut to 3 tokens"):
        encode_pairs(tokenizer, iter(long), max_length=3)
    _refused("pairs: expected TokenizedPairs, got one, not in a list", lambda: pad_pairs(one))
    _refused("pairs: expected TokenizedPairs, got NoneType", lambda: pad_pairs(None))


def test_what_a_tokenizer_raises_has_the_number_of_its_pair():
    class OfAscii:
        eos_token_id = 2

        def __call__(self, text, **options):
            return text[0].encode("ascii")

    _refused(
        "pairs[0]: 'ascii' codec",
        lambda: encode_pairs(OfAscii(), [Pair("é", "b", "a")]),
        ValueError,
    )


def test_optimizers_flags_and_batches_like_ours(model):
    class Own(NamedTuple):
        labels: torch.Tensor

    batch = Own(BATCH.labels)
    zeros = torch.zeros(2, 3, requires_grad=True)
    loss, _ = training.pair_loss(model, batch, OBJECTIVE, log_odds_of=lambda *_: zeros)
    assert loss > 0

    class Wrapped:
        def __init__(self, optimizer):
            self.step, self.zero_grad = optimizer.step, optimizer.zero_grad

    own = Wrapped(torch.optim.SGD(model.parameters(), lr=0.1))
    steps = training.training_steps(model, [(BATCH, None)], RewardPenalizeLoss({"mle": 1.0}), own)
    assert next(steps)["loss"] > 0
    drawn = fastadapt.sample(ROWS, Adaptor(), seeds=LABELS, base_logprobs=np.bool_(True))
    assert drawn.base_logprobs is not None


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        *((f"{name}_loss", name) for name in ("mle", "dpo", "mate", "exmate", "unlikelihood")),
        *(("DPO", "dpo"), ("exmate-penalty", "exmate_penalty"), ("exmte", "exmate")),
    ],
)
def test_names_of_functions_suggest_losses(name, meant):
    with pytest.raises(ValueError, match=rf"; did you mean {meant}\?$"):
        RewardPenalizeLoss({name: 1.0})
