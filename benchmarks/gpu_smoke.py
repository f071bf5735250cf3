"""Whether `sample` on a CUDA device draws the CPU's tokens, in a minute or two.

    python benchmarks/gpu_smoke.py --out smoke.jsonl

A process a core takes adaptors in turn, so that kernels are compiled beside each other and once.
Each case compares every field with the CPU's kernel, to the last bit, then replays a CUDA graph
with other seeds, and calls once more while torch raises where the host would wait. A line of JSON a
case is written as soon as the case is done.
"""

from __future__ import annotations

import json
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from cases import DTYPES, GPU_ADAPTORS, GPU_ROWS, make_rows
from device_timing import DeviceCall, captured
from fastadapt import Adaptor, sample
from harness import Axis, Benchmark, Option, require_cuda

FIELDS = {"base_logprobs": True, "log_mass": True}
NAMES = ("tokens", "logprobs", "kept", "status", "base_logprobs", "log_mass")
BENCHMARK = Benchmark(
    "gpu_smoke",
    __doc__,
    {
        "batch": Axis((1, 64, 512), kind=int),
        "dtypes": Axis(tuple(DTYPES)),
        "vocabulary": Option(128_256, metavar="V"),
    },
)


def main() -> int:
    """Run all cases; the exit code is 1 where one differs or fails."""
    options = BENCHMARK.parse()
    require_cuda()
    jobs = list(product(options.batch, options.dtypes, GPU_ADAPTORS))
    failed, done, console = 0, 0, Console()
    workers = min(len(jobs), os.cpu_count() or 1)
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
    with pool:
        running = [pool.submit(run, *job, options.vocabulary, options.out) for job in jobs]
        for job in as_completed(running):
            for case in job.result():
                done += 1
                if case["result"] != "equal":
                    failed += 1
                    console.print(json.dumps(case), markup=False, highlight=False, soft_wrap=True)
    console.print(f"{done} cases, {failed} differ or fail", highlight=False)
    return int(failed > 0 or done == 0)


def run(n: int, dtype: str, name: str, v: int, out: Path | None) -> list[dict[str, Any]]:
    """The cases of a batch, dtype and adaptor, each written when it is done."""
    torch.set_num_threads(2)
    cases = []
    for kind in GPU_ROWS:
        rows = make_rows(kind, v, n, seed=n)[0].to(DTYPES[dtype])
        for fields in ({}, FIELDS):
            if fields and name not in ("T+k+p", "T+p", "everything"):
                continue
            case: dict[str, Any] = {"n": n, "v": v, "dtype": dtype, "rows": kind, "adaptor": name}
            start = time.perf_counter()
            try:
                result = check(rows, GPU_ADAPTORS[name], fields)
            except Exception as error:  # whatever a compiler or a driver raises
                result = f"{type(error).__name__}: {str(error)[:300]}"
            case |= {"fields": bool(fields), "result": result}
            case["s"] = round(time.perf_counter() - start, 2)
            cases.append(case)
            if out:
                with out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(case) + "\n")
    return cases


def check(rows: Tensor, adaptor: Adaptor, fields: dict[str, bool]) -> str:
    """Compare a call, a replay and a call without waiting with the CPU."""
    here = rows.cuda()
    seeds = torch.arange(len(rows)) * 7 + 1
    positions = torch.arange(len(rows)) % 5
    where, steps = seeds.cuda(), positions.cuda()
    drawn: list[Any] = []

    def draw(turn: int = 0) -> Any:
        return sample(here, adaptor, seeds=where, positions=steps, **fields)

    for step in ("call", "call that may not wait", "replay"):
        if step == "call that may not wait":
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        try:
            if step == "replay":
                graph = captured(DeviceCall(lambda turn: drawn.append(draw())))
                where += 5
                seeds = seeds + 5
                graph(0)
                ours = drawn[-1]
            else:
                ours = draw()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        wanted = sample(rows, adaptor, seeds=seeds, positions=positions, **fields)
        for name in NAMES[: 6 if fields else 4]:
            a, b = getattr(ours, name).cpu(), getattr(wanted, name)
            same = (a == b) | ((a != a) & (b != b))
            if not same.all():
                at = int((~same).nonzero()[0])
                wrong = f"{step}: {name} differs in {int((~same).sum())} rows"
                return f"{wrong}; row {at}: expected {b[at].item()}, got {a[at].item()}"
    return "equal"


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    sys.exit(main())
