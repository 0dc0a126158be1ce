"""The real Megatron-core on gloo: the uninterrupted run of the first layout is the oracle."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("megatron.core", reason="megatron-core is not installed")
import tenplex_jobs as jobs

from megatron_tenplex import GPTShape
from megatron_tenplex.testing import run_world
from megatron_tenplex.testing.gpt import GPTJob

pytestmark = pytest.mark.megatron

GATED = GPTShape(
    4, 64, 4, 128, ffn_hidden_size=96, num_query_groups=2, gated=True, bias=False, norm="RMSNorm"
)
TOURS = {
    # Gated MLP, grouped queries, workers that come and go.
    "gated": (
        4,
        GPTJob(GATED, global_batch_size=12),
        ["tp=2,pp=2", "pp=4", "tp=2,dp=1", "dp=3", "dp=4", "tp=2,pp=2"],
        3,
    ),
    "tied": (
        4,
        GPTJob(GPTShape(4, 64, 4, 128, tied=True), sequence_parallel=True),
        ["pp=2", "tp=4", "tp=2,pp=2"],
        4,
    ),
    "moe": (
        4,
        GPTJob(GPTShape(2, 32, 4, 128, num_experts=4, bias=False), sequence_parallel=True),
        ["ep=2", "ep=4", "ep=2,tp=2,etp=1", "ep=2"],
        3,
    ),
    "vpp": (4, GPTJob(GPTShape(8, 32, 4, 128)), ["pp=4", "pp=4,vpp=2", "tp=2"], 3),
    "buckets": (2, GPTJob(bucket_size=30000), ["dp=2", "tp=2", "dp=2"], 3),
    # One holder and three workers without anything: parts are passed on (TX-28).
    "replicated": (
        4,
        GPTJob(distributed_optimizer=False, global_batch_size=4),
        ["tp=2,dp=1", "dp=1", "dp=4", "pp=2,dp=1"],
        3,
    ),
}


@pytest.fixture(scope="module", params=list(TOURS))
def toured(request):
    workers, job, layouts, steps = TOURS[request.param]
    last = 20 if request.param == "buckets" else None
    return run_world(workers, jobs.tour, job, layouts, steps, last, timeout=400)


def test_tx01_losses_equal_the_uninterrupted_run(toured):
    # Covers TX-05 (gated, grouped queries, tied), TX-08 (experts), TX-12 (workers come and go), TX-23 (VPP).
    loss, norm = jobs.differences(toured)
    assert loss <= 2e-6
    assert norm <= 2e-5
    losses = [step[0] for step in toured[0]["steady"] if step]
    assert not losses or losses[-1] < losses[0]


def test_tx02_live_changes_move_the_lower_bound(toured):
    for moved, least, identity in toured[0]["bytes"]:
        assert moved == least <= identity


def test_tx12_idle_workers_get_none():
    workers, job, *_ = TOURS["gated"]
    results = run_world(workers, jobs.tour, job, ["tp=2,pp=2", "dp=3"], 1, timeout=100)
    assert sum(r["idle"][-1] for r in results) == 1
    assert not any(r["idle"][1] for r in results)
    assert jobs.differences(results)[0] <= 2e-6


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_tx07_there_and_back_is_bit_identical(precision):
    job = GPTJob(precision=precision)
    for same, small_same, step in run_world(
        2, jobs.there_and_back, job, ["tp=2", "pp=2", "dp=2"], timeout=100
    ):
        assert same
        assert small_same
        assert step == 2


def test_tx08_experts_there_and_back_are_bit_identical():
    job = TOURS["moe"][1]
    results = run_world(4, jobs.there_and_back, job, ["ep=2", "ep=4", "ep=1,tp=2"], timeout=100)
    assert all(same and small for same, small, _ in results)


def test_tx09_parking_the_old_layout_in_host_memory_changes_nothing():
    parked = partial(jobs.there_and_back, release_source=True)
    results = run_world(2, parked, GPTJob(), ["tp=2", "pp=2"], timeout=100)
    assert all(same and small for same, small, _ in results)


def test_tx06_padding_of_the_vocabulary():
    job = GPTJob(GPTShape(4, 32, 4, 130), padded_vocab=True)
    by_worker = run_world(2, jobs.padded, job, ["tp=2", "pp=2", "tp=2", "dp=2"], 130, timeout=100)

    def real_rows(number):
        parts: dict = {}
        for found in by_worker:
            parts.update(found[number][0])
        return np.concatenate([parts[offset] for offset in sorted(parts)])

    first = real_rows(0)
    assert first.shape == (130, 32)
    for number in (1, 2, 3):
        assert np.array_equal(first, real_rows(number))
        assert all(top == 0 for found in by_worker for top in found[number][1])
    assert any(top > 0 for found in by_worker for top in found[0][1])


def test_tx07_random_streams():
    job = GPTJob(dropout=0.1)
    results = run_world(2, jobs.random_streams, job, ["tp=2", "tp=2", "pp=2"], timeout=100)
    for before, same_layout, other_layout in results:
        assert same_layout == before
        assert other_layout != before
    assert results[0][0][1] != results[1][0][1]  # tensor-parallel streams differ among ranks


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("build", "no such model"),
        ("transport", "content of .* tensors changed while it moved"),
        ("memory", r"reshard needs .* GiB on rank 0, .* GiB free"),
    ],
)
def test_tx10_a_failed_change_leaves_the_old_layout(how, said):
    steady = (
        run_world(2, jobs.tour, GPTJob(), ["tp=2"], 4, timeout=100)[0]["steady"] if how == "build" else None
    )
    results = run_world(2, jobs.failing, GPTJob(), "tp=2", "pp=2", how, timeout=100)
    for error, kept, parallel, curve, builds in results:
        assert re.search(said, error), error
        assert kept
        assert parallel == "tp=2,pp=1,dp=1"
        if steady:
            assert max(abs(a[0] - b[0]) for a, b in zip(curve, steady, strict=True)) <= 2e-6
        if how == "memory":
            assert builds == 1  # nothing was built, nothing moved


@pytest.mark.parametrize("shadow", [False, True])
def test_tx22_a_prepared_change_plans_before_its_pause(shadow):
    # TX-29 with a shadow: the new model, too, is built while training goes on.
    results = run_world(2, jobs.prepared, GPTJob(), "tp=2", "pp=2", shadow, timeout=200)
    loss, norm = jobs.differences(results)
    assert loss <= 2e-6
    assert norm <= 2e-5
    for found in results:
        *before, (name, began, _) = found["spans"]
        assert name == "pause"
        ahead = {span[0] for span in before if span[2] <= began}
        within = {span[0] for span in before if span[1] >= began}
        assert len(before) == sum(span[2] <= began or span[1] >= began for span in before)
        assert {"plan", "groups", "build"} <= ahead
        assert "plan" not in within
        assert ("build" in within) != shadow
        assert found["computed"] == [1, 2]


def test_tx22_a_failed_preparation_leaves_training_as_it_was():
    results = run_world(2, jobs.badly_prepared, GPTJob(), "tp=2", "pp=2", timeout=200)
    steady = run_world(2, jobs.tour, GPTJob(), ["tp=2"], 4, timeout=200)[0]["steady"]
    for said, curve in results:
        assert "no such model" in said
        assert max(abs(a[0] - b[0]) for a, b in zip(curve, steady, strict=True)) <= 2e-6


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs /proc to count threads")
@pytest.mark.parametrize("kept", [0, 3])
def test_tx12_threads_do_not_grow_with_the_number_of_changes(kept):
    layouts = ["tp=2", "pp=2", "dp=2", "tp=2", "pp=2", "dp=2", "tp=2"]
    job = GPTJob(GPTShape(2, 32, 4, 128), global_batch_size=2)  # fp32: its optimizer hides a cycle
    for counts in run_world(2, jobs.threads_after_changes, job, layouts, kept, timeout=300):
        of_one_layout = counts[0]
        assert max(counts) <= (1 + kept) * of_one_layout
        assert counts[-1] <= counts[3]


def test_tx16_the_analytic_layout_is_that_of_the_real_model():
    job = partial(GPTJob, padded_vocab=True)
    small = GPTShape(4, 32, 4, 128)
    cases = [
        (job(small), ["tp=4", "tp=2,pp=2", "tp=2", "pp=4", "pp=2", "dp=4"]),
        (job(GPTShape(8, 32, 4, 128)), ["pp=4,vpp=2"]),
        (job(small, precision="bf16"), ["tp=2", "pp=2", "dp=4"]),
        (job(GPTShape(4, 32, 4, 130, tied=True)), ["tp=2", "pp=2", "tp=2,pp=2"]),
        (job(GPTShape(4, 32, 4, 130)), ["tp=2", "pp=2"]),
        (job(GATED), ["tp=2", "pp=2,tp=2", "dp=4"]),
        (replace(TOURS["moe"][1], padded_vocab=True), ["ep=2", "ep=4", "ep=2,tp=2,etp=1", "tp=2"]),
    ]
    for wrong in run_world(4, jobs.analytic_layouts, cases, timeout=120):
        assert wrong == []


def test_tx12_a_schedule_of_changes_with_workers_that_pause():
    job = GPTJob(GPTShape(4, 32, 4, 128), global_batch_size=12)
    steady = run_world(3, jobs.scheduled, job, "tp=2,dp=1", {}, 7, timeout=90)
    changing = run_world(3, jobs.scheduled, job, "tp=2,dp=1", {2: "dp=3", 4: "pp=2,dp=1"}, 7, timeout=90)
    for i in range(7):
        one, other = (next(r[i] for r in results if r[i] is not None) for results in (steady, changing))
        assert abs(one[0] - other[0]) <= 2e-6
    assert [sum(r[i] is not None for r in changing) for i in range(7)] == [2, 2, 3, 3, 2, 2, 2]
