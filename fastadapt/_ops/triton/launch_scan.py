"""Passes over whole rows for CUDA tensors: scratch, sizes and grids. Nothing here synchronises.

A call takes the maxima of groups of logits (one read), weighs the rows whose first filter asks for
it (one more), lists the tokens from a floor up, and finds where a nucleus ends. What is launched
follows from the adaptor, never from logits.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from fastadapt._ops.filter_code import is_known, may_act, order_of
from fastadapt._ops.triton import nucleus, scan
from fastadapt._ops.triton.bundles import (
    Adaptors,
    Asked,
    Lists,
    Parts,
    Rows,
    Sizes,
    Tiling,
    Weights,
)
from fastadapt._ops.triton.rows import (
    EPSILON,
    ETA,
    MARKS,
    MIN_P,
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


@lru_cache
def steps_of(code: int, rows: int) -> Steps:
    """The passes for bounds of a code whose knobs have so many rows, 1 where all are numbers."""
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
    )


# Without a limit, assemblers for sm_80 stop at 128 or 168 registers and spill.
MOST_REGISTERS = 255


@lru_cache
def options_of(device: torch.device, warps: int, registers: int | None = None) -> dict[str, Any]:
    """Options of a launch.

    From compute capability 9 on, programs of a kernel take their places while the one before ends
    (programmatic dependent launch), and wait there for its results.
    """
    early = device.type == "cuda" and not torch.version.hip
    early = early and torch.cuda.get_device_capability(device) >= (9, 0)
    options: dict[str, Any] = {"num_warps": warps, "enable_fp_fusion": False, "PDL": early}
    if registers:
        options["maxnreg"] = registers
    if early:
        options["launch_pdl"] = True
    return options


class Plan(NamedTuple):
    """Sizes that change the speed of a kernel but never its result; powers of two."""

    columns: int = 128  # groups of a tile of the first pass
    group: int = 32  # logits of a group
    ahead: int = 8  # that a thread loads before it looks at them
    supers: int = 16  # super-groups of a tile
    block: int = 1024  # logits whose mass is one number; what the deciding kernels look at together
    together: int = 2  # blocks that a weighing program looks at together
    bins: int = 512
    bins_step: int = 1024  # logits that four warps put into bins together
    bracket_step: int = 2048  # of a list, that eight warps put into bins together
    rounds: int = 3  # on brackets of too many tokens
    programs: int = 4096  # that list tokens, each with tiles enough for its share of the floor
    seldom: int = 2048  # at least, in kernels for which rows are few
    room: int = 8192  # of a list of a row's largest, in memory
    list_size: int = 1024  # that a program holds at once
    short_size: int = 128  # of a list that is put in order
    scratch_bytes: int = 1 << 28  # of virtual rows at a time

    def row_bytes(self, v: int) -> int:
        """Returns the scratch of a virtual row: lists, histograms, block masses, group maxima."""
        blocks, groups = -(-v // self.block), -(-v // self.group)
        return 16 * self.room + 24 * self.bins + 44 * blocks + 5 * groups


PLAN = Plan()


class Scan(NamedTuple):
    """Scanned and weighed rows: the arguments of the deciding kernels, in their order."""

    rows: Rows
    adaptors: Adaptors
    parts: Parts
    lists: Lists
    weights: Weights


class Options(NamedTuple):
    """What a scan should compute."""

    all_weighed: bool = False  # weigh also the rows whose first filter does not ask for it
    base: bool = False  # weigh at temperature 1 too
    entropy: bool = False  # with `base`, surprisals of it too


def adaptors_of(knobs: Tensor, order: int) -> Adaptors:
    """Bundles knobs (A, 8, R) and the order of their filters, 0 or 1."""
    return Adaptors(knobs, knobs.shape[0], knobs.shape[2], int(knobs.shape[2] > 1), order)


class Layout(NamedTuple):
    """Sizes that follow from a plan and V; compile-time constants by name."""

    tiles: int
    blocks: int
    groups: int  # padded, as are the next
    tiling: Tiling
    padded: dict[str, Any]
    weighing: int  # programs that weigh a row
    long: Sizes  # of deciding kernels
    short: Sizes


@lru_cache
def asked_of(
    options: Options, steps: Steps, positions: bool = False, base: bool = False, later: bool = False
) -> Asked:
    """Returns the constants of the deciding kernels.

    `base`: also score the base distribution; `later`: another kernel may sum survivors.
    """
    log_mass, weighed = options.all_weighed, options.all_weighed or options.base
    sum_later = later and steps.sums
    return Asked(*map(tl.constexpr, (positions, base, log_mass, weighed, sum_later, steps.plain)))


def up(number: int) -> int:
    """Returns the next power of two."""
    return 1 << (number - 1).bit_length()


@lru_cache
def layout_of(plan: Plan, v: int) -> Layout:
    """Returns the layout for rows of V entries."""
    tiles, blocks = -(-v // (plan.columns * plan.group)), -(-v // plan.block)
    splits = up(tiles)
    tiling = plan.columns, plan.group, plan.supers, up(tiles * plan.supers), plan.ahead

    def sizes(alone: int) -> Sizes:
        size = alone or plan.list_size
        step = plan.block // 2  # the registers of a search for a cut spill where it is a block
        places = plan.room, size, plan.bins, splits, up(blocks)
        return Sizes(*map(tl.constexpr, (plan.block, step, *places, alone > 0)))

    return Layout(
        tiles,
        blocks,
        up(tiles * plan.columns),
        Tiling(*map(tl.constexpr, tiling)),
        {"SPLITS": splits, "BLOCKS": up(blocks)},
        -(-blocks // plan.together),
        sizes(0),
        sizes(plan.short_size),
    )


def _scratch(logits: Tensor, virtual: int, bins: bool, plan: Plan, sizes: Layout) -> Any:
    """Allocates parts, lists and weights of rows."""
    n, tiles, blocks = len(logits), sizes.tiles, sizes.blocks
    new, real, word = logits.new_empty, torch.float32, torch.int64
    parts = Parts(
        new(n, tiles, dtype=real),
        new(n, tiles * plan.supers, dtype=real),
        new(n, tiles * plan.columns, dtype=real),
        tiles,
    )
    step = MARKS.value + 3 * plan.bins * bins
    lists = Lists(
        new(virtual, step, dtype=word),
        new(virtual, dtype=real),
        new(virtual, plan.room, dtype=real),
        new(virtual, plan.room, dtype=torch.int32),
        new(virtual, plan.room, dtype=real),
        new(virtual, plan.room, dtype=torch.int32),
        step,
    )
    weights = Weights(
        new(virtual, blocks, dtype=word),
        new(virtual, blocks, dtype=word),
        new(virtual, blocks, dtype=word),
        new(virtual, blocks, dtype=word),
        new(virtual, blocks, dtype=word),
        new(virtual, blocks, dtype=torch.int32),
        blocks,
    )
    return parts, lists, weights


def scan_rows(
    logits: Tensor, knobs: Tensor, steps: Steps, plan: Plan, options: Options
) -> tuple[Scan, Layout]:
    """Scans rows of logits (N, V), N > 0, each once for each of the adaptors."""
    n, v = logits.shape
    device, sizes = logits.device, layout_of(plan, v)
    rows, adaptors = Rows(logits, logits.stride(0), v), adaptors_of(knobs, steps.order)
    virtual = n * adaptors.number
    scanned = Scan(rows, adaptors, *_scratch(logits, virtual, steps.bins, plan, sizes))
    parts, lists, weights = scanned[2:]
    scan.maxima_kernel[(n, sizes.tiles)](
        rows,
        adaptors,
        parts,
        lists,
        COLUMNS=plan.columns,
        GROUP=plan.group,
        AHEAD=plan.ahead,
        SUPERS=plan.supers,
        **options_of(device, 1),
    )
    if steps.weighs or options.all_weighed or options.base:
        scan.weigh_kernel[(virtual, sizes.weighing)](
            rows,
            adaptors,
            parts,
            weights,
            ALWAYS=options.all_weighed or options.base,
            BASE=options.base,
            BASE_SURPRISAL=options.entropy,
            BLOCK=plan.block,
            TOGETHER=plan.together,
            SPLITS=sizes.padded["SPLITS"],
            **options_of(device, 4),
        )
    if steps.bins:
        scan.sketch_kernel[(virtual,)](
            *scanned,
            COLUMNS=plan.columns,
            GROUPS=sizes.groups,
            ROOM=plan.room,
            **sizes.padded,
            **options_of(device, 8),
        )
    if steps.ranks:
        few = max(4, -(-plan.programs // virtual))
        scan.collect_kernel[(virtual, min(sizes.tiles, few))](
            *scanned, tiling=sizes.tiling, sizes=sizes.long, **options_of(device, 1)
        )
    if steps.lists:
        scan.list_kernel[(virtual, sizes.tiles)](
            *scanned,
            tiling=sizes.tiling,
            sizes=sizes.long,
            **options_of(device, 1),
        )
    shared = {"BINS": plan.bins, "ROOM": plan.room}
    if steps.sketches:
        nucleus.bracket_kernel[(virtual,)](
            *scanned,
            STEP=plan.bracket_step,
            SHORT=plan.short_size,
            **shared,
            **options_of(device, 8),
        )
    if steps.bins:
        few = min(sizes.tiles, max(4, -(-plan.seldom // virtual)))
        nucleus.bins_kernel[(virtual, few)](
            *scanned,
            COLUMNS=plan.columns,
            GROUP=plan.group,
            STEP=min(plan.columns * plan.group, plan.bins_step),
            **shared,
            **options_of(device, 4, MOST_REGISTERS),
        )
        scan.split_kernel[(virtual, few)](
            *scanned, tiling=sizes.tiling, sizes=sizes.long, **options_of(device, 1)
        )
        for _ in range(plan.rounds):
            nucleus.narrow_kernel[(virtual, few)](
                *scanned, STEP=plan.bins_step, **shared, **options_of(device, 4, MOST_REGISTERS)
            )
    return scanned, sizes


def slices(logits: Tensor, adaptors: int, plan: Plan) -> list[slice | None]:
    """Returns slices of rows whose scratch stays within its limit; None stands for all rows."""
    n, v = logits.shape
    step = max(1, plan.scratch_bytes // (adaptors * plan.row_bytes(v)))
    if 0 < n <= step:
        return [None]
    return [slice(i, min(i + step, n)) for i in range(0, n, step)]


def some(tensor: Tensor, at: slice | None) -> Tensor:
    """Returns some rows of a tensor, or the tensor itself."""
    return tensor if at is None else tensor[at]


def knobs_of_rows(knobs: Tensor, at: slice | None) -> Tensor:
    """Returns the knobs (A, 8, R) of some rows."""
    return knobs if at is None or knobs.shape[2] == 1 else knobs[:, :, at].contiguous()
