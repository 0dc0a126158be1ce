"""Replicas of training state in host memory: a folder in shared memory, checked block by block."""

from __future__ import annotations

import json
import mmap
import os
import shutil
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_tenplex.cells import cells_of
from megatron_tenplex.errors import ReplicaCorruptError, UncoveredRangeError
from megatron_tenplex.executor import view_of
from megatron_tenplex.ptc import Box, ParallelTensorCollection, Shard, TensorSpec

_BLOCK = 1 << 20
_ALIGNMENT = 64


class TensorStore:
    """Versions of the state of ranks, kept on one host.

    Layout: ``root/host/version/rank/{manifest.json, data.bin}``. A rank's folder is written under a temporary
    name and renamed last, so that one that exists is complete. The manifest holds a CRC32 of every MiB of
    data and one of itself. Files are not flushed to a disk: the folder is meant to be in shared memory.

    Args:
        root: e.g. ``/dev/shm/job``.
        host: name of the host whose memory it is.
    """

    def __init__(self, root: str | os.PathLike[str], *, host: str) -> None:
        if not host or "/" in host or host.startswith("."):
            raise ValueError(f"host must be a plain name, got {host!r}")
        self.root, self.host = Path(root), host
        self._manifests: dict[tuple[int, int], dict[str, Any]] = {}

    def _folder(self, version: int, rank: int) -> Path:
        return self.root / self.host / f"{version:012d}" / f"{rank:06d}"

    def put(  # noqa: PLR0917 - the rank's whole description, in the order it is read
        self,
        version: int,
        rank: int,
        world_size: int,
        tensors: Mapping[str, TensorSpec],
        state: Mapping[Shard, Tensor],
        common: Mapping[str, Any] | None = None,
    ) -> None:
        """Write one rank's state; ``common`` must be JSON values. An existing copy is replaced."""
        folder = self._folder(version, rank)
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = folder.with_name(f".{folder.name}.{os.getpid()}")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        try:
            manifest = {
                "version": version,
                "rank": rank,
                "world_size": world_size,
                "tensors": ParallelTensorCollection(tensors, [state]).to_json(),
                "offsets": [],
                "blocks": [],
                "common": common,
            }
            _write_data(part / "data.bin", state, manifest)
            text = json.dumps(manifest)
            (part / "manifest.json").write_text(f"{zlib.crc32(text.encode()):08x}\n{text}")
            shutil.rmtree(folder, ignore_errors=True)
            part.rename(folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        self._manifests.pop((version, rank), None)

    def versions(self) -> list[int]:
        """Versions of which at least one rank is complete here, ascending."""
        base = self.root / self.host
        if not base.is_dir():
            return []
        return sorted(int(p.name) for p in base.iterdir() if p.name.isdigit() and self.ranks(int(p.name)))

    def ranks(self, version: int) -> list[int]:
        """Ranks of ``version`` that are complete here."""
        base = self._folder(version, 0).parent
        return sorted(int(p.name) for p in base.iterdir() if p.name.isdigit()) if base.is_dir() else []

    def prune(self, keep: int) -> None:
        """Remove all but the newest ``keep`` versions."""
        for version in self.versions()[: -keep or None]:
            shutil.rmtree(self._folder(version, 0).parent, ignore_errors=True)

    def manifest(self, version: int, rank: int) -> dict[str, Any]:
        """What :meth:`put` described.

        Raises:
            ReplicaCorruptError: the manifest does not have its checksum.
            LookupError: there is no such copy.
        """
        known = self._manifests.get((version, rank))
        if known is not None:
            return known
        path = self._folder(version, rank) / "manifest.json"
        if not path.is_file():
            raise LookupError(f"no replica of rank {rank}, version {version} on host {self.host}")
        said, _, text = path.read_bytes().partition(b"\n")
        got = zlib.crc32(text)
        if said != f"{got:08x}".encode():
            want = int(said, 16) if _is_hex(said) else 0
            raise self._corrupt("manifest", version, rank, 0, (got, want))
        self._manifests[version, rank] = json.loads(text)
        return self._manifests[version, rank]

    def shards(self, version: int, rank: int) -> tuple[dict[str, TensorSpec], tuple[Shard, ...]]:
        """Tensors and shards of one copy."""
        collection = ParallelTensorCollection.from_json(self.manifest(version, rank)["tensors"])
        return dict(collection.tensors), collection.shards[0]

    def read(self, version: int, rank: int, shard: Shard, box: Box | None = None) -> Tensor:
        """A copy of a shard's tensor, or of the part ``box`` of it, from blocks that are checked.

        Raises:
            ReplicaCorruptError: a block does not have its checksum.
            LookupError: the copy does not have this shard.
        """
        tensors, _ = self.shards(version, rank)
        dtype = tensors[shard.key].dtype if shard.key in tensors else torch.uint8
        data = bytearray(self.read_bytes(version, rank, shard, 0, shard.numel * dtype.itemsize))
        whole = torch.frombuffer(data, dtype=dtype)
        whole = whole if shard.flat is not None else whole.view(shard.box.shape)
        return whole if box is None else view_of(shard, whole, box).clone()

    def read_bytes(self, version: int, rank: int, shard: Shard, low: int, high: int) -> bytes:
        """Bytes ``[low, high)`` of a shard's tensor; errors as those of :meth:`read`."""
        _, shards = self.shards(version, rank)
        if shard not in shards:
            raise LookupError(f"rank {rank}, version {version} on host {self.host} has no {shard}")
        offset = self.manifest(version, rank)["offsets"][shards.index(shard)]
        return self._checked(version, rank, shard.key, offset + low, high - low)

    def _checked(self, version: int, rank: int, key: str, offset: int, size: int) -> bytes:
        blocks = self.manifest(version, rank)["blocks"]
        first, last = offset // _BLOCK, -(-(offset + size) // _BLOCK)
        with open(self._folder(version, rank) / "data.bin", "rb") as file:
            file.seek(first * _BLOCK)
            data = file.read((last - first) * _BLOCK)
        for block in range(first, last):
            at = (block - first) * _BLOCK
            got = zlib.crc32(data[at : at + _BLOCK])
            if got != blocks[block]:
                raise self._corrupt(key, version, rank, block, (got, blocks[block]))
        return data[offset - first * _BLOCK : offset - first * _BLOCK + size]

    def _corrupt(
        self, key: str, version: int, rank: int, block: int, sums: tuple[int, int]
    ) -> ReplicaCorruptError:
        got, want = sums
        return ReplicaCorruptError(
            key, host=self.host, rank=rank, version=version, block=block, got=got, want=want
        )

    def open(self, version: int, rank: int) -> dict[Shard, Tensor]:
        """All tensors of one copy as views of the mapped file, after every block was checked.

        Raises:
            ReplicaCorruptError: naming the first tensor in a block that does not have its checksum.
        """
        tensors, shards = self.shards(version, rank)
        manifest = self.manifest(version, rank)
        if not shards:
            return {}
        with open(self._folder(version, rank) / "data.bin", "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        for block, want in enumerate(manifest["blocks"]):
            got = zlib.crc32(memoryview(mapped)[block * _BLOCK : (block + 1) * _BLOCK])
            if got != want:
                within = [
                    s for s, o in zip(shards, manifest["offsets"], strict=True) if o < (block + 1) * _BLOCK
                ]
                raise self._corrupt(within[-1].key, version, rank, block, (got, want))
        opened = {}
        for shard, offset in zip(shards, manifest["offsets"], strict=True):
            dtype = tensors[shard.key].dtype
            whole = torch.frombuffer(mapped, dtype=dtype, count=shard.numel, offset=offset)
            opened[shard] = whole if shard.flat is not None else whole.view(shard.box.shape)
        return opened


def _is_hex(text: bytes) -> bool:
    return len(text) == 8 and all(c in b"0123456789abcdef" for c in text)


def _write_data(path: Path, state: Mapping[Shard, Tensor], manifest: dict[str, Any]) -> None:
    with open(path, "wb") as file:
        at = 0
        for tensor in state.values():
            gap = -at % _ALIGNMENT
            file.write(bytes(gap))
            at += gap
            manifest["offsets"].append(at)
            data = tensor.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy()
            file.write(data.data)
            at += data.nbytes
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            manifest["blocks"].append(zlib.crc32(block))


def restore(
    stores: Sequence[TensorStore], target: Mapping[Shard, Tensor], *, version: int | None = None
) -> int:
    """Fill ``target`` from replicas, each range from the first intact copy; the nearest store comes first.

    Args:
        version: the newest that intact copies cover by default.

    Returns:
        The version used.

    Raises:
        UncoveredRangeError: no version (or not the given one) is covered; its cause names a corrupt copy.
        LookupError: there is no version at all.
    """
    versions = sorted({v for store in stores for v in store.versions()}, reverse=True)
    wanted = versions if version is None else [version]
    if not versions:
        raise LookupError("no replicas in any store")
    failure: UncoveredRangeError | None = None
    for candidate in wanted:
        try:
            _restore_version(stores, target, candidate)
        except UncoveredRangeError as error:
            failure = failure or error
        else:
            return candidate
    assert failure is not None
    raise failure


def _restore_version(stores: Sequence[TensorStore], target: Mapping[Shard, Tensor], version: int) -> None:
    copies: list[dict[Shard, Tensor]] = []
    tensors: dict[str, TensorSpec] = {}
    corrupt: ReplicaCorruptError | None = None
    present: set[int] = set()
    world_size = 0
    for store in stores:
        for rank in store.ranks(version):
            try:
                opened = store.open(version, rank)
                tensors.update(store.shards(version, rank)[0])
                world_size = store.manifest(version, rank)["world_size"]
            except ReplicaCorruptError as error:
                corrupt = corrupt or error
                continue
            copies.append(opened)
            present.add(rank)
    lost = [rank for rank in range(world_size) if rank not in present]
    needed = {s.key for s in target}
    for shard in target:
        if shard.key not in tensors:
            raise UncoveredRangeError(shard.key, shard.box, lost) from corrupt
    source = ParallelTensorCollection(tensors, copies)
    wanted = ParallelTensorCollection({k: tensors[k] for k in needed}, [target])
    found: list[tuple[Tensor, Tensor]] = []
    for key, cells in cells_of(source, wanted, [len(copies)]):
        for cell in cells:
            if not cell.holders:
                raise UncoveredRangeError(key, cell.box, lost) from corrupt
            copy = min(cell.holders)
            shard = cell.holders[copy]
            read = view_of(shard, copies[copy][shard], cell.box)
            for shards in cell.needers.values():
                found += [(view_of(s, target[s], cell.box), read) for s in shards]
    with torch.no_grad():
        for into, read in found:
            into.copy_(read)
