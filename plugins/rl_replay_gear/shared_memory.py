"""Rows that several processes of a host map: an anonymous file in memory, named by its descriptor."""

from __future__ import annotations

import mmap
import os

import torch
from torch import Tensor


class SharedRows:
    """``nbytes`` of memory behind a descriptor; it goes when the last process that maps it does.

    Args:
        nbytes: Size.
        descriptor: Map this one (of another process: ``/proc/PID/fd/FD`` opened) instead of creating memory.
        pinned: Register it with CUDA, so that kernels read it in place.
    """

    def __init__(self, nbytes: int, *, descriptor: int | None = None, pinned: bool = False) -> None:
        self.fd = os.memfd_create("rl_replay_gear") if descriptor is None else os.dup(descriptor)
        if descriptor is None:
            os.ftruncate(self.fd, nbytes)
        self._buffer = torch.frombuffer(mmap.mmap(self.fd, nbytes), dtype=torch.int64)
        self._used = 0
        if pinned:
            error = torch.cuda.cudart().cudaHostRegister(self._buffer.data_ptr(), nbytes, 0)
            if int(error):
                raise MemoryError(
                    f"cannot pin {nbytes / 2**30:.1f} GiB of shared memory (CUDA error {error})"
                )

    def take(self, rows: int, words: int) -> Tensor:
        """The next int64 [rows, words], page-aligned; the order of calls is the same in every process."""
        begin = self._used
        self._used = -(-(begin + rows * words) // 512) * 512
        return self._buffer[begin : begin + rows * words].view(rows, words)

    @staticmethod
    def size(rows: int, widths: list[int]) -> int:
        """Bytes that hold ``rows`` of each of ``widths`` words."""
        return sum(-(-rows * words // 512) * 512 * 8 for words in widths)

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)
