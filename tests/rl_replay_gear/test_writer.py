"""Writers: step by step, from other processes (GR-21), held back by a limiter (GR-20)."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time

import numpy as np
import pytest
import torch

from rl_replay_gear import (
    ColumnSpec,
    RateLimiter,
    SharedMemoryChannel,
    TableSpec,
    TrajectoryTable,
    TrajectoryWriter,
    Uniform,
)

SPEC = TableSpec(
    (
        ColumnSpec("obs", (2,), final=True),
        ColumnSpec("a", (), torch.int64),
        ColumnSpec("h", (), torch.bfloat16),
    ),
    5000,
    500,
)


def test_writer_commits_whole_trajectories_only():
    table = TrajectoryTable(SPEC)
    writer = TrajectoryWriter(table, environments=2)
    for step in range(150):
        for env in range(2):
            writer.append(env, obs=np.full(2, step, np.float32), a=10 * env + step, h=0.5)
    assert len(table) == 0
    assert writer.pending(1) == 150
    handle = writer.commit(1, obs=[9.0, 9.0], priority=3.0)
    found = table.read(handle)
    assert found["a"].tolist() == list(range(10, 160))
    assert found["obs"][-1].tolist() == [9, 9]
    assert found["h"].dtype == torch.bfloat16
    assert table.priorities().tolist() == [3.0]
    writer.abort(0)
    assert writer.commit(0, obs=[0.0, 0.0]) is None
    assert len(table) == 1


def test_writer_refuses_bad_steps_and_keeps_the_good_ones():
    table = TrajectoryTable(SPEC)
    writer = TrajectoryWriter(table)
    writer.append(obs=torch.zeros(2), a=1, h=0.0)
    for step, error, text in [
        ({"obs": torch.zeros(3), "a": 1, "h": 0.0}, ValueError, r"'obs': expected one step float32 \[2\]"),
        ({"obs": torch.zeros(2), "a": 1.5, "h": 0.0}, ValueError, "'a'"),
        ({"obs": torch.zeros(2), "a": 1}, KeyError, "missing columns: h"),
        ({"obs": torch.zeros(2), "a": 1, "h": 0.0, "act": 1}, KeyError, "unknown column 'act'"),
    ]:
        with pytest.raises(error, match=text):
            writer.append(**step)
    with pytest.raises(KeyError, match="missing final values: obs"):
        writer.commit()
    assert table.read(writer.commit(obs=torch.ones(2)))["a"].tolist() == [1]
    short = TrajectoryWriter(TrajectoryTable(TableSpec((ColumnSpec("a"),), 2, 2)))
    for _ in range(2):
        short.append(a=0.0)
    with pytest.raises(ValueError, match="trajectory of 3 steps is longer than max_steps=2"):
        short.append(a=0.0)


def test_writer_keeps_the_precision_and_refuses_values_that_would_wrap_round():
    spec = TableSpec((ColumnSpec("d", (), torch.float64), ColumnSpec("u", (), torch.uint8)), 100, 10)
    table = TrajectoryTable(spec)
    writer = TrajectoryWriter(table)
    writer.append(d=0.1, u=255)
    writer.append(d=np.float64(0.1), u=np.uint8(7))
    writer.append(d=torch.tensor(0.1, dtype=torch.float64), u=np.int64(3))
    with pytest.raises(IndexError, match=r"env must be in 0..0 \(environments\), got 1"):
        writer.append(1, d=0.0, u=1)
    with pytest.raises(ValueError, match="column 'd': str cannot be read as a tensor"):
        writer.append(d="half", u=1)
    for bad in (256, -1, np.int64(300), torch.tensor(1000)):
        with pytest.raises(ValueError, match=f"column 'u': {int(bad)} does not fit into uint8"):
            writer.append(d=5.0, u=bad)
    found = table.read(writer.commit())
    assert found["d"].tolist() == [0.1] * 3
    assert found["u"].tolist() == [255, 7, 3]


def test_a_writer_that_dies_in_mid_trajectory_leaves_no_half_trajectory():
    table = TrajectoryTable(SPEC)

    def actor():
        writer = TrajectoryWriter(table)
        with contextlib.suppress(ZeroDivisionError):
            writer.append(obs=torch.zeros(2), a=1, h=0.0)
            writer.append(obs=torch.zeros(2), a=1 // 0, h=0.0)

    thread = threading.Thread(target=actor)
    thread.start()
    thread.join()
    assert len(table) == 0
    assert table.num_steps == 0


def act(sink, actor, count, ready):
    """Writes trajectories whose every value tells actor and number."""
    for number in range(count):
        n = 1 + (number * 7 + actor) % 40
        sink.write(
            {
                "obs": torch.full((n + 1, 2), actor * 1000.0 + number),
                "a": torch.full((n,), number),
                "h": torch.full((n,), float(actor), dtype=torch.bfloat16),
            },
            priority=None if number % 2 else float(number),
        )
        if number == 5:
            ready.set()
    sink.close()


def whole(table):
    """Check that every trajectory is of one piece; returns (actor, number) pairs."""
    found = []
    for handle in table.handles().tolist():
        columns = table.read(handle)
        actor, number = int(columns["h"][0]), int(columns["a"][0])
        n = 1 + (number * 7 + actor) % 40
        assert len(columns["a"]) == n
        assert torch.equal(columns["obs"], torch.full((n + 1, 2), actor * 1000.0 + number))
        assert bool((columns["a"] == number).all())
        found.append((actor, number))
    return found


def test_gr21_four_actor_processes_deliver_every_trajectory_in_order():
    context = multiprocessing.get_context("fork")
    table = TrajectoryTable(SPEC)
    with SharedMemoryChannel(SPEC, 4096, actors=4) as channel:
        processes = [
            context.Process(target=act, args=(channel.sink(i), i, 30, context.Event())) for i in range(4)
        ]
        for process in processes:
            process.start()
        total, deadline = 0, time.monotonic() + 60
        while total < 120 and time.monotonic() < deadline:
            total += channel.drain(table)
        for process in processes:
            process.join()
            assert process.exitcode == 0
    found = whole(table)
    for actor in range(4):
        assert [number for a, number in found if a == actor] == list(range(30))


def test_gr21_an_actor_killed_while_writing_tears_nothing():
    context = multiprocessing.get_context("fork")
    table = TrajectoryTable(SPEC)
    with SharedMemoryChannel(SPEC, 4096, actors=2) as channel:
        events = [context.Event(), context.Event()]
        processes = [
            context.Process(target=act, args=(channel.sink(i), i, 10**6 if i == 0 else 40, events[i]))
            for i in range(2)
        ]
        for process in processes:
            process.start()
        drained = 0
        deadline = time.monotonic() + 60
        while not events[0].is_set() and time.monotonic() < deadline:
            drained += channel.drain(table)
        os.kill(processes[0].pid, signal.SIGKILL)
        processes[0].join()
        while processes[1].is_alive() and time.monotonic() < deadline:
            drained += channel.drain(table)
        processes[1].join()
        drained += channel.drain(table)
        assert channel.drain(table) == 0
    found = whole(table)
    assert [number for a, number in found if a == 1] == list(range(40))
    killed = [number for a, number in found if a == 0]
    assert killed == list(range(killed[0], killed[0] + len(killed)))


def test_gr21_a_torn_record_is_never_published():
    """The bytes of a record are there but its head is not: what a death between the two leaves."""
    table = TrajectoryTable(SPEC)
    with SharedMemoryChannel(SPEC, 4096) as channel:
        sink = channel.sink(0)
        act(sink, 0, 1, threading.Event())
        ring = channel._rings[0]
        head = ring.head
        ring.data[head : head + 64] = 255
        assert channel.drain(table) == 1
        assert channel.drain(table) == 0
        with pytest.raises(ValueError, match="does not fit a ring of 4096 bytes"):
            sink.write({"obs": torch.zeros(401, 2), "a": torch.zeros(400, dtype=torch.int64),
                        "h": torch.zeros(400, dtype=torch.bfloat16)})  # fmt: skip
        block = {
            "obs": torch.zeros(41, 2),
            "a": torch.zeros(40, dtype=torch.int64),
            "h": torch.zeros(40, dtype=torch.bfloat16),
        }
        for bad in (float("nan"), -1.0):
            with pytest.raises(ValueError, match="priorities must be finite and >= 0"):
                sink.write(block, priority=bad)
        assert channel.drain(table) == 0
        for _ in range(5):
            sink.write(block)
        with pytest.raises(TimeoutError, match="made no room"):
            sink.write(block, timeout=0.05)
        sink.close()


def test_gr20_the_rule_holds_at_every_step_of_a_replay():
    limiter = RateLimiter(samples_per_insert=4.0, min_size=5, error_buffer=10.0)
    random = np.random.default_rng(0)
    inserts = samples = 0
    blocked = {"insert": 0, "sample": 0}
    for _ in range(5000):
        n = int(random.integers(1, 4))
        if random.random() < 0.5:
            allowed = inserts + n <= 5 or (inserts + n) * 4 - samples <= 4 * 5 + 10
            assert limiter.can_insert(n) == allowed
            if allowed:
                limiter.inserted(n)
                inserts += n
            blocked["insert"] += not allowed
        else:
            n = int(random.integers(1, 16))
            allowed = inserts >= 5 and inserts * 4 - samples - n >= 4 * 5 - 10
            assert limiter.can_sample(n) == allowed
            if allowed:
                limiter.sampled(n)
                samples += n
            blocked["sample"] += not allowed
    assert min(blocked.values()) > 100


def test_gr20_a_table_waits_for_the_other_side_and_says_who_starves():
    spec = TableSpec((ColumnSpec("x"),), 1000, 100)
    table = TrajectoryTable(spec, limiter=RateLimiter(1.0, 2, 2.0, timeout=0.1))
    with pytest.raises(TimeoutError, match=r"the learner starves: no insert in 0.1 s \(0 inserts"):
        table.select(Uniform(), 1)
    for _ in range(4):
        table.write({"x": torch.zeros(2)})
    with pytest.raises(TimeoutError, match=r"writers starve: no sample in 0.1 s \(4 inserts, 0 samples"):
        table.write({"x": torch.zeros(2)})
    assert len(table) == 4
    patient = TrajectoryTable(spec, limiter=RateLimiter(1.0, 1, 1.0, timeout=20))
    reader = threading.Thread(target=lambda: patient.select(Uniform(), 1))
    reader.start()
    patient.write({"x": torch.zeros(2)})
    reader.join(10)
    assert not reader.is_alive()
    with pytest.raises(ValueError, match="blocks for ever"):
        RateLimiter(4.0, 1, 1.0)
