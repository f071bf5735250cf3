"""Philox4x32-10, the random numbers of the sampling rule, in PyTorch."""

from torch import Tensor, full_like, zeros_like


def philox(
    seeds: Tensor, positions: Tensor, stream: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the words of Philox4x32-10 (Salmon et al. 2011): key = seed.

    Args:
        seeds (Tensor): (N,), int64, read as unsigned.
        positions (Tensor): (N,), int64, read as unsigned: the low half of the counter.
        stream (int): the high half of the counter, in [0, 2^32).

    Returns:
        Tensor, Tensor, Tensor, Tensor: the four output words, each (N,), in [0, 2^32).
    """
    mask = 0xFFFFFFFF
    k0, k1 = seeds & mask, (seeds >> 32) & mask
    c0, c1 = positions & mask, (positions >> 32) & mask
    c2, c3 = full_like(c0, stream), zeros_like(c0)
    for _ in range(10):
        # the int64 product wraps, and its 64 bits are those of the unsigned product
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        high0, high1 = (p0 >> 32) & mask, (p1 >> 32) & mask
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, p1 & mask, high0 ^ c3 ^ k1, p0 & mask
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return c0, c1, c2, c3
