"""Predicts the times of `sample` on a GPU from machine code and from statements that ran.

    python benchmarks/gpu_predictions.py --out benchmarks/results/gpu_predicted.json

The model is that of `gpu_model.py`. Which statements run Triton's interpreter counts, which takes
minutes; beside each time is what was measured, and what the model said of the kernels before.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from cases import GPU_ADAPTORS
from gpu_calls import DTYPES, OUTPUTS, draw
from gpu_model import CONSTANTS, Kernel, Time, blocks_of, time_of
from gpu_static import CORES, in_processes
from harness import Benchmark, Option
from host import ROOT
from machine_code import code_of, demand_of
from no_gpu import Launch, Source, compiled, recorded

TARGET, VOCABULARY = 90, 128_256
ADAPTORS = tuple(name for name in GPU_ADAPTORS if name != "T+k")
BATCHES = (1, 64, 512)
ROWS = ("normal3", "flat")
# What the same model predicted of the kernels of commit 708a710, microseconds: one program read a
# row alone where its list did not do.
BEFORE = {
    **{("T+k+p", n, "float32", "normal3"): us for n, us in ((1, 40.0), (64, 86.0), (512, 445.0))},
    **{("T+p", n, "float32", "normal3"): us for n, us in ((1, 500.0), (64, 500.0), (512, 2000.0))},
    **{("T+p", n, "float32", "flat"): 1300.0 for n in (1, 64)},
}
MEASURED = ROOT / "benchmarks" / "results" / "gpu_sampling.json"
MODE = "cold, graph"
TRACED = 4  # bytes of a logit in a trace, which is of float32
NOTES = (
    "Predicted, not measured: " + str(CONSTANTS),
    "Statements are counted on one row of seed 0 in float32 and taken to run as often in all rows"
    " of its kind and for bfloat16; a block of instructions runs as often as the"
    " statements that its instructions come from do on average, which is too often in loops that"
    " the assembler unrolls.",
    "Bytes are all that programs ask for, none of them from the L2 cache; of bfloat16 logits half.",
    "Launches do not overlap, and no outputs but the tokens are asked for.",
)


BENCHMARK = Benchmark(
    "gpu_predicted",
    __doc__,
    {"processes": Option(CORES, "that compile and interpret", least=1)},
    ("triton",),
)


@BENCHMARK
def main(options: argparse.Namespace, record: dict[str, Any]) -> None:
    """Predict the grid and print it."""
    record["triton"] = triton.__version__
    record["settings"] = {"target": TARGET, "vocabulary": VOCABULARY}
    record["notes"] = list(NOTES)
    record["cells"] = predictions(
        partial(in_processes, processes=options.processes), options.processes
    )
    sys.stdout.writelines(f"{line_of(cell)}\n" for cell in record["cells"])


class Case(NamedTuple):
    """A call that is predicted, and its launches."""

    adaptor: str
    batch: int
    dtype: str
    rows: str
    launches: list[Launch]

    @property
    def traced_as(self) -> tuple[Any, ...]:
        """Batches of the same grids for a row have the same programs."""
        return self.adaptor, self.rows, *(launch.grid[1:] for launch in self.launches)


def cases() -> Iterator[Case]:
    """The grid."""
    for adaptor, n, dtype in itertools.product(ADAPTORS, BATCHES, ("float32", "bfloat16")):
        rows, seeds = torch.empty(n, VOCABULARY, dtype=DTYPES[dtype]), torch.arange(n)
        with recorded(TARGET) as got:
            draw(rows, GPU_ADAPTORS[adaptor], OUTPUTS["no outputs"], seeds)
        for kind in ROWS:
            yield Case(adaptor, n, dtype, kind, got.launches)


def kernel_of(source: Source) -> Kernel:
    """Compiles a kernel and cuts its machine code into blocks."""
    binary = compiled(source)
    code = code_of(binary.asm["cubin"])
    return Kernel(blocks_of(code), demand_of(binary, code), source.options["num_warps"])


def trace(adaptor: str, n: int, rows: str) -> list[dict[str, Any]]:
    """Runs the interpreter, which another process must be started for."""
    command = [sys.executable, str(Path(__file__).with_name("gpu_trace.py"))]
    done = subprocess.run(
        [*command, adaptor, str(n), str(VOCABULARY), rows],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"gpu_trace.py {adaptor} {n} {rows}:\n{done.stderr}")
    traced: list[dict[str, Any]] = json.loads(done.stdout)
    return traced


def predictions(
    compile_all: Callable[[Callable[[Source], Kernel], Sequence[Source]], Iterable[Kernel]],
    processes: int,
) -> list[dict[str, Any]]:
    """A line for each case: microseconds in all and by kernel, and what each kernel is bound by.

    Args:
        compile_all: maps a function over sources, in several processes.
        processes: that interpret.
    """
    grid = list(cases())
    sources = {f"{x.source.kernel} {x.key}": x.source for case in grid for x in case.launches}
    made = dict(zip(sources, compile_all(kernel_of, list(sources.values())), strict=True))
    asked = {case.traced_as: (case.adaptor, case.batch, case.rows) for case in grid}
    with ThreadPoolExecutor(processes) as pool:
        traces = dict(zip(asked, pool.map(lambda x: trace(*x), asked.values()), strict=True))
    measured = measured_us()
    return [predicted(case, made, traces[case.traced_as], measured) for case in grid]


def predicted(
    case: Case,
    made: Mapping[str, Kernel],
    traced: Sequence[Mapping[str, Any]],
    measured: Mapping[tuple[Any, ...], float],
) -> dict[str, Any]:
    """The line of a case, with what was measured of it where it was."""
    names = [launch.source.kernel for launch in case.launches]
    if names != [launch["kernel"] for launch in traced]:
        raise RuntimeError(f"{case.adaptor}: expected the launches {names} in the trace")
    us, kernels = CONSTANTS.call_us, {}
    size = DTYPES[case.dtype].itemsize
    for launch, what in zip(case.launches, traced, strict=True):
        x, y, z = launch.grid
        moved = case.batch * (what["logit_bytes"] * size / TRACED + what["other_bytes"])
        kernel = made[f"{launch.source.kernel} {launch.key}"]
        time = time_of(kernel, x * y * z, moved, what["mean"], what["longest"])
        longest = max(time)
        us += longest + CONSTANTS.launch_us
        name = launch.source.kernel
        before, _ = kernels.get(name, (0.0, ""))
        kernels[name] = round(before + longest, 2), Time._fields[time.index(longest)]
    place = case.adaptor, case.batch, case.dtype, case.rows
    line = dict(zip(("adaptor", "batch", "dtype", "rows"), place, strict=True))
    line["us"] = round(us, 1)
    for name, found in (("measured_us", measured.get(place)), ("before_us", BEFORE.get(place))):
        line |= {name: found} if found else {}
    return {**line, "kernels": kernels}


def measured_us(path: Path = MEASURED) -> dict[tuple[Any, ...], float]:
    """Medians of the benchmark on a GPU."""
    if not path.exists():
        return {}
    return {
        (cell["adaptor"], cell["batch"], cell["dtype"], cell["rows"]): round(
            cell["us"]["fastadapt"][1], 1
        )
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
        if (cell["vocabulary"], cell["mode"]) == (VOCABULARY, MODE)
    }


def line_of(cell: Mapping[str, Any]) -> str:
    """A prediction, beside what was measured."""
    kernels = ", ".join(f"{name} {us} ({by})" for name, (us, by) in cell["kernels"].items())
    measured = f", measured {cell['measured_us']}" if "measured_us" in cell else ""
    case = f"{cell['adaptor']}, N = {cell['batch']}, {cell['dtype']}, {cell['rows']}"
    return f"{case}: predicted {cell['us']} us{measured}: {kernels}"


if __name__ == "__main__":
    sys.exit(main())
