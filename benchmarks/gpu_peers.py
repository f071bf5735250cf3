"""The others on a GPU: FlashInfer's samplers and vLLM's top-k/top-p kernels.

Each is made for one adaptor and one set of rows (N, V), float32. Neither has a temperature of its
own, so it gets rows that are divided already, outside its time. transformers' and the compiled
chain are those of `peers`, with the temperature inside.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from device_timing import DeviceCall
from fastadapt import Adaptor
from missing import MissingPeer
from peers import compiled_draw, stock_draw


class Peer(NamedTuple):
    """How a peer is made, where it runs, and whether it is also measured in a CUDA graph."""

    make: Callable[[Adaptor, Tensor], DeviceCall]
    adaptors: tuple[str, ...]
    batches: tuple[int, ...] | None = None
    in_graph: bool = False


def stock(adaptor: Adaptor, rows: Tensor) -> DeviceCall:
    """transformers' warpers, softmax, multinomial."""
    draw = stock_draw(adaptor)
    return DeviceCall(lambda turn: draw(rows))


def compiled(adaptor: Adaptor, rows: Tensor) -> DeviceCall:
    """`peers.nucleus`, softmax and multinomial through `torch.compile`."""
    draw = compiled_draw(adaptor, rows)
    return DeviceCall(lambda turn: draw(rows))


def flashinfer(adaptor: Adaptor, rows: Tensor) -> DeviceCall:
    """FlashInfer: one call where there is a top-k; otherwise its softmax and its top-p sampler.

    It is called without `indices`: with indices that name one row, as in its own benchmark, it
    would read that row only.
    """
    try:
        from flashinfer import sampling as api
    except ImportError as error:
        raise MissingPeer(f"flashinfer: {error}") from error
    scaled, top_p = _scaled(adaptor, rows), float(adaptor.top_p)

    def top_k_top_p(turn: int) -> object:
        return api.top_k_top_p_sampling_from_logits(
            scaled, int(adaptor.top_k), top_p, seed=0, offset=turn
        )

    def only_top_p(turn: int) -> object:
        return api.top_p_sampling_from_probs(api.softmax(scaled), top_p, seed=0, offset=turn)

    return DeviceCall(top_k_top_p if adaptor.top_k else only_top_p)


def vllm(adaptor: Adaptor, rows: Tensor) -> DeviceCall:
    """vLLM's Triton top-k/top-p mask, then softmax and the exponential race, as its sampler does.

    The mask is written into the logits; they are restored before each call, outside its time.
    """
    try:
        from vllm.v1.sample.ops.topk_topp_triton import apply_top_k_top_p_triton
    except ImportError as error:
        raise MissingPeer(f"vllm: {error}") from error
    mask: Any = apply_top_k_top_p_triton
    scaled, count = _scaled(adaptor, rows), len(rows)
    logits = scaled.clone()
    k = _on_rows(int(adaptor.top_k), 0, torch.int32, rows)
    p = _on_rows(float(adaptor.top_p), 1.0, torch.float32, rows)

    def draw(turn: int) -> object:
        probs = mask(logits, k, p).softmax(-1)
        noise = torch.empty_like(probs).exponential_()
        return probs.div_(noise).argmax(-1).view(count)

    return DeviceCall(draw, prepare=lambda: logits.copy_(scaled))


# FlashInfer's and vLLM's top-k and top-p; the slow ones in the cells that have a reference on the
# CPU.
GPU_PEERS = {
    "flashinfer": Peer(flashinfer, ("T+p", "T+k+p"), in_graph=True),
    "vllm": Peer(vllm, ("T+k", "T+p", "T+k+p"), in_graph=True),
    "stock": Peer(stock, ("T+p", "T+k+p", "everything")),
    "compiled": Peer(compiled, ("T+p",), batches=(64,)),  # each shape is compiled for long
}


def _scaled(adaptor: Adaptor, rows: Tensor) -> Tensor:
    """(N, V): the rows divided by the temperature."""
    return rows / float(adaptor.temperature)


def _on_rows(value: float, off: float, dtype: torch.dtype, rows: Tensor) -> Tensor | None:
    """(N,): the value of a knob for every row; None where it is off."""
    return (
        None if value == off else torch.full((len(rows),), value, dtype=dtype, device=rows.device)
    )
