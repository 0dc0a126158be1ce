"""The host's decisions against a plain restatement: a layer and a request at a time, full sorts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_moe_offload import EAMCollection, eam_distance
from vllm_moe_offload.policy import make_policy
from vllm_moe_offload.shares import ShareEstimator
from vllm_moe_offload.victims import VictimPlanner, least, trades

LAYERS, EXPERTS, TOP_K = 4, 12, 2


class PlainHost:
    """Estimator, policy and planner in the form that is easiest to read."""

    def __init__(self, policy: str, num_slots: int) -> None:
        self.policy, self.num_slots = make_policy(policy, LAYERS, EXPERTS), num_slots
        self.finished: list[np.ndarray] = []
        self.live: dict[str, np.ndarray] = {}
        self.beliefs: dict[str, list] = {}  # choices when matched, prior, choices when counted, share

    def observe(self, request: str, chosen: np.ndarray) -> None:
        matrix = self.live.setdefault(request, np.zeros((LAYERS, EXPERTS), np.int64))
        for layers in chosen:
            for layer, experts in enumerate(layers):
                for expert in experts:
                    matrix[layer, expert] += 1

    def finish(self, request: str) -> None:
        self.finished.append(self.live.pop(request))
        self.beliefs.pop(request, None)

    def prior(self, observed: np.ndarray) -> np.ndarray:
        if not self.finished:
            return np.zeros((LAYERS, EXPERTS))
        distances = np.asarray([eam_distance(observed, matrix) for matrix in self.finished])
        weights = np.exp((distances.min() - distances) / 0.05)
        kept = np.flatnonzero(weights > weights.sum() * 1e-13)
        if len(kept) > 16:
            kept = kept[np.argpartition(-weights[kept], 16)[:16]]
        mean = sum(
            weight * normalise(self.finished[index])
            for index, weight in zip(kept, weights[kept] / weights[kept].sum(), strict=True)
        )
        return np.mean([matrix[0].sum() for matrix in self.finished]) * mean

    def share(self, requests: list[str]) -> np.ndarray:
        total = np.zeros((LAYERS, EXPERTS))
        mean = np.mean([matrix[0].sum() for matrix in self.finished]) if self.finished else 0.0
        for request in requests:
            observed, belief = self.live[request], self.beliefs.get(request)
            seen = observed[0].sum()
            if belief is None or 2 * belief[0] <= min(seen, 2 * mean):
                prior = self.prior(observed)
                self.beliefs[request] = [seen, prior, seen, normalise(prior + observed)]
            elif seen >= 1.25 * belief[2]:
                belief[2:] = seen, normalise(belief[1] + observed)
            total += self.beliefs[request][3]
        return total / len(requests)

    def learn(self, chosen: np.ndarray, share: np.ndarray | None) -> None:
        for layer in range(LAYERS):
            self.policy.on_layer(layer, share)
            self.policy.on_accesses(layer * EXPERTS + np.unique(chosen[:, layer]))

    def plan(
        self, rows: np.ndarray, accesses: int, misses: int, share: np.ndarray | None
    ) -> tuple[list[int], int, list[int]]:
        """Victims' slots, how many of them are for any batch, admitted keys."""
        slots, keys = self.num_slots, range(LAYERS * EXPERTS)
        held = [key for key in keys if 0 <= rows[key] < slots]
        absent = [key for key in keys if key not in held]
        self.policy.on_layer(0, share)
        worth = self.policy.worth() if accesses > len(held) else None
        if worth is None:
            rank = self.policy._rank(np.asarray(held))
            order = sorted(zip(rank, self.policy._last_access[held], held, strict=True))
            victims = [key for *_, key in order][: max(4 * misses, EXPERTS)]
            return [rows[key] for key in victims], len(victims), list(keys)
        held.sort(key=lambda key: worth[key])
        absent.sort(key=lambda key: -worth[key])
        count = sum(worth[a] > worth[h] for h, a in zip(held, absent, strict=False))
        return [rows[key] for key in held[: max(count, EXPERTS)]], count, sorted(absent[:count])


