"""Where chunks come from: files, or chunks of a host cache. Targets: where their bytes go in host memory."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from tiered_memory import DirectReader
from vllm_serverless_loader.checkpoint.index import TENSOR_ALIGN, CorruptCheckpointError
from vllm_serverless_loader.loading.read_plan import Chunk, DataFile

Progress = Callable[[int], None]
_SMALL = 256 << 10  # reads of tensors below this are merged


@dataclass
class Piece:
    """A part of a chunk: read into ``buffer`` (uint8), then copied on; a gap is skipped.

    Attributes:
        num_bytes: length of the part.
        buffer: where the bytes go; None for a gap, whose bytes are zero.
        copies: ``(destination, part of buffer)`` to do after the read.
    """

    num_bytes: int
    buffer: Tensor | None
    copies: list[tuple[Tensor, Tensor]] = field(default_factory=list)


class Source(Protocol):
    """Gives the bytes of chunks; thread-safe."""

    tier: str

    def read(self, chunk: Chunk, pieces: Sequence[Piece]) -> None:
        """Fill the pieces, which together make up the chunk."""


class FileSource:
    """Chunks from files. Context manager; checksums are compared if ``verify``.

    Raises:
        CorruptCheckpointError: on reading, a checksum differs; the file, the chunk and its bytes are named.
        OSError: a file cannot be opened or read.
    """

    tier = "disk"

    def __init__(
        self, files: Sequence[DataFile], mode: Literal["auto", "always", "never"], *, verify: bool
    ) -> None:
        self._files = files
        self._verify = verify
        with ExitStack() as stack:
            self._readers = [stack.enter_context(DirectReader(file.path, mode=mode)) for file in files]
            self._stack = stack.pop_all()

    def read(self, chunk: Chunk, pieces: Sequence[Piece]) -> None:
        """Read a chunk and compare its checksum."""
        import xxhash

        file, reader = self._files[chunk.file], self._readers[chunk.file]
        begin = chunk.start - file.base
        hasher = xxhash.xxh3_64() if self._verify and chunk.checksum else None
        offset = begin
        for piece in pieces:
            if piece.buffer is not None:
                reader.read_into(piece.buffer, offset, None if hasher is None else hasher.update)
            elif hasher is not None:
                hasher.update(bytes(piece.num_bytes))
            offset += piece.num_bytes
        if hasher is not None and hasher.hexdigest() != chunk.checksum:
            end = begin + chunk.num_bytes
            raise CorruptCheckpointError(
                f"{file.path}: checksum of chunk {chunk.number} (bytes {begin}..{end}) differs"
            )
        _copy_on(pieces)

    def __enter__(self) -> FileSource:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


class MemorySource:
    """Chunks from host memory.

    Args:
        extents: uint8 tensors that hold the logical address space from 0 on, one after the other.
    """

    tier = "host"

    def __init__(self, extents: Sequence[Tensor]) -> None:
        self.extents = Extents(extents)

    def read(self, chunk: Chunk, pieces: Sequence[Piece]) -> None:
        """Copy a chunk out of the cache."""
        offset = chunk.start
        for piece in pieces:
            if piece.buffer is not None:
                done = 0
                into = piece.buffer.numpy()
                for part in self.extents.parts(offset, piece.num_bytes):
                    # NumPy copies in the calling thread; torch would start a team of threads for each reader.
                    into[done : done + part.numel()] = part.numpy()
                    done += part.numel()
            offset += piece.num_bytes
        _copy_on(pieces)

    def __enter__(self) -> MemorySource:
        return self

    def __exit__(self, *_: object) -> None:
        return None


class _Watched:
    def __init__(self, source: Source, progress: Progress) -> None:
        self.tier = source.tier
        self._source = source
        self._progress = progress

    def read(self, chunk: Chunk, pieces: Sequence[Piece]) -> None:
        self._source.read(chunk, pieces)
        self._progress(chunk.num_bytes)


def watched(source: Source, progress: Progress | None) -> Source:
    """The same source, which tells ``progress`` the bytes of each chunk that was read."""
    return source if progress is None else _Watched(source, progress)


class Extents:
    """A logical address space over several stretches of memory."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = list(tensors)
        self._starts = [0]
        for tensor in self._tensors:
            self._starts.append(self._starts[-1] + tensor.numel())

    @property
    def num_bytes(self) -> int:
        """Size of the address space."""
        return self._starts[-1]

    def parts(self, start: int, num_bytes: int) -> list[Tensor]:
        """The stretches that hold ``num_bytes`` bytes from ``start`` on."""
        found = []
        number = bisect.bisect_right(self._starts, start) - 1
        while num_bytes:
            begin = start - self._starts[number]
            part = self._tensors[number][begin : begin + num_bytes]
            found.append(part)
            start, num_bytes, number = start + part.numel(), num_bytes - part.numel(), number + 1
        return found


def memory_pieces(extents: Extents, chunk: Chunk) -> list[Piece]:
    """Pieces that put all of a chunk at its logical address."""
    return [Piece(part.numel(), part) for part in extents.parts(chunk.start, chunk.num_bytes)]


def tensor_pieces(chunk: Chunk, destinations: Mapping[str, Tensor]) -> list[Piece]:
    """Pieces that put a chunk's segments straight into CPU tensors, small neighbours by way of a buffer.

    Args:
        chunk: what is read.
        destinations: name -> uint8 ``[num_bytes]`` of the whole tensor.
    """
    pieces: list[Piece] = []
    run: list[tuple[int, int, Tensor]] = []  # (chunk offset, bytes, destination)

    def flush() -> None:
        if not run:
            return
        start, end = run[0][0], run[-1][0] + run[-1][1]
        buffer = torch.empty(end - start, dtype=torch.uint8)
        copies = [(into, buffer[at - start : at - start + count]) for at, count, into in run]
        pieces.append(Piece(end - start, buffer, copies))
        run.clear()

    def skip(gap: int) -> None:
        # A gap of the format's alignment or more may hold tensors that are not wanted; a shorter one is zero.
        is_hashed = chunk.checksum is not None and gap >= TENSOR_ALIGN
        pieces.append(Piece(gap, torch.empty(gap, dtype=torch.uint8) if is_hashed else None))

    position = 0
    for segment in chunk.segments:
        into = destinations[segment.name][segment.tensor_offset : segment.tensor_offset + segment.num_bytes]
        gap = segment.chunk_offset - position
        is_small = segment.num_bytes < _SMALL
        if gap and not (run and is_small and gap < _SMALL):
            flush()
            skip(gap)
        if is_small:
            run.append((segment.chunk_offset, segment.num_bytes, into))
        else:
            flush()
            pieces.append(Piece(segment.num_bytes, into))
        position = segment.chunk_offset + segment.num_bytes
    flush()
    if position < chunk.num_bytes:
        skip(chunk.num_bytes - position)
    return pieces


def _copy_on(pieces: Sequence[Piece]) -> None:
    for piece in pieces:
        for destination, part in piece.copies:
            destination.copy_(part)
