"""Adapters in host memory, as folders that any loader of adapters can open.

An adapter's folder holds its small files, and for each safetensors file a link to memory without a name,
which is gone when its owner is. Once an adapter has to leave, its links point to the original files instead,
so that a path given to an engine stays good.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tiered_memory import DirectReader, PinnedArena
from vllm_serverless_loader.loading.options import LoadOptions

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_SMALL_FILE = 1 << 20


@dataclass
class _Adapter:
    folder: Path
    fingerprint: tuple
    arenas: dict[Path, PinnedArena] = field(default_factory=dict)  # by original file

    @property
    def num_bytes(self) -> int:
        return sum(arena.nbytes for arena in self.arenas.values())


class AdapterCache:
    """Least recently used adapters leave. Thread-safe; context manager.

    Args:
        root: folder for the adapters' folders, made if need be; must outlive the paths given out.
        capacity_bytes: of weights in memory.
        options: how files are read.

    Raises:
        ValueError: a capacity below 1.
    """

    def __init__(
        self, root: str | os.PathLike[str], capacity_bytes: int, *, options: LoadOptions | None = None
    ) -> None:
        if capacity_bytes < 1:
            raise ValueError(f"adapters: capacity_bytes must be at least 1, got {capacity_bytes}")
        self.root = Path(root)
        self.capacity_bytes = int(capacity_bytes)
        self._options = options or LoadOptions()
        self._adapters: OrderedDict[str, _Adapter] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def adapters(self) -> tuple[str, ...]:
        """Real paths of the adapters in memory, least recently used first."""
        with self._lock:
            return tuple(self._adapters)

    @property
    def used_bytes(self) -> int:
        """Bytes of weights in memory."""
        with self._lock:
            return sum(adapter.num_bytes for adapter in self._adapters.values())

    def get(self, path: str | os.PathLike[str]) -> Path:
        """Folder of an adapter, read into memory if it is not there or has changed on disk.

        Raises:
            FileNotFoundError: no ``adapter_config.json``, or no ``adapter_model.safetensors``: adapters in
                pickled files are not read.
            MemoryError: larger than the cache.
            OSError: a file cannot be read.
        """
        real = Path(os.path.realpath(path))
        for name in (CONFIG, WEIGHTS):
            if not (real / name).is_file():
                raise FileNotFoundError(
                    f"no adapter in {real}: {name} is missing; save it as PEFT does by default"
                )
        with self._lock:
            known = self._adapters.get(str(real))
            if known is not None and known.fingerprint == _fingerprint(real):
                self._adapters.move_to_end(str(real))
                return known.folder
            if known is not None:
                self._drop(str(real))
            return self._fill(real).folder

    def close(self) -> None:
        """Let go of the memory; the folders stay and point to the original files. Idempotent."""
        with self._lock:
            for name in list(self._adapters):
                self._drop(name)

    def _fill(self, real: Path) -> _Adapter:
        files = [file for file in sorted(real.iterdir()) if file.is_file()]
        weights = [file for file in files if file.suffix == ".safetensors"]
        needed = sum(file.stat().st_size for file in weights)
        if needed > self.capacity_bytes:
            raise MemoryError(f"adapters: {real} has {needed} bytes, the cache {self.capacity_bytes}")
        while sum(one.num_bytes for one in self._adapters.values()) + needed > self.capacity_bytes:
            self._drop(next(iter(self._adapters)))
        folder = self.root / hashlib.sha256(str(real).encode()).hexdigest()[:32]
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        adapter = _Adapter(folder, _fingerprint(real))
        try:
            for file in files:
                if file in weights:
                    adapter.arenas[file] = self._read(file)
                elif file.stat().st_size <= _SMALL_FILE:
                    shutil.copyfile(file, folder / file.name)
            for file, arena in adapter.arenas.items():
                _link(folder / file.name, f"/proc/{os.getpid()}/fd/{arena.fd}")
        except BaseException:
            for arena in adapter.arenas.values():
                arena.close()
            raise
        self._adapters[str(real)] = adapter
        return adapter

    def _read(self, file: Path) -> PinnedArena:
        """A file's bytes in memory that others can open."""
        arena = PinnedArena(max(1, file.stat().st_size), pinned=False, shared=True)
        step = self._options.chunk_bytes
        try:
            with (
                DirectReader(file, mode=self._options.direct_io) as reader,
                ThreadPoolExecutor(self._options.io_threads, "serverless-loader") as pool,
            ):
                starts = range(0, reader.nbytes, step)
                parts = [arena.buffer[start : min(start + step, reader.nbytes)] for start in starts]
                list(pool.map(reader.read_into, parts, starts))
        except BaseException:
            arena.close()
            raise
        return arena

    def _drop(self, name: str) -> None:
        adapter = self._adapters.pop(name)
        for file, arena in adapter.arenas.items():
            if adapter.folder.is_dir():
                _link(adapter.folder / file.name, file)
            arena.close()

    def __enter__(self) -> AdapterCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _fingerprint(folder: Path) -> tuple:
    stats = [(file.name, file.stat()) for file in sorted(folder.iterdir()) if file.is_file()]
    return tuple((name, stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in stats)


def _link(place: Path, target: str | Path) -> None:
    """Make ``place`` a link to ``target``, at once for everybody who opens it."""
    partial = place.with_name(place.name + ".partial")
    partial.unlink(missing_ok=True)
    partial.symlink_to(target)
    partial.replace(place)
