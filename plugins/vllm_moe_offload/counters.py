"""Counters of one pool of slots, and bytes moved by this process."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

_moved: Counter[str] = Counter()


@dataclass
class CacheStats:
    """Counters since the pool was made. ``accesses == hits + late + misses`` always.

    Attributes:
        accesses: distinct experts requested, summed over layers and steps.
        hits: of these, resident when requested.
        late: of these, on their way into a slot.
        misses: of these, neither.
        evictions: experts that lost their slot to another one.
        prefetched: copies started ahead of need.
        prefetch_used: of these, requested before they were evicted.
        copies: copies from host to device.
        bytes_host_to_device: ``copies`` times the bytes of an expert's tensors.
        in_place: misses that were read from host memory without being copied.
        bytes_disk_to_host: bytes read from the file of experts.
        waves: passes over parts of a layer's experts beyond the first one of each layer and step.
        stall_seconds: time that layers waited for experts, as far as the host can see it.
    """

    accesses: int = 0
    hits: int = 0
    late: int = 0
    misses: int = 0
    evictions: int = 0
    prefetched: int = 0
    prefetch_used: int = 0
    copies: int = 0
    bytes_host_to_device: int = 0
    in_place: int = 0
    bytes_disk_to_host: int = 0
    waves: int = 0
    stall_seconds: float = 0.0

    def as_dict(self) -> dict[str, int | float]:
        """The counters by name."""
        return dict(vars(self))


def count_moved(link: str, nbytes: int) -> None:
    """Add to what :func:`moved_bytes` reports."""
    _moved[link] += nbytes


def moved_bytes() -> dict[str, int]:
    """Bytes this process moved over each link since the last call: ``"dram->hbm"``, ``"disk->dram"``.

    Reads in place count like copies: the bytes cross the same link.

    On a CPU, where expert slots are memory like any other, ``"dram->hbm"`` counts the copies into slots.
    """
    return {link: _moved.pop(link, 0) for link in ("dram->hbm", "disk->dram")}
