"""What holds in every process of a test run: pytest-xdist starts several, with the same options."""

import os

import torch

from fastadapt import _C


def test_instruction_set_is_the_one_asked_for(request):
    """Of each worker too, which gets the options of `pytest` but is another process."""
    asked = request.config.getoption("--cpu-capability")
    assert _C.cpu_capability() == (asked or _C.cpu_capabilities()[-1])


def test_worker_has_one_thread(request):
    """As many workers as cores; a number in the environment is kept, by tests' processes too."""
    if hasattr(request.config, "workerinput"):
        assert torch.get_num_threads() == int(os.environ["OMP_NUM_THREADS"])


def test_workers_share_no_group(request):
    """Tests that share a module's fixture, or one of the whole list, run in one process."""
    groups, shared = {}, {"gpu", "demo_model", "preloaded"}
    for item in request.session.items:
        for mark in item.iter_markers("xdist_group"):
            groups.setdefault(item.path.stem, set()).add(mark.args[0])
            if hasattr(request.config, "workerinput"):  # where pytest-xdist looks for the group
                assert item.nodeid.endswith(f"@{mark.args[0]}"), item.nodeid
    assert all(names <= {module, *shared} for module, names in groups.items())
