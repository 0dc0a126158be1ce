"""The simulator against queueing theory and schedules by hand; traces against their moments."""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import pytest

from vllm_serverless_loader import (
    CacheTransfer,
    FirstAvailablePolicy,
    LocalityPolicy,
    ModelInfo,
    RandomPolicy,
    ServerSpec,
    StartupTimePolicy,
    Trace,
    simulate,
)

LINKS = {"remote": 1e9, "disk": 4e9, "host": 16e9}


def trace_of(*requests, models=("a", "b", "c"), outputs=100):
    arrivals, owners = zip(*requests, strict=True)
    count = len(arrivals)
    return Trace(
        np.array(arrivals, dtype=np.float64),
        np.array([models.index(name) for name in owners]),
        np.full(count, 0),
        np.full(count, outputs),
        tuple(models),
    )


def infos(*sizes, names="abc"):
    return [ModelInfo(name, (size,)) for name, size in zip(names, sizes, strict=False)]


def test_sl19_waiting_times_are_those_of_m_d_1():
    """One server, one model, always resident: Poisson arrivals, constant service."""
    service, load = 1.0, 0.7
    waits = []
    for seed in range(8):
        trace = Trace.gamma(["a"], requests_per_s=load, duration_s=6_000, cv=1.0, output_tokens=50, seed=seed)
        trace.input_tokens[:] = 0
        spec = ServerSpec(num_gpus=1, bandwidth=LINKS, decode_s_per_token=service / 50)
        models = [ModelInfo("a", (0,))]
        result = simulate(trace, models, [spec], FirstAvailablePolicy({"a": models[0]}), keep_alive_s=1e9)
        assert set(result.tier[1:]) == {"device"}
        waits.append(result.queue_s.mean())
    expected = load * service / (2 * (1 - load))
    error = np.std(waits, ddof=1) / len(waits) ** 0.5
    assert abs(np.mean(waits) - expected) < 3 * error


def test_sl19_a_schedule_by_hand():
    models = infos(8e9, 4e9, 2e9)
    known = {one.name: one for one in models}
    spec = ServerSpec(num_gpus=2, bandwidth=LINKS, decode_s_per_token=0.1, host_cache_bytes=8e9)
    # a at 0 from disk (2 s), b at 0 from disk behind it (1 s), c at 1 waits for a GPU.
    result = simulate(
        trace_of((0.0, "a"), (0.0, "b"), (1.0, "c"), (40.0, "c"), (41.0, "a")),
        models,
        [spec],
        StartupTimePolicy(known),
    )
    assert result.load_s.tolist() == pytest.approx([2.0, 1.0, 0.5, 0.125, 2.0])
    assert result.queue_s.tolist() == pytest.approx([0.0, 2.0, 11.0, 0.0, 0.0])
    assert result.finish_s.tolist() == pytest.approx([12.0, 13.0, 22.5, 50.125, 53.0])
    assert result.tier == ["disk", "disk", "disk", "host", "disk"]  # b and c pushed a out of 8 GB
    assert not result.migrated.any()


def test_sl19_migration_makes_room_where_the_bytes_are():
    models = infos(16e9, 1e9)
    known = {one.name: one for one in models}
    specs = [ServerSpec(num_gpus=1, bandwidth=LINKS), ServerSpec(num_gpus=1, bandwidth=LINKS)]
    trace = trace_of((0.0, "b"), (1.0, "a"), models=("a", "b"))
    on_disk = [{"a", "b"}, {"b"}]
    result = simulate(trace, models, specs, StartupTimePolicy(known), on_disk=on_disk)
    assert result.migrated.tolist() == [True, False]
    assert result.server.tolist() == [0, 0]
    # b's load at the other server (0.25 s) and its recomputed tokens, then 4 s from disk instead of 16 s from
    # afar.
    assert 4.25 < result.startup_s[1] < 4.35
    pause = 16 * specs[0].prefill_s_per_token
    assert result.finish_s[0] == pytest.approx(0.25 + 100 * 0.02 + pause)
    fixed = simulate(trace, models, specs, StartupTimePolicy(known, migration=False), on_disk=on_disk)
    assert fixed.startup_s[1] == pytest.approx(16.0)


