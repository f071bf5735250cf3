"""The others: transformers' chain, a compiled chain of plain PyTorch, llama.cpp's sampler chain.

Each is made for one adaptor and takes rows (N, V), float32; what its time includes is said where it
is made. A peer that this machine lacks is not replaced by another: making it raises `MissingPeer`.
Those of the losses are in `loss_peers`.

On a GPU there are FlashInfer's samplers and vLLM's top-k/top-p kernels too. Neither has a
temperature of its own, so it gets rows that are divided already, outside its time; those of
transformers' and the compiled chain have the temperature inside.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor

from device_timing import DeviceCall
from fastadapt import Adaptor
from fastadapt._cli.measure import stock_chain
from missing import MissingPeer, compiled, found

_NO_IDS = torch.empty(1, 0, dtype=torch.int64)

Draw = Callable[[Tensor], Tensor]


def stock_draw(adaptor: Adaptor, rows: Tensor | None = None) -> Draw:
    """transformers' warpers, softmax, multinomial, as its generation loop does them."""
    chain: Any = stock_chain(adaptor)
    return lambda rows: chain(_NO_IDS, rows).softmax(-1).multinomial(1)[:, 0]


def nucleus(rows: Tensor, temperature: float, top_p: float) -> Tensor:
    """(N, V): the scaled logits with all outside the nucleus at -inf, in plain PyTorch.

    A token stays while the mass above it is below `top_p` (Holtzman et al. 2020).
    """
    scaled = rows / temperature
    ordered, ids = scaled.sort(-1, descending=True)
    mass = ordered.softmax(-1)
    outside = mass.cumsum(-1) - mass >= top_p
    return scaled.masked_fill(outside.scatter(-1, ids, outside), -math.inf)


def compiled_draw(adaptor: Adaptor, rows: Tensor) -> Draw:
    """`nucleus`, softmax and multinomial through `torch.compile`, compiled for the rows' shape."""
    temperature, top_p = float(adaptor.temperature), float(adaptor.top_p)
    if adaptor != Adaptor(temperature=temperature, top_p=top_p):
        raise MissingPeer(f"the compiled chain has temperature and top-p, not {adaptor!r}")

    def draw(rows: Tensor) -> Tensor:
        return nucleus(rows, temperature, top_p).softmax(-1).multinomial(1)[:, 0]

    call: Draw = compiled(draw, lambda call: call(rows))
    return call


class LlamaChain:
    """llama.cpp's chain temperature, top-k, top-p, draw; it has no batch, so rows go one by one.

    The time includes filling its array of (id, logit, p), which NumPy does and which each draw
    needs anew because the chain sorts and cuts the array, and one call through ctypes per row.
    llama.cpp has no epsilon and no eta; only temperature, top_k and top_p count, so it does less.
    """

    def __init__(self, adaptor: Adaptor, vocabulary: int, *, seed: int) -> None:
        if importlib.util.find_spec("llama_cpp") is None:
            raise MissingPeer("llama-cpp-python is not installed")
        from llama_cpp import llama_cpp as api

        self._api: Any = api
        self._chain = api.llama_sampler_chain_init(api.llama_sampler_chain_default_params())
        for link in (
            api.llama_sampler_init_temp(float(adaptor.temperature)),
            api.llama_sampler_init_top_k(int(adaptor.top_k)),
            api.llama_sampler_init_top_p(float(adaptor.top_p), 1),
            api.llama_sampler_init_dist(seed),
        ):
            api.llama_sampler_chain_add(self._chain, link)
        self._empty = numpy.zeros(
            vocabulary, dtype=[("id", numpy.int32), ("logit", numpy.float32), ("p", numpy.float32)]
        )
        self._empty["id"] = numpy.arange(vocabulary)
        self._items = self._empty.copy()
        self._data = self._items.ctypes.data_as(ctypes.POINTER(api.llama_token_data))

    def __call__(self, rows: Tensor) -> Tensor:
        """Draw one token per row."""
        return torch.tensor([self._draw(row)[0] for row in rows.numpy()])

    def kept(self, row: Tensor) -> set[int]:
        """The ids that are left after the chain has run on one row, (V,)."""
        size = self._draw(row.numpy())[1]
        return set(self._items["id"][:size].tolist())

    def close(self) -> None:
        """Free the chain."""
        self._api.llama_sampler_free(self._chain)

    def _draw(self, row: Any) -> tuple[int, int]:
        """The token drawn from one row and the number of tokens kept."""
        self._items[:] = self._empty
        self._items["logit"] = row
        array = self._api.llama_token_data_array(self._data, len(row), -1, False)
        self._api.llama_sampler_apply(self._chain, ctypes.byref(array))
        return int(self._items["id"][array.selected]), int(array.size)


