"""Loops that run once a batch: compiled by numba where it is installed.

Without numba the ``*_numpy`` twins at the end of this module take the place of the loops over a batch, and
``PrefixSumTree`` uses its torch twins.
"""

# ruff: noqa: PLR0917 (compiled functions take positional arguments)

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

try:
    from numba import njit

    COMPILED = True
except ImportError:
    COMPILED = False

    def njit(**_options: Any) -> Callable[[Any], Any]:
        """Leave the function as it is."""
        return lambda function: function


SLOT_BITS = 31
GENERATION_BITS = 20
SLOT_MASK = (1 << SLOT_BITS) - 1
GENERATION_MASK = (1 << GENERATION_BITS) - 1


@njit(cache=True, nogil=True)
def counter_uniforms(key: np.uint64, first: int, out: np.ndarray) -> None:
    """Fill ``out`` with SplitMix64 of ``key`` at the counters ``first ..``: 53 bits in [0, 1)."""
    for i in range(out.shape[0]):
        z = key + np.uint64(first + i) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
        out[i] = np.float64(z >> np.uint64(11)) * (1.0 / (1 << 53))


@njit(cache=True, nogil=True)
def locate(
    handles: np.ndarray, shard: int, generation: np.ndarray, live: np.ndarray, slots: np.ndarray
) -> int:
    """Write the slot of each int64 handle, -1 where it is stale; return the number of stale ones."""
    stale = 0
    for i in range(handles.shape[0]):
        handle = handles[i]
        slot = handle & SLOT_MASK
        current = (
            handle >= 0
            and slot < live.shape[0]
            and (handle >> (SLOT_BITS + GENERATION_BITS)) == shard
            and live[slot]
            and ((handle >> SLOT_BITS) & GENERATION_MASK) == generation[slot]
        )
        slots[i] = slot if current else -1
        stale += 0 if current else 1
    return stale


@njit(cache=True, nogil=True)
def window_segments(
    slots: np.ndarray,
    anchors: np.ndarray,
    start: np.ndarray,
    length: np.ndarray,
    extra: int,
    offset: int,
    window: int,
    pad: int,
    out: np.ndarray,
) -> None:
    """Fill ``out`` int64 [4, B]: first row, number of steps, position in the window, first step of each.

    ``extra`` is 1 for a final column, whose trajectories have one row more than they have steps.
    """
    for i in range(slots.shape[0]):
        rows = length[slots[i]] + extra
        begin = anchors[i] + offset
        low = min(max(begin, 0), rows)
        high = min(max(begin + window, 0), rows)
        steps = max(high - low, 0)
        out[0, i] = start[slots[i]] + low if steps else 0
        out[1, i] = steps
        if pad == 0 or steps == 0:
            out[2, i] = 0
        elif pad == 1:
            out[2, i] = window - steps
        else:
            out[2, i] = low - begin
        out[3, i] = low


@njit(cache=True, nogil=True)
def run_starts(first: np.ndarray, shift: np.ndarray, begin: np.ndarray) -> tuple[int, int]:
    """Write ``first - shift`` and return its smallest and largest value; (0, 0) of none."""
    if first.shape[0] == 0:
        return 0, 0
    low = high = first[0] - shift[0]
    for i in range(first.shape[0]):
        begin[i] = first[i] - shift[i]
        low = min(low, begin[i])
        high = max(high, begin[i])
    return low, high


@njit(cache=True, nogil=True)
def fill_padding(words: np.ndarray, count: np.ndarray, shift: np.ndarray, fill: np.ndarray) -> None:
    """Set every position of ``words`` int64 [B, L, W] outside ``shift .. shift + count`` to ``fill`` [W]."""
    for i in range(words.shape[0]):
        if count[i] == words.shape[1]:
            continue
        for j in range(words.shape[1]):
            if j < shift[i] or j >= shift[i] + count[i]:
                for k in range(words.shape[2]):
                    words[i, j, k] = fill[k]


@njit(cache=True, nogil=True)
def uniform_anchors(u: np.ndarray, slots: np.ndarray, length: np.ndarray, anchors: np.ndarray) -> None:
    """A step of each trajectory, uniform: ``floor(u * n)``."""
    for i in range(slots.shape[0]):
        steps = length[slots[i]]
        anchors[i] = min(int(u[i] * steps), steps - 1)


