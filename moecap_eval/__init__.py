"""MoE-CAP: cost, accuracy and performance of any two or more configurations, measured from the same requests.

``run(load_config("config.yaml"), "out")`` measures, ``compare("out")`` judges, ``write_report("out")`` shows.
Names are imported when first used, so that importing this package costs nothing and needs no framework.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moecap_eval.accounting import Breakdown, mbu, mfu, s_mbu, s_mfu, step_bytes, step_flops
    from moecap_eval.comparison import Comparison, Row, compare
    from moecap_eval.config import CompareConfig, HardwareConfig, RunConfig, load_config, parse_config
    from moecap_eval.cost import CostModel
    from moecap_eval.hardware import Figure, HardwareProfile, MemoryTier, Peaks, load_hardware, measure_peaks
    from moecap_eval.load import LoadReport, open_loop, poisson_arrivals
    from moecap_eval.model_spec import LayerSpec, ModelSpec
    from moecap_eval.records import RecordLog, Records, read_records
    from moecap_eval.registry import list_workloads, load_workload
    from moecap_eval.report import write_report
    from moecap_eval.routing import RoutingTrace, expected_distinct_experts
    from moecap_eval.runner import RunSummary, block_order, run
    from moecap_eval.stats import (
        Estimate,
        holm,
        judge,
        mcnemar_exact,
        paired_difference,
        paired_ratio,
        ratio_of_sums,
        wilson_interval,
    )
    from moecap_eval.tasks import load_items
    from moecap_eval.workload import (
        ArmConfig,
        Axis,
        BlockResult,
        Item,
        RunContext,
        Sample,
        StepRecord,
        System,
        Workload,
    )
    from moecap_eval.workload_tools import ConfiguredSystem, Stopwatch, read_options, seeded_items

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
    "workload_tools": ("ConfiguredSystem", "Stopwatch", "read_options", "seeded_items"),
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

__all__ = [
    "ArmConfig",
    "Axis",
    "BlockResult",
    "Breakdown",
    "CompareConfig",
    "Comparison",
    "ConfiguredSystem",
    "CostModel",
    "Estimate",
    "Figure",
    "HardwareConfig",
    "HardwareProfile",
    "Item",
    "LayerSpec",
    "LoadReport",
    "MemoryTier",
    "ModelSpec",
    "Peaks",
    "RecordLog",
    "Records",
    "RoutingTrace",
    "Row",
    "RunConfig",
    "RunContext",
    "RunSummary",
    "Sample",
    "StepRecord",
    "Stopwatch",
    "System",
    "Workload",
    "block_order",
    "compare",
    "expected_distinct_experts",
    "holm",
    "judge",
    "list_workloads",
    "load_config",
    "load_hardware",
    "load_items",
    "load_workload",
    "mbu",
    "mcnemar_exact",
    "measure_peaks",
    "mfu",
    "open_loop",
    "paired_difference",
    "paired_ratio",
    "parse_config",
    "poisson_arrivals",
    "ratio_of_sums",
    "read_options",
    "read_records",
    "run",
    "s_mbu",
    "s_mfu",
    "seeded_items",
    "step_bytes",
    "step_flops",
    "wilson_interval",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'moecap_eval' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"moecap_eval.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, *globals()]
