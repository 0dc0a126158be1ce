"""MoE-Infinity in vLLM: experts in host memory, a pool of expert slots on the GPU, activation-aware.

Enabled by ``additional_config={"moe_offload": {...}}``; without that key vLLM is unchanged. Names are
resolved on first use: importing the package imports neither vLLM nor CUDA.
"""

from __future__ import annotations

import importlib
from typing import Any

_MODULE_OF = {
    "CacheStats": "counters",
    "DirectCache": "direct",
    "DiskExpertStore": "disk_store",
    "EAMCollection": "eam",
    "EAMPredictor": "predictor",
    "EAMTracer": "eam",
    "EvictionPolicy": "policy",
    "ExpertCache": "cache",
    "ExpertStore": "store",
    "GatePredictor": "predictor",
    "HostExpertStore": "store",
    "LinkModel": "simulator",
    "MoEOffloadConfig": "config",
    "PrefetchQueue": "prefetch",
    "ReplayResult": "simulator",
    "RoutingTrace": "trace",
    "SlabLayout": "store",
    "TieredExpertStore": "disk_store",
    "collect_trace": "vllm_runner",
    "eam_distance": "eam",
    "get_cache": "vllm_runner",
    "make_policy": "policy",
    "moved_bytes": "counters",
    "prefetch_priority": "predictor",
    "remap_expert_ids": "kernels",
    "replay": "simulator",
    "request_eams": "vllm_runner",
    "stats": "vllm_runner",
}

__all__ = ["register", *_MODULE_OF]  # noqa: PLE0604 - the table's keys are strings


def register() -> None:
    """Entry point ``vllm.general_plugins``: vLLM calls it in each of its processes."""
    from vllm_moe_offload.vllm_layer import register as register_layers

    register_layers()


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
