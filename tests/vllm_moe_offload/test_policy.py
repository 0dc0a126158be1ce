"""The activation-aware policy against a slow restatement of its rule, and what it must learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_moe_offload import RoutingTrace, replay
from vllm_moe_offload.policy import make_policy

LAYERS, EXPERTS = 3, 4
AGES = [2, 3, 4, 6, 10, 18, 34, 66]


class SlowRule:
    """Dictionaries and loops in place of arrays; no forgetting."""

    def __init__(self):
        self.tried, self.used, self.last = {}, {}, {}
        self.distinct, self.passed = 1.0, 0

    def suggested(self, share, layer, expert):
        if share is None:
            return min(self.distinct / EXPERTS, 1.0)
        return 1 - math.exp(-share[layer][expert] * self.distinct)

    def kind(self, share, layer, expert, due):
        p = self.suggested(share, layer, expert)
        exponent = math.floor(math.log2(p)) + 1 if p else 0
        age = min(due - self.last.get((layer, expert), -67), 66)
        return max(0, min(8, exponent + 8)), sum(age >= bound for bound in AGES)

    def serve(self, share, layer, experts):
        kinds = [self.kind(share, layer, expert, self.passed) for expert in range(EXPERTS)]
        for expert, kind in enumerate(kinds):
            self.tried[kind] = self.tried.get(kind, 0) + 1
            self.used[kind] = self.used.get(kind, 0) + (expert in experts)
        for expert in experts:
            self.last[layer, expert] = self.passed

    def learned(self, experts, layer):
        self.distinct += (len(experts) - self.distinct) / LAYERS
        self.passed += layer == LAYERS - 1

    def rank(self, share, running, passed, layer, expert):
        later = layer <= running
        kind = self.kind(share, layer, expert, passed + later)
        p = (self.used.get(kind, 0) + 2 * self.suggested(share, layer, expert)) / (
            self.tried.get(kind, 0) + 2
        )
        return -(layer - running + LAYERS * (later + 1 / max(p, 1e-6)))


SHARES = st.none() | st.integers(0, 2**16).map(
    lambda seed: np.random.default_rng(seed).dirichlet(np.full(EXPERTS, 0.4), LAYERS)
)
STEP = st.tuples(SHARES, st.lists(st.sets(st.integers(0, 3), min_size=1), min_size=LAYERS, max_size=LAYERS))


@settings(max_examples=60, deadline=None)
@given(st.lists(STEP, min_size=1, max_size=12), SHARES)
def test_mo09_eam_ranks_by_the_expected_layers_until_the_next_use(steps, share):
    policy, slow = make_policy("eam", LAYERS, EXPERTS), SlowRule()
    policy.on_layer(0, steps[0][0])
    for number, (predicted, layers) in enumerate(steps):
        for layer, experts in enumerate(layers):
            # The classes of a layer are taken when its turn comes, before what the layer before used counts.
            if (number, layer) != (0, 0):
                policy.on_layer(layer, predicted)
            slow.serve(predicted, layer, experts)
            policy.on_accesses(layer * EXPERTS + np.asarray(sorted(experts)))
            policy_share = share if share is None else share.reshape(-1)
            policy._learn()  # what the next on_layer would do first
            policy._running = None
            slow.learned(experts, layer)
            policy._share = policy_share
            keys = np.arange(LAYERS * EXPERTS)
            passed = slow.passed - (layer == LAYERS - 1)
            expected = [slow.rank(share, layer, passed, *divmod(int(key), EXPERTS)) for key in keys]
            np.testing.assert_allclose(policy._rank(keys), expected, rtol=1e-9)


def one_token_steps(ids, experts, request=None):
    ids = np.asarray(ids)
    request = np.zeros(len(ids), int) if request is None else request
    return RoutingTrace(ids, request, np.arange(len(ids)), experts)


def test_mo09_eam_learns_where_recency_tells_more_than_the_request():
    """Experts stay for a few tokens and then change at random: LRU's case, in which shares say nothing."""
    rng = np.random.default_rng(0)
    ids, now = [], np.stack([rng.permutation(32)[:2] for _ in range(4)])
    for _ in range(1500):
        for layer in range(4):
            if rng.random() < 0.2:
                now[layer] = rng.permutation(32)[:2]
        ids.append(now.copy())
    trace = one_token_steps(ids, 32, np.arange(1500) // 25)
    lru = replay(trace, num_slots=16, policy="lru").hit_rate
    assert lru > 0.6
    assert replay(trace, num_slots=16, policy="eam").hit_rate >= 0.98 * lru


def test_mo09_eam_learns_where_the_request_tells_more_than_recency():
    """Half of the experts belong to the request's topic, the others come once: scans defeat LRU."""
    rng = np.random.default_rng(1)
    topics = [[rng.permutation(64)[:4] for _ in range(4)] for _ in range(6)]
    ids, request = [], []
    for number in range(60):
        topic = topics[rng.integers(6)]
        for _ in range(12):
            ids.append([[*rng.permutation(topic[layer])[:1], rng.integers(64)] for layer in range(4)])
            request.append(number)
    ids = [[[a, b if b != a else (b + 1) % 64] for a, b in layers] for layers in ids]
    trace = one_token_steps(ids, 64, np.asarray(request))
    lru = replay(trace, num_slots=20, policy="lru").hit_rate
    assert replay(trace, num_slots=20, policy="eam").hit_rate >= 1.15 * lru


@pytest.mark.parametrize("policy", ["lru", "lfu", "least_stale", "eam", "eam_reference"])
def test_mo09_victims_are_the_lowest_ranks_oldest_first(policy):
    rng = np.random.default_rng(2)
    rule = make_policy(policy, LAYERS, EXPERTS)
    for step in range(20):
        layer = step % LAYERS
        rule.on_layer(layer, None)
        rule.on_accesses(layer * EXPERTS + np.unique(rng.integers(0, EXPERTS, 2)))
    keys = np.arange(LAYERS * EXPERTS)
    order = sorted(keys, key=lambda key: (rule._rank(keys)[key], rule._last_access[key], key))
    assert rule.victims(keys, 5).tolist() == order[:5]
