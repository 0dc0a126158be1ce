"""Placement that follows popularity (QV-19)."""

from __future__ import annotations

import threading
import time
from functools import partial

import pytest
import torch
from quiver_reference import random_edges

from pyg_quiver import (
    CSCTopology,
    DeviceTopology,
    PlacementRefresher,
    QuiverFeatureStore,
    QuiverSampler,
    fap,
    plan_placement,
    seed_probability,
)

pytestmark = pytest.mark.pyg
NODES, FANOUTS, BATCH = 2000, [4, 2], 32


def requests(popular: torch.Tensor, count: int, generator: torch.Generator) -> list[torch.Tensor]:
    """Batches whose seeds are mostly the popular nodes, by Zipf."""
    weight = torch.arange(1, NODES + 1).double() ** -1.1
    return [popular[torch.multinomial(weight, BATCH, True, generator=generator)] for _ in range(count)]


def local_share(store: QuiverFeatureStore, sampler: QuiverSampler, batches: list[torch.Tensor]) -> float:
    store.reset_stats()
    for i, node in enumerate(batches):
        store.get_tensor(group_name=None, attr_name="x", index=sampler.sample(node, key=i).node)
    rows = store.stats().rows
    return rows["local"] / sum(rows.values())


def test_qv19_hit_rate_recovers_after_popularity_drifts():
    generator = torch.Generator().manual_seed(0)
    topology = CSCTopology.from_edge_index(random_edges(NODES, 16_000, 1), NODES)
    sampler = QuiverSampler(topology, FANOUTS)
    one = DeviceTopology(torch.ones(1, 1, dtype=torch.bool))
    plan = partial(plan_placement, row_bytes=4, devices=one, device_budget=4 * NODES // 5)
    x = torch.randn(NODES, 1)
    before, after = (torch.randperm(NODES, generator=generator) for _ in range(2))

    def hotness(popular: torch.Tensor) -> torch.Tensor:
        log = torch.cat(requests(popular, 400, generator))
        return fap(topology, FANOUTS, seed_probability(NODES, BATCH, log), mode="count")

    store = QuiverFeatureStore(plan=plan(hotness(before)))
    store.put_tensor(x, group_name=None, attr_name="x", index=None)
    test = requests(after, 60, generator)
    stale = local_share(store, sampler, test)
    fresh_store = QuiverFeatureStore(plan=plan(hotness(after)))
    fresh_store.put_tensor(x, group_name=None, attr_name="x", index=None)
    fresh = local_share(fresh_store, sampler, test)
    assert stale < 0.9 * fresh
    with PlacementRefresher(
        store, topology, FANOUTS, plan, batch_size=BATCH, window=BATCH * 300
    ) as refresher:
        assert refresher.refresh() is None
        for node in requests(before, 300, generator) + requests(after, 300, generator):
            refresher.observe(node)
        old = store.plan
        refresher.start(0.02)
        for _ in range(500):
            if store.plan is not old:
                break
            time.sleep(0.01)
    assert [t.name for t in threading.enumerate() if t.name == "pyg_quiver-refresh"] == []
    assert local_share(store, sampler, test) >= 0.95 * fresh
    assert torch.equal(store.get_tensor(group_name=None, attr_name="x", index=None), x)


def test_qv19_errors():
    topology = CSCTopology.from_edge_index(random_edges(10, 20, 1), 10)
    with pytest.raises(ValueError, match="window is 0"):
        PlacementRefresher(QuiverFeatureStore(), topology, [2], lambda hot: None, batch_size=1, window=0)

    def broken(hotness: torch.Tensor) -> None:
        raise ArithmeticError("no plan")

    refresher = PlacementRefresher(QuiverFeatureStore(), topology, [2], broken, batch_size=1)
    refresher.observe(torch.tensor([3]))
    with pytest.raises(ArithmeticError, match="no plan"):
        refresher.refresh()
