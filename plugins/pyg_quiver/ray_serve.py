"""The inference engine as a Ray Serve deployment, for more than one process or machine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import torch
from ray import serve

from pyg_quiver.serving import InferenceEngine, Response


def gnn_deployment(make_engine: Callable[[], InferenceEngine], **options: Any) -> Any:
    """A deployment whose replicas each run an engine of their own.

    ``serve.run(gnn_deployment(make_engine, num_replicas=2).bind())`` gives a handle;
    ``handle.remote([3, 7], request_id=1)`` gives a :class:`Response`. The answer does not depend on the
    replica. Refusals of its engine (``EngineOverloaded``) and missed deadlines reach the caller as
    exceptions; a replica that is stopped answers what it has accepted first.

    Args:
        make_engine: called in each replica; loads the model, the graph and the features there.
        options: of ``ray.serve.deployment``, e.g. ``num_replicas``, ``ray_actor_options``.
    """

    @serve.deployment(**options)
    class GNN:
        """One replica."""

        def __init__(self) -> None:
            self.engine = make_engine()

        async def __call__(
            self, node: list[int], request_id: int | None = None, deadline_ms: float | None = None
        ) -> Response:
            ids = torch.tensor(node, dtype=torch.int64)
            future = self.engine.submit(ids, request_id=request_id, deadline_ms=deadline_ms)
            return await asyncio.wrap_future(future)

        async def stats(self) -> Any:
            """The engine's counts."""
            return self.engine.stats()

        def check_health(self) -> None:
            """Fails once the engine has no worker left, so that Ray replaces the replica."""
            self.engine.check()

        def __del__(self) -> None:
            if hasattr(self, "engine"):
                self.engine.close()

    return GNN
