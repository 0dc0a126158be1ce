"""The loaders in real PyG: drop-in training, PyG's semantics, workers and epochs (QV-01, QV-03)."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
import torch.nn.functional as F
import torch_geometric.loader
from quiver_reference import random_edges
from torch_geometric.data import Data
from torch_geometric.nn import GraphSAGE
from torch_geometric.utils import k_hop_subgraph

import pyg_quiver
from pyg_quiver import CSCTopology, NeighborLoader, QuiverSampler, batch_key

pytestmark = pytest.mark.pyg


@pytest.fixture(scope="module")
def graph() -> Data:
    """Two communities: neighbours mostly share the label, features are noisy."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(0, 4, (1200,), generator=generator)
    target = torch.randint(0, 1200, (12000,), generator=generator)
    same = torch.rand(12000, generator=generator) < 0.8
    by_label = [(y == c).nonzero().squeeze(1) for c in range(4)]
    random = torch.randint(0, 1200, (12000,), generator=generator)
    mates = torch.stack(
        [by_label[int(c)][int(r) % len(by_label[int(c)])] for c, r in zip(y[target], random, strict=True)]
    )
    source = torch.where(same, mates, random)
    x = F.one_hot(y, 4).float() + 1.5 * torch.randn(1200, 4, generator=generator)
    return Data(
        x=x, y=y, edge_index=torch.stack([source, target]), edge_attr=torch.arange(12000.0).view(-1, 1)
    )


def test_qv01_pyg_alone_cannot_sample_here(graph):
    """The reason for this package; where pyg-lib is installed there is nothing to show."""
    if torch_geometric.typing.WITH_PYG_LIB or torch_geometric.typing.WITH_TORCH_SPARSE:
        pytest.skip("pyg-lib or torch-sparse is installed")
    loader = torch_geometric.loader.NeighborLoader(graph, [3], batch_size=4)
    with pytest.raises(ImportError, match="requires either 'pyg-lib' or 'torch-sparse'"):
        next(iter(loader))


def train(loader_class, data, graph, **kwargs) -> float:
    torch.manual_seed(1)
    model = GraphSAGE(4, 32, num_layers=2, out_channels=4)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    loader = loader_class(data, [8, 4], torch.arange(800), batch_size=100, shuffle=True, **kwargs)
    for _ in range(6):
        for batch in loader:
            optimizer.zero_grad()
            out = model(batch.x, batch.edge_index)[: batch.batch_size]
            F.cross_entropy(out, graph.y[batch.n_id[: batch.batch_size]]).backward()
            optimizer.step()
    model.eval()
    predicted = model(graph.x, graph.edge_index)[800:].argmax(1)
    return float((predicted == graph.y[800:]).float().mean())


@pytest.mark.parametrize("workers", [0, 2])
def test_qv01_graphsage_trains_through_the_loader(graph, workers):
    alone = GraphSAGE(4, 32, num_layers=2, out_channels=4)(graph.x, graph.edge_index)[800:].argmax(1)
    chance = float((alone == graph.y[800:]).float().mean())
    kwargs = {"num_workers": workers, "persistent_workers": workers > 0}
    accuracy = train(NeighborLoader, graph, graph, **kwargs)
    assert accuracy > 0.8
    assert accuracy > chance + 0.2


def test_qv01_is_pygs_loader(graph):
    loader = NeighborLoader(graph, [3, 2], batch_size=10)
    assert isinstance(loader, torch_geometric.loader.NeighborLoader)
    batch = next(iter(loader))
    assert batch.batch_size == 10
    assert torch.equal(batch.x, graph.x[batch.n_id])
    assert torch.equal(batch.edge_attr, graph.edge_attr[batch.e_id])
    assert torch.equal(batch.n_id[batch.edge_index], graph.edge_index[:, batch.e_id])
    assert batch.num_sampled_nodes[0] == 10
    assert sum(batch.num_sampled_nodes) == batch.num_nodes
    assert sum(batch.num_sampled_edges) == batch.edge_index.size(1)
    assert loader(torch.tensor([4, 5])).n_id[:2].tolist() == [4, 5]


def test_qv03_every_neighbour_equals_k_hop_subgraph(graph):
    for seed in (0, 7, 500):
        batch = next(iter(NeighborLoader(graph, [-1, -1], torch.tensor([seed]), batch_size=1)))
        subset, _, _, mask = k_hop_subgraph(seed, 2, graph.edge_index, num_nodes=graph.num_nodes)
        assert sorted(batch.n_id.tolist()) == subset.tolist()
        # The loader takes the in-edges of nodes reached before the last hop, k_hop_subgraph those of all.
        inner = set(batch.n_id[: sum(batch.num_sampled_nodes[:2])].tolist())
        target = graph.edge_index[1]
        wanted = [e for e in mask.nonzero().squeeze(1).tolist() if int(target[e]) in inner]
        assert sorted(batch.e_id.tolist()) == wanted


