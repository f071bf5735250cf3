"""The demo: a real model's text through the fused sampler, beside transformers' own chain.

Its second part, in `demo_training`, trains the model.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text
from torch import Tensor

from fastadapt import Adaptor, sample
from fastadapt._cli import demo_training
from fastadapt._cli.measure import (
    BAND,
    Generation,
    KeptSetAudit,
    encode_prompts,
    generate,
    median_ms,
    mode_kwargs,
    step_ms,
    step_ratios,
    stock_chain,
    time_generation,
    tokens_per_s,
)
from fastadapt._ops.checks import integer
from fastadapt.study._progress import progress_bar, stepper
from fastadapt.training.pretrained import DEFAULT_MODEL, load_model, terms_to_accept

PROMPTS = (
    "Give three tips for staying healthy.",
    "Write a short story about a robot who learns to paint.",
    "Explain why the sky is blue to a ten-year-old.",
    "What should I cook tonight with rice, eggs and spinach?",
    "Describe a quiet morning in a small fishing village.",
    "Suggest names for a bakery and say why they fit.",
    "How does a bicycle stay upright?",
    "Write a friendly note that thanks a neighbour for watering the plants.",
)
BEGINNINGS = (  # for base models, which continue a text
    "Three things keep people healthy:",
    "Once upon a time there was a robot who wanted to paint. One morning",
    "The sky is blue because",
    "Fried rice with eggs and spinach. Ingredients:",
    "It was a quiet morning in the fishing village. The boats",
    "A good name for a bakery is one that",
    "A bicycle stays upright because",
    "Dear neighbour, thank you for watering",
)
_SHOWN_TEXTS = 8


class PromptTooLongError(ValueError):
    """A prompt with the tokens to generate is longer than the model's context."""


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """Options of the demo.

    Args:
        adaptor: the sampling adaptor, numbers only, in transformers' order.
        prompts: user messages, or for a base model beginnings of texts; none: the built-in ones.
        batch: sequences at once, at least one per given prompt; prompts repeat to fill it.
        max_new_tokens: tokens generated per sequence, at least 2.
        seed: seed of every draw.
        threads: torch's threads, `None` for torch's own choice.
        model: as `pretrained.load_model` takes it; `None` for the default model.
        rounds: how often each mode is timed.
        train: whether the second part follows; `None` for only with the default model, since
            another one may be too large.
        accept_terms: whether the model's terms of use, if it has any, are accepted.

    Raises:
        ValueError: a value is out of range; the message has the expected and the actual one.
    """

    adaptor: Adaptor
    prompts: tuple[str, ...] = ()
    batch: int | None = None
    max_new_tokens: int = 32
    seed: int = 0
    threads: int | None = None
    model: str | None = None
    rounds: int = 3
    train: bool | None = None
    accept_terms: bool = False

    def __post_init__(self) -> None:
        """Check every value before anything is loaded."""
        for name, low in (("batch", 1), ("max_new_tokens", 2), ("threads", 1), ("rounds", 1)):
            if getattr(self, name) is not None:
                integer(name, getattr(self, name), low)
        if not 0 <= self.seed < 2**62:
            raise ValueError(f"seed: expected 0 <= seed < 2**62, got {self.seed}")
        for number, prompt in enumerate(self.prompts, start=1):
            if not prompt.strip():
                raise ValueError(f"prompt: expected text, got an empty prompt (number {number})")
        if self.batch is not None and self.batch < len(self.prompts):
            raise ValueError(
                f"batch: expected at least the number of prompts, {len(self.prompts)}, "
                f"got {self.batch}"
            )
        if self.model is not None and not self.model.strip():
            raise ValueError("model: expected a name or a path, got an empty one")
        adaptor = self.adaptor
        if adaptor.rows is not None or adaptor.order != "hf" or adaptor.min_tokens_to_keep != 1:
            raise ValueError(f"adaptor: expected numbers in order 'hf' that keep 1, got {adaptor}")
        if adaptor.temperature == 0:
            raise ValueError(
                "temperature: expected above 0, got 0; the demo compares sampling, and greedy "
                "search is timed beside it anyway"
            )

    @property
    def trains(self) -> bool:
        """Whether the demo goes on to train the model."""
        return self.model is None if self.train is None else self.train

    def filled_prompts(self, *, chat: bool) -> list[str]:
        """Return one prompt per sequence: the user's, or built-in ones for the kind of model."""
        prompts = self.prompts or (PROMPTS if chat else BEGINNINGS)
        batch = len(prompts) if self.batch is None else self.batch
        return [prompts[i % len(prompts)] for i in range(batch)]


