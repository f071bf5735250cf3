"""The draw inside transformers' loop: its last processor, with matching stopping criteria."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteriaList,
)

from fastadapt.adaptor import Adaptor
from fastadapt.hf._chain import Chain
from fastadapt.hf._run import Run
from fastadapt.hf._streams import Streams
from fastadapt.hf._told import Supports
from fastadapt.results import Support
from fastadapt.sampling.functions import filter_logits, sample, score

_STATUS = {
    1: "NaN among its scores",
    2: "+inf among its scores",
    3: "no finite score",
    4: "a sampling knob out of range",
}


class Draw(LogitsProcessor):
    """The only processor: runs the others, draws a token per row, and returns one-hot rows.

    The loop's argmax finds the drawn tokens.

    Args:
        chain: what the processors are, and the adaptor that it draws by.
        input_ids (Tensor): (N, T), int64; the prompts.
        streams: the random streams of the rows.
        tell: gets what there is to tell of each step's tokens, as `Told.add`; None: nothing.
        supports: gets what each step's tokens are drawn from; None: nothing does.
        config: the call's generation config.
        split: the group over whose ranks the vocabulary is split, and the size of the whole; None:
            scores are whole.
    """

    def __init__(
        self,
        chain: Chain,
        input_ids: Tensor,
        streams: Streams,
        tell: Callable[..., None] | None,
        supports: Supports | None,
        config: GenerationConfig,
        split: tuple[Any, int] | None = None,
    ) -> None:
        """Prepares one call of the generation loop."""
        rows, self.prompt_length = input_ids.shape[:2]
        self.chain, self.streams, self.tell, self.supports = chain, streams, tell, supports
        self.options: dict[str, Any] = {} if split is None else {"group": split[0]}
        if supports is not None:
            self.options["support"] = True
        self.width = None if split is None else split[1]
        self.before: Any = LogitsProcessorList(chain.before)
        self.edits = Run(chain.edits)
        self.records = bool(config.return_dict_in_generate and config.output_scores)
        self.scores: list[Tensor] = []
        self.pad_token = _pad_token(config)
        self.at_once = _reads_are_free(input_ids.device)
        self.finished = torch.zeros(rows, dtype=torch.bool, device=input_ids.device)
        self.status = torch.zeros(rows, dtype=torch.uint8, device=input_ids.device)
        self.one_hot: Tensor | None = None
        self.previous: Tensor | None = None
        self.warned = False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Draws from the scores, (N, V); returns 1 at each row's token and 0 elsewhere."""
        # a processor may write into what it gets
        logits = scores.clone() if self.tell is not None and self.before else scores
        scores, edits, allowed = self.edits(input_ids, self.before(input_ids, scores))
        adaptor, kept = self.chain.adaptor, None
        if scores.dtype == torch.float64:
            kept = self._unfused(input_ids, scores)
            adaptor, scores = Adaptor(), _narrowed(kept)
        seeds, positions = self.streams.at(input_ids.shape[1] - self.prompt_length)
        if self.records and adaptor.has_coin:  # which the recorded scores have to show
            if seeds is None:
                seeds = torch.randint(2**63 - 1, (len(scores),), device=scores.device)
            adaptor = adaptor.tossed(seeds, positions)
        changes: dict[str, Any] = {"edits": edits, "allowed": allowed}
        options = {**changes, **self.options}
        drawn = sample(scores, adaptor, seeds=seeds, positions=positions, **options)
        ended = self.finished | (self.status != 0)
        self.status = torch.where(ended, self.status, drawn.status)
        if self.at_once:
            _raise_bad_rows(self.status)
        if self.records:
            kept = filter_logits(scores, adaptor, **changes) if kept is None else kept
            self.scores.append(kept.log_softmax(-1) if self.chain.normalised else kept)
        over = self.finished | (self.status != 0)
        if self.tell is not None:
            self.tell(logits, drawn.tokens, drawn.logprobs, drawn.kept, over)
        if self.supports is not None:
            assert drawn.support is not None  # noqa: S101, for the type checker
            self.supports.add(drawn.support, over)
        tokens = torch.where(drawn.status == 0, drawn.tokens, self.pad_token)
        return self._rows_of(tokens[:, None], scores)

    def _unfused(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Applies transformers' own warpers, which take every dtype."""
        if not self.warned:
            self.warned = True
            expected = "expected float32, bfloat16 or float16 from the processors"
            warnings.warn(
                f"scores: {expected}, got {scores.dtype}; warpers and draw run unfused",
                stacklevel=8,  # whoever called model.generate
            )
        for warper in self.chain.warpers:
            scores = warper(input_ids, scores)
        return scores

    def _rows_of(self, tokens: Tensor, scores: Tensor) -> Tensor:
        """Returns one-hot rows in a buffer that is reused while the shape stays."""
        buffer, previous = self.one_hot, self.previous
        shape = (len(scores), self.width or scores.shape[1])
        if (
            buffer is None
            or previous is None
            or buffer.shape != shape
            or buffer.dtype != scores.dtype
        ):
            buffer = self.one_hot = scores.new_zeros(shape)
        else:
            buffer.scatter_(1, previous, 0.0)
        self.previous = tokens
        return buffer.scatter_(1, tokens, 1.0)

    def end_rows(self, done: Tensor) -> Tensor:
        """Marks the rows that end with this step, finished or bad, and returns all ended rows."""
        self.finished = self.finished | done | (self.status != 0)
        return self.finished

    def finish(self, output: Any) -> None:
        """Puts the true scores into the loop's output; raises for bad rows."""
        _raise_bad_rows(self.status)
        if self.records:
            output.scores = tuple(self.scores[: len(output.scores)])


class Watch(LogitsProcessor):
    """The only processor of a greedy search that tells: runs the others, which decide as ever.

    Args:
        processors: as `model.generate` prepares them.
        input_ids (Tensor): (N, T), int64; the prompts.
        tell: gets what there is to tell of each step's tokens, as `Told.add`; None: nothing.
        supports: gets the ids of each step that have a finite processed score; None: nothing does.
    """

    def __init__(
        self,
        processors: LogitsProcessorList,
        input_ids: Tensor,
        tell: Callable[..., None] | None,
        supports: Supports | None,
    ) -> None:
        """Prepares one call of the generation loop."""
        self.processors: Any = processors
        self.tell, self.supports = tell, supports
        self.finished = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Returns what the processors make of the scores, (N, V)."""
        logits = scores.clone() if self.tell is not None and self.processors else scores
        scores = self.processors(input_ids, scores)
        if self.tell is not None:
            tokens = scores.argmax(-1)
            rows = _narrowed(scores) if scores.dtype == torch.float64 else scores
            by = score(rows, tokens, [Adaptor()])
            self.tell(logits, tokens, by.logprobs[:, 0], by.kept[:, 0], self.finished)
        if self.supports is not None:
            self.supports.add(Support.from_mask(scores.isfinite()), self.finished)
        return scores

    def end_rows(self, done: Tensor) -> Tensor:
        """Notes the rows that end with this step, and returns them as they come."""
        self.finished = self.finished | done
        return done


class Stopping(StoppingCriteriaList):
    """The given criteria, applied to the true scores; bad rows stop too.

    Args:
        criteria: as `model.generate` prepares them.
        draw: the processor that knows the scores, and is told which rows end.
    """

    def __init__(self, criteria: StoppingCriteriaList, draw: Draw | Watch) -> None:
        """Wraps the given criteria."""
        super().__init__(criteria)
        self.draw = draw

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Returns which rows end, (N,) bool."""
        if scores is not None and isinstance(self.draw, Draw):
            scores = tuple(self.draw.scores)
        return self.draw.end_rows(super().__call__(input_ids, scores, **kwargs))


def _narrowed(scores: Tensor) -> Tensor:
    """Converts float64 scores to float32, each finite row shifted so that none overflows."""
    top = scores.amax(-1, keepdim=True)
    return (scores - torch.where(top.isfinite(), top, 0.0)).float()


def _raise_bad_rows(status: Tensor) -> None:
    """Raises an error that names every row with a status other than 0."""
    if bool(status.any()):
        bad = [(row, code) for row, code in enumerate(status.tolist()) if code]
        listed = "; ".join(f"row {row} has {_STATUS[code]} (status {code})" for row, code in bad)
        raise RuntimeError(f"no token can be drawn: {listed}")


def _reads_are_free(device: torch.device) -> bool:
    """Whether the host can read a tensor without waiting for a device."""
    return device.type == "cpu"


def _pad_token(config: GenerationConfig) -> int:
    """Returns the id that a bad row gets: pad, else the first end-of-sequence token, else 0."""
    for token in (config.pad_token_id, config.eos_token_id):
        if token is not None:
            return max(int(torch.as_tensor(token).flatten()[0]), 0)
    return 0
