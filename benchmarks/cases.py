"""What the sampling benchmarks run on: the grids, the adaptors and the rows of logits.

The rows of a model, which need more packages, are in `real_rows`.
"""

from __future__ import annotations

from collections.abc import Sequence

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


def study_adaptors() -> list[Adaptor]:
    """The 31 adaptors of the probability-quality study: six truncations at five temperatures, 1."""
    truncations: list[dict[str, float]] = [
        {"top_k": 30},
        {"top_k": 50},
        {"top_p": 0.9},
        {"top_p": 0.95},
        {"typical_p": 0.9},
        {"eta_cutoff": 9e-4},
    ]
    temperatures = (0.5, 0.75, 1.0, 1.25, 1.5)
    grid = [Adaptor(temperature=t, **knobs) for t in temperatures for knobs in truncations]
    return [*grid, Adaptor()]


def make_rows(
    kind: str, vocabulary: int, batch: int, *, seed: int, real: Tensor | None = None
) -> list[Tensor]:
    """Make the sets of rows of a cell.

    Args:
        kind: a key of `ROWS` or `GPU_ROWS`.
        vocabulary: V.
        batch: N.
        seed: of everything that is random here.
        real: (M, W), what `real_logits` returned; only the kind "real" needs it.

    Returns:
        `SETS` tensors (N, V), float32, contiguous, with memory of their own; one where a set is
        large.
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


def chosen(names: Sequence[str] | None, known: Sequence[str]) -> list[str]:
    """The names asked for, in the order of the known ones; all of them where none is asked for."""
    return [name for name in known if names is None or name in names]
