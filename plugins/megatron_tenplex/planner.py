"""From two collections to the moves that turn one into the other, with the fewest bytes received."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_tenplex.balance import Class, balanced_quotas
from megatron_tenplex.cells import Cell, cells_of, collection_paused
from megatron_tenplex.errors import UncoveredRangeError
from megatron_tenplex.ptc import Box, ParallelTensorCollection, Shard, union_numel
from megatron_tenplex.topology import Topology

_UNSPLIT_BYTES = 64 << 10
_FEW = 2  # copies a holder may send itself: passing parts on takes about as long as two


@dataclass(frozen=True, slots=True)
class Move:
    """Copy ``box`` of tensor ``key`` from one worker to another, or within one.

    In phase 0 ``source_shard`` belongs to the source layout; in later phases it is a shard of the target
    layout that an earlier phase has filled.
    """

    key: str
    box: Box
    source: int
    target: int
    source_shard: Shard
    target_shard: Shard
    nbytes: int
    phase: int


@dataclass(frozen=True)
class WorkerPlan:
    """What one worker does, in the order of the plan."""

    sends: tuple[Move, ...]
    receives: tuple[Move, ...]
    copies: tuple[Move, ...]


class ReshardPlan:
    """Moves between two layouts; deterministic, so that every worker can compute it for itself.

    Attributes:
        moves: in the order in which each pair of workers exchanges them.
        num_workers: ``max(source.world_size, target.world_size)``.
        placement: ``placement[role] = worker``.
        remote_bytes, local_bytes, inter_host_bytes: sums over moves between workers, within a worker, between
            hosts of the topology.
        sent_bytes, received_bytes: int64 ``[num_workers]``.
    """

    def __init__(
        self, moves: Sequence[Move], num_workers: int, placement: tuple[int, ...], topology: Topology
    ) -> None:
        self.moves = tuple(moves)
        self.num_workers, self.placement, self.topology = num_workers, placement, topology
        self.sent_bytes = np.zeros(num_workers, dtype=np.int64)
        self.received_bytes = np.zeros(num_workers, dtype=np.int64)
        self.local_bytes = 0
        self.inter_host_bytes = 0
        self._links: dict[tuple[int, int], int] = {}
        for move in self.moves:
            if move.source == move.target:
                self.local_bytes += move.nbytes
                continue
            link = (move.source, move.target)
            self._links[link] = self._links.get(link, 0) + move.nbytes
        for (sender, receiver), nbytes in self._links.items():
            self.sent_bytes[sender] += nbytes
            self.received_bytes[receiver] += nbytes
            if topology.host(sender) != topology.host(receiver):
                self.inter_host_bytes += nbytes
        self._digest: str | None = None

    @property
    def remote_bytes(self) -> int:
        """Bytes that cross between workers."""
        return int(self.received_bytes.sum())

    @property
    def bottleneck_bytes(self) -> int:
        """The most that any worker sends or receives."""
        return int(max(self.sent_bytes.max(initial=0), self.received_bytes.max(initial=0)))

    @property
    def digest(self) -> str:
        """SHA-256 over all moves."""
        if self._digest is None:
            content = hashlib.sha256(repr((self.num_workers, self.placement)).encode())
            for m in self.moves:
                line = (m.key, m.box.offset, m.box.shape, m.source, m.target, m.phase)
                shards = (m.source_shard.box.offset, m.source_shard.flat, m.target_shard.box.offset)
                content.update(repr((line, shards, m.target_shard.flat)).encode())
            self._digest = content.hexdigest()
        return self._digest

    def for_worker(self, worker: int) -> WorkerPlan:
        """The part of one worker."""
        sends = tuple(m for m in self.moves if m.source == worker != m.target)
        receives = tuple(m for m in self.moves if m.target == worker != m.source)
        copies = tuple(m for m in self.moves if m.source == m.target == worker)
        return WorkerPlan(sends, receives, copies)

    def links(self) -> dict[tuple[int, int], int]:
        """(sender, receiver) -> bytes, in ascending order."""
        return dict(sorted(self._links.items()))

    def predict(self, topology: Topology | None = None) -> float:
        """Seconds of the slowest worker, links in both directions at once and every message one latency."""
        topology = topology or self.topology
        shape = (2, 2, self.num_workers)  # inter-host or not; sent, received
        nbytes, messages = np.zeros(shape), np.zeros(self.num_workers)
        for (sender, receiver), count in self._links.items():
            crossing = int(topology.host(sender) != topology.host(receiver))
            nbytes[crossing, 0, sender] += count
            nbytes[crossing, 1, receiver] += count
            messages[[sender, receiver]] += 1
        busiest = nbytes.max(axis=1)
        seconds = busiest[0] / topology.intra_host_bandwidth + busiest[1] / topology.inter_host_bandwidth
        return float((seconds + messages * topology.latency).max(initial=0.0))

    def summary(self) -> str:
        """One line for a log."""
        return (
            f"{self.num_workers} workers, {format_bytes(self.remote_bytes)} between workers "
            f"({format_bytes(self.inter_host_bytes)} between hosts), "
            f"busiest {format_bytes(self.bottleneck_bytes)}, "
            f"{format_bytes(self.local_bytes)} stay, {self.predict():.3g} s expected"
        )


def format_bytes(count: int) -> str:
    """``count`` in a readable unit."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"


