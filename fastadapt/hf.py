"""Hooks for transformers: a generation loop with a fused draw, and a fused logits processor.

`generate` runs transformers' own decoding loop as a greedy search whose last processor has drawn
already: it returns one-hot rows, so the loop's argmax finds the token. `FusedLogitsWarper` is the
mask alone, for code that samples by itself.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    GenerationConfig,
    LogitNormalization,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_managed_module

from fastadapt.adaptor import Adaptor
from fastadapt.sampling import filter_logits, sample

# In the order in which transformers runs them: the knob of ours, the attribute of theirs.
_WARPERS = {
    TemperatureLogitsWarper: ("temperature", "temperature"),
    TopKLogitsWarper: ("top_k", "top_k"),
    TopPLogitsWarper: ("top_p", "top_p"),
    MinPLogitsWarper: ("min_p", "min_p"),
    TypicalLogitsWarper: ("typical_p", "mass"),
    EpsilonLogitsWarper: ("epsilon_cutoff", "epsilon"),
    EtaLogitsWarper: ("eta_cutoff", "epsilon"),
}
_STATUS = {
    1: "NaN among its scores",
    2: "+inf among its scores",
    3: "no finite score",
    4: "a sampling knob out of range",
}


class FusedLogitsWarper(LogitsProcessor):
    """Masks logits by an adaptor in one fused call; removed entries become -inf.

    A user's processor runs before the warpers that transformers builds from the generation config
    (whose default is top_k=50), so those must be neutral; `generate_kwargs` says so:

        model.generate(**inputs, **FusedLogitsWarper(Adaptor(top_p=0.9)).generate_kwargs())

    Together with `custom_generate=fastadapt.hf.generate` mask and draw are one call; that is the
    way to give each sequence knobs of its own.

    Args:
        adaptor (Adaptor): a per-row knob holds one value per sequence, that is prompts times
            `num_return_sequences`, those of one prompt next to each other.

    Raises:
        TypeError: `adaptor` is not an `Adaptor`.
        ValueError: (when called) the per-row knobs do not fit the batch.
    """

    def __init__(self, adaptor: Adaptor) -> None:
        """Keeps the adaptor."""
        if not isinstance(adaptor, Adaptor):
            raise TypeError(f"adaptor: expected an Adaptor, got {type(adaptor).__name__}")
        self.adaptor = adaptor

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Filters the scores, (N, V); a row with NaN, +inf or nothing finite stays as it is."""
        _check_rows(self.adaptor, scores.shape[0])
        return filter_logits(scores, self.adaptor)

    def generate_kwargs(self) -> dict[str, Any]:
        """Return keyword arguments of `model.generate` that make this the only warper."""
        return {
            "logits_processor": LogitsProcessorList([self]),
            "do_sample": True,
            "temperature": 1.0,
            "top_h": None,
            "top_k": 0,
            "top_p": 1.0,
            "min_p": None,
            "typical_p": 1.0,
            "epsilon_cutoff": 0.0,
            "eta_cutoff": 0.0,
        }


