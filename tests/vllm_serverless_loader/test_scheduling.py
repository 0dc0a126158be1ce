"""Estimators against their formulas, the policy against trying everything (SL-11 to SL-13)."""

from __future__ import annotations

import itertools
import math
import random
import statistics
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_serverless_loader import (
    CacheTransfer,
    CheapestTransport,
    FirstAvailablePolicy,
    Instance,
    LoadingTimeEstimator,
    LocalityPolicy,
    MigrationTimeEstimator,
    ModelInfo,
    RandomPolicy,
    ServerState,
    StartupTimePolicy,
)
from vllm_serverless_loader.scheduling.estimators import estimated_output_tokens

BANDWIDTH = {"remote": 1e9, "disk": 4e9, "host": 16e9}


def test_sl11_loading_time_is_the_slowest_link():
    loading = LoadingTimeEstimator(BANDWIDTH, fixed_s=0.5)
    parts = (8_000_000_000, 6_000_000_000)
    for tier, seconds in (("remote", 14.0), ("disk", 3.5), ("host", 0.5)):
        assert loading.estimate(parts, tier, queue_s=2.0) == pytest.approx(2.5 + seconds, rel=1e-12)
    assert loading.estimate(parts, "device", queue_s=2.0) == 0.0
    wide = LoadingTimeEstimator({"remote": 1e9, "disk": 100e9, "host": 1e9})
    assert wide.estimate(parts, "disk") == pytest.approx(8.0, rel=1e-12)  # the fuller GPU's link is slower
    with pytest.raises(ValueError, match="tier must be one of"):
        loading.estimate(parts, "tape")
    with pytest.raises(ValueError, match="bandwidth of 'disk' must be positive"):
        LoadingTimeEstimator({"remote": 1.0, "host": 1.0})


@pytest.mark.parametrize("tier", ["remote", "disk", "host"])
def test_sl11_new_bandwidth_is_learnt_within_ten_percent_in_five_loads(tier):
    loading = LoadingTimeEstimator(BANDWIDTH, fixed_s=0.2)
    true = dict(BANDWIDTH, **{tier: BANDWIDTH[tier] / 3})
    parts = (5_000_000_000,)
    for _ in range(5):
        loading.observe(parts, tier, 0.2 + parts[0] / true[tier])
    assert loading.bandwidth[tier] == pytest.approx(true[tier], rel=0.1)
    for other in set(BANDWIDTH) - {tier}:
        assert loading.bandwidth[other] == BANDWIDTH[other]
    before = dict(loading.bandwidth)
    loading.observe(parts, tier, 0.1)  # below the fixed part: says nothing
    loading.observe(parts, "device", 3.0)
    assert loading.bandwidth == before


def test_sl11_smoothing_is_the_formula():
    loading = LoadingTimeEstimator(BANDWIDTH, smoothing=0.25)
    loading.observe((4_000_000_000,), "disk", 2.0)
    assert 1 / loading.bandwidth["disk"] == pytest.approx(0.75 / 4e9 + 0.25 * 2.0 / 4e9, rel=1e-12)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5000), st.floats(0.001, 10)), min_size=1, max_size=90))
def test_sl11_migration_time_is_the_clipped_least_squares_line(seen):
    estimator = MigrationTimeEstimator(1e-4, 0.01)
    assert estimator.estimate(100) == pytest.approx(0.02, rel=1e-12)
    for tokens, seconds in seen:
        estimator.observe(tokens, seconds)
    x, y = np.array(seen[-64:]).T
    found = np.array([estimator.estimate(0), estimator.estimate(1000)])
    assert (found >= 0).all()
    fixed, slope = found[0], (found[1] - found[0]) / 1000
    if len(set(x)) == 1:
        assert slope * x[0] + fixed == pytest.approx(max(y.mean(), fixed), rel=1e-9, abs=1e-12)
        return
    # No other non-negative line has a smaller sum of squares.
    best = ((slope * x + fixed - y) ** 2).sum()
    free = np.polynomial.Polynomial.fit(x, y, 1).convert().coef
    candidates = [(0.0, max(0.0, y.mean())), ((x * y).sum() / (x * x).sum(), 0.0)]
    if len(free) == 2 and min(free) >= 0:
        candidates.append((free[1], free[0]))
    assert best <= min(((a * x + b - y) ** 2).sum() for a, b in candidates) * (1 + 1e-6) + 1e-9


