"""Replay against closed forms, enumeration and bounds."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vllm_moe_offload import EAMCollection, LinkModel, RoutingTrace, replay

POLICIES = ["lru", "lfu", "least_stale", "eam", "eam_reference"]


def trace_of(steps, num_experts):
    """steps: nested lists [step][layer][top_k], one token of request 0 each."""
    ids = np.asarray(steps, dtype=np.int32)
    return RoutingTrace(ids, np.zeros(len(ids), np.int32), np.arange(len(ids), dtype=np.int32), num_experts)


TRACES = st.integers(1, 3).flatmap(
    lambda layers: st.lists(
        st.lists(st.permutations(range(5)).map(lambda order: order[:2]), min_size=layers, max_size=layers),
        min_size=1,
        max_size=25,
    )
)


@settings(max_examples=60, deadline=None)
@given(TRACES, st.integers(2, 9), st.sampled_from(POLICIES))
def test_mo09_belady_bounds_every_policy_and_counts_add_up(steps, slots, policy):
    trace = trace_of(steps, 5)
    bound = replay(trace, num_slots=slots, policy="belady")
    result = replay(trace, num_slots=slots, policy=policy, expert_nbytes=7)
    assert result.hits <= bound.hits
    assert result.accesses == bound.accesses == result.hits + result.late + result.misses
    assert result.accesses == sum(len(set(layer)) for step in steps for layer in step)
    assert result.bytes_moved == 7 * result.misses


def fewest_misses(requests, slots):
    """Misses of the best possible schedule, by trying every victim."""
    states = {frozenset(): 0}
    for needed in requests:
        following = {}
        for state, misses in states.items():
            absent = needed - state
            rest = sorted(state - needed)
            room = slots - len(needed)
            for kept in itertools.combinations(rest, min(room, len(rest))):
                after = frozenset(kept) | needed
                count = misses + len(absent)
                following[after] = min(following.get(after, count), count)
        states = following
    return min(states.values())


@settings(max_examples=40, deadline=None)
@given(st.lists(st.permutations(range(5)).map(lambda order: [order[:2]]), min_size=1, max_size=9))
def test_mo09_belady_is_the_brute_force_optimum(steps):
    requests = [frozenset(step[0]) for step in steps]
    assert replay(trace_of(steps, 5), num_slots=3, policy="belady").misses == fewest_misses(requests, 3)


def test_mo09_cyclic_scan_defeats_lru():
    steps = [[[step % 5]] for step in range(50)]
    assert replay(trace_of(steps, 5), num_slots=4, policy="lru").hits == 0
    # Belady misses once in every four steps after the first round: 5 + 45 / 4 misses.
    assert replay(trace_of(steps, 5), num_slots=4, policy="belady").hits >= 33


@pytest.mark.parametrize("policy", ["lru", "lfu"])
def test_mo09_uniform_routing_hits_slots_over_experts(policy):
    rng = np.random.default_rng(0)
    steps = np.stack([rng.permutation(16)[:2] for _ in range(6000)])[:, None]
    result = replay(trace_of(steps, 16), num_slots=8, policy=policy)
    # Two distinct of 16 and 8 slots, the last two of which just served: 8/16 for any history policy.
    assert result.hit_rate == pytest.approx(8 / 16, abs=0.02)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.floats(0.01, 5), st.floats(0.01, 5))
@example(2, 0.958984375, 1.0)
def test_mo08_disjoint_experts_stall_for_their_copies_and_the_oracle_hides_compute(k, copy, compute):
    count = 6
    steps = [[list(range(step * k, step * k + k))] for step in range(count)]
    trace = trace_of(steps, count * k)
    link = LinkModel(copy_seconds=copy, layer_seconds=compute)
    demand = replay(trace, num_slots=4 * k, policy="lru", link=link)
    assert demand.stall_seconds == pytest.approx(count * k * copy)
    assert demand.total_seconds == pytest.approx(count * (k * copy + compute))
    oracle = replay(trace, num_slots=4 * k, policy="lru", prefetch="oracle", link=link)
    expected = k * copy + (count - 1) * max(0.0, k * copy - compute)
    assert oracle.stall_seconds == pytest.approx(expected, rel=1e-6)
    assert oracle.misses + oracle.late + oracle.hits == oracle.accesses


def topic_trace(seed, layers=4, experts=32, top_k=4, requests=60, tokens=24):
    """Requests of 6 topics; a topic prefers a few experts of each layer, 15 % of choices are noise."""
    rng = np.random.default_rng(seed)
    taste = rng.dirichlet(np.full(experts, 0.08), size=(6, layers))
    ids, request = [], []
    for index in range(requests):
        topic = rng.integers(6)
        for _ in range(tokens):
            rows = []
            for layer in range(layers):
                share = 0.85 * taste[topic, layer] + 0.15 / experts
                rows.append(rng.choice(experts, size=top_k, replace=False, p=share))
            ids.append(rows)
            request.append(index)
    return RoutingTrace(np.asarray(ids), np.asarray(request), np.arange(len(ids)), experts)


def test_mo09_eam_beats_lru_on_topics_and_nears_belady():
    trace = topic_trace(0)
    slots = trace.num_layers * trace.num_experts // 4
    rates = {
        policy: replay(trace, num_slots=slots, policy=policy).hit_rate for policy in ["lru", "eam", "belady"]
    }
    assert rates["eam"] > rates["lru"]
    assert rates["eam"] >= 0.85 * rates["belady"]


def test_mo17_bad_input():
    trace = trace_of([[[0, 1]]], 4)
    with pytest.raises(ValueError, match="1 slots are fewer than top_k=2"):
        replay(trace, num_slots=1)
    with pytest.raises(ValueError, match="prefetch must be one of"):
        replay(trace, num_slots=2, prefetch="psychic")
    with pytest.raises(ValueError, match="policy must be one of"):
        replay(trace, num_slots=2, policy="fifo")


def test_mo06_the_given_collection_is_copied():
    collection = EAMCollection(1, 4)
    replay(trace_of([[[0, 1]]], 4), num_slots=2, collection=collection)
    assert len(collection) == 0


def test_mo17_trace_round_trip_and_refusals(tmp_path):
    trace = topic_trace(3, requests=2, tokens=3)
    trace.save(tmp_path / "trace.npz")
    loaded = RoutingTrace.load(tmp_path / "trace.npz")
    np.testing.assert_array_equal(loaded.expert_ids, trace.expert_ids)
    assert (loaded.request_ids, loaded.num_experts) == (trace.request_ids, 32)
    assert [path.name for path in tmp_path.iterdir()] == ["trace.npz"]
    (tmp_path / "bad.npz").write_bytes((tmp_path / "trace.npz").read_bytes()[:-40])
    with pytest.raises(ValueError, match="is no routing trace"):
        RoutingTrace.load(tmp_path / "bad.npz")
    with pytest.raises(ValueError, match="expert_ids must be in"):
        trace_of([[[9]]], 4)
    with pytest.raises(ValueError, match="must not decrease"):
        RoutingTrace(np.zeros((2, 1, 1)), np.zeros(2), np.asarray([1, 0]), 1)
