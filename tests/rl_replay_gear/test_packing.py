"""Packing columns into rows: compiled and column by column, the same bytes; how few calls a write makes."""

from __future__ import annotations

import torch
from counted_ops import CountedOps
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_replay_gear import ColumnSpec, ReturnsToGo, TableSpec, TrajectoryTable
from rl_replay_gear.spec import DTYPES


def random_bytes(column: ColumnSpec, rows: int, generator: torch.Generator) -> torch.Tensor:
    high = 2 if column.dtype is torch.bool else 256
    raw = torch.randint(0, high, (rows * column.nbytes,), generator=generator, dtype=torch.uint8)
    return raw.view(column.dtype).view(rows, *column.shape)


columns_of_any_kind = st.lists(
    st.builds(
        lambda dtype, shape, final, group: (DTYPES[dtype], tuple(shape), final, group),
        st.sampled_from(sorted(DTYPES)),
        st.lists(st.integers(1, 7), max_size=2),
        st.booleans(),
        st.sampled_from([None, "a"]),
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=60, deadline=None)
@given(columns_of_any_kind, st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 2**31))
def test_compiled_packing_writes_the_bytes_that_column_copies_write(kinds, lengths, seed):
    columns = tuple(
        ColumnSpec(f"c{i}", shape, dtype, final=final, group=group)
        for i, (dtype, shape, final, group) in enumerate(kinds)
    )
    tables = [TrajectoryTable(TableSpec(columns, 60, 8), memory="host") for _ in range(2)]
    for packer in tables[1]._packers:
        packer._compiled = False
    for table in tables:
        for words in table.storage:
            words.zero_()
    generator = torch.Generator().manual_seed(seed)
    for length in lengths:
        trajectory = {c.name: random_bytes(c, c.rows(length), generator) for c in columns}
        for table in tables:
            table.write(trajectory)
    for one, other in zip(tables[0].storage, tables[1].storage, strict=True):
        assert torch.equal(one, other)


def test_strided_columns_and_columns_that_need_gradients_are_stored_as_they_read():
    table = TrajectoryTable(TableSpec((ColumnSpec("x", (3,)), ColumnSpec("y")), 100, 10))
    x = torch.randn(3, 8).T
    y = torch.randn(16)[::2].requires_grad_()
    handle = table.write({"x": x, "y": y})
    found = table.read(handle)
    assert torch.equal(found["x"], x)
    assert torch.equal(found["y"], y)
    assert not found["y"].requires_grad
    assert not any(words.requires_grad for words in table.storage)


def test_a_write_costs_no_torch_call_a_column():
    columns = tuple(ColumnSpec(f"c{i}", (i + 1,)) for i in range(12))
    table = TrajectoryTable(TableSpec(columns, 100, 10), memory="host")
    trajectory = {c.name: torch.zeros(5, *c.shape) for c in columns}
    table.write(trajectory)
    with CountedOps() as counted:
        for _ in range(20):  # the last ones evict
            table.write(trajectory)
    assert counted.names == []


def test_relabelling_recomputes_derived_columns_and_leaves_neighbours_alone():
    spec = TableSpec((ColumnSpec("rewards"), ColumnSpec("x", (5,))), 30, 3, derived=(ReturnsToGo(),))
    table = TrajectoryTable(spec)
    trajectories = [{"rewards": torch.ones(4) * i, "x": torch.randn(4, 5)} for i in range(3)]
    handles = [table.write(t) for t in trajectories]
    table.relabel(handles[1], {"rewards": torch.tensor([0.0, 0.0, 0.0, 2.0])})
    for i, (handle, trajectory) in enumerate(zip(handles, trajectories, strict=True)):
        found = table.read(handle)
        assert torch.equal(found["x"], trajectory["x"])
        expected = [2.0] * 4 if i == 1 else [4.0 * i, 3.0 * i, 2.0 * i, 1.0 * i]
        assert found["returns_to_go"].tolist() == expected
