"""The parallelizable tensor collection: named global tensors, and which part of them each rank holds.

Tenplex (SOSP'24, arXiv 2312.05181) calls the state of a job a PTC: tensors, how a configuration slices
them, and which device gets which slice. Here a slice is a :class:`Shard`: an N-dimensional interval of a
global tensor and, for a distributed optimizer, a row-major range of that interval.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True, order=True, slots=True)
class Box:
    """A half-open interval of a global tensor; ``Box((), ())`` is a scalar."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def end(self) -> tuple[int, ...]:
        """First index behind the box in each dimension."""
        return tuple(o + s for o, s in zip(self.offset, self.shape, strict=True))

    def intersect(self, other: Box) -> Box | None:
        """The common part, or None if there is none."""
        low = tuple(map(max, self.offset, other.offset))
        high = tuple(map(min, self.end, other.end))
        if any(h <= lo for lo, h in zip(low, high, strict=True)):
            return None
        return Box(low, tuple(h - lo for lo, h in zip(low, high, strict=True)))

    def __str__(self) -> str:
        return "[" + ", ".join(f"{o}:{o + s}" for o, s in zip(self.offset, self.shape, strict=True)) + "]"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape and dtype of a global tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Shard:
    """Elements ``[flat[0], flat[1])`` of ``box`` in row-major order; ``flat=None`` means all of it.

    The tensor of a shard has ``box.shape`` where ``flat`` is None and is one-dimensional otherwise.
    """

    key: str
    box: Box
    flat: tuple[int, int] | None = None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.box.numel if self.flat is None else self.flat[1] - self.flat[0]

    def boxes(self) -> tuple[Box, ...]:
        """Disjoint boxes that make up the shard, in row-major order; at most ``2 N - 1`` of them."""
        if self.flat is None:
            return (self.box,) if self.box.numel else ()
        parts = _flat_boxes(self.box.shape, *self.flat)
        return tuple(
            Box(tuple(a + b for a, b in zip(self.box.offset, offset, strict=True)), shape)
            for offset, shape in parts
        )

    def __lt__(self, other: Shard) -> bool:
        return self.sort_key() < other.sort_key()

    def sort_key(self) -> tuple[Any, ...]:
        """A key that orders shards with and without ``flat``."""
        return (self.key, self.box, self.flat or (-1, -1))


