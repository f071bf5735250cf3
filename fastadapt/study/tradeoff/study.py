"""The probability-quality trade-off of an aligned model and its prior under sampling adaptors.

After Tan et al. 2024 (arXiv 2406.10203). For a prior p and an aligned model p+ over the same
tokens, the reward `r = log p+ - log p` makes p+ the exact optimum of RLHF with beta = 1, and for
any corpus

    mean r / beta + mean log p = log Z + mean log p+          (log Z = 0 for this reward)

so corpora of equal mean log p+ lie on a line of slope -beta in the plane of mean log p and mean
reward. An adaptor chooses the line and the place on it. `run_study` samples strings of many
adaptors and finds how log p and the reward go together: among strings, adaptors and corpora.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from fastadapt._ops.checks import integer
from fastadapt.study.files import write_whole
from fastadapt.study.tradeoff import correlations, normalisation, statistics
from fastadapt.study.tradeoff.contexts import Prompts, Side, check_lengths, check_sides
from fastadapt.study.tradeoff.corpora import Corpora, Plan
from fastadapt.study.tradeoff.grids import Cell, check_grid, hidden_cells
from fastadapt.study.tradeoff.pool import Pool, pool_of
from fastadapt.study.tradeoff.rewards import Reward

_PACKAGES = ("fastadapt", "torch", "transformers")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a study samples and how it analyses that.

    Args:
        cells: the grid of adaptors, 2 to 256.
        strings: strings of each adaptor and prompt.
        max_new_tokens: the longest string, in tokens.
        seed: of all draws and of the bootstrap.
        replicates: of the bootstrap, which resamples prompts.
        released: also sample with the hidden top-k and score without the prompt, as the released
            code of the paper did, to say what that does.

    Raises:
        ValueError: a value is out of range; the message has the expected and the actual one.
    """

    cells: Sequence[Cell]
    strings: int = 2
    max_new_tokens: int = 24
    seed: int = 0
    replicates: int = 2000
    released: bool = True

    def __post_init__(self) -> None:
        """Checks every value before anything is sampled."""
        check_grid(self.cells)
        for name, low in (("strings", 1), ("max_new_tokens", 1), ("replicates", 10)):
            integer(name, getattr(self, name), low)
        if not 0 <= self.seed < 2**62:
            raise ValueError(f"seed: expected 0 <= seed < 2**62, got {self.seed}")

    @property
    def all_cells(self) -> list[Cell]:
        """The grid and, if wanted, its copies with a hidden top-k."""
        return [*self.cells, *(hidden_cells(self.cells) if self.released else [])]


def run_study(
    aligned: Side,
    prior: Side,
    prompts: Prompts,
    settings: Settings,
    folder: Path,
    *,
    names: dict[str, str | None],
    reward: Reward | None = None,
    on_part: Callable[[], None] = lambda: None,
    command: str = "",
) -> dict[str, Any]:
    """Samples what a folder lacks, analyses it, and writes `results.json` there.

    Args:
        aligned: draws the strings.
        prior: scores them; the same model without a system prompt, say.
        prompts: user messages, at least two.
        settings: what to do.
        folder: for `corpora/` and the results; a folder of the same study is resumed.
        names: what the two sides and the reward are called, for the manifest and the report.
        reward: of a prompt and strings, one number each; others than finite are counted.
        on_part: called after every prompt.
        command: what ran the study, to be quoted in the report.

    Returns:
        The contents of `results.json`: plain dictionaries, see `analyse`.

    Raises:
        ValueError: vocabularies that differ, a prompt that does not fit, fewer than two prompts,
            a folder with another study (`OtherStudyError`), nothing left to analyse.
        StorageError: a part could not be written; what is there is kept.
    """
    if len(prompts.texts) < 2:
        raise ValueError(f"prompts: expected at least 2, got {len(prompts.texts)}")
    check_sides(aligned, prior)
    check_lengths((aligned, prior), prompts.texts, settings.max_new_tokens)
    plan = Plan(
        prompts.texts,
        settings.all_cells,
        settings.strings,
        settings.max_new_tokens,
        settings.seed,
        settings.released,
    )
    versions = {name: metadata.version(name) for name in _PACKAGES}
    corpora = Corpora(folder / "corpora", plan, {**names, **versions})
    corpora.fill(aligned, prior, reward, on_part=on_part)
    results = {
        "command": command,
        "names": {**names, **versions},
        "prompts": {
            "used": len(prompts.texts),
            "read": prompts.read,
            "duplicates": prompts.duplicates,
            "too long": prompts.too_long,
            "empty": prompts.empty,
        },
        "settings": {
            "strings": settings.strings,
            "max_new_tokens": settings.max_new_tokens,
            "seed": settings.seed,
            "replicates": settings.replicates,
        },
        **analyse(pool_of(corpora.table(), plan.cells), settings, has_reward=reward is not None),
    }
    write_results(folder / "results.json", results)
    return results


