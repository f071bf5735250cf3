"""What a generation tells of its tokens: a few numbers each and the ids they were chosen from."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastadapt.adaptor import Adaptor
from fastadapt.results import Support
from fastadapt.sampling.functions import score

_IGNORED = -100


class Fields(NamedTuple):
    """The numbers of one step's tokens, (N,), or of all steps, (N, steps)."""

    logprobs: Tensor
    base_logprobs: Tensor
    kept: Tensor
    ranks: Tensor


class Told:
    """Collects the numbers of each step."""

    def __init__(self) -> None:
        self.steps: list[Fields] = []

    def add(
        self, logits: Tensor, tokens: Tensor, logprobs: Tensor, kept: Tensor, over: Tensor
    ) -> None:
        """Adds a step.

        Args:
            logits: (N, V); the model's own, unedited.
            tokens: (N,), int64; not read of rows that are over.
            logprobs: (N,), float32; as the tokens were chosen.
            kept: (N,), int32; how many tokens there were to choose from.
            over: (N,), bool; rows that ended before this step: zeros.

        Raises:
            ValueError: there are other rows of logits than tokens.
        """
        if logits.shape[:-1] != tokens.shape:
            raise ValueError(
                f"output_logprobs: expected one row of logits a sequence, {len(tokens)}, got shape "
                f"{tuple(logits.shape)}"
            )
        vocabulary = logits.shape[1]
        known = ~over & (tokens < vocabulary)  # processors may have made rows wider
        ids = torch.where(known, tokens, 0)
        base = score(logits, torch.where(known, tokens, _IGNORED), [Adaptor()]).base_logprobs
        x = logits.gather(1, ids[:, None])
        lower = torch.arange(vocabulary, device=logits.device) < ids[:, None]
        ranks = 1 + ((logits > x) | (logits == x) & lower).sum(-1, dtype=torch.int32)
        self.steps.append(
            Fields(
                torch.where(over, 0.0, logprobs),
                torch.where(known | over, base, -torch.inf),
                torch.where(over, 0, kept),
                torch.where(known & ~base.isnan(), ranks, 0),
            )
        )

    def put(self, output: Any, steps: int) -> None:
        """Puts the numbers of the first steps into the output of `model.generate`."""
        for name, values in zip(Fields._fields, zip(*self.steps[:steps], strict=True), strict=True):
            output[name] = torch.stack(values, 1)


class Supports:
    """Collects the ids that each step's tokens were chosen from."""

    def __init__(self) -> None:
        self.steps: list[tuple[Support, Tensor]] = []

    def add(self, support: Support, over: Tensor) -> None:
        """Adds a step.

        Args:
            support: of N rows; those of rows that are over mean nothing.
            over: (N,), bool; rows that ended before this step.
        """
        self.steps.append((support, over))

    def put(self, output: Any, steps: int) -> None:
        """Puts one support a sequence, a row a token, into the output of `model.generate`."""
        supports, over = zip(*self.steps[:steps], strict=True)
        live = ~torch.stack(over, 1)  # (N, steps)
        sequences, at = live.nonzero().unbind(1)  # sequence by sequence
        rows = Support.cat(supports).index(at * live.shape[0] + sequences)
        output["supports"] = rows.split(live.sum(1).tolist())
