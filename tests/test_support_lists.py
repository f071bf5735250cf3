"""Labels among lists of ids: the C++ of CPUs against the operators of torch that GPUs run."""

import math

import pytest
import torch

from bits import assert_same
from fastadapt._ops.lists import ends_of
from fastadapt._ops.supports import among


@pytest.fixture(params=range(6))
def lists(request):
    """Labels, used, full, ids, offsets: lists without the label, with it alone, of ignored rows."""
    generator = torch.Generator().manual_seed(request.param)
    counts = torch.randint(0, 6, (40,), generator=generator)
    counts[:3] = torch.tensor([0, 1, 5])
    rows = [torch.randperm(9, generator=generator)[:k].sort().values.int() for k in counts.tolist()]
    labels = torch.randint(9, (40,), generator=generator)
    used = torch.rand(40, generator=generator) < 0.8
    full = (counts == 0) & (torch.rand(40, generator=generator) < 0.5)
    return labels, used, full, torch.cat(rows), ends_of(counts)


def test_pairs_of_both_devices_are_the_same(lists):
    assert_same(among.Pairs(*among._pairs(*lists)), among._pairs_of_torch(*lists))
    assert among._pairs(*lists)[0].numel() > 0


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf, -math.inf, 800.0])
def test_log_odds_of_both_devices_are_the_same(lists, value):
    """Also of logits that are not finite, beside others and alone."""
    _, ends, own, without = among._pairs(*lists)
    z = torch.randn(int(ends[-1]), dtype=torch.float64) * 3
    z[torch.rand(len(z)) < 0.3] = value
    if value == -math.inf:  # a row whose others are all -inf
        first = int((own >= 0).nonzero()[0])
        z[ends[first] : ends[first + 1]] = value
        z[own[first]] = 1.0
    dm = torch.randn(len(own), dtype=torch.float64)
    given = z, ends, own
    torch.testing.assert_close(
        among._among(*given, without), among._among_of_torch(*given, without), equal_nan=True
    )
    torch.testing.assert_close(
        among._among_backward(dm, *given),
        among._among_backward_of_torch(dm, *given),
        equal_nan=True,
    )


def test_operators_of_lists_are_checked(lists):
    ops = torch.ops.fastadapt
    torch.library.opcheck(ops.support_pairs, lists)
    _, ends, own, without = among._pairs(*lists)
    z = torch.randn(int(ends[-1]), dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(ops.support_among, (z, ends, own, without))
    dm = torch.randn(len(own), dtype=torch.float64)
    torch.library.opcheck(ops.support_among_backward, (dm, z.detach(), ends, own))
    torch.autograd.gradcheck(lambda x: ops.support_among(x, ends, own, without)[own >= 0], (z,))
