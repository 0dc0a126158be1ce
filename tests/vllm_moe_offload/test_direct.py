"""The pool that the device manages: twins equal, rows always name the right bytes, the host only hints."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tiered_memory import SimulatedClock, SimulatedCopyEngine
from vllm_moe_offload import HostExpertStore, RoutingTrace, SlabLayout, replay, residency
from vllm_moe_offload.direct import DirectCache, far_rows

LAYERS, EXPERTS, TOP_K = 3, 10, 2


def tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "w": torch.randn(EXPERTS, 5, 7, generator=generator),
        "b": torch.randn(EXPERTS, 3, generator=generator),
    }


def make(
    slots: int, *, layers: int = LAYERS, kernels=residency, device="cpu", policy="lru", **more
) -> DirectCache:
    all_layers = [tensors(layer) for layer in range(layers)]
    if more.get("expert_map"):
        own = np.flatnonzero(np.asarray(more["expert_map"]) >= 0)
        all_layers = [{name: tensor[own] for name, tensor in layer.items()} for layer in all_layers]
    slabs = torch.zeros(
        slots, SlabLayout.from_tensors(all_layers[0]).nbytes, dtype=torch.uint8, device=device
    )
    store = HostExpertStore(all_layers, pin_memory=device != "cpu", aligned_to=slabs.data_ptr())
    return DirectCache(store, slabs, policy=policy, top_k=TOP_K, max_tokens=64, kernels=kernels, **more)


def choices(rng: np.random.Generator, tokens: int, experts: int = EXPERTS) -> torch.Tensor:
    return torch.from_numpy(np.stack([rng.permutation(experts)[:TOP_K] for _ in range(tokens)])).int()


def record_at(cache: DirectCache, row: int) -> bytes:
    nbytes = cache.store.layout.nbytes
    return ctypes.string_at(cache._r.slabs.data_ptr() + row * nbytes, nbytes)


def finish_step(cache: DirectCache, tokens: int, *, learn: bool = True) -> None:
    cache.end_step(tokens)
    if learn:
        for _ in cache.reports():
            pass
        cache.plan_ahead()


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 29), st.integers(0, 2**31), st.sampled_from(["lru", "lfu", "eam", "least_stale"]))
def test_mo20_every_row_names_the_bytes_of_its_expert(slots, seed, policy):
    rng = np.random.default_rng(seed)
    cache = make(slots, policy=policy)
    for step in range(12):
        tokens, padding = int(rng.integers(1, 60)), int(rng.integers(0, 4))
        cache.begin_step(tokens)
        for layer in range(LAYERS):
            ids = choices(rng, tokens + padding)
            rows = cache.serve(layer, ids, remap=True)
            if layer + 1 < LAYERS and seed % 2:
                cache.foresee(layer + 1, choices(rng, tokens + padding).long())
                cache.join()
            assert (rows[tokens:] == 0).all()
            for expert, row in {*zip(ids[:tokens].flatten().tolist(), rows[:tokens].flatten().tolist())}:  # noqa: B905
                expected = cache.store.record(layer, expert).numpy().tobytes()
                assert record_at(cache, row) == expected
                assert int(cache.row_table(layer)[expert]) == row
        # The host may lag: what it knows changes which victims it queues, never what is read.
        finish_step(cache, tokens, learn=step % 3 != 0)
    cache.close()
    cache.verify()
    stats = cache.stats
    assert stats["accesses"] == stats["hits"] + stats["misses"]
    assert stats["misses"] + stats["prefetched"] == stats["copies"] + stats["in_place"]
    assert stats["prefetch_used"] <= stats["prefetched"]
    assert stats["bytes_host_to_device"] == stats["copies"] * cache.store.layout.expert_nbytes


def test_mo20_kernels_equal_their_twins():
    """On a GPU the kernels, elsewhere Triton's interpreter, which is chosen before Triton is imported."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        for slots in (4, 9, 21):
            compare_kernels(slots, "cuda")
        return
    here = Path(__file__)
    script = f"from tests.vllm_moe_offload.{here.stem} import compare_kernels as c; c(4, 'cpu'); c(9, 'cpu')"
    child = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=here.parents[2],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert child.returncode == 0, child.stderr[-3000:]


