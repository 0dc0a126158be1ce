"""Models in host memory: fixed chunks of one arena, least recently used models leave, leased ones never."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from tiered_memory import PinnedArena
from vllm_serverless_loader.checkpoint.index import PartitionIndex
from vllm_serverless_loader.checkpoint.reader import Checkpoint, load_from
from vllm_serverless_loader.loading.options import LoadOptions, LoadReport, LoadResult
from vllm_serverless_loader.loading.pipeline import (
    copy_straight,
    fill_host,
    fill_tensors,
    stream_tensors,
    typed_view,
)
from vllm_serverless_loader.loading.read_plan import Chunk, DataFile, plan_chunks
from vllm_serverless_loader.loading.sources import Extents, MemorySource, memory_pieces

ModelId = tuple[str, int]


class CachedModel:
    """A model in host memory, kept there until :meth:`release`. Context manager.

    Attributes:
        hit: whether it was there before the call that gave this lease.
        index: names and places of the tensors.
        path: the checkpoint's directory.
        chunks: numbers of the cache's chunks that hold it, in order.
    """

    def __init__(
        self,
        index: PartitionIndex,
        extents: Sequence[Tensor],
        *,
        hit: bool,
        path: Path,
        chunks: Sequence[int],
        pinned: Callable[[], bool],
        release: Callable[[], None],
        push: Callable[[PartitionIndex, Mapping[str, Tensor]], bool] | None = None,
    ) -> None:
        self.index = index
        self.hit = hit
        self.path = path
        self.chunks = tuple(chunks)
        self._source: MemorySource | None = MemorySource(extents)
        self._pinned = pinned
        self._release = release
        self._push = push

    @property
    def num_bytes(self) -> int:
        """Bytes of the model's files in the cache."""
        return self.index.num_bytes

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors, in file order."""
        return tuple(self.index.tensors)

    @property
    def extents(self) -> Extents:
        """The memory that holds the model's logical address space."""
        return self._open_source().extents

    def tensor(self, name: str) -> Tensor:
        """A tensor on the CPU: a view of the cache where its chunks adjoin, else a copy. Do not write to it.

        Raises:
            KeyError: there is no such tensor.
            ValueError: the lease was released.
        """
        entry = self.index.tensors[name]
        if entry.num_bytes == 0:
            return torch.empty(entry.shape, dtype=entry.dtype)
        parts = self._open_source().extents.parts(entry.offset, entry.num_bytes)
        memory = parts[0] if len(parts) == 1 else torch.cat(parts)
        if memory.data_ptr() % entry.dtype.itemsize:
            memory = memory.clone()
        return memory.view(entry.dtype).view(entry.shape)

    def tensors(
        self, device: str | torch.device = "cpu", *, options: LoadOptions | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """Tensors one by one in file order; on the CPU views as :meth:`tensor` gives them."""
        options = options or LoadOptions()
        if torch.device(device).type == "cpu":
            for name in self.index.tensors:
                yield name, self.tensor(name)
            return
        yield from stream_tensors(
            self._open_source(),
            self._plan(options),
            self.index.tensors,
            torch.device(device),
            threads=options.io_threads,
            staging_chunks=options.staging_chunks,
        )

    def load(
        self,
        device: str | torch.device = "cpu",
        *,
        into: Mapping[str, Tensor] | None = None,
        strict: bool = True,
        options: LoadOptions | None = None,
    ) -> LoadResult:
        """As :meth:`Checkpoint.load`; on the CPU without ``into`` the tensors are views of the cache."""
        options = options or LoadOptions()
        source = self._open_source()
        if into is None and torch.device(device).type == "cpu":
            return load_views(self, source)
        return load_from(
            source,
            self.index,
            self._plan(options),
            torch.device(device),
            into=into,
            strict=strict,
            options=options,
            path=self.path,
            move=functools.partial(self._move, source, options),
        )

    def _move(
        self,
        source: MemorySource,
        options: LoadOptions,
        chunks: Sequence[Chunk],
        destinations: Mapping[str, Tensor],
    ) -> None:
        """The fastest way from the cache to where the tensors are."""
        on_gpu = any(tensor.is_cuda for tensor in destinations.values())
        if on_gpu and self._pinned():
            copy_straight(source.extents, chunks, destinations)
        elif not (on_gpu and self._push is not None and self._push(self.index, destinations)):
            threads, slots = options.io_threads, options.staging_chunks
            fill_tensors(source, chunks, destinations, threads=threads, staging_chunks=slots)

    def release(self) -> None:
        """Let the model be evicted. Idempotent; views of it must not be used any more."""
        if self._source is not None:
            self._source = None
            self._release()

    def _open_source(self) -> MemorySource:
        if self._source is None:
            raise ValueError(f"{self.path}: the lease on the cached model was released")
        return self._source

    def _plan(self, options: LoadOptions) -> list[Chunk]:
        whole = DataFile(self.path, self.index.num_bytes, 0)
        return plan_chunks([whole], self.index.tensors, options.chunk_bytes)

    def __enter__(self) -> CachedModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


@dataclass
class _Entry:
    index: PartitionIndex
    path: Path
    chunks: list[int]
    fingerprint: tuple
    leases: int = 0
    is_current: bool = True


@dataclass
class _Fill:
    done: bool = False
    error: BaseException | None = None


class HostCache:
    """Cache of models in host memory. Thread-safe; context manager.

    A model takes ``ceil(num_bytes / chunk_bytes)`` chunks, adjoining where possible. A hit and a fill count
    as use, :meth:`get` too, a release does not.

    Args:
        capacity_bytes: size, rounded down to whole chunks.
        chunk_bytes: the unit of allocation, a multiple of 4096.
        pinned: ``None``: page-locked in the background where there is a CUDA device; ``True``: page-locked
            before the constructor returns, or MemoryError; ``False``: pageable.
        shared: other processes may map the memory (for a store process).

    Raises:
        ValueError: less than one chunk, or a bad chunk size.
        MemoryError: the memory is not there.
    """

    def __init__(
        self,
        capacity_bytes: int,
        *,
        chunk_bytes: int = 16 << 20,
        pinned: bool | None = None,
        shared: bool = False,
    ) -> None:
        if chunk_bytes < 4096 or chunk_bytes % 4096:
            raise ValueError(
                f"host cache: chunk_bytes must be a positive multiple of 4096, got {chunk_bytes}"
            )
        count = int(capacity_bytes) // chunk_bytes
        if count < 1:
            raise ValueError(f"host cache: {capacity_bytes} bytes hold no chunk of {chunk_bytes}")
        self.chunk_bytes = chunk_bytes
        self.capacity_bytes = count * chunk_bytes
        threads = min(16, len(os.sched_getaffinity(0)))
        self.arena = PinnedArena(self.capacity_bytes, pinned=pinned or False, shared=shared, threads=threads)
        self._buffer = self.arena.buffer
        self._free = set(range(count))
        self._entries: OrderedDict[ModelId, _Entry] = OrderedDict()
        self._fills: dict[ModelId, _Fill] = {}
        self._changed = threading.Condition()
        self._pinning: threading.Thread | None = None
        if pinned is None and torch.cuda.is_available():
            self._pinning = threading.Thread(target=self._pin, name="serverless-loader-pin", daemon=True)
            self._pinning.start()

    @property
    def models(self) -> tuple[ModelId, ...]:
        """(real path, rank) of the cached models, least recently used first."""
        with self._changed:
            return tuple(self._entries)

    @property
    def used_bytes(self) -> int:
        """Bytes of all chunks in use, by fills under way too."""
        with self._changed:
            return self.capacity_bytes - len(self._free) * self.chunk_bytes

    def load(self, checkpoint: Checkpoint, *, options: LoadOptions | None = None) -> CachedModel:
        """Lease the model, reading it into the cache if it is not there, or has changed on disk.

        Concurrent callers for one model share one fill.

        Raises:
            MemoryError: leased models leave too little room; nothing was evicted.
            CorruptCheckpointError, OSError: reading failed; the chunks are free again.
        """
        options = options or LoadOptions()
        model: ModelId = (os.path.realpath(checkpoint.path), checkpoint.rank)
        fingerprint = _fingerprint(checkpoint)
        with self._changed:
            while True:
                entry = self._entries.get(model)
                if entry is not None and entry.fingerprint == fingerprint:
                    return self._lease(model, entry, hit=True)
                fill = self._fills.get(model)
                if fill is None:
                    break
                self._wait(fill)
            if entry is not None:
                self._retire(model, entry)
            chunks = self._allocate(-(-checkpoint.num_bytes // self.chunk_bytes))
            fill = self._fills[model] = _Fill()
        entry = _Entry(checkpoint.index, checkpoint.path, chunks, fingerprint)
        try:
            extents = Extents(self._extents(entry))
            with checkpoint.source(options) as source:
                fill_host(
                    source,
                    checkpoint.plan(options),
                    lambda chunk: memory_pieces(extents, chunk),
                    threads=options.io_threads,
                )
        except BaseException as error:
            with self._changed:
                self._free.update(chunks)
                self._finish(model, fill, error)
            raise
        with self._changed:
            self._entries[model] = entry
            self._finish(model, fill, None)
            return self._lease(model, entry, hit=False)

    def get(self, path: str | os.PathLike[str], rank: int = 0) -> CachedModel | None:
        """Lease a model that is there; None if it is not."""
        with self._changed:
            model = (os.path.realpath(path), rank)
            entry = self._entries.get(model)
            return None if entry is None else self._lease(model, entry, hit=True)

    def evict(self, path: str | os.PathLike[str], rank: int = 0) -> bool:
        """Drop a model; False if it is not there.

        Raises:
            RuntimeError: it is leased.
        """
        with self._changed:
            model = (os.path.realpath(path), rank)
            entry = self._entries.get(model)
            if entry is None:
                return False
            if entry.leases:
                raise RuntimeError(f"host cache: {model[0]} (rank {rank}) has {entry.leases} leases")
            self._retire(model, entry)
            return True

    def close(self) -> None:
        """Let go of the memory; it is freed with the last lease's views. Idempotent."""
        if self._pinning is not None:
            self._pinning.join()
        with self._changed:
            self._entries.clear()
            self._buffer = torch.empty(0, dtype=torch.uint8)
            self.arena.close()

    def _lease(self, model: ModelId, entry: _Entry, *, hit: bool) -> CachedModel:
        entry.leases += 1
        self._entries.move_to_end(model)
        return CachedModel(
            entry.index,
            self._extents(entry),
            hit=hit,
            path=entry.path,
            chunks=entry.chunks,
            pinned=lambda: self.arena.pinned,
            release=lambda: self._released(entry),
        )

    def _released(self, entry: _Entry) -> None:
        with self._changed:
            entry.leases -= 1
            if not entry.leases and not entry.is_current:
                self._free.update(entry.chunks)

    def _retire(self, model: ModelId, entry: _Entry) -> None:
        """Forget a model; its chunks are free at once, or with its last lease."""
        del self._entries[model]
        entry.is_current = False
        if not entry.leases:
            self._free.update(entry.chunks)

    def _wait(self, fill: _Fill) -> None:
        while not fill.done:
            self._changed.wait()
        if fill.error is not None:
            raise fill.error

    def _finish(self, model: ModelId, fill: _Fill, error: BaseException | None) -> None:
        fill.done, fill.error = True, error
        del self._fills[model]
        self._changed.notify_all()

    def _allocate(self, count: int) -> list[int]:
        """Take ``count`` chunks, evicting if need be."""
        evictable = [(model, entry) for model, entry in self._entries.items() if not entry.leases]
        available = len(self._free) + sum(len(entry.chunks) for _, entry in evictable)
        if count > available:
            raise MemoryError(
                f"host cache: {count} chunks needed, {len(self._free)} free, {available - len(self._free)} "
                f"evictable, {self.capacity_bytes // self.chunk_bytes} in all"
            )
        for model, entry in evictable:
            if len(self._free) >= count:
                break
            self._retire(model, entry)
        runs = _runs(sorted(self._free))
        fitting = [run for run in runs if len(run) >= count]
        # The smallest run that holds the model, else the longest ones: few seams.
        order = [min(fitting, key=len)] if fitting else sorted(runs, key=len, reverse=True)
        chunks = [number for run in order for number in run][:count]
        self._free.difference_update(chunks)
        return chunks

    def _extents(self, entry: _Entry) -> list[Tensor]:
        return extents_of(self._buffer, entry.chunks, self.chunk_bytes)

    def _pin(self) -> None:
        # A pageable cache works, slower; the arena names the reason where someone asks it to pin.
        with contextlib.suppress(MemoryError, ValueError):
            self.arena.pin()

    def __enter__(self) -> HostCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def extents_of(buffer: Tensor, chunks: Sequence[int], chunk_bytes: int) -> list[Tensor]:
    """The stretches of ``buffer`` (uint8) that chunks make up, neighbours joined."""
    extents, first = [], 0
    for place in range(1, len(chunks) + 1):
        if place == len(chunks) or chunks[place] != chunks[place - 1] + 1:
            begin = chunks[first] * chunk_bytes
            extents.append(buffer[begin : begin + (place - first) * chunk_bytes])
            first = place
    return extents


def load_views(model: CachedModel, source: MemorySource) -> LoadResult:
    """All tensors of a cached model without moving a byte, where its chunks adjoin."""
    begin = time.perf_counter()
    parts = source.extents.parts(0, source.extents.num_bytes)
    if len(parts) == 1:
        tensors = {name: typed_view(parts[0], entry) for name, entry in model.index.tensors.items()}
    else:
        tensors = {name: model.tensor(name) for name in model.names}
    seconds = time.perf_counter() - begin
    return LoadResult(tensors, LoadReport(model.num_bytes, seconds, "host", {"host": model.num_bytes}))


def _fingerprint(checkpoint: Checkpoint) -> tuple:
    """What tells one content from another: checksums, or where there are none what the file system says."""
    if checkpoint.has_checksums:
        return (checkpoint.index.chunk_checksums, tuple(checkpoint.index.tensors.items()))
    stats = [os.stat(file.path) for file in checkpoint.files]
    facts = [(status.st_size, status.st_mtime_ns, status.st_ino) for status in stats]
    return (*zip((str(file.path) for file in checkpoint.files), facts, strict=True),)


def _runs(numbers: Sequence[int]) -> list[list[int]]:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return runs
