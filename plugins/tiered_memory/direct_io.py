"""Reads of large files past the page cache, or from it where it already holds the bytes."""

from __future__ import annotations

import errno
import mmap
import os
import warnings
from pathlib import Path
from types import TracebackType
from typing import Literal

import torch
from torch import Tensor

from tiered_memory.host_memory import PAGE

_BOUNCE = 4 << 20
_NOT_RESIDENT = (errno.EAGAIN, errno.EOPNOTSUPP, errno.ENOTSUP)
_warned_devices: set[int] = set()


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

    def read_into(self, out: Tensor, offset: int) -> None:
        """Fill ``out`` with the ``out.nbytes`` bytes of the file from ``offset``.

        Any offset, length and address will do. Parts aligned to 4096 bytes in the file and in memory alike
        are read in place; the rest goes through a bounce buffer when read past the page cache.

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
        view = out.detach().view(-1).view(torch.uint8).numpy().data
        if offset < 0 or offset + len(view) > self.nbytes:
            found = max(0, min(self.nbytes - offset, len(view)))
            raise OSError(f"{self.path}: expected {len(view)} bytes at {offset}, found {found}")
        address = out.data_ptr()
        done = self._read_resident(view, offset) if self._probe else 0
        if self._direct and done < len(view):
            done = self._read_direct(view, offset, done, (address - offset) % PAGE == 0)
        while done < len(view):
            done += self._read_once(self._fd, view[done:], offset + done, len(view) - done)

    def _read_resident(self, view: memoryview, offset: int) -> int:
        """Read what the page cache holds from ``offset`` on without waiting; returns the bytes read."""
        done = 0
        # One page first: asking for more would make the kernel read ahead what is not there.
        for end in (min(PAGE, len(view)), len(view)):
            while done < end:
                try:
                    count = os.preadv(self._fd, [view[done:end]], offset + done, os.RWF_NOWAIT)
                except OSError as error:
                    if error.errno in _NOT_RESIDENT:
                        return done
                    raise self._failed(error, offset + done) from error
                if count == 0:
                    return done
                done += count
        return done

    def _read_direct(self, view: memoryview, offset: int, done: int, congruent: bool) -> int:
        """Read past the page cache; returns the position reached, short of the end if O_DIRECT is refused."""
        bounce: mmap.mmap | None = None
        end = len(view)
        while done < end and self._direct:
            position = offset + done
            lead = position % PAGE
            whole = (end - done) // PAGE * PAGE
            try:
                if congruent and lead == 0 and whole:
                    done += self._read_once(self._direct_fd, view[done : done + whole], position, end - done)
                    continue
                bounce = bounce or mmap.mmap(-1, min(_BOUNCE, -(-(end - done + lead) // PAGE) * PAGE + PAGE))
                # Only as far as the next place from which reading in place is possible.
                wanted = min(PAGE if congruent else len(bounce), lead + end - done)
                block = memoryview(bounce)[: -(-wanted // PAGE) * PAGE]
                try:
                    count = self._read_once(self._direct_fd, block, position - lead, end - done)
                    usable = min(count - lead, end - done)
                    if usable <= 0:
                        raise OSError(f"{self.path}: expected {end - done} bytes at {position}, found 0")
                    view[done : done + usable] = block[lead : lead + usable]
                finally:
                    block.release()
                done += usable
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._refused()
        return done

    def _read_once(self, fd: int, view: memoryview, offset: int, needed: int) -> int:
        try:
            count = os.preadv(fd, [view], offset)
        except OSError as error:
            raise self._failed(error, offset) from error
        if count == 0:
            raise OSError(f"{self.path}: expected {needed} bytes at {offset}, found 0")
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
