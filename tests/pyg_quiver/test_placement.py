"""Plans without a GPU, and the store that carries them out (QV-08, QV-09, QV-17, QV-18, QV-19)."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quiver_reference import random_edges
from torch_geometric.data import Data

from pyg_quiver import (
    DISK,
    HOST,
    CSCTopology,
    DeviceTopology,
    NeighborLoader,
    PlacementPlan,
    QuiverFeatureStore,
    plan_placement,
)

pytestmark = pytest.mark.pyg


def linked(*groups: tuple[int, ...]) -> DeviceTopology:
    count = sum(map(len, groups))
    peer = torch.eye(count, dtype=torch.bool)
    for group in groups:
        for a, b in itertools.permutations(group, 2):
            peer[a, b] = True
    return DeviceTopology(peer)


def test_qv08_cliques_of_any_layout():
    assert linked((0, 1, 2, 3), (4, 5, 6, 7)).cliques() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert linked((0, 2), (1,), (3, 4)).cliques() == [[0, 2], [1], [3, 4]]
    one_way = torch.tensor([[True, True], [False, True]])
    assert DeviceTopology(one_way).cliques() == [[0], [1]]
    chain = torch.eye(3, dtype=torch.bool)
    chain[0, 1] = chain[1, 0] = chain[1, 2] = chain[2, 1] = True
    assert DeviceTopology(chain).cliques() == [[0, 1], [2]]
    assert DeviceTopology(torch.zeros(0, 0, dtype=torch.bool)).cliques() == []
    detected = DeviceTopology.detect()
    assert len(detected) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_qv08_budgets_are_kept_and_a_clique_holds_one_copy(data):
    groups = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    starts = list(itertools.accumulate(groups, initial=0))
    devices = linked(*(tuple(range(a, b)) for a, b in itertools.pairwise(starts)))
    rows = data.draw(st.integers(0, 40))
    budgets = data.draw(st.lists(st.integers(0, 120), min_size=len(devices), max_size=len(devices)))
    host = data.draw(st.one_of(st.none(), st.integers(0, 300)))
    hotness = torch.rand(rows, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    plan = plan_placement(hotness, 8, devices, device_budget=budgets, host_budget=host)
    order = torch.argsort(hotness.double(), descending=True, stable=True)
    for device, budget in enumerate(budgets):
        assert plan.bytes(device) <= budget
    for clique in plan.cliques:
        held = torch.cat([plan.rows(device) for device in clique])
        assert held.unique().numel() == held.numel()
        assert set(held.tolist()) == set(order[: held.numel()].tolist())
        assert held.numel() == min(rows, sum(budgets[d] // 8 for d in clique))
    assert host is None or plan.bytes(HOST) <= host
    for device in range(len(devices)):
        where = plan.location(device)
        assert where.dtype == torch.int8
        for place in (HOST, DISK, *plan.clique_of(device)):
            ids = (where == place).nonzero().squeeze(1)
            assert set(ids.tolist()) <= set(plan.rows(place).tolist())
        rate = plan.hit_rate(device)
        assert sum(rate.values()) == pytest.approx(1)
        if rows:
            assert rate["local"] == pytest.approx(
                float(hotness[where == device].sum() / hotness.sum()), abs=1e-6
            )


def test_qv08_round_robin_gives_each_gpu_an_equal_share():
    hotness = torch.arange(100, 0, -1).double()
    plan = plan_placement(hotness, 4, linked((0, 1)), device_budget=4 * 20)
    assert plan.rows(0).tolist() == list(range(0, 40, 2))
    assert plan.rows(1).tolist() == list(range(1, 40, 2))
    replicated = plan_placement(hotness, 4, linked((0, 1)), device_budget=80, policy="device_replicate")
    assert replicated.rows(0).tolist() == replicated.rows(1).tolist() == list(range(20))
    assert replicated.hit_rate(0)["peer"] == 0


BANDWIDTH = {"local": 2000.0, "peer": 350.0, "host": 50.0, "disk": 1.0}


def seconds(hotness, sets, bandwidth):
    """Mean modelled time of two readers over given rows of two devices; the rest lies on the host."""
    total = 0.0
    for device in range(2):
        for row, reads in enumerate(hotness):
            own, other = row in sets[device], row in sets[1 - device]
            tier = "local" if own else "peer" if other else "host"
            total += reads / bandwidth[tier] / 2
    return total


@pytest.mark.parametrize("peer", [60.0, 200.0, 350.0, 1900.0])
@pytest.mark.parametrize("skew", [0.0, 1.0, 3.0])
def test_qv18_auto_is_within_one_percent_of_exhaustive_search(peer, skew):
    bandwidth = {**BANDWIDTH, "peer": peer}
    hotness = torch.arange(1, 7).double() ** -skew
    plan = plan_placement(hotness, 1, linked((0, 1)), device_budget=3, policy="auto", bandwidth=bandwidth)
    chosen = seconds(hotness.tolist(), [set(plan.rows(0).tolist()), set(plan.rows(1).tolist())], bandwidth)
    every = [set(rows) for rows in itertools.combinations(range(6), 3)]
    best = min(seconds(hotness.tolist(), pair, bandwidth) for pair in itertools.product(every, every))
    assert chosen <= best * 1.01


def test_qv08_brute_force_on_six_rows():
    hotness = torch.tensor([0.5, 3.0, 1.0, 2.0, 0.1, 0.2])
    plan = plan_placement(hotness, 10, linked((0, 1)), device_budget=20, host_budget=10)
    held = set(plan.rows(0).tolist()) | set(plan.rows(1).tolist())
    best = max(itertools.combinations(range(6), 4), key=lambda rows: float(hotness[list(rows)].sum()))
    assert held == set(best)
    assert plan.rows(HOST).tolist() == [5]
    assert plan.rows(DISK).tolist() == [4]


def test_qv08_errors_and_round_trip(tmp_path):
    devices = DeviceTopology(torch.eye(2, dtype=torch.bool), free_bytes=(80_000_000_000, 71_300_000_000))
    with pytest.raises(ValueError, match=r"device 1: budget 90\.0 GB exceeds the free 71\.3 GB"):
        plan_placement(torch.ones(3), 4, devices, device_budget=[10, 90_000_000_000])
    with pytest.raises(ValueError, match="device_budget has 3 entries for 2 devices"):
        plan_placement(torch.ones(3), 4, devices, device_budget=[1, 2, 3])
    with pytest.raises(ValueError, match="policy='auto' needs bandwidth in B/s of disk, host, local, peer"):
        plan_placement(torch.ones(3), 4, linked((0, 1)), device_budget=4, policy="auto")
    with pytest.raises(ValueError, match="policy is 'best'"):
        plan_placement(torch.ones(3), 4, devices, device_budget=4, policy="best")
    with pytest.raises(ValueError, match="none negative"):
        plan_placement(torch.tensor([-1.0]), 4, devices, device_budget=4)
    with pytest.raises(ValueError, match="device 0: budget -1 is negative"):
        plan_placement(torch.ones(3), 4, linked((0,)), device_budget=-1)
    plan = plan_placement(torch.rand(50), 4, devices, device_budget=40, host_budget=60)
    plan.save(tmp_path / "plan.safetensors")
    loaded = PlacementPlan.load(tmp_path / "plan.safetensors")
    for place in (0, 1, HOST, DISK):
        assert torch.equal(loaded.rows(place), plan.rows(place))
    assert loaded.cliques == plan.cliques
    assert loaded.hit_rate(1) == plan.hit_rate(1)
    with pytest.raises(IndexError, match=r"device 2 is out of range \[0, 2\)"):
        plan.location(2)


def four_tier_plan(rows: int) -> PlacementPlan:
    hotness = torch.rand(rows, generator=torch.Generator().manual_seed(1))
    return plan_placement(hotness, 1, linked((0, 1)), device_budget=rows // 5, host_budget=rows // 3)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.int64], ids=str
)
@pytest.mark.parametrize("width", [1, 3, 16, 77])
def test_qv09_qv17_rows_equal_the_tensor_for_every_reader_and_dtype(tmp_path, dtype, width):
    x = (torch.randn(101, width, generator=torch.Generator().manual_seed(0)) * 20).to(dtype)
    plan = four_tier_plan(101)
    index = torch.randint(0, 101, (300,), generator=torch.Generator().manual_seed(2))
    for reader in (0, 1):
        store = QuiverFeatureStore(plan=plan, reader=reader, disk_path=tmp_path)
        store["paper", "x", None] = x
        assert torch.equal(store["paper", "x", index], x[index])
        assert torch.equal(store["paper", "x", None], x)
        assert torch.equal(store["paper", "x", 5:30:2], x[5:30:2])
        assert store.get_tensor_size(group_name="paper", attr_name="x") == (101, width)
    assert list(tmp_path.iterdir()) == []  # files are unlinked while in use


def test_qv09_stats_count_each_tier(tmp_path):
    plan = four_tier_plan(100)
    store = QuiverFeatureStore(plan=plan, reader=1, disk_path=tmp_path)
    store.put_tensor(torch.randn(100, 4), group_name=None, attr_name="x", index=None)
    index = torch.randint(0, 100, (1000,))
    store.get_tensor(group_name=None, attr_name="x", index=index)
    where = plan.location(1)[index]
    stats = store.stats()
    expected = {
        "local": int((where == 1).sum()), "peer": int((where == 0).sum()),
        "host": int((where == HOST).sum()), "disk": int((where == DISK).sum()),
    }  # fmt: skip
    assert stats.rows == expected
    assert stats.bytes == {tier: count * 16 for tier, count in expected.items()}
    store.reset_stats()
    assert sum(store.stats().rows.values()) == 0


def test_qv08_predicted_hit_rate_equals_the_counted_one(tmp_path):
    hotness = torch.arange(1, 1001).double() ** -1.2
    plan = plan_placement(hotness, 4, linked((0, 1)), device_budget=4 * 100, host_budget=4 * 300)
    store = QuiverFeatureStore(plan=plan, disk_path=tmp_path)
    store.put_tensor(torch.randn(1000, 1), group_name=None, attr_name="x", index=None)
    reads = torch.multinomial(hotness, 200_000, replacement=True, generator=torch.Generator().manual_seed(0))
    store.get_tensor(group_name=None, attr_name="x", index=reads)
    for tier, share in plan.hit_rate(0).items():
        assert store.stats().rows[tier] / 200_000 == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize("workers", [0, 2])
def test_qv01_qv09_stores_give_the_batches_of_data(tmp_path, workers):
    edges = random_edges(200, 2000, 4)
    data = Data(x=torch.randn(200, 6), y=torch.arange(200), edge_index=edges)
    topology = CSCTopology.from_edge_index(edges, 200)
    store = QuiverFeatureStore(plan=four_tier_plan(200), disk_path=tmp_path)
    store.put_tensor(data.x, group_name=None, attr_name="x", index=None)
    store.put_tensor(data.y, group_name=None, attr_name="y", index=None)
    plain = NeighborLoader(data, [4, 3], torch.arange(100), batch_size=25)
    stores = NeighborLoader((store, topology), [4, 3], torch.arange(100), batch_size=25, num_workers=workers)
    for a, b in zip(plain, stores, strict=True):
        assert torch.equal(a.x, b.x)
        assert torch.equal(a.y, b.y)
        assert torch.equal(a.edge_index, b.edge_index)
        assert torch.equal(a.e_id, b.e_id)
    assert stores.filter_per_worker is False


def test_qv09_disk_needs_a_folder_and_rows_are_not_patched():
    store = QuiverFeatureStore(plan=four_tier_plan(30))
    with pytest.raises(ValueError, match="rows of 'x' on disk: pass disk_path"):
        store.put_tensor(torch.zeros(30, 2), group_name=None, attr_name="x", index=None)
    with pytest.raises(ValueError, match="put the whole tensor"):
        store.put_tensor(torch.zeros(1, 2), group_name=None, attr_name="x", index=torch.tensor([3]))
    with pytest.raises(KeyError):
        store.get_tensor(group_name=None, attr_name="missing", index=None)
    store.put_tensor(torch.zeros(5, 2), group_name="other", attr_name="x", index=None)
    for wrong in (5, -1):
        with pytest.raises(IndexError, match=f"index names row {wrong}, but there are 5 rows"):
            store.get_tensor(group_name="other", attr_name="x", index=torch.tensor([0, wrong]))
    assert store.remove_tensor(group_name="other", attr_name="x", index=None)
    assert store.get_all_tensor_attrs() == []


def test_qv19_no_wrong_row_while_rows_move(tmp_path):
    x = torch.randn(2000, 8)
    store = QuiverFeatureStore(plan=four_tier_plan(2000), disk_path=tmp_path)
    store.put_tensor(x, group_name=None, attr_name="x", index=None)
    wrong, stop = [], threading.Event()

    def read() -> None:
        generator = torch.Generator().manual_seed(threading.get_ident() % 1000)
        while not stop.is_set():
            index = torch.randint(0, 2000, (200,), generator=generator)
            if not torch.equal(store.get_tensor(group_name=None, attr_name="x", index=index), x[index]):
                wrong.append(index)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for seed in range(8):
        hotness = torch.rand(2000, generator=torch.Generator().manual_seed(seed))
        store.place(plan_placement(hotness, 1, linked((0, 1)), device_budget=300 + seed, host_budget=900))
    stop.set()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert store.plan.rows(0).numel() == 307
