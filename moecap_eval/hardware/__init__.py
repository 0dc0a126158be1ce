"""What a machine can do: stated by a profile with sources, or measured here."""

from __future__ import annotations

from moecap_eval.hardware.probe import Peaks, measure_peaks
from moecap_eval.hardware.profiles import (
    Figure,
    HardwareProfile,
    MemoryTier,
    list_profiles,
    load_hardware,
)

__all__ = [
    "Figure",
    "HardwareProfile",
    "MemoryTier",
    "Peaks",
    "list_profiles",
    "load_hardware",
    "measure_peaks",
]
