"""A slow sampler written from the draw specification alone, in plain Python, and graphs to run it on."""

from __future__ import annotations

import torch

from pyg_quiver import rng


def offsets(key: int, degree: int, fanout: int, replace: bool) -> list[int]:
    """Which neighbours a node draws, as offsets into its neighbourhood."""
    if fanout < 0 or (degree <= fanout and not replace):
        return list(range(degree))
    if degree == 0:
        return []
    if replace:
        return [rng.draw(key, s, degree) for s in range(fanout)]
    taken: list[int] = []
    for s in range(fanout):
        last = degree - fanout + s
        pick = rng.draw(key, s, last + 1)
        taken.append(last if pick in taken else pick)
    return taken


def sample(colptr, row, seeds, groups, streams, fanouts, replace=False):
    """(node, row, col, edge, group, nodes per hop, edges per hop) as lists."""
    node, group = list(seeds), list(groups)
    place: dict[tuple[int, int], int] = {}
    for i, key in enumerate(zip(group, node, strict=True)):
        place.setdefault(key, i)
    rows, cols, edges = [], [], []
    nodes_per_hop, edges_per_hop = [len(node)], []
    begin = 0
    for hop, fanout in enumerate(fanouts):
        end, before = len(node), len(edges)
        for i in range(begin, end):
            start, degree = colptr[node[i]], colptr[node[i] + 1] - colptr[node[i]]
            key = rng.node_key(streams[group[i]], node[i], hop)
            for offset in offsets(key, degree, fanout, replace):
                source = (group[i], row[start + offset])
                if source not in place:
                    place[source] = len(node)
                    node.append(source[1])
                    group.append(source[0])
                rows.append(place[source])
                cols.append(i)
                edges.append(start + offset)
        nodes_per_hop.append(len(node) - end)
        edges_per_hop.append(len(edges) - before)
        begin = end
    return node, rows, cols, edges, group, nodes_per_hop, edges_per_hop


def random_edges(nodes: int, edges: int, seed: int, sources: int | None = None) -> torch.Tensor:
    """A directed multigraph: skewed in-degrees, self loops, parallel edges, nodes without neighbours."""
    generator = torch.Generator().manual_seed(seed)
    target = (torch.rand(edges, generator=generator) ** 3 * nodes).long()
    source = torch.randint(0, sources or nodes, (edges,), generator=generator)
    return torch.stack([source, target])


def check_backend(sample_fn, device: str) -> int:
    """Compare a backend with :func:`sample` on cases that reach every branch; returns their number."""
    from pyg_quiver import CSCTopology
    from pyg_quiver.backends.contract import Draws, Frontier, Graph

    cases = 0
    one_group = [[2], [3, 2], [-1, 2], [0, 3], [5, 4, 3], [60], [7, 7], [1, 1, 1, 1]]
    for dtype in (torch.int32, torch.int64):
        topology = CSCTopology.from_edge_index(random_edges(40, 300, 1), 40, index_dtype=dtype)
        graph = Graph(topology.colptr.to(device), topology.row.to(device), 40)
        for replace in (False, True):
            for keys, groups in [((12345,), [0] * 7), ((3, 2**63 + 1, 3), [0, 0, 1, 1, 1, 2, 2])]:
                for fanouts in one_group if len(keys) == 1 else one_group[:5]:
                    seeds = torch.tensor([3, 0, 39, 3, 17, 1, 0])
                    frontier = Frontier(seeds.to(device), torch.tensor(groups).to(device))
                    draws = Draws(rng.streams_tensor(7, list(keys)).to(device), replace=replace)
                    out = sample_fn(graph, frontier, fanouts, draws)
                    streams = [rng.stream(7, key) for key in keys]
                    expected = sample(
                        topology.colptr.tolist(), topology.row.tolist(), seeds.tolist(), groups, streams,
                        fanouts, replace,
                    )  # fmt: skip
                    got = [
                        out.node.tolist(), out.row.tolist(), out.col.tolist(), out.edge.tolist(),
                        out.group.tolist(), out.nodes_per_hop, out.edges_per_hop,
                    ]  # fmt: skip
                    assert got == list(expected), (dtype, replace, keys, fanouts)
                    cases += 1
    return cases
