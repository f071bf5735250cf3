"""Where the statements of the GPU's kernels stand, for a trace and for machine code."""

from __future__ import annotations

import ast
import functools
from pathlib import Path
from typing import NamedTuple

from fastadapt._ops import triton as kernels

FOLDER = Path(kernels.__file__).parent
Place = tuple[str, int]  # name of a file of kernels, first line of a statement
Stack = tuple[
    Place, ...
]  # a statement, and where each function around it was called, innermost first


class Statements(NamedTuple):
    """The statements of a file: of each line, and the loops that the compiler unrolls."""

    of_line: dict[int, int]  # the first line of the innermost statement of a line
    unrolled: dict[int, list[tuple[int, int]]]  # of a statement: loops around, first in their body
    functions: frozenset[int]  # lines of definitions


@functools.cache
def is_of_kernels(file: str) -> bool:
    """Whether a path is that of a file of kernels, of this clone or another."""
    return Path(file).parts[-4:-1] == FOLDER.parts[-3:]


@functools.cache
def statements_of(name: str) -> Statements:
    """Reads the statements of a file of kernels."""
    tree = ast.parse((FOLDER / name).read_text(encoding="utf-8"))
    of_line: dict[int, int] = {}
    unrolled: dict[int, list[tuple[int, int]]] = {}
    functions = set()
    for node in ast.walk(tree):  # from the outer ones to the inner ones
        if not isinstance(node, ast.stmt):
            continue
        first = min([node.lineno, *(x.lineno for x in getattr(node, "decorator_list", ()))])
        for line in range(first, (node.end_lineno or first) + 1):
            of_line[line] = node.lineno
        if isinstance(node, ast.FunctionDef):
            functions.add(node.lineno)
        if isinstance(node, ast.For) and "static_range" in ast.unparse(node.iter):
            loop = node.lineno, node.body[0].lineno
            for inside in (x for x in ast.walk(node) if isinstance(x, ast.stmt) and x is not node):
                unrolled.setdefault(inside.lineno, []).append(loop)
    return Statements(of_line, unrolled, frozenset(functions))


def place_of(file: str, line: int) -> Place:
    """The statement at a line of a file of kernels."""
    name = Path(file).name
    return name, statements_of(name).of_line.get(line, line)


def to_text(stack: Stack) -> str:
    """A stack as a key in JSON."""
    return " ".join(f"{name}:{line}" for name, line in stack)
