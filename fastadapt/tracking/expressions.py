"""The arithmetic of the catalogue's expressions: numbers, names, calls, comparisons, + - * / **."""

import ast
import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any

_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
    ast.Lt: operator.lt,
}


def value_of(text: str, names: Mapping[str, Any]) -> Any:
    """Returns the value of an expression, whose names stand for numbers, tensors and functions."""
    return _value(_parsed(text), names)


@functools.lru_cache(maxsize=256)
def _parsed(text: str) -> ast.expr:
    """Returns the tree of an expression."""
    return ast.parse(text, mode="eval").body


def _value(node: ast.expr, names: Mapping[str, Any]) -> Any:
    """Returns the value of a part of an expression."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        return names[node.id]
    if isinstance(node, ast.Call):
        return _value(node.func, names)(*(_value(part, names) for part in node.args))
    if isinstance(node, ast.UnaryOp):
        return _OPERATORS[type(node.op)](_value(node.operand, names))
    if isinstance(node, ast.BinOp):
        sides = (_value(part, names) for part in (node.left, node.right))
        return _OPERATORS[type(node.op)](*sides)
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        sides = (_value(part, names) for part in (node.left, *node.comparators))
        return _OPERATORS[type(node.ops[0])](*sides)
    raise ValueError(f"expression: expected arithmetic, got {ast.unparse(node)}")
