"""The peak of resident memory."""

import pytest
import torch

from fastadapt import memory

needs_peak = pytest.mark.skipif(
    not memory.is_measurable(), reason="this system does not tell the peak of a process"
)


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
