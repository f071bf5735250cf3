"""The peak of resident memory."""

import platform
import subprocess
import sys

import pytest
import torch

from fastadapt._ops import memory

needs_peak = pytest.mark.skipif(
    not memory.is_measurable(), reason="this system does not tell the peak of a process"
)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc's malloc")
@needs_peak
def test_freed_blocks_are_returned(tmp_path):
    """Holes of 2 MB between blocks that stay are no longer resident."""
    code = (
        "import torch; from fastadapt._ops import memory\n"
        "assert memory.return_freed_blocks()\n"
        "torch.ones(4 << 20)  # freed, it raises the bound to its 16 MB\n"
        "blocks = [torch.ones(1 << 19) for _ in range(64)]\n"
        "full = memory._kilobytes('VmRSS')\n"
        "del blocks[::2]\n"
        "assert full - memory._kilobytes('VmRSS') > 60_000"
    )
    run = [sys.executable, "-P", "-c", code]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@needs_peak
def test_peak_sees_what_is_freed_again():
    size, late = 64 << 20, 1 << 20  # the kernel counts some pages late
    with memory.PeakMemory() as peak:
        large = torch.ones(size, dtype=torch.uint8)
        del large
    assert size - late <= peak.extra < size + (8 << 20)
    with memory.PeakMemory() as small:
        torch.ones(1)
    assert small.extra < 8 << 20


def test_peak_needs_a_system_that_tells_it(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_PROCESS", tmp_path / "none")
    assert not memory.is_measurable()
    with pytest.raises(OSError), memory.PeakMemory():
        pass
