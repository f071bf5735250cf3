"""Launches of the sampling kernels for CUDA tensors: one scan of the rows, then what follows.

Nothing here synchronises. One program a row decides, mostly from the list; the survivors that no
list holds are summed by many.
"""

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from contextvars import copy_context
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from fastadapt._ops.filter_code import filter_code, joined, order_of
from fastadapt._ops.outputs import LogOdds, Scores, sample_fields, sample_outputs, score_outputs
from fastadapt._ops.triton import draw, write
from fastadapt._ops.triton.bundles import Drawn, Labels, Rows, Scored, Support
from fastadapt._ops.triton.launch_scan import (
    FEWER_REGISTERS,
    MOST_REGISTERS,
    PLAN,
    Launch,
    Plan,
    Scan,
    Steps,
    asked_of,
    knobs_of_rows,
    launch_on,
    options_on,
    scan_rows,
    slices,
    some,
    steps_of,
    up,
)
from fastadapt._ops.triton.rows import (
    ALL_WEIGHED,
    BASE,
    BASE_LOGPROBS,
    BY_MASS,
    LOG_MASS,
    NUM_KNOBS,
    POSITIONS,
    SUM_LATER,
    SURPRISAL,
    TOP_K,
    TOP_P,
)


def sample(
    logits: Tensor,
    knobs: Tensor,
    order: int,
    seeds: Tensor,
    positions: Tensor | None,
    base_logprobs: bool,
    log_mass: bool,
    top_n: int,
    out: list[Tensor],
    plan: Plan = PLAN,
    launch: Launch | None = None,
) -> None:
    """Draws; only what was asked for is computed."""
    launch = launch or launch_on(logits.device)
    steps = steps_of(order, knobs.shape[1])
    if steps.by_mass:
        steps = steps._replace(lists=False)
    bits = [bit.value for bit, on in ((SUM_LATER, steps.sums), (BY_MASS, steps.by_mass)) if on]
    bits += draw_bits(positions, base_logprobs, log_mass, top_n)
    asked = asked_of(knobs, steps.order, *bits)
    for at in slices(logits, 1, plan):
        here = some(logits, at)
        scanned = scan_rows(here, knobs_of_rows(knobs, at), asked, steps, plan, launch)
        layout, n = scanned.layout, scanned.virtual
        part = [some(t, at) for t in out]
        drawn = drawn_of(part, base_logprobs, log_mass, top_n)
        own = some(seeds, at), some(seeds if positions is None else positions, at), drawn
        short = scanned.given(layout.short_plain if steps.plain else layout.short)
        long = scanned.given(layout.long)
        if not steps.by_mass:
            launch(draw.short_kernel, (n,), *short, *own, warps=4, registers=MOST_REGISTERS)
        if steps.filters and not steps.by_mass:
            launch(draw.long_kernel, (n,), *long, *own, warps=8, registers=MOST_REGISTERS)
        if steps.sums:
            grid = n, min(layout.tiles, max(4, -(-plan.seldom // n)))
            options = {
                "AT_ONCE": min(plan.at_once, plan.columns),
                "warps": 4,
                "registers": FEWER_REGISTERS,
            }
            launch(draw.sum_kernel, grid, *long, *own, **options)
        if top_n:
            top(scanned, drawn, part[-3:])


def draw_bits(
    positions: Tensor | None, base_logprobs: bool, log_mass: bool, top_n: int
) -> list[int]:
    """What a draw asks for, as `asked_of` takes it."""
    with_base = base_logprobs or top_n > 0
    bits = (
        (POSITIONS, positions is not None),
        (BASE_LOGPROBS, base_logprobs),
        (LOG_MASS, log_mass),
        (ALL_WEIGHED, log_mass or with_base),
        (BASE, with_base),
    )
    return [bit.value for bit, wanted in bits if wanted]


def drawn_of(out: list[Tensor], base_logprobs: bool, log_mass: bool, top_n: int) -> Drawn:
    """The outputs of a draw as kernels take them; a field that is not asked for is not written."""
    base, mass, *_ = sample_fields(out, base_logprobs, log_mass, top_n)[4:]
    return Drawn(*out[:4], *(out[1] if t is None else t for t in (base, mass)))


def top(scanned: Scan, drawn: Drawn, out: list[Tensor]) -> None:
    """Finds the most probable tokens and the rank of the drawn one."""
    n, number = out[0].shape
    sizes = scanned.layout.long
    given = scanned.rows, scanned.asked, scanned.scratch, sizes, number, drawn
    launch = scanned.launch
    # four warps would take 174 registers each, these 126
    launch(draw.top_kernel, (n,), *given, out[2], warps=16, registers=MOST_REGISTERS)
    # Triton 3.4 does not sort one entry
    launch(draw.sort_kernel, (n,), *given, *out[:2], TOP=up(max(number, 2)), warps=4)


def decided(logits: Tensor, knobs: Tensor, asked: int, steps: Steps, plan: Plan) -> Scan:
    """Decides every virtual row: what its filters come to is in its record."""
    scanned = scan_rows(logits, knobs, asked, steps, plan, launch_on(logits.device))
    layout = scanned.layout
    scanned.launch(
        write.bounds_kernel,
        (scanned.virtual,),
        *scanned.given(layout.long_plain if steps.plain else layout.long),
        warps=8,
        registers=MOST_REGISTERS,
    )
    return scanned


def compile_draws(
    device: torch.device, v: int, dtypes: Sequence[torch.dtype], top_n: int, threads: int
) -> int:
    """Compiles what any draw from rows of V logits launches; returns how many kernels that are."""
    wanted: list[Callable[[], Any]] = []

    def note(
        kernel: Any,
        grid: tuple[int, ...],
        *arguments: Any,
        warps: int,
        registers: int | None = None,
        **constants: Any,
    ) -> None:
        options = options_on(device, warps, registers)
        wanted.append(partial(kernel.warmup, *arguments, grid=grid, **constants, **options))

    # knobs that may all act in any row, and those that make a kernel of its own
    plain = filter_code(0, (knob in (TOP_K.value, TOP_P.value) for knob in range(NUM_KNOBS.value)))
    for dtype, code in itertools.product(dtypes, (0, plain)):
        logits = torch.empty(1, v, dtype=dtype, device=device)
        knobs = torch.empty(NUM_KNOBS.value, 1, dtype=torch.float64, device=device)
        seeds = torch.empty(1, dtype=torch.int64, device=device)
        out = sample_outputs(logits, False, False, top_n)
        sample(logits, knobs, code, seeds, None, False, False, top_n, out, launch=note)

    def compile_all() -> int:
        # those that decide come last and take longest
        together = getattr(triton, "AsyncCompileMode", None)  # Triton 3.4 has none
        with ThreadPoolExecutor(threads) as pool, together(pool) if together else nullcontext():
            return len({id(made): made for made in (one() for one in reversed(wanted))})

    return copy_context().run(compile_all)  # Triton leaves its mode on where one fails


def filter_logits(
    logits: Tensor, knobs: Tensor, order: int, out: Tensor, plan: Plan = PLAN
) -> None:
    """Writes the filtered logits."""
    steps = steps_of(order, knobs.shape[1])
    asked = asked_of(knobs, steps.order)
    for at in slices(logits, 1, plan):
        scanned = decided(some(logits, at), knobs_of_rows(knobs, at), asked, steps, plan)
        grid, given = (scanned.virtual, scanned.layout.blocks), scanned.given(scanned.layout.long)
        scanned.launch(write.filter_kernel, grid, *given, some(out, at), warps=4)


def score(
    logits: Tensor,
    tokens: Tensor,
    knobs: list[Tensor],
    orders: list[int],
    ignore_index: int,
    out: Scores,
    plan: Plan = PLAN,
) -> None:
    """Scores tokens under all adaptors of one order at a time."""
    for order in sorted({order_of(code) for code in orders}):
        members = [i for i, code in enumerate(orders) if order_of(code) == order]
        code = joined(orders[i] for i in members)
        rows = max(knobs[i].shape[1] for i in members)
        packed = torch.stack([knobs[i].expand(-1, rows) for i in members])
        if len(members) == len(knobs):
            _score(logits, tokens, packed, code, ignore_index, out, plan)
            continue
        part = score_outputs(logits, len(members))[:3]
        _score(logits, tokens, packed, code, ignore_index, (*part, *out[3:]), plan)
        for whole, columns in zip(out[:3], part, strict=True):
            for column, i in enumerate(members):
                whole[:, i] = columns[:, column]


def _score(
    logits: Tensor,
    tokens: Tensor,
    knobs: Tensor,
    order: int,
    ignore_index: int,
    out: Scores,
    plan: Plan,
) -> None:
    """Under adaptors of one order; knobs (A, 14, R), outputs (N, A) and (N,)."""
    steps = steps_of(order, 0)
    asked = asked_of(knobs, steps.order, ALL_WEIGHED.value, BASE.value, SURPRISAL.value)
    for at in slices(logits, len(knobs), plan):
        scanned = decided(some(logits, at), knobs_of_rows(knobs, at), asked, steps, plan)
        labels = Labels(some(tokens, at), ignore_index)
        scored = Scored(*(some(t, at) for t in out))
        given = scanned.given(scanned.layout.long)
        scanned.launch(write.score_kernel, (scanned.virtual,), *given, labels, scored, warps=4)


def adapted_log_odds(
    logits: Tensor,
    tokens: Tensor,
    knobs: Tensor,
    order: int,
    ignore_index: int,
    out: LogOdds,
    plan: Plan = PLAN,
) -> None:
    """Computes log-odds, support and statistics."""
    steps = steps_of(order, knobs.shape[1])
    asked = asked_of(knobs, steps.order)
    for at in slices(logits, 1, plan):
        value, support, stats = (some(t, at) for t in out)
        scanned = decided(some(logits, at), knobs_of_rows(knobs, at), asked, steps, plan)
        labels = Labels(some(tokens, at), ignore_index)
        log_odds(scanned, labels, (value, support, stats), write.support_kernel)


def log_odds(
    scanned: Scan, labels: Labels, out: LogOdds, support_kernel: Any, *survivors: Tensor
) -> None:
    """Writes supports by a kernel that knows survivors, and the log-odds on them."""
    value, support, stats = out
    double = value.dtype == torch.float64
    n, blocks, launch = scanned.virtual, scanned.layout.blocks, scanned.launch
    largest = value.new_empty(n, blocks, dtype=torch.float64)
    kept, given = Support(support, largest, blocks), scanned.given(scanned.layout.long)
    launch(support_kernel, (n, blocks), *given, *survivors, labels, kept, DOUBLE=double, warps=4)
    own = {"DOUBLE": double, "warps": 4, "registers": MOST_REGISTERS}
    launch(write.log_odds_kernel, (n,), *given, labels, kept, value, stats, **own)


def adapted_log_odds_backward(
    dlog_odds: Tensor,
    logits: Tensor,
    tokens: Tensor,
    knobs: Tensor,
    order: int,
    ignore_index: int,
    support: Tensor,
    stats: Tensor,
    out: Tensor,
    plan: Plan = PLAN,
) -> None:
    """Computes the gradient in one read of the logits and one write."""
    n, v = logits.shape
    launch_on(logits.device)(
        write.log_odds_backward_kernel,
        (n, -(-v // plan.block)),
        dlog_odds.contiguous(),
        Rows(logits, logits.stride(0), v),
        knobs,
        asked_of(knobs, 0),
        Labels(tokens, ignore_index),
        support,
        stats,
        out,
        DOUBLE=logits.dtype == torch.float64,
        BLOCK=plan.block,
        warps=4,
    )
