"""Writing, reading, capacity and eviction (GR-01, GR-03, GR-04, GR-07, GR-23) and what is refused."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_replay_gear import ColumnSpec, Fifo, Lifo, Prioritized, TableSpec, TopK, TrajectoryTable, Uniform
from rl_replay_gear.allocator import ExtentAllocator
from rl_replay_gear.spec import DTYPES


def random_column(dtype, shape, generator):
    if dtype is torch.bool:
        return torch.rand(shape, generator=generator) < 0.5
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    info = torch.iinfo(dtype)
    return torch.randint(info.min, info.max, shape, generator=generator).to(dtype)


def test_gr01_read_returns_what_was_written_bit_for_bit():
    generator = torch.Generator().manual_seed(0)
    shapes = [(), (1,), (5,), (3, 2), (2, 3, 4), (65,)]
    columns = tuple(
        ColumnSpec(f"{name}{i}", shape, dtype, final=i % 3 == 2)
        for name, dtype in DTYPES.items()
        for i, shape in enumerate(shapes)
    )
    table = TrajectoryTable(TableSpec(columns, 100, 10))
    written = {}
    for length in (1, 2, 17, 5):
        columns_now = {c.name: random_column(c.dtype, (c.rows(length), *c.shape), generator) for c in columns}
        written[table.write(columns_now)] = columns_now
    for handle, expected in written.items():
        found = table.read(handle)
        for name, value in expected.items():
            assert found[name].dtype == value.dtype
            assert torch.equal(found[name].flatten().view(torch.uint8), value.flatten().view(torch.uint8)), (
                name
            )


def test_gr01_numpy_arrays_and_write_batch(spec, make_trajectory):
    table = TrajectoryTable(spec)
    lengths = [4, 1, 9]
    parts = [make_trajectory(n, n) for n in lengths]
    joined = {name: torch.cat([p[name] for p in parts]).numpy() for name in parts[0]}
    handles = table.write_batch(joined, torch.tensor(lengths), priorities=[3.0, 0.0, 2.0])
    assert table.lengths().tolist() == lengths
    assert table.priorities().tolist() == [3.0, 0.0, 2.0]
    for handle, part in zip(handles.tolist(), parts, strict=True):
        assert all(torch.equal(table.read(handle)[name], value) for name, value in part.items())


def test_gr01_write_batch_of_final_columns():
    table = TrajectoryTable(TableSpec((ColumnSpec("o", (), final=True), ColumnSpec("a")), 20, 5))
    obs = torch.arange(7.0)
    handles = table.write_batch({"o": obs, "a": torch.arange(5.0)}, torch.tensor([2, 3]))
    assert table.read(int(handles[0]))["o"].tolist() == [0, 1, 2]
    assert table.read(int(handles[1]))["o"].tolist() == [3, 4, 5, 6]
    assert table.read(int(handles[1]))["a"].tolist() == [2, 3, 4]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(0, 5)), min_size=1, max_size=200),
)
def test_gr03_extents_never_overlap_and_free_space_coalesces(operations):
    allocator = ExtentAllocator(100)
    live: list[tuple[int, int]] = []
    for rows, choice in operations:
        if choice == 0 and live:
            allocator.free(*live.pop(0))
        elif choice == 1 and live:
            allocator.free(*live.pop())
        start = allocator.allocate(rows)
        if start is None:
            taken = np.zeros(100, bool)
            for a, n in live:
                taken[a : a + n] = True
            gaps = "".join("x" if t else "." for t in taken).split("x")
            assert max(map(len, gaps)) < rows  # a refusal is only right when no gap is long enough
        else:
            assert 0 <= start <= 100 - rows
            assert all(start + rows <= a or a + n <= start for a, n in live)
            live.append((start, rows))
        assert allocator.free_rows == 100 - sum(n for _, n in live)


def test_gr03_ten_thousand_writes_keep_content_and_fill_the_capacity():
    table = TrajectoryTable(TableSpec((ColumnSpec("x", (), torch.int64),), 2000, 500))
    random = np.random.default_rng(0)
    longest, kept = 60, {}
    for number in range(10_000):
        length = int(random.integers(1, longest + 1))
        handle = table.write({"x": torch.full((length,), number)})
        kept[handle] = (number, length)
        assert table.num_steps <= 2000
        if number > 200:
            assert table.num_steps >= 2000 - 2 * longest  # the brief allows 4
    assert table.nbytes == 2000 * 16
    live = table.handles().tolist()
    assert len(live) == len(table) > 30
    for handle in live:
        number, length = kept[handle]
        assert table.read(handle)["x"].tolist() == [number] * length
    starts = sorted(zip(table.index.start[table.index.ordered()], table.lengths().tolist(), strict=True))
    assert all(a + n <= b for (a, n), (b, _) in itertools.pairwise(starts))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 30), st.integers(0, 9)), min_size=1, max_size=120))
def test_gr03_writes_of_any_length_always_find_room(operations):
    table = TrajectoryTable(TableSpec((ColumnSpec("x"),), 30, 4))
    for length, choice in operations:
        if choice < 3 and len(table):
            table.remove(int(table.handles()[choice % len(table)]))
        handle = table.write({"x": torch.full((length,), float(length))})
        assert table.handles()[-1] == handle
        for live in table.handles().tolist():
            values = table.read(live)["x"].tolist()
            assert values == [float(len(values))] * len(values)


@pytest.mark.parametrize(
    ("remover", "rule"),
    [
        (Fifo(), lambda live: live[0]),
        (Lifo(), lambda live: live[-1]),
        (TopK(largest=False), lambda live: min(live, key=lambda item: (item[1], item[2]))),
        (TopK(), lambda live: min(live, key=lambda item: (-item[1], item[2]))),
    ],
)
def test_gr04_removers_equal_an_exact_simulation(remover, rule):
    table = TrajectoryTable(TableSpec((ColumnSpec("x"),), 10_000, 8), remover=remover)
    random = np.random.default_rng(1)
    live: list[tuple[int, float, int]] = []
    for number in range(300):
        priority = float(random.integers(0, 5))
        if len(live) == 8:
            live.remove(rule(live))
        handle = table.write({"x": torch.zeros(int(random.integers(1, 9)))}, priority=priority)
        live.append((handle, priority, number))
        assert table.handles().tolist() == [item[0] for item in live]


def test_gr04_a_uniform_remover_evicts_every_trajectory_equally_often():
    table = TrajectoryTable(TableSpec((ColumnSpec("x"),), 10_000, 5), remover=Uniform())
    handles = [table.write({"x": torch.zeros(1)}) for _ in range(5)]
    places = np.zeros(5)
    for _ in range(3000):
        before = handles
        new = table.write({"x": torch.zeros(1)})
        gone = set(before) - set(table.handles().tolist())
        assert len(gone) == 1
        places[before.index(gone.pop())] += 1
        handles = table.handles().tolist()
        assert handles[-1] == new
    chi_square = ((places - 600) ** 2 / 600).sum()
    assert chi_square < 23.5  # 4 degrees of freedom, p = 1e-4


def test_gr07_duplicates_take_the_maximum_and_stale_handles_are_dropped(filled, make_trajectory):
    handles = filled.handles()
    filled.remove(int(handles[1]))
    replacement = filled.write(make_trajectory(4), priority=7.0)
    assert replacement not in handles.tolist()
    stale = filled.update_priorities(
        torch.stack([handles[0], handles[1], handles[0], handles[2]]), torch.tensor([2.0, 9.0, 5.0, 0.5])
    )
    assert stale == 1
    assert filled.stale_dropped == 1
    assert filled.priorities().tolist() == [5.0, 0.5, 1.0, 1.0, 7.0]
    with pytest.raises(RuntimeError, match="1 of 2 handles are stale"):
        filled.update_priorities(handles[:2], [1.0, 1.0], strict=True)
    assert filled.priorities().tolist() == [5.0, 0.5, 1.0, 1.0, 7.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_gr07_bad_priorities_are_refused_and_nothing_changes(filled, make_trajectory, bad):
    before = filled.priorities().clone()
    with pytest.raises(ValueError, match=r"priorities must be finite and >= 0; index 1 is"):
        filled.update_priorities(filled.handles()[:2], [4.0, bad])
    assert torch.equal(filled.priorities(), before)
    with pytest.raises(ValueError, match="finite"):
        filled.write(make_trajectory(3), priority=bad)
    assert len(filled) == 5


def test_gr07_default_priority_is_the_largest_live_one(spec, make_trajectory):
    table = TrajectoryTable(spec)
    table.write(make_trajectory(2))
    assert table.priorities().tolist() == [1.0]
    top = table.write(make_trajectory(2), priority=5.0)
    table.write(make_trajectory(2))
    table.remove(top)
    table.update_priorities(table.handles()[1:], [0.25])
    table.write(make_trajectory(2))
    assert table.priorities().tolist() == [1.0, 0.25, 1.0]


def test_a_refused_write_names_the_fault_and_evicts_nothing(spec, make_trajectory):
    table = TrajectoryTable(spec)
    for seed in range(50):
        table.write(make_trajectory(20, seed))
    before = table.handles().tolist()
    good = make_trajectory(40)
    cases = [
        ({**good, "obs": torch.zeros(40, 16, dtype=torch.float64)}, ValueError,
         r"column 'obs': expected float32 \[n, 3\], got float64 \[40, 16\]"),
        ({**good, "reward": torch.zeros(39)}, ValueError, r"column 'reward'"),
        ({**good, "reward": None}, ValueError, "column 'reward': NoneType cannot be read as a tensor"),
        ({k: v for k, v in good.items() if k != "obs"}, KeyError, "missing columns: obs"),
        ({**good, "rewards": good["reward"]}, KeyError, "did you mean 'reward'"),
        (make_trajectory(1001), ValueError, "trajectory of 1001 steps is longer than max_steps=1000"),
        (make_trajectory(0), ValueError, "trajectory of 0 steps"),
    ]  # fmt: skip
    for columns, error, text in cases:
        with pytest.raises(error, match=text):
            table.write(columns)
    assert table.handles().tolist() == before
    with pytest.raises(ValueError, match="1001 steps"):
        table.write_batch(make_trajectory(1002), torch.tensor([1, 1001]))
    assert table.handles().tolist() == before


def test_stale_handles_are_refused_by_read_remove_and_collect(filled):
    from rl_replay_gear import Window

    selection = filled.select(Uniform(), 64)
    gone = int(filled.handles()[0])
    filled.remove(gone)
    for call in (filled.read, filled.remove):
        with pytest.raises(KeyError, match="stale handle"):
            call(gone)
    with pytest.raises(RuntimeError, match=r"of 64 handles are stale"):
        filled.collect(selection, Window(3))
    assert filled.count_stale(selection.handles) == int((selection.handles == gone).sum())


def test_relabel_recomputes_derived_columns(make_trajectory):
    from rl_replay_gear import ReturnsToGo

    spec = TableSpec(
        (ColumnSpec("reward"), ColumnSpec("x")), 100, 10, derived=(ReturnsToGo(reward="reward"),)
    )
    table = TrajectoryTable(spec)
    handle = table.write({"reward": torch.ones(4), "x": torch.arange(4.0)})
    table.relabel(handle, {"reward": torch.tensor([0.0, 0.0, 0.0, 2.0])})
    found = table.read(handle)
    assert found["returns_to_go"].tolist() == [2, 2, 2, 2]
    assert found["x"].tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="column 'reward'"):
        table.relabel(handle, {"reward": torch.ones(5)})
    assert table.read(handle)["returns_to_go"].tolist() == [2, 2, 2, 2]


def test_gr23_final_columns_store_each_observation_once():
    spec = TableSpec((ColumnSpec("obs", (100,), final=True), ColumnSpec("reward")), 10_000, 100)
    table = TrajectoryTable(spec)
    assert table.nbytes <= 0.6 * 10_000 * (2 * 400 + 4)
    obs = torch.randn(8, 100)
    assert torch.equal(table.read(table.write({"obs": obs, "reward": torch.zeros(7)}))["obs"], obs)


def test_table_spec_round_trips_and_refuses_nonsense(spec):
    from rl_replay_gear import NStepReturn, ReturnsToGo

    rich = TableSpec(
        spec.columns, 10, 5, derived=(ReturnsToGo(reward="reward"), NStepReturn(reward="reward"))
    )
    assert TableSpec.from_json(rich.to_json()) == rich
    assert rich.fingerprint() != spec.fingerprint()
    assert TableSpec(spec.columns, 77, 3).fingerprint() == spec.fingerprint()
    assert len(rich.fingerprint()) == 16
    with pytest.raises(ValueError, match="repeat"):
        TableSpec((ColumnSpec("a"), ColumnSpec("a")), 10, 5)
    with pytest.raises(KeyError, match="needs the column 'rewards'"):
        _ = TableSpec(spec.columns, 10, 5, derived=(ReturnsToGo(),)).step_bytes
    with pytest.raises(ValueError, match="complex64"):
        ColumnSpec("a", (), torch.complex64)
    inferred = TableSpec.infer({"o": np.zeros((5, 2), np.float32), "a": torch.zeros(4)}, 10, 3)
    assert inferred.columns == (ColumnSpec("o", (2,), final=True), ColumnSpec("a"))
    selector = Prioritized()
    TrajectoryTable(spec).attach(selector)
    with pytest.raises(ValueError, match="another table"):
        TrajectoryTable(spec).attach(selector)


def test_a_table_larger_than_memory_is_refused_with_sizes():
    spec = TableSpec((ColumnSpec("x", (1024,)),), max_steps=10**11, max_trajectories=10)
    with pytest.raises(MemoryError, match=r"cannot map [\d.]+ GiB, free memory [\d.]+ GiB"):
        TrajectoryTable(spec, memory="host")
