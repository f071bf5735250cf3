"""Compiles every Triton kernel ahead of time for GPUs that need not be there, and reads the machine
code's demands: no spill, no stack, no local memory, no fused multiply-add, and no more shared
memory than the target has.

    python tests/native/compile_kernels.py [--targets 80 90 100] [--dtypes fp32 bf16 fp16 fp64]

Needs triton; the package it comes with has the assembler and `cuobjdump`.
"""

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastadapt._ops.triton import bundles, draw, label, linear, nucleus, scan, write
from fastadapt._ops.triton import launch_losses as losses
from fastadapt._ops.triton.launch_scan import (
    BINNING,
    COLLECTING,
    DECIDING,
    ONE_WARP,
    PASS,
    PLAN,
    WIDE,
    layout_of,
)

sys.path.append(str(Path(__file__).parent))  # `python -P` leaves it out
import linear_kernels  # noqa: E402

# KiB a block may have: CUDA's table of compute capabilities
SHARED = {80: 163, 90: 227, 100: 227}
DTYPES = ("fp32", "bf16", "fp16", "fp64")
LONGEST = 262_144
KINDS = {
    "*fp64": "knobs largest_others stats tops seconds totals factors",
    "*fp32": "largest supers groups listed floors spare logprobs log_norms entropies base_logprobs"
    " log_masses top_logprobs",
    "*i64": "marks sums surprisal_sums base_sums base_surprisal_sums kept_sums seeds positions"
    " tokens all_bounds top_ids ids index",
    "*i32": "first_ids listed_ids spare_ids finite kept token_ranks",
    "*u8": "status support mask",
    "i64": "stride ignore_index",
    "i32": "v number step row_step vllm splits blocks tiles",
    "constexpr": "BLOCK ROOM LIST BINS SPLITS BLOCKS ALONE COLUMNS GROUP PER_TILE SUPERS STEP"
    " POSITIONS BASE LOG_MASS ALL_WEIGHED SUM_LATER",
}
TYPES = {name: kind for kind, names in KINDS.items() for name in names.split()}
BUNDLES: dict[str, Any] = {
    "rows": bundles.Rows,
    "adaptors": bundles.Adaptors,
    "parts": bundles.Parts,
    "lists": bundles.Lists,
    "weights": bundles.Weights,
    "sizes": bundles.Sizes,
    "tiling": bundles.Tiling,
    "asked": bundles.Asked,
    "chance": bundles.Chance,
    "labels": bundles.Labels,
    "candidates": bundles.Candidates,
}
# of arguments that are not the same bundle everywhere
OF_KERNELS: dict[str, dict[str, Any]] = {
    "short_kernel": {"out": bundles.Drawn},
    "long_kernel": {"out": bundles.Drawn},
    "sum_kernel": {"out": bundles.Drawn},
    "score_kernel": {"out": bundles.Scored},
    "top_kernel": {"drawn": bundles.Drawn},
    "sort_kernel": {"drawn": bundles.Drawn},
    "support_kernel": {"kept": bundles.Support},
    "log_odds_kernel": {"kept": bundles.Support},
    "label_sum_kernel": {"sums": bundles.Sums},
    "label_log_odds_kernel": {"sums": bundles.Sums},
    "top_sum_kernel": {"tops": bundles.Tops},
    "candidate_log_odds_kernel": {"tops": bundles.Tops},
}
Constants = dict[str, int | bool]
Options = dict[str, Any]


class Variant(NamedTuple):
    """One compilation; with `ones` its integers are 1, which Triton makes constants."""

    target: int
    module: str
    kernel: str
    dtype: str
    constants: Constants
    options: Options
    ones: bool = False

    def __str__(self) -> str:
        """Where to look when it fails."""
        asked = " ".join(f"{k}={v}" for k, v in self.constants.items() if isinstance(v, bool) and v)
        asked += " of ones" if self.ones else ""
        return f"sm_{self.target} {self.kernel} {self.dtype} {asked}".rstrip()


class Demand(NamedTuple):
    """What the machine code of a variant needs."""

    registers: int
    stack: int
    local: int
    shared: int
    fused: int


def _variant(
    target: int,
    dtype: str,
    module: ModuleType,
    kernel: str,
    constants: Constants,
    options: Options = PASS,
) -> Variant:
    """What can be sent to another process."""
    name = module.__name__.rpartition(".")[2]
    return Variant(target, name, kernel, dtype, constants, options)


