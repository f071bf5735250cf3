"""The command `fastadapt tradeoff`: loads, samples with a progress bar, writes the report."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fastadapt._ops.checks import integer
from fastadapt.study._progress import progress_bar, stepper
from fastadapt.study.tradeoff import contexts, corpora, grids, rewards, study
from fastadapt.study.tradeoff.plots import draw_figures
from fastadapt.study.tradeoff.report import write_report
from fastadapt.study.tradeoff.rewards import Reward
from fastadapt.training.pretrained import DEFAULT_MODEL, load_model

_QUICK_PROMPTS = 24


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the command; see `fastadapt tradeoff --help`.

    Raises:
        ValueError: a value is out of range.
    """

    out: Path
    model: str | None = None
    prior: str | None = None
    system: str | None = None
    prior_system: str | None = None
    prompts: Path | None = None
    count: int | None = None
    grid: str | None = None
    strings: int = 2
    max_new_tokens: int | None = None
    reward: str | None = None
    reward_model: str | None = None
    seed: int = 0
    threads: int | None = None
    quick: bool = False

    def __post_init__(self) -> None:
        """Checks all that can be checked before a model is loaded."""
        for name, low in (("count", 2), ("threads", 1)):
            if getattr(self, name) is not None:
                integer(name, getattr(self, name), low)
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"out: expected a folder, got the file {self.out}")


def settings_of(options: Options) -> study.Settings:
    """Returns the study's settings for these options.

    Raises:
        OSError, ValueError: the grid's file cannot be read or is none, or a value is out of range.
    """
    grid = options.grid or ("small" if options.quick else "paper")
    named: dict[str, Callable[[], list[grids.Cell]]] = {
        "paper": grids.paper_grid,
        "small": grids.small_grid,
    }
    cells = named[grid]() if grid in named else grids.read_grid(grid)
    default = 16 if options.quick else 24
    return study.Settings(
        cells=cells,
        strings=options.strings,
        max_new_tokens=default if options.max_new_tokens is None else options.max_new_tokens,
        seed=options.seed,
    )


def run(
    options: Options,
    settings: study.Settings,
    *,
    out: Console | None = None,
    err: Console | None = None,
) -> dict[str, Any]:
    """Runs a study and writes `results.json`, figures and `report.md` into its folder.

    Args:
        options: what to load.
        settings: from `settings_of`.
        out: for the paths written.
        err: for the progress bars.

    Returns:
        The results.

    Raises:
        ModelNotFoundError: a model is missing.
        OSError, ValueError: as `study.run_study`; prompts or a reward that cannot be read.
    """
    out, err = out or Console(), err or Console(stderr=True)
    if options.threads:
        torch.set_num_threads(options.threads)
    prompts = _prompts(options)
    reward, reward_name = _reward(options)
    if reward is not None:
        # one that raises or returns no numbers stops here, before a model is loaded
        corpora.reward_values(reward, prompts.texts[0], ["Yes.", "No, I cannot."])
    aligned, prior = _sides(options, err)
    with progress_bar(err, auto_refresh=False) as bar:
        step = stepper(bar, "sampling, prompt by prompt", len(prompts.texts))
        results = study.run_study(
            aligned,
            prior,
            prompts,
            settings,
            options.out,
            names={
                "model": options.model or DEFAULT_MODEL,
                "prior": options.prior or options.model or DEFAULT_MODEL,
                "system": aligned.system,
                "prior_system": prior.system,
                "reward": reward_name,
                "dtype": str(aligned.model.dtype).removeprefix("torch."),
            },
            reward=reward,
            on_part=step,
            command=command(options),
        )
    report = write_report(results, options.out, draw_figures(results, options.out))
    out.print(
        f"{report} and its figures; all numbers in {options.out / 'results.json'}", soft_wrap=True
    )
    return results


def command(options: Options) -> str:
    """Returns the command line of some options, naming files without their folders."""
    words = ["fastadapt", "tradeoff", "--out", options.out.name]
    for name in ("model", "prior", "system", "prior_system", "prompts", "count", "grid", "strings"):
        value = getattr(options, name)
        if value is not None:
            words += [_flag(name), value.name if isinstance(value, Path) else str(value)]
    for name in ("max_new_tokens", "reward", "reward_model", "seed"):
        if getattr(options, name) is not None:
            words += [_flag(name), str(getattr(options, name))]
    return shlex.join([*words, *(["--quick"] if options.quick else [])])


def _flag(name: str) -> str:
    """Returns the flag of an option."""
    return "--" + name.replace("_", "-")


def _prompts(options: Options) -> contexts.Prompts:
    """Returns as many prompts as asked for."""
    if options.prompts:
        prompts = contexts.read_prompts(options.prompts)
    else:
        prompts = contexts.builtin_prompts()
    count = options.count
    if count is None and options.quick:
        count = min(_QUICK_PROMPTS, len(prompts.texts))
    if count is not None and count > len(prompts.texts):
        raise ValueError(f"count: expected at most {len(prompts.texts)}, got {count}")
    return prompts._replace(texts=prompts.texts[:count])


def _reward(options: Options) -> tuple[Reward | None, str | None]:
    """Returns the user's reward and its name in the report, if there is one."""
    if options.reward:
        return rewards.reward_function(options.reward), f"the function {options.reward}"
    if options.reward_model:
        name = options.reward_model
        return rewards.reward_model(name), f"the reward model {name}"
    return None, None


def _sides(options: Options, err: Console) -> tuple[contexts.Side, contexts.Side]:
    """Returns the two distributions; a model that both share is loaded once."""
    system = options.system
    if system is None and options.prior is None:
        system = contexts.SYSTEM
    with progress_bar(err, auto_refresh=True) as bar:
        task = bar.add_task("loading the model", total=None)

        def report(phase: str, done: int, total: int) -> None:
            bar.update(task, description=phase, completed=done, total=total if done else None)

        def load(name: str | None) -> tuple[Any, Any]:
            return load_model(name, fetch=True, progress=report)

        model, tokenizer = load(options.model)
        others = (model, tokenizer) if options.prior is None else load(options.prior)
    aligned = contexts.Side(model, tokenizer, system)
    return aligned, contexts.Side(*others, options.prior_system)
