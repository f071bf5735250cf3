"""Two processes train as one: data parallel by both trainers, sharded (FSDP2), a split head."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

WORKER = Path(__file__).parent / "train_in_parallel.py"


@pytest.fixture(scope="module")
def curves(tmp_path_factory, letter_model):
    """What one process sees, and what two see."""
    folder = tmp_path_factory.mktemp("parallel")
    launch = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*launch, "--nproc-per-node", "2", str(WORKER), str(folder), letter_model],
        cwd=folder,
        env=environment,
        check=True,
        timeout=300,
    )
    spec = importlib.util.spec_from_file_location("train_in_parallel", WORKER)
    worker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(worker)
    return worker.everything(folder, letter_model), json.loads(
        (folder / "parallel.json").read_text()
    )


pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo"
)


@pytest.mark.parametrize("way", ["pairs", "texts"])
def test_data_parallel(curves, way):
    one, two = (seen[way] for seen in curves)
    assert len(one) == len(two) == 4
    for alone, shared in zip(one, two, strict=True):
        assert shared == pytest.approx(alone, rel=1e-4), way
    assert one[0]["loss"] != one[-1]["loss"]


@pytest.mark.parametrize("way", ["sharded", "split head"])
def test_sharded(curves, way):
    one, two = (seen[way] for seen in curves)
    assert two == pytest.approx(one, rel=1e-5)
    assert one[-1] != pytest.approx(one[0], rel=1e-2)


def test_a_head_with_a_group_of_its_own(curves):
    """Trained, it is refused before the forward; frozen, its backward does not need it."""
    one, two = (seen["refused"] for seen in curves)
    assert one == ["", ""]
    assert "got a trained one with fully_shard of its own" in two[0] and two[1] == ""