def run(options: DemoOptions, *, out: Console | None = None, err: Console | None = None) -> None:
    """Run the demo and print its report.

    Args:
        options: what to do.
        out: where the report goes, standard output by default.
        err: where progress goes, standard error by default.

    Raises:
        ModelNotFoundError: the model cannot be loaded or fetched.
        TermsNotAcceptedError: its terms of use were not accepted.
        PromptTooLongError: a prompt does not fit the model.
    """
    out, err = out or Console(), err or Console(file=sys.stderr)
    adaptor, length = options.adaptor, options.max_new_tokens
    model, tokenizer = _load(options, err)
    prompts = options.filled_prompts(chat=bool(tokenizer.chat_template))
    inputs = encode_prompts(tokenizer, prompts)
    _check_length(model, inputs, length)
    kwargs = mode_kwargs(adaptor, seeds=options.seed + torch.arange(len(prompts)))
    audit = KeptSetAudit(adaptor)
    with _threads(options.threads), progress_bar(err, auto_refresh=False) as bar:
        step = stepper(bar, "generating", (options.rounds * len(kwargs) + 1) * length)
        runs = time_generation(
            model,
            inputs,
            kwargs,
            rounds=options.rounds,
            length=length,
            seed=options.seed,
            on_step=step,
        )
        audited = generate(model, inputs, kwargs["fused"], length=length, audit=audit, on_step=step)
        audit.check_drawn(audited.tokens[:, -1])
        timings = _time_kernels(adaptor, audit.scores, bar)
        threads = torch.get_num_threads()

    name = options.model or DEFAULT_MODEL
    out.print(Text(f"{name}, {adaptor}, seed {options.seed}, threads {threads}\n"))
    _print_texts(out, model, tokenizer, prompts, runs)
    out.print(_generation_table(runs))
    out.print(Text(_agreement(audit, torch.equal(runs["fused"][0].tokens, audited.tokens))))
    out.print(_kernel_table(timings, audit.scores))
    if options.trains:
        with _threads(options.threads), progress_bar(err, auto_refresh=False) as bar:
            step = stepper(bar, "training", demo_training.count_steps())
            report = demo_training.train(model, tokenizer, on_step=step)
        out.print()
        demo_training.print_report(out, report)


class KernelTiming(NamedTuple):
    """Median milliseconds of one call on the same logits."""

    adaptor: Adaptor
    kept: int
    softmax_ms: float
    stock_ms: float
    fused_ms: float


def _time_kernels(adaptor: Adaptor, logits: Tensor, bar: Progress) -> list[KernelTiming]:
    """Time one draw per row, fused and through transformers' chain, for several adaptors."""
    others = (
        Adaptor(top_k=50),
        Adaptor(top_p=0.9),
        Adaptor(min_p=0.05),
        Adaptor(typical_p=0.9),
        Adaptor(eta_cutoff=3e-4),
        Adaptor(temperature=0.7, top_k=50, top_p=0.95),
    )
    chosen = [adaptor, *(other for other in others if other != adaptor)]
    step = stepper(bar, "timing the kernels", len(chosen))
    seeds = torch.arange(len(logits))
    timings = []
    for one in chosen:
        chain: Any = stock_chain(one)

        def stock(chain: Any = chain) -> Tensor:
            return torch.multinomial(chain(seeds[:, None], logits).softmax(-1), 1)

        def fused(one: Adaptor = one) -> Tensor:
            return sample(logits, one, seeds=seeds).tokens

        times = median_ms([lambda: logits.softmax(-1), stock, fused], budget_s=0.7)
        kept = int(sample(logits, one, seeds=seeds).kept.median())
        timings.append(KernelTiming(one, kept, *times))
        step()
    return timings


def _load(options: DemoOptions, err: Console) -> tuple[Any, Any]:
    """Load the model with a progress bar (in a log: lines), once its terms are accepted."""
    accepted = _accepts_terms(options, err)
    shown = ""
    with progress_bar(err, auto_refresh=True) as bar:
        task = bar.add_task("loading the model", total=None)

        def report(phase: str, done: int, total: int) -> None:
            nonlocal shown
            if phase != shown and not err.is_terminal:
                err.print(Text(phase))
            shown = phase
            bar.update(task, description=phase, completed=done, total=total if done else None)

        return load_model(options.model, fetch=True, accept_terms=accepted, progress=report)


def _accepts_terms(options: DemoOptions, err: Console) -> bool:
    """Show the terms of the model, if it has any, and ask whether they are accepted."""
    terms = terms_to_accept(options.model)
    if terms is None or not (options.accept_terms or sys.stdin.isatty()):
        return False
    err.print(Text(f"{terms.text}\n{terms.url}\n"))
    if options.accept_terms:
        return True
    answer = ""
    with contextlib.suppress(EOFError):
        answer = err.input("Do you accept them? [y/N] ", markup=False)
    return answer.strip().lower() in {"y", "yes"}


