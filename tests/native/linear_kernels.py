"""The kernels of a linear head for compile_kernels.py: their arguments are named tuples."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

from triton.compiler import ASTSource

from fastadapt._ops.linear.cuda import DOUBLE_TILE, TILE
from fastadapt._ops.triton import launch_linear, linear

FIELDS = {"tile_sum_kernel": linear.Kind, "tile_gradient_kernel": linear.Kind}
FIELDS |= {"mix_kernel": linear.Mix}
LAST = {"tile_sum_kernel": "kind", "tile_gradient_kernel": "kind", "mix_kernel": "mix"}


def variants(one: Callable[..., Any], dtype: str) -> Iterator[Any]:
    """Every kernel and set of options; `one(name, constants, options)` makes a variant."""
    double = {"DOUBLE": dtype == "fp64"}
    tile = {"BLOCK": DOUBLE_TILE if dtype == "fp64" else TILE}
    off = dict.fromkeys(linear.Kind._fields, False) | double | tile
    asked = ({}, {"BIASED": True, "CAPPED": True})
    for options in asked:
        kind = off | options
        for more in ({}, {"WEIGHTED": True, "KEEP": True}, {"WEIGHTED": True, "EXPS": True}):
            yield one("tile_sum_kernel", kind | more, launch_linear.BY_TILE)
        yield one("tile_gradient_kernel", kind, launch_linear.BY_TILE)
        if dtype not in ("fp32", "fp64"):
            yield one("tile_gradient_kernel", kind | {"KEEP": True}, launch_linear.BY_TILE)
    block = {"BLOCK": launch_linear.ROW_BLOCK}
    for factor, source in ((1, 0), (0, 1), (1, 1)):
        flags = {"FACTOR": bool(factor), "SOURCE": bool(source), "PLACES": False, "IN_PLACE": True}
        yield one("mix_kernel", flags | block, launch_linear.BY_ROW)
    for factor, places in itertools.product((False, True), repeat=2):
        flags = {"FACTOR": factor, "SOURCE": False, "PLACES": places, "IN_PLACE": False}
        yield one("mix_kernel", flags | block, launch_linear.BY_ROW)
    labels = {"BLOCK": launch_linear.LABEL_BLOCK}
    yield one("label_entry_kernel", labels, launch_linear.BY_ROW)
    yield one("dot_kernel", double | block, launch_linear.BY_ROW)


def source_of(name: str, dtype: str, constants: dict[str, int | bool], ones: bool) -> ASTSource:
    """What Triton compiles: products are wide, or those kept, in the type of the head."""
    kernel = getattr(linear, name)
    own, wide = f"*{dtype}", "*fp64" if dtype == "fp64" else "*fp32"
    types: dict[str, Any] = dict.fromkeys(("stats", "shrinks", "gains", "factors"), "*fp64")
    types |= dict.fromkeys(("exps", "kept", "source", "a", "b"), own)
    types |= dict.fromkeys(("index", "places", "labels"), "*i64")
    types |= dict.fromkeys(("kept_stride", "out_stride", "source_stride"), "i64")
    types |= {"a_stride": "i64", "b_stride": "i64", "width": "i32", "sums": wide}
    types |= {"rows": "i32", "first": "i32"}
    products = own if name == "tile_gradient_kernel" and constants["KEEP"] else wide
    types["tile"] = linear.Tile(products, "i64", "i32", "i32", "*i64", wide, "*fp64")
    types["out"] = "*fp64" if name == "dot_kernel" else own
    if name == "mix_kernel" and constants["IN_PLACE"]:
        types["out"] = wide
    constexprs: dict[Any, int | bool] = dict(constants)
    if name in FIELDS:
        at = kernel.arg_names.index(LAST[name])
        names = FIELDS[name]._fields
        types[LAST[name]] = FIELDS[name](*("constexpr" for _ in names))
        constexprs = {(at, i): constants[field] for i, field in enumerate(names)}
    else:
        types |= dict.fromkeys(constants, "constexpr")
    for at, argument in enumerate(kernel.arg_names if ones else ()):
        kinds = types[argument]
        if kinds in ("i32", "i64"):
            constexprs[(at,)] = 1
        elif isinstance(kinds, linear.Tile):
            constexprs |= {(at, i): 1 for i, kind in enumerate(kinds) if kind in ("i32", "i64")}
    return ASTSource(
        fn=kernel, signature={n: types[n] for n in kernel.arg_names}, constexprs=constexprs
    )
