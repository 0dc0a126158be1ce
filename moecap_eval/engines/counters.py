"""Which experts a pass touched, counted on the device that routed it, without waiting for that device.

Each MoE layer copies its expert ids into one buffer (a single asynchronous copy, so it can be part of a
CUDA graph). After the pass a few operations reduce the buffer of all layers to counts, which travel to the
host through a pinned ring. Nothing here knows an engine.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_RING_SLOTS = 64


@dataclass(frozen=True)
class PassCounts:
    """One pass, on the host.

    ``counts`` is int32 ``[layers, experts]``: unpadded (token, expert) pairs. ``loaded`` is int64
    ``[layers]``: distinct experts including those only padding rows use.
    """

    duration_s: float
    counts: np.ndarray
    loaded: np.ndarray
    distinct_tokens: int


class PassCounters:
    """Counts experts and input tokens of each pass on ``device`` and hands them over in order.

    Args:
        num_layers: MoE layers observed; 0 for a dense model.
        num_experts: routed experts of a layer.
        top_k: experts per token.
        max_rows: largest number of rows of a pass.
        padded_rows: rows up to which a pass may be padded (largest CUDA graph), 0 if it never is.
        vocab_size: rows of the embedding.
        device: where the routers run.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_experts: int,
        top_k: int,
        max_rows: int,
        padded_rows: int,
        vocab_size: int,
        device: torch.device,
    ) -> None:
        self._num_layers, self._num_experts = num_layers, num_experts
        self._max_rows, self._padded_rows = max_rows, min(padded_rows, max_rows)
        self._rows_seen = [0] * num_layers
        self._written_rows = max_rows
        self._active = False
        # Expert id `num_experts` means "no row was written here".
        shape = (num_layers, max_rows, max(top_k, 1))
        self._ids = torch.full(shape, num_experts, dtype=torch.int32, device=device)
        self._token_seen = torch.zeros(vocab_size, dtype=torch.int32, device=device)
        self._clock = _CudaClock() if device.type == "cuda" else _HostClock()

    def capture(self, slot: int) -> Callable[[Tensor], None]:
        """The function that layer ``slot`` calls with its expert ids, ``[rows, top_k]``."""

        def copy_ids(topk_ids: Tensor) -> None:
            if self._clock.is_capturing():
                # A captured graph writes from row 0 at each replay, when this function is not called.
                self._ids[slot, : topk_ids.shape[0]].copy_(topk_ids)
            elif self._active:
                # A layer may be called in several micro-batches of one pass.
                start = self._rows_seen[slot]
                end = min(start + topk_ids.shape[0], self._max_rows)
                self._ids[slot, start:end].copy_(topk_ids[: end - start])
                self._rows_seen[slot] = end

        return copy_ids

    def begin(self) -> None:
        """Forget the last pass and start the clock; expert ids outside a pass (dummy runs) are not kept."""
        self._rows_seen = [0] * self._num_layers
        self._ids[:, : self._written_rows].fill_(self._num_experts)
        self._active = True
        self._clock.begin()

    def end(self, rows: int, input_ids: Tensor) -> None:
        """Stop the clock and reduce the pass of ``rows`` unpadded rows and their ``input_ids``."""
        self._clock.end()
        self._active = False
        self._written_rows = max(rows, self._padded_rows)
        touched = self._histogram(rows)
        loaded = touched if self._padded_rows <= rows else self._histogram(self._padded_rows)
        self._token_seen.zero_()
        self._token_seen.index_fill_(0, input_ids[:rows].long(), 1)
        parts = (
            touched.flatten(),
            (loaded > 0).sum(1, dtype=torch.int32),
            self._token_seen.sum().int()[None],
        )
        self._clock.submit(torch.cat(parts))

    def _histogram(self, rows: int) -> Tensor:
        """int32 [layers, experts] of the first ``rows`` rows."""
        ids = self._ids[:, :rows].flatten(1).long()
        counts = torch.zeros(
            (self._num_layers, self._num_experts + 1), dtype=torch.int32, device=self._ids.device
        )
        counts.scatter_add_(1, ids, torch.ones_like(ids, dtype=torch.int32))
        return counts[:, : self._num_experts]

    def drain(self) -> list[PassCounts]:
        """Passes that ended since the last call, in order; waits for those still running."""
        pairs = self._num_layers * self._num_experts
        return [
            PassCounts(
                duration_s=seconds,
                counts=values[:pairs].reshape(self._num_layers, self._num_experts),
                loaded=values[pairs:-1].astype(np.int64),
                distinct_tokens=int(values[-1]),
            )
            for seconds, values in self._clock.take()
        ]


