"""Shards over gloo processes (GR-14, GR-15, GR-19, GR-26); the cases are in sharded_cases.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from rl_replay_gear import (
    ColumnSpec,
    Fifo,
    ParallelLayout,
    Prioritized,
    ShardedTable,
    TableSpec,
    TrajectoryTable,
    Uniform,
    Window,
)

SCRIPT = os.path.join(os.path.dirname(__file__), "sharded_cases.py")


CASES = {
    2: ["all_to_all", "schema", "empty"],
    3: ["mapped", "mapped_kernel", "law", "ranked", "priorities", "strict", "batch_sizes"],
    4: ["all_to_all", "stages", "tensor_peers"],
}  # by number of processes: starting one takes seconds, so a group runs all its cases


def launch(cases, world, folder, **environment):
    """What each process prints for each case, and its exit code."""
    processes = [
        subprocess.Popen(
            [sys.executable, SCRIPT, ",".join(cases), str(rank), str(world), str(folder / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **environment},
        )
        for rank in range(world)
    ]
    found: dict[str, list[object]] = {case: [] for case in cases}
    codes, errors = [], []
    for process in processes:
        out, error = process.communicate(timeout=240)
        codes.append(process.returncode)
        errors.append(error)
        for line in out.splitlines():
            if line.startswith("RESULT "):
                _, case, result = line.split(" ", 2)
                found[case].append(json.loads(result))
    return found, codes, errors


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """``run(case, world)``: the result of every process."""
    groups = {}

    def results(case, world):
        if world not in groups:
            found, codes, errors = launch(
                CASES[world], world, tmp_path_factory.mktemp(f"world{world}"), TRITON_INTERPRET="1"
            )
            assert codes == [0] * world, errors[0][-3000:]
            groups[world] = found
        return groups[world][case]

    return results


@pytest.mark.parametrize("world", [2, 4])
def test_gr15_shards_draw_the_items_of_one_table(world, run):
    assert run("all_to_all", world) == ["same"] * world


def test_gr26_mapped_shards_give_the_same_batches(run):
    assert run("mapped", 3) == ["same"] * 3


def test_gr26_the_interpreted_kernel_reads_the_rows_of_other_processes_past_2_gib(run):
    pytest.importorskip("triton")
    assert run("mapped_kernel", 3) == [3] * 3


@pytest.mark.gpu
def test_gr26_processes_read_each_others_device_memory(tmp_path):
    if torch.cuda.device_count() == 0:
        pytest.skip("no GPU")
    found, codes, errors = launch(["mapped_device"], 2, tmp_path)
    assert codes == [0, 0], errors[0][-3000:]
    assert found["mapped_device"] == [2, 2]


def test_gr14_frequencies_equal_global_weights_with_an_empty_shard(run):
    sys.path.insert(0, os.path.dirname(SCRIPT))
    import sharded_cases

    counts: dict[int, int] = {}
    for result in run("law", 3):
        for who, count in result.items():
            counts[int(who)] = counts.get(int(who), 0) + count
    weights = {
        int(columns["who"][0]): priority
        for rank in range(3)
        for columns, priority in sharded_cases.trajectories(rank)
    }
    total = sum(counts.values())
    assert total == 3 * 40 * 500
    expected = {who: total * w / sum(weights.values()) for who, w in weights.items() if w > 0}
    assert set(counts) == set(expected)
    statistic = sum((counts[who] - e) ** 2 / e for who, e in expected.items())
    assert statistic < len(expected) - 1 + 4.5 * np.sqrt(2 * (len(expected) - 1))


def test_gr14_top_k_and_distinct_draws_over_shards(run):
    sys.path.insert(0, os.path.dirname(SCRIPT))
    import sharded_cases

    results = run("ranked", 3)
    ranked = sorted(
        (
            (-priority, rank, number, int(columns["who"][0]))
            for rank in range(3)
            for number, (columns, priority) in enumerate(sharded_cases.trajectories(rank))
        ),
        key=lambda item: item[:3],
    )
    assert [who for top, _, _ in results for who in top] == [item[3] for item in ranked[:9]]
    distinct = [who for _, part, _ in results for who in part]
    assert len(distinct) == len(set(distinct)) == 9
    assert all("cannot select 150 distinct trajectories from a table of 11" in r for _, _, r in results)


def test_gr14_priorities_reach_the_shard_that_holds_them(run):
    results = run("priorities", 3)
    dropped = {result[0] for result in results}
    assert len(dropped) == 1  # every process learns the same number
    values = {value for result in results for value in result[1]}
    assert values & {10.0, 11.0, 12.0}
    assert all("finite and >= 0 in every process" in result[2] for result in results)
    assert all(result[3] for result in results)
    assert len({result[4] for result in results}) == 1


def test_gr19_stages_of_one_data_parallel_rank_get_the_same_items(run):
    results = run("stages", 4)
    for first, second in ((0, 1), (2, 3)):
        for a, b in zip(results[first], results[second], strict=True):
            assert a[1:] == b[1:]
            assert (a[0], b[0]) == (["x"], ["who", "big"])
    assert results[0][0][1:] != results[2][0][1:]


def test_gr19_tensor_parallel_peers_get_the_same_batch(run):
    results = run("tensor_peers", 4)
    assert results[0] == results[1]
    assert results[2] == results[3]
    assert results[0] != results[2]


def test_gr14_a_stale_handle_is_an_error_in_all_processes_when_strict(run):
    for refused, unchanged in run("strict", 3):
        assert "handles are stale, over all processes" in refused
        assert unchanged


def test_gr14_batch_sizes_must_agree(run):
    for refused in run("batch_sizes", 3):
        assert len(refused) == 2
        assert all("the same batch_size; they ask for 3, 4, 5" in message for message in refused)


def test_gr14_a_dead_peer_is_reported_with_the_step(tmp_path):
    found, codes, _ = launch(["peer_dies"], 2, tmp_path)
    assert codes == [0, 7]
    [message] = found["peer_dies"]
    assert "sharded table, select: process 0 of 2 got no answer from a peer" in message


def test_gr14_schemas_must_agree_and_empty_shards_are_named(run):
    for message in run("schema", 2):
        assert "rank 0 and rank 1 disagree on big, returns_to_go" in message
    assert all("table is empty" in message for message in run("empty", 2))


def test_gr14_one_process_needs_no_process_group():
    table = TrajectoryTable(TableSpec((ColumnSpec("x"),), 100, 10))
    sharded = ShardedTable(table)
    for n in (3, 5):
        sharded.write({"x": torch.arange(float(n))})
    selection = sharded.select(Prioritized(), 6)
    batch = sharded.collect(selection, Window(2))
    assert batch["x"].shape == (6, 2)
    assert sharded.update_priorities(selection.handles, torch.ones(6)) == 0
    with pytest.raises(ValueError, match="no order over shards"):
        sharded.select(Fifo(), 2)
    assert ShardedTable(table, scope="local").select(Fifo(), 2).handles.tolist() == table.handles().tolist()
    with pytest.raises(ValueError, match="shared=True"):
        ShardedTable(table, exchange="mapped")


def test_gr19_layout_from_a_device_mesh_needs_dp():
    class Mesh:
        mesh_dim_names = ("pp", "dp")

        def get_local_rank(self, name):
            return {"pp": 1, "dp": 3}[name]

        def size(self, dim):
            return (2, 4)[dim]

    layout = ParallelLayout.from_mesh(Mesh())
    assert (layout.dp_rank, layout.dp_size, layout.pp_stage, layout.pp_size) == (3, 4, 1, 2)
    Mesh.mesh_dim_names = ("tp",)
    with pytest.raises(ValueError, match="dimension named 'dp'"):
        ParallelLayout.from_mesh(Mesh())
    assert ParallelLayout.single() == ParallelLayout(0, 1)
    assert Uniform().over == "trajectories"
