"""Routers in simulated time; the engine with stalling, failing and blocking models (QV-10 to 12, QV-14)."""

from __future__ import annotations

import itertools
import pickle
import threading
import time
from concurrent.futures import CancelledError, wait

import numpy as np
import pytest
import torch
from quiver_reference import random_edges
from torch_geometric.nn import GraphSAGE

from pyg_quiver import (
    CalibrationProfile,
    CostModel,
    CSCTopology,
    EarliestFinishRouter,
    EngineOverloaded,
    InferenceEngine,
    PlacementPlan,
    QuiverFeatureStore,
    QuiverSampler,
    ThresholdRouter,
    calibrate,
)

pytestmark = pytest.mark.pyg


@pytest.fixture(scope="module")
def topology() -> CSCTopology:
    return CSCTopology.from_edge_index(random_edges(500, 6000, 9), 500)


@pytest.fixture(scope="module")
def features() -> torch.Tensor:
    return torch.randn(500, 12, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model() -> GraphSAGE:
    torch.manual_seed(0)
    return GraphSAGE(12, 16, num_layers=2, out_channels=3).eval()


@pytest.fixture
def sampler(topology) -> QuiverSampler:
    return QuiverSampler(topology, [5, 4], seed=11)


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("pyg_quiver-")]


class Gate:
    """A model that waits until it is opened."""

    def __init__(self, model):
        self.model, self.open, self.entered = model, threading.Event(), threading.Event()

    def __call__(self, x, edge_index):
        self.entered.set()
        assert self.open.wait(20)
        return self.model(x, edge_index)


# Routers


def test_qv10_fit_recovers_a_line_among_outliers():
    generator = np.random.default_rng(0)
    psgs = np.repeat([10.0, 100, 1e3, 1e4, 1e5], 20)
    seconds = 2e-4 + 5e-8 * psgs + generator.exponential(1e-6, psgs.size)
    seconds[::15] *= 20
    fitted = CostModel.fit(psgs, seconds)
    assert fitted.slope_s == pytest.approx(5e-8, rel=0.02)
    assert fitted.intercept_s == pytest.approx(2e-4, rel=0.05)
    with pytest.raises(ValueError, match="two sizes or more, got 1"):
        CostModel.fit([1, 1], [1, 2])


def test_qv10_threshold_is_the_crossing():
    profile = CalibrationProfile(
        {"cpu": CostModel(1e-5, 8e-8), "gpu": CostModel(6e-4, 2e-9)}, {"gpu": "A"},
        {"cpu": CostModel(1e-5, 2e-7), "gpu": CostModel(8e-4, 4e-9)},
    )  # fmt: skip
    for prefer, models in (("throughput", profile.cost), ("latency", profile.worst)):
        router = ThresholdRouter.from_profile(profile, prefer)
        at = router.threshold
        assert models["cpu"].predict(at) == pytest.approx(models["gpu"].predict(at))
        assert router.choose(at * 0.99, 0.0, {}) == "cpu"
        assert router.choose(at * 1.01, 0.0, {}) == "gpu"
    faster = CalibrationProfile({"cpu": CostModel(1e-3, 1e-7), "gpu": CostModel(1e-4, 1e-9)}, {})
    assert ThresholdRouter.from_profile(faster).threshold == 0
    slower = CalibrationProfile({"cpu": CostModel(1e-5, 1e-9), "gpu": CostModel(1e-4, 1e-8)}, {})
    assert ThresholdRouter.from_profile(slower).threshold == float("inf")
    with pytest.raises(ValueError, match="no route 'tpu'"):
        ThresholdRouter.from_profile(profile, above="tpu")


