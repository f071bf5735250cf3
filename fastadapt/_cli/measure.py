"""Measurements on real generations: the time of each step, and agreement of the kept sets.

Shared by the demo and the benchmarks, which run transformers' loop three ways: greedy, with its
own warpers ("stock") and with `fastadapt.hf.generate` ("fused").
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from fastadapt import Adaptor, filter_logits, hf

BAND = 1e-5


class Generation(NamedTuple):
    """One run of `model.generate`.

    Attributes:
        tokens: (N, n), int64; the generated ids. No end token stops a sequence.
        prefill_s: seconds up to the first token.
        steps_s: seconds of each later step.
    """

    tokens: Tensor
    prefill_s: float
    steps_s: list[float]


def encode_prompts(tokenizer: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Apply the chat template, if there is one, and pad on the left.

    Returns:
        `input_ids` and `attention_mask`, each (N, T), int64.
    """
    if tokenizer.chat_template:
        texts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
            for prompt in prompts
        ]
    else:
        texts = list(prompts)
    encoded = tokenizer(
        texts,
        return_tensors="pt",
        padding=True,
        padding_side="left",
        add_special_tokens=not tokenizer.chat_template,
    )
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def mode_kwargs(adaptor: Adaptor, *, seeds: Tensor) -> dict[str, dict[str, Any]]:
    """Return the arguments of `model.generate` for greedy, stock and fused sampling.

    Args:
        adaptor: the knobs, numbers only.
        seeds: (N,), int64; the streams of the fused draws.
    """
    stock = {
        "do_sample": True,
        "temperature": float(adaptor.temperature),
        "top_k": adaptor.top_k,
        "top_p": float(adaptor.top_p),
        "min_p": float(adaptor.min_p) or None,
        "typical_p": float(adaptor.typical_p),
        "epsilon_cutoff": float(adaptor.epsilon_cutoff),
        "eta_cutoff": float(adaptor.eta_cutoff),
    }
    fused = {**stock, "custom_generate": hf.generate, "seeds": seeds}
    return {"greedy": {"do_sample": False}, "stock": stock, "fused": fused}


