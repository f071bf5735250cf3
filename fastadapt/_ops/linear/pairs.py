"""A student's head and a teacher's: their problem, the rows that take part, the work on tiles."""

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor

from fastadapt._ops.linear.tiles import Head, LowRank, RowWork, places_of


class PairProblem(NamedTuple):
    """The arguments that the operators of two heads share, in the order of their schemas."""

    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H), dtype of `hidden`, or float32
    bias: Tensor | None  # (V,)
    teacher_hidden: Tensor  # (N, H of the teacher)
    teacher_weight: Tensor  # (V, H of the teacher), the same
    teacher_bias: Tensor | None  # (V,)
    mask: Tensor | None  # (N,) bool, the rows that count; None: all
    softcap: float  # 0: none; of logits that the temperature has divided, like the scale
    logit_scale: float
    teacher_softcap: float
    teacher_logit_scale: float
    kind: int  # KL, REVERSE_KL or JSD of csrc/kernels.h
    beta: float  # of JSD, in (0, 1)
    low_states: Tensor | None = None  # (N, r), of the student's adapter, in a dtype of their own
    low_weight: Tensor | None = None  # (V, r), the same
    teacher_low_states: Tensor | None = None  # those of the teacher's
    teacher_low_weight: Tensor | None = None

    @property
    def low(self) -> LowRank | None:
        """The student's adapter."""
        return LowRank.of_both(self.low_states, self.low_weight)

    def heads(self, takes: Tensor | None) -> tuple[Head, Head]:
        """Selects the rows that take part, `takes` (N,) bool; on a GPU this waits for the device.

        Returns:
            Those of the student and of the teacher; they have no labels.
        """
        index = None if takes is None else places_of(takes)
        student = self.hidden, self.weight, self.bias
        teacher = self.teacher_hidden, self.teacher_weight, self.teacher_bias
        of_teacher = LowRank.of_both(self.teacher_low_states, self.teacher_low_weight)
        return (
            Head.of_rows(index, *student, self.softcap, self.logit_scale, self.low),
            Head.of_rows(
                index, *teacher, self.teacher_softcap, self.teacher_logit_scale, of_teacher
            ),
        )


class PairWork(ABC):
    """What a device does with tiles of two heads. Made for one call, its buffers are reused."""

    tile: int  # ids a tile
    student: RowWork

    @abstractmethod
    def __init__(self, student: Head, teacher: Head, problem: PairProblem) -> None:
        """Takes the heads of the rows that take part; buffers are allocated when needed."""

    def backward_tile(self) -> int:
        """Returns the ids per tile in the backward, a divisor of `tile`."""
        return self.student.backward_tile()

    @classmethod
    @abstractmethod
    def mixture_rows(cls, n: int, v: int, itemsize: int) -> int:
        """Returns how many rows JSD's two passes take at once."""

    @classmethod
    @abstractmethod
    def makes_again(cls) -> bool:
        """Whether the second pass of JSD makes the products again."""

    @classmethod
    @abstractmethod
    def scratch_bytes(cls, n: int, v: int, itemsize: int, kind: int) -> tuple[int, int]:
        """Returns the bytes of a forward, and of a backward beside its sums."""

    @abstractmethod
    def sum_tile(
        self, first: int, last: int, rows: slice, stats: Tensor, *, mixing: bool = False
    ) -> None:
        """Adds ids [first, last) to the statistics of `rows`, (n of them, NUM_PAIR_STATS).

        Args:
            first: id.
            last: id, exclusive.
            rows: of those that take part.
            stats: as in csrc/kernels.h.
            mixing: the second pass of JSD.
        """

    @abstractmethod
    def gradient_tile(
        self, first: int, last: int, stats: Tensor, gains: Tensor, out: Tensor
    ) -> None:
        """Computes dL/dx of a tile of the student's products, (n, last - first)."""
