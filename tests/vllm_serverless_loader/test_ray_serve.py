"""A local cluster of Ray Serve with simulated engines: placement by bytes, reuse, migration (SL-18)."""

from __future__ import annotations

import asyncio
import json
import os

import pytest
import torch

from vllm_serverless_loader import write_partition
from vllm_serverless_loader.migration.simulated_engine import next_token
from vllm_serverless_loader.ray_serve.config import ClusterConfig

pytestmark = [pytest.mark.ray, pytest.mark.slow]

PROMPT = list(range(30))
MIB = 1 << 20


def expected(tokens):
    everything = list(PROMPT)
    for _ in range(tokens):
        everything.append(next_token(everything))
    return everything[len(PROMPT) :]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for number, name in enumerate(("a", "b", "c")):
        write_partition(root / name, {"w": torch.full((2 * MIB,), number, dtype=torch.uint8)})
    return root


@pytest.fixture(scope="module")
def cluster():
    """Three nodes on this machine, two of them with two GPUs as far as Ray knows."""
    import ray
    from ray.cluster_utils import Cluster

    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": 2})
    made.add_node(num_cpus=1, num_gpus=2)
    made.add_node(num_cpus=1)
    ray.init(address=made.address, log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.fixture
def ingress(cluster, folder):
    """The application: ``a`` needs both GPUs of a node."""
    import ray
    from ray import serve

    from vllm_serverless_loader.ray_serve.app import CONTROLLER, build_app

    gpus = {"a": 2, "b": 1, "c": 1}
    engine = {"step_s": 0.01}
    config = {
        "models": {
            name: {"path": str(folder / name), "num_gpus": count, "engine": engine}
            for name, count in gpus.items()
        },
        "host_cache_bytes": 5 * MIB,  # two of three models
        "chunk_bytes": MIB // 2,
        "engine": "simulated",
        "keep_alive_s": 0.2,
        "requests_per_instance": 1,
    }
    handle = serve.run(build_app(config), name="serverless", route_prefix="/")
    yield handle.options(stream=True)
    controller = ray.get_actor(CONTROLLER)
    ray.get(controller.close.remote())
    ray.kill(controller)
    serve.delete("serverless")


async def ask(ingress, model, tokens):
    """How the model was started, and the tokens."""
    start, ids = {}, []
    async for item in ingress.generate.remote(model, PROMPT, {"max_tokens": tokens}):
        if "start" in item:
            start = item["start"]
        else:
            ids.append(item["token"])
    return start, ids


async def controller_status():
    import ray

    from vllm_serverless_loader.ray_serve.app import CONTROLLER

    return await ray.get_actor(CONTROLLER).status.remote()


async def until(condition):
    """Wait for the controller's status to be so."""
    for _ in range(200):
        status = await controller_status()
        if condition(status):
            return status
        await asyncio.sleep(0.05)
    raise AssertionError(status)


def running(status):
    """Names of the running models by server."""
    return [sorted(one["instances"].values()) for one in status["servers"].values()]


def test_sl18_models_start_where_their_bytes_are_and_move_to_make_room(ingress):
    async def run():
        first, ids = await ask(ingress, "a", 5)
        assert ids == expected(5)
        assert first["tier"] == "disk"
        assert first["estimated_s"] > 0
        again, _ = await ask(ingress, "a", 5)
        assert (again["tier"], again["server"], again["estimated_s"]) == ("device", first["server"], 0.0)
        await until(lambda status: running(status) == [[], []])
        placed, _ = await ask(ingress, "a", 5)
        assert (placed["tier"], placed["server"]) == ("host", first["server"])
        await until(lambda status: running(status) == [[], []])

        # One b on each node leaves no node with two free GPUs: one of them has to move.
        long = [asyncio.ensure_future(ask(ingress, "b", 900))]
        await until(lambda status: sorted(running(status)) == [[], ["b"]])
        short = asyncio.ensure_future(ask(ingress, "c", 150))
        await until(lambda status: any("c" in names for names in running(status)))
        long.append(asyncio.ensure_future(ask(ingress, "b", 900)))
        await until(lambda status: sum(names.count("b") for names in running(status)) == 2)
        await short
        await until(lambda status: running(status) == [["b"], ["b"]])
        moved, ids = await ask(ingress, "a", 5)
        assert ids == expected(5)
        assert moved["migrations"] == 1
        # Both that are still running, however slow this machine is, are on one server.
        assert sum("b" in names for names in running(await controller_status())) <= 1
        for other in long:
            _, ids = await other
            assert ids == expected(900)
        await until(lambda status: running(status) == [[], []])

    asyncio.run(run())


def test_sl18_config_is_checked(tmp_path):
    shown = ClusterConfig.parse("examples/serverless_cluster.yaml")
    assert shown.model_infos()["small"].num_gpus == 1
    assert shown.host_cache_bytes == 8 << 30
    path = tmp_path / "cluster.yaml"
    path.write_text(json.dumps({"models": {"a": {"path": "m"}}, "polcy": "random"}))
    with pytest.raises(ValueError, match="unknown key 'polcy'; did you mean 'policy'"):
        ClusterConfig.parse(path)
    path.write_text(json.dumps({"models": {"a": {"path": "m"}}}))
    assert ClusterConfig.parse(path).models["a"].path == str(tmp_path / "m")
    for bad, text in (
        ({"models": {}}, "models is empty"),
        ({"models": {"a": {}}}, "models.a needs a path"),
        ({"models": {"a": {"path": "m"}}, "policy": "best"}, "policy must be one of"),
        ({"models": {"a": {"path": "m"}}, "engine": "other"}, "engine must be vllm or simulated"),
    ):
        with pytest.raises(ValueError, match=text):
            ClusterConfig.parse(bad)


def test_sl18_router_groups_by_startup_time():
    from vllm_serverless_loader import LoadingTimeEstimator, ModelInfo
    from vllm_serverless_loader.ray_serve.router import ranks, startup_stats

    assert ranks([(3.0, "c"), (1.0, "a"), (1.25, "b"), (1.5, "d")], 0.25) == [["a", "b"], ["d"], ["c"]]
    assert ranks([(float("inf"), "x"), (1.0, "a"), (float("inf"), "y")], 0.0) == [["a"], ["x", "y"]]
    assert ranks([], 1.0) == []
    models = {name: ModelInfo(name, (8,)) for name in "abcd"}
    loading = LoadingTimeEstimator({"remote": 1.0, "disk": 2.0, "host": 4.0})
    tiers = {"a": "device", "b": "host", "c": "disk"}
    stats = startup_stats(models, tiers, loading, queue_s=10.0)
    assert stats == {"startup_s": {"a": 0.0, "b": 2.0, "c": 14.0, "d": 18.0}}


def test_sl18_own_deployments_route_by_startup_time(cluster, tmp_path):
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    from vllm_serverless_loader import LoadingTimeEstimator, ModelInfo
    from vllm_serverless_loader.ray_serve.router import StartupTimeRequestRouter, startup_stats

    @serve.deployment(
        num_replicas=2,
        ray_actor_options={"num_cpus": 0},
        request_router_config=RequestRouterConfig(
            request_router_class=StartupTimeRequestRouter,
            request_router_kwargs={"tolerance_s": 0.01},
            request_routing_stats_period_s=0.1,
        ),
    )
    class Replica:
        """Holds one of two models in host memory: the first replica ``a``, the second ``b``."""

        def __init__(self, folder):
            for name in ("a", "b"):
                try:
                    os.mkdir(os.path.join(folder, name))
                except FileExistsError:
                    continue
                self.home = name
                break

        def record_routing_stats(self):
            models = {name: ModelInfo(name, (10**9,)) for name in ("a", "b")}
            loading = LoadingTimeEstimator({"remote": 1e9, "disk": 2e9, "host": 1e10})
            return startup_stats(models, {self.home: "host"}, loading)

        def __call__(self):
            return self.home

    handle = serve.run(Replica.bind(str(tmp_path)), name="own", route_prefix="/own")

    async def run():
        async def homes(model):
            return {await handle.options(multiplexed_model_id=model).remote() for _ in range(6)}

        for model in ("a", "b"):
            for _ in range(200):  # until both replicas have reported
                if await homes(model) == {model}:
                    break
                await asyncio.sleep(0.05)
            assert await homes(model) == {model}
        assert await handle.remote() in {"a", "b"}

    try:
        asyncio.run(run())
    finally:
        serve.delete("own")
