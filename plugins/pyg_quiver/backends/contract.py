"""What every backend takes and returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Graph:
    """In-neighbours of one edge type: those of v are ``row[colptr[v] : colptr[v + 1]]``.

    Attributes:
        colptr: int64 ``[N + 1]``.
        row: int32 or int64 ``[E]``.
        num_src_nodes: nodes that ``row`` may name.
        weight: float64 ``[E]`` in CSC order, for weighted draws.
        node_time: int64 ``[num_src_nodes]``; each neighbourhood is then sorted by it.
        edge_time: int64 ``[E]`` in CSC order, ascending in each neighbourhood.
        hot_start: int64 ``[N]``, where the copy of each node's column begins in ``hot_row``; -1 without.
        hot_row: copies of some columns in GPU memory, for graphs whose ``row`` is in host memory.
    """

    colptr: Tensor
    row: Tensor
    num_src_nodes: int
    weight: Tensor | None = None
    node_time: Tensor | None = None
    edge_time: Tensor | None = None
    hot_start: Tensor | None = None
    hot_row: Tensor | None = None


@dataclass(frozen=True)
class Frontier:
    """Nodes of one type and their disjoint groups, int64 ``[n]`` each; groups of seeds ascend."""

    node: Tensor
    group: Tensor


@dataclass(frozen=True)
class Draws:
    """How neighbours are drawn.

    Attributes:
        streams: int64 ``[groups]`` (see ``rng.py``).
        replace: with replacement.
        last: the latest neighbours instead of random ones (needs ``group_time``).
        group_time: int64 ``[groups]``, the time that no neighbour may exceed.
    """

    streams: Tensor
    replace: bool = False
    last: bool = False
    group_time: Tensor | None = None


@dataclass(frozen=True)
class Sampled:
    """A sampled subgraph of one node and edge type.

    Attributes:
        node: int64 ``[n]`` nodes: seeds first, then by first appearance.
        row: int64 ``[e]`` sources, as positions in ``node``.
        col: int64 ``[e]`` targets, likewise.
        edge: int64 ``[e]`` CSC positions.
        group: int64 ``[n]`` the disjoint group of each node.
        nodes_per_hop: seeds, then new nodes of each hop.
        edges_per_hop: edges of each hop.
    """

    node: Tensor
    row: Tensor
    col: Tensor
    edge: Tensor
    group: Tensor
    nodes_per_hop: list[int]
    edges_per_hop: list[int]


class NodeTable(Protocol):
    """Nodes of one type in order of appearance, and the map from node to position."""

    node: Tensor
    group: Tensor

    def add(self, node: Tensor, group: Tensor) -> Tensor:
        """Positions of the nodes; those not seen before are appended in order of appearance."""


class HopBackend(Protocol):
    """One hop on one edge type, and the table of nodes; enough to sample any graph hop by hop."""

    def draw(
        self, graph: Graph, frontier: Frontier, draws: Draws, hop: int, fanout: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(CSC positions, index of the target in the frontier, source nodes) of each edge drawn; int64."""

    def table(self, num_nodes: int, seeds: Frontier, groups: int) -> NodeTable:
        """Table that begins with the seeds; repeated seeds keep a row each."""


def empty_int64(device: torch.device | None = None) -> Tensor:
    """An empty list of ids."""
    return torch.empty(0, dtype=torch.int64, device=device)
