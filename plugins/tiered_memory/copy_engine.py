"""Copies in order of submission on a side stream, and a twin on simulated time for tests and replay.

A CopyEngine makes Copies. The simulated engine keeps the interface; a SimulatedClock, which several engines
may share, finishes their copies as time passes.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Sequence
from types import TracebackType

import torch
from torch import Tensor

Pairs = Sequence[tuple[Tensor, Tensor]]


class Copy:
    """A submitted copy. This class itself stands for one that was done, or failed, on submission.

    Attributes:
        nbytes: bytes that it moves.
    """

    def __init__(self, nbytes: int, error: Exception | None = None) -> None:
        self.nbytes = nbytes
        self._error = error

    @property
    def done(self) -> bool:
        """Whether the bytes have arrived. Never blocks; raises what made the copy fail."""
        if self._error is not None:
            raise self._error
        return True

    def wait(self, stream: torch.cuda.Stream | None = None) -> None:
        """Make ``stream`` (default: the current one) wait for the copy; the host does not wait.

        Raises:
            Exception: what made the copy fail; its destination is undefined then.
        """
        if self._error is not None:
            raise self._error

    def synchronize(self) -> float:
        """Make the host wait.

        Returns:
            Seconds that the copy took on its link (0.0 on the CPU).

        Raises:
            Exception: what made the copy fail; its destination is undefined then.
        """
        self.wait()
        return 0.0


class _CudaCopy(Copy):
    """Between two events of the engine's stream."""

    def __init__(self, nbytes: int, stream: torch.cuda.Stream) -> None:
        super().__init__(nbytes)
        self._device = stream.device
        self._start = torch.cuda.Event(enable_timing=True)
        self._end = torch.cuda.Event(enable_timing=True)

    @property
    def done(self) -> bool:
        return self._end.query()

    def wait(self, stream: torch.cuda.Stream | None = None) -> None:
        (stream or torch.cuda.current_stream(self._device)).wait_event(self._end)

    def synchronize(self) -> float:
        self._end.synchronize()
        return self._start.elapsed_time(self._end) * 1e-3


class CopyEngine:
    """One side stream of a device; copies keep the order of submission.

    Two directions, or two GPUs, are two engines. Priorities are the caller's: with few copies in flight an
    urgent one waits for at most those.

    Args:
        device: a CUDA device, or ``"cpu"``, where ``submit`` copies at once.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        # Source and destination must outlive the copy even if the caller drops everything.
        self._in_flight: deque[tuple[Copy, Pairs]] = deque()
        self._closed = False

    def submit(self, pairs: Pairs, *, after: torch.cuda.Stream | None = None) -> Copy:
        """Queue copies; returns at once where the host side is pinned.

        Args:
            pairs: ``(destination, source)`` tensors, alike in shape and dtype; views are allowed.
            after: the copy starts after all work this stream holds now, e.g. the kernel that still reads
                what is about to be overwritten. None: as soon as the engine's stream is free.

        Raises:
            ValueError: a pair differs in shape or dtype; nothing is queued.
            RuntimeError: the engine is closed.
        """
        if self._closed:
            raise RuntimeError("copy engine: already closed")
        for index, (destination, source) in enumerate(pairs):
            if destination.shape != source.shape or destination.dtype != source.dtype:
                raise ValueError(
                    f"copy engine: pair {index} differs: destination {tuple(destination.shape)} "
                    f"{destination.dtype}, source {tuple(source.shape)} {source.dtype}"
                )
        while self._in_flight and self._in_flight[0][0].done:
            self._in_flight.popleft()
        return self._launch(pairs, sum(source.nbytes for _, source in pairs), after)

    def _launch(self, pairs: Pairs, nbytes: int, after: torch.cuda.Stream | None) -> Copy:
        if self._stream is None:
            try:
                for destination, source in pairs:
                    destination.copy_(source)
            except Exception as error:
                return Copy(nbytes, error)
            return Copy(nbytes)
        if after is not None:
            self._stream.wait_stream(after)
        copy = _CudaCopy(nbytes, self._stream)
        with torch.cuda.stream(self._stream):
            copy._start.record(self._stream)
            for destination, source in pairs:
                destination.copy_(source, non_blocking=True)
            copy._end.record(self._stream)
        self._in_flight.append((copy, pairs))
        return copy

    def close(self) -> None:
        """Finish what is in flight and let go of stream and tensors. Idempotent."""
        self._closed = True
        try:
            if self._stream is not None:
                self._stream.synchronize()
        finally:
            self._in_flight.clear()
            self._stream = None

    def __enter__(self) -> CopyEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class SimulatedClock:
    """Time that passes only when told to.

    Attributes:
        now: seconds since the start.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[tuple[float, int, _SimulatedCopy]] = []
        self._order = itertools.count()

    def advance(self, seconds: float) -> None:
        """Let ``seconds`` pass; the copies that fall due are finished in order of time."""
        if seconds < 0:
            raise ValueError(f"clock: cannot advance by {seconds} s")
        self._advance_to(self.now + seconds)

    def _advance_to(self, end: float) -> None:
        while self._due and self._due[0][0] <= end:
            self.now, _, copy = heapq.heappop(self._due)
            copy._finish()
        self.now = max(self.now, end)

    def _schedule(self, copy: _SimulatedCopy) -> None:
        heapq.heappush(self._due, (copy._end, next(self._order), copy))


