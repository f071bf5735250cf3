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


@pytest.mark.parametrize("ranks", (2, 4))
def test_ranks_have_the_results_of_one_process(ranks, tmp_path):
    command = [sys.executable, "-P", str(RANK)]
    started = [
        subprocess.Popen(
            [*command, str(rank), str(ranks), str(tmp_path / "store")],
            cwd=tmp_path,
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
        held = [line for line in output.splitlines() if line.startswith("held: ")]
        assert len(held) == CASES + (ranks == 2), output[-4000:]  # one more on two


def test_a_group_needs_torch_distributed():
    hidden, weight, labels = torch.randn(3, 8), torch.randn(20, 8), torch.zeros(3, dtype=torch.long)
    with pytest.raises(RuntimeError, match="group: expected torch.distributed to be initialised"):
        linear_label_margins(hidden, weight, labels, group=object())