def variants(targets: list[int], dtypes: list[str]) -> Iterator[Variant]:
    """Every kernel, dtype and set of options, at the sizes that the launches use."""
    layout = layout_of(PLAN, LONGEST)
    blocks = layout.padded["BLOCKS"]
    block = {"BLOCK": PLAN.block}
    parts = {**block, "SPLITS": layout.padded["SPLITS"]}
    search = {
        **parts, "ROOM": PLAN.list_size, "LIST": PLAN.list_size, "BINS": PLAN.bins,
        "BLOCKS": blocks, "ALONE": False,
    }  # fmt: skip
    short = {**search, "LIST": PLAN.short_size, "ALONE": True}
    tiles = {"COLUMNS": PLAN.columns, "GROUP": PLAN.group}
    for target, dtype in itertools.product(targets, dtypes):
        one = partial(_variant, target, dtype)
        double = {"DOUBLE": dtype == "fp64"}
        first = {**tiles, "AHEAD": PLAN.ahead, "SUPERS": PLAN.supers}
        yield one(scan, "maxima_kernel", first, ONE_WARP)
        for asked in (False, True):
            base = {"ALWAYS": asked, "BASE": asked, "BASE_SURPRISAL": asked}
            together = {"TOGETHER": PLAN.together}
            yield one(scan, "weigh_kernel", {**parts, **together, **base})
            tiling = {name: size.value for name, size in layout.tiling._asdict().items()}
            listing = {**search, **tiling, "NUCLEUS": asked}
            yield one(scan, "collect_kernel", listing, ONE_WARP)
        yield from _nucleus_variants(partial(one, nucleus), search)
        for asked in (False, True) if dtype != "fp64" else ():
            decided = dict.fromkeys(bundles.Asked._fields, asked)
            yield one(draw, "short_kernel", {**short, **decided}, COLLECTING)
            yield one(draw, "long_kernel", {**search, **decided}, DECIDING)
            yield one(draw, "sum_kernel", {**search, **together, **decided})
        no = dict.fromkeys(bundles.Asked._fields, False)
        yield one(write, "bounds_kernel", {**search, **no}, DECIDING)
        yield one(write, "support_kernel", {**parts, **double})
        yield one(write, "log_odds_kernel", {**block, "BLOCKS": blocks, **double})
        yield one(write, "log_odds_backward_kernel", {**block, **double})
        yield from _loss_variants(partial(one, label), double)
        yield from linear_kernels.variants(partial(one, linear), dtype)
        if dtype == "fp64":
            continue
        yield one(write, "score_kernel", {**search, **no, "ALL_WEIGHED": True}, DECIDING)
        yield one(write, "filter_kernel", parts)
        yield one(draw, "top_kernel", search, COLLECTING)
        for number in (1, 1024):
            yield one(draw, "sort_kernel", {**search, "TOP": number})


