"""Tables on disk: a folder of a manifest and raw files, checksummed, replaced atomically, without pickle."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rl_replay_gear.allocator import ExtentAllocator
from rl_replay_gear.index import SlotIndex
from rl_replay_gear.selectors import Selector
from rl_replay_gear.spec import TableSpec
from rl_replay_gear.table import Memory, TrajectoryTable

FORMAT = "rl_replay_gear table 1"
MANIFEST = "manifest.json"
_CHUNK_ROWS = 1 << 16


def save_table(table: TrajectoryTable, path: str | os.PathLike[str]) -> None:
    """Write the live trajectories and everything a resumed run needs to the folder ``path``.

    New files are written and synced beside those of an earlier save, then the manifest is replaced in one
    step and only then are the old files deleted: a save that is killed leaves the earlier one whole.

    Raises:
        OSError: e.g. disk full; the earlier save is still whole.
        ValueError: ``path`` is a folder that holds something else.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    manifest_path = folder / MANIFEST
    if not manifest_path.exists() and any(not _is_ours(item.name) for item in folder.iterdir()):
        raise ValueError(f"{folder} holds files of something else; choose an empty folder")
    tag = secrets.token_hex(4)
    with table.lock:
        index_state = table.index.state()
        files: dict[str, dict[str, Any]] = {}
        try:
            for number, words in enumerate(table.storage):
                name = f"rows-{number}-{tag}.bin"
                with _writing(folder / name) as write:
                    for start, rows in _extents(table, index_state):
                        for begin in range(start, start + rows, _CHUNK_ROWS):
                            stop = min(begin + _CHUNK_ROWS, start + rows)
                            write(words[begin:stop].contiguous().cpu().numpy().tobytes())
                    files[name] = write.summary()
            for key, array in index_state.items():
                name = f"index-{key}-{tag}.bin"
                with _writing(folder / name) as write:
                    write(np.ascontiguousarray(array).tobytes())
                    files[name] = {**write.summary(), "dtype": str(array.dtype)}
            manifest = {
                "format": FORMAT,
                "spec": json.loads(table.spec.to_json()),
                "fingerprint": table.spec.fingerprint(),
                "shard": table.index.shard,
                "max_times_sampled": table.max_times_sampled,
                "evictions": table.evictions,
                "stale_dropped": table.stale_dropped,
                "allocator": table.allocator.state(),
                "retired": table.retired_handles(),
                "tag": tag,
                "files": files,
            }
            temporary = folder / f"{MANIFEST}-{tag}.tmp"
            with _writing(temporary) as write:
                write(json.dumps(manifest, indent=1).encode())
            os.replace(temporary, manifest_path)
        except BaseException:
            for item in folder.glob(f"*-{tag}.*"):
                item.unlink()
            raise
    _sync_folder(folder)
    for item in folder.iterdir():
        if _is_ours(item.name) and item.name != MANIFEST and item.name not in files:
            item.unlink()


def load_table(
    path: str | os.PathLike[str],
    *,
    memory: Memory = "auto",
    remover: Selector | None = None,
    mmap: bool = False,
) -> TrajectoryTable:
    """Read a table that ``save_table`` wrote; its handles stay valid.

    Args:
        path: The folder.
        memory: As in ``TrajectoryTable``.
        remover: As in ``TrajectoryTable``; it is not part of a saved table.
        mmap: Map the rows instead of reading them. The table is then read-only, and checksums of the rows are
            not verified (their sizes are).

    Raises:
        ValueError: a file is missing, foreign, truncated or altered; names it and what was expected.
    """
    folder = Path(path)
    manifest = _read_manifest(folder / MANIFEST)
    spec = TableSpec.from_json(json.dumps(manifest["spec"]))
    if spec.fingerprint() != manifest["fingerprint"]:
        raise ValueError(
            f"{folder / MANIFEST}: schema {spec.fingerprint()} differs from the recorded "
            f"{manifest['fingerprint']} (columns: {', '.join(c.name for c in spec.all_columns)})"
        )
    for name, entry in manifest["files"].items():
        _verify(folder / name, entry, content=not (mmap and name.startswith("rows-")))
    tag = manifest["tag"]
    state = {
        name[len("index-") : -len(f"-{tag}.bin")]: np.frombuffer(
            (folder / name).read_bytes(), np.dtype(entry["dtype"])
        ).copy()
        for name, entry in manifest["files"].items()
        if name.startswith("index-")
    }
    rows = row_files(folder)
    if mmap:
        return _mapped_table(spec, manifest, state, rows, remover)
    table = TrajectoryTable(
        spec,
        memory=memory,
        remover=remover,
        max_times_sampled=manifest["max_times_sampled"],
        shard=manifest["shard"],
    )
    for words, file in zip(table.storage, rows, strict=True):
        with file.open("rb") as stream:
            for start, count in _extents(table, state):
                for begin in range(start, start + count, _CHUNK_ROWS):
                    stop = min(begin + _CHUNK_ROWS, start + count)
                    raw = bytearray(stream.read((stop - begin) * words.shape[1] * 8))
                    words[begin:stop].copy_(torch.frombuffer(raw, dtype=torch.int64).view(stop - begin, -1))
    _adopt(table, manifest, state)
    return table


