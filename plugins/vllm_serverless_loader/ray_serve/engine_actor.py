"""An engine in an actor, and the proxy through which a router uses it."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterable
from typing import Any

from vllm_serverless_loader.loading.options import LoadOptions
from vllm_serverless_loader.loading.store import StoreClient
from vllm_serverless_loader.migration.request import Engine, RequestState, Token
from vllm_serverless_loader.migration.simulated_engine import SimulatedEngine
from vllm_serverless_loader.ray_serve.config import ModelConfig


class EngineActor:
    """A model on this node's GPUs, loaded by way of the node's store."""

    def __init__(self, kind: str, model: ModelConfig, socket: str) -> None:
        self._kind, self._model, self._socket = kind, model, socket
        self._engine: Engine | None = None
        self._aborted: set[str] = set()

    async def load(self) -> dict[str, Any]:
        """Load the model; seconds it took, the tier its bytes were in, and what its requests may carry."""
        begin = time.perf_counter()
        with StoreClient(self._socket) as client, client.open(self._model.path) as cached:
            hit = cached.hit
            if self._kind == "simulated":
                # Everything but the computing is real: the bytes move to where parameters would be.
                self._weights = {name: tensor.clone() for name, tensor in cached.tensors()}
                self._engine = SimulatedEngine(**self._model.engine)
        if self._kind == "vllm":
            from vllm_serverless_loader.vllm_engine import VLLMEngine

            extra = {"store": self._socket, "io_threads": LoadOptions().io_threads}
            self._engine = VLLMEngine.start(
                self._model.path,
                load_format="serverless_llm",
                model_loader_extra_config=extra,
                tensor_parallel_size=self._model.num_gpus,
                **self._model.engine,
            )
        seconds, tier = time.perf_counter() - begin, "host" if hit else "disk"
        return {"seconds": seconds, "tier": tier, "carries": sorted(getattr(self._engine, "carries", ()))}

    async def generate(self, request: RequestState) -> AsyncIterator[Token]:
        """The tokens that follow ``request.token_ids``."""
        assert self._engine is not None
        async for token in self._engine.generate(request):
            if request.request_id in self._aborted:
                self._aborted.discard(request.request_id)
                return
            yield token

    async def prefill(self, request: RequestState) -> int:
        """Compute and keep the cache of ``request.token_ids``."""
        assert self._engine is not None
        return await self._engine.prefill(request)

    async def abort(self, request_id: str) -> None:
        """Stop a request."""
        assert self._engine is not None
        self._aborted.add(request_id)
        await self._engine.abort(request_id)


class RemoteEngine:
    """An :class:`EngineActor` as a router's engine.

    Args:
        actor: the loaded engine.
        carries: as its :meth:`EngineActor.load` said.
    """

    def __init__(self, actor: Any, carries: Iterable[str] = ()) -> None:
        self.actor = actor
        self.carries = frozenset(carries)

    async def generate(self, request: RequestState) -> AsyncIterator[Token]:
        """The tokens that follow ``request.token_ids``."""
        async for reference in self.actor.generate.options(num_returns="streaming").remote(request):
            yield Token(*await reference)

    async def prefill(self, request: RequestState) -> int:
        """Compute and keep the cache of ``request.token_ids``."""
        return await self.actor.prefill.remote(request)

    async def abort(self, request_id: str) -> None:
        """Stop a request."""
        await self.actor.abort.remote(request_id)
