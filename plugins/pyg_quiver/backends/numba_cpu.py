"""CPU sampler in numba: releases the GIL, one thread a call, scratch maps kept per thread."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from pyg_quiver.backends import numba_kernels as kernels
from pyg_quiver.backends.contract import Draws, Frontier, Graph, Sampled

DENSE_MAP_NODES = 50_000_000  # above, a hash map replaces 4 bytes a node and thread

_PIECES_PER_THREAD = 4
_EDGES_PER_PIECE = 4096  # fewer cost more to hand over than to draw

_NO_WEIGHT = np.empty(0, np.float64)
_NO_TIME = np.empty(0, np.int64)
_NO_SLOT = np.empty(0, np.int32)

_local = threading.local()


def dense_map(num_nodes: int) -> np.ndarray:
    """This thread's map from node to local id, all -1 between calls; one for each size in use."""
    maps = _local.__dict__.setdefault("maps", {})
    if num_nodes not in maps:
        maps[num_nodes] = np.full(num_nodes, -1, np.int32)
    return maps[num_nodes]


_known: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _arrays(graph: Graph) -> kernels.GraphArrays:
    """The graph as arrays; kept, since making them takes a tenth of a small batch."""
    arrays = _known.get(graph)
    if arrays is None:
        arrays = _known[graph] = _as_arrays(graph)
    return arrays


def _as_arrays(graph: Graph) -> kernels.GraphArrays:
    return kernels.GraphArrays(
        graph.colptr.numpy(),
        graph.row.numpy(),
        _NO_WEIGHT if graph.weight is None else graph.weight.numpy(),
        _NO_TIME if graph.node_time is None else graph.node_time.numpy(),
        _NO_TIME if graph.edge_time is None else graph.edge_time.numpy(),
    )


def _streams(draws: Draws) -> np.ndarray:
    return draws.streams.numpy().view(np.uint64)


def _times(draws: Draws) -> np.ndarray:
    return _NO_TIME if draws.group_time is None else draws.group_time.numpy()


def sample(
    graph: Graph, seeds: Frontier, fanouts: Sequence[int], draws: Draws, *, num_threads: int = 1
) -> Sampled:
    """Sample a homogeneous graph in one compiled call (arguments: ``hops.sample_one_type``).

    With several threads, and where a dense map serves, hops are drawn in pieces by a pool of threads while
    this one relabels the pieces that are done; the result is the same.
    """
    num_nodes = graph.colptr.numel() - 1
    hashed = draws.streams.numel() > 1 or num_nodes > DENSE_MAP_NODES
    if num_threads > 1 and not hashed and graph.weight is None and seeds.node.numel():
        return _sample_with_threads(graph, seeds, fanouts, draws, num_threads)
    slot = _NO_SLOT if hashed else dense_map(num_nodes)
    out = kernels.sample(
        _arrays(graph), seeds.node.numpy(), seeds.group.numpy(), _streams(draws),
        np.asarray(fanouts, np.int64), draws.replace, draws.last, _times(draws), slot, hashed,
    )  # fmt: skip
    node, row, col, edge, group = (torch.from_numpy(array) for array in out[:5])
    return Sampled(node, row, col, edge, group, out[5].tolist(), out[6].tolist())


@cache
def _pool(num_threads: int, process: int) -> ThreadPoolExecutor:
    """Threads of this process: those of a parent do not survive a fork."""
    return ThreadPoolExecutor(num_threads, thread_name_prefix="pyg_quiver_draw")


def _sample_with_threads(
    graph: Graph, seeds: Frontier, fanouts: Sequence[int], draws: Draws, num_threads: int
) -> Sampled:
    arrays, slot = _arrays(graph), dense_map(graph.colptr.numel() - 1)
    nodes, count = seeds.node.numpy().copy(), seeds.node.numel()
    kernels.place_seeds(slot, _NO_TIME, _NO_TIME, len(slot), False, nodes, seeds.group.numpy(), 0, count)
    pieces: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    ends, begin = [0, count], 0
    try:
        for hop, fanout in enumerate(fanouts):
            edge, col, local, futures = _draw_pieces(
                arrays, nodes, draws, begin=begin, end=count, hop=hop, fanout=fanout, num_threads=num_threads
            )
            nodes = np.concatenate([nodes[:count], np.empty(min(len(edge), len(slot)), np.int64)])
            begin = count
            for future in futures:
                first, last = future.result()
                count = kernels.relabel_dense(slot, local, first, last, nodes, count)
            pieces.append((local, col, edge))
            ends.append(count)
    finally:
        slot[nodes[:count]] = -1
    joined = [
        torch.from_numpy(np.concatenate([piece[i] for piece in pieces] or [_NO_TIME])) for i in range(3)
    ]
    node = torch.from_numpy(nodes[:count])
    rows, cols, edges = joined
    nodes_per_hop, edges_per_hop = [b - a for a, b in pairwise(ends)], [len(piece[0]) for piece in pieces]
    return Sampled(node, rows, cols, edges, torch.zeros_like(node), nodes_per_hop, edges_per_hop)


