"""Host memory for arrays that are read at random."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tiered_memory.arena import PinnedArena


def empty_on_host(shape: Sequence[int], dtype: torch.dtype, *, pinned: bool | None = False) -> Tensor:
    """An uninitialised CPU tensor in huge pages, where the system has them.

    Random reads of large arrays wait for address translation as much as for memory: with 4 KiB pages nearly
    every row or edge misses the processor's table of translations.

    Args:
        shape: of the tensor.
        dtype: its element type.
        pinned: as for ``PinnedArena``; the memory goes with the tensor.
    """
    arena = PinnedArena(max(math.prod(shape) * dtype.itemsize, 1), pinned=pinned)
    return arena.empty(tuple(shape), dtype)
