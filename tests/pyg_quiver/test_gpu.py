"""The samplers and the store on a real GPU: the bits of the CPU (QV-02, QV-05, QV-09)."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from quiver_reference import check_backend, random_edges

from pyg_quiver import (
    CSCTopology,
    DeviceTopology,
    NeighborLoader,
    QuiverFeatureStore,
    QuiverSampler,
    plan_placement,
)

pytestmark = [pytest.mark.pyg, pytest.mark.gpu]


@pytest.fixture(scope="module")
def topology() -> CSCTopology:
    return CSCTopology.from_edge_index(random_edges(20_000, 600_000, 3), 20_000)


def equal(a, b) -> None:
    for name in ("node", "row", "col", "edge"):
        assert torch.equal(getattr(a, name).cpu(), getattr(b, name).cpu()), name
    assert a.num_sampled_nodes == b.num_sampled_nodes
    assert a.num_sampled_edges == b.num_sampled_edges


def test_qv02_triton_equals_the_specification_on_the_gpu():
    from pyg_quiver.backends import triton_gpu

    assert check_backend(triton_gpu.sample, device="cuda") == 52


@pytest.mark.parametrize("mode", ["gpu", "uva"])
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("fanouts", [[15, 10, 5], [25, 10], [-1, 3]], ids=str)
def test_qv05_same_bits_as_the_cpu(topology, mode, backend, replace, fanouts):
    if mode == "uva" and (backend == "torch" or -1 in fanouts):
        pytest.skip("torch operations do not read pinned memory from the GPU")
    here = QuiverSampler(topology, fanouts, replace=replace, mode="cpu", backend="torch", seed=3)
    there = QuiverSampler(topology, fanouts, replace=replace, mode=mode, backend=backend, seed=3)
    for key, batch in ((1, 1), (2, 64), (3, 1024)):
        node = torch.randint(0, 20_000, (batch,), generator=torch.Generator().manual_seed(key))
        equal(here.sample(node, key=key), there.sample(node, key=key))


def test_qv22_copied_columns_change_no_bit(topology):
    hot = topology.in_degree().argsort(descending=True)[:3000]
    here = QuiverSampler(topology, [15, 10, 5], backend="torch")
    there = QuiverSampler(topology, [15, 10, 5], mode="uva", hot_columns=hot)
    for key, batch in ((1, 3), (2, 700)):
        node = torch.randint(0, 20_000, (batch,), generator=torch.Generator().manual_seed(key))
        equal(here.sample(node, key=key), there.sample(node, key=key))


def test_qv12_groups_replayed_from_graphs_equal_the_cpu_from_several_threads(topology):
    here = QuiverSampler(topology, [10, 5], backend="torch", seed=3)
    there = QuiverSampler(topology, [10, 5], mode="gpu", seed=3)

    def compare(number: int) -> bool:
        generator = torch.Generator().manual_seed(number)
        sizes = torch.randint(1, 9, (1 + number % 20,), generator=generator)
        group = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
        node = torch.randint(0, 20_000, (len(group),), generator=generator)
        a, b = (s.sample_groups(node, group, range(len(sizes))) for s in (here, there))
        return all(
            torch.equal(getattr(a, n), getattr(b, n).cpu()) for n in ("node", "row", "col", "edge", "group")
        )

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(compare, range(60)))


def test_qv01_loader_on_the_gpu_gives_the_batches_of_the_cpu(topology):
    from torch_geometric.data import Data

    edges = random_edges(20_000, 600_000, 3)
    data = Data(x=torch.randn(20_000, 8), edge_index=edges)
    cpu = NeighborLoader(data, [5, 5], torch.arange(500), batch_size=250, mode="cpu")
    gpu = NeighborLoader(data, [5, 5], torch.arange(500), batch_size=250, mode="gpu")
    for a, b in zip(cpu, gpu, strict=True):
        assert torch.equal(a.x, b.x.cpu())
        assert torch.equal(a.edge_index, b.edge_index.cpu())
        assert torch.equal(a.e_id, b.e_id.cpu())


def test_qv09_rows_that_cannot_be_pinned_are_read_and_reported(monkeypatch):
    from pyg_quiver import host_memory
    from tiered_memory import PinnedArena

    monkeypatch.setattr(host_memory, "PinnedArena", lambda nbytes, **_: PinnedArena(nbytes, pinned=False))
    x = torch.randn(5000, 16)
    store = QuiverFeatureStore("cuda")
    with pytest.warns(RuntimeWarning, match=r"pageable memory: .* run at [0-9.]+ GB/s"):
        store.put_tensor(x, group_name=None, attr_name="x", index=None)
    index = torch.randint(0, 5000, (700,))
    assert torch.equal(store.get_tensor(group_name=None, attr_name="x", index=index).cpu(), x[index])


def test_qv20_a_reader_gets_the_rows_of_both_gpus():
    devices = DeviceTopology.detect()
    if len(devices) < 2 or len(devices.cliques()[0]) < 2:
        pytest.skip("needs two linked GPUs")
    x = torch.randn(4000, 100)
    plan = plan_placement(torch.rand(4000), 400, devices, device_budget=400 * 1500)
    index = torch.randint(0, 4000, (9000,))
    for reader in (0, 1):
        store = QuiverFeatureStore(f"cuda:{reader}", plan=plan, reader=reader)
        store.put_tensor(x, group_name=None, attr_name="x", index=None)
        assert torch.equal(store.get_tensor(group_name=None, attr_name="x", index=index).cpu(), x[index])
        where = plan.location(reader)[index]
        assert store.stats().rows["peer"] == int((where == 1 - reader).sum()) > 0