@njit(cache=True, nogil=True)
def make_handles(slots: np.ndarray, generation: np.ndarray, shard: int, handles: np.ndarray) -> None:
    """Write the int64 handle of each slot."""
    for i in range(slots.shape[0]):
        slot = slots[i]
        handles[i] = (
            (np.int64(shard) << (SLOT_BITS + GENERATION_BITS))
            | (np.int64(generation[slot]) << SLOT_BITS)
            | np.int64(slot)
        )


@njit(cache=True, nogil=True)
def tree_draw(
    values: np.ndarray, offsets: np.ndarray, fanout: int, u: np.ndarray, index: np.ndarray, weight: np.ndarray
) -> None:
    """Inverse of the cumulative sum of the leaves: the smallest i with ``cumsum_i > u * total``.

    A level's children are scanned in order and their sums subtracted; where rounding leaves a remainder
    past the last child, the last child of positive sum is taken, so a leaf of weight 0 is never drawn.
    """
    top = offsets.shape[0] - 1
    total = values[offsets[top]]
    for i in range(u.shape[0]):
        rest = u[i] * total
        node = 0
        for level in range(top - 1, -1, -1):
            base = offsets[level] + node * fanout
            chosen = 0
            below = False
            for child in range(fanout):
                value = values[base + child]
                if value > 0.0:
                    chosen = child
                    if rest < value:
                        below = True
                        break
                    rest -= value
            if not below:
                rest = values[base + chosen]
            node = node * fanout + chosen
        index[i] = node
        weight[i] = values[node]


@njit(cache=True, nogil=True)
def tree_update(
    values: np.ndarray,
    minima: np.ndarray,
    offsets: np.ndarray,
    fanout: int,
    index: np.ndarray,
    weight: np.ndarray,
) -> None:
    """Set leaves and recompute the sums and positive minima above them from their children."""
    for i in range(index.shape[0]):
        values[index[i]] = weight[i]
    divisor = 1
    for level in range(1, offsets.shape[0]):
        divisor *= fanout
        previous = -1
        for i in range(index.shape[0]):
            node = index[i] // divisor
            if node == previous:
                continue
            previous = node
            base = offsets[level - 1] + node * fanout
            total = 0.0
            smallest = np.inf
            for child in range(fanout):
                value = values[base + child]
                total += value
                low = minima[base + child - offsets[1]] if level > 1 else value
                if value > 0.0 and low < smallest:
                    smallest = low
            values[offsets[level] + node] = total
            minima[offsets[level] + node - offsets[1]] = smallest


@njit(cache=True, nogil=True)
def first_bad_leaf(index: np.ndarray, weight: np.ndarray, capacity: int) -> int:
    """Position of the first leaf outside the tree or weight that is not finite and >= 0; -1 if none."""
    for i in range(index.shape[0]):
        if not (0 <= index[i] < capacity and 0.0 <= weight[i] < np.inf):
            return i
    return -1


@njit(cache=True, nogil=True)
def priority_weights(
    slots: np.ndarray,
    priority: np.ndarray,
    alpha: float,
    length: np.ndarray,
    over_steps: bool,
    out: np.ndarray,
) -> None:
    """``p^alpha`` of each slot, times its length if ``over_steps``; 0 where p is 0, which is never drawn."""
    for i in range(slots.shape[0]):
        p = np.float64(priority[slots[i]])
        out[i] = p**alpha if p > 0.0 else 0.0
        if over_steps:
            out[i] *= length[slots[i]]


@njit(cache=True, nogil=True)
def tree_rebuild(values: np.ndarray, minima: np.ndarray, offsets: np.ndarray, fanout: int) -> None:
    """Recompute every sum and positive minimum, with the same arithmetic as ``tree_update``."""
    for level in range(1, offsets.shape[0]):
        stop = offsets[level + 1] if level + 1 < offsets.shape[0] else offsets[level] + 1
        children_end = offsets[level]
        for node in range(stop - offsets[level]):
            base = offsets[level - 1] + node * fanout
            if base >= children_end:
                break
            total = 0.0
            smallest = np.inf
            for child in range(fanout):
                value = values[base + child]
                total += value
                low = minima[base + child - offsets[1]] if level > 1 else value
                if value > 0.0 and low < smallest:
                    smallest = low
            values[offsets[level] + node] = total
            minima[offsets[level] + node - offsets[1]] = smallest


