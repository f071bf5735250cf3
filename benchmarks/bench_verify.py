"""`verify` beside `sample` of the rows it reads, its laws, and its bits where no law is asked for.

    python benchmarks/bench_verify.py --threads 1 --out benchmarks/results/verify.json

Costs: drafts of k tokens a sequence, whose logits are the rows' own and a multiple of normal noise.
`sample` draws from exactly the rows that are read: those up to the first rejection and, where their
logits are given, the drafts'. All calls run in every round. Laws: the tokens of each row that is
reached, by a G-test against the row's filtered softmax in float64. Bits: sequences whose result is
not what `sample` gives row by row.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from statistics import median
from typing import Any

import torch
from scipy import stats
from torch import Tensor

from cases import ADAPTORS, DTYPES, GPU_ADAPTORS, make_rows
from fastadapt import Adaptor, Verified, reference, sample, verify
from harness import SEED, Axis, Benchmark, Option, progress, settings_of
from timing import Call, in_turns, microseconds, ratios

SEQUENCES, K = 8, 4
FILTERS = {"T+k+p": GPU_ADAPTORS["T+k+p"], "T+p": ADAPTORS["T+p"]}
# what drafts are drawn from: noise on the rows, in parts of their own deviation
NOISE = {"the rows": 0.0, "near": 0.05, "far": 0.3, "other": 3.0}
LAWS = {
    "neutral": Adaptor(),
    "T+p": Adaptor(temperature=0.8, top_p=0.9),
    "T+k": Adaptor(temperature=1.3, top_k=7),
    "typical": Adaptor(typical_p=0.8),
    "everything": ADAPTORS["everything"],
}
BY = Adaptor(temperature=1.2, top_k=12)  # what the drafts of the laws are drawn by
VOCABULARY, ROWS = 24, 3  # of the laws
BENCHMARK = Benchmark(
    "verify",
    __doc__,
    {
        "vocab": Axis((128_256,), kind=int),
        "dtypes": Axis(tuple(DTYPES)),
        "rounds": Option(60, least=2),
        "draws": Option(1_000_000, "for each law", least=1000),
        "sequences": Option(100_000, "whose bits are compared", least=100),
        "seed": SEED,
    },
)


@BENCHMARK
def main(options: argparse.Namespace, record: dict[str, Any]) -> None:
    """Time every cell, then test the laws and the bits."""
    record["settings"] = {
        **settings_of(options, "rounds", "draws", "sequences", "seed"),
        "k": K,
    }
    record["cells"], record["laws"] = [], []
    grid = list(itertools.product(options.vocab, options.dtypes, FILTERS, NOISE))
    laws = list(itertools.product(LAWS, NOISE))
    with progress("verifying", len(grid) + len(laws) + 1) as step:
        for cell in grid:
            named = dict(zip(("vocabulary", "dtype", "adaptor", "drafts"), cell, strict=True))
            shape = {"batch": SEQUENCES, "rows": "normal3"}
            record["cells"].append({**named, **shape, **measure_cell(*cell, options)})
            step()
        for adaptor, drafts in laws:
            found = law(adaptor, drafts, options.draws, options.seed)
            record["laws"].append({"adaptor": adaptor, "drafts": drafts, **found})
            step()
        record["differences"] = differences(options.sequences, options.seed)
        step()


def measure_cell(
    vocabulary: int, dtype: str, adaptor: str, drafts: str, options: argparse.Namespace
) -> dict[str, Any]:
    """Time one cell; times in microseconds."""
    knobs = FILTERS[adaptor]
    made = make_rows("normal3", vocabulary, SEQUENCES * (K + 1), seed=options.seed)
    torch.manual_seed(options.seed)
    problems = []
    for rows in made:
        x = rows.view(SEQUENCES, K + 1, vocabulary)
        y = x[:, :K] + 3 * NOISE[drafts] * torch.randn(SEQUENCES, K, vocabulary)
        problems.append((x.to(DTYPES[dtype]), y.to(DTYPES[dtype])))
    seeds = torch.arange(SEQUENCES)
    draft = [_drafted(y, knobs, seeds) for _, y in problems]
    calls: dict[str, Call] = {}
    accepted = {}
    for kind in ("as sampled", "by its law"):
        known = kind == "by its law"

        def verified(turn: int, known: bool = known) -> Verified:
            x, y = problems[turn % len(problems)]
            logits = {"draft_logits": y} if known else {}
            return verify(x, draft[turn % len(problems)], knobs, seeds=seeds, **logits)

        results = [verified(turn) for turn in range(len(problems))]
        reads = [
            _rows_read(x, y if known else None, result)
            for (x, y), result in zip(problems, results, strict=True)
        ]
        accepted[kind] = sum(float(r.accepted.float().mean()) for r in results) / len(results)
        calls[kind] = verified
        calls[f"sample of what {kind} reads"] = _sampled(reads, knobs)
    took = in_turns(calls, rounds=options.rounds)
    return {
        "accepted": accepted,
        "us": microseconds(took, 1),
        "per_sequence": {kind: 1e6 * median(took[kind]) / SEQUENCES for kind in accepted},
        "to_sample": {
            kind: ratios(took, f"sample of what {kind} reads", [kind], 3)[kind] for kind in accepted
        },
    }


def _drafted(logits: Tensor, adaptor: Adaptor, seeds: Tensor) -> Tensor:
    """What a draft model draws by the same seeds and positions."""
    n, k, _ = logits.shape
    each = seeds[:, None].expand(n, k)
    return sample(logits, adaptor, seeds=each, positions=torch.arange(k).expand(n, k)).tokens


def _rows_read(x: Tensor, y: Tensor | None, result: Verified) -> Tensor:
    """The rows that a call reads, one after the other."""
    upto = result.accepted[:, None]
    rows = [x[torch.arange(x.shape[1]) <= upto]]
    if y is not None:
        rows.append(y[torch.arange(y.shape[1]) <= upto])
    return torch.cat(rows)


def _sampled(reads: list[Tensor], adaptor: Adaptor) -> Call:
    """`sample` of these rows."""
    seeds = [torch.arange(len(rows)) for rows in reads]

    def call(turn: int) -> object:
        at = turn % len(reads)
        return sample(reads[at], adaptor, seeds=seeds[at])

    return call


def law(adaptor: str, drafts: str, draws: int, seed: int) -> dict[str, Any]:
    """p-values of the rows that are reached often enough, and how many drafts stand."""
    torch.manual_seed(seed)
    x = torch.randn(1, ROWS, VOCABULARY) * 1.5
    y = x[:, : ROWS - 1] + 1.5 * NOISE[drafts] * torch.randn(1, ROWS - 1, VOCABULARY)
    seeds = torch.randint(-(2**63), 2**63 - 1, (draws,))
    of_drafts = y.expand(draws, -1, -1)
    draft = _drafted(of_drafts, BY, seeds)
    options = {"draft_logits": of_drafts, "draft_adaptor": BY, "seeds": seeds}
    got = verify(x.expand(draws, -1, -1), draft, LAWS[adaptor], **options)
    laws = reference.filter_logits(x[0].double(), LAWS[adaptor]).softmax(-1)
    values = []
    for i in range(ROWS):
        tokens = got.tokens[got.accepted >= i, i]
        p = laws[i]
        if len(tokens) * float(p[p > 0].min()) < 10 or (p > 0).sum() < 2:
            continue
        counts = torch.bincount(tokens, minlength=VOCABULARY)
        seen, wanted = counts[p > 0].tolist(), (p[p > 0] * len(tokens)).tolist()
        g = stats.power_divergence(seen, wanted, lambda_="log-likelihood")
        values.append(float(g.pvalue) if counts[p == 0].sum() == 0 else 0.0)
    return {"p_values": values, "accepted": float(got.accepted.float().mean())}


def differences(sequences: int, seed: int) -> int:
    """How many sequences without known drafts have another result than `sample`, row by row."""
    torch.manual_seed(seed)
    found, cases = 0, list(itertools.product(LAWS.values(), DTYPES.values(), (7, 40, 200, 1000)))
    each = -(-sequences // len(cases))
    for adaptor, dtype, v in cases:
        x = (torch.randn(each, K + 1, v) * 3).to(dtype)
        seeds = torch.randint(2**62, (each,))
        near = (x[:, :K] + 0.3 * torch.randn(each, K, v)).to(dtype)
        draft = _drafted(near, adaptor, seeds)
        at = torch.arange(K + 1)
        drawn = sample(
            x, adaptor, seeds=seeds[:, None].expand(-1, K + 1), positions=at.expand(each, -1)
        )
        got = verify(x, draft, adaptor, seeds=seeds)
        accepted = (drawn.tokens[:, :K] == draft).long().cumprod(1).sum(1)
        there = at <= accepted[:, None]
        wrong = got.accepted != accepted
        wrong |= (got.tokens != drawn.tokens.where(there, -1)).any(1)
        wrong |= (got.logprobs != drawn.logprobs.where(there, 0)).any(1)
        found += int(wrong.sum())
    return found


if __name__ == "__main__":
    sys.exit(main())
