"""What the GPU's code is, on a machine without one: its demands, specialisations and launches.

    python benchmarks/gpu_static.py --scope most --out benchmarks/results/gpu_static.json
    python benchmarks/gpu_static.py --scope most --check benchmarks/results/gpu_static.json

Every kernel is specialised by Triton's just-in-time path for the arguments that the launches give
it, and compiled for GPUs of three kinds. Whatever spills, has a stack or local memory, fuses
multiplications with additions or takes more shared memory than the GPU has fails, and so does a
kernel that no call launches. With a record, more specialisations or calls of PyTorch than a server
should meet fail, too. `--check` compares with a record: registers, stack, barriers,
specialisations and launches must be the same, instructions within 3 %; a line for each difference.
It needs the version of Triton that made the record.

By default float32 is compiled with all options for sm_90, with those that need most for the others,
and bfloat16 with those for sm_90: of the sampling kernels other types differ by the conversion of
what is loaded. `--scope all` compiles all four types with all options for all; `--scope most` only
float32, with the options that need most. For sm_90 integers are 1 as well, which are constants.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import pkgutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import triton
from triton.runtime.jit import JITFunction

from cases import GPU_ADAPTORS
from fastadapt import Adaptor
from fastadapt._ops import triton as kernels
from gpu_calls import (
    DTYPES,
    EDITED_OUTPUTS,
    OUTPUTS,
    TOP_OUTPUTS,
    calls,
    changes_of,
    draw,
    per_row,
)
from gpu_static_check import ALL, differences, read_record, refuse_another, too_many
from harness import Axis, Benchmark, Option, progress
from machine_code import SHARED_KIB, Demand, code_of, demand_of, loads_through_descriptors
from no_gpu import Launch, Source, compiled, recorded

COUNTED_FOR = 90  # what is specialised and launched does not depend on the target
# Of each class of integers that Triton tells apart: 1, multiples of 16, others; with every
# alignment of a row that an odd number of them makes.
BATCHES = (1, 2, 3, 7, 8, 16, 17, 63, 64, 65, 511, 512)
VOCABULARIES = (50_257, 128_256, 151_936, 262_144)
CALL = 64, 128_256  # N and V of the calls whose launches are counted
BYTES = {"*fp64": 8, "*fp32": 4, "*bf16": 2, "*fp16": 2}
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
PER_ROW = "per row"
Cell = dict[str, Any]
Item, Result = TypeVar("Item"), TypeVar("Result")
BENCHMARK = Benchmark(
    "gpu_static",
    __doc__,
    {
        "check": Option(help="JSON file to compare with", kind=Path, metavar="FILE"),
        "processes": Option(CORES, "that compile", least=1),
        "scope": Option("usual", "what is compiled", choices=("most", "usual", "all")),
        "targets": Axis(tuple(map(str, SHARED_KIB)), metavar="SM"),
    },
    ("triton",),
)


class Work(NamedTuple):
    """A kernel to compile, and where it was met."""

    source: Source
    variant: str
    exact: bool

    def __str__(self) -> str:
        """Where to look when it fails."""
        return f"sm_{self.source.target} {self.source.kernel} ({self.variant})"


@BENCHMARK
def main(options: argparse.Namespace, record: dict[str, Any]) -> bool:
    """Compile and count, compare if asked to, and say whether something must not be so."""
    before = read_record(options.check) if options.check else None
    record["triton"] = triton.__version__
    targets = list(map(int, options.targets))
    record["settings"] = {"targets": targets, "scope": options.scope}
    if before is not None:
        refuse_another(before, record)
    work = list(to_compile(targets, options.scope))
    if options.out or options.check:
        record["specialisations"] = specialisations(VOCABULARIES, BATCHES)
        record["calls"] = calls_of(*CALL)
    demands = in_processes(demand_of_work, work, options.processes)
    record["kernels"] = [cell_of(*both) for both in zip(work, demands, strict=True)]
    wrong = [
        f"{one}: {complaint}"
        for one, demand in zip(work, demands, strict=True)
        for complaint in demand.complaints(one.source.target, one.exact)
    ]
    wrong += [f"{name}: expected a launch, got none" for name in never_met(work)]
    wrong += too_many(record)
    if before is not None:
        wrong += differences(before, record)
    lines = [*most_of(record["kernels"]), *wrong]
    lines.append(f"triton {triton.__version__}, {len(work)} compilations, {len(wrong)} complaints")
    sys.stdout.write("\n".join(lines) + "\n")
    return bool(wrong)


def to_compile(targets: Sequence[int], scope: str) -> Iterator[Work]:
    """Every specialised kernel once, with the name of the first call that launches it."""
    for target in targets:
        for dtype in DTYPES:
            counted = target == COUNTED_FOR and scope == "usual"
            if scope == "all" or dtype == "float32" or (counted and dtype == "bfloat16"):
                thorough = scope == "all" or (counted and dtype == "float32")
                yield from _met(target, dtype, thorough, ones=thorough or target == COUNTED_FOR)


def _met(target: int, dtype: str, thorough: bool, ones: bool) -> Iterator[Work]:
    """The kernels of one type for one target."""
    seen: set[str] = set()
    for call in calls(dtype, thorough, ones):
        with recorded(target) as got:
            call.run()
        named: Counter[str] = Counter()
        for key, source in got.sources().items():
            if key in seen:
                continue
            seen.add(key)
            named[source.kernel] += 1
            number = named[source.kernel]
            variant = f"{call.name}, {number}" if number > 1 else call.name
            yield Work(source, variant, call.exact)


def never_met(work: Sequence[Work]) -> list[str]:
    """The kernels of the package that no call launches: functions of Triton's named *_kernel."""
    met = {(one.source.module, one.source.kernel) for one in work}
    found = []
    for module in pkgutil.walk_packages(kernels.__path__, f"{kernels.__name__}."):
        for name, value in vars(import_module(module.name)).items():
            own = isinstance(value, JITFunction) and value.fn.__module__ == module.name
            if own and name.endswith("_kernel") and (module.name, name) not in met:
                found.append(f"{module.name}.{name}")
    return found


