"""What a table holds: columns, capacity, and where each column lies in a row."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from rl_replay_gear.derived import Derived

DTYPES = {
    "bool": torch.bool,
    "uint8": torch.uint8,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
PACKED_BYTES = 256  # columns up to this width share a row group
ROW_ALIGNMENT = 16  # the widest unit of a GPU copy


@dataclass(frozen=True)
class ColumnSpec:
    """One field of a trajectory: a tensor ``[n, *shape]`` for a trajectory of ``n`` steps.

    Args:
        name: Key of the column.
        shape: Shape of one step.
        dtype: One of bool, uint8, int8..int64, float16, bfloat16, float32, float64.
        fill: Value of padded positions.
        final: The column has ``n + 1`` rows, e.g. observations with the last next observation.
        group: Columns of one group share a row. By default those of at most 256 B a step share one
            and larger ones lie alone.
        memory: ``"host"``, ``"pinned"`` or ``"device"`` for this column; None follows the table.
    """

    name: str
    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    fill: float = 0.0
    final: bool = False
    group: str | None = None
    memory: str | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_NAMES:
            raise ValueError(f"column {self.name!r}: dtype {self.dtype} is not one of {', '.join(DTYPES)}")
        if any(size < 1 for size in self.shape):
            raise ValueError(f"column {self.name!r}: shape {self.shape} has a size below 1")
        if self.memory not in (None, "host", "pinned", "device"):
            raise ValueError(
                f"column {self.name!r}: memory {self.memory!r} is not 'host', 'pinned' or 'device'"
            )
        object.__setattr__(self, "shape", tuple(int(size) for size in self.shape))

    def as_tensor(self, value: Any) -> Tensor:
        """``value`` as a tensor of whatever dtype it has; ValueError where it is none."""
        try:
            return value if isinstance(value, Tensor) else torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"column {self.name!r}: {type(value).__name__} cannot be read as a tensor ({error})"
            ) from error

    @property
    def nbytes(self) -> int:
        """Bytes of one step."""
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, num_steps: int) -> int:
        """Rows of a trajectory of ``num_steps`` steps."""
        return num_steps + int(self.final)


@dataclass(frozen=True)
class TableSpec:
    """Columns and capacity of a table.

    Args:
        columns: What the writer gives.
        max_steps: Capacity in steps, over all trajectories; also the longest trajectory.
        max_trajectories: Capacity in trajectories.
        derived: Columns computed from the others when a trajectory is committed.
    """

    columns: tuple[ColumnSpec, ...]
    max_steps: int
    max_trajectories: int
    derived: tuple[Derived, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", tuple(self.columns))
        object.__setattr__(self, "derived", tuple(self.derived))
        names = [column.name for column in self.all_columns]
        if not self.columns:
            raise ValueError("a table needs at least one column")
        if len(set(names)) != len(names):
            raise ValueError(f"column names repeat: {sorted(n for n in set(names) if names.count(n) > 1)}")
        if self.max_steps < 1 or self.max_trajectories < 1:
            raise ValueError(
                f"max_steps={self.max_steps} and max_trajectories={self.max_trajectories} must be >= 1"
            )
        if self.max_trajectories > 2**31:
            raise ValueError(f"max_trajectories={self.max_trajectories} is more than 2**31 slots")

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the written columns."""
        return tuple(column.name for column in self.columns)

    @cached_property
    def all_columns(self) -> tuple[ColumnSpec, ...]:
        """The written columns, then the derived ones."""
        given = {column.name: column for column in self.columns}
        return self.columns + tuple(derived.column(given) for derived in self.derived)

    @property
    def step_bytes(self) -> int:
        """Payload bytes of one step, derived columns included, alignment not."""
        return sum(column.nbytes for column in self.all_columns)

    @property
    def num_rows(self) -> int:
        """Rows the table allocates: a trajectory with a final column takes one row more than its steps."""
        return self.max_steps + (self.max_trajectories if self.has_final else 0)

    @cached_property
    def has_final(self) -> bool:
        """Whether any column has a row more than the trajectory has steps."""
        return any(column.final for column in self.columns)

    def to_json(self) -> str:
        """The specification as JSON text; ``from_json`` is its inverse."""
        columns = [{**asdict(column), "dtype": DTYPE_NAMES[column.dtype]} for column in self.columns]
        return json.dumps(
            {
                "columns": columns,
                "max_steps": self.max_steps,
                "max_trajectories": self.max_trajectories,
                "derived": [derived.to_dict() for derived in self.derived],
            },
            sort_keys=True,
        )

    @classmethod
    def from_json(cls, text: str) -> TableSpec:
        """Read what ``to_json`` wrote."""
        data = json.loads(text)
        columns = [
            ColumnSpec(**{**column, "dtype": DTYPES[column["dtype"]], "shape": tuple(column["shape"])})
            for column in data["columns"]
        ]
        derived = tuple(Derived.from_dict(item) for item in data["derived"])
        return cls(tuple(columns), data["max_steps"], data["max_trajectories"], derived)

    def fingerprint(self) -> str:
        """16 hex digits that name the schema (columns and derived columns, not the capacity)."""
        data = json.loads(self.to_json())
        schema = json.dumps([data["columns"], data["derived"]], sort_keys=True)
        return hashlib.sha256(schema.encode()).hexdigest()[:16]

    @classmethod
    def infer(cls, trajectory: Mapping[str, Any], max_steps: int, max_trajectories: int) -> TableSpec:
        """The specification that fits an example; a column of ``n + 1`` rows is taken as final."""
        tensors = {name: torch.as_tensor(value) for name, value in trajectory.items()}
        num_steps = min(len(tensor) for tensor in tensors.values())
        columns = []
        for name, tensor in tensors.items():
            if len(tensor) not in (num_steps, num_steps + 1):
                raise ValueError(f"column {name!r} has {len(tensor)} rows, the shortest one {num_steps}")
            columns.append(
                ColumnSpec(name, tuple(tensor.shape[1:]), tensor.dtype, final=len(tensor) == num_steps + 1)
            )
        return cls(tuple(columns), max_steps, max_trajectories)

    def check_names(self, names: Iterable[str], *, among: Iterable[str] | None = None) -> None:
        """Raise KeyError for a name that is no column, with the closest one."""
        known = [column.name for column in self.all_columns] if among is None else list(among)
        for name in names:
            if name not in known:
                close = difflib.get_close_matches(str(name), known, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise KeyError(f"unknown column {name!r} (columns: {', '.join(known)}){hint}")


@dataclass(frozen=True)
class Field:
    """Where a column lies: ``row[offset : offset + nbytes]`` of its group."""

    column: ColumnSpec
    offset: int

    @property
    def stop(self) -> int:
        """First byte after the field."""
        return self.offset + self.column.nbytes


@dataclass(frozen=True)
class RowGroup:
    """Columns stored side by side: one uint8 row of ``row_bytes`` a step."""

    fields: tuple[Field, ...]
    row_bytes: int
    final: bool
    memory: str | None

    def fill_row(self) -> Tensor:
        """The row of padded positions: uint8 ``[row_bytes]``."""
        row = torch.zeros(self.row_bytes, dtype=torch.uint8)
        for field in self.fields:
            column = field.column
            value = torch.full((max(1, math.prod(column.shape)),), column.fill).to(column.dtype)
            row[field.offset : field.stop] = value.view(torch.uint8)
        return row


def row_groups(columns: Iterable[ColumnSpec]) -> tuple[RowGroup, ...]:
    """Assign columns to row groups; widest elements first, so that every field is aligned."""
    members: dict[tuple[str, bool, str | None], list[ColumnSpec]] = {}
    for column in columns:
        if column.group is not None:
            name = f"group:{column.group}"
        else:
            name = "small" if column.nbytes <= PACKED_BYTES else f"column:{column.name}"
        members.setdefault((name, column.final, column.memory), []).append(column)
    groups = []
    for (_, final, memory), group in members.items():
        fields, offset = [], 0
        for column in sorted(group, key=lambda column: -column.dtype.itemsize):
            fields.append(Field(column, offset))
            offset += column.nbytes
        row_bytes = -(-offset // ROW_ALIGNMENT) * ROW_ALIGNMENT
        groups.append(RowGroup(tuple(fields), row_bytes, final, memory))
    return tuple(groups)
