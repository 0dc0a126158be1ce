"""Writes partitions: data first, index last, both complete or not there at all."""

from __future__ import annotations

import errno
import fcntl
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

from vllm_serverless_loader.checkpoint.index import (
    DEFAULT_CHUNK_BYTES,
    DTYPE_NAMES,
    FILE_ALIGN,
    MAX_CHUNK_BYTES,
    TENSOR_ALIGN,
    CheckpointKey,
    PartitionIndex,
    TensorEntry,
    partition_name,
)

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".partial")


def write_partition(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    *,
    rank: int = 0,
    world_size: int = 1,
    key: CheckpointKey | None = None,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
) -> PartitionIndex:
    """Write one rank's tensors into the directory ``path`` (created if absent).

    Views, slices and transposes are stored as what they show. Names with the same storage, offset, shape,
    stride and dtype are stored once and tied again when loaded.

    Args:
        path: directory of the checkpoint.
        tensors: any devices and dtypes; stored in this order.
        rank: which partition this is.
        world_size: of how many.
        key: what the checkpoint is made of.
        chunk_bytes: bytes covered by one checksum, a multiple of 4096.

    Raises:
        ValueError: a dtype that the format does not know, or a bad number.
        FileExistsError: the partition is there already; nothing is overwritten.
        BlockingIOError: another process is writing the same partition.
        OSError: the disk is full, or a write fails; nothing of this partition is left behind.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in [0, {world_size}), got {rank}")
    if not FILE_ALIGN <= chunk_bytes <= MAX_CHUNK_BYTES or chunk_bytes % FILE_ALIGN:
        raise ValueError(
            f"chunk_bytes must be a multiple of {FILE_ALIGN} up to {MAX_CHUNK_BYTES}, got {chunk_bytes}"
        )
    entries, num_bytes = _place(tensors)
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    base = folder / partition_name(rank, world_size)
    data, index_file = base.with_suffix(".bin"), base.with_suffix(".json")
    with _writing(index_file) as partial_index:
        partial_data = data.with_name(data.name + ".partial")
        try:
            checksums = _write_data(partial_data, tensors, entries, num_bytes, chunk_bytes)
            os.replace(partial_data, data)
        except BaseException:
            partial_data.unlink(missing_ok=True)
            raise
        try:
            index = PartitionIndex(
                rank, world_size, num_bytes, chunk_bytes, tuple(checksums), key or CheckpointKey(), entries
            )
            _write_all(partial_index, index.to_json().encode())
            os.fsync(partial_index)
            os.replace(index_file.with_name(index_file.name + ".partial"), index_file)
        except BaseException:
            data.unlink(missing_ok=True)
            raise
        _sync_folder(folder)
    return index


def copy_other_files(source: Path, target: Path) -> None:
    """Copy what is not weights: configuration, tokenizer, code-free text files."""
    for path in sorted(source.iterdir()):
        is_weight = path.suffix in _WEIGHT_SUFFIXES or path.name.endswith(".index.json")
        is_partition = path.name.startswith("partition-")
        if (
            path.is_file()
            and not is_weight
            and not is_partition
            and path.resolve().parent != target.resolve()
        ):
            shutil.copyfile(path, target / path.name)


def _place(tensors: Mapping[str, Tensor]) -> tuple[dict[str, TensorEntry], int]:
    """Entries in order of ``tensors``, tied ones sharing theirs, and the length of the data file."""
    entries: dict[str, TensorEntry] = {}
    known: dict[object, TensorEntry] = {}
    end = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPE_NAMES or tensor.layout != torch.strided:
            raise ValueError(f"tensor {name!r}: cannot store {tensor.dtype} with layout {tensor.layout}")
        num_bytes = math.prod(tensor.shape) * tensor.dtype.itemsize
        identity = _identity(tensor) if num_bytes else name
        if identity not in known:
            offset = -(-end // TENSOR_ALIGN) * TENSOR_ALIGN
            known[identity] = TensorEntry(tensor.dtype, tuple(tensor.shape), offset, num_bytes)
            end = offset + num_bytes
        entries[name] = known[identity]
    return entries, -(-end // FILE_ALIGN) * FILE_ALIGN


def _identity(tensor: Tensor) -> object:
    storage = tensor.untyped_storage().data_ptr()
    return (tensor.device, storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)


@contextmanager
def _writing(index_file: Path) -> Iterator[int]:
    """Descriptor of the partial index, whose lock makes this process the only writer of the partition."""
    partial = index_file.with_name(index_file.name + ".partial")
    while True:
        fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A writer that has just finished may have renamed the file between open and lock.
            if partial.exists() and os.path.samestat(os.fstat(fd), os.stat(partial)):
                break
        except OSError as error:
            os.close(fd)
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise BlockingIOError(
                    errno.EAGAIN, "another process is writing this partition", str(index_file)
                ) from error
            raise
        os.close(fd)
    try:
        if index_file.exists():
            raise FileExistsError(
                errno.EEXIST,
                "a checkpoint is here already; remove it or choose another directory",
                str(index_file),
            )
        os.ftruncate(fd, 0)
        yield fd
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
    finally:
        os.close(fd)


def _write_data(
    path: Path,
    tensors: Mapping[str, Tensor],
    entries: Mapping[str, TensorEntry],
    num_bytes: int,
    chunk_bytes: int,
) -> list[str]:
    """Write the data file and return the checksum of each chunk."""
    import xxhash

    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        _reserve(fd, path, num_bytes)
        checksums: list[str] = []
        chunk = bytearray(min(chunk_bytes, num_bytes))
        used = 0
        for piece in _pieces(tensors, entries, num_bytes):
            view = memoryview(piece)
            while view:
                count = min(len(view), len(chunk) - used)
                chunk[used : used + count] = view[:count]
                used, view = used + count, view[count:]
                if used == len(chunk):
                    _write_all(fd, chunk)
                    checksums.append(xxhash.xxh3_64_hexdigest(chunk))
                    used = 0
        if used:
            _write_all(fd, memoryview(chunk)[:used])
            checksums.append(xxhash.xxh3_64_hexdigest(memoryview(chunk)[:used]))
        os.fsync(fd)
        return checksums
    finally:
        os.close(fd)


def _pieces(
    tensors: Mapping[str, Tensor], entries: Mapping[str, TensorEntry], num_bytes: int
) -> Iterator[bytes | memoryview]:
    """The data file's content in order, gaps and tail as zeros."""
    end = 0
    for name, entry in entries.items():
        if entry.offset < end or entry.num_bytes == 0:
            continue  # tied to one already written, or empty
        yield bytes(entry.offset - end)
        host = tensors[name].detach().resolve_conj().resolve_neg().to("cpu").contiguous()
        yield host.view(-1).view(torch.uint8).numpy().data
        end = entry.end
    yield bytes(num_bytes - end)


def _reserve(fd: int, path: Path, num_bytes: int) -> None:
    """Find out about a full disk before writing gigabytes to it."""
    status = os.fstatvfs(fd)
    free = status.f_bavail * status.f_frsize
    if num_bytes > free:
        raise OSError(errno.ENOSPC, f"the disk is full: {num_bytes} bytes needed, {free} free", str(path))


def _write_all(fd: int, content: bytes | bytearray | memoryview) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(fd, view) :]


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