def test_qv10_calibrate_and_stale_profiles(tmp_path, topology, sampler):
    profile = calibrate({"cpu": sampler}, batch_sizes=(1, 64, 2048), repeats=7)
    assert profile.cost["cpu"].slope_s > 0
    profile.save(tmp_path / "profile.json")
    loaded = CalibrationProfile.load(tmp_path / "profile.json")
    assert loaded == profile
    loaded.require(profile.context)
    with pytest.raises(ValueError, match=r"profile was calibrated for gpu='.*', this is gpu='B'"):
        loaded.require({**profile.context, "gpu": "B"})
    other = QuiverSampler(CSCTopology.from_edge_index(random_edges(500, 6000, 10), 500), [5, 4])
    from pyg_quiver.routing import calibration_context

    with pytest.raises(ValueError, match=r"calibrated for cpu\.graph="):
        loaded.require(calibration_context({"cpu": other}))
    with pytest.raises(ValueError, match="got 0 samplers, 11 sizes and repeats=30"):
        calibrate({})


def simulate(router, cost, arrivals, work):
    """Latencies of batches in virtual time: one server a route, in order of arrival."""
    free_at = dict.fromkeys(cost, 0.0)
    latency = []
    for now, psgs in zip(arrivals, work, strict=True):
        route = router.choose(psgs, now, free_at)
        free_at[route] = max(now, free_at[route]) + cost[route].predict(psgs)
        latency.append(free_at[route] - now)
    return np.percentile(latency, 99)


@pytest.mark.parametrize("rate", [200, 500, 1000, 1500, 2000, 3000])
def test_qv14_earliest_finish_is_never_worse_than_the_best_single_policy(rate):
    cost = {"cpu": CostModel(2e-5, 85e-9), "gpu": CostModel(6e-4, 2.5e-9)}
    generator = np.random.default_rng(rate)
    arrivals = np.cumsum(generator.exponential(1 / rate, 20_000))
    work = 900 * np.exp(generator.normal(1.0, 1.0, 20_000))
    threshold = ThresholdRouter((6e-4 - 2e-5) / (85e-9 - 2.5e-9))
    others = [ThresholdRouter(float("inf")), ThresholdRouter(-1.0), threshold]
    best = min(simulate(router, cost, arrivals, work) for router in others)
    assert simulate(EarliestFinishRouter(cost), cost, arrivals, work) <= 1.05 * best


def test_qv14_earliest_finish_counts_the_queue():
    router = EarliestFinishRouter({"cpu": CostModel(0, 1e-6), "gpu": CostModel(1e-4, 1e-8)})
    assert router.choose(10, 0.0, {"cpu": 0.0, "gpu": 0.0}) == "cpu"
    assert router.choose(10, 0.0, {"cpu": 1.0, "gpu": 0.0}) == "gpu"
    assert router.choose(1e6, 0.0, {"cpu": 0.0, "gpu": 0.0}) == "gpu"
    with pytest.raises(ValueError, match="no route"):
        router.choose(1, 0.0, {"tpu": 0.0})


# Engine


def test_qv11_qv12_answers_do_not_depend_on_batch_mates(model, features, sampler):
    generator = torch.Generator().manual_seed(3)
    requests = [torch.randint(0, 500, (int(n),), generator=generator) for n in torch.randint(1, 9, (60,))]
    with InferenceEngine(model, features, sampler, max_batch_psgs=2000, max_wait_ms=5) as engine:
        futures = [engine.submit(node, request_id=i) for i, node in enumerate(requests)]
        responses = [future.result(30) for future in futures]
        for i, (node, response) in enumerate(zip(requests, responses, strict=True)):
            assert response.request_id == i
            assert response.route == "cpu"
            assert response.output.shape == (node.numel(), 3)
            assert torch.allclose(response.output, engine.infer(node, request_id=i), atol=1e-5)
            assert response.queue_s >= 0
            assert response.service_s > 0
        stats = engine.stats()
        assert (stats.accepted, stats.completed, stats.failed, stats.rejected) == (60, 60, 0, 0)
        assert stats.per_route == {"cpu": 60}
        assert stats.waiting == 0
        longest = max(response.queue_s + response.service_s for response in responses)
        assert 0 < stats.latency_s["p50"] <= stats.latency_s["p99"] <= stats.latency_s["p99.9"] <= longest
        assert len(threads()) == 2
    assert threads() == []


