"""Drafts of several tokens in transformers' assisted loop: each row that stands is drawn once."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from fastadapt._ops.checks import instance


class Drafted(LogitsProcessor):
    """Calls a processor that draws, on the rows of a sequence as far as its drafts stand.

    The loop asks for a row at each draft and one behind them, and keeps the tokens up to the first
    that is not its draft: the law of `fastadapt.verify` without draft logits. Rows behind that one
    are not looked at.

    Args:
        draw: the processor; it returns one-hot rows, or scores whose argmax is the token.
    """

    def __init__(self, draw: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.draw = draw
        self.length = -1  # of the tokens that stand
        self.token = -1  # the last of them

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Returns what the processor makes of the scores, (1, V), or the scores as they are."""
        length = input_ids.shape[1]
        if self.length >= 0 and (length != self.length or int(input_ids[0, -1]) != self.token):
            return scores
        rows = self.draw(input_ids, scores)
        self.length, self.token = length + 1, int(rows.argmax(-1))
        return rows


def check_assistant(model: Any, assistant: Any) -> None:
    """Raises unless an assistant is a model of the same vocabulary.

    Raises:
        TypeError: no model of transformers.
        ValueError: a vocabulary of another size.
    """
    instance("assistant_model", assistant, PreTrainedModel, "a PreTrainedModel")
    size, own = (m.config.get_text_config().vocab_size for m in (model, assistant))
    if own != size:
        raise ValueError(f"assistant_model: expected a vocabulary of {size} tokens, got {own}")


class WithDrafts:
    """Stands for a model in its assisted loop, whose drafts are made by other processors.

    What makes drafts tries the loop's processors on rows of its own, which are not to be drawn.

    Args:
        model: everything else is its.
        processors: for what makes drafts.
    """

    def __init__(self, model: Any, processors: Sequence[LogitsProcessor]) -> None:
        self._model = model
        self._processors = LogitsProcessorList(processors)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the model."""
        return self._model(*args, **kwargs)

    def _get_candidate_generator(self, **options: Any) -> Any:
        """Returns what makes drafts; the loop asks for it by this name."""
        options["logits_processor"] = self._processors
        return self._model._get_candidate_generator(**options)  # noqa: SLF001, as the loop does

    def generate(self, input_ids: Tensor, **options: Any) -> Any:
        """Runs the model's assisted loop."""
        return type(self._model)._assisted_decoding(self, input_ids, **options)  # noqa: SLF001
