"""MoE-CAP: cost, accuracy and performance of any two or more configurations, measured from the same requests.

``run(load_config("config.yaml"), "out")`` measures, ``compare("out")`` judges, ``write_report("out")`` shows.
Names are imported when first used, so that importing this package costs nothing and needs no framework.
"""

from __future__ import annotations

import importlib
from typing import Any

_EXPORTS = {
    "workload": (
        "ArmConfig",
        "Axis",
        "BlockResult",
        "Item",
        "RunContext",
        "Sample",
        "StepRecord",
        "System",
        "Workload",
    ),
    "registry": ("list_workloads", "load_workload"),
    "config": ("CompareConfig", "HardwareConfig", "RunConfig", "load_config", "parse_config"),
    "runner": ("RunSummary", "block_order", "run"),
    "records": ("RecordLog", "Records", "read_records"),
    "stats": (
        "Estimate",
        "holm",
        "judge",
        "mcnemar_exact",
        "paired_difference",
        "paired_ratio",
        "ratio_of_sums",
        "wilson_interval",
    ),
    "comparison": ("Comparison", "Row", "compare"),
    "report": ("write_report",),
    "model_spec": ("LayerSpec", "ModelSpec"),
    "accounting": ("Breakdown", "mbu", "mfu", "s_mbu", "s_mfu", "step_bytes", "step_flops"),
    "routing": ("RoutingTrace", "expected_distinct_experts"),
    "hardware": ("Figure", "HardwareProfile", "MemoryTier", "Peaks", "load_hardware", "measure_peaks"),
    "cost": ("CostModel",),
    "tasks": ("load_items",),
    "load": ("LoadReport", "open_loop", "poisson_arrivals"),
}
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = sorted(_MODULE_OF)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'moecap_eval' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"moecap_eval.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, *globals()]
