"""How often each statement of the kernels runs in a call of `sample`, and the bytes it moves.

    TRITON_INTERPRET=1 python benchmarks/gpu_trace.py ADAPTOR N V ROWS

Triton's interpreter runs the programs of the first of N equal rows, of a kind of `cases.py`, under
the grids of all of them. Prints a JSON list of launches, in their order. A statement is known by
where it stands and where the functions around it were called from; what the compiler repeats
because a loop is a `static_range` counts for each repetition.
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any
from unittest import mock

import triton
from torch import Tensor
from triton.runtime import interpreter

from cases import GPU_ADAPTORS, make_rows
from gpu_calls import draw
from no_gpu import AsOnCuda, Calls
from statements import Stack, is_of_kernels, place_of, statements_of, to_text


class Tracer:
    """Counts statements as Python runs them."""

    def __init__(self) -> None:
        self.counts: Counter[Stack] = Counter()
        self.calls: list[tuple[FrameType, Stack]] = []  # the frames now, and where each one stands

    def __call__(self, frame: FrameType, event: str, arg: object) -> Any:
        """Follows the functions of kernels."""
        if not is_of_kernels(frame.f_code.co_filename):
            return None
        self.calls.append((frame, ()))
        return self._within

    def _within(self, frame: FrameType, event: str, arg: object) -> Any:
        if event == "return":
            self.calls.pop()
        elif event == "line":
            _, before = self.calls[-1]
            place = place_of(frame.f_code.co_filename, frame.f_lineno)
            if place is not None and (not before or before[0] != place):
                outer = self.calls[-2][1] if len(self.calls) > 1 else ()
                here = (place, *outer)
                self.calls[-1] = frame, here
                self.counts[here] += 1
        return self._within


def executions(counts: Counter[Stack]) -> dict[Stack, float]:
    """How often each of the copies runs that the compiler makes of a statement."""
    return {stack: count / math.prod(_copies(counts, stack)) for stack, count in counts.items()}


def _copies(counts: Counter[Stack], stack: Stack) -> Iterator[float]:
    """Repetitions of the unrolled loops around a statement and around the calls that led to it."""
    for at, (name, line) in enumerate(stack):
        for head, body in statements_of(name).unrolled.get(line, ()):
            repeated = counts[((name, body), *stack[at + 1 :])]
            entered = counts[((name, head), *stack[at + 1 :])] - repeated
            yield max(1.0, repeated / max(1, entered))


class Traced:
    """The launches of a call, each with what the programs of the first row do."""

    def __init__(self, rows: Tensor) -> None:
        self.launches: list[dict[str, Any]] = []
        self.tracer = Tracer()
        self.moved = [0, 0]  # bytes of logits, bytes of the rest
        self.programs: list[Counter[Stack]] = []
        self.began = False  # whether a program of the launch did
        first = rows.data_ptr()
        self.logits = range(first, first + rows.shape[1] * rows.element_size())

    def run(self, run: Any, function: Any, *args: Any, grid: Any, **options: Any) -> None:
        """Runs the programs of the first row of a launch."""
        self.moved, self.programs = [0, 0], []
        around, self.tracer.calls, self.began = self.tracer.calls, [], False
        run(function, *args, grid=(1, *grid[1:]), **options)
        self._end_program()
        self.tracer.calls = around
        total = sum(self.programs, Counter())
        number = len(self.programs)
        longest = max(self.programs, key=lambda counts: counts.total())
        self.launches.append(
            {
                "kernel": function.fn.__name__,
                "grid": list(grid),
                "logit_bytes": self.moved[0],
                "other_bytes": self.moved[1],
                "mean": {to_text(x): n / number for x, n in executions(total).items()},
                "longest": {to_text(x): n for x, n in executions(longest).items()},
            }
        )

    def begin_program(self, begin: Any, builder: Any, x: int, y: int, z: int) -> None:
        """Starts to count anew."""
        if not self.began:  # what ran before was the interpreter's rewriting of the kernel
            self.tracer.counts, self.began = Counter(), True
        self._end_program()
        begin(builder, x, y, z)

    def _end_program(self) -> None:
        if self.tracer.counts:
            self.programs.append(self.tracer.counts)
            self.tracer.counts = Counter()

    def move(self, function: Any, builder: Any, pointers: Any, *rest: Any) -> Any:
        """Counts the bytes of a load or a store."""
        mask = next(x for x in rest if x is not None and x.data.dtype == bool)
        here = pointers.data[mask.data]
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        logits = (here >= self.logits.start) & (here < self.logits.stop)
        self.moved[0] += int(logits.sum()) * size
        self.moved[1] += int((~logits).sum()) * size
        return function(builder, pointers, *rest)


def trace(call: Callable[[Tensor], object], row: Tensor, n: int) -> list[dict[str, Any]]:
    """The launches of a call on N rows that equal one, (1, V)."""
    traced = Traced(row)
    builder = type(interpreter.interpreter_builder)
    run, begin = interpreter.InterpretedFunction.run, builder.set_grid_idx

    def replaced(name: str) -> Any:
        function = getattr(builder, name)
        return mock.patch.object(
            builder, name, lambda self, *args: traced.move(function, self, *args)
        )

    with (
        mock.patch.object(
            interpreter.InterpretedFunction,
            "run",
            lambda self, *args, **options: traced.run(run, self, *args, **options),
        ),
        mock.patch.object(
            builder, "set_grid_idx", lambda self, *at: traced.begin_program(begin, self, *at)
        ),
        replaced("create_masked_load"),
        replaced("create_masked_store"),
        AsOnCuda(Calls.none()),
    ):
        sys.settrace(traced.tracer)
        try:
            call(row.expand(n, -1))
        finally:
            sys.settrace(None)
    return traced.launches


def main(adaptor: str, n: str, v: str, rows: str) -> None:
    """Prints the launches of a draw."""
    if not triton.knobs.runtime.interpret:
        sys.exit("expected TRITON_INTERPRET=1")
    row = make_rows(rows, int(v), 1, seed=0)[0]
    launches = trace(lambda rows: draw(rows, GPU_ADAPTORS[adaptor], {}), row, int(n))
    sys.stdout.write(json.dumps(launches))


if __name__ == "__main__":
    main(*sys.argv[1:])
