"""Collection (GR-08, GR-09): backends give the same bits, unread columns are not read, buffers are reused."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from counted_ops import CountedOps

from rl_replay_gear import ColumnSpec, GraphedCollect, TableSpec, TrajectoryTable, Uniform, Window
from rl_replay_gear.randomness import CounterGenerator
from rl_replay_gear.spec import DTYPES, row_groups


def mixed_table():
    columns = tuple(
        ColumnSpec(f"{name}_{i}", shape, dtype, fill=1.0)
        for name, dtype in DTYPES.items()
        for i, shape in enumerate([(), (3,), (5, 7)])
    )
    table = TrajectoryTable(TableSpec(columns, 200, 20))
    generator = torch.Generator().manual_seed(0)
    for length in (1, 4, 9, 30):
        table.write(
            {
                c.name: torch.randint(0, 2, (length, *c.shape), generator=generator).to(c.dtype)
                for c in columns
            }
        )
    return table


INTERPRETED = """
import sys
sys.path.insert(0, {here!r})
import torch
from test_collect import mixed_table
from rl_replay_gear import Uniform, Window
from rl_replay_gear.collect import fill_plan, gather_on_gpu
from rl_replay_gear.randomness import CounterGenerator
table = mixed_table()
selection = table.select(Uniform(), 6, generator=CounterGenerator(3))
slots, _ = table.index.locate(selection.handles.numpy())
for window in (Window(5, -2, "head"), Window(3, 0, "tail")):
    plain = table.collect(selection, window, backend="torch")
    kernel = table.collect(selection, window, backend="triton")
    plan = table.plan(window)
    bounds = torch.empty((len(plan.segments), 4, 6), dtype=torch.int64)
    fill_plan(plan, table.index, slots, selection.anchors.numpy(), bounds)
    for read, a, b in zip(plan.reads, plain.buffers, kernel.buffers, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, gather_on_gpu(read, [read.source], bounds[read.segment], backend="auto"))
