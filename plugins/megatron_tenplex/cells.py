"""Cut two collections into cells: boxes within which every element has the same holders and needers."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

from megatron_tenplex.ptc import Box, ParallelTensorCollection, Shard


@dataclass(frozen=True, slots=True)
class Cell:
    """A box of one tensor.

    Attributes:
        box: the elements.
        holders: worker -> its first source shard that contains the box.
        needers: worker -> all its target shards that contain the box.
    """

    box: Box
    holders: Mapping[int, Shard]
    needers: Mapping[int, tuple[Shard, ...]]


@contextmanager
def collection_paused() -> Iterator[None]:
    """Stop Python's cyclic collector: it would spend as long scanning a plan's objects as planning takes."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


Piece = tuple[int, int, Shard]  # side (0 source, 1 target), worker, shard


def cells_of(
    source: ParallelTensorCollection, target: ParallelTensorCollection, placement: Sequence[int]
) -> Iterator[tuple[str, list[Cell]]]:
    """Per key, in sorted order, the cells that some worker needs.

    Tensors which are sliced alike (a parameter and its two moments) are cut once.
    """
    pieces: dict[str, list[Piece]] = {key: [] for key in sorted(target.tensors)}
    for worker, shards in enumerate(source.shards):
        for shard in shards:
            if shard.key in pieces:
                pieces[shard.key].append((0, worker, shard))
    for role, shards in enumerate(target.shards):
        for shard in shards:
            pieces[shard.key].append((1, placement[role], shard))
    cut: dict[tuple[tuple[int, int, Box, tuple[int, int] | None], ...], tuple[str, list[Cell]]] = {}
    for key, of_key in pieces.items():
        signature = tuple((side, worker, shard.box, shard.flat) for side, worker, shard in of_key)
        if signature not in cut:
            cut[signature] = (key, list(_cut(of_key)))
            yield key, cut[signature][1]
        else:
            yield key, [_renamed(cell, key) for cell in cut[signature][1]]


def _renamed(cell: Cell, key: str) -> Cell:
    return Cell(
        cell.box,
        {worker: Shard(key, s.box, s.flat) for worker, s in cell.holders.items()},
        {worker: tuple(Shard(key, s.box, s.flat) for s in ss) for worker, ss in cell.needers.items()},
    )


def _cut(pieces: Sequence[Piece]) -> Iterator[Cell]:
    members: dict[Box, list[Piece]] = {}
    for piece in pieces:
        for box in piece[2].boxes():
            members.setdefault(box, []).append(piece)
    boxes = list(members)
    bounds = [(box.offset, box.end) for box in boxes]
    for offset, end, covering in _sweep(bounds, tuple(range(len(boxes))), 0, (), ()):
        holders: dict[int, Shard] = {}
        needers: dict[int, tuple[Shard, ...]] = {}
        for index in covering:
            for side, worker, shard in members[boxes[index]]:
                if side == 0:
                    holders.setdefault(worker, shard)
                elif shard not in needers.get(worker, ()):
                    needers[worker] = (*needers.get(worker, ()), shard)
        if needers:
            shape = tuple(e - o for o, e in zip(offset, end, strict=True))
            yield Cell(Box(offset, shape), dict(sorted(holders.items())), dict(sorted(needers.items())))


def _sweep(
    bounds: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
    active: tuple[int, ...],
    axis: int,
    offset: tuple[int, ...],
    end: tuple[int, ...],
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
    """Split at every border along ``axis``, then each interval along the next with the boxes left in it."""
    if axis == len(bounds[0][0]):
        yield offset, end, active
        return
    first_low, first_high = bounds[active[0]][0][axis], bounds[active[0]][1][axis]
    if all(bounds[i][0][axis] == first_low and bounds[i][1][axis] == first_high for i in active):
        yield from _sweep(bounds, active, axis + 1, (*offset, first_low), (*end, first_high))
        return
    starts: dict[int, list[int]] = {}
    ends: dict[int, list[int]] = {}
    for i in active:
        starts.setdefault(bounds[i][0][axis], []).append(i)
        ends.setdefault(bounds[i][1][axis], []).append(i)
    cuts = sorted({*starts, *ends})
    inside: dict[int, None] = {}
    for low, high in pairwise(cuts):
        for i in ends.get(low, ()):
            inside.pop(i, None)
        inside.update(dict.fromkeys(starts.get(low, ())))
        if inside:
            yield from _sweep(bounds, tuple(inside), axis + 1, (*offset, low), (*end, high))
