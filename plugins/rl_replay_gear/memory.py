"""Where rows and batches lie: tiers of a table's memory, and batch buffers that are used again."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from rl_replay_gear.spec import RowGroup

Memory = Literal["auto", "host", "pinned", "device"]
WORD = 8  # rows are handled as int64 words
_SMALLEST_POOLED = 1 << 16
_IDLE_BYTES = 1 << 28


def resolve_memory(memory: str) -> str:
    """The tier that ``memory`` means here; ValueError for an unknown one, RuntimeError without a GPU."""
    if memory not in ("auto", "host", "pinned", "device"):
        raise ValueError(f"memory must be 'auto', 'host', 'pinned' or 'device', got {memory!r}")
    if memory == "auto":
        return "pinned" if torch.cuda.is_available() else "host"
    if memory in ("pinned", "device") and not torch.cuda.is_available():
        raise RuntimeError(f"memory={memory!r} needs a CUDA device; use 'host' or 'auto'")
    return memory


def allocate_rows(
    groups: Sequence[RowGroup], rows: int, memory: str, *, shared: bool
) -> tuple[list[Tensor], Any]:
    """One int64 [rows, row_bytes / 8] tensor a group, and the shared arena they lie in, if any."""
    from tiered_memory import PinnedArena

    tiers = [resolve_memory(group.memory or memory) for group in groups]
    widths = [group.row_bytes // WORD for group in groups]
    if not shared or set(tiers) == {"device"}:  # device memory can be mapped as it is
        return [_rows(rows, width, tier) for width, tier in zip(widths, tiers, strict=True)], None
    if "device" in tiers:
        raise ValueError("shared=True needs all columns in device memory or none")
    pinned = None if "pinned" in tiers else False
    arena = PinnedArena(shared_bytes(rows, widths), pinned=pinned, shared=True)
    return [arena.empty((rows, width), torch.int64) for width in widths], arena


def shared_bytes(rows: int, widths: Sequence[int]) -> int:
    """Size of an arena that holds ``rows`` of each of ``widths`` words, page-aligned."""
    return sum(-(-rows * width * WORD // 4096) * 4096 for width in widths)


def _rows(rows: int, width: int, tier: str) -> Tensor:
    from tiered_memory import PinnedArena

    if tier == "device":
        return torch.empty((rows, width), dtype=torch.int64, device="cuda")
    # An arena is mapped in huge pages where there are any: random windows miss the TLB less.
    pinned = None if tier == "pinned" else False
    return PinnedArena(rows * width * WORD, pinned=pinned).empty((rows, width), torch.int64)


class BufferPool:
    """CPU buffers for batches. One is handed out again when the last tensor that lies in it is gone.

    Fresh megabytes cost a page fault every 4 kB, which is more than copying rows into them.
    """

    def __init__(self) -> None:
        self._idle: dict[int, list[np.ndarray]] = {}
        self._idle_bytes = 0

    def empty(self, *shape: int) -> Tensor:
        """An uninitialised int64 tensor."""
        count = math.prod(shape)
        if count * WORD < _SMALLEST_POOLED:
            return torch.empty(shape, dtype=torch.int64)
        idle = self._idle.get(count)
        if idle:
            memory = idle.pop()
            self._idle_bytes -= memory.nbytes
        else:
            memory = np.empty(count, np.int64)
        lease = memory[:]  # tensors keep this view alive, the pool keeps only what it is a view of
        weakref.finalize(lease, self._give_back, memory).atexit = False
        return torch.from_numpy(lease).view(shape)

    def _give_back(self, memory: np.ndarray) -> None:
        if self._idle_bytes + memory.nbytes > _IDLE_BYTES:  # sizes of the past may fill it
            self._idle.clear()
            self._idle_bytes = 0
        self._idle_bytes += memory.nbytes
        self._idle.setdefault(memory.size, []).append(memory)
