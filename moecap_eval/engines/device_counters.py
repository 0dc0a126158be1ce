"""Which experts a pass touched, counted on the device that routed it, without holding up that device.

On a step's path stand one small kernel and one copy, whatever the number of layers: the last MoE layer
gathers the expert ids of all layers into one buffer (inside a CUDA graph this is one node of the graph), and
after the pass that buffer is copied to a slot of a ring. When half of the ring is full, its passes are
counted together on a side stream and travel to the host through pinned memory, while the other half fills.
Nothing here knows an engine.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from moecap_eval.engines.counters import PassCounts

_RING_PASSES = 128  # of each half
_RING_BYTES = 1 << 25
_MAX_IN_FLIGHT = 64


class DevicePassCounters:
    """Counts experts and input tokens of each pass on ``device`` and hands them over in order.

    Args:
        num_layers: MoE layers observed; 0 for a dense model.
        num_experts: routed experts of a layer.
        top_k: experts per token.
        max_rows: largest number of rows of a pass.
        graph_rows: rows of the largest CUDA graph, 0 if there is none.
        input_ids: the buffer in which every pass finds its token ids, int32 ``[max_rows]``.
        device: where the routers run.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_experts: int,
        top_k: int,
        max_rows: int,
        graph_rows: int,
        input_ids: Tensor,
        device: torch.device,
    ) -> None:
        self._num_layers, self._num_experts, self._max_rows = num_layers, num_experts, max_rows
        self._input_ids = input_ids
        self._top_k = max(top_k, 1)
        # Layer by layer the ids of each row; then, flat, the number of rows written and their tokens.
        shape = (num_layers + 1, max_rows + 1, self._top_k)
        self._pass = torch.full(shape, num_experts, dtype=torch.int32, device=device)
        self._ids = self._pass[:num_layers, :max_rows]
        self._written, self._tokens = self._pass[-1].flatten()[:1], self._pass[-1].flatten()[1:]
        self._written.zero_()
        self._row_numbers = torch.arange(max_rows + 1, dtype=torch.int32, device=device)
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._rows_seen = [0] * num_layers
        self._active = self._gathered = False
        self._largest_graph = 0

        self._ring_rows = min(max(graph_rows, 1), max_rows)
        slot_bytes = 4 * (num_layers + 1) * (self._ring_rows + 1) * self._top_k
        slots = max(1, min(_RING_PASSES, _RING_BYTES // (2 * slot_bytes)))
        ring = (2, slots, num_layers + 1, self._ring_rows + 1, self._top_k)
        self._ring = torch.zeros(ring, dtype=torch.int32, device=device)
        # Views made once: slicing a tensor takes the host as long as starting a copy.
        self._slots = [[self._ring[half, slot] for slot in range(slots)] for half in range(2)]
        self._ring_source = self._pass[:, : self._ring_rows + 1]
        self._half = 0
        self._rows: list[int] = []
        self._lane = _CudaLane(device) if device.type == "cuda" else _HostLane()

    def capture(self, slot: int) -> Callable[[Tensor], None]:
        """The function that layer ``slot`` calls with its expert ids, ``[rows, top_k]``.

        The ids must stay as they are until the last layer has called.
        """

        def keep_ids(topk_ids: Tensor) -> None:
            if self._active or self._lane.is_capturing():
                self._keep(slot, topk_ids)

        return keep_ids

    def _keep(self, slot: int, topk_ids: Tensor) -> None:
        if slot == 0 and self._gathered and not self._active:
            self._start_rows()  # the next graph is captured, from row 0
        # A layer may be called in several micro-batches of one pass.
        start = self._rows_seen[slot]
        end = min(start + topk_ids.shape[0], self._max_rows)
        self._kept.append((self._ids[slot, start:end], topk_ids[: end - start]))
        self._rows_seen[slot] = end
        if slot == self._num_layers - 1:
            if not self._active:
                self._largest_graph = max(self._largest_graph, end)
            self._gather(end)

    def _start_rows(self) -> None:
        self._rows_seen = [0] * self._num_layers
        self._kept.clear()
        self._gathered = False

    def _gather(self, rows: int) -> None:
        """Copy what the layers kept, the tokens, and how many rows there are: one kernel for 60 layers."""
        if len({ids.data_ptr() for _, ids in self._kept}) < len(self._kept):
            raise RuntimeError(
                "several MoE layers hand over their expert ids in one buffer, where only the last layer's "
                "are left at the end of a pass: this router cannot be observed"
            )
        rows_of_tokens = min(rows, self._input_ids.shape[0])
        copies = [
            *self._kept,
            (self._tokens[:rows_of_tokens], self._input_ids[:rows_of_tokens]),
            (self._written, self._row_numbers[rows : rows + 1]),
        ]
        torch._foreach_copy_([target for target, _ in copies], [source for _, source in copies])
        self._kept.clear()
        self._gathered = True

    def begin(self) -> None:
        """Forget the last pass and start the clock; expert ids outside a pass (dummy runs) are not kept."""
        self._start_rows()
        self._active = True
        self._lane.begin()

    def end(self, rows: int) -> None:
        """Stop the clock and take over the pass of ``rows`` unpadded rows."""
        self._lane.end()
        self._active = False
        seen = max(self._rows_seen, default=0)
        if not self._num_layers:
            self._gather(rows)
        elif seen or rows > self._largest_graph:
            self._close_eager_pass(rows, seen)
        written = max(rows, seen)
        if written > self._ring_rows:
            self._turn()
            self._lane.run(lambda: self._count(self._pass[None, :, : written + 1], [rows]), 1)
            self._lane.wait()
            return
        slots = self._slots[self._half]
        slots[len(self._rows)].copy_(self._ring_source)
        self._rows.append(rows)
        if len(self._rows) == len(slots):
            self._turn()
            # A graph that does not gather leaves this at 0, and its pass is found to be a hole.
            self._written.zero_()

    def _close_eager_pass(self, rows: int, seen: int) -> None:
        """Mark rows that a layer left out, where no graph stands for it."""
        for slot, layer_rows in enumerate(self._rows_seen):
            if layer_rows < rows:
                self._ids[slot, layer_rows:rows].fill_(self._num_experts)
        if not self._gathered:
            self._gather(seen)

    def _turn(self) -> None:
        """Count the passes of the ring's current half and go on in the other one."""
        if not self._rows:
            return
        half, rows = self._half, self._rows
        self._lane.run(lambda: self._count(self._ring[half, : len(rows)], rows), len(rows))
        self._half, self._rows = 1 - half, []
        self._lane.wait(but=1)  # the other half was counted before

    def _count(self, passes: Tensor, rows: list[int]) -> Tensor:
        used = torch.tensor(rows, dtype=torch.int32, pin_memory=passes.is_cuda)
        return count_passes(passes, used.to(passes.device, non_blocking=True), self._num_experts)

    def drain(self) -> list[PassCounts]:
        """Passes that ended since the last call, in order; waits for those still running."""
        self._turn()
        pairs = self._num_layers * self._num_experts
        return [
            PassCounts(
                duration_s=seconds,
                counts=values[:pairs].reshape(self._num_layers, self._num_experts),
                loaded=values[pairs:-1].astype(np.int64),
                distinct_tokens=int(values[-1]),
            )
            for seconds, values in self._lane.take()
        ]


def count_passes(passes: Tensor, rows: Tensor, num_experts: int) -> Tensor:
    """Experts and tokens of several passes at once.

    Args:
        passes: int32 ``[passes, layers + 1, capacity + 1, top_k]``: expert ids of each row, and in the last
            "layer", flat, the number of rows written (padding included) and one token id for each.
        rows: int32 ``[passes]``, the rows that are not padding; rows that were not written count nowhere.
        num_experts: ids from 0; any other id counts nowhere.

    Returns:
        int32 ``[passes, layers * num_experts + layers + 1]``: (token, expert) pairs of unpadded rows by layer
        and expert, distinct experts of all written rows by layer, distinct tokens of unpadded rows.
    """
    layers, capacity = passes.shape[1] - 1, passes.shape[2] - 1
    last = passes[:, -1].flatten(1)
    written, tokens = last[:, :1], last[:, 1 : capacity + 1]
    row = torch.arange(capacity, device=passes.device)
    is_written = row < written
    is_token = is_written & (row < rows[:, None])

    ids = passes[:, :layers, :capacity]
    known = (ids >= 0) & (ids < num_experts) & is_written[:, None, :, None]
    # One histogram for both: experts of padding rows have bins of their own.
    bins = torch.where(is_token[:, None, :, None], ids, ids + num_experts)
    counts = _histogram(torch.where(known, bins, 2 * num_experts), 2 * num_experts)
    touched, padding = counts[..., :num_experts], counts[..., num_experts:]
    return torch.cat(
        (
            touched.flatten(1),
            ((touched + padding) > 0).sum(2, dtype=torch.int32),
            _distinct(torch.where(is_token, tokens, -1))[:, None],
        ),
        dim=1,
    )


def _histogram(ids: Tensor, bins: int) -> Tensor:
    """int32 [passes, layers, bins] of int32 [passes, layers, rows, top_k]; the id ``bins`` counts nowhere."""
    flat = ids.flatten(2).long()
    counts = torch.zeros((*flat.shape[:2], bins + 1), dtype=torch.int32, device=ids.device)
    counts.scatter_add_(2, flat, torch.ones((), dtype=torch.int32, device=ids.device).expand(flat.shape))
    return counts[..., :bins]


def _distinct(values: Tensor) -> Tensor:
    """int32 [passes]: distinct values of each row of int32 [passes, n] that are not -1."""
    ordered = values.sort(dim=1).values
    first = torch.ones_like(ordered[:, :1], dtype=torch.bool)
    new = torch.cat((first, ordered[:, 1:] != ordered[:, :-1]), dim=1) & (ordered >= 0)
    return new.sum(1, dtype=torch.int32)


class _HostLane:
    """Times passes that are complete when the call returns, and counts on the spot."""

    def __init__(self) -> None:
        self._start = 0.0
        self._pending: deque[float] = deque()
        self._finished: list[tuple[float, np.ndarray]] = []

    def is_capturing(self) -> bool:
        return False

    def begin(self) -> None:
        self._start = time.perf_counter()

    def end(self) -> None:
        self._pending.append(time.perf_counter() - self._start)

    def run(self, count: Callable[[], Tensor], passes: int) -> None:
        values = count().numpy()
        self._finished += [(self._pending.popleft(), values[index]) for index in range(passes)]

    def wait(self, *, but: int = 0) -> None:
        pass

    def take(self) -> list[tuple[float, np.ndarray]]:
        finished, self._finished = self._finished, []
        return finished


class _CudaLane:
    """Times passes by events and counts on a side stream; the host waits only in ``take``."""

    def __init__(self, device: torch.device) -> None:
        self._side = torch.cuda.Stream(device)
        self._free: list[_EventPair] = []
        self._events: _EventPair | None = None
        self._pending: deque[_EventPair] = deque()
        self._in_flight: deque[tuple[list[_EventPair], Tensor, torch.cuda.Event]] = deque()
        self._done: deque[torch.cuda.Event] = deque(maxlen=2)
        self._finished: list[tuple[float, np.ndarray]] = []

    def is_capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def begin(self) -> None:
        self._events = self._free.pop() if self._free else _EventPair()
        self._events.start.record()

    def end(self) -> None:
        assert self._events is not None
        self._events.stop.record()
        self._pending.append(self._events)
        self._events = None

    def run(self, count: Callable[[], Tensor], passes: int) -> None:
        """Count on the side stream what the main stream has written so far."""
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            values = count()
            on_host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            on_host.copy_(values, non_blocking=True)
            done = torch.cuda.Event()
            done.record()
        self._done.append(done)
        self._in_flight.append(([self._pending.popleft() for _ in range(passes)], on_host, done))
        if len(self._in_flight) > _MAX_IN_FLIGHT:
            self._harvest()

    def wait(self, *, but: int = 0) -> None:
        """Let the main stream wait for all counting ``but`` the last few."""
        if len(self._done) > but:
            torch.cuda.current_stream().wait_event(self._done[-1 - but])

    def _harvest(self) -> None:
        pairs, on_host, done = self._in_flight.popleft()
        done.synchronize()
        for pair, values in zip(pairs, on_host.numpy().copy(), strict=True):
            self._finished.append((pair.seconds(), values))
        self._free += pairs

    def take(self) -> list[tuple[float, np.ndarray]]:
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
