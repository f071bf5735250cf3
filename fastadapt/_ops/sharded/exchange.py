"""What ranks exchange. A program of a rank yields requests, and is sent what they come to.

The same program runs over a process group, and side by side with others in one process.
"""

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Result = TypeVar("Result")


class Request(NamedTuple):
    """One collective: "gather", whose result is (ranks, *x.shape), "sum" or "max", x's own."""

    kind: str
    x: Tensor


Program = Generator[Request, Tensor, Result]


class Traffic(NamedTuple):
    """The requests of a program: the kind and the bytes that a rank hands over in each."""

    rounds: list[tuple[str, int]]

    def note(self, request: Request) -> None:
        """Adds one."""
        self.rounds.append((request.kind, request.x.numel() * request.x.element_size()))

    def received(self, ranks: int) -> int:
        """The bytes that reach a rank: of a gather those of all others, of a ring's reduction
        twice its own but for what stays."""
        sent = sum(size * (1 if kind == "gather" else 2 / ranks) for kind, size in self.rounds)
        return int(sent * (ranks - 1))


def over_group(
    program: Program[Result], group: "ProcessGroup", traffic: Traffic | None = None
) -> Result:
    """Runs a rank's program; every rank of the group runs one of the same kind."""
    name, ranks = group.group_name, group.size()
    collectives = torch.ops._c10d_functional
    answer: Any = None
    while True:
        try:
            kind, x = request = program.send(answer)
        except StopIteration as stop:
            result: Result = stop.value
            return result
        if traffic is not None:
            traffic.note(request)
        if kind == "gather":
            parts = collectives.all_gather_into_tensor(x.reshape(-1), ranks, name)
            answer = collectives.wait_tensor(parts).view(ranks, *x.shape)
        else:
            answer = collectives.wait_tensor(collectives.all_reduce(x.contiguous(), kind, name))


def side_by_side(
    programs: Sequence[Program[Result]], traffic: Traffic | None = None
) -> list[Result]:
    """Runs the programs of all ranks in turns, in one process; their results in order.

    Raises:
        RuntimeError: programs that do not ask for the same, which would hang over a group.
    """
    results: list[Result] = []
    answers: list[Any] = [None] * len(programs)
    while True:
        requests: list[Request] = []
        for program, answer in zip(programs, answers, strict=True):
            try:
                requests.append(program.send(answer))
            except StopIteration as stop:
                results.append(stop.value)
        if not requests:
            return results
        asked = {(r.kind, r.x.shape, r.x.dtype) for r in requests}
        if results or len(asked) > 1:
            raise RuntimeError(f"ranks: expected one request of all, got {asked or 'an end'}")
        if traffic is not None:
            traffic.note(requests[0])
        parts = torch.stack([r.x for r in requests])
        kind = requests[0].kind
        whole = parts if kind == "gather" else parts.sum(0) if kind == "sum" else parts.amax(0)
        answers = [whole] * len(programs)


def packed(*parts: Tensor) -> Tensor:
    """One row of int32 words out of tensors of 32 and 64 bits."""
    return torch.cat([x.contiguous().view(-1).view(torch.int32) for x in parts])


def unpacked(words: Tensor, *like: Tensor) -> list[Tensor]:
    """The tensors out of gathered words (ranks, W), each (ranks, *shape) of those they were."""
    found, at = [], 0
    for x in like:
        size = x.numel() * x.element_size() // 4
        part = words[:, at : at + size].reshape(-1).clone()  # aligned
        found.append(part.view(x.dtype).view(len(words), *x.shape))
        at += size
    return found