def _draw_pieces(
    arrays: kernels.GraphArrays, nodes: np.ndarray, draws: Draws, *,
    begin: int, end: int, hop: int, fanout: int, num_threads: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[Future[tuple[int, int]]]]:  # fmt: skip
    """Start drawing the frontier ``nodes[begin:end]``; each Future gives the range of edges that is ready."""
    size = end - begin
    starts, degrees = np.empty(size, np.int64), np.empty(size, np.int64)
    offsets = np.empty(size + 1, np.int64)
    groups = np.zeros(end, np.int64)
    total = kernels.plan_hop(
        arrays, nodes, groups, begin, end, fanout, draws.replace, draws.last, _times(draws),
        starts, degrees, offsets,
    )  # fmt: skip
    edge, col, local = np.empty(total, np.int64), np.empty(total, np.int64), np.empty(total, np.int64)
    streams = _streams(draws)

    def draw(first: int, last: int) -> tuple[int, int]:
        kernels.draw_hop(
            nodes, groups, streams, begin, begin + first, begin + last, hop, fanout, draws.replace,
            arrays.weight, starts, degrees, offsets, edge, col, 0,
        )  # fmt: skip
        span = int(offsets[first]), int(offsets[last])
        kernels.neighbours(arrays.row, edge, local, *span)
        return span

    parts = max(min(_PIECES_PER_THREAD * num_threads, total // _EDGES_PER_PIECE), 1)
    cuts = np.searchsorted(offsets, np.linspace(0, total, parts + 1)[1:-1]).tolist()
    pool = _pool(num_threads, os.getpid())
    return edge, col, local, [pool.submit(draw, a, b) for a, b in pairwise([0, *cuts, size])]


class NumbaBackend:
    """:class:`~pyg_quiver.backends.contract.HopBackend` in compiled code, one call a hop and edge type."""

    def draw(
        self, graph: Graph, frontier: Frontier, draws: Draws, hop: int, fanout: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See the contract."""
        arrays, nodes, groups = _arrays(graph), frontier.node.numpy(), frontier.group.numpy()
        size = len(nodes)
        starts, degrees = np.empty(size, np.int64), np.empty(size, np.int64)
        offsets = np.empty(size + 1, np.int64)
        total = kernels.plan_hop(
            arrays, nodes, groups, 0, size, fanout, draws.replace, draws.last, _times(draws),
            starts, degrees, offsets,
        )  # fmt: skip
        edge, col = np.empty(total, np.int64), np.empty(total, np.int64)
        total = kernels.draw_hop(
            nodes, groups, _streams(draws), 0, 0, size, hop, fanout, draws.replace, arrays.weight,
            starts, degrees, offsets, edge, col, 0,
        )  # fmt: skip
        neighbour = np.empty(total, np.int64)
        kernels.neighbours(arrays.row, edge, neighbour, 0, total)
        return torch.from_numpy(edge[:total]), torch.from_numpy(col[:total]), torch.from_numpy(neighbour)

    def table(self, num_nodes: int, seeds: Frontier, groups: int) -> NumbaTable:
        """See the contract."""
        return NumbaTable(num_nodes, seeds)


class NumbaTable:
    """Node table by hashing, so that several node types need no map each."""

    def __init__(self, num_nodes: int, seeds: Frontier) -> None:
        self.node, self.group = seeds.node, seeds.group
        self._num_nodes = max(num_nodes, 1)
        self._keys, self._values = kernels.place_seeds(
            _NO_SLOT, np.full(1024, -1, np.int64), np.empty(1024, np.int64), self._num_nodes, True,
            self.node.numpy(), self.group.numpy(), 0, self.node.numel(),
        )  # fmt: skip

    def add(self, node: Tensor, group: Tensor) -> Tensor:
        """See the contract."""
        count, size = self.node.numel(), node.numel()
        nodes = np.concatenate([self.node.numpy(), np.empty(size, np.int64)])
        groups = np.concatenate([self.group.numpy(), np.empty(size, np.int64)])
        local = node.numpy().copy()
        self._keys, self._values, count = kernels.relabel_hashed(
            self._keys, self._values, self._num_nodes, local, group.numpy(), 0, size, nodes, groups, count
        )
        self.node, self.group = (
            torch.from_numpy(nodes[:count].copy()),
            torch.from_numpy(groups[:count].copy()),
        )
        return torch.from_numpy(local)
