"""The rows of a step that are drawn here: one call of `sample` for those of one filter order."""

from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from fastadapt.adaptor import INTEGER_KNOBS, Adaptor
from fastadapt.results import Sample
from fastadapt.sampling.functions import sample
from fastadapt.vllm._records import record
from fastadapt.vllm._request import KNOBS
from fastadapt.vllm._row import Row
from fastadapt.vllm._texts import Texts

BANNED = float("-inf")


class Batch:
    """Rows of some requests of the engine's batch, until it changes.

    Attributes:
        rows: by their places in the engine's batch.
        at (Tensor): (rows,), int64; these places.
        prompts (Tensor): (rows,), int64; the lengths of their prompts, where the engine tells them.

    Args:
        rows: by their places in the batch, ascending.
        logits (Tensor): (N, V), of which the vocabulary and the device are read.
        before: the batch until now, whose texts are kept; None for the first one.
    """

    def __init__(
        self, rows: Sequence[tuple[int, Row]], logits: Tensor, before: "Batch | None"
    ) -> None:
        """Groups the rows by what one adaptor has in common."""
        self.rows = list(rows)
        # copies to a device make the host wait for it: once for a batch, not at every step
        self.at = torch.tensor([place for place, _ in rows]).to(logits.device)
        self.prompts = torch.tensor([row.prompt_length for _, row in rows]).to(logits.device)
        members: dict[Any, list[int]] = {}
        for i, (_, row) in enumerate(self.rows):
            members.setdefault(_common(row), []).append(i)
        groups = [] if before is None else before.groups
        known: dict[Any, Texts] = {group.key: group.texts for group in groups}
        self.groups: list[Group] = [
            Group(
                key,
                [self.rows[i] for i in of_batch],
                of_batch,
                logits,
                known.get(key) or Texts(logits.shape[1]),
            )
            for key, of_batch in members.items()
        ]

    def draw(self, logits: Tensor, positions: Tensor, *, penalties: bool) -> None:
        """Draws each row and leaves it one-hot, in place.

        Args:
            logits (Tensor): (N, V), float32, a row for each request.
            positions (Tensor): (rows,), int64; of those here.
            penalties: whether the engine's penalties are still to come.
        """
        for group in self.groups:
            group.draw(logits, positions, penalties)

    def draw_drafts(self, logits: Tensor, places: Tensor, positions: Tensor) -> Tensor:
        """Returns logits with all rows of the requests here drawn and one-hot.

        A request has a row for each of its drafts; how many is known on the device alone, so all
        rows are drawn and those of others keep their logits.

        Args:
            logits (Tensor): (L, V), float32; the engine's penalties are in them.
            places (Tensor): (L,), int64: which of the requests here a row is of, or -1.
            positions (Tensor): (L,), int64.
        """
        for group in self.groups:
            logits = group.draw_drafts(logits, places, positions)
        return logits


