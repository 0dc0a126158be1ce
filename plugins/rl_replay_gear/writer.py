"""Build trajectories step by step and hand them over whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

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
        self.sink.spec.check_names(step, among=self._columns)
        missing = [name for name in self._columns if name not in step]
        if missing:
            raise KeyError(f"missing columns: {', '.join(missing)}")
        steps = self._steps[env]
        if steps.count >= self.sink.spec.max_steps:
            raise ValueError(
                f"trajectory of {steps.count + 1} steps is longer than max_steps={self.sink.spec.max_steps}"
            )
        steps.add({name: _step_value(column, step[name]) for name, column in self._columns.items()})

    def commit(self, env: int = 0, /, *, priority: float | None = None, **final: Any) -> Any:
        """Hand the trajectory to the sink; ``final`` holds the last row of each final column.

        Returns:
            What the sink returns (a table: the handle); None for a trajectory without steps.
        """
        wanted = [name for name, column in self._columns.items() if column.final]
        self.sink.spec.check_names(final, among=wanted)
        steps = self._steps[env]
        if steps.count == 0:
            return None
        missing = [name for name in wanted if name not in final]
        if missing:
            raise KeyError(f"missing final values: {', '.join(missing)}")
        last = {name: _step_value(self._columns[name], final[name]) for name in wanted}
        result = self.sink.write(steps.columns(last), priority=priority)
        steps.count = 0
        return result

    def abort(self, env: int = 0, /) -> None:
        """Forget the steps of a trajectory under construction."""
        self._steps[env].count = 0

    def pending(self, env: int = 0, /) -> int:
        """Steps of the trajectory under construction."""
        return self._steps[env].count


class _Steps:
    """Growing buffers of one trajectory."""

    def __init__(self, columns: Mapping[str, ColumnSpec]) -> None:
        self.count = 0
        self._buffers = {
            name: torch.empty((_FIRST_STEPS, *column.shape), dtype=column.dtype)
            for name, column in columns.items()
        }

    def add(self, values: Mapping[str, Tensor]) -> None:
        # One row is kept free for the value after the last step.
        if self.count + 1 >= len(next(iter(self._buffers.values()))):
            for name, buffer in self._buffers.items():
                self._buffers[name] = torch.cat([buffer, torch.empty_like(buffer)])
        for name, value in values.items():
            self._buffers[name][self.count] = value
        self.count += 1

    def columns(self, last: Mapping[str, Tensor]) -> dict[str, Tensor]:
        out = {}
        for name, buffer in self._buffers.items():
            if name in last:
                buffer[self.count] = last[name]
                out[name] = buffer[: self.count + 1]
            else:
                out[name] = buffer[: self.count]
        return out


def _step_value(column: ColumnSpec, value: Any) -> Tensor:
    tensor = value if isinstance(value, Tensor) else torch.as_tensor(value)
    fits = tensor.dtype == column.dtype or torch.can_cast(tensor.dtype, column.dtype)
    if tensor.shape != column.shape or not fits:
        raise ValueError(
            f"column {column.name!r}: expected one step {DTYPE_NAMES[column.dtype]} {list(column.shape)}, "
            f"got {DTYPE_NAMES.get(tensor.dtype, tensor.dtype)} {list(tensor.shape)}"
        )
    return tensor
