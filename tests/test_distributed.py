"""Two processes train as one: data parallel by both trainers, sharded (FSDP2), a split head."""

import importlib.util
import json
import socket
from pathlib import Path

import pytest
import torch.distributed as dist

STEPS = 4  # of the worker
WORKER = Path(__file__).parent / "train_in_parallel.py"


@pytest.fixture(scope="module")
def curves(tmp_path_factory, letter_model, start_python):
    """What one process sees, and what two see, which are told of each other as by torchrun."""
    folder = tmp_path_factory.mktemp("parallel")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}
    group |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
    outputs = [folder / f"{rank}.txt" for rank in "01"]
    ranks = [
        start_python(
            *(WORKER, str(folder), letter_model),
            **{"folder": folder, "output": output, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            **group,
        )
        for rank, output in enumerate(outputs)
    ]
    spec = importlib.util.spec_from_file_location("train_in_parallel", WORKER)
    worker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(worker)
    alone = worker.everything(folder, letter_model)
    for rank, output in zip(ranks, outputs, strict=True):
        rank.join(timeout=300)
        rank.kill()
        assert rank.exitcode == 0, output.read_text()[-4000:]
    return alone, json.loads((folder / "parallel.json").read_text())


pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo"
)


PARALLEL = [
    *("pairs", "pairs with LoRA on the head", "pairs, other losses"),
    *("single responses", "negatives", "texts"),
]


@pytest.mark.parametrize("way", PARALLEL)
def test_data_parallel(curves, way):
    one, two = (seen[way] for seen in curves)
    assert len(one) == len(two) == 4
    for alone, shared in zip(one, two, strict=True):
        assert shared == pytest.approx(alone, rel=1e-4), way
    assert one[0]["loss"] != one[-1]["loss"]


SHARDED = ["sharded", "trained head alone", "frozen head alone", "LoRA on the head", "split head"]


@pytest.mark.parametrize("way", SHARDED)
def test_sharded(curves, way):
    """Also a head with a group of its own, which is not there between its two passes."""
    one, two = (seen[way] for seen in curves)
    assert two == pytest.approx(one, rel=1e-5)
    assert one[STEPS - 1] != pytest.approx(one[0], rel=1e-2)
