"""Rows of tokens scored by trl's forward, padded or packed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastadapt.training.compiled import head_outside_graphs
from fastadapt.training.head import HeadError, causal_of, evaluating
from fastadapt.training.lora import has_adapter
from fastadapt.training.pairs import IGNORED
from fastadapt.trl._log_probs import LogOdds, Scorer
from fastadapt.trl._served import served

_PACKED = {"input_ids", "attention_mask"}  # what a packed row is made of
_PROBES = ((3, 5, 2, 7, 4), (6, 2, 5), (4, 6, 3, 2, 5))  # two sequences, another first one


class Scored(NamedTuple):
    """What a forward says of each token but the first one of R rows, (R, T - 1).

    All but the log-odds are None where the model was not asked for them; no numbers of labels that
    are ignored.
    """

    log_odds: Tensor
    entropy: Tensor | None
    mean_logits: Tensor | None
    hits: Tensor | None
    log_sum_squares: Tensor | None
    aux_loss: Tensor | None
    logsumexp: Tensor | None = None
    divergences: Tensor | None = None


def score_rows(
    model: Any,
    inputs: Mapping[str, Any],
    labels: Tensor,
    scorer: type | Scorer = LogOdds,
    *,
    packs: bool = False,
    **more: Any,
) -> Scored:
    """Scores the labels of rows by one forward.

    Args:
        model: a model that trl has given its forward, or what wraps it.
        inputs: what the model takes, R rows.
        labels: (R, T), int64; the tokens themselves, or -100.
        scorer: what returns their log-odds.
        packs: whether the rows go through the model as one, without padding.
        **more: other arguments of the model.
    """
    given, own, unpacked = dict(inputs), labels, _aligned(labels.shape[1] - 1)
    if packs:
        given, own, unpacked = _packed(inputs, labels)
    with served(scorer), head_outside_graphs(model):
        outputs = model(**given, **more, labels=own, use_cache=False, fused_lm_head=True)
    names = ("entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
    found = [getattr(outputs, name) for name in names]
    entropy, means, hits, squares = (None if x is None else unpacked(x) for x in found)
    made = {
        name: unpacked(_spread(x, outputs.label_mask))
        for name, x in getattr(scorer, "made", {}).items()
    }
    log_odds = unpacked(outputs.log_probs)
    return Scored(log_odds, entropy, means, hits, squares, outputs.aux_loss, **made)


def _spread(x: Tensor, mask: Tensor) -> Tensor:
    """Returns values of the rows that a mask says at their places, 0 elsewhere, as trl does."""
    return x.new_zeros(mask.shape).masked_scatter(mask, x)


def check_packing(model: Any, config: Any) -> None:
    """Raises unless a model keeps the sequences of a packed row apart.

    It is asked: what a sequence gets is the same whatever stands before it in the row (to a
    rounding, since experts may see their tokens in other groups), and what it gets alone (to the
    roundings of all layers).

    Args:
        model: as for `score_rows`.
        config: of the model, for the name of its attention in the message.

    Raises:
        ValueError: it does not, or has no way to say where a sequence begins.
    """
    causal = causal_of(model)
    device = causal.get_output_embeddings().weight.device
    vocabulary = causal.config.get_text_config().vocab_size

    def of_last(*sequences: tuple[int, ...]) -> Tensor:
        width = max(map(len, sequences))
        ids = torch.zeros(len(sequences), width, dtype=torch.int64, device=device)
        there = torch.zeros_like(ids)
        for row, (tokens, one) in enumerate(zip(ids, there, strict=True)):
            tokens[: len(sequences[row])] = torch.tensor(sequences[row]) % vocabulary
            one[: len(sequences[row])] = 1
        labels = ids.masked_fill(there == 0, IGNORED)
        rows = {"input_ids": ids, "attention_mask": there}
        scored = score_rows(model, rows, labels, packs=True).log_odds
        return scored[-1, : len(sequences[-1]) - 1].double()

    a, b, other = _PROBES
    try:
        with torch.no_grad(), evaluating(causal):
            behind, behind_other, alone = of_last(a, b), of_last(other, b), of_last(b)
    except TypeError as error:  # no position_ids
        raise HeadError(_refusal(causal, config, str(error))) from error
    cast = torch.is_autocast_enabled(device.type)
    eps = torch.finfo(torch.get_autocast_dtype(device.type) if cast else causal.dtype).eps
    spread = alone.max() - alone.min()
    leak, gap = ((behind - x).abs().max() / spread for x in (behind_other, alone))
    if not (leak <= eps and gap <= eps**0.5):
        got = f"log-odds that differ by {float(max(leak, gap)):.2g} of their range behind another"
        raise HeadError(_refusal(causal, config, got))


def _refusal(causal: Any, config: Any, got: str) -> str:
    attention = getattr(config, "_attn_implementation", None)
    return (
        f"args.padding_free: expected a model whose sequences see nothing of each other in one "
        f"row, by their position_ids, got {type(causal).__name__} with attention {attention!r}: "
        f"{got}; False pads"
    )


def _aligned(width: int) -> Callable[[Tensor], Tensor]:
    """Returns what leaves out positions that prompt-learning adapters put before the tokens."""
    return lambda x: x[:, x.shape[1] - width :]


def _packed(
    inputs: Mapping[str, Any], labels: Tensor
) -> tuple[dict[str, Any], Tensor, Callable[[Tensor], Tensor]]:
    """Returns rows as one without padding, its labels, and what makes rows of its outputs again.

    Positions begin anew with each sequence, by which transformers' masks and varying-length kernels
    keep them apart.
    """
    more = sorted(inputs.keys() - _PACKED)
    if more:
        raise ValueError(f"args.padding_free: expected rows of text alone, got {more} beside them")
    kept = inputs["attention_mask"].bool()
    places = kept.long().cumsum(-1) - 1
    labels = labels.masked_fill(places == 0, IGNORED)  # before it stands another sequence's end
    given = {"input_ids": inputs["input_ids"][kept][None], "position_ids": places[kept][None]}

    def unpacked(x: Tensor) -> Tensor:
        row = F.pad(x[0], (1, 0))  # of the first token, which nothing predicts
        return x.new_zeros(kept.shape).masked_scatter(kept, row)[:, 1:]

    return given, labels[kept][None], unpacked


@contextlib.contextmanager
def without_adapter_on_its_head(model: Any) -> Iterator[None]:
    """Makes a model name the layer below an adapter as its head, within the block.

    trl's trainers look for an adapter there when they are made and refuse it: their own scoring
    would leave it out.
    """
    causal: Any = causal_of(model) if isinstance(model, torch.nn.Module) else None
    if not hasattr(causal, "get_output_embeddings"):
        yield
        return
    own = causal.get_output_embeddings

    def below() -> Any:
        layer = own()
        return layer.base_layer if has_adapter(layer) else layer

    object.__setattr__(causal, "get_output_embeddings", below)
    try:
        yield
    finally:
        object.__delattr__(causal, "get_output_embeddings")
