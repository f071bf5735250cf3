"""A vocabulary split over ranks: side by side in this process, and over gloo (sharded_ranks.py)."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fastadapt import Adaptor, Edits, Support, sample, score
from fastadapt._ops.sharded import arithmetic
from fastadapt._ops.sharded.exchange import Request, Traffic, packed, side_by_side, unpacked
from fastadapt.sampling.sharded import draw_of, edits_of_slice, law_of, score_of, words_of_slice
from sharded_cases import NO_EDITS, differing_rows, made

RANK = Path(__file__).with_name("sharded_ranks.py")
CASES = {2: 25, 4: 15, 8: 5}


def drawn(logits, adaptor, ranks, traffic=None, **options) -> list[Any]:
    """What each rank has of a draw from equal slices."""
    options = {"seeds": torch.arange(len(logits)), **NO_EDITS, **options}
    parts = enumerate(logits.tensor_split(ranks, -1))
    return side_by_side([draw_of(x, adaptor, rank, **options) for rank, x in parts], traffic)


@pytest.mark.parametrize("block", range(20))
def test_slices_have_the_bits_of_the_whole(block):
    """Thousands of rows, of all kinds, under all adaptors, with edits and masks."""
    for seed in range(10 * block, 10 * block + 10):
        case = made(seed)
        assert differing_rows(case) == (0, 0), case.name


def test_differences_are_seen():
    """A draw from other logits differs in the rows that do."""
    case = made(3)
    assert len(case.logits) > 1
    other = case._replace(sizes=case.sizes)
    changed = case.logits.clone()
    changed[0] = changed[0].flip(0) + 1

    class Changed(type(case)):
        def slice(self, rank):
            return changed.split(self.sizes, -1)[rank]

    draws, scores = differing_rows(Changed(*other))
    assert draws <= 1 and scores <= 1 and draws + scores > 0


@pytest.mark.parametrize("ranks", CASES)
def test_ranks_have_the_results_of_one_process(ranks, run_ranks):
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("torch has no gloo")
    said = {lines[-1] for lines in run_ranks(RANK, ranks, str(CASES[ranks]))}
    assert said == {
        f"held: {sum(len(made(10**6 * ranks + i, ranks).logits) for i in range(CASES[ranks]))}"
    }


@pytest.mark.parametrize(
    ("adaptor", "rounds"),
    [
        (Adaptor(temperature=0.0), ["gather"] * 2),
        (Adaptor(), ["gather", "gather", "sum"]),  # the draw
        (Adaptor(temperature=0.8, top_k=50), ["gather"] * 2),
        (Adaptor(top_k=20, top_p=0.9, eta_cutoff=1e-3), ["gather"] * 2),
        (Adaptor(min_p=0.1, order="vllm"), ["gather"] * 2),
        (Adaptor(epsilon_cutoff=1e-2), ["gather"] * 2),
        (Adaptor(epsilon_cutoff=1e-4), ["gather", "gather", "gather", "sum"]),
        (Adaptor(top_k=5, typical_p=0.5), ["gather"] * 2),
        (Adaptor(typical_p=0.02), ["gather"] * 3),  # the most typical ones
    ],
)
def test_rounds(adaptor, rounds):
    torch.manual_seed(0)
    logits = torch.randn(1, 4000) * 3
    traffic = Traffic([])
    got = drawn(logits, adaptor, 4, traffic)[0]
    assert [kind for kind, _ in traffic.rounds] == rounds
    assert torch.equal(got[0], sample(logits, adaptor, seeds=torch.arange(1)).tokens)


def test_a_tail_takes_few_rounds_and_bytes():
    """Thousands of survivors: a search, its last tokens, the draw."""
    torch.manual_seed(0)
    logits = torch.randn(1, 100_000) * 3
    for adaptor in (Adaptor(top_p=0.95), Adaptor(top_k=5000), Adaptor(typical_p=0.9)):
        traffic = Traffic([])
        got = drawn(logits, adaptor, 8, traffic)[0]
        whole = sample(logits, adaptor, seeds=torch.arange(1))
        assert int(whole.kept) > 4000 and torch.equal(got[2], whole.kept)
        assert len(traffic.rounds) <= 7
        assert traffic.received(8) < 0.15 * 2 * 100_000 * 7 / 8  # of bfloat16 logits


def test_a_bad_slice_is_a_bad_row_everywhere():
    logits = torch.randn(4, 40)
    logits[1, 3], logits[2, 39], logits[3] = float("nan"), float("inf"), float("-inf")
    for got in drawn(logits, Adaptor(top_p=0.9), 4):
        assert got[3].tolist() == [0, 1, 2, 3]
        assert got[0][1:].tolist() == [-1, -1, -1]


def test_keys_rank_tokens():
    values = torch.tensor([float("-inf"), -3e38, -1.0, -1e-45, -0.0, 0.0, 2.0, float("inf")])
    order = arithmetic.ordered(values)
    assert (order.diff() >= 0).all() and order[4] == order[5]
    assert torch.equal(arithmetic.from_ordered(order), values)
    key = arithmetic.key_of(torch.tensor([1.0, 1.0, 2.0]), torch.tensor([7, 6, 2**31 - 1]))
    assert key.argsort().tolist() == [0, 1, 2]
    assert key[0] >= arithmetic.with_ties(key[0]) == arithmetic.with_ties(key[1])


def test_words_travel():
    a = torch.randint(-(2**62), 2**62, (2, 3))
    b, c = torch.rand(5), torch.rand(2, 0).double()
    words = torch.stack([packed(a, b, c), packed(a + 1, b + 1, c)])
    got = unpacked(words, a, b, c)
    assert torch.equal(got[0], torch.stack([a, a + 1]))
    assert torch.equal(got[1], torch.stack([b, b + 1])) and got[2].shape == (2, 2, 0)


def test_programs_that_differ_do_not_hang_side_by_side():
    def program(kind):
        yield Request(kind, torch.zeros(1))

    with pytest.raises(RuntimeError, match="one request of all"):
        side_by_side([program("sum"), program("max")])


def test_edits_and_words_of_slices():
    edits = Edits.from_rows([{0: 1.0, 40: 2.0}, {}, {39: 3.0, 64: 4.0}], "pre")
    part = edits_of_slice(edits, 39, 26)
    assert part.ids.tolist() == [1, 0, 25] and part.offsets.tolist() == [0, 1, 1, 3]
    assert part.columns[0].tolist() == [2.0, 3.0, 4.0]
    bits = torch.rand(3, 96) < 0.5
    words = ((bits.view(3, 3, 32).long() << torch.arange(32)).sum(-1)).to(torch.int32)
    for first, size in ((0, 96), (7, 60), (32, 32), (95, 1), (90, 6), (90, 40)):
        part = words_of_slice(words, first, size)
        got = (part[..., None] >> torch.arange(32) & 1).flatten(1)[:, :size].bool()
        expected = torch.nn.functional.pad(bits, (0, 64))[:, first : first + size]
        assert torch.equal(got, expected)


def test_results_have_no_gradient():
    logits = (torch.randn(3, 50) * 3).requires_grad_()
    for got in drawn(logits, Adaptor(top_p=0.9), 2, base_logprobs=True):
        assert not any(x.requires_grad for x in got)
    tokens = torch.arange(3)
    programs = [
        score_of(x, tokens, [Adaptor()], i, **NO_EDITS) for i, x in enumerate(logits.chunk(2, 1))
    ]
    for got in side_by_side(programs):
        assert not any(x.requires_grad for x in got)


def test_what_is_not_offered_is_refused_by_name():
    rows = torch.zeros(2, 5)
    with pytest.raises(NotImplementedError, match="logits: expected a CPU tensor with a group"):
        draw_of(rows.to("meta"), Adaptor(), 0, **NO_EDITS)
    assert law_of(rows, Adaptor(top_p=0.9, top_k=5, order=("top_p", "top_k", "xtc"))).filters
    for unknown, message in (
        (Adaptor(top_n_sigma=1.0), "adaptor.top_n_sigma: expected it off with a group"),
        (Adaptor(xtc_probability=0.5), "adaptor.xtc_probability: expected it off"),
        (Adaptor(top_p=0.9, order=("top_p", "temperature")), "adaptor.order: expected the temp"),
        (Adaptor(min_p=0.1, typical_p=0.9, order=("typical_p", "min_p")), "min_p before typical_p"),
    ):
        with pytest.raises(NotImplementedError, match=message):
            law_of(rows, unknown)
    with pytest.raises(TypeError, match=r"logits: expected float32.*got torch.float64"):
        draw_of(rows.double(), Adaptor(), 0, **NO_EDITS)
    with pytest.raises(ValueError, match="score: expected temperature > 0"):
        greedy = [Adaptor(temperature=0.0)]
        score_of(rows, torch.zeros(2, dtype=torch.long), greedy, 0, **NO_EDITS)


def test_a_group_needs_torch_distributed():
    for call in (
        lambda g: sample(torch.zeros(1, 4), Adaptor(), group=g),
        lambda g: score(torch.zeros(1, 4), torch.zeros(1, dtype=torch.long), [Adaptor()], group=g),
    ):
        with pytest.raises(RuntimeError, match="expected torch.distributed to be initialised"):
            call(torch.distributed.ProcessGroup(0, 1))
        with pytest.raises(TypeError, match="group: expected a ProcessGroup or None, got str"):
            call("world")


def test_ties_that_one_filter_has_parted_stay_apart():
    """Top-k keeps all ties of its last value, of those that were left to it."""
    torch.manual_seed(0)
    logits = torch.randint(2, (40, 1000)).float() * 1.5
    seeds = torch.arange(40)
    more = {"epsilon_cutoff": 1e-4, "typical_p": 0.95}
    for others in ({}, more):
        knobs = {"top_p": torch.rand(40), **others, "top_k": torch.randint(1, 100, (40,))}
        adaptor = Adaptor(**knobs, order=tuple(knobs))
        whole = sample(logits, adaptor, seeds=seeds, support=True)
        for got in drawn(logits, adaptor, 8, seeds=seeds, support=True):
            assert torch.equal(got[2], whole.kept) and torch.equal(got[0], whole.tokens)
            assert Support(*got[-3:]) == whole.support
