"""An iterable of batches: seeded, prefetched, resumable."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from rl_replay_gear.batch import TrajectoryBatch
from rl_replay_gear.collect import Windows
from rl_replay_gear.randomness import CounterGenerator
from rl_replay_gear.selection import Selection
from rl_replay_gear.selectors import Selector
from rl_replay_gear.table import Anchor

_MAX_RETRIES = 100


class Source(Protocol):
    """What a loader reads: a ``TrajectoryTable`` or a ``ShardedTable``."""

    def select(self, selector: Selector, batch_size: int, *, anchor: Anchor, generator: Any) -> Selection:
        """See ``TrajectoryTable.select``."""

    def collect(self, selection: Selection, windows: Windows, **options: Any) -> TrajectoryBatch:
        """See ``TrajectoryTable.collect``."""

    def count_stale(self, handles: Tensor) -> int:
        """See ``TrajectoryTable.count_stale``."""

    def attach(self, selector: Selector) -> None:
        """See ``TrajectoryTable.attach``."""

    def update_priorities(self, handles: Any, priorities: Any, *, strict: bool = False) -> int:
        """See ``TrajectoryTable.update_priorities``."""


@dataclass
class _Pending:
    number: int
    retry: int
    selection: Selection
    batch: TrajectoryBatch | None = None
    ready: torch.cuda.Event | None = None


class TrajectoryLoader:
    """Batches of windows, without end unless ``steps_per_epoch`` is given.

    Batch ``n`` is selected with uniform numbers that depend on ``(seed, n)`` alone. Selection runs inside
    ``next()``: batch ``n + prefetch`` is selected when batch ``n`` is delivered, so a run with writes and
    priority updates in between is reproducible. On CUDA batches are collected on a side stream as soon as
    they are selected; on the CPU when they are delivered. A batch one of whose trajectories was evicted
    meanwhile is drawn again with ``(seed, n, retry)`` and counted in ``redrawn``.

    Args:
        table: A ``TrajectoryTable`` or ``ShardedTable``.
        selector, windows, batch_size, anchor, columns, device: As in ``select`` and ``collect``.
        prefetch: Batches selected ahead; 0 with ``max_times_sampled``, or an eviction may cost a use.
        seed: Of all draws.
        steps_per_epoch: Length of one ``for`` loop, and ``len()``.
        transform: Applied to each batch when it is delivered.
        reuse_buffers: Batches share ``prefetch + 2`` sets of memory in turn; a batch is then valid until that
            many later ones have been delivered.
    """

    def __init__(
        self,
        table: Source,
        selector: Selector,
        windows: Windows,
        batch_size: int,
        *,
        anchor: Anchor = "uniform",
        columns: Sequence[str] | None = None,
        device: torch.device | str | None = None,
        prefetch: int = 2,
        seed: int = 0,
        steps_per_epoch: int | None = None,
        transform: Callable[[TrajectoryBatch], Any] | None = None,
        reuse_buffers: bool = False,
    ) -> None:
        if batch_size < 1 or prefetch < 0:
            raise ValueError(f"batch_size={batch_size} must be >= 1 and prefetch={prefetch} >= 0")
        self.table, self.selector, self.windows, self.batch_size = table, selector, windows, batch_size
        self.anchor, self.columns = anchor, columns
        self.device = None if device is None else torch.device(device)
        self.prefetch, self.seed, self.steps_per_epoch = prefetch, seed, steps_per_epoch
        self.transform = transform
        self.redrawn = 0
        self._next_selected = 0
        self._pending: deque[_Pending] = deque()
        self._buffers: deque[Sequence[Tensor]] | None = deque() if reuse_buffers else None
        self._stream: torch.cuda.Stream | None = None
        table.attach(selector)

    def __len__(self) -> int:
        if self.steps_per_epoch is None:
            raise TypeError("a TrajectoryLoader has no length unless steps_per_epoch is given")
        return self.steps_per_epoch

    def __iter__(self) -> Iterator[Any]:
        if self.steps_per_epoch is None:
            while True:
                yield next(self)
        for _ in range(self.steps_per_epoch):
            yield next(self)

    def __next__(self) -> Any:
        while len(self._pending) <= self.prefetch:
            self._pending.append(self._select(self._next_selected, 0))
            self._next_selected += 1
        entry = self._pending.popleft()
        while self.table.count_stale(entry.selection.handles):
            if entry.retry == _MAX_RETRIES:
                raise RuntimeError(f"batch {entry.number} went stale {_MAX_RETRIES} times")
            self.redrawn += 1
            entry = self._select(entry.number, entry.retry + 1)
        batch = entry.batch or self._collect(entry.selection)
        if entry.ready is not None:
            torch.cuda.current_stream(self.device).wait_event(entry.ready)
            for buffer in batch.buffers:
                buffer.record_stream(torch.cuda.current_stream(self.device))
        if self._buffers is not None:
            self._buffers.append(batch.buffers)
        return batch if self.transform is None else self.transform(batch)

    def update_priorities(self, handles: Any, priorities: Any, *, strict: bool = False) -> int:
        """See ``TrajectoryTable.update_priorities``."""
        return self.table.update_priorities(handles, priorities, strict=strict)

    def state_dict(self) -> dict[str, Any]:
        """Everything but the table, as JSON: the batches selected and not yet delivered are part of it."""
        pending = [
            {
                "number": entry.number,
                "retry": entry.retry,
                "handles": entry.selection.handles.tolist(),
                "anchors": entry.selection.anchors.tolist(),
                "probability": entry.selection.probability.tolist(),
                "weight": None if entry.selection.weight is None else entry.selection.weight.tolist(),
            }
            for entry in self._pending
        ]
        return {
            "seed": self.seed,
            "next": self._next_selected,
            "redrawn": self.redrawn,
            "pending": pending,
            "selector": self.selector.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken; the table must hold what it held then."""
        self.seed, self._next_selected = state["seed"], state["next"]
        self.redrawn = state["redrawn"]
        self._pending = deque(
            _Pending(
                entry["number"],
                entry["retry"],
                Selection(
                    torch.tensor(entry["handles"], dtype=torch.int64),
                    torch.tensor(entry["anchors"], dtype=torch.int64),
                    torch.tensor(entry["probability"], dtype=torch.float64),
                    None if entry["weight"] is None else torch.tensor(entry["weight"]),
                ),
            )
            for entry in state["pending"]
        )
        self.selector.load_state_dict(state["selector"])

    def _select(self, number: int, retry: int) -> _Pending:
        selection = self.table.select(
            self.selector,
            self.batch_size,
            anchor=self.anchor,
            generator=CounterGenerator(self.seed, number, retry),
        )
        entry = _Pending(number, retry, selection)
        if self.device is not None and self.device.type == "cuda":
            if self._stream is None:
                self._stream = torch.cuda.Stream(self.device)
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._stream):
                entry.batch = self._collect(selection)
                entry.ready = torch.cuda.Event()
                entry.ready.record()
        return entry

    def _collect(self, selection: Selection) -> TrajectoryBatch:
        out = None
        if self._buffers is not None and len(self._buffers) >= self.prefetch + 2:
            out = self._buffers.popleft()
        return self.table.collect(selection, self.windows, columns=self.columns, device=self.device, out=out)