def test_sl11_output_tokens_from_elapsed_time():
    assert estimated_output_tokens(1.0, 0.3) == 3
    assert estimated_output_tokens(0.0, 0.3) == 0


@settings(max_examples=100, deadline=None)
@given(
    bytes_per_token=st.floats(1e3, 1e6),
    bandwidth=st.floats(1e8, 1e11),
    fixed=st.floats(0, 1),
    prefill=st.floats(1e-6, 1e-2),
    tokens=st.integers(0, 100_000),
)
def test_sl29_the_cheaper_transport_is_chosen(bytes_per_token, bandwidth, fixed, prefill, tokens):
    estimator = CheapestTransport(CacheTransfer(bytes_per_token, bandwidth, fixed), prefill)
    copied, computed = fixed + tokens * bytes_per_token / bandwidth, tokens * prefill
    assert estimator.choose(tokens) == ("cache" if copied < computed else "tokens")
    assert estimator.estimate(tokens) == pytest.approx(min(copied, computed), rel=1e-12)


def test_sl29_both_regimes_of_one_cluster():
    """Llama-3.1-8B: 128 KiB a token; 10 Gbit/s copy 1.05e-4 s a token after 50 ms."""
    estimator = CheapestTransport(CacheTransfer(131072, 1.25e9, 0.05), 2e-4)
    assert estimator.choose(100) == "tokens"
    assert estimator.choose(10_000) == "cache"
    for _ in range(64):  # a faster GPU than believed
        estimator.observe(1000, 0.05)
    assert estimator.choose(10_000) == "tokens"
    with pytest.raises(ValueError, match="must be positive"):
        CacheTransfer(0, 1.0)


# Powers of two, so that sums are exact and ties are ties.
MODELS = {
    "a": ModelInfo("a", (1024,)),
    "b": ModelInfo("b", (2048, 2048)),
    "c": ModelInfo("c", (512,)),
    "d": ModelInfo("d", (256, 256, 256)),
}


def random_cluster(rng, servers, *, idle=0.15):
    cluster, names = [], itertools.count()
    for number in range(servers):
        num_gpus = rng.choice([1, 2, 4])
        links = {"remote": rng.choice([16.0, 32.0]), "disk": rng.choice([64.0, 128.0]), "host": 512.0}
        instances, free = [], num_gpus - rng.choice([0, 0, 0, 1])
        while free > 0:
            model = rng.choice([m for m in MODELS.values() if m.num_gpus <= free])
            free -= model.num_gpus
            instances.append(
                Instance(
                    f"i{next(names):03d}",
                    model.name,
                    busy=rng.random() > idle,
                    migratable=rng.random() > 0.2,
                    context_tokens=rng.choice([0, 64, 128, 1024]),
                    last_used=rng.choice([1.0, 2.0, 3.0]),
                )
            )
        tiers = {name: rng.choice(["host", "disk"]) for name in MODELS if rng.random() > 0.3}
        migration = MigrationTimeEstimator(rng.choice([0.0, 1 / 64]), rng.choice([0.0, 0.5]))
        io_free_at = rng.choice([0.0, 8.0, 32.0])
        pool = rng.choice([math.inf, math.inf, 1024])
        cluster.append(
            ServerState(
                f"s{number}",
                num_gpus,
                tiers,
                LoadingTimeEstimator(links),
                migration,
                instances,
                io_free_at,
                pool,
            )
        )
    return cluster


