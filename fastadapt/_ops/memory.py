"""The peak of resident memory during a block, as Linux counts it."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

_PROCESS = Path("/proc/self")
_M_MMAP_THRESHOLD = -3  # malloc.h
_RESET_PEAK = "5"  # proc(5): sets VmHWM to VmRSS


def return_freed_blocks() -> bool:
    """Makes malloc return freed blocks of 1 MB and more to the system.

    By default glibc raises that bound to 32 MB as a program goes on and keeps smaller blocks in a
    heap with holes, so that a peak tells where the holes lay and not what was alive. It holds for
    the rest of the process and makes such blocks slower: for a process that measures memory.

    Returns:
        bool: whether the C library does it; glibc does.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and mallopt(_M_MMAP_THRESHOLD, 1 << 20) == 1


class PeakMemory:
    """The peak of resident memory inside a `with` block, beyond what was resident before.

    Memory that malloc has kept for itself is given back first, where the C library can do that:
    pages that the block takes from there would not count. Pages that the kernel counts late make
    the peak wrong by less than 1 MB. Blocks do not nest: each resets the peak.

    Examples:
        >>> with PeakMemory() as peak:
        ...     y = torch.ones(1_000_000)
        >>> peak.extra >= 4_000_000
        True

    Attributes:
        before: bytes resident at the beginning.
        largest: bytes, the most resident until the end; only after the block.

    Raises:
        OSError: at the beginning; no Linux, or a kernel that does not let the peak be reset.
    """

    def __init__(self) -> None:
        self.before = self.largest = 0

    @property
    def extra(self) -> int:
        """Bytes that the block needed beyond what was resident before it."""
        return self.largest - self.before

    def __enter__(self) -> PeakMemory:
        gc.collect()
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
        _reset()
        self.before = _kilobytes("VmRSS") * 1024
        return self

    def __exit__(self, *_: object) -> None:
        self.largest = _kilobytes("VmHWM") * 1024


def is_measurable() -> bool:
    """Tells whether `PeakMemory` works on this system."""
    try:
        _reset()
        _kilobytes("VmHWM")
    except (OSError, KeyError):
        return False
    return True


def _reset() -> None:
    """Resets the peak to what is resident now."""
    (_PROCESS / "clear_refs").write_text(_RESET_PEAK, encoding="ascii")


def _kilobytes(name: str) -> int:
    """Reads one line of /proc/self/status."""
    lines = (_PROCESS / "status").read_text(encoding="ascii").splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields[name].split()[0])
