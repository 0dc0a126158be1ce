"""PSGS and FAP against closed forms, enumeration and measured counts (QV-06, QV-07)."""

from __future__ import annotations

import itertools

import pytest
import torch
from quiver_reference import random_edges

from pyg_quiver import CSCTopology, QuiverSampler, fap, psgs, rng, seed_probability
from pyg_quiver.backends import numba_cpu
from pyg_quiver.backends.contract import Draws, Frontier, Graph

pytestmark = pytest.mark.pyg

BACKENDS = ("numba", "torch")


def of_edges(pairs, nodes):
    return CSCTopology.from_edge_index(torch.tensor(list(pairs), dtype=torch.int64).reshape(-1, 2).t(), nodes)


@pytest.mark.parametrize("backend", BACKENDS)
def test_qv06_closed_forms(backend):
    path = of_edges([(i + 1, i) for i in range(5)], 6)  # i draws i + 1
    assert psgs(path, [2, 2, 2], backend=backend).tolist() == [4, 4, 4, 3, 2, 1]
    star = of_edges([(leaf, 0) for leaf in range(1, 11)], 11)
    assert psgs(star, [4], backend=backend).tolist() == [5.0] + [1.0] * 10
    assert psgs(star, [-1], backend=backend)[0] == 11
    complete = of_edges(itertools.permutations(range(7), 2), 7)
    assert psgs(complete, [3, 2], backend=backend).tolist() == pytest.approx([1 + 3 + 6] * 7)
    tree = of_edges([(2 * i + c, i) for i in range(7) for c in (1, 2)], 15)
    assert psgs(tree, [2, 2, 2], backend=backend)[0] == 15
    assert psgs(tree, [1, 1, 1], backend=backend)[0] == 4
    assert psgs(tree, [], backend=backend).tolist() == [1] * 15


def test_qv06_two_hops_equal_the_expected_sample_exactly():
    edges = random_edges(200, 2000, 5)
    edges = torch.unique(edges[:, edges[0] != edges[1]], dim=1)
    topology = CSCTopology.from_edge_index(edges, 200)
    predicted = psgs(topology, [4, 3])
    graph = Graph(topology.colptr, topology.row, 200)
    draws = 400
    seeds = torch.arange(200).repeat_interleave(draws)
    streams = rng.streams_tensor(0, [rng.mix(i) for i in range(seeds.numel())])
    # From each seed alone, no node of the second hop is expanded twice before the third.
    out = numba_cpu.sample(graph, Frontier(seeds, torch.arange(seeds.numel())), [4, 3], Draws(streams))
    measured = (
        torch.bincount(out.group[out.col], minlength=seeds.numel()).view(200, draws).double().mean(1) + 1
    )
    assert float((measured / predicted).mean()) == pytest.approx(1, abs=0.02)
    bound = psgs(topology, [4, 3, 2])
    deep = numba_cpu.sample(graph, Frontier(seeds, torch.arange(seeds.numel())), [4, 3, 2], Draws(streams))
    size = torch.bincount(deep.group[deep.col], minlength=seeds.numel()).view(200, draws).double().mean(1) + 1
    assert (size <= bound * 1.05 + 0.5).all()


def enumerate_reads(topology, fanouts, p0):
    """Expected reads of the unrolled tree, by walking every path with its probability."""
    total = [float(p) for p in p0]

    def walk(v, h, weight):
        start, end = int(topology.colptr[v]), int(topology.colptr[v + 1])
        if h == len(fanouts) or start == end:
            return
        ratio = 1.0 if fanouts[h] < 0 else min(1.0, fanouts[h] / (end - start))
        for u in topology.row[start:end].tolist():
            total[u] += weight * ratio
            walk(u, h + 1, weight * ratio)

    for v, p in enumerate(p0.tolist()):
        walk(v, 0, p)
    return total


