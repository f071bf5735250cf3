"""The results of `sample`, `verify` and `score`; shared with their PyTorch references."""

from typing import NamedTuple

from torch import Tensor

from fastadapt.results.support import Support as Support


class Sample(NamedTuple):
    """The result of `sample`. Every field has the shape `logits.shape[:-1]`, written `...` below.

    Examples:
        >>> drawn = sample(torch.zeros(1, 4), Adaptor(temperature=0.0), log_mass=True)
        >>> drawn.tokens, drawn.logprobs, drawn.kept, drawn.status
        (tensor([0]), tensor([0.]), tensor([1], dtype=torch.int32), tensor([0], dtype=torch.uint8))

    Attributes:
        tokens: (...), int64; the drawn ids, -1 in a bad row.
        logprobs: (...), float32, nats; log-probability of the token under the adapted distribution,
            NaN in a bad row.
        kept: (...), int32; number of finite tokens that survived the filters, 0 in a bad row.
        status: (...), uint8; 0 ok, 1 NaN in the row, 2 +inf in the row, 3 nothing finite (2 and 3
            as x / T is in float32), 4 a knob of the row out of range (only knobs on CUDA get this
            far).
        base_logprobs: (...), float32, nats; the token's log-probability at temperature 1
            without filters, or None.
        log_mass: (...), float32, nats; `lse_kept(z/T) - lse(z/T)`, the log of the kept
            probability mass at the adaptor's temperature, or None. 0 where temperature is 0.
        top_ids: (..., n), int64; the n most probable ids (lowest id first among equals), or None.
        top_logprobs: (..., n), float32, nats; their base log-probabilities, or None.
        rank: (...), int32; 1 + the number of tokens ranked before the drawn one by
            (logit descending, id ascending), 0 in a bad row, or None.
        support: the ids that survived in each row, rows folded to N, or None. Full where that is
            the last dimension of the logits, padding of `num_tokens` too; empty in a bad row.
    """

    tokens: Tensor
    logprobs: Tensor
    kept: Tensor
    status: Tensor
    base_logprobs: Tensor | None = None
    log_mass: Tensor | None = None
    top_ids: Tensor | None = None
    top_logprobs: Tensor | None = None
    rank: Tensor | None = None
    support: Support | None = None


class Verified(NamedTuple):
    """The result of `verify` for N sequences of k drafts each.

    Examples:
        >>> logits = torch.tensor([[[2.0, 1.0, 0.0, -1.0]] * 3])
        >>> verified = verify(logits, torch.tensor([[0, 3]]), Adaptor(temperature=0.0))
        >>> verified.tokens, verified.accepted
        (tensor([[ 0,  0, -1]]), tensor([1]))

    Attributes:
        tokens: (N, k + 1), int64; the accepted drafts and one more token, then -1. In a bad row -1
            stands for that token.
        accepted: (N,), int64; how many drafts stand, 0 to k: `tokens[n, accepted[n]]` is the token
            behind them.
        logprobs: (N, k + 1), float32, nats; of each token under the adapted distribution of its
            row, NaN in a bad row, 0 behind the end.
        kept: (N, k + 1), int32; number of finite tokens that survived the filters, 0 in a bad row
            and behind the end.
        status: (N, k + 1), uint8; as of `Sample`, and 5 where the row of `draft_logits` is bad; 0
            behind the end, where no row is judged.
        support: the ids that survived in each of N (k + 1) rows, as of `Sample`, none behind the
            end; or None.
    """

    tokens: Tensor
    accepted: Tensor
    logprobs: Tensor
    kept: Tensor
    status: Tensor
    support: Support | None = None


class Score(NamedTuple):
    """The result of `score` under A adaptors. `...` is the shape of `tokens`.

    Examples:
        >>> scores = score(torch.zeros(1, 4), torch.tensor([3]), [Adaptor()])
        >>> scores.base_logprobs, scores.entropy
        (tensor([-1.3863]), tensor([1.3863]))

    Attributes:
        logprobs: (..., A), float32, nats; log-probability under each adapted distribution, -inf
            outside its support, NaN in a bad row, 0 in an ignored row.
        log_norm: (..., A), float32, nats; `lse_kept(z/T) - lse(z)/T`, the log normaliser log Z_t
            of the adaptor at this step (arXiv 2406.10203).
        kept: (..., A), int32; number of finite tokens in the support.
        base_logprobs: (...), float32, nats; log-probability at temperature 1, unfiltered.
        entropy: (...), float32, nats; entropy of that base distribution.
        supports: for each adaptor, the ids in the support of each row, as of `Sample`, none in an
            ignored row; or None.
    """

    logprobs: Tensor
    log_norm: Tensor
    kept: Tensor
    base_logprobs: Tensor
    entropy: Tensor
    supports: tuple[Support, ...] | None = None
