"""A checkpoint on disk, opened and checked: partitions of our own format, or a safetensors directory."""

from __future__ import annotations

import dataclasses
import json
import mmap
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tiered_memory import PinnedArena
from vllm_serverless_loader.checkpoint.index import (
    CheckpointKey,
    CorruptCheckpointError,
    PartitionIndex,
    TensorEntry,
    config_digest,
    partition_name,
)
from vllm_serverless_loader.checkpoint.safetensors_directory import read_directory
from vllm_serverless_loader.loading.options import LoadOptions, LoadReport, LoadResult
from vllm_serverless_loader.loading.pipeline import (
    byte_view,
    fill_host,
    fill_tensors,
    stream_tensors,
    typed_view,
)
from vllm_serverless_loader.loading.read_plan import Chunk, DataFile, lay_out, plan_chunks
from vllm_serverless_loader.loading.sources import (
    Extents,
    FileSource,
    Progress,
    Source,
    memory_pieces,
    watched,
)

if TYPE_CHECKING:
    import os

Mover = Callable[[list[Chunk], Mapping[str, Tensor]], None]
_PARTITION = re.compile(r"partition-(\d{5})-of-(\d{5})\.json")


class Checkpoint:
    """One rank's tensors on disk. Context manager; opening reads no tensor data.

    Attributes:
        path: the directory.
        rank, world_size: which partition of how many; 0 of 1 for a safetensors directory.
        num_bytes: size of the logical address space of all files.
        index: names, places, checksums; offsets are logical.
        files: the data files.
    """

    def __init__(self, path: Path, index: PartitionIndex, files: tuple[DataFile, ...]) -> None:
        self.path = path
        self.index = index
        self.files = files

    @property
    def rank(self) -> int:
        """Number of the partition."""
        return self.index.rank

    @property
    def world_size(self) -> int:
        """Partitions of the checkpoint."""
        return self.index.world_size

    @property
    def num_bytes(self) -> int:
        """Size of the logical address space."""
        return self.index.num_bytes

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors, in file order."""
        return tuple(self.index.tensors)

    @property
    def has_checksums(self) -> bool:
        """Whether damage to the data can be noticed."""
        return bool(self.index.chunk_checksums)

    def load(
        self,
        device: str | torch.device = "cpu",
        *,
        into: Mapping[str, Tensor] | None = None,
        strict: bool = True,
        options: LoadOptions | None = None,
        progress: Progress | None = None,
    ) -> LoadResult:
        """Load tensors.

        Args:
            device: where new tensors are made, if ``into`` is not given. On the CPU they are views of one
                buffer.
            into: tensors to fill, of any device and stride; returned as ``.tensors``.
            strict: names of ``into`` must match exactly; otherwise the common ones are filled.
            options: how to read.
            progress: is told the bytes of each chunk that has been read, from several threads.

        Raises:
            ValueError: names, shapes or dtypes of ``into`` differ; nothing has been written then.
            CorruptCheckpointError: a checksum differs; what was loaded is undefined.
            OSError: a file cannot be read.
        """
        options = options or LoadOptions()
        chunks = self.plan(options)
        with self.source(options) as source:
            return load_from(
                watched(source, progress),
                self.index,
                chunks,
                torch.device(device),
                into=into,
                strict=strict,
                options=options,
                path=self.path,
            )

    def tensors(
        self,
        device: str | torch.device = "cpu",
        *,
        options: LoadOptions | None = None,
        progress: Progress | None = None,
    ) -> Iterator[tuple[str, Tensor]]:
        """Tensors one by one in file order, read ahead by threads; a tensor is valid until the next one.

        Host memory used: ``staging_chunks`` chunks and the largest tensor.
        """
        options = options or LoadOptions()
        with self.source(options) as source:
            yield from stream_tensors(
                watched(source, progress),
                self.plan(options),
                self.index.tensors,
                torch.device(device),
                threads=options.io_threads,
                staging_chunks=options.staging_chunks,
            )

    def verify(self) -> None:
        """Read everything and compare all checksums; a safetensors directory has none, and is only read.

        Raises:
            CorruptCheckpointError: the first chunk found that differs.
        """
        options = LoadOptions()
        whole = {f"file {file.path}": _whole(file) for file in self.files if file.num_bytes}
        chunks = plan_chunks(self.files, whole, self._chunk_bytes(options), self.index.chunk_checksums)
        with self.source(options) as source:

            def pieces(chunk: Chunk) -> list:
                buffer = torch.frombuffer(mmap.mmap(-1, chunk.num_bytes), dtype=torch.uint8)
                return memory_pieces(Extents([buffer]), dataclasses.replace(chunk, start=0))

            fill_host(source, chunks, pieces, threads=options.io_threads)

    def plan(self, options: LoadOptions) -> list[Chunk]:
        """The chunks that hold the tensors."""
        return plan_chunks(
            self.files, self.index.tensors, self._chunk_bytes(options), self.index.chunk_checksums
        )

    def source(self, options: LoadOptions) -> FileSource:
        """An open source of the chunks."""
        return FileSource(self.files, options.direct_io, verify=options.verify)

    def _chunk_bytes(self, options: LoadOptions) -> int:
        return self.index.chunk_bytes if self.has_checksums else options.chunk_bytes

    def close(self) -> None:
        """Nothing is held open between loads; for symmetry with what is."""

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_checkpoint(
    path: str | os.PathLike[str],
    *,
    rank: int = 0,
    world_size: int | None = None,
    expect: CheckpointKey | None = None,
) -> Checkpoint:
    """Open a checkpoint of our format, or a directory of safetensors files.

    Args:
        path: the directory.
        rank: partition to open; every rank of a safetensors directory opens all of it.
        world_size: ranks that will load; checked for our own format.
        expect: what the checkpoint must be; fields that either side leaves empty are not compared.

    Raises:
        FileNotFoundError: no checkpoint, or a file of it is missing.
        ValueError: a rank that is not there, other number of ranks, newer version, or another key.
        CorruptCheckpointError: an index is damaged, or a file has another length.
    """
    if rank < 0:
        raise ValueError(f"rank must not be negative, got {rank}")
    folder = Path(path)
    sizes = {int(match[2]) for match in map(_PARTITION.fullmatch, _file_names(folder)) if match}
    if not sizes:
        checkpoint = _open_safetensors(folder)
    else:
        checkpoint = _open_partition(folder, rank, world_size, sizes)
    if expect is not None:
        checkpoint.index.key.check(expect, folder)
    return checkpoint


def load_checkpoint(
    path: str | os.PathLike[str], device: str | torch.device = "cpu", *, rank: int = 0
) -> dict[str, Tensor]:
    """All tensors of a rank, by name; errors as :func:`open_checkpoint` and :meth:`Checkpoint.load`."""
    with open_checkpoint(path, rank=rank) as checkpoint:
        return dict(checkpoint.load(device).tensors)


def model_digest(folder: Path) -> str:
    """Digest of the directory's config.json; "" if there is none."""
    path = folder / "config.json"
    if not path.is_file():
        return ""
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise CorruptCheckpointError(f"{path}: not JSON: {error}") from error
    return config_digest(config)


