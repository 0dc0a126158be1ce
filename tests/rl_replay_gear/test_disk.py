"""The disk tier (GR-31): the bits of the table in memory, through direct I/O."""

from __future__ import annotations

import pytest
import torch

from rl_replay_gear import (
    ColdTable,
    ColumnSpec,
    Prioritized,
    ReturnsToGo,
    TableSpec,
    TrajectoryLoader,
    TrajectoryTable,
    Uniform,
    Window,
    save_table,
)
from rl_replay_gear.randomness import CounterGenerator
from rl_replay_gear.storage_format import row_files

SPEC = TableSpec(
    (
        ColumnSpec("observations", (5,), final=True),
        ColumnSpec("actions", (), torch.int64, fill=-10),
        ColumnSpec("rewards"),
        ColumnSpec("pixels", (3, 40), torch.uint8, fill=7),
    ),
    2000,
    40,
    (ReturnsToGo(),),
)


@pytest.fixture
def saved(tmp_path):
    table = TrajectoryTable(SPEC)
    generator = torch.Generator().manual_seed(0)
    for number in range(30):
        n = 1 + (number * 37) % 90
        table.write(
            {
                "observations": torch.randn(n + 1, 5, generator=generator),
                "actions": torch.randint(0, 9, (n,), generator=generator),
                "rewards": torch.randn(n, generator=generator),
                "pixels": torch.randint(0, 255, (n, 3, 40), generator=generator).byte(),
            },
            priority=float(number % 4),
        )
    for handle in table.handles()[::5].tolist():
        table.remove(handle)
    save_table(table, tmp_path / "cold")
    return table, tmp_path / "cold"


@pytest.mark.parametrize("cached", [False, True])
def test_gr31_windows_from_disk_have_the_bits_of_the_table_in_memory(saved, cached):
    table, folder = saved
    with ColdTable(folder, cached=cached, threads=3) as cold:
        assert torch.equal(cold.handles(), table.handles())
        for number, (window, columns) in enumerate([
            (Window(20, -19, "head"), None),
            (Window(90), ["pixels", "rewards"]),
            (Window(7, -3, "around"), ["actions"]),
            ({"observations": Window(2), "pixels": Window(4, -4, "head")}, None),
        ]):  # fmt: skip
            a = table.select(Prioritized(), 33, generator=CounterGenerator(number))
            b = cold.select(Prioritized(), 33, generator=CounterGenerator(number))
            assert torch.equal(a.handles, b.handles)
            there = cold.collect(b, window, columns=columns)
            expected = table.collect(a, window, columns=columns)
            assert there.columns == expected.columns
            for name in expected:
                assert torch.equal(there[name], expected[name])
                assert torch.equal(there.mask[name], expected.mask[name])
                assert torch.equal(there.timesteps[name], expected.timesteps[name])
        assert cold.bytes_read > 0


def test_gr31_a_loader_reads_it_and_hot_trajectories_move_up(saved):
    table, folder = saved
    with ColdTable(folder) as cold:
        loaders = [TrajectoryLoader(t, Uniform(over="steps"), Window(9), 16, seed=4) for t in (table, cold)]
        for _ in range(3):
            here, there = (next(loader) for loader in loaders)
            assert torch.equal(here["observations"], there["observations"])
        hot = TrajectoryTable(SPEC)
        moved = cold.promote(cold.handles()[3:6], hot)
        for old, new in zip(cold.handles()[3:6].tolist(), moved.tolist(), strict=True):
            before, after = table.read(old), hot.read(new)
            assert all(torch.equal(before[name], after[name]) for name in before)


def test_gr31_faults_are_named(saved):
    table, folder = saved
    with pytest.raises(ValueError, match="threads must be at least 1"):
        ColdTable(folder, threads=0)
    with ColdTable(folder) as cold:
        chosen = cold.select(Uniform(), 4, generator=CounterGenerator(0))
        chosen.handles[0] += 1 << 31
        with pytest.raises(RuntimeError, match="1 of 4 handles are stale"):
            cold.collect(chosen, Window(2))
        given = table.read(int(table.handles()[0]))
        del given["returns_to_go"]
        with pytest.raises(RuntimeError, match="read-only"):
            cold.table.write(given)
    file = row_files(folder)[0]
    file.write_bytes(file.read_bytes()[:-16])
    with pytest.raises(ValueError, match=r"rows-0.*expected \d+ bytes, found \d+"):
        ColdTable(folder)
