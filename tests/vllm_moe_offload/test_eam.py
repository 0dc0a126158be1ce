"""Distances, collection and predictor against plain NumPy loops."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from vllm_moe_offload import EAMCollection, EAMPredictor, EAMTracer, eam_distance, prefetch_priority

SHAPE = (3, 4)
MATRIX = hnp.arrays(np.int64, SHAPE, elements=st.integers(0, 5))


def slow_distance(observed, stored):
    cosines = []
    for a, b in zip(observed.astype(float), stored.astype(float), strict=True):
        if a.any():
            cosines.append(a @ b / np.sqrt((a @ a) * (b @ b)) if b.any() else 0.0)
    return 1 - np.mean(cosines) if cosines else 1.0


@settings(max_examples=80, deadline=None)
@given(MATRIX, st.lists(MATRIX, min_size=1, max_size=5), st.sampled_from([0.0, 0.05, 1.0]))
def test_mo07_distance_and_prediction_equal_the_formula(observed, stored, temperature):
    collection = EAMCollection(*SHAPE)
    for matrix in stored:
        collection.add(matrix)
    distances = [slow_distance(observed, matrix) for matrix in stored]
    np.testing.assert_allclose(collection.distances(observed), distances, atol=1e-9)
    np.testing.assert_allclose([eam_distance(observed, matrix) for matrix in stored], distances, atol=1e-9)
    shares = [
        np.stack([row / row.sum() if row.any() else np.full(4, 1 / 4) for row in matrix.astype(float)])
        for matrix in stored
    ]
    predicted = EAMPredictor(collection, temperature=temperature).predict(observed)
    np.testing.assert_allclose(predicted.sum(axis=1), 1, atol=1e-9)
    if temperature:
        weights = np.exp(-np.asarray(distances) / temperature)
        expected = np.einsum("n,nle->le", weights / weights.sum(), np.asarray(shares))
        np.testing.assert_allclose(predicted, expected, atol=1e-9)
    else:
        nearest = int(np.argmin(np.round(distances, 12)))
        near = [share for share, d in zip(shares, distances, strict=True) if d <= distances[nearest] + 1e-9]
        assert any(np.allclose(predicted, share, atol=1e-9) for share in near)


@settings(max_examples=50, deadline=None)
@given(MATRIX, st.lists(MATRIX, min_size=1, max_size=5))
def test_mo07_expectation_is_a_posterior_mean_with_stored_requests_as_prior(observed, stored):
    collection = EAMCollection(*SHAPE)
    for matrix in stored:
        collection.add(matrix)
    predictor = EAMPredictor(collection)
    strength = np.mean([matrix[0].sum() for matrix in stored])
    counts = strength * predictor.predict(observed) + observed
    sums = counts.sum(axis=1, keepdims=True)
    expected = np.where(sums > 0, counts / np.where(sums > 0, sums, 1), 1 / SHAPE[1])
    np.testing.assert_allclose(predictor.expect(observed), expected, atol=1e-9)


def test_mo07_expectation_uses_the_nearest_entries_of_a_large_collection():
    rng = np.random.default_rng(3)
    collection = EAMCollection(*SHAPE, capacity=100)
    stored = [rng.integers(0, 50, SHAPE) for _ in range(100)]
    for matrix in stored:
        collection.add(matrix)
    observed = stored[7] + 1
    near = sorted(range(100), key=lambda index: slow_distance(observed, stored[index]))[:16]
    small = EAMCollection(*SHAPE)
    for index in near:
        small.add(stored[index])
    shift = collection.mean_choices / small.mean_choices
    counts = shift * small.mean_choices * EAMPredictor(small).predict(observed) + observed
    expected = counts / counts.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(EAMPredictor(collection).expect(observed), expected, atol=1e-9)


def test_mo07_empty_collection_is_uniform():
    predicted = EAMPredictor(EAMCollection(*SHAPE)).predict(np.ones(SHAPE, np.int64))
    np.testing.assert_array_equal(predicted, np.full(SHAPE, 0.25))


def test_mo07_priority():
    share = np.arange(12.0).reshape(SHAPE)
    priority = prefetch_priority(share, 1)
    assert not priority[0].any()
    np.testing.assert_allclose(priority[1], share[1] + 1e-8)
    np.testing.assert_allclose(priority[2], (share[2] + 1e-8) * (1 - 1 / 4))


def unit(index):
    matrix = np.zeros(SHAPE, np.int64)
    matrix[:, index] = 1
    return matrix


def test_mo06_replaces_the_least_often_nearest_and_keeps_persistent_ones():
    collection = EAMCollection(*SHAPE, capacity=3)
    assert [collection.add(unit(0), persistent=True), collection.add(unit(1)), collection.add(unit(2))] == [
        0,
        1,
        2,
    ]
    collection.distances(unit(1))
    assert collection.add(unit(3)) == 2  # entry 1 was nearest once
    assert collection.add(unit(2)) == 2
    assert len(collection) == 3
    np.testing.assert_array_equal(collection.matrices[0], unit(0))
    full = EAMCollection(*SHAPE, capacity=1)
    full.add(unit(0), persistent=True)
    with pytest.raises(ValueError, match=r"^EAM collection is full of persistent entries \(capacity 1\)$"):
        full.add(unit(1))
    with pytest.raises(ValueError, match=r"holds \[3, 4\] matrices, got \(2, 2\)"):
        full.add(np.zeros((2, 2), np.int64))


def test_mo06_round_trip_is_exact(tmp_path):
    collection = EAMCollection(*SHAPE, capacity=5)
    rng = np.random.default_rng(0)
    for index in range(7):
        collection.add(rng.integers(0, 9, SHAPE), persistent=index == 2)
        collection.distances(rng.integers(0, 9, SHAPE))
    collection.save(tmp_path / "eams.npz")
    loaded = EAMCollection.load(tmp_path / "eams.npz")
    np.testing.assert_array_equal(loaded.matrices, collection.matrices)
    query = rng.integers(0, 9, SHAPE)
    np.testing.assert_array_equal(loaded.distances(query), collection.distances(query))
    extra = rng.integers(0, 9, SHAPE)
    assert loaded.add(extra) == collection.add(extra)
    with np.load(tmp_path / "eams.npz") as file:
        arrays = dict(file) | {"added": np.zeros(1, np.int64)}
    np.savez(tmp_path / "uneven.npz", **arrays)
    with pytest.raises(
        ValueError, match=r"uneven\.npz is no EAM collection: its arrays have different lengths"
    ):
        EAMCollection.load(tmp_path / "uneven.npz")
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 no zip")
    with pytest.raises(ValueError, match="is no EAM collection"):
        EAMCollection.load(tmp_path / "bad.npz")


def test_mo05_tracer():
    tracer = EAMTracer(*SHAPE)
    tracer.record("a", 0, np.asarray([[1, 2], [1, 3]]))
    tracer.record("b", 2, np.asarray([0]))
    assert tracer.live == ("a", "b")
    assert tracer.matrix("a")[0].tolist() == [0, 2, 1, 1]
    with pytest.raises(IndexError):
        tracer.record("a", 0, np.asarray([4]))
    assert tracer.finish("a").sum() == 4
    tracer.discard("b")
    tracer.discard("b")
    assert tracer.live == ()
    with pytest.raises(KeyError):
        tracer.matrix("a")