@njit(cache=True, nogil=True)
def first_occurrences(items: np.ndarray, seen: np.ndarray, stamp: int, out: np.ndarray, filled: int) -> int:
    """Append the items whose ``seen`` is not ``stamp`` to ``out`` until it is full; return its length."""
    for i in range(items.shape[0]):
        if filled == out.shape[0]:
            break
        item = items[i]
        if seen[item] != stamp:
            seen[item] = stamp
            out[filled] = item
            filled += 1
    return filled


def counter_uniforms_numpy(key: np.uint64, first: int, out: np.ndarray) -> None:
    """The twin of ``counter_uniforms``."""
    z = np.arange(first, first + len(out), dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + key
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    out[:] = (z >> np.uint64(11)) * (1.0 / (1 << 53))


def locate_numpy(
    handles: np.ndarray, shard: int, generation: np.ndarray, live: np.ndarray, slots: np.ndarray
) -> int:
    """The twin of ``locate``."""
    slot = np.minimum(handles & SLOT_MASK, len(live) - 1)
    current = (
        (handles >= 0)
        & ((handles & SLOT_MASK) < len(live))
        & ((handles >> (SLOT_BITS + GENERATION_BITS)) == shard)
        & live[slot]
        & (((handles >> SLOT_BITS) & GENERATION_MASK) == generation[slot])
    )
    slots[:] = np.where(current, slot, -1)
    return int((~current).sum())


def window_segments_numpy(
    slots: np.ndarray,
    anchors: np.ndarray,
    start: np.ndarray,
    length: np.ndarray,
    extra: int,
    offset: int,
    window: int,
    pad: int,
    out: np.ndarray,
) -> None:
    """The twin of ``window_segments``."""
    rows = length[slots] + extra
    begin = anchors + offset
    low = np.minimum(np.maximum(begin, 0), rows)
    steps = np.maximum(np.minimum(np.maximum(begin + window, 0), rows) - low, 0)
    shift = (np.zeros_like(low), window - steps, low - begin)[pad]
    out[0] = np.where(steps > 0, start[slots] + low, 0)
    out[1] = steps
    out[2] = np.where(steps > 0, shift, 0)
    out[3] = low


def run_starts_numpy(first: np.ndarray, shift: np.ndarray, begin: np.ndarray) -> tuple[int, int]:
    """The twin of ``run_starts``."""
    np.subtract(first, shift, out=begin)
    return (int(begin.min()), int(begin.max())) if len(begin) else (0, 0)


def fill_padding_numpy(words: np.ndarray, count: np.ndarray, shift: np.ndarray, fill: np.ndarray) -> None:
    """The twin of ``fill_padding``."""
    position = np.arange(words.shape[1])
    words[(position < shift[:, None]) | (position >= (shift + count)[:, None])] = fill


def uniform_anchors_numpy(u: np.ndarray, slots: np.ndarray, length: np.ndarray, anchors: np.ndarray) -> None:
    """The twin of ``uniform_anchors``."""
    steps = length[slots]
    anchors[:] = np.minimum((u * steps).astype(np.int64), steps - 1)


def make_handles_numpy(slots: np.ndarray, generation: np.ndarray, shard: int, handles: np.ndarray) -> None:
    """The twin of ``make_handles``."""
    handles[:] = (shard << (SLOT_BITS + GENERATION_BITS)) | (generation[slots] << SLOT_BITS) | slots


def first_bad_leaf_numpy(index: np.ndarray, weight: np.ndarray, capacity: int) -> int:
    """The twin of ``first_bad_leaf``."""
    good = (index >= 0) & (index < capacity) & (weight >= 0.0) & (weight < np.inf)
    return -1 if good.all() else int(np.argmin(good))


def priority_weights_numpy(
    slots: np.ndarray,
    priority: np.ndarray,
    alpha: float,
    length: np.ndarray,
    over_steps: bool,
    out: np.ndarray,
) -> None:
    """The twin of ``priority_weights``."""
    p = priority[slots].astype(np.float64)
    out[:] = np.where(p > 0.0, p**alpha, 0.0)
    if over_steps:
        out *= length[slots]


if not COMPILED:
    first_bad_leaf, priority_weights = first_bad_leaf_numpy, priority_weights_numpy
    counter_uniforms = counter_uniforms_numpy
    locate, window_segments = locate_numpy, window_segments_numpy
    uniform_anchors, make_handles = uniform_anchors_numpy, make_handles_numpy
    run_starts, fill_padding = run_starts_numpy, fill_padding_numpy
