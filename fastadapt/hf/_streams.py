"""The random streams of a call: seeds and positions of its rows, and who else draws."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastadapt._ops.checks import integers

Seeds = Sequence[int | None] | Tensor


class Streams:
    """Seeds and positions of each step.

    A row without a seed draws by torch's default generator, at each step anew, as it would among
    rows that have none either.

    Args:
        seeds: (N,), int64; None where no row has one.
        unseeded: (N,), bool; the rows whose seed is none. None where all have theirs.
        starts: (N,), int64; the position of each row's first token.
        device: of the rows.
    """

    def __init__(
        self,
        seeds: Tensor | None,
        unseeded: Tensor | None,
        starts: Tensor | None,
        device: torch.device,
    ) -> None:
        """Notes the state of the default generators."""
        moved = [None if x is None else x.to(device) for x in (seeds, unseeded, starts)]
        self.seeds, self.unseeded, self.starts = moved
        self.device = device
        self.states = [] if seeds is None else _default_generators(device)
        self.others = False

    def at(self, step: int) -> tuple[Tensor | None, Tensor | None]:
        """Returns seeds and positions, (N,) int64 each; None and None where no row has a seed."""
        if self.seeds is None:
            return None, None
        positions = torch.full_like(self.seeds, step)
        if self.starts is not None:
            positions += self.starts
        if self.unseeded is None:
            return self.seeds, positions
        self.others = self.others_drew()
        fresh = torch.randint(2**63 - 1, self.seeds.shape, device=self.device)
        self.states = _default_generators(self.device)
        seeds = torch.where(self.unseeded, fresh, self.seeds)
        return seeds, torch.where(self.unseeded, 0, positions)

    def others_drew(self) -> bool:
        """Whether, beside seeds, something else drew from a default generator."""
        if self.seeds is None or self.others:
            return self.others
        return not all(map(torch.equal, self.states, _default_generators(self.device)))


def seeds_of(given: Seeds) -> tuple[Tensor, Tensor | None]:
    """Returns seeds as a tensor, and which of them are none.

    Args:
        given: integers, or a list or tuple with None for a row without a seed.

    Returns:
        int64, of the shape given, 0 where there is none; bool, or None where all are there.

    Raises:
        TypeError, ValueError: as `integers`.
    """
    holes = [seed is None for seed in given] if isinstance(given, list | tuple) else []
    if not any(holes):
        return integers("seeds", given), None  # type: ignore[arg-type]
    known: list[Any] = [0 if seed is None else seed for seed in given]
    try:
        return integers("seeds", known), torch.tensor(holes)
    except (TypeError, ValueError) as error:
        expected = "seeds: expected integers in [-2**63, 2**63) or None"
        raise type(error)(f"{expected}, got {given!r}") from error


def _default_generators(device: torch.device) -> list[Tensor]:
    """Returns the states of the default generators of the CPU and of a device."""
    states = [torch.random.get_rng_state()]
    if device.type != "cpu":
        states.append(torch.get_device_module(device).get_rng_state(device))
    return states
