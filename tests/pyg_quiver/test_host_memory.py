"""Arrays that are read at random lie in huge pages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from quiver_reference import random_edges

from pyg_quiver import CSCTopology, DeviceTopology, QuiverFeatureStore, plan_placement

pytestmark = pytest.mark.pyg

MAPS = Path("/proc/self/smaps")


def asks_for_huge_pages(tensor: torch.Tensor) -> bool:
    """Whether the mapping that holds the tensor was advised so (flag "hg" of the kernel)."""
    address = tensor.data_ptr()
    inside = False
    for line in MAPS.read_text().splitlines():
        bounds = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if bounds:
            inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return "hg" in line.split()
    raise AssertionError("no mapping holds the tensor")


@pytest.fixture(autouse=True)
def huge_pages() -> None:
    if not (MAPS.exists() and Path("/sys/kernel/mm/transparent_hugepage").exists()):
        pytest.skip("the kernel has no transparent huge pages, or does not show its mappings")


def test_the_graph_made_from_an_edge_list_asks_for_huge_pages():
    edges = random_edges(1000, 400_000, 0)
    topology = CSCTopology.from_edge_index(edges, 1000)
    assert asks_for_huge_pages(topology.row)
    assert asks_for_huge_pages(topology.sorted_by(torch.rand(1000)).row)
    assert torch.equal(topology.row, edges[0][torch.argsort(edges[1], stable=True)])
    assert not asks_for_huge_pages(torch.empty(16))


@pytest.mark.parametrize("with_plan", [False, True])
def test_qv09_rows_in_host_memory_ask_for_huge_pages(with_plan):
    x = torch.randn(20_000, 100)
    devices = DeviceTopology(torch.ones(1, 1, dtype=torch.bool))
    plan = plan_placement(torch.rand(20_000), 400, devices, device_budget=400 * 100) if with_plan else None
    store = QuiverFeatureStore(plan=plan)
    store.put_tensor(x, group_name=None, attr_name="x", index=None)
    placed = store._placed[None, "x"]
    assert asks_for_huge_pages(placed.sources[placed.tiers.index("host")])
    index = torch.randint(0, 20_000, (500,))
    assert torch.equal(store.get_tensor(group_name=None, attr_name="x", index=index), x[index])
