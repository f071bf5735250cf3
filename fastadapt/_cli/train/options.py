"""Options of `fastadapt train` beside trl's own: data, losses, stages, adapters."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from fastadapt._cli.errors import did_you_mean
from fastadapt.losses.catalogue.listing import CATALOGUE
from fastadapt.losses.mixture import FORMULAS, RewardPenalizeLoss
from fastadapt.losses.named import ALIASES, name_of
from fastadapt.losses.responses import Responses

Stages = tuple[dict[str, float], ...]
# of the needs of losses, what a batch of pairs with a reference that was computed before serves
SERVED = frozenset(
    {"pairs", "unpaired", "reference", "lengths", "batch", "candidates", "mean_logits"}
)
# KTO's reference point takes a forward of the reference in each step.
CANDIDATES = "candidate_unlikelihood_penalty"
OFFERED = [name for name, entry in CATALOGUE.items() if entry.needs <= SERVED and name != "kto"]
TRUNCATIONS = ("prompt", "response", "error")
_OF_THE_LOSSES = ("coefficient", "norm", "level")


def _flag(text: str, default: Any = None, **more: Any) -> Any:
    """Declares an option with the help text of its flag."""
    return field(default=default, metadata={"help": text, **more})


@dataclass
class RunArguments:
    """Options of a run: data, model, losses and stages; `ValueError` if one is out of range.

    Each field is a flag of the command with the same name; its help text says what it is.
    """

    data: list[str] = field(
        metadata={"help": "preference pairs: files, or a data set of the hub (owner/name)"}
    )
    model: str | None = _flag(
        "a causal language model: folder, .gguf or hub (default: the demo's)",
        aliases=["--model_name_or_path"],
    )
    loss: str | None = _flag("one stage: losses joined by +, weighted or not: dpo+exmate=0.5")
    stages: str | None = _flag("several, one after the other: exmate,dpo or mle,dpo=1+exmate=0.5")
    learning_rates: list[float] | None = _flag("one for each stage, in place of --learning_rate")
    coefficient: float | None = _flag("of the penalty inside a loss (default: 1)")
    norm: str | None = _flag("of ExMATE: sequence_mean, batch_token_mean, sequence_sum or token")
    level: str | None = _flag("of unlikelihood: token, sequence or sequence_mean")
    loss_options: list[str] | None = _flag(
        "others, NAME=VALUE or LOSS.NAME=VALUE: gamma=1 dpo.beta=0.3; `fastadapt losses NAME` "
        "lists a loss's own"
    )
    negatives: str | None = _flag(
        "what candidate_unlikelihood_penalty makes less likely in the rows of chosen responses: "
        "previous, top_k or repeated_ngrams"
    )
    negative_options: list[str] | None = _flag(
        "of --negatives, NAME=VALUE: window=32, k=5, n=3, context=sequence"
    )
    # trl's flags that are options of losses, those that were given
    of_trl: dict[str, float] = field(default_factory=dict, init=False)
    split: str = _flag("split of --data, if it is a data set of the hub", "train")
    eval_data: list[str] | None = _flag("pairs to evaluate on")
    eval_split: str = _flag("split of --eval_data, if it is a data set of the hub", "test")
    eval_fraction: float = _flag("share of --data to evaluate on, in place of --eval_data", 0.0)
    chat: bool = _flag("treat text prompts as a user's messages, in the chat template", False)
    truncation: str = _flag(
        "what is cut from pairs of more than --max_length tokens: the prompt's beginning, the "
        "responses' ends, or nothing (an error)",
        "prompt",
        choices=TRUNCATIONS,
    )
    lora_r: int | None = _flag("train LoRA adapters of this rank instead of all parameters")
    lora_alpha: int | None = _flag("scale of the adapters (default: twice the rank)")
    lora_target_modules: list[str] | None = _flag("the layers with adapters (default: all linear)")
    threads: int | None = _flag("threads of torch (default: torch's own choice)")
    resume: bool = _flag("continue from the newest complete checkpoint, if there is one", False)

    def __post_init__(self) -> None:
        """Checks ranges and options that exclude each other."""
        for name in ("lora_r", "lora_alpha", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if self.truncation not in TRUNCATIONS:  # a file's values are no choices of argparse
            expected = f"expected one of {TRUNCATIONS}"
            raise ValueError(f"truncation: {expected}, got {self.truncation!r}")
        if not 0 <= self.eval_fraction < 1:
            raise ValueError(f"eval_fraction: expected a share in [0, 1), got {self.eval_fraction}")
        if self.eval_fraction and self.eval_data:
            raise ValueError("eval_fraction: expected it without eval_data, got both")
        if self.lora_r is None and (self.lora_alpha or self.lora_target_modules):
            raise ValueError("lora_r: expected a rank beside the other flags of LoRA, got none")
        for rate in self.learning_rates or ():
            if not 0 < rate < math.inf:
                raise ValueError(f"learning_rates: expected values above 0, got {rate}")
        parse_options(self.loss_options or ())
        self.options_of_negatives()
        count = len(self.mixtures())
        if self.learning_rates and len(self.learning_rates) != count:
            got = len(self.learning_rates)
            raise ValueError(f"learning_rates: expected {count}, one per stage, got {got}")

    def mixtures(self) -> Stages:
        """Returns the mixture of each stage."""
        return parse_stages(self.loss, self.stages)

    def options_of_losses(self) -> dict[str, Any]:
        """Returns the options of the losses that were set, as `RewardPenalizeLoss` takes them."""
        named = {name: getattr(self, name) for name in _OF_THE_LOSSES}
        set_here = {name: value for name, value in named.items() if value is not None}
        return {**self.of_trl, **set_here, **parse_options(self.loss_options or ())}

    def options_of_negatives(self) -> dict[str, Any]:
        """Returns the options of the negatives that were set."""
        words = self.negative_options or ()
        if dotted := [word for word in words if "." in word.partition("=")[0]]:
            raise ValueError(f"negative_options: expected NAME=VALUE, got {dotted[0]!r}")
        return parse_options(words, "negative_options")


def parse_options(words: Iterable[str], flag: str = "loss_options") -> dict[str, Any]:
    """Reads NAME=VALUE, an option of all losses that have it, and LOSS.NAME=VALUE, of one.

    A value is a number, true, false or null, else text.

    Raises:
        ValueError: a word of another form, an option that is said twice.
    """
    found: dict[str, Any] = {}
    more = " or LOSS.NAME=VALUE" if flag == "loss_options" else ""
    for word in words:
        name, equals, text = word.partition("=")
        loss, dot, own = name.rpartition(".")
        if not equals or not own or (dot and not loss):
            raise ValueError(f"{flag}: expected NAME=VALUE{more}, got {word!r}")
        if dot and name_of(loss) not in CATALOGUE:
            hint = did_you_mean(loss, CATALOGUE)
            raise ValueError(f"{flag}: expected a loss before the dot, got {loss!r}{hint}")
        into = found.setdefault(name_of(loss), {}) if dot else found
        if own in into:
            raise ValueError(f"{flag}: expected each option once, got {name!r} twice")
        into[own] = _value(text)
    return found


def _value(text: str) -> Any:
    """Reads a value of an option."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def parse_stages(loss: str | None, stages: str | None) -> Stages:
    """Reads "dpo+exmate=0.5", one stage, or "exmate,dpo+mle=0.5", a stage between commas.

    Raises:
        ValueError: neither or both, a comma in one stage, a loss that there is not, a loss named
            twice, a weight that is no finite number.
    """
    if (loss is None) == (stages is None):
        got = "neither" if loss is None else "both"
        raise ValueError(f"loss, stages: expected one of --loss and --stages, got {got}")
    if stages is not None:
        return tuple(_mixture("stages", part) for part in stages.split(","))
    text = loss or ""
    if "," in text:
        joined = text.replace(",", "+")
        raise ValueError(
            f"loss: expected losses joined by +, got {text!r}; their sum is --loss {joined}, "
            f"one after the other --stages {text}"
        )
    return (_mixture("loss", text),)