def test_qv03_gnn_output_equals_the_full_graph(graph):
    torch.manual_seed(0)
    model = GraphSAGE(4, 16, num_layers=3, out_channels=5).eval()
    full = model(graph.x, graph.edge_index)
    for batch in NeighborLoader(graph, [-1, -1, -1], torch.arange(0, 1200, 40), batch_size=10):
        plain = model(batch.x, batch.edge_index)[: batch.batch_size]
        trimmed = model(
            batch.x,
            batch.edge_index,
            num_sampled_nodes_per_hop=batch.num_sampled_nodes,
            num_sampled_edges_per_hop=batch.num_sampled_edges,
        )[: batch.batch_size]
        assert torch.allclose(plain, full[batch.n_id[: batch.batch_size]], atol=1e-5)
        assert torch.allclose(trimmed, plain, atol=1e-5)


def test_qv03_duplicate_seeds_and_nodes_without_neighbours():
    data = Data(edge_index=torch.tensor([[1, 2], [0, 0]]), num_nodes=4)
    batch = next(iter(NeighborLoader(data, [2], torch.tensor([0, 3, 0]), batch_size=3)))
    assert batch.n_id.tolist() == [0, 3, 0, 1, 2]
    assert sorted(zip(*batch.edge_index.tolist(), strict=True)) == [(3, 0), (3, 2), (4, 0), (4, 2)]


def epoch_of(loader) -> list[tuple[list[int], list[int]]]:
    return [(batch.n_id.tolist(), batch.e_id.tolist()) for batch in loader]


def test_qv02_same_batches_from_any_number_of_workers(graph):
    runs = {}
    for workers, persistent in [(0, False), (1, False), (2, False), (2, True)]:
        loader = NeighborLoader(
            graph,
            [4, 3],
            torch.arange(300),
            batch_size=64,
            num_workers=workers,
            persistent_workers=persistent,
        )
        runs[workers, persistent] = [epoch_of(loader) for _ in range(3)]
    first = runs[0, False]
    assert first[0] != first[1] != first[2]
    assert all(run == first for run in runs.values())


def test_qv02_a_batch_depends_on_its_seeds_not_on_their_order_in_the_epoch(graph):
    loader = NeighborLoader(graph, [4], torch.arange(300), batch_size=50)
    in_order = {tuple(batch.input_id.tolist()): batch.e_id.tolist() for batch in loader}
    backwards = [list(range(start, start + 50)) for start in range(250, -1, -50)]
    loader = NeighborLoader(graph, [4], torch.arange(300), batch_sampler=backwards)
    for batch in loader:
        assert batch.e_id.tolist() == in_order[tuple(batch.input_id.tolist())]


def test_qv02_set_epoch_repeats_a_pass(graph):
    loader = NeighborLoader(graph, [4], torch.arange(100), batch_size=50)
    first, second = epoch_of(loader), epoch_of(loader)
    loader.set_epoch(0)
    assert epoch_of(loader) == first
    assert epoch_of(loader) == second


def test_qv02_loader_key_is_the_documented_one(graph):
    sampler = QuiverSampler(graph, [4, 4], seed=5)
    loader = NeighborLoader(graph, [4, 4], torch.arange(100, 200), batch_size=100, seed=5)
    loader.set_epoch(2)
    batch = next(iter(loader))
    alone = sampler.sample(torch.arange(100, 200), key=batch_key(torch.arange(100), 2))
    assert torch.equal(batch.n_id, alone.node)
    assert torch.equal(batch.e_id, sampler.edge_permutation[alone.edge])


def test_qv01_a_dataloader_sampler_still_orders_the_seeds(graph):
    order = torch.utils.data.SequentialSampler(range(30))
    loader = NeighborLoader(graph, [2], torch.arange(30), batch_size=10, sampler=order)
    assert next(iter(loader)).input_id.tolist() == list(range(10))
    mine = QuiverSampler(graph, [2], seed=3)
    assert NeighborLoader(graph, [2], batch_size=10, sampler=mine).node_sampler is mine
    with pytest.raises(ValueError, match="both given"):
        NeighborLoader(graph, [2], batch_size=10, sampler=mine, neighbor_sampler=mine)


def test_qv03_induced_and_bidirectional_subgraphs(graph):
    induced = next(
        iter(NeighborLoader(graph, [3, 2], torch.arange(20), batch_size=20, subgraph_type="induced"))
    )
    chosen = set(induced.n_id.tolist())
    inside = [e for e, (s, t) in enumerate(graph.edge_index.t().tolist()) if s in chosen and t in chosen]
    assert sorted(induced.e_id.tolist()) == inside
    assert torch.equal(induced.n_id[induced.edge_index], graph.edge_index[:, induced.e_id])
    both = next(
        iter(NeighborLoader(graph, [3], torch.arange(20), batch_size=20, subgraph_type="bidirectional"))
    )
    pairs = set(map(tuple, both.edge_index.t().tolist()))
    assert pairs
    assert pairs == {(b, a) for a, b in pairs}


