"""Sampling hop by hop over any number of edge types, on top of a :class:`HopBackend`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyg_quiver.backends.contract import Draws, Frontier, Graph, HopBackend, Sampled, empty_int64

EdgeType = tuple[str, str, str]


@dataclass(frozen=True)
class SampledTypes:
    """A sampled heterogeneous subgraph: the fields of :class:`Sampled` by node or edge type."""

    node: dict[str, Tensor]
    row: dict[EdgeType, Tensor]
    col: dict[EdgeType, Tensor]
    edge: dict[EdgeType, Tensor]
    group: dict[str, Tensor]
    nodes_per_hop: dict[str, list[int]]
    edges_per_hop: dict[EdgeType, list[int]]


def sample_types(
    backend: HopBackend,
    graphs: Mapping[EdgeType, Graph],
    seeds: Mapping[str, Frontier],
    *,
    num_nodes: Mapping[str, int],
    fanouts: Mapping[EdgeType, Sequence[int]],
    draws: Mapping[EdgeType, Draws],
) -> SampledTypes:
    """Sample hop by hop; in a hop, edge types come in sorted order and see the nodes of the hop before.

    Args:
        backend: draws and tables.
        graphs: in-neighbours by edge type (source type, relation, target type).
        seeds: seeds by node type.
        num_nodes: nodes of the graph by type.
        fanouts: neighbours per hop by edge type, equally many hops for each.
        draws: how neighbours are drawn, by edge type; the same number of groups for each.
    """
    groups = max((draw.streams.numel() for draw in draws.values()), default=1)
    device = next(iter(seeds.values())).node.device
    nobody = Frontier(empty_int64(device), empty_int64(device))
    tables = {kind: backend.table(num_nodes[kind], seeds.get(kind, nobody), groups) for kind in num_nodes}
    pieces: dict[EdgeType, list[tuple[Tensor, Tensor, Tensor]]] = {kind: [] for kind in sorted(graphs)}
    begin = dict.fromkeys(num_nodes, 0)
    nodes_per_hop = {kind: [table.node.numel()] for kind, table in tables.items()}
    for hop in range(max((len(f) for f in fanouts.values()), default=0)):
        end = {kind: table.node.numel() for kind, table in tables.items()}
        for edge_type, parts in pieces.items():
            source, _, target = edge_type
            members = slice(begin[target], end[target])
            frontier = Frontier(tables[target].node[members], tables[target].group[members])
            edge, col, neighbour = backend.draw(
                graphs[edge_type], frontier, draws[edge_type], hop, fanouts[edge_type][hop]
            )
            row = tables[source].add(neighbour, frontier.group[col])
            parts.append((row, col + begin[target], edge))
        for kind, table in tables.items():
            nodes_per_hop[kind].append(table.node.numel() - end[kind])
        begin = end
    return SampledTypes(
        node={kind: table.node for kind, table in tables.items()},
        row={kind: _joined(parts, 0, device) for kind, parts in pieces.items()},
        col={kind: _joined(parts, 1, device) for kind, parts in pieces.items()},
        edge={kind: _joined(parts, 2, device) for kind, parts in pieces.items()},
        group={kind: table.group for kind, table in tables.items()},
        nodes_per_hop=nodes_per_hop,
        edges_per_hop={kind: [part[2].numel() for part in parts] for kind, parts in pieces.items()},
    )


def sample_one_type(
    backend: HopBackend, graph: Graph, seeds: Frontier, fanouts: Sequence[int], draws: Draws
) -> Sampled:
    """The same for a homogeneous graph."""
    kind = ("", "", "")
    out = sample_types(
        backend, {kind: graph}, {"": seeds},
        num_nodes={"": graph.num_src_nodes}, fanouts={kind: fanouts}, draws={kind: draws},
    )  # fmt: skip
    return Sampled(
        out.node[""], out.row[kind], out.col[kind], out.edge[kind], out.group[""],
        out.nodes_per_hop[""], out.edges_per_hop[kind],
    )  # fmt: skip


def _joined(parts: list[tuple[Tensor, Tensor, Tensor]], field: int, device: torch.device) -> Tensor:
    return torch.cat([part[field] for part in parts]) if parts else empty_int64(device)
