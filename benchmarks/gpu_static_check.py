"""Compares what the GPU's code is with what it was."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

EXACT = (
    *("registers", "stack", "local", "spills", "shared", "barriers", "fused", "fused_double"),
    *("copies", "products"),
)
INSTRUCTIONS_WITHIN = 0.03
# What is compared: the fields that say what a line is of, and those that must be the same.
PARTS: dict[str, tuple[Sequence[str], Sequence[str]]] = {
    "kernels": (("target", "kernel", "variant"), EXACT),
    "specialisations": (("vocabulary", "dtype", "outputs", "adaptor"), ("kernels",)),
    "calls": (("batch", "vocabulary", "outputs", "adaptor"), ("launches", "kernels")),
}
ALL = "all of these"  # in the place of a vocabulary, of outputs, of an adaptor
# of a kernel by all batches, vocabularies and outputs for one adaptor; of all kernels by all
# batches, adaptors and outputs for one vocabulary
MOST_OF_A_KERNEL, MOST_OF_A_SERVER = 3, 12
# Calls of PyTorch for one of `sample`, beside one for each tensor that it returns. Outputs of an
# operator may not share memory, so each takes an allocation; what is left is that of the scratch.
OTHER_ATEN_CALLS = 1
Record = Mapping[str, Any]


def read_record(path: Path) -> Record:
    """Reads a record; ends with a sentence where a file is none."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        sys.exit(f"check: expected a record of gpu_static.py, got {path} ({error})")
    if not isinstance(record, dict) or any(part not in record for part in PARTS):
        sys.exit(f"check: expected a record of gpu_static.py with {', '.join(PARTS)}, got {path}")
    return record


def refuse_another(before: Record, now: Record) -> None:
    """Ends with a sentence where a record is of another version of Triton, or of other kernels."""
    for name in ("triton", "settings"):
        if before.get(name) != now[name]:
            sys.exit(f"{name}: expected {before.get(name)} as in the record, got {now[name]}")


def differences(before: Record, now: Record) -> Iterator[str]:
    """A line for each difference."""
    for part, (place, fields) in PARTS.items():
        old, new = (
            {tuple(cell[name] for name in place): cell for cell in record[part]}
            for record in (before, now)
        )
        for where in [*old, *(where for where in new if where not in old)]:
            name = f"{part}, {' '.join(map(str, where))}"
            if where not in new:
                yield f"{name}: in the record, not there now"
            elif where not in old:
                yield f"{name}: not in the record, there now"
            else:
                yield from (f"{name}: {x}" for x in _changes(old[where], new[where], fields))


def _changes(old: Record, new: Record, fields: Sequence[str]) -> Iterator[str]:
    """The changes of one line."""
    for name in fields:
        if old.get(name) != new.get(name):
            yield f"{name} {old.get(name)} before, {new.get(name)} now"
    were, are = old.get("instructions", 0), new.get("instructions", 0)
    if abs(are - were) > INSTRUCTIONS_WITHIN * were:
        yield f"instructions {were} before, {are} now"


def too_many(record: Record) -> Iterator[str]:
    """A line for each count that is larger than it should be."""
    for cell in record.get("specialisations", ()):
        where = f"{cell['vocabulary']} {cell['dtype']} {cell['adaptor']}"
        numbers = cell["kernels"]
        if cell["vocabulary"] == ALL:
            for name, number in numbers.items():
                if number > MOST_OF_A_KERNEL:
                    yield f"{where}: {number} of {name}, expected at most {MOST_OF_A_KERNEL}"
        elif (total := sum(numbers.values())) > MOST_OF_A_SERVER:
            yield f"{where}: {total} specialisations, expected at most {MOST_OF_A_SERVER}"
    for cell in record.get("calls", ()):
        if cell["aten_calls"] > (most := cell["tensors"] + OTHER_ATEN_CALLS):
            where = f"{cell['outputs']} {cell['adaptor']}"
            yield f"{where}: {cell['aten_calls']} aten calls, expected at most {most}"
