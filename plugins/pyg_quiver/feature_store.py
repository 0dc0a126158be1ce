"""PyG feature store over memory tiers: one gather a batch, wherever the rows lie."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch_geometric.data import FeatureStore, TensorAttr

from pyg_quiver.host_memory import empty_on_host
from pyg_quiver.placement import DISK, HOST, PlacementPlan
from tiered_memory.gather import SOURCE_SHIFT, gather_rows, row_code
from tiered_memory.probe import measure_bandwidth

TIERS = ("local", "peer", "host", "disk")
_MOVE_ROWS = 1 << 18


@dataclass(frozen=True)
class GatherStats:
    """Rows and bytes read so far, by tier: local, peer, host, disk."""

    rows: dict[str, int]
    bytes: dict[str, int]


@dataclass(frozen=True)
class _Placed:
    """One attribute in its tiers. Never changed: a move makes another and swaps them."""

    sources: tuple[Tensor, ...]
    tiers: tuple[str, ...]
    code: Tensor | None  # None: row i is row i of the only source
    num_rows: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.num_rows, *self.sources[0].shape[1:])


class QuiverFeatureStore(FeatureStore):
    """Feature rows in GPU memory, peers' memory, host memory and on disk, read by one gather.

    Store tensors as in any PyG feature store: ``store["x"] = x`` or ``store.put_tensor(x, group_name=None,
    attr_name="x", index=None)``. A tensor with as many rows as the plan is split over the tiers of the plan;
    others, and all without a plan, lie in host memory.

    Args:
        device: where rows arrive. On "cpu" the tiers are virtual: counts and results are the same.
        plan: where rows lie.
        reader: device of the plan that reads (the process's GPU).
        disk_path: folder for rows on disk.

    Raises:
        ValueError: rows on disk without ``disk_path``.
    """

    def __init__(
        self,
        device: str | torch.device = "cpu",
        *,
        plan: PlacementPlan | None = None,
        reader: int = 0,
        disk_path: str | Path | None = None,
    ) -> None:
        super().__init__()
        where = torch.device(device)
        if where.type == "cuda" and where.index is None:
            where = torch.device("cuda", torch.cuda.current_device())
        # FeatureStore treats attributes as tensors: own state goes around its __setattr__.
        self.__dict__.update(
            device=where,
            _plan=plan,
            _reader=reader,
            _disk_path=None if disk_path is None else Path(disk_path),
            _placed={},
            _lock=threading.Lock(),
            _rows=dict.fromkeys(TIERS, 0),
            _bytes=dict.fromkeys(TIERS, 0),
            _pending=[],
            _moves=0,
        )

    @property
    def plan(self) -> PlacementPlan | None:
        """The placement in use."""
        return self.__dict__["_plan"]

    def stats(self) -> GatherStats:
        """Rows and bytes read by tier since the last :meth:`reset_stats`."""
        with self._lock:
            self._settle()
            return GatherStats(dict(self._rows), dict(self._bytes))

    def reset_stats(self) -> None:
        """Count from 0 again."""
        with self._lock:
            self._settle()
            self.__dict__["_rows"] = dict.fromkeys(TIERS, 0)
            self.__dict__["_bytes"] = dict.fromkeys(TIERS, 0)

    def place(self, plan: PlacementPlan) -> None:
        """Move every attribute to another plan; callable while others read.

        Readers see the old placement until the new one is complete, so no row is ever wrong; both are in
        memory during the move.
        """
        for key, placed in list(self._placed.items()):
            if plan.num_rows == placed.num_rows:
                self._placed[key] = self._place_rows(
                    key, lambda rows, old=placed: self._read(old, rows), plan, placed
                )
        self.__dict__["_plan"] = plan

    # PyG's FeatureStore contract.

    def _put_tensor(self, tensor: Any, attr: TensorAttr) -> bool:
        tensor = torch.as_tensor(tensor)
        key = (attr.group_name, attr.attr_name)
        if attr.is_set("index") and attr.index is not None:
            raise ValueError(
                f"put_tensor({attr.attr_name!r}): rows cannot be changed one by one; put the whole tensor"
            )
        plan = self.plan
        if plan is None or plan.num_rows != tensor.shape[0]:
            table = self._host_table(tensor.shape, tensor.dtype)
            table.copy_(tensor)
            self._placed[key] = _Placed((table,), ("host",), None, tensor.shape[0])
            return True
        self._placed[key] = self._place_rows(key, lambda rows: tensor[rows], plan, tensor)
        return True

    def _get_tensor(self, attr: TensorAttr) -> Tensor:
        placed = self._placed.get((attr.group_name, attr.attr_name))
        if placed is None:
            raise KeyError(f"no tensor {attr.attr_name!r} in group {attr.group_name!r}")
        return self._gather(placed, self._rows_of(attr.index, placed.num_rows))

    def _multi_get_tensor(self, attrs: list[TensorAttr]) -> list[Tensor]:
        """All attributes of a batch; equal indices are sent to the device once."""
        sent: dict[int, Tensor] = {}
        out: list[Tensor] = []
        for attr in attrs:
            placed = self._placed.get((attr.group_name, attr.attr_name))
            if placed is None:
                raise KeyError(f"no tensor {attr.attr_name!r} in group {attr.group_name!r}")
            identity = id(attr.index) if isinstance(attr.index, Tensor) else -placed.num_rows
            if identity not in sent:
                sent[identity] = self._rows_of(attr.index, placed.num_rows)
            out.append(self._gather(placed, sent[identity]))
        return out

    def _remove_tensor(self, attr: TensorAttr) -> bool:
        return self._placed.pop((attr.group_name, attr.attr_name), None) is not None

    def _get_tensor_size(self, attr: TensorAttr) -> tuple[int, ...] | None:
        placed = self._placed.get((attr.group_name, attr.attr_name))
        return None if placed is None else placed.shape

    def get_all_tensor_attrs(self) -> list[TensorAttr]:
        """Every stored attribute."""
        return [TensorAttr(group, name) for group, name in self._placed]

    def __getstate__(self) -> dict[str, Any]:
        """State for another process: everything but the lock."""
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    # Placing and reading.

    def _host_table(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        if self.device.type != "cuda":
            return empty_on_host(shape, dtype)
        table = empty_on_host(shape, dtype, pinned=None)
        if not table.is_pinned():
            _warn_pageable(self.device)
        return table

    def _table(self, place: int, key: tuple[Any, str], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        if place == HOST:
            return self._host_table(shape, dtype)
        if place == DISK:
            return self._disk_table(key, shape, dtype)
        if self.device.type != "cuda":
            return empty_on_host(shape, dtype)
        device = self.device if place == self._reader else torch.device("cuda", place)
        return torch.empty(tuple(shape), dtype=dtype, device=device)

    def _disk_table(self, key: tuple[Any, str], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        if self._disk_path is None:
            raise ValueError(f"the plan puts {shape[0]} rows of {key[1]!r} on disk: pass disk_path, a folder")
        self._disk_path.mkdir(parents=True, exist_ok=True)
        self.__dict__["_moves"] += 1
        path = self._disk_path / f"{key[0] or 'rows'}_{key[1]}_{self._moves}.bin"
        count = int(np.prod(shape)) * dtype.itemsize
        mapped = np.memmap(path, dtype=np.uint8, mode="w+", shape=(count,))
        path.unlink()  # the mapping keeps the file until the table goes, and a killed process leaves none
        return torch.from_numpy(mapped).view(dtype).view(tuple(shape))

    def _place_rows(self, key: tuple[Any, str], read: Any, plan: PlacementPlan, like: Any) -> _Placed:
        """Copy rows to where the plan puts them; ``read(ids)`` gives them, ``like`` their shape and dtype."""
        shape = like.shape
        dtype = like.dtype if isinstance(like, Tensor) else like.sources[0].dtype
        code = torch.empty(plan.num_rows, dtype=torch.int64)
        peers = [device for device in plan.clique_of(self._reader) if device != self._reader]
        sources: list[Tensor] = []
        tiers: list[str] = []
        # From far to near: a row held twice ends with the code of the nearest copy.
        for place, tier in [
            (DISK, "disk"),
            (HOST, "host"),
            *((p, "peer") for p in peers),
            (self._reader, "local"),
        ]:
            rows = plan.rows(place)
            if rows.numel() == 0:
                continue
            table = self._table(place, key, (rows.numel(), *shape[1:]), dtype)
            for start in range(0, rows.numel(), _MOVE_ROWS):
                part = rows[start : start + _MOVE_ROWS]
                table[start : start + part.numel()] = read(part).to(table.device)
            code[rows] = row_code(len(sources), torch.arange(rows.numel()))
            sources.append(table)
            tiers.append(tier)
        return _Placed(tuple(sources), tuple(tiers), code.to(self.device), plan.num_rows)

    def _rows_of(self, index: Any, num_rows: int) -> Tensor:
        if index is None:
            return torch.arange(num_rows, device=self.device)
        if isinstance(index, slice):
            return torch.arange(num_rows, device=self.device)[index]
        index = torch.as_tensor(index)
        if index.dtype == torch.bool:
            index = index.nonzero().squeeze(1)
        if index.device.type == "cpu" and index.numel():
            low, high = (int(bound) for bound in torch.aminmax(index))
            if low < 0 or high >= num_rows:
                raise IndexError(f"index names row {low if low < 0 else high}, but there are {num_rows} rows")
        return index.to(self.device, torch.int64)

    def _read(self, placed: _Placed, rows: Tensor) -> Tensor:
        rows = rows.to(self.device)
        if placed.code is None:
            return gather_rows(placed.sources, rows)
        return gather_rows(placed.sources, placed.code, rows)

    def _gather(self, placed: _Placed, rows: Tensor) -> Tensor:
        out = self._read(placed, rows)
        row_bytes = out.nbytes // max(out.shape[0], 1)
        if len(placed.sources) == 1:
            counts: Any = [rows.numel()]
        else:
            assert placed.code is not None
            counts = _count_sources(placed.code[rows] >> SOURCE_SHIFT, len(placed.sources))
        with self._lock:
            self._pending.append((placed.tiers, counts, row_bytes))
            if len(self._pending) > 1000 or self.device.type == "cpu":
                self._settle()
        return out

    def _settle(self) -> None:
        """Add the counts of past gathers; they stay on the device until asked for: reads never wait."""
        for tiers, counts, row_bytes in self._pending:
            for tier, count in zip(
                tiers, counts if isinstance(counts, list) else counts.tolist(), strict=True
            ):
                self._rows[tier] += int(count)
                self._bytes[tier] += int(count) * row_bytes
        self._pending.clear()


@cache
def _warn_pageable(device: torch.device) -> None:
    """Say once what it costs that rows could not be pinned."""
    rate = measure_bandwidth("pageable_to_device", nbytes=1 << 26, seconds=0.05, device=device.index or 0)
    warnings.warn(
        f"feature rows lie in pageable memory: the CPU collects them and copies to {device} run at "
        f"{rate.bytes_per_s / 1e9:.1f} GB/s (raise the locked-memory limit, or give the plan a host_budget)",
        RuntimeWarning,
    )


def _count_sources(which: Tensor, sources: int) -> Tensor:
    """How often each source is named, ``[sources]``; on a GPU without waiting for it."""
    if which.device.type == "cpu":
        return torch.bincount(which, minlength=sources)
    return torch.histc(which.float(), sources, -0.5, sources - 0.5)
