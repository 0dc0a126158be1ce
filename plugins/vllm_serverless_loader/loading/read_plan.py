"""Which bytes are read, in which chunks, for which tensors. Pure: no file is touched.

All files of a checkpoint lie one after the other in one logical address space; file ``f`` begins at
``f.base``, a multiple of 4096. Offsets of tensors and chunks are logical.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_serverless_loader.checkpoint.index import FILE_ALIGN, TensorEntry


@dataclass(frozen=True)
class DataFile:
    """A file of ``num_bytes`` bytes at logical address ``base``."""

    path: Path
    num_bytes: int
    base: int


@dataclass(frozen=True)
class Segment:
    """Bytes of a chunk that belong to a tensor.

    Attributes:
        name: the tensor; of tied names the first.
        tensor_offset: first byte, counted from the tensor's first.
        chunk_offset: first byte, counted from the chunk's first.
        num_bytes: how many.
    """

    name: str
    tensor_offset: int
    chunk_offset: int
    num_bytes: int


@dataclass(frozen=True)
class Chunk:
    """One read: ``num_bytes`` bytes from logical address ``start``, all of one file.

    Attributes:
        file: number of the file.
        checksum: what the bytes must hash to (xxh3_64), or None if the format has no checksums.
        number: number of the chunk in its file.
        segments: the wanted tensors' parts, in order; other bytes are gaps.
    """

    file: int
    number: int
    start: int
    num_bytes: int
    checksum: str | None
    segments: tuple[Segment, ...]


def plan_chunks(
    files: Sequence[DataFile],
    tensors: Mapping[str, TensorEntry],
    chunk_bytes: int,
    checksums: Sequence[str] = (),
) -> list[Chunk]:
    """Chunks that hold ``tensors``, in logical order.

    Args:
        files: in order of ``base``.
        tensors: name -> entry with a logical offset.
        chunk_bytes: length of a chunk, a multiple of 4096.
        checksums: one a chunk of the only file; empty if there are none.
    """
    # Tied names have equal entries; the first stands for all.
    unique = {
        entry.offset: (name, entry) for name, entry in reversed(list(tensors.items())) if entry.num_bytes
    }
    pending = [unique[offset] for offset in sorted(unique)]
    chunks: list[Chunk] = []
    first = 0
    for file_number, file in enumerate(files):
        for number in range(-(-file.num_bytes // chunk_bytes)):
            start = file.base + number * chunk_bytes
            end = min(start + chunk_bytes, file.base + file.num_bytes)
            while first < len(pending) and pending[first][1].end <= start:
                first += 1
            segments = []
            for name, entry in pending[first:]:
                if entry.offset >= end:
                    break
                begin, stop = max(entry.offset, start), min(entry.end, end)
                segments.append(Segment(name, begin - entry.offset, begin - start, stop - begin))
            if segments:
                checksum = checksums[number] if checksums else None
                chunks.append(Chunk(file_number, number, start, end - start, checksum, tuple(segments)))
    return chunks


def lay_out(paths_and_sizes: Sequence[tuple[Path, int]]) -> tuple[DataFile, ...]:
    """Place files one after the other."""
    files, base = [], 0
    for path, num_bytes in paths_and_sizes:
        files.append(DataFile(path, num_bytes, base))
        base += -(-num_bytes // FILE_ALIGN) * FILE_ALIGN
    return tuple(files)