def test_sl28_staging_is_never_slower_and_faster_when_the_disk_is_slow():
    """The migration takes 1 s; the model is in host memory before, or after it, or does not fit there."""
    specs = [
        ServerSpec(num_gpus=1, bandwidth=LINKS, host_cache_bytes=64e9),
        ServerSpec(num_gpus=1, bandwidth=LINKS | {"disk": 1e9}),
    ]
    trace = trace_of((0.0, "b"), (1.0, "a"), models=("a", "b"), outputs=1000)
    # b, 1 GB, is on both disks: 1 s at the second server, and less than 0.02 s of recomputed tokens.
    for size, pool, plain, staged in (
        (4e9, 64e9, 1.0 + 1.0, 1.0 + 0.25),  # read while b moves: left is the copy from host memory
        (16e9, 64e9, 1.0 + 4.0, 4.0),  # the disk is at work all the time
        (16e9, 8e9, 1.0 + 4.0, 1.0 + 4.0),  # no room in the pool
    ):
        models = infos(size, 1e9)
        known = {one.name: one for one in models}
        here = [dataclasses.replace(specs[0], host_cache_bytes=pool), specs[1]]
        found = {}
        for staging in (False, True):
            policy = StartupTimePolicy(known, staging=staging)
            result = simulate(trace, models, here, policy, on_disk=[{"a", "b"}, {"b"}])
            assert result.migrated.tolist() == [True, False]
            found[staging] = result.startup_s[1]
        assert found[False] == pytest.approx(plain, abs=0.02)
        assert found[True] == pytest.approx(staged, abs=0.02)


def test_sl29_a_migration_takes_the_cheaper_way():
    """The context is 2000 tokens of prompt; recomputing them takes 2 s, copying 0.2 s or 20 s."""
    models = infos(16e9, 1e9)
    known = {one.name: one for one in models}
    trace = trace_of((0.0, "b"), (3.0, "a"), models=("a", "b"), outputs=1000)
    trace.input_tokens[0] = 2000
    found = []
    for bandwidth in (None, 1e9, 1e7):
        cache = None if bandwidth is None else CacheTransfer(1e5, bandwidth)
        specs = [ServerSpec(num_gpus=1, bandwidth=LINKS, prefill_s_per_token=1e-3, cache_transfer=cache)] * 2
        result = simulate(trace, models, specs, StartupTimePolicy(known), on_disk=[{"a", "b"}, {"b"}])
        assert result.migrated.tolist() == [True, False]
        found.append(result.startup_s[1])
    # b from disk at the other server, its context, then a from disk.
    assert found[0] == pytest.approx(0.25 + 2.0 + 4.0, abs=0.1)
    assert found[1] == pytest.approx(0.25 + 0.2 + 4.0, abs=0.1)
    assert found[2] == found[0]


@pytest.mark.parametrize("seed", range(6))
def test_sl28_the_first_request_that_migrates_never_starts_later(seed):
    """Up to there both runs are the same; after it they decide about other clusters."""
    names = [f"m{n}" for n in range(8)]
    models = [ModelInfo(name, (int(6e9 + 1e9 * number),)) for number, name in enumerate(names)]
    known = {one.name: one for one in models}
    trace = Trace.gamma(names, requests_per_s=1.0, duration_s=120, cv=4.0, seed=seed, output_tokens=800)
    specs = [ServerSpec(num_gpus=2, bandwidth=LINKS | {"disk": 2e9}, host_cache_bytes=16e9)] * 4
    on_disk = [set(names[number::2]) for number in range(4)]
    plain, staged = (
        simulate(trace, models, specs, StartupTimePolicy(known, staging=staging), on_disk=on_disk)
        for staging in (False, True)
    )
    differ = np.flatnonzero(plain.startup_s != staged.startup_s)
    assert plain.migrated.any()
    if differ.size:
        assert staged.startup_s[differ[0]] < plain.startup_s[differ[0]]


