"""Corpora on disk: strings sampled and scored prompt by prompt, resumable.

A folder holds `manifest.json`, which says what is sampled, and `parts/`, one Parquet file a prompt.
A part is written beside its place and moved there whole, so a crash or a full disk loses the prompt
in flight and nothing else; every string has a seed of its own, so a resumed folder ends with the
same table as one that was never interrupted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from fastadapt.study.files import StorageError as StorageError  # what a full disk raises here
from fastadapt.study.files import write_whole
from fastadapt.study.tradeoff.contexts import Side, context_ids, end_ids, start_ids
from fastadapt.study.tradeoff.decoding import Strings, draw_strings, score_strings
from fastadapt.study.tradeoff.grids import Cell
from fastadapt.study.tradeoff.rewards import Reward

Values = np.ndarray[Any, np.dtype[np.float64]]
_MANIFEST = "manifest.json"
_FORMAT = 1


class OtherStudyError(ValueError):
    """The folder holds strings sampled with other settings."""


class Plan(NamedTuple):
    """What to sample.

    Attributes:
        prompts: their texts.
        cells: the adaptors; the strings of each are drawn from the aligned side.
        strings: strings of each adaptor and prompt.
        max_new_tokens: the longest string.
        seed: of all draws.
        without_prompt: also score each string under the prior without its prompt, as the released
            code of the paper did.
    """

    prompts: Sequence[str]
    cells: Sequence[Cell]
    strings: int
    max_new_tokens: int
    seed: int
    without_prompt: bool


class Corpora:
    """A folder with one file of strings per prompt.

    Args:
        folder: made if it is missing.
        plan: what is sampled.
        names: what else the strings depend on, such as the models' names, for the manifest.

    Raises:
        OtherStudyError: the folder holds another plan.
        StorageError: the folder cannot be written.
    """

    def __init__(self, folder: Path, plan: Plan, names: dict[str, str | None]) -> None:
        self.folder, self.plan = folder, plan
        manifest = _manifest(plan, names)
        path = folder / _MANIFEST
        if path.exists():
            _check_manifest(path, manifest)
            return
        write_whole(
            path, lambda place: place.write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")
        )

    def missing(self) -> list[int]:
        """Returns the prompts whose file is missing or unreadable."""
        return [i for i in range(len(self.plan.prompts)) if not _is_readable(self._part(i))]

    def fill(
        self,
        aligned: Side,
        prior: Side,
        reward: Reward | None = None,
        *,
        on_part: Callable[[], None] = lambda: None,
    ) -> None:
        """Samples and scores what is missing.

        Args:
            aligned: draws the strings.
            prior: scores them too.
            reward: of a prompt and strings, one number each; not finite where it has none.
            on_part: called after every part.

        Raises:
            StorageError: a part could not be written.
            ValueError: the reward returned another number of values.
        """
        for index in self.missing():
            table = sample_part(self.plan, index, aligned, prior, reward)
            write_whole(self._part(index), partial(_write_table, table))
            on_part()

    def table(self) -> pa.Table:
        """Returns all strings, in the order of prompts, adaptors and repetitions."""
        return pa.concat_tables(
            [pq.read_table(self._part(i)) for i in range(len(self.plan.prompts))]
        )

    def _part(self, index: int) -> Path:
        """Returns the file of a prompt."""
        return self.folder / "parts" / f"{index:05d}.parquet"


def sample_part(
    plan: Plan, index: int, aligned: Side, prior: Side, reward: Reward | None
) -> pa.Table:
    """Samples the strings of one prompt with all scores; `columns` describes them."""
    prompt, cells = plan.prompts[index], plan.cells
    own = [cell for cell in range(len(cells)) for _ in range(plan.strings)]
    seeds = _seeds(plan, index)
    strings = draw_strings(
        aligned.model,
        context_ids(aligned, prompt),
        own,
        [cell.adaptor for cell in cells],
        seeds,
        ends=end_ids(aligned),
        max_new_tokens=plan.max_new_tokens,
    )
    drawn = strings.tokens[:, : max(int(strings.lengths.max()), 1)]
    log_prior = score_strings(prior.model, context_ids(prior, prompt), drawn)
    log_alone = torch.full_like(log_prior, torch.nan)
    if plan.without_prompt:
        log_alone = score_strings(prior.model, start_ids(prior), drawn)
    texts = [
        aligned.tokenizer.decode(row[:length], skip_special_tokens=True)
        for row, length in zip(drawn.tolist(), strings.lengths.tolist(), strict=True)
    ]
    rewards = np.full(len(own), np.nan)
    if reward is not None:
        rewards = reward_values(reward, prompt, texts)
    repetition = np.tile(np.arange(plan.strings), len(cells))
    return columns(index, own, repetition, seeds, strings, (log_prior, log_alone), texts, rewards)


def reward_values(reward: Reward, prompt: str, texts: Sequence[str]) -> Values:
    """Returns the rewards of some strings.

    Raises:
        ValueError: it returned something else than one number for each; NaN and infinities are
            numbers here.
    """
    found: Any = reward(prompt, texts)
    expected = f"reward: expected one number for each of {len(texts)} strings"
    try:
        listed = list(found)
        if any(isinstance(value, str | bytes) for value in listed):
            raise TypeError("text")
        values = np.array([float(value) for value in listed])
    except (TypeError, ValueError, RuntimeError) as error:
        got = " ".join(repr(found).split())[:60]
        raise ValueError(f"{expected}, got {got}") from error
    if values.shape != (len(texts),):
        raise ValueError(f"{expected}, got shape {values.shape}")
    return values


def columns(
    prompt: int,
    own: Sequence[int],
    repetition: np.ndarray[Any, Any],
    seeds: Tensor,
    strings: Strings,
    log_priors: tuple[Tensor, Tensor],
    texts: Sequence[str],
    rewards: np.ndarray[Any, Any],
) -> pa.Table:
    """Returns a part. Its columns, one row a string; log-probabilities are sums, in nats:

    `prompt`, `cell`, `repetition`: which string it is; `seed`: of its draws; `tokens`, `text`,
    `length`: tokens with the end token, `finished`: whether there is one; `status`: 0, or why no
    token could be drawn; `violations`: tokens outside the support that they were drawn from;
    `log_prior`, `log_alone`: under the prior, with and without the prompt (null if not asked for);
    `log_aligned`: under the aligned model; `reward`: of the user (null if there is none); `log_q`,
    `log_norm`: a list each, of all adaptors.
    """
    rows, adaptors = strings.log_q.shape
    lists = {
        name: pa.FixedSizeListArray.from_arrays(pa.array(values.numpy().reshape(-1)), adaptors)
        for name, values in (("log_q", strings.log_q), ("log_norm", strings.log_norm))
    }
    tokens = [
        row[:length]
        for row, length in zip(strings.tokens.tolist(), strings.lengths.tolist(), strict=True)
    ]
    return pa.table(
        {
            "prompt": pa.array([prompt] * rows, pa.int32()),
            "cell": pa.array(own, pa.int32()),
            "repetition": pa.array(repetition, pa.int32()),
            "seed": pa.array(seeds.numpy()),
            "tokens": pa.array(tokens, pa.list_(pa.int32())),
            "text": pa.array(list(texts), pa.string()),
            "length": pa.array(strings.lengths.numpy(), pa.int32()),
            "finished": pa.array(strings.finished.numpy()),
            "status": pa.array(strings.status.numpy(), pa.int32()),
            "violations": pa.array(strings.violations.numpy(), pa.int32()),
            "log_prior": pa.array(log_priors[0].numpy()),
            "log_alone": pa.array(log_priors[1].numpy(), from_pandas=True),  # NaN as null
            "log_aligned": pa.array(strings.log_aligned.numpy()),
            "reward": pa.array(rewards, from_pandas=True),
            **lists,
        }
    )


def _seeds(plan: Plan, index: int) -> Tensor:
    """Returns independent seeds for all strings of a prompt."""
    count = len(plan.cells) * plan.strings
    words = np.random.SeedSequence([plan.seed, index]).generate_state(count, np.uint64)
    return torch.from_numpy((words >> np.uint64(1)).astype(np.int64))


def _manifest(plan: Plan, names: dict[str, str | None]) -> dict[str, Any]:
    """Returns everything that the strings depend on."""
    digest = hashlib.sha256(json.dumps(list(plan.prompts)).encode()).hexdigest()
    return {
        "format": _FORMAT,
        **names,
        "prompts": len(plan.prompts),
        "prompts_sha256": digest,
        "adaptors": [f"{cell.name}: {cell.adaptor}" for cell in plan.cells],
        "strings": plan.strings,
        "max_new_tokens": plan.max_new_tokens,
        "seed": plan.seed,
        "without_prompt": plan.without_prompt,
    }


def _check_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """Raises unless the stored manifest equals this one."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise OtherStudyError(f"{path}: expected the manifest of a study, got {error}") from error
    if not isinstance(kept, dict):
        raise OtherStudyError(f"{path}: expected the manifest of a study, got {str(kept)[:60]!r}")
    changed = [
        name for name in manifest.keys() | kept.keys() if manifest.get(name) != kept.get(name)
    ]
    if changed:
        name = min(changed)
        raise OtherStudyError(
            f"{path.parent} holds a study with other settings ({', '.join(sorted(changed))}): "
            f"expected {name} = {manifest.get(name)!r}, got {kept.get(name)!r}; take another folder"
        )


def _write_table(table: pa.Table, place: Path) -> None:
    """Write a table, compressed."""
    pq.write_table(table, place, compression="zstd")


def _is_readable(path: Path) -> bool:
    """Whether a file exists and is complete."""
    try:
        pq.read_table(path)
    except (OSError, pa.ArrowException):
        return False
    return True
