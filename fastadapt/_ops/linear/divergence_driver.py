"""Divergence of two linear heads, tile by tile of their vocabulary, on any device.

With 1M = one product of N H V: KL and reverse KL take 2M forward, of sums that are rescaled as the
maxima grow, and JSD the same where a device keeps the logits of a block of rows for its second
pass, else 4M. The backward takes 2M for the logits and 1M for each of dhidden and dweight.
"""

import torch
from torch import Tensor

from fastadapt._C import (
    CENTRE,
    DIVERGENCE,
    JSD,
    KL,
    NUM_PAIR_STATS,
    STUDENT_MAX,
    STUDENT_SUM,
    TEACHER_MAX,
    TEACHER_SUM,
)
from fastadapt._ops.linear.gradients import HeadGradients, Quintuple
from fastadapt._ops.linear.pairs import PairProblem, PairWork

SUMS = {True: (TEACHER_SUM, STUDENT_SUM), False: (STUDENT_SUM, TEACHER_SUM)}  # of KL, reverse KL


def empty_outputs(problem: PairProblem) -> tuple[Tensor, Tensor]:
    """Allocates divergences and statistics."""
    hidden = problem.hidden
    n, wide = hidden.shape[0], torch.promote_types(hidden.dtype, torch.float32)
    stats = hidden.new_empty(n, NUM_PAIR_STATS, dtype=torch.float64)
    return hidden.new_empty(n, dtype=wide), stats


def forward(work: type[PairWork], problem: PairProblem) -> tuple[Tensor, Tensor]:
    """Computes divergences and the statistics that the backward needs."""
    values, all_stats = out = empty_outputs(problem)
    student, teacher = problem.heads(problem.mask)
    pair = work(student, teacher, problem)
    n, v = student.hidden.shape[0], problem.weight.shape[0]
    stats = all_stats.new_zeros(n, NUM_PAIR_STATS)
    stats[:, [STUDENT_MAX, TEACHER_MAX]] = float("-inf")
    mixes = problem.kind == JSD
    block = work.mixture_rows(n, v, student.hidden.element_size()) if mixes else n
    for begin in range(0, n, max(1, block)):
        rows = slice(begin, min(begin + block, n))
        for mixing in (False, True) if mixes else (False,):
            for first, last in student.tiles(work.tile):
                pair.sum_tile(first, last, rows, stats[rows], mixing=mixing)
    student.scatter(_finish(stats, problem.kind), values)
    student.scatter(stats, all_stats)
    return out


def _finish(stats: Tensor, kind: int) -> Tensor:
    """Returns the divergences of summed statistics, (n,) float64, and sets the centres.

    A divergence is not negative; what rounding leaves below 0 is 0. NaN stays.
    """
    if kind == JSD:
        return stats[:, DIVERGENCE].clamp(min=0)
    first, second = SUMS[kind == KL]
    mean = stats[:, DIVERGENCE] / stats[:, first]
    if kind != KL:
        stats[:, CENTRE] = mean
    return (mean + (stats[:, second].log() - stats[:, first].log())).clamp(min=0)


def backward(
    work: type[PairWork],
    problem: PairProblem,
    ddivergence: Tensor,
    stats: Tensor,
    wanted: list[bool],
) -> Quintuple:
    """Computes the student's gradients, and its adapter's; each block of a head's is written once.

    Rows without an upstream gradient are dropped like those that do not count.
    """
    takes = ddivergence != 0
    student, teacher = problem.heads(takes if problem.mask is None else takes & problem.mask)
    gains, stats = student.gather(ddivergence.double()).contiguous(), student.gather(stats)
    pair = work(student, teacher, problem)
    matrix = problem.hidden, problem.weight, problem.bias
    gradients = HeadGradients(pair.student, *matrix, wanted, low=problem.low)
    for first, last, out in gradients.tiles(pair.backward_tile()):
        pair.gradient_tile(first, last, stats, gains, out)
        gradients.add(first, last, out)
    return gradients.finished()
