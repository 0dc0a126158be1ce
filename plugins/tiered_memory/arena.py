"""One host allocation, pinned where a GPU can use that, cut into aligned tensors."""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import threading
import warnings
from collections.abc import Sequence
from types import TracebackType

import torch
from torch import Tensor

from tiered_memory.host_memory import (
    PAGE,
    absent_bytes,
    available_bytes,
    gib,
    locked_memory_limit,
    populate,
)

_PORTABLE_AND_MAPPED = 3  # cudaHostRegisterPortable | cudaHostRegisterMapped: every GPU may address it
_HUGE_PAGE = 2 << 20


class _Mapping(mmap.mmap):
    """Memory that is unregistered from CUDA before it is unmapped.

    Tensors made from it hold a reference, so it goes with the last of them.
    """

    registered_at: int = 0

    def __del__(self) -> None:
        if self.registered_at:
            torch.cuda.cudart().cudaHostUnregister(self.registered_at)


def _shared_memory(nbytes: int) -> int:
    """Descriptor of ``nbytes`` of memory that other processes may map."""
    if nbytes % _HUGE_PAGE == 0 and hasattr(os, "MFD_HUGETLB"):
        fd = os.memfd_create("tiered_memory", os.MFD_CLOEXEC | os.MFD_HUGETLB)
        try:
            os.ftruncate(fd, nbytes)
            # Mapping reserves the pages, or fails: a later touch cannot run out of them.
            _Mapping(fd, nbytes).close()
            return fd
        except OSError:
            os.close(fd)
    fd = os.memfd_create("tiered_memory", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, nbytes)
    except BaseException:
        os.close(fd)
        raise
    return fd


