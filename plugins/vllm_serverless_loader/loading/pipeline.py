"""Moves chunks from a source into tensors: threads that read, page-locked staging, copies to GPUs."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import torch
from torch import Tensor

from tiered_memory import Copy, CopyEngine, PinnedArena
from vllm_serverless_loader.checkpoint.index import TensorEntry
from vllm_serverless_loader.loading.read_plan import Chunk
from vllm_serverless_loader.loading.sources import Extents, Piece, Source, tensor_pieces


def byte_view(tensor: Tensor) -> Tensor:
    """A contiguous tensor's bytes, uint8 ``[num_bytes]``, sharing memory."""
    return tensor.detach().view(-1).view(torch.uint8)


def for_each_chunk(chunks: Sequence[Chunk], work: Callable[[Chunk], None], threads: int) -> None:
    """Run ``work`` on every chunk, in order of start, with up to ``threads`` threads.

    The first error stops the others after their current chunk and is raised here; all threads have ended
    then.
    """
    remaining = iter(chunks)
    lock = threading.Lock()
    errors: list[BaseException] = []

    def run() -> None:
        while True:
            with lock:
                chunk = None if errors else next(remaining, None)
            if chunk is None:
                return
            try:
                work(chunk)
            except BaseException as error:
                with lock:
                    errors.append(error)
                return

    workers = [
        threading.Thread(target=run, name=f"serverless-loader-{number}")
        for number in range(min(threads, len(chunks)) - 1)
    ]
    for worker in workers:
        worker.start()
    run()
    for worker in workers:
        worker.join()
    if errors:
        raise errors[0]


def fill_host(
    source: Source, chunks: Sequence[Chunk], pieces_of: Callable[[Chunk], Sequence[Piece]], *, threads: int
) -> None:
    """Read chunks into host memory."""
    for_each_chunk(chunks, lambda chunk: source.read(chunk, pieces_of(chunk)), threads)


def fill_tensors(
    source: Source,
    chunks: Sequence[Chunk],
    destinations: Mapping[str, Tensor],
    *,
    threads: int,
    staging_chunks: int,
) -> None:
    """Read chunks into tensors on any devices.

    Args:
        source: gives the chunks.
        chunks: what to read.
        destinations: name -> uint8 ``[num_bytes]`` for each name that occurs in a segment.
        threads: threads that read.
        staging_chunks: chunks of page-locked memory on the way to GPUs.
    """
    devices = {tensor.device for tensor in destinations.values()}
    if not chunks:
        return
    if all(device.type == "cpu" for device in devices):
        fill_host(source, chunks, lambda chunk: tensor_pieces(chunk, destinations), threads=threads)
        return
    with Staging(max((chunk.num_bytes for chunk in chunks), default=1), staging_chunks, devices) as staging:

        def work(chunk: Chunk) -> None:
            pairs = []
            with staging.slot() as slot:
                source.read(chunk, [Piece(chunk.num_bytes, slot.buffer[: chunk.num_bytes])])
                for part in chunk.segments:
                    into = destinations[part.name][part.tensor_offset : part.tensor_offset + part.num_bytes]
                    pairs.append((into, slot.buffer[part.chunk_offset : part.chunk_offset + part.num_bytes]))
                slot.send(pairs)

        for_each_chunk(chunks, work, threads)
        staging.drain()


def copy_straight(extents: Extents, chunks: Sequence[Chunk], destinations: Mapping[str, Tensor]) -> None:
    """Copies from page-locked memory into tensors, all queued at once."""
    devices = {tensor.device for tensor in destinations.values()}
    with ExitStack() as stack:
        engines = {device: CopyEngine(device) for device in devices}
        for device, engine in engines.items():
            stack.callback(engine.close)
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()
        last: dict[torch.device, Copy] = {}
        for chunk in chunks:
            for segment in chunk.segments:
                into, done = destinations[segment.name], segment.tensor_offset
                pairs = []
                for part in extents.parts(chunk.start + segment.chunk_offset, segment.num_bytes):
                    pairs.append((into[done : done + part.numel()], part))
                    done += part.numel()
                last[into.device] = engines[into.device].submit(pairs)
        for copy in last.values():
            copy.synchronize()