def test_qv01_gpu_modes_refuse_workers(graph, monkeypatch):
    sampler = QuiverSampler(graph, [2])
    monkeypatch.setattr(sampler, "mode", "uva")
    with pytest.raises(
        ValueError, match="mode='uva' samples in the main process: num_workers must be 0, got 2"
    ):
        NeighborLoader(graph, [2], batch_size=4, sampler=sampler, num_workers=2)


def test_qv01_adj_t_and_empty_graphs(graph):
    plain = CSCTopology.from_edge_index(graph.edge_index, graph.num_nodes)
    coo = torch.sparse_coo_tensor(graph.edge_index.flip(0), torch.ones(12000), (1200, 1200)).coalesce()
    data = Data(x=graph.x, adj_t=coo.to_sparse_csr())
    topology = CSCTopology.from_data(data)
    simple = torch.unique(graph.edge_index, dim=1).size(1)
    assert topology.num_edges == simple
    assert (topology.in_degree() <= plain.in_degree()).all()
    batch = next(iter(NeighborLoader(Data(num_nodes=3), [2], batch_size=3)))
    assert batch.n_id.tolist() == [0, 1, 2]
    assert batch.num_sampled_edges == [0]


def test_numba_missing_falls_back_to_torch_with_one_warning(graph, monkeypatch):
    expected = QuiverSampler(graph, [4]).sample(torch.arange(50))
    find = pyg_quiver.sampler.importlib.util.find_spec
    monkeypatch.setattr(
        pyg_quiver.sampler.importlib.util, "find_spec", lambda name: None if name == "numba" else find(name)
    )
    with pytest.warns(RuntimeWarning, match="numba is not installed.*3 times slower") as caught:
        sampler = QuiverSampler(graph, [4])
    assert len(caught) == 1
    assert sampler.backend == "torch"
    assert torch.equal(sampler.sample(torch.arange(50)).edge, expected.edge)
    with pytest.raises(ImportError, match="backend='numba' needs numba: pip install numba"):
        QuiverSampler(graph, [4], backend="numba")


def test_import_needs_no_numba_no_triton_no_pyg():
    import subprocess

    code = (
        "import sys\n"
        "for name in ('numba', 'triton', 'torch_geometric', 'pyg_lib'): sys.modules[name] = None\n"
        "import pyg_quiver\n"
        "try: pyg_quiver.NeighborLoader\n"
        "except ImportError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install graft-plugins[pyg]" in done.stdout


def test_topology_errors_and_round_trip(tmp_path):
    edges = random_edges(50, 400, 8)
    topology = CSCTopology.from_edge_index(edges, 50, index_dtype=torch.int32)
    topology.save(tmp_path)
    loaded = CSCTopology.load(tmp_path)
    for name in ("colptr", "row", "edge_permutation"):
        assert torch.equal(getattr(topology, name), getattr(loaded, name))
    assert loaded.fingerprint() == topology.fingerprint()
    assert topology.fingerprint() != CSCTopology.from_edge_index(edges.flip(0), 50).fingerprint()
    assert torch.equal(edges[:, topology.edge_permutation][0], topology.row.long())
    assert topology.in_degree().tolist() == torch.bincount(edges[1], minlength=50).tolist()
    (tmp_path / "topology.json").write_text('{"format": "other"}')
    with pytest.raises(ValueError, match="format 'other'"):
        CSCTopology.load(tmp_path)
    with pytest.raises(ValueError, match=r"colptr must be non-decreasing, but colptr\[3\]=5 > colptr\[4\]=4"):
        CSCTopology(torch.tensor([0, 1, 2, 5, 4, 5]), torch.zeros(5, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"colptr must go from 0 to 2"):
        CSCTopology(torch.tensor([0, 1]), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"row names node 9, out of range \[0, 1\)"):
        CSCTopology(torch.tensor([0, 1]), torch.tensor([9]))
    with pytest.raises(ValueError, match=r"source 5, which is out of range \[0, 3\)"):
        CSCTopology.from_edge_index(torch.tensor([[5], [0]]), 3)
    with pytest.raises(ValueError, match="data is dict"):
        CSCTopology.from_data({})


def test_sampler_can_be_copied_to_workers(graph):
    sampler = QuiverSampler(graph, [3])
    clone = copy.copy(sampler)
    sampler.set_epoch(4)
    assert clone.epoch == 4