def check_compatible(
    source: ParallelTensorCollection, target: ParallelTensorCollection, placement: Sequence[int]
) -> None:
    """Refuse layouts of different tensors and placements that are not one."""
    for key, spec in sorted(target.tensors.items()):
        have = source.tensors.get(key)
        if have is None:
            continue  # nobody holds it: the planner raises UncoveredRangeError where it is needed
        if have.shape != spec.shape:
            raise ValueError(f"global shape of {key} differs: {have.shape} -> {spec.shape}")
        if have.dtype != spec.dtype:
            raise ValueError(f"dtype of {key} differs: {have.dtype} -> {spec.dtype}")
    workers = max(source.world_size, target.world_size)
    if len(placement) != target.world_size or len(set(placement)) != len(placement):
        raise ValueError(f"placement must name {target.world_size} different workers, got {list(placement)}")
    if any(not 0 <= worker < workers for worker in placement):
        raise ValueError(f"placement names workers outside 0..{workers - 1}: {list(placement)}")


def lower_bound(
    source: ParallelTensorCollection,
    target: ParallelTensorCollection,
    *,
    placement: Sequence[int] | None = None,
) -> int:
    """Bytes that workers must receive: for each role, the elements it needs and its worker does not hold.

    Counted per worker by marking grids, independently of how the planner cuts tensors; once for all tensors
    and workers that have and need the same boxes.
    """
    placement = tuple(range(target.world_size)) if placement is None else tuple(placement)
    check_compatible(source, target, placement)
    missing = 0
    counted: dict[tuple[tuple[Box, ...], tuple[Box, ...]], int] = {}
    for role, worker in enumerate(placement):
        need, have = _boxes_by_key(target, role), {}
        if worker < source.world_size:
            have = _boxes_by_key(source, worker)
        for key, boxes in need.items():
            pair = (tuple(boxes), tuple(have.get(key, ())))
            if pair not in counted:
                common = [c for a in pair[0] for b in pair[1] if (c := a.intersect(b)) is not None]
                counted[pair] = union_numel(boxes) - union_numel(common)
            missing += counted[pair] * target.itemsize(key)
    return missing


def _boxes_by_key(collection: ParallelTensorCollection, rank: int) -> dict[str, list[Box]]:
    boxes: dict[str, list[Box]] = {}
    for shard in dict.fromkeys(collection.shards[rank]):
        boxes.setdefault(shard.key, []).extend(shard.boxes())
    return boxes


