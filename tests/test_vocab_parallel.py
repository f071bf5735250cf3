"""A head split over processes by vocabulary: what its ranks do is in vocab_parallel_ranks.py."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastadapt import linear_label_margins

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("torch has no gloo", allow_module_level=True)

RANK = Path(__file__).with_name("vocab_parallel_ranks.py")
CASES = 2 * 3 * 5 * 2 + 4  # splits, dtypes, plans, shapes; and others


def run(ranks: int, folder: Path, device: str) -> list[list[str]]:
    """The cases that held in each process."""
    command = [sys.executable, "-P", str(RANK)]
    started = [
        subprocess.Popen(
            [*command, str(rank), str(ranks), str(folder / "store"), device],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    for process, output in zip(started, outputs, strict=True):
        assert process.returncode == 0, output[-4000:]
    return [[x for x in out.splitlines() if x.startswith("held: ")] for out in outputs]


@pytest.mark.parametrize("ranks", (2, 4))
def test_ranks_have_the_results_of_one_process(ranks, tmp_path):
    held = run(ranks, tmp_path, "cpu")
    assert {len(cases) for cases in held} == {CASES + (ranks == 2)}  # one more on two


@pytest.mark.gpu
@pytest.mark.parametrize("ranks", (2, 4))
def test_ranks_on_gpus(ranks, tmp_path):
    """Through NCCL; errors about labels are the CPU's alone."""
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} CUDA devices")
    held = run(ranks, tmp_path, "cuda")
    assert {len(cases) for cases in held} == {CASES - 1 + (ranks == 2)}


def test_a_group_needs_torch_distributed():
    hidden, weight, labels = torch.randn(3, 8), torch.randn(20, 8), torch.zeros(3, dtype=torch.long)
    with pytest.raises(RuntimeError, match="group: expected torch.distributed to be initialised"):
        linear_label_margins(hidden, weight, labels, group=object())
