"""The operators of a linear head for CUDA tensors. Labels are not checked: that would wait."""

from typing import Any

from torch import Tensor

from fastadapt._ops.common import device_of
from fastadapt._ops.linear.driver import Triple, backward, forward
from fastadapt._ops.linear.driver import frozen_head_backward as frozen
from fastadapt._ops.linear.plan import work_of
from fastadapt._ops.linear.tiles import Problem

_FIELDS = len(Problem._fields)


def linear_log_odds(*arguments: Any) -> Triple:
    """As the driver does on every device."""
    problem = Problem(*arguments[:_FIELDS])
    with device_of(problem.hidden):
        return forward(work_of(problem.hidden), problem, *arguments[_FIELDS:])


def linear_log_odds_backward(*arguments: Any) -> Triple:
    """The gradients that are wanted."""
    problem = Problem(*arguments[:_FIELDS])
    with device_of(problem.hidden):
        return backward(work_of(problem.hidden), problem, *arguments[_FIELDS:])


def frozen_head_backward(dlog_odds: Tensor, *arguments: Any) -> Tensor:
    """The gradient of the hidden states."""
    with device_of(dlog_odds):
        return frozen(work_of(dlog_odds), dlog_odds, *arguments)
