"""One actor a node: its store process's pool, and what the controller must know about the node."""

from __future__ import annotations

import os
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray

from vllm_serverless_loader.loading.host_cache import HostCache
from vllm_serverless_loader.loading.store import StoreClient, StoreServer
from vllm_serverless_loader.ray_serve.config import ClusterConfig


class NodeAgent:
    """Owns the pool of a node and remembers its engines, so that a restarted controller finds them."""

    def __init__(self, config: ClusterConfig, num_gpus: int) -> None:
        self._config = config
        self._num_gpus = num_gpus
        self._cache = HostCache(config.host_cache_bytes, chunk_bytes=config.chunk_bytes, shared=True)
        self._folder = tempfile.TemporaryDirectory(prefix="serverless-loader-")
        self._server = StoreServer(self._cache, Path(self._folder.name) / "store.sock")
        self._server.start()
        self._engines: dict[str, tuple[str, Any]] = {}

    def describe(self) -> dict[str, Any]:
        """GPUs, socket of the store, tiers of the models, registered engines."""
        return {
            "node": ray.get_runtime_context().get_node_id(),
            "num_gpus": self._num_gpus,
            "socket": str(self._server.socket_path),
            "tiers": self.tiers(),
            "engines": dict(self._engines),
        }

    def tiers(self) -> dict[str, str]:
        """Model -> ``"host"`` or ``"disk"``; models that are not here are left out."""
        cached = {path for path, _ in self._cache.models}
        found = {}
        for name, model in self._config.models.items():
            if os.path.realpath(model.path) in cached:
                found[name] = "host"
            elif Path(model.path).is_dir():
                found[name] = "disk"
        return found

    def stage(self, path: str) -> None:
        """Read a model into the pool in the background; an engine that asks for it shares the read."""
        threading.Thread(
            target=self._stage, args=(path,), name="serverless-loader-stage", daemon=True
        ).start()

    def _stage(self, path: str) -> None:
        # Only a head start: the engine's own load meets the same error and reports it.
        with suppress(OSError, ValueError, MemoryError), StoreClient(self._server.socket_path) as client:
            client.open(path).release()

    def register(self, instance: str, model: str, engine: Any) -> None:
        """Remember an engine."""
        self._engines[instance] = (model, engine)

    def forget(self, instance: str) -> None:
        """Forget an engine."""
        self._engines.pop(instance, None)

    def close(self) -> None:
        """Stop the store and free the pool."""
        self._server.stop()
        self._cache.close()
        self._folder.cleanup()
