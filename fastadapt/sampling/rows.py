"""Rows as the operators take them: real vocabulary, checked edits, masks, knobs and seeds."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastadapt._ops.checks import instance, integer, per_row
from fastadapt._ops.common import AS_THEY_ARE, MAX_ADAPTORS, RowEdits
from fastadapt.adaptor import Adaptor
from fastadapt.sampling.edits import Edits


def edited_rows(
    rows: Tensor,
    leading: torch.Size,
    edits: Edits | None,
    allowed: Tensor | None,
    num_tokens: int | None,
) -> tuple[Tensor, RowEdits]:
    """Returns the logits of the real vocabulary and what operators take of edits, checked.

    Args:
        rows (Tensor): (N, V), float32 or half precision where there are edits.
        leading (torch.Size): the shape of the logits without V.
        edits (Edits | None): of N rows.
        allowed (Tensor | None): (*leading, ceil(V / 32)), int32, V of all logits or the real one.
        num_tokens (int | None): 1 to V.

    Raises:
        TypeError: something else than edits, words of another dtype, float64 logits.
        ValueError: another number of rows or words, another device, ids beyond V.
    """
    v = rows.shape[1]
    if num_tokens is not None:
        rows = rows[:, : integer("num_tokens", num_tokens, 1, v)]
    if edits is None and allowed is None:
        return rows, AS_THEY_ARE
    if rows.dtype == torch.float64:
        raise TypeError(
            f"{'allowed' if edits is None else 'edits'}: expected float32, bfloat16 or float16 "
            "logits, got torch.float64; fastadapt.reference takes it"
        )
    words = None if allowed is None else words_of(allowed, leading, v, rows.shape[1], rows.device)
    changes = RowEdits(allowed=words)
    if edits is not None:
        check_edits(edits, rows)
        ids_below(edits, v)
        changes = RowEdits(edits.ids, edits.offsets, edits.columns, words)
    return rows, changes


def check_edits(edits: object, rows: Tensor) -> None:
    """Raises unless edits are of these rows (N, ...) and on their device."""
    instance("edits", edits, Edits, "Edits")
    assert isinstance(edits, Edits)  # noqa: S101, for the type checker
    if edits.rows != rows.shape[0]:
        raise ValueError(f"edits: expected {rows.shape[0]} rows, got {edits.rows}")
    if edits.ids.device != rows.device:
        raise ValueError(f"edits: expected device {rows.device}, got {edits.ids.device}")


def ids_below(edits: Edits, v: int) -> None:
    """Raises where edits are of an id beyond the vocabulary, as far as known."""
    if edits.largest >= v:
        raise ValueError(f"edits: expected ids in [0, {v}), got {edits.largest}")


def knobs_for(rows: Tensor, adaptor: Adaptor, name: str = "adaptor") -> Tensor:
    """Returns the packed knobs, checked against rows (N, ...).

    Raises:
        TypeError: something else than an adaptor.
        ValueError: per-row knobs of another length or on another device.
    """
    if not isinstance(adaptor, Adaptor):
        raise TypeError(f"{name}: expected an Adaptor, got {type(adaptor).__name__}")
    if adaptor.rows is not None and adaptor.rows != rows.shape[0]:
        raise ValueError(
            f"{name}: expected per-row knobs of {rows.shape[0]} values, got {adaptor.rows}"
        )
    if adaptor.rows is not None and adaptor.packed.device != rows.device:
        raise ValueError(
            f"{name}: expected per-row knobs on {rows.device}, got {adaptor.packed.device}"
        )
    return adaptor.packed_on(rows.device)


def refuse_coin(adaptor: Adaptor) -> None:
    """Raises where nothing is drawn, and so no coin thrown, for an adaptor with a coin.

    Raises:
        ValueError: XTC's probability is known to be between 0 and 1 in some row.
    """
    if adaptor.has_coin:
        raise ValueError(
            "xtc_probability: expected 0 or 1 where no token is drawn, got a value between them; "
            "Adaptor.tossed throws its coin"
        )


def scored(adaptors: object) -> None:
    """Raises unless `score` takes adaptors: some, at most so many, of temperatures above 0."""
    if isinstance(adaptors, str) or not isinstance(adaptors, Sequence):
        got = type(adaptors).__name__
        raise TypeError(f"adaptors: expected a sequence of Adaptors, got {got}")
    if not 1 <= len(adaptors) <= MAX_ADAPTORS:
        raise ValueError(f"adaptors: expected 1 to {MAX_ADAPTORS}, got {len(adaptors)}")
    for i, adaptor in enumerate(adaptors):
        instance(f"adaptors[{i}]", adaptor, Adaptor, "an Adaptor")
        refuse_greedy(adaptor, "score")
        refuse_coin(adaptor)


def refuse_greedy(adaptor: Adaptor, what: str) -> None:
    """Raises for temperature 0, which has no distribution to score under."""
    if adaptor.greedy:
        raise ValueError(f"{what}: expected temperature > 0, got 0")


def seeds_of(
    seeds: Tensor | None, generator: torch.Generator | None, shape: torch.Size, rows: Tensor
) -> Tensor:
    """Returns a seed for each of `shape`, flat: those given, or drawn from a generator.

    Raises:
        TypeError: seeds of another dtype, something else than a generator.
        ValueError: seeds of another shape, a generator on another device or beside seeds.
    """
    if seeds is not None:
        if generator is not None:
            raise ValueError("generator: expected None beside seeds, which decide the draws")
        return per_row("seeds", seeds, torch.int64, shape, rows)
    if generator is not None:
        instance("generator", generator, torch.Generator, "a torch.Generator")
        if generator.device.type != rows.device.type:
            raise ValueError(
                f"generator: expected one on {rows.device}, got one on {generator.device}"
            )
    count = (shape.numel(),)
    return torch.randint(2**63 - 1, count, generator=generator, device=rows.device)


def words_of(
    allowed: object, leading: torch.Size, v: int, real: int, device: torch.device
) -> Tensor:
    """Returns the words of allowed ids as (N, ceil(V / 32)), of all logits or of real tokens."""
    instance("allowed", allowed, Tensor, "a tensor of torch.int32")
    assert isinstance(allowed, Tensor)  # noqa: S101, for the type checker
    if allowed.dtype != torch.int32:
        raise TypeError(f"allowed: expected a tensor of torch.int32, got {allowed.dtype}")
    width = allowed.shape[-1] if allowed.dim() else 0
    whole = -(-v // 32)
    shape = (*leading, width if width in (whole, -(-real // 32)) else whole)
    if allowed.shape != shape:
        raise ValueError(f"allowed: expected shape {shape}, got {tuple(allowed.shape)}")
    if allowed.device != device:
        raise ValueError(f"allowed: expected device {device}, got {allowed.device}")
    words = allowed if allowed.dim() == 2 else allowed.reshape(-1, shape[-1])
    return words if words.stride(1) == 1 or words.shape[1] == 1 else words.contiguous()