def normalise(matrix: np.ndarray) -> np.ndarray:
    sums = matrix.sum(axis=1, keepdims=True)
    return np.where(sums > 0, matrix / np.where(sums > 0, sums, 1), 1 / EXPERTS)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["eam", "eam", "lru", "lfu", "least_stale", "eam_reference"]),
    st.integers(3, 40),
    st.integers(1, 6),
    st.integers(0, 2**31),
)
def test_mo09_decisions_equal_the_plain_form(policy, num_slots, requests, seed):
    rng = np.random.default_rng(seed)
    taste = rng.dirichlet(np.full(EXPERTS, 0.3), size=(requests, LAYERS))
    plain = PlainHost(policy, num_slots)
    rule = make_policy(policy, LAYERS, EXPERTS)
    rule._PASSES_REMEMBERED = plain.policy._PASSES_REMEMBERED = 5  # so that it forgets within the test
    planner = VictimPlanner(rule, num_slots=num_slots, own_slots=num_slots)
    estimator = ShareEstimator(EAMCollection(LAYERS, EXPERTS, 50))
    names = [str(index) for index in range(requests)]
    rows = [(name, slice(index, index + 1)) for index, name in enumerate(names)]
    places = rng.permutation(LAYERS * EXPERTS)[:num_slots]
    for step in range(30):
        noise = rng.gumbel(size=(requests, LAYERS, EXPERTS))
        chosen = np.argsort(-(np.log(taste + 1e-3) + noise), axis=2)[:, :, :TOP_K].astype(np.int32)
        estimator.observe_step(rows, chosen)
        for index, name in enumerate(names):
            plain.observe(name, chosen[[index]])
        # Any residency: what the device did is not the host's affair. Records may lie before the slots.
        if step % 3 == 0:
            places = rng.permutation(LAYERS * EXPERTS)[:num_slots]
        planner.rows = np.where(rng.random(LAYERS * EXPERTS) < 0.5, -7, num_slots + 3)
        planner.rows[places] = rng.permutation(num_slots)
        planner.accesses, planner.misses = int(rng.integers(1, 60)), int(rng.integers(0, 8))
        share = estimator.step_share(dict.fromkeys(names, 1)) if policy == "eam" else None
        expected = plain.share(names) if policy == "eam" else None
        if share is not None:
            np.testing.assert_allclose(share, expected, rtol=1e-12)
        planner.learn(chosen, share)
        plain.learn(chosen, share)
        plan = planner.plan(share)
        slots, count, admitted = plain.plan(planner.rows, planner.accesses, planner.misses, share)
        assert plan.slots.tolist() == slots
        assert plan.queued == count
        assert np.flatnonzero(plan.admitted).tolist() == admitted
        if step % 5 == 4:
            ended = names[step % requests]
            estimator.finish(ended)
            plain.finish(ended)
            estimator.observe_step([(ended, slice(0, 1))], chosen)
            plain.observe(ended, chosen[:1])


VALUES = st.lists(st.integers(0, 6), max_size=12)


@given(VALUES, VALUES)
def test_trades_are_counted_as_by_sorting(mine, theirs):
    pairs = zip(sorted(mine), sorted(theirs, reverse=True), strict=False)
    assert trades(np.asarray(mine, np.int64), np.asarray(theirs, np.int64)) == sum(a < b for a, b in pairs)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=12), st.data())
def test_the_least_values_are_those_of_a_stable_sort(values, data):
    count = data.draw(st.integers(0, len(values)))
    order = sorted(range(len(values)), key=lambda index: values[index])
    assert least(np.asarray(values), count).tolist() == order[:count]


@pytest.mark.parametrize("large", [300, 70_000])
def test_mo07_matching_is_exact_whatever_the_counts(large):
    """Beyond 24 bits of a product the sums leave single precision."""
    rng = np.random.default_rng(large)
    collection = EAMCollection(LAYERS, EXPERTS)
    stored = [rng.integers(0, 200, (LAYERS, EXPERTS)) for _ in range(5)]
    stored[3][1, 2], stored[4][0] = large, 0
    for matrix in stored:
        collection.add(matrix)
    observed = rng.integers(0, large, (LAYERS, EXPERTS))
    expected = [eam_distance(observed, matrix) for matrix in stored]
    np.testing.assert_allclose(collection.distances(observed), expected, rtol=1e-12)
    np.testing.assert_array_equal(collection.matrices, stored)
    shares = collection.mean_shares(np.asarray([4, 3]), np.asarray([0.25, 0.75]))
    np.testing.assert_array_equal(shares, 0.25 * normalise(stored[4]) + 0.75 * normalise(stored[3]))


def test_counts_that_cannot_be_are_refused():
    collection = EAMCollection(LAYERS, EXPERTS)
    for bad in (-1, 2**24):
        matrix = np.full((LAYERS, EXPERTS), bad)
        with pytest.raises(ValueError, match=r"counts must be in \[0, 16777216\), found"):
            collection.add(matrix)
    assert len(collection) == 0
