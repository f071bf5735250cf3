"""A request in the engine's batch."""

from collections.abc import Sequence
from dataclasses import dataclass

from fastadapt.vllm._records import Sheet
from fastadapt.vllm._request import Request


@dataclass(frozen=True, eq=False)
class Row:
    """A request that is drawn here; one row equals itself alone.

    Attributes:
        request: how it is drawn.
        seed: int64.
        prompt: its tokens, where the engine gives them.
        output: the engine's own list, which grows, and shrinks where tokens are taken back.
        prompt_length: of the prompt, where the engine gives no tokens.
        sheet: where it is recorded what its tokens were drawn from, if it is.
    """

    request: Request
    seed: int
    prompt: Sequence[int] = ()
    output: Sequence[int] = ()
    prompt_length: int = 0
    sheet: Sheet | None = None
