"""Which worker plays which role of the new layout, so that as little as possible has to move."""

from __future__ import annotations

import numpy as np
from scipy.optimize import linear_sum_assignment

from megatron_tenplex.cells import cells_of, collection_paused
from megatron_tenplex.ptc import ParallelTensorCollection
from megatron_tenplex.topology import Topology


def assign_roles(
    source: ParallelTensorCollection, target: ParallelTensorCollection, *, topology: Topology | None = None
) -> tuple[int, ...]:
    """``placement[role] = worker`` with the fewest bytes to receive; ties go to the identity.

    With ``topology``, bytes that cross hosts come first: blocks of ``ranks_per_host`` consecutive roles
    (which hold the tensor-parallel groups) are given to hosts, then roles to the workers of each host.

    Exact without ``topology``: an assignment problem on the overlap of what a worker has and a role needs.
    """
    workers = max(source.world_size, target.world_size)
    roles = target.world_size
    held = np.zeros((workers, roles), dtype=np.int64)
    hosts = 1 if topology is None else -(-workers // topology.ranks_per_host)
    blocks = 1 if topology is None else -(-roles // topology.ranks_per_host)
    host_lacks = np.zeros((hosts, blocks), dtype=np.int64)
    with collection_paused():
        for key, cells in cells_of(source, target, range(roles)):
            itemsize = target.itemsize(key)
            for cell in cells:
                nbytes = cell.box.numel * itemsize
                holders, needers = list(cell.holders), list(cell.needers)
                held[np.ix_(holders, needers)] += nbytes
                if topology is not None:
                    _add_host_need(host_lacks, holders, needers, nbytes, topology)
    if topology is None:
        return _assign(held)
    nested = _nested(held, host_lacks, topology)
    identity = tuple(range(roles))
    return min((identity, nested), key=lambda p: _cost(p, held, host_lacks, topology))


def _add_host_need(
    lacks: np.ndarray, holders: list[int], needers: list[int], nbytes: int, topology: Topology
) -> None:
    without = np.ones(len(lacks), dtype=bool)
    without[[topology.host(worker) for worker in holders]] = False
    for role in needers:
        lacks[without, topology.host(role)] += nbytes


def _assign(held: np.ndarray) -> tuple[int, ...]:
    """Maximise the overlap, then the number of roles that stay where they are."""
    roles = held.shape[1]
    value = held * (roles + 1)
    value[range(roles), range(roles)] += 1
    rows, columns = linear_sum_assignment(value, maximize=True)
    worker_of = dict(zip(columns.tolist(), rows.tolist(), strict=True))
    return tuple(worker_of[role] for role in range(roles))


def _nested(held: np.ndarray, host_lacks: np.ndarray, topology: Topology) -> tuple[int, ...]:
    workers, roles = held.shape
    per_host = topology.ranks_per_host
    hosts, blocks = host_lacks.shape
    inside = np.full((hosts, blocks), np.iinfo(np.int64).max // 4)
    choice: dict[tuple[int, int], tuple[int, ...]] = {}
    for host in range(hosts):
        at = range(host * per_host, min((host + 1) * per_host, workers))
        for block in range(blocks):
            of = range(block * per_host, min((block + 1) * per_host, roles))
            if len(of) <= len(at):
                part = held[at.start : at.stop, of.start : of.stop]
                chosen = _assign(part)
                choice[host, block] = tuple(at.start + worker for worker in chosen)
                inside[host, block] = -sum(part[w, r] for r, w in enumerate(chosen))
    feasible = inside < np.iinfo(np.int64).max // 4
    # Bytes between hosts first; the total only decides between equals, so it is scaled below one byte.
    cost = np.full((hosts, blocks), 1e18)
    total = inside[feasible].astype(float)
    span = float(total.max() - total.min()) + 1.0
    cost[feasible] = host_lacks[feasible] + (total - total.min()) / (span * blocks)
    rows, columns = linear_sum_assignment(cost)
    placement = [0] * roles
    for host, block in zip(rows.tolist(), columns.tolist(), strict=True):
        for i, worker in enumerate(choice[host, block]):
            placement[block * per_host + i] = worker
    return tuple(placement)


def _cost(
    placement: tuple[int, ...], held: np.ndarray, host_lacks: np.ndarray, topology: Topology
) -> tuple[int, int]:
    """(bytes between hosts of the blocks at their hosts, minus the overlap)."""
    per_host = topology.ranks_per_host
    blocks = range(0, len(placement), per_host)
    crossing = sum(int(host_lacks[topology.host(placement[b]), b // per_host]) for b in blocks)
    return crossing, -sum(int(held[worker, role]) for role, worker in enumerate(placement))