def brute_force(model, cluster, now, parallel, staging=False):
    """Every server, every set of victims, every destination of each."""

    def free(server):
        return server.num_gpus - sum(MODELS[i.model].num_gpus for i in server.instances if i.busy)

    def tier(server, name):
        return server.tiers.get(name, "remote")

    def loading(server, name, queued=True):
        waits = queued and tier(server, name) != "host"
        queue = max(0.0, server.io_free_at - now) if waits else 0.0
        return server.loading.estimate(MODELS[name].partition_bytes, tier(server, name), queue_s=queue)

    needed, best = MODELS[model].num_gpus, None
    for number, server in enumerate(cluster):
        if free(server) >= needed:
            plans = [()]
        else:
            victims = [i for i in server.instances if i.busy and i.migratable and i.model != model]
            victims.sort(key=lambda one: one.id)
            others = [other for other in cluster if other is not server]
            plans = []
            for count in range(1, len(victims) + 1):
                for chosen in itertools.combinations(victims, count):
                    if free(server) + sum(MODELS[i.model].num_gpus for i in chosen) < needed:
                        continue
                    plans += [
                        tuple(zip(chosen, to, strict=True)) for to in itertools.product(others, repeat=count)
                    ]
        for plan in plans:
            if server.num_gpus < needed:
                continue
            times, fits = [], True
            for place, (victim, to) in enumerate(plan):
                taken = sum(MODELS[v.model].num_gpus for v, other in plan if other is to)
                fits &= taken <= free(to)
                waits = 0.0
                if tier(to, victim.model) != "host":
                    for earlier, other in plan[:place]:
                        if other is to and tier(to, earlier.model) != "host":
                            waits += loading(to, earlier.model, queued=False)
                times.append(waits + loading(to, victim.model) + to.migration.estimate(victim.context_tokens))
            if fits:
                moved = max(times, default=0.0) if parallel else sum(times)
                start = loading(server, model) + moved
                if staging and plan and MODELS[model].num_bytes <= server.host_cache_bytes:
                    from_host = server.loading.estimate(MODELS[model].partition_bytes, "host")
                    start = max(loading(server, model), moved + from_host)
                key = (start, sum(times), len(times), number)
                best = key if best is None or key < best else best
    return best


@pytest.mark.parametrize(("parallel", "staging"), [(True, False), (False, False), (True, True)])
def test_sl12_equals_brute_force_on_small_clusters(parallel, staging):
    rng = random.Random(7)
    migrated = waited = sooner = 0
    for _ in range(800):
        cluster = random_cluster(rng, rng.choice([1, 2, 3, 4]), idle=0.0)
        model = rng.choice(list(MODELS))
        policy = StartupTimePolicy(MODELS, parallel_migrations=parallel, staging=staging)
        found = policy.allocate(model, cluster, now=4.0)
        best = brute_force(model, cluster, 4.0, parallel, staging)
        if best is None:
            assert found is None
            waited += 1
            continue
        number = int(found.server[1:])
        total = sum(one.estimated_s for one in found.migrations)
        assert (found.estimated_startup_s, total, len(found.migrations), number) == best
        migrated += bool(found.migrations)
        if staging:  # SL-28: never later
            plain = StartupTimePolicy(MODELS).allocate(model, cluster, now=4.0)
            assert found.estimated_startup_s <= plain.estimated_startup_s
            sooner += found.estimated_startup_s < plain.estimated_startup_s
        else:
            assert not found.staged
        check_plan(found, cluster, model)
    assert migrated > 20
    assert waited > 20
    assert sooner > 20 or not staging