@dataclass(frozen=True, eq=False)
class Generate:
    """Generate with filters and draw fused: `model.generate(..., custom_generate=generate)`.

    Equivalent to `model.generate(...)` with the same arguments: the same processors, kept tokens,
    scores, stopping and outputs; only the random numbers differ. `do_sample=False` is
    transformers' greedy search, unchanged.

    The warpers at the end of the prepared processor list (temperature, top-k, top-p, min-p,
    typical, epsilon, eta, in this order) are read into one `Adaptor`. Where another processor
    stands among or after them (top-h, a watermark), or they disagree on `min_tokens_to_keep`, are
    repeated, out of order or have a finite `filter_value`, the chain runs as it is and only the
    draw is fused. `LogitNormalization` may follow, and a `FusedLogitsWarper` may take their place.

    Arguments of `model.generate` that are special here:
        seeds: one int64 per returned sequence, prompts times `num_return_sequences`, those of one
            prompt next to each other. The n-th token that a call generates in a sequence depends
            on its logits, the knobs, its seed and n alone: neither padding nor batch mates nor
            the default generator matter. Without seeds the default generator is used, so
            `torch.manual_seed` reproduces.
        streamer, synced_gpus: never reach a callable; pass them to `using` instead. `synced_gpus`
            is otherwise chosen as transformers does.
        stop_strings: its tokenizer never reaches a callable; pass
            `stopping_criteria=[StopStringCriteria(tokenizer, stop_strings)]` instead.
        assistant_model: never reaches a callable; it is ignored.

    Raises:
        ValueError: a mode other than sampling and greedy search (beams, contrastive, assisted,
            DoLa, constraints), `stop_strings`, `seeds` without `do_sample=True`, or seeds or
            per-row knobs that do not fit the batch.
        TypeError: seeds that are not integers.
        RuntimeError: an unfinished row has NaN, +inf or nothing finite. On a CPU at once; elsewhere
            the row ends with the pad token and the error follows after the loop, so that no step
            waits for the device.
    """

    streamer: BaseStreamer | None = None
    synced_gpus: bool | None = None
    seeds: Sequence[int] | Tensor | None = None

    def using(
        self,
        *,
        streamer: BaseStreamer | None = None,
        synced_gpus: bool | None = None,
        seeds: Sequence[int] | Tensor | None = None,
    ) -> "Generate":
        """Return a callable for `custom_generate` with these settings and no others.

        Args:
            streamer (BaseStreamer): receives the prompt, every token, and the end.
            synced_gpus (bool): keep calling the model until every rank has finished.
            seeds (Tensor or sequence of int): as the `seeds` of `model.generate`.
        """
        return Generate(streamer, synced_gpus, seeds)

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        *,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        seeds: Sequence[int] | Tensor | None = None,
        stop_strings: object = None,
        **model_kwargs: Any,
    ) -> Any:
        """Run the loop; called by `model.generate`, which prepares the arguments."""
        if stop_strings is not None:  # named above, it is kept from the generation config
            raise ValueError(
                "stop_strings: expected none, because transformers hands a callable no tokenizer; "
                "pass stopping_criteria=[StopStringCriteria(tokenizer, stop_strings)] instead"
            )
        _check_mode(generation_config)
        seeds = self._seeds(seeds, input_ids, generation_config)
        draw = None
        if generation_config.do_sample:
            head, adaptor, normalised = _split(logits_processor)
            _check_rows(adaptor, input_ids.shape[0])
            draw = _Draw(adaptor, normalised, input_ids, seeds, generation_config)
            logits_processor = LogitsProcessorList([*head, draw])
            stopping_criteria = _Stopping(stopping_criteria, draw)
            generation_config = copy.copy(generation_config)
            generation_config.do_sample = False
        if self.streamer is not None:
            self.streamer.put(input_ids.cpu())
        output = model._sample(
            input_ids,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            synced_gpus=_is_sharded(model) if self.synced_gpus is None else self.synced_gpus,
            streamer=self.streamer,
            **model_kwargs,
        )
        return output if draw is None else draw.finish(output)

    def _seeds(
        self, seeds: Sequence[int] | Tensor | None, input_ids: Tensor, config: GenerationConfig
    ) -> Tensor | None:
        """The seeds of this call, from either place, as (N,) int64 on the device of the ids."""
        if seeds is not None and self.seeds is not None:
            raise ValueError("seeds: expected in `using` or in `model.generate`, got them in both")
        seeds = self.seeds if seeds is None else seeds
        if seeds is None:
            return None
        if not config.do_sample:
            raise ValueError("seeds: expected do_sample=True beside them, got do_sample=False")
        tensor, rows = torch.as_tensor(seeds), input_ids.shape[0]
        if tensor.shape != (rows,):
            raise ValueError(
                f"seeds: expected shape ({rows},), one per sequence (prompts times "
                f"num_return_sequences), got {tuple(tensor.shape)}"
            )
        if tensor.dtype == torch.bool or tensor.is_floating_point() or tensor.is_complex():
            raise TypeError(f"seeds: expected integers, got {tensor.dtype}")
        return tensor.to(input_ids.device, torch.int64)


generate = Generate()


class _Draw(LogitsProcessor):
    """Last of the processors: draws a token per row and returns one-hot rows for the argmax."""

    def __init__(
        self,
        adaptor: Adaptor,
        normalised: bool,
        input_ids: Tensor,
        seeds: Tensor | None,
        config: GenerationConfig,
    ) -> None:
        """Sets up the bookkeeping of one call of the loop."""
        rows, self.prompt_length = input_ids.shape[:2]
        self.adaptor, self.normalised, self.seeds = adaptor, normalised, seeds
        self.records = bool(config.return_dict_in_generate and config.output_scores)
        self.scores: list[Tensor] = []
        self.pad_token = _pad_token(config)
        self.at_once = _reads_are_free(input_ids.device)
        self.finished = torch.zeros(rows, dtype=torch.bool, device=input_ids.device)
        self.status = torch.zeros(rows, dtype=torch.uint8, device=input_ids.device)
        self.one_hot: Tensor | None = None
        self.previous: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Draws from the scores, (N, V); 1 at each row's token and 0 elsewhere."""
        positions = None
        if self.seeds is not None:
            positions = torch.full_like(self.seeds, input_ids.shape[1] - self.prompt_length)
        drawn = sample(scores, self.adaptor, seeds=self.seeds, positions=positions)
        seen = self.finished | (self.status != 0)
        self.status = torch.where(seen, self.status, drawn.status)
        if self.at_once:
            _raise_bad_rows(self.status)
        if self.records:
            kept = filter_logits(scores, self.adaptor)
            self.scores.append(kept.log_softmax(-1) if self.normalised else kept)
        tokens = torch.where(drawn.status == 0, drawn.tokens, self.pad_token)
        return self._rows_of(tokens[:, None], scores)

    def _rows_of(self, tokens: Tensor, scores: Tensor) -> Tensor:
        """The one-hot rows, in one buffer for all steps: two writes a row, not one a score."""
        if self.one_hot is None or self.previous is None:
            self.one_hot = torch.zeros_like(scores)
        else:
            self.one_hot.scatter_(1, self.previous, 0.0)
        self.previous = tokens
        return self.one_hot.scatter_(1, tokens, 1.0)

    def end_rows(self, done: Tensor) -> Tensor:
        """Rows that end with this step: those that are done, and the bad ones."""
        self.finished = self.finished | done | (self.status != 0)
        return self.finished

    def finish(self, output: Any) -> Any:
        """The loop's output with the true scores; raises for bad rows."""
        _raise_bad_rows(self.status)
        if self.records:
            output.scores = tuple(self.scores[: len(output.scores)])
        return output


