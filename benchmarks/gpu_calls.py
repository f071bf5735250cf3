"""The calls whose kernels are looked at without a GPU: every function that launches some."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cases import GPU_ADAPTORS
from fastadapt import (
    Adaptor,
    Edits,
    Sample,
    adapted_log_odds,
    candidate_log_odds,
    filter_logits,
    label_log_odds,
    linear_log_odds,
    sample,
    score,
    verify,
)
from fastadapt._ops.common import RowEdits
from fastadapt._ops.linear.divergence import KINDS
from fastadapt._ops.linear.driver import RECOMPUTE
from fastadapt._ops.triton.chains.launch import survivors
from fastadapt._ops.triton.edits.launch import edited
from fastadapt._ops.triton.supports import launch as supports

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
COMMON = 16, 262_144  # N and V
WIDTH, HEAD = 64, 16_384  # of hidden states, and ids of their head: tiles of one width
# What a draw is asked for: nothing but tokens, each optional field, all of them and positions.
OUTPUTS: dict[str, dict[str, Any]] = {
    "no outputs": {},
    "base_logprobs": {"base_logprobs": True},
    "log_mass": {"log_mass": True},
    "all outputs": {"base_logprobs": True, "log_mass": True, "positions": True},
}
# With the most probable tokens beside the drawn one, which two kernels more find.
TOP_OUTPUTS: dict[str, dict[str, Any]] = {
    f"{asked} and top 20": {**OUTPUTS[asked], "top_logprobs": 20}
    for asked in ("no outputs", "base_logprobs", "all outputs")
}
# Filters for which there are kernels of chains: what else is in one makes no other kernel.
CHAIN = Adaptor(
    temperature=0.8, min_k=3.0, xtc_probability=1.0, order=("min_k", "xtc", "temperature")
)
EDITED_OUTPUTS = "no outputs, edits"  # of rows with edits and masks


class Call(NamedTuple):
    """A call, and whether its arithmetic is specified to the bit, so that none may be fused."""

    name: str
    run: Callable[[], object]
    exact: bool = True


def draw(
    rows: Tensor, adaptor: Adaptor, outputs: Mapping[str, Any], seeds: Tensor | None = None
) -> Sample:
    """Draws from rows with some outputs."""
    seeds = torch.arange(len(rows)) if seeds is None else seeds
    given = dict(outputs)
    if given.pop("positions", False):
        given["positions"] = seeds
    return sample(rows, adaptor, seeds=seeds, **given)


def changes_of(n: int, v: int, *, given: bool = False) -> dict[str, Any]:
    """Edits of an id of each row, and a mask of allowed tokens, as arguments."""
    ids, offsets = torch.zeros(n, dtype=torch.int32), torch.arange(n + 1)
    values = torch.zeros(n)
    edits = Edits.set(ids, offsets, values) if given else Edits(ids, offsets, post=values)
    return {"edits": edits, "allowed": torch.zeros(n, -(-v // 32), dtype=torch.int32)}


def per_row(adaptor: Adaptor, n: int) -> Adaptor:
    """The same knobs as tensors of a value for each row."""
    names = "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"
    return Adaptor(**{name: torch.full((n,), getattr(adaptor, name)) for name in names})


def calls(dtype: str, thorough: bool, ones: bool) -> Iterator[Call]:
    """The functions with the options that make other kernels.

    Args:
        dtype: of logits, hidden states and head.
        thorough: also draws without outputs, other adaptors and knobs of each row. Else what asks
            for most.
        ones: also N = V = 1: integers that are 1 are constants of a kernel.
    """
    for n, v in (COMMON, (1, 1)) if ones else (COMMON,):
        size = "" if v > 1 else ", N = V = 1"
        rows = torch.empty(n, v, dtype=DTYPES[dtype])
        if dtype != "float64":
            found = {**_sampling(rows, thorough), **_edits(rows), **_verified(rows)}
            for name, run in found.items():
                yield Call(f"{name}, {dtype}{size}", run)
        for name, run in _adapted(rows).items():
            yield Call(f"{name}, {dtype}{size}", run)
        found = {**_losses(rows), **_linear(rows), **_pairs(rows), **_on_supports(rows)}
        for name, run in found.items():
            yield Call(f"{name}, {dtype}{size}", run, exact=False)
        if dtype == "float32" and v > 1:  # the product that sums reads half precision alone
            for name, run in _products(rows.bfloat16()).items():
                yield Call(f"{name}, bfloat16", run, exact=False)


def _sampling(rows: Tensor, thorough: bool) -> dict[str, Callable[[], object]]:
    """Draws, filtered logits and scores."""
    n, v = rows.shape
    chosen = GPU_ADAPTORS["T+p"]  # which may need every step
    found: dict[str, Callable[[], object]] = {}
    for top in (1024, 1) if thorough or v == 1 else (1024,):
        if top <= v:
            given = {**OUTPUTS["all outputs"], "top_logprobs": top}
            found[f"T+p, all outputs, top {top}"] = partial(draw, rows, chosen, given)
    if thorough and v > 1:
        for asked in ("no outputs", "all outputs"):
            for name, adaptor in GPU_ADAPTORS.items():
                found[f"{name}, {asked}"] = partial(draw, rows, adaptor, OUTPUTS[asked])
        knobs = per_row(GPU_ADAPTORS["everything"], n)
        found["per row, no outputs"] = partial(draw, rows, knobs, OUTPUTS["no outputs"])
    elif v > 1:  # filters that T+p leaves out of the kernel for short lists
        everything = GPU_ADAPTORS["everything"]
        found["everything, all outputs"] = partial(draw, rows, everything, OUTPUTS["all outputs"])
    found["chain, all outputs"] = partial(draw, rows, CHAIN, OUTPUTS["all outputs"])
    several = [chosen, *([GPU_ADAPTORS["everything"]] if n > 1 else [])]
    tokens = torch.zeros(n, dtype=torch.int64)
    for name, adaptor, adaptors in (("", chosen, several), (", chain", CHAIN, [CHAIN])):
        found[f"filter{name}"] = partial(filter_logits, rows, adaptor)
        found[f"score{name}"] = partial(score, rows, tokens, adaptors)
        own = rows, adaptor.packed, adaptor.filter_code, torch.ones(n, dtype=torch.int32)
        found[f"supports{name}"] = partial(survivors, *own, tokens)
    return found


def _adapted(rows: Tensor) -> dict[str, Callable[[], object]]:
    """Log-odds on the support of an adaptor, and their gradient."""
    tokens = torch.zeros(len(rows), dtype=torch.int64)
    given = rows, tokens, GPU_ADAPTORS["T+p"]
    found = {"adapted log-odds": _with_backward(adapted_log_odds, *given)}
    found["adapted log-odds, chain"] = _with_backward(adapted_log_odds, *given[:2], CHAIN)
    if rows.dtype == torch.float32:  # which edited rows of other types are, too
        for name, given_values in (("edits", False), ("given values", True)):
            changes = changes_of(*rows.shape, given=given_values)
            if given_values:
                changes["edits"].columns.requires_grad_()
            found[f"adapted log-odds, {name}"] = _with_backward(adapted_log_odds, *given, **changes)
    return found


def _edits(rows: Tensor) -> dict[str, Callable[[], object]]:
    """Edited rows, by what is done to them."""
    n, v = rows.shape
    found: dict[str, Callable[[], object]] = {}
    for name, given in (("edits", False), ("given values", True)):
        edits, allowed = changes_of(n, v, given=given).values()
        lists = edits.ids, edits.offsets, edits.columns
        found[name] = partial(edited, rows, RowEdits(*lists))
        found[f"{name}, allowed"] = partial(edited, rows, RowEdits(*lists, allowed))
    found["allowed"] = partial(edited, rows, RowEdits(allowed=allowed))
    return found


def _verified(rows: Tensor) -> dict[str, Callable[[], object]]:
    """Drafts of one token a sequence, with their logits and without."""
    (n, v), k = rows.shape, min(1, len(rows) - 1)
    logits = rows.view(n // (k + 1), k + 1, v)
    draft, seeds = torch.zeros(len(logits), k, dtype=torch.int64), torch.arange(len(logits))
    given = partial(verify, logits, draft, GPU_ADAPTORS["T+p"], seeds=seeds)
    by_law = partial(verify, logits, draft, seeds=seeds, draft_logits=logits[:, :k])
    return {
        "verify": given,
        "verify by its law": partial(by_law, GPU_ADAPTORS["T+p"]),
        "verify by its law, chain": partial(by_law, CHAIN),
    }


def _losses(rows: Tensor) -> dict[str, Callable[[], object]]:
    """Log-odds of labels and of candidates, and their gradients."""
    n, v = rows.shape
    index = torch.zeros(n, min(v, 100), dtype=torch.int64)
    mask = torch.ones_like(index, dtype=torch.bool)
    return {
        "labels": _with_backward(label_log_odds, rows, index[:, 0].contiguous()),
        "candidates": _with_backward(candidate_log_odds, rows, index),
        "masked candidates": _with_backward(candidate_log_odds, rows, index, mask),
    }


def _linear(rows: Tensor) -> dict[str, Callable[[], object]]:
    """Log-odds of a linear head, with and without its own gradient."""
    n, v = min(len(rows), 8), min(rows.shape[1], HEAD)
    width = WIDTH if v > 1 else 1
    hidden, weight = rows.new_zeros(n, width), rows.new_zeros(v, width)
    labels = torch.zeros(n, dtype=torch.int64)
    some = torch.where(torch.arange(n) % 2 == 0, labels, -100) if n > 1 else labels
    found: dict[str, Callable[[], object]] = {}
    for name, bias, cap in (("head", None, None), ("capped head", rows.new_zeros(v), 30.0)):
        for outputs in ((), ("entropy",)):
            kind = " and ".join((name, *outputs))
            given: dict[str, Any] = {"bias": bias, "softcap": cap, "outputs": outputs}
            found[kind] = partial(linear_log_odds, hidden, weight, labels, **given)
            found[f"frozen {kind}"] = _with_backward(linear_log_odds, hidden, weight, some, **given)
        problem = hidden, weight, some[:, None], bias, cap or 0.0, 1.0, -100, None, None
        for kept, budget in (("", 0), (", logits kept", 1 << 30)):
            found[f"trained {name}{kept}"] = partial(_train_head, problem, budget)
    return found


def _on_supports(rows: Tensor) -> dict[str, Callable[[], object]]:
    """Products of pairs of a row and an id, and sums by them."""
    n, width = len(rows), WIDTH if rows.shape[1] > 1 else 1
    hidden, pairs, ends = rows.new_zeros(n, width), torch.arange(n), torch.arange(n + 1)
    numbers = torch.zeros(n, dtype=torch.float64)
    return {
        "products of supports": partial(supports.dot, hidden, hidden, pairs, pairs, numbers),
        "sums of supports": partial(
            supports.mix, hidden, numbers, pairs, ends, pairs, torch.empty_like(hidden)
        ),
    }


def _products(rows: Tensor) -> dict[str, Callable[[], object]]:
    """Log-odds of a head that is trained, or needs no gradient."""
    return {name: run for name, run in _linear(rows).items() if "frozen" not in name}


def _pairs(rows: Tensor) -> dict[str, Callable[[], object]]:
    """Divergences of two heads, and their gradients."""
    n, v = min(len(rows), 8), min(rows.shape[1], HEAD)
    width = WIDTH if v > 1 else 1
    hidden, weight, bias = rows.new_zeros(n, width), rows.new_zeros(v, width), rows.new_zeros(v)
    found: dict[str, Callable[[], object]] = {}
    for name, number in KINDS.items():
        for words, some, cap in (("heads", None, 0.0), ("capped heads", bias, 30.0)):
            side = hidden, weight, some
            problem = *side, *side, None, cap, 1.0, cap, 1.0, number, 0.5
            found[f"{name} of {words}"] = partial(_train_pair, problem)
    return found


def _train_pair(problem: tuple[Any, ...]) -> object:
    """A forward and a backward with all gradients."""
    values, stats = torch.ops.fastadapt.linear_divergence(*problem)
    wanted = [True, True, problem[2] is not None]
    return torch.ops.fastadapt.linear_divergence_backward(
        torch.ones_like(values), stats, *problem, wanted=wanted
    )


def _train_head(problem: tuple[Any, ...], kept_bytes: int) -> object:
    """A forward and a backward with all gradients; rows of no mass would take no part in it."""
    given = {
        "plan": RECOMPUTE,
        "kept_bytes": kept_bytes,
        "moments": False,
        "apart": True,
        "masked": False,
    }
    own, others, _, stats, kept = torch.ops.fastadapt.linear_log_odds(*problem, **given)
    return torch.ops.fastadapt.linear_log_odds_backward(
        torch.ones_like(own),
        torch.ones_like(others),
        None,
        own,
        stats.fill_(1),
        kept,
        *problem,
        wanted=[True, True, problem[3] is not None],
    )


def _with_backward(
    function: Callable[..., Any], first: Tensor, *rest: Any, **options: Any
) -> Callable[[], object]:
    """A call and the gradient of its first result with respect to its first argument."""

    def run() -> object:
        result = function(first.detach().requires_grad_(), *rest, **options)
        values = result[0] if isinstance(result, tuple) else result
        values.backward(torch.ones_like(values))
        return values

    return run
