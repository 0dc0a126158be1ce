"""The draw specification: every sample is a pure function of (seed, key, hop, node), on every device.

All arithmetic is modulo 2**64. ``mix`` is the finaliser of SplitMix64 (Steele, Lea, Flood 2014), used here
as a counter-based generator: nothing is carried from one draw to the next, so neither the order of
batches nor the number of workers changes a sample. The plain-Python functions below are the reference
for the backends:

    batch_key(input_id, epoch) = epoch * G + sum_i mix(input_id[i] + (i + 1) * G)
    stream(seed, key, t)       = mix(seed ^ mix(key + t * G))       t: index of the edge type in sorted order
    node_key(stream, v, h)     = mix(stream ^ mix(v << 8 | h))      h: hop, v < 2**55
    draw(node_key, s, n)       = ((mix(node_key + s * G) >> 32) * n) >> 32   in [0, n), bias <= n / 2**32
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
MULTIPLIER_1 = 0xBF58476D1CE4E5B9
MULTIPLIER_2 = 0x94D049BB133111EB


def mix(z: int) -> int:
    """Scramble 64 bits, one to one."""
    z ^= z >> 30
    z = z * MULTIPLIER_1 & MASK
    z ^= z >> 27
    z = z * MULTIPLIER_2 & MASK
    return z ^ (z >> 31)


def stream(seed: int, key: int, edge_type: int = 0) -> int:
    """Key of one batch (or one disjoint group) on one edge type."""
    return mix((seed & MASK) ^ mix((key + edge_type * GOLDEN) & MASK))


def node_key(stream: int, node: int, hop: int) -> int:
    """Key of the draws of one node in one hop."""
    return mix(stream ^ mix((node << 8 | hop) & MASK))


def draw(key: int, step: int, limit: int) -> int:
    """Draw ``step`` of a node: an integer in ``[0, limit)``."""
    return ((mix((key + step * GOLDEN) & MASK) >> 32) * limit) >> 32


def _mixed_ids(input_id: Tensor, counters: np.ndarray) -> Any:
    z: Any = input_id.detach().cpu().numpy().astype(np.uint64) + counters * np.uint64(GOLDEN)
    z ^= z >> np.uint64(30)
    z *= np.uint64(MULTIPLIER_1)
    z ^= z >> np.uint64(27)
    z *= np.uint64(MULTIPLIER_2)
    return z ^ (z >> np.uint64(31))


def batch_key(input_id: Tensor, epoch: int = 0) -> int:
    """Key of a batch from the positions of its seeds in the loader's input.

    Args:
        input_id: int64 ``[B]``.
        epoch: pass over the data.

    Returns:
        An integer in ``[0, 2**64)``; it depends on the order of ``input_id``.
    """
    mixed = _mixed_ids(input_id, np.arange(1, input_id.numel() + 1, dtype=np.uint64))
    return (epoch * GOLDEN + int(mixed.sum(dtype=np.uint64))) & MASK


def seed_keys(input_id: Tensor, epoch: int = 0) -> list[int]:
    """``batch_key(input_id[i : i + 1], epoch)`` of every seed, for disjoint sampling."""
    mixed = _mixed_ids(input_id, np.ones(input_id.numel(), dtype=np.uint64))
    return [(epoch * GOLDEN + value) & MASK for value in mixed.tolist()]


def streams_tensor(seed: int, keys: Sequence[int], edge_type: int = 0) -> Tensor:
    """Streams of several keys as int64 ``[len(keys)]`` (the same 64 bits, signed)."""
    values = [stream(seed, key, edge_type) for key in keys]
    return torch.tensor([v - (1 << 64) if v >> 63 else v for v in values], dtype=torch.int64)