def compare_kernels(slots: int, device: str) -> None:
    """Random steps on both; all tables are compared after every layer."""
    from vllm_moe_offload import residency_kernels

    policy = "lfu" if slots > 4 else "lru"  # the former admits some experts only
    # Nine slots: a rank that has seven of the ten experts.
    expert_map = (0, -1, 1, 2, -1, 3, 4, 5, 6, -1) if slots == 9 else None
    twin = make(slots, policy=policy, expert_map=expert_map)
    ours = make(slots, kernels=residency_kernels, device=device, policy=policy, expert_map=expert_map)
    rng = np.random.default_rng(slots)
    for step in range(10):
        tokens = int(rng.integers(1, 60 if step % 2 else 4))
        for cache in (twin, ours):
            cache.begin_step(tokens)
        for layer in range(LAYERS):
            ids, remap = choices(rng, tokens + 2), bool(rng.integers(2))
            expected = twin.serve(layer, ids, remap=remap)
            found = ours.serve(layer, ids.to(device), remap=remap).cpu()
            if remap:
                expected, found = as_places(twin, expected), as_places(ours, found)
            assert torch.equal(found, expected)
            compare_tables(twin, ours)
            if layer + 1 < LAYERS:
                guess = choices(rng, tokens + 2).long()
                for cache in (twin, ours):
                    cache.foresee(layer + 1, guess.to(device))
                    cache.join()
                compare_tables(twin, ours)
        for cache in (twin, ours):
            cache.end_step(tokens)
            for _ in cache.reports(wait=True):
                pass
            cache.plan_ahead()
    ours.verify()
    assert ours.stats == twin.stats
    assert ours.stats["copies"] > 0
    assert ours.stats["in_place"] > 0
    assert ours.stats["prefetched"] >= ours.stats["prefetch_used"] > 0


def compare_tables(twin: DirectCache, ours: DirectCache) -> None:
    for name in ("last_used", "foreseen", "key_of", "trace", "control", "counters", "slabs"):
        assert torch.equal(getattr(ours._r, name).cpu(), getattr(twin._r, name)), name
    assert torch.equal(ours.slot_of_expert.cpu(), twin.slot_of_expert)


def as_places(cache: DirectCache, rows: torch.Tensor) -> torch.Tensor:
    """Slots as they are, records as -1 - key: their rows depend on addresses."""
    far = cache._r.far.cpu()
    keys = {row: -1 - key for key, row in enumerate(far.tolist())}
    return torch.tensor([keys.get(row, row) for row in rows.flatten().tolist()]).view(rows.shape)


@settings(max_examples=30, deadline=None)
@given(st.integers(4, 25), st.integers(1, 3), st.integers(0, 2**31))
def test_mo08_prefetched_experts_are_named_only_when_their_bytes_are_there(slots, owned, seed):
    """Copies take two steps; predictions are random, and the device may win the race for an expert."""
    rng = np.random.default_rng(seed)
    clock = SimulatedClock()
    nbytes = SlabLayout.from_tensors(tensors(0)).nbytes
    link = SimulatedCopyEngine(clock, bytes_per_s=nbytes / 2.0)
    cache = make(slots, host_slots=owned, copy_engine=link)
    for _ in range(15):
        tokens = int(rng.integers(1, 6))
        cache.begin_step(tokens)
        for layer in range(LAYERS):
            clock.advance(1 / LAYERS)
            ids = choices(rng, tokens)
            rows = cache.serve(layer, ids, remap=True)
            for expert, row in set(zip(ids.flatten().tolist(), rows.flatten().tolist(), strict=True)):
                assert record_at(cache, row) == cache.store.record(layer, expert).numpy().tobytes()
        cache.share = rng.dirichlet(np.full(EXPERTS, 0.1), size=LAYERS)
        finish_step(cache, tokens)
    stats = cache.stats
    assert stats["prefetched"] > 0
    assert stats["prefetch_used"] <= stats["prefetched"]
    assert stats["misses"] + stats["prefetched"] == stats["copies"] + stats["in_place"]
    table = cache.slot_of_expert[cache.slot_of_expert >= 0]
    assert len(table) == len(table.unique())
    cache.close()


