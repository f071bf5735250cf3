"""Reads the machine code of a compiled Triton kernel with the tools that Triton brings along."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# KiB of shared memory that a block may have: CUDA's table of compute capabilities
SHARED_KIB = {80: 163, 90: 227, 100: 227}
LEAST_LOOP = 4  # instructions; less is a wait, or what stands behind the end of the code

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([^;]*?)\s*;")
_LABEL = re.compile(r"^\s*(\.L_\w+):")
_PLACE = re.compile(r'//## File "([^"]*)", line (\d+)')
_TARGET = re.compile(r"`\((\.L_\w+)\)")


class Place(NamedTuple):
    """A line of a source file."""

    file: str
    line: int


class Instruction(NamedTuple):
    """An instruction without its predicate, and the lines that it comes from, innermost first."""

    text: str
    places: tuple[Place, ...]

    @property
    def name(self) -> str:
        """LDG for LDG.E.128."""
        return re.split(r"[. ]", self.text, maxsplit=1)[0]

    @property
    def loaded_bytes(self) -> int:
        """The bytes that a thread loads from global memory."""
        if self.name != "LDG":
            return 0
        modifiers = self.text.split()[0].split(".")[1:]
        widths = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
        return next((widths[x] for x in modifiers if x in widths), 4)


class Code(NamedTuple):
    """The instructions of a kernel, and where each label stands among them."""

    instructions: list[Instruction]
    labels: dict[str, int]

    def target(self, at: int) -> int | None:
        """Where a branch goes; None for other instructions."""
        found = _TARGET.search(self.instructions[at].text)
        return self.labels.get(found[1]) if found else None

    def loops(self) -> list[range]:
        """The natural loops, each from the target of a branch backwards to that branch."""
        found = []
        for at, instruction in enumerate(self.instructions):
            first = self.target(at) if instruction.name == "BRA" else None
            if first is not None and first + LEAST_LOOP <= at + 1:
                found.append(range(first, at + 1))
        return found


class Demand(NamedTuple):
    """What the machine code of a kernel is and needs."""

    registers: int
    stack: int  # bytes
    local: int  # bytes
    shared: int  # bytes
    fused: int  # float32 multiplications and additions in one instruction of PTX
    fused_double: int
    # read from the instructions
    spills: int | None = None  # that move to or from local memory
    barriers: int | None = None  # that wait for the other warps of the block
    instructions: int | None = None
    per_logit: float | None = None  # a logit, in the loop that loads most, if one does
    # of a kernel that loads through descriptors
    copies: int | None = None  # instructions that load so
    products: int | None = None  # of a warp group, or of a multiprocessor, by tensor cores

    def complaints(self, target: int, exact: bool) -> Iterator[str]:
        """What must not be: memory of a thread's own, fused arithmetic, too much shared memory.

        Args:
            target: that it is compiled for.
            exact: whether float64 may not be fused either; CUDA's own e^x of float64 is.
        """
        for name in ("stack", "local", "spills"):
            if number := getattr(self, name):
                yield f"{name} {number}, expected none"
        most = SHARED_KIB[target] * 1024
        if self.shared > most:
            yield f"shared {self.shared}, expected at most {most}"
        for name in ("copies", "products"):
            if getattr(self, name) == 0:
                yield f"no {name} of the kind that this GPU has"
        if fused := self.fused + exact * self.fused_double:
            yield f"{fused} fused multiply-adds, expected none"


def code_of(cubin: bytes) -> Code:
    """The instructions of a binary, without padding."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    places: list[Place] = []
    fresh = False  # the places above belong to instructions that are read already
    for line in _tool("nvdisasm", cubin, "-c", "-gi").splitlines():
        if place := _PLACE.search(line):
            if fresh:
                places = []
            places.append(Place(place[1], int(place[2])))
            fresh = False
        elif label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := _INSTRUCTION.search(line):
            fresh = True
            if not found[2].startswith("NOP"):
                instructions.append(Instruction(found[2], tuple(places)))
    return Code(instructions, labels)


def demand_of(kernel: Any, code: Code | None = None, logit_bytes: int | None = None) -> Demand:
    """Reads the demands of a compiled kernel.

    Args:
        kernel: as `triton.compile` returns it.
        code: its instructions, if those are to be counted.
        logit_bytes: the size of a logit, of kernels that load logits.
    """
    cubin, ptx = kernel.asm["cubin"], kernel.asm["ptx"]
    usage = dict(re.findall(r"([A-Z]+):(\d+)", _tool("cuobjdump", cubin, "-res-usage")))
    demand = Demand(
        int(usage["REG"]),
        int(usage["STACK"]),
        int(usage["LOCAL"]),
        max(int(usage["SHARED"]), kernel.metadata.shared),
        ptx.count("fma.rn.f32"),
        ptx.count("fma.rn.f64"),
    )
    if code is None:
        return demand
    names = [x.name for x in code.instructions]
    if loads_through_descriptors(kernel):
        products = sum(name in ("HGMMA", "UTCHMMA") for name in names)
        demand = demand._replace(copies=names.count("UTMALDG"), products=products)
    return demand._replace(
        spills=sum(name in ("LDL", "STL") for name in names),
        barriers=names.count("BAR"),
        instructions=len(names),
        per_logit=logit_bytes and _per_logit(code, logit_bytes),
    )


def loads_through_descriptors(kernel: Any) -> bool:
    """Whether a compiled kernel has tensors loaded by the unit for that."""
    return "cp.async.bulk.tensor" in kernel.asm["ptx"]


def _per_logit(code: Code, logit_bytes: int) -> float | None:
    """Instructions a logit of the loop that loads most at a time, of loops without such a loop."""
    loads = {}
    for loop in code.loops():
        if loaded := sum(code.instructions[at].loaded_bytes for at in loop):
            loads[loop] = loaded
    inner = {
        loop: loaded
        for loop, loaded in loads.items()
        if not any(x != loop and x[0] >= loop[0] and x[-1] <= loop[-1] for x in loads)
    }
    if not inner:
        return None
    main = max(inner, key=lambda loop: (inner[loop], -len(loop)))
    return round(len(main) * logit_bytes / inner[main], 2)


def _tool(name: str, cubin: bytes, *options: str) -> str:
    """What a tool says of a binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        command = [str(TOOLS / name), *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
