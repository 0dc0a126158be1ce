"""Energy of a window of time. A meter that cannot tell answers None, never 0.

``nvml`` reads the GPUs' energy counters, ``rapl`` the processors' (Intel and AMD, Linux powercap), ``tdp``
multiplies a stated power by time, ``none`` knows nothing.
"""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_POWERCAP = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Energy:
    """Energy of a window; ``joules`` is None where unknown, ``source`` then is ``"none"``."""

    joules: float | None
    source: str


_UNKNOWN = Energy(None, "none")


class EnergyMeter(ABC):
    """Measures between ``begin`` and ``end``."""

    source: str
    min_window_s: float = 0.0

    def __init__(self) -> None:
        self._begun_s: float | None = None

    def begin(self) -> None:
        """Open the window."""
        self._start()
        self._begun_s = time.perf_counter()

    def end(self) -> Energy:
        """Close the window.

        Raises:
            RuntimeError: ``begin`` was not called.
        """
        if self._begun_s is None:
            raise RuntimeError("EnergyMeter.end() without begin()")
        seconds, self._begun_s = time.perf_counter() - self._begun_s, None
        if seconds < self.min_window_s:
            return _UNKNOWN  # shorter than the counter's period: a reading would be noise
        joules = self._joules(seconds)
        return _UNKNOWN if joules is None else Energy(joules, self.source)

    @abstractmethod
    def _start(self) -> None:
        """Read the counters."""

    @abstractmethod
    def _joules(self, seconds: float) -> float | None:
        """Energy since ``_start``, None where the counters fail."""


class NoMeter(EnergyMeter):
    """Knows nothing."""

    source = "none"

    def _start(self) -> None:
        pass

    def _joules(self, seconds: float) -> float | None:
        return None


class TdpMeter(EnergyMeter):
    """Power times time: an upper estimate, labelled as such by its source."""

    source = "tdp"

    def __init__(self, watts: float) -> None:
        super().__init__()
        if watts <= 0:
            raise ValueError(f"watts must be positive, got {watts}")
        self._watts = watts

    def _start(self) -> None:
        pass

    def _joules(self, seconds: float) -> float | None:
        return self._watts * seconds


class RaplMeter(EnergyMeter):
    """Running average power limit counters of all processor packages.

    Args:
        root: the powercap folder.

    Raises:
        OSError: no readable package counter there.
    """

    source = "rapl"
    min_window_s = 0.01

    def __init__(self, root: Path = _POWERCAP) -> None:
        super().__init__()
        # intel-rapl:0 is a package; intel-rapl:0:1 a part of it, already counted.
        self._zones = sorted(zone for zone in root.glob("intel-rapl:*") if zone.name.count(":") == 1)
        if not self._zones:
            raise FileNotFoundError(f"{root} has no intel-rapl package (common on virtual machines)")
        self._ranges = [int((zone / "max_energy_range_uj").read_text()) for zone in self._zones]
        self._before = self._read()

    def _read(self) -> list[int]:
        return [int((zone / "energy_uj").read_text()) for zone in self._zones]

    def _start(self) -> None:
        self._before = self._read()

    def _joules(self, seconds: float) -> float | None:
        try:
            after = self._read()
        except OSError:
            return None
        # A counter starts anew above its range; windows are far shorter than a whole turn (minutes).
        spans = zip(self._before, after, self._ranges, strict=True)
        return sum((now - was) % (span + 1) for was, now, span in spans) / 1e6


class NvmlMeter(EnergyMeter):
    """Energy counters of the visible NVIDIA GPUs (Volta and later).

    Raises:
        OSError: no driver, no GPU, or no permission; the message says which.
        ImportError: nvidia-ml-py is not installed.
    """

    source = "nvml"
    min_window_s = 0.1

    def __init__(self) -> None:
        super().__init__()
        import pynvml

        self._nvml = pynvml
        try:
            pynvml.nvmlInit()
            self._devices = self._visible_devices()
            self._before = self._read()
        except pynvml.NVMLError as error:
            raise OSError(f"NVML energy counters are not available: {error}") from error
        if not self._devices:
            raise OSError("NVML sees no GPU")

    def _visible_devices(self) -> list[Any]:
        nvml = self._nvml
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if visible is None:
            return [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
        names = [name.strip() for name in visible.split(",") if name.strip()]
        return [
            nvml.nvmlDeviceGetHandleByIndex(int(name))
            if name.isdecimal()
            else nvml.nvmlDeviceGetHandleByUUID(name)
            for name in names
        ]

    def _read(self) -> list[int]:
        return [self._nvml.nvmlDeviceGetTotalEnergyConsumption(device) for device in self._devices]

    def _start(self) -> None:
        self._before = self._read()

    def _joules(self, seconds: float) -> float | None:
        try:
            after = self._read()
        except self._nvml.NVMLError:
            return None
        return sum(now - was for was, now in zip(self._before, after, strict=True)) / 1e3


def open_meter(tdp_w: float | None = None) -> EnergyMeter:
    """The best meter this machine offers: GPU counters, processor counters, ``tdp_w``, or none."""
    for make in (NvmlMeter, RaplMeter):
        try:
            return make()
        except (OSError, ImportError):
            continue
    return NoMeter() if tdp_w is None else TdpMeter(tdp_w)
