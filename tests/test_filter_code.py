"""What the host knows of an adaptor's knobs, and which passes of the kernels follow from it."""

import pytest
import torch

from fastadapt import Adaptor
from fastadapt._ops.filter_code import joined, may_act, order_of
from fastadapt.adaptor import KNOBS


def acting(adaptor):
    """The knobs that may do something."""
    return {name for i, name in enumerate(KNOBS[:7]) if may_act(adaptor.filter_code, i)}


def test_numbers_that_are_neutral_do_nothing():
    assert acting(Adaptor()) == set()
    assert acting(Adaptor(temperature=0)) == {"temperature"}
    assert acting(Adaptor(temperature=0.7, top_p=0.9, min_p=0.0)) == {"top_p"}
    every = Adaptor(
        top_k=1, top_p=0.5, min_p=0.1, typical_p=0.9, epsilon_cutoff=0.1, eta_cutoff=0.1
    )
    assert acting(every) == set(KNOBS[1:7])


def test_tensors_are_read_on_the_cpu_alone():
    assert acting(Adaptor(top_k=torch.tensor([0, 0]), top_p=torch.tensor([1.0, 0.9]))) == {"top_p"}
    knob = torch.empty(2, device="meta", dtype=torch.int64)
    assert acting(Adaptor(top_k=knob)) == {"top_k"}


def test_codes_of_several_distributions():
    a, b = Adaptor(top_k=3).filter_code, Adaptor(top_p=0.9).filter_code
    assert [may_act(joined([a, b]), i) for i in (0, 1, 2, 3)] == [False, True, True, False]
    assert all(may_act(joined([a, 0]), i) for i in range(7))
    assert joined([Adaptor(top_k=3, order="vllm").filter_code]) & 1 == 1


@pytest.mark.parametrize(
    ("adaptor", "passes"),
    [
        (Adaptor(), {"weighs", "plain"}),
        (Adaptor(temperature=0), {"weighs", "ranks", "filters", "plain"}),
        (Adaptor(temperature=0.8, top_k=50, top_p=0.9), {"ranks", "filters", "plain"}),
        (Adaptor(min_p=0.1), {"lists", "filters", "sums", "by_mass"}),
        (Adaptor(min_p=0.1, min_tokens_to_keep=2), {"lists", "filters", "sums"}),
        (Adaptor(min_p=0.1, temperature=0), {"ranks", "lists", "filters", "sums"}),
        (Adaptor(min_p=torch.tensor([0.1, 0.2])), {"weighs", "lists", "filters", "sums"}),
        (Adaptor(top_k=50, min_p=0.1, order="vllm"), {"lists", "filters", "sums"}),
        (Adaptor(epsilon_cutoff=0.1), {"weighs", "lists", "filters", "sums", "by_mass"}),
        (Adaptor(typical_p=0.9), {"weighs", "bins", "filters", "sums"}),
        (
            Adaptor(top_p=0.9),
            {"weighs", "bins", "sketches", "lists", "filters", "sums", "plain"},
        ),
        (
            Adaptor(top_k=torch.tensor([0, 5]), top_p=torch.tensor([0.9, 1.0])),
            {"weighs", "bins", "sketches", "ranks", "lists", "filters", "sums", "plain"},
        ),
    ],
)
def test_passes_follow_from_the_adaptor(adaptor, passes):
    pytest.importorskip("triton", reason="triton is not installed: it has wheels for Linux")
    from fastadapt._ops.triton.launch_scan import steps_of

    steps = steps_of(adaptor.filter_code, adaptor.packed.shape[1])
    assert {name for name, asked in steps._asdict().items() if asked and name != "order"} == passes
    assert steps.order == order_of(adaptor.filter_code)
    unknown = steps_of(steps.order, adaptor.packed.shape[1])
    assert all(unknown._replace(order=1, plain=True, by_mass=True))
    assert not unknown.plain and not unknown.by_mass
