"""The others: transformers' chain, a compiled chain of plain PyTorch, llama.cpp's sampler chain.

Each is made for one adaptor and takes rows (N, V), float32; what its time includes is said where it
is made. A peer that this machine lacks is not replaced by another: making it raises `MissingPeer`.
Those of the losses are in `loss_peers`.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

from fastadapt import Adaptor
from fastadapt._cli.measure import stock_chain
from missing import MissingPeer

_NO_IDS = torch.empty(1, 0, dtype=torch.int64)

Draw = Callable[[Tensor], Tensor]


def stock_draw(adaptor: Adaptor) -> Draw:
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
    """`nucleus`, softmax and multinomial through `torch.compile`, compiled for the rows' shape.

    Raises:
        MissingPeer: there is no C++ compiler, or the compiler cannot do it.
    """
    temperature, top_p = float(adaptor.temperature), float(adaptor.top_p)
    if adaptor != Adaptor(temperature=temperature, top_p=top_p):
        raise MissingPeer(f"the compiled chain has temperature and top-p, not {adaptor!r}")

    def draw(rows: Tensor) -> Tensor:
        return nucleus(rows, temperature, top_p).softmax(-1).multinomial(1)[:, 0]

    from torch._inductor.exc import InductorError  # takes 3 s, in each process

    torch.compiler.reset()
    compiled: Draw = torch.compile(draw, dynamic=False)
    try:
        compiled(rows)
    except InductorError as error:
        raise MissingPeer(f"torch.compile: {str(error).strip().splitlines()[0]}") from error
    return compiled


class LlamaChain:
    """llama.cpp's chain temperature, top-k, top-p, draw; it has no batch, so rows go one by one.

    The time includes filling its array of (id, logit, p), which NumPy does and which each draw
    needs anew because the chain sorts and cuts the array, and one call through ctypes per row.
    llama.cpp has no epsilon and no eta; the knob epsilon is left out, so it does less work.

    Args:
        adaptor: temperature, top_k and top_p count.
        vocabulary: V.
        seed: of its generator.

    Raises:
        MissingPeer: llama-cpp-python is not installed.
    """

    def __init__(self, adaptor: Adaptor, vocabulary: int, *, seed: int) -> None:
        """Build the chain and the array."""
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