@pytest.mark.parametrize("backend", BACKENDS)
def test_qv07_count_equals_the_unrolled_tree(backend):
    topology = CSCTopology.from_edge_index(random_edges(12, 40, 3), 12)
    p0 = torch.rand(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for fanouts in ([2], [2, 3], [-1, 1, 2]):
        result = fap(topology, fanouts, p0, mode="count", backend=backend)
        assert result.tolist() == pytest.approx(enumerate_reads(topology, fanouts, p0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_qv07_probability_is_exact_on_trees(backend):
    # Every node is drawn by one other only, so nothing is assumed: chances multiply along the path.
    tree = of_edges([(2 * i + c, i) for i in range(7) for c in (1, 2)], 15)
    p0 = torch.zeros(15, dtype=torch.float64)
    p0[0] = 0.6
    assert fap(tree, [1, 1], p0, backend=backend).tolist() == pytest.approx(
        [0.6] + [0.3] * 2 + [0.15] * 4 + [0.0] * 8
    )
    p0[1] = 0.5
    result = fap(tree, [2, 1], p0, backend=backend)
    assert result[1] == pytest.approx(0.5 + 0.5 * 0.6)
    # Node 3: drawn surely where 1 is a seed; by 1 with 1/2 where 1 was found in the first hop only.
    assert result[3] == pytest.approx(1 - (1 - 0.5) * (1 - 0.5 * 0.6 * 0.5))


def test_qv07_backends_agree_and_reference_has_the_published_defects():
    topology = CSCTopology.from_edge_index(random_edges(300, 4000, 1), 300)
    for mode in ("count", "probability"):
        a, b = (fap(topology, [5, 3], 0.05, mode=mode, backend=backend) for backend in BACKENDS)
        assert torch.allclose(a, b, rtol=1e-10)
    assert torch.allclose(psgs(topology, [5, 3], backend="numba"), psgs(topology, [5, 3], backend="torch"))
    reference = fap(topology, [5, 3], 0.05, mode="reference")
    assert (reference[topology.in_degree() == 0] == 0).all()
    assert fap(topology, [5, 3], 0.05)[topology.in_degree() == 0].min() >= 0.05


def hit_rate(hotness, counts, share):
    held = torch.argsort(hotness, descending=True)[: int(share * hotness.numel())]
    return float(counts[held].sum() / counts.sum())


def test_qv07_hit_rate_is_near_the_oracles_on_a_directed_graph():
    generator = torch.Generator().manual_seed(0)
    nodes, edges = 5000, 100_000
    target = (torch.rand(edges, generator=generator) ** 2.5 * nodes).long()
    popularity = torch.randperm(
        nodes, generator=generator
    )  # how often a node is drawn, unrelated to how much it draws
    source = popularity[(torch.rand(edges, generator=generator) ** 2.5 * nodes).long()]
    topology = CSCTopology.from_edge_index(torch.stack([source, target]), nodes)
    sampler = QuiverSampler(topology, [10, 5])
    counts = [torch.zeros(nodes), torch.zeros(nodes)]
    for i in range(400):
        seeds = torch.randperm(nodes, generator=generator)[:64]
        node = sampler.sample(seeds, key=i).node
        counts[i % 2] += torch.bincount(node, minlength=nodes)
    p0 = seed_probability(nodes, 64)
    oracle = hit_rate(counts[0], counts[1], 0.2)
    assert hit_rate(fap(topology, [10, 5], p0), counts[1], 0.2) >= 0.97 * oracle
    assert hit_rate(fap(topology, [10, 5], p0, mode="count"), counts[1], 0.2) >= 0.97 * oracle
    assert hit_rate(fap(topology, [10, 5], p0, mode="reference"), counts[1], 0.2) < 0.7 * oracle


def test_qv07_seed_probability_from_a_request_log():
    assert seed_probability(10, 5).tolist() == [0.5] * 10
    assert seed_probability(3, 8).tolist() == [1.0] * 3
    log = torch.tensor([0, 0, 0, 2])
    assert seed_probability(4, 2, log).tolist() == pytest.approx([1 - 0.25**2, 0, 1 - 0.75**2, 0])
    assert seed_probability(1, 2, torch.tensor([0])).tolist() == [1.0]
    with pytest.raises(IndexError, match=r"node 9 is out of range \[0, 4\)"):
        seed_probability(4, 2, torch.tensor([9]))
    with pytest.raises(ValueError, match="requests is empty"):
        seed_probability(4, 2, torch.tensor([], dtype=torch.int64))


def test_metric_errors():
    topology = CSCTopology.from_edge_index(random_edges(5, 20, 0), 5)
    with pytest.raises(ValueError, match=r"seed_prob must lie in \[0, 1\], got 1\.7\d* at node 3"):
        fap(topology, [2], torch.tensor([0, 0, 0, 1.7, 0]).double())
    with pytest.raises(ValueError, match="nan at node 0"):
        fap(topology, [2], torch.tensor([float("nan"), 0, 0, 0, 0]))
    with pytest.raises(ValueError, match=r"seed_prob is \(2,\); it must be \[5\]"):
        fap(topology, [2], torch.zeros(2))
    with pytest.raises(ValueError, match=r"num_neighbors\[1\] is -2"):
        psgs(topology, [1, -2])
    with pytest.raises(ValueError, match="mode is 'sum'"):
        fap(topology, [2], 0.5, mode="sum")
