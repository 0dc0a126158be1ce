"""Heterogeneous, link, disjoint, temporal and weighted sampling in real PyG (QV-15, QV-16)."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from quiver_reference import random_edges
from torch_geometric.data import Data, HeteroData
from torch_geometric.nn import GraphSAGE, HeteroConv, SAGEConv
from torch_geometric.sampler import NegativeSampling

from pyg_quiver import (
    CSCTopology,
    LinkNeighborLoader,
    NeighborLoader,
    QuiverFeatureStore,
    QuiverSampler,
    rng,
)

pytestmark = pytest.mark.pyg

CITES, WRITES, REV = (
    ("paper", "cites", "paper"),
    ("author", "writes", "paper"),
    ("paper", "rev_writes", "author"),
)


@pytest.fixture(scope="module")
def hetero() -> HeteroData:
    generator = torch.Generator().manual_seed(0)
    data = HeteroData()
    data["paper"].x = torch.randn(120, 6, generator=generator)
    data["author"].x = torch.randn(70, 4, generator=generator)
    data[CITES].edge_index = random_edges(120, 700, 1)
    data[WRITES].edge_index = random_edges(120, 400, 2, sources=70)
    data[REV].edge_index = data[WRITES].edge_index.flip(0)
    data["paper"].time = torch.randint(0, 50, (120,), generator=generator)
    return data


@pytest.fixture(scope="module")
def homogeneous() -> Data:
    return Data(
        x=torch.randn(150, 5, generator=torch.Generator().manual_seed(1)),
        edge_index=random_edges(150, 1500, 3),
    )


class HeteroSAGE(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(
            HeteroConv({kind: SAGEConv((-1, -1), 8) for kind in (CITES, WRITES, REV)}) for _ in range(2)
        )

    def forward(self, x, edge_index):
        for layer in self.layers:
            x = {kind: out.relu() for kind, out in layer(x, edge_index).items()}
        return x


def test_qv15_hetero_output_equals_the_full_graph(hetero):
    torch.manual_seed(0)
    model = HeteroSAGE()
    with torch.no_grad():
        full = model(hetero.x_dict, hetero.edge_index_dict)
        for kind in ("paper", "author"):
            for batch in NeighborLoader(hetero, [-1, -1], kind, batch_size=30):
                out = model(batch.x_dict, batch.edge_index_dict)[kind][: batch[kind].batch_size]
                seeds = batch[kind].n_id[: batch[kind].batch_size]
                assert torch.allclose(out, full[kind][seeds], atol=1e-5)


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("disjoint", [False, True])
def test_qv15_backends_agree_and_edges_are_real(hetero, replace, disjoint):
    fanouts = {CITES: [3, 2], WRITES: [2, 2], REV: [4, 1]}
    outs = []
    for backend in ("numba", "torch"):
        sampler = QuiverSampler(hetero, fanouts, replace=replace, disjoint=disjoint, backend=backend, seed=4)
        loader = NeighborLoader(hetero, fanouts, ("paper", torch.arange(40)), batch_size=20, sampler=sampler)
        outs.append(list(loader))
    for a, b in zip(*outs, strict=True):
        for kind in ("paper", "author"):
            assert torch.equal(a[kind].n_id, b[kind].n_id)
            assert a[kind].num_sampled_nodes == b[kind].num_sampled_nodes
            assert sum(a[kind].num_sampled_nodes) == a[kind].n_id.numel()
        for kind in (CITES, WRITES, REV):
            assert torch.equal(a[kind].edge_index, b[kind].edge_index)
            source, _, target = kind
            real = hetero[kind].edge_index[:, a[kind].e_id]
            assert torch.equal(a[source].n_id[a[kind].edge_index[0]], real[0])
            assert torch.equal(a[target].n_id[a[kind].edge_index[1]], real[1])
            if disjoint:
                assert torch.equal(
                    a[source].batch[a[kind].edge_index[0]], a[target].batch[a[kind].edge_index[1]]
                )
            degree = torch.bincount(a[kind].edge_index[1], minlength=1)
            assert degree.max() <= max(fanouts[kind])


def test_qv15_one_type_equals_the_homogeneous_sampler(homogeneous):
    typed = HeteroData()
    typed["v"].x = homogeneous.x
    typed["v", "to", "v"].edge_index = homogeneous.edge_index
    plain = next(iter(NeighborLoader(homogeneous, [4, 3], torch.arange(50), batch_size=50, seed=2)))
    hetero = next(iter(NeighborLoader(typed, [4, 3], ("v", torch.arange(50)), batch_size=50, seed=2)))
    assert torch.equal(plain.n_id, hetero["v"].n_id)
    assert torch.equal(plain.edge_index, hetero["v", "to", "v"].edge_index)


def test_qv15_missing_fanouts_and_unknown_types(hetero):
    with pytest.raises(ValueError, match="edge type"):
        QuiverSampler(hetero, {CITES: [2]})


def test_qv15_induced_subgraphs_hold_every_edge_among_the_sampled_nodes(hetero):
    batch = next(iter(NeighborLoader(hetero, [3, 2], "paper", batch_size=6, subgraph_type="induced")))
    for kind in hetero.edge_types:
        source, target = set(batch[kind[0]].n_id.tolist()), set(batch[kind[2]].n_id.tolist())
        edges = hetero[kind].edge_index
        inside = [e for e, (s, t) in enumerate(edges.t().tolist()) if s in source and t in target]
        assert sorted(batch[kind].e_id.tolist()) == inside
        names = torch.stack(
            [batch[kind[0]].n_id[batch[kind].edge_index[0]], batch[kind[2]].n_id[batch[kind].edge_index[1]]]
        )
        assert torch.equal(names, edges[:, batch[kind].e_id])


def test_qv15_a_type_without_edges_has_links_all_the_same():
    alone = HeteroData(paper={"num_nodes": 20})
    links = (("paper", "paper"), torch.randint(0, 20, (2, 8)))
    (batch,) = LinkNeighborLoader(alone, [], edge_label_index=links, batch_size=8)
    assert batch["paper"].num_nodes == links[1].unique().numel()


@pytest.mark.parametrize("disjoint", [False, True])
def test_qv15_link_loader_labels_are_pygs(homogeneous, disjoint):
    positive = homogeneous.edge_index[:, ::7]
    loader = LinkNeighborLoader(
        homogeneous,
        [3, 2],
        positive,
        batch_size=32,
        neg_sampling=NegativeSampling("binary", 2.0),
        disjoint=disjoint,
    )
    for first in range(2):
        seen = 0
        for batch in loader:
            count = batch.input_id.numel()
            ends = batch.n_id[batch.edge_label_index]
            assert torch.equal(ends[:, :count], positive[:, batch.input_id])
            assert batch.edge_label.tolist() == [1.0] * count + [0.0] * (2 * count)
            assert torch.equal(batch.n_id[batch.edge_index], homogeneous.edge_index[:, batch.e_id])
            if disjoint:
                assert torch.equal(batch.batch[batch.edge_index[0]], batch.batch[batch.edge_index[1]])
                assert int(batch.batch.max()) < count
            seen += count
        assert seen == positive.size(1), first


def test_qv15_negative_edges_repeat_and_do_not_touch_the_global_generator(homogeneous):
    def ends(loader):
        return [batch.n_id[batch.edge_label_index].tolist() for batch in loader]

    def fresh(**kwargs):
        return LinkNeighborLoader(
            homogeneous, [2], homogeneous.edge_index[:, :60], batch_size=20, neg_sampling_ratio=1.0, **kwargs
        )

    torch.manual_seed(0)
    a = ends(fresh())
    drawn = torch.rand(1)
    torch.manual_seed(123)
    loader = fresh(num_workers=2)
    assert ends(loader) == a
    assert ends(loader) != a
    torch.manual_seed(0)
    ends(fresh())
    assert torch.equal(torch.rand(1), drawn)
    assert ends(fresh(seed=1)) != a


def test_qv15_triplets_and_hetero_links(homogeneous, hetero):
    positive = homogeneous.edge_index[:, :40]
    batch = next(
        iter(
            LinkNeighborLoader(
                homogeneous, [3], positive, batch_size=40, neg_sampling=NegativeSampling("triplet", 2)
            )
        )
    )
    assert torch.equal(batch.n_id[batch.src_index], positive[0])
    assert torch.equal(batch.n_id[batch.dst_pos_index], positive[1])
    assert batch.dst_neg_index.shape == (40, 2)
    loader = LinkNeighborLoader(
        hetero, [3, 2], (WRITES, hetero[WRITES].edge_index), batch_size=50, neg_sampling_ratio=1.0
    )
    for batch in loader:
        count = batch[WRITES].input_id.numel()
        source, target = batch[WRITES].edge_label_index[:, :count]
        wanted = hetero[WRITES].edge_index[:, batch[WRITES].input_id]
        assert torch.equal(batch["author"].n_id[source], wanted[0])
        assert torch.equal(batch["paper"].n_id[target], wanted[1])


def test_qv15_link_prediction_trains():
    generator = torch.Generator().manual_seed(0)
    community = torch.randint(0, 5, (200,), generator=generator)
    pairs = torch.randint(0, 200, (2, 8000), generator=generator)
    data = Data(x=torch.nn.functional.one_hot(community).float(), num_nodes=200)
    data.edge_index = pairs[:, community[pairs[0]] == community[pairs[1]]]
    torch.manual_seed(0)
    model = GraphSAGE(5, 16, num_layers=2, out_channels=16)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    loader = LinkNeighborLoader(data, [5, 5], batch_size=256, neg_sampling_ratio=1.0, shuffle=True)
    losses = []
    for _ in range(12):
        total = 0.0
        for batch in loader:
            optimizer.zero_grad()
            h = model(batch.x, batch.edge_index)
            score = (h[batch.edge_label_index[0]] * h[batch.edge_label_index[1]]).sum(1)
            loss = torch.nn.functional.binary_cross_entropy_with_logits(score, batch.edge_label)
            loss.backward()
            optimizer.step()
            total += loss.item()
        losses.append(total / len(loader))
    assert losses[-1] < 0.75 * math.log(2)  # a constant guess has log 2


def test_qv16_disjoint_nodes_carry_their_seed(homogeneous):
    batch = next(iter(NeighborLoader(homogeneous, [4, 3], torch.arange(25), batch_size=25, disjoint=True)))
    assert batch.batch[:25].tolist() == list(range(25))
    assert torch.equal(batch.batch[batch.edge_index[0]], batch.batch[batch.edge_index[1]])
    alone = next(iter(NeighborLoader(homogeneous, [4, 3], torch.arange(25), batch_size=1, disjoint=True)))
    assert torch.equal(batch.n_id[batch.batch == 0], alone.n_id)


def allowed(times, limit):
    return sorted(t for t in times if t <= limit)


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("strategy", ["uniform", "last"])
@pytest.mark.parametrize("level", ["node", "edge"])
def test_qv16_no_edge_is_later_than_its_seed(homogeneous, backend, strategy, level):
    generator = torch.Generator().manual_seed(5)
    data = homogeneous.clone()
    count = data.num_nodes if level == "node" else data.num_edges
    data.time = torch.randint(0, 40, (count,), generator=generator)
    seeds = torch.arange(30)
    limit = torch.randint(5, 40, (30,), generator=generator)
    options = {"time_attr": "time", "temporal_strategy": strategy}
    sampler = QuiverSampler(data, [3, 2], backend=backend, **options)
    loader = NeighborLoader(data, [3, 2], seeds, input_time=limit, batch_size=30, sampler=sampler, **options)
    batch = next(iter(loader))
    source = data.edge_index[0, batch.e_id]
    times = data.time[source] if level == "node" else data.time[batch.e_id]
    group = batch.batch[batch.edge_index[1]]
    assert batch.e_id.numel() > 30
    assert (times <= limit[group]).all()
    for i, seed in enumerate(seeds.tolist()):
        into = (data.edge_index[1] == seed).nonzero().squeeze(1)
        times_in = data.time[data.edge_index[0, into]] if level == "node" else data.time[into]
        possible = allowed(times_in.tolist(), int(limit[i]))
        drawn = times[(batch.edge_index[1] == i)].tolist()
        assert len(drawn) == min(3, len(possible))
        if strategy == "last":
            assert sorted(drawn) == possible[-3:] if possible else drawn == []


def test_qv16_temporal_backends_agree_and_hetero_times_hold(homogeneous, hetero):
    data = homogeneous.clone()
    data.time = torch.arange(150)
    batches = []
    for backend in ("numba", "torch"):
        sampler = QuiverSampler(data, [3, 3], time_attr="time", backend=backend)
        batches.append(
            next(iter(NeighborLoader(data, [3, 3], torch.arange(60), batch_size=60, sampler=sampler)))
        )
    assert torch.equal(batches[0].e_id, batches[1].e_id)
    assert (
        data.time[data.edge_index[0, batches[0].e_id]] <= batches[0].batch[batches[0].edge_index[1]]
    ).all()
    limit = torch.full((40,), 20)
    loader = NeighborLoader(
        hetero, [4, 4], ("paper", torch.arange(40)), input_time=limit, time_attr="time", batch_size=40
    )
    batch = next(iter(loader))
    found = hetero["paper"].time[hetero[CITES].edge_index[0, batch[CITES].e_id]]
    assert found.numel() > 0
    assert (found <= 20).all()


def inclusion(weights, fanout):
    """Chance of each item among the first arrivals, by enumeration of all orders."""
    chance = [0.0] * len(weights)
    for order in itertools.permutations(range(len(weights)), fanout):
        probability, left = 1.0, sum(weights)
        for item in order:
            probability *= weights[item] / left
            left -= weights[item]
        for item in order:
            chance[item] += probability
    return chance


def test_qv16_times_of_a_feature_store_and_link_batches_with_time(homogeneous):
    data = homogeneous.clone()
    data.time = torch.randint(0, 40, (data.num_nodes,), generator=torch.Generator().manual_seed(6))
    store = QuiverFeatureStore()
    for name in ("x", "time"):
        store.put_tensor(data[name], group_name=None, attr_name=name, index=None)
    topology = CSCTopology.from_edge_index(data.edge_index, data.num_nodes)
    options = {"time_attr": "time", "batch_size": 30}
    plain = next(iter(NeighborLoader(data, [3, 2], torch.arange(30), **options)))
    stores = next(iter(NeighborLoader((store, topology), [3, 2], torch.arange(30), **options)))
    assert torch.equal(plain.n_id, stores.n_id)
    assert torch.equal(plain.e_id, stores.e_id)
    links = data.edge_index[:, :20]
    limit = data.time[links].amax(0)
    batch = next(
        iter(LinkNeighborLoader(data, [3], links, edge_label_time=limit, neg_sampling="triplet", **options))
    )
    times = data.time[batch.n_id[batch.edge_index[0]]]
    assert batch.edge_index.size(1) > 0
    assert (times <= limit.max()).all()
    with pytest.raises(ValueError, match="'age' is no attribute of the feature store"):
        QuiverSampler((store, topology), [3], time_attr="age")


@pytest.mark.parametrize("replace", [False, True])
def test_qv16_weighted_inclusion_matches_enumeration(replace):
    weights = [0.5, 3.0, 1.0, 0.0, 2.0]
    data = Data(edge_index=torch.tensor([[1, 2, 3, 4, 5], [0] * 5]), num_nodes=6, w=torch.tensor(weights))
    sampler = QuiverSampler(data, [2], weight_attr="w", replace=replace)
    draws = 6000
    out = sampler.sample_groups(
        torch.zeros(draws, dtype=torch.int64), torch.arange(draws), [rng.mix(i) for i in range(draws)]
    )
    frequency = torch.bincount(out.edge, minlength=5).double() / draws
    positive = [w for w in weights if w > 0]
    expected = [2 * w / 6.5 for w in positive] if replace else inclusion(positive, 2)
    assert frequency[3] == 0
    assert frequency[[0, 1, 2, 4]].tolist() == pytest.approx(expected, abs=5 * (0.25 / draws) ** 0.5 * 1.5)


def test_qv16_errors(homogeneous):
    with pytest.raises(ValueError, match="time_attr 'when' is neither a node nor an edge attribute"):
        QuiverSampler(homogeneous, [2], time_attr="when")
    with pytest.raises(ValueError, match="weight_attr 'w' is not an edge attribute"):
        QuiverSampler(homogeneous, [2], weight_attr="w")
    with pytest.raises(ValueError, match="temporal_strategy is 'first'"):
        QuiverSampler(homogeneous, [2], temporal_strategy="first")
    data = homogeneous.clone()
    data.w = -torch.ones(data.num_edges)
    with pytest.raises(ValueError, match="negative weights"):
        QuiverSampler(data, [2], weight_attr="w")
    data.w = torch.ones(data.num_edges)
    with pytest.raises(ImportError, match="weight_attr needs backend='numba'"):
        QuiverSampler(data, [2], weight_attr="w", backend="torch")
    data.time = torch.arange(data.num_edges)
    loader = NeighborLoader(data, [2], batch_size=4, time_attr="time")
    with pytest.raises(ValueError, match="pass input_time"):
        next(iter(loader))