def test_qv12_every_route_gives_the_same_answer(model, features, topology):
    routes = {
        "cpu": QuiverSampler(topology, [5, 4], seed=1, backend="numba"),
        "gpu": QuiverSampler(topology, [5, 4], seed=1, backend="torch"),  # another sampler, the same bits
    }
    node = torch.tensor([3, 77])
    with InferenceEngine(model, features, routes, router=ThresholdRouter(float("inf"))) as engine:
        a = engine.submit(node, request_id=5).result(30)
    with InferenceEngine(model, features, routes, router=ThresholdRouter(-1.0)) as engine:
        b = engine.submit(node, request_id=5).result(30)
    assert (a.route, b.route) == ("cpu", "gpu")
    assert torch.allclose(a.output, b.output, atol=1e-5)
    other = QuiverSampler(topology, [5, 4], seed=2)
    with InferenceEngine(model, features, other) as engine:
        assert not torch.allclose(engine.infer(node, request_id=5), a.output, atol=1e-5)


def test_qv11_all_neighbours_give_the_full_graph_answer(model, features, topology):
    full = model(
        features,
        torch.stack([topology.row, torch.repeat_interleave(torch.arange(500), topology.in_degree())]),
    )
    store = QuiverFeatureStore()
    store.put_tensor(features, group_name=None, attr_name="x", index=None)
    with InferenceEngine(model, store, QuiverSampler(topology, [-1, -1]), max_batch_psgs=1e4) as engine:
        futures = [engine.submit(torch.tensor([v, v + 1])) for v in range(0, 100, 2)]
        for v, future in zip(range(0, 100, 2), futures, strict=True):
            assert torch.allclose(future.result(30).output, full[[v, v + 1]], atol=1e-5)


def test_qv11_overload_is_refused_with_a_time_to_retry(model, features, sampler):
    gate = Gate(model)
    with InferenceEngine(gate, features, sampler, max_queue=4, max_batch_psgs=1.0, max_wait_ms=0) as engine:
        accepted = [engine.submit(torch.tensor([0]))]
        assert gate.entered.wait(10)
        refused = None
        for _ in range(20):
            try:
                accepted.append(engine.submit(torch.tensor([1])))
            except EngineOverloaded as error:
                refused = error
                break
            time.sleep(0.01)
        assert refused is not None
        assert refused.retry_after_s > 0
        assert (engine.stats().rejected, engine.stats().waiting) == (1, 4)
        gate.open.set()
        assert all(future.result(30) for future in accepted)


def test_qv11_deadlines_pass_while_waiting_and_while_running(model, features, sampler):
    gate = Gate(model)
    with InferenceEngine(
        gate, features, sampler, max_batch_psgs=1.0, max_wait_ms=0, deadline_ms=60
    ) as engine:
        running = engine.submit(torch.tensor([0]))
        assert gate.entered.wait(10)
        waiting = [engine.submit(torch.tensor([v])) for v in range(3)]
        patient = engine.submit(torch.tensor([1]), deadline_ms=60_000)
        for future in (running, *waiting):
            with pytest.raises(TimeoutError, match="missed its deadline"):
                future.result(5)
        gate.open.set()
        assert patient.result(30).output.shape == (1, 3)
        assert engine.stats().failed == 4


def test_qv11_a_failing_model_fails_only_its_batch(model, features, sampler):
    def sometimes(x, edge_index):
        if x.shape[0] and bool((x[0] == features[13]).all()):
            raise ArithmeticError("bad luck")
        return model(x, edge_index)

    with InferenceEngine(sometimes, features, sampler, max_batch_psgs=1.0) as engine:
        futures = [engine.submit(torch.tensor([v])) for v in (12, 13, 14)]
        assert futures[0].result(30).output.shape == (1, 3)
        with pytest.raises(ArithmeticError, match="bad luck"):
            futures[1].result(30)
        assert futures[2].result(30).output.shape == (1, 3)
        assert engine.stats().failed == 1