def _nucleus_variants(one: Callable[..., Variant], search: Constants) -> Iterator[Variant]:
    """What finds where a nucleus ends."""
    groups = {"GROUPS": layout_of(PLAN, LONGEST).groups, "COLUMNS": PLAN.columns}
    yield one("sketch_kernel", {**search, **groups, "MOST": PLAN.list_size // PLAN.group}, WIDE)
    steps = {"STEP": PLAN.bins_step, "STEPS": PLAN.bins_steps}
    yield one("bins_kernel", {**search, **steps}, BINNING)
    yield one("narrow_kernel", {**search, "STEP": PLAN.step}, BINNING)


def _loss_variants(one: Callable[..., Variant], double: Constants) -> Iterator[Variant]:
    """log-odds of labels and candidates."""
    block = {**double, "BLOCK": losses.PLAN.block}
    tiles = {"TILES": triton.next_power_of_2(LONGEST // losses.PLAN.block)}
    yield one("label_sum_kernel", block, losses.BY_TILE)
    yield one("label_log_odds_kernel", {**double, **tiles}, losses.BY_ROW)
    yield one("label_backward_kernel", block, losses.BY_TILE)
    yield one("top_sum_kernel", block, losses.BY_TILE)
    yield one("candidate_backward_kernel", block, losses.BY_TILE)
    for masked in (False, True):
        each = {**double, "MASKED": masked, "CANDIDATES": losses.PLAN.candidates}
        yield one("candidate_log_odds_kernel", {**block, **each, **tiles}, losses.BY_ROW)
        yield one("candidate_factor_kernel", each, losses.BY_ROW)
        yield one("candidate_own_kernel", each, losses.BY_TILE)


def source_of(variant: Variant, kernel: Any) -> ASTSource:
    """A kernel with the types of its arguments, those of bundles by their fields."""
    wide = "*fp64" if variant.dtype == "fp64" else "*fp32"
    types = TYPES | {"logits": f"*{variant.dtype}", "out": f"*{variant.dtype}"}
    types |= {"log_odds": wide, "dlog_odds": wide} | dict.fromkeys(variant.constants, "constexpr")
    shapes = BUNDLES | OF_KERNELS.get(variant.kernel, {})
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], int | bool] = {}
    for place, name in enumerate(kernel.arg_names):
        shape = shapes.get(name)
        fields = (name,) if shape is None else shape._fields
        kinds = [types[field] for field in fields]
        signature[name] = kinds[0] if shape is None else shape(*kinds)
        for inner, (field, kind) in enumerate(zip(fields, kinds, strict=True)):
            at = (place,) if shape is None else (place, inner)
            if kind == "constexpr":
                constants[at] = variant.constants[field]
            elif variant.ones and kind in ("i32", "i64"):
                constants[at] = 1
    return ASTSource(fn=kernel, signature=signature, constexprs=constants)


def demand_of(variant: Variant) -> Demand:
    """Compiles a variant."""
    modules = {
        "draw": draw, "label": label, "nucleus": nucleus, "scan": scan, "write": write,
    }  # fmt: skip
    if variant.module == "linear":
        source = linear_kernels.source_of(
            variant.kernel, variant.dtype, variant.constants, variant.ones
        )
    else:
        source = source_of(variant, getattr(modules[variant.module], variant.kernel))
    binary = triton.compile(source, GPUTarget("cuda", variant.target, 32), variant.options)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(binary.asm["cubin"])
        command = [str(tool), "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(number) for name, number in re.findall(r"([A-Z]+):(\d+)", usage)}
    shared = max(found["SHARED"], binary.metadata.shared)
    # log-odds of labels are of no specified arithmetic: float64's e^x is CUDA's own, which fuses
    pattern = "fma.rn.f32" if variant.module in ("label", "linear") else "fma.rn.f"
    fused = binary.asm["ptx"].count(pattern)
    return Demand(found["REG"], found["STACK"], found["LOCAL"], shared, fused)


def complaints(variant: Variant, demand: Demand) -> list[str]:
    """What of the machine code must not be."""
    most = SHARED[variant.target] * 1024
    wrong = [
        f"{name} {n} bytes" for name, n in (("stack", demand.stack), ("local", demand.local)) if n
    ]
    wrong += [f"shared {demand.shared} of {most} bytes"] if demand.shared > most else []
    return wrong + ([f"{demand.fused} fused multiply-adds"] if demand.fused else [])


def main() -> int:
    """Compiles all, prints what each kernel needs at most, and fails where one must not be."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--targets", nargs="+", type=int, choices=SHARED, default=list(SHARED))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    work = list(variants(options.targets, options.dtypes))
    first = {(v.module, v.kernel): v for v in reversed(work)}
    work += [variant._replace(ones=True) for variant in first.values()]
    failed = 0
    lines: list[str] = []
    most: dict[tuple[int, str], Demand] = {}
    with ProcessPoolExecutor(options.jobs) as pool:
        for variant, demand in zip(work, pool.map(demand_of, work), strict=True):
            for wrong in complaints(variant, demand):
                failed += 1
                lines.append(f"{variant}: {wrong}")
            key = variant.target, variant.kernel
            before = most.get(key, demand)
            most[key] = Demand(*(max(pair) for pair in zip(before, demand, strict=True)))
    for (target, kernel), demand in most.items():
        lines.append(
            f"sm_{target} {kernel}: {demand.registers} registers, {demand.shared} B shared"
        )
    lines.append(f"triton {triton.__version__}, {len(work)} compilations, {failed} complaints")
    sys.stdout.write("\n".join(lines) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
