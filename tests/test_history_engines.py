"""Each rule of a history beside the engine that defines it: the same logits, bit for bit."""

import json
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from fastadapt import Adaptor, Edits, History, filter_logits, reference
from fastadapt.reference.edits import edited

INF = float("inf")
V = 14
LLAMA = json.loads(Path(__file__).with_name("llama_cpp.json").read_text())


def padded_batch(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of few kinds with padding on the left (of id 0, which is in texts too), and logits."""
    generator = torch.Generator().manual_seed(seed)
    n, t = 4, int(torch.randint(2, 40, (), generator=generator))
    tokens = torch.randint(0, 3 + seed % 9, (n, t), generator=generator)
    start = torch.randint(0, t, (n,), generator=generator)
    start[0] = 0
    tokens[torch.arange(t) < start[:, None]] = 0
    return tokens, start, torch.randn(n, V, generator=generator) * 4


def processed(processor: object, tokens: Tensor, logits: Tensor) -> Tensor:
    return processor(tokens, logits.clone())  # type: ignore[operator, no-any-return]


def changed(logits: Tensor, edits: Edits) -> Tensor:
    return filter_logits(logits, Adaptor(), edits=edits)


@pytest.mark.parametrize("penalty", [1.2, 0.8, 1.7])
@pytest.mark.parametrize("seed", range(8))
def test_repetition_of_transformers(seed: int, penalty: float) -> None:
    tokens, start, logits = padded_batch(seed)
    history = History(tokens, start, prompt_length=(tokens.shape[1] - start) // 2)
    of_texts = RepetitionPenaltyLogitsProcessor(penalty, prompt_ignore_length=start)
    edits = history.edits(repetition=penalty)
    assert torch.equal(changed(logits, edits), processed(of_texts, tokens, logits))
    of_outputs = RepetitionPenaltyLogitsProcessor(
        penalty, prompt_ignore_length=start + (tokens.shape[1] - start) // 2
    )
    edits = history.edits(repetition=penalty, repeats="output")
    assert torch.equal(changed(logits, edits), processed(of_outputs, tokens, logits))
    whole = RepetitionPenaltyLogitsProcessor(penalty)
    edits = History(tokens).edits(repetition=penalty)
    assert torch.equal(changed(logits, edits), processed(whole, tokens, logits))


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(8))
def test_n_grams_of_transformers(seed: int, n: int) -> None:
    """Its n-grams have the padding; ours need not."""
    tokens, start, logits = padded_batch(seed)
    expected = processed(NoRepeatNGramLogitsProcessor(n), tokens, logits)
    edits = History(tokens, start).ban_ngrams(n, counts="padded")
    assert torch.equal(changed(logits, edits), expected)
    without = changed(logits, History(tokens, start).ban_ngrams(n))
    for r, first in enumerate(start.tolist()):
        alone = processed(
            NoRepeatNGramLogitsProcessor(n), tokens[r : r + 1, first:], logits[r:][:1]
        )
        assert torch.equal(without[r : r + 1], alone)


def some_sequences(seed: int, biases: tuple[float, ...]) -> dict[tuple[int, ...], float]:
    draw = random.Random(seed)
    lengths = [draw.choice([2, 3, 1, 2]) for _ in range(25)]
    return {tuple(draw.randrange(5) for _ in range(n)): draw.choice(biases) for n in lengths}


@pytest.mark.parametrize("seed", range(12))
def test_sequences_of_transformers(seed: int) -> None:
    """Numbers whose sum depends on the order of those of one token."""
    tokens, start, logits = padded_batch(seed)
    biases = some_sequences(seed, (0.1, 1e8, -1e8, 3.3, -0.7, -INF))
    expected = processed(SequenceBiasLogitsProcessor(dict(biases)), tokens, logits)
    edits = History(tokens, start).sequences(biases, counts="padded")
    assert torch.equal(changed(logits, edits), expected)


@pytest.mark.parametrize("seed", range(6))
def test_bad_words_of_transformers(seed: int) -> None:
    tokens, start, logits = padded_batch(seed)
    words = some_sequences(seed, (-INF,))
    processor = NoBadWordsLogitsProcessor([list(word) for word in words], eos_token_id=2)
    kept = {word: bias for word, bias in words.items() if word != (2,)}
    edits = History(tokens, start).sequences(kept, counts="padded")
    assert torch.equal(changed(logits, edits), processed(processor, tokens, logits))


@pytest.mark.parametrize("n", [0, 5, 12, 60])
def test_lengths_of_transformers(n: int) -> None:
    for seed in range(6):
        tokens, start, logits = padded_batch(seed)
        prompt = tokens.shape[1] // 2
        start = start.clamp(max=prompt)
        history = History(tokens, start, prompt_length=prompt - start)
        edits = history.min_length([2, 4], n, counts="padded")
        processor = MinLengthLogitsProcessor(n, [2, 4])
        assert torch.equal(changed(logits, edits), processed(processor, tokens, logits))
        new = MinNewTokensLengthLogitsProcessor(prompt, n, [2, 4])
        edits = history.min_length([2, 4], n)
        assert torch.equal(changed(logits, edits), processed(new, tokens, logits))


@pytest.mark.parametrize("seed", range(8))
def test_penalties_of_vllm(seed: int) -> None:
    """vLLM's and OpenAI's: what its `apply_penalties` does with tables of all tokens."""
    tokens, start, logits = padded_batch(seed)
    generator = torch.Generator().manual_seed(seed)
    n, t = tokens.shape
    prompt = (start + torch.randint(0, t, (n,), generator=generator)).clamp(max=t)
    repetition = 0.7 + torch.rand(n, generator=generator)
    frequency, presence = torch.randn(2, n, generator=generator)
    place = torch.arange(t)
    kinds = torch.nn.functional.one_hot(tokens, V)
    of_output = (kinds * (place >= prompt[:, None])[..., None]).sum(1)
    there = (kinds * (place >= start[:, None])[..., None]).sum(1) > 0
    expected = logits.clone()
    scaled = torch.where(
        expected > 0, expected / repetition[:, None], expected * repetition[:, None]
    )
    expected = torch.where(there, scaled, expected)
    expected -= frequency[:, None] * of_output
    expected -= presence[:, None] * (of_output > 0)
    history = History(tokens, start, prompt_length=prompt - start)
    edits = history.edits(repetition=repetition, frequency=frequency, presence=presence)
    assert torch.equal(changed(logits, edits), expected)


@pytest.mark.parametrize("seed", range(8))
def test_bad_words_of_vllm(seed: int) -> None:
    """Its words match the output alone."""
    tokens, start, logits = padded_batch(seed)
    prompt = start + (tokens.shape[1] - start) // 2
    words = some_sequences(seed, (-INF,))
    expected = logits.clone()
    for r, first in enumerate(prompt.tolist()):
        output = tokens[r, first:].tolist()
        for word in words:
            before = list(word[:-1])
            if len(before) <= len(output) and output[len(output) - len(before) :] == before:
                expected[r, word[-1]] = -INF
    edits = History(tokens, start, prompt_length=prompt - start).sequences(words, counts="output")
    assert torch.equal(changed(logits, edits), expected)


@pytest.mark.parametrize("window", [1, 6, 100])
def test_penalties_of_text_generation_webui(window: int) -> None:
    """Of the last tokens, padding or not: a division, then one number."""
    for seed in range(6):
        tokens, _, logits = padded_batch(seed)
        expected = logits.clone()
        for r, row in enumerate(tokens[:, -window:]):
            ids, times = row.unique(return_counts=True)
            x = logits[r, ids]
            x = torch.where(x < 0, x * 1.15, x / 1.15)
            expected[r, ids] = x - (0.3 * torch.ones(len(ids)) + 0.7 * times.float())
        edits = History(tokens).edits(
            repetition=1.15, presence=0.3, frequency=0.7, counts="all", window=window
        )
        assert torch.equal(changed(logits, edits), expected)


def of_webui(tokens: list[int], numbers: dict, breakers: list[int]) -> dict[int, float]:
    """DRY as text-generation-webui has it: penalties of ids, from a search of each last token."""
    penalties: dict[int, int] = {}
    if tokens and tokens[-1] not in breakers:
        for i, token in enumerate(tokens[:-1]):
            if token != tokens[-1] or tokens[i + 1] in breakers:
                continue
            length = 1
            while length < 50 and i - length >= 0:
                before = tokens[-1 - length]
                if tokens[i - length] != before or before in breakers:
                    break
                length += 1
            penalties[tokens[i + 1]] = max(penalties.get(tokens[i + 1], 0), length)
    least, (multiplier, base) = numbers["allowed_length"], (numbers["multiplier"], numbers["base"])
    return {i: multiplier * base ** (n - least) for i, n in penalties.items() if n >= least}


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("seed", range(10))
def test_dry_of_text_generation_webui(seed: int, window: int | None) -> None:
    tokens, start, logits = padded_batch(seed)
    tokens = torch.cat([tokens, tokens.repeat(1, 1 + 3 * (seed % 3))], 1)
    numbers = {"multiplier": 0.8, "base": 1.75, "allowed_length": 1 + seed % 3}
    breakers = [seed % 5] if seed % 2 else []
    expected = logits.clone()
    for r, row in enumerate(tokens.tolist()):
        for i, penalty in of_webui(row[-window:] if window else row, numbers, breakers).items():
            expected[r, i] -= penalty
    history = History(tokens, start)
    edits = history.dry(**numbers, breakers=breakers, longest=50, window=window, counts="padded")
    assert torch.equal(changed(logits, edits), expected)


@pytest.mark.parametrize("at", range(len(LLAMA["penalties"])))
@pytest.mark.parametrize("kind", ["penalties", "dry"])
def test_what_llama_cpp_made(kind: str, at: int) -> None:
    """Recorded by record_llama_cpp.py from the library itself; prompts are texts to it."""
    case = LLAMA[kind][at]
    tokens = torch.tensor(case["tokens"], dtype=torch.int64)[None]
    logits, expected = torch.tensor([case["logits"]]), torch.tensor([case["out"]])
    for prompt in (0, tokens.shape[1] // 2, tokens.shape[1]):
        lists = []
        for kept in (History, reference.History):
            history = kept(tokens, prompt_length=prompt)
            if kind == "dry":
                lists.append(history.dry(**case["numbers"], window=case["window"]))
            else:
                given = {**case["numbers"], "window": case["window"]}
                lists.append(history.edits(**given, counts="all"))
        assert torch.equal(changed(logits, lists[0]), expected)
        assert torch.equal(edited(logits, lists[1]), expected)


def test_what_llama_cpp_made_changes_logits() -> None:
    """So that the records show something."""
    for kind in ("penalties", "dry"):
        assert sum(case["logits"] != case["out"] for case in LLAMA[kind]) > 8
