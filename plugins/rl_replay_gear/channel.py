"""Writers in other processes of the host: one ring of shared memory an actor."""

from __future__ import annotations

import time
from collections.abc import Mapping
from multiprocessing import shared_memory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rl_replay_gear.spec import TableSpec
from rl_replay_gear.table import TrajectoryTable, check_priority, check_trajectory

_HEADER = 128  # head at byte 0 (written by the actor), tail at byte 64 (written by the reader)
_RECORD = 24  # bytes, steps, priority (NaN: none)
_SKIP = -1  # a record's size: nothing more before the end of the ring
_POLL_S = 0.0005


def _aligned(nbytes: int) -> int:
    return -(-nbytes // 8) * 8


def _record_bytes(spec: TableSpec, steps: int) -> int:
    return _RECORD + sum(_aligned(column.rows(steps) * column.nbytes) for column in spec.columns)


class _Ring:
    """Bytes shared by one actor and one reader; ``head`` and ``tail`` only grow."""

    def __init__(self, memory: shared_memory.SharedMemory, capacity: int) -> None:
        self.memory, self.capacity = memory, capacity
        self.ends = np.ndarray((_HEADER // 8,), np.int64, memory.buf)
        self.data = np.ndarray((capacity,), np.uint8, memory.buf, offset=_HEADER)

    @property
    def head(self) -> int:
        return int(self.ends[0])

    @property
    def tail(self) -> int:
        return int(self.ends[8])

    def release(self) -> None:
        del self.ends, self.data
        self.memory.close()


class SharedMemoryChannel:
    """Carries whole trajectories from actor processes to the process that holds the table.

    An actor publishes a trajectory by moving its ring's head after the last byte is written, so one that dies
    in between leaves nothing behind. One writer a ring and one reader, hence no lock; this relies on stores
    becoming visible in order, as on x86-64.

    Args:
        spec: Schema of the trajectories.
        bytes_per_actor: Size of each ring; at least two of the longest trajectories should fit.
        actors: Number of rings.
    """

    def __init__(self, spec: TableSpec, bytes_per_actor: int, *, actors: int = 1) -> None:
        self.spec = spec
        self._capacity = _aligned(bytes_per_actor)
        self._rings = []
        for _ in range(actors):
            memory = shared_memory.SharedMemory(create=True, size=_HEADER + self._capacity)
            ring = _Ring(memory, self._capacity)
            ring.ends[:] = 0
            self._rings.append(ring)

    def sink(self, actor: int) -> SharedMemorySink:
        """The writing end of one actor: picklable, to be given to its process."""
        return SharedMemorySink(self.spec, self._rings[actor].memory.name, self._capacity)

    def drain(self, table: TrajectoryTable) -> int:
        """Write every published trajectory into ``table``; returns how many."""
        written = 0
        for ring in self._rings:
            while ring.tail < ring.head:
                written += self._take(ring, table)
        return written

    def _take(self, ring: _Ring, table: TrajectoryTable) -> int:
        at = ring.tail % ring.capacity
        size = int(ring.data[at : at + 8].view(np.int64)[0])
        if size == _SKIP:
            ring.ends[8] = ring.tail + ring.capacity - at
            return 0
        steps = int(ring.data[at + 8 : at + 16].view(np.int64)[0])
        priority = float(ring.data[at + 16 : at + 24].view(np.float64)[0])
        columns: dict[str, Tensor] = {}
        begin = at + _RECORD
        for column in self.spec.columns:
            nbytes = column.rows(steps) * column.nbytes
            raw = torch.from_numpy(ring.data[begin : begin + nbytes])
            columns[column.name] = raw.view(column.dtype).view(column.rows(steps), *column.shape)
            begin += _aligned(nbytes)
        table.write(columns, priority=None if np.isnan(priority) else priority)
        del columns, raw
        ring.ends[8] = ring.tail + size
        return 1

    def close(self) -> None:
        """Free the memory; trajectories not drained are lost."""
        for ring in self._rings:
            ring.release()
            ring.memory.unlink()
        self._rings.clear()

    def __enter__(self) -> SharedMemoryChannel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class SharedMemorySink:
    """The actor's end of a ring; ``write`` has the signature of ``TrajectoryTable.write``."""

    def __init__(self, spec: TableSpec, name: str, capacity: int) -> None:
        self.spec, self._name, self._capacity = spec, name, capacity
        self._ring: _Ring | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"spec": self.spec, "_name": self._name, "_capacity": self._capacity, "_ring": None}

    def write(
        self, columns: Mapping[str, Any], *, priority: float | None = None, timeout: float | None = None
    ) -> None:
        """Publish one trajectory, waiting while the ring is full.

        Raises:
            KeyError, ValueError: as in ``TrajectoryTable.write``; also a trajectory larger than the ring.
            TimeoutError: the reader made no room in ``timeout`` seconds.
        """
        check_priority(priority)  # here, since the reader could not refuse one record and take the next
        tensors, steps = check_trajectory(self.spec, columns)
        size = _record_bytes(self.spec, steps)
        if size > self._capacity:
            raise ValueError(f"a trajectory of {size} bytes does not fit a ring of {self._capacity} bytes")
        ring = self._attached()
        at = ring.head % ring.capacity
        if at + size > ring.capacity:  # records do not wrap: leave the rest of the ring out
            left = ring.capacity - at
            self._wait_for_room(ring, left, timeout)
            ring.data[at : at + 8].view(np.int64)[0] = _SKIP
            ring.ends[0] = ring.head + left
            at = 0
        self._wait_for_room(ring, size, timeout)
        record = ring.data[at : at + size]
        record[:8].view(np.int64)[0] = size
        record[8:16].view(np.int64)[0] = steps
        record[16:24].view(np.float64)[0] = np.nan if priority is None else priority
        begin = _RECORD
        for column in self.spec.columns:
            raw = tensors[column.name].contiguous().view(-1).view(torch.uint8).numpy()
            record[begin : begin + len(raw)] = raw
            begin += _aligned(len(raw))
        ring.ends[0] = ring.head + size

    def close(self) -> None:
        """Let go of the memory."""
        if self._ring is not None:
            self._ring.release()
            self._ring = None

    def _attached(self) -> _Ring:
        if self._ring is None:
            self._ring = _Ring(shared_memory.SharedMemory(name=self._name), self._capacity)
        return self._ring

    @staticmethod
    def _wait_for_room(ring: _Ring, nbytes: int, timeout: float | None) -> None:
        deadline = None if timeout is None else time.monotonic() + timeout
        while ring.head - ring.tail > ring.capacity - nbytes:
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError(f"the reader made no room for {nbytes} bytes in {timeout} s")
            time.sleep(_POLL_S)
