"""Tenplex in Megatron-core: change the parallelism of a running job, with all of its training state.

Names are resolved on first use: importing the package imports neither Megatron nor DeepSpeed.
"""

from __future__ import annotations

import importlib
from typing import Any

_MODULE_OF = {
    "Box": "ptc",
    "CopyServiceTransport": "transport",
    "DatasetProgress": "dataset",
    "ElasticBatchSampler": "dataset",
    "GPTShape": "layout",
    "Move": "planner",
    "ParallelConfig": "layout",
    "ParallelTensorCollection": "ptc",
    "Reconfigurator": "reconfigure",
    "ReplicaCorruptError": "errors",
    "ReshardPlan": "planner",
    "ReshardReport": "executor",
    "Schedule": "arguments",
    "Shard": "ptc",
    "TensorSpec": "ptc",
    "TensorStore": "tensor_store",
    "Topology": "topology",
    "TorchTransport": "transport",
    "TrainingState": "reconfigure",
    "Transport": "transport",
    "UncoveredRangeError": "errors",
    "World": "membership",
    "ZeroReconfigurator": "deepspeed_adapter",
    "add_tenplex_args": "arguments",
    "assign_roles": "placement",
    "execute": "executor",
    "execute_local": "executor",
    "gpt_layout": "layout",
    "lower_bound": "planner",
    "plan_reshard": "planner",
    "restore": "tensor_store",
    "smallest_move": "policy",
    "zero_layout": "deepspeed_adapter",
}

__all__ = list(_MODULE_OF)


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
