"""What each process of the sharding tests does: ``python sharded_cases.py CASE,CASE RANK WORLD STORE``."""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from rl_replay_gear import (
    ColumnSpec,
    ParallelLayout,
    Prioritized,
    ReturnsToGo,
    ShardedTable,
    TableSpec,
    TopK,
    TrajectoryLoader,
    TrajectoryTable,
    Uniform,
    Window,
)
from rl_replay_gear.randomness import CounterGenerator

COLUMNS = (ColumnSpec("x", (3,), fill=-1.0), ColumnSpec("who", (), torch.int64), ColumnSpec("big", (80,)))
SPEC = TableSpec(COLUMNS, 500, 50)
SIZES = (4, 0, 7, 2)  # trajectories a shard; the second is empty
WINDOW = Window(4, -2, "around")


def trajectories(rank):
    random = np.random.default_rng(rank)
    for number in range(SIZES[rank]):
        n = int(random.integers(1, 9))
        columns = {
            "x": torch.from_numpy(random.normal(size=(n, 3)).astype(np.float32)),
            "who": torch.full((n,), 100 * rank + number),
            "big": torch.full((n, 80), float(number)),
        }
        yield columns, float(random.integers(0, 5))


def shard(rank, **options):
    table = TrajectoryTable(SPEC, **options)
    for columns, priority in trajectories(rank):
        table.write(columns, priority=priority)
    return table


def whole(world):
    """One table that holds the shards in rank order."""
    table = TrajectoryTable(SPEC)
    for rank in range(world):
        for columns, priority in trajectories(rank):
            table.write(columns, priority=priority)
    return table


def picked(batch):
    return torch.where(batch.mask["who"], batch["who"], 0).amax(1).tolist()


def same_as_one_table(rank, world, exchange):
    table = ShardedTable(shard(rank, shared=exchange == "mapped"), exchange=exchange)
    assert table.exchange == exchange
    single = whole(world)
    for number, make in enumerate(
        (Uniform, lambda: Uniform(over="steps"), lambda: Prioritized(0.7, 0.5),
         lambda: Prioritized(1.0, over="steps", normalize=None), lambda: Prioritized(stratified=True))
    ):  # fmt: skip
        ours, theirs = make(), make()
        for turn in range(5):
            selection = table.select(ours, 16, generator=CounterGenerator(number, turn))
            expected = single.select(theirs, 16 * world, generator=CounterGenerator(number, turn))
            part = slice(16 * rank, 16 * (rank + 1))
            batch, reference = table.collect(selection, WINDOW), single.collect(expected, WINDOW)
            for name in batch:
                assert torch.equal(batch[name], reference[name][part]), (exchange, number, name)
                assert torch.equal(batch.mask[name], reference.mask[name][part])
                assert torch.equal(batch.timesteps[name], reference.timesteps[name][part])
            assert torch.allclose(batch.probability, reference.probability[part], rtol=1e-12)
            assert torch.allclose(batch.weight, reference.weight[part], rtol=1e-5)
    return "same"


def case_all_to_all(rank, world):
    return same_as_one_table(rank, world, "all_to_all")


def case_mapped(rank, world):
    return same_as_one_table(rank, world, "mapped")


def far_shard(rank, **options):
    """Rows past 2^31 bytes, in memory of which only the pages written to exist."""
    table = TrajectoryTable(
        TableSpec((ColumnSpec("v", (128,), torch.int64, fill=-7),), 2_200_000, 9), **options
    )
    table.allocator.allocate(2_100_000)
    for number in range(3):
        steps = torch.arange(5 + number)[:, None] + 100 * number + 1000 * rank
        table.write({"v": steps.expand(-1, 128).contiguous()})
    assert int(table.index.start[0]) * table.storage[0].shape[1] * 8 > 2**31
    return table


def mapped_far_rows(rank, world, backend, **options):
    """Rows of all shards, read in place, are what their owners wrote."""
    table = ShardedTable(far_shard(rank, shared=True, **options), exchange="mapped")
    seen = set()
    for turn in range(3):
        selection = table.select(Uniform(), 8, generator=CounterGenerator(5, turn))
        batch = table.collect(selection, Window(6, -2, "around"), backend=backend)
        plain = table.collect(selection, Window(6, -2, "around"), device="cpu", backend="torch")
        assert torch.equal(batch["v"].cpu(), plain["v"])
        for i, handle in enumerate(selection.handles.tolist()):
            owner, slot = handle >> 51, handle & (2**31 - 1)
            seen.add((owner, slot))
            steps = torch.arange(6) + int(selection.anchors[i]) - 2
            inside = (steps >= 0) & (steps < 5 + slot)
            expected = torch.where(inside, steps + 100 * slot + 1000 * owner, -7)
            assert torch.equal(batch["v"][i].cpu(), expected[:, None].expand(-1, 128)), (turn, i)
    return len({owner for owner, _ in seen})


def case_mapped_kernel(rank, world):
    return mapped_far_rows(rank, world, "triton", memory="host")