print("equal")
"""


def test_gr08_the_interpreted_kernel_gives_the_same_bits():
    pytest.importorskip("triton")
    here = os.path.dirname(__file__)
    result = subprocess.run(
        [sys.executable, "-c", INTERPRETED.format(here=here)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "equal"


def test_gr08_every_dtype_reads_back_through_windows():
    table = mixed_table()
    selection = table.select(Uniform(), 32, generator=CounterGenerator(1))
    batch = table.collect(selection, Window(6, -1, "around"))
    for i, handle in enumerate(selection.handles.tolist()):
        rows, anchor = table.read(handle), int(selection.anchors[i])
        for name in batch:
            found = batch[name][i]
            assert found.dtype == rows[name].dtype
            for j in range(6):
                step = anchor - 1 + j
                expected = rows[name][step] if 0 <= step < len(rows[name]) else torch.ones_like(rows[name][0])
                assert torch.equal(found[j], expected), (name, j)


def test_a_batch_costs_as_many_torch_calls_for_twelve_columns_as_for_one():
    counts = []
    for number in (1, 12):
        columns = tuple(ColumnSpec(f"c{i}", (i + 1,)) for i in range(number))
        table = TrajectoryTable(TableSpec(columns, 100, 10), memory="host")
        table.write({c.name: torch.zeros(50, *c.shape) for c in columns})
        selector, window = Uniform(), Window(20, 0, "head")
        table.collect(table.select(selector, 8), window)
        with CountedOps() as counted:
            table.collect(table.select(selector, 8, generator=CounterGenerator(1)), window)
        counts.append(len(counted.names))
    assert counts[0] == counts[1] <= 9


def test_gr09_small_columns_share_rows_and_large_ones_lie_alone():
    columns = (
        ColumnSpec("done", (), torch.bool),
        ColumnSpec("reward"),
        ColumnSpec("frame", (4, 16, 16), torch.uint8),
        ColumnSpec("next", (3,), final=True),
        ColumnSpec("x", (2,), torch.float64),
        ColumnSpec("mine", (2,), group="own"),
    )
    names = [{field.column.name for field in group.fields} for group in row_groups(columns)]
    assert names == [{"done", "reward", "x"}, {"frame"}, {"next"}, {"mine"}]
    for group in row_groups(columns):
        assert group.row_bytes % 16 == 0
        assert all(field.offset % field.column.dtype.itemsize == 0 for field in group.fields)


def test_gr09_columns_not_asked_for_are_not_read():
    columns = (ColumnSpec("reward"), ColumnSpec("frame", (1000,), torch.uint8), ColumnSpec("obs", (60,)))
    table = TrajectoryTable(TableSpec(columns, 100, 10))
    table.write(
        {
            "reward": torch.ones(10),
            "frame": torch.ones(10, 1000, dtype=torch.uint8),
            "obs": torch.ones(10, 60),
        }
    )
    selection = table.select(Uniform(), 4, anchor="start")
    window = Window(10)
    assert table.collect(selection, window).bytes_read == 4 * 10 * (256 + 1008)
    assert table.collect(selection, window, columns=["frame"]).bytes_read == 4 * 10 * 1008
    assert table.collect(selection, {"reward": window}).bytes_read == 4 * 10 * 16
    with pytest.raises(KeyError, match="did you mean 'reward'"):
        table.collect(selection, window, columns=["rewards"])


def test_reused_buffers_are_filled_again(filled):
    first = filled.select(Uniform(), 8, generator=CounterGenerator(0))
    second = filled.select(Uniform(), 8, generator=CounterGenerator(1))
    batch = filled.collect(first, Window(4, -2, "head"))
    expected = filled.collect(second, Window(4, -2, "head"))
    again = filled.collect(second, Window(4, -2, "head"), out=batch.buffers)
    assert again.buffers[0].data_ptr() == batch.buffers[0].data_ptr()
    assert all(torch.equal(again[name], expected[name]) for name in expected)


def test_batches_move_and_become_tensordicts(filled):
    pytest.importorskip("tensordict")
    selection = filled.select(Uniform(), 8)
    batch = filled.collect(selection, Window(4))
    moved = batch.to("cpu")
    assert all(torch.equal(moved[name], batch[name]) for name in batch)
    found = batch.to_tensordict()
    assert found.batch_size == (8,)
    assert torch.equal(found["mask"], batch.mask["obs"])
    assert torch.equal(found["handle"], selection.handles)
    assert found["weight"].tolist() == [1.0] * 8


def test_memory_that_does_not_exist_is_refused(spec):
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    for memory in ("pinned", "device"):
        with pytest.raises(RuntimeError, match="needs a CUDA device"):
            TrajectoryTable(spec, memory=memory)
    with pytest.raises(ValueError, match="'auto', 'host', 'pinned' or 'device'"):
        TrajectoryTable(spec, memory="gpu")


def test_gr29_a_graph_needs_rows_that_kernels_can_read(filled):
    with pytest.raises(ValueError, match="rows in pinned or device memory"):
        GraphedCollect(filled, Window(3), 4)
    with pytest.raises(ValueError, match="buffers=0"):
        GraphedCollect(filled, Window(3), 4, buffers=0)


def test_batch_memory_is_used_again_only_when_no_tensor_lies_in_it():
    table = TrajectoryTable(TableSpec((ColumnSpec("x", (64,)),), 1000, 10))
    for n in range(10):
        table.write({"x": torch.full((100, 64), float(n))})

    def batch(seed):
        return table.collect(table.select(Uniform(), 32, generator=CounterGenerator(seed)), Window(20))

    kept = batch(0)["x"][3:5]  # a view outlives its batch
    values, address = kept.clone(), kept.untyped_storage().data_ptr()
    others = [batch(seed) for seed in range(1, 4)]
    assert address not in {other["x"].untyped_storage().data_ptr() for other in others}
    assert torch.equal(kept, values)
    array = kept.numpy()
    del kept
    assert batch(5)["x"].untyped_storage().data_ptr() != address
    del array
    assert address in {b["x"].untyped_storage().data_ptr() for b in [batch(seed) for seed in range(6, 12)]}
