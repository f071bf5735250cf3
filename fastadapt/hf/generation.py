"""Hooks for transformers: a generation loop with a fused draw, and a fused logits processor.

`generate` runs transformers' own decoding loop as a greedy search whose last processor has drawn
already: it returns one-hot rows, so the loop's argmax finds the token. `FusedLogitsWarper` is the
mask alone, for code that samples by itself.
"""

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from fastadapt._ops.checks import instance, integers
from fastadapt.adaptor import Adaptor
from fastadapt.hf._asked import has_drafts, is_asked, is_sharded
from fastadapt.hf._chain import chain_of
from fastadapt.hf._drafted import Drafted, WithDrafts, check_assistant
from fastadapt.hf._draw import Draw, Stopping, Watch
from fastadapt.hf._split import refuse_whole_rows
from fastadapt.hf._streams import Seeds, Streams, seeds_of
from fastadapt.hf._told import Supports, Told
from fastadapt.hf._unreachable import refuse_unreachable
from fastadapt.sampling.functions import filter_logits


class FusedLogitsWarper(LogitsProcessor):
    """Masks logits by an adaptor in one fused call; removed entries become -inf.

    A user's processor runs before the warpers that transformers builds from the generation config
    (whose default is top_k=50), so those must be neutral; `generate_kwargs` says so:

        model.generate(**inputs, **FusedLogitsWarper(Adaptor(top_p=0.9)).generate_kwargs())

    Together with `custom_generate=fastadapt.hf.generate` mask and draw are one call; that is the
    way to give each sequence knobs of its own.

    Examples:
        >>> from fastadapt.hf import FusedLogitsWarper
        >>> warper = FusedLogitsWarper(Adaptor(top_k=2))
        >>> warper(torch.tensor([[5]]), torch.tensor([[2.0, 1.0, 0.0, -1.0]]))
        tensor([[2., 1., -inf, -inf]])

    Args:
        adaptor (Adaptor): a per-row knob holds one value per sequence, that is prompts times
            `num_return_sequences`, those of one prompt next to each other.

    Raises:
        TypeError: `adaptor` is not an `Adaptor`.
        ValueError: (when called) the per-row knobs do not fit the batch.
    """

    def __init__(self, adaptor: Adaptor) -> None:
        instance("adaptor", adaptor, Adaptor, "an Adaptor")
        self.adaptor = adaptor

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Filters the scores, (N, V); a row with NaN, +inf or nothing finite is left as it is.

        Float64 scores are filtered as float32. XTC's coins are of torch's default generator.
        """
        rows, adaptor = scores.shape[0], self.adaptor
        _check_rows(adaptor, rows)
        if adaptor.has_coin:
            adaptor = adaptor.tossed(torch.randint(2**63 - 1, (rows,), device=scores.device))
        if scores.dtype == torch.float64:
            return filter_logits(scores.float(), adaptor).double()
        return filter_logits(scores, adaptor)

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
    """Runs `model.generate` with filters and draw fused, as its `custom_generate`.

    Equivalent to `model.generate(...)` with the same arguments: the same processors, kept tokens,
    scores, stopping and outputs; only the random numbers differ. `do_sample=False` is
    transformers' greedy search, unchanged.

    The warpers at the end of the prepared processor list (temperature first or last; top-h, top-k,
    top-p, min-p, typical, epsilon, eta in any order) are read into one `Adaptor`. Where another
    processor stands among or after them (a watermark), or they disagree on `min_tokens_to_keep`,
    are repeated or have a finite `filter_value`, the chain runs as it is and only the draw is
    fused. So it is, with a warning, where a value is none that an `Adaptor` takes (a
    temperature below 1e-6) or a processor returns float64. `LogitNormalization` may follow, and a
    `FusedLogitsWarper` may take their place.

    On a CPU the processors right before these that touch few logits of a row become edits and
    masks of the same call, in transformers' order and to its values: bias, bad words, repetition
    penalty and n-grams (of an encoder too), minimum lengths, forced, suppressed and allowed tokens,
    the decay of the length. They are known by their exact class. A processor of another class, a
    subclass or a user's own among them, runs as it is, and so does all that stands before it.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from fastadapt.hf import Generate
        >>> sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
        >>> prompt = torch.tensor([[1, 2, 3]])
        >>> settings = {"do_sample": True, "top_p": 0.9, "min_new_tokens": 4, "max_new_tokens": 4}
        >>> model.generate(prompt, custom_generate=Generate(seeds=[7]), **settings).shape
        torch.Size([1, 7])
        >>> telling = {"return_dict_in_generate": True, "output_logprobs": True}
        >>> out = model.generate(prompt, custom_generate=Generate(), **telling, **settings)
        >>> out.logprobs.shape, out.kept.shape
        (torch.Size([1, 4]), torch.Size([1, 4]))

    Arguments of `model.generate` that are special here:
        seeds: one int64 per returned sequence, prompts times `num_return_sequences`, those of one
            prompt next to each other. The n-th token that a call generates in a sequence depends
            on its logits, the knobs, its seed and n alone: neither padding nor batch mates nor
            the default generator matter. Without seeds the default generator is used, so
            `torch.manual_seed` reproduces. A model that draws by itself within a step (the depth
            decoders of CSM and Moshi, dropout in training mode) does so from the default generator
            in spite of seeds; where that is seen, a warning says so. None in a list is a row
            without a seed: it draws by the default generator, as it would among rows without seeds.
        positions: one int64 >= 0 per returned sequence, beside `seeds`: how many tokens its seed
            has drawn already, by default 0. With the tokens so far as the prompt, a sequence goes
            on as it would have without the break.
        output_logprobs: with `return_dict_in_generate=True` the output also has, each
            (sequences, steps) and not of the vocabulary's size: `logprobs`, float32, nats, under
            the distribution that the token was drawn from (in a greedy search, under the softmax of
            the processed scores); `base_logprobs`, float32, nats, under the softmax of the model's
            own logits, before any processor; `kept`, int32, how many tokens the first of these
            distributions has; `ranks`, int32, 1 + how many tokens stand before it in the model's
            own logits (logit descending, id ascending). All are 0 after a sequence's end. Where
            those logits have no such token they are -inf and 0, where they have NaN, NaN and 0.
        output_supports: with `return_dict_in_generate=True` the output also has `supports`, a list
            of one `Support` per returned sequence: the ids that each of its tokens was drawn from,
            one row a token, through the sequence's end (in a greedy search those whose processed
            score is finite). The counts of a row that is not full are its `kept`. What a penalty,
            a bias or guidance did to their scores it does not say.
        streamer, synced_gpus: never reach a callable and are refused; pass them to `using` instead.
            `synced_gpus` is otherwise chosen as transformers does.
        stop_strings: its tokenizer never reaches a callable; pass
            `stopping_criteria=[StopStringCriteria(tokenizer, stop_strings)]` instead.
        prompt_lookup_num_tokens: drafts of so many tokens, from repeats in the text. A draft stands
            while it is the token that is drawn at its place, so that tokens are those without
            drafts. One sequence at a time, as in transformers.
        assistant_model: never reaches a callable; pass it to `using`. Its drafts stand likewise.
        cache_implementation="paged": transformers goes to `generate_batch` before it looks at
            `custom_generate`, so nothing is fused, seeds are ignored, and nothing here can see it.

    Models with a `generate` of their own (MusicGen, Dia, Janus for images) may not pass
    `custom_generate` on; it is then ignored or refused there, and nothing here can see it. Those
    that call the loop more than once (Whisper, for each segment and each temperature) count the
    tokens of each call anew and decide by themselves which calls sample; seeds are for those. Where
    they go on with some rows alone they do not say which: these draw by the first of the seeds,
    with a warning. An output that such a model makes by itself may leave out what `output_logprobs`
    adds (Whisper's does).

    Raises:
        ValueError: a mode other than sampling and greedy search (beams, contrastive, DoLa,
            constraints), an argument that cannot reach here (above), `seeds` without
            `do_sample=True`, `positions` without seeds, `output_logprobs` or
            `output_supports` without `return_dict_in_generate=True`, or seeds, positions or per-row
            knobs that do not fit the batch.
        TypeError: seeds or positions that are not integers, a flag that is not a bool.
        RuntimeError: an unfinished row has NaN, +inf or nothing finite. On a CPU at once; elsewhere
            the row ends with the pad token and the error follows after the loop, so that no step
            waits for the device.
    """

    streamer: BaseStreamer | None = None
    synced_gpus: bool | None = None
    seeds: Seeds | None = None
    assistant_model: Any = None
    group: Any = None

    def using(
        self,
        *,
        streamer: BaseStreamer | None = None,
        synced_gpus: bool | None = None,
        seeds: Seeds | None = None,
        assistant_model: Any = None,
        group: Any = None,
    ) -> "Generate":
        """Return a callable for `custom_generate` with these settings and no others.

        Args:
            streamer (BaseStreamer): receives the prompt, every token, and the end.
            synced_gpus (bool): keep calling the model until every rank has finished.
            seeds (Tensor or sequence of int or None): as the `seeds` of `model.generate`.
            assistant_model (PreTrainedModel): drafts tokens; of a vocabulary of the same size.
            group (ProcessGroup): of ranks whose model gives a slice of the logits, as `sample` has
                it; all run this call. With it there may be warpers alone, and what needs whole rows
                raises NotImplementedError.
        """
        return Generate(streamer, synced_gpus, seeds, assistant_model, group)

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        *,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        seeds: Seeds | None = None,
        positions: Sequence[int] | Tensor | None = None,
        output_logprobs: bool = False,
        output_supports: bool = False,
        stop_strings: object = None,
        **model_kwargs: Any,
    ) -> Any:
        """Run the loop; called by `model.generate`, which prepares the arguments."""
        synced_gpus = is_sharded(model) if self.synced_gpus is None else self.synced_gpus
        refuse_unreachable(model, synced_gpus)
        if stop_strings is not None:  # named above, it is kept from the generation config
            raise ValueError(
                "stop_strings: expected none, because transformers hands a callable no tokenizer; "
                "pass stopping_criteria=[StopStringCriteria(tokenizer, stop_strings)] instead"
            )
        if self.assistant_model is not None:
            check_assistant(model, self.assistant_model)
        drafts = has_drafts(generation_config, self.assistant_model)
        told = Told() if is_asked("output_logprobs", output_logprobs, generation_config) else None
        asked = is_asked("output_supports", output_supports, generation_config)
        supports = Supports() if asked else None
        streams = self._streams(model, seeds, positions, input_ids, generation_config)
        tell = None if told is None else told.add
        for_drafts: list[LogitsProcessor] = list(logits_processor)
        draw: Draw | Watch | None = None
        if generation_config.do_sample:
            chain = chain_of(logits_processor, FusedLogitsWarper)
            _check_rows(chain.adaptor, input_ids.shape[0])
            split = None
            if self.group is not None:
                others = {
                    "output_logprobs": output_logprobs,
                    "assistant_model or prompt_lookup_num_tokens": drafts,
                }
                refuse_whole_rows(chain, generation_config, **others)
                split = self.group, model.config.get_text_config().vocab_size
            draw = Draw(chain, input_ids, streams, tell, supports, generation_config, split)
            generation_config = copy.copy(generation_config)
            generation_config.do_sample = False
            for_drafts = [*chain.before, *chain.edits]
        elif self.group is not None:
            raise NotImplementedError(
                "do_sample: expected True with a group (a temperature of 0 is greedy), got False"
            )
        elif tell is not None or supports is not None:
            draw = Watch(logits_processor, input_ids, tell, supports)
        if draw is not None:
            logits_processor = LogitsProcessorList([Drafted(draw) if drafts else draw])
            stopping_criteria = Stopping(stopping_criteria, draw)
        if self.streamer is not None:
            self.streamer.put(input_ids.cpu())
        loop = model._sample
        if drafts:
            loop = WithDrafts(model, for_drafts).generate
            model_kwargs["assistant_model"] = self.assistant_model
        output = loop(
            input_ids,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            synced_gpus=synced_gpus,
            streamer=self.streamer,
            **model_kwargs,
        )
        if streams.others_drew():
            warnings.warn(
                f"seeds: {type(model).__name__} or one of its processors drew from torch's default "
                "generator too, which seeds do not reach; torch.manual_seed reproduces that part",
                stacklevel=4,
            )
        if isinstance(draw, Draw):
            draw.finish(output)
        for found in (told, supports):
            if found is not None:
                found.put(output, output.sequences.shape[1] - input_ids.shape[1])
        return output

    def _streams(
        self,
        model: Any,
        seeds: Seeds | None,
        positions: Sequence[int] | Tensor | None,
        input_ids: Tensor,
        config: GenerationConfig,
    ) -> Streams:
        """Returns the random streams of this call, on the ids' device."""
        if seeds is not None and self.seeds is not None:
            raise ValueError("seeds: expected in `using` or in `model.generate`, got them in both")
        seeds = self.seeds if seeds is None else seeds
        rows, device = input_ids.shape[0], input_ids.device
        # such a model decides by itself which of its calls sample, and which rows they have
        decides = type(model).generate is not GenerationMixin.generate
        if positions is not None and seeds is None:
            raise ValueError("positions: expected seeds beside them, got none")
        if seeds is None or (decides and not config.do_sample):
            return Streams(None, None, None, device)
        if not config.do_sample:
            raise ValueError("seeds: expected do_sample=True beside them, got do_sample=False")
        tensor, unseeded = seeds_of(seeds)
        if decides and tensor.dim() == 1 and tensor.shape[0] > rows:
            warnings.warn(
                f"seeds: {type(model).__name__}.generate goes on with {rows} of {len(tensor)} rows "
                "and does not say which; they draw by the first seeds, so that they depend on "
                "their batch mates",
                stacklevel=5,
            )
            tensor = tensor[:rows]
            unseeded = None if unseeded is None else unseeded[:rows]
            positions = None if positions is None else positions[:rows]
        starts = None if positions is None else integers("positions", positions)
        for name, values in (("seeds", tensor), ("positions", starts)):
            if values is not None and values.shape != (rows,):
                raise ValueError(
                    f"{name}: expected shape ({rows},), one per sequence (prompts times "
                    f"num_return_sequences), got {tuple(values.shape)}"
                )
        if starts is not None and bool((starts < 0).any()):
            raise ValueError(f"positions: expected integers >= 0, got {starts.tolist()}")
        if unseeded is not None and bool(unseeded.all()):
            return Streams(None, None, None, device)
        return Streams(tensor, unseeded, starts, device)


generate = Generate()
"""What `model.generate(custom_generate=...)` takes: `Generate` with its default settings.

Examples:
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from fastadapt.hf import generate
    >>> sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
    >>> prompt = torch.tensor([[1, 2, 3]])
    >>> knobs = {"do_sample": True, "top_p": 0.9, "max_new_tokens": 4, "seeds": [7]}
    >>> tokens = model.generate(prompt, custom_generate=generate, **knobs)
    >>> torch.equal(tokens, model.generate(prompt, custom_generate=generate, **knobs))
    True
"""


def _check_rows(adaptor: Adaptor, rows: int) -> None:
    """Raises unless per-row knobs fit the batch."""
    if adaptor.rows is not None and adaptor.rows != rows:
        raise ValueError(
            f"adaptor: expected per-row knobs for {rows} sequences (prompts times "
            f"num_return_sequences), got {adaptor.rows}; repeat_interleave expands them as "
            "transformers expands the prompts"
        )
