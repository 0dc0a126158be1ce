"""GPU memory split between graph and features, and sampling through copied columns (QV-22)."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from quiver_reference import random_edges

from pyg_quiver import CSCTopology, QuiverSampler, edge_reads, plan_caches

pytestmark = pytest.mark.pyg
BANDWIDTH = {"local": 2e12, "host": 5e10}


@pytest.fixture(scope="module")
def topology() -> CSCTopology:
    return CSCTopology.from_edge_index(random_edges(2000, 30_000, 2), 2000)


def test_qv22_edge_reads_equal_what_batches_read(topology):
    seeds = torch.zeros(2000).double()
    seeds[:500] = 0.1
    expected = edge_reads(topology, [4, 3], seeds)
    rounds = 400
    chosen = (torch.rand(rounds, 500, generator=torch.Generator().manual_seed(0)) < 0.1).nonzero()[:, 1]
    sampler = QuiverSampler(topology, [4, 3])
    edge = sampler.sample_groups(chosen, torch.arange(chosen.numel()), range(chosen.numel())).edge
    target = torch.repeat_interleave(torch.arange(2000), topology.in_degree())
    counted = torch.bincount(target[edge], minlength=2000)
    # Nodes met again within one request are not expanded again, so a little less is read than expected.
    assert float(counted.sum()) / rounds == pytest.approx(float(expected.sum()), rel=0.03)
    for part in expected.argsort(descending=True)[:1000].split(100):
        assert float(counted[part].sum()) / rounds == pytest.approx(float(expected[part].sum()), rel=0.08)


@pytest.mark.parametrize("share", [0.02, 0.1, 0.3, 0.7])
@pytest.mark.parametrize("row_bytes", [64, 512])
def test_qv22_both_together_take_less_modelled_time_than_features_alone(topology, share, row_bytes):
    total = topology.row.nbytes + 2000 * row_bytes
    plan = plan_caches(
        topology, [10, 5], 0.05, row_bytes=row_bytes, budget=int(total * share), bandwidth=BANDWIDTH
    )
    assert plan.topology_bytes + plan.feature_bytes == int(total * share)
    assert plan.topology_bytes == int(topology.in_degree()[plan.hot_columns].sum()) * 8
    # The very hottest rows come first; then columns save more than the rows left.
    assert plan.seconds < plan.seconds_features_only or (share == 0.02 and plan.topology_bytes == 0)


def test_qv22_the_split_is_the_best_one_of_a_tiny_graph():
    tiny = CSCTopology.from_edge_index(torch.tensor([[1, 2, 3, 0, 2, 1], [0, 0, 0, 1, 1, 2]]), 4)
    row_bytes, budget = 16, 48
    plan = plan_caches(tiny, [2, 2], 0.3, row_bytes=row_bytes, budget=budget, bandwidth=BANDWIDTH)
    from pyg_quiver import fap

    reads = torch.cat([edge_reads(tiny, [2, 2], 0.3) * 32, fap(tiny, [2, 2], 0.3, mode="count") * row_bytes])
    size = torch.cat([tiny.in_degree() * 8, torch.full((4,), row_bytes)])
    saving = 1 / BANDWIDTH["host"] - 1 / BANDWIDTH["local"]
    best = max(
        float(reads[list(chosen)].sum())
        for count in range(9)
        for chosen in itertools.combinations(range(8), count)
        if int(size[list(chosen)].sum()) <= budget
    )
    slowest = float(reads.sum()) / BANDWIDTH["host"]
    lost = plan.seconds - (slowest - saving * best)
    assert 0 <= lost <= saving * float(reads.max())  # all but the last item


CASES = """
import sys
sys.path.insert(0, {folder!r})
import torch
from dataclasses import replace
from quiver_reference import random_edges
from pyg_quiver import CSCTopology, rng
from pyg_quiver.backends import triton_gpu
from pyg_quiver.backends.contract import Draws, Frontier, Graph
from pyg_quiver.typed_graphs import with_hot_columns
topology = CSCTopology.from_edge_index(random_edges(40, 300, 1), 40)
graph = Graph(topology.colptr, topology.row, 40)
hot = torch.arange(0, 40, 3)
cached = with_hot_columns(graph, hot)
target = torch.repeat_interleave(torch.arange(40), topology.in_degree())
spoilt = topology.row.clone()
spoilt[target % 3 == 0] = -1  # whoever reads these from the host is found out
one, three = torch.zeros(7, dtype=torch.int64), torch.tensor([0, 0, 1, 1, 1, 2, 2])
for groups, keys in ((one, [5]), (three, [5, 6, 7])):
    seeds = Frontier(torch.tensor([3, 0, 39, 3, 17, 1, 0]), groups)
    draws = Draws(rng.streams_tensor(1, keys))
    a = triton_gpu.sample(graph, seeds, [4, 3], draws)
    b = triton_gpu.sample(replace(cached, row=spoilt), seeds, [4, 3], draws)
    for name in ("node", "row", "col", "edge", "group"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    # A batch whose buffers are larger than it needs, as replayed ones are.
    shape = triton_gpu._Shape(7, len(keys), (4, 3), False, 40).rounded_up()
    batch = triton_gpu._Batch(graph, shape)
    fewer = Frontier(seeds.node[:2], torch.zeros(2, dtype=torch.int64))
    for again in (seeds, fewer, seeds):  # and used before, for more and for less
        c = batch.run(again, draws)
        expected = triton_gpu.sample(graph, again, [4, 3], draws)
        for name in ("node", "row", "col", "edge", "group"):
            assert torch.equal(getattr(c, name), getattr(expected, name)), name
    for name in ("node", "row", "col", "edge", "group"):
        assert torch.equal(getattr(a, name), getattr(c, name)), name
    assert a.nodes_per_hop == c.nodes_per_hop and a.edges_per_hop == c.edges_per_hop
print("done")
"""


def test_qv22_qv02_copied_columns_and_rounded_buffers_change_no_bit():
    if torch.cuda.is_available():
        pytest.skip("test_gpu.py samples through copied columns on the device")
    pytest.importorskip("triton")
    code = CASES.format(folder=str(Path(__file__).parent))
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[-1] == "done"


def test_qv22_errors(topology):
    with pytest.raises(ValueError, match="budget is -1"):
        plan_caches(topology, [2], 0.1, row_bytes=4, budget=-1, bandwidth=BANDWIDTH)
    with pytest.raises(ValueError, match="needs bandwidth in B/s of local"):
        plan_caches(topology, [2], 0.1, row_bytes=4, budget=1, bandwidth={"host": 1.0})
    with pytest.raises(ValueError, match="hot_columns are for mode='uva'"):
        QuiverSampler(topology, [2], hot_columns=torch.tensor([1]))