def check_plan(found, cluster, model):
    """Victims leave enough room, never share a GPU, and are other models' busy instances."""
    by_id = {server.id: server for server in cluster}
    server = by_id[found.server]
    here = {one.id: one for one in server.instances}
    room = {
        one.id: one.num_gpus - sum(MODELS[i.model].num_gpus for i in one.instances if i.busy)
        for one in cluster
    }
    for move in found.migrations:
        victim = here[move.instance]
        assert victim.busy
        assert victim.migratable
        assert victim.model != model
        assert move.source == found.server != move.destination
        room[move.destination] -= MODELS[victim.model].num_gpus
        room[found.server] += MODELS[victim.model].num_gpus
    assert all(count >= 0 for count in room.values())
    gone = {move.instance for move in found.migrations} | set(found.evictions)
    left = sum(MODELS[one.model].num_gpus for one in server.instances if one.id not in gone)
    assert server.num_gpus - left >= MODELS[model].num_gpus


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 10**6), model=st.sampled_from(sorted(MODELS)))
def test_sl12_idle_instances_are_reused_or_evicted_oldest_first(seed, model):
    cluster = random_cluster(random.Random(seed), 4, idle=0.5)
    snapshot = repr(cluster)
    found = StartupTimePolicy(MODELS).allocate(model, cluster, now=4.0)
    assert repr(cluster) == snapshot  # pure
    idle = [
        (server, one) for server in cluster for one in server.instances if one.model == model and not one.busy
    ]
    if idle:
        assert (found.server, found.reuse) == (idle[0][0].id, idle[0][1].id)
        assert (found.tier, found.estimated_startup_s) == ("device", 0.0)
        return
    if found is None:
        return
    check_plan(found, cluster, model)
    server = next(one for one in cluster if one.id == found.server)
    ages = [one.last_used for one in server.instances if one.id in found.evictions]
    kept = [one.last_used for one in server.instances if not one.busy and one.id not in found.evictions]
    assert not kept or not ages or max(ages) <= min(kept)


def test_sl12_other_policies_follow_their_rules():
    def server(name, tier, busy):
        instances = [Instance("x" + name, "c")] if busy else []
        return ServerState(
            name,
            1,
            {"a": tier} if tier else {},
            LoadingTimeEstimator(BANDWIDTH),
            MigrationTimeEstimator(),
            instances,
        )

    cluster = [server("s0", None, False), server("s1", "disk", False), server("s2", "host", True)]
    assert FirstAvailablePolicy(MODELS).allocate("a", cluster, 0.0).server == "s0"
    assert LocalityPolicy(MODELS).allocate("a", cluster, 0.0) is None
    assert StartupTimePolicy(MODELS, migration=False).allocate("a", cluster, 0.0).server == "s1"
    cluster[2].instances.clear()
    assert LocalityPolicy(MODELS).allocate("a", cluster, 0.0).server == "s2"
    drawn = {RandomPolicy(MODELS, seed=seed).allocate("a", cluster, 0.0).server for seed in range(40)}
    assert drawn == {"s0", "s1", "s2"}
    for policy in (FirstAvailablePolicy, LocalityPolicy, RandomPolicy, StartupTimePolicy):
        assert policy(MODELS).allocate("b", cluster, 0.0) is None  # no server has two GPUs
        assert policy(MODELS).allocate("a", [], 0.0) is None


def big_cluster(rng, servers=100):
    models = {
        f"m{n}": ModelInfo(f"m{n}", (rng.randrange(4, 30) * 10**9,) * rng.choice([1, 1, 2, 4]))
        for n in range(200)
    }
    cluster, names = [], itertools.count()
    for number in range(servers):
        free, instances = 4 - (rng.random() < 0.1), []
        while free > 0:
            model = rng.choice([one for one in models.values() if one.num_gpus <= free])
            free -= model.num_gpus
            instances.append(Instance(f"i{next(names)}", model.name, context_tokens=rng.randrange(4096)))
        tiers = {name: rng.choice(["host", "disk", "disk"]) for name in rng.sample(sorted(models), 40)}
        estimators = LoadingTimeEstimator(BANDWIDTH), MigrationTimeEstimator()
        cluster.append(ServerState(f"s{number}", 4, tiers, *estimators, instances, rng.choice([0.0, 5.0])))
    return models, cluster


def calls_of(work, *arguments):
    """Python and C calls that ``work`` makes: its cost on any machine, however busy."""
    count = 0

    def seen(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(seen)
    try:
        work(*arguments)
    finally:
        sys.setprofile(None)
    return count


def test_sl13_a_decision_takes_few_calls():
    """Its milliseconds are measured by benchmarks/vllm_serverless_loader_scheduler.py."""
    rng = random.Random(1)
    calls = []
    for _ in range(5):
        models, cluster = big_cluster(rng)
        policy = StartupTimePolicy(models)
        calls += [calls_of(policy.allocate, name, cluster, 1.0) for name in rng.sample(sorted(models), 20)]
    assert statistics.median(calls) < 8_000
    assert max(calls) < 25_000