def plan_reshard(
    source: ParallelTensorCollection,
    target: ParallelTensorCollection,
    *,
    placement: Sequence[int] | None = None,
    topology: Topology | None = None,
    relay: bool = False,
    fan_out: bool = False,
    source_policy: Literal["balanced", "first"] = "balanced",
    lost: Sequence[int] = (),
) -> ReshardPlan:
    """Plan the moves from ``source`` to ``target``.

    Args:
        placement: ``placement[role] = worker``; the identity by default (see :func:`assign_roles`).
        topology: prefers holders on the same host; without it all workers are one host.
        relay: what several workers of a host lack comes in once and is passed on inside the host.
        fan_out: where more than two workers of a host need something for each that holds it, each gets a part
            and passes it on to the others, so that nobody sends more than about one copy.
        source_policy: ``"balanced"`` shares the load among replica holders; ``"first"`` always takes the
            lowest holder, as the paper's code does (for comparison).
        lost: source ranks whose shards are gone, named in the error.

    Raises:
        UncoveredRangeError: a needed range has no holder.
        ValueError: shapes or dtypes differ, or the placement is not one.
    """
    placement = tuple(range(target.world_size)) if placement is None else tuple(placement)
    check_compatible(source, target, placement)
    workers = max(source.world_size, target.world_size)
    topology = topology or Topology(ranks_per_host=workers)
    builder = _Builder(workers, topology, relay=relay, fan_out=fan_out, lost=lost)
    with collection_paused():
        for key, cells in cells_of(source, target, placement):
            for cell in cells:
                builder.add(key, cell, target.itemsize(key))
        return ReshardPlan(builder.moves(source_policy), workers, placement, topology)


@dataclass(slots=True)
class _Demand:
    """A cell that one worker lacks, who may send it, and who gets it from the receiver afterwards."""

    key: str
    cell: Cell
    itemsize: int
    target: int
    holders: Class
    passed_on: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.cell.box.numel * self.itemsize


class _Builder:
    def __init__(
        self, workers: int, topology: Topology, *, relay: bool, fan_out: bool, lost: Sequence[int]
    ) -> None:
        self.workers, self.topology, self.lost = workers, topology, lost
        self.relay, self.fan_out = relay, fan_out
        self.demands: list[_Demand] = []
        self.local: list[Move] = []
        self._relayed = 0

    def add(self, key: str, cell: Cell, itemsize: int) -> None:
        lacking = [worker for worker in cell.needers if worker not in cell.holders]
        for worker, shards in cell.needers.items():
            if worker in cell.holders:
                nbytes = cell.box.numel * itemsize
                for shard in shards:
                    self.local.append(
                        Move(key, cell.box, worker, worker, cell.holders[worker], shard, nbytes, 0)
                    )
        if lacking and not cell.holders:
            raise UncoveredRangeError(key, cell.box, self.lost)
        by_host: dict[int, list[int]] = {}
        for worker in lacking:
            by_host.setdefault(self.topology.host(worker), []).append(worker)
        for host, needers in by_host.items():
            near = tuple(h for h in cell.holders if self.topology.host(h) == host)
            holders = near or tuple(cell.holders)
            if self.relay and not near and len(needers) > 1:
                first = needers[self._relayed % len(needers)]
                self._relayed += 1
                others = tuple(worker for worker in needers if worker != first)
                self.demands.append(_Demand(key, cell, itemsize, first, holders, others))
            elif self.fan_out and len(needers) > _FEW * len(holders):
                self._scatter(key, cell, itemsize, needers, holders)
            else:
                for worker in needers:
                    self.demands.append(_Demand(key, cell, itemsize, worker, holders, ()))

    def _scatter(self, key: str, cell: Cell, itemsize: int, needers: Sequence[int], holders: Class) -> None:
        """A part for each needer, which then passes it on; the first one changes with every cell."""
        self._relayed += 1
        turned = [needers[(self._relayed + i) % len(needers)] for i in range(len(needers))]
        for worker, box in zip(turned, _parts(cell.box, len(turned)), strict=False):
            others = tuple(w for w in turned if w != worker)
            part = Cell(box, cell.holders, cell.needers)
            self.demands.append(_Demand(key, part, itemsize, worker, holders, others))

    def moves(self, policy: Literal["balanced", "first"]) -> list[Move]:
        moves = list(self.local)
        if policy == "first":
            for demand in self.demands:
                moves += self._filled(demand, demand.cell.box, min(demand.cell.holders))
        elif policy == "balanced":
            moves += self._balanced()
        else:
            raise ValueError(f"source_policy must be balanced or first, got {policy!r}")
        return sorted(moves, key=lambda move: move.phase)

    def _balanced(self) -> Iterator[Move]:
        base = [0] * self.workers
        shared: dict[Class, int] = {}
        for demand in self.demands:
            if len(demand.holders) == 1:
                base[demand.holders[0]] += demand.nbytes
            else:
                shared[demand.holders] = shared.get(demand.holders, 0) + demand.nbytes
        quotas, optimum = balanced_quotas(shared, base)
        unsplit = max(1, min(_UNSPLIT_BYTES, int(optimum / 200)))
        for demand in self.demands:
            if len(demand.holders) == 1:
                yield from self._filled(demand, demand.cell.box, demand.holders[0])
                continue
            for box, sender in _share(demand, quotas[demand.holders], unsplit):
                yield from self._filled(demand, box, sender)

    def _filled(self, demand: _Demand, box: Box, sender: int) -> Iterator[Move]:
        """The move itself, then copies into further shards of the receiver, then what it passes on."""
        nbytes = box.numel * demand.itemsize
        cell, receiver = demand.cell, demand.target
        first, *others = cell.needers[receiver]
        yield Move(demand.key, box, sender, receiver, cell.holders[sender], first, nbytes, 0)
        for shard in others:
            yield Move(demand.key, box, receiver, receiver, first, shard, nbytes, 1)
        for worker in demand.passed_on:
            shard, *rest = cell.needers[worker]
            yield Move(demand.key, box, receiver, worker, first, shard, nbytes, 1)
            for further in rest:
                yield Move(demand.key, box, worker, worker, shard, further, nbytes, 2)


