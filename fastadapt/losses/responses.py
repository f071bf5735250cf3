"""Responses as log-odds of their label tokens, in two layouts."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastadapt._ops.checks import integer
from fastadapt.losses.shapes import accumulated, like_log_odds


class Responses(NamedTuple):
    """The label tokens of B responses: the input of every loss of this package.

    Made from labels by `Responses.from_labels(log_odds, labels)`, where a label of -100 does not
    count; from log-probabilities by `Responses.from_logps`. By hand in two layouts:
    `Responses(log_odds, mask)`, padded, and `Responses(log_odds, segments=ids)`, packed. A token
    that does not count (mask False, segment id negative) changes no loss and gets a zero gradient,
    whatever its log-odds are, NaN included. A response without tokens counts in no mean over
    responses; a pair counts if one of its responses has some, in losses without a reference if both
    have.

    Log-odds are not log-probabilities, but no check can tell the two apart: both are
    negative for a token of p < 1/2. A mask made by hand has to be False where a label was ignored:
    the log-odds there are 0, which under a mask of True is a token of probability 1/2.

    Examples:
        >>> labels = torch.tensor([[5, 7, 2], [5, -100, -100]])
        >>> responses = Responses.from_labels(torch.zeros(2, 3), labels)
        >>> responses.mask
        tensor([[ True,  True,  True],
                [ True, False, False]])

    Attributes:
        log_odds: (B, T) or (N,), float32, float64, bfloat16 or float16, nats; per token
            `m = z_y - logsumexp(z_j, j != y)`, from `adapted_log_odds` or any such operator. Sums
            are float32, float64 for float64. A token of probability 0 has m = -inf.
        mask: (B, T), bool; the tokens that count.
        segments: (N,), int64; the response of each token in [0, B), in any order, or negative. An
            id >= B is an error on the CPU and undefined elsewhere.
        num_segments: B of the packed layout. None: 1 + the largest id, which reads the device and
            cannot be compiled without a graph break.
        total_tokens: what token means divide by: an int or a tensor of one value, such as
            transformers' `num_items_in_batch`. The losses of micro-batches then add up to the loss
            of the whole batch. None: the tokens that count here.
        total_sequences: the same for means over responses or pairs.
    """

    log_odds: Tensor
    mask: Tensor | None = None
    segments: Tensor | None = None
    num_segments: int | None = None
    total_tokens: int | Tensor | None = None
    total_sequences: int | Tensor | None = None

    @classmethod
    def from_labels(
        cls,
        log_odds: Tensor,
        labels: Tensor,
        *,
        ignore_index: int = -100,
        segments: Tensor | None = None,
        num_segments: int | None = None,
        total_tokens: int | Tensor | None = None,
        total_sequences: int | Tensor | None = None,
    ) -> "Responses":
        """Returns the responses of labels; those that are ignored do not count.

        Examples:
            >>> labels = torch.tensor([[1, 2, -100]])
            >>> log_odds = linear_log_odds(torch.ones(1, 3, 4), torch.zeros(5, 4), labels)
            >>> Responses.from_labels(log_odds, labels).mask
            tensor([[ True,  True, False]])

        Args:
            log_odds (Tensor): the labels' log-odds, of the shape of `labels`; or logits, with one
                more dimension (..., V), of which `label_log_odds` makes them.
            labels (Tensor): (B, T), or (N,) with `segments`, int64; those that the log-odds are of,
                at each position the token to score there, or `ignore_index`.
            ignore_index (int): the label of tokens that do not count.
            segments (Tensor | None): as the attribute.
            num_segments (int | None): as the attribute.
            total_tokens (int | Tensor | None): as the attribute.
            total_sequences (int | Tensor | None): as the attribute.

        Raises:
            TypeError: wrong dtypes.
            ValueError: shapes or devices that do not fit; on a CPU a negative label that is not
                ignored (`verify` and bad rows have -1); for logits, as `label_log_odds`.
        """
        ignore_index = integer("ignore_index", ignore_index)
        dims = 2 if segments is None else 1
        of_labels = isinstance(log_odds, Tensor) and isinstance(labels, Tensor)
        if of_labels and labels.dim() == dims and log_odds.shape[:-1] == labels.shape:
            from fastadapt.log_odds import label_log_odds  # responses themselves need no operator

            log_odds = label_log_odds(log_odds, labels, ignore_index=ignore_index)
        accumulated("log_odds", log_odds)
        like_log_odds("labels", labels, torch.int64, log_odds, dims)
        kept = labels != ignore_index
        if labels.device.type == "cpu" and not torch.compiler.is_compiling():
            negative = labels[kept & (labels < 0)]
            if len(negative) > 0:
                got = int(negative[0])
                raise ValueError(f"labels: expected ids from 0 on or {ignore_index}, got {got}")
        if segments is None:
            return cls(log_odds, kept, None, num_segments, total_tokens, total_sequences)
        like_log_odds("segments", segments, torch.int64, log_odds, dims)
        ids = torch.where(kept, segments, -1)
        return cls(log_odds, None, ids, num_segments, total_tokens, total_sequences)

    @classmethod
    def from_logps(
        cls,
        logps: Tensor,
        labels: Tensor,
        *,
        ignore_index: int = -100,
        segments: Tensor | None = None,
        num_segments: int | None = None,
        total_tokens: int | Tensor | None = None,
        total_sequences: int | Tensor | None = None,
    ) -> "Responses":
        """Returns the responses of labels with given log-probabilities, where log-odds are missing.

        `m = l - log(1 - e^l)`, differentiable. Log-probabilities have no digits left where p is
        near 1: l = 0 becomes log-odds of +inf, without a gradient. Log-odds of logits or of hidden
        states have them; see `from_labels`.

        Args:
            logps (Tensor): the labels' log-probabilities, of the shape of `labels`, <= 0, a float
                dtype as `log_odds`, nats.
            labels (Tensor): as in `from_labels`, and so all others.
            ignore_index (int): as in `from_labels`.
            segments (Tensor | None): as the attribute.
            num_segments (int | None): as the attribute.
            total_tokens (int | Tensor | None): as the attribute.
            total_sequences (int | Tensor | None): as the attribute.

        Raises:
            TypeError, ValueError: as `from_labels`. A value > 0 becomes NaN, and the loss with it.
        """
        logp = accumulated("logps", logps)
        like_log_odds("labels", labels, torch.int64, logps, 2 if segments is None else 1)
        below = logp < 0
        inside = torch.where(below, logp, -1)  # the gradient elsewhere would be 0 * inf
        edge = torch.where(logp == 0, float("inf"), float("nan"))
        log_odds = torch.where(below, inside - torch.log(-torch.expm1(inside)), edge)
        return cls.from_labels(
            log_odds,
            labels,
            ignore_index=ignore_index,
            segments=segments,
            num_segments=num_segments,
            total_tokens=total_tokens,
            total_sequences=total_sequences,
        )