def test_mo08_a_right_prediction_turns_a_miss_into_a_hit_and_a_new_one_replaces_the_old():
    clock = SimulatedClock()
    link = SimulatedCopyEngine(clock, bytes_per_s=1e12)
    cache = make(4, layers=1, host_slots=1, copy_engine=link)  # experts 0 to 3 have the slots
    share = np.zeros((1, EXPERTS))
    for guess in (7, 8):  # 7 is superseded before its copy starts
        cache.share = np.where(np.arange(EXPERTS) == guess, 0.9, share)
        cache.plan_ahead()
    cache.begin_step(1)
    assert cache.resident(0) == {0, 1, 2}  # retired at once, named again only when its copy has arrived
    clock.advance(1)
    cache.end_step(1)
    for _ in cache.reports():
        pass
    cache.begin_step(1)
    assert cache.resident(0) == {0, 1, 2, 8}
    cache.serve(0, torch.tensor([[8, 0]], dtype=torch.int32), remap=True)
    cache.end_step(1)
    for _ in cache.reports():
        pass
    assert cache.stats["prefetched"] == cache.stats["prefetch_used"] == 1
    assert cache.stats["misses"] == 0


def test_mo21_a_look_ahead_turns_misses_into_hits_and_spares_what_it_names():
    cache = make(6, layers=2)  # experts 0 to 2 of both layers have the slots
    cache.begin_step(1)
    cache.serve(0, torch.tensor([[0, 1]], dtype=torch.int32), remap=True)
    cache.foresee(1, torch.tensor([[0, 7, 8]]))  # 0 is there and must stay
    cache.join()
    assert {0, 7, 8} <= cache.resident(1)
    assert {0, 1} <= cache.resident(0)
    cache.serve(1, torch.tensor([[7, 0]], dtype=torch.int32), remap=True)
    finish_step(cache, 1)
    stats = cache.stats
    assert (stats["accesses"], stats["hits"], stats["misses"]) == (4, 4, 0)
    assert (stats["prefetched"], stats["prefetch_used"], stats["copies"]) == (2, 1, 2)
    cache.verify()


def test_mo08_a_slot_whose_expert_the_device_brought_in_first_is_used_again():
    clock = SimulatedClock()
    link = SimulatedCopyEngine(clock, bytes_per_s=1e12)
    cache = make(8, layers=2, host_slots=1, copy_engine=link)  # experts 0 to 3 of both layers have the slots
    for turn, guess in enumerate((4, 8, 8)):
        cache.share = np.zeros((2, EXPERTS))
        cache.share[0, guess] = 0.9
        cache.plan_ahead()
        tokens = 1 if turn else 40  # a large batch brings in what is missing, 4 first of all
        cache.begin_step(tokens)
        ids = np.stack([np.roll(np.arange(EXPERTS), row)[:TOP_K] for row in range(tokens)])
        cache.serve(0, torch.from_numpy(ids).int(), remap=False)
        clock.advance(1)
        finish_step(cache, tokens)
    assert 4 in cache.resident(0)
    assert int(cache._r.key_of[7]) == residency.NO_KEY  # 4 had arrived for nothing, 8 is on its way
    cache.begin_step(1)
    assert cache._r.key_of[7] == 8
    assert cache.stats["prefetched"] == 2
    cache.verify()


def test_padding_and_dummy_passes_leave_no_trace():
    cache = make(6)
    cache.begin_step(0)
    rng = np.random.default_rng(0)
    before = cache.slot_of_expert.clone()
    for layer in range(LAYERS):
        assert (cache.serve(layer, choices(rng, 5), remap=True) == 0).all()
    finish_step(cache, 0)
    assert torch.equal(cache.slot_of_expert, before)
    assert cache.stats["accesses"] == 0


def test_an_expert_used_after_the_ranking_keeps_its_slot():
    cache = make(2, layers=1)  # experts 0 and 1 have the slots
    cache.begin_step(1)
    cache.serve(0, torch.tensor([[0, 1]], dtype=torch.int32), remap=True)
    cache.end_step(1)
    cache.begin_step(1)  # the host has learned nothing: both are still queued as victims
    rows = cache.serve(0, torch.tensor([[2, 3]], dtype=torch.int32), remap=True)
    assert cache.resident(0) == {0, 1}
    assert ((rows < 0) | (rows >= 2)).all()
    cache.end_step(1)
    for _ in cache.reports():
        pass
    assert cache.stats["in_place"] == 2
    cache.plan_ahead()
    cache.begin_step(1)
    cache.serve(0, torch.tensor([[2, 3]], dtype=torch.int32), remap=True)
    assert cache.resident(0) == {2, 3}