def case_mapped_device(rank, world):
    """On GPUs: each process its own, or all the same one."""
    torch.cuda.set_device(rank % torch.cuda.device_count())
    return mapped_far_rows(rank, world, "auto", memory="device")


def case_law(rank, world):
    table = ShardedTable(shard(rank), exchange="all_to_all")
    selector = Prioritized(1.0)
    counts = {}
    for turn in range(40):
        batch = table.collect(
            table.select(selector, 500, anchor="start", generator=CounterGenerator(turn)), {"who": Window(1)}
        )
        for who in batch["who"][:, 0].tolist():
            counts[who] = counts.get(who, 0) + 1
    return counts


def case_ranked(rank, world):
    table = ShardedTable(shard(rank), exchange="all_to_all")
    top = picked(table.collect(table.select(TopK(), 3, anchor="start"), Window(1)))
    selector = Uniform(replacement=False)
    selection = table.select(selector, 3, anchor="start", generator=CounterGenerator(1))
    everyone = picked(table.collect(selection, Window(1)))
    try:
        table.select(selector, 50, generator=CounterGenerator(1))
    except ValueError as error:
        refused = str(error)
    return [top, everyone, refused]


def case_priorities(rank, world):
    table = ShardedTable(shard(rank), exchange="all_to_all")
    selector = Prioritized(1.0)
    selection = table.select(Uniform(), 8, generator=CounterGenerator(2))
    if rank == 0:
        table.table.remove(int(table.table.handles()[0]))
    dropped = table.update_priorities(selection.handles, torch.full((8,), 10.0 + rank))
    after = table.table.priorities().tolist()
    bad = torch.full((8,), float("nan") if rank == world - 1 else 1.0)
    try:
        table.update_priorities(selection.handles, bad)
        refused = ""
    except ValueError as error:
        refused = str(error)
    table.attach(selector)
    unchanged = table.table.priorities().tolist() == after
    return [dropped, sorted(set(after)), refused, unchanged, table.count_stale(selection.handles)]


def case_stages(rank, world):
    """Two pipeline stages of two tensor-parallel... here: 2 data-parallel ranks x 2 stages."""
    layout = ParallelLayout(
        rank // 2, 2, pp_stage=rank % 2, pp_size=2, columns_by_stage={0: ["x"], 1: ["who", "big"]}
    )
    table = ShardedTable(shard(rank), layout, exchange="all_to_all")
    loader = TrajectoryLoader(table, Uniform(), WINDOW, 6, seed=5, prefetch=1)
    batches = [next(loader) for _ in range(3)]
    return [[list(b.columns), b.handles.tolist(), b.anchors.tolist()] for b in batches]


def case_tensor_peers(rank, world):
    """2 data-parallel ranks of 2 tensor-parallel processes each."""
    layout = ParallelLayout(rank // 2, 2, tp_rank=rank % 2, tp_size=2)
    table = ShardedTable(shard(rank), layout, exchange="all_to_all")
    loader = TrajectoryLoader(table, Prioritized(), WINDOW, 6, seed=6)
    batch = next(loader)
    return [batch.handles.tolist(), batch.anchors.tolist(), batch["x"].flatten().tolist()]


def case_batch_sizes(rank, world):
    table = ShardedTable(shard(rank))
    refused = []
    for selector in (Uniform(), TopK()):
        try:
            table.select(selector, 3 + rank, generator=CounterGenerator(0))
        except ValueError as error:
            refused.append(str(error))
    return refused


def case_strict(rank, world):
    """A stale handle of one shard is an error in all processes, and nothing changes in any."""
    table = ShardedTable(shard(rank), exchange="all_to_all")
    selection = table.select(Uniform(replacement=False), 3, generator=CounterGenerator(3))
    if rank == 0:
        table.table.clear()
    before = table.table.priorities().tolist()
    try:
        table.update_priorities(selection.handles, torch.full((3,), 9.0), strict=True)
        refused = ""
    except RuntimeError as error:
        refused = str(error)
    return [refused, table.table.priorities().tolist() == before]


def case_peer_dies(rank, world):
    table = ShardedTable(shard(rank))
    if rank == world - 1:
        os._exit(7)
    try:
        table.select(Uniform(), 3, generator=CounterGenerator(0))
    except RuntimeError as error:
        print("RESULT peer_dies", json.dumps(str(error)), flush=True)
    os._exit(0)


def case_schema(rank, world):
    spec = SPEC if rank == 0 else TableSpec(COLUMNS[:2], 500, 50, (ReturnsToGo(reward="who"),))
    try:
        ShardedTable(TrajectoryTable(spec))
    except ValueError as error:
        return str(error)
    return ""


def case_empty(rank, world):
    try:
        ShardedTable(TrajectoryTable(SPEC)).select(Uniform(), 3, generator=CounterGenerator(0))
    except RuntimeError as error:
        return str(error)
    return ""


def main():
    cases, rank, world, store = sys.argv[1].split(","), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    for case in cases:
        result = globals()[f"case_{case}"](rank, world)
        print(f"RESULT {case}", json.dumps(result), flush=True)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