class _Stopping(StoppingCriteriaList):
    """The given criteria, who see the true scores; bad rows stop too."""

    def __init__(self, criteria: StoppingCriteriaList, draw: _Draw) -> None:
        """Holds the criteria and the processor that knows the scores."""
        super().__init__(criteria)
        self.draw = draw

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Which rows end, (N,) bool."""
        true_scores = None if scores is None else tuple(self.draw.scores)
        return self.draw.end_rows(super().__call__(input_ids, true_scores, **kwargs))


def _split(processors: LogitsProcessorList) -> tuple[list[LogitsProcessor], Adaptor, bool]:
    """What runs before the draw, the adaptor fused with it, and whether scores are normalised."""
    body = list(processors)
    normalised = bool(body) and type(body[-1]) is LogitNormalization
    if normalised:
        body.pop()
    if body and type(body[-1]) is FusedLogitsWarper:
        return body[:-1], body[-1].adaptor, normalised
    split = len(body) - sum(type(p) in _WARPERS for p in body)
    head, tail = body[:split], body[split:]
    kinds = [type(warper) for warper in tail]
    if not tail or kinds != [kind for kind in _WARPERS if kind in kinds]:
        return list(processors), Adaptor(), False
    # top-k has its own minimum in top_k already
    guarded = [w for w in tail if type(w) not in (TemperatureLogitsWarper, TopKLogitsWarper)]
    keep = {w.min_tokens_to_keep for w in guarded} or {1}
    few = any(w.top_k < max(keep) for w in tail if type(w) is TopKLogitsWarper)
    finite = any(getattr(w, "filter_value", -math.inf) != -math.inf for w in tail)
    if few or finite or len(keep) > 1:
        return list(processors), Adaptor(), False
    knobs: dict[str, Any] = {}
    for warper in tail:
        knob, attribute = _WARPERS[type(warper)]
        value = getattr(warper, attribute)
        knobs[knob] = int(value) if knob == "top_k" else float(value)
    return head, Adaptor(**knobs, min_tokens_to_keep=keep.pop()), normalised


def _check_mode(config: GenerationConfig) -> None:
    """Raises unless the config asks for one sequence per row and one token per step."""
    mode = config.get_generation_mode()
    if mode not in ("sample", "greedy_search"):
        raise ValueError(
            f"generation mode: expected sampling or greedy search, got {mode.value}; "
            "set num_beams=1 and no contrastive, assisted, DoLa or constraint option"
        )


def _check_rows(adaptor: Adaptor, rows: int) -> None:
    """Raises unless per-row knobs fit the batch."""
    if adaptor.rows is not None and adaptor.rows != rows:
        raise ValueError(
            f"adaptor: expected per-row knobs for {rows} sequences (prompts times "
            f"num_return_sequences), got {adaptor.rows}; repeat_interleave expands them as "
            "transformers expands the prompts"
        )


def _raise_bad_rows(status: Tensor) -> None:
    """Raises naming every row whose status is not 0."""
    if bool(status.any()):
        bad = [(row, code) for row, code in enumerate(status.tolist()) if code]
        listed = "; ".join(f"row {row} has {_STATUS[code]} (status {code})" for row, code in bad)
        raise RuntimeError(f"no token can be drawn: {listed}")


def _reads_are_free(device: torch.device) -> bool:
    """Whether the host can look at a value without waiting for a device."""
    return device.type == "cpu"


def _pad_token(config: GenerationConfig) -> int:
    """The id that a bad row gets: pad, else the first end of sequence, else 0."""
    for token in (config.pad_token_id, config.eos_token_id):
        if token is not None:
            return max(int(torch.as_tensor(token).flatten()[0]), 0)
    return 0


def _is_sharded(model: Any) -> bool:
    """Whether ranks share the weights and so must call the model equally often."""
    zero3 = is_deepspeed_zero3_enabled()
    if not (zero3 or is_fsdp_managed_module(model)):
        return False
    distributed = torch.distributed
    return (
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    )