def _share(demand: _Demand, quota: dict[int, float], unsplit: int) -> Iterator[tuple[Box, int]]:
    """Cut the demand among its holders by what is left of their quotas, and reduce these."""
    box = demand.cell.box
    while True:
        sender = max(demand.holders, key=lambda worker: (quota[worker], -worker))
        nbytes = box.numel * demand.itemsize
        axis = max(range(len(box.shape)), key=lambda d: box.shape[d]) if box.shape else -1
        if nbytes <= quota[sender] or nbytes <= unsplit or axis < 0 or box.shape[axis] < 2:
            quota[sender] -= nbytes
            yield box, sender
            return
        slice_bytes = nbytes // box.shape[axis]
        count = max(1, min(box.shape[axis] - 1, round(quota[sender] / slice_bytes)))
        head, box = split_box(box, axis, count)
        quota[sender] -= count * slice_bytes
        yield head, sender


def _parts(box: Box, count: int) -> Iterator[Box]:
    """Up to ``count`` boxes of about equal size that make up ``box``, cut along its longest axis."""
    axis = max(range(len(box.shape)), key=lambda d: box.shape[d]) if box.shape else -1
    while axis >= 0 and count > 1 and box.shape[axis] > 1:
        head, box = split_box(box, axis, -(-box.shape[axis] // count))
        yield head
        count -= 1
    yield box


def split_box(box: Box, axis: int, count: int) -> tuple[Box, Box]:
    """The first ``count`` indices of ``axis``, and the rest."""
    head = Box(box.offset, (*box.shape[:axis], count, *box.shape[axis + 1 :]))
    offset = (*box.offset[:axis], box.offset[axis] + count, *box.offset[axis + 1 :])
    tail = Box(offset, (*box.shape[:axis], box.shape[axis] - count, *box.shape[axis + 1 :]))
    return head, tail
