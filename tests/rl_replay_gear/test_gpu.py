"""On a CUDA device (GR-08, GR-29 and stream safety): the checks of benchmarks/rl_replay_gear_gpu.py."""

from __future__ import annotations

import pytest
import torch
from counted_ops import CountedOps

from benchmarks import rl_replay_gear_gpu as bench
from rl_replay_gear import GraphedCollect, PrefixSumTree, Selection, Uniform, Window
from rl_replay_gear.randomness import CounterGenerator

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("memory", ["pinned", "device", "host"])
def test_gr08_batches_on_the_gpu_have_the_bits_of_the_cpu(memory):
    assert bench.same_bits(memory)["ok"]


def test_gr30_columns_in_two_tiers_come_in_one_batch():
    found = bench.two_tiers()
    assert found["ok"], found


def test_gr05_a_prioritised_selector_on_the_device_draws_the_cpus_items():
    found = bench.selector_on_device()
    assert found["ok"], found


def test_gr08_a_column_past_2_gib():
    assert bench.past_2_gib(bench.filled(bench.WIDE_COLUMNS, 2200, 1000, "pinned"))["ok"]


def test_gr11_no_batch_is_torn_while_trajectories_are_overwritten():
    found = bench.overwritten_while_prefetching()
    assert found["ok"], found


def test_gr11_prefetch_changes_nothing():
    assert bench.prefetch_changes_nothing()["ok"]


def test_gr06_trees_on_the_device_are_exact():
    found = bench.tree_on_device()
    assert found["ok"], found
    assert bench.law_on_device()["ok"]


def test_gr29_draw_and_gather_replay_from_a_cuda_graph():
    from tiered_memory import gather_segments

    table = bench.filled(bench.DT_COLUMNS, 50, 200, "device")
    table.collect(table.select(Uniform(), 8), Window(20))
    tree = PrefixSumTree(50, device="cuda")
    tree.update(torch.arange(50, device="cuda"), torch.rand(50, dtype=torch.float64, device="cuda"))
    start = torch.from_numpy(table.index.start).cuda()
    u = torch.rand(64, dtype=torch.float64, device="cuda")
    full, zero = torch.full((64,), 20, device="cuda"), torch.zeros(64, dtype=torch.int64, device="cuda")

    def step():
        slots, _ = tree.draw(u)
        return gather_segments(table.storage[0], start[slots], full, zero, 20)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for seed in range(3):
        torch.manual_seed(seed)
        u.copy_(torch.rand(64, dtype=torch.float64))
        graph.replay()
        slots = tree.draw(u)[0].cpu()
        handles = torch.from_numpy(table.index.handles(slots.numpy()))
        chosen = Selection(handles, torch.zeros(64, dtype=torch.int64), torch.ones(64))
        assert torch.equal(out, table.collect(chosen, Window(20)).buffers[0])


def test_gr29_graphed_collection_equals_eager():
    found = bench.graphed_bits()
    assert found["ok"], found


def test_a_batch_costs_few_torch_calls_and_a_replayed_one_fewer():
    table = bench.filled(bench.DT_COLUMNS, 50, 200, "pinned")
    window = Window(20)
    graphed = GraphedCollect(table, window, 64)
    chosen = table.select(Uniform(), 64)
    table.collect(chosen, window, device="cuda")
    counts = []
    for collect in (lambda: table.collect(chosen, window, device="cuda"), lambda: graphed(chosen)):
        with CountedOps() as counted:
            collect()
        counts.append(counted.names)
    assert len(counts[0]) <= 14, counts[0]
    assert len(counts[1]) <= 3, counts[1]


def test_select_is_reproducible_on_any_memory():
    host, device = (bench.filled(bench.DT_COLUMNS, 30, 50, memory) for memory in ("host", "device"))
    a, b = (t.select(Uniform(), 64, generator=CounterGenerator(1)) for t in (host, device))
    assert torch.equal(a.handles, b.handles)
