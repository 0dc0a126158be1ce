"""Reads of large files past the page cache, or from it where it already holds the bytes."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from tiered_memory.arena import PinnedArena
from tiered_memory.host_memory import PAGE

_BOUNCE = 4 << 20
_HUGE_PAGE = 2 << 20
_UPDATE = 512 << 10  # stretches that a core's cache still holds when they are hashed
_NOT_RESIDENT = (errno.EAGAIN, errno.EOPNOTSUPP, errno.ENOTSUP)
_warned_devices: set[int] = set()
Bytes = np.ndarray


class _BounceBuffers:
    """Aligned buffers for reads past the page cache, kept while any reader is open.

    They lie in huge pages where the system has them: a disk then gets a few large requests instead of one
    for every few pages, which doubles its throughput on some machines.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[Bytes] = []
        self._readers = 0

    def reader_opened(self) -> None:
        """Count a reader."""
        with self._lock:
            self._readers += 1

    def reader_closed(self) -> None:
        """Count a reader no more; the last one frees the buffers."""
        with self._lock:
            self._readers -= 1
            if not self._readers:
                self._idle.clear()

    @contextlib.contextmanager
    def one(self) -> Iterator[Bytes]:
        """A buffer of ``_BOUNCE`` bytes for this thread."""
        with self._lock:
            buffer = self._idle.pop() if self._idle else None
        if buffer is None:
            arena = PinnedArena(_BOUNCE + _HUGE_PAGE, pinned=False)
            buffer = arena.empty(_BOUNCE, align=_HUGE_PAGE).numpy()
        try:
            yield buffer
        finally:
            with self._lock:
                if self._readers:
                    self._idle.append(buffer)


_bounce_buffers = _BounceBuffers()


