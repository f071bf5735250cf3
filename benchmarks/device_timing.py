"""Times of calls on a CUDA device: between events, L2 cache cold or hot, in a CUDA graph or not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from timing import Call

FLUSH_BYTES = 128 << 20  # at least
SLEEP = 1_000_000  # cycles, some 0.6 ms: the host has submitted a call by then


@dataclass(frozen=True)
class DeviceCall:
    """A call, and what must be done before each without being timed (rows to restore, say)."""

    run: Call
    prepare: Callable[[], object] | None = None

    def __call__(self, turn: int) -> object:
        return self.run(turn)


class DeviceTimer:
    """Seconds between two events around a call, as `timing.in_turns` takes them.

    Before each call a buffer of four times the L2 cache is written and read. The read leaves no
    line to be written back while the call runs. Then the device waits while the host submits the
    call, whose time holds the host's share only as far as that is longer than `SLEEP`.

    Args:
        hot: the call is made once more between the flush and the first event, so that it finds in
            the cache what a call leaves there.
    """

    def __init__(self, *, hot: bool) -> None:
        self._hot = hot
        cache = torch.cuda.get_device_properties().L2_cache_size
        size = max(4 * cache, FLUSH_BYTES)
        self._buffer = torch.empty(size // 4, dtype=torch.int32, device="cuda")
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self, call: Call, turns: range) -> float:
        """Seconds per call of the calls with these numbers."""
        return sum(self._seconds(call, turn) for turn in turns) / len(turns)

    def _seconds(self, call: Call, turn: int) -> float:
        prepare = call.prepare if isinstance(call, DeviceCall) else None
        if prepare and not self._hot:
            prepare()
        self._buffer.fill_(turn)
        self._buffer.amax()
        if self._hot:
            if prepare:
                prepare()
            call(turn)
            if prepare:
                prepare()
        torch.cuda._sleep(SLEEP)
        self._start.record()
        call(turn)
        self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end) / 1e3


def captured(call: DeviceCall) -> DeviceCall:
    """The call as the replay of a CUDA graph, which is that of turn 0, if it can be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for turn in range(3):  # what is compiled or allocated once is so before the capture
            call(turn)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(0)
    return replace(call, run=lambda turn: graph.replay())
