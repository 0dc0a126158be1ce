"""Compiled loops against their NumPy twins."""

from __future__ import annotations

import itertools

import numpy as np

from rl_replay_gear import loops


def test_compiled_loops_equal_their_numpy_twins():
    random = np.random.default_rng(0)
    capacity, count = 50, 400
    start, length = random.integers(0, 10**12, capacity), random.integers(1, 9, capacity)
    generation, live = random.integers(0, 2**20, capacity), random.random(capacity) < 0.7
    slots = random.integers(0, capacity, count)
    u = random.random(count)
    found, twin = np.empty((2, count), np.int64), np.empty((2, count), np.int64)
    loops.make_handles(slots, generation, 5, found[0])
    loops.make_handles_numpy(slots, generation, 5, twin[0])
    assert np.array_equal(found[0], twin[0])
    handles = found[0].copy()
    handles[::7] += 1 << loops.SLOT_BITS
    handles[::11] = -1
    handles[::13] |= 1 << 60
    handles[::17] |= loops.SLOT_MASK
    stale = loops.locate(handles, 5, generation, live, found[0])
    assert stale == loops.locate_numpy(handles, 5, generation, live, twin[0])
    assert 0 < stale < count
    assert np.array_equal(found[0], twin[0])
    loops.uniform_anchors(u, slots, length, found[1])
    loops.uniform_anchors_numpy(u, slots, length, twin[1])
    assert np.array_equal(found[1], twin[1])
    for extra, offset, window, pad in itertools.product((0, 1), (-9, -2, 0, 3, 12), (1, 4), (0, 1, 2)):
        one, other = np.empty((4, count), np.int64), np.empty((4, count), np.int64)
        loops.window_segments(slots, found[1], start, length, extra, offset, window, pad, one)
        loops.window_segments_numpy(slots, found[1], start, length, extra, offset, window, pad, other)
        assert np.array_equal(one, other)
    words = random.integers(0, 9, (count, 4, 2))
    other_words = words.copy()
    steps = random.integers(0, 5, count)
    shift = np.minimum(random.integers(0, 5, count), 4 - steps)
    loops.fill_padding(words, steps, shift, np.array([-1, -2]))
    loops.fill_padding_numpy(other_words, steps, shift, np.array([-1, -2]))
    assert np.array_equal(words, other_words)
    assert (words[:, :, 0] == -1).sum() == (4 - steps).sum()
    for size in (0, 1, count):
        one, other = np.empty((2, size), np.int64)
        ends = loops.run_starts(steps[:size], shift[:size], one)
        assert ends == loops.run_starts_numpy(steps[:size], shift[:size], other)
        assert np.array_equal(one, other)
        assert ends == ((one.min(), one.max()) if size else (0, 0))
    for key, begin in ((0, 1), (2**64 - 1, 10**12), (12345678901234567890, 7)):
        drawn, twin = np.empty(1000), np.empty(1000)
        loops.counter_uniforms(np.uint64(key), begin, drawn)
        loops.counter_uniforms_numpy(np.uint64(key), begin, twin)
        assert np.array_equal(drawn, twin)
        assert drawn.min() >= 0
        assert drawn.max() < 1


def test_checks_and_weights_of_a_tree_equal_their_twins():
    index = np.array([0, 4, 9, 3])
    good = np.array([0.0, 1e300, 5e-324, 2.0])
    for position, leaf, weight in [(-1, 0, 0.0), (0, 10, 0.0), (2, -1, 1.0), (1, 4, np.nan), (3, 3, np.inf),
                                   (0, 0, -1e-300)]:  # fmt: skip
        leaves, weights = index.copy(), good.copy()
        if position >= 0:
            leaves[position], weights[position] = leaf, weight
        assert loops.first_bad_leaf(leaves, weights, 10) == position
        assert loops.first_bad_leaf_numpy(leaves, weights, 10) == position
    assert loops.first_bad_leaf(index[:0], good[:0], 10) == loops.first_bad_leaf_numpy(
        index[:0], good[:0], 10
    )
    random = np.random.default_rng(0)
    priority = random.random(50).astype(np.float32)
    priority[::5] = 0
    length, slots = random.integers(1, 9, 50), random.integers(0, 50, 200)
    for alpha in (0.0, 0.6, 1.0):
        for over_steps in (False, True):
            one, other = np.empty((2, 200))
            loops.priority_weights(slots, priority, alpha, length, over_steps, one)
            loops.priority_weights_numpy(slots, priority, alpha, length, over_steps, other)
            np.testing.assert_allclose(one, other, rtol=1e-15)
            assert (one[priority[slots] == 0] == 0).all()
