"""The operator under `linear_support_log_odds`: products of each row with its own rows of a head.

The pairs of row and id stand in compressed rows. What is summed is summed pair by pair in one order
by one thread: by ascending ids for the hidden states, by ascending rows for the head.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastadapt._ops.common import device_of, no_double_backward
from fastadapt._ops.linear.cpu import CpuWork, dot, mix
from fastadapt._ops.lists import ends_of, rows_of

BLOCK_NUMBERS = 1 << 18  # of the wide sums of ids' gradients that are made at once

_library = torch.library.Library("fastadapt", "FRAGMENT")
_PROBLEM = "Tensor hidden, Tensor weight, Tensor ids, Tensor offsets"
_library.define(f"support_products({_PROBLEM}, *, bool sparse) -> Tensor")
_library.define(
    f"support_products_backward(Tensor dproducts, {_PROBLEM}, *, bool[] wanted, bool sparse)"
    " -> (Tensor, Tensor, Tensor)"
)


def _products(
    hidden: Tensor, weight: Tensor, ids: Tensor, offsets: Tensor, *, sparse: bool
) -> Tensor:
    """hidden (N, H) times rows of the weight (V, H), (count,) float64 of float32 sums."""
    out = hidden.new_empty(ids.shape[0], dtype=torch.float64)
    if hidden.is_cuda:
        with device_of(hidden):
            _launches().dot(hidden, weight, rows_of(offsets.diff(), ids.shape[0]), ids, out)
    else:
        dot(hidden, weight, ids, out, offsets=offsets)
    return out


def _backward(
    dproducts: Tensor,
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    offsets: Tensor,
    *,
    wanted: list[bool],
    sparse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of hidden states and weight, and the ids that a sparse one has rows of.

    Pairs without an upstream gradient are dropped: those of tokens without a reward.
    """
    rows = rows_of(offsets.diff(), ids.shape[0])
    some = dproducts.nonzero()[:, 0]
    gain, ids, rows = dproducts[some], ids[some], rows[some]
    offsets = ends_of(rows.bincount(minlength=hidden.shape[0]))
    dhidden, dweight, found = _zeros(hidden, weight, wanted, sparse)
    if wanted[0]:
        places = torch.arange(hidden.shape[0], device=ids.device)
        _sum_parts(weight, gain, ids, offsets, places, dhidden)
    if wanted[1]:
        by_id, order = ids.sort(stable=True)
        gain, rows = gain[order], rows[order]
        found, counts = by_id.unique_consecutive(return_counts=True)
        ends = ends_of(counts)
        if sparse:
            dweight = weight.new_empty(found.shape[0], weight.shape[1])
        places = torch.arange(found.shape[0], device=ids.device) if sparse else found
        _sum_parts(hidden, gain, rows, ends, places, dweight)
    return dhidden, dweight, found if sparse else found[:0]


def _sum_parts(
    source: Tensor, gain: Tensor, index: Tensor, offsets: Tensor, places: Tensor, out: Tensor
) -> None:
    """Writes out[places[p]], the sum of gain[k] source[index[k]] over part p of a list."""
    if source.is_cuda:
        with device_of(source):
            _launches().mix(source, gain, index, offsets, places, out)
        return
    h = source.shape[1]
    block = max(1, BLOCK_NUMBERS // h)
    wide = torch.promote_types(source.dtype, torch.float32)
    buffer = source.new_empty(min(block, places.shape[0]), h, dtype=wide)
    for first in range(0, places.shape[0], block):
        some = places[first : first + block]
        sums = buffer[: some.shape[0]].zero_()
        mix(sums, source, gain=gain, index=index, offsets=offsets[first:])
        CpuWork.scatter(sums, None, some, out)


def _launches() -> ModuleType:
    """Those for CUDA tensors."""
    from fastadapt._ops.triton.supports import launch

    return launch


def _zeros(
    hidden: Tensor, weight: Tensor, wanted: list[bool], sparse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Those of the gradients that are wanted, a sparse one without rows, and no ids."""
    dense = wanted[1] and not sparse
    return (
        hidden.new_zeros(hidden.shape if wanted[0] else (0, hidden.shape[1])),
        weight.new_zeros(weight.shape if dense else (0, weight.shape[1])),
        hidden.new_empty(0, dtype=torch.int64),
    )


def _fake_products(
    hidden: Tensor, weight: Tensor, ids: Tensor, offsets: Tensor, *, sparse: bool
) -> Tensor:
    """What the forward returns."""
    return hidden.new_empty(ids.shape[0], dtype=torch.float64)


def _fake_backward(
    dproducts: Tensor,
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    offsets: Tensor,
    *,
    wanted: list[bool],
    sparse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the backward returns; how many ids there are depends on them."""
    dhidden, dweight, found = _zeros(hidden, weight, wanted, sparse)
    if wanted[1] and sparse:
        found = hidden.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64)
        dweight = weight.new_empty(found.shape[0], weight.shape[1])
    return dhidden, dweight, found


def _save(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor
) -> None:
    """Keeps the inputs."""
    ctx.save_for_backward(*inputs)
    ctx.sparse = keyword_only_inputs["sparse"]


def _gradient(ctx: Any, dproducts: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of hidden states and weight, each only when wanted."""
    wanted = list(ctx.needs_input_grad[:2])
    hidden, weight, ids, offsets = ctx.saved_tensors
    dhidden, dweight, found = torch.ops.fastadapt.support_products_backward(
        dproducts, hidden, weight, ids, offsets, wanted=wanted, sparse=ctx.sparse
    )
    if wanted[1] and ctx.sparse:
        dweight = torch.sparse_coo_tensor(
            found[None], dweight, weight.shape, check_invariants=False, is_coalesced=True
        )
    return dhidden if wanted[0] else None, dweight if wanted[1] else None, None, None


def _register() -> None:
    """Implementations, fakes and autograd."""
    for name, function, fake in (
        ("support_products", _products, _fake_products),
        ("support_products_backward", _backward, _fake_backward),
    ):
        for device in ("CPU", "CUDA"):
            _library.impl(name, function, device)
        torch.library.register_fake(f"fastadapt::{name}", fake, lib=_library)
    torch.library.register_autograd(
        "fastadapt::support_products", _gradient, setup_context=_save, lib=_library
    )
    torch.library.register_autograd(
        "fastadapt::support_products_backward",
        no_double_backward("support log-odds"),
        lib=_library,
    )


_register()
support_products = torch.ops.fastadapt.support_products
