"""What the operating system says about host memory (Linux), and population of pages."""

from __future__ import annotations

import ctypes
import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

PAGE = 4096
GIB = 1 << 30
_MADV_POPULATE_WRITE = 23  # Linux 5.14; not yet in the mmap module
_CGROUP = Path("/sys/fs/cgroup")


def gib(nbytes: float) -> str:
    """``nbytes`` in GiB with one digit, as all messages print sizes."""
    return f"{nbytes / GIB:.1f} GiB"


def available_bytes() -> int:
    """Bytes this process could still allocate: the kernel's estimate, cut by the memory cgroup's limit."""
    available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        if limit != "max":
            used = int((_CGROUP / "memory.current").read_text())
            available = min(available, max(0, int(limit) - used))
    except (OSError, ValueError):
        pass
    return available


def locked_memory_limit() -> str:
    """The limit on locked memory (RLIMIT_MEMLOCK) as text."""
    try:
        import resource
    except ImportError:
        return "unknown"
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return "none" if soft == resource.RLIM_INFINITY else gib(soft)


def absent_bytes(address: int, nbytes: int) -> int:
    """Bytes of the page-aligned range that have no physical page yet (mincore); all of them if unknown."""
    pages = -(-nbytes // PAGE)
    present = (ctypes.c_ubyte * pages)()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), present) != 0:
        return nbytes
    # Only the lowest bit of each byte is defined.
    return int(pages - (np.ctypeslib.as_array(present) & 1).sum(dtype=np.int64)) * PAGE


def populate(address: int, nbytes: int, threads: int) -> None:
    """Give every page of the page-aligned range memory, in parallel, without changing what it holds.

    Registration would otherwise fault the pages in one by one on a single thread. Kernels without
    MADV_POPULATE_WRITE leave the work to the registration.

    Raises:
        MemoryError: the kernel has no page left.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    step = -(-nbytes // (threads * PAGE)) * PAGE

    def touch(start: int) -> int:
        length = min(step, nbytes - start)
        if libc.madvise(
            ctypes.c_void_p(address + start), ctypes.c_size_t(length), ctypes.c_int(_MADV_POPULATE_WRITE)
        ):
            return ctypes.get_errno()
        return 0

    with ThreadPoolExecutor(threads) as pool:
        codes = set(pool.map(touch, range(0, nbytes, step)))
    if codes & {errno.ENOMEM, errno.EFAULT}:
        raise MemoryError(f"cannot populate {gib(nbytes)}: free memory {gib(available_bytes())}")
