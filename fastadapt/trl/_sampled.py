"""What a trainer keeps of a generation: log-probabilities and supports, sequence by sequence."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastadapt.hf.generation import generate
from fastadapt.results import Support


class Recorder:
    """A `custom_generate` that draws as `fastadapt.hf.generate` and keeps what it tells.

    Args:
        supports: whether supports are kept too.
    """

    def __init__(self, supports: bool) -> None:
        self.supports = supports
        self.output: Any = None

    def __call__(
        self, model: Any, input_ids: Tensor, *, generation_config: Any, **rest: Any
    ) -> Tensor:
        """Returns the sequences, as trl expects them."""
        config = copy.copy(generation_config)
        config.return_dict_in_generate = True
        self.output = generate(
            model,
            input_ids,
            generation_config=config,
            output_logprobs=True,
            output_supports=self.supports,
            **rest,
        )
        sequences: Tensor = self.output.sequences
        return sequences

    def logps(self, lengths: Sequence[int]) -> list[Tensor]:
        """Returns the log-probabilities of the first tokens of each sequence.

        Raises:
            RuntimeError: transformers did not call this.
        """
        if self.output is None:
            raise RuntimeError("custom_generate: expected to be called by model.generate, was not")
        return [row[:n] for row, n in zip(self.output.logprobs, lengths, strict=True)]

    def supports_of(self, lengths: Sequence[int]) -> list[Support]:
        """Returns the supports of the first tokens of each sequence.

        Raises:
            RuntimeError: a sequence has ended before its last token.
        """
        found = [s[:n] for s, n in zip(self.output.supports, lengths, strict=True)]
        if [*map(len, found)] != [*lengths]:
            raise RuntimeError(
                f"supports: expected one row for each of {[*lengths]} tokens, got "
                f"{[*map(len, found)]}; sequences have to end at an end token or the length"
            )
        return found


@dataclass
class Batch:
    """What is known of the sequences that are scored.

    Attributes:
        supports: one a sequence; None: not known, or not used.
        logps: (B, T), the sampler's; None: not known.
        removed: (B, T), bool; the tokens that filters would not have kept that decided again; None:
            none decided.
        mask: (B, T), bool; the tokens of the loss; None: there is no loss yet.
        drawn: the sampler's log-probabilities of a generation, (length,) a sequence.
        scored: whether its tokens have been scored on supports.
    """

    supports: list[Support] | None = None
    logps: Tensor | None = None
    removed: Tensor | None = None
    mask: Tensor | None = None
    drawn: list[Tensor] = field(default_factory=list)
    scored: bool = False


def padded(rows: Sequence[Tensor], width: int) -> Tensor:
    """Returns rows of unequal lengths as one tensor, (B, width), with 0 behind their ends."""
    whole = torch.nn.utils.rnn.pad_sequence([*rows], batch_first=True)
    return torch.nn.functional.pad(whole, (0, width - whole.shape[1]))


def rows_of(supports: Sequence[Support], mask: Tensor) -> Support:
    """Returns the rows of all scored tokens, sequence by sequence, on their device.

    Args:
        supports: one a sequence.
        mask: (B, T), bool; the tokens that are scored.
    """
    whole = Support.cat(supports).to(mask.device)
    scored = torch.cat([row[: len(s)] for s, row in zip(supports, mask, strict=True)])
    return whole if bool(scored.all()) else whole.index(scored.nonzero()[:, 0])
