"""From columns to rows: one pass over a row group instead of a strided copy for each column."""

# ruff: noqa: PLR0917 (compiled functions take positional arguments)

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from rl_replay_gear import loops
from rl_replay_gear.spec import RowGroup

if loops.COMPILED:
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic

    @intrinsic(prefer_literal=True)
    def _copy(_context: Any, to: Any, source: Any, size: Any) -> Any:
        """Copy ``size`` bytes, a constant, between two addresses: a load and a store."""

        def build(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            count = context.get_constant(types.intp, size.literal_value)
            places = [builder.inttoptr(argument, cgutils.voidptr_t) for argument in arguments[:2]]
            cgutils.raw_memcpy(builder, *places, count, 1)
            return context.get_dummy_value()

        return types.void(to, source, size), build


@loops.njit(cache=True, nogil=True)
def _pack(
    to: int, row_bytes: int, rows: int, sources: np.ndarray, offsets: np.ndarray, widths: np.ndarray
) -> None:
    for row in range(rows):
        for column in range(sources.shape[0]):
            left = widths[column]
            target = to + row * row_bytes + offsets[column]
            source = sources[column] + row * left
            while left >= 32:
                _copy(target, source, 32)
                target, source, left = target + 32, source + 32, left - 32
            if left >= 16:
                _copy(target, source, 16)
                target, source, left = target + 16, source + 16, left - 16
            if left >= 8:
                _copy(target, source, 8)
                target, source, left = target + 8, source + 8, left - 8
            if left >= 4:
                _copy(target, source, 4)
                target, source, left = target + 4, source + 4, left - 4
            if left >= 2:
                _copy(target, source, 2)
                target, source, left = target + 2, source + 2, left - 2
            if left:
                _copy(target, source, 1)


class RowPacker:
    """Writes columns into the rows of one group.

    Compiled by numba for rows in host memory; torch copies column by column elsewhere, with the same bytes.

    Args:
        group: The layout of a row.
        words: The group's rows, int64 [rows, row_bytes / 8].
        views: Each column's place in them, [rows, *shape].
    """

    def __init__(self, group: RowGroup, words: Tensor, views: Mapping[str, Tensor]) -> None:
        self.final = group.final
        self._views = [(field.column.name, views[field.column.name]) for field in group.fields]
        self._words = words
        self._row_bytes = group.row_bytes
        self._compiled = loops.COMPILED and words.device.type == "cpu" and words.is_contiguous()
        self._sources = np.empty(len(group.fields), np.int64)
        self._offsets = np.array([field.offset for field in group.fields], np.int64)
        self._widths = np.array([field.column.nbytes for field in group.fields], np.int64)

    def pack(self, columns: Mapping[str, Tensor], start: int, rows: int) -> None:
        """Put ``columns`` [rows, *shape], of the columns' dtypes, into the rows from ``start`` on."""
        if not self._compiled:
            for name, view in self._views:
                view[start : start + rows].copy_(columns[name])
            return
        held = []  # keeps what had to be copied alive while its address is in use
        for i, (name, _) in enumerate(self._views):
            tensor = columns[name]
            if not (tensor.is_cpu and tensor.is_contiguous()):
                tensor = tensor.cpu().contiguous()
                held.append(tensor)
            self._sources[i] = tensor.data_ptr()
        to = self._words.data_ptr() + start * self._row_bytes
        _pack(to, self._row_bytes, rows, self._sources, self._offsets, self._widths)
