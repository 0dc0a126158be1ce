"""Compiled loops of the gather on a CPU: the torch twin's bits, without its passes over index tensors.

``gather.py`` uses them where numba is installed. A request is checked before anything is written.
"""

# Compiled functions take plain arrays by position; numba infers their types.
# ruff: noqa: ANN001, ANN202, PLR0917

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from torch import Tensor

_SHIFT = 48
_MASK = (1 << _SHIFT) - 1
_BLOCK = 64  # rows whose first lines are fetched before the first of them is copied
_LINE_WORDS = 8
_FETCHED_WORDS = 32
_MOST_SOURCES = 8


@njit(nogil=True, cache=True)
def _copy_rows(flats, strides, num_rows, width, code, index, indexed, out):  # type: ignore[no-untyped-def]
    """out[i] = the row that code[index[i]] (or code[i]) names; the first i that names none, or -1."""
    total = len(index) if indexed else len(code)
    for i in range(total):
        if indexed and (index[i] < 0 or index[i] >= len(code)):
            return i
        c = code[index[i]] if indexed else code[i]
        source = c >> _SHIFT
        if source < 0 or source >= len(num_rows) or (c & _MASK) >= num_rows[source]:
            return i
    begins = np.empty(_BLOCK, np.int64)
    which = np.empty(_BLOCK, np.int64)
    fetched = 0
    for first in range(0, total, _BLOCK):
        last = min(first + _BLOCK, total)
        # Independent reads first, so that the processor has many cache misses in flight.
        for i in range(first, last):
            c = code[index[i]] if indexed else code[i]
            begin, source = (c & _MASK) * strides[c >> _SHIFT], c >> _SHIFT
            begins[i - first], which[i - first] = begin, source
            for w in range(0, min(width, _FETCHED_WORDS), _LINE_WORDS):
                fetched |= flats[source][begin + w]
        for i in range(first, last):
            begin, flat = begins[i - first], flats[which[i - first]]
            out[i * width : (i + 1) * width] = flat[begin : begin + width]
    # The reads above must not look useless to the compiler.
    return -1 - (fetched & 1)


@njit(nogil=True, cache=True)
def _copy_segments(flats, strides, num_rows, width, first, count, shift, length, fill, out):  # type: ignore[no-untyped-def]
    """Windows of ``gather.gather_segments``; the first segment that is out of bounds, or -1."""
    for b in range(len(first)):
        if count[b] < 0 or shift[b] < 0 or shift[b] + count[b] > length:
            return b
        source = first[b] >> _SHIFT
        if count[b] > 0 and (
            source < 0 or source >= len(num_rows) or (first[b] & _MASK) + count[b] > num_rows[source]
        ):
            return b
    for b in range(len(first)):
        n = count[b]
        at = b * length * width
        begin, end = at + shift[b] * width, at + (shift[b] + n) * width
        for position in range(at, begin, width):
            out[position : position + width] = fill
        for position in range(end, at + length * width, width):
            out[position : position + width] = fill
        if n == 0:
            continue
        source = first[b] >> _SHIFT
        flat, stride = flats[source], strides[source]
        start = (first[b] & _MASK) * stride
        if stride == width:
            out[begin:end] = flat[start : start + n * width]
        else:
            for k in range(n):
                out[begin + k * width : begin + (k + 1) * width] = flat[
                    start + k * stride : start + k * stride + width
                ]
    return -1


def gather_rows(sources: list[Tensor], code: Tensor, index: Tensor | None, out: Tensor) -> int:
    """Copy rows (sources and out: views of ``gather._unit_views``); the first bad request, or below 0."""
    codes = code.numpy()
    at = codes if index is None else index.numpy()
    return _copy_rows(*_flat(sources), out.shape[1], codes, at, index is not None, _words(out))


def gather_segments(
    sources: list[Tensor],
    first: Tensor,
    count: Tensor,
    shift: Tensor,
    length: int,
    fill: Tensor | None,
    out: Tensor,
) -> int:
    """Copy segments, likewise; the first bad segment, or below 0."""
    words = _words(out)
    row = np.zeros(out.shape[1], words.dtype) if fill is None else _words(fill)
    return _copy_segments(
        *_flat(sources), out.shape[1], first.numpy(), count.numpy(), shift.numpy(), length, row, words
    )


def _words(view: Tensor) -> np.ndarray:
    return view.reshape(-1).numpy()


def _flat(sources: list[Tensor]) -> tuple[Any, tuple[int, ...], tuple[int, ...]]:
    """All words of each source, its row stride in words, its rows.

    One source, or as many as there may be (absent ones have no rows): the loops are compiled for two
    lengths of the tuples only.
    """
    flats = []
    for source in sources:
        rows, width = source.shape
        words = (rows - 1) * source.stride(0) + width if rows else 0
        flats.append(source.as_strided((words,), (1,)).numpy())
    strides = [source.stride(0) for source in sources]
    num_rows = [source.shape[0] for source in sources]
    if len(flats) > 1:
        absent = _MOST_SOURCES - len(flats)
        flats, strides, num_rows = (
            flats + [flats[0]] * absent,
            strides + [0] * absent,
            num_rows + [0] * absent,
        )
    return tuple(flats), tuple(strides), tuple(num_rows)