def _check_length(model: Any, inputs: Mapping[str, Tensor], length: int) -> None:
    """Refuse prompts that leave no room for the tokens to generate."""
    prompt = inputs["input_ids"].shape[1]
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and prompt + length > limit:
        raise PromptTooLongError(
            f"prompt: expected at most {limit - length} tokens beside {length} new ones, "
            f"since the model has {limit} positions; got {prompt}"
        )


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Set torch's number of threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _print_texts(
    out: Console,
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    runs: Mapping[str, list[Generation]],
) -> None:
    """Print prompts and texts of the first sequences."""
    ends = model.generation_config.eos_token_id
    ends = {ends, tokenizer.eos_token_id} if isinstance(ends, int) else set(ends or ())
    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for row, prompt in enumerate(prompts[:_SHOWN_TEXTS]):
        table.add_row(Text("prompt", style="bold"), Text(_printable(prompt), style="bold"))
        for label, mode in (("transformers", "stock"), ("fastadapt", "fused")):
            tokens = runs[mode][0].tokens[row].tolist()
            length = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
            text = tokenizer.decode(tokens[:length], skip_special_tokens=True)
            table.add_row(label, Text(_printable(text)))
        table.add_row()
    out.print(table)
    if len(prompts) > _SHOWN_TEXTS:
        out.print(f"... and {len(prompts) - _SHOWN_TEXTS} more sequences")


def _printable(text: str) -> str:
    """Return a text without surrounding blanks, empty lines and control characters."""
    lines = (line.rstrip() for line in text.strip().splitlines())
    return "\n".join("".join(filter(str.isprintable, line)) for line in lines if line)


def _generation_table(runs: Mapping[str, list[Generation]]) -> Table:
    """Tabulate the speed and the cost of a step in each mode."""
    batch, length = runs["greedy"][0].tokens.shape
    table = Table(
        title=f"Generation: batch {batch}, {length} new tokens, {len(runs['greedy'])} rounds",
        title_justify="left",
    )
    table.add_column("mode")
    for name in ("tokens/s", "ms/step", "x greedy"):
        table.add_column(name, justify="right")
    labels = {"greedy": "greedy", "stock": "sampling, transformers", "fused": "sampling, fastadapt"}
    for mode, label in labels.items():
        ratio = statistics.median(step_ratios(runs[mode], runs["greedy"]))
        speed, cost = tokens_per_s(runs[mode]), step_ms(runs[mode])
        table.add_row(label, f"{speed:.1f}", f"{cost:.2f}", f"{ratio:.3f}")
    return table


def _agreement(audit: KeptSetAudit, repeated: bool) -> str:
    """Describe how well the kept sets agree with transformers'."""
    return (
        f"\nKept sets: {audit.equal} of {audit.rows} equal transformers' own at every step "
        f"(median {statistics.median(audit.kept):.0f} tokens kept, at most {max(audit.kept)}).\n"
        f"Differing tokens: {audit.wrong} wrong, {audit.in_band} within {BAND:g} of a threshold, "
        f"{audit.ties} tied with it.\n"
        f"Drawn tokens inside transformers' kept set: {audit.drawn - audit.drawn_outside} of "
        f"{audit.drawn}.\n"
        f"Same seeds, same tokens in a second run: {'yes' if repeated else 'NO'}.\n"
    )


def _kernel_table(timings: Sequence[KernelTiming], logits: Tensor) -> Table:
    """Tabulate the time of one draw per row."""
    softmax = statistics.median(timing.softmax_ms for timing in timings)
    rows, vocabulary = logits.shape
    table = Table(
        title=f"One call on {rows} x {vocabulary} real logits; torch.softmax: {softmax:.2f} ms",
        title_justify="left",
        caption="transformers: its warpers, softmax, multinomial. fastadapt: sample()",
        caption_justify="left",
    )
    table.add_column("adaptor", overflow="fold")
    for name in ("kept", "transformers\nms", "fastadapt\nms", "speed-\nup", "x soft-\nmax"):
        table.add_column(name, justify="right")
    for timing in timings:
        table.add_row(
            repr(timing.adaptor).removeprefix("Adaptor"),
            str(timing.kept),
            f"{timing.stock_ms:.2f}",
            f"{timing.fused_ms:.2f}",
            f"{timing.stock_ms / timing.fused_ms:.1f}",
            f"{timing.fused_ms / softmax:.2f}",
        )
    return table