def stock_score(rows: Tensor, tokens: Tensor, adaptors: Sequence[Adaptor]) -> tuple[Tensor, Tensor]:
    """Log-probabilities and kept counts, (N, A) each, by transformers' warpers in a loop."""
    logprobs, kept = [], []
    for adaptor in adaptors:
        chain: Any = stock_chain(adaptor)
        scores = chain(_NO_IDS, rows)
        logprobs.append(scores.log_softmax(-1).gather(-1, tokens[:, None])[:, 0])
        kept.append((scores > -math.inf).sum(-1))
    return torch.stack(logprobs, -1), torch.stack(kept, -1)


class GpuPeer(NamedTuple):
    """How a peer is made, where it runs, and whether it is also measured in a CUDA graph."""

    make: Callable[[Adaptor, Tensor], DeviceCall]
    adaptors: tuple[str, ...]
    batches: tuple[int, ...] | None = None
    in_graph: bool = False


def on_gpu(make: Callable[[Adaptor, Tensor], Draw]) -> Callable[[Adaptor, Tensor], DeviceCall]:
    """How one that runs on any device is made for rows on a GPU."""

    def made(adaptor: Adaptor, rows: Tensor) -> DeviceCall:
        draw = make(adaptor, rows)
        return DeviceCall(lambda turn: draw(rows))

    return made


def flashinfer(adaptor: Adaptor, rows: Tensor) -> DeviceCall:
    """FlashInfer: one call where there is a top-k; otherwise its softmax and its top-p sampler.

    It is called without `indices`: with indices that name one row, as in its own benchmark, it
    would read that row only.
    """
    api = found("flashinfer.sampling", "flashinfer")
    scaled, top_p = rows / float(adaptor.temperature), float(adaptor.top_p)

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
    mask = found("vllm.v1.sample.ops.topk_topp_triton:apply_top_k_top_p_triton", "vllm")
    scaled, count = rows / float(adaptor.temperature), len(rows)
    logits = scaled.clone()
    k = torch.full((count,), int(adaptor.top_k), dtype=torch.int32, device=rows.device)
    p = torch.full((count,), float(adaptor.top_p), device=rows.device)
    knobs = k if adaptor.top_k else None, p if adaptor.top_p != 1 else None

    def draw(turn: int) -> object:
        probs = mask(logits, *knobs).softmax(-1)
        noise = torch.empty_like(probs).exponential_()
        return probs.div_(noise).argmax(-1).view(count)

    return DeviceCall(draw, prepare=lambda: logits.copy_(scaled))


# FlashInfer's and vLLM's top-k and top-p; the slow ones in the cells that have a reference on the
# CPU.
GPU_PEERS = {
    "flashinfer": GpuPeer(flashinfer, ("T+p", "T+k+p"), in_graph=True),
    "vllm": GpuPeer(vllm, ("T+k", "T+p", "T+k+p"), in_graph=True),
    "stock": GpuPeer(on_gpu(stock_draw), ("T+p", "T+k+p", "everything")),
    # each shape is compiled for long
    "compiled": GpuPeer(on_gpu(compiled_draw), ("T+p",), batches=(64,)),
}
