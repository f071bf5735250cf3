"""Passes over whole rows for CUDA tensors: scratch, sizes and grids. Nothing here synchronises.

A call takes the maxima of groups of logits (one read), weighs the rows whose first filter asks for
it (one more), lists the tokens from a floor up, and finds where a nucleus ends. What is launched
follows from the adaptor, never from logits, and what is compiled from V, the type of the logits and
which filters there are: not from the number of rows, nor from what else is asked for.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from fastadapt._ops.filter_code import filters_of, is_known, may_act, order_of
from fastadapt._ops.triton import nucleus, scan, split
from fastadapt._ops.triton.bundles import Rows, Scratch, Sizes
from fastadapt._ops.triton.rows import (
    ADAPTORS_SHIFT,
    ALL_WEIGHED,
    BASE,
    BOUNDS_SIZE,
    EPSILON,
    ETA,
    KEEP,
    MARKS,
    MIN_P,
    PER_ROW,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    TYPICAL_P,
)

# The order of the filters by the code of an order: that of `rows.filter_at`.
FILTERS = (
    (TOP_K, TOP_P, MIN_P, TYPICAL_P, EPSILON, ETA),
    (MIN_P, TOP_K, TOP_P, TYPICAL_P, EPSILON, ETA),
)


class Steps(NamedTuple):
    """Which passes some row of a call can need."""

    order: int
    weighs: bool = True  # masses of whole rows
    bins: bool = True  # a nucleus, or typical, of a whole row
    sketches: bool = True  # top-p, for which the largest of groups may do
    ranks: bool = True  # a list by ranks, for top-k or for the lowest id of the largest
    lists: bool = True  # a list by masses
    filters: bool = True  # something that acts
    sums: bool = True  # of survivors that no list holds
    plain: bool = False  # no filter but top-k and top-p
    by_mass: bool = False  # min-p, epsilon or eta alone, for which a draw needs no list


@lru_cache
def is_chain(code: int) -> bool:
    """Whether the kernels of chains run the filters of a code: others do not know all, or an order.

    What a code leaves open is one of the six of Transformers and vLLM.
    """
    if not is_known(code):
        return False
    return order_of(code) > 1 or not set(filters_of(code)) <= {knob.value for knob in FILTERS[0]}


@lru_cache
def steps_of(code: int, rows: int) -> Steps:
    """The passes for bounds of a code whose knobs have so many rows, 1 where all are numbers.

    Raises:
        NotImplementedError: the code is one of a chain.
    """
    if is_chain(code):
        raise NotImplementedError(f"order: expected no chain, got the filters {filters_of(code)}")
    order = order_of(code)
    used = [knob.value for knob in FILTERS[order] if may_act(code, knob.value)]
    one_bounds = rows == 1 and is_known(code)
    first = set(used[:1]) if one_bounds else set(used)
    return Steps(
        order,
        weighs=not used or not one_bounds or not first <= {TOP_K.value, MIN_P.value},
        bins=bool(first & {TOP_P.value, TYPICAL_P.value}),
        sketches=TOP_P.value in first,
        ranks=TOP_K.value in first or may_act(code, TEMPERATURE.value),
        lists=bool(first - {TOP_K.value, TYPICAL_P.value}),
        filters=bool(used) or may_act(code, TEMPERATURE.value),
        sums=not first <= {TOP_K.value},
        plain=set(used) <= {TOP_K.value, TOP_P.value},
        by_mass=len(used) == 1
        and one_bounds
        and first <= {MIN_P.value, EPSILON.value, ETA.value}
        and not may_act(code, TEMPERATURE.value)
        and not may_act(code, KEEP.value),
    )


# Without a limit, assemblers stop at 128 or 168 registers for sm_80, at 55 for sm_100, and spill.
MOST_REGISTERS = 255
FEWER_REGISTERS = 128  # for kernels that fit them without a stack
# Launches a kernel on a grid, with its arguments, warps and constants.
Launch = Callable[..., None]


@lru_cache
def options_of(early: bool, warps: int, registers: int | None) -> dict[str, Any]:
    """Options of a launch.

    Where it is early, programs of a kernel take their places while the one before ends
    (programmatic dependent launch), and wait there for its results.
    """
    options: dict[str, Any] = {"num_warps": warps, "enable_fp_fusion": False, "PDL": early}
    if registers:
        options["maxnreg"] = registers
    if early:
        options["launch_pdl"] = True
    return options


def _launch(
    early: bool,
    kernel: Any,
    grid: tuple[int, ...],
    *arguments: Any,
    warps: int,
    registers: int | None = None,
    **constants: Any,
) -> None:
    """Launches a kernel on the current device."""
    kernel[grid](*arguments, **constants, **options_of(early, warps, registers))


@lru_cache
def is_early(device: torch.device) -> bool:
    """Whether kernels are launched early on a device: from compute capability 9 on."""
    nvidia = device.type == "cuda" and not torch.version.hip
    return nvidia and torch.cuda.get_device_capability(device) >= (9, 0)


@lru_cache
def _launches(early: bool) -> Launch:
    """Returns what launches kernels, early or not."""
    return partial(_launch, early)


def launch_on(device: torch.device) -> Launch:
    """Returns what launches kernels on a device."""
    return _launches(is_early(device))


def options_on(device: torch.device, warps: int, registers: int | None) -> dict[str, Any]:
    """Options of a launch on a device."""
    return options_of(is_early(device), warps, registers)


class Plan(NamedTuple):
    """Sizes that change the speed of a kernel but never its result; powers of two."""

    columns: int = 128  # groups of a tile of the first pass
    group: int = 32  # logits of a group
    ahead: int = 8  # that a thread loads before it looks at them
    supers: int = 16  # super-groups of a tile
    block: int = 1024  # logits whose mass is one number; what the deciding kernels look at together
    together: int = 2  # blocks that a weighing program looks at together
    at_once: int = 16  # groups of a tile that a program looks at together where few matter
    bins: int = 512
    bins_step: int = 1024  # logits that a program puts into bins together
    bracket_step: int = 2048  # of a list, that eight warps put into bins together
    rounds: int = 3  # on brackets of too many tokens
    programs: int = 4096  # that list tokens, each with tiles enough for its share of the floor
    seldom: int = 2048  # at least, in kernels for which rows are few
    room: int = 8192  # of a list of a row's largest, in memory
    list_size: int = 1024  # that a program holds at once
    short_size: int = 128  # of a list that is put in order
    scratch_bytes: int = 1 << 28  # of virtual rows at a time


PLAN = Plan()


class Layout(NamedTuple):
    """Sizes that follow from a plan and V, and compile-time constants."""

    tiles: int
    weighing: int  # programs that weigh a row
    blocks: int
    words: int  # of a record, in int64
    record: tuple[Any, ...]  # the constants of `Scratch`
    long: Sizes  # of kernels that look at rows, or at long lists
    long_plain: Sizes  # where no filter but top-k and top-p may act
    short: Sizes
    short_plain: Sizes


def up(number: int) -> int:
    """Returns the next power of two."""
    return 1 << (number - 1).bit_length()


@lru_cache
def layout_of(plan: Plan, v: int) -> Layout:
    """Returns the layout for rows of V entries."""
    tiles, blocks = -(-v // (plan.columns * plan.group)), -(-v // plan.block)
    # padded, so that vocabularies of much the same size share kernels
    splits, most_blocks = up(tiles), up(blocks)
    starts, end = [], 0
    for words in (
        MARKS.value + 3 * plan.bins,
        BOUNDS_SIZE.value,
        6 * most_blocks,
        (splits + 1) // 2,
        (splits * plan.supers + 1) // 2,
        (splits * plan.columns + 1) // 2,
        2 * plan.room,
    ):
        starts.append(end)
        end += -(-words // 16) * 16  # parts begin at multiples of 128 bytes

    def sizes(list_size: int, alone: bool, plain: bool) -> Sizes:
        step = plan.block // 4  # the registers of a search for a cut spill where it is a block
        of_tile = plan.columns, plan.group, plan.supers, plan.ahead
        padded = plan.block, step, plan.room, plan.bins, splits, most_blocks
        return Sizes(*map(tl.constexpr, (*of_tile, *padded, list_size, alone, plain)))

    return Layout(
        tiles,
        -(-blocks // plan.together),
        blocks,
        end,
        tuple(map(tl.constexpr, (end, *starts[1:]))),
        sizes(plan.list_size, False, False),
        sizes(plan.list_size, False, True),
        sizes(plan.short_size, True, False),
        sizes(plan.short_size, True, True),
    )


class Scan(NamedTuple):
    """Scanned and weighed rows."""

    launch: Launch
    rows: Rows
    knobs: Tensor  # (A, 14, R), or (14, R) for one adaptor
    asked: int
    scratch: Scratch
    layout: Layout
    virtual: int  # rows times adaptors

    def given(self, sizes: Sizes) -> tuple[Any, ...]:
        """The first arguments of most kernels."""
        return self.rows, self.knobs, self.asked, self.scratch, sizes


def asked_of(knobs: Tensor, order: int, *bits: int) -> int:
    """Packs the number of adaptors, how knobs (..., 14, R) lie, their order, and what is asked for.

    Bits are constants of `rows`, each once.
    """
    adaptors = knobs.shape[0] if knobs.dim() > 2 else 1
    per_row = PER_ROW.value if knobs.shape[-1] > 1 else 0
    return sum(bits, (adaptors << ADAPTORS_SHIFT.value) | per_row | order)


def scan_rows(
    logits: Tensor, knobs: Tensor, asked: int, steps: Steps, plan: Plan, launch: Launch
) -> Scan:
    """Scans rows of logits (N, V), N > 0, each once for each of the adaptors."""
    n, v = logits.shape
    layout = layout_of(plan, v)
    virtual = n * (asked >> ADAPTORS_SHIFT.value)
    memory = logits.new_empty(virtual * layout.words, dtype=torch.int64)
    words = MARKS.value + 3 * plan.bins * steps.bins
    scratch = Scratch(memory, words, *layout.record)
    scanned = Scan(
        launch, Rows(logits, logits.stride(0), v), knobs, asked, scratch, layout, virtual
    )
    given = scanned.given(layout.long)
    own = scanned.rows, asked, scratch, layout.long
    launch(scan.maxima_kernel, (n, layout.tiles), *own, warps=1)
    if steps.weighs or asked & (ALL_WEIGHED.value | BASE.value):
        grid = virtual, layout.weighing
        launch(scan.weigh_kernel, grid, *given, TOGETHER=plan.together, warps=4)
    if steps.bins:
        launch(scan.sketch_kernel, (virtual,), *given, warps=8)
    if steps.ranks or steps.lists:
        programs = max(4, -(-plan.programs // virtual)) if steps.ranks else layout.tiles
        launch(scan.list_kernel, (virtual, min(layout.tiles, programs)), *given, warps=1)
    if steps.sketches:
        sizes = {"STEP": plan.bracket_step, "SHORT": plan.short_size}
        launch(nucleus.bracket_kernel, (virtual,), *given, **sizes, warps=8)
    if steps.bins:
        _search(scanned, plan)
    return scanned


def _search(scanned: Scan, plan: Plan) -> None:
    """Finds the brackets of rows that have no list."""
    launch, layout = scanned.launch, scanned.layout
    given = scanned.given(layout.long)
    virtual = scanned.virtual
    grid = virtual, min(layout.tiles, max(4, -(-plan.seldom // virtual)))
    step = min(plan.columns * plan.group, plan.bins_step)
    launch(nucleus.bins_kernel, grid, *given, STEP=step, warps=4, registers=MOST_REGISTERS)
    launch(split.split_kernel, grid, *given, warps=1)
    # as many warps in all: four a program would take 181 registers
    grid = virtual, min(layout.tiles, max(2, -(-plan.seldom // (2 * virtual))))
    options: dict[str, Any] = {"STEP": plan.bins_step, "warps": 8, "registers": FEWER_REGISTERS}
    for _ in range(plan.rounds):
        launch(nucleus.narrow_kernel, grid, *given, **options)


def slices(logits: Tensor, adaptors: int, plan: Plan, more: int = 0) -> list[slice | None]:
    """Returns slices of rows whose scratch stays within its limit; None stands for all rows.

    Scratch is a record of each virtual row, and so many int64 more.
    """
    n, v = logits.shape
    words = layout_of(plan, v).words + more
    step = max(1, plan.scratch_bytes // (adaptors * 8 * words))
    if 0 < n <= step:
        return [None]
    # of 16 rows each begins as well aligned as the first
    step = max(step // 16 * 16, min(step, 15))
    return [slice(i, min(i + step, n)) for i in range(0, n, step)]


def some(tensor: Tensor, at: slice | None) -> Tensor:
    """Returns some rows of a tensor, or the tensor itself."""
    return tensor if at is None else tensor[at]


def knobs_of_rows(knobs: Tensor, at: slice | None) -> Tensor:
    """Returns the knobs (..., 14, R) of some rows."""
    return knobs if at is None or knobs.shape[-1] == 1 else knobs[..., at].contiguous()
