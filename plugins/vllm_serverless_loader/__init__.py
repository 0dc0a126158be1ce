"""ServerlessLLM in vLLM and Ray: fast multi-tier loading, live migration, start-up-time-aware allocation.

Enabled by ``--load-format serverless_llm``. Names are resolved on first use: importing the package imports
neither vLLM nor Ray, and touches no device.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

_MODULE_OF = {
    "AdapterCache": "loading.adapters",
    "CachedModel": "loading.host_cache",
    "Checkpoint": "checkpoint.reader",
    "CheckpointKey": "checkpoint.index",
    "CorruptCheckpointError": "checkpoint.index",
    "HostCache": "loading.host_cache",
    "LoadOptions": "loading.options",
    "LoadReport": "loading.options",
    "LoadResult": "loading.options",
    "PartitionIndex": "checkpoint.index",
    "StoreClient": "loading.store",
    "StoreServer": "loading.store",
    "TensorEntry": "checkpoint.index",
    "convert": "conversion",
    "load_checkpoint": "checkpoint.reader",
    "open_checkpoint": "checkpoint.reader",
    "open_remote": "loading.remote",
    "write_partition": "checkpoint.writer",
    "Engine": "migration.request",
    "MigrationError": "migration.request",
    "MigrationReport": "migration.request",
    "RequestState": "migration.request",
    "SimulatedEngine": "migration.simulated_engine",
    "Token": "migration.request",
    "Allocation": "scheduling.cluster",
    "CacheTransfer": "scheduling.estimators",
    "CheapestTransport": "scheduling.estimators",
    "FirstAvailablePolicy": "scheduling.policies",
    "Instance": "scheduling.cluster",
    "LoadingTimeEstimator": "scheduling.estimators",
    "LocalityPolicy": "scheduling.policies",
    "Migration": "scheduling.cluster",
    "MigrationTimeEstimator": "scheduling.estimators",
    "ModelInfo": "scheduling.cluster",
    "RandomPolicy": "scheduling.policies",
    "ServerSpec": "simulation.simulator",
    "ServerState": "scheduling.cluster",
    "SimulationResult": "simulation.simulator",
    "StartupTimePolicy": "scheduling.policies",
    "Trace": "simulation.trace",
    "simulate": "simulation.simulator",
    "TokenRouter": "migration.router",
    "VLLMEngine": "vllm_engine",
}

__all__ = ["register", *_MODULE_OF]  # noqa: PLE0604 - the table's keys are strings


def register() -> None:
    """Entry point ``vllm.general_plugins``: vLLM calls it in each of its processes."""
    from vllm_serverless_loader.vllm_loader import register as register_loader

    register_loader()
    if os.environ.get("SERVERLESS_LOADER_ADAPTERS"):
        from vllm_serverless_loader.vllm_adapters import register as register_resolver

        register_resolver()


def __getattr__(name: str) -> Any:
    """Import the module that defines ``name`` on first use (PEP 562)."""
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
