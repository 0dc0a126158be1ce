"""Which machines can serve a model at a given time per output token (MoE-CAP, equations 7 and 8)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from moecap_eval.accounting import step_bytes, step_flops
from moecap_eval.cost import CostModel
from moecap_eval.hardware import HardwareProfile
from moecap_eval.model_spec import ModelSpec
from moecap_eval.routing import expected_distinct_experts
from moecap_eval.workload import StepRecord

Limit = Literal["memory", "bandwidth", "compute", "unknown compute"]


@dataclass(frozen=True)
class Demand:
    """What one decode pass needs: bytes in memory, bytes read, and FLOPs."""

    resident_bytes: int
    read_bytes: int
    flops: int


@dataclass(frozen=True)
class PlanRow:
    """One machine. ``limit`` binds; ``tpot_s`` and ``usd_per_million`` (tokens) are None where unknown.

    Both are at the speed the machine reaches, which may be better than the wanted one.
    """

    profile: str
    meets: bool
    limit: Limit
    tpot_s: float | None
    needed_bytes_per_s: float
    needed_flops_per_s: float
    resident_bytes: int
    memory_bytes: int
    usd_per_million: float | None


def demand(spec: ModelSpec, batch: int, context: int) -> Demand:
    """One decode pass of ``batch`` requests with ``context`` cached tokens each.

    Experts touched are the expected number under uniform routing, rounded up; real routing touches fewer.
    """
    if batch < 1 or context < 1:
        raise ValueError(f"batch and context must be positive, got {batch} and {context}")
    touched = {
        layer.index: math.ceil(expected_distinct_experts(layer.num_experts, layer.top_k, batch))
        for layer in spec.layers
        if layer.num_experts
    }
    step = StepRecord(
        duration_s=1.0,
        tokens=batch,
        requests=batch,
        sampled_tokens=batch,
        distinct_tokens=batch,
        kv_tokens_read=batch * context,
        attended_positions=batch * context,
        experts_touched=touched,
    )
    resident = spec.weight_bytes.total + batch * context * spec.kv_bytes_per_token
    return Demand(resident, step_bytes(spec, step).total, step_flops(spec, step).total)


def plan(
    spec: ModelSpec,
    profiles: Sequence[HardwareProfile],
    *,
    tpot_s: float,
    batch: int = 1,
    context: int = 1024,
    s_mbu: float = 1.0,
    s_mfu: float = 1.0,
    costs: Mapping[str, CostModel] | None = None,
) -> list[PlanRow]:
    """Judge each machine by memory, bandwidth (eq. 7) and compute (eq. 8).

    Args:
        spec: the model.
        profiles: the machines; one device each.
        tpot_s: wanted time per output token, in seconds.
        batch: requests decoded together.
        context: cached tokens of each request.
        s_mbu: share of the bandwidth that the engine reaches; 1 gives the bound that no engine can beat.
        s_mfu: the same of compute.
        costs: price by profile name.

    Raises:
        ValueError: a target, batch, context or share out of range.
    """
    if not tpot_s > 0:
        raise ValueError(f"the time per output token must be positive, got {tpot_s} s")
    for name, share in (("s_mbu", s_mbu), ("s_mfu", s_mfu)):
        if not 0 < share <= 1:
            raise ValueError(f"{name} must lie in (0, 1], got {share}")
    need = demand(spec, batch, context)
    return [
        _judge(
            spec,
            profile,
            need,
            tpot_s=tpot_s,
            batch=batch,
            shares=(s_mbu, s_mfu),
            cost=(costs or {}).get(profile.name),
        )
        for profile in profiles
    ]


def read_costs(path: str | Path) -> dict[str, CostModel]:
    """Prices by profile name from a YAML file: ``h100-sxm: {usd_per_hour: 3.0}``."""
    data: Any = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if not isinstance(data, Mapping) or not all(isinstance(section, Mapping) for section in data.values()):
        raise ValueError(f"{path}: expected a cost section for each profile name")
    return {str(name): CostModel.from_mapping(section) for name, section in data.items()}


def _judge(
    spec: ModelSpec,
    profile: HardwareProfile,
    need: Demand,
    *,
    tpot_s: float,
    batch: int,
    shares: tuple[float, float],
    cost: CostModel | None,
) -> PlanRow:
    memory_bytes = profile.tiers[profile.fast_tier].bytes
    read_s = need.read_bytes / (profile.peak_bytes_per_s * shares[0])
    try:
        compute_s = need.flops / (profile.peak_flops_per_s(spec.weight_dtype) * shares[1])
    except ValueError:
        compute_s = None
    limit: Limit
    reached: float | None = max(read_s, compute_s or 0.0)
    if need.resident_bytes > memory_bytes:
        limit, reached = "memory", None
    elif compute_s is None:
        limit, reached = "unknown compute", None
    else:
        limit = "bandwidth" if read_s >= compute_s else "compute"
    usd = None if reached is None or cost is None else 1e6 * cost.usd(reached) / batch
    return PlanRow(
        profile=profile.name,
        meets=reached is not None and reached <= tpot_s,
        limit=limit,
        tpot_s=reached,
        needed_bytes_per_s=need.read_bytes / tpot_s / shares[0],
        needed_flops_per_s=need.flops / tpot_s / shares[1],
        resident_bytes=need.resident_bytes,
        memory_bytes=memory_bytes,
        usd_per_million=usd,
    )