def _file_names(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir()] if folder.is_dir() else []


def _open_partition(folder: Path, rank: int, world_size: int | None, sizes: set[int]) -> Checkpoint:
    if len(sizes) > 1:
        first, second = sorted(sizes)[:2]
        raise ValueError(f"{folder} holds partitions of {first} and of {second} ranks; keep one of the two")
    (stored,) = sizes
    for other in range(stored):
        for suffix in (".json", ".bin"):
            path = (folder / partition_name(other, stored)).with_suffix(suffix)
            if not path.is_file():
                raise FileNotFoundError(f"partition {other} of {stored} is incomplete: {path} is missing")
    index = PartitionIndex.read((folder / partition_name(0, stored)).with_suffix(".json"))
    if index.key.layout == "full" and stored == 1:
        rank = 0  # every rank reads all of it and keeps its part
    elif world_size is not None and world_size != stored:
        raise ValueError(
            f"{folder} was written for tensor_parallel_size={stored}, running with {world_size}; "
            f"convert again with --tensor-parallel-size {world_size} or load the original model directory"
        )
    if not 0 <= rank < stored:
        raise ValueError(f"{folder} has {stored} partitions, rank {rank} asked for")
    base = folder / partition_name(rank, stored)
    index_path, data_path = base.with_suffix(".json"), base.with_suffix(".bin")
    if rank:
        index = PartitionIndex.read(index_path)
    if (index.rank, index.world_size) != (rank, stored):
        raise CorruptCheckpointError(
            f"{index_path}: not a partition index: it describes rank {index.rank} of {index.world_size}"
        )
    num_bytes = data_path.stat().st_size
    if num_bytes != index.num_bytes:
        raise CorruptCheckpointError(f"{data_path}: {num_bytes} bytes, expected {index.num_bytes}")
    # An index copied from another model describes another configuration than the one beside it.
    index.key.check(dataclasses.replace(index.key, model=model_digest(folder)), folder)
    return Checkpoint(folder, index, lay_out([(data_path, num_bytes)]))


def _open_safetensors(folder: Path) -> Checkpoint:
    stored = read_directory(folder) if folder.is_dir() else []
    if not stored:
        raise FileNotFoundError(
            f"no checkpoint in {folder}: expected partition-*-of-*.json or *.safetensors; "
            "convert a model with 'serverless-loader convert MODEL PATH'"
        )
    files = lay_out([(file.path, file.num_bytes) for file in stored])
    tensors = {
        name: dataclasses.replace(entry, offset=file.base + entry.offset)
        for file, content in zip(files, stored, strict=True)
        for name, entry in content.tensors.items()
    }
    num_bytes = files[-1].base + files[-1].num_bytes
    key = CheckpointKey(model=model_digest(folder))
    return Checkpoint(
        folder, PartitionIndex(0, 1, num_bytes, LoadOptions().chunk_bytes, (), key, tensors), files
    )


def _whole(file: DataFile) -> TensorEntry:
    return TensorEntry(torch.uint8, (file.num_bytes,), file.base, file.num_bytes)


