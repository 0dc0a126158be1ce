"""``tenplex://``: stored tensors and ranges of a data set as files of fsspec."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from fsspec import AbstractFileSystem

from megatron_tenplex.tensor_store import TensorStore


class TenplexFileSystem(AbstractFileSystem):
    """Read-only view of a :class:`TensorStore`: ``tenplex://HOST/VERSION/RANK/NUMBER.bin``.

    ``NUMBER`` counts the shards in the order of ``manifest.json``, which is beside them; a file holds the
    bytes of one shard, row-major. Only the blocks that a range touches are read, and each is checked.

    Args:
        root: folder of the store.
    """

    protocol = "tenplex"
    cachable = False

    def __init__(self, root: str, **options: Any) -> None:
        super().__init__(**options)
        self.root = Path(root)

    def _parts(self, path: str) -> list[str]:
        return [part for part in self._strip_protocol(path).split("/") if part]

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        """Entries of a folder.

        Raises:
            FileNotFoundError: there is no such folder or file.
        """
        parts = self._parts(path)
        base = "/".join(parts)
        if len(parts) == 0:
            names = sorted(p.name for p in self.root.iterdir() if p.is_dir())
            entries = [self._folder(name) for name in names]
        elif len(parts) == 1:
            entries = [self._folder(f"{base}/{v}") for v in self._store(parts).versions()]
        elif len(parts) == 2:
            ranks = self._store(parts).ranks(self._number(parts[1], path))
            entries = [self._folder(f"{base}/{rank}") for rank in ranks]
        elif len(parts) == 3:
            entries = self._files(parts, base)
        else:
            entries = [e for e in self._files(parts[:3], "/".join(parts[:3])) if e["name"] == base]
        if not entries and parts:
            raise FileNotFoundError(path)
        return entries if detail else [entry["name"] for entry in entries]

    def _files(self, parts: list[str], base: str) -> list[dict[str, Any]]:
        store = self._store(parts)
        version, rank = (self._number(part, base) for part in parts[1:3])
        tensors, shards = self._described(store, version, rank, base)
        sizes = [shard.numel * tensors[shard.key].dtype.itemsize for shard in shards]
        files = [{"name": f"{base}/{n}.bin", "size": size, "type": "file"} for n, size in enumerate(sizes)]
        manifest = json.dumps(store.manifest(version, rank))
        return [{"name": f"{base}/manifest.json", "size": len(manifest), "type": "file"}, *files]

    def _store(self, parts: list[str]) -> TensorStore:
        if not (self.root / parts[0]).is_dir():
            raise FileNotFoundError(f"no host {parts[0]} in {self.root}")
        return TensorStore(self.root, host=parts[0])

    @staticmethod
    def _described(store: TensorStore, version: int, rank: int, path: str) -> Any:
        try:
            return store.shards(version, rank)
        except LookupError as error:
            raise FileNotFoundError(path) from error

    @staticmethod
    def _number(text: str, path: str) -> int:
        if not text.isdigit():
            raise FileNotFoundError(path)
        return int(text)

    @staticmethod
    def _folder(name: str) -> dict[str, Any]:
        return {"name": name, "size": 0, "type": "directory"}

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        """Bytes ``[start, end)`` of a file; negative positions count from its end.

        Raises:
            FileNotFoundError: there is no such file.
            ReplicaCorruptError: a block does not have its checksum.
        """
        parts = self._parts(path)
        if len(parts) != 4:
            raise FileNotFoundError(path)
        store = self._store(parts)
        version, rank = (self._number(part, path) for part in parts[1:3])
        tensors, shards = self._described(store, version, rank, path)
        if parts[3] == "manifest.json":
            return json.dumps(store.manifest(version, rank)).encode()[slice(start, end)]
        number = self._number(parts[3].removesuffix(".bin"), path)
        if number >= len(shards):
            raise FileNotFoundError(path)
        size = shards[number].numel * tensors[shards[number].key].dtype.itemsize
        low, high, _step = slice(start, end).indices(size)
        return store.read_bytes(version, rank, shards[number], low, max(low, high))

    def _open(self, path: str, mode: str = "rb", **_: Any) -> io.BytesIO:
        if mode != "rb":
            raise ValueError(f"tenplex:// is read-only, got mode {mode!r}")
        return io.BytesIO(self.cat_file(path))