def analyse(pool: Pool, settings: Settings, *, has_reward: bool = False) -> dict[str, Any]:
    """Returns the results of a pool of strings, as plain dictionaries.

    Args:
        pool: its usable strings.
        settings: the seed and the number of replicates are used.
        has_reward: whether the strings have a user's reward.

    Returns:
        `counts` and `identity`; `adaptors`, one entry each ("own", means of log p and of the
        implicit reward; "user", of log p and the user's, null without any); `correlations` for
        each reward ("implicit"; "flipped", its negative; "released", as the released code computes
        it; "user");
        `typical`; `normalisation`, local against global; `hidden_top_k`; `strings`, rounded, for
        the figures.

    Raises:
        ValueError: an adaptor of the grid has fewer than two usable strings.
    """
    grid = pool.select(pool.in_grid)
    per_cell = np.bincount(grid.cell, minlength=len(pool.cells))
    for number, cell in enumerate(pool.cells):
        if not cell.hidden_top_k and per_cell[number] < 2:
            raise ValueError(
                f"adaptor {cell.name}: expected at least 2 usable strings, got {per_cell[number]} "
                f"(left out: {pool.excluded})"
            )
    rng = np.random.default_rng(settings.seed)
    counts = statistics.prompt_counts(pool.prompts, settings.replicates, rng)
    rewards = {
        "implicit": (grid, grid.log_prior, grid.implicit_reward),
        "flipped": (grid, grid.log_prior, -grid.implicit_reward),
    }
    if settings.released:
        rewards["released"] = (grid, grid.log_alone, grid.log_alone - grid.log_aligned)
    not_finite = 0
    extra: list[dict[str, Any]] = [{} for _ in _grid_cells(pool)]
    if has_reward:
        usable = np.isfinite(grid.reward)
        not_finite = int((~usable).sum())
        rest = grid.select(usable)
        if len(np.unique(rest.cell)) < 2:
            raise ValueError(
                f"reward: expected finite values for two adaptors or more, got {int(usable.sum())} "
                f"finite ones of {len(usable)}"
            )
        rewards["user"] = (rest, rest.log_prior, rest.reward)
        per_adaptor = [_judged(rest, number) for number in _grid_cells(pool)]
        extra = [{"user": values} for values in per_adaptor]
    compared = normalisation.compare(pool, counts, settings.seed)
    return {
        "counts": {
            "strings": len(pool.cell),
            "of the grid": len(grid.cell),
            "tokens": int(pool.length.sum()),
            "violations": pool.violations,
            "excluded": pool.excluded,
            "reward not finite": not_finite,
            "finished": float(grid.finished.mean()),
        },
        "identity": _identity(grid),
        "adaptors": [
            {**_adaptor(grid, number), **entry, **more}
            for number, entry, more in zip(
                _grid_cells(pool), compared["adaptors"], extra, strict=True
            )
        ],
        "correlations": {
            name: correlations.correlate(*arguments, counts) for name, arguments in rewards.items()
        },
        "typical": correlations.typical_corpora(grid, settings.seed),
        "normalisation": {"pool": compared["pool"], "correlation": compared["correlation"]},
        "hidden_top_k": normalisation.hidden_top_k(pool, counts),
        "strings": {
            "cell": grid.cell.tolist(),
            "log_prior": np.round(grid.log_prior, 2).tolist(),
            "reward": np.round(grid.implicit_reward, 2).tolist(),
            **({"user": grid.reward.tolist()} if has_reward else {}),
        },
    }


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Writes results as JSON, an entry per line, with null for what is not finite."""
    entries = [
        f"{json.dumps(k)}: {json.dumps(_clean(v), allow_nan=False)}" for k, v in results.items()
    ]
    text = "{\n" + ",\n".join(entries) + "\n}\n"
    write_whole(path, lambda place: place.write_text(text, encoding="utf-8"))


def read_results(path: Path) -> dict[str, Any]:
    """Reads results; None stands for a number that was not finite."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _grid_cells(pool: Pool) -> list[int]:
    """Returns the indices of the cells of the grid itself."""
    return [i for i, cell in enumerate(pool.cells) if not cell.hidden_top_k]


def _identity(grid: Pool) -> dict[str, float]:
    """Returns the largest error of the identity, over adaptors' corpora and over prompts'."""
    error = 0.0
    for groups in (grid.cell, grid.prompt):
        n = np.bincount(groups)
        reward, prior, aligned = (
            np.bincount(groups, values)[n > 0] / n[n > 0]
            for values in (grid.implicit_reward, grid.log_prior, grid.log_aligned)
        )
        error = max(error, float(np.abs(reward + prior - aligned).max()))
    return {"corpora": len(np.unique(grid.cell)) + len(np.unique(grid.prompt)), "error": error}


def _judged(rest: Pool, number: int) -> list[float] | None:
    """Returns mean log p and mean user reward of an adaptor's strings that have a reward."""
    mine = rest.select(rest.cell == number)
    return [float(mine.log_prior.mean()), float(mine.reward.mean())] if len(mine.cell) else None


def _adaptor(grid: Pool, number: int) -> dict[str, Any]:
    """Summarises the strings of one adaptor."""
    mine, cell = grid.select(grid.cell == number), grid.cells[number]
    return {
        "name": cell.name,
        "family": cell.family,
        "temperature": cell.temperature,
        "strings": len(mine.cell),
        "length": float(mine.length.mean()),
        "log_q": float(mine.log_q[:, number].mean()),
        "log_aligned": float(mine.log_aligned.mean()),
        "sd": [float(mine.log_prior.std()), float(mine.implicit_reward.std())],
    }


def _clean(value: Any) -> Any:
    """Returns a record with None for what is not finite, and floats in six digits."""
    if isinstance(value, dict):
        return {name: _clean(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(entry) for entry in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
