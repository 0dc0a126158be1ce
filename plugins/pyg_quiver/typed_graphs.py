"""The graphs of one data object by edge type, with times and weights in the order that sampling needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import Data, FeatureStore, GraphStore, HeteroData

from pyg_quiver.backends.contract import Frontier, Graph
from pyg_quiver.topology import CSCTopology

EdgeType = tuple[str, str, str]

HOMOGENEOUS: EdgeType = ("", "", "")


@dataclass(frozen=True)
class TypedGraphs:
    """Graphs by edge type; a homogeneous graph has the one type :data:`HOMOGENEOUS`.

    Attributes:
        graphs: in-neighbours by (source type, relation, target type).
        permutations: original edge number at each CSC position, or None where it is the same.
        num_nodes: nodes by node type.
        node_time: int64 time of each node, by type; empty without.
        is_hetero: whether types are the user's.
    """

    graphs: dict[EdgeType, Graph]
    permutations: dict[EdgeType, Tensor | None]
    num_nodes: dict[str, int]
    node_time: dict[str, Tensor] = field(default_factory=dict)
    is_hetero: bool = False

    @classmethod
    def from_data(
        cls,
        data: CSCTopology | Data | HeteroData | tuple[FeatureStore, GraphStore],
        *,
        time_attr: str | None = None,
        weight_attr: str | None = None,
    ) -> TypedGraphs:
        """Collect graphs, times and weights.

        Raises:
            ValueError: an attribute that is missing or not supported for this kind of data.
        """
        if isinstance(data, HeteroData):
            return _from_hetero_data(data, time_attr, weight_attr)
        if isinstance(data, Data):
            return _from_homogeneous_data(data, time_attr, weight_attr)
        if weight_attr is not None:
            raise ValueError("weight_attr needs Data or HeteroData: stores carry no edge attributes")
        topology = data if isinstance(data, CSCTopology) else CSCTopology.from_data(data)
        is_hetero = not isinstance(topology, CSCTopology)
        by_type = topology if isinstance(topology, dict) else {HOMOGENEOUS: topology}
        times = {} if time_attr is None else _store_times(data, time_attr)
        num_nodes: dict[str, int] = {}
        for (source, _, target), one in by_type.items():
            num_nodes[source] = max(num_nodes.get(source, 0), one.num_src_nodes)
            num_nodes[target] = max(num_nodes.get(target, 0), one.num_nodes)
        for kind, one in by_type.items():
            if kind[0] in times:
                by_type = {**by_type, kind: one.sorted_by(times[kind[0]])}
        return cls(
            {
                kind: _graph(one, num_nodes[kind[2]], node_time=times.get(kind[0]))
                for kind, one in by_type.items()
            },
            {kind: one.edge_permutation for kind, one in by_type.items()},
            num_nodes,
            times,
            is_hetero,
        )

    @property
    def only_type(self) -> EdgeType:
        """The edge type of a homogeneous graph."""
        return HOMOGENEOUS

    @property
    def device(self) -> torch.device:
        """Where samples are made: where ``colptr`` lies (the CPU where there are no edge types)."""
        return next((graph.colptr.device for graph in self.graphs.values()), torch.device("cpu"))

    @property
    def is_temporal(self) -> bool:
        """Whether neighbours are limited by time."""
        return any(self.has_time(kind) for kind in self.graphs)

    def fingerprint(self) -> str:
        """Digits that tell graphs apart (see :meth:`CSCTopology.fingerprint`), of each edge type."""
        return " ".join(
            CSCTopology(graph.colptr.cpu(), graph.row.cpu(), num_src_nodes=graph.num_src_nodes).fingerprint()
            for _, graph in sorted(self.graphs.items())
        )

    def has_time(self, kind: EdgeType) -> bool:
        """Whether the neighbours of this edge type have times."""
        return self.graphs[kind].node_time is not None or self.graphs[kind].edge_time is not None

    def seed_time(self, kind: str, node: Tensor, time: Tensor | None) -> Tensor | None:
        """Time limit of each seed: as given, else the time of the seed node itself."""
        if not self.is_temporal:
            return None
        if time is not None:
            return time.to(node.device, torch.int64)
        if kind not in self.node_time:
            raise ValueError(
                "sampling by edge time needs the time of each seed: pass input_time (edge_label_time)"
            )
        return self.node_time[kind][node]

    def to(self, device: str) -> TypedGraphs:
        """A copy on a device."""
        return self._map(lambda tensor: tensor.to(device), lambda tensor: tensor.to(device))

    def to_uva(self, device: str, hot_columns: Tensor | None = None) -> TypedGraphs:
        """``colptr`` on the device; edges pinned in host memory, where kernels read them in place.

        Args:
            device: of the kernels.
            hot_columns: nodes of a homogeneous graph whose columns are also copied to the device.
        """
        moved = self._map(lambda tensor: tensor.to(device), lambda tensor: tensor.cpu().pin_memory())
        if hot_columns is None:
            return moved
        if self.is_hetero:
            raise ValueError("hot_columns are for homogeneous graphs")
        return replace(moved, graphs={HOMOGENEOUS: with_hot_columns(moved.graphs[HOMOGENEOUS], hot_columns)})

    def _map(self, nodes: Callable[[Tensor], Tensor], edges: Callable[[Tensor], Tensor]) -> TypedGraphs:
        def moved(graph: Graph) -> Graph:
            return replace(
                graph,
                colptr=nodes(graph.colptr),
                row=edges(graph.row),
                node_time=None if graph.node_time is None else nodes(graph.node_time),
                edge_time=None if graph.edge_time is None else nodes(graph.edge_time),
            )

        return replace(
            self,
            graphs={kind: moved(graph) for kind, graph in self.graphs.items()},
            permutations={k: None if p is None else nodes(p) for k, p in self.permutations.items()},
            node_time={kind: nodes(time) for kind, time in self.node_time.items()},
        )

    def induced(self, kind: EdgeType, target: Frontier, source: Frontier) -> tuple[Tensor, Tensor, Tensor]:
        """All edges of a type among sampled nodes of one group: (row, col, CSC positions), by target.

        Args:
            kind: edge type.
            target: sampled nodes of the target type, with their groups.
            source: sampled nodes of the source type, likewise.
        """
        graph, nodes, node = self.graphs[kind], self.num_nodes[kind[0]], target.node
        start = graph.colptr[node]
        count = graph.colptr[node + 1] - start
        col = torch.repeat_interleave(torch.arange(node.numel(), device=node.device), count)
        edge = torch.arange(col.numel(), device=node.device) - (count.cumsum(0) - count)[col] + start[col]
        if source.node.numel() == 0 or edge.numel() == 0:
            return col[:0], col[:0], edge[:0]
        neighbour = graph.row[edge.to(graph.row.device)].to(node.device, torch.int64)
        wanted = target.group[col] * nodes + neighbour
        keys, order = torch.sort(source.group * nodes + source.node, stable=True)
        at = torch.searchsorted(keys, wanted).clamp(max=keys.numel() - 1)
        found = keys[at] == wanted
        return order[at[found]], col[found], edge[found]


def with_hot_columns(graph: Graph, columns: Tensor) -> Graph:
    """A graph with copies of some nodes' columns where ``colptr`` lies."""
    device, columns = graph.colptr.device, columns.cpu()
    colptr = graph.colptr.cpu()
    start, count = colptr[columns], colptr[columns + 1] - colptr[columns]
    first = count.cumsum(0) - count
    hot_start = torch.full((colptr.numel() - 1,), -1, dtype=torch.int64)
    hot_start[columns] = first
    edge = torch.arange(int(count.sum())) + torch.repeat_interleave(start - first, count)
    hot_row = graph.row[edge.to(graph.row.device)]
    return replace(graph, hot_start=hot_start.to(device), hot_row=hot_row.to(device))


