"""References of the losses: float64 probabilities, one response after another, plain loops.

Nothing here is written for speed or for lower precision.
"""

from torch import Tensor

from fastadapt.reference.responses import (
    Side,
    dtype_of,
    each,
    log_of,
    miss,
    miss_of_mean,
    probabilities,
    sequences,
    stacked,
    tokens,
    zero,
)


def label_logps(log_odds: Tensor) -> Tensor:
    """Reference of `fastadapt.label_logps`.

    Examples:
        >>> from fastadapt import reference
        >>> reference.label_logps(torch.tensor([0.0, 2.0]))
        tensor([-0.6931, -0.1269])
    """
    return log_of(*probabilities(log_odds)).to(dtype_of(log_odds))


def sequence_logps(responses: Side) -> Tensor:
    """Reference of `fastadapt.sequence_logps`.

    Examples:
        >>> from fastadapt import reference
        >>> chosen = Responses(torch.tensor([[0.0, 2.0]]), torch.tensor([[True, True]]))
        >>> reference.sequence_logps(chosen)
        tensor([-0.8201], dtype=torch.float64)
    """
    sums = [log_of(*probabilities(m)).sum() for m in each(responses)]
    return stacked(sums, responses.log_odds)


def mle_loss(chosen: Side, *, reduction: str = "token_mean") -> Tensor:
    """Reference of `fastadapt.mle_loss`.

    Examples:
        >>> from fastadapt import reference
        >>> chosen = Responses(torch.tensor([[0.0, 2.0]]), torch.tensor([[True, True]]))
        >>> reference.mle_loss(chosen)
        tensor(0.4100)
    """
    total = sum((-log_of(*probabilities(m)).sum() for m in each(chosen)), zero(chosen))
    divisor = {"token_mean": tokens, "sequence_sum": sequences}[reduction](chosen)
    return (total / divisor).to(dtype_of(chosen.log_odds))


def unlikelihood_penalty(rejected: Side, *, level: str = "token") -> Tensor:
    """Reference of `fastadapt.unlikelihood_penalty`.

    Examples:
        >>> from fastadapt import reference
        >>> rejected = Responses(torch.tensor([[0.0, -2.0]]), torch.tensor([[True, True]]))
        >>> reference.unlikelihood_penalty(rejected)
        tensor(0.4100)
    """
    total = zero(rejected)
    for m in each(rejected):
        p, rest = probabilities(m)
        if level == "token":
            total = total - rest.log().sum()
        elif level == "sequence":
            total = total - miss(p, rest).log()
        elif len(m):
            total = total - miss_of_mean(m).log()
    return (total / (tokens if level == "token" else sequences)(rejected)).to(
        dtype_of(rejected.log_odds)
    )


def candidate_unlikelihood_penalty(
    chosen: Side, candidates: Tensor, candidate_mask: Tensor
) -> Tensor:
    """Reference of `fastadapt.candidate_unlikelihood_penalty`.

    Examples:
        >>> from fastadapt import reference
        >>> chosen = Responses(torch.zeros(1, 2), torch.tensor([[True, True]]))
        >>> candidates = torch.tensor([[[-1.0, -2.0], [-3.0, 0.0]]])
        >>> there = torch.tensor([[[True, True], [True, False]]])
        >>> reference.candidate_unlikelihood_penalty(chosen, candidates, there)
        tensor(0.2444)
    """
    counted = chosen.mask if chosen.segments is None else chosen.segments >= 0
    total = zero(chosen)
    for row, mask in zip(candidates[counted], candidate_mask[counted], strict=True):
        for m in row[mask]:
            total = total - probabilities(m)[1].log()
    return (total / tokens(chosen)).to(dtype_of(chosen.log_odds))


def exmate_penalty(rejected: Side, *, norm: str = "sequence_mean") -> Tensor:
    """Reference of `fastadapt.exmate_penalty`.

    Examples:
        >>> from fastadapt import reference
        >>> rejected = Responses(torch.tensor([[0.0, -2.0]]), torch.tensor([[True, True]]))
        >>> reference.exmate_penalty(rejected)
        tensor(0.2441)
    """
    total, product, count = zero(rejected), zero(rejected) + 1, tokens(rejected)
    for m in each(rejected):
        p = probabilities(m)[0]
        if norm == "token":
            total = total + p.sum() / count
        elif norm == "batch_token_mean":
            product = product * (p ** (1 / count)).prod()
        elif len(m):
            power = 1 / len(m) if norm == "sequence_mean" else 1.0
            total = total + (p**power).prod() / sequences(rejected)
    if norm == "batch_token_mean" and any(len(m) for m in each(rejected)):
        total = product
    return total.to(dtype_of(rejected.log_odds))