def row_files(path: str | os.PathLike[str]) -> list[Path]:
    """The files of a saved table that hold its row groups, in the table's order."""
    folder = Path(path)
    return [folder / name for name in _read_manifest(folder / MANIFEST)["files"] if name.startswith("rows-")]


def _adopt(table: TrajectoryTable, manifest: dict[str, Any], state: dict[str, np.ndarray]) -> None:
    table.restore(
        SlotIndex.restore(table.spec.max_trajectories, manifest["shard"], state),
        ExtentAllocator.restore(
            table.spec.num_rows, _extents(table, state), manifest["allocator"], ring=table.allocator.ring
        ),
        retired=manifest["retired"],
        evictions=manifest["evictions"],
        stale_dropped=manifest["stale_dropped"],
    )


def _mapped_table(
    spec: TableSpec,
    manifest: dict[str, Any],
    state: dict[str, np.ndarray],
    rows: list[Path],
    remover: Selector | None,
) -> TrajectoryTable:
    extra = int(spec.has_final)
    lengths = state["length"] + extra
    state = {**state, "start": np.cumsum(lengths) - lengths}  # in the file trajectories lie end to end
    total = int(lengths.sum())
    storage: list[Tensor] = [
        torch.from_file(str(file), shared=False, size=file.stat().st_size // 8, dtype=torch.int64).view(
            total, -1
        )
        for file in rows
    ]
    table = TrajectoryTable(
        spec,
        memory="host",
        remover=remover,
        max_times_sampled=manifest["max_times_sampled"],
        shard=manifest["shard"],
        storage=storage,
    )
    _adopt(table, manifest, state)
    return table


def _extents(table: TrajectoryTable, state: dict[str, np.ndarray]) -> list[tuple[int, int]]:
    extra = int(table.spec.has_final)
    lengths = (state["length"] + extra).tolist()
    return list(zip(state["start"].tolist(), lengths, strict=True))


def _is_ours(name: str) -> bool:
    return name.startswith(("rows-", "index-", MANIFEST))


def _read_manifest(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise ValueError(f"{path} does not exist: {path.parent} holds no saved table")
    try:
        manifest = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        raise ValueError(f"{path}: expected the format {FORMAT!r}, found {found!r}")
    return manifest


def _verify(path: Path, entry: dict[str, Any], *, content: bool) -> None:
    found = path.stat().st_size if path.exists() else 0
    if not path.exists() or found != entry["bytes"]:
        raise ValueError(f"{path}: expected {entry['bytes']} bytes, found {found}")
    if content:
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if digest != entry["sha256"]:
            raise ValueError(f"{path}: expected sha256 {entry['sha256']}, found {digest}")


class _HashingWriter:
    """Writes to a file descriptor and remembers size and checksum."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._hash = hashlib.sha256()
        self._bytes = 0

    def __call__(self, data: bytes) -> None:
        self._hash.update(data)
        self._bytes += len(data)
        view = memoryview(data)
        while view:
            view = view[os.write(self._descriptor, view) :]

    def summary(self) -> dict[str, Any]:
        return {"bytes": self._bytes, "sha256": self._hash.hexdigest()}


@contextmanager
def _writing(path: Path) -> Iterator[_HashingWriter]:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        yield _HashingWriter(descriptor)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