class DirectReader:
    """Reads one file; thread-safe, so threads belong to the caller. Context manager.

    Args:
        path: the file.
        mode: ``"auto"``: from the page cache where it holds the bytes (probed at each read), else past it
            (O_DIRECT). ``"always"``: past it. ``"never"``: ordinary reads. Where the file system refuses
            O_DIRECT (EINVAL), reads are ordinary from then on, with one RuntimeWarning for each process and
            file system.

    Attributes:
        path: the file.
        nbytes: its length when it was opened.

    Raises:
        ValueError: unknown ``mode``.
        OSError: the file cannot be opened.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, mode: Literal["auto", "always", "never"] = "auto"
    ) -> None:
        if mode not in ("auto", "always", "never"):
            raise ValueError(f"direct reader: mode must be 'auto', 'always' or 'never', got {mode!r}")
        self.path = Path(path)
        self._probe = mode == "auto"
        self._direct_fd = -1
        self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        _bounce_buffers.reader_opened()
        try:
            status = os.fstat(self._fd)
            self.nbytes = status.st_size
            self._device = status.st_dev
            self._direct = mode != "never"
            if self._direct:
                try:
                    self._direct_fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
                except OSError as error:
                    if error.errno != errno.EINVAL:
                        raise
                    self._refused()
        except BaseException:
            self.close()
            raise

    @property
    def direct(self) -> bool:
        """Whether bytes that the page cache does not hold are read past it."""
        return self._direct

    def read_into(self, out: Tensor, offset: int, update: Callable[[memoryview], None] | None = None) -> None:
        """Fill ``out`` with the ``out.nbytes`` bytes of the file from ``offset``.

        Any offset, length and address will do. Parts aligned to 4096 bytes in the file and in memory alike
        are read in place; the rest goes through a bounce buffer when read past the page cache.

        Args:
            out: contiguous CPU tensor.
            offset: first byte in the file.
            update: gets every stretch of bytes in order, right after it was read, such as
                the ``update`` of a hash: cheaper then than in a pass of its own.

        Raises:
            ValueError: ``out`` is not a contiguous CPU tensor, or the reader is closed.
            OSError: the file ends early (``FILE: expected 4096 bytes at 8192, found 100``), or a read fails;
                what ``out`` holds is undefined then.
        """
        if out.device.type != "cpu" or not out.is_contiguous():
            raise ValueError(
                f"direct reader: out must be a contiguous CPU tensor, got {out.device} {out.shape}"
            )
        if self._fd < 0:
            raise ValueError(f"direct reader: {self.path} is closed")
        if out.nbytes == 0:
            return
        view = out.detach().view(-1).view(torch.uint8).numpy()
        if offset < 0 or offset + len(view) > self.nbytes:
            found = max(0, min(self.nbytes - offset, len(view)))
            raise OSError(f"{self.path}: expected {len(view)} bytes at {offset}, found {found}")
        done = self._read_resident(view, offset, update) if self._probe else 0
        if self._direct and done < len(view):
            done = self._read_direct(view, offset, done, update)
        while done < len(view):
            part = view[done:] if update is None else view[done : done + _UPDATE]
            done += self._read_once(self._fd, part, offset + done, len(view) - done, update)

    def _read_resident(self, view: Bytes, offset: int, update: Callable[[memoryview], None] | None) -> int:
        """Read what the page cache holds from ``offset`` on without waiting; returns the bytes read."""
        done = 0
        step = len(view) if update is None else _UPDATE
        while done < len(view):
            # One page first: asking for more would make the kernel read ahead what is not there.
            part = view[done : done + step] if done else view[:PAGE]
            try:
                count = os.preadv(self._fd, [part.data], offset + done, os.RWF_NOWAIT)
            except OSError as error:
                if error.errno in _NOT_RESIDENT:
                    return done
                raise self._failed(error, offset + done) from error
            if count == 0:
                return done
            if update is not None:
                update(part[:count].data)
            done += count
        return done

    def _read_direct(
        self, view: Bytes, offset: int, done: int, update: Callable[[memoryview], None] | None
    ) -> int:
        """Read past the page cache; returns the position reached, short of the end if O_DIRECT is refused."""
        congruent = (view.ctypes.data - offset) % PAGE == 0
        with contextlib.ExitStack() as stack:
            bounce: Bytes | None = None
            while done < len(view) and self._direct:
                position, needed = offset + done, len(view) - done
                lead, whole = position % PAGE, needed // PAGE * PAGE
                try:
                    if congruent and lead == 0 and whole:
                        part = view[done : done + whole]
                        done += self._read_once(self._direct_fd, part, position, needed, update)
                        continue
                    if bounce is None:
                        bounce = stack.enter_context(_bounce_buffers.one())
                    # Only as far as the next place from which reading in place is possible.
                    wanted = min(PAGE if congruent else len(bounce), lead + needed)
                    block = bounce[: -(-wanted // PAGE) * PAGE]
                    count = self._read_once(self._direct_fd, block, position - lead, needed)
                except OSError as error:
                    if error.errno != errno.EINVAL:
                        raise
                    self._refused()
                    continue
                usable = min(count - lead, needed)
                if usable <= 0:
                    raise OSError(f"{self.path}: expected {needed} bytes at {position}, found 0")
                view[done : done + usable] = block[lead : lead + usable]
                if update is not None:
                    update(view[done : done + usable].data)
                done += usable
        return done

    def _read_once(
        self,
        fd: int,
        view: Bytes,
        offset: int,
        needed: int,
        update: Callable[[memoryview], None] | None = None,
    ) -> int:
        try:
            count = os.preadv(fd, [view.data], offset)
        except OSError as error:
            raise self._failed(error, offset) from error
        if count == 0:
            raise OSError(f"{self.path}: expected {needed} bytes at {offset}, found 0")
        if update is not None:
            update(view[:count].data)
        return count

    def _failed(self, error: OSError, offset: int) -> OSError:
        return OSError(error.errno, f"{error.strerror} (read at byte {offset})", str(self.path))

    def _refused(self) -> None:
        self._direct = False
        if self._device in _warned_devices:
            return
        _warned_devices.add(self._device)
        warnings.warn(
            f"{self.path}: its file system (device {os.major(self._device)}:{os.minor(self._device)}) "
            "refuses O_DIRECT; reading through the page cache",
            RuntimeWarning,
            stacklevel=3,
        )

    def close(self) -> None:
        """Close the descriptors. Idempotent; no read may be under way."""
        if self._fd >= 0:
            _bounce_buffers.reader_closed()
        for name in ("_fd", "_direct_fd"):
            fd = getattr(self, name)
            setattr(self, name, -1)
            if fd >= 0:
                os.close(fd)

    def __enter__(self) -> DirectReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