def in_processes(
    function: Callable[[Item], Result], items: Sequence[Item], processes: int
) -> list[Result]:
    """What a function makes of each kernel, in several processes."""
    context = multiprocessing.get_context("spawn")  # PyTorch's threads would not survive a fork
    with (
        ProcessPoolExecutor(processes, context) as pool,
        progress("compiling", len(items)) as advance,
    ):
        results = []
        for result in pool.map(function, items):
            results.append(result)
            advance()
        return results


def demand_of_work(one: Work) -> Demand:
    """Compiles a kernel and reads its machine code.

    Its instructions where all of it is specified, or a unit of the GPU loads: a disassembler takes
    0.8 seconds for the smallest kernel, as long as its compilation.
    """
    binary = compiled(one.source)
    read = one.exact or loads_through_descriptors(binary)
    code = code_of(binary.asm["cubin"]) if read else None
    return demand_of(binary, code, logit_bytes(one.source))


def logit_bytes(source: Source) -> int | None:
    """The size of a logit, of kernels that are given logits."""
    for name, kind in source.signature.items():
        kind = kind if name == "logits" else getattr(kind, "logits", None)
        if kind is not None:
            return BYTES[kind]
    return None


def cell_of(one: Work, demand: Demand) -> Cell:
    """A line of the record."""
    place = {"target": one.source.target, "kernel": one.source.kernel, "variant": one.variant}
    return {**place, **{name: x for name, x in demand._asdict().items() if x is not None}}


def specialisations(
    vocabularies: Sequence[int],
    batches: Sequence[int],
    dtypes: Sequence[str] = ("float32", "bfloat16"),
    outputs: Sequence[str] = tuple(OUTPUTS),
    adaptors: Sequence[str] = (*GPU_ADAPTORS, PER_ROW),
) -> list[Cell]:
    """How many of each kernel all batches together meet: by V, type, outputs and adaptor.

    The last cells are of all adaptors and outputs for one V, what a server can meet, and of all V
    and outputs for one adaptor.
    """
    met: dict[tuple[Any, ...], list[Launch]] = {}
    for v, dtype in itertools.product(vocabularies, dtypes):
        rows = torch.empty(max(batches), v, dtype=DTYPES[dtype])
        for asked, name in itertools.product(outputs, adaptors):
            launches = []
            for n in batches:
                with recorded(COUNTED_FOR) as got:
                    draw(rows[:n], _adaptor(name, n), OUTPUTS[asked])
                launches += got.launches
            for case in ((v, asked, name), (v, ALL, ALL), (ALL, ALL, name)):
                met.setdefault((case[0], dtype, *case[1:]), []).extend(launches)
    names = "vocabulary", "dtype", "outputs", "adaptor"
    in_order = sorted(met, key=lambda case: case.count(ALL))
    return [
        {**dict(zip(names, case, strict=True)), "kernels": _distinct(met[case])}
        for case in in_order
    ]


def _adaptor(name: str, n: int) -> Adaptor:
    """An adaptor of numbers, or the one with knobs of each row."""
    return GPU_ADAPTORS[name] if name != PER_ROW else per_row(GPU_ADAPTORS["everything"], n)


def _distinct(launches: Sequence[Launch]) -> dict[str, int]:
    """How many specialisations of each kernel were launched."""
    found = {(x.source.kernel, x.key) for x in launches}
    return dict(Counter(kernel for kernel, _ in sorted(found)))


def calls_of(n: int, v: int) -> list[Cell]:
    """Launches and PyTorch's operators in a call of `sample`, by adaptor and outputs."""
    rows, seeds = torch.empty(n, v), torch.arange(n)
    cells = []
    changed = {EDITED_OUTPUTS: changes_of(n, v)}
    for asked, options in {**OUTPUTS, **TOP_OUTPUTS, **changed}.items():
        for name, adaptor in GPU_ADAPTORS.items():
            with recorded(COUNTED_FOR) as got:
                drawn = draw(rows, adaptor, options, seeds)
            case = {"batch": n, "vocabulary": v, "outputs": asked, "adaptor": name}
            tensors = sum(field is not None for field in drawn) + (asked in changed)  # edited rows
            counts = {"launches": len(got.launches), "tensors": tensors}
            counts["aten_calls"] = got.operators.total()
            cells.append({**case, **counts, "kernels": got.by_kernel()})
    return cells


def most_of(cells: Sequence[Cell]) -> Iterator[str]:
    """What each kernel needs at most, a line for each and each target."""
    most: dict[tuple[int, str], Cell] = {}
    for cell in cells:
        of_kernel = most.setdefault((cell["target"], cell["kernel"]), {})
        for name in ("registers", "shared", "barriers", "instructions"):
            if name in cell:
                of_kernel[name] = max(cell[name], of_kernel.get(name, 0))
    for (target, kernel), needs in sorted(most.items()):
        listed = ", ".join(f"{number} {name}" for name, number in needs.items())
        yield f"sm_{target} {kernel}: {listed}"


if __name__ == "__main__":
    sys.exit(main())
