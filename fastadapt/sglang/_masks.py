"""SGLang's sampling masks as supports."""

from collections.abc import Iterable, Sequence

import torch

from fastadapt._ops.checks import instance, integer
from fastadapt.results import Support

MOST = 2**31 - 1


def support_of(mask: Sequence[Sequence[int]]) -> Support:
    """Returns what a request's tokens were drawn from, to train on, of SGLang's sampling mask.

    A request with `return_sampling_mask` gets the mask in `meta_info["output_token_sampling_mask"]`
    and each token's log-probability under the distribution it was drawn from in
    `meta_info["output_token_sampling_logprobs"]`. SGLang knows no full rows: a request without a
    filter ends where its vocabulary is larger than `--sampling-mask-max-tokens`.

    Examples:
        >>> support = fastadapt.sglang.support_of([[9, 2, 5], [7]])
        >>> support.ids, support.offsets
        (tensor([2, 5, 9, 7], dtype=torch.int32), tensor([0, 3, 4]))

    Args:
        mask: for each output token the ids that it was drawn from, in any order, each once.

    Returns:
        Support: of one row for each output token, on the CPU.

    Raises:
        TypeError: no lists of integers.
        ValueError: a token without ids, an id out of [0, 2**31) or one that is there twice.
    """
    instance("mask", mask, Sequence, "a list of ids for each token")
    ids: list[int] = []
    ends = [0]
    for at, row in enumerate(mask):
        name = f"mask[{at}]"
        if not isinstance(row, Iterable) or isinstance(row, str | bytes):
            raise TypeError(f"{name}: expected a list of ids, got {type(row).__name__}")
        kept = sorted(integer(name, one, 0, MOST) for one in row)
        if not kept or len(set(kept)) < len(kept):
            raise ValueError(f"{name}: expected ids, each once, got {len(kept)}")
        ids += kept
        ends.append(len(ids))
    return Support(
        torch.tensor(ids, dtype=torch.int32, device="cpu"),
        torch.tensor(ends, device="cpu"),
        torch.zeros(len(ends) - 1, dtype=torch.bool, device="cpu"),
    )