class HostPassCounters(PassCounters):
    """The same counts for routers that run on the host, where NumPy's small calls are several times cheaper.

    Host passes are never padded.
    """

    def __init__(self, **sizes: int) -> None:
        super().__init__(**sizes, padded_rows=0, device=torch.device("cpu"))
        self._clock = self._host_clock = _HostClock()
        self._host_ids = self._ids.numpy()
        self._offsets = (np.arange(self._num_layers) * (self._num_experts + 1))[:, None, None]

    def capture(self, slot: int) -> Callable[[Tensor], None]:
        """The function that layer ``slot`` calls with its expert ids, ``[rows, top_k]``."""

        def copy_ids(topk_ids: Tensor) -> None:
            if self._active:
                start = self._rows_seen[slot]
                end = min(start + topk_ids.shape[0], self._max_rows)
                self._host_ids[slot, start:end] = topk_ids.numpy()[: end - start]
                self._rows_seen[slot] = end

        return copy_ids

    def begin(self) -> None:
        """Forget the last pass and start the clock."""
        self._rows_seen = [0] * self._num_layers
        self._active = True
        self._clock.begin()

    def end(self, rows: int, input_ids: Tensor) -> None:
        """Stop the clock and reduce the pass of ``rows`` rows and their ``input_ids``."""
        self._clock.end()
        self._active = False
        for slot, seen in enumerate(self._rows_seen):
            self._host_ids[slot, seen:rows] = self._num_experts
        bins = self._num_experts + 1
        flat = (self._host_ids[:, :rows] + self._offsets).ravel()
        counts = np.bincount(flat, minlength=self._num_layers * bins).reshape(self._num_layers, bins)
        counts = counts[:, : self._num_experts].astype(np.int32)
        distinct_tokens = np.unique(input_ids[:rows].numpy()).size
        parts = (counts.ravel(), (counts > 0).sum(axis=1), [distinct_tokens])
        self._host_clock.submit_host(np.concatenate(parts).astype(np.int32))


class _HostClock:
    """Times passes that are complete when the call returns."""

    def __init__(self) -> None:
        self._finished: list[tuple[float, np.ndarray]] = []
        self._start = self._seconds = 0.0

    def is_capturing(self) -> bool:
        return False

    def begin(self) -> None:
        self._start = time.perf_counter()

    def end(self) -> None:
        self._seconds = time.perf_counter() - self._start

    def submit(self, values: Tensor) -> None:
        self.submit_host(values.numpy().copy())

    def submit_host(self, values: np.ndarray) -> None:
        self._finished.append((self._seconds, values))

    def take(self) -> list[tuple[float, np.ndarray]]:
        finished, self._finished = self._finished, []
        return finished


class _CudaClock:
    """Times passes by events and brings their counts to the host through pinned buffers."""

    def __init__(self) -> None:
        self._free: list[tuple[torch.cuda.Event, torch.cuda.Event, torch.cuda.Event]] = []
        self._in_flight: deque[tuple[tuple[torch.cuda.Event, ...], Tensor]] = deque()
        self._buffers: list[Tensor] = []
        self._finished: list[tuple[float, np.ndarray]] = []
        self._events: tuple[torch.cuda.Event, torch.cuda.Event, torch.cuda.Event] | None = None

    def is_capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def begin(self) -> None:
        self._harvest(wait=len(self._in_flight) >= _RING_SLOTS)
        self._events = self._free.pop() if self._free else self._new_events()
        self._events[0].record()

    @staticmethod
    def _new_events() -> tuple[torch.cuda.Event, torch.cuda.Event, torch.cuda.Event]:
        return (
            torch.cuda.Event(enable_timing=True),
            torch.cuda.Event(enable_timing=True),
            torch.cuda.Event(),
        )

    def end(self) -> None:
        assert self._events is not None
        self._events[1].record()

    def submit(self, values: Tensor) -> None:
        assert self._events is not None
        buffer = self._buffers.pop() if self._buffers else torch.empty_like(values, device="cpu").pin_memory()
        buffer.copy_(values, non_blocking=True)
        self._events[2].record()
        self._in_flight.append((self._events, buffer))
        self._events = None

    def _harvest(self, *, wait: bool) -> None:
        """Collect passes whose counts arrived; with ``wait``, at least the oldest one."""
        while self._in_flight:
            events, buffer = self._in_flight[0]
            if not events[2].query():
                if not wait:
                    return
                events[2].synchronize()
            wait = False
            self._in_flight.popleft()
            milliseconds = events[0].elapsed_time(events[1])
            self._finished.append((milliseconds / 1e3, buffer.numpy().copy()))
            self._buffers.append(buffer)
            self._free.append((events[0], events[1], events[2]))

    def take(self) -> list[tuple[float, np.ndarray]]:
        while self._in_flight:
            self._harvest(wait=True)
        finished, self._finished = self._finished, []
        return finished
