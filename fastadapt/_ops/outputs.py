"""Allocates the outputs of the operators, for every device and for the fakes."""

import torch
from torch import Tensor

from fastadapt._C import NUM_STATS

Scores = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
LogOdds = tuple[Tensor, Tensor, Tensor]
Pair = tuple[Tensor, Tensor]
Verification = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
SampleFields = tuple[Tensor, Tensor, Tensor, Tensor, *tuple[Tensor | None, ...]]


def sample_outputs(logits: Tensor, base: bool, log_mass: bool, top_n: int) -> list[Tensor]:
    """Allocates the four outputs of every draw and those asked for, in the order of `Sample`."""
    n = logits.shape[0]
    out = [
        logits.new_empty(n, dtype=torch.int64),
        logits.new_empty(n, dtype=torch.float32),
        logits.new_empty(n, dtype=torch.int32),
        logits.new_empty(n, dtype=torch.uint8),
    ]
    out += [logits.new_empty(n, dtype=torch.float32) for wanted in (base, log_mass) if wanted]
    if top_n:
        out.append(logits.new_empty(n, top_n, dtype=torch.int64))
        out.append(logits.new_empty(n, top_n, dtype=torch.float32))
        out.append(logits.new_empty(n, dtype=torch.int32))
    return out


def sample_fields(out: list[Tensor], base: bool, log_mass: bool, top_n: int) -> SampleFields:
    """Returns the nine fields of `Sample`, None for those not asked for."""
    tokens, logprobs, kept, status, *asked = out
    if not asked:  # the host's part of a call on a few rows
        return tokens, logprobs, kept, status, None, None, None, None, None
    optional = iter(asked)
    wanted = (base, log_mass, *(top_n > 0,) * 3)
    given = (next(optional) if field else None for field in wanted)
    return tokens, logprobs, kept, status, *given


def score_outputs(logits: Tensor, adaptors: int) -> Scores:
    """Allocates outputs in the order of `Score`."""
    n = logits.shape[0]
    return (
        logits.new_empty(n, adaptors, dtype=torch.float32),
        logits.new_empty(n, adaptors, dtype=torch.float32),
        logits.new_empty(n, adaptors, dtype=torch.int32),
        logits.new_empty(n, dtype=torch.float32),
        logits.new_empty(n, dtype=torch.float32),
    )


def log_odds_outputs(logits: Tensor) -> LogOdds:
    """Allocates log-odds, the support as bits, and maximum and mass of the other survivors."""
    n, v = logits.shape
    return (
        logits.new_empty(n, dtype=torch.promote_types(logits.dtype, torch.float32)),
        logits.new_empty(n, (v + 7) // 8, dtype=torch.uint8),
        logits.new_empty(n, 2, dtype=torch.float64),
    )


def logits_gradient(dlog_odds: Tensor, logits: Tensor, *_: object) -> Tensor:
    """An empty gradient, the output of a backward of these arguments."""
    return logits.new_empty(logits.shape)


def edited_gradients(logits: Tensor, columns: Tensor | None, of_values: bool) -> Pair:
    """Empty gradients of logits and, where asked for, of the values that replace some, (1, E)."""
    shape = columns.shape if columns is not None and of_values else (0,)
    return logits.new_empty(logits.shape), logits.new_empty(shape, dtype=torch.float32)


def label_outputs(logits: Tensor, labels: Tensor) -> Pair:
    """Log-odds of labels, (N,) or of each row several, and statistics of the others."""
    stats = logits.new_empty(logits.shape[0], NUM_STATS, dtype=torch.float64)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return logits.new_empty(labels.shape, dtype=wide), stats


def verification_outputs(logits: Tensor, draft: Tensor) -> Verification:
    """Allocates outputs in the order of `Verified`, those of rows (N, K + 1)."""
    n, k = draft.shape
    return (
        logits.new_empty(n, k + 1, dtype=torch.int64),
        logits.new_empty(n, dtype=torch.int64),
        logits.new_empty(n, k + 1, dtype=torch.float32),
        logits.new_empty(n, k + 1, dtype=torch.int32),
        logits.new_empty(n, k + 1, dtype=torch.uint8),
    )
