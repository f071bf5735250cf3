"""What the benchmarks run on: grids, adaptors, rows of logits, hidden states and heads.

The rows of a model, which need more packages, are in `real_rows`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastadapt import Adaptor

# Llama-2, GPT-2, Llama-3, Qwen-2.5 and Gemma-3
VOCABULARIES = (32_000, 50_257, 128_256, 151_936, 262_144)
BATCHES = (1, 8, 64)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ADAPTORS = {
    "T": Adaptor(temperature=0.8),
    "T+p": Adaptor(temperature=0.8, top_p=0.9),
    "T+k+p+eps": Adaptor(temperature=0.8, top_k=50, top_p=0.9, epsilon_cutoff=3e-4),
    "typical": Adaptor(typical_p=0.9),
    "eta": Adaptor(eta_cutoff=9e-4),
    "everything": Adaptor(
        temperature=0.8,
        top_k=200,
        top_p=0.95,
        min_p=0.02,
        typical_p=0.95,
        epsilon_cutoff=3e-4,
        eta_cutoff=9e-4,
    ),
}
ROWS = {
    "normal1": "standard normal",
    "normal3": "3 x standard normal",
    "flat": "all equal",
    "ties": "3 x standard normal, rounded to bfloat16 also where rows are float32",
    "real": "next-token logits of SmolLM2-135M-Instruct",
}
# On a GPU every knob alone matters, since each has a kernel's variant, and so do ties: rows of two
# levels hold no threshold that does not cut one.
GPU_VOCABULARIES = (128_256, 32_000, 262_144)
GPU_BATCHES = (64, 512, 1, 8)
GPU_ADAPTORS = {
    "T+k+p": Adaptor(temperature=0.8, top_k=50, top_p=0.9),
    "T": ADAPTORS["T"],
    "T+k": Adaptor(temperature=0.8, top_k=50),
    "T+p": ADAPTORS["T+p"],
    "min-p": Adaptor(min_p=0.02),
    "typical": ADAPTORS["typical"],
    "epsilon": Adaptor(epsilon_cutoff=3e-4),
    "eta": ADAPTORS["eta"],
    "everything": ADAPTORS["everything"],
}
GPU_ROWS = {
    "normal3": ROWS["normal3"],
    "flat": ROWS["flat"],
    "levels": "0 or 1.5, one as often as the other",
}
# Sets of rows that take turns, so that neither caches nor branch predictors learn one row.
SETS = 4
_MANY_BYTES = 8 << 20  # above this a set has rows enough of its own


def make_rows(
    kind: str, vocabulary: int, batch: int, *, seed: int, real: Tensor | None = None
) -> list[Tensor]:
    """Make `SETS` tensors (N, V) of one kind, float32, contiguous; one where a set is large.

    Rows of the kind "real" are made of those that `find_real_rows` returned, (M, W).
    """
    generator = torch.Generator().manual_seed(seed)
    sets = SETS if 4 * batch * vocabulary <= _MANY_BYTES else 1
    return [_one_set(kind, vocabulary, batch, generator, real) for _ in range(sets)]


def _one_set(kind: str, v: int, n: int, generator: torch.Generator, real: Tensor | None) -> Tensor:
    """(N, V) float32 rows of one kind."""
    if kind == "flat":
        return torch.full((n, v), 1.5)
    if kind == "levels":
        return torch.randint(2, (n, v), generator=generator).mul(1.5)
    if kind == "real":
        if real is None:
            raise ValueError("rows 'real': expected the model's logits, got None")
        return _of_width(real[torch.randint(len(real), (n,), generator=generator)], v, generator)
    rows = torch.randn(n, v, generator=generator).mul_(1 if kind == "normal1" else 3)
    return rows.bfloat16().float() if kind == "ties" else rows


def _of_width(rows: Tensor, v: int, generator: torch.Generator) -> Tensor:
    """Rows of another vocabulary.

    A narrower one has the first ids (of a byte-pair vocabulary, the common ones). A wider one gets
    further tokens drawn from the lower half of the row's own values, so the tail grows longer and
    the head, which decides the support, stays.
    """
    n, width = rows.shape
    if v <= width:
        return rows[:, :v].clone()
    low = rows.sort(-1).values[:, : width // 2]
    more = torch.randint(width // 2, (n, v - width), generator=generator)
    return torch.cat([rows, low.gather(-1, more)], -1)


class LossInputs(NamedTuple):
    """What the benchmarks of losses compute on."""

    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    labels: Tensor  # (N,)
    upstream: Tensor  # (N,), of both signs
    reference: Tensor  # (pairs,): the reference's log-ratio of each pair of sequences

    def wanted(self) -> list[Tensor]:
        """What gets gradients."""
        return [x for x in (self.hidden, self.weight) if x.requires_grad]


def make_loss_inputs(
    n: int,
    h: int,
    v: int,
    dtype: torch.dtype,
    *,
    frozen: bool,
    seed: int,
    device: str = "cpu",
    pairs: int = 0,
) -> LossInputs:
    """Hidden states and head of standard normals, logits of variance 1."""
    generator = torch.Generator(device).manual_seed(seed)
    place: dict[str, Any] = {"generator": generator, "device": device}
    hidden = torch.randn(n, h, **place).to(dtype)
    weight = torch.empty(v, h, dtype=dtype, device=device)
    for rows in weight.split(4096):  # no float32 copy of the whole
        rows.copy_(torch.randn(rows.shape, **place) / h**0.5)
    labels = torch.randint(v, (n,), **place)
    upstream, reference = torch.randn(n, **place), torch.randn(pairs, **place)
    weight.requires_grad_(not frozen)
    return LossInputs(hidden.requires_grad_(), weight, labels, upstream, reference)
