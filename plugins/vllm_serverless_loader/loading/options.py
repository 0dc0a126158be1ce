"""How to load, and what a load reports."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

DIRECT_IO_MODES = ("auto", "always", "never")
_UNITS = {
    "": 1,
    **{p: 1000**i for i, p in enumerate("kmgt", 1)},
    **{p + "i": 1024**i for i, p in enumerate("kmgt", 1)},
}


@dataclass(frozen=True)
class LoadOptions:
    """Knobs of a load.

    Attributes:
        io_threads: threads that read; by default one a core, between 4 and 16.
        chunk_bytes: bytes of one read of a safetensors file; our own format is read in the chunks of its
            index.
        staging_chunks: chunks of page-locked memory on the way to a GPU, or read ahead; at least one a thread
            keeps all threads busy.
        direct_io: as ``mode`` of :class:`tiered_memory.DirectReader`.
        verify: compare the checksum of each chunk that comes from disk.
    """

    io_threads: int = field(default_factory=lambda: max(4, min(16, len(os.sched_getaffinity(0)))))
    chunk_bytes: int = 16 << 20
    staging_chunks: int = 16
    direct_io: Literal["auto", "always", "never"] = "auto"
    verify: bool = True

    def __post_init__(self) -> None:
        for name in ("io_threads", "staging_chunks"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if type(self.chunk_bytes) is not int or self.chunk_bytes < 4096 or self.chunk_bytes % 4096:
            raise ValueError(f"chunk_bytes must be a positive multiple of 4096, got {self.chunk_bytes!r}")
        if self.direct_io not in DIRECT_IO_MODES:
            raise ValueError(f"direct_io must be one of {', '.join(DIRECT_IO_MODES)}; got {self.direct_io!r}")
        if not isinstance(self.verify, bool):
            raise ValueError(f"verify must be true or false, got {self.verify!r}")


def parse_size(text: str) -> int:
    """Bytes of a text such as ``"64GiB"`` or ``"500MB"``.

    Raises:
        ValueError: not a positive size.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    if match is None or match[2] not in _UNITS or float(match[1]) <= 0:
        raise ValueError(f"a size must be bytes or text such as 64GiB or 500MB, got {text!r}")
    return int(float(match[1]) * _UNITS[match[2]])


def check_names(given: Iterable[str], known: Iterable[str], what: str) -> None:
    """Refuse unknown names.

    Raises:
        ValueError: the first unknown one, with the nearest known one.
    """
    known = list(known)
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
            raise ValueError(f"{what}: unknown key {name!r}; {hint}")


def options_from(values: Mapping[str, Any], what: str) -> LoadOptions:
    """LoadOptions of a mapping.

    Raises:
        ValueError: an unknown key, or a bad value.
    """
    check_names(values, [item.name for item in dataclasses.fields(LoadOptions)], what)
    return LoadOptions(**values)


@dataclass(frozen=True)
class LoadReport:
    """One finished load.

    Attributes:
        num_bytes: bytes of the checkpoint that were delivered.
        seconds: from the call to the last byte in place.
        source: slowest tier that was used: ``"remote"``, ``"disk"`` or ``"host"``.
        bytes_read: bytes taken from each tier.
    """

    num_bytes: int
    seconds: float
    source: str
    bytes_read: Mapping[str, int] = field(default_factory=dict)

    @property
    def bandwidth(self) -> float:
        """Bytes per second."""
        return self.num_bytes / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True)
class LoadResult:
    """Tensors by name, and how they came."""

    tensors: Mapping[str, Tensor]
    report: LoadReport