def load_from(
    source: Source,
    index: PartitionIndex,
    chunks: list[Chunk],
    device: torch.device,
    *,
    into: Mapping[str, Tensor] | None,
    strict: bool,
    options: LoadOptions,
    path: Path,
    move: Mover | None = None,
) -> LoadResult:
    """Load from any source; arguments and errors as :meth:`Checkpoint.load`.

    ``move(chunks, destinations)`` brings bytes to devices, if the source knows a better way than staging.
    """
    begin = time.perf_counter()
    wanted: Mapping[str, TensorEntry] = index.tensors
    if into is not None:
        wanted = _matching(index, into, strict, path)
        if len(wanted) < len(index.tensors):
            chunks = _only(chunks, index, wanted)
    threads = options.io_threads
    if into is None and device.type == "cpu":
        # Page-aligned, so that direct reads need no bounce buffer.
        memory = PinnedArena(max(index.num_bytes, 1), pinned=False).buffer
        extents = Extents([memory])
        fill_host(source, chunks, lambda chunk: memory_pieces(extents, chunk), threads=threads)
        tensors: Mapping[str, Tensor] = _tied(
            {name: typed_view(memory, entry) for name, entry in wanted.items()}, wanted
        )
    else:
        tensors = into if into is not None else _allocate(wanted, device)
        destinations, later = _destinations(wanted, tensors)
        if move is not None:
            move(chunks, destinations)
        else:
            slots = options.staging_chunks
            fill_tensors(source, chunks, destinations, threads=threads, staging_chunks=slots)
        with torch.no_grad():
            for tensor, content in later:
                tensor.copy_(content)
    moved = sum(chunk.num_bytes for chunk in chunks)
    seconds = time.perf_counter() - begin
    return LoadResult(tensors, LoadReport(moved, seconds, source.tier, {source.tier: moved}))


def _matching(
    index: PartitionIndex, into: Mapping[str, Tensor], strict: bool, path: Path
) -> dict[str, TensorEntry]:
    """Entries of the tensors to fill; refuses what does not fit before anything is written."""
    missing = [name for name in into if name not in index.tensors]
    unexpected = [name for name in index.tensors if name not in into]
    common = {name: entry for name, entry in index.tensors.items() if name in into}
    misshapen = [
        f"{name} ({_text(into[name].dtype, into[name].shape)}, stored {_text(entry.dtype, entry.shape)})"
        for name, entry in common.items()
        if into[name].dtype != entry.dtype or tuple(into[name].shape) != entry.shape
    ]
    problems = [(misshapen, "of another shape or dtype")]
    if strict:
        problems += [(missing, "not in the checkpoint"), (unexpected, "in the checkpoint alone")]
    for names, what in problems:
        if names:
            more = ", ..." if len(names) > 5 else ""
            raise ValueError(f"{path}: {len(names)} tensors are {what}: {', '.join(names[:5])}{more}")
    return common


def _text(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


def _only(chunks: list[Chunk], index: PartitionIndex, wanted: Mapping[str, TensorEntry]) -> list[Chunk]:
    """Chunks and segments that hold wanted tensors; a tied tensor goes by the first of its wanted names."""
    name_at = {entry.offset: name for name, entry in reversed(list(wanted.items())) if entry.num_bytes}
    kept = []
    for chunk in chunks:
        segments = tuple(
            dataclasses.replace(part, name=name_at[index.tensors[part.name].offset])
            for part in chunk.segments
            if index.tensors[part.name].offset in name_at
        )
        if segments:
            kept.append(dataclasses.replace(chunk, segments=segments))
    return kept


def _allocate(entries: Mapping[str, TensorEntry], device: torch.device) -> dict[str, Tensor]:
    return _tied(
        {name: torch.empty(e.shape, dtype=e.dtype, device=device) for name, e in entries.items()}, entries
    )


def _tied(tensors: dict[str, Tensor], entries: Mapping[str, TensorEntry]) -> dict[str, Tensor]:
    """The same tensor under all names that share an entry."""
    first: dict[int, Tensor] = {}
    return {
        name: first.setdefault(entries[name].offset, tensor) if entries[name].num_bytes else tensor
        for name, tensor in tensors.items()
    }


def _destinations(
    entries: Mapping[str, TensorEntry], given: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[tuple[Tensor, Tensor]]]:
    """Byte views to fill, and copies to do afterwards: into strided tensors and second names of a tie."""
    destinations: dict[str, Tensor] = {}
    later: list[tuple[Tensor, Tensor]] = []
    first: dict[int, Tensor] = {}
    for name, entry in entries.items():
        tensor = given[name].detach()
        if entry.num_bytes == 0:
            continue
        if entry.offset in first:
            if tensor.data_ptr() != first[entry.offset].data_ptr():
                later.append((tensor, first[entry.offset]))
            continue
        target = tensor
        if not tensor.is_contiguous():
            target = torch.empty_like(tensor, memory_format=torch.contiguous_format)
            later.append((tensor, target))
        first[entry.offset] = target
        destinations[name] = byte_view(target)
    return destinations, later
