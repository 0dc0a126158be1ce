from __future__ import annotations

import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tiered_memory import CopyEngine, SimulatedClock, SimulatedCopyEngine

SECONDS = st.floats(1e-3, 10)


def byte_pair(nbytes: int, value: int = 1):
    return torch.zeros(nbytes, dtype=torch.uint8), torch.full((nbytes,), value, dtype=torch.uint8)


def test_tm05_cpu_engine_copies_at_once_through_views():
    table = torch.zeros(4, 6)
    rows = torch.arange(6.0).flip(0)
    with CopyEngine("cpu") as engine:
        copy = engine.submit([(table[2], rows), (table[:, 5], torch.ones(4))])
    assert copy.done
    assert copy.synchronize() == 0.0
    assert copy.nbytes == 40
    assert torch.equal(table[2, :5], rows[:5])
    assert torch.equal(table[:, 5], torch.ones(4))


@pytest.mark.parametrize("other", [torch.zeros(5), torch.zeros(4, dtype=torch.float64), torch.zeros(2, 2)])
def test_tm05_unlike_pairs_are_refused_before_anything_is_copied(other):
    target = torch.zeros(3)
    with CopyEngine("cpu") as engine, pytest.raises(ValueError, match="pair 1 differs"):
        engine.submit([(target, torch.ones(3)), (torch.zeros(4), other)])
    assert not target.any()


def test_tm05_a_failed_copy_raises_where_it_is_waited_for():
    # Overlapping expanded memory cannot be written: torch refuses inside copy_.
    engine = CopyEngine("cpu")
    copy = engine.submit([(torch.zeros(1).expand(4), torch.ones(4))])
    for use in (copy.wait, copy.synchronize, lambda: copy.done):
        with pytest.raises(RuntimeError):
            use()


def test_tm05_closed_engine_refuses():
    engine = CopyEngine("cpu")
    engine.close()
    engine.close()
    with pytest.raises(RuntimeError, match="already closed"):
        engine.submit([byte_pair(1)])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 5000), min_size=1, max_size=20), st.floats(0, 0.1), st.floats(10, 1e6))
def test_tm06_makespan_of_one_link_is_the_sum(sizes, latency, bandwidth):
    clock = SimulatedClock()
    engine = SimulatedCopyEngine(clock, bytes_per_s=bandwidth, latency_s=latency)
    copies = [engine.submit([byte_pair(size)]) for size in sizes]
    seconds = [copy.synchronize() for copy in copies]
    expected = [latency + size / bandwidth for size in sizes]
    assert seconds == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert clock.now == pytest.approx(sum(expected), rel=1e-12, abs=1e-12)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 12), SECONDS, SECONDS)
def test_tm06_makespan_of_a_two_stage_pipeline(chunks, first, second):
    # n equal chunks through two links: the slower one is busy throughout, the other adds one chunk.
    clock = SimulatedClock()
    disk = SimulatedCopyEngine(clock, bytes_per_s=1 / first)
    link = SimulatedCopyEngine(clock, bytes_per_s=1 / second)
    staged, target = torch.zeros(chunks, dtype=torch.uint8), torch.zeros(chunks, dtype=torch.uint8)
    source = torch.arange(1, chunks + 1, dtype=torch.uint8)
    reads = [disk.submit([(staged[i], source[i])]) for i in range(chunks)]
    for i, read in enumerate(reads):
        read.wait()
        last = link.submit([(target[i], staged[i])])
    last.wait()
    assert clock.now == pytest.approx(first + second + (chunks - 1) * max(first, second), rel=1e-12)
    assert torch.equal(target, source)


def test_tm06_an_unwaited_read_sees_old_bytes():
    clock = SimulatedClock()
    engine = SimulatedCopyEngine(clock, bytes_per_s=100, latency_s=1)
    (old, new), (old2, new2) = byte_pair(100), byte_pair(50)
    copy, copy2 = engine.submit([(old, new)]), engine.submit([(old2, new2)])
    clock.advance(1.999)
    assert not copy.done
    assert not old.any()
    clock.advance(0.001)
    assert copy.done
    assert torch.equal(old, new)
    assert not copy2.done
    assert not old2.any()
    assert copy2.synchronize() == pytest.approx(1.5)
    assert clock.now == pytest.approx(3.5)
    clock.advance(5)
    assert engine.submit([byte_pair(100)]).synchronize() == pytest.approx(2)
    assert clock.now == pytest.approx(10.5)


def test_tm06_copies_of_two_links_finish_in_order_of_time():
    clock = SimulatedClock()
    slow, fast = SimulatedCopyEngine(clock, bytes_per_s=1), SimulatedCopyEngine(clock, bytes_per_s=10)
    target = torch.zeros(4, dtype=torch.uint8)
    slow.submit([(target, torch.full((4,), 9, dtype=torch.uint8))])
    fast.submit([(target, torch.full((4,), 5, dtype=torch.uint8))])
    clock.advance(1)
    assert target.tolist() == [5] * 4
    clock.advance(3)
    assert target.tolist() == [9] * 4


def test_tm06_failure_and_bad_arguments():
    clock = SimulatedClock()
    copy = SimulatedCopyEngine(clock, bytes_per_s=4).submit([(torch.zeros(1).expand(4), torch.ones(4))])
    assert not copy.done
    with pytest.raises(RuntimeError):
        copy.wait()
    assert clock.now == 4.0
    with pytest.raises(ValueError, match="bytes_per_s must be positive"):
        SimulatedCopyEngine(clock, bytes_per_s=0)
    with pytest.raises(ValueError, match="cannot advance"):
        clock.advance(-1)


def test_tm06_nothing_is_kept_after_close():
    clock = SimulatedClock()
    engine = SimulatedCopyEngine(clock, bytes_per_s=1)
    old, new = byte_pair(3)
    engine.submit([(old, new)])
    engine.close()
    assert torch.equal(old, new)
    kept = weakref.ref(new)
    del new, old
    gc.collect()
    assert kept() is None


@pytest.mark.gpu
def test_tm05_after_and_wait_order_reads_and_writes():
    host_old = torch.full((1 << 22,), 1.0).pin_memory()
    host_new = torch.full((1 << 22,), 2.0).pin_memory()
    slot = torch.empty(1 << 22, device="cuda")
    seen = torch.empty(8, 1 << 22, device="cuda")
    with CopyEngine("cuda") as engine:
        for round_ in range(8):
            fresh = host_new if round_ % 2 else host_old
            # The compute stream reads late; without `after` the copy would overtake the previous read.
            copy = engine.submit([(slot, fresh)], after=torch.cuda.current_stream())
            copy.wait()
            torch.cuda._sleep(2_000_000)
            seen[round_] = slot
        torch.cuda.synchronize()
        assert copy.done
        assert copy.synchronize() > 0
    for round_ in range(8):
        assert bool((seen[round_] == (2.0 if round_ % 2 else 1.0)).all())


@pytest.mark.gpu
def test_tm05_done_never_blocks_and_sources_outlive_their_names():
    engine = CopyEngine("cuda")
    target = torch.zeros(1 << 26, dtype=torch.uint8, device="cuda")
    source = torch.full((1 << 26,), 4, dtype=torch.uint8).pin_memory()
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)
    copy = engine.submit([(target, source)], after=torch.cuda.current_stream())
    assert not copy.done
    del source
    gc.collect()
    copy.synchronize()
    assert copy.done
    assert bool((target == 4).all())
    engine.close()
    assert not engine._in_flight
    assert engine._stream is None