def objective_of(stage: Mapping[str, float], options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options that the losses of a stage take, those of one loss alone under it."""
    own = {name for loss in stage for name in _options_of(loss)}
    return {name: value for name, value in options.items() if name in own or name in stage}


def check_losses(stages: Stages, options: Mapping[str, Any], micro_batches: int) -> None:
    """Computes every stage's loss on a toy pair, so that wrong options fail before training.

    Args:
        stages: the mixtures.
        options: of the losses, as `objective_of` takes them; each must be of some loss.
        micro_batches: how many batches and processes share a step.

    Raises:
        ValueError: whatever a loss refuses, or an option of none of them.
    """
    log_odds, mask = torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)
    toy, reference = Responses(log_odds, mask), torch.zeros(1)
    used: set[str] = set()
    for stage in stages:
        own = objective_of(stage, options)
        used |= set(own)
        objective = RewardPenalizeLoss(stage, **own)
        more = {
            "reward_shift": torch.zeros(()),
            **dict.fromkeys(("logsumexp", "mean_logits"), log_odds),
            "candidates": log_odds[..., None],
            "candidate_mask": mask[..., None],
        }
        needed = {name: value for name, value in more.items() if objective.needs(name)}
        objective(toy, toy, reference, reference, **needed)
        if not objective.splits and micro_batches > 1:
            raise ValueError(
                f"norm: expected one that splits over {micro_batches} micro-batches, "
                "got 'batch_token_mean'"
            )
    unused = sorted(set(options) - used)
    if unused:
        names = ", ".join(name for stage in stages for name in stage)
        expected = "a stage with it" if unused[0] in CATALOGUE else "a loss that has it"
        known = {name for stage in stages for loss in stage for name in _options_of(loss)}
        hint = did_you_mean(unused[0], known)
        raise ValueError(f"{unused[0]}: expected {expected}, got {names}{hint}")


def _options_of(loss: str) -> list[str]:
    """Returns the names of a loss's options."""
    own = inspect.signature(FORMULAS[loss]).parameters.values()
    return [p.name for p in own if p.kind is p.KEYWORD_ONLY]


def _mixture(flag: str, text: str) -> dict[str, float]:
    """Parses the losses of one stage, each with its weight or 1."""
    mixture: dict[str, float] = {}
    for part in text.split("+"):
        word, equals, written = part.strip().partition("=")
        name = name_of(word)
        if name not in OFFERED:
            known, hint = ", ".join(OFFERED), did_you_mean(word, [*OFFERED, *ALIASES])
            if name in CATALOGUE:
                lacking = sorted(CATALOGUE[name].needs - SERVED) or ["reference_point"]
                hint = f", which needs what this command has not: {', '.join(lacking)}"
            raise ValueError(f"{flag}: expected some of {known}, got {word!r}{hint}")
        if name in mixture:
            raise ValueError(f"{flag}: expected each loss once in a stage, got {name!r} twice")
        try:
            weight = float(written) if equals else 1.0
        except ValueError:
            weight = math.nan
        if not math.isfinite(weight):
            raise ValueError(f"{flag}: expected a number as the weight of {name}, got {written!r}")
        mixture[name] = weight
    return mixture