def generate(
    model: Any,
    inputs: Mapping[str, Tensor],
    kwargs: Mapping[str, Any],
    *,
    length: int,
    audit: LogitsProcessor | None = None,
    on_step: Callable[[], None] | None = None,
) -> Generation:
    """Generate exactly `length` tokens per sequence and take the time of every step.

    Args:
        model: a causal language model.
        inputs: `input_ids` and `attention_mask`, each (N, T).
        kwargs: one of `mode_kwargs`.
        length: new tokens per sequence.
        audit: a processor that sees the raw scores of every step.
        on_step: called after every step; its time is not counted.
    """
    clock = _StepClock(on_step or (lambda: None))
    tokens = model.generate(
        **inputs,
        **kwargs,
        max_new_tokens=length,
        # an id outside the vocabulary never comes, so every mode takes the same number of steps
        eos_token_id=model.get_output_embeddings().weight.shape[0],
        pad_token_id=0,
        logits_processor=LogitsProcessorList([audit] if audit else []),
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    prefill, *steps = clock.seconds
    return Generation(tokens[:, inputs["input_ids"].shape[1] :], prefill, steps)


def time_generation(
    model: Any,
    inputs: Mapping[str, Tensor],
    modes: Mapping[str, Mapping[str, Any]],
    *,
    rounds: int,
    length: int,
    seed: int = 0,
    on_step: Callable[[], None] | None = None,
) -> dict[str, list[Generation]]:
    """Time several ways of generating in turn, so that drift of the machine affects all alike.

    Args:
        model: a causal language model.
        inputs: `input_ids` and `attention_mask`, each (N, T).
        modes: the arguments of `model.generate` for each mode, as from `mode_kwargs`.
        rounds: how often each mode runs, after a short warm-up; each round starts with another.
        length: new tokens per sequence.
        seed: seed of torch's default generator before every run.
        on_step: called after every timed step; its time is not counted.

    Returns:
        For each mode its runs, in order of the rounds.
    """
    runs: dict[str, list[Generation]] = {name: [] for name in modes}
    for kwargs in modes.values():
        generate(model, inputs, kwargs, length=2)
    names = list(modes)
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                run_ = generate(model, inputs, modes[name], length=length, on_step=on_step)
            runs[name].append(run_)
    return runs


def stock_chain(adaptor: Adaptor) -> LogitsProcessorList:
    """Return transformers' own warpers for an adaptor, in the order of its generation loop."""
    knobs: list[tuple[Any, Any, float]] = [
        (TemperatureLogitsWarper, float(adaptor.temperature), 1.0),
        (TopKLogitsWarper, adaptor.top_k, 0),
        (TopPLogitsWarper, float(adaptor.top_p), 1.0),
        (MinPLogitsWarper, float(adaptor.min_p), 0.0),
        (TypicalLogitsWarper, float(adaptor.typical_p), 1.0),
        (EpsilonLogitsWarper, float(adaptor.epsilon_cutoff), 0.0),
        (EtaLogitsWarper, float(adaptor.eta_cutoff), 0.0),
    ]
    return LogitsProcessorList([warper(value) for warper, value, off in knobs if value != off])


def step_ms(runs: Sequence[Generation]) -> float:
    """Return the median time of a step over all runs, in milliseconds; the prefill is not one."""
    return 1e3 * statistics.median(step for run_ in runs for step in run_.steps_s)


def step_ratios(runs: Sequence[Generation], base: Sequence[Generation]) -> list[float]:
    """Return, for each round, the median step of one mode divided by that of another."""
    return [
        statistics.median(one.steps_s) / statistics.median(other.steps_s)
        for one, other in zip(runs, base, strict=True)
    ]


def tokens_per_s(runs: Sequence[Generation]) -> float:
    """Return the median speed of whole runs, prefill included, over all sequences."""
    return statistics.median(
        run_.tokens.numel() / (run_.prefill_s + sum(run_.steps_s)) for run_ in runs
    )


class KeptSetAudit(LogitsProcessor):
    """Compares our kept set with transformers' at every step of a generation.

    It stands in front of the warpers, so it sees the scores that they get, and leaves them alone.

    Args:
        adaptor: the knobs, numbers only.

    Attributes:
        rows: kept sets compared, one per step and sequence.
        equal: kept sets that are the same.
        in_band: differing tokens whose side changes when every threshold moves by `BAND`.
        ties: differing tokens equal, up to rounding, to one on the other side.
        wrong: differing tokens that neither explains.
        drawn, drawn_outside: tokens drawn, and those of them outside transformers' kept set.
        kept: sizes of the kept sets.
        scores: the raw scores of the last step, (N, V).
    """

    def __init__(self, adaptor: Adaptor) -> None:
        """Prepare transformers' chain and two more with slightly moved thresholds."""
        self.adaptor = adaptor
        self.chain: Any = stock_chain(adaptor)
        self.strict: Any = stock_chain(_shifted(adaptor, -1))
        self.lenient: Any = stock_chain(_shifted(adaptor, 1))
        self.rows = self.equal = self.in_band = self.ties = self.wrong = 0
        self.drawn = self.drawn_outside = 0
        self.kept: list[int] = []
        self.scores = torch.empty(0)
        self._stock = torch.empty(0)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Compare the kept sets of one step; the scores, (N, V), are returned as they came."""
        if self.rows:
            self.check_drawn(input_ids[:, -1])
        stock = self.chain(input_ids, scores) != -math.inf
        ours = filter_logits(scores, self.adaptor) != -math.inf
        differs = (stock != ours).any(-1)
        self.rows += len(differs)
        self.equal += int((~differs).sum())
        self.kept += ours.sum(-1).tolist()
        for row in differs.nonzero()[:, 0].tolist():
            self._explain(scores[row : row + 1], stock[row], ours[row])
        self.scores, self._stock = scores, stock
        return scores

    def check_drawn(self, tokens: Tensor) -> None:
        """Look the tokens drawn last, (N,), up in transformers' kept sets."""
        self.drawn += len(tokens)
        self.drawn_outside += int((~self._stock.gather(-1, tokens[:, None])).sum())

    def _explain(self, scores: Tensor, stock: Tensor, ours: Tensor) -> None:
        """Count the differing tokens of one row: within rounding, tied, or wrong."""
        exact, ids = scores.double(), torch.empty(1, 0, dtype=torch.int64)
        strict, lenient = (
            chain(ids, exact)[0] != -math.inf for chain in (self.strict, self.lenient)
        )
        for token in (stock != ours).nonzero()[:, 0].tolist():
            gaps = (scores[0, stock != stock[token]] - scores[0, token]).abs()
            rounding = 4 * torch.finfo(torch.float32).eps * scores[0, token].abs()
            if strict[token] != lenient[token]:
                self.in_band += 1
            elif bool((gaps <= rounding).any()):
                self.ties += 1
            else:
                self.wrong += 1


class _StepClock(StoppingCriteria):
    """Takes the time of each step; never stops a sequence."""

    def __init__(self, on_step: Callable[[], None]) -> None:
        self.seconds: list[float] = []
        self._on_step = on_step
        self._resumed = time.perf_counter()

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Record the time of a step; returns False for every sequence."""
        self.seconds.append(time.perf_counter() - self._resumed)
        self._on_step()
        self._resumed = time.perf_counter()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def _shifted(adaptor: Adaptor, sign: int) -> Adaptor:
    """Move every threshold by `BAND`; +1 keeps more, -1 keeps less."""
    mass: dict[str, Any] = {
        name: min(max(value + sign * BAND, BAND / 2), 1.0)
        for name in ("top_p", "typical_p")
        if (value := float(getattr(adaptor, name))) < 1.0
    }
    floor: dict[str, Any] = {
        name: min(float(getattr(adaptor, name)) * (1.0 - sign * BAND), 1.0 - BAND / 2)
        for name in ("min_p", "epsilon_cutoff", "eta_cutoff")
    }
    return replace(adaptor, **mass, **floor)


def median_ms(calls: Sequence[Callable[[], object]], *, budget_s: float) -> list[float]:
    """Time calls in turn until the budget is spent, at least five times; medians in ms."""
    times: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + budget_s
    while len(times[0]) < 6 or time.perf_counter() < end:
        for call, seconds in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
    return [1e3 * statistics.median(seconds[1:]) for seconds in times]