def _numbered(device: torch.device) -> torch.device:
    """The device as tensors on it name it: ``cuda`` alone means the current one."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


class Slot:
    """One chunk of staging memory; its owner fills ``buffer`` and sends parts of it."""

    def __init__(self, staging: Staging, buffer: Tensor) -> None:
        self._staging = staging
        self.buffer = buffer
        self.copies: list[Copy] = []

    def send(self, pairs: Sequence[tuple[Tensor, Tensor]], after: torch.cuda.Stream | None = None) -> None:
        """Queue copies out of the slot, ``(destination, part of buffer)``, behind what ``after`` holds."""
        self.copies += self._staging.submit(pairs, after)

    def __enter__(self) -> Slot:
        return self

    def __exit__(self, *_: object) -> None:
        self._staging.give_back(self)


class Staging:
    """A ring of page-locked chunks on the way to GPUs. Context manager.

    Memory used: ``slots * chunk_bytes``, page-locked once for all chunks that pass through.
    """

    def __init__(self, chunk_bytes: int, slots: int, devices: set[torch.device]) -> None:
        chunk_bytes = -(-chunk_bytes // 4096) * 4096
        self._arena = PinnedArena(slots * chunk_bytes)
        self._free = deque(Slot(self, self._arena.empty(chunk_bytes)) for _ in range(slots))
        self._changed = threading.Condition()
        self._submit_lock = threading.Lock()
        self._engines = {device: CopyEngine(device) for device in map(_numbered, devices)}
        for engine_device in self._engines:
            if engine_device.type == "cuda":
                # Destinations were allocated on the current stream; their earlier use must be over.
                torch.cuda.current_stream(engine_device).synchronize()

    def slot(self) -> Slot:
        """A free slot; waits for the copies out of the one that has been in use for longest."""
        with self._changed:
            while not self._free:
                self._changed.wait()
            slot = self._free.popleft()
        for copy in slot.copies:
            copy.synchronize()
        slot.copies.clear()
        return slot

    def submit(self, pairs: Sequence[tuple[Tensor, Tensor]], after: torch.cuda.Stream | None) -> list[Copy]:
        """Queue copies, one for each device that occurs."""
        by_device: dict[torch.device, list[tuple[Tensor, Tensor]]] = {}
        for pair in pairs:
            by_device.setdefault(pair[0].device, []).append(pair)
        with self._submit_lock:
            return [self._engines[device].submit(some, after=after) for device, some in by_device.items()]

    def give_back(self, slot: Slot) -> None:
        """Let the next reader have the slot."""
        with self._changed:
            self._free.append(slot)
            self._changed.notify()

    def drain(self) -> None:
        """Wait for all copies."""
        for slot in self._free:
            for copy in slot.copies:
                copy.synchronize()
            slot.copies.clear()

    def __enter__(self) -> Staging:
        return self

    def __exit__(self, *_: object) -> None:
        for engine in self._engines.values():
            engine.close()
        self._free.clear()
        self._arena.close()


def stream_tensors(
    source: Source,
    chunks: Sequence[Chunk],
    tensors: Mapping[str, TensorEntry],
    device: torch.device,
    *,
    threads: int,
    staging_chunks: int,
) -> Iterator[tuple[str, Tensor]]:
    """Tensors in file order while later chunks are being read. A tensor is valid until the next one is asked
    for.

    Host memory: ``staging_chunks`` chunks and, on the CPU, the largest tensor.
    """
    names_at: dict[int, list[str]] = {}
    for name, entry in tensors.items():
        names_at.setdefault(entry.offset if entry.num_bytes else -1, []).append(name)
    for name in names_at.pop(-1, []):
        yield name, torch.empty(tensors[name].shape, dtype=tensors[name].dtype, device=device)
    chunk_bytes = max((chunk.num_bytes for chunk in chunks), default=1)
    with ExitStack() as stack:
        staging = stack.enter_context(Staging(chunk_bytes, staging_chunks, {device}))
        pool = ThreadPoolExecutor(min(threads, staging_chunks), "serverless-loader")
        stack.callback(pool.shutdown, wait=True, cancel_futures=True)

        def read(chunk: Chunk, slot: Slot) -> None:
            source.read(chunk, [Piece(chunk.num_bytes, slot.buffer[: chunk.num_bytes])])

        ahead: deque[tuple[Chunk, Slot, object]] = deque()
        upcoming = iter(chunks)
        partial: Tensor | None = None
        # One buffer for all tensors that lie in several chunks: allocating each anew fragments the heap.
        cut = {part.name for chunk in chunks for part in chunk.segments if part.tensor_offset}
        room = max((tensors[name].num_bytes for name in cut), default=0) if device.type == "cpu" else 0
        buffer = torch.empty(room, dtype=torch.uint8)
        while True:
            while len(ahead) < staging_chunks and (chunk := next(upcoming, None)) is not None:
                slot = staging.slot()
                ahead.append((chunk, slot, pool.submit(read, chunk, slot)))
            if not ahead:
                return
            chunk, slot, future = ahead.popleft()
            with slot:
                future.result()  # type: ignore[attr-defined]
                for part in chunk.segments:
                    entry = tensors[part.name]
                    here = slot.buffer[part.chunk_offset : part.chunk_offset + part.num_bytes]
                    is_whole = part.num_bytes == entry.num_bytes
                    if not (is_whole and device.type == "cpu"):
                        if part.tensor_offset == 0 and device.type == "cpu":
                            partial = buffer[: entry.num_bytes]
                        elif part.tensor_offset == 0:
                            partial = torch.empty(entry.num_bytes, dtype=torch.uint8, device=device)
                        assert partial is not None
                        # The memory may have belonged to a tensor that the caller's stream still reads.
                        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
                        into = partial[part.tensor_offset : part.tensor_offset + part.num_bytes]
                        slot.send([(into, here)], stream)
                        here = partial
                    if part.tensor_offset + part.num_bytes == entry.num_bytes:
                        for copy in slot.copies:
                            copy.wait()
                        for name in names_at[entry.offset]:
                            yield name, _typed(here, tensors[name])
                        partial = None


def _typed(content: Tensor, entry: TensorEntry) -> Tensor:
    """``content`` (uint8) as the tensor it holds; a copy if its address does not suit the dtype."""
    if content.storage_offset() % entry.dtype.itemsize:
        content = content.clone()
    return content.view(entry.dtype).view(entry.shape)


def typed_view(memory: Tensor, entry: TensorEntry) -> Tensor:
    """The tensor that ``entry`` describes inside ``memory``, uint8 from logical address 0 on."""
    if entry.num_bytes == 0:
        return torch.empty(entry.shape, dtype=entry.dtype, device=memory.device)
    return _typed(memory[entry.offset : entry.end], entry)