@pytest.mark.parametrize("policy", [FirstAvailablePolicy, LocalityPolicy, RandomPolicy, StartupTimePolicy])
def test_sl19_every_request_is_served_once_and_gpus_are_never_shared(policy):
    names = [f"m{n}" for n in range(12)]
    models = [ModelInfo(name, (int(3e9),) * (1 + number % 2)) for number, name in enumerate(names)]
    known = {one.name: one for one in models}
    trace = Trace.gamma(names, requests_per_s=1.0, duration_s=300, cv=4.0, zipf=0.8, seed=3)
    specs = [ServerSpec(num_gpus=2, bandwidth=LINKS, host_cache_bytes=10e9) for _ in range(4)]
    result = simulate(trace, models, specs, policy(known), keep_alive_s=5.0)
    service = 256 * 1e-4 + 128 * 0.02
    done = result.finish_s - result.startup_s - trace.arrival_s
    assert (done >= service - 1e-9).all()
    assert (result.queue_s >= -1e-9).all()
    if not result.migrated.any():
        begin = trace.arrival_s + result.startup_s
        for number in range(len(specs)):
            here = np.flatnonzero(result.server == number)
            for moment in begin[here]:
                running = here[(begin[here] <= moment) & (moment < result.finish_s[here] - 1e-9)]
                assert sum(models[trace.model[one]].num_gpus for one in running) <= 2
    again = simulate(trace, models, specs, policy(known), keep_alive_s=5.0)
    assert np.array_equal(again.finish_s, result.finish_s)


def test_sl19_ten_thousand_requests_on_a_hundred_servers():
    names = [f"m{n}" for n in range(200)]
    models = [ModelInfo(name, (int(14e9),)) for name in names]
    trace = Trace.gamma(names, requests_per_s=50.0, duration_s=60, cv=8.0, zipf=0.6, seed=0)
    assert len(trace) > 2_000
    begin = time.process_time()
    simulate(trace, models, [ServerSpec()] * 100, StartupTimePolicy({one.name: one for one in models}))
    assert (time.process_time() - begin) * 10_000 / len(trace) < 30


def test_sl19_bad_input_is_refused():
    models = infos(1e9)
    with pytest.raises(ValueError, match="model 'b' of the trace"):
        simulate(trace_of((0.0, "b"), models=("b",)), models, [ServerSpec()], FirstAvailablePolicy({}))
    wide = ModelInfo("a", (1, 1, 1, 1, 1))
    with pytest.raises(ValueError, match="'a' can never be placed"):
        simulate(trace_of((0.0, "a"), models=("a",)), [wide], [ServerSpec()], StartupTimePolicy({"a": wide}))


@pytest.mark.parametrize("cv", [0.5, 1.0, 4.0])
def test_sl20_sample_cv_is_the_one_asked_for(cv):
    trace = Trace.gamma(["a"], requests_per_s=20.0, duration_s=50_000, cv=cv, seed=5)
    gaps = np.diff(trace.arrival_s)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.05)
    assert len(trace) / 50_000 == pytest.approx(20.0, rel=0.05)


def test_sl20_popularity_follows_zipf():
    trace = Trace.gamma(list("abcd"), requests_per_s=50.0, duration_s=10_000, cv=1.0, zipf=1.0, seed=1)
    counts = np.bincount(trace.model, minlength=4)
    assert counts / counts[0] == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4], rel=0.05)
    assert (np.diff(trace.arrival_s) >= 0).all()


def test_sl20_azure_functions_schema(tmp_path):
    path = tmp_path / "invocations.csv"
    header = ["HashOwner", "HashApp", "HashFunction", "Trigger", *map(str, range(1, 1441))]
    rows = []
    for number in range(6):
        counts = [0] * 1440
        counts[number % 3] = 100 * (number + 1)
        rows.append(["o", "p", f"f{number}", "http", *map(str, counts)])
    path.write_text("\n".join(",".join(row) for row in [header, *rows]))
    trace = Trace.azure_functions(path, ["a", "b"], requests_per_s=40.0, duration_s=180.0, seed=2)
    assert len(trace) == pytest.approx(40.0 * 180, rel=0.05)
    minute = (trace.arrival_s // 60).astype(int)
    # Function n runs in minute n mod 3 and belongs to model n mod 2: counts 100 .. 600.
    expected = np.zeros((2, 3))
    for number in range(6):
        expected[number % 2, number % 3] += 100 * (number + 1)
    found = np.zeros((2, 3))
    np.add.at(found, (trace.model, minute), 1)
    assert found / found.sum() == pytest.approx(expected / expected.sum(), abs=0.02)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="not the schema of 2019"):
        Trace.azure_functions(path, ["a"], requests_per_s=1.0, duration_s=60.0)
