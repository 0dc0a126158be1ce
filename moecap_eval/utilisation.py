"""How much of the machine each arm used: MBU, S-MBU, MFU, S-MFU and bytes, from the recorded passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moecap_eval.axes import FAST_TIERS
from moecap_eval.records import Records
from moecap_eval.workload import StepRecord

if TYPE_CHECKING:
    from moecap_eval.model_spec import ModelSpec

MEASURES = ("S-MBU", "MBU", "S-MFU", "MFU")


@dataclass(frozen=True)
class Peak:
    """A machine's limits as one source states them; a limit that is unknown is None."""

    source: str
    bytes_per_s: float | None
    flops_per_s: float | None


@dataclass(frozen=True)
class Utilisation:
    """One arm's passes, summed.

    ``shares`` maps (measure, peak source) to a value in [0, 1], or None with the reason in ``reasons``.
    ``bytes_by_component`` and ``moved_bytes`` are totals over all passes.
    """

    arm: str
    passes: int
    tokens: int
    duration_s: float
    bytes_by_component: Mapping[str, int] = field(default_factory=dict)
    moved_bytes: Mapping[str, int] = field(default_factory=dict)
    shares: Mapping[tuple[str, str], float | None] = field(default_factory=dict)
    reasons: Mapping[tuple[str, str], str] = field(default_factory=dict)


def peaks_of(environment: Mapping[str, Any], dtype: str | None = None) -> list[Peak]:
    """The profile's stated peaks and the measured ones, as far as the environment holds them.

    Args:
        environment: of the records.
        dtype: whose FLOP/s to take; without one, no FLOP/s are given.
    """
    found = []
    profile = environment.get("hardware") or {}
    tiers = profile.get("tiers") or {}
    tier = next((tiers[name] for name in FAST_TIERS if name in tiers), None)
    if profile:
        flops = _pick(profile.get("flops_per_s") or {}, dtype)
        value = flops.get("value") if isinstance(flops, Mapping) else flops
        found.append(Peak("spec", tier["bytes_per_s"] if tier else None, value))
    measured = environment.get("measured_peaks")
    if measured:
        flops = _pick(measured.get("flops_per_s") or {}, dtype)
        value = flops.get("value") if isinstance(flops, Mapping) else flops
        found.append(Peak("measured", measured.get("read_bytes_per_s"), value))
    return found


def utilisation(records: Records, arm: str) -> Utilisation | None:
    """An arm's utilisation, or None when it recorded no passes.

    A measure that cannot be formed (unknown model, an invalid pass, a value above 1) is None with its reason.
    """
    steps = [
        step for block in records.blocks.get(arm, []) for step in records.steps.get((arm, block.block), [])
    ]
    if not steps:
        return None
    moved: dict[str, int] = {}
    for step in steps:
        for link, size in step.moved_bytes.items():
            moved[link] = moved.get(link, 0) + size
    facts = records.arms[arm].facts if arm in records.arms else {}
    shares: dict[tuple[str, str], float | None] = {}
    reasons: dict[tuple[str, str], str] = {}
    components: dict[str, int] = {}
    spec, unknown = _model_spec(facts)
    if spec is not None:
        components = _components(spec, steps)
    for peak in peaks_of(records.environment, None if spec is None else spec.weight_dtype):
        for measure, (function, limit) in _functions(peak).items():
            key = (measure, peak.source)
            try:
                if spec is None or limit is None:
                    raise ValueError(unknown or f"the {peak.source} peak is unknown")
                shares[key] = function(spec, steps, limit)
            except ValueError as error:
                shares[key], reasons[key] = None, str(error)
    return Utilisation(
        arm=arm,
        passes=len(steps),
        tokens=sum(step.tokens for step in steps),
        duration_s=sum(step.duration_s for step in steps),
        bytes_by_component=components,
        moved_bytes=moved,
        shares=shares,
        reasons=reasons,
    )


def _functions(peak: Peak) -> dict[str, tuple[Callable[..., float], float | None]]:
    from moecap_eval.accounting import mbu, mfu, s_mbu, s_mfu

    return {
        "S-MBU": (s_mbu, peak.bytes_per_s),
        "MBU": (mbu, peak.bytes_per_s),
        "S-MFU": (s_mfu, peak.flops_per_s),
        "MFU": (mfu, peak.flops_per_s),
    }


def _model_spec(facts: Mapping[str, Any]) -> tuple[ModelSpec | None, str]:
    """The arm's model, or None and why it is not known."""
    from moecap_eval.model_spec import ModelSpec

    config = facts.get("model_config")
    if not config:
        return None, "the arm does not state its model's config"
    try:
        dtypes = {"weight_dtype": facts.get("weight_dtype"), "kv_dtype": facts.get("kv_dtype")}
        return ModelSpec.from_config(config, **dtypes), ""
    except ValueError as error:
        return None, str(error)


def _components(spec: ModelSpec, steps: Sequence[StepRecord]) -> dict[str, int]:
    from moecap_eval.accounting import step_bytes

    totals: dict[str, int] = {}
    for step in steps:
        if step.invalid is None:
            for name, size in step_bytes(spec, step).items():
                totals[name] = totals.get(name, 0) + size
    return totals


def _pick(figures: Mapping[str, Any], dtype: str | None) -> Any:
    return None if dtype is None else figures.get(dtype)
