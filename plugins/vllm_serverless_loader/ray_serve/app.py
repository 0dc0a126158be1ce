"""The ingress: takes requests, holds their tokens, carries out migrations."""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from typing import Any

import ray
from ray import serve

from vllm_serverless_loader.migration.request import MigrationError, RequestState
from vllm_serverless_loader.migration.router import TokenRouter
from vllm_serverless_loader.ray_serve.cluster_controller import ClusterController
from vllm_serverless_loader.ray_serve.config import ClusterConfig
from vllm_serverless_loader.ray_serve.engine_actor import RemoteEngine

CONTROLLER = "serverless-loader-controller"


def controller_handle(config: ClusterConfig) -> Any:
    """The cluster's controller; made by whoever asks first."""
    options = {"name": CONTROLLER, "get_if_exists": True, "lifetime": "detached", "num_cpus": 0}
    options |= {"max_concurrency": 1000, "max_restarts": -1}
    return ray.remote(ClusterController).options(**options).remote(config)


class Ingress:
    """OpenAI's ``/v1/completions`` with token ids as prompt; every answer says how its model was started."""

    def __init__(self, config: ClusterConfig) -> None:
        self._config = config
        self._id = uuid.uuid4().hex
        self._routers: dict[str, TokenRouter] = {}
        self._home: dict[str, str] = {}  # instance at the start of a request -> instance that serves it now
        self._controller = controller_handle(config)
        self._ready = False

    async def generate(
        self, model: str, prompt: list[int], sampling: Mapping[str, Any]
    ) -> AsyncIterator[dict[str, Any]]:
        """First how the model was started, then one item a token."""
        begin = time.perf_counter()
        if not self._ready:
            await self._controller.start.remote()
            self._ready = True
        grant = await self._acquire(model)
        instance = grant["instance"]
        try:
            start = {
                "model": model,
                "server": grant["server"],
                "tier": grant["tier"],
                "estimated_s": grant["estimated_s"],
                "load_s": grant.get("load_s", 0.0),
                "startup_s": time.perf_counter() - begin,
                "migrations": len(grant["migrations"]),
            }
            yield {"start": start}
            now = self._home.get(instance, instance)
            router = self._routers.setdefault(
                now, TokenRouter(RemoteEngine(grant["engine"], grant["carries"]))
            )
            request = RequestState(uuid.uuid4().hex, tuple(prompt), sampling=dict(sampling))
            async for token in router.generate(request):
                yield {"token": token.id, "finish_reason": token.finish_reason}
        finally:
            await self._release(instance)

    async def _acquire(self, model: str) -> dict[str, Any]:
        """A loaded instance; migrations of the plan are done on the way."""
        while True:
            grant = await self._controller.acquire.remote(model, self._id)
            if await self._migrate(grant):
                break
        if grant["tier"] != "device":
            loaded = await self._controller.begin.remote(grant["instance"])
            grant = {
                **grant,
                "engine": loaded["engine"],
                "carries": loaded["carries"],
                "tier": loaded["tier"],
                "load_s": loaded["seconds"],
            }
        return grant

    async def _migrate(self, grant: dict[str, Any]) -> bool:
        """Carry out the plan; False if a migration failed, and the request must be placed anew."""
        options = {
            name: self._config.migration[name]
            for name in ("max_gap_tokens", "max_rounds")
            if name in self._config.migration
        }
        for move in grant["migrations"]:
            source, target = move["instance"], move["target"]
            router = self._routers.get(source)
            try:
                loaded = await self._controller.begin.remote(target)
                report = None
                if router is not None:
                    destination = RemoteEngine(loaded["engine"], loaded["carries"])
                    report = await router.migrate(destination, **options)
            except (MigrationError, ray.exceptions.RayError):
                await self._controller.not_moved.remote(source, target, grant["instance"])
                return False
            tokens, seconds = 0, 0.0
            if router is not None and report is not None:
                self._routers[target] = self._routers.pop(source)
                for first, now in list(self._home.items()):
                    if now == source:
                        self._home[first] = target
                self._home.setdefault(source, target)
                sent = [one.rounds[0].context_tokens for one in report.requests if one.rounds]
                tokens, seconds = max(sent, default=0), report.seconds
            await self._controller.moved.remote(source, target, tokens=tokens, seconds=seconds)
        return True

    async def _release(self, instance: str) -> None:
        now = self._home.get(instance, instance)
        await self._controller.release.remote(now)
        router = self._routers.get(now)
        if router is not None and not router.requests():
            del self._routers[now]
            self._home = {first: last for first, last in self._home.items() if last != now}

    async def __call__(self, http: Any) -> Any:
        """HTTP: ``{"model", "prompt": [ids], "max_tokens", "stream", ...}``."""
        from starlette.responses import JSONResponse, StreamingResponse

        body = await http.json()
        model, prompt, stream = body.pop("model", None), body.pop("prompt", None), body.pop("stream", False)
        is_ids = isinstance(prompt, list) and prompt and all(type(one) is int for one in prompt)
        if model not in self._config.models or not is_ids:
            known = ", ".join(self._config.models)
            message = f"model must be one of {known}; prompt a list of token ids"
            return JSONResponse({"error": {"message": message}}, status_code=400)
        items = self.generate(model, prompt, body)
        if stream:

            async def events() -> AsyncIterator[str]:
                async for item in items:
                    yield f"data: {json.dumps(item)}\n\n"
                yield "data: [DONE]\n\n"

            return StreamingResponse(events(), media_type="text/event-stream")
        start, ids, reason = {}, [], None
        async for item in items:
            if "start" in item:
                start = item["start"]
            else:
                ids.append(item["token"])
                reason = item["finish_reason"] or reason
        return JSONResponse({"choices": [{"token_ids": ids, "finish_reason": reason}], "serverless": start})


def build_app(config: Mapping[str, Any] | str | os.PathLike[str]) -> serve.Application:
    """The Ray Serve application of a cluster.

    Args:
        config: as :meth:`ClusterConfig.parse`.
    """
    parsed = ClusterConfig.parse(config)
    deployment = serve.deployment(Ingress, name="serverless-loader", max_ongoing_requests=1000)
    return deployment.options(ray_actor_options={"num_cpus": 0}).bind(parsed)


def __getattr__(name: str) -> Any:
    """``app``: the application of the file that SERVERLESS_LOADER_CONFIG names."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    path = os.environ.get("SERVERLESS_LOADER_CONFIG")
    if path is None:
        raise ValueError("set SERVERLESS_LOADER_CONFIG to the YAML file of the cluster")
    return build_app(path)
