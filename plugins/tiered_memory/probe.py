"""Measured bandwidth of the links between memory tiers, so that plans and limits rest on this machine."""

from __future__ import annotations

import mmap
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from tiered_memory.arena import PinnedArena
from tiered_memory.host_memory import available_bytes

_DISK_BLOCK = 16 << 20
_LINKS = (
    "host_read",
    "host_copy",
    "host_to_device",
    "device_to_host",
    "pageable_to_device",
    "device_read",
    "device_copy",
    "peer_copy",
    "disk_read",
)
_HOST_BUFFERS = {
    "host_read": 1,
    "host_copy": 2,
    "host_to_device": 1,
    "device_to_host": 1,
    "pageable_to_device": 1,
}


@dataclass(frozen=True)
class Bandwidth:
    """One measured link.

    Attributes:
        link: its name, as given to :func:`measure_bandwidth`.
        bytes_per_s: median of ``samples``.
        samples: bytes per second of each repetition; a copy's bytes are counted once.
        nbytes: bytes moved in each repetition.
    """

    link: str
    bytes_per_s: float
    samples: tuple[float, ...]
    nbytes: int


def measure_bandwidth(
    link: str,
    *,
    nbytes: int = 1 << 30,
    seconds: float = 0.5,
    device: int = 0,
    peer: int | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Bandwidth:
    """Measure one link.

    Args:
        link: ``"host_read"``, ``"host_copy"``, ``"host_to_device"``, ``"device_to_host"`` (both pinned),
            ``"pageable_to_device"``, ``"device_read"``, ``"device_copy"``, ``"peer_copy"`` (from ``peer`` to
            ``device``) or ``"disk_read"`` (O_DIRECT, a temporary file in the folder ``path``).
        nbytes: bytes moved in each repetition; for the disk rounded down to 16 MiB blocks, at least one.
        seconds: time spent on repetitions after one to warm up; at least three are made.
        device: CUDA device number.
        peer: the other device of ``"peer_copy"``.
        path: folder of ``"disk_read"``.

    Raises:
        ValueError: unknown link, or ``peer`` or ``path`` is missing.
        RuntimeError: the device does not exist.
        MemoryError, OSError: memory or disk is short (with needed and free bytes), or the file system has no
            O_DIRECT: a rate of the page cache is never reported as the disk's.
    """
    if link not in _LINKS:
        raise ValueError(f"bandwidth: link must be one of {', '.join(_LINKS)}; got {link!r}")
    if link == "disk_read":
        if path is None:
            raise ValueError("bandwidth: disk_read needs path, a folder on the disk to measure")
        return _disk_read(Path(path), max(nbytes // _DISK_BLOCK, 1) * _DISK_BLOCK, seconds)
    if link == "peer_copy" and peer is None:
        raise ValueError("bandwidth: peer_copy needs peer, the device to copy from")
    needed, free = _HOST_BUFFERS.get(link, 0) * nbytes, available_bytes()
    if needed > free:
        raise MemoryError(f"bandwidth: {link} needs {needed} bytes of host memory, {free} are free")
    if link.startswith("host_") and link != "host_to_device":
        return _repeat(link, _host_step(link, nbytes), time.perf_counter, nbytes, seconds)
    for number in (device, peer or 0):
        if number >= torch.cuda.device_count():
            raise RuntimeError(
                f"bandwidth: {link}: no CUDA device {number}, found {torch.cuda.device_count()}"
            )
    with torch.cuda.device(device):
        step = _device_step(link, nbytes, device, peer)

        def now() -> float:
            torch.cuda.synchronize(device)
            return time.perf_counter()

        return _repeat(link, step, now, nbytes, seconds)


def _host_step(link: str, nbytes: int) -> Callable[[], object]:
    # Written once, so that every page is there before the first repetition.
    source = torch.ones(nbytes // 4, dtype=torch.float32)
    if link == "host_read":
        return source.sum
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


def _device_step(link: str, nbytes: int, device: int, peer: int | None) -> Callable[[], object]:
    there = torch.ones(nbytes // 4, dtype=torch.float32, device=f"cuda:{device}")
    if link == "device_read":
        return there.sum
    if link == "device_copy":
        other = torch.empty_like(there)
        return lambda: other.copy_(there)
    if link == "peer_copy":
        remote = torch.ones(nbytes // 4, dtype=torch.float32, device=f"cuda:{peer}")
        torch.cuda.synchronize(peer)
        return lambda: there.copy_(remote)
    arena = PinnedArena(nbytes // 4 * 4, pinned=link != "pageable_to_device")
    host = arena.empty((nbytes // 4,), torch.float32)
    host.fill_(1)
    if link == "device_to_host":
        return lambda: host.copy_(there, non_blocking=True)
    return lambda: there.copy_(host, non_blocking=True)


def _repeat(
    link: str, step: Callable[[], object], now: Callable[[], float], nbytes: int, seconds: float
) -> Bandwidth:
    step()
    samples: list[float] = []
    start = now()
    end = start + seconds
    while len(samples) < 3 or start < end:
        step()
        stop = now()
        samples.append(nbytes / (stop - start))
        start = stop
    return Bandwidth(link, statistics.median(samples), tuple(samples), nbytes)


def _disk_read(folder: Path, nbytes: int, seconds: float) -> Bandwidth:
    free = shutil.disk_usage(folder).free
    if nbytes > free:
        raise OSError(f"bandwidth: disk_read needs {nbytes} bytes in {folder}, {free} are free")
    block = mmap.mmap(-1, _DISK_BLOCK)  # page-aligned, as O_DIRECT demands
    block.write(os.urandom(_DISK_BLOCK))
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".bandwidth-") as file:
        for _ in range(nbytes // _DISK_BLOCK):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        try:
            descriptor = os.open(file.name, os.O_RDONLY | os.O_DIRECT)
        except OSError as error:
            raise OSError(f"bandwidth: the file system of {folder} has no O_DIRECT: {error}") from error
        try:

            def read_all() -> None:
                for offset in range(0, nbytes, _DISK_BLOCK):
                    if os.preadv(descriptor, [block], offset) != _DISK_BLOCK:
                        raise OSError(f"bandwidth: short read at {offset} of {file.name}")

            return _repeat("disk_read", read_all, time.perf_counter, nbytes, seconds)
        finally:
            os.close(descriptor)
