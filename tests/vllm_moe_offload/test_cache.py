"""The slots: a random walk checked after every step, failing and slow copies, layouts and refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tiered_memory import Copy, CopyEngine, SimulatedClock, SimulatedCopyEngine
from vllm_moe_offload import ExpertCache, HostExpertStore, SlabLayout, remap_expert_ids

LAYERS, EXPERTS = 3, 6


def make_store():
    generator = torch.Generator().manual_seed(0)
    return HostExpertStore(
        [
            {
                "w13_weight": torch.randn(EXPERTS, 8, 4, generator=generator).bfloat16(),
                "w2_weight": torch.randn(EXPERTS, 4, 4, generator=generator).bfloat16(),
                "scale": torch.randn(EXPERTS, generator=generator),
            }
            for _ in range(LAYERS)
        ]
    )


STORE = make_store()


def expected(layer, expert):
    return STORE.layout.views(STORE.record(layer, expert))


class CacheMachine(RuleBasedStateMachine):
    """Random ensure, release, prefetch, clear and passing time over a slow simulated link."""

    def __init__(self):
        super().__init__()
        self.clock = SimulatedClock()
        self.cache = ExpertCache(
            STORE,
            5,
            policy="lru",
            copy_engine=SimulatedCopyEngine(self.clock, bytes_per_s=100, latency_s=1),
            prefetch_budget=0.6,
            debug_checks=True,
        )
        self.pinned: dict[tuple[int, int], int] = {}
        self.held: dict[int, list[int]] = {}

    @rule(
        layer=st.integers(0, LAYERS - 1),
        experts=st.lists(st.integers(0, EXPERTS - 1), min_size=1, max_size=4),
    )
    def ensure(self, layer, experts):
        distinct = set(experts)
        keys = {(layer, expert) for expert in distinct} | set(self.pinned)
        if len(keys) > 3:  # leaves room, since at most two prefetches may fly
            return
        slots = self.cache.ensure(layer, experts).tolist()
        for expert, slot in zip(experts, slots, strict=True):
            self.pinned[layer, expert] = slot
            for name, value in expected(layer, expert).items():
                assert torch.equal(self.cache.views[name][slot], value)
        self.held.setdefault(layer, [])

    @rule(layer=st.integers(0, LAYERS - 1))
    def release(self, layer):
        self.cache.release(layer)
        self.pinned = {key: slot for key, slot in self.pinned.items() if key[0] != layer}

    @precondition(lambda self: self.cache.in_flight < 2)
    @rule(layer=st.integers(0, LAYERS - 1), expert=st.integers(0, EXPERTS - 1))
    def prefetch(self, layer, expert):
        before = self.cache.counters.prefetched
        done = self.cache.prefetch(layer, expert)
        assert done or self.cache.counters.prefetched == before

    @rule(seconds=st.floats(0, 3))
    def pass_time(self, seconds):
        self.clock.advance(seconds)

    @rule()
    def clear(self):
        self.cache.clear()
        for layer in range(LAYERS):
            kept = {expert for owner, expert in self.pinned if owner == layer}
            assert self.cache.resident(layer) == kept

    @invariant()
    def pinned_experts_keep_their_slots_and_bytes(self):
        for (layer, expert), slot in self.pinned.items():
            assert int(self.cache.slot_of_expert[layer, expert]) == slot
            for name, value in expected(layer, expert).items():
                assert torch.equal(self.cache.views[name][slot], value)

    @invariant()
    def the_table_is_a_bijection_onto_arrived_bytes(self):
        table = self.cache.slot_of_expert
        used = table[table >= 0].tolist()
        assert len(used) == len(set(used))
        for layer, expert in (table >= 0).nonzero().tolist():
            for name, value in expected(layer, expert).items():
                assert torch.equal(self.cache.views[name][table[layer, expert]], value)

    @invariant()
    def counters_add_up(self):
        stats = self.cache.stats
        assert stats["accesses"] == stats["hits"] + stats["late"] + stats["misses"]
        assert stats["copies"] == stats["misses"] + stats["prefetched"]
        assert stats["bytes_host_to_device"] == stats["copies"] * STORE.layout.expert_nbytes


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


def test_mo02_records_and_arrays_hold_the_same_experts():
    arrays, records = ExpertCache(STORE, 4), ExpertCache(STORE, 4, contiguous=False)
    for cache in (arrays, records):
        slots = cache.ensure(1, [5, 0, 5])
        assert slots[0] == slots[2]
        for expert, slot in zip([5, 0], slots.tolist(), strict=False):
            for name, value in expected(1, expert).items():
                assert torch.equal(cache.views[name][slot], value)
    assert all(view.is_contiguous() for view in arrays.views.values())
    assert records.views["w2_weight"].stride(0) == STORE.layout.nbytes // 2
    assert STORE.layout.nbytes % 4096 == 0
    assert STORE.layout.expert_nbytes == 8 * 4 * 2 + 4 * 4 * 2 + 4


def test_mo04_more_experts_than_slots_is_refused_before_anything_changes():
    cache = ExpertCache(STORE, 4)
    with pytest.raises(ValueError, match=r"^layer 2 needs 5 experts at once, cache has 4 slots$"):
        cache.ensure(2, range(5))
    assert cache.stats["accesses"] == 0
    with pytest.raises(IndexError, match="layer 3 of 3"):
        cache.ensure(3, [0])
    with pytest.raises(IndexError, match="expert 6 of 6"):
        cache.ensure(0, [6])


class FailingEngine(CopyEngine):
    """Every copy whose number is in ``bad`` fails in flight."""

    def __init__(self, bad):
        super().__init__("cpu")
        self.bad, self.number = bad, -1

    def _launch(self, pairs, nbytes, after):
        self.number += 1
        if self.number in self.bad:
            return Copy(nbytes, RuntimeError("the link broke"))
        return super()._launch(pairs, nbytes, after)


def test_a_failed_copy_raises_and_leaves_nothing_stale():
    cache = ExpertCache(STORE, 4, copy_engine=FailingEngine({2}))
    cache.ensure(0, [0, 1])
    cache.release(0)
    with pytest.raises(RuntimeError, match="the link broke"):
        cache.ensure(0, [1, 2])
    assert cache.resident(0) == {0, 1}
    assert int(cache.slot_of_expert[0, 2]) == -1
    slots = cache.ensure(0, [2, 3, 4, 5])  # nothing stayed pinned
    for expert, slot in zip([2, 3, 4, 5], slots.tolist(), strict=True):
        assert torch.equal(cache.views["w2_weight"][slot], expected(0, expert)["w2_weight"])


def test_a_failed_prefetch_is_absent_again():
    cache = ExpertCache(STORE, 4, copy_engine=FailingEngine({0}))
    assert cache.prefetch(0, 3)
    with pytest.raises(RuntimeError, match="the link broke"):
        cache.ensure(0, [3])
    assert cache.resident(0) == frozenset()
    cache.ensure(0, [3])
    assert cache.resident(0) == {3}


def test_mo08_demand_waits_for_the_copy_in_progress_only():
    clock = SimulatedClock()
    seconds = STORE.layout.expert_nbytes / 100
    cache = ExpertCache(STORE, 6, copy_engine=SimulatedCopyEngine(clock, bytes_per_s=100), prefetch_budget=1)
    cache.prefetch(1, 0)
    clock.advance(seconds / 4)
    cache.ensure(0, [0])
    assert clock.now == pytest.approx(2 * seconds)
    assert cache.stats["late"] == 0
    cache.prefetch(1, 1)
    cache.ensure(1, [1, 0])
    assert (cache.stats["late"], cache.stats["hits"], cache.stats["prefetch_used"]) == (1, 1, 2)


def test_mo08_prefetch_keeps_its_budget_and_spares_pinned_experts():
    cache = ExpertCache(STORE, 4, prefetch_budget=0.5)
    assert cache.prefetch(0, 0)
    assert cache.prefetch(0, 1)
    assert not cache.prefetch(0, 2)
    cache.ensure(0, [0, 1, 3, 4])
    assert not cache.prefetch(1, 0)
    assert cache.resident(0) == {0, 1, 3, 4}


def test_store_refuses_layers_that_differ():
    with pytest.raises(ValueError, match="layer 1 differs from layer 0"):
        HostExpertStore([{"w": torch.zeros(2, 3)}, {"w": torch.zeros(2, 4)}])
    with pytest.raises(ValueError, match="one common number of experts"):
        SlabLayout.from_tensors({"a": torch.zeros(2, 1), "b": torch.zeros(3, 1)})
    with pytest.raises(IndexError, match="layer 0, expert 9"):
        STORE.record(0, 9)


def test_remapped_ids():
    table = torch.tensor([4, -1, 0], dtype=torch.int32)
    remapped = remap_expert_ids(torch.tensor([[2, 0], [1, 2]]), table)
    assert remapped.tolist() == [[0, 4], [-1, 0]]
    assert remapped.dtype == torch.int32
