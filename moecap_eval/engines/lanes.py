"""How passes are timed and their counts brought to the host: on a CPU at once, on a GPU without waiting."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Chunk = tuple[list[float], np.ndarray]  # seconds of each pass, and what was counted of all
_MAX_IN_FLIGHT = 8  # chunks whose counts wait in pinned memory


class HostLane:
    """Times passes that are complete when the call returns, and counts on the spot."""

    def __init__(self) -> None:
        self._start = 0.0
        self._pending: list[float] = []
        self._finished: list[Chunk] = []

    def is_capturing(self) -> bool:
        """Whether a graph is being captured: never."""
        return False

    def begin(self) -> None:
        """A pass begins."""
        self._start = time.perf_counter()

    def end(self) -> None:
        """The pass has ended."""
        self._pending.append(time.perf_counter() - self._start)

    def run(self, count: Callable[[], Tensor], passes: int) -> None:
        """Count the oldest ``passes`` passes that were timed."""
        self._finished.append((self._pending[:passes], count().numpy()))
        del self._pending[:passes]

    def take(self) -> list[Chunk]:
        """What was counted since the last call, in order."""
        finished, self._finished = self._finished, []
        return finished


class CudaLane:
    """Times passes by events and counts on a side stream; the host waits only in ``take``."""

    def __init__(self, device: torch.device) -> None:
        self._side = torch.cuda.Stream(device)
        self._free: list[_EventPair] = []
        self._pending: list[_EventPair] = []
        self._in_flight: deque[tuple[list[_EventPair], Tensor, torch.cuda.Event, Callable]] = deque()
        self._finished: list[Chunk] = []
        self._stream: torch.cuda.Stream | None = None

    def is_capturing(self) -> bool:
        """Whether a graph is being captured on the current stream."""
        return torch.cuda.is_current_stream_capturing()

    def begin(self) -> None:
        """A pass is about to be enqueued."""
        self._stream = torch.cuda.current_stream()
        events = self._free.pop() if self._free else _EventPair()
        self._pending.append(events)
        events.start.record(self._stream)

    def end(self) -> None:
        """The pass has been enqueued."""
        self._pending[-1].stop.record(self._stream)

    def run(self, count: Callable[[], Tensor], passes: int) -> None:
        """Count on the side stream what the main stream has written so far."""
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            values = count()
            on_host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            on_host.copy_(values, non_blocking=True)
            done = torch.cuda.Event()
            done.record()
        # `count` holds tensors of the main stream, whose memory must not be given away before it is done.
        self._in_flight.append((self._pending[:passes], on_host, done, count))
        del self._pending[:passes]
        if len(self._in_flight) > _MAX_IN_FLIGHT:
            self._harvest()

    def _harvest(self) -> None:
        pairs, on_host, done, _ = self._in_flight.popleft()
        done.synchronize()
        self._finished.append(([pair.seconds() for pair in pairs], on_host.numpy().copy()))
        self._free += pairs

    def take(self) -> list[Chunk]:
        """What was counted since the last call, in order; waits for it."""
        while self._in_flight:
            self._harvest()
        finished, self._finished = self._finished, []
        return finished


class _EventPair:
    """Start and stop of a pass on the device's own clock."""

    def __init__(self) -> None:
        self.start, self.stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def seconds(self) -> float:
        return self.start.elapsed_time(self.stop) / 1e3