class _SimulatedCopy(Copy):
    def __init__(self, pairs: Pairs, nbytes: int, clock: SimulatedClock, start: float, end: float) -> None:
        super().__init__(nbytes)
        self._pairs, self._clock, self._start, self._end = pairs, clock, start, end
        self._finished = False

    @property
    def done(self) -> bool:
        return self._finished and super().done

    def wait(self, stream: torch.cuda.Stream | None = None) -> None:
        if not self._finished:
            self._clock._advance_to(self._end)
        super().wait(stream)

    def synchronize(self) -> float:
        self.wait()
        return self._end - self._start

    def _finish(self) -> None:
        try:
            for destination, source in self._pairs:
                destination.copy_(source)
        except Exception as error:
            self._error = error
        self._finished = True
        self._pairs = ()


class SimulatedCopyEngine(CopyEngine):
    """One link that carries one copy at a time, in simulated time.

    The bytes appear at the destination only when the clock passes the copy's end, so a reader that does not
    wait sees the old ones. ``wait`` and ``synchronize`` advance the clock. ``after`` has no meaning here.

    Args:
        clock: the time of the simulation; engines may share it.
        bytes_per_s: bandwidth of the link.
        latency_s: seconds that each copy occupies the link besides its bytes.
    """

    def __init__(self, clock: SimulatedClock, *, bytes_per_s: float, latency_s: float = 0.0) -> None:
        if bytes_per_s <= 0 or latency_s < 0:
            raise ValueError(
                f"simulated link: bytes_per_s must be positive and latency_s not negative, "
                f"got {bytes_per_s} and {latency_s}"
            )
        super().__init__("cpu")
        self._clock, self._bytes_per_s, self._latency_s = clock, bytes_per_s, latency_s
        self._free_at = 0.0

    def _launch(self, pairs: Pairs, nbytes: int, after: torch.cuda.Stream | None) -> Copy:
        start = max(self._clock.now, self._free_at)
        self._free_at = start + self._latency_s + nbytes / self._bytes_per_s
        copy = _SimulatedCopy(tuple(pairs), nbytes, self._clock, start, self._free_at)
        self._clock._schedule(copy)
        return copy

    def close(self) -> None:
        """Finish what is in flight, which advances the clock, and refuse further copies. Idempotent."""
        if not self._closed and self._free_at > self._clock.now:
            self._clock._advance_to(self._free_at)
        super().close()
