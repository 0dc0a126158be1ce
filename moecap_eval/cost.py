"""What a second of a machine costs: amortised hardware plus energy, or a rental price."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

_SECONDS_PER_YEAR = 365 * 86400
_JOULES_PER_KWH = 3.6e6
_MEMORY_KEYS = ("usd_per_gib", "installed_gib")


@dataclass(frozen=True)
class CostModel:
    """USD of a run, from purchase prices and power, or from ``usd_per_hour`` alone.

    Attributes:
        device_usd: price of the accelerators, without memory that ``memory`` prices.
        host_usd: price of the rest.
        watts: power drawn, used where no energy was measured.
        lifetime_years: years over which the hardware is written off.
        utilisation: share of its life in which it does paid work, in (0, 1]; divides capital only.
        usd_per_kwh: electricity price.
        pue: power usage effectiveness of the site, at least 1.
        memory: per tier ``usd_per_gib`` and ``installed_gib``.
        memory_accounting: ``"installed"`` charges what is built in; ``"used"`` asks what a machine with just
            enough memory would cost, which is a what-if and must be labelled so.
        usd_per_hour: rental price; replaces everything above.
    """

    device_usd: float = 0
    host_usd: float = 0
    watts: float = 0
    lifetime_years: float = 3
    utilisation: float = 0.8
    usd_per_kwh: float = 0.15
    pue: float = 1.25
    memory: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    memory_accounting: Literal["installed", "used"] = "installed"
    usd_per_hour: float | None = None

    def __post_init__(self) -> None:
        for name in ("device_usd", "host_usd", "watts", "usd_per_kwh"):
            _require(f"cost.{name}", getattr(self, name), minimum=0)
        _require("cost.lifetime_years", self.lifetime_years, above=0)
        _require("cost.utilisation", self.utilisation, above=0, maximum=1)
        _require("cost.pue", self.pue, minimum=1)
        if self.usd_per_hour is not None:
            _require("cost.usd_per_hour", self.usd_per_hour, minimum=0)
        if self.memory_accounting not in ("installed", "used"):
            raise ValueError(
                f"cost.memory_accounting must be 'installed' or 'used', got {self.memory_accounting!r}"
            )
        if not isinstance(self.memory, Mapping):
            raise ValueError(f"cost.memory must map tiers to prices, got {self.memory!r}")
        for tier, price in self.memory.items():
            _check_memory(tier, price)

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any]) -> CostModel:
        """Build from a config section; ValueError names an unknown key and the nearest known one."""
        known = [entry.name for entry in fields(cls)]
        _refuse_unknown("cost", options, known)
        return cls(**options)

    def capital_usd_per_s(self, used_bytes: Mapping[str, int] | None = None) -> float:
        """Price of the hardware per second of its paid life.

        Args:
            used_bytes: bytes in use by tier; needed with ``memory_accounting="used"``.
        """
        total = self.device_usd + self.host_usd
        for tier, price in self.memory.items():
            total += price.get("usd_per_gib", 0.0) * self._gib(tier, price, used_bytes)
        return total / (self.lifetime_years * _SECONDS_PER_YEAR * self.utilisation)

    def _gib(self, tier: str, price: Mapping[str, float], used_bytes: Mapping[str, int] | None) -> float:
        if self.memory_accounting == "installed":
            return price.get("installed_gib", 0.0)
        if used_bytes is None:
            raise ValueError(
                "cost.memory_accounting 'used' needs the bytes in use; the workload reports none: "
                "use 'installed'"
            )
        return used_bytes.get(tier, 0) / 2**30

    def energy_usd(self, joules: float) -> float:
        """Price of ``joules`` drawn by the machine, the site's overhead included."""
        return joules * self.pue * self.usd_per_kwh / _JOULES_PER_KWH

    def usd(
        self, seconds: float, joules: float | None = None, used_bytes: Mapping[str, int] | None = None
    ) -> float:
        """Price of ``seconds`` of work; without measured ``joules``, of ``watts * seconds``."""
        if self.usd_per_hour is not None:
            return seconds * self.usd_per_hour / 3600
        energy = self.watts * seconds if joules is None else joules
        return seconds * self.capital_usd_per_s(used_bytes) + self.energy_usd(energy)


def _check_memory(tier: str, price: object) -> None:
    if not isinstance(price, Mapping):
        raise ValueError(f"cost.memory.{tier} must have {' and '.join(_MEMORY_KEYS)}, got {price!r}")
    _refuse_unknown(f"cost.memory.{tier}", price, _MEMORY_KEYS)
    for key, value in price.items():
        _require(f"cost.memory.{tier}.{key}", value, minimum=0)


def _refuse_unknown(where: str, options: Mapping[str, Any], known: tuple[str, ...] | list[str]) -> None:
    for key in options:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise ValueError(f"{where}.{key}: unknown key; {hint}")


def _require(
    name: str,
    value: object,
    *,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise ValueError(f"{name} must be a number, got {value!r}")
    if minimum is not None and value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    if above is not None and value <= above:
        raise ValueError(f"{name} must be above {above}, got {value}")
    if maximum is not None and value > maximum:
        raise ValueError(f"{name} must be at most {maximum}, got {value}")