def _graph(topology: CSCTopology, num_nodes: int, **times: Tensor | None) -> Graph:
    """Targets beyond the topology's have no neighbours."""
    missing = num_nodes - topology.num_nodes
    colptr = topology.colptr
    if missing:
        colptr = torch.cat([colptr, colptr[-1:].expand(missing)])
    return Graph(colptr, topology.row, topology.num_src_nodes, **times)


def _store_times(data: Any, time_attr: str) -> dict[str, Tensor]:
    """Node times of a feature store, by node type."""
    found = {}
    if isinstance(data, tuple):
        for attr in data[0].get_all_tensor_attrs():
            if attr.attr_name == time_attr:
                kind = "" if attr.group_name is None else attr.group_name
                found[kind] = data[0].get_tensor(attr.group_name, attr.attr_name, None).cpu().long()
    if not found:
        raise ValueError(
            f"time_attr {time_attr!r} is no attribute of the feature store (stores have no edge attributes)"
        )
    return found


def _weight(store: Any, name: str | None, permutation: Tensor | None) -> Tensor | None:
    if name is None:
        return None
    if name not in store:
        raise ValueError(f"weight_attr {name!r} is not an edge attribute")
    weight = store[name].double().flatten()
    if bool((weight < 0).any()):
        raise ValueError(f"weight_attr {name!r} has negative weights")
    return weight if permutation is None else weight[permutation]


