"""Memory below the GPU, shared by the plugins: pinned memory, direct reads, ordered copies, gathers, probes.

Names are resolved on first use, so that importing the package touches no device and needs no Triton.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tiered_memory.arena import PinnedArena
    from tiered_memory.copy_engine import Copy, CopyEngine, SimulatedClock, SimulatedCopyEngine
    from tiered_memory.direct_io import DirectReader
    from tiered_memory.gather import gather_rows, gather_segments, peer_access, row_code
    from tiered_memory.probe import Bandwidth, measure_bandwidth

__all__ = [
    "Bandwidth",
    "Copy",
    "CopyEngine",
    "DirectReader",
    "PinnedArena",
    "SimulatedClock",
    "SimulatedCopyEngine",
    "gather_rows",
    "gather_segments",
    "measure_bandwidth",
    "peer_access",
    "row_code",
]

_MODULE_OF = {
    "Bandwidth": "probe",
    "Copy": "copy_engine",
    "CopyEngine": "copy_engine",
    "DirectReader": "direct_io",
    "PinnedArena": "arena",
    "SimulatedClock": "copy_engine",
    "SimulatedCopyEngine": "copy_engine",
    "gather_rows": "gather",
    "gather_segments": "gather",
    "measure_bandwidth": "probe",
    "peer_access": "gather",
    "row_code": "gather",
}


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