def test_mo09_where_a_step_needs_more_than_the_slots_only_what_is_worth_more_gets_one():
    cache = make(3, layers=1, policy="lfu")  # experts 0 to 2 have the slots
    plan = [[[0, 1], [2, 3]]] * 5 + [[[0, 1], [3, 4]]] * 2
    for number, ids in enumerate(plan):
        cache.begin_step(2)
        cache.serve(0, torch.tensor(ids, dtype=torch.int32), remap=True)
        finish_step(cache, 2)
        if number == 4:  # all were asked for as often: nobody gained by a trade
            assert cache.resident(0) == {0, 1, 2}
            assert cache.stats["copies"] == 0
            assert cache.stats["in_place"] == 5
    assert cache.resident(0) == {0, 1, 3}  # 3 was asked for more often than 2, and 4 not yet
    assert cache.stats["copies"] == 1


def test_mo11_a_large_batch_copies_each_missing_expert_at_most_once_a_layer_and_spares_the_rest():
    cache = make(16)
    rng = np.random.default_rng(1)
    spared = None
    for _ in range(3):
        tokens = 60  # 120 choices of 10 experts: all of them are needed
        cache.begin_step(tokens)
        for layer in range(LAYERS):
            before = cache.slot_of_expert[layer] >= 0
            start = int(cache._r.counters[residency.PULLS])
            cache.serve(layer, choices(rng, tokens), remap=False)
            pulls = int(cache._r.counters[residency.PULLS]) - start
            assert pulls == int((~before).sum())  # ten slots in turn suffice for ten experts
            assert (cache.slot_of_expert[layer] >= 0).all()
        finish_step(cache, tokens)
        spared = cache.num_slots - EXPERTS
    assert spared == 6
    assert cache.stats["in_place"] == 0


@pytest.mark.parametrize("policy", ["lru", "least_stale"])
def test_mo17_one_layer_with_a_prompt_host_hits_as_replay_does(policy):
    """With one layer and no lag the policy sees the same history as in a replay."""
    rng = np.random.default_rng(3)
    trace = np.stack([rng.permutation(EXPERTS)[:TOP_K] for _ in range(200)])[:, None]
    cache = make(4, layers=1, policy=policy)
    warm = [0, 1, 2, 3]  # what has slots at the start; the replay begins empty
    for ids in (warm[:2], warm[2:]):
        cache.begin_step(1)
        cache.serve(0, torch.tensor([ids], dtype=torch.int32), remap=True)
        finish_step(cache, 1)
    for ids in trace:
        cache.begin_step(1)
        cache.serve(0, torch.from_numpy(ids).int(), remap=True)
        finish_step(cache, 1)
    steps = np.concatenate([np.asarray([[warm[:2]], [warm[2:]]]), trace])
    expected = replay(
        RoutingTrace(steps, np.zeros(len(steps)), np.arange(len(steps)), EXPERTS), num_slots=4, policy=policy
    )
    assert cache.stats["accesses"] == expected.accesses
    assert cache.stats["hits"] == expected.hits + 4  # the four that were there
    assert cache.stats["in_place"] == 0


def test_reports_carry_the_choices_of_their_step():
    cache = make(7)
    rng = np.random.default_rng(5)
    sent = []
    for tick in range(1, 4):
        ids = [choices(rng, tick + 2) for _ in range(LAYERS)]
        cache.begin_step(tick)
        for layer in range(LAYERS):
            cache.serve(layer, ids[layer], remap=False)
        cache.end_step(tick, note=f"step {tick}")
        sent.append(np.stack([part[:tick].numpy() for part in ids], axis=1))
    for tick, report in enumerate(cache.reports(wait=True), start=1):
        assert (report.tick, report.note) == (tick, f"step {tick}")
        np.testing.assert_array_equal(report.chosen, sent[tick - 1])


def test_records_off_the_grid_of_slots_are_refused():
    store = HostExpertStore([tensors(0)], pin_memory=False)
    slabs = torch.zeros(3 * store.layout.nbytes + 64, dtype=torch.uint8)
    start = (64 + store.record(0, 0).data_ptr() - slabs.data_ptr()) % store.layout.nbytes
    start = start if start + 2 * store.layout.nbytes <= len(slabs) else 0
    shifted = slabs[start : start + 2 * store.layout.nbytes].view(2, -1)
    with pytest.raises(ValueError, match=r"records of layer 0 are \d+ bytes more than a whole number"):
        far_rows(store, shifted, np.arange(EXPERTS))
