"""A vocabulary split over ranks: side by side in this process, and over gloo (sharded_ranks.py)."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastadapt import Adaptor, Edits, reference, sample
from fastadapt._ops.sharded import arithmetic
from fastadapt._ops.sharded.exchange import Request, Traffic, packed, side_by_side, unpacked
from fastadapt.reference.arithmetic import exp64, log64, masses, philox
from fastadapt.reference.distribution import Distribution
from fastadapt.sampling.sharded import draw_of, edits_of_slice, score_of, words_of_slice
from sharded_cases import Case, made, unlike

RANK = Path(__file__).with_name("sharded_ranks.py")
NO_EDITS = {"edits": None, "allowed": None, "num_tokens": None}


def drawn_side_by_side(case: Case, traffic: Traffic | None = None) -> list[Any]:
    """What each rank has of a draw."""
    ranks = range(len(case.sizes))
    options = {**case.options, **NO_EDITS, **case.edits}
    programs = [draw_of(case.slice(rank), case.adaptor, rank, **options) for rank in ranks]
    return side_by_side(programs, traffic)


def scored_side_by_side(case: Case, tokens: Tensor) -> list[Any]:
    """What each rank has of scores."""
    edits = {**NO_EDITS, **case.edits}
    return side_by_side(
        [
            score_of(case.slice(rank), tokens, case.adaptors, rank, **edits)
            for rank in range(len(case.sizes))
        ]
    )


@pytest.mark.parametrize("block", range(20))
def test_slices_have_the_bits_of_the_whole(block):
    """Thousands of rows, of all kinds, under all adaptors, with edits and masks."""
    for seed in range(10 * block, 10 * block + 10):
        case = made(seed)
        whole = case.sampled(case.logits)
        asked = type(whole)._make(whole)
        expected = [x for x in asked if x is not None]
        names = [name for name, x in zip(whole._fields, whole, strict=True) if x is not None]
        for got in drawn_side_by_side(case):
            differ = [
                n for n, a, b in zip(names, expected, got, strict=True) if unlike_bits(a, b)
            ]
            assert differ == [], case.name
        tokens = case.tokens(whole)
        scores = case.scored(case.logits, tokens)
        for got in scored_side_by_side(case, tokens):
            assert unlike(scores, got) == [], case.name


def unlike_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors differ, NaN being NaN."""
    return a.dtype != b.dtype or not torch.equal(a.nan_to_num(7e7), b.nan_to_num(7e7))


@pytest.mark.parametrize("ranks", (2, 4, 8))
def test_ranks_have_the_results_of_one_process(ranks, start_python, tmp_path):
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("torch has no gloo")
    outputs = [tmp_path / f"{rank}.txt" for rank in range(ranks)]
    started = [
        start_python(
            *(RANK, str(rank), str(ranks), str(tmp_path / "store"), "25"),
            **{"folder": tmp_path, "output": output},
        )
        for rank, output in enumerate(outputs)
    ]
    try:
        for process in started:
            process.join(timeout=240)
    finally:
        for process in started:
            process.kill()
    for process, output in zip(started, outputs, strict=True):
        process.join()
        assert process.exitcode == 0, output.read_text()[-4000:]
    said = {output.read_text().splitlines()[-1] for output in outputs}
    assert len(said) == 1
    assert int(said.pop().removeprefix("held: ")) > 100