class Group:
    """Rows that one adaptor can draw.

    Args:
        key: what their adaptors have in common.
        rows: by their places in the engine's batch, ascending.
        of_batch: their places among all rows that are drawn here.
        logits (Tensor): (N, V), of which the vocabulary and the device are read.
        texts: of the rows before, if this group was there.
    """

    def __init__(
        self,
        key: Any,
        rows: Sequence[tuple[int, Row]],
        of_batch: list[int],
        logits: Tensor,
        texts: Texts,
    ) -> None:
        """Makes the tensors of every step."""
        device = logits.device
        self.key, self.texts = key, texts
        self.rows = [row for _, row in rows]
        self.recorded = self.rows[0].sheet is not None  # as all of them
        self.at = torch.tensor([place for place, _ in rows]).to(device)
        self.of_batch = torch.tensor(of_batch).to(device)
        self.seeds = torch.tensor([row.seed for row in self.rows]).to(device)
        self.knobs = _knobs([row.request.adaptor for row in self.rows], device)
        self.adaptor = Adaptor(**self.knobs)
        self.bias = _padded_bias(self.rows, logits.shape[1], device)

    def draw(self, logits: Tensor, positions: Tensor, penalties: bool) -> None:
        """Draws and leaves the rows one-hot, in place; see `Batch.draw`."""
        everything = len(self.at) == logits.shape[0]
        rows = logits if everything else logits[self.at]
        if self.bias is not None:
            rows.scatter_add_(1, *self.bias)
        edits = self.texts.edits(self.rows) if penalties else None
        at = positions[self.of_batch]
        drawn = sample(
            rows,
            self.adaptor,
            seeds=self.seeds,
            positions=at,
            support=self.recorded,
            edits=None if edits is None else edits.to(logits.device),
        )
        if self.recorded:
            record([row.sheet for row in self.rows], at, drawn)
        fill, tokens = _outcome(drawn)
        if everything:
            logits.copy_(fill[:, None].expand_as(logits))
            logits.scatter_(1, tokens[:, None], fill.clamp(min=0)[:, None])
        else:
            logits[self.at] = fill[:, None]
            logits[self.at, tokens] = fill.clamp(min=0)

    def draw_drafts(self, logits: Tensor, places: Tensor, positions: Tensor) -> Tensor:
        """Returns logits with the rows of this group drawn and one-hot; see `Batch.draw_drafts`."""
        mine = places[:, None] == self.of_batch  # (L, rows)
        here, local = mine.any(1), mine.int().argmax(1)
        if not self.recorded:
            drawn = self._drawn(logits, local, positions, support=False)
            return torch.where(here[:, None], _one_hot(drawn, logits), logits)
        at = here.nonzero()[:, 0]  # waits for the device, as a record does
        local, positions = local[at], positions[at]
        drawn = self._drawn(logits[at], local, positions, support=True)
        record([self.rows[i].sheet for i in local.tolist()], positions, drawn)
        return logits.index_copy(0, at, _one_hot(drawn, logits))

    def _drawn(self, rows: Tensor, local: Tensor, positions: Tensor, *, support: bool) -> Sample:
        """Draws rows, each by the knobs, seed and bias of one of the rows here.

        Args:
            rows (Tensor): (L, V), float32; not changed.
            local (Tensor): (L,), int64: whose.
            positions (Tensor): (L,), int64.
            support: whether to return what was kept too.
        """
        if self.bias is not None:
            ids, values = (x[local] for x in self.bias)
            rows = rows.scatter_add(1, ids, values)
        knobs: dict[str, Any] = {
            name: knob[local] if isinstance(knob, Tensor) else knob
            for name, knob in self.knobs.items()
        }
        seeds = self.seeds[local]
        return sample(rows, Adaptor(**knobs), seeds=seeds, positions=positions, support=support)


def _one_hot(drawn: Sample, logits: Tensor) -> Tensor:
    """Returns rows as wide as logits, each with its token alone."""
    fill, tokens = _outcome(drawn)
    one_hot = fill[:, None].repeat(1, logits.shape[1])
    return one_hot.scatter_(1, tokens[:, None], fill.clamp(min=0)[:, None])


def _outcome(drawn: Sample) -> tuple[Tensor, Tensor]:
    """Returns what fills each row and the token that gets 0; a row without a token is NaN.

    -inf stays -inf and 0 stays 0, by whatever the engine multiplies or divides them later; what is
    subtracted from 0 leaves the only finite number of the row.
    """
    drew = drawn.status == 0
    nan = torch.full_like(drawn.logprobs, float("nan"))
    return torch.where(drew, BANNED, nan), drawn.tokens.clamp(min=0)


def _common(row: Row) -> tuple[Any, ...]:
    """Returns what cannot differ from row to row: knobs that are no numbers, and being recorded."""
    values = {name: getattr(row.request.adaptor, name) for name in KNOBS}
    knobs = ((name, x) for name, x in values.items() if not _is_number(x))
    return row.sheet is not None, *knobs


def _knobs(adaptors: Sequence[Adaptor], device: torch.device) -> dict[str, Any]:
    """Returns the knobs of one adaptor for rows with one each; equal ones are one number."""
    knobs: dict[str, Any] = {}
    for name in KNOBS:
        values = [getattr(adaptor, name) for adaptor in adaptors]
        if all(value == values[0] for value in values):
            knobs[name] = values[0]
            continue
        dtype = torch.int64 if name in INTEGER_KNOBS else torch.float64
        knobs[name] = torch.tensor(values, dtype=dtype).to(device)
    return knobs


def _padded_bias(
    rows: Sequence[Row], size: int, device: torch.device
) -> tuple[Tensor, Tensor] | None:
    """Returns ids and values of the rows' biases, (rows, B) each, padded with a 0 for id 0.

    An id that the vocabulary does not have is no token's.
    """
    pairs = [[(i, x) for i, x in row.request.bias.items() if i < size] for row in rows]
    most = max(map(len, pairs))
    if most == 0:
        return None
    padded = [of_row + [(0, 0.0)] * (most - len(of_row)) for of_row in pairs]
    ids = torch.tensor([[i for i, _ in of_row] for of_row in padded]).to(device)
    values = torch.tensor([[x for _, x in of_row] for of_row in padded], dtype=torch.float32)
    return ids, values.to(device)


def _is_number(value: object) -> bool:
    """Whether an adaptor takes a tensor of such values."""
    return isinstance(value, Real) and not isinstance(value, bool)
