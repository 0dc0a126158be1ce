"""Hardware profiles: peaks and capacities of machines, each figure with its source and date."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from moecap_eval.hardware.probe import Peaks

_FOLDER = resources.files("moecap_eval.hardware") / "profiles"
_KEYS = ("name", "tiers", "flops_per_s", "tdp_w", "links")


@dataclass(frozen=True)
class Figure:
    """A number with where it comes from and when that was stated (ISO date)."""

    value: float
    source: str
    date: str


@dataclass(frozen=True)
class MemoryTier:
    """Capacity and bandwidth of one tier."""

    bytes: int
    bytes_per_s: float
    source: str
    date: str


@dataclass(frozen=True)
class HardwareProfile:
    """One machine. ``flops_per_s`` holds dense peaks by dtype, ``links`` bytes per second between tiers.

    ``tdp_w`` is None where it is unknown.
    """

    name: str
    tiers: Mapping[str, MemoryTier]
    flops_per_s: Mapping[str, Figure]
    tdp_w: Figure | None = None
    links: Mapping[str, Figure] = field(default_factory=dict)

    @property
    def fast_tier(self) -> str:
        """The tier the processor computes from: ``hbm`` where there is one."""
        return "hbm" if "hbm" in self.tiers else "dram"

    @property
    def peak_bytes_per_s(self) -> float:
        """Bandwidth of the fast tier."""
        return self.tiers[self.fast_tier].bytes_per_s

    def peak_flops_per_s(self, dtype: str) -> float:
        """Dense peak of ``dtype``; ValueError lists what the profile knows."""
        name = dtype.removeprefix("torch.")
        if name not in self.flops_per_s:
            raise ValueError(
                f"hardware profile {self.name!r} has no FLOP/s for {name} "
                f"(it has {', '.join(self.flops_per_s)})"
            )
        return self.flops_per_s[name].value

    def with_peaks(self, peaks: Peaks | Mapping[str, Any], date: str) -> HardwareProfile:
        """This machine with measured rates in place of the stated ones; capacities stay."""
        measured = peaks if isinstance(peaks, Peaks) else Peaks(**peaks)
        source = "measured by moecap_eval.measure_peaks"
        fast = replace(
            self.tiers[self.fast_tier], bytes_per_s=measured.read_bytes_per_s, source=source, date=date
        )
        rates = {dtype: Figure(value, source, date) for dtype, value in measured.flops_per_s.items()}
        return replace(
            self,
            tiers={**self.tiers, self.fast_tier: fast},
            flops_per_s={**self.flops_per_s, **rates},
        )


def list_profiles() -> list[str]:
    """Names of the profiles that ship with the harness."""
    names = [entry.name for entry in _FOLDER.iterdir()]
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def load_hardware(name_or_path: str | Path) -> HardwareProfile:
    """Load a shipped profile by name or any profile by path.

    Raises:
        ValueError: an unknown name (with the nearest), or a file in which a figure lacks source or date.
        FileNotFoundError: a path that does not exist.
    """
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml"):
        text, where = path.read_text(), str(path)
    else:
        names = list_profiles()
        if str(name_or_path) not in names:
            near = difflib.get_close_matches(str(name_or_path), names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"unknown hardware profile {str(name_or_path)!r}{hint} (known: {', '.join(names)}; "
                "or give the path of a YAML file)"
            )
        text, where = (_FOLDER / f"{name_or_path}.yaml").read_text(), f"profile {name_or_path}"
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{where}: not valid YAML: {error}") from error
    return _parse(data, where)


def _parse(data: Any, where: str) -> HardwareProfile:
    if not isinstance(data, Mapping):
        raise ValueError(f"{where}: expected a mapping with {', '.join(_KEYS)}")
    for key in data:
        if key not in _KEYS:
            raise ValueError(f"{where}: unknown key {key!r} (known: {', '.join(_KEYS)})")
    for key in ("name", "tiers", "flops_per_s"):
        if not data.get(key):
            raise ValueError(f"{where}: {key} is missing")
    tiers = {tier: _tier(entry, f"{where}: tiers.{tier}") for tier, entry in data["tiers"].items()}
    if not {"hbm", "dram"} & tiers.keys():
        raise ValueError(f"{where}: tiers needs hbm or dram")
    return HardwareProfile(
        name=str(data["name"]),
        tiers=tiers,
        flops_per_s=_figures(data["flops_per_s"], f"{where}: flops_per_s"),
        tdp_w=_figure(data["tdp_w"], f"{where}: tdp_w") if data.get("tdp_w") else None,
        links=_figures(data.get("links") or {}, f"{where}: links"),
    )


def _fields(entry: Any, names: tuple[str, ...], where: str) -> dict[str, Any]:
    if not isinstance(entry, Mapping) or set(entry) != set(names):
        raise ValueError(f"{where} needs exactly {', '.join(names)}; got {entry!r}")
    for name in names[:-2]:
        value = entry[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise ValueError(f"{where}.{name} must be a positive number, got {value!r}")
    return {**entry, "source": str(entry["source"]), "date": str(entry["date"])}


def _tier(entry: Any, where: str) -> MemoryTier:
    values = _fields(entry, ("bytes", "bytes_per_s", "source", "date"), where)
    return MemoryTier(int(values["bytes"]), float(values["bytes_per_s"]), values["source"], values["date"])


def _figure(entry: Any, where: str) -> Figure:
    values = _fields(entry, ("value", "source", "date"), where)
    return Figure(float(values["value"]), values["source"], values["date"])


def _figures(entries: Any, where: str) -> dict[str, Figure]:
    if not isinstance(entries, Mapping):
        raise ValueError(f"{where}: expected a mapping, got {entries!r}")
    return {str(name): _figure(entry, f"{where}.{name}") for name, entry in entries.items()}
