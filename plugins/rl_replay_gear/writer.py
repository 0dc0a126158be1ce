"""Build trajectories step by step and hand them over whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from rl_replay_gear.spec import DTYPE_NAMES, ColumnSpec, TableSpec

_FIRST_STEPS = 64


class Sink(Protocol):
    """Where trajectories go: a table, a shared-memory channel, a Ray inbox."""

    spec: TableSpec

    def write(self, columns: Mapping[str, Any], *, priority: float | None = None) -> Any:
        """Store one trajectory."""


class TrajectoryWriter:
    """Collects the steps of one or several environments; nothing reaches the sink before ``commit``.

    Args:
        sink: A ``TrajectoryTable``, ``ShardedTable``, ``SharedMemoryChannel.sink(i)`` or ``RayInbox.sink()``.
        environments: Number of trajectories under construction at once.
    """

    def __init__(self, sink: Sink, *, environments: int = 1) -> None:
        self.sink = sink
        self._columns = {column.name: column for column in sink.spec.columns}
        self._steps = [_Steps(self._columns) for _ in range(environments)]

    def append(self, env: int = 0, /, **step: Any) -> None:
        """Add one step: a value of the column's shape for every column.

        Raises:
            KeyError: a column is missing or unknown.
            ValueError: a shape does not fit, a dtype loses information, or the trajectory grows past
                ``max_steps``. The step is not added.
        """
        if step.keys() != self._columns.keys():
            self.sink.spec.check_names(step, among=self._columns)
            missing = [name for name in self._columns if name not in step]
            raise KeyError(f"missing columns: {', '.join(missing)}")
        steps = self._of(env)
        if steps.count >= self.sink.spec.max_steps:
            raise ValueError(
                f"trajectory of {steps.count + 1} steps is longer than max_steps={self.sink.spec.max_steps}"
            )
        steps.add(step)

    def commit(self, env: int = 0, /, *, priority: float | None = None, **final: Any) -> Any:
        """Hand the trajectory to the sink; ``final`` holds the last row of each final column.

        Returns:
            What the sink returns (a table: the handle); None for a trajectory without steps.
        """
        wanted = [name for name, column in self._columns.items() if column.final]
        self.sink.spec.check_names(final, among=wanted)
        steps = self._of(env)
        if steps.count == 0:
            return None
        missing = [name for name in wanted if name not in final]
        if missing:
            raise KeyError(f"missing final values: {', '.join(missing)}")
        result = self.sink.write(steps.columns(final), priority=priority)
        steps.count = 0
        return result

    def abort(self, env: int = 0, /) -> None:
        """Forget the steps of a trajectory under construction."""
        self._of(env).count = 0

    def pending(self, env: int = 0, /) -> int:
        """Steps of the trajectory under construction."""
        return self._of(env).count

    def _of(self, env: int) -> _Steps:
        if not 0 <= env < len(self._steps):
            raise IndexError(f"env must be in 0..{len(self._steps) - 1} (environments), got {env}")
        return self._steps[env]


class _Steps:
    """The trajectory under construction: a growing buffer for each column."""

    def __init__(self, columns: Mapping[str, ColumnSpec]) -> None:
        self.count = 0
        self._room = 0
        self._buffers = {name: _Buffer(column) for name, column in columns.items()}
        self._grow()

    def add(self, values: Mapping[str, Any]) -> None:
        if self.count + 1 >= self._room:  # one row is kept free for the value after the last step
            self._grow()
        for name, buffer in self._buffers.items():
            buffer.put(self.count, values[name])
        self.count += 1

    def columns(self, last: Mapping[str, Any]) -> dict[str, Tensor]:
        for name, value in last.items():
            self._buffers[name].put(self.count, value)
        return {name: buffer.rows[: self.count + int(name in last)] for name, buffer in self._buffers.items()}

    def _grow(self) -> None:
        self._room = max(_FIRST_STEPS, 2 * self._room)
        for buffer in self._buffers.values():
            buffer.grow(self._room)


class _Buffer:
    """Rows of one column. What a refused step has written past the last one is overwritten by the next."""

    def __init__(self, column: ColumnSpec) -> None:
        self._column = column
        self.rows = torch.empty((0, *column.shape), dtype=column.dtype)
        self._array: np.ndarray | None = None  # the same memory; NumPy has no bfloat16

    def grow(self, count: int) -> None:
        rows = torch.empty((count, *self._column.shape), dtype=self._column.dtype)
        rows[: len(self.rows)] = self.rows
        self.rows = rows
        self._array = None if rows.dtype is torch.bfloat16 else rows.numpy()

    def put(self, position: int, value: Any) -> None:
        array = self._array
        # The usual case first: an array or scalar of NumPy that has just the column's type and shape.
        if (
            array is not None
            and isinstance(value, np.ndarray | np.generic)
            and value.dtype == array.dtype
            and value.shape == self._column.shape
        ):
            array[position] = value
        else:
            self.rows[position] = _step_value(self._column, value)


def _step_value(column: ColumnSpec, value: Any) -> Tensor:
    if isinstance(value, float):  # torch would round it to float32
        tensor = torch.tensor(value, dtype=torch.float64)
    else:
        tensor = column.as_tensor(value)
    fits = tensor.dtype == column.dtype or torch.can_cast(tensor.dtype, column.dtype)
    if tensor.shape != column.shape or not fits:
        raise ValueError(
            f"column {column.name!r}: expected one step {DTYPE_NAMES[column.dtype]} {list(column.shape)}, "
            f"got {DTYPE_NAMES.get(tensor.dtype, tensor.dtype)} {list(tensor.shape)}"
        )
    if tensor.dtype != column.dtype and not column.dtype.is_floating_point:
        narrow = tensor.to(column.dtype)
        if not torch.equal(narrow.to(tensor.dtype), tensor):
            raise ValueError(
                f"column {column.name!r}: {tensor.tolist()} does not fit into {DTYPE_NAMES[column.dtype]}"
            )
    return tensor
