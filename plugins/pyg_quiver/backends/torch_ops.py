"""The sampler in plain torch operations: the twin of the compiled backends, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from pyg_quiver.backends.contract import Draws, Frontier, Graph, empty_int64
from pyg_quiver.rng import GOLDEN, MULTIPLIER_1, MULTIPLIER_2

_UNSEEN = torch.iinfo(torch.int64).max
_SEEN = -(1 << 62)  # a node with position p is entered as p + _SEEN, below every edge number


def _signed(value: int) -> int:
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical right shift of 64 bits held in int64."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def mix(z: Tensor) -> Tensor:
    """``rng.mix`` of int64 tensors (64 bits, signed)."""
    z = (z ^ _shift(z, 30)) * _signed(MULTIPLIER_1)
    z = (z ^ _shift(z, 27)) * _signed(MULTIPLIER_2)
    return z ^ _shift(z, 31)


def draw_below(key: Tensor, step: int, limit: Tensor) -> Tensor:
    """``rng.draw``; ``limit`` below 2**31."""
    return _shift(_shift(mix(key + _signed(step * GOLDEN)), 32) * limit, 32)


def _eligible(graph: Graph, start: Tensor, end: Tensor, limit: Tensor) -> Tensor:
    """End of the neighbours no later than ``limit``, by bisection of all neighbourhoods at once."""
    low, high = start.clone(), end.clone()
    last = max(graph.row.numel() - 1, 0)
    while bool((low < high).any()):
        middle = (low + high) // 2
        at = middle.clamp(max=last)
        if graph.edge_time is not None:
            time = graph.edge_time[at]
        else:
            assert graph.node_time is not None
            time = graph.node_time[graph.row[at].long()]
        right = (low < high) & (time <= limit)
        high = torch.where((low < high) & ~right, middle, high)
        low = torch.where(right, middle + 1, low)
    return low


def _picks(key: Tensor, degree: Tensor, fanout: int, replace: bool) -> Tensor:
    """Drawn offsets ``[F, fanout]``: with replacement, or Floyd's algorithm for all nodes at once."""
    picks = torch.empty(key.numel(), fanout, dtype=torch.int64, device=key.device)
    for s in range(fanout):
        if replace:
            picks[:, s] = draw_below(key, s, degree)
            continue
        last = degree - fanout + s
        pick = draw_below(key, s, last + 1)
        taken = (picks[:, :s] == pick.unsqueeze(1)).any(1)
        picks[:, s] = torch.where(taken, last, pick)
    return picks


class TorchBackend:
    """:class:`pyg_quiver.backends.contract.HopBackend` in torch operations."""

    def draw(
        self, graph: Graph, frontier: Frontier, draws: Draws, hop: int, fanout: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See the contract."""
        node, group = frontier.node, frontier.group
        if graph.weight is not None:
            raise ImportError("weight_attr needs backend='numba': pip install numba")
        if graph.colptr.numel() == 1 or node.numel() == 0:
            return (empty_int64(node.device),) * 3
        start, degree = graph.colptr[node], graph.colptr[node + 1] - graph.colptr[node]
        if draws.group_time is not None:
            degree = _eligible(graph, start, start + degree, draws.group_time[group]) - start
            if draws.last and fanout >= 0:
                start = start + (degree - fanout).clamp(min=0)
                degree = degree.clamp(max=fanout)
        if fanout < 0:
            count = degree
            whole = torch.ones_like(degree, dtype=torch.bool)
        else:
            whole = torch.zeros_like(degree, dtype=torch.bool) if draws.replace else degree <= fanout
            count = torch.where(whole, degree, torch.where(degree > 0, fanout, 0))
        drawn = (~whole & (count > 0)).nonzero().squeeze(1)
        col = torch.repeat_interleave(torch.arange(node.numel(), device=node.device), count)
        step = torch.arange(col.numel(), device=node.device) - (count.cumsum(0) - count)[col]
        offset = step
        if drawn.numel():
            key = mix(draws.streams[group[drawn]] ^ mix(node[drawn] << 8 | hop))
            picks = _picks(key, degree[drawn], fanout, draws.replace)
            place = torch.zeros_like(degree)
            place[drawn] = torch.arange(drawn.numel(), device=node.device)
            chosen = picks[place[col], step.clamp(max=max(fanout - 1, 0))]
            offset = torch.where(whole[col], step, chosen)
        edge = start[col] + offset
        return edge, col, graph.row[edge].long()

    def table(self, num_nodes: int, seeds: Frontier, groups: int) -> TorchTable:
        """See the contract."""
        return TorchTable(num_nodes, seeds, dense=groups == 1)


class TorchTable:
    """Positions by the smallest edge number that names a node, so that order does not depend on threads.

    The dense form holds one int64 a node of the graph; otherwise ids are first made dense by sorting.
    """

    def __init__(self, num_nodes: int, seeds: Frontier, *, dense: bool) -> None:
        self.node, self.group = seeds.node, seeds.group
        self._num_nodes = num_nodes
        self._slot: Tensor | None = None
        if dense:
            self._slot = torch.full((num_nodes,), _UNSEEN, dtype=torch.int64, device=self.node.device)
            self._enter_known(self._slot, self.node)

    @staticmethod
    def _enter_known(slot: Tensor, node: Tensor) -> None:
        positions = torch.arange(node.numel(), device=node.device) + _SEEN
        slot.scatter_reduce_(0, node, positions, "amin")

    def add(self, node: Tensor, group: Tensor) -> Tensor:
        """See the contract."""
        if node.numel() == 0:
            return node
        if self._slot is not None:
            return self._number(self._slot, node, node, group)
        known = self.group * self._num_nodes + self.node
        compact, inverse = torch.cat([known, group * self._num_nodes + node]).unique(return_inverse=True)
        slot = torch.full((compact.numel(),), _UNSEEN, dtype=torch.int64, device=node.device)
        self._enter_known(slot, inverse[: known.numel()])
        return self._number(slot, inverse[known.numel() :], node, group)

    def _number(self, slot: Tensor, at: Tensor, node: Tensor, group: Tensor) -> Tensor:
        order = torch.arange(node.numel(), device=node.device)
        slot.scatter_reduce_(0, at, order, "amin")
        new = (slot[at] == order).nonzero().squeeze(1)
        slot[at[new]] = self.node.numel() + torch.arange(new.numel(), device=node.device) + _SEEN
        self.node = torch.cat([self.node, node[new]])
        self.group = torch.cat([self.group, group[new]])
        return slot[at] - _SEEN