class PinnedArena:
    """``nbytes`` of host memory, handed out front to back by :meth:`empty` and freed as a whole.

    Reuse of the pieces is their owner's business. Use as a context manager or call :meth:`close`.

    Args:
        nbytes: size; nothing rounds it up to a power of two.
        pinned: ``True``: page-locked or MemoryError. ``None``: page-locked where there is a CUDA device
            and the memory allows, else pageable (with one RuntimeWarning if there is a device).
            ``False``: pageable; :meth:`pin` may follow.
        shared: other processes may attach by the descriptor :attr:`fd`. The memory has no name in the file
            system, so none stays behind when processes are killed; huge pages are used where ``nbytes`` is a
            multiple of them and the system has some reserved.
        threads: threads that populate the pages before they are registered.

    Attributes:
        nbytes: size of the arena.
        buffer: uint8 ``[nbytes]``, all of it.
        fd: descriptor of a shared arena, owned by it; None otherwise and after :meth:`close`.

    Raises:
        ValueError: ``nbytes`` or ``threads`` below 1.
        RuntimeError: ``pinned=True`` without a CUDA device.
        MemoryError: the memory is not there, or ``pinned=True`` and it cannot be page-locked.
    """

    def __init__(
        self, nbytes: int, *, pinned: bool | None = None, shared: bool = False, threads: int = 4
    ) -> None:
        if nbytes < 1 or threads < 1:
            raise ValueError(f"arena: nbytes and threads must be at least 1, got {nbytes} and {threads}")
        try:
            fd = _shared_memory(int(nbytes)) if shared else None
            if fd is None:
                # A private mapping: shared anonymous memory gets no transparent huge pages on most systems.
                mapping = _Mapping(-1, int(nbytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            else:
                mapping = _Mapping(fd, int(nbytes))
        except (OSError, OverflowError) as error:
            raise MemoryError(
                f"arena: cannot map {gib(int(nbytes))}, free memory {gib(available_bytes())}"
            ) from error
        self._open(mapping, int(nbytes), fd, pinned=pinned, threads=threads)

    @classmethod
    def attach(cls, fd: int, *, pinned: bool | None = None) -> PinnedArena:
        """Another process's shared arena: the same bytes, all of them free to :meth:`empty` here.

        Args:
            fd: a descriptor of it in this process (inherited, or received over a socket); duplicated.
            pinned: as for the constructor; every process registers the memory for its own GPU context.

        Raises:
            OSError: ``fd`` is not an open descriptor of shared memory.
        """
        own = os.dup(fd)
        try:
            nbytes = os.fstat(own).st_size
            if nbytes < 1:
                raise OSError(f"arena: descriptor {fd} holds no shared memory")
            mapping = _Mapping(own, nbytes)
        except BaseException:
            os.close(own)
            raise
        arena = cls.__new__(cls)
        arena._open(mapping, nbytes, own, pinned=pinned, threads=4)
        return arena

    def _open(
        self, mapping: _Mapping, nbytes: int, fd: int | None, *, pinned: bool | None, threads: int
    ) -> None:
        self.nbytes = nbytes
        self.fd = fd
        self._threads = threads
        self._lock = threading.Lock()
        self._used = 0
        if self.nbytes >= _HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
            # A kernel without transparent huge pages refuses: slower to pin, otherwise the same.
            with contextlib.suppress(OSError):
                mapping.madvise(mmap.MADV_HUGEPAGE)
        self._mapping: _Mapping | None = mapping
        self.buffer = torch.frombuffer(mapping, dtype=torch.uint8)
        if pinned or (pinned is None and torch.cuda.is_available()):
            try:
                self.pin()
            except RuntimeError:
                self.close()
                raise
            except MemoryError as error:
                if pinned:
                    self.close()
                    raise
                warnings.warn(f"{error}; the arena is pageable", RuntimeWarning, stacklevel=2)

    @property
    def free_bytes(self) -> int:
        """Bytes that :meth:`empty` has not handed out yet."""
        return self.nbytes - self._used

    @property
    def pinned(self) -> bool:
        """Whether the memory is page-locked, so that copies from it overlap with other work."""
        return self._mapping is not None and self._mapping.registered_at != 0

    def empty(
        self, shape: int | Sequence[int], dtype: torch.dtype = torch.uint8, *, align: int = PAGE
    ) -> Tensor:
        """Cut the next tensor from the front of what is left.

        Args:
            shape: shape of the tensor.
            dtype: its element type.
            align: power of two; the tensor's address is a multiple of it.

        Returns:
            An uninitialised, contiguous CPU tensor that shares the arena's memory.

        Raises:
            ValueError: ``align`` is not a power of two, or the arena is closed.
            MemoryError: too little is left; nothing is taken then.
        """
        if align < 1 or align & (align - 1):
            raise ValueError(f"arena: align must be a power of two, got {align}")
        sizes = (shape,) if isinstance(shape, int) else tuple(shape)
        wanted = math.prod(sizes) * dtype.itemsize
        with self._lock:
            buffer = self._open_buffer()
            front = buffer.data_ptr() + self._used
            # A tensor must at least be aligned to its own elements.
            padding = -front % max(align, dtype.itemsize)
            if padding + wanted > self.free_bytes:
                raise MemoryError(
                    f"arena: {gib(wanted)} asked for, {gib(self.free_bytes)} of {gib(self.nbytes)} left"
                )
            start = self._used + padding
            self._used = start + wanted
        return buffer[start : start + wanted].view(dtype).view(sizes)

    def pin(self) -> None:
        """Page-lock the memory: populate its pages with the arena's threads, then register it with CUDA.

        Idempotent; callable from any thread; what the memory holds stays.

        Raises:
            RuntimeError: there is no CUDA device.
            MemoryError: the memory cannot be page-locked; the arena stays usable, pageable.
            ValueError: the arena is closed.
        """
        with self._lock:
            buffer = self._open_buffer()
            assert self._mapping is not None
            if self._mapping.registered_at:
                return
            if not torch.cuda.is_available():
                raise RuntimeError("cannot pin host memory: there is no CUDA device; use pinned=None")
            address = buffer.data_ptr()
            refusal = (
                f"cannot pin {gib(self.nbytes)}: locked-memory limit {locked_memory_limit()}, "
                f"free memory {gib(available_bytes())}"
            )
            # Populating more than there is would not fail but have the process killed.
            if absent_bytes(address, self.nbytes) > available_bytes():
                raise MemoryError(refusal)
            populate(address, self.nbytes, self._threads)
            code = torch.cuda.cudart().cudaHostRegister(address, self.nbytes, _PORTABLE_AND_MAPPED)
            if int(code) != 0:
                raise MemoryError(f"{refusal} (cudaHostRegister: error {int(code)})")
            self._mapping.registered_at = address

    def close(self) -> None:
        """Let go of the memory. It is freed with the last tensor cut from it. Idempotent."""
        with self._lock:
            self._mapping = None
            if self.fd is not None:
                os.close(self.fd)
                self.fd = None
            self.buffer = torch.empty(0, dtype=torch.uint8)

    def _open_buffer(self) -> Tensor:
        if self._mapping is None:
            raise ValueError("arena: already closed")
        return self.buffer

    def __enter__(self) -> PinnedArena:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
