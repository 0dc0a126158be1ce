"""Checkpoints that fsspec reaches (object stores): one read fills host memory and the local disk."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vllm_serverless_loader.checkpoint.index import CorruptCheckpointError, PartitionIndex, partition_name
from vllm_serverless_loader.checkpoint.reader import Checkpoint, open_checkpoint
from vllm_serverless_loader.loading.options import LoadOptions
from vllm_serverless_loader.loading.read_plan import Chunk, lay_out
from vllm_serverless_loader.loading.sources import FileSource, Piece


def is_remote(path: str) -> bool:
    """Whether ``path`` is a URL."""
    return "://" in path


def open_remote(url: str, folder: str | os.PathLike[str], *, rank: int = 0) -> Checkpoint:
    """Open a converted checkpoint at ``url``; a copy that ``folder`` holds already is opened instead.

    The data is read when the checkpoint is loaded, each byte once, and written to ``folder`` on the way. The
    copy counts once it is complete; until then the next load starts again.

    Args:
        url: directory of partitions, as fsspec understands it (``s3://bucket/model``).
        folder: local directory of this checkpoint's copy.
        rank: partition to open.

    Raises:
        FileNotFoundError: there is no such partition at ``url``.
        ValueError, CorruptCheckpointError: as :func:`open_checkpoint`.
    """
    import fsspec

    target = Path(folder)
    system, root = fsspec.core.url_to_fs(url)
    names = sorted(str(name).rsplit("/", 1)[-1] for name in system.ls(root, detail=False))
    sizes = {int(name[19:24]) for name in names if name.startswith("partition-") and name.endswith(".json")}
    if len(sizes) != 1:
        raise FileNotFoundError(
            f"no checkpoint at {url}: expected partition-*-of-*.json of one number of ranks"
        )
    (world_size,) = sizes
    base = partition_name(rank, world_size)
    if (target / f"{base}.json").is_file():
        return open_checkpoint(target, rank=rank)
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        if not name.startswith("partition-"):
            _store(target / name, system.cat_file(f"{root}/{name}"))
    with tempfile.TemporaryDirectory() as scratch:
        index_file = Path(scratch) / f"{base}.json"
        index_file.write_bytes(system.cat_file(f"{root}/{base}.json"))
        index = PartitionIndex.read(index_file)
    stored = system.size(f"{root}/{base}.bin")
    if stored != index.num_bytes:
        raise CorruptCheckpointError(f"{url}/{base}.bin: {stored} bytes, expected {index.num_bytes}")
    return _RemoteCheckpoint(target, index, system, f"{root}/{base}.bin", f"{url}/{base}.bin")


class _RemoteCheckpoint(Checkpoint):
    def __init__(self, path: Path, index: PartitionIndex, system: Any, remote: str, shown: str) -> None:
        data = path / f"{partition_name(index.rank, index.world_size)}.bin"
        super().__init__(path, index, lay_out([(data, index.num_bytes)]))
        self._system, self._remote, self._shown = system, remote, shown

    def source(self, options: LoadOptions) -> FileSource:
        return _RemoteSource(self, self._system, self._remote, self._shown)


class _RemoteSource(FileSource):
    """Reads each chunk once and keeps it; always verified, since networks and proxies damage bytes too."""

    tier = "remote"

    def __init__(self, checkpoint: _RemoteCheckpoint, system: Any, remote: str, shown: str) -> None:
        self._checkpoint = checkpoint
        self._system, self._remote, self._shown = system, remote, shown
        self._lock = threading.Lock()
        self._missing = set(range(checkpoint.index.num_chunks))
        data = checkpoint.files[0].path
        self._partial = data.with_name(f"{data.name}.{os.getpid()}.{id(self)}.partial")
        self._fd = os.open(self._partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)

    def read(self, chunk: Chunk, pieces: Sequence[Piece]) -> None:
        import xxhash

        end = chunk.start + chunk.num_bytes
        content = self._system.cat_file(self._remote, start=chunk.start, end=end)
        if xxhash.xxh3_64_hexdigest(content) != chunk.checksum:
            raise CorruptCheckpointError(
                f"{self._shown}: checksum of chunk {chunk.number} (bytes {chunk.start}..{end}) differs"
            )
        os.pwrite(self._fd, content, chunk.start)
        view, done = torch.frombuffer(bytearray(content), dtype=torch.uint8), 0
        for piece in pieces:
            if piece.buffer is not None:
                piece.buffer.copy_(view[done : done + piece.num_bytes])
            for destination, part in piece.copies:
                destination.copy_(part)
            done += piece.num_bytes
        with self._lock:
            self._missing.discard(chunk.number)

    def __enter__(self) -> _RemoteSource:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            os.fsync(self._fd)
        finally:
            os.close(self._fd)
        if self._missing:
            self._partial.unlink()
            return
        data = self._checkpoint.files[0].path
        os.replace(self._partial, data)
        _store(data.with_suffix(".json"), self._checkpoint.index.to_json().encode())


def _store(path: Path, content: bytes) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_bytes(content)
    os.replace(partial, path)
