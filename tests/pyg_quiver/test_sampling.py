"""Draws and backends against the plain-Python sampler, and their statistics (QV-02, QV-03, QV-21)."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quiver_reference import random_edges, sample
from scipy import stats

from pyg_quiver import CSCTopology, QuiverSampler, batch_key, rng
from pyg_quiver.backends import numba_cpu
from pyg_quiver.backends.contract import Draws, Frontier, Graph
from pyg_quiver.backends.hops import sample_one_type
from pyg_quiver.backends.numba_cpu import NumbaBackend
from pyg_quiver.backends.torch_ops import TorchBackend

pytestmark = pytest.mark.pyg


BACKENDS = {
    "numba": numba_cpu.sample,
    "numba-hops": lambda *a: sample_one_type(NumbaBackend(), *a),
    "torch": lambda *a: sample_one_type(TorchBackend(), *a),
}


def run(name, topology, seeds, fanouts, *, keys=(0,), groups=None, replace=False, seed=0):
    groups = torch.zeros_like(seeds) if groups is None else groups
    graph = Graph(topology.colptr, topology.row, topology.num_src_nodes)
    draws = Draws(rng.streams_tensor(seed, list(keys)), replace=replace)
    return BACKENDS[name](graph, Frontier(seeds, groups), fanouts, draws)


def expected(topology, seeds, fanouts, *, keys=(0,), groups=None, replace=False, seed=0):
    groups = [0] * len(seeds) if groups is None else groups.tolist()
    streams = [rng.stream(seed, key) for key in keys]
    return sample(
        topology.colptr.tolist(), topology.row.tolist(), seeds.tolist(), groups, streams, fanouts, replace
    )


def same(result, reference) -> None:
    node, row, col, edge, group, nodes_per_hop, edges_per_hop = reference
    assert result.node.tolist() == node
    assert result.row.tolist() == row
    assert result.col.tolist() == col
    assert result.edge.tolist() == edge
    assert result.group.tolist() == group
    assert result.nodes_per_hop == nodes_per_hop
    assert result.edges_per_hop == edges_per_hop
    for tensor in (result.node, result.row, result.col, result.edge, result.group):
        assert tensor.dtype == torch.int64


def test_qv02_vectors_of_the_specification():
    assert rng.mix(1) == 0x5692161D100B05E5
    assert batch_key(torch.tensor([0, 1, 2]), 0) == 0x3987F29ABE2B0D45
    from quiver_reference import offsets

    assert offsets(rng.node_key(rng.stream(0, 0), 10, 0), 20, 5, False) == [15, 6, 10, 18, 12]
    ids = torch.tensor([5, 2**40, 7])
    assert rng.seed_keys(ids, 3) == [batch_key(ids[i : i + 1], 3) for i in range(3)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fanouts", [[2], [3, 2], [-1, 2], [0, 3], [5, 4, 3], [-1, -1], [60]], ids=str)
@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_qv02_every_backend_equals_the_specification(backend, fanouts, replace, dtype):
    topology = CSCTopology.from_edge_index(random_edges(40, 300, 1), 40, index_dtype=dtype)
    seeds = torch.tensor([3, 0, 39, 3, 17, 1, 0])
    result = run(backend, topology, seeds, fanouts, keys=(12345,), replace=replace, seed=7)
    same(result, expected(topology, seeds, fanouts, keys=(12345,), replace=replace, seed=7))


@pytest.mark.parametrize("backend", BACKENDS)
def test_qv02_disjoint_groups_are_sampled_as_if_alone(backend):
    topology = CSCTopology.from_edge_index(random_edges(30, 200, 2), 30)
    seeds = torch.tensor([0, 1, 0, 5, 5, 29])
    groups = torch.tensor([0, 0, 1, 2, 2, 3])
    keys = (9, 2**63 + 1, 9, 4)
    result = run(backend, topology, seeds, [4, 3], keys=keys, groups=groups)
    same(result, expected(topology, seeds, [4, 3], keys=keys, groups=groups))
    for g, key in enumerate(keys):
        alone = run(backend, topology, seeds[groups == g], [4, 3], keys=(key,))
        assert result.node[result.group == g].tolist() == alone.node.tolist()
        assert result.edge[result.group[result.col] == g].tolist() == alone.edge.tolist()


@settings(max_examples=80, deadline=None)
@given(
    nodes=st.integers(1, 25),
    edges=st.integers(0, 120),
    graph_seed=st.integers(0, 1000),
    fanouts=st.lists(st.integers(-1, 6), min_size=0, max_size=3),
    replace=st.booleans(),
    key=st.integers(0, 2**64 - 1),
    data=st.data(),
)
def test_qv02_numba_and_torch_equal_the_specification(nodes, edges, graph_seed, fanouts, replace, key, data):
    topology = CSCTopology.from_edge_index(random_edges(nodes, edges, graph_seed), nodes)
    seeds = torch.tensor(data.draw(st.lists(st.integers(0, nodes - 1), max_size=6)), dtype=torch.int64)
    reference = expected(topology, seeds, fanouts, keys=(key,), replace=replace)
    for backend in ("numba", "numba-hops", "torch"):
        same(run(backend, topology, seeds, fanouts, keys=(key,), replace=replace), reference)


def test_qv21_hash_map_gives_the_bits_of_the_dense_map(monkeypatch):
    topology = CSCTopology.from_edge_index(random_edges(3000, 60000, 3), 3000)
    seeds = torch.arange(0, 3000, 2)
    dense = run("numba", topology, seeds, [6, 5])
    monkeypatch.setattr(numba_cpu, "DENSE_MAP_NODES", 10)
    monkeypatch.setattr(numba_cpu, "dense_map", lambda nodes: pytest.fail("the dense map was used"))
    hashed = run("numba", topology, seeds, [6, 5])
    for name in ("node", "row", "col", "edge", "nodes_per_hop", "edges_per_hop"):
        a, b = getattr(dense, name), getattr(hashed, name)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("threads", [2, 3])
def test_qv02_threads_of_one_call_change_nothing(threads):
    topology = CSCTopology.from_edge_index(random_edges(5000, 200_000, 3), 5000)
    graph = Graph(topology.colptr, topology.row, 5000)
    seeds = torch.arange(0, 5000, 3)
    for fanouts in ([15, 10], [-1, 3], []):
        draws = Draws(rng.streams_tensor(1, [2]))
        frontier = Frontier(seeds, torch.zeros_like(seeds))
        one = numba_cpu.sample(graph, frontier, fanouts, draws)
        more = numba_cpu.sample(graph, frontier, fanouts, draws, num_threads=threads)
        for name in ("node", "row", "col", "edge", "group"):
            assert torch.equal(getattr(one, name), getattr(more, name))
        assert (one.nodes_per_hop, one.edges_per_hop) == (more.nodes_per_hop, more.edges_per_hop)
        assert (numba_cpu.dense_map(5000) == -1).all()


def test_qv02_threads_of_one_call_work_after_a_fork():
    import multiprocessing

    topology = CSCTopology.from_edge_index(random_edges(5000, 200_000, 3), 5000)
    sampler = QuiverSampler(topology, [15, 10], num_threads=2)
    expected = sampler.sample(torch.arange(2000)).edge.sum()
    here, there = multiprocessing.get_context("fork").Pipe()

    def child() -> None:
        there.send(int(sampler.sample(torch.arange(2000)).edge.sum()))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    assert here.poll(30)
    assert here.recv() == expected
    process.join(10)


def test_qv02_scratch_maps_are_clean_after_a_call():
    topology = CSCTopology.from_edge_index(random_edges(500, 5000, 4), 500)
    for start in range(0, 500, 50):
        run("numba", topology, torch.arange(start, start + 50), [5, 5])
        assert (numba_cpu.dense_map(500) == -1).all()


@pytest.mark.parametrize("fanout", [3, 60])
def test_qv03_inclusion_is_uniform_in_singles_and_pairs(fanout):
    degree, draws = (8, 4000) if fanout == 3 else (64, 400)
    keys = [rng.mix(i) for i in range(draws)]
    colptr = torch.tensor([0] + [degree] * (degree + 1))
    topology = CSCTopology(colptr, torch.arange(1, degree + 1))
    seeds, groups = torch.zeros(draws, dtype=torch.int64), torch.arange(draws)
    result = run("numba", topology, seeds, [fanout], keys=keys, groups=groups)
    picked = result.edge.view(draws, fanout).numpy()
    assert all(len(set(row)) == fanout for row in picked.tolist())
    singles = np.bincount(picked.ravel(), minlength=degree)
    # Without replacement counts are less spread than multinomial ones; the statistic is scaled accordingly.
    scale = (degree - 1) / (degree - fanout)
    statistic = ((singles - singles.mean()) ** 2 / singles.mean()).sum() * scale
    assert stats.chi2.sf(statistic, degree - 1) > 1e-3
    if fanout == 3:
        pairs = np.zeros((degree, degree))
        for row in picked:
            for a, b in itertools.combinations(sorted(row), 2):
                pairs[a, b] += 1
        counts = pairs[np.triu_indices(degree, 1)]
        assert abs(counts - counts.mean()).max() < 5 * np.sqrt(counts.mean())


def test_qv02_sample_is_pure_and_thread_safe():
    from concurrent.futures import ThreadPoolExecutor

    topology = CSCTopology.from_edge_index(random_edges(2000, 40000, 5), 2000)
    sampler = QuiverSampler(topology, [5, 5])
    seeds = [torch.randint(0, 2000, (64,), generator=torch.Generator().manual_seed(i)) for i in range(40)]
    alone = [sampler.sample(node, key=i) for i, node in enumerate(seeds)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda pair: sampler.sample(pair[1], key=pair[0]), enumerate(seeds)))
    for a, b in zip(alone, together, strict=True):
        assert torch.equal(a.node, b.node)
        assert torch.equal(a.edge, b.edge)
        assert torch.equal(a.row, b.row)


def test_qv02_the_key_the_seed_and_the_epoch_change_the_sample():
    topology = CSCTopology.from_edge_index(random_edges(200, 8000, 6), 200)
    node = torch.arange(50)
    base = QuiverSampler(topology, [5]).sample(node, key=1)
    assert not torch.equal(base.edge, QuiverSampler(topology, [5]).sample(node, key=2).edge)
    assert not torch.equal(base.edge, QuiverSampler(topology, [5], seed=1).sample(node, key=1).edge)
    assert torch.equal(base.edge, QuiverSampler(topology, [5]).sample(node, key=1).edge)


def test_sampler_errors():
    topology = CSCTopology.from_edge_index(random_edges(5, 20, 0), 5)
    sampler = QuiverSampler(topology, [2])
    with pytest.raises(IndexError, match=r"node 7 is out of range \[0, 5\)"):
        sampler.sample(torch.tensor([0, 7]))
    with pytest.raises(IndexError, match=r"node -1 is out of range \[0, 5\)"):
        sampler.sample(torch.tensor([-1]))
    with pytest.raises(ValueError, match="mode is 'tpu'"):
        QuiverSampler(topology, [2], mode="tpu")
    with pytest.raises(ValueError, match="backend is 'cuda'"):
        QuiverSampler(topology, [2], backend="cuda")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="mode='gpu' needs a CUDA device; use mode='cpu'"):
            QuiverSampler(topology, [2], mode="gpu")
