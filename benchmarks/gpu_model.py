"""How long the kernels of a call may take on a GPU: a model that no GPU has calibrated.

A kernel takes the longest of: its bytes at the bandwidth; the instructions of all warps at the rate
at which multiprocessors issue them, in whole waves of blocks; one warp alone, which waits for the
result of each instruction that the next one needs. A launch and a call take their time beside that.

Of a linear head a product takes whole waves of blocks of its result, or its bytes if they take
longer, and the work on its rows its bytes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from machine_code import Code, Demand, Instruction
from statements import Stack, is_of_kernels, place_of, statements_of, to_text

# Cycles until a result can be used, by the name of an instruction; 5 for all others.
LATENCIES = {
    **{"LDG": 600, "ATOMG": 600, "LDS": 30, "ATOMS": 60, "BAR": 30, "SHFL": 24, "REDUX": 24},
    **{
        "MUFU": 24,
        "S2R": 20,
        "F2I": 16,
        "I2F": 16,
        "DADD": 16,
        "DMUL": 16,
        "DFMA": 16,
        "DSETP": 16,
    },
    **{"STS": 4, "STG": 4},
}
ENDS = ("BRA", "EXIT", "RET", "CALL", "BRX", "BREAK")
_REGISTER = re.compile(r"\b(UR|R|UP|P)(\d+)\b")


class Constants(NamedTuple):
    """A GPU with 132 multiprocessors, and what has been seen of such."""

    tb_per_s: float = 3.0
    ghz: float = 1.7
    multiprocessors: int = 132
    schedulers: int = 4  # of a multiprocessor
    issued: float = 0.7  # instructions a cycle and scheduler
    warps: int = 64  # of a multiprocessor, at most
    blocks: int = 32
    registers: int = 65_536
    shared: int = 227 * 1024
    reserved: int = 1024  # of shared memory, for each block
    launch_us: float = 2.0
    call_us: float = 1.5
    latency: int = 5  # cycles, of instructions that LATENCIES does not name


CONSTANTS = Constants()


class Products(NamedTuple):
    """Products of half precision on such a GPU, through cuBLAS and in a kernel of ours."""

    tflops: float = 700.0
    block: tuple[int, int] = 128, 256  # of a result, either way round, that a multiprocessor makes
    own_tflops: float = 600.0  # of ours, whose blocks the launch tells
    tb_per_s: float = 4.0  # between L2 and HBM: a tile is partly in the cache
    launch_us: float = 2.0  # of a product too

    def ideal_us(self, rows: int, columns: int, depth: int) -> float:
        """The bare product, of no waves and no bytes."""
        return 2 * rows * columns * depth / self.tflops / 1e6

    def product_us(self, rows: int, columns: int, depth: int, moved: float) -> float:
        """One through cuBLAS."""
        a, b = self.block
        waves = min(
            math.ceil(math.ceil(rows / x) * math.ceil(columns / y) / CONSTANTS.multiprocessors)
            for x, y in ((a, b), (b, a))
        )
        whole = self.ideal_us(a * waves * CONSTANTS.multiprocessors, b, depth)
        return max(whole, self.moved_us(moved))

    def own_us(self, blocks: int, programs: int, block: int, depth: int, moved: float) -> float:
        """One of ours: programs that stay, each making blocks of so many numbers in turn."""
        a_program = 2 * math.ceil(blocks / programs) * block * depth
        together = max(programs, CONSTANTS.multiprocessors)
        return max(a_program * together / self.own_tflops / 1e6, self.moved_us(moved))

    def moved_us(self, moved: float) -> float:
        """So many bytes."""
        return moved / self.tb_per_s / 1e6


PRODUCTS = Products()


class Block(NamedTuple):
    """Instructions that run one after the other."""

    instructions: int
    latency: int  # cycles of one warp alone
    stacks: dict[str, int]  # how many instructions come from each statement


class Kernel(NamedTuple):
    """What the model needs of a compiled kernel."""

    blocks: list[Block]
    demand: Demand
    warps: int  # of a block


class Time(NamedTuple):
    """The three times of a kernel, microseconds."""

    bytes: float
    issue: float
    latency: float


def blocks_of(code: Code, constants: Constants = CONSTANTS) -> list[Block]:
    """Cuts code at labels and after branches."""
    instructions = code.instructions
    after = {at + 1 for at, x in enumerate(instructions) if x.name in ENDS}
    cuts = sorted({0, len(instructions), *code.labels.values(), *after})
    blocks = []
    for first, last in zip(cuts, cuts[1:], strict=False):
        part = instructions[first:last]
        stacks: dict[str, int] = {}
        for instruction in part:
            if stack := _stack_of(instruction):
                text = to_text(stack)
                stacks[text] = stacks.get(text, 0) + 1
        blocks.append(Block(len(part), _latency(part, constants), stacks))
    return blocks


def _stack_of(instruction: Instruction) -> Stack:
    """The statements of kernels that an instruction comes from; of functions, who calls them."""
    places = (place_of(*x) for x in instruction.places if is_of_kernels(x.file))
    found = tuple(places)
    while found and found[0][1] in statements_of(found[0][0]).functions:
        found = found[1:]
    return found


def _latency(part: Sequence[Instruction], constants: Constants) -> int:
    """Cycles of one warp: one instruction a cycle, each after what it needs."""
    ready: dict[str, int] = {}
    now = 0
    for instruction in part:
        operands = instruction.text.partition(" ")[2].split(",")
        writes = instruction.name not in ("STG", "STS", "BAR", *ENDS)
        read = ",".join(operands[1:] if writes else operands)
        now = max([now + 1, *(ready.get(x[0], 0) for x in _REGISTER.finditer(read))])
        took = LATENCIES.get(instruction.name, constants.latency)
        if instruction.name == "BAR":
            now += took
        for x in _REGISTER.finditer(operands[0]) if writes else ():
            for other in range(
                4 if "128" in instruction.text else 2 if "64" in instruction.text else 1
            ):
                ready[f"{x[1]}{int(x[2]) + other}"] = now + took
    return max([now, *ready.values()])


def executed(block: Block, counts: Mapping[str, float]) -> float:
    """How often a block runs: the mean over its instructions of how often their statements do."""
    known = sum(block.stacks.values())
    if not known:
        return 1.0
    return sum(number * counts.get(stack, 0.0) for stack, number in block.stacks.items()) / known


def time_of(
    kernel: Kernel,
    programs: int,
    moved: float,
    mean: Mapping[str, float],
    longest: Mapping[str, float],
    constants: Constants = CONSTANTS,
) -> Time:
    """The times of a launch.

    Args:
        kernel: that is launched.
        programs: how many of it.
        moved: bytes from and to global memory.
        mean: how often statements run in a program, on average.
        longest: and in the program that runs most.
        constants: of the GPU.
    """
    c, demand = constants, kernel.demand
    together = max(
        1,
        min(
            c.blocks,
            c.warps // kernel.warps,
            c.registers // (32 * kernel.warps * max(1, 8 * math.ceil(demand.registers / 8))),
            (c.shared + c.reserved) // (demand.shared + c.reserved),
        ),
    )
    together = min(together, math.ceil(programs / c.multiprocessors))
    waves = math.ceil(programs / (c.multiprocessors * together))
    instructions = sum(x.instructions * executed(x, mean) for x in kernel.blocks)
    cycles = waves * instructions * together * kernel.warps / (c.schedulers * c.issued)
    latency = sum(x.latency * executed(x, longest) for x in kernel.blocks)
    return Time(moved / c.tb_per_s / 1e6, cycles / c.ghz / 1e3, latency / c.ghz / 1e3)