def test_qv11_a_worker_that_dies_names_itself_in_its_futures(model, features, sampler):
    def fatal(x, edge_index):
        raise SystemExit("out of memory")

    engine = InferenceEngine(fatal, features, sampler, max_batch_psgs=1.0, max_wait_ms=0)
    future = engine.submit(torch.tensor([1]))
    with pytest.raises(RuntimeError, match="worker pyg_quiver-cpu died: SystemExit"):
        future.result(30)
    for _ in range(500):
        if threads() == ["pyg_quiver-dispatch"]:
            break
        time.sleep(0.01)
    with pytest.raises(RuntimeError, match="all workers died: pyg_quiver-cpu"):
        engine.submit(torch.tensor([1]))
    engine.close()
    assert threads() == []


def test_qv11_cancellation_before_the_batch_starts(model, features, sampler):
    gate = Gate(model)
    with InferenceEngine(gate, features, sampler, max_batch_psgs=1.0, max_wait_ms=0) as engine:
        first = engine.submit(torch.tensor([0]))
        assert gate.entered.wait(10)
        waiting = [engine.submit(torch.tensor([v])) for v in range(5)]
        assert waiting[-1].cancel()
        assert not first.cancel()
        gate.open.set()
        wait([first, *waiting], 30)
        with pytest.raises(CancelledError):
            waiting[-1].result()
        assert all(future.result().output.shape == (1, 3) for future in waiting[:-1])


@pytest.mark.parametrize("drain", [True, False])
def test_qv11_shutdown_resolves_every_future_once(model, features, sampler, drain):
    engine = InferenceEngine(model, features, sampler, max_batch_psgs=500, max_wait_ms=20)
    futures = [engine.submit(torch.tensor([v])) for v in range(50)]
    engine.close(drain=drain)
    engine.close()
    assert all(future.done() for future in futures)
    failed = [future for future in futures if future.exception() is not None]
    assert not drain or not failed
    for future in failed:
        with pytest.raises(RuntimeError, match="InferenceEngine is closed"):
            future.result()
    with pytest.raises(RuntimeError, match="InferenceEngine is closed"):
        engine.submit(torch.tensor([0]))
    assert threads() == []


def test_qv11_close_with_a_blocked_model_fails_what_is_left(model, features, sampler):
    gate = Gate(model)
    engine = InferenceEngine(gate, features, sampler, max_batch_psgs=1.0, max_wait_ms=0)
    futures = [engine.submit(torch.tensor([v])) for v in range(4)]
    assert gate.entered.wait(10)
    engine.close(timeout_s=0.2)
    for future in futures:
        with pytest.raises(RuntimeError, match="InferenceEngine is closed"):
            future.result(5)
    gate.open.set()
    for _ in range(100):
        if not threads():
            break
        time.sleep(0.02)
    assert threads() == []


def test_qv11_a_hub_with_every_neighbour_runs_alone(model, features):
    edges = torch.cat(
        [random_edges(500, 2000, 1), torch.stack([torch.arange(500), torch.zeros(500, dtype=torch.int64)])], 1
    )
    sampler = QuiverSampler(CSCTopology.from_edge_index(edges, 500), [-1, -1])
    with InferenceEngine(model, features, sampler, max_batch_psgs=50) as engine:
        hub, other = engine.submit(torch.tensor([0])), engine.submit(torch.tensor([499]))
        assert hub.result(30).psgs > 500
        assert other.result(30).output.shape == (1, 3)


def test_qv23_overload_is_answered_with_fewer_neighbours_and_says_so(model, features, topology, sampler):
    fewer = QuiverSampler(topology, [2, 1], seed=11)
    gate = Gate(model)
    with InferenceEngine(
        gate, features, sampler, max_batch_psgs=200, max_wait_ms=0, degraded=fewer, degrade_after_ms=0.0
    ) as engine:
        first = engine.submit(torch.tensor([0]), request_id=0)
        assert gate.entered.wait(10)
        waiting = [engine.submit(torch.tensor([v]), request_id=v) for v in range(1, 40)]
        gate.open.set()
        answers = [future.result(30) for future in [first, *waiting]]
        degraded = [answer for answer in answers if answer.degraded]
        assert engine.stats().degraded == len(degraded) > 0
        for answer in answers:
            again = engine.infer(
                torch.tensor([answer.request_id]), request_id=answer.request_id, degraded=answer.degraded
            )
            assert torch.allclose(answer.output, again, atol=1e-5)
    with InferenceEngine(model, features, sampler) as engine:
        assert not engine.submit(torch.tensor([0])).result(30).degraded
        with pytest.raises(ValueError, match="no degraded samplers"):
            engine.infer(torch.tensor([0]), degraded=True)
    with pytest.raises(ValueError, match=r"degraded has routes \['other'\], samplers \['cpu'\]"):
        InferenceEngine(model, features, sampler, degraded={"other": fewer})