def mate_penalty(rejected: Side) -> Tensor:
    """Reference of `fastadapt.mate_penalty`.

    Examples:
        >>> from fastadapt import reference
        >>> rejected = Responses(torch.tensor([[0.0, -2.0]]), torch.tensor([[True, True]]))
        >>> reference.mate_penalty(rejected)
        tensor(-1.4100)
    """
    return -mle_loss(rejected)


def unlikelihood_loss(
    chosen: Side, rejected: Side, *, coefficient: float = 1.0, level: str = "token"
) -> Tensor:
    """Reference of `fastadapt.unlikelihood_loss`.

    Examples:
        >>> from fastadapt import reference
        >>> mask = torch.tensor([[True, True]])
        >>> chosen = Responses(torch.tensor([[0.0, 2.0]]), mask)
        >>> rejected = Responses(torch.tensor([[0.0, -2.0]]), mask)
        >>> reference.unlikelihood_loss(chosen, rejected, coefficient=0.5)
        tensor(0.6151)
    """
    return mle_loss(chosen) + coefficient * unlikelihood_penalty(rejected, level=level)


def exmate_loss(
    chosen: Side, rejected: Side, *, coefficient: float = 1.0, norm: str = "sequence_mean"
) -> Tensor:
    """Reference of `fastadapt.exmate_loss`.

    Examples:
        >>> from fastadapt import reference
        >>> mask = torch.tensor([[True, True]])
        >>> chosen = Responses(torch.tensor([[0.0, 2.0]]), mask)
        >>> rejected = Responses(torch.tensor([[0.0, -2.0]]), mask)
        >>> reference.exmate_loss(chosen, rejected)
        tensor(0.6542)
    """
    return mle_loss(chosen) + coefficient * exmate_penalty(rejected, norm=norm)


def mate_loss(chosen: Side, rejected: Side, *, coefficient: float = 1.0) -> Tensor:
    """Reference of `fastadapt.mate_loss`.

    Examples:
        >>> from fastadapt import reference
        >>> mask = torch.tensor([[True, True]])
        >>> chosen = Responses(torch.tensor([[0.0, 2.0]]), mask)
        >>> rejected = Responses(torch.tensor([[0.0, -2.0]]), mask)
        >>> reference.mate_loss(chosen, rejected)
        tensor(-1.)
    """
    return mle_loss(chosen) + coefficient * mate_penalty(rejected)


def focal_mle_loss(
    chosen: Side, *, focal_gamma: float = 2.0, reduction: str = "token_mean"
) -> Tensor:
    """Reference of `fastadapt.losses.focal_mle_loss`.

    Examples:
        >>> from fastadapt import reference
        >>> chosen = Responses(torch.tensor([[0.0, 2.0]]), torch.tensor([[True, True]]))
        >>> reference.focal_mle_loss(chosen)
        tensor(0.0875)
    """
    total = zero(chosen)
    for m in each(chosen):
        p, rest = probabilities(m)
        total = total - (rest**focal_gamma * log_of(p, rest)).sum()
    divisor = {"token_mean": tokens, "sequence_sum": sequences}[reduction](chosen)
    return (total / divisor).to(dtype_of(chosen.log_odds))


def dft_loss(chosen: Side, *, reduction: str = "token_mean") -> Tensor:
    """Reference of `fastadapt.losses.dft_loss`.

    Examples:
        >>> from fastadapt import reference
        >>> chosen = Responses(torch.tensor([[0.0, 2.0]]), torch.tensor([[True, True]]))
        >>> reference.dft_loss(chosen)
        tensor(0.2292)
    """
    total = zero(chosen)
    for m in each(chosen):
        p, rest = probabilities(m)
        total = total - (p.detach() * log_of(p, rest)).sum()
    divisor = {"token_mean": tokens, "sequence_sum": sequences}[reduction](chosen)
    return (total / divisor).to(dtype_of(chosen.log_odds))
