"""Quiver in PyG: neighbour sampling, feature placement and serving (Tan et al., arXiv 2305.10863).

Names are resolved on first use: importing the package needs neither numba nor Triton and touches no device.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyg_quiver.caches import CachePlan, plan_caches
    from pyg_quiver.feature_store import GatherStats, QuiverFeatureStore
    from pyg_quiver.loader import LinkNeighborLoader, NeighborLoader
    from pyg_quiver.metrics import edge_reads, fap, psgs, seed_probability
    from pyg_quiver.placement import DISK, HOST, DeviceTopology, PlacementPlan, plan_placement
    from pyg_quiver.refresh import PlacementRefresher
    from pyg_quiver.rng import batch_key
    from pyg_quiver.routing import (
        CalibrationProfile,
        CostModel,
        EarliestFinishRouter,
        ThresholdRouter,
        calibrate,
    )
    from pyg_quiver.sampler import QuiverSampler
    from pyg_quiver.serving import EngineOverloaded, EngineStats, InferenceEngine, Response
    from pyg_quiver.topology import CSCTopology

__all__ = [
    "DISK",
    "HOST",
    "CSCTopology",
    "CachePlan",
    "CalibrationProfile",
    "CostModel",
    "DeviceTopology",
    "EarliestFinishRouter",
    "EngineOverloaded",
    "EngineStats",
    "GatherStats",
    "InferenceEngine",
    "LinkNeighborLoader",
    "NeighborLoader",
    "PlacementPlan",
    "PlacementRefresher",
    "QuiverFeatureStore",
    "QuiverSampler",
    "Response",
    "ThresholdRouter",
    "batch_key",
    "calibrate",
    "edge_reads",
    "fap",
    "plan_caches",
    "plan_placement",
    "psgs",
    "seed_probability",
]

_MODULE_OF = {
    "DISK": "placement",
    "HOST": "placement",
    "CSCTopology": "topology",
    "CachePlan": "caches",
    "CalibrationProfile": "routing",
    "CostModel": "routing",
    "DeviceTopology": "placement",
    "EarliestFinishRouter": "routing",
    "EngineOverloaded": "serving",
    "EngineStats": "serving",
    "GatherStats": "feature_store",
    "InferenceEngine": "serving",
    "LinkNeighborLoader": "loader",
    "NeighborLoader": "loader",
    "PlacementPlan": "placement",
    "PlacementRefresher": "refresh",
    "QuiverFeatureStore": "feature_store",
    "QuiverSampler": "sampler",
    "Response": "serving",
    "ThresholdRouter": "routing",
    "batch_key": "rng",
    "calibrate": "routing",
    "edge_reads": "metrics",
    "fap": "metrics",
    "plan_caches": "caches",
    "plan_placement": "placement",
    "psgs": "metrics",
    "seed_probability": "metrics",
}


def __getattr__(name: str) -> Any:
    """Import the module that defines ``name`` on first use (PEP 562)."""
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "torch_geometric":
            raise
        raise ImportError(f"pyg_quiver.{name} needs PyG: pip install graft-plugins[pyg]") from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