def test_qv23_degrading_answers_more_in_time_at_twice_the_capacity(features, topology):
    """Work costs time by the edge; the objective is three times the service of one full batch."""

    def slow(x, edge_index):
        time.sleep(1e-4 * edge_index.shape[1])
        return x[:, :1]

    full, fewer = QuiverSampler(topology, [8, 8]), QuiverSampler(topology, [3, 2])
    work = float(full.psgs().mean())
    gap = 1e-4 * work / 2  # arrivals at twice the rate that full fan-outs can serve

    def answered_in_time(degraded):
        with InferenceEngine(
            slow, features, full, max_batch_psgs=work * 8, max_queue=40, max_wait_ms=0,
            degraded=degraded, degrade_after_ms=1e3 * gap * 8,
        ) as engine:  # fmt: skip
            futures, sent = [], []
            for i in range(200):
                time.sleep(gap)
                try:
                    futures.append(engine.submit(torch.tensor([i])))
                    sent.append(i)
                except EngineOverloaded:
                    continue
            answers = [future.result(30) for future in futures]
        return sum(answer.queue_s + answer.service_s <= gap * 48 for answer in answers)

    refusing, degrading = answered_in_time(None), answered_in_time(fewer)
    assert degrading >= 1.3 * refusing


def test_qv11_an_idle_route_does_not_let_a_busy_one_collect_requests(model, features, topology, sampler):
    gate = Gate(model)
    routes = {"cpu": sampler, "gpu": QuiverSampler(topology, [5, 4], seed=11)}
    with InferenceEngine(
        gate, features, routes, router=ThresholdRouter(-1.0), max_queue=5, max_batch_psgs=1.0, max_wait_ms=0
    ) as engine:
        accepted = []
        while len(accepted) < 100:
            try:
                accepted.append(engine.submit(torch.tensor([0])))
            except EngineOverloaded:
                break
            time.sleep(0.005)
        assert len(accepted) <= 5 + 2 + 1  # waiting, running and next at the busy route
        gate.open.set()
        assert {future.result(30).route for future in accepted} == {"gpu"}


def test_several_workers_of_a_route_run_at_once_and_predictions_learn(model, features, topology, sampler):
    together = threading.Barrier(2, timeout=30)
    batches = itertools.count()

    def meet(x, edge_index):
        # Only the first two: how many batches the rest make depends on how fast they are taken.
        if next(batches) < 2:
            together.wait()
        return model(x, edge_index)

    cost = EarliestFinishRouter({"cpu": CostModel(1e-6, 0.0)})
    with InferenceEngine(
        meet, features, {"cpu": sampler}, router=cost, workers={"cpu": 2}, max_batch_psgs=1.0, max_wait_ms=0
    ) as engine:
        assert sorted(threads()) == ["pyg_quiver-cpu", "pyg_quiver-cpu-1", "pyg_quiver-dispatch"]
        futures = [engine.submit(torch.tensor([v])) for v in range(6)]
        assert all(future.result(200).output.shape == (1, 3) for future in futures)
        # The cost model was far too low: it has been raised by what batches took.
        assert engine._predict("cpu", 1.0) > cost.cost["cpu"].predict(1.0)
    with pytest.raises(ValueError, match="workers is"):
        InferenceEngine(model, features, sampler, workers={"gpu": 1})
    assert threads() == []


