"""A head split over processes by vocabulary: what its ranks do is in vocab_parallel_ranks.py."""

from pathlib import Path

import pytest
import torch

from fastadapt import linear_log_odds

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("torch has no gloo", allow_module_level=True)

RANK = Path(__file__).with_name("vocab_parallel_ranks.py")
# by ranks: shapes of the first and the second split, dtypes, plans; and others
CASES = {2: (2 + 1) * 3 * 7 + 7, 4: (1 + 1) * 3 * 7 + 6}


@pytest.fixture
def run(run_ranks):
    """Runs the ranks; returns the cases that held in each."""

    def start_all(ranks: int, device: str) -> list[list[str]]:
        said = run_ranks(RANK, ranks, device)
        return [[line for line in lines if line.startswith("held: ")] for lines in said]

    return start_all


@pytest.mark.parametrize("ranks", (2, 4))
def test_ranks_have_the_results_of_one_process(ranks, run):
    held = run(ranks, "cpu")
    assert {len(cases) for cases in held} == {CASES[ranks]}


@pytest.mark.gpu
@pytest.mark.parametrize("ranks", (2, 4))
def test_ranks_on_gpus(ranks, run):
    """Through NCCL; errors about labels are the CPU's alone."""
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} CUDA devices")
    held = run(ranks, "cuda")
    assert {len(cases) for cases in held} == {CASES[ranks] - 1}


def test_a_group_needs_torch_distributed():
    hidden, weight, labels = torch.randn(3, 8), torch.randn(20, 8), torch.zeros(3, dtype=torch.long)
    with pytest.raises(RuntimeError, match="group: expected torch.distributed to be initialised"):
        linear_log_odds(hidden, weight, labels, group=torch.distributed.ProcessGroup(0, 1))