def _flat_boxes(shape: tuple[int, ...], low: int, high: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(offset, shape) of the boxes that make up the row-major range [low, high) of an array of ``shape``."""
    if high <= low:
        return []
    if not shape:
        return [((), ())]
    row = math.prod(shape[1:])
    first, last = low // row, high // row
    tail = (0,) * (len(shape) - 1)

    def within(index: int, start: int, stop: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        return [((index, *o), (1, *s)) for o, s in _flat_boxes(shape[1:], start, stop)]

    if first == last:
        return within(first, low % row, high % row)
    parts = []
    if low % row:
        parts += within(first, low % row, row)
        first += 1
    if last > first:
        parts.append(((first, *tail), (last - first, *shape[1:])))
    if high % row:
        parts += within(last, 0, high % row)
    return parts


def union_numel(boxes: Iterable[Box]) -> int:
    """Number of distinct elements of ``boxes`` of one tensor, by marking a grid of their borders."""
    unique = list(dict.fromkeys(box for box in boxes if box.numel))
    if len(unique) <= 1:
        return sum(box.numel for box in unique)
    dims = len(unique[0].offset)
    if dims == 0:
        return 1
    cuts = [np.unique([edge for b in unique for edge in (b.offset[d], b.end[d])]) for d in range(dims)]
    grid = np.zeros([len(c) - 1 for c in cuts], dtype=bool)
    for box in unique:
        low = [int(np.searchsorted(cuts[d], box.offset[d])) for d in range(dims)]
        high = [int(np.searchsorted(cuts[d], box.end[d])) for d in range(dims)]
        grid[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = True
    cells = grid.astype(np.int64)
    for d, cut in enumerate(cuts):
        widths = np.diff(cut).reshape([-1 if i == d else 1 for i in range(dims)])
        cells = cells * widths
    return int(cells.sum())


class ParallelTensorCollection:
    """Global tensors and the shards of every rank.

    Args:
        tensors: key -> shape and dtype of the global tensor.
        shards: shards of rank 0, of rank 1, ... They may repeat or overlap, on one rank and across ranks.

    Raises:
        ValueError: a shard names an unknown key or does not fit into its tensor.
    """

    def __init__(self, tensors: Mapping[str, TensorSpec], shards: Sequence[Iterable[Shard]]) -> None:
        self.tensors: Mapping[str, TensorSpec] = dict(tensors)
        self.shards: tuple[tuple[Shard, ...], ...] = tuple(tuple(of_rank) for of_rank in shards)
        self.validate()
        self._digest: str | None = None

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return len(self.shards)

    @property
    def digest(self) -> str:
        """SHA-256 of the content, equal in every process that holds the same collection."""
        if self._digest is None:
            text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
            self._digest = hashlib.sha256(text.encode()).hexdigest()
        return self._digest

    def itemsize(self, key: str) -> int:
        """Bytes of one element."""
        return self.tensors[key].dtype.itemsize

    def held_bytes(self, rank: int) -> int:
        """Bytes of the distinct elements of ``rank``."""
        boxes: dict[str, list[Box]] = {}
        for shard in self.shards[rank]:
            boxes.setdefault(shard.key, []).extend(shard.boxes())
        return sum(union_numel(of_key) * self.itemsize(key) for key, of_key in boxes.items())

    def total_bytes(self) -> int:
        """Bytes of all global tensors."""
        return sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in self.tensors.values())

    def validate(self) -> None:
        """Check that every shard lies in its tensor."""
        checked: set[Shard] = set()
        for rank, shards in enumerate(self.shards):
            for shard in shards:
                if shard in checked:
                    continue
                checked.add(shard)
                spec = self.tensors.get(shard.key)
                if spec is None:
                    near = difflib.get_close_matches(shard.key, self.tensors, 1)
                    hint = f"; did you mean {near[0]!r}?" if near else ""
                    raise ValueError(f"rank {rank} has a shard of unknown tensor {shard.key!r}{hint}")
                box = shard.box
                if len(box.offset) != len(spec.shape) or len(box.shape) != len(spec.shape):
                    raise ValueError(
                        f"{shard.key}{box} of rank {rank} has not the dimensions of {spec.shape}"
                    )
                sizes = zip(box.offset, box.shape, spec.shape, strict=True)
                if any(o < 0 or n < 0 or o + n > size for o, n, size in sizes):
                    raise ValueError(f"{shard.key}{box} of rank {rank} lies outside the tensor {spec.shape}")
                if shard.flat is not None and not 0 <= shard.flat[0] <= shard.flat[1] <= box.numel:
                    raise ValueError(f"{shard.key}{box} of rank {rank}: flat range {shard.flat} is outside")

    def to_json(self) -> dict[str, Any]:
        """JSON values; :meth:`from_json` reads them."""
        return {
            "tensors": {
                key: [list(spec.shape), str(spec.dtype).removeprefix("torch.")]
                for key, spec in sorted(self.tensors.items())
            },
            "shards": [
                [
                    [s.key, list(s.box.offset), list(s.box.shape), list(s.flat) if s.flat else None]
                    for s in rank
                ]
                for rank in self.shards
            ],
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> ParallelTensorCollection:
        """The collection that :meth:`to_json` described."""
        tensors = {
            key: TensorSpec(tuple(shape), dtype_of(name)) for key, (shape, name) in content["tensors"].items()
        }
        shards = [
            [Shard(k, Box(tuple(o), tuple(s)), tuple(f) if f else None) for k, o, s, f in rank]
            for rank in content["shards"]
        ]
        return cls(tensors, shards)


def dtype_of(name: str) -> torch.dtype:
    """The torch dtype called ``name``, e.g. ``"bfloat16"``."""
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"unknown dtype {name!r}")
    return found