def test_reload_changes_later_answers_and_drops_none(model, features, sampler, topology):
    torch.manual_seed(1)
    newer = GraphSAGE(12, 16, num_layers=2, out_channels=3).eval()
    with InferenceEngine(model, features, sampler, max_batch_psgs=200, max_wait_ms=0) as engine:
        before = [engine.submit(torch.tensor([v]), request_id=0) for v in range(30)]
        engine.reload(model=newer, features=features * 2)
        after = engine.submit(torch.tensor([4]), request_id=0).result(30)
        assert all(future.result(30).output.shape == (1, 3) for future in before)
        assert torch.allclose(after.output, engine.infer(torch.tensor([4])), atol=1e-5)
        with pytest.raises(ValueError, match="samplers has routes"):
            engine.reload(samplers={"other": sampler})


def test_engine_errors(model, features, sampler):
    with pytest.raises(ValueError, match="pass a router"):
        InferenceEngine(model, features, {"a": sampler, "b": sampler})
    with pytest.raises(ValueError, match="router chooses 'gpu', but the samplers are cpu"):
        InferenceEngine(model, features, {"cpu": sampler}, router=ThresholdRouter(1.0))
    with pytest.raises(ValueError, match="max_queue must be at least 1"):
        InferenceEngine(model, features, sampler, max_queue=0)
    with InferenceEngine(model, features, sampler) as engine:
        with pytest.raises(IndexError, match=r"node 500 is out of range \[0, 500\)"):
            engine.submit(torch.tensor([500]))
        with pytest.raises(ValueError, match="one or more node ids"):
            engine.submit(torch.tensor([], dtype=torch.int64))
    assert threads() == []


def test_engine_refuses_what_it_could_not_answer(model, features, topology, sampler, tmp_path):
    with pytest.raises(ValueError, match="features has 20 rows, but the graph has 500 nodes"):
        InferenceEngine(model, features[:20], sampler)
    with pytest.raises(ValueError, match="features has no attribute 'x'"):
        InferenceEngine(model, QuiverFeatureStore(), sampler)
    with pytest.raises(ValueError, match="deadline_ms not negative"):
        InferenceEngine(model, features, sampler, deadline_ms=-1)
    with InferenceEngine(lambda x, edge_index: x[:1], features, sampler) as engine:
        with pytest.raises(
            ValueError, match=r"node is torch.float32 \(1,\); it must be one or more node ids"
        ):
            engine.submit(torch.tensor([1.5]))
        with pytest.raises(TypeError, match="request_id is 'first'; it must be an integer"):
            engine.submit(torch.tensor([1]), request_id="first")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="deadline_ms is -3"):
            engine.submit(torch.tensor([1]), deadline_ms=-3)
        with pytest.raises(ValueError, match="the model returned 1 rows for 2 requested nodes"):
            engine.submit(torch.tensor([1, 2])).result(30)
    other = tmp_path / "other.json"
    other.write_text("no profile")
    with pytest.raises(ValueError, match="not a calibration profile"):
        CalibrationProfile.load(other)
    with pytest.raises(ValueError, match="not a placement plan"):
        PlacementPlan.load(other)


def test_qv11_a_refusal_reaches_a_caller_in_another_process():
    refused = pickle.loads(pickle.dumps(EngineOverloaded("3 requests are waiting", 0.25)))
    assert str(refused) == "3 requests are waiting"
    assert refused.retry_after_s == 0.25


def test_sampler_refuses_bad_fanouts_and_nodes(topology):
    for value in (15, "15"):
        with pytest.raises(TypeError, match=r"it must give a number for each hop, as \[15, 10, 5\]"):
            QuiverSampler(topology, value)
    for fanouts, message in (([3, -2], r"num_neighbors\[1\] is -2"), (["a"], r"num_neighbors\[0\] is 'a'")):
        with pytest.raises(ValueError, match=message):
            QuiverSampler(topology, fanouts)
    with pytest.raises(ValueError, match="num_threads is 0"):
        QuiverSampler(topology, [2], num_threads=0)
    for node in (torch.tensor([1.5]), torch.tensor([[1]]), torch.tensor([True])):
        with pytest.raises(ValueError, match=r"nodes are .*must be integers, \[n\]"):
            QuiverSampler(topology, [2]).sample(node)
    with pytest.raises(ValueError, match=r"edge_index is torch\.float32"):
        CSCTopology.from_edge_index(torch.rand(2, 3))
