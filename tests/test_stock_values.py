"""The values that transformers' own tests of its warpers expect, from our warper in their place.

The rows are those of `tests/generation/test_logits_process.py`; what a warper removes is -inf here,
which those tests choose as 0 where they count.
"""

import pytest
import torch

from fastadapt import Adaptor

hf = pytest.importorskip("fastadapt.hf", reason="transformers is not installed")

pytestmark = pytest.mark.usefixtures("device")

DISTRIBUTIONS = {
    "top_p": (
        {"top_p": 0.8},
        [[0.3, 0.1, 0.1, 0.5], [0.15, 0.3, 0.3, 0.25]],
        [[0.3, 0, 0, 0.5], [0, 0.3, 0.3, 0.25]],
    ),
    "min_p": (
        {"min_p": 0.08},
        [[0.9, 0.0274, 0.047, 0.0274], [0.15, 0.3, 0.3, 0.25], [0.97, 0.01, 0.01, 0.01]],
        [[0.9, 0, 0, 0], [0.15, 0.3, 0.3, 0.25], [0.97, 0, 0, 0]],
    ),
    "typical_p": (
        {"typical_p": 0.5},
        [[0.97, 0.01, 0.01, 0.01], [0.4, 0.2, 0.2, 0.2]],
        [[0.97, 0, 0, 0], [0, 0.2, 0.2, 0.2]],
    ),
    "epsilon_cutoff": (
        {"epsilon_cutoff": 0.1},
        [[0.87, 0.099, 0.001, 0.03], [0.4, 0.299, 0.101, 0.2]],
        [[0.87, 0, 0, 0], [0.4, 0.299, 0.101, 0.2]],
    ),
    "eta_cutoff": (
        {"eta_cutoff": 0.0625},
        [[0.0, 0.1, 0.8, 0.1], [0.01, 0.04, 0.9, 0.05]],
        [[0.0, 0.1, 0.8, 0.1], [0, 0, 0.9, 0]],
    ),
}


def warp(scores, device, **knobs):
    return hf.FusedLogitsWarper(Adaptor(**knobs))(None, scores.to(device)).cpu()


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_distributions(device, cpu_capability, name):
    knobs, given, wanted = DISTRIBUTIONS[name]
    got = warp(torch.tensor(given).log(), device, **knobs).exp()
    torch.testing.assert_close(got, torch.tensor(wanted), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("knobs", "counts"),
    [
        ({"top_p": 0.9, "min_tokens_to_keep": 2}, [3, 2]),
        ({"min_p": 0.05, "min_tokens_to_keep": 2}, [3, 2]),
        ({"typical_p": 0.7, "min_tokens_to_keep": 2}, [2, 2]),
        ({"epsilon_cutoff": 5e-2, "min_tokens_to_keep": 2}, [3, 2]),
        ({"eta_cutoff": 0.1, "min_tokens_to_keep": 2}, [2, 2]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_ramps(device, cpu_capability, knobs, counts):
    """One ramp of ten, and the same a hundred times as steep."""
    ramp = torch.arange(10.0).repeat(2, 1) - 5
    ramp[1] *= 100
    assert (warp(ramp, device, **knobs) > float("-inf")).sum(-1).tolist() == counts


def test_top_k(device, cpu_capability):
    ramp = torch.arange(10.0).repeat(2, 1)
    ramp[1, :5] += 10
    removed = warp(ramp, device, top_k=3) == float("-inf")
    assert removed[0].tolist() == [True] * 7 + [False] * 3
    assert removed[1].tolist() == [True] * 2 + [False] * 3 + [True] * 5
    # ties all stay, and a minimum of tokens is more than k
    even = torch.full((2, 5), 0.2)
    assert torch.equal(warp(even, device, top_k=1, min_tokens_to_keep=3), even)
    short = torch.arange(5.0).repeat(2, 1)
    removed = warp(short, device, top_k=1, min_tokens_to_keep=3) == float("-inf")
    assert removed.sum(-1).tolist() == [2, 2]


def test_typical_leaves_equal_tokens(device, cpu_capability):
    even = torch.full((2, 5), 0.2)
    assert torch.equal(warp(even, device, typical_p=0.5, min_tokens_to_keep=3), even)


def test_temperature(device, cpu_capability):
    """Equal scores stay equal; peaks and valleys grow below 1 and shrink above."""
    scores = torch.full((2, 20), 1 / 20)
    scores[1, 5], scores[1, 10] = 1 / 20 + 0.1, 1 / 20 - 0.4
    p = scores.softmax(-1)
    sharp, smooth = (warp(scores, device, temperature=t).softmax(-1) for t in (0.5, 1.3))
    for warped in (sharp, smooth):
        torch.testing.assert_close(warped[0], p[0], rtol=0, atol=1e-3)
    assert p[1].max() < sharp[1].max() and p[1].min() > sharp[1].min()
    assert p[1].max() > smooth[1].max() and p[1].min() < smooth[1].min()
