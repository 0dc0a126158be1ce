"""The table: ragged trajectories in row groups, written whole, selected by handle, read through windows."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from rl_replay_gear import loops
from rl_replay_gear.allocator import ExtentAllocator
from rl_replay_gear.batch import TrajectoryBatch
from rl_replay_gear.collect import Backend, ReadPlan, Windows, collect_batch, plan_reads
from rl_replay_gear.index import SlotIndex
from rl_replay_gear.limiter import RateLimiter
from rl_replay_gear.memory import BufferPool, Memory, allocate_rows, resolve_memory
from rl_replay_gear.packing import RowPacker
from rl_replay_gear.randomness import Generator, uniforms
from rl_replay_gear.selection import Selection
from rl_replay_gear.selectors import Fifo, Selector
from rl_replay_gear.spec import DTYPE_NAMES, ColumnSpec, TableSpec, row_groups
from rl_replay_gear.window import Window

Anchor = Literal["uniform", "start", "end"]


class TrajectoryTable:
    """Trajectories of any length up to a capacity in steps and in trajectories.

    A write is atomic: it is refused before anything changes, or the whole trajectory is there. A handle names
    one trajectory for good; once evicted its handle is stale and is refused or dropped, never reused.

    Args:
        spec: Columns and capacity.
        memory: Where rows lie: ``"host"``; ``"pinned"`` host memory that kernels read in place;
            ``"device"`` the current CUDA device; ``"auto"`` is pinned where there is a CUDA device, else
            host.
        remover: Eviction order, ``Fifo()`` by default. Any selector; it is asked for one trajectory at a
            time.
        max_times_sampled: A trajectory selected this often is selected no more and is the first to be
            evicted.
        limiter: Holds writes and selections back (see ``RateLimiter``).
        shard: Number of this shard in a ``ShardedTable``; part of every handle.
        shared: Rows lie in memory that other processes of this host may map.
        storage: Rows that exist already, one int64 [rows, row_bytes / 8] a row group; the table is read-only.
    """

    def __init__(
        self,
        spec: TableSpec,
        *,
        memory: Memory = "auto",
        remover: Selector | None = None,
        max_times_sampled: int | None = None,
        limiter: RateLimiter | None = None,
        shard: int = 0,
        shared: bool = False,
        storage: Sequence[Tensor] | None = None,
    ) -> None:
        if max_times_sampled is not None and max_times_sampled < 1:
            raise ValueError(f"max_times_sampled must be at least 1, got {max_times_sampled}")
        if not 0 <= shard < 1 << 12:
            raise ValueError(f"shard must be in 0..4095, got {shard}")
        self.spec = spec
        self.memory = resolve_memory(memory)
        self.groups = row_groups(spec.all_columns)
        self.read_only = storage is not None
        self.shared = shared
        if storage is None:
            self.storage, self.arena = allocate_rows(self.groups, spec.num_rows, self.memory, shared=shared)
        else:
            self.storage, self.arena = list(storage), None
        self.index = SlotIndex(spec.max_trajectories, shard)
        self.remover = Fifo() if remover is None else remover
        self.allocator = ExtentAllocator(spec.num_rows, ring=isinstance(self.remover, Fifo))
        self.limiter = limiter
        self.max_times_sampled = max_times_sampled
        self.evictions = 0
        self.stale_dropped = 0
        self.lock = threading.RLock()
        self._views = {
            field.column.name: _column_view(words, field.column, field.offset)
            for group, words in zip(self.groups, self.storage, strict=True)
            for field in group.fields
        }
        self._packers = [
            RowPacker(group, words, self._views)
            for group, words in zip(self.groups, self.storage, strict=True)
        ]
        self._selectors: list[weakref.ref[Selector]] = []
        self._pool = BufferPool()
        self._retired: deque[int] = deque()
        self._plans: dict[Any, ReadPlan] = {}
        self._in_flight: dict[tuple[int, int], torch.cuda.Event] = {}
        self.attach(self.remover)

    def __len__(self) -> int:
        return self.index.size

    @property
    def num_steps(self) -> int:
        """Live steps."""
        return self.index.num_steps

    @property
    def nbytes(self) -> int:
        """Bytes of rows allocated, over all tiers."""
        return sum(words.nbytes for words in self.storage)

    def handles(self) -> Tensor:
        """int64 [len], oldest first."""
        return torch.from_numpy(self.index.handles(self.index.ordered()))

    def lengths(self) -> Tensor:
        """Steps of each trajectory: int64 [len], oldest first."""
        return torch.from_numpy(self.index.length[self.index.ordered()])

    def priorities(self) -> Tensor:
        """float32 [len], oldest first."""
        return torch.from_numpy(self.index.priority[self.index.ordered()])

    def write(self, columns: Mapping[str, Any], *, priority: float | None = None) -> int:
        """Store a trajectory and return its handle.

        Args:
            columns: For every written column of the spec a tensor or array ``[n, *shape]`` of its dtype
                (``[n + 1, *shape]`` for a final one).
            priority: None is the largest live priority, 1.0 in an empty table.

        Raises:
            KeyError: a column is missing or unknown.
            ValueError: dtype, shape or length does not fit, or the priority is not finite and >= 0.
            TimeoutError: the limiter let no write through in time.
        """
        tensors, num_steps = check_trajectory(self.spec, columns)
        check_priority(priority)
        if self.limiter is not None:
            self.limiter.wait_insert()
        with self.lock:
            return self._commit(tensors, num_steps, priority)

    def write_batch(self, columns: Mapping[str, Any], lengths: Tensor, priorities: Any = None) -> Tensor:
        """Store ``m`` trajectories that lie end to end; everything is checked before the first is stored.

        Args:
            columns: ``[sum(lengths), *shape]`` (``[sum(lengths) + m, *shape]`` for final columns).
            lengths: int64 [m].
            priorities: float [m]; None as in ``write``.

        Returns:
            Handles int64 [m].
        """
        steps = torch.as_tensor(lengths, dtype=torch.int64)
        if steps.numel() and int(steps.min()) < 1:
            raise ValueError(f"lengths must be at least 1, got {int(steps.min())}")
        if steps.numel() and int(steps.max()) > self.spec.max_steps:
            raise ValueError(_too_long(int(steps.max()), self.spec.max_steps))
        if priorities is not None:
            priorities = np.asarray(priorities, np.float64)
            _check_priorities(priorities)
            if len(priorities) != len(steps):
                raise ValueError(f"{len(priorities)} priorities for {len(steps)} trajectories")
        tensors, _ = check_trajectory(self.spec, columns, total=int(steps.sum()), trajectories=len(steps))
        out = np.empty(len(steps), np.int64)
        begin = 0
        for i, count in enumerate(steps.tolist()):
            part = {
                column.name: tensors[column.name][
                    begin + i * int(column.final) : begin + (i + 1) * int(column.final) + count
                ]
                for column in self.spec.columns
            }
            begin += count
            if self.limiter is not None:
                self.limiter.wait_insert()
            with self.lock:
                out[i] = self._commit(part, count, None if priorities is None else float(priorities[i]))
        return torch.from_numpy(out)

    def read(self, handle: int) -> dict[str, Tensor]:
        """Copies of all columns of a trajectory, derived ones included; KeyError for a stale handle."""
        with self.lock:
            slot = self._slot(handle)
            start, steps = int(self.index.start[slot]), int(self.index.length[slot])
            return {
                column.name: self._views[column.name][start : start + column.rows(steps)].clone(
                    memory_format=torch.contiguous_format
                )
                for column in self.spec.all_columns
            }

    def relabel(self, handle: int, columns: Mapping[str, Any]) -> None:
        """Overwrite columns of a live trajectory in place and recompute the derived ones.

        For hindsight relabelling: give the rewards that were achieved and the returns-to-go follow. Batches
        already collected keep what they hold.

        Raises:
            KeyError: stale handle or unknown column.
            ValueError: dtype or shape does not fit.
        """
        self.spec.check_names(columns, among=self.spec.names)
        with self.lock:
            if self.read_only:
                raise RuntimeError("this table was loaded with mmap=True and is read-only")
            slot = self._slot(handle)
            start, steps = int(self.index.start[slot]), int(self.index.length[slot])
            tensors = self.read(handle)
            for column in self.spec.columns:
                if column.name in columns:
                    tensors[column.name] = _checked_column(column, columns[column.name], steps)
            given = {column.name: tensors[column.name] for column in self.spec.columns}
            self._store(given, start, steps)

    def remove(self, handle: int) -> None:
        """Take a trajectory out; KeyError for a stale handle."""
        with self.lock:
            self._remove_slot(self._slot(handle))

    def clear(self) -> None:
        """Take every trajectory out."""
        with self.lock:
            for slot in self.index.ordered().tolist():
                self._remove_slot(slot)

    def retired_handles(self) -> list[int]:
        """Trajectories used up (``max_times_sampled``) whose rows are still there, oldest first."""
        return list(self._retired)

    def restore(
        self,
        index: SlotIndex,
        allocator: ExtentAllocator,
        *,
        retired: Sequence[int],
        evictions: int,
        stale_dropped: int,
    ) -> None:
        """Take over the state of a saved table; only right after construction, before any selector."""
        self.index, self.allocator = index, allocator
        self._retired = deque(retired)
        self.evictions, self.stale_dropped = evictions, stale_dropped
        self.remover.detach()
        self.attach(self.remover)

    def update_priorities(self, handles: Any, priorities: Any, *, strict: bool = False) -> int:
        """Set priorities; where a handle comes more than once, the largest value wins.

        Args:
            handles: int64 [m].
            priorities: float [m], finite and >= 0; else ValueError and nothing is changed.
            strict: RuntimeError instead of dropping when a handle is stale; nothing is changed then.

        Returns:
            Number of stale handles dropped (also added to ``stale_dropped``).
        """
        handle_array = np.ascontiguousarray(torch.as_tensor(handles, dtype=torch.int64).cpu().numpy())
        values = torch.as_tensor(priorities).detach().cpu().to(torch.float64).numpy()
        if values.shape != handle_array.shape:
            raise ValueError(f"{values.shape} priorities for {handle_array.shape} handles")
        _check_priorities(values)
        with self.lock:
            slots, stale = self.index.locate(handle_array)
            if stale and strict:
                raise RuntimeError(f"{stale} of {len(slots)} handles are stale")
            if stale:
                kept = slots >= 0
                slots, values = slots[kept], values[kept]
            unique, inverse = np.unique(slots, return_inverse=True)
            largest = np.zeros(len(unique))
            np.maximum.at(largest, inverse, values)
            self.index.set_priorities(unique, largest)
            selectable = unique[self.index.selectable[unique]]
            for selector in self._followers():
                selector.updated(selectable)
            self.stale_dropped += stale
        return stale

    def attach(self, selector: Selector) -> None:
        """Let ``selector`` follow this table; ``select`` does it on first use."""
        if not isinstance(selector, Selector):
            raise TypeError(f"selector must be a Selector such as Uniform(), got {selector!r}")
        selector.attach(self)
        if selector not in self._followers():
            self._selectors = [known for known in self._selectors if known() is not None]
            self._selectors.append(weakref.ref(selector))

    def _followers(self) -> list[Selector]:
        return [selector for known in self._selectors if (selector := known()) is not None]

    def select(
        self,
        selector: Selector,
        batch_size: int,
        *,
        anchor: Anchor = "uniform",
        generator: Generator | None = None,
    ) -> Selection:
        """Draw ``batch_size`` trajectories and an anchor step in each.

        Args:
            selector: The law. It follows this table from its first use on.
            batch_size: B.
            anchor: ``"uniform"`` a step of the trajectory, ``"start"`` its first, ``"end"`` its last.
            generator: Source of the uniform numbers.

        Raises:
            RuntimeError: the table is empty.
            ValueError: not enough distinct trajectories, or no positive weight.
            TimeoutError: the limiter let no selection through in time.
        """
        if anchor not in ("uniform", "start", "end"):
            raise ValueError(f"anchor must be 'uniform', 'start' or 'end', got {anchor!r}")
        if not isinstance(batch_size, Integral) or batch_size < 0:
            raise ValueError(f"batch_size must be an integer of at least 0, got {batch_size!r}")
        if self.limiter is not None:
            self.limiter.wait_sample(batch_size)
        with self.lock:
            if not isinstance(selector, Selector) or not selector.serves(self):
                self.attach(selector)
            if self.index.num_selectable == 0:
                state = "" if self.limiter is None else f" ({self.limiter.describe()})"
                raise RuntimeError(f"table is empty: write a trajectory before selecting{state}")
            if self.max_times_sampled is None:
                slots, probability = selector.select(batch_size, generator)
                values = selector.weights(probability)
            else:
                slots, probability = self._select_counted(selector, batch_size, generator)
                values = None
            selection = self.make_selection(slots, probability, values, anchor=anchor, generator=generator)
        if self.limiter is not None:
            self.limiter.sampled(batch_size)
        return selection

    def make_selection(
        self,
        slots: np.ndarray,
        probability: np.ndarray,
        weights: np.ndarray | None,
        *,
        anchor: Anchor,
        generator: Generator | None,
    ) -> Selection:
        """The selection of ``slots``, with anchors drawn from ``generator``."""
        length = self.index.length
        if anchor == "uniform":
            anchors = np.empty(len(slots), np.int64)
            loops.uniform_anchors(uniforms(generator, len(slots)), slots, length, anchors)
        elif anchor == "start":
            anchors = np.zeros(len(slots), np.int64)
        else:
            anchors = length[slots] - 1
        return Selection(
            torch.from_numpy(self.index.handles(slots)),
            torch.from_numpy(anchors),
            torch.from_numpy(probability),
            None if weights is None else torch.from_numpy(weights),
        )

    def count_stale(self, handles: Tensor) -> int:
        """How many handles name no live trajectory."""
        return self.index.locate(handles.numpy())[1]

    def collect(
        self,
        selection: Selection,
        windows: Windows,
        *,
        columns: Sequence[str] | None = None,
        device: torch.device | str | None = None,
        backend: Backend = "auto",
        out: Sequence[Tensor] | None = None,
    ) -> TrajectoryBatch:
        """Gather the windows of a selection.

        Args:
            selection: What ``select`` returned.
            windows: One window for all columns, or one a column; columns not named are not read.
            columns: Which columns; all (or all keys of ``windows``) by default.
            device: Where the batch is wanted; the table's own device or the CPU by default.
            backend: ``"auto"``: Triton for a CUDA batch, else torch. ``"torch"`` with a CUDA batch gathers on
                the CPU and copies. All give the same bits.
            out: Buffers of an earlier batch (``read_buffers``) to be filled again.

        Raises:
            RuntimeError: a trajectory was evicted after it was selected.
            KeyError: unknown column.
        """
        plan = self.plan(windows, columns)
        target = torch.device(device) if device is not None else self._home()
        if target.type == "cuda" and not torch.cuda.is_available():
            raise RuntimeError(
                f"device={str(target)!r} needs a CUDA device; leave it out for a batch on the CPU"
            )
        with self.lock:
            slots, stale = self.index.locate(selection.handles.numpy())
            if stale:
                raise RuntimeError(f"{stale} of {len(slots)} handles are stale: select again")
            batch = collect_batch(
                plan,
                self.index,
                slots,
                selection,
                device=target,
                backend=backend,
                out=out,
                pool=self._pool,
            )
            if target.type == "cuda" or self.memory == "device":
                self.note_reading()
        return batch

    def plan(self, windows: Windows, columns: Sequence[str] | None = None) -> ReadPlan:
        """The reads of a subscription; kept, since a learner asks for the same one every step."""
        if not isinstance(windows, Window | Mapping):
            raise TypeError(f"windows must be a Window, or one for each column by name, got {windows!r}")
        key = (
            windows if isinstance(windows, Window) else tuple(windows.items()),
            None if columns is None else tuple(columns),
        )
        plan = self._plans.get(key)
        if plan is None:
            if isinstance(windows, Window):
                names = [c.name for c in self.spec.all_columns] if columns is None else list(columns)
                per_column = dict.fromkeys(names, windows)
            else:
                names = list(windows) if columns is None else list(columns)
                self.spec.check_names(names, among=list(windows))
                per_column = {name: windows[name] for name in names}
            self.spec.check_names(per_column)
            if not per_column:
                raise ValueError("a batch needs at least one column")
            for name, window in per_column.items():
                if not isinstance(window, Window):
                    raise TypeError(f"the window of column {name!r} must be a Window, got {window!r}")
            plan = self._plans[key] = plan_reads(self.groups, self.storage, per_column)
        return plan

    def note_reading(self) -> None:
        """Kernels queued on the current stream read the rows: writes wait for them."""
        # A stream works in order: its last event stands for all before it.
        stream = torch.cuda.current_stream()
        key = (stream.device_index, stream.cuda_stream)
        event = self._in_flight.setdefault(key, torch.cuda.Event())
        event.record(stream)

    def _home(self) -> torch.device:
        return self.storage[0].device if self.memory == "device" else torch.device("cpu")

    def _slot(self, handle: int) -> int:
        slots, stale = self.index.locate(np.array([handle], np.int64))
        if stale:
            raise KeyError(f"stale handle {handle}: its trajectory was removed or is of another table")
        return int(slots[0])

    def _commit(self, tensors: Mapping[str, Tensor], num_steps: int, priority: float | None) -> int:
        rows = num_steps + int(self.spec.has_final)
        value = self.index.max_priority if priority is None else priority
        start = self._make_room(rows, num_steps)
        self._store(tensors, start, num_steps)
        slot = self.index.insert(start, num_steps, value)
        changed = np.array([slot], np.int64)
        for selector in self._followers():
            selector.inserted(changed)
        if self.limiter is not None:
            self.limiter.inserted()
        return self.index.handle(slot)

    def _make_room(self, rows: int, num_steps: int) -> int:
        if self.read_only:
            raise RuntimeError("this table was loaded with mmap=True and is read-only")
        while True:
            if not self.index.full and self.index.num_steps + num_steps <= self.spec.max_steps:
                start = self.allocator.allocate(rows)
                if start is not None:
                    return start
            self._evict()

    def _evict(self) -> None:
        while self._retired:
            slots, stale = self.index.locate(np.array([self._retired.popleft()], np.int64))
            if not stale:
                self._remove_slot(int(slots[0]))
                return
        self._remove_slot(self.remover.evict(self.evictions))
        self.evictions += 1

    def _remove_slot(self, slot: int) -> None:
        changed = np.array([slot], np.int64)
        if self.index.selectable[slot]:
            self.index.retire(slot)
            for selector in self._followers():
                selector.removed(changed)
        self.allocator.free(
            int(self.index.start[slot]), int(self.index.length[slot]) + int(self.spec.has_final)
        )
        self.index.remove(slot)

    def _store(self, tensors: Mapping[str, Tensor], start: int, num_steps: int) -> None:
        derived = {item.name: item.compute(tensors) for item in self.spec.derived}
        columns = {**tensors, **derived} if derived else tensors
        self._await_readers()
        for packer in self._packers:
            packer.pack(columns, start, num_steps + packer.final)

    def _select_counted(
        self, selector: Selector, batch_size: int, generator: Generator | None
    ) -> tuple[np.ndarray, np.ndarray]:
        # One at a time, so that a trajectory used up by this batch is not drawn again in it.
        slots, probability = np.empty(batch_size, np.int64), np.empty(batch_size, np.float64)
        allowed = self.max_times_sampled
        assert allowed is not None
        remaining = self.index.num_selectable * allowed - int(
            self.index.times_sampled[self.index.dense[: self.index.num_selectable]].sum()
        )
        if batch_size > remaining:
            raise ValueError(
                f"cannot select {batch_size} trajectories: {remaining} selections are left "
                f"(max_times_sampled={allowed})"
            )
        for i in range(batch_size):
            slot, probability[i : i + 1] = selector.select(1, generator)
            slots[i] = slot[0]
            self.index.times_sampled[slot] += 1
            if self.index.times_sampled[slot[0]] >= allowed:
                self._retired.append(int(self.index.handles(slot)[0]))
                self.index.retire(int(slot[0]))
                for other in self._followers():
                    other.removed(slot)
        return slots, probability

    def _await_readers(self) -> None:
        # Kernels read the rows in place: none may still run when rows are overwritten.
        for event in self._in_flight.values():
            event.synchronize()
        self._in_flight.clear()


def check_trajectory(
    spec: TableSpec, columns: Mapping[str, Any], *, total: int | None = None, trajectories: int = 1
) -> tuple[dict[str, Tensor], int]:
    """Columns as tensors and the number of steps; raises as ``TrajectoryTable.write`` does."""
    given = spec.columns
    if len(columns) != len(given) or not all(map(columns.__contains__, spec.names)):
        missing = [name for name in spec.names if name not in columns]
        if missing:
            raise KeyError(f"missing columns: {', '.join(missing)}")
        spec.check_names(columns, among=spec.names)
    steps = total
    if steps is None:
        shape = given[0].as_tensor(columns[spec.names[0]]).shape
        steps = (shape[0] if len(shape) else 1) - given[0].final
        if steps < 1:
            raise ValueError(f"trajectory of {steps} steps: at least 1 is needed")
        if steps > spec.max_steps:
            raise ValueError(_too_long(steps, spec.max_steps))
    tensors = {}
    for column in given:
        value = columns[column.name]
        rows = steps + trajectories * column.final
        fits = isinstance(value, Tensor) and value.dtype is column.dtype
        if not fits or value.shape != (rows, *column.shape):
            value = _checked_column(column, value, steps, trajectories)
        tensors[column.name] = value
    return tensors, steps


def _too_long(steps: int, max_steps: int) -> str:
    return f"trajectory of {steps} steps is longer than max_steps={max_steps}"


def check_priority(priority: float | None) -> None:
    """ValueError unless a priority is None or finite and >= 0."""
    if priority is not None:
        _check_priorities(np.array([priority], np.float64))


def _check_priorities(values: np.ndarray) -> None:
    bad = ~(np.isfinite(values) & (values >= 0))
    if bad.any():
        i = int(np.flatnonzero(bad)[0])
        raise ValueError(f"priorities must be finite and >= 0; index {i} is {values[i]}")


def _checked_column(column: ColumnSpec, value: Any, steps: int, trajectories: int = 1) -> Tensor:
    tensor = column.as_tensor(value)
    rows = steps + trajectories * column.final
    if tensor.dtype != column.dtype or tensor.shape != (rows, *column.shape):
        expected = ", ".join(["n + 1" if column.final else "n", *map(str, column.shape)])
        raise ValueError(
            f"column {column.name!r}: expected {DTYPE_NAMES[column.dtype]} [{expected}], "
            f"got {DTYPE_NAMES.get(tensor.dtype, tensor.dtype)} {list(tensor.shape)} (n = {steps})"
        )
    return tensor


def _column_view(words: Tensor, column: ColumnSpec, offset: int) -> Tensor:
    dtype = column.dtype
    typed = words.view(torch.uint8 if dtype is torch.bool else dtype)
    start = offset // dtype.itemsize
    width = column.nbytes // dtype.itemsize
    view = typed[:, start] if column.shape == () else typed[:, start : start + width]
    if len(column.shape) > 1:
        view = view.unflatten(-1, column.shape)
    return view.view(torch.bool) if dtype is torch.bool else view