def _typed(
    store: Any,
    size: tuple[int, int],
    weight_attr: str | None,
    node_time: Tensor | None,
    edge_time: Tensor | None,
) -> tuple[Graph, Tensor | None]:
    order = edge_time
    if order is None and node_time is not None:
        order = node_time[store.edge_index[0]]
    if order is None:
        topology = CSCTopology.from_store(store, size)
    else:
        topology = CSCTopology.from_edge_index(store.edge_index, size, order=order)
    permutation = topology.edge_permutation
    sorted_time = edge_time if edge_time is None or permutation is None else edge_time[permutation]
    graph = _graph(
        topology,
        size[1],
        weight=_weight(store, weight_attr, permutation),
        node_time=node_time,
        edge_time=sorted_time,
    )
    return graph, permutation


def _from_homogeneous_data(data: Data, time_attr: str | None, weight_attr: str | None) -> TypedGraphs:
    node_time = edge_time = None
    if time_attr is not None:
        if time_attr in data and data.is_node_attr(time_attr):
            node_time = data[time_attr].long()
        elif time_attr in data and data.is_edge_attr(time_attr):
            edge_time = data[time_attr].long()
        else:
            raise ValueError(f"time_attr {time_attr!r} is neither a node nor an edge attribute")
    nodes = data.num_nodes
    graph, permutation = _typed(data, (nodes, nodes), weight_attr, node_time, edge_time)
    return TypedGraphs(
        {HOMOGENEOUS: graph},
        {HOMOGENEOUS: permutation},
        {"": nodes},
        {} if node_time is None else {"": node_time},
    )


def _from_hetero_data(data: HeteroData, time_attr: str | None, weight_attr: str | None) -> TypedGraphs:
    node_time = {
        kind: data[kind][time_attr].long()
        for kind in data.node_types
        if time_attr and time_attr in data[kind]
    }
    graphs: dict[EdgeType, Graph] = {}
    permutations: dict[EdgeType, Tensor | None] = {}
    edge_timed = [kind for kind in data.edge_types if time_attr and time_attr in data[kind]]
    if time_attr is not None and not node_time and not edge_timed:
        raise ValueError(f"time_attr {time_attr!r} is neither a node nor an edge attribute")
    if node_time and edge_timed:
        raise ValueError(f"time_attr {time_attr!r} is an attribute of both nodes and edges")
    for kind in data.edge_types:
        size = (data[kind[0]].num_nodes, data[kind[2]].num_nodes)
        edge_time = data[kind][time_attr].long() if kind in edge_timed else None
        weight = weight_attr if weight_attr is not None and weight_attr in data[kind] else None
        graphs[kind], permutations[kind] = _typed(data[kind], size, weight, node_time.get(kind[0]), edge_time)
    if weight_attr is not None and all(graph.weight is None for graph in graphs.values()):
        raise ValueError(f"weight_attr {weight_attr!r} is not an edge attribute")
    num_nodes = {kind: data[kind].num_nodes for kind in data.node_types}
    return TypedGraphs(graphs, permutations, num_nodes, node_time, is_hetero=True)
